//! Pacing: the trainer yields to serving at layer borders, for a bounded time.
//!
//! The engine marks when it is inside a busy period; the trainer calls [`Pacer::yield_now`] between layers of a forward
//! and of a backward pass. It waits there while serving is busy, but never longer than `max_wait`, so training cannot
//! starve. This is the only thing that engine and trainer share.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// The one shared switch between engine and trainer.
#[derive(Debug)]
pub struct Pacer {
    busy: Mutex<bool>,
    idle: Condvar,
    max_wait: Duration,
    yielded_us: AtomicU64,
}

impl Pacer {
    /// `max_wait`: the longest that one yield point waits while serving is busy (the trainer's guaranteed floor).
    pub fn new(max_wait: Duration) -> Self {
        Self { busy: Mutex::new(false), idle: Condvar::new(), max_wait, yielded_us: AtomicU64::new(0) }
    }

    /// Engine side: serving has work (`true`) or ran out of it (`false`).
    pub fn set_busy(&self, busy: bool) {
        *self.busy.lock() = busy;
        if !busy {
            self.idle.notify_all();
        }
    }

    /// Whether serving has work.
    pub fn is_busy(&self) -> bool {
        *self.busy.lock()
    }

    /// Trainer side: waits while serving is busy, at most `max_wait`.
    pub fn yield_now(&self) {
        let mut busy = self.busy.lock();
        if !*busy {
            return;
        }
        let start = Instant::now();
        let deadline = start + self.max_wait;
        while *busy {
            if self.idle.wait_until(&mut busy, deadline).timed_out() {
                break;
            }
        }
        self.yielded_us.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
    }

    /// Time that training gave away so far.
    pub fn yielded(&self) -> Duration {
        Duration::from_micros(self.yielded_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_idle_engine_costs_nothing_and_a_busy_one_a_bounded_wait() {
        let pacer = Pacer::new(Duration::from_millis(30));
        pacer.yield_now();
        assert_eq!(pacer.yielded(), Duration::ZERO);
        pacer.set_busy(true);
        let t = Instant::now();
        pacer.yield_now();
        assert!(t.elapsed() >= Duration::from_millis(29), "waits while serving is busy");
        assert!(t.elapsed() < Duration::from_secs(60), "but not for ever");
    }

    #[test]
    fn the_trainer_goes_on_as_soon_as_serving_is_idle() {
        let pacer = Arc::new(Pacer::new(Duration::from_secs(60)));
        pacer.set_busy(true);
        let trainer = std::thread::spawn({
            let pacer = Arc::clone(&pacer);
            move || pacer.yield_now()
        });
        std::thread::sleep(Duration::from_millis(20));
        pacer.set_busy(false);
        trainer.join().expect("trainer ends");
        assert!(pacer.yielded() < Duration::from_secs(30), "it is told, and does not wait to the end");
    }
}
