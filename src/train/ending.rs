//! The end of all jobs of a tenant.

use std::time::{Duration, Instant};

use super::{
    error::TrainError,
    handle::{Shared, TrainerHandle},
};
use crate::ids::TenantId;

/// How often it is looked whether the jobs have ended.
const LOOK: Duration = Duration::from_millis(20);

impl Shared {
    /// Jobs of a tenant that are not over, paused ones, too.
    fn jobs_of(&self, tenant: &TenantId) -> Vec<String> {
        self.live.lock().iter().filter(|(_, live)| live.tenant == *tenant).map(|(id, _)| id.clone()).collect()
    }
}

impl TrainerHandle {
    /// Jobs of a tenant that wait or run.
    pub fn unfinished_of(&self, tenant: &TenantId) -> usize {
        self.shared.live.lock().values().filter(|live| live.tenant == *tenant && !live.paused).count()
    }

    /// Cancels all jobs of a tenant, paused ones, too, and waits until none is left; false if some are after so long. New
    /// ones must be refused meanwhile.
    ///
    /// # Errors
    /// The log's.
    pub async fn end_tenant(&self, tenant: &TenantId, within: Duration) -> Result<bool, TrainError> {
        let until = Instant::now() + within;
        loop {
            let jobs = self.shared.jobs_of(tenant);
            if jobs.is_empty() {
                return Ok(true);
            }
            for id in &jobs {
                match self.cancel(tenant, id).await {
                    // one whose row is not there yet is refused by the store; without a trainer nothing runs
                    Ok(_) | Err(TrainError::NotFound(_) | TrainError::Down) => {}
                    Err(e) => return Err(e),
                }
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
