//! The database: SQLite in the data directory, or PostgreSQL by URL. The same queries mean the same to both.
//!
//! Queries are plain text with `$n` placeholders over TEXT and BIGINT. There is one writer at a time in either: SQLite's
//! only write connection, or in PostgreSQL a lock that every writing transaction takes first, across all servers. So what
//! a writer has read holds until it commits, and commits have one order. Never holds a transaction open across blob input
//! or output.

mod format;
mod query;

#[cfg(test)]
mod tests;

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    str::FromStr,
    time::Duration,
};

pub(super) use format::FORMAT;
pub(super) use query::{On, Row, Value, query, query_text};
use sqlx::{
    PgPool, Postgres, Sqlite, SqlitePool, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::StoreError;

/// SQLite's connections that read while the writer writes (WAL).
const READERS: u32 = 4;
/// Longest wait for another connection's lock in SQLite: there is one writer, so only a checkpoint or a foreign tool holds
/// one.
const BUSY: Duration = Duration::from_secs(10);
/// Connections to PostgreSQL of one server.
const CONNECTIONS: u32 = 8;
/// Longest wait for one of them, be it free or new.
const ACQUIRE: Duration = Duration::from_secs(10);
/// Longest time of a statement in PostgreSQL, with the wait for the writers' lock.
const STATEMENT: Duration = Duration::from_secs(20);
/// After this, a server that hangs within a transaction loses it, and the lock with it.
const IDLE: Duration = Duration::from_secs(10);
/// What PostgreSQL's writers lock; any number that nothing else in the database locks.
const WRITERS: i64 = 0x6465_6c74_6173_7276;

/// The connections to one database.
pub(super) enum Db {
    Sqlite {
        /// One connection: writers queue here in order and asynchronously, not in SQLite's busy loop.
        writer: SqlitePool,
        readers: SqlitePool,
    },
    Postgres {
        pool: PgPool,
        /// One connection of its own: a lease is renewed also while all others wait.
        lease: PgPool,
    },
}

/// What statements of a transaction run on.
pub(super) enum Conn {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

/// A transaction. Dropped without commit, it leaves nothing.
pub(super) struct Tx(Conn);

impl Deref for Tx {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.0
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Conn {
        &mut self.0
    }
}

impl Tx {
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        match self.0 {
            Conn::Sqlite(tx) => Ok(tx.commit().await?),
            Conn::Postgres(tx) => query::bounded(tx.commit()).await,
        }
    }
}

impl Conn {
    /// Unix milliseconds now, by the one clock of all who share the database.
    pub(super) async fn now_ms(&mut self) -> Result<i64, StoreError> {
        match self {
            Self::Sqlite(_) => Ok(now_ms()),
            Self::Postgres(_) => {
                let row = query("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT").fetch_one(self);
                Ok(row.await?.try_get(0)?)
            }
        }
    }
}

impl Db {
    /// Opens SQLite's file, and makes it if needed; brings it up to date.
    pub(super) async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = sqlite_options(path).create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
        // what is deleted does not stay in free pages
        let options = options.synchronous(SqliteSynchronous::Full).pragma("secure_delete", "ON");
        let writer = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        let readers = SqlitePoolOptions::new().max_connections(READERS).connect_lazy_with(options);
        Self::Sqlite { writer, readers }.brought_up_to_date().await
    }

    /// Opens SQLite's file for reading only, beside the server that writes it.
    pub(super) async fn open_beside(path: &Path) -> Result<Self, StoreError> {
        let pool = SqlitePoolOptions::new().max_connections(1).connect_with(sqlite_options(path)).await?;
        let db = Self::Sqlite { writer: pool.clone(), readers: pool };
        format::check(&db).await?;
        Ok(db)
    }

    /// Connects to PostgreSQL and brings the database up to date; of servers that do so at once, one does.
    pub(super) async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::postgres(url).await?.brought_up_to_date().await
    }

    /// Connects to PostgreSQL, and changes nothing.
    pub(super) async fn connect_beside(url: &str) -> Result<Self, StoreError> {
        let db = Self::postgres(url).await?;
        format::check(&db).await?;
        Ok(db)
    }

    async fn postgres(url: &str) -> Result<Self, StoreError> {
        let options = postgres_options(url)?;
        let lease = PgPoolOptions::new().max_connections(1).acquire_timeout(ACQUIRE).connect_lazy_with(options.clone());
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(ACQUIRE);
        Ok(Self::Postgres { pool: query::bounded(pool.connect_with(options)).await?, lease })
    }

    async fn brought_up_to_date(self) -> Result<Self, StoreError> {
        format::check(&self).await?;
        format::migrate(&self).await?;
        Ok(self)
    }

    /// Whether other servers may be at work on it.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self, Self::Postgres { .. })
    }

    /// Starts a transaction that may write, and waits until no other one does: it never fails half-way because what it
    /// read has been overtaken.
    pub(super) async fn begin(&self) -> Result<Tx, StoreError> {
        match self {
            Self::Sqlite { writer, .. } => Ok(Tx(Conn::Sqlite(writer.begin_with("BEGIN IMMEDIATE").await?))),
            Self::Postgres { pool, .. } => {
                // each statement after the lock sees what was committed before it
                let begin = pool.begin_with("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE");
                let mut tx = Tx(Conn::Postgres(query::bounded(begin).await?));
                query("SELECT pg_advisory_xact_lock($1)").bind(WRITERS).execute(&mut *tx).await?;
                Ok(tx)
            }
        }
    }

    /// Starts a transaction that only reads, and sees the database as it is at one moment.
    pub(super) async fn snapshot(&self) -> Result<Tx, StoreError> {
        match self {
            Self::Sqlite { readers, .. } => Ok(Tx(Conn::Sqlite(readers.begin().await?))),
            Self::Postgres { pool, .. } => {
                let begin = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
                Ok(Tx(Conn::Postgres(query::bounded(begin).await?)))
            }
        }
    }

    /// For single statements that only read.
    pub(super) fn readers(&self) -> &Self {
        self
    }

    /// For the statement that renews a lease.
    pub(super) fn lease(&self) -> On<'_> {
        match self {
            Self::Sqlite { .. } => On::Db(self),
            Self::Postgres { lease, .. } => On::Pool(lease),
        }
    }

    /// Writes the database anew, so that no bytes of deleted rows are left in it.
    /// PostgreSQL keeps what is in its own log and backups; its operators have to say for how long.
    pub(super) async fn vacuum(&self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite { writer, .. } => {
                sqlx::query("VACUUM").execute(writer).await?;
            }
            Self::Postgres { pool, .. } => {
                query::bounded(sqlx::query("VACUUM").execute(pool)).await?;
            }
        }
        Ok(())
    }

    /// Empties the write-ahead log; false if somebody still reads what is in it.
    pub(super) async fn empty_log(&self) -> Result<bool, StoreError> {
        let Self::Sqlite { writer, .. } = self else { return Ok(true) };
        let busy: i64 = sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(writer).await?;
        Ok(busy == 0)
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Sqlite { writer, readers } => {
                readers.close().await;
                writer.close().await;
            }
            // a connection that hangs is not waited for
            Self::Postgres { pool, lease } => {
                let closed = async { tokio::join!(pool.close(), lease.close()) };
                drop(tokio::time::timeout(Duration::from_secs(2), closed).await);
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Sqlite { writer, .. } => writer.is_closed(),
            Self::Postgres { pool, .. } => pool.is_closed(),
        }
    }
}

fn sqlite_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).busy_timeout(BUSY).foreign_keys(true)
}

fn postgres_options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(url).map_err(|_| StoreError::Invalid {
        field: "--database",
        // the URL may have a password in it: it is not repeated
        message: "is not a URL of PostgreSQL; accepted is postgres://USER:PASSWORD@HOST:PORT/DATABASE".to_owned(),
    })?;
    Ok(options.application_name("deltaserve").options([
        ("statement_timeout", STATEMENT.as_millis().to_string().as_str()),
        ("idle_in_transaction_session_timeout", IDLE.as_millis().to_string().as_str()),
        // a commit is durable when it is answered, whatever the cluster's default is
        ("synchronous_commit", "on"),
    ]))
}

/// Unix milliseconds now.
pub(super) fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// An unsigned value as the database keeps it.
pub(super) fn to_db(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A count read back.
pub(super) fn from_db(table: &'static str, value: i64) -> Result<u64, StoreError> {
    u64::try_from(value).map_err(|_| StoreError::row(table, format!("negative number {value}")))
}

/// A text column that holds an identifier or a digest.
pub(super) fn parse<T: FromStr<Err: std::fmt::Display>>(table: &'static str, text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|e| StoreError::row(table, format!("{text:?} {e}")))
}

/// Refuses text that PostgreSQL cannot keep, with either database.
pub(super) fn check_text(field: &'static str, text: &str) -> Result<(), StoreError> {
    match text.contains('\0') {
        true => {
            Err(StoreError::Invalid { field, message: "has a NUL character; text without it is accepted".to_owned() })
        }
        false => Ok(()),
    }
}
