//! Statements with their values, run on either database, and the rows that they answer with.

use std::{borrow::Cow, time::Duration};

use sqlx::{
    AssertSqlSafe, ColumnIndex, Decode, PgPool, Postgres, Row as _, SqlSafeStr as _, SqlStr, Sqlite, Type,
    postgres::PgRow, sqlite::SqliteRow,
};

use super::{Conn, Db};
use crate::store::StoreError;

/// Longest wait for an answer from PostgreSQL: beyond the longest statement, so that only a server that is gone is given up.
const ANSWER: Duration = Duration::from_secs(25);

/// A value of a statement.
pub(in crate::store) enum Value {
    Int(Option<i64>),
    Text(Option<String>),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(Some(value))
    }
}

impl From<Option<i64>> for Value {
    fn from(value: Option<i64>) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(Some(value.to_owned()))
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(Some(value))
    }
}

impl From<&String> for Value {
    fn from(value: &String) -> Self {
        Self::Text(Some(value.clone()))
    }
}

impl From<Option<String>> for Value {
    fn from(value: Option<String>) -> Self {
        Self::Text(value)
    }
}

impl From<&Option<String>> for Value {
    fn from(value: &Option<String>) -> Self {
        Self::Text(value.clone())
    }
}

/// A statement with its values.
pub(in crate::store) struct Query {
    sql: Cow<'static, str>,
    values: Vec<Value>,
}

/// A statement.
pub(in crate::store) fn query(sql: &'static str) -> Query {
    Query { sql: Cow::Borrowed(sql), values: Vec::new() }
}

/// A statement made of names of tables and columns in this program; never of data.
pub(in crate::store) fn query_text(sql: String) -> Query {
    Query { sql: Cow::Owned(sql), values: Vec::new() }
}

/// Where a statement runs.
pub(in crate::store) enum On<'a> {
    /// In a transaction.
    Conn(&'a mut Conn),
    /// By itself.
    Db(&'a Db),
    /// By itself, on connections of PostgreSQL.
    Pool(&'a PgPool),
}

impl<'a> From<&'a mut Conn> for On<'a> {
    fn from(conn: &'a mut Conn) -> Self {
        Self::Conn(conn)
    }
}

impl<'a> From<&'a Db> for On<'a> {
    fn from(db: &'a Db) -> Self {
        Self::Db(db)
    }
}

/// Binds all values of a statement, of whichever database.
macro_rules! bound {
    ($database:ty, $sql:expr, $values:expr) => {{
        let mut query = sqlx::query::<$database>($sql);
        for value in $values {
            query = match value {
                Value::Int(value) => query.bind(value),
                Value::Text(value) => query.bind(value),
            };
        }
        query
    }};
}

impl Query {
    pub(in crate::store) fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    fn sql(sql: Cow<'static, str>) -> SqlStr {
        match sql {
            Cow::Borrowed(text) => text.into_sql_str(),
            Cow::Owned(text) => AssertSqlSafe(text).into_sql_str(),
        }
    }

    /// Runs it; how many rows it changed.
    pub(in crate::store) async fn execute<'a>(self, on: impl Into<On<'a>>) -> Result<u64, StoreError> {
        let (sql, values) = (Self::sql(self.sql), self.values);
        match on.into() {
            On::Conn(Conn::Sqlite(tx)) => Ok(bound!(Sqlite, sql, values).execute(&mut **tx).await?.rows_affected()),
            On::Conn(Conn::Postgres(tx)) => {
                Ok(bounded(bound!(Postgres, sql, values).execute(&mut **tx)).await?.rows_affected())
            }
            On::Db(Db::Sqlite { readers, .. }) => {
                Ok(bound!(Sqlite, sql, values).execute(readers).await?.rows_affected())
            }
            On::Db(Db::Postgres { pool, .. }) | On::Pool(pool) => {
                Ok(bounded(bound!(Postgres, sql, values).execute(pool)).await?.rows_affected())
            }
        }
    }

    /// All of its rows.
    pub(in crate::store) async fn fetch_all<'a>(self, on: impl Into<On<'a>>) -> Result<Vec<Row>, StoreError> {
        let (sql, values) = (Self::sql(self.sql), self.values);
        Ok(match on.into() {
            On::Conn(Conn::Sqlite(tx)) => lite(bound!(Sqlite, sql, values).fetch_all(&mut **tx).await?),
            On::Conn(Conn::Postgres(tx)) => pg(bounded(bound!(Postgres, sql, values).fetch_all(&mut **tx)).await?),
            On::Db(Db::Sqlite { readers, .. }) => lite(bound!(Sqlite, sql, values).fetch_all(readers).await?),
            On::Db(Db::Postgres { pool, .. }) | On::Pool(pool) => {
                pg(bounded(bound!(Postgres, sql, values).fetch_all(pool)).await?)
            }
        })
    }

    /// Its row, if it has one.
    pub(in crate::store) async fn fetch_optional<'a>(self, on: impl Into<On<'a>>) -> Result<Option<Row>, StoreError> {
        Ok(self.fetch_all(on).await?.into_iter().next())
    }

    /// Its one row.
    pub(in crate::store) async fn fetch_one<'a>(self, on: impl Into<On<'a>>) -> Result<Row, StoreError> {
        Ok(self.fetch_optional(on).await?.ok_or(sqlx::Error::RowNotFound)?)
    }
}

/// A row of an answer.
pub(in crate::store) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    /// A column's value, by its place or name.
    pub(in crate::store) fn try_get<'r, T, I>(&'r self, at: I) -> Result<T, sqlx::Error>
    where
        T: Decode<'r, Sqlite> + Type<Sqlite> + Decode<'r, Postgres> + Type<Postgres>,
        I: ColumnIndex<SqliteRow> + ColumnIndex<PgRow>,
    {
        match self {
            Self::Sqlite(row) => row.try_get(at),
            Self::Postgres(row) => row.try_get(at),
        }
    }
}

fn lite(rows: Vec<SqliteRow>) -> Vec<Row> {
    rows.into_iter().map(Row::Sqlite).collect()
}

fn pg(rows: Vec<PgRow>) -> Vec<Row> {
    rows.into_iter().map(Row::Postgres).collect()
}

/// Waits for PostgreSQL no longer than an answer can take.
pub(super) async fn bounded<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(ANSWER, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(StoreError::NoAnswer { of: "the database", waited: ANSWER }),
    }
}
