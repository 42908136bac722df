//! Garbage: blobs that no row names. Safe beside publishes that are under way, of this server and of others (see `holds`).

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use super::{
    Store, StoreError,
    blobs::Stored,
    db::{On, query},
    holds::{CLAIM, GRACE},
    leases::milliseconds,
};
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
        self.renew_holds().await?;
        let stored = self.blobs().list().await?;
        let named = self.named_blobs().await?;
        crate::failpoint!("garbage-listed");
        self.orphans_among(&stored.iter().map(|blob| blob.id).collect());
        let mut removed = Garbage::default();
        for Stored { id, bytes, at } in stored.into_iter().filter(|blob| !named.contains(&blob.id.to_string())) {
            // what another server wrote a moment ago is not looked at twice
            let young = SystemTime::now().duration_since(at).is_ok_and(|age| age < grace);
            if self.is_shared() && young {
                continue;
            }
            if self.collect(id, grace).await? {
                crate::failpoint!("garbage-removed");
                removed.blobs += 1;
                removed.bytes += bytes;
            }
        }
        if self.is_shared() {
            self.forget_old_holds().await?;
        }
        Ok(removed)
    }

    /// Removes a blob if no row names it, nobody holds it, and this has been so for as long as `grace`: whether it did.
    pub(super) async fn collect(&self, blob: BlobId, grace: Duration) -> Result<bool, StoreError> {
        // who is about to name these bytes holds them
        let Some(_claim) = self.inner.holds.claim(blob, grace) else { return Ok(false) };
        crate::failpoint!("garbage-claimed");
        if !self.is_shared() {
            // Once more, now that nobody can start to publish it: a publish may have committed since the list.
            if self.is_named(self.db(), blob).await? {
                return Ok(false);
            }
            self.blobs().delete(blob).await?;
            return Ok(true);
        }
        let Some(claimed) = self.claim_among_servers(blob, grace).await? else { return Ok(false) };
        // where it is not known whether it was removed, the claim stands until it is old: a late removal hits nobody
        self.blobs().delete(blob).await?;
        let mut tx = self.db().begin().await?;
        let sql = "DELETE FROM garbage WHERE blob = $1 AND claimed_ms = $2";
        query(sql).bind(blob.to_string()).bind(claimed).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Claims a blob for removal among servers: when that was, or `None` if it must stay.
    async fn claim_among_servers(&self, blob: BlobId, grace: Duration) -> Result<Option<i64>, StoreError> {
        let mut tx = self.db().begin().await?;
        let (now, text) = (tx.now_ms().await?, blob.to_string());
        // holds of this server are known better in memory
        let sql = "SELECT 1 FROM blob_holds WHERE blob = $1 AND owner <> $2 AND until_ms > $3";
        let held = query(sql).bind(&text).bind(self.server()).bind(now).fetch_optional(&mut *tx).await?.is_some();
        if held || self.is_named(&mut *tx, blob).await? {
            let sql = "DELETE FROM garbage WHERE blob = $1 AND claimed_ms = 0";
            query(sql).bind(&text).execute(&mut *tx).await?;
            tx.commit().await?;
            return Ok(None);
        }
        let sql = "INSERT INTO garbage (blob, since_ms) VALUES ($1, $2) ON CONFLICT (blob) DO NOTHING";
        query(sql).bind(&text).bind(now).execute(&mut *tx).await?;
        let sql = "UPDATE garbage SET claimed_ms = $2 WHERE blob = $1 AND since_ms <= $3 AND claimed_ms < $4";
        let update = query(sql).bind(&text).bind(now).bind(now.saturating_sub(milliseconds(grace)));
        let claimed = update.bind(now - milliseconds(CLAIM)).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok((claimed > 0).then_some(now))
    }

    async fn forget_old_holds(&self) -> Result<(), StoreError> {
        let mut tx = self.db().begin().await?;
        let now = tx.now_ms().await?;
        query("DELETE FROM blob_holds WHERE until_ms < $1").bind(now).execute(&mut *tx).await?;
        tx.commit().await
    }

    pub(super) async fn named_blobs(&self) -> Result<HashSet<String>, StoreError> {
        let sql = "SELECT blob FROM version_files UNION SELECT blob FROM datasets UNION SELECT blob FROM job_blobs \
                   UNION SELECT blob FROM job_checkpoints";
        let rows = query(sql).fetch_all(self.db()).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    pub(super) async fn is_named<'a>(&self, on: impl Into<On<'a>>, blob: BlobId) -> Result<bool, StoreError> {
        is_named(on, blob).await
    }
}

/// Whether a row names a blob.
pub(super) async fn is_named<'a>(on: impl Into<On<'a>>, blob: BlobId) -> Result<bool, StoreError> {
    let sql = "SELECT 1 FROM version_files WHERE blob = $1 UNION ALL SELECT 1 FROM datasets WHERE blob = $1 \
               UNION ALL SELECT 1 FROM job_blobs WHERE blob = $1 \
               UNION ALL SELECT 1 FROM job_checkpoints WHERE blob = $1 LIMIT 1";
    Ok(query(sql).bind(blob.to_string()).fetch_optional(on).await?.is_some())
}
