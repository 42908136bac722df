//! New versions made of others.

use std::sync::Arc;

use super::{
    catalog_params::{MergeMethod, MergeParams},
    params::{DeltaInfo, ServeError, UploadParams},
    service::Service,
};
use crate::{
    ids::TenantId,
    interop::{self, EncodeMeta},
    merge::{MergeError, Source, merge},
    registry::DeltaLease,
    store::Origin,
};

impl Service {
    /// Publishes a weighted merge of LoRA deltas.
    ///
    /// # Errors
    /// An unknown delta; deltas that cannot be merged, by name; the policy's.
    pub async fn merge(&self, tenant: &TenantId, params: MergeParams) -> Result<DeltaInfo, ServeError> {
        params.check()?;
        let mut parts: Vec<(DeltaLease, String, f64)> = Vec::with_capacity(params.deltas.len());
        for (i, (reference, weight)) in params.deltas.iter().enumerate() {
            let missing = || ServeError::field(&format!("deltas[{i}].delta"), "must not be empty");
            let lease = self.lease(tenant, reference).await?.ok_or_else(missing)?;
            let name = format!("{}@{}", lease.version().name, lease.version().number);
            parts.push((lease, name, *weight));
        }
        let terms: Vec<String> = parts.iter().map(|(_, name, weight)| format!("{name}*{weight}")).collect();
        let origin = Origin::Merge(format!("{}:{}", params.method.as_str(), terms.join("+")));
        let method: MergeMethod = params.method;
        let files = self
            .blocking(move |service| {
                let source = |p: &'_ (DeltaLease, String, f64)| (Arc::clone(p.0.delta()), p.1.clone(), p.2);
                let held: Vec<_> = parts.iter().map(source).collect();
                let sources: Vec<Source<'_>> =
                    held.iter().map(|(delta, name, weight)| Source { name, delta, weight: *weight }).collect();
                let merged = merge(&sources, method, &service.base.sites).map_err(refused)?;
                let meta = EncodeMeta { base_name: service.base_name.clone(), ..EncodeMeta::default() };
                interop::encode(&merged, &service.base, &meta).map_err(|e| ServeError::field("deltas", e.to_string()))
            })
            .await?;
        let upload = UploadParams { name: params.name, policy: params.policy, labels: vec![], files: files.files };
        self.publish(tenant, upload, origin).await
    }
}

fn refused(e: MergeError) -> ServeError {
    match e {
        MergeError::Refused(message) => ServeError::field("deltas", message),
        MergeError::Tensor(e) => ServeError::Internal(e.to_string()),
    }
}
