//! Limits of the trainer.

use std::{collections::HashMap, sync::Arc};

use crate::{
    admission::params::{Quota, QuotaOf},
    ids::TenantId,
    ops::{Halves, Priority},
};

/// How many jobs there may be, and how they train beside each other.
#[derive(Clone)]
pub struct TrainerConfig {
    /// Jobs that train at the same time, taking turns.
    pub max_concurrent_jobs: usize,
    /// Whether jobs of other servers are taken over.
    pub takes_over: bool,
    /// Jobs that may wait or run, those included that are being published.
    pub max_jobs: usize,
    /// Waiting and running jobs of one tenant.
    pub max_jobs_per_tenant: usize,
    /// Who knows the limits of tenants; `None`: there are none but these.
    pub quotas: Option<QuotaOf>,
    /// Shares of jobs' starts, while jobs of several tenants wait, of those that have another than 1.
    pub weights: Arc<HashMap<TenantId, u32>>,
    /// Paused jobs of one tenant.
    pub max_paused_per_tenant: usize,
    /// Jobs whose small pieces may be trained in one pass on the base; 1 = each by itself, and so the same bits in any
    /// company.
    pub share: usize,
    /// How its threads are treated beside those of serving.
    pub priority: Priority,
    /// Which of its products may be computed in halves.
    pub halves: Halves,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self {
            max_concurrent_jobs: 4,
            takes_over: true,
            max_jobs: 64,
            max_jobs_per_tenant: 16,
            quotas: None,
            weights: Arc::default(),
            max_paused_per_tenant: 64,
            share: 1,
            priority: Priority::Normal,
            halves: Halves::Never,
        }
    }
}

impl TrainerConfig {
    /// How many jobs of a tenant may wait or run: by the server's own limit, and by the tenant's.
    pub(super) fn jobs_of(&self, tenant: &TenantId) -> (usize, Quota) {
        (self.max_jobs_per_tenant, self.quotas.as_ref().map(|quotas| quotas(tenant)).unwrap_or_default())
    }
}

impl std::fmt::Debug for TrainerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainerConfig").field("max_jobs", &self.max_jobs).finish_non_exhaustive()
    }
}
