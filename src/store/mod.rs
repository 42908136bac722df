//! The store: what must survive a restart and `kill -9`. Content-addressed blobs, and one transactional database of
//! names, versions, datasets and jobs.
//!
//! Owns the data directory (`lock`, `server-id`, `models/`, and unless they are elsewhere `meta.sqlite3` and `blobs/`), the
//! database and the blobs. A row names a blob only after the blob is durable, and rows that belong together are written in
//! one transaction; so a crash leaves blobs without a row at worst, and [`Store::collect_garbage`] removes those. Servers
//! that share a PostgreSQL database share its blobs, too; each job belongs to one of them (see `leases`). Never looks into
//! a delta's tensors, never keeps anything resident.

mod backup;
mod blobs;
mod datasets;
mod db;
mod error;
mod garbage;
mod holds;
mod jobs;
mod leases;
mod models;
mod pairing;
mod tenants;
mod verify;
mod versions;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod upgrade_tests;

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

pub use backup::{Backup, Restored, backup, restore};
pub use datasets::{DatasetRecord, NewDataset};
pub use error::StoreError;
pub use garbage::Garbage;
pub use holds::HeldFiles;
pub use jobs::{CheckpointRecord, CreateJob, EventRecord, JobChange, JobPage, JobRecord, NewJob, is_terminal};
pub use leases::{JobAsk, LEASE, RENEW};
pub use models::Models;
pub use tenants::{ClosedTenant, DeletedTenant, TenantUsage};
pub use verify::{Verified, Verify};
pub use versions::{NameRecord, NewVersion, Origin, StoredFile, VersionRecord};

use self::{blobs::Blobs, db::Db, holds::Holds, leases::Server};
use crate::ids::BlobId;

/// URL of a PostgreSQL database. It may have a password in it: it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("postgres://...")
    }
}

impl std::str::FromStr for DatabaseUrl {
    type Err = String;

    /// Says what is accepted where it is no such URL.
    fn from_str(url: &str) -> Result<Self, String> {
        match url.starts_with("postgres://") || url.starts_with("postgresql://") {
            true => Ok(Self(url.to_owned())),
            false => {
                Err("is no URL of PostgreSQL; accepted is postgres://USER:PASSWORD@HOST:PORT/DATABASE, or nothing \
                          for SQLite in the data directory"
                    .to_owned())
            }
        }
    }
}

/// Where everything is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The data directory.
    pub dir: PathBuf,
    /// A PostgreSQL database; `None`: SQLite in the data directory.
    pub database: Option<DatabaseUrl>,
    /// URL of a folder or bucket of blobs; `None`: `blobs/` in the data directory.
    pub blobs: Option<String>,
}

impl Places {
    /// Everything in one directory.
    pub fn local(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), database: None, blobs: None }
    }
}

/// Whether a URL is one of a blob store that can be used.
///
/// # Errors
/// What is wrong with it and what is accepted.
pub fn check_blobs_url(url: &str) -> Result<(), String> {
    blobs::check_url(url)
}

/// The open store. Clones share it; it is closed and unlocked when the last one is dropped.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    db: Db,
    blobs: Blobs,
    holds: Arc<Holds>,
    server: Server,
    tenants: Arc<tenants::Tenants>,
    /// Dropped last: the directory belongs to this process until everything above is closed.
    _lock: File,
}

impl Store {
    /// Opens everything in one directory, and makes it if needed: locks it for this process, brings the database up to date, removes
    /// half-written files of a crash. Touches nothing else.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another process has it open; what the file system or the database refuses.
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_at(&Places::local(dir)).await
    }

    /// As [`Self::open`], with the database and the blobs where they are. Takes this server's lease in a shared database.
    ///
    /// # Errors
    /// As [`Self::open`]; [`StoreError::Mismatch`] if database and blobs are not of each other, [`StoreError::TooNew`].
    pub async fn open_at(places: &Places) -> Result<Self, StoreError> {
        let (dir, shared) = (places.dir.clone(), places.database.is_some());
        let (lock, id) = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&dir).map_err(StoreError::io(&dir))?;
            let lock = lock(&dir)?;
            let id = if shared { leases::server_id(&dir)? } else { String::new() };
            Ok::<_, StoreError>((lock, id))
        })
        .await??;
        crate::failpoint!("store-locked", |why| Err(StoreError::injected(why)));
        let db = match &places.database {
            Some(DatabaseUrl(url)) => Db::connect(url).await?,
            None => Db::open(&places.dir.join("meta.sqlite3")).await?,
        };
        crate::failpoint!("store-migrated");
        let blobs = open_blobs(places, !db.is_shared()).await?;
        // The directory entries of new files must not be lost either.
        File::open(&places.dir).and_then(|d| d.sync_all()).map_err(StoreError::io(&places.dir))?;
        pairing::pair(&db, &blobs).await?;
        let server = leases::register(&db, id).await?;
        let (dir, holds) = (places.dir.clone(), Holds::new());
        let inner = Inner { dir, db, blobs, holds, server, tenants: Arc::default(), _lock: lock };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Whole models that jobs made.
    pub fn models(&self) -> Models {
        Models::new(self.dir())
    }

    /// Closes the database connections; operations fail from now on. The lock goes with the last clone.
    pub async fn close(&self) {
        self.give_up_lease().await;
        self.db().close().await;
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.db().is_closed()
    }

    /// Whether other servers may be at work on the same database and blobs.
    pub fn is_shared(&self) -> bool {
        self.db().is_shared()
    }

    /// Stores the bytes under their digest; durable on return. A blob that no row names within the hour may be
    /// collected.
    ///
    /// # Errors
    /// What the blob store refuses.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<BlobId, StoreError> {
        let id = blobs::digest(&bytes).await?;
        let _hold = self.hold(&[id]).await?;
        self.blobs().put(id, bytes).await?;
        Ok(id)
    }

    /// As [`Self::put_blob`]; until the second is dropped, nobody removes it.
    pub(crate) async fn put_held(&self, bytes: Bytes) -> Result<(BlobId, impl Send + use<>), StoreError> {
        let id = blobs::digest(&bytes).await?;
        let hold = self.hold(&[id]).await?;
        self.blobs().put(id, bytes).await?;
        Ok((id, hold))
    }

    /// Reads a blob and verifies its digest.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it is missing or its bytes are not the ones stored.
    pub async fn get_blob(&self, id: BlobId) -> Result<Bytes, StoreError> {
        self.blobs().get(id, None).await
    }

    fn db(&self) -> &Db {
        &self.inner.db
    }

    /// How many times a blob was written since the store was opened, be it a new one or one whose bytes had gone bad.
    pub fn blobs_written(&self) -> u64 {
        self.blobs().written()
    }

    fn blobs(&self) -> &Blobs {
        &self.inner.blobs
    }
}

/// Opens the blobs; `alone`: no other server writes them.
async fn open_blobs(places: &Places, alone: bool) -> Result<Blobs, StoreError> {
    let places = places.clone();
    let open = move || match &places.blobs {
        Some(url) => Blobs::at(url, alone),
        None => Blobs::open(&places.dir.join("blobs"), alone),
    };
    tokio::task::spawn_blocking(open).await?
}

fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(StoreError::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(StoreError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_opener_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Store::open(dir.path()).await.unwrap();
        assert!(matches!(Store::open(dir.path()).await, Err(StoreError::Locked(_))));
        let clone = first.clone();
        drop(first);
        assert!(matches!(Store::open(dir.path()).await, Err(StoreError::Locked(_))));
        drop(clone);
        Store::open(dir.path()).await.unwrap();
    }
}
