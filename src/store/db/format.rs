//! The format of a database: a row says which, and migrations bring an older one up to date.

use sqlx::migrate::Migrator;

use super::{Db, query};
use crate::store::StoreError;

pub(super) static SQLITE: Migrator = sqlx::migrate!("src/store/migrations/sqlite");
pub(super) static POSTGRES: Migrator = sqlx::migrate!("src/store/migrations/postgres");

/// The format of this program's databases: the number of the newest migration.
pub(in crate::store) const FORMAT: u64 = 4;

/// Refuses a database of a newer program before anything of it is touched. Those from before there was such a row have none.
pub(super) async fn check(db: &Db) -> Result<(), StoreError> {
    let has_row = match db {
        Db::Sqlite { .. } => query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'"),
        Db::Postgres { .. } => query(
            "SELECT 1 FROM information_schema.tables WHERE table_name = 'meta' AND table_schema = current_schema()",
        ),
    };
    if has_row.fetch_optional(db).await?.is_none() {
        return Ok(());
    }
    let row = query("SELECT value FROM meta WHERE fact = 'format'").fetch_optional(db).await?;
    let text = row.map(|row| row.try_get::<String, _>(0)).transpose()?;
    let found = text.as_deref().and_then(|text| text.parse::<u64>().ok());
    let found = found.ok_or_else(|| StoreError::row("meta", format!("format is {text:?}")))?;
    if found > FORMAT {
        return Err(StoreError::TooNew { found, known: FORMAT });
    }
    Ok(())
}

/// Brings a database up to date, each migration in a transaction of its own.
pub(super) async fn migrate(db: &Db) -> Result<(), StoreError> {
    match db {
        Db::Sqlite { writer, .. } => SQLITE.run(writer).await?,
        // takes a lock of its own: of servers that start at once, one migrates
        Db::Postgres { pool, .. } => POSTGRES.run(pool).await?,
    }
    Ok(())
}
