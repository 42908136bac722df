//! What can go wrong in the store, and what a client is told of it.

use std::{path::PathBuf, time::Duration};

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
    /// A newer version of this program has made the database.
    #[error(
        "the database has the format {found}, and this version of deltaserve knows those up to {known}: \
         run the version that made it, or a newer one"
    )]
    TooNew {
        /// Its format.
        found: u64,
        /// The newest that is known.
        known: u64,
    },
    /// The database or the blob store is too slow or gone.
    #[error("{of} did not answer within {waited:?}")]
    NoAnswer {
        /// Which.
        of: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The job belongs to another server now: what this one says of it no longer counts.
    #[error("job {0} belongs to another server")]
    NotOwner(String),
    /// Bytes were named so late that they may have been collected.
    #[error("too much time passed between storing bytes and naming them; they must be stored again")]
    HoldExpired,
    /// Another process of the same server has taken over.
    #[error("another process of this server has taken its place")]
    Replaced,
    /// Database and blob store are not of each other.
    #[error("{0}")]
    Mismatch(String),
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

    /// Whether the database or a bucket is out of reach or overloaded, so that the same may go well a moment later.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::NoAnswer { .. } | Self::HoldExpired => true,
            Self::Database(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => true,
            // PostgreSQL's classes of five characters: connection, resources, intervention (timeouts, too), time in transaction
            Self::Database(sqlx::Error::Database(e)) => e.code().is_some_and(|code| {
                code.len() == 5 && (["08", "53", "57"].iter().any(|class| code.starts_with(class)) || code == "25P03")
            }),
            Self::Blob(object_store::Error::Generic { store, .. }) => ["S3", "GCS", "MicrosoftAzure"].contains(store),
            _ => false,
        }
    }

    /// What a failpoint was told to fail with.
    #[cfg(feature = "failpoints")]
    pub(super) fn injected(message: Option<String>) -> Self {
        Self::io("failpoint")(std::io::Error::other(message.unwrap_or_else(|| "injected".to_owned())))
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
            StoreError::NotOwner(_) => Self::Conflict(e.to_string()),
            e if e.may_pass() => Self::StoreUnavailable(e.to_string()),
            StoreError::Quota(limit) => (*limit).into(),
            StoreError::TenantClosed => Self::deleting(),
            StoreError::Locked(_)
            | StoreError::TooNew { .. }
            | StoreError::NoAnswer { .. }
            | StoreError::HoldExpired
            | StoreError::Replaced
            | StoreError::Mismatch(_)
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
