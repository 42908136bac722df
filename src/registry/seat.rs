//! A seat: one delta's place among the resident. Who holds it, and when it may be evicted.
//!
//! The seat owns the delta and its reservation until it is evicted *and* nobody holds it; both then go in that order,
//! inside one call, so that the budget never counts less than there is. moka holds seats, not deltas: it drops removed
//! values some time later, and by then a seat is empty.
//!
//! Locks: a seat's state first, the idle list inside it. Neither is held across an await.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use metrics::Gauge;
use parking_lot::Mutex;

use super::{
    budget::{Reservation, ResidentBudget},
    demand::{Demand, Score},
};
use crate::{delta::Delta, ids::DeltaId};

/// A delta in memory. The tensors go before the bytes are given back: fields drop in this order.
struct Resident {
    delta: Arc<Delta>,
    reservation: Reservation,
}

pub(super) struct Seat {
    pub(super) id: DeltaId,
    /// Of a composition: what it is made of.
    pub(super) parts: Vec<DeltaId>,
    pub(super) weight_kib: u32,
    state: Mutex<State>,
}

struct State {
    resident: Option<Resident>,
    /// Takes no new holders; goes when the last one lets go.
    evicted: bool,
    holders: u64,
    /// Its place in the idle list.
    idle_at: Option<u64>,
}

/// The seats that nobody holds, those first that are asked for least, and the counts over all seats.
pub(super) struct Idle {
    list: Mutex<List>,
    budget: Arc<ResidentBudget>,
    resident: AtomicU64,
    leased: AtomicU64,
    gauge: Gauge,
}

struct List {
    demand: Demand,
    /// By how much they are asked for; where that is the same, by when they were let go.
    order: BTreeMap<(Score, u64), Arc<Seat>>,
    /// The score that each is in the order by.
    scores: HashMap<u64, Score>,
    /// How often a seat was let go so far.
    clock: u64,
}

impl List {
    fn insert(&mut self, seat: &Arc<Seat>) -> u64 {
        let at = self.clock;
        self.clock += 1;
        let score = self.demand.score(&seat.id);
        self.scores.insert(at, score);
        self.order.insert((score, at), Arc::clone(seat));
        at
    }

    fn remove(&mut self, at: u64) -> Option<Arc<Seat>> {
        let score = self.scores.remove(&at)?;
        self.order.remove(&(score, at))
    }

    /// Counts a request for a seat that is not in the list.
    fn ask(&mut self, id: DeltaId, bytes: u64) {
        if self.demand.asked(id, bytes) {
            for ((_, at), seat) in std::mem::take(&mut self.order) {
                let score = self.demand.score(&seat.id);
                self.scores.insert(at, score);
                self.order.insert((score, at), seat);
            }
        }
    }
}

impl Idle {
    pub(super) fn new(budget: Arc<ResidentBudget>, gauge: Gauge) -> Arc<Self> {
        let demand = Demand::new(budget.limit());
        let list = Mutex::new(List { demand, order: BTreeMap::new(), scores: HashMap::new(), clock: 0 });
        Arc::new(Self { list, budget, resident: AtomicU64::new(0), leased: AtomicU64::new(0), gauge })
    }

    /// Deltas in memory, evicted but leased ones included.
    pub(super) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Deltas that somebody holds.
    pub(super) fn leased(&self) -> u64 {
        self.leased.load(Ordering::Relaxed)
    }

    /// Seats a loaded delta and holds it. That is no request yet: those who asked for it hold it themselves.
    pub(super) fn seat(
        self: &Arc<Self>,
        id: DeltaId,
        parts: Vec<DeltaId>,
        delta: Arc<Delta>,
        reservation: Reservation,
    ) -> Hold {
        // Rounded down: the budget is exact and stricter, so that moka never sees a reason of its own to evict.
        let weight_kib = u32::try_from(reservation.bytes() / 1024).unwrap_or(u32::MAX);
        let resident = Some(Resident { delta, reservation });
        let state = Mutex::new(State { resident, evicted: false, holders: 1, idle_at: None });
        self.resident.fetch_add(1, Ordering::Relaxed);
        self.gauge.increment(1.0);
        self.leased.fetch_add(1, Ordering::Relaxed);
        self.list.lock().demand.seated(id);
        Hold { seat: Arc::new(Seat { id, parts, weight_kib, state }), idle: Arc::clone(self) }
    }

    /// Holds a seat's delta for a request, which is counted; `None` if it has been evicted. Finding it and holding it is one step.
    pub(super) fn hold(self: &Arc<Self>, seat: &Arc<Seat>) -> Option<(Arc<Delta>, Hold)> {
        let mut state = seat.state.lock();
        let (delta, bytes) = match &state.resident {
            Some(resident) if !state.evicted => (Arc::clone(&resident.delta), resident.reservation.bytes()),
            _ => return None,
        };
        let idle_at = state.idle_at.take();
        {
            let mut list = self.list.lock();
            if let Some(at) = idle_at {
                list.remove(at);
            }
            list.ask(seat.id, bytes);
        }
        self.add_holder(&mut state);
        drop(state);
        Some((delta, Hold { seat: Arc::clone(seat), idle: Arc::clone(self) }))
    }

    /// Evicts the seat that is asked for least, of those that nobody holds and that are not kept.
    pub(super) fn evict_one(&self, keep: &HashSet<DeltaId>) -> Option<Arc<Seat>> {
        self.evict(|id| !keep.contains(id))
    }

    /// Evicts the seat that is asked for least, of those that nobody holds and that may go.
    pub(super) fn evict(&self, may_go: impl Fn(&DeltaId) -> bool) -> Option<Arc<Seat>> {
        loop {
            let (at, seat) = {
                let mut list = self.list.lock();
                let at = list.order.iter().find(|(_, seat)| may_go(&seat.id)).map(|((_, at), _)| *at)?;
                (at, list.remove(at)?)
            };
            let mut state = seat.state.lock();
            // Held, or held and let go again, since it was taken from the list.
            if state.idle_at != Some(at) {
                continue;
            }
            state.idle_at = None;
            state.evicted = true;
            let resident = state.resident.take();
            drop(state);
            self.free(seat.id, resident);
            return Some(seat);
        }
    }

    /// Takes a seat from new holders; its delta goes now or with the last of the present ones.
    pub(super) fn retire(&self, seat: &Seat) {
        let mut state = seat.state.lock();
        state.evicted = true;
        if let Some(at) = state.idle_at.take() {
            self.list.lock().remove(at);
        }
        let resident = if state.holders == 0 { state.resident.take() } else { None };
        drop(state);
        self.free(seat.id, resident);
    }

    /// Nobody can ask for the id any more: how much it was asked for counts no more.
    pub(super) fn forget(&self, id: &DeltaId) {
        self.list.lock().demand.forget(id);
    }

    fn add_holder(&self, state: &mut State) {
        if state.holders == 0 {
            self.leased.fetch_add(1, Ordering::Relaxed);
        }
        state.holders += 1;
    }

    fn release(&self, seat: &Arc<Seat>) {
        let mut state = seat.state.lock();
        state.holders -= 1;
        if state.holders > 0 {
            return;
        }
        self.leased.fetch_sub(1, Ordering::Relaxed);
        if state.evicted {
            let resident = state.resident.take();
            drop(state);
            self.free(seat.id, resident);
            return;
        }
        state.idle_at = Some(self.list.lock().insert(seat));
        drop(state);
        self.budget.room().notify_waiters();
    }

    fn free(&self, id: DeltaId, resident: Option<Resident>) {
        if let Some(Resident { delta, reservation }) = resident {
            drop(delta);
            self.list.lock().demand.left(id);
            self.resident.fetch_sub(1, Ordering::Relaxed);
            self.gauge.decrement(1.0);
            drop(reservation);
        }
    }
}

impl Seat {
    /// Bytes in memory now, and holders.
    pub(super) fn usage(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.resident.as_ref().map_or(0, |r| r.reservation.bytes()), state.holders)
    }
}

/// Keeps a seat's delta in memory. A clone is one more holder.
pub(super) struct Hold {
    seat: Arc<Seat>,
    idle: Arc<Idle>,
}

impl Hold {
    pub(super) fn seat(&self) -> &Arc<Seat> {
        &self.seat
    }
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.idle.add_holder(&mut self.seat.state.lock());
        Self { seat: Arc::clone(&self.seat), idle: Arc::clone(&self.idle) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.idle.release(&self.seat);
    }
}
