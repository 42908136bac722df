//! Server information to the wire.

use crate::{
    admission::catalog_params::{BaseInfo, LimitsInfo, LoadInfo, ResidencyInfo, ServerInfo},
    grpc::proto,
};

/// The reply of GetServerInfo.
pub(in crate::grpc) fn server_info(info: ServerInfo) -> proto::GetServerInfoResponse {
    proto::GetServerInfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        base: Some(base(info.base)),
        limits: Some(limits(info.limits)),
        residency: Some(residency(info.residency)),
        load: Some(load(info.load)),
        uptime_seconds: info.uptime_seconds,
        serving_methods: info.serving_methods,
        training_methods: info.training_methods,
    }
}

fn base(b: BaseInfo) -> proto::BaseInfo {
    proto::BaseInfo {
        name: b.name,
        family: b.family,
        fingerprint: b.fingerprint,
        causal: b.causal,
        layers: b.layers,
        hidden_size: b.hidden_size,
        vocab_size: b.vocab_size,
        context_length: b.context_length,
        parameters: b.parameters,
        dtype: b.dtype,
        weight_bytes: b.weight_bytes,
        device: b.device,
        target_modules: b.target_modules,
        has_chat_template: b.has_chat_template,
    }
}

fn limits(l: LimitsInfo) -> proto::Limits {
    proto::Limits {
        max_message_bytes: l.max_message_bytes,
        max_upload_bytes: l.max_upload_bytes,
        max_queue: l.max_queue,
        max_sequences: l.max_sequences,
        max_batch_tokens: l.max_batch_tokens,
        kv_positions: l.kv_positions,
        max_train_jobs: l.max_train_jobs,
        tenant_max_concurrent: l.tenant_max_concurrent,
        tenant_rate: l.tenant_rate,
        tenant_burst: l.tenant_burst,
    }
}

fn residency(r: ResidencyInfo) -> proto::Residency {
    proto::Residency {
        resident: r.resident,
        leased: r.leased,
        bytes: r.bytes,
        budget_bytes: r.budget_bytes,
        hits: r.hits,
        misses: r.misses,
        evictions: r.evictions,
    }
}

fn load(l: LoadInfo) -> proto::Load {
    proto::Load {
        queued: l.queued,
        running: l.running,
        kv_positions_used: l.kv_positions_used,
        train_jobs: l.train_jobs,
    }
}
