//! The resident budget: how many bytes of deltas exist, whether cached, leased after eviction, or being loaded (I8).
//!
//! Room is reserved before anything is allocated and given back by Drop, after what it stood for is gone. Knows bytes
//! only; who makes room is `cache`'s matter.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use metrics::Gauge;
use tokio::sync::Notify;

/// The bytes that deltas may take.
pub(crate) struct ResidentBudget {
    limit: u64,
    used: AtomicU64,
    /// Told whenever room may have come up: bytes given back, or a delta that has become evictable.
    room: Notify,
    gauge: Gauge,
}

impl ResidentBudget {
    pub(crate) fn new(limit: u64, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0), room: Notify::new(), gauge })
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    pub(crate) fn room(&self) -> &Notify {
        &self.room
    }

    /// Takes the bytes if they fit.
    pub(crate) fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        self.gauge.increment(bytes as f64);
        Some(Reservation { budget: Arc::clone(self), bytes })
    }
}

/// Bytes taken from the budget until dropped.
pub(crate) struct Reservation {
    budget: Arc<ResidentBudget>,
    bytes: u64,
}

impl Reservation {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds another reservation of the same budget to this one.
    pub(crate) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Gives back what is over.
    pub(crate) fn shrink_to(&mut self, bytes: u64) {
        let over = self.bytes.saturating_sub(bytes);
        self.bytes -= over;
        self.release(over);
    }

    fn release(&self, bytes: u64) {
        if bytes > 0 {
            self.budget.used.fetch_sub(bytes, Ordering::AcqRel);
            self.budget.gauge.decrement(bytes as f64);
            self.budget.room.notify_waiters();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn use_is_the_sum_of_what_is_reserved_and_never_over_the_limit(
            ops in prop::collection::vec((0_u8..4, 0_u64..60), 1..200),
        ) {
            let budget = ResidentBudget::new(100, Gauge::noop());
            let mut held: Vec<Reservation> = Vec::new();
            for (op, n) in ops {
                match op {
                    0 | 1 => {
                        let free = budget.limit() - budget.used();
                        let got = budget.try_reserve(n);
                        prop_assert_eq!(got.is_some(), n <= free);
                        held.extend(got);
                    }
                    2 if !held.is_empty() => drop(held.swap_remove(n as usize % held.len())),
                    3 if held.len() > 1 => {
                        let other = held.swap_remove(0);
                        held[0].join(other);
                        held[0].shrink_to(n);
                    }
                    _ => {}
                }
                prop_assert_eq!(budget.used(), held.iter().map(Reservation::bytes).sum::<u64>());
                prop_assert!(budget.used() <= budget.limit());
            }
            drop(held);
            prop_assert_eq!(budget.used(), 0);
        }

        #[test]
        fn no_sum_overflows(bytes in u64::MAX - 5..=u64::MAX) {
            let budget = ResidentBudget::new(u64::MAX, Gauge::noop());
            let _held = budget.try_reserve(10);
            prop_assert!(budget.try_reserve(bytes).is_none());
        }
    }
}
