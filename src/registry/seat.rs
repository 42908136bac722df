//! A seat: one delta's place among the resident. Who holds it, when it was let go, and what it may be evicted for.
//!
//! The seat owns the delta and its reservation until it is evicted *and* nobody holds it; both then go in that order,
//! inside one call, so that the budget never counts less than there is. moka holds seats, not deltas: it drops removed
//! values some time later, and by then a seat is empty.
//!
//! Locks: a seat's state first, the idle list inside it. Neither is held across an await.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use metrics::Gauge;
use parking_lot::Mutex;

use super::budget::{Reservation, ResidentBudget};
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

/// The seats that nobody holds, longest unused first, and the counts over all seats.
pub(super) struct Idle {
    seats: Mutex<BTreeMap<u64, Arc<Seat>>>,
    clock: AtomicU64,
    budget: Arc<ResidentBudget>,
    resident: AtomicU64,
    leased: AtomicU64,
    gauge: Gauge,
}

impl Idle {
    pub(super) fn new(budget: Arc<ResidentBudget>, gauge: Gauge) -> Arc<Self> {
        let (clock, resident, leased) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { seats: Mutex::new(BTreeMap::new()), clock, budget, resident, leased, gauge })
    }

    /// Deltas in memory, evicted but leased ones included.
    pub(super) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Deltas that somebody holds.
    pub(super) fn leased(&self) -> u64 {
        self.leased.load(Ordering::Relaxed)
    }

    /// Seats a loaded delta and holds it.
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
        Hold { seat: Arc::new(Seat { id, parts, weight_kib, state }), idle: Arc::clone(self) }
    }

    /// Holds a seat's delta; `None` if it has been evicted. Finding it and holding it is one step.
    pub(super) fn hold(self: &Arc<Self>, seat: &Arc<Seat>) -> Option<(Arc<Delta>, Hold)> {
        let mut state = seat.state.lock();
        let delta = match &state.resident {
            Some(resident) if !state.evicted => Arc::clone(&resident.delta),
            _ => return None,
        };
        if let Some(at) = state.idle_at.take() {
            self.seats.lock().remove(&at);
        }
        self.add_holder(&mut state);
        drop(state);
        Some((delta, Hold { seat: Arc::clone(seat), idle: Arc::clone(self) }))
    }

    /// Evicts the longest unused seat that is not kept.
    pub(super) fn evict_one(&self, keep: &HashSet<DeltaId>) -> Option<Arc<Seat>> {
        self.evict(|id| !keep.contains(id))
    }

    /// Evicts the longest unused seat among those that may go.
    pub(super) fn evict(&self, may_go: impl Fn(&DeltaId) -> bool) -> Option<Arc<Seat>> {
        loop {
            let (at, seat) = {
                let mut seats = self.seats.lock();
                let at = seats.iter().find(|(_, seat)| may_go(&seat.id)).map(|(at, _)| *at)?;
                (at, seats.remove(&at)?)
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
            self.free(resident);
            return Some(seat);
        }
    }

    /// Takes a seat from new holders; its delta goes now or with the last of the present ones.
    pub(super) fn retire(&self, seat: &Seat) {
        let mut state = seat.state.lock();
        state.evicted = true;
        if let Some(at) = state.idle_at.take() {
            self.seats.lock().remove(&at);
        }
        let resident = if state.holders == 0 { state.resident.take() } else { None };
        drop(state);
        self.free(resident);
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
            self.free(resident);
            return;
        }
        let at = self.clock.fetch_add(1, Ordering::Relaxed);
        state.idle_at = Some(at);
        self.seats.lock().insert(at, Arc::clone(seat));
        drop(state);
        self.budget.room().notify_waiters();
    }

    fn free(&self, resident: Option<Resident>) {
        if let Some(Resident { delta, reservation }) = resident {
            drop(delta);
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
