//! The memory of constraints' states: one for every sequence that has begun, also while its pages are lost.
//!
//! A newcomer whose state has no room waits, and no newcomer with a state passes it: what runs ends, so it gets its room. Those
//! without one pass, however many wait so: these are not in the line. A state may grow while its sequence runs; where all
//! together exceed the limit, the largest has to go.

use super::{Entry, Scheduler, SeqId};

impl Scheduler {
    /// Says of newcomers, one after the other in the order in which they begin, whether their constraints' states have room.
    pub(super) fn room_for_constraints(&self) -> impl FnMut(SeqId) -> bool {
        let mut room = self.limits.constraint_bytes.checked_sub(self.constraint_bytes());
        move |id| match self.waiting.get(&id).map_or(0, |e| e.constraint_bytes) {
            0 => true,
            bytes => {
                room = room.and_then(|room| room.checked_sub(bytes));
                room.is_some()
            }
        }
    }

    /// Bytes of all states that are there.
    pub(in crate::engine) fn constraint_bytes(&self) -> u64 {
        self.with_states().map(|(_, e)| e.constraint_bytes).sum()
    }

    /// A sequence's state has come to so many bytes.
    pub(in crate::engine) fn set_constraint_bytes(&mut self, id: SeqId, bytes: u64) {
        if let Some(entry) = self.running.get_mut(&id).or_else(|| self.waiting.get_mut(&id)) {
            entry.constraint_bytes = bytes;
        }
    }

    /// The largest state, its bytes and the limit, where all together exceed that.
    pub(in crate::engine) fn largest_constraint(&self) -> Option<(SeqId, u64, u64)> {
        let limit = self.limits.constraint_bytes;
        let largest = || self.with_states().map(|(id, e)| (e.constraint_bytes, id)).max();
        (self.constraint_bytes() > limit).then(largest).flatten().map(|(bytes, id)| (id, bytes, limit))
    }

    fn with_states(&self) -> impl Iterator<Item = (SeqId, &Entry)> {
        let returning = self.returning.values().filter_map(|id| self.waiting.get_key_value(id));
        self.running.iter().chain(returning).map(|(id, e)| (*id, e))
    }
}
