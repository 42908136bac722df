//! What can go wrong between a name and a lease, and what a client is told of it.

use std::{sync::Arc, time::Duration};

use crate::{
    admission::params::{ServeError, TenantLimit},
    ids::{BaseFingerprint, NameError},
    store::StoreError,
};

/// Why a loader refused a version's files.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LoadError {
    /// The files are not a delta that this base can apply.
    #[error("{0}")]
    Invalid(String),
    /// They are of another base.
    #[error("{0}")]
    BaseMismatch(String),
    /// Not the files' fault: memory, device, a panic.
    #[error("{0}")]
    Failed(String),
}

/// An operation of the registry failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// No such delta or version, or another tenant's: the same answer.
    #[error("no delta {0:?}")]
    NotFound(String),
    /// A delta reference that cannot be one.
    #[error("delta reference {text:?} {detail}")]
    BadReference {
        /// As given.
        text: String,
        /// What is accepted.
        detail: String,
    },
    /// A name outside what is accepted.
    #[error("name {0}")]
    BadName(#[from] NameError),
    /// The version was made for another base.
    #[error("delta {name:?} was made for base {}, this server runs {}", .delta.short(), .base.short())]
    BaseMismatch {
        /// The delta asked for.
        name: String,
        /// The base that it was made for.
        delta: BaseFingerprint,
        /// The resident base.
        base: BaseFingerprint,
    },
    /// The stored version is missing bytes or has other ones, or no longer decodes.
    #[error("stored delta {name:?} is corrupt: {detail}")]
    Corrupt {
        /// The delta asked for.
        name: String,
        /// What was found.
        detail: String,
    },
    /// One delta needs more than the whole budget.
    #[error("a delta of {bytes} bytes does not fit the resident budget of {budget} bytes")]
    TooLarge {
        /// What it needs.
        bytes: u64,
        /// What there is.
        budget: u64,
    },
    /// Everything resident is leased or pinned.
    #[error("{needed} bytes needed, {used} of {budget} in use")]
    BudgetFull {
        /// What was asked for.
        needed: u64,
        /// What is in use.
        used: u64,
        /// What there is.
        budget: u64,
    },
    /// Pins may take half of the budget.
    #[error("pinned deltas would take {needed} bytes; at most {allowed} may be pinned")]
    PinBudget {
        /// What all pins would take.
        needed: u64,
        /// What they may take.
        allowed: u64,
    },
    /// The tenant's own share of the memory is in use.
    #[error("{0}")]
    Quota(TenantLimit),
    /// A change of a tenant that is to be deleted does not end.
    #[error("a change of this tenant's deltas is still under way")]
    Busy,
    /// A load took too long.
    #[error("loading took longer than {0:?}")]
    LoadTimeout(Duration),
    /// A load failed for a reason of our own.
    #[error("loading {name:?} failed: {detail}")]
    LoadFailed {
        /// The delta asked for.
        name: String,
        /// Why.
        detail: String,
    },
    /// Its load failed a moment ago, and is not tried again yet.
    #[error("{error}; it is tried again in {:.1} s", .retry.as_secs_f64())]
    Failing {
        /// How it failed.
        error: Box<RegistryError>,
        /// When it is tried again.
        retry: Duration,
    },
    /// Deltas that do not add up; says which and why.
    #[error("{0}")]
    NotComposable(String),
    /// Nobody waits for it any more.
    #[error("was given up, since nobody waits for it")]
    Abandoned,
    /// The store refused.
    #[error(transparent)]
    Store(Arc<StoreError>),
}

impl From<StoreError> for RegistryError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::NotFound { kind: "delta", name } => Self::NotFound(name),
            e => Self::Store(Arc::new(e)),
        }
    }
}

impl From<tokio::task::JoinError> for RegistryError {
    fn from(e: tokio::task::JoinError) -> Self {
        StoreError::from(e).into()
    }
}

impl From<RegistryError> for ServeError {
    fn from(e: RegistryError) -> Self {
        match &e {
            RegistryError::NotFound(name) => Self::DeltaNotFound(name.clone()),
            RegistryError::BadReference { .. } => Self::field("delta", e.to_string()),
            RegistryError::BadName(error) => Self::field("name", error.to_string()),
            RegistryError::BaseMismatch { .. } => Self::BaseMismatch(e.to_string()),
            RegistryError::Corrupt { name, detail } => {
                tracing::error!(delta = %name, %detail, "stored delta is corrupt");
                Self::Corrupt(name.clone())
            }
            RegistryError::Failing { error, retry } => {
                // the log has it since it happened
                let error = match &**error {
                    RegistryError::Corrupt { name, .. } => Self::Corrupt(name.clone()),
                    other => Self::from(other.clone()),
                };
                Self::Failing { error: Box::new(error), retry: *retry }
            }
            RegistryError::NotComposable(_) => Self::field("deltas", e.to_string()),
            RegistryError::TooLarge { .. } => Self::field("files", e.to_string()),
            RegistryError::BudgetFull { .. } | RegistryError::PinBudget { .. } => Self::ResidentBudget(e.to_string()),
            RegistryError::Quota(limit) => (*limit).into(),
            RegistryError::Busy => Self::TenantDeleting(e.to_string()),
            RegistryError::LoadTimeout(_) => Self::Overloaded(e.to_string()),
            RegistryError::LoadFailed { .. } | RegistryError::Abandoned => Self::Internal(e.to_string()),
            RegistryError::Store(error) => Self::from(&**error),
        }
    }
}
