//! Pacing: the trainer yields to serving at layer borders, for a bounded time, and serving leaves it a floor.
//!
//! The engine marks when it is inside a busy period; the trainer calls [`Pacer::yield_now`] between layers of a forward
//! and of a backward pass. It waits there while serving is busy, but never longer than `max_wait`. Where the trainer's threads
//! run only when no other wants a core ([`crate::ops::Priority`]), that alone would not keep it from starving: an engine that
//! is busy all the time, and on every core, would leave it nothing. So between steps the engine asks [`Pacer::leave_floor`],
//! which, where serving has been busy for long, lets it do some layers alone. This is all that engine and trainer share.

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// The longest that the engine waits at a time. A layer that takes longer has several turns.
const LONGEST_GIFT: Duration = Duration::from_millis(250);
/// The shortest time that the engine computes between two such waits, so that few steps are delayed by one.
const SHORTEST_SPELL: Duration = Duration::from_millis(200);

/// The one shared switch between engine and trainer.
///
/// What both look at all the time are atomics: a trainer's thread that the system has stopped for others must hold no lock that
/// the engine takes before each step.
#[derive(Debug)]
pub struct Pacer {
    busy: AtomicBool,
    /// The trainer has work.
    training: AtomicBool,
    /// The engine waits for the trainer.
    gift: AtomicBool,
    /// Yield points so far.
    points: AtomicU64,
    /// Taken only to wait and to wake.
    waiting: Mutex<()>,
    /// Serving is idle, or lets the trainer through.
    open: Condvar,
    /// The trainer is at a yield point, or has no work.
    passed: Condvar,
    /// The engine's own.
    spell: Mutex<Option<Spell>>,
    max_wait: Duration,
    floor: f64,
    yielded_us: AtomicU64,
    given_us: AtomicU64,
}

/// A time in which serving is busy beside training.
#[derive(Debug, Clone, Copy)]
struct Spell {
    begun: Instant,
    /// How long it is to last before training is let through.
    length: Duration,
}

impl Pacer {
    /// `max_wait`: the longest that one yield point waits while serving is busy. `floor`: the share of the time, 0 to below 1,
    /// that the trainer has at least while serving is always busy; 0: whatever is left.
    pub fn new(max_wait: Duration, floor: f64) -> Self {
        Self {
            busy: AtomicBool::new(false),
            training: AtomicBool::new(false),
            gift: AtomicBool::new(false),
            points: AtomicU64::new(0),
            waiting: Mutex::new(()),
            open: Condvar::new(),
            passed: Condvar::new(),
            spell: Mutex::new(None),
            max_wait,
            floor: floor.clamp(0.0, 0.99),
            yielded_us: AtomicU64::new(0),
            given_us: AtomicU64::new(0),
        }
    }

    /// Engine side: serving has work (`true`) or ran out of it (`false`).
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, SeqCst);
        if !busy {
            *self.spell.lock() = None;
            // whoever has seen that serving was busy waits by now
            drop(self.waiting.lock());
            self.open.notify_all();
        }
    }

    /// Whether serving has work.
    pub fn is_busy(&self) -> bool {
        self.busy.load(SeqCst)
    }

    /// Trainer side: there is a job to work on (`true`), or none that computes (`false`).
    pub fn set_training(&self, training: bool) {
        self.training.store(training, SeqCst);
        if !training {
            drop(self.waiting.lock());
            self.passed.notify_all();
        }
    }

    /// Trainer side: waits while serving is busy and lets nothing through, at most `max_wait`.
    pub fn yield_now(&self) {
        self.points.fetch_add(1, SeqCst);
        let gift = self.gift.load(SeqCst);
        if gift {
            drop(self.waiting.lock());
            self.passed.notify_all();
        }
        if gift || !self.is_busy() {
            return;
        }
        let start = Instant::now();
        let deadline = start + self.max_wait;
        let mut waiting = self.waiting.lock();
        while self.is_busy() && !self.gift.load(SeqCst) {
            if self.open.wait_until(&mut waiting, deadline).timed_out() {
                break;
            }
        }
        drop(waiting);
        self.yielded_us.fetch_add(start.elapsed().as_micros() as u64, Relaxed);
    }

    /// Engine side, between two steps: lets training through where serving has been busy beside it for so long that it has less
    /// than its floor, and waits for that, at most 250 ms: until the trainer has had its share of the time since, and is at a
    /// yield point. Costs two looks where nothing trains.
    pub fn leave_floor(&self) {
        if self.floor == 0.0 || !self.training.load(SeqCst) || !self.is_busy() {
            return;
        }
        let now = Instant::now();
        let spell = *self.spell.lock().get_or_insert(Spell { begun: now, length: SHORTEST_SPELL });
        let busy = now.duration_since(spell.begun);
        if busy < spell.length {
            return;
        }
        let share = self.floor / (1.0 - self.floor);
        let (least, deadline) = (now + busy.mul_f64(share).min(LONGEST_GIFT), now + LONGEST_GIFT);
        let begun = self.points.load(SeqCst);
        self.gift.store(true, SeqCst);
        let mut waiting = self.waiting.lock();
        self.open.notify_all();
        // whole layers: the last one is not left half done
        let done = || Instant::now() >= least && self.points.load(SeqCst) > begun;
        while self.training.load(SeqCst) && !done() {
            if self.passed.wait_until(&mut waiting, deadline).timed_out() {
                break;
            }
        }
        drop(waiting);
        self.gift.store(false, SeqCst);
        let given = now.elapsed();
        let length = given.div_f64(share).max(SHORTEST_SPELL);
        *self.spell.lock() = Some(Spell { begun: Instant::now(), length });
        self.given_us.fetch_add(given.as_micros() as u64, Relaxed);
    }

    /// Time that training gave away so far.
    pub fn yielded(&self) -> Duration {
        Duration::from_micros(self.yielded_us.load(Relaxed))
    }

    /// Time that serving waited for training so far.
    pub fn given(&self) -> Duration {
        Duration::from_micros(self.given_us.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_idle_engine_costs_nothing_and_a_busy_one_a_bounded_wait() {
        let pacer = Pacer::new(Duration::from_millis(30), 0.0);
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
        let pacer = Arc::new(Pacer::new(Duration::from_secs(60), 0.0));
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

    /// An engine that is always busy beside a trainer whose layers take `layer`: layers that it came through in `time`, and the
    /// share of the time that the engine waited.
    fn beside(floor: f64, training: bool, layer: Duration, time: Duration) -> (u64, f64) {
        let pacer = Pacer::new(Duration::from_secs(3600), floor);
        pacer.set_training(training);
        pacer.set_busy(true);
        let (over, begun) = (AtomicBool::new(false), Instant::now());
        let layers = std::thread::scope(|s| {
            let trainer = s.spawn(|| {
                let mut layers = 0;
                loop {
                    pacer.yield_now();
                    if over.load(SeqCst) {
                        return layers;
                    }
                    std::thread::sleep(layer);
                    layers += 1;
                }
            });
            while begun.elapsed() < time {
                std::thread::sleep(Duration::from_millis(2));
                pacer.leave_floor();
            }
            over.store(true, SeqCst);
            pacer.set_busy(false);
            trainer.join().expect("no panic")
        });
        (layers, pacer.given().as_secs_f64() / begun.elapsed().as_secs_f64())
    }

    #[test]
    fn an_engine_that_is_always_busy_leaves_the_floor_and_not_much_more() {
        let time = Duration::from_millis(2500);
        // long layers and short ones; the machine may be slow, so that both sides come late
        for (floor, layer) in [(0.1, 40), (0.1, 1), (0.3, 5)] {
            let (layers, share) = beside(floor, true, Duration::from_millis(layer), time);
            assert!(
                layers > 2 && (floor * 0.5..floor * 2.5).contains(&share),
                "{floor}, {layer} ms: {layers}, {share}"
            );
        }
        assert_eq!(beside(0.0, true, Duration::from_millis(40), time / 5).0, 0, "without a floor it waits");
        assert_eq!(
            beside(0.5, false, Duration::from_millis(40), time / 5).1,
            0.0,
            "nothing is given where nothing trains"
        );
    }

    #[test]
    fn a_trainer_that_does_not_come_delays_the_engine_by_a_bounded_time() {
        let pacer = Pacer::new(Duration::from_secs(3600), 0.5);
        pacer.set_training(true);
        pacer.set_busy(true);
        pacer.leave_floor();
        std::thread::sleep(SHORTEST_SPELL);
        let t = Instant::now();
        pacer.leave_floor();
        assert!(t.elapsed() >= LONGEST_GIFT && t.elapsed() < Duration::from_secs(60));
        assert!(pacer.given() >= LONGEST_GIFT);
        // a job that ends meanwhile ends the wait
        std::thread::sleep(SHORTEST_SPELL + LONGEST_GIFT);
        std::thread::scope(|s| {
            let waits = s.spawn(|| pacer.leave_floor());
            std::thread::sleep(Duration::from_millis(20));
            pacer.set_training(false);
            waits.join().expect("no panic");
        });
        assert!(!pacer.gift.load(SeqCst));
    }
}
