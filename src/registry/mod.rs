//! The registry: a name stands for an immutable version, and a lease keeps a version's delta resident.
//!
//! Owns what is in memory and what is current; the store owns what is on disk. A request resolves its reference once
//! and holds a lease until its last token: replacing, deleting or evicting does not touch it. Every change is committed
//! by the store first and then taken over by the catalog, on a task of its own, so that a caller that goes away cannot
//! leave the two apart.
//!
//! Budget (I8): cached, leased and loading bytes together never exceed the limit. Pins may take half of it.

mod budget;
mod cache;
mod catalog;
mod compose;
mod demand;
mod error;
mod failures;
mod follow;
mod kept;
mod listing;
mod metrics;
mod reference;
mod seat;
mod tenants;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

pub use compose::Composition;
pub use error::{LoadError, RegistryError};
pub use kept::KeptVersion;
pub use listing::{ListPage, ListQuery};
pub use reference::{DeltaRef, VersionSel};

use self::{
    budget::Reservation,
    cache::Residency,
    catalog::{Catalog, Found},
    compose::Turns,
    seat::Hold,
    tenants::UnderWay,
};
pub use crate::{
    admission::params::{PublishPolicy, QuotaOf},
    store::{Origin, VersionRecord},
};
use crate::{
    delta::{Delta, DeltaFiles, DeltaSpec},
    ids::{BaseFingerprint, DeltaId, DeltaName, TenantId},
    store::{NameRecord, NewVersion, Store, StoreError},
};

/// Makes a delta of a version's files; runs on a blocking thread.
pub type Loader = Arc<dyn Fn(&DeltaFiles) -> Result<Delta, LoadError> + Send + Sync>;

/// The limits of residency.
#[derive(Clone)]
pub struct RegistryConfig {
    /// Most bytes of deltas in memory: cached, leased and being loaded.
    pub max_resident_bytes: u64,
    /// Loads at a time.
    pub max_concurrent_loads: usize,
    /// Longest time for reading and decoding one version.
    pub load_timeout: Duration,
    /// How long a load waits for room while everything resident is leased.
    pub room_wait: Duration,
    /// For how long a version whose load failed is not loaded again; zero: not at all.
    pub retry_after: Duration,
    /// Who knows the limits of tenants; `None`: there are none.
    pub quotas: Option<QuotaOf>,
}

impl std::fmt::Debug for RegistryConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryConfig").field("max_resident_bytes", &self.max_resident_bytes).finish_non_exhaustive()
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            max_resident_bytes: 1 << 30,
            max_concurrent_loads: 4,
            load_timeout: Duration::from_secs(30),
            room_wait: Duration::from_secs(1),
            retry_after: Duration::from_secs(5),
            quotas: None,
        }
    }
}

/// A delta kept resident for a request. A clone is one more lease; the last one dropped lets the delta be evicted.
#[derive(Clone)]
pub struct DeltaLease {
    // Before `hold`: this reference goes first, so that the bytes are not given back while it keeps the tensors.
    delta: Arc<Delta>,
    version: Arc<VersionRecord>,
    hold: Hold,
}

impl DeltaLease {
    /// Which bytes these are.
    pub fn id(&self) -> DeltaId {
        self.version.id
    }

    /// The delta. Whoever clones the `Arc` keeps the lease as long: the budget counts leases.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// The version that was resolved.
    pub fn version(&self) -> &Arc<VersionRecord> {
        &self.version
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.hold.seat().usage().0
    }
}

impl std::fmt::Debug for DeltaLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeltaLease({}/{}@{})", self.version.tenant, self.version.name, self.version.number)
    }
}

/// A version to publish.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Under which name.
    pub name: DeltaName,
    /// Its files, already checked by decoding them.
    pub files: DeltaFiles,
    /// What the decoding said of it.
    pub spec: DeltaSpec,
    /// What may happen to an existing name.
    pub policy: PublishPolicy,
    /// Where it comes from.
    pub origin: Origin,
}

/// A version with what is known of it now.
#[derive(Debug, Clone)]
pub struct DeltaStatus {
    /// The version.
    pub version: Arc<VersionRecord>,
    /// Whether its name stands for it.
    pub current: bool,
    /// Kept resident.
    pub pinned: bool,
    /// Bytes in memory; 0: not resident.
    pub resident_bytes: u64,
    /// Leases held on it now.
    pub leases: u64,
    /// Its stored bytes were found missing or changed.
    pub corrupt: bool,
}

/// The state of the resident deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidencyStats {
    /// Deltas in memory, evicted ones that are still leased included.
    pub resident: u64,
    /// Deltas that somebody leases.
    pub leased: u64,
    /// Bytes cached, leased and being loaded.
    pub bytes: u64,
    /// Most bytes.
    pub budget: u64,
    /// Bytes of honoured pins.
    pub pinned_bytes: u64,
    /// Leases of a resident delta so far.
    pub hits: u64,
    /// Leases that had to wait for a load so far.
    pub misses: u64,
    /// Deltas evicted for room so far.
    pub evictions: u64,
}

/// Names, versions and leases of one base. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    store: Store,
    base: BaseFingerprint,
    catalog: Arc<Catalog>,
    residency: Residency,
    turns: Arc<Turns>,
    under_way: Arc<UnderWay>,
    quotas: Option<QuotaOf>,
    budget: u64,
}

/// Bytes of the resident budget that work takes for as long as this lives.
pub struct WorkSpace {
    _reservation: Reservation,
}

impl Registry {
    /// Reads the catalog and starts to load what is pinned. Metrics need their recorder installed before.
    ///
    /// # Errors
    /// What the store refuses.
    pub async fn open(
        store: Store,
        base: BaseFingerprint,
        loader: Loader,
        config: RegistryConfig,
    ) -> Result<Self, RegistryError> {
        let (budget, quotas) = (config.max_resident_bytes, config.quotas.clone());
        // before the names: what changes in between is taken over twice, not never
        let seen = store.last_change().await?;
        let catalog = Arc::new(Catalog::new(store.all_names().await?, budget / 2));
        let pins = Arc::clone(&catalog);
        let residency = Residency::new(store.clone(), loader, Arc::new(move || pins.pinned()), config);
        let (turns, under_way) = (Arc::new(Turns::new()), Arc::default());
        let registry = Self { store, base, catalog, residency, turns, under_way, quotas, budget };
        tokio::spawn(registry.clone().warm());
        if registry.store.is_shared() {
            tokio::spawn(registry.clone().follow(seen));
        }
        Ok(registry)
    }

    /// The version that a reference stands for now.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], the same for unknown names and for other tenants'.
    pub fn resolve(&self, tenant: &TenantId, wanted: &DeltaRef) -> Result<Arc<VersionRecord>, RegistryError> {
        Ok(self.catalog.find(tenant, wanted)?.version)
    }

    /// Resolves a reference once and keeps that version's delta resident until the lease is dropped.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::BaseMismatch`], [`RegistryError::BudgetFull`],
    /// [`RegistryError::Corrupt`] and the other errors of loading.
    pub async fn lease(&self, tenant: &TenantId, wanted: &DeltaRef) -> Result<DeltaLease, RegistryError> {
        let version = self.resolve(tenant, wanted)?;
        self.check_base(&version, wanted)?;
        self.lease_version(tenant, &version, wanted).await
    }

    async fn lease_version(
        &self,
        tenant: &TenantId,
        version: &Arc<VersionRecord>,
        wanted: &DeltaRef,
    ) -> Result<DeltaLease, RegistryError> {
        let _room = match &self.quotas {
            Some(quotas) => self.room_of(tenant, version, quotas(tenant)).await?,
            None => None,
        };
        let held = self.residency.hold(version).await;
        if !self.catalog.is_live(&version.id) {
            // Deleted while it was loaded: nothing may stay resident of it beyond its leases.
            self.residency.retire(&version.id).await;
        }
        match held {
            Ok((delta, hold)) => Ok(DeltaLease { delta, version: Arc::clone(version), hold }),
            // Its blobs may have been collected in between: then it is gone, not corrupt.
            Err(e @ (RegistryError::Corrupt { .. } | RegistryError::Failing { .. })) => {
                self.resolve(tenant, &DeltaRef::exact(version))
                    .map_err(|_| RegistryError::NotFound(wanted.to_string()))?;
                Err(e)
            }
            Err(e) => Err(e),
        }
    }

    /// Publishes a version and moves its name to it: all or nothing, also if the caller goes away.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] and [`StoreError::Conflict`] as the policy says; [`RegistryError::TooLarge`] for
    /// what could never be loaded.
    pub async fn publish(
        &self,
        tenant: &TenantId,
        publication: Publication,
    ) -> Result<Arc<VersionRecord>, RegistryError> {
        let Publication { name, files, spec, policy, origin } = publication;
        if spec.resident_bytes > self.budget {
            return Err(RegistryError::TooLarge { bytes: spec.resident_bytes, budget: self.budget });
        }
        let new = NewVersion { tenant: tenant.clone(), name, base: self.base, spec, files, policy, origin };
        let (this, change) = (self.clone(), self.under_way.change(tenant));
        let task = async move {
            let _change = change;
            let before = this.store.blobs_written();
            let published = this.store.publish(new).await;
            // also where the name was refused: a blob that went bad was written anew before, and any version may have it
            if this.store.blobs_written() != before {
                this.residency.forget_all();
            }
            let (version, name) = published?;
            crate::failpoint!("registry-before-take-over");
            this.take_over(name).await;
            crate::failpoint!("registry-taken-over");
            tracing::info!(
                tenant = %version.tenant, delta = %version.name, number = version.number, id = %version.id.short(),
                origin = %version.origin, "published"
            );
            Ok(version)
        };
        tokio::spawn(task).await?
    }

    /// A version and its state.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub async fn get(&self, tenant: &TenantId, wanted: &DeltaRef) -> Result<DeltaStatus, RegistryError> {
        Ok(self.status(self.catalog.find(tenant, wanted)?).await)
    }

    /// Deletes a name with all its versions, or the one version that the reference picks. Leases keep what they have;
    /// new requests find nothing at once. The current version goes only as the last one or with its name.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`StoreError::Conflict`] if `expected` is not the current version;
    /// [`StoreError::IsCurrent`].
    pub async fn delete(
        &self,
        tenant: &TenantId,
        wanted: &DeltaRef,
        expected: Option<DeltaId>,
    ) -> Result<(), RegistryError> {
        let number = self.resolve(tenant, wanted).map(|v| wanted.version.as_ref().map(|_| v.number))?;
        let (store, owner, name) = (self.store.clone(), tenant.clone(), wanted.name.clone());
        self.change(tenant, async move { store.delete_versions(&owner, &name, number, expected).await }).await
    }

    /// Moves a name to another of its versions.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`StoreError::Conflict`] if `expected` is not the current version.
    pub async fn set_alias(
        &self,
        tenant: &TenantId,
        name: &DeltaName,
        to: &VersionSel,
        expected: Option<DeltaId>,
    ) -> Result<Arc<VersionRecord>, RegistryError> {
        let version = self.resolve(tenant, &DeltaRef { name: name.clone(), version: Some(to.clone()) })?;
        let (store, owner, name, number) = (self.store.clone(), tenant.clone(), name.clone(), version.number);
        self.change(tenant, async move { store.set_current(&owner, &name, number, expected).await }).await?;
        Ok(version)
    }

    /// Keeps the name's current version resident, whichever it is, or no longer. Pins may take half of the budget.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::PinBudget`], and the errors of loading: it is loaded now.
    pub async fn pin(&self, tenant: &TenantId, name: &DeltaName, pinned: bool) -> Result<(), RegistryError> {
        let wanted = DeltaRef::current(name.clone());
        let _lease = match pinned {
            true => {
                self.catalog.check_pin(&*self.resolve(tenant, &wanted)?)?;
                Some(self.lease(tenant, &wanted).await?)
            }
            false => None,
        };
        let (store, owner, name) = (self.store.clone(), tenant.clone(), name.clone());
        self.change(tenant, async move { store.set_pinned(&owner, &name, pinned).await }).await
    }

    /// A version's files, verified.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], [`RegistryError::Corrupt`].
    pub async fn download(
        &self,
        tenant: &TenantId,
        wanted: &DeltaRef,
    ) -> Result<(Arc<VersionRecord>, DeltaFiles), RegistryError> {
        let version = self.resolve(tenant, wanted)?;
        match self.store.read_files(&version).await {
            Ok(files) => Ok((version, files)),
            Err(e @ StoreError::Corrupt { .. }) => {
                Err(RegistryError::Corrupt { name: wanted.to_string(), detail: e.to_string() })
            }
            Err(e) => Err(e.into()),
        }
    }

    /// The state of the resident deltas.
    pub fn stats(&self) -> ResidencyStats {
        let c = self.residency.counts();
        ResidencyStats {
            resident: c.resident,
            leased: c.leased,
            bytes: c.bytes,
            budget: c.budget,
            pinned_bytes: self.catalog.pinned_bytes(),
            hits: c.hits,
            misses: c.misses,
            evictions: c.evictions,
        }
    }

    /// Takes bytes of the resident budget for work beside the deltas, e.g. a merge.
    ///
    /// # Errors
    /// [`RegistryError::TooLarge`], [`RegistryError::BudgetFull`].
    pub async fn work_space(&self, bytes: u64) -> Result<WorkSpace, RegistryError> {
        Ok(WorkSpace { _reservation: self.residency.work_space(bytes).await? })
    }

    /// The base that all versions of this registry are for.
    pub fn base(&self) -> BaseFingerprint {
        self.base
    }

    /// Commits a change and takes it over, on a task of its own.
    async fn change(
        &self,
        tenant: &TenantId,
        commit: impl Future<Output = Result<NameRecord, StoreError>> + Send + 'static,
    ) -> Result<(), RegistryError> {
        let (this, change) = (self.clone(), self.under_way.change(tenant));
        let task = async move {
            let _change = change;
            this.take_over(commit.await?).await;
            Ok(())
        };
        tokio::spawn(task).await?
    }

    async fn take_over(&self, name: NameRecord) {
        // published again, deleted or pointed elsewhere: what failed of it may be whole now
        name.versions.values().for_each(|version| self.residency.forget(&version.id));
        for dead in self.catalog.apply(name) {
            self.residency.forget(&dead);
            self.residency.retire(&dead).await;
        }
    }

    async fn status(&self, found: Found) -> DeltaStatus {
        let (resident_bytes, leases) = self.residency.usage(&found.version.id).await;
        let corrupt = self.store.is_corrupt(&found.version);
        let Found { version, current, pinned } = found;
        DeltaStatus { version, current, pinned, resident_bytes, leases, corrupt }
    }

    fn check_base(&self, version: &VersionRecord, wanted: &DeltaRef) -> Result<(), RegistryError> {
        match version.base == self.base {
            true => Ok(()),
            false => {
                let name = wanted.to_string();
                Err(RegistryError::BaseMismatch { name, delta: version.base, base: self.base })
            }
        }
    }

    async fn warm(self) {
        for version in self.catalog.pinned_versions() {
            let wanted = DeltaRef::current(version.name.clone());
            if let Err(error) = self.lease(&version.tenant, &wanted).await {
                tracing::warn!(tenant = %version.tenant, delta = %version.name, %error, "pinned delta not loaded");
            }
        }
    }
}
