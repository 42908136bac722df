//! The end of a tenant: of its calls and jobs, and of all that it has.
//!
//! First nothing new begins: admission takes no calls of the tenant, and the store nothing new for it. Then what runs is
//! ended, with a bound. Then all goes: rows, models, blobs that nobody else names, what is resident, pages of the prefix
//! cache. A deletion that did not come to its end may be done again, and goes on.

use std::time::{Duration, Instant};

use super::{params::ServeError, service::Service};
use crate::{
    audit,
    ids::TenantId,
    store::{ClosedTenant, DeletedTenant},
};

/// Longest time for jobs to end.
const BOUND: Duration = Duration::from_secs(30);
/// Longest time for calls to end: longer takes only a client that does not read what it was told.
const CALLS: Duration = Duration::from_secs(10);
/// How often the engine is told again while calls are on their way to it.
const AGAIN: Duration = Duration::from_millis(50);

/// What was deleted with a tenant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantDeleted {
    /// Names of deltas.
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
    /// Blobs that somebody still reads; they are removed within the hour.
    pub blobs_left: u64,
}

impl From<DeletedTenant> for TenantDeleted {
    fn from(d: DeletedTenant) -> Self {
        let DeletedTenant { deltas, versions, datasets, jobs, models, blobs, blobs_left } = d;
        Self { deltas, versions, datasets, jobs, models, blobs, blobs_left }
    }
}

impl Service {
    /// Deletes all that a tenant has, and ends what runs for it. Goes on where the caller leaves; a tenant that has nothing is
    /// deleted at once.
    ///
    /// # Errors
    /// [`ServeError::TenantDeleting`] if somebody else deletes it at this moment, or something of it does not end in time.
    pub async fn delete_tenant(&self, tenant: &TenantId) -> Result<TenantDeleted, ServeError> {
        audit::note(|note| {
            note.tenant = tenant.to_string();
            note.object = tenant.to_string();
        });
        let (this, tenant) = (self.clone(), tenant.clone());
        let task = tokio::spawn(async move { this.delete_all_of(&tenant).await });
        task.await.map_err(|e| ServeError::Internal(format!("deleting a tenant ended early: {e}")))?
    }

    async fn delete_all_of(&self, tenant: &TenantId) -> Result<TenantDeleted, ServeError> {
        let calls = self.inner.tenants.close(tenant).ok_or_else(ServeError::deleting)?;
        let closed: ClosedTenant = self.parts().store.close_tenant(tenant);
        if !self.parts().trainer.end_tenant(tenant, BOUND).await? {
            let message = format!("a training job of this tenant did not end within {BOUND:?}; delete it again");
            return Err(ServeError::TenantDeleting(message));
        }
        let until = Instant::now() + CALLS;
        loop {
            // a call that was admitted before may hand over its next sequence after
            self.end_sequences(tenant, until).await?;
            if calls.left(AGAIN).await {
                break;
            }
            if Instant::now() >= until {
                tracing::warn!(%tenant, "a deleted tenant has calls whose end was not read");
                break;
            }
        }
        // once more: pages may have got their names until the last one ended
        self.end_sequences(tenant, Instant::now() + CALLS).await?;
        let deleted = self.parts().registry.delete_tenant(tenant, &closed).await?;
        tracing::info!(
            %tenant, deltas = deleted.deltas, versions = deleted.versions, datasets = deleted.datasets,
            jobs = deleted.jobs, models = deleted.models, blobs = deleted.blobs, left = deleted.blobs_left, "deleted a tenant"
        );
        Ok(deleted.into())
    }

    /// Has the engine end all sequences of a tenant and forget its pages.
    async fn end_sequences(&self, tenant: &TenantId, until: Instant) -> Result<(), ServeError> {
        loop {
            if let Some(ended) = self.parts().engine.end_tenant(tenant) {
                // answered by letting go of it
                let _ = ended.await;
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(ServeError::Overloaded("the engine takes nothing; delete the tenant again".into()));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
