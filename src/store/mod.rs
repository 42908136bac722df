//! The store: what must survive a restart and `kill -9`. Content-addressed blobs, and one transactional database of
//! names, versions, datasets and jobs.
//!
//! Owns the data directory: `lock`, `meta.sqlite3`, `blobs/`, `models/`. A row names a blob only after the blob is durable, and
//! rows that belong together are written in one transaction; so a crash leaves blobs without a row at worst, and
//! [`Store::collect_garbage`] removes those. Never looks into a delta's tensors, never keeps anything resident.

mod blobs;
mod datasets;
mod db;
mod error;
mod garbage;
mod holds;
mod jobs;
mod models;
mod tenants;
mod versions;

#[cfg(test)]
mod crash_tests;

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

pub use datasets::{DatasetRecord, NewDataset};
pub use error::StoreError;
pub use garbage::Garbage;
pub use holds::HeldFiles;
pub use jobs::{CheckpointRecord, CreateJob, EventRecord, JobChange, JobPage, JobRecord, NewJob, is_terminal};
pub use models::Models;
pub use tenants::{ClosedTenant, DeletedTenant, TenantUsage};
pub use versions::{NameRecord, NewVersion, Origin, StoredFile, VersionRecord};

use self::{blobs::Blobs, db::Db, holds::Holds};
use crate::ids::BlobId;

/// The open data directory. Clones share it; it is closed and unlocked when the last one is dropped.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    db: Db,
    blobs: Blobs,
    holds: Arc<Holds>,
    tenants: Arc<tenants::Tenants>,
    /// Dropped last: the directory belongs to this process until everything above is closed.
    _lock: File,
}

impl Store {
    /// Opens the directory, and makes it if needed: locks it for this process, brings the database up to date, removes
    /// half-written files of a crash. Touches nothing else.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another process has it open; what the file system or the database refuses.
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        let dir = dir.to_owned();
        let (dir, lock, blobs) = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&dir).map_err(StoreError::io(&dir))?;
            let lock = lock(&dir)?;
            let blobs = Blobs::open(&dir.join("blobs"))?;
            Ok::<_, StoreError>((dir, lock, blobs))
        })
        .await??;
        let db = Db::open(&dir.join("meta.sqlite3")).await?;
        // The database file's own directory entry must not be lost either.
        File::open(&dir).and_then(|d| d.sync_all()).map_err(StoreError::io(&dir))?;
        Ok(Self {
            inner: Arc::new(Inner { dir, db, blobs, holds: Holds::new(), tenants: Arc::default(), _lock: lock }),
        })
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
        self.db().close().await;
    }

    /// Stores the bytes under their digest; durable on return. A blob that no row names within the hour may be
    /// collected.
    ///
    /// # Errors
    /// What the blob store refuses.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<BlobId, StoreError> {
        let id = blobs::digest(&bytes).await?;
        let _hold = self.inner.holds.hold(id).await;
        self.blobs().put(id, bytes).await?;
        Ok(id)
    }

    /// As [`Self::put_blob`]; until the second is dropped, nobody removes it.
    pub(crate) async fn put_held(&self, bytes: Bytes) -> Result<(BlobId, impl Send + use<>), StoreError> {
        let id = blobs::digest(&bytes).await?;
        let hold = self.inner.holds.hold(id).await;
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
