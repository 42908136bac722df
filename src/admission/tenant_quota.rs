//! A tenant's limits and what it uses of them.

use super::{
    params::{QuotaItem, ServeError},
    service::Service,
    tenants::InUse,
};
use crate::{ids::TenantId, model::Base, train::Prepared};

/// One limit, and what is used of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuotaUse {
    /// Its name: `deltas`, `tokens_per_second`, ...
    pub name: &'static str,
    /// The most, or the rate per second; `None` = no limit.
    pub limit: Option<f64>,
    /// Of a rate: how much at once.
    pub burst: Option<u32>,
    /// How much there is; of a rate, how much of the burst. More than the burst is a debt.
    pub used: f64,
}

impl Service {
    /// All limits of a tenant, and what it uses.
    ///
    /// # Errors
    /// The store's.
    pub async fn quota(&self, tenant: &TenantId) -> Result<Vec<QuotaUse>, ServeError> {
        let (parts, quota) = (self.parts(), self.inner.tenants.limits().quotas.of(tenant));
        let InUse { calls, rate, tokens } = self.inner.tenants.in_use(tenant);
        let usage = parts.store.tenant_usage(tenant).await?;
        let resident = parts.registry.resident_bytes(tenant).await;
        let models = parts.store.model_bytes(tenant).await?;
        let of_rate = |name, limit: Option<super::params::Rate>, used| QuotaUse {
            name,
            limit: limit.map(|rate| rate.per_second),
            burst: limit.map(|rate| rate.burst),
            used,
        };
        let mut all = vec![
            QuotaUse {
                name: "concurrent_calls",
                limit: quota.max_concurrent.map(|n| n as f64),
                burst: None,
                used: calls as f64,
            },
            of_rate("calls_per_second", quota.rate, rate),
            of_rate("tokens_per_second", quota.tokens, tokens),
        ];
        all.extend(QuotaItem::ALL.map(|item| {
            let used = match item {
                QuotaItem::Deltas => usage.deltas,
                QuotaItem::Versions => usage.versions,
                QuotaItem::StoredBytes => usage.stored_bytes,
                QuotaItem::ResidentBytes => resident,
                QuotaItem::TrainJobs => parts.trainer.unfinished_of(tenant) as u64,
                QuotaItem::DatasetBytes => usage.dataset_bytes,
                QuotaItem::ModelBytes => models,
            };
            QuotaUse { name: item.name(), limit: quota.of(item).map(|n| n as f64), burst: None, used: used as f64 }
        }));
        Ok(all)
    }

    /// Refuses a job of full fine-tuning whose model its tenant could not keep: now, not when it has been trained.
    pub(super) async fn check_model_room(&self, tenant: &TenantId, prepared: &Prepared) -> Result<(), ServeError> {
        if prepared.spec.full.is_none() {
            return Ok(());
        }
        Ok(self.parts().store.check_new_model(tenant, model_bytes(&self.parts().base)).await?)
    }
}

/// About what a trained model's files take: its numbers are f32.
fn model_bytes(base: &Base) -> u64 {
    base.parameters.saturating_mul(4)
}
