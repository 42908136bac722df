//! What a tenant has in the store, against its limits, and how all of it goes.
//!
//! Sizes are as the tenant knows them: bytes that two versions share count twice, and whether another tenant has the same
//! bytes makes no difference. A limit is checked before bytes are written and again in the transaction that names them,
//! behind every other writer.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Store, StoreError, VersionRecord,
    db::{Conn, from_db, parse, query},
};
use crate::{
    admission::params::{Quota, QuotaItem, QuotaOf, TenantLimit},
    ids::{BlobId, TenantId},
};

/// How often a blob that somebody holds is tried again, and how long after.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// What the store knows of tenants beside their rows.
#[derive(Default)]
pub(super) struct Tenants {
    quotas: OnceLock<QuotaOf>,
    /// Nothing new is stored for these.
    closed: Mutex<HashSet<TenantId>>,
    /// Blobs that a tenant's deletes and refused uploads may have left to the collection; after a restart it removes them
    /// at once.
    orphans: Mutex<HashSet<(TenantId, BlobId)>>,
}

/// What a tenant has stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantUsage {
    /// Names that have a version.
    pub deltas: u64,
    /// Versions of all names.
    pub versions: u64,
    /// Bytes of their files.
    pub stored_bytes: u64,
    /// Bytes of datasets.
    pub dataset_bytes: u64,
}

/// What was deleted with a tenant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeletedTenant {
    /// Names of deltas, also those whose versions had been deleted before.
    pub deltas: u64,
    /// Versions of them.
    pub versions: u64,
    /// Datasets.
    pub datasets: u64,
    /// Jobs.
    pub jobs: u64,
    /// Whole models.
    pub models: u64,
    /// Blobs that nobody else names.
    pub blobs: u64,
    /// Blobs that somebody still reads; the hourly collection removes them.
    pub blobs_left: u64,
}

/// A tenant for whom nothing new is stored until this is dropped.
pub struct ClosedTenant {
    tenant: TenantId,
    tenants: Arc<Tenants>,
}

impl Drop for ClosedTenant {
    fn drop(&mut self) {
        self.tenants.closed.lock().remove(&self.tenant);
    }
}

impl Store {
    /// Says who knows the limits of tenants; without, there are none. Once.
    pub fn set_quotas(&self, quotas: QuotaOf) {
        // a second one is a mistake in the program that changes nothing
        let _ = self.inner.tenants.quotas.set(quotas);
    }

    pub(super) fn quota(&self, tenant: &TenantId) -> Quota {
        self.inner.tenants.quotas.get().map(|quotas| quotas(tenant)).unwrap_or_default()
    }

    /// Stores nothing new for a tenant until what is returned is dropped; what is under way is refused when it comes to its
    /// transaction.
    pub fn close_tenant(&self, tenant: &TenantId) -> ClosedTenant {
        let tenants = Arc::clone(&self.inner.tenants);
        tenants.closed.lock().insert(tenant.clone());
        ClosedTenant { tenant: tenant.clone(), tenants }
    }

    /// Remembers whose blobs these were.
    pub(super) fn orphan(&self, tenant: &TenantId, blobs: impl IntoIterator<Item = BlobId>) {
        self.inner.tenants.orphans.lock().extend(blobs.into_iter().map(|blob| (tenant.clone(), blob)));
    }

    /// Forgets whose all other blobs were: they are gone.
    pub(super) fn orphans_among(&self, stored: &HashSet<BlobId>) {
        self.inner.tenants.orphans.lock().retain(|(_, blob)| stored.contains(blob));
    }

    /// To be asked with the write lock held.
    pub(super) fn check_open(&self, tenant: &TenantId) -> Result<(), StoreError> {
        if self.inner.tenants.closed.lock().contains(tenant) { Err(StoreError::TenantClosed) } else { Ok(()) }
    }

    /// What a tenant has stored.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn tenant_usage(&self, tenant: &TenantId) -> Result<TenantUsage, StoreError> {
        let mut reader = self.db().snapshot().await?;
        usage(&mut reader, tenant).await
    }

    /// Bytes of the models that a tenant's jobs made.
    ///
    /// # Errors
    /// The file system's, or what the database refuses.
    pub async fn model_bytes(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        let models = self.models();
        let found = {
            let models = models.clone();
            tokio::task::spawn_blocking(move || models.jobs()).await??
        };
        let mut bytes = 0_u64;
        for job in found {
            if self.any_job(&job).await?.is_some_and(|record| record.tenant == *tenant) {
                let models = models.clone();
                let model = tokio::task::spawn_blocking(move || models.find(&job)).await??;
                bytes = bytes.saturating_add(model.map_or(0, |model| model.bytes));
            }
        }
        Ok(bytes)
    }

    /// Whether a tenant may have so many bytes of models more.
    ///
    /// # Errors
    /// [`StoreError::Quota`]; as [`Self::model_bytes`].
    pub async fn check_new_model(&self, tenant: &TenantId, bytes: u64) -> Result<(), StoreError> {
        let quota = self.quota(tenant);
        if quota.model_bytes.is_none() {
            return Ok(());
        }
        let used = self.model_bytes(tenant).await?;
        quota.check(QuotaItem::ModelBytes, used, bytes).map_err(StoreError::Quota)
    }

    /// Whether a tenant may have a dataset of so many bytes more: to be asked before the bytes are written.
    ///
    /// # Errors
    /// [`StoreError::Quota`], or what the database refuses.
    pub async fn check_dataset_room(&self, tenant: &TenantId, bytes: u64) -> Result<(), StoreError> {
        let mut reader = self.db().snapshot().await?;
        self.check_dataset(&mut reader, tenant, bytes).await
    }

    /// As [`Self::check_dataset_room`], in the transaction that names it; and whether anything is stored for the tenant.
    pub(super) async fn check_new_dataset(
        &self,
        tx: &mut Conn,
        tenant: &TenantId,
        bytes: u64,
    ) -> Result<(), StoreError> {
        self.check_open(tenant)?;
        self.check_dataset(tx, tenant, bytes).await
    }

    async fn check_dataset(&self, tx: &mut Conn, tenant: &TenantId, bytes: u64) -> Result<(), StoreError> {
        let quota = self.quota(tenant);
        if quota.dataset_bytes.is_none() {
            return Ok(());
        }
        let used = usage(tx, tenant).await?.dataset_bytes;
        quota.check(QuotaItem::DatasetBytes, used, bytes).map_err(StoreError::Quota)
    }

    /// Deletes all rows of a tenant that is closed, the models of its jobs and the blobs that no row names any more, and
    /// leaves no bytes of deleted rows in the database's files. May be done again after a failure: it goes on.
    ///
    /// # Errors
    /// What the file system, the database or the blob store refuses.
    pub async fn delete_tenant(&self, closed: &ClosedTenant) -> Result<DeletedTenant, StoreError> {
        let tenant = closed.tenant.as_str();
        let mut deleted = DeletedTenant::default();
        // models first: without the job's row nobody would know whose they are
        let jobs: Vec<String> = {
            let rows = query("SELECT id FROM jobs WHERE tenant = $1").bind(tenant);
            let rows = rows.fetch_all(self.db().readers()).await?;
            rows.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<_, StoreError>>()?
        };
        let models = self.models();
        let remove =
            move || -> Result<u64, StoreError> { jobs.iter().map(|job| models.remove(job).map(u64::from)).sum() };
        deleted.models = tokio::task::spawn_blocking(remove).await??;

        let mut tx = self.db().begin().await?;
        let mut blobs: BTreeSet<BlobId> = BTreeSet::new();
        for sql in [
            "SELECT blob FROM version_files WHERE tenant = $1",
            "SELECT blob FROM datasets WHERE tenant = $1",
            "SELECT blob FROM job_blobs WHERE job_id IN (SELECT id FROM jobs WHERE tenant = $1)",
            "SELECT blob FROM job_checkpoints WHERE job_id IN (SELECT id FROM jobs WHERE tenant = $1)",
        ] {
            for row in query(sql).bind(tenant).fetch_all(&mut *tx).await? {
                blobs.insert(parse("blobs", row.try_get(0)?)?);
            }
        }
        blobs.extend(
            self.inner.tenants.orphans.lock().iter().filter(|(t, _)| *t == closed.tenant).map(|(_, blob)| *blob),
        );
        // children before parents; a name's current version refers back to it, and is checked at the end only
        let mut gone = [0_u64; 9];
        for (sql, gone) in [
            "DELETE FROM idempotency WHERE tenant = $1",
            "DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM job_blobs WHERE job_id IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM job_checkpoints WHERE job_id IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM jobs WHERE tenant = $1",
            "DELETE FROM datasets WHERE tenant = $1",
            "DELETE FROM version_files WHERE tenant = $1",
            "DELETE FROM versions WHERE tenant = $1",
            "DELETE FROM deltas WHERE tenant = $1",
        ]
        .into_iter()
        .zip(&mut gone)
        {
            *gone = query(sql).bind(tenant).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        [deleted.jobs, deleted.datasets, deleted.versions, deleted.deltas] = [gone[4], gone[5], gone[7], gone[8]];

        // until they are removed: a failure on the way does not lose sight of them
        self.orphan(&closed.tenant, blobs.iter().copied());
        for blob in blobs {
            match self.remove_unnamed(blob).await? {
                Some(true) => deleted.blobs += 1,
                Some(false) => {
                    deleted.blobs_left += 1;
                    continue;
                }
                None => {}
            }
            self.inner.tenants.orphans.lock().remove(&(closed.tenant.clone(), blob));
        }
        if gone.iter().any(|rows| *rows > 0) {
            self.db().vacuum().await?;
            for _ in 0..TRIES {
                if self.db().empty_log().await? {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok(deleted)
    }

    /// Removes a blob unless a row names it (`None`); false if somebody holds it all the time.
    async fn remove_unnamed(&self, blob: BlobId) -> Result<Option<bool>, StoreError> {
        for _ in 0..TRIES {
            if self.is_named(self.db(), blob).await? {
                return Ok(None);
            }
            if self.collect(blob, Duration::ZERO).await? {
                return Ok(Some(true));
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(Some(false))
    }
}

impl VersionRecord {
    /// Whether the tenant may have this version more. The bytes of a version that the name has are no other.
    pub(super) async fn check_room(&self, tx: &mut Conn, quota: &Quota) -> Result<(), StoreError> {
        if !quota.bounds_versions() {
            return Ok(());
        }
        let sql = "SELECT id FROM versions WHERE tenant = $1 AND name = $2 AND deleted_ms IS NULL";
        let same = query(sql).bind(self.tenant.as_str()).bind(self.name.as_str());
        let (rows, id) = (same.fetch_all(&mut *tx).await?, self.id.to_string());
        for row in &rows {
            if row.try_get::<String, _>(0)? == id {
                return Ok(());
            }
        }
        let used = usage(tx, &self.tenant).await?;
        let check = || -> Result<(), TenantLimit> {
            quota.check(QuotaItem::Deltas, used.deltas, u64::from(rows.is_empty()))?;
            quota.check(QuotaItem::Versions, used.versions, 1)?;
            quota.check(QuotaItem::StoredBytes, used.stored_bytes, self.stored_bytes)
        };
        check().map_err(StoreError::Quota)
    }
}

async fn usage(tx: &mut Conn, tenant: &TenantId) -> Result<TenantUsage, StoreError> {
    let sql = "SELECT (SELECT COUNT(*) FROM deltas WHERE tenant = $1 AND current IS NOT NULL), \
               (SELECT COUNT(*) FROM versions WHERE tenant = $1 AND deleted_ms IS NULL), \
               (SELECT CAST(COALESCE(SUM(stored_bytes), 0) AS BIGINT) FROM versions \
                WHERE tenant = $1 AND deleted_ms IS NULL), \
               (SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM datasets WHERE tenant = $1)";
    let row = query(sql).bind(tenant.as_str()).fetch_one(tx).await?;
    let count = |at: usize| -> Result<u64, StoreError> { from_db("versions", row.try_get(at)?) };
    Ok(TenantUsage { deltas: count(0)?, versions: count(1)?, stored_bytes: count(2)?, dataset_bytes: count(3)? })
}

#[cfg(test)]
mod tests;
