//! Whose a job is, where several servers share the store.

use std::collections::BTreeSet;

use super::{JobLog, LogError, StoredJob, stored};
use crate::{
    ids::TenantId,
    store::{JobAsk, StoreError},
};

impl JobLog {
    /// Whether other servers may run jobs of the same store.
    pub fn is_shared(&self) -> bool {
        self.store.is_shared()
    }

    /// Whether the store was closed.
    pub fn is_closed(&self) -> bool {
        self.store.is_closed()
    }

    /// Renews this server's lease on its jobs; false: another process of this server has it.
    ///
    /// # Errors
    /// The store's.
    pub async fn renew_lease(&self) -> Result<bool, LogError> {
        match self.store.renew_lease().await {
            Ok(()) => Ok(true),
            Err(StoreError::Replaced) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes the unfinished jobs this server's that no living one owns, and gives back those and its own, but for those of
    /// `except`; oldest first. One that cannot be read does not hide the others.
    ///
    /// # Errors
    /// The store's.
    pub async fn claim(&self, base: &str, except: &BTreeSet<String>) -> Result<Vec<StoredJob>, LogError> {
        let claimed = self.store.claim_jobs(base, except).await?;
        let readable = claimed.into_iter().filter_map(|record| {
            let id = record.id.clone();
            stored(record).inspect_err(|error| tracing::error!(job = id, %error, "a stored job is unreadable")).ok()
        });
        Ok(readable.collect())
    }

    /// Makes a paused job this server's: whether it is paused still.
    ///
    /// # Errors
    /// The store's.
    pub async fn claim_paused(&self, id: &str) -> Result<bool, LogError> {
        Ok(self.store.claim_paused(id).await?)
    }

    /// Whether a job is this server's.
    ///
    /// # Errors
    /// The store's.
    pub async fn owns(&self, id: &str) -> Result<bool, LogError> {
        Ok(self.store.owns_job(id).await?)
    }

    /// This server's unfinished jobs.
    ///
    /// # Errors
    /// The store's.
    pub async fn owned(&self) -> Result<BTreeSet<String>, LogError> {
        Ok(self.store.owned_jobs().await?)
    }

    /// Asks a job's owner to do something with it.
    ///
    /// # Errors
    /// The store's.
    pub async fn ask(&self, tenant: &TenantId, id: &str, ask: JobAsk) -> Result<(), LogError> {
        Ok(self.store.ask_of_job(tenant, id, ask).await?)
    }

    /// What other servers were asked to do with this server's jobs.
    ///
    /// # Errors
    /// The store's.
    pub async fn take_asks(&self) -> Result<Vec<(String, JobAsk)>, LogError> {
        Ok(self.store.take_asks().await?)
    }
}
