//! New versions made of others.

use std::sync::Arc;

use super::{
    catalog_params::MergeParams,
    params::{DeltaInfo, ServeError, UploadParams},
    service::{Service, references},
};
use crate::{
    ids::TenantId,
    interop::{self, EncodeMeta},
    merge::{MergeError, Source, merge},
    registry::DeltaLease,
    store::Origin,
};

impl Service {
    /// Publishes a weighted merge of LoRA deltas. One is computed at a time; the others wait.
    ///
    /// # Errors
    /// An unknown delta; deltas that cannot be merged, by name; the policy's.
    pub async fn merge(&self, tenant: &TenantId, params: MergeParams) -> Result<DeltaInfo, ServeError> {
        params.check()?;
        let wanted = references(&params.deltas)?;
        // ahead of the leases: those who wait hold nothing
        let turn = Arc::clone(&self.inner.merging).acquire_owned().await;
        let turn = turn.map_err(|e| ServeError::Internal(e.to_string()))?;
        let mut parts: Vec<(DeltaLease, String, f64)> = Vec::with_capacity(wanted.len());
        for (i, (reference, weight)) in wanted.iter().enumerate() {
            let lease = self.parts().registry.lease(tenant, reference).await?;
            let name = format!("{}@{}", lease.version().name, lease.version().number);
            if parts.iter().any(|(_, other, _)| *other == name) {
                return Err(ServeError::field(format!("deltas[{i}].delta"), format!("names {name} again")));
            }
            parts.push((lease, name, *weight));
        }
        let terms: Vec<String> = parts.iter().map(|(_, name, weight)| format!("{name}*{weight}")).collect();
        let origin = Origin::Merge(format!("{}:{}", params.method.as_str(), terms.join("+")));
        let method = params.method;
        // goes with this call: a client that hangs up ends the work at the next site
        let caller = Arc::new(());
        let waiting = Arc::downgrade(&caller);
        let (labels, files) = self
            .blocking(move |service| {
                let _turn = turn;
                let sources: Vec<Source<'_>> = (parts.iter())
                    .map(|(lease, name, weight)| Source { name, delta: lease.delta(), weight: *weight })
                    .collect();
                let stop = || waiting.strong_count() == 0;
                let merged = merge(&sources, method, &service.base.sites, &stop).map_err(refused)?;
                let meta = EncodeMeta { base_name: service.base_name.clone(), ..EncodeMeta::default() };
                let files = interop::encode(&merged, &service.base, &meta);
                let files = files.map_err(|e| ServeError::field("deltas", e.to_string()))?;
                Ok((merged.spec.labels, files.files))
            })
            .await?;
        drop(caller);
        let upload = UploadParams { name: params.name, policy: params.policy, labels, files };
        self.publish(tenant, upload, origin).await
    }
}

fn refused(e: MergeError) -> ServeError {
    match e {
        MergeError::Refused(message) => ServeError::field("deltas", message),
        MergeError::Stopped | MergeError::Tensor(_) => ServeError::Internal(e.to_string()),
    }
}
