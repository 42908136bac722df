//! New versions made of others.

use std::sync::Arc;

use super::{
    catalog_params::MergeParams,
    params::{DeltaInfo, ServeError, UploadParams},
    service::{Service, references},
    training::note_of,
};
use crate::{
    ids::TenantId,
    interop::{self, EncodeMeta},
    merge::{MergeError, Source, merge},
    registry::{DeltaLease, RegistryError},
    store::Origin,
};

/// Merges that are made or wait.
pub(super) const MERGES: usize = 8;

impl Service {
    /// Publishes a weighted merge of LoRA deltas. One is computed at a time; some others wait, more are refused.
    ///
    /// # Errors
    /// An unknown delta; deltas that cannot be merged, by name; too many merges; no room for one in the resident budget, which
    /// its result and its files are counted against while it is made; the policy's.
    pub async fn merge(&self, tenant: &TenantId, params: MergeParams) -> Result<DeltaInfo, ServeError> {
        note_of(tenant, &params.name);
        params.check()?;
        let wanted = references(&params.deltas)?;
        let _place =
            self.inner.merge_places.try_acquire().map_err(|_| {
                ServeError::Overloaded(format!("{MERGES} merges are being made or wait; at most {MERGES}"))
            })?;
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
        // what is made, and the same as files
        let bytes: u64 = parts.iter().map(|(lease, _, _)| lease.delta().bytes()).sum();
        let room = self.parts().registry.work_space(bytes.saturating_mul(2)).await.map_err(|e| match e {
            RegistryError::TooLarge { bytes, budget } => {
                let message = format!("a merge of these takes {bytes} bytes; the resident budget is {budget} bytes");
                ServeError::field("deltas", message)
            }
            other => other.into(),
        })?;
        let terms: Vec<String> = parts.iter().map(|(_, name, weight)| format!("{name}*{weight}")).collect();
        let origin = Origin::Merge(format!("{}:{}", params.method.as_str(), terms.join("+")));
        let method = params.method;
        // goes with this call: a client that hangs up ends the work, also in the middle of a site
        let caller = Arc::new(());
        let waiting = Arc::downgrade(&caller);
        let (labels, files) = self
            .blocking(move |service| {
                let _held = (turn, room);
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
        self.publish(tenant, upload, origin).await.map_err(|e| e.of_files("deltas"))
    }
}

fn refused(e: MergeError) -> ServeError {
    match e {
        MergeError::Refused(message) => ServeError::field("deltas", message),
        MergeError::Stopped | MergeError::Tensor(_) => ServeError::Internal(e.to_string()),
    }
}
