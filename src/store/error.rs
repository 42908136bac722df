//! What can go wrong in the store, and what a client is told of it.

use std::path::PathBuf;

use crate::{
    admission::params::{ServeError, TenantLimit},
    ids::{BlobId, DeltaId},
};

/// An operation of the store failed. Nothing of it is visible then.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process (or another `Store` of this one) has the directory open.
    #[error("{} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The disk of the data directory is too full.
    #[error("{need} bytes are needed in the data directory, whose disk has {free} left")]
    DiskFull {
        /// Bytes that are needed.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The database refused.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// The database is of another version, or its migration failed.
    #[error("database migration: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The blob store refused.
    #[error("blob store: {0}")]
    Blob(#[from] object_store::Error),
    /// A row holds what this program never writes.
    #[error("row of {table}: {detail}")]
    Row {
        /// Which table.
        table: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// A blob is missing or its bytes are not those of its digest.
    #[error("blob {blob} is corrupt: {reason}")]
    Corrupt {
        /// Which blob.
        blob: BlobId,
        /// What was found.
        reason: String,
    },
    /// No such thing for this tenant.
    #[error("no {kind} {name:?}")]
    NotFound {
        /// `delta`, `dataset`, `job`, `blob`.
        kind: &'static str,
        /// As asked for.
        name: String,
    },
    /// The name has a live version and the policy was create.
    #[error("delta {0:?} exists already")]
    AlreadyExists(String),
    /// The expected version is not the current one.
    #[error("delta {name:?}: expected current version {expected}, found {}", found(.current))]
    Conflict {
        /// The delta's name.
        name: String,
        /// What the caller expected.
        expected: DeltaId,
        /// What is current; `None`: nothing.
        current: Option<DeltaId>,
    },
    /// The current version cannot be deleted while others remain.
    #[error("delta {name:?}: version {number} is current; move the name to another version first, or delete the name")]
    IsCurrent {
        /// The delta's name.
        name: String,
        /// The version's number.
        number: u64,
    },
    /// An idempotency key was used with another request.
    #[error("idempotency key {0:?} was used with a different request")]
    IdempotencyConflict(String),
    /// The job is in a terminal state: its history is closed.
    #[error("job {id} has ended: {state}")]
    JobEnded {
        /// Which job.
        id: String,
        /// Its terminal state.
        state: String,
    },
    /// The tenant is at a limit of its own.
    #[error("{0}")]
    Quota(TenantLimit),
    /// The tenant is being deleted: nothing new is stored for it.
    #[error("the tenant is being deleted")]
    TenantClosed,
    /// An argument is outside what is accepted.
    #[error("{field}: {message}")]
    Invalid {
        /// Which argument.
        field: &'static str,
        /// What is accepted.
        message: String,
    },
    /// A background task of the runtime was lost (shutdown or panic).
    #[error("task lost: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl StoreError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn row(table: &'static str, detail: impl ToString) -> Self {
        Self::Row { table, detail: detail.to_string() }
    }
}

fn found(current: &Option<DeltaId>) -> String {
    current.map_or_else(|| "none".to_owned(), |id| id.to_string())
}

impl From<StoreError> for ServeError {
    fn from(e: StoreError) -> Self {
        Self::from(&e)
    }
}

impl From<&StoreError> for ServeError {
    fn from(e: &StoreError) -> Self {
        match e {
            StoreError::Corrupt { blob, .. } => Self::Corrupt(blob.to_string()),
            StoreError::NotFound { kind: "delta", name } => Self::DeltaNotFound(name.clone()),
            StoreError::NotFound { kind, name } => Self::NotFound { kind, name: name.clone() },
            StoreError::AlreadyExists(name) => Self::AlreadyExists(name.clone()),
            StoreError::Conflict { .. } | StoreError::IsCurrent { .. } | StoreError::JobEnded { .. } => {
                Self::Conflict(e.to_string())
            }
            StoreError::IdempotencyConflict(key) => Self::IdempotencyConflict(key.clone()),
            StoreError::Invalid { field, message } => Self::field(*field, message.clone()),
            StoreError::Quota(limit) => (*limit).into(),
            StoreError::TenantClosed => Self::deleting(),
            StoreError::Locked(_)
            | StoreError::Io { .. }
            | StoreError::DiskFull { .. }
            | StoreError::Database(_)
            | StoreError::Migrate(_)
            | StoreError::Blob(_)
            | StoreError::Row { .. }
            | StoreError::Task(_) => Self::Internal(e.to_string()),
        }
    }
}
