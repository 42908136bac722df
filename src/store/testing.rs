//! Where the store's tests run: each on SQLite, and on PostgreSQL where there is one.

#[path = "../../tests/support/postgres.rs"]
mod postgres;

use std::path::Path;

pub(super) use postgres::psql;

use super::{Places, Store};

/// An empty place for one test.
pub(super) struct Place {
    dir: tempfile::TempDir,
    database: Option<String>,
}

impl Place {
    pub(super) fn sqlite() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), database: None }
    }

    /// `None`, with the reason printed, where there is no PostgreSQL.
    pub(super) fn postgres() -> Option<Self> {
        Some(Self { dir: tempfile::tempdir().unwrap(), database: Some(postgres::new_database()?) })
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The database's URL, if it is PostgreSQL.
    pub(super) fn url(&self) -> Option<&str> {
        self.database.as_deref()
    }

    /// Whether several servers can have it open.
    pub(super) fn is_shared(&self) -> bool {
        self.database.is_some()
    }

    /// A server of this name: a data directory of its own, and the blobs of all.
    pub(super) fn of(&self, server: &str) -> Places {
        let blobs = Some(format!("file://{}", self.dir().join("blobs").display()));
        Places { dir: self.dir().join(server), database: self.url().map(|url| url.parse().unwrap()), blobs }
    }

    /// Opens it; again after a close.
    pub(super) async fn open(&self) -> Store {
        self.server("server").await
    }

    pub(super) async fn server(&self, name: &str) -> Store {
        Store::open_at(&self.of(name)).await.unwrap()
    }
}

/// Makes a test of each function, on each database.
macro_rules! on_each_database {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test(crate::store::testing::Place::sqlite()).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    if let Some(place) = crate::store::testing::Place::postgres() {
                        super::$test(place).await;
                    }
                }
            )+
        }
    };
}
pub(super) use on_each_database;
