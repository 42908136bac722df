//! Content-addressed blobs: `<first two hex digits>/<digest>`, written once, verified at every read.
//!
//! In a folder (`blobs/` of the data directory, or `file://`), or in a bucket by URL. A blob is durable (in a folder: its
//! bytes and its directory entry) before `put` returns, hence before any row names it, and nobody sees a part of one.
//! Goes through `object_store` only, except for the few duties of a file system that it leaves to us: a directory's fsync
//! and the staged files of a crash. Every wait has an end.

mod place;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path as Key};
use parking_lot::RwLock;
pub(super) use place::check_url;

use super::StoreError;
use crate::ids::BlobId;

/// Above this size a digest is computed off the async threads (about 0.2 ms).
const INLINE_DIGEST: usize = 128 * 1024;
/// Longest wait for an answer about one blob; longer by a second per mebibyte of it that is moved.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest time of a whole listing.
const LISTING: Duration = Duration::from_secs(600);
/// What a staged file must not be younger than to be one of a crash, in a folder that other servers write to.
const STAGED: Duration = Duration::from_secs(3600);
/// The object that says which database these blobs are of.
const MARK: &str = "store-id";
/// The folder of what was found to have other bytes than its name says.
const QUARANTINE: &str = "quarantine";

/// A stored blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) id: BlobId,
    pub(super) bytes: u64,
    /// When it was written.
    pub(super) at: SystemTime,
}

pub(super) struct Blobs {
    objects: Arc<dyn ObjectStore>,
    /// The folder; `None`: a bucket.
    root: Option<PathBuf>,
    /// Longest wait for an answer.
    answer: Duration,
    /// Times that one was written.
    written: AtomicU64,
    /// Blobs that were found to be corrupt, and why.
    quarantined: RwLock<HashMap<BlobId, String>>,
}

impl Blobs {
    /// Opens (and makes) a folder of blobs and removes what a crash left half-written. `alone`: nobody else writes there.
    pub(super) fn open(root: &Path, alone: bool) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).map_err(StoreError::io(root))?;
        sweep(root, if alone { Duration::ZERO } else { STAGED })?;
        let objects = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        Ok(Self::of(Arc::new(objects), Some(root.to_owned())))
    }

    /// The blobs at a URL; credentials are in the environment.
    pub(super) fn at(url: &str, alone: bool) -> Result<Self, StoreError> {
        match place::folder(url) {
            Some(root) => Self::open(&root, alone),
            None => {
                let text =
                    |(key, value): (OsString, OsString)| Some((key.into_string().ok()?, value.into_string().ok()?));
                Ok(Self::of(place::bucket(url, std::env::vars_os().filter_map(text))?, None))
            }
        }
    }

    fn of(objects: Arc<dyn ObjectStore>, root: Option<PathBuf>) -> Self {
        Self { objects, root, answer: ANSWER, written: AtomicU64::new(0), quarantined: RwLock::default() }
    }

    /// Waits for an answer about a blob of so many bytes, as long as one can take.
    async fn answer<T>(&self, bytes: u64, work: impl Future<Output = T>) -> Result<T, StoreError> {
        let waited = self.answer + Duration::from_secs(bytes >> 20);
        let done = tokio::time::timeout(waited, work).await;
        done.map_err(|_| StoreError::NoAnswer { of: "the blob store", waited })
    }

    /// Stores the bytes unless they are there already. A blob whose stored bytes went bad is written anew.
    pub(super) async fn put(&self, id: BlobId, bytes: Bytes) -> Result<(), StoreError> {
        let (key, size) = (key(id), bytes.len() as u64);
        if self.holds_already(id, &key, &bytes).await? {
            crate::failpoint!("blob-before-dir-sync");
            // Whoever wrote it may not have reached its directory fsync yet, or was killed before it.
            return self.sync_dir(id).await;
        }
        crate::failpoint!("blob-before-write", |why| Err(StoreError::injected(why)));
        crate::failpoint!("blob-half-staged" => self.stage_half(id, &bytes));
        let put = self.answer(size, self.objects.put(&key, bytes.into())).await;
        crate::failpoint!("blob-written");
        // an error may come after the bytes
        self.written.fetch_add(1, Ordering::AcqRel);
        put??;
        self.forget(id);
        Ok(())
    }

    /// What a kill within a write leaves: the first half of the bytes, under the name of what is not whole yet.
    #[cfg(feature = "failpoints")]
    fn stage_half(&self, id: BlobId, bytes: &[u8]) {
        let Some(root) = &self.root else { return };
        let shard = root.join(&id.to_string()[..2]);
        // best effort: the process ends here
        let _ = std::fs::create_dir_all(&shard);
        let _ = std::fs::write(shard.join(format!("{id}#1")), &bytes[..bytes.len() / 2]);
    }

    /// How many times one was written since this was opened.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    async fn holds_already(&self, id: BlobId, key: &Key, bytes: &Bytes) -> Result<bool, StoreError> {
        if self.quarantined.read().contains_key(&id) {
            return Ok(false);
        }
        let size = bytes.len() as u64;
        if self.root.is_none() {
            // a bucket checks its own bytes, and what is large is not fetched to be compared
            return Ok(self.size(id).await? == Some(size));
        }
        match self.answer(0, self.objects.get(key)).await? {
            Ok(found) if found.meta.size == size => Ok(self.answer(size, found.bytes()).await?? == bytes),
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads a blob and verifies it; `size`, where known, is checked before a byte is read. What is found is known from
    /// then on: that it is corrupt, or that it is whole again.
    pub(super) async fn get(&self, id: BlobId, size: Option<u64>) -> Result<Bytes, StoreError> {
        match self.read(id, size).await {
            Ok(bytes) => {
                self.forget(id);
                Ok(bytes)
            }
            Err(StoreError::Corrupt { reason, .. }) => {
                // bytes that were moved aside are missing now, which is not what was wrong with them
                let reason = self.quarantined.write().entry(id).or_insert(reason).clone();
                self.count();
                Err(StoreError::Corrupt { blob: id, reason })
            }
            Err(e) => Err(e),
        }
    }

    async fn read(&self, id: BlobId, size: Option<u64>) -> Result<Bytes, StoreError> {
        let corrupt = |reason: String| StoreError::Corrupt { blob: id, reason };
        let found = match self.answer(0, self.objects.get(&key(id))).await? {
            Err(object_store::Error::NotFound { .. }) => return Err(corrupt("missing".to_owned())),
            found => found?,
        };
        if let Some(size) = size.filter(|&size| size != found.meta.size) {
            return Err(corrupt(format!("{} bytes instead of {size}", found.meta.size)));
        }
        let bytes = self.answer(found.meta.size, found.bytes()).await??;
        match digest(&bytes).await? {
            actual if actual == id => Ok(bytes),
            actual => Err(corrupt(format!("its bytes have the digest {actual}"))),
        }
    }

    pub(super) async fn exists(&self, id: BlobId) -> Result<bool, StoreError> {
        Ok(self.size(id).await?.is_some())
    }

    /// Its bytes; `None`: it is not there.
    pub(super) async fn size(&self, id: BlobId) -> Result<Option<u64>, StoreError> {
        match self.answer(0, self.objects.head(&key(id))).await? {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    pub(super) async fn delete(&self, id: BlobId) -> Result<(), StoreError> {
        crate::failpoint!("blob-before-delete", |why| Err(StoreError::injected(why)));
        let deleted = self.answer(0, self.objects.delete(&key(id))).await?;
        self.forget(id);
        crate::failpoint!("blob-deleted");
        match deleted {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Every blob. Objects that are not blobs, and those in quarantine, are passed over.
    pub(super) async fn list(&self) -> Result<Vec<Stored>, StoreError> {
        let listed = tokio::time::timeout(LISTING, self.objects.list(None).try_collect::<Vec<_>>()).await;
        let all = listed.map_err(|_| StoreError::NoAnswer { of: "the blob store", waited: LISTING })??;
        let stored = all.iter().filter_map(|meta| {
            let id = meta.location.filename()?.parse().ok()?;
            (meta.location == key(id)).then(|| Stored { id, bytes: meta.size, at: meta.last_modified.into() })
        });
        Ok(stored.collect())
    }

    /// Takes a blob that is corrupt out of service. `aside`: bytes that are not its own are moved, for a look at them; not
    /// where another server may be writing it anew.
    pub(super) async fn quarantine(&self, id: BlobId, reason: &str, aside: bool) -> Result<(), StoreError> {
        self.quarantined.write().insert(id, reason.to_owned());
        self.count();
        if !aside {
            return Ok(());
        }
        let aside = Key::from(format!("{QUARANTINE}/{id}"));
        match self.answer(0, self.objects.rename(&key(id), &aside)).await? {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// It is whole again, or nobody's any more.
    pub(super) fn forget(&self, id: BlobId) {
        if self.is_quarantined(id) {
            self.quarantined.write().remove(&id);
            self.count();
        }
    }

    fn count(&self) {
        metrics::gauge!("deltaserve_store_corrupt_blobs").set(self.quarantined.read().len() as f64);
    }

    /// Whether it is known to be corrupt.
    pub(super) fn is_quarantined(&self, id: BlobId) -> bool {
        self.quarantined.read().contains_key(&id)
    }

    /// Which database these blobs are of, if that was said.
    pub(super) async fn mark(&self) -> Result<Option<String>, StoreError> {
        match self.answer(0, self.objects.get(&Key::from(MARK))).await? {
            Ok(found) => Ok(Some(String::from_utf8_lossy(&self.answer(0, found.bytes()).await??).trim().to_owned())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Says which database these blobs are of.
    pub(super) async fn set_mark(&self, id: &str) -> Result<(), StoreError> {
        let text = Bytes::from(format!("{id}\n"));
        self.answer(0, self.objects.put(&Key::from(MARK), text.into())).await??;
        Ok(())
    }

    /// What is said of where they are.
    pub(super) fn describe(&self) -> String {
        self.objects.to_string()
    }

    async fn sync_dir(&self, id: BlobId) -> Result<(), StoreError> {
        let Some(root) = &self.root else { return Ok(()) };
        let dir = root.join(&id.to_string()[..2]);
        tokio::task::spawn_blocking(move || {
            File::open(&dir).and_then(|d| d.sync_all()).map_err(StoreError::io(dir))?;
            Ok(())
        })
        .await?
    }
}

/// The digest of the bytes, computed where it does not hold up other tasks.
pub(super) async fn digest(bytes: &Bytes) -> Result<BlobId, StoreError> {
    if bytes.len() <= INLINE_DIGEST {
        return Ok(BlobId::of(bytes));
    }
    let bytes = bytes.clone();
    Ok(tokio::task::spawn_blocking(move || BlobId::of(&bytes)).await?)
}

fn key(id: BlobId) -> Key {
    let hex = id.to_string();
    Key::from(format!("{}/{hex}", &hex[..2]))
}

/// Removes staged uploads (`<digest>#<n>`) that a crash left behind. Where nobody else writes, that is all of them.
fn sweep(root: &Path, older: Duration) -> Result<(), StoreError> {
    for shard in std::fs::read_dir(root).map_err(StoreError::io(root))? {
        let shard = shard.map_err(StoreError::io(root))?;
        if !shard.file_type().map_err(StoreError::io(shard.path()))?.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(shard.path()).map_err(StoreError::io(shard.path()))? {
            let file = file.map_err(StoreError::io(shard.path()))?;
            if !file.file_name().to_string_lossy().contains('#') {
                continue;
            }
            let age = file.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
            if older.is_zero() || age.is_some_and(|age| age >= older) {
                std::fs::remove_file(file.path()).map_err(StoreError::io(file.path()))?;
            }
        }
    }
    Ok(())
}
