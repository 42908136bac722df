//! Residency: which deltas are in memory. Loads one at a time per id, within the budget, and evicts what is asked for least
//! (see `demand`).
//!
//! The map and the single flight are moka's; its own eviction never comes to act, because an eviction must spare what
//! is leased (it would free nothing) and what is pinned: the victims are chosen from the idle list (see `seat`). Knows
//! versions by id only; whose they are and what they are called is the catalog's matter.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use moka::{future::Cache, ops::compute::Op, policy::EvictionPolicy};
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use super::{
    LoadError, Loader, RegistryConfig, RegistryError,
    budget::{Reservation, ResidentBudget},
    failures::Failures,
    metrics::Metrics,
    seat::{Hold, Idle, Seat},
};
use crate::{
    delta::Delta,
    ids::DeltaId,
    store::{Store, StoreError, VersionRecord},
};

/// How often a request starts over because what it found was evicted before it could be held.
const ATTEMPTS: usize = 8;

/// Ids that must stay, asked for when a victim is chosen.
pub(super) type Keep = Arc<dyn Fn() -> Arc<HashSet<DeltaId>> + Send + Sync>;

/// Whether the caller that something is made for still waits.
#[derive(Clone)]
pub(super) struct Interest(Arc<watch::Sender<()>>);

impl Interest {
    /// What the caller holds for as long as it waits, and what is asked of it.
    fn new() -> (watch::Receiver<()>, Self) {
        let (asked, held) = watch::channel(());
        (held, Self(Arc::new(asked)))
    }

    /// Resolves when it has left.
    pub(super) async fn gone(&self) {
        self.0.closed().await;
    }

    /// [`RegistryError::Abandoned`] if it has left.
    pub(super) fn check(&self) -> Result<(), RegistryError> {
        if self.0.is_closed() { Err(RegistryError::Abandoned) } else { Ok(()) }
    }
}

#[derive(Clone)]
pub(super) struct Residency {
    shared: Arc<Shared>,
}

struct Shared {
    seats: Cache<DeltaId, Arc<Seat>>,
    idle: Arc<Idle>,
    budget: Arc<ResidentBudget>,
    /// Bounds concurrent reads and decodes. Those who wait for it are requests, bounded by admission.
    loads: Arc<Semaphore>,
    store: Store,
    loader: Loader,
    keep: Keep,
    config: RegistryConfig,
    metrics: Metrics,
    failures: Failures,
    hits: AtomicU64,
    misses: AtomicU64,
    evictions: AtomicU64,
}

/// Counts over the cache's life.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) evictions: u64,
    pub(super) resident: u64,
    pub(super) leased: u64,
    pub(super) bytes: u64,
    pub(super) budget: u64,
}

impl Residency {
    pub(super) fn new(store: Store, loader: Loader, keep: Keep, config: RegistryConfig) -> Self {
        let metrics = Metrics::new();
        let budget = ResidentBudget::new(config.max_resident_bytes, metrics.bytes.clone());
        let idle = Idle::new(Arc::clone(&budget), metrics.resident.clone());
        let retired = Arc::clone(&idle);
        let seats = Cache::builder()
            .max_capacity(config.max_resident_bytes.div_ceil(1024))
            .weigher(|_, seat: &Arc<Seat>| seat.weight_kib)
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, seat: Arc<Seat>, _| retired.retire(&seat))
            .build();
        let loads = Arc::new(Semaphore::new(config.max_concurrent_loads.max(1)));
        let (hits, misses, evictions) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let failures = Failures::new(config.retry_after);
        let shared = Shared {
            seats,
            idle,
            budget,
            loads,
            store,
            loader,
            keep,
            config,
            metrics,
            failures,
            hits,
            misses,
            evictions,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Holds the version's delta, and loads it first if it is not resident.
    pub(super) async fn hold(&self, version: &Arc<VersionRecord>) -> Result<(Arc<Delta>, Hold), RegistryError> {
        if let Some(failing) = self.shared.failures.find(&version.id) {
            return Err(own(version, &failing));
        }
        let load = {
            let (this, version) = (self.clone(), Arc::clone(version));
            move |_| {
                let (this, version) = (this.clone(), Arc::clone(&version));
                async move { this.load(&version).await }
            }
        };
        let held = self.hold_made(version.id, version.spec.resident_bytes, load).await;
        held.map_err(|e| own(version, &e))
    }

    /// Holds the delta of an id, which `make` seats if it is not resident: once, however many wait. `make` may end with
    /// [`RegistryError::Abandoned`] where the caller that it is given has left: the next that waits makes it then.
    pub(super) async fn hold_made<M>(
        &self,
        id: DeltaId,
        bytes: u64,
        make: impl Fn(Interest) -> M + Send + 'static,
    ) -> Result<(Arc<Delta>, Hold), RegistryError>
    where
        M: Future<Output = Result<Hold, RegistryError>> + Send + 'static,
    {
        if let Some(held) = self.find(&id).await {
            self.shared.hits.fetch_add(1, Ordering::Relaxed);
            self.shared.metrics.hits.increment(1);
            return Ok(held);
        }
        self.shared.misses.fetch_add(1, Ordering::Relaxed);
        self.shared.metrics.misses.increment(1);
        // On a task of its own: a caller that goes away must not break off the load that others wait for.
        let (_waits, interest) = Interest::new();
        let this = self.clone();
        tokio::spawn(async move { this.find_or_make(id, bytes, &interest, make).await }).await?
    }

    async fn find(&self, id: &DeltaId) -> Option<(Arc<Delta>, Hold)> {
        let seat = self.shared.seats.get(id).await?;
        match self.shared.idle.hold(&seat) {
            Some(held) => Some(held),
            None => {
                self.remove(&seat).await;
                None
            }
        }
    }

    async fn find_or_make<M>(
        &self,
        id: DeltaId,
        bytes: u64,
        interest: &Interest,
        make: impl Fn(Interest) -> M + Send,
    ) -> Result<(Arc<Delta>, Hold), RegistryError>
    where
        M: Future<Output = Result<Hold, RegistryError>> + Send,
    {
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            // Whoever makes it holds the seat from the start; it cannot be evicted before it is handed out.
            let first = Arc::new(Mutex::new(None));
            let load = {
                let (first, made) = (Arc::clone(&first), make(interest.clone()));
                async move {
                    let hold = made.await?;
                    let seat = Arc::clone(hold.seat());
                    *first.lock() = Some(hold);
                    Ok::<_, RegistryError>(seat)
                }
            };
            let seat = match self.shared.seats.try_get_with(id, load).await.map_err(|e| RegistryError::clone(&e)) {
                Ok(seat) => seat,
                // whoever made it has left: each does so once
                Err(RegistryError::Abandoned) if interest.check().is_ok() => continue,
                Err(e) => return Err(e),
            };
            attempts += 1;
            if let Some(held) = self.shared.idle.hold(&seat) {
                return Ok(held);
            }
            self.remove(&seat).await;
        }
        Err(self.full(bytes))
    }

    /// Seats what `make` computes, on a blocking thread, of deltas that the caller holds: `bytes` are reserved before.
    pub(super) async fn compute(
        &self,
        (id, parts): (DeltaId, Vec<DeltaId>),
        bytes: u64,
        make: impl FnOnce() -> Result<Delta, RegistryError> + Send + 'static,
    ) -> Result<Hold, RegistryError> {
        let shared = &self.shared;
        let mut reservation = self.reserve(bytes).await?;
        let permit = Arc::clone(&shared.loads).acquire_owned().await;
        let permit = permit.map_err(|e| RegistryError::LoadFailed { name: id.short(), detail: e.to_string() })?;
        let work = move || {
            let _permit = permit;
            make()
        };
        let delta = tokio::task::spawn_blocking(work).await??;
        self.fit(&mut reservation, delta.bytes()).await?;
        Ok(shared.idle.seat(id, parts, Arc::new(delta), reservation))
    }

    async fn fit(&self, reservation: &mut Reservation, bytes: u64) -> Result<(), RegistryError> {
        if bytes > reservation.bytes() {
            reservation.join(self.reserve(bytes - reservation.bytes()).await?);
        }
        reservation.shrink_to(bytes);
        Ok(())
    }

    /// Loads a version, and remembers if that fails.
    async fn load(&self, version: &Arc<VersionRecord>) -> Result<Hold, RegistryError> {
        self.shared.failures.begin(version.id);
        let loaded = self.load_now(version).await;
        self.shared.failures.end(version.id, &loaded);
        loaded
    }

    /// Something has changed about a version: how it failed says nothing any more.
    pub(super) fn forget(&self, id: &DeltaId) {
        self.shared.failures.forget(id);
    }

    /// Blobs of the store have changed: how any version failed says nothing any more.
    pub(super) fn forget_all(&self) {
        self.shared.failures.forget_all();
    }

    /// Reads and decodes within a reservation made before.
    async fn load_now(&self, version: &Arc<VersionRecord>) -> Result<Hold, RegistryError> {
        let shared = &self.shared;
        let started = Instant::now();
        let planned = match version.spec.resident_bytes {
            0 => version.stored_bytes,
            bytes => bytes,
        };
        let reservation = self.reserve(planned).await?;
        let permit = Arc::clone(&shared.loads).acquire_owned().await;
        let permit = permit.map_err(|e| load_failed(version, &e))?;
        let work = async {
            crate::failpoint!("registry-before-load", |why| Err(injected(version, why)));
            let files = shared.store.read_files(version).await.map_err(|e| unreadable(version, e))?;
            let loader = Arc::clone(&shared.loader);
            // The decode cannot be broken off: permit and reservation stay with it, also after a timeout.
            let decode = tokio::task::spawn_blocking(move || (loader(&files), reservation, permit));
            let (delta, reservation, _permit) = decode.await.map_err(|e| load_failed(version, &e))?;
            Ok::<_, RegistryError>((delta.map_err(|e| refused(version, e))?, reservation))
        };
        let limit = shared.config.load_timeout;
        let (delta, mut reservation) = timeout(limit, work).await.map_err(|_| RegistryError::LoadTimeout(limit))??;
        // The spec may have been written under other circumstances, e.g. another dtype of the base.
        self.fit(&mut reservation, delta.bytes()).await?;
        shared.metrics.load_seconds.record(started.elapsed().as_secs_f64());
        crate::failpoint!("registry-before-seat", |why| Err(injected(version, why)));
        Ok(shared.idle.seat(version.id, vec![], Arc::new(delta), reservation))
    }

    /// Takes room for work that seats nothing.
    pub(super) async fn work_space(&self, bytes: u64) -> Result<Reservation, RegistryError> {
        self.reserve(bytes).await
    }

    /// Takes room from the budget, evicting what nobody uses, and waits a little for what somebody does.
    async fn reserve(&self, bytes: u64) -> Result<Reservation, RegistryError> {
        let shared = &self.shared;
        if bytes > shared.budget.limit() {
            return Err(RegistryError::TooLarge { bytes, budget: shared.budget.limit() });
        }
        let deadline = tokio::time::Instant::now() + shared.config.room_wait;
        loop {
            let mut room = std::pin::pin!(shared.budget.room().notified());
            room.as_mut().enable();
            loop {
                if let Some(reservation) = shared.budget.try_reserve(bytes) {
                    return Ok(reservation);
                }
                let Some(victim) = shared.idle.evict_one(&(shared.keep)()) else { break };
                shared.evictions.fetch_add(1, Ordering::Relaxed);
                shared.metrics.evictions.increment(1);
                crate::failpoint!("registry-evicted");
                self.remove(&victim).await;
            }
            if tokio::time::timeout_at(deadline, room).await.is_err() {
                return Err(self.full(bytes));
            }
        }
    }

    /// Evicts the longest unused of these; false if all are in use, kept or not in memory.
    pub(super) async fn evict_among(&self, ids: &HashSet<DeltaId>) -> bool {
        let shared = &self.shared;
        let keep = (shared.keep)();
        let Some(victim) = shared.idle.evict(|id| ids.contains(id) && !keep.contains(id)) else { return false };
        shared.evictions.fetch_add(1, Ordering::Relaxed);
        shared.metrics.evictions.increment(1);
        self.remove(&victim).await;
        true
    }

    /// Takes an id, and what is made of it, from new requests; those who hold it keep it.
    pub(super) async fn retire(&self, id: &DeltaId) {
        let seats = self.shared.seats.iter().map(|(_, seat)| seat);
        let dead: Vec<Arc<Seat>> = seats.filter(|seat| seat.id == *id || seat.parts.contains(id)).collect();
        for seat in dead {
            crate::failpoint!("registry-before-retire");
            self.shared.idle.retire(&seat);
            self.shared.idle.forget(&seat.id);
            self.remove(&seat).await;
        }
        self.shared.idle.forget(id);
    }

    /// Takes a seat out of the map, unless another has its place.
    async fn remove(&self, seat: &Arc<Seat>) {
        let same = |found: Option<moka::Entry<DeltaId, Arc<Seat>>>| {
            let same = found.is_some_and(|entry| Arc::ptr_eq(entry.value(), seat));
            std::future::ready(if same { Op::Remove } else { Op::Nop })
        };
        self.shared.seats.entry(seat.id).and_compute_with(same).await;
    }

    /// Bytes in memory and holders of an id.
    pub(super) async fn usage(&self, id: &DeltaId) -> (u64, u64) {
        self.shared.seats.get(id).await.map_or((0, 0), |seat| seat.usage())
    }

    pub(super) fn counts(&self) -> Counts {
        let shared = &self.shared;
        Counts {
            hits: shared.hits.load(Ordering::Relaxed),
            misses: shared.misses.load(Ordering::Relaxed),
            evictions: shared.evictions.load(Ordering::Relaxed),
            resident: shared.idle.resident(),
            leased: shared.idle.leased(),
            bytes: shared.budget.used(),
            budget: shared.budget.limit(),
        }
    }

    fn full(&self, needed: u64) -> RegistryError {
        let budget = &self.shared.budget;
        RegistryError::BudgetFull { needed, used: budget.used(), budget: budget.limit() }
    }
}

fn name_of(version: &VersionRecord) -> String {
    format!("{}@{}", version.name, version.number)
}

/// The error as this caller may see it: whoever ran the load may have known the same bytes by another name.
fn own(version: &VersionRecord, error: &RegistryError) -> RegistryError {
    let mine = name_of(version);
    match error.clone() {
        RegistryError::Corrupt { detail, .. } => RegistryError::Corrupt { name: mine, detail },
        RegistryError::LoadFailed { detail, .. } => RegistryError::LoadFailed { name: mine, detail },
        RegistryError::Failing { error, retry } => {
            RegistryError::Failing { error: Box::new(own(version, &error)), retry }
        }
        other => other,
    }
}

fn load_failed(version: &VersionRecord, error: &dyn std::error::Error) -> RegistryError {
    RegistryError::LoadFailed { name: name_of(version), detail: error.to_string() }
}

/// What a failpoint was told to fail with.
#[cfg(feature = "failpoints")]
fn injected(version: &VersionRecord, message: Option<String>) -> RegistryError {
    let detail = message.unwrap_or_else(|| "injected".to_owned());
    RegistryError::LoadFailed { name: name_of(version), detail }
}

fn unreadable(version: &VersionRecord, error: StoreError) -> RegistryError {
    match error {
        StoreError::Corrupt { .. } => RegistryError::Corrupt { name: name_of(version), detail: error.to_string() },
        error => error.into(),
    }
}

fn refused(version: &VersionRecord, error: LoadError) -> RegistryError {
    let name = name_of(version);
    match error {
        // It was accepted when it was published, so the stored form is at fault.
        LoadError::Invalid(detail) | LoadError::BaseMismatch(detail) => RegistryError::Corrupt { name, detail },
        LoadError::Failed(detail) => RegistryError::LoadFailed { name, detail },
    }
}
