//! The catalog: tenant and name to version, in memory, so that a request asks no database. The one mutable map.
//!
//! It follows the store: an entry changes only after the change is committed, and of two answers the one with the
//! higher revision counts. Its lock is never held across an await. Knows nothing of tensors or residency.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use parking_lot::RwLock;

use super::{DeltaRef, RegistryError};
use crate::{
    ids::{DeltaId, DeltaName, TenantId},
    store::{NameRecord, VersionRecord},
};

type Key = (TenantId, DeltaName);

pub(super) struct Catalog {
    state: RwLock<State>,
    /// Most bytes that pins may take.
    pin_bytes: u64,
}

struct State {
    tenants: HashMap<TenantId, BTreeMap<DeltaName, NameRecord>>,
    /// How many live versions have these bytes, over all names.
    live: HashMap<DeltaId, usize>,
    pinned_names: BTreeSet<Key>,
    /// Ids that must not be evicted: the current versions of pinned names, as far as they fit `pin_bytes`.
    pinned: Arc<HashSet<DeltaId>>,
    pinned_bytes: u64,
}

/// A version with what its name says of it.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) version: Arc<VersionRecord>,
    pub(super) current: bool,
    pub(super) pinned: bool,
}

impl Catalog {
    pub(super) fn new(names: Vec<NameRecord>, pin_bytes: u64) -> Self {
        let state = State {
            tenants: HashMap::new(),
            live: HashMap::new(),
            pinned_names: BTreeSet::new(),
            pinned: Arc::default(),
            pinned_bytes: 0,
        };
        let catalog = Self { state: RwLock::new(state), pin_bytes };
        for name in names {
            catalog.apply(name);
        }
        catalog
    }

    /// Finds what a reference names. Unknown and another tenant's are the same answer.
    pub(super) fn find(&self, tenant: &TenantId, wanted: &DeltaRef) -> Result<Found, RegistryError> {
        let state = self.state.read();
        let entry = state.tenants.get(tenant).and_then(|names| names.get(&wanted.name));
        let found = entry.and_then(|entry| {
            let version = match &wanted.version {
                None => entry.current(),
                Some(sel) => entry.versions.values().find(|v| sel.matches(v.number, &v.id)),
            }?;
            Some(found(entry, version))
        });
        found.ok_or_else(|| RegistryError::NotFound(wanted.to_string()))
    }

    /// Takes over a name as it is after a commit, unless a later commit was taken over before. Returns the ids that no
    /// live version has any more.
    pub(super) fn apply(&self, new: NameRecord) -> Vec<DeltaId> {
        let mut state = self.state.write();
        let state = &mut *state;
        let old = state.tenants.get(&new.tenant).and_then(|names| names.get(&new.name));
        if old.is_some_and(|old| old.revision >= new.revision) {
            return Vec::new();
        }
        let ids = |name: &NameRecord| name.versions.values().map(|v| v.id).collect::<Vec<_>>();
        let gone = old.map(ids).unwrap_or_default();
        for id in ids(&new) {
            *state.live.entry(id).or_default() += 1;
        }
        let dead = state.let_go(gone);
        let key = (new.tenant.clone(), new.name.clone());
        let was_pinned = state.pinned_names.remove(&key);
        if new.pinned {
            state.pinned_names.insert(key);
        }
        let repin = was_pinned || new.pinned;
        state.tenants.entry(new.tenant.clone()).or_default().insert(new.name.clone(), new);
        if repin {
            state.repin(self.pin_bytes);
        }
        dead
    }

    /// Forgets all of a tenant. Returns the ids that no live version has any more.
    pub(super) fn remove(&self, tenant: &TenantId) -> Vec<DeltaId> {
        let mut state = self.state.write();
        let state = &mut *state;
        let names = state.tenants.remove(tenant).unwrap_or_default();
        let pins = state.pinned_names.len();
        state.pinned_names.retain(|(owner, _)| owner != tenant);
        if state.pinned_names.len() != pins {
            state.repin(self.pin_bytes);
        }
        state.let_go(names.into_values().flat_map(|name| name.versions.into_values().map(|v| v.id)))
    }

    /// Which bytes a tenant's versions are.
    pub(super) fn ids_of(&self, tenant: &TenantId) -> HashSet<DeltaId> {
        let state = self.state.read();
        let names = state.tenants.get(tenant).into_iter().flat_map(BTreeMap::values);
        names.flat_map(|name| name.versions.values().map(|v| v.id)).collect()
    }

    /// Whether any live version has these bytes.
    pub(super) fn is_live(&self, id: &DeltaId) -> bool {
        self.state.read().live.contains_key(id)
    }

    /// Ids that must not be evicted.
    pub(super) fn pinned(&self) -> Arc<HashSet<DeltaId>> {
        Arc::clone(&self.state.read().pinned)
    }

    pub(super) fn pinned_bytes(&self) -> u64 {
        self.state.read().pinned_bytes
    }

    /// Whether pinning this version too keeps the pins within their share.
    pub(super) fn check_pin(&self, version: &VersionRecord) -> Result<(), RegistryError> {
        let state = self.state.read();
        let more = if state.pinned.contains(&version.id) { 0 } else { version.spec.resident_bytes };
        match state.pinned_bytes.saturating_add(more) {
            needed if needed > self.pin_bytes => Err(RegistryError::PinBudget { needed, allowed: self.pin_bytes }),
            _ => Ok(()),
        }
    }

    /// Current versions of all pinned names.
    pub(super) fn pinned_versions(&self) -> Vec<Arc<VersionRecord>> {
        let state = self.state.read();
        state.pinned_names.iter().filter_map(|key| state.name(key)?.current().cloned()).collect()
    }

    /// A tenant's names after `after`, in order: their current versions, or all, newest first.
    pub(super) fn list(&self, tenant: &TenantId, query: &Listing<'_>) -> Vec<Found> {
        let state = self.state.read();
        let names = state.tenants.get(tenant).into_iter().flatten();
        let names = names.filter(|(name, _)| name.as_str().starts_with(query.prefix));
        let versions = names.flat_map(|(_, entry)| {
            entry.versions.values().rev().map(|version| found(entry, version)).filter(|v| query.all || v.current)
        });
        let is_after = |v: &Found| match query.after {
            None => true,
            Some((name, number)) if v.version.name == *name => v.version.number < number,
            Some((name, _)) => v.version.name > *name,
        };
        versions.filter(is_after).take(query.limit).collect()
    }
}

/// What to list.
pub(super) struct Listing<'a> {
    pub(super) prefix: &'a str,
    /// Continue behind this one.
    pub(super) after: Option<(&'a DeltaName, u64)>,
    pub(super) limit: usize,
    /// All versions, not only the current ones.
    pub(super) all: bool,
}

impl State {
    /// Counts versions out; returns the ids that no live version has any more.
    fn let_go(&mut self, gone: impl IntoIterator<Item = DeltaId>) -> Vec<DeltaId> {
        let mut dead = Vec::new();
        for id in gone {
            if let Some(count) = self.live.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    self.live.remove(&id);
                    dead.push(id);
                }
            }
        }
        dead
    }

    fn name(&self, key: &Key) -> Option<&NameRecord> {
        self.tenants.get(&key.0)?.get(&key.1)
    }

    /// Honours pins in the order of tenant and name until their share is full. A pin that a publish has made too large
    /// stays recorded and is honoured again when there is room.
    fn repin(&mut self, allowed: u64) {
        let (mut pinned, mut bytes) = (HashSet::new(), 0_u64);
        for version in self.pinned_names.iter().filter_map(|key| self.name(key)?.current()) {
            let sum = bytes.saturating_add(version.spec.resident_bytes);
            if pinned.contains(&version.id) {
                continue;
            }
            if sum > allowed {
                tracing::warn!(tenant = %version.tenant, delta = %version.name, "pin not honoured: no room for it");
                continue;
            }
            bytes = sum;
            pinned.insert(version.id);
        }
        self.pinned = Arc::new(pinned);
        self.pinned_bytes = bytes;
    }
}

fn found(entry: &NameRecord, version: &Arc<VersionRecord>) -> Found {
    let current = entry.current == Some(version.number);
    Found { version: Arc::clone(version), current, pinned: entry.pinned && current }
}
