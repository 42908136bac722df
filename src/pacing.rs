//! Pacing: the trainer yields to serving at layer borders, for a bounded time, and serving leaves it a floor.
//!
//! The engine marks when it is inside a busy period; the trainer calls [`Pacer::yield_now`] between layers of a forward
//! and of a backward pass. It waits there while serving is busy, but never longer than `max_wait`. Where the trainer's threads
//! run only when no other wants a core ([`crate::ops::Priority`]), that alone would not keep it from starving: an engine that
//! is busy all the time, and on every core, would leave it nothing. So between steps the engine asks [`Pacer::leave_floor`],
//! which, where training has not got through a layer for long, lets it do one alone. This is all that engine and trainer share.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// The longest that the engine waits for one layer of training. One that takes longer has several turns.
const LONGEST_GIFT: Duration = Duration::from_millis(250);
/// The shortest time that the engine computes between two such waits, so that few steps are delayed by one.
const SHORTEST_SPELL: Duration = Duration::from_millis(200);

/// The one shared switch between engine and trainer.
#[derive(Debug)]
pub struct Pacer {
    state: Mutex<State>,
    /// Serving is idle, or lets the trainer through.
    open: Condvar,
    /// The trainer is at a yield point.
    passed: Condvar,
    max_wait: Duration,
    floor: f64,
    yielded_us: AtomicU64,
    given_us: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    busy: bool,
    /// The trainer has work.
    training: bool,
    /// The engine waits for the trainer's next yield point.
    gift: bool,
    /// Yield points so far.
    points: u64,
    spell: Option<Spell>,
}

/// A time in which serving is busy beside training.
#[derive(Debug, Clone, Copy)]
struct Spell {
    begun: Instant,
    /// Yield points when it began.
    points: u64,
    /// It is over when the trainer passes one, or after this time by a gift.
    length: Duration,
}

impl Pacer {
    /// `max_wait`: the longest that one yield point waits while serving is busy. `floor`: the share of the time, 0 to below 1,
    /// that the trainer has at least while serving is always busy; 0: whatever is left.
    pub fn new(max_wait: Duration, floor: f64) -> Self {
        Self {
            state: Mutex::default(),
            open: Condvar::new(),
            passed: Condvar::new(),
            max_wait,
            floor: floor.clamp(0.0, 0.99),
            yielded_us: AtomicU64::new(0),
            given_us: AtomicU64::new(0),
        }
    }

    /// Engine side: serving has work (`true`) or ran out of it (`false`).
    pub fn set_busy(&self, busy: bool) {
        let mut state = self.state.lock();
        state.busy = busy;
        if !busy {
            state.spell = None;
            self.open.notify_all();
        }
    }

    /// Whether serving has work.
    pub fn is_busy(&self) -> bool {
        self.state.lock().busy
    }

    /// Trainer side: there is a job to work on (`true`), or none that computes (`false`).
    pub fn set_training(&self, training: bool) {
        let mut state = self.state.lock();
        state.training = training;
        if !training {
            state.spell = None;
            state.gift = false;
            self.passed.notify_all();
        }
    }

    /// Trainer side: waits while serving is busy, at most `max_wait`.
    pub fn yield_now(&self) {
        let mut state = self.state.lock();
        state.points += 1;
        if state.gift {
            state.gift = false;
            self.passed.notify_all();
        }
        if !state.busy {
            return;
        }
        let start = Instant::now();
        let deadline = start + self.max_wait;
        while state.busy && !state.gift {
            if self.open.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        drop(state);
        self.yielded_us.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
    }

    /// Engine side, between two steps: where training has passed no yield point since serving became busy beside it, or since it
    /// was let through, for so long that it has less than its floor, waits until it has passed one, at most 250 ms. Costs a
    /// lock where nothing trains.
    pub fn leave_floor(&self) {
        if self.floor == 0.0 {
            return;
        }
        let mut state = self.state.lock();
        if !state.training || !state.busy {
            return;
        }
        let (now, points) = (Instant::now(), state.points);
        let spell = state.spell.get_or_insert(Spell { begun: now, points, length: SHORTEST_SPELL });
        if spell.points != points {
            *spell = Spell { begun: now, points, ..*spell };
            return;
        }
        if now.duration_since(spell.begun) < spell.length {
            return;
        }
        state.gift = true;
        self.open.notify_all();
        let deadline = now + LONGEST_GIFT;
        while state.gift {
            if self.passed.wait_until(&mut state, deadline).timed_out() {
                state.gift = false;
            }
        }
        let (now, given) = (Instant::now(), now.elapsed());
        let length = given.mul_f64((1.0 - self.floor) / self.floor).max(SHORTEST_SPELL);
        let points = state.points;
        state.spell = state.training.then_some(Spell { begun: now, points, length });
        drop(state);
        self.given_us.fetch_add(given.as_micros() as u64, Ordering::Relaxed);
    }

    /// Time that training gave away so far.
    pub fn yielded(&self) -> Duration {
        Duration::from_micros(self.yielded_us.load(Ordering::Relaxed))
    }

    /// Time that serving waited for training so far.
    pub fn given(&self) -> Duration {
        Duration::from_micros(self.given_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, atomic::AtomicBool};

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
                    if over.load(Ordering::SeqCst) {
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
            over.store(true, Ordering::SeqCst);
            pacer.set_busy(false);
            trainer.join().expect("no panic")
        });
        (layers, pacer.given().as_secs_f64() / begun.elapsed().as_secs_f64())
    }

    #[test]
    fn an_engine_that_is_always_busy_leaves_the_floor_and_no_more() {
        let (layer, time) = (Duration::from_millis(40), Duration::from_millis(2500));
        let (layers, share) = beside(0.1, true, layer, time);
        // a layer of 40 ms in each 400, and one at the end of the wait that is always there
        assert!((3..=8).contains(&layers), "{layers}");
        assert!((0.04..0.25).contains(&share), "{share}");
        assert_eq!(beside(0.0, true, layer, time / 5).0, 0, "without a floor it waits");
        assert_eq!(beside(0.5, false, layer, time / 5).1, 0.0, "nothing is given where nothing trains");
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
        assert!(!pacer.state.lock().gift);
    }

    #[test]
    fn training_that_goes_on_by_itself_is_given_nothing() {
        let pacer = Pacer::new(Duration::ZERO, 0.5);
        pacer.set_training(true);
        pacer.set_busy(true);
        let begun = Instant::now();
        while begun.elapsed() < 3 * SHORTEST_SPELL {
            pacer.yield_now();
            pacer.leave_floor();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(pacer.given(), Duration::ZERO);
    }
}
