//! Tenants as wholes: what is in memory of one, against its limit, and how all of it goes.
//!
//! Bytes in memory are counted by version, for every tenant that has it: what two tenants share counts for both. A load that
//! would go over its tenant's limit first evicts what the tenant itself has not used for longest. Sums of deltas are not
//! counted: they are made one at a time per tenant, and make room for whoever needs it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Registry, RegistryError};
use crate::{
    admission::params::{Quota, QuotaItem},
    ids::{DeltaId, TenantId},
    store::{ClosedTenant, DeletedTenant, VersionRecord},
};

/// Longest wait for the changes of a tenant that are under way.
const CHANGES: Duration = Duration::from_secs(30);

/// Changes of names that are under way, by tenant, and what is being loaded for whom.
#[derive(Default)]
pub(super) struct UnderWay {
    changes: Mutex<HashMap<TenantId, usize>>,
    ended: Notify,
    loads: Mutex<HashMap<(TenantId, DeltaId), Load>>,
}

#[derive(Default, Clone, Copy)]
struct Load {
    bytes: u64,
    waiting: usize,
}

/// A change of a tenant's names, from before its commit until the catalog has taken it over.
pub(super) struct Change {
    tenant: TenantId,
    under_way: Arc<UnderWay>,
}

impl Drop for Change {
    fn drop(&mut self) {
        let mut changes = self.under_way.changes.lock();
        if let Some(n) = changes.get_mut(&self.tenant) {
            *n -= 1;
            if *n == 0 {
                changes.remove(&self.tenant);
                self.under_way.ended.notify_waiters();
            }
        }
    }
}

/// Bytes that are being loaded for a tenant.
pub(super) struct Loading {
    key: (TenantId, DeltaId),
    under_way: Arc<UnderWay>,
}

impl Drop for Loading {
    fn drop(&mut self) {
        let mut loads = self.under_way.loads.lock();
        if let Some(load) = loads.get_mut(&self.key) {
            load.waiting -= 1;
            if load.waiting == 0 {
                loads.remove(&self.key);
            }
        }
    }
}

impl UnderWay {
    pub(super) fn change(self: &Arc<Self>, tenant: &TenantId) -> Change {
        *self.changes.lock().entry(tenant.clone()).or_default() += 1;
        Change { tenant: tenant.clone(), under_way: Arc::clone(self) }
    }

    /// Waits until no change of a tenant is under way; false if there still is one after so long.
    async fn no_changes(&self, tenant: &TenantId, within: Duration) -> bool {
        let none = async {
            loop {
                let mut ended = std::pin::pin!(self.ended.notified());
                ended.as_mut().enable();
                if !self.changes.lock().contains_key(tenant) {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(within, none).await.is_ok()
    }

    fn load(self: &Arc<Self>, tenant: &TenantId, id: DeltaId, bytes: u64) -> Loading {
        let key = (tenant.clone(), id);
        let mut loads = self.loads.lock();
        let load = loads.entry(key.clone()).or_default();
        (load.bytes, load.waiting) = (bytes, load.waiting + 1);
        Loading { key, under_way: Arc::clone(self) }
    }

    fn loading(&self, tenant: &TenantId, id: DeltaId) -> u64 {
        self.loads.lock().get(&(tenant.clone(), id)).map_or(0, |load| load.bytes)
    }
}

impl Registry {
    /// Bytes in memory of a tenant's versions.
    pub async fn resident_bytes(&self, tenant: &TenantId) -> u64 {
        let mut sum = 0_u64;
        for id in self.catalog.ids_of(tenant) {
            sum = sum.saturating_add(self.residency.usage(&id).await.0);
        }
        sum
    }

    /// Makes sure that a tenant may have this version in memory, which it may then until what is returned is dropped.
    ///
    /// # Errors
    /// [`RegistryError::Quota`] where all that it has in memory is in use or pinned.
    pub(super) async fn room_of(
        &self,
        tenant: &TenantId,
        version: &VersionRecord,
        quota: Quota,
    ) -> Result<Option<Loading>, RegistryError> {
        if quota.resident_bytes.is_none() || self.residency.usage(&version.id).await.0 > 0 {
            return Ok(None);
        }
        let bytes = version.spec.resident_bytes;
        // entered first: of two at the same moment each sees the other
        let loading = self.under_way.load(tenant, version.id, bytes);
        let mut own: HashSet<DeltaId> = self.catalog.ids_of(tenant);
        own.remove(&version.id);
        loop {
            let mut used = 0_u64;
            for id in &own {
                let there = self.residency.usage(id).await.0;
                used = used.saturating_add(if there > 0 { there } else { self.under_way.loading(tenant, *id) });
            }
            let Err(limit) = quota.check(QuotaItem::ResidentBytes, used, bytes) else { return Ok(Some(loading)) };
            if !self.residency.evict_among(&own).await {
                return Err(RegistryError::Quota(limit));
            }
        }
    }

    /// Deletes all that a closed tenant has in the store, the catalog and the cache. Leases keep what they have.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] if a change of it does not come to its end; what the store refuses.
    pub async fn delete_tenant(
        &self,
        tenant: &TenantId,
        closed: &ClosedTenant,
    ) -> Result<DeletedTenant, RegistryError> {
        // what was committed before the tenant was closed is taken over by the catalog before it forgets all
        if !self.under_way.no_changes(tenant, CHANGES).await {
            return Err(RegistryError::Busy);
        }
        let deleted = self.store.delete_tenant(closed).await;
        // also where that failed: part of it may be gone, and the tenant is to be deleted again
        for dead in self.catalog.remove(tenant) {
            self.residency.forget(&dead);
            self.residency.retire(&dead).await;
        }
        Ok(deleted?)
    }
}
