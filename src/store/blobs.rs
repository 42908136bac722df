//! Content-addressed blobs: `blobs/<first two hex digits>/<digest>`, written once, verified at every read.
//!
//! A blob is durable (its bytes, its directory entry) before `put` returns, hence before any row names it. Goes through
//! `object_store` only, except for the few file-system duties that it leaves to us: a directory's fsync and the
//! staged files of a crash.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path as Key};

use super::StoreError;
use crate::ids::BlobId;

/// Above this size a digest is computed off the async threads (about 0.2 ms).
const INLINE_DIGEST: usize = 128 * 1024;

pub(super) struct Blobs {
    objects: Arc<dyn ObjectStore>,
    root: PathBuf,
    /// Times that one was written.
    written: AtomicU64,
}

impl Blobs {
    /// Opens (and makes) the blob directory and removes what a crash left half-written.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).map_err(StoreError::io(root))?;
        sweep(root)?;
        let objects = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        Ok(Self { objects: Arc::new(objects), root: root.to_owned(), written: AtomicU64::new(0) })
    }

    /// Stores the bytes unless they are there already. A blob whose stored bytes went bad is written anew.
    pub(super) async fn put(&self, id: BlobId, bytes: Bytes) -> Result<(), StoreError> {
        let key = key(id);
        if self.holds_already(&key, &bytes).await? {
            crate::failpoint!("blob-before-dir-sync");
            // Whoever wrote it may not have reached its directory fsync yet, or was killed before it.
            return self.sync_dir(id).await;
        }
        crate::failpoint!("blob-before-write", |why| Err(StoreError::injected(why)));
        crate::failpoint!("blob-half-staged" => self.stage_half(id, &bytes));
        let put = self.objects.put(&key, bytes.into()).await;
        crate::failpoint!("blob-written");
        // an error may come after the bytes
        self.written.fetch_add(1, Ordering::AcqRel);
        put?;
        Ok(())
    }

    /// What a kill within a write leaves: the first half of the bytes, under the name of what is not whole yet.
    #[cfg(feature = "failpoints")]
    fn stage_half(&self, id: BlobId, bytes: &[u8]) {
        let shard = self.root.join(&id.to_string()[..2]);
        // best effort: the process ends here
        let _ = std::fs::create_dir_all(&shard);
        let _ = std::fs::write(shard.join(format!("{id}#1")), &bytes[..bytes.len() / 2]);
    }

    /// How many times one was written since this was opened.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    async fn holds_already(&self, key: &Key, bytes: &Bytes) -> Result<bool, StoreError> {
        match self.objects.get(key).await {
            Ok(found) if found.meta.size == bytes.len() as u64 => Ok(found.bytes().await? == bytes),
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads a blob and verifies it; `size`, where known, is checked before a byte is read.
    pub(super) async fn get(&self, id: BlobId, size: Option<u64>) -> Result<Bytes, StoreError> {
        let corrupt = |reason: String| StoreError::Corrupt { blob: id, reason };
        let found = match self.objects.get(&key(id)).await {
            Err(object_store::Error::NotFound { .. }) => return Err(corrupt("missing".to_owned())),
            found => found?,
        };
        if let Some(size) = size.filter(|&size| size != found.meta.size) {
            return Err(corrupt(format!("{} bytes instead of {size}", found.meta.size)));
        }
        let bytes = found.bytes().await?;
        match digest(&bytes).await? {
            actual if actual == id => Ok(bytes),
            actual => Err(corrupt(format!("its bytes have the digest {actual}"))),
        }
    }

    pub(super) async fn exists(&self, id: BlobId) -> Result<bool, StoreError> {
        match self.objects.head(&key(id)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    pub(super) async fn delete(&self, id: BlobId) -> Result<(), StoreError> {
        crate::failpoint!("blob-before-delete", |why| Err(StoreError::injected(why)));
        let deleted = self.objects.delete(&key(id)).await;
        crate::failpoint!("blob-deleted");
        match deleted {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Every blob with its size. Files that are not blobs are passed over.
    pub(super) async fn list(&self) -> Result<Vec<(BlobId, u64)>, StoreError> {
        let all: Vec<_> = self.objects.list(None).try_collect().await?;
        let id = |key: &Key| key.filename().and_then(|name| name.parse().ok());
        Ok(all.iter().filter_map(|meta| Some((id(&meta.location)?, meta.size))).collect())
    }

    async fn sync_dir(&self, id: BlobId) -> Result<(), StoreError> {
        let dir = self.root.join(&id.to_string()[..2]);
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

/// Removes staged uploads (`<digest>#<n>`) that a crash left behind; the directory lock proves that nobody writes them.
fn sweep(root: &Path) -> Result<(), StoreError> {
    for shard in std::fs::read_dir(root).map_err(StoreError::io(root))? {
        let shard = shard.map_err(StoreError::io(root))?;
        if !shard.file_type().map_err(StoreError::io(shard.path()))?.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(shard.path()).map_err(StoreError::io(shard.path()))? {
            let file = file.map_err(StoreError::io(shard.path()))?;
            if file.file_name().to_string_lossy().contains('#') {
                std::fs::remove_file(file.path()).map_err(StoreError::io(file.path()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_changed_missing_or_cut_blob_is_corrupt_and_writing_it_again_heals_it() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let bytes = Bytes::from(vec![7u8; INLINE_DIGEST + 1]);
        let id = digest(&bytes).await.unwrap();
        assert!(matches!(blobs.get(id, None).await, Err(StoreError::Corrupt { .. })));
        blobs.put(id, bytes.clone()).await.unwrap();
        assert_eq!(blobs.get(id, Some(bytes.len() as u64)).await.unwrap(), bytes);
        let path = dir.path().join(&id.to_string()[..2]).join(id.to_string());
        for damage in [&b"x"[..], &[8u8; INLINE_DIGEST + 1]] {
            std::fs::write(&path, damage).unwrap();
            assert!(matches!(blobs.get(id, None).await, Err(StoreError::Corrupt { .. })));
            assert!(matches!(blobs.get(id, Some(bytes.len() as u64)).await, Err(StoreError::Corrupt { .. })));
            blobs.put(id, bytes.clone()).await.unwrap();
            assert_eq!(blobs.get(id, None).await.unwrap(), bytes);
            let written = blobs.written();
            blobs.put(id, bytes.clone()).await.unwrap();
            assert_eq!(blobs.written(), written, "it was there");
        }
        assert_eq!(blobs.written(), 3);
        assert_eq!(blobs.list().await.unwrap(), [(id, bytes.len() as u64)]);
    }

    #[tokio::test]
    async fn opening_removes_staged_files_and_keeps_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let id = BlobId::of(b"abc");
        blobs.put(id, Bytes::from_static(b"abc")).await.unwrap();
        let staged = dir.path().join(&id.to_string()[..2]).join(format!("{id}#1"));
        std::fs::write(&staged, b"ab").unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        assert!(!staged.exists());
        assert_eq!(blobs.get(id, None).await.unwrap(), "abc");
    }
}
