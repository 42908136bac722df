//! Versions that somebody needs later: their files stay, and nothing of them is in memory until then.

use std::sync::Arc;

use super::{DeltaLease, DeltaRef, Registry, RegistryError, VersionRecord};
use crate::{ids::TenantId, store::HeldFiles};

/// A version that can be leased for as long as this lives, also after it is deleted. A clone keeps it as well.
#[derive(Clone)]
pub struct KeptVersion {
    version: Arc<VersionRecord>,
    _files: Arc<HeldFiles>,
}

impl std::fmt::Debug for KeptVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeptVersion({}/{}@{})", self.version.tenant, self.version.name, self.version.number)
    }
}

impl Registry {
    /// Resolves a reference once and keeps that version's files.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::BaseMismatch`].
    pub async fn keep(&self, tenant: &TenantId, wanted: &DeltaRef) -> Result<KeptVersion, RegistryError> {
        let version = self.resolve(tenant, wanted)?;
        self.check_base(&version, wanted)?;
        let files = Arc::new(self.store.hold_files(&version).await?);
        Ok(KeptVersion { version, _files: files })
    }

    /// Leases a version that was kept.
    ///
    /// # Errors
    /// As [`Registry::lease`]; what was deleted and collected before it was kept is not found.
    pub async fn lease_kept(&self, kept: &KeptVersion) -> Result<DeltaLease, RegistryError> {
        let version = &kept.version;
        self.lease_version(&version.tenant, version, &DeltaRef::exact(version)).await
    }
}
