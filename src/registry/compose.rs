//! Compositions: several leased versions as one delta, made once per combination while anyone uses it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{DeltaLease, Registry, RegistryError, budget::Reservation};
use crate::{
    delta::{Delta, SiteTable},
    ids::DeltaId,
    merge::{MergeError, Source, compose},
};

/// Weighted versions as one delta. Keeps their leases, and its own bytes reserved, as long as it lives.
pub struct Composition {
    // before the reservation: the tensors go first
    delta: Arc<Delta>,
    id: DeltaId,
    parts: Vec<(DeltaLease, f64)>,
    _room: Reservation,
}

impl Composition {
    /// The delta.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// Digest of the versions and their weights.
    pub fn id(&self) -> DeltaId {
        self.id
    }

    /// The versions and their weights, in the order asked for.
    pub fn parts(&self) -> &[(DeltaLease, f64)] {
        &self.parts
    }
}

impl std::fmt::Debug for Composition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.parts.iter().map(|(lease, weight)| (lease, weight))).finish()
    }
}

/// The compositions in use.
pub(super) type Compositions = Mutex<HashMap<DeltaId, Weak<Composition>>>;

fn id_of(parts: &[(DeltaLease, f64)]) -> DeltaId {
    let mut h = Sha256::new();
    h.update(b"deltaserve composition v1\0");
    for (lease, weight) in parts {
        h.update(lease.id().as_bytes());
        h.update(weight.to_bits().to_le_bytes());
    }
    DeltaId::from_bytes(h.finalize().into())
}

impl Registry {
    /// The weighted sum of leased versions as one delta. The same combination is shared while anyone holds it.
    ///
    /// # Errors
    /// [`RegistryError::NotComposable`] with the reason, by name; [`RegistryError::BudgetFull`].
    pub async fn compose(
        &self,
        parts: Vec<(DeltaLease, f64)>,
        sites: &SiteTable,
    ) -> Result<Arc<Composition>, RegistryError> {
        let id = id_of(&parts);
        if let Some(found) = self.composed(&id) {
            return Ok(found);
        }
        let bytes: u64 = parts.iter().map(|(lease, _)| lease.delta().bytes()).sum();
        let mut room = self.residency.reserve(bytes).await?;
        let sites = sites.clone();
        let sum = tokio::task::spawn_blocking(move || sum(&parts, &sites).map(|delta| (delta, parts)));
        let (delta, parts) = sum.await??;
        // what is taken over as it is shares its tensors: this counts it twice, never too little
        room.shrink_to(delta.bytes());
        let made = Arc::new(Composition { delta: Arc::new(delta), id, parts, _room: room });
        let mut all = self.compositions.lock();
        if let Some(first) = all.get(&id).and_then(Weak::upgrade) {
            return Ok(first); // made by another request meanwhile
        }
        all.retain(|_, held| held.strong_count() > 0);
        all.insert(id, Arc::downgrade(&made));
        Ok(made)
    }

    fn composed(&self, id: &DeltaId) -> Option<Arc<Composition>> {
        self.compositions.lock().get(id).and_then(Weak::upgrade)
    }
}

fn sum(parts: &[(DeltaLease, f64)], sites: &SiteTable) -> Result<Delta, RegistryError> {
    let names: Vec<String> =
        parts.iter().map(|(l, _)| format!("{}@{}", l.version().name, l.version().number)).collect();
    let sources: Vec<Source<'_>> = (parts.iter().zip(&names))
        .map(|((lease, weight), name)| Source { name, delta: lease.delta(), weight: *weight })
        .collect();
    compose(&sources, sites).map_err(|e| match e {
        MergeError::Refused(why) => RegistryError::NotComposable(why),
        MergeError::Tensor(e) => RegistryError::LoadFailed { name: names.join(" + "), detail: e.to_string() },
    })
}
