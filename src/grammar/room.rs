//! The memory of compiled grammars: those that are kept and those that requests hold, together, within a bound.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Bytes of all that are alive.
#[derive(Debug)]
pub(super) struct Room {
    taken: AtomicU64,
    /// Most of them.
    pub(super) limit: u64,
}

/// Some of them, given back with it.
#[derive(Debug)]
pub(super) struct Taken {
    room: Arc<Room>,
    pub(super) bytes: u64,
}

impl Room {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { taken: AtomicU64::new(0), limit })
    }

    /// `None` where there are not so many.
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Option<Taken> {
        let more = |taken: u64| taken.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Taken { room: Arc::clone(self), bytes })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_never_exceeds_the_limit_and_comes_back() {
        let room = Room::new(10);
        let (six, four) = (room.take(6), room.take(4));
        assert!(six.is_some() && four.is_some() && room.take(1).is_none());
        drop(six);
        assert!(room.take(7).is_none() && room.take(u64::MAX).is_none());
        assert!(room.take(6).is_some_and(|taken| taken.bytes == 6));
    }
}
