//! Garbage: blobs that no row names. Safe beside publishes that are under way (see `holds`).

use std::{collections::HashSet, time::Duration};

use sqlx::Row;

use super::{Store, StoreError, holds::GRACE};
use crate::ids::BlobId;

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Blobs removed.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Store {
    /// Removes blobs that no version, dataset or job names. Blobs that this process wrote within the last hour stay:
    /// their writer may be about to name them.
    ///
    /// # Errors
    /// What the database or the blob store refuses; what was removed until then stays removed.
    pub async fn collect_garbage(&self) -> Result<Garbage, StoreError> {
        self.collect_garbage_after(GRACE).await
    }

    pub(crate) async fn collect_garbage_after(&self, grace: Duration) -> Result<Garbage, StoreError> {
        let stored = self.blobs().list().await?;
        let named = self.named_blobs().await?;
        self.orphans_among(&stored.iter().map(|(blob, _)| *blob).collect());
        let mut removed = Garbage::default();
        for (blob, bytes) in stored.into_iter().filter(|(blob, _)| !named.contains(&blob.to_string())) {
            let Some(_claim) = self.inner.holds.claim(blob, grace) else { continue };
            // Once more, now that nobody can start to publish it: a publish may have committed since the list.
            if self.is_named(blob).await? {
                continue;
            }
            self.blobs().delete(blob).await?;
            removed.blobs += 1;
            removed.bytes += bytes;
        }
        Ok(removed)
    }

    pub(super) async fn named_blobs(&self) -> Result<HashSet<String>, StoreError> {
        let sql = "SELECT blob FROM version_files UNION SELECT blob FROM datasets UNION SELECT blob FROM job_blobs \
                   UNION SELECT blob FROM job_checkpoints";
        let rows = sqlx::query(sql).fetch_all(self.db().readers()).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    pub(super) async fn is_named(&self, blob: BlobId) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM version_files WHERE blob = $1 UNION ALL SELECT 1 FROM datasets WHERE blob = $1 \
                   UNION ALL SELECT 1 FROM job_blobs WHERE blob = $1 \
                   UNION ALL SELECT 1 FROM job_checkpoints WHERE blob = $1 LIMIT 1";
        Ok(sqlx::query(sql).bind(blob.to_string()).fetch_optional(self.db().readers()).await?.is_some())
    }
}
