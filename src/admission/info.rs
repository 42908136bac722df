//! What the server is and does.

use super::{
    catalog_params::{BaseInfo, LimitsInfo, LoadInfo, ResidencyInfo, ServerInfo},
    params::ServeError,
    service::Service,
};
use crate::kv::PAGE_SIZE;

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl Service {
    /// Describes the base, the limits, residency and load.
    ///
    /// # Errors
    /// None today.
    #[allow(clippy::unused_async, reason = "every call of the service is async to its edges")]
    pub async fn server_info(&self) -> Result<ServerInfo, ServeError> {
        let parts = self.parts();
        let (base, limits, tenants) = (&parts.base, &parts.limits, self.inner.tenants.limits().quotas.default_quota());
        let residency = parts.registry.stats();
        let engine = parts.engine.stats();
        Ok(ServerInfo {
            base: BaseInfo {
                name: parts.base_name.clone(),
                family: base.arch.model_type.clone(),
                fingerprint: base.fingerprint.to_string(),
                causal: base.arch.is_causal(),
                layers: count(base.arch.layers),
                hidden_size: count(base.arch.hidden),
                vocab_size: count(base.arch.vocab),
                context_length: count(self.context()),
                parameters: base.parameters,
                dtype: base.weight_format().to_owned(),
                weight_bytes: base.weight_bytes(),
                device: base.device_name(),
                target_modules: base.sites.linears().map(|(_, e)| e.module.clone()).collect(),
                has_chat_template: parts.chat.is_some(),
            },
            limits: LimitsInfo {
                max_message_bytes: limits.max_message_bytes,
                max_upload_bytes: limits.max_upload_bytes,
                max_queue: count(limits.max_queue),
                max_sequences: count(limits.max_sequences),
                max_batch_tokens: count(limits.max_batch_tokens),
                kv_positions: count(limits.kv_positions),
                max_train_jobs: count(limits.max_train_jobs),
                tenant_max_concurrent: tenants.max_concurrent.map_or(0, count),
                tenant_rate: tenants.rate.map_or(0.0, |rate| rate.per_second),
                tenant_burst: tenants.rate.map_or(0, |rate| rate.burst),
            },
            residency: ResidencyInfo {
                resident: residency.resident,
                leased: residency.leased,
                bytes: residency.bytes,
                budget_bytes: residency.budget,
                hits: residency.hits,
                misses: residency.misses,
                evictions: residency.evictions,
            },
            load: LoadInfo {
                queued: count(engine.waiting),
                running: count(engine.running),
                kv_positions_used: count(engine.pages_used * PAGE_SIZE),
                train_jobs: count(parts.trainer.unfinished()),
            },
            uptime_seconds: self.inner.started.elapsed().as_secs(),
            serving_methods: ["lora", "dora", "bitfit", "head"].map(String::from).to_vec(),
            training_methods: ["lora", "bitfit", "head"].map(String::from).to_vec(),
        })
    }
}
