//! Compositions: several versions as one delta, made once per combination and resident like any other delta.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{DeltaLease, DeltaRef, Registry, RegistryError, VersionRecord, cache::Interest, seat::Hold};
use crate::{
    delta::{Delta, SiteTable},
    ids::{DeltaId, TenantId},
    merge::{MergeError, Source, compose},
};

/// Weighted versions as one delta, kept resident for a request; a clone is one more lease. Its versions need not stay
/// resident: what it has of them counts as its own.
#[derive(Clone)]
pub struct Composition {
    // Before `_hold`: this reference goes first, so that the bytes are not given back while it keeps the tensors.
    delta: Arc<Delta>,
    id: DeltaId,
    parts: Vec<(Arc<VersionRecord>, f64)>,
    _hold: Hold,
}

impl Composition {
    /// The delta. Whoever clones the `Arc` keeps the composition as long: the budget counts its holders.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// Digest of the tenant, the versions and their weights, whatever their order.
    pub fn id(&self) -> DeltaId {
        self.id
    }

    /// The versions and their weights, in the order asked for.
    pub fn parts(&self) -> &[(Arc<VersionRecord>, f64)] {
        &self.parts
    }
}

impl std::fmt::Debug for Composition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = self.parts.iter().map(|(version, weight)| format!("{}*{weight}", name_of(version)));
        f.debug_list().entries(parts).finish()
    }
}

/// Sums that are made at a time.
const AT_ONCE: usize = 2;

/// Whose turn it is to make a sum: every weight is another sum, and each takes room from the budget. One at a time of a
/// tenant, some in all; a tenant that wants many waits behind itself.
pub(super) struct Turns {
    all: Arc<Semaphore>,
    tenants: Mutex<HashMap<TenantId, Weak<Semaphore>>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(AT_ONCE)), tenants: Mutex::default() }
    }

    /// Waits for a turn, for as long as the caller waits.
    async fn take(&self, tenant: &TenantId, interest: &Interest) -> Result<[OwnedSemaphorePermit; 2], RegistryError> {
        let own = self.of(tenant);
        let turn = async {
            let own = own.acquire_owned().await.map_err(|_| RegistryError::Abandoned)?;
            let all = Arc::clone(&self.all).acquire_owned().await.map_err(|_| RegistryError::Abandoned)?;
            Ok([own, all])
        };
        tokio::select! {
            turn = turn => turn,
            () = interest.gone() => Err(RegistryError::Abandoned),
        }
    }

    fn of(&self, tenant: &TenantId) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock();
        if let Some(own) = tenants.get(tenant).and_then(Weak::upgrade) {
            return own;
        }
        tenants.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(1));
        tenants.insert(tenant.clone(), Arc::downgrade(&own));
        own
    }
}

fn name_of(version: &VersionRecord) -> String {
    format!("{}@{}", version.name, version.number)
}

/// The tenant is part of it: what goes wrong with a sum is told to all who wait for it, by the names of its versions.
pub(super) fn id_of(tenant: &TenantId, sorted: &[(Arc<VersionRecord>, f64)]) -> DeltaId {
    let mut h = Sha256::new();
    h.update(b"deltaserve composition v2\0");
    h.update((tenant.as_str().len() as u64).to_le_bytes());
    h.update(tenant.as_str());
    for (version, weight) in sorted {
        h.update(version.id.as_bytes());
        h.update(weight.to_bits().to_le_bytes());
    }
    DeltaId::from_bytes(h.finalize().into())
}

impl Registry {
    /// Resolves references once and keeps the weighted sum of their versions resident until the last clone is dropped. The
    /// same versions with the same weights are one sum, in any order; while it is resident, nobody computes it again.
    ///
    /// # Errors
    /// As [`Registry::lease`], for each; [`RegistryError::NotComposable`] with the reason, by name, also for a version that is
    /// named twice and for a sum larger than the budget.
    pub async fn lease_sum(
        &self,
        tenant: &TenantId,
        wanted: &[(DeltaRef, f64)],
        sites: &SiteTable,
    ) -> Result<Composition, RegistryError> {
        let mut parts = Vec::with_capacity(wanted.len());
        for (reference, weight) in wanted {
            let version = self.resolve(tenant, reference)?;
            self.check_base(&version, reference)?;
            parts.push((version, weight + 0.0)); // -0.0 is 0.0
        }
        check_distinct(&parts)?;
        let mut sorted = parts.clone();
        sorted.sort_by_key(|(version, weight)| (version.id, weight.to_bits()));
        let id = id_of(tenant, &sorted);
        let ids: Vec<DeltaId> = sorted.iter().map(|(version, _)| version.id).collect();
        let bytes = sorted.iter().map(|(version, _)| version.spec.resident_bytes).sum();
        let make = {
            let (this, tenant, sites, sorted) = (self.clone(), tenant.clone(), Arc::new(sites.clone()), sorted);
            let ids = ids.clone();
            move |interest| {
                let (this, tenant, sites) = (this.clone(), tenant.clone(), Arc::clone(&sites));
                let (ids, sorted) = (ids.clone(), sorted.clone());
                async move { this.add_up(&tenant, (id, ids), &sorted, sites, interest).await }
            }
        };
        let held = self.residency.hold_made(id, bytes, make).await;
        for dead in ids.iter().filter(|part| !self.catalog.is_live(part)) {
            // Deleted meanwhile: nothing may stay resident of it beyond its leases.
            self.residency.retire(dead).await;
        }
        let (delta, hold) = held?;
        Ok(Composition { delta, id, parts, _hold: hold })
    }

    /// Leases the versions, adds them up and lets go of them; gives up where nobody waits for it any more.
    async fn add_up(
        &self,
        tenant: &TenantId,
        id: (DeltaId, Vec<DeltaId>),
        sorted: &[(Arc<VersionRecord>, f64)],
        sites: Arc<SiteTable>,
        interest: Interest,
    ) -> Result<Hold, RegistryError> {
        // ahead of the leases: those who wait hold nothing
        let turn = self.turns.take(tenant, &interest).await?;
        let mut leases = Vec::with_capacity(sorted.len());
        for (version, weight) in sorted {
            let lease = self.lease_version(tenant, version, &DeltaRef::exact(version)).await?;
            interest.check()?;
            leases.push((lease, *weight));
        }
        // What is taken over as it is shares its tensors with its version: it is counted twice, never too little.
        let bytes: u64 = leases.iter().map(|(lease, _)| lease.delta().bytes()).sum();
        let work = move || {
            let _turn = turn;
            interest.check()?;
            sum(&leases, &sites)
        };
        let made = self.residency.compute(id, bytes, work).await;
        made.map_err(|e| match e {
            RegistryError::TooLarge { bytes, budget } => RegistryError::NotComposable(format!(
                "together take {bytes} bytes; the resident budget is {budget} bytes"
            )),
            other => other,
        })
    }
}

fn check_distinct(parts: &[(Arc<VersionRecord>, f64)]) -> Result<(), RegistryError> {
    for (i, (version, _)) in parts.iter().enumerate() {
        let same =
            |(other, _): &&(Arc<VersionRecord>, f64)| (&other.name, other.number) == (&version.name, version.number);
        if parts[..i].iter().any(|part| same(&part)) {
            return Err(RegistryError::NotComposable(format!("name {} twice", name_of(version))));
        }
    }
    Ok(())
}

fn sum(leases: &[(DeltaLease, f64)], sites: &SiteTable) -> Result<Delta, RegistryError> {
    let names: Vec<String> = leases.iter().map(|(lease, _)| name_of(lease.version())).collect();
    let sources: Vec<Source<'_>> = (leases.iter().zip(&names))
        .map(|((lease, weight), name)| Source { name, delta: lease.delta(), weight: *weight })
        .collect();
    compose(&sources, sites).map_err(|e| match e {
        MergeError::Refused(why) => RegistryError::NotComposable(why),
        MergeError::Stopped | MergeError::Tensor(_) => {
            RegistryError::LoadFailed { name: names.join(" + "), detail: e.to_string() }
        }
    })
}
