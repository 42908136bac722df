//! What a tenant may have at most, and what is said where that is reached. Plain numbers: whoever owns what is counted
//! (calls, the store, the trainer, what is resident) asks for a tenant's [`Quota`] and checks it.

use std::sync::Arc;

use crate::ids::TenantId;

/// So much per second, in the long run, and so much at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Per second, over 0.
    pub per_second: f64,
    /// At once, at least 1.
    pub burst: u32,
}

/// The limits of one tenant; `None` = no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quota {
    /// Calls of inference in progress.
    pub max_concurrent: Option<usize>,
    /// Calls of inference.
    pub rate: Option<Rate>,
    /// Tokens of inference, read and generated.
    pub tokens: Option<Rate>,
    /// Names that have a version.
    pub deltas: Option<u64>,
    /// Versions of all names.
    pub versions: Option<u64>,
    /// Bytes of the files of all versions.
    pub stored_bytes: Option<u64>,
    /// Bytes of versions in memory.
    pub resident_bytes: Option<u64>,
    /// Training jobs that wait or run.
    pub train_jobs: Option<u64>,
    /// Bytes of datasets.
    pub dataset_bytes: Option<u64>,
    /// Bytes of models that full fine-tuning made.
    pub model_bytes: Option<u64>,
}

/// Tells a tenant's limits as they are now.
pub type QuotaOf = Arc<dyn Fn(&TenantId) -> Quota + Send + Sync>;

/// What is counted, and not by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuotaItem {
    /// Names that have a version.
    Deltas,
    /// Versions of all names.
    Versions,
    /// Bytes of versions' files.
    StoredBytes,
    /// Bytes of versions in memory.
    ResidentBytes,
    /// Training jobs that wait or run.
    TrainJobs,
    /// Bytes of datasets.
    DatasetBytes,
    /// Bytes of models.
    ModelBytes,
}

impl QuotaItem {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Deltas,
        Self::Versions,
        Self::StoredBytes,
        Self::ResidentBytes,
        Self::TrainJobs,
        Self::DatasetBytes,
        Self::ModelBytes,
    ];

    /// Its name in replies.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deltas => "deltas",
            Self::Versions => "versions",
            Self::StoredBytes => "stored_bytes",
            Self::ResidentBytes => "resident_bytes",
            Self::TrainJobs => "train_jobs",
            Self::DatasetBytes => "dataset_bytes",
            Self::ModelBytes => "model_bytes",
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Deltas => "TENANT_DELTAS",
            Self::Versions => "TENANT_VERSIONS",
            Self::StoredBytes => "TENANT_STORED_BYTES",
            Self::ResidentBytes => "TENANT_RESIDENT_BYTES",
            Self::TrainJobs => "TENANT_TRAIN_JOBS",
            Self::DatasetBytes => "TENANT_DATASET_BYTES",
            Self::ModelBytes => "TENANT_MODEL_BYTES",
        }
    }

    /// What so many of it are called.
    fn words(self) -> &'static str {
        match self {
            Self::Deltas => "deltas",
            Self::Versions => "versions of deltas",
            Self::StoredBytes => "bytes of stored deltas",
            Self::ResidentBytes => "bytes of deltas in memory",
            Self::TrainJobs => "training jobs that wait or run",
            Self::DatasetBytes => "bytes of datasets",
            Self::ModelBytes => "bytes of models",
        }
    }

    /// Whether what is in the way goes by itself.
    pub fn passes(self) -> bool {
        matches!(self, Self::ResidentBytes | Self::TrainJobs)
    }
}

impl Quota {
    /// The limit of an item.
    pub fn of(&self, item: QuotaItem) -> Option<u64> {
        match item {
            QuotaItem::Deltas => self.deltas,
            QuotaItem::Versions => self.versions,
            QuotaItem::StoredBytes => self.stored_bytes,
            QuotaItem::ResidentBytes => self.resident_bytes,
            QuotaItem::TrainJobs => self.train_jobs,
            QuotaItem::DatasetBytes => self.dataset_bytes,
            QuotaItem::ModelBytes => self.model_bytes,
        }
    }

    /// Whether anything of versions is limited.
    pub fn bounds_versions(&self) -> bool {
        self.deltas.is_some() || self.versions.is_some() || self.stored_bytes.is_some()
    }

    /// Whether `asked` more of an item may be had beside the `used` ones.
    ///
    /// # Errors
    /// The limit, with these numbers.
    pub fn check(&self, item: QuotaItem, used: u64, asked: u64) -> Result<(), TenantLimit> {
        match self.of(item) {
            Some(limit) if asked > 0 && used.saturating_add(asked) > limit => {
                Err(TenantLimit::Amount { item, limit, used, asked })
            }
            _ => Ok(()),
        }
    }
}

/// A limit of one tenant that was reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TenantLimit {
    /// So many calls at a time.
    Concurrency(usize),
    /// So many calls per second, and so many at once.
    Rate(f64, u32),
    /// So many tokens per second, and so many at once.
    Tokens(f64, u32),
    /// So much of something.
    Amount {
        /// Of what.
        item: QuotaItem,
        /// The most.
        limit: u64,
        /// What there is.
        used: u64,
        /// What was asked for.
        asked: u64,
    },
}

impl TenantLimit {
    /// The stable machine-readable reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Concurrency(_) => "TENANT_CONCURRENCY",
            Self::Rate(..) => "TENANT_RATE",
            Self::Tokens(..) => "TENANT_TOKENS",
            Self::Amount { item, .. } => item.reason(),
        }
    }

    /// What is limited, as `GetQuota` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Concurrency(_) => "concurrent_calls",
            Self::Rate(..) => "calls_per_second",
            Self::Tokens(..) => "tokens_per_second",
            Self::Amount { item, .. } => item.name(),
        }
    }

    /// The limit and, where it is an amount, how much of it is used.
    pub fn numbers(self) -> (f64, Option<u64>) {
        match self {
            Self::Concurrency(most) => (most as f64, Some(most as u64)),
            Self::Rate(rate, _) | Self::Tokens(rate, _) => (rate, None),
            Self::Amount { limit, used, .. } => (limit as f64, Some(used)),
        }
    }
}

impl std::fmt::Display for TenantLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Concurrency(most) => write!(f, "this tenant has {most} calls in progress, the most that it may have"),
            Self::Rate(rate, burst) => {
                write!(f, "this tenant's calls exceed {rate} per second, {burst} at once: its rate limit")
            }
            Self::Tokens(rate, burst) => {
                write!(f, "this tenant's tokens exceed {rate} per second, {burst} at once: its limit of tokens")
            }
            Self::Amount { item, limit, used, asked } => {
                let words = item.words();
                write!(f, "this tenant has {used} {words} and asked for {asked} more; at most {limit} are allowed")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_the_most_that_there_may_be_and_is_told_with_its_numbers() {
        let quota = Quota { deltas: Some(3), ..Quota::default() };
        assert_eq!(quota.check(QuotaItem::Deltas, 2, 1), Ok(()));
        assert_eq!(quota.check(QuotaItem::Deltas, 9, 0), Ok(()), "who asks for nothing more is not refused");
        assert_eq!(quota.check(QuotaItem::Versions, 1 << 40, 1 << 40), Ok(()));
        let over = quota.check(QuotaItem::Deltas, 3, 1).unwrap_err();
        assert_eq!((over.reason(), over.name(), over.numbers()), ("TENANT_DELTAS", "deltas", (3.0, Some(3))));
        assert_eq!(over.to_string(), "this tenant has 3 deltas and asked for 1 more; at most 3 are allowed");
        assert!(quota.check(QuotaItem::Deltas, u64::MAX, u64::MAX).is_err(), "sums do not overflow");
    }

    #[test]
    fn every_item_has_a_limit_a_name_and_a_reason_of_its_own() {
        let all = |f: fn(QuotaItem) -> &'static str| {
            QuotaItem::ALL.map(f).into_iter().collect::<std::collections::HashSet<_>>()
        };
        assert_eq!((all(QuotaItem::name).len(), all(QuotaItem::reason).len()), (7, 7));
        let quota = Quota {
            deltas: Some(0),
            versions: Some(1),
            stored_bytes: Some(2),
            resident_bytes: Some(3),
            train_jobs: Some(4),
            dataset_bytes: Some(5),
            model_bytes: Some(6),
            ..Quota::default()
        };
        assert_eq!(QuotaItem::ALL.map(|item| quota.of(item)), [0, 1, 2, 3, 4, 5, 6].map(Some));
    }
}
