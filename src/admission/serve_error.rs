//! Everything that a request can end with, other than success.

use std::time::Duration;

use super::quota::TenantLimit;

/// One problem of a request's field or of a dataset's line.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Violation {
    /// The field (`sampling.top_p`) or line (`line 12 /completion`).
    pub field: String,
    /// Stable code, e.g. `MISSING_FIELD`; may be empty.
    pub code: String,
    /// What was wrong and what is accepted.
    pub message: String,
}

/// Everything that a request can end with, other than success. One place (`grpc/status.rs`) maps it to codes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ServeError {
    /// Bad input. Code INVALID_ARGUMENT, reason `INVALID_REQUEST`, field violations attached.
    #[error("{}", Violations(.0))]
    Invalid(Vec<Violation>),
    /// No such delta or version, or another tenant's: the same answer. NOT_FOUND, `DELTA_NOT_FOUND`.
    #[error("no delta {0:?}")]
    DeltaNotFound(String),
    /// No such job, dataset or model, or another tenant's. NOT_FOUND, `NOT_FOUND`.
    #[error("no {kind} {name:?}")]
    NotFound {
        /// `job`, `dataset`, `model of job`.
        kind: &'static str,
        /// As asked for.
        name: String,
    },
    /// A job has no checkpoint of that step. NOT_FOUND, `NOT_FOUND`.
    #[error("{0}")]
    NoCheckpoint(String),
    /// The delta belongs to another base. FAILED_PRECONDITION, `BASE_MISMATCH`.
    #[error("the delta was made for another base: {0}")]
    BaseMismatch(String),
    /// The delta or the base cannot do this task. FAILED_PRECONDITION, `WRONG_TASK`.
    #[error("{0}")]
    WrongTask(String),
    /// The numbers of this request overflowed: weights or scale of its delta do not suit the base. FAILED_PRECONDITION,
    /// `NON_FINITE`.
    #[error("the model's output is not finite: the delta's weights or its scale are too large for this base")]
    NonFinite,
    /// The name exists (policy create). ALREADY_EXISTS, `PUBLISH_CONFLICT`.
    #[error("delta {0:?} exists already; use upsert or compare-and-swap to replace it")]
    AlreadyExists(String),
    /// The expected version is not the current one. ABORTED, `PUBLISH_CONFLICT`.
    #[error("{0}")]
    Conflict(String),
    /// The job's state does not allow it. FAILED_PRECONDITION, `JOB_STATE`.
    #[error("{0}")]
    JobState(String),
    /// A job cannot go on from where it stopped. FAILED_PRECONDITION, `CANNOT_RESUME`.
    #[error("the job cannot go on: {0}")]
    CannotResume(String),
    /// An idempotency key was used with another request. ALREADY_EXISTS, `IDEMPOTENCY_CONFLICT`.
    #[error("idempotency key {0:?} was used with a different request")]
    IdempotencyConflict(String),
    /// No permit. RESOURCE_EXHAUSTED, `OVERLOADED`, RetryInfo.
    #[error("overloaded: {0}")]
    Overloaded(String),
    /// The tenant is at a limit of its own. RESOURCE_EXHAUSTED, reason of the limit, QuotaFailure, RetryInfo where waiting
    /// helps.
    #[error("{limit}")]
    TenantLimit {
        /// Which one.
        limit: TenantLimit,
        /// When a request may be accepted; `None`: not before something is deleted.
        retry: Option<Duration>,
    },
    /// The tenant is being deleted. UNAVAILABLE, `TENANT_DELETING`, RetryInfo.
    #[error("{0}")]
    TenantDeleting(String),
    /// What this caller may not do. PERMISSION_DENIED, `PERMISSION_DENIED`.
    #[error("{0}")]
    NotAllowed(String),
    /// The audit log cannot be written, and must be. UNAVAILABLE, `AUDIT_UNAVAILABLE`, RetryInfo.
    #[error("{0}")]
    AuditUnavailable(String),
    /// Every resident byte is leased. RESOURCE_EXHAUSTED, `RESIDENT_BUDGET`, RetryInfo.
    #[error("the resident budget is full of deltas in use: {0}")]
    ResidentBudget(String),
    /// Full fine-tuning has no room: now (RESOURCE_EXHAUSTED, RetryInfo), or on this server at all (FAILED_PRECONDITION).
    /// `NOT_ENOUGH_MEMORY`.
    #[error("{message}")]
    NotEnoughMemory {
        /// The numbers.
        message: String,
        /// Whether it is the same at any other time.
        lasting: bool,
    },
    /// A constraint has no room: now (RetryInfo), or on this server at all. RESOURCE_EXHAUSTED, `CONSTRAINT_MEMORY`.
    #[error("{message}")]
    ConstraintMemory {
        /// The numbers.
        message: String,
        /// Whether it is the same at any other time.
        lasting: bool,
    },
    /// A stored delta does not match its digest. DATA_LOSS, `DELTA_CORRUPT`.
    #[error("stored delta {0:?} is corrupt")]
    Corrupt(String),
    /// A delta's load failed a moment ago, and is not tried again yet. Code and reason of `error`; RetryInfo.
    #[error("{error}; it is tried again in {:.1} s", .retry.as_secs_f64())]
    Failing {
        /// How it failed.
        error: Box<ServeError>,
        /// When it is tried again.
        retry: Duration,
    },
    /// The server is draining. UNAVAILABLE, `DRAINING`.
    #[error("the server is shutting down")]
    Draining,
    /// The trainer thread has ended; the rest serves. UNAVAILABLE, `TRAINING_DOWN`.
    #[error("training is down until the server is restarted; its jobs go on then")]
    TrainingDown,
    /// The database or the blob store does not answer; the text is logged, not sent. UNAVAILABLE, `STORE_UNAVAILABLE`,
    /// RetryInfo.
    #[error("the store does not answer; the server's log has the details")]
    StoreUnavailable(String),
    /// The deadline passed. DEADLINE_EXCEEDED, `DEADLINE_EXCEEDED`.
    #[error("the deadline passed after {0:?}")]
    DeadlineExceeded(Duration),
    /// The client left or the job was cancelled. CANCELLED, `CANCELLED`.
    #[error("cancelled")]
    Cancelled,
    /// Our fault; the text is logged, not sent. INTERNAL, `INTERNAL`.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ServeError {
    /// A single field violation.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), code: String::new(), message: message.into() }])
    }

    /// The tenant is being deleted, and takes no calls meanwhile.
    pub(crate) fn deleting() -> Self {
        Self::TenantDeleting("this tenant is being deleted; it takes no calls until that is done".into())
    }

    /// Problems of the files that the server made for a request, as problems of the field of that request.
    pub(super) fn of_files(self, field: &str) -> Self {
        let Self::Invalid(mut found) = self else { return self };
        for violation in found.iter_mut().filter(|v| v.field.starts_with("files")) {
            field.clone_into(&mut violation.field);
        }
        Self::Invalid(found)
    }

    /// The stable machine-readable reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID_REQUEST",
            Self::DeltaNotFound(_) => "DELTA_NOT_FOUND",
            Self::NotFound { .. } | Self::NoCheckpoint(_) => "NOT_FOUND",
            Self::BaseMismatch(_) => "BASE_MISMATCH",
            Self::WrongTask(_) => "WRONG_TASK",
            Self::NonFinite => "NON_FINITE",
            Self::AlreadyExists(_) | Self::Conflict(_) => "PUBLISH_CONFLICT",
            Self::JobState(_) => "JOB_STATE",
            Self::CannotResume(_) => "CANNOT_RESUME",
            Self::IdempotencyConflict(_) => "IDEMPOTENCY_CONFLICT",
            Self::Overloaded(_) => "OVERLOADED",
            Self::TenantLimit { limit, .. } => limit.reason(),
            Self::TenantDeleting(_) => "TENANT_DELETING",
            Self::NotAllowed(_) => "PERMISSION_DENIED",
            Self::AuditUnavailable(_) => "AUDIT_UNAVAILABLE",
            Self::ResidentBudget(_) => "RESIDENT_BUDGET",
            Self::NotEnoughMemory { .. } => "NOT_ENOUGH_MEMORY",
            Self::ConstraintMemory { .. } => "CONSTRAINT_MEMORY",
            Self::Corrupt(_) => "DELTA_CORRUPT",
            Self::Failing { error, .. } => error.reason(),
            Self::Draining => "DRAINING",
            Self::TrainingDown => "TRAINING_DOWN",
            Self::StoreUnavailable(_) => "STORE_UNAVAILABLE",
            Self::DeadlineExceeded(_) => "DEADLINE_EXCEEDED",
            Self::Cancelled => "CANCELLED",
            Self::Internal(_) => "INTERNAL",
        }
    }
}

/// Prints the first few violations on one line.
struct Violations<'a>(&'a [Violation]);

impl std::fmt::Display for Violations<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, v) in self.0.iter().take(5).enumerate() {
            let sep = if i > 0 { "; " } else { "" };
            write!(f, "{sep}{}: {}", v.field, v.message)?;
        }
        match self.0.len() {
            0..=5 => Ok(()),
            n => write!(f, "; and {} more", n - 5),
        }
    }
}

/// When a limit that passes by itself is asked about again.
const PASSES: Duration = Duration::from_secs(1);

impl From<TenantLimit> for ServeError {
    fn from(limit: TenantLimit) -> Self {
        let passes = !matches!(limit, TenantLimit::Amount { item, .. } if !item.passes());
        metrics::counter!(crate::telemetry::names::REFUSALS, "reason" => limit.reason().to_ascii_lowercase())
            .increment(1);
        Self::TenantLimit { limit, retry: passes.then_some(PASSES) }
    }
}
