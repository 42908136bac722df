//! Deltas: upload, look up, list, delete, pin, promote, download.

use std::sync::Arc;

use super::{
    catalog_params::{AliasParams, DeltaDetail, DownloadReply, Page, PageRequest},
    params::{DeltaInfo, ServeError, UploadParams},
    service::Service,
    training::note_of,
};
use crate::{
    audit,
    delta::{DeltaFiles, Task},
    ids::{DeltaId, DeltaName, TenantId},
    interop::{self, EncodeMeta, InteropError},
    registry::{DeltaRef, DeltaStatus, ListQuery, Publication, VersionRecord, VersionSel},
    store::Origin,
};

fn name(field: &str, name: &str) -> Result<DeltaName, ServeError> {
    DeltaName::new(name).map_err(|e| ServeError::field(field, e.to_string()))
}

/// A version as it is recorded.
fn noted(version: &VersionRecord) -> audit::Version {
    audit::Version { number: version.number, id: version.id.to_string() }
}

fn info(status: &DeltaStatus) -> DeltaInfo {
    let v = &status.version;
    DeltaInfo {
        name: v.name.to_string(),
        number: v.number,
        id: v.id,
        current: status.current,
        methods: v.spec.methods.clone(),
        task: v.spec.task.as_str().into(),
        labels: v.spec.labels.clone(),
        parameters: v.spec.parameters,
        stored_bytes: v.stored_bytes,
        resident_bytes: status.resident_bytes,
        leases: status.leases,
        pinned: status.pinned,
        origin: v.origin.clone(),
        created_ms: v.created_ms,
        corrupt: status.corrupt,
        problem: (v.spec.task == Task::SeqCls).then_some(v.spec.problem),
    }
}

impl Service {
    /// Publishes a PEFT folder. It is decoded for this base first: what cannot be served is never stored.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn upload(&self, tenant: &TenantId, params: UploadParams) -> Result<DeltaInfo, ServeError> {
        self.publish(tenant, params, Origin::Upload).await
    }

    /// Publishes a folder from anywhere.
    pub(crate) async fn publish(
        &self,
        tenant: &TenantId,
        params: UploadParams,
        origin: Origin,
    ) -> Result<DeltaInfo, ServeError> {
        note_of(tenant, &params.name);
        let name = name("name", &params.name)?;
        let before = self.current(tenant, &name);
        audit::note(|note| note.before = before);
        let mut files = DeltaFiles { files: params.files };
        if !params.labels.is_empty() {
            let labels = serde_json::to_vec(&params.labels).map_err(|e| ServeError::Internal(e.to_string()))?;
            files.files.insert("labels.json".into(), labels.into());
        }
        let base = Arc::clone(&self.parts().base);
        let decode = move || interop::decode(&files, &base).map(|delta| (delta.spec.clone(), files));
        let decoded = tokio::task::spawn_blocking(decode).await;
        let (spec, files) = decoded.map_err(|e| ServeError::Internal(e.to_string()))??;
        let publication = Publication { name, files, spec, policy: params.policy, origin };
        let version = self.parts().registry.publish(tenant, publication).await?;
        audit::note(|note| note.after = Some(noted(&version)));
        self.status(tenant, &version.name, version.number).await
    }

    /// What a name stands for now, as it is recorded.
    fn current(&self, tenant: &TenantId, name: &DeltaName) -> Option<audit::Version> {
        let wanted = DeltaRef::current(name.clone());
        self.parts().registry.resolve(tenant, &wanted).ok().map(|version| noted(&version))
    }

    async fn status(&self, tenant: &TenantId, name: &DeltaName, number: u64) -> Result<DeltaInfo, ServeError> {
        let wanted = DeltaRef { name: name.clone(), version: Some(VersionSel::Number(number)) };
        Ok(info(&self.parts().registry.get(tenant, &wanted).await?))
    }

    /// A version and its siblings.
    ///
    /// # Errors
    /// Unknown, or another tenant's: the same answer.
    pub async fn get_delta(&self, tenant: &TenantId, reference: &str) -> Result<DeltaDetail, ServeError> {
        let wanted: DeltaRef = reference.parse().map_err(ServeError::from)?;
        let registry = &self.parts().registry;
        let delta = info(&registry.get(tenant, &wanted).await?);
        let mut query =
            ListQuery { prefix: delta.name.clone(), all_versions: true, page_size: 1000, ..Default::default() };
        let mut versions = Vec::new();
        loop {
            let page = registry.list(tenant, &query).await?;
            versions.extend(page.deltas.iter().map(info).filter(|d| d.name == delta.name));
            if page.next_page_token.is_empty()
                || page.deltas.last().is_some_and(|d| d.version.name.as_str() != delta.name)
            {
                return Ok(DeltaDetail { delta, versions });
            }
            query.page_token = page.next_page_token;
        }
    }

    /// Current versions by name.
    ///
    /// # Errors
    /// A page token that this server did not make.
    pub async fn list_deltas(
        &self,
        tenant: &TenantId,
        page: PageRequest,
        prefix: &str,
    ) -> Result<Page<DeltaInfo>, ServeError> {
        let query = ListQuery {
            prefix: prefix.to_owned(),
            all_versions: false,
            page_token: page.token.unwrap_or_default(),
            page_size: page.size as usize,
        };
        let page = self.parts().registry.list(tenant, &query).await?;
        let next = Some(page.next_page_token).filter(|t| !t.is_empty());
        Ok(Page { items: page.deltas.iter().map(info).collect(), next })
    }

    /// Deletes a name with all its versions, or one version (`name@3`). Running requests keep theirs.
    ///
    /// # Errors
    /// Unknown; or not the expected version.
    pub async fn delete_delta(
        &self,
        tenant: &TenantId,
        reference: &str,
        expected: Option<DeltaId>,
    ) -> Result<(), ServeError> {
        note_of(tenant, reference);
        let wanted: DeltaRef = reference.parse().map_err(ServeError::from)?;
        let before = self.parts().registry.resolve(tenant, &wanted).ok().map(|version| noted(&version));
        audit::note(|note| note.before = before);
        Ok(self.parts().registry.delete(tenant, &wanted, expected).await?)
    }

    /// Keeps a name's current version resident, or no longer.
    ///
    /// # Errors
    /// Unknown; or more than may be pinned.
    pub async fn pin(&self, tenant: &TenantId, delta: &str, pinned: bool) -> Result<DeltaInfo, ServeError> {
        note_of(tenant, delta);
        let name = name("name", delta)?;
        let after = self.current(tenant, &name);
        audit::note(|note| {
            note.after = after;
            note.detail = Some(if pinned { "pinned" } else { "not pinned" }.to_owned());
        });
        let registry = &self.parts().registry;
        registry.pin(tenant, &name, pinned).await?;
        Ok(info(&registry.get(tenant, &DeltaRef::current(name)).await?))
    }

    /// Points a name at one of its versions.
    ///
    /// # Errors
    /// Unknown; or not the expected version.
    pub async fn set_alias(&self, tenant: &TenantId, params: AliasParams) -> Result<DeltaInfo, ServeError> {
        note_of(tenant, &params.name);
        let name = name("name", &params.name)?;
        let before = self.current(tenant, &name);
        audit::note(|note| note.before = before);
        let wanted: DeltaRef = format!("{name}@{}", params.version).parse().map_err(ServeError::from)?;
        let version = wanted.version.ok_or_else(|| ServeError::field("version", "is missing"))?;
        let made = self.parts().registry.set_alias(tenant, &name, &version, params.expected).await?;
        audit::note(|note| note.after = Some(noted(&made)));
        self.status(tenant, &made.name, made.number).await
    }

    /// A version's files, as they are stored, or in a form that PEFT loads.
    ///
    /// # Errors
    /// Unknown; corrupt on disk; PEFT has no such form.
    pub async fn download(
        &self,
        tenant: &TenantId,
        reference: &str,
        for_peft: bool,
    ) -> Result<DownloadReply, ServeError> {
        let wanted: DeltaRef = reference.parse().map_err(ServeError::from)?;
        let (version, files) = self.parts().registry.download(tenant, &wanted).await?;
        let files = if for_peft { self.for_peft(files).await? } else { files };
        Ok(DownloadReply { delta: self.status(tenant, &version.name, version.number).await?, files })
    }

    async fn for_peft(&self, files: DeltaFiles) -> Result<DeltaFiles, ServeError> {
        let made = self.blocking(move |parts| {
            let meta = EncodeMeta { base_name: parts.base_name.clone(), ..EncodeMeta::default() };
            interop::for_peft(files, &parts.base, &meta).map_err(|e| match e {
                InteropError::Unapplied(_) => ServeError::field("form", e.to_string()),
                e => ServeError::Corrupt(e.to_string()),
            })
        });
        made.await
    }
}
