//! The database connections: one writer, a few readers, and the settings that make a commit durable.
//!
//! Queries are plain text with `$n` placeholders and standard types, so that they mean the same to Postgres. Never
//! holds a transaction open across blob input or output.

use std::{path::Path, str::FromStr, time::Duration};

use sqlx::{
    Row as _, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::StoreError;

/// Connections that read while the writer writes (WAL).
const READERS: u32 = 4;
/// Longest wait for another connection's lock: there is one writer, so only a checkpoint or a foreign tool holds one.
const BUSY: Duration = Duration::from_secs(10);

pub(super) struct Db {
    /// One connection: writers queue here in order and asynchronously, not in SQLite's busy loop.
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Db {
    pub(super) async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY)
            .foreign_keys(true)
            // what is deleted does not stay in free pages
            .pragma("secure_delete", "ON");
        let writer = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        sqlx::migrate!("src/store/migrations").run(&writer).await?;
        let readers = SqlitePoolOptions::new().max_connections(READERS).connect_with(options).await?;
        Ok(Self { writer, readers })
    }

    /// Starts a transaction that may write. It takes the write lock at once, so that it never fails half-way because
    /// what it read has been overtaken. Dropped without commit, it leaves nothing.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// For single statements that only read.
    pub(super) fn readers(&self) -> &SqlitePool {
        &self.readers
    }

    /// Writes the database anew, so that no bytes of deleted rows are left in it.
    pub(super) async fn vacuum(&self) -> Result<(), StoreError> {
        sqlx::query("VACUUM").execute(&self.writer).await?;
        Ok(())
    }

    /// Empties the write-ahead log; false if somebody still reads what is in it.
    pub(super) async fn empty_log(&self) -> Result<bool, StoreError> {
        let row = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&self.writer).await?;
        Ok(row.try_get::<i64, _>(0)? == 0)
    }

    pub(super) async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
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
