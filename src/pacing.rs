//! Pacing: the trainer yields to serving at layer borders, as much as is measured to be needed, and serving leaves it
//! a floor.
//!
//! The engine marks when it is inside a busy period; the trainer calls [`Pacer::yield_now`] between layers of a forward
//! and of a backward pass. While serving is busy it waits there, so that it computes for a share of the time, its *duty*; not where
//! something is asked of its jobs, which they hear between two micro-steps ([`Pacer::hurry`]). The engine tells of every step
//! ([`Pacer::stepped`]), and a controller (`control`) finds the duty at which the p99 of the time between steps of a sequence
//! stays within a bound of what it is without training. In idle time nothing is held. Where the trainer's threads
//! run only when no other wants a core ([`crate::ops::Priority`]), that alone would not keep it from starving: an engine that
//! is busy all the time, and on every core, would leave it nothing. So between steps the engine asks [`Pacer::leave_floor`],
//! which, where training has computed less than its floor, lets it do some layers alone. This is all that engine and trainer share.
//! No number that training comes to depends on it.

mod clock;
mod control;
mod gaps;
#[cfg(test)]
mod tests;

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use self::{
    clock::Lap,
    control::{Control, Step},
    gaps::Gap,
};

pub use self::control::Figures;

/// The longest that the engine waits at a time. A layer that takes longer has several turns.
const LONGEST_GIFT: Duration = Duration::from_millis(250);
/// The shortest time that the engine computes between two such waits, so that few steps are delayed by one.
const SHORTEST_SPELL: Duration = Duration::from_millis(200);
/// How soon a trainer that is held sees that it is no more. It is not told, which would take a lock in the engine's steps.
const LOOK: Duration = Duration::from_millis(2);
/// How soon a trainer that waits sees that its duty has changed.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// The one shared switch between engine and trainer.
///
/// What both look at all the time are atomics: a trainer's thread that the system has stopped for others must hold no lock that
/// the engine takes before each step.
#[derive(Debug)]
pub struct Pacer {
    busy: AtomicBool,
    /// Since when, in microseconds since `epoch`.
    busy_since: AtomicU64,
    /// The trainer has work.
    training: AtomicBool,
    /// The trainer waits at a yield point.
    rests: AtomicBool,
    /// How often it began to compute after it had not.
    departures: AtomicU64,
    /// The engine waits for the trainer.
    gift: AtomicBool,
    /// The trainer is held, whatever its duty.
    held: AtomicBool,
    /// Something is asked of a job, which is to come to the end of its micro-step.
    hurries: AtomicBool,
    /// The duty, as the bits of an f64.
    duty: AtomicU64,
    /// Whether the duty follows from something measured.
    measured: AtomicBool,
    /// Yield points so far.
    points: AtomicU64,
    /// Microseconds that the trainer has computed while serving was busy.
    computed_us: AtomicU64,
    /// Taken only to wait and to wake.
    waiting: Mutex<()>,
    /// Serving is idle, or lets the trainer through.
    open: Condvar,
    /// The trainer is at a yield point, or has no work.
    passed: Condvar,
    /// The trainer's own.
    lap: Mutex<Lap>,
    /// The engine's own.
    spell: Mutex<Option<Spell>>,
    /// The engine's own.
    books: Mutex<Books>,
    controlled: bool,
    epoch: Instant,
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
    /// What the trainer had computed before it.
    computed: u64,
}

/// What the engine keeps of its steps.
#[derive(Debug)]
struct Books {
    control: Control,
    /// The end of the last step, where it was busy since.
    last: Option<Mark>,
}

/// What was so at the end of a step.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    rests: bool,
    departures: u64,
    given: u64,
}

impl Pacer {
    /// Without a controller: a yield point waits `max_wait` at most while serving is busy. `floor`: the share of the time, 0 to
    /// below 1, that the trainer has at least while serving is always busy; 0: whatever is left.
    pub fn new(max_wait: Duration, floor: f64) -> Self {
        let (flag, zero) = (|| AtomicBool::new(false), || AtomicU64::new(0));
        let floor = floor.clamp(0.0, 0.99);
        Self {
            busy: flag(),
            busy_since: zero(),
            training: flag(),
            rests: flag(),
            departures: zero(),
            gift: flag(),
            held: flag(),
            hurries: flag(),
            duty: zero(),
            measured: flag(),
            points: zero(),
            computed_us: zero(),
            waiting: Mutex::new(()),
            open: Condvar::new(),
            passed: Condvar::new(),
            lap: Mutex::new(Lap::now()),
            spell: Mutex::new(None),
            books: Mutex::new(Books { control: Control::new(0.0, floor), last: None }),
            controlled: false,
            epoch: Instant::now(),
            max_wait,
            floor,
            yielded_us: zero(),
            given_us: zero(),
        }
    }

    /// With a controller that keeps the p99 of the time between steps of a sequence within `bound`, a share, of what it is without
    /// training. `max_wait` bounds a yield point's wait while that is not measured. 0: training computes in idle time only, and its floor.
    #[must_use]
    pub fn keeping(mut self, bound: f64) -> Self {
        let control = Control::new(bound, self.floor);
        self.controlled = true;
        self.duty.store(control.duty().to_bits(), SeqCst);
        self.measured.store(control.is_measured(), SeqCst);
        self.books = Mutex::new(Books { control, last: None });
        self
    }

    /// Engine side: serving has work (`true`) or ran out of it (`false`).
    pub fn set_busy(&self, busy: bool) {
        if busy {
            self.busy_since.store(self.since_epoch(), SeqCst);
        }
        self.busy.store(busy, SeqCst);
        if !busy {
            *self.spell.lock() = None;
            self.books.lock().last = None;
            // whoever has seen that serving was busy waits by now
            drop(self.waiting.lock());
            self.open.notify_all();
        }
    }

    fn since_epoch(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    /// Whether serving has work.
    pub fn is_busy(&self) -> bool {
        self.busy.load(SeqCst)
    }

    /// Trainer side: there is a job to work on (`true`), or none that computes (`false`).
    pub fn set_training(&self, training: bool) {
        let before = self.training.swap(training, SeqCst);
        if training && !before {
            self.departures.fetch_add(1, SeqCst);
        }
        if !training {
            self.tell();
        }
    }

    /// Whoever asks something of a job: no yield point holds training until [`Self::calm`]. It hears what is asked once its
    /// micro-step is done, which takes what it takes alone.
    pub fn hurry(&self) {
        self.hurries.store(true, SeqCst);
        // without the lock, which a trainer may hold that gets no core: one that does not hear it looks soon
        self.open.notify_all();
    }

    /// Trainer side: it is about to look at what is asked of its jobs. What is asked from here on hurries it again.
    pub fn calm(&self) {
        // a swap, which sees what was asked before the flag that it clears was set
        self.hurries.swap(false, SeqCst);
    }

    /// Trainer side: waits while serving is busy and lets nothing through, for as long as the duty says.
    pub fn yield_now(&self) {
        self.points.fetch_add(1, SeqCst);
        let gift = self.gift.load(SeqCst);
        if gift {
            self.tell();
        }
        let start = Instant::now();
        let computed = self.lap_ends();
        if (gift && !self.held.load(SeqCst)) || !self.is_shut() {
            return;
        }
        if self.wait_after(computed).is_some_and(|wait| wait.is_zero()) && !self.held.load(SeqCst) {
            return;
        }
        self.rests.store(true, SeqCst);
        while self.is_shut() {
            if self.held.load(SeqCst) {
                if self.gift.load(SeqCst) {
                    self.tell();
                }
                std::thread::sleep(LOOK);
                continue;
            }
            let now = Instant::now();
            // by the duty of now, which may be another than when it began to wait
            let deadline = self.wait_after(computed).and_then(|wait| start.checked_add(wait));
            if deadline.is_some_and(|deadline| now >= deadline) {
                break;
            }
            let look = now + LONGEST_WAIT;
            let mut waiting = self.waiting.lock();
            // looked at with the lock: serving takes it before it tells that it is idle, or waits
            if self.is_shut() {
                self.open.wait_until(&mut waiting, deadline.map_or(look, |deadline| deadline.min(look)));
            }
        }
        // in this order: a step that has not seen the second yet has seen no more than a trainer that rests
        self.rests.store(false, SeqCst);
        self.departures.fetch_add(1, SeqCst);
        self.yielded_us.fetch_add(start.elapsed().as_micros() as u64, Relaxed);
        *self.lap.lock() = Lap::now();
    }

    /// Serving is busy, nothing is asked of a job, and serving does not wait for the trainer to compute.
    fn is_shut(&self) -> bool {
        let given = self.gift.load(SeqCst) && !self.held.load(SeqCst);
        self.is_busy() && !given && !self.hurries.load(SeqCst)
    }

    /// Wakes an engine that waits for the trainer.
    fn tell(&self) {
        drop(self.waiting.lock());
        self.passed.notify_all();
    }

    /// What the trainer has computed since it left the last yield point, as far as serving was busy.
    fn lap_ends(&self) -> Duration {
        let mut lap = self.lap.lock();
        let computed = lap.computed();
        *lap = Lap::now();
        if !self.is_busy() {
            return Duration::ZERO;
        }
        let busy = self.since_epoch().saturating_sub(self.busy_since.load(SeqCst));
        let computed = computed.min(Duration::from_micros(busy));
        self.computed_us.fetch_add(computed.as_micros() as u64, Relaxed);
        computed
    }

    /// How long a yield point waits while serving is busy; `None`: for however long it is.
    fn wait_after(&self, computed: Duration) -> Option<Duration> {
        if !self.controlled {
            return Some(self.max_wait);
        }
        let duty = self.duty();
        let wait = Duration::try_from_secs_f64(computed.as_secs_f64() * (1.0 - duty) / duty).ok();
        if self.measured.load(SeqCst) { wait } else { Some(wait.map_or(self.max_wait, |w| w.min(self.max_wait))) }
    }

    /// Engine side, between two steps: lets training through where serving has been busy beside it for so long that it has computed
    /// less than its floor, and waits for that, at most 250 ms: until the trainer has had what it lacked, and is at a
    /// yield point. One that is held is let through no yield point, but has to come to one. Costs two looks where nothing trains.
    pub fn leave_floor(&self) {
        if self.floor == 0.0 || !self.training.load(SeqCst) || !self.is_busy() {
            return;
        }
        // by the engine's steps only: it stays so in here
        let held = self.held.load(SeqCst);
        if held && self.rests.load(SeqCst) {
            return;
        }
        let now = Instant::now();
        let computed = self.computed_us.load(Relaxed);
        let spell = *self.spell.lock().get_or_insert(Spell { begun: now, length: SHORTEST_SPELL, computed });
        let busy = now.duration_since(spell.begun);
        if busy < spell.length {
            return;
        }
        let has = Duration::from_micros(computed.saturating_sub(spell.computed));
        let lacks = busy.mul_f64(self.floor).saturating_sub(has).div_f64(1.0 - self.floor);
        if lacks.is_zero() {
            *self.spell.lock() = Some(Spell { begun: now, length: SHORTEST_SPELL, computed });
            return;
        }
        let (least, deadline) = (now + lacks.min(LONGEST_GIFT), now + LONGEST_GIFT);
        let begun = self.points.load(SeqCst);
        self.gift.store(true, SeqCst);
        let mut waiting = self.waiting.lock();
        self.open.notify_all();
        // whole layers: the last one is not left half done
        let done = || match held {
            true => self.rests.load(SeqCst),
            false => Instant::now() >= least && self.points.load(SeqCst) > begun,
        };
        while self.training.load(SeqCst) && !done() {
            if self.passed.wait_until(&mut waiting, deadline).timed_out() {
                break;
            }
        }
        drop(waiting);
        self.gift.store(false, SeqCst);
        let given = now.elapsed();
        let length = given.mul_f64((1.0 - self.floor) / self.floor).max(SHORTEST_SPELL);
        let computed = self.computed_us.load(Relaxed);
        *self.spell.lock() = Some(Spell { begun: Instant::now(), length, computed });
        self.given_us.fetch_add(given.as_micros() as u64, Relaxed);
    }

    /// Engine side: a step ended, of so many rows; so many sequences waited for it to get their next tokens.
    pub fn stepped(&self, rows: usize, tokens: usize) {
        let (departures, given) = (self.departures.load(SeqCst), self.given_us.load(Relaxed));
        let trains = self.training.load(SeqCst);
        let mark = Mark { at: Instant::now(), rests: !trains || self.rests.load(SeqCst), departures, given };
        let mut books = self.books.lock();
        // the first step of a busy time ends no gap
        let Some(last) = books.last.replace(mark) else { return };
        let gap = Gap {
            at: mark.at.saturating_duration_since(self.epoch),
            length: mark.at.duration_since(last.at).as_secs_f32(),
            rows,
            tokens,
            gift: last.given != given,
        };
        let without = last.rests && last.departures == departures;
        books.control.note(Step { gap, trains, without });
        let control = &books.control;
        self.duty.store(control.duty().to_bits(), SeqCst);
        self.measured.store(control.is_measured(), SeqCst);
        self.held.store(control.holds(), SeqCst);
    }

    /// The share of the time that training may compute at while serving is busy.
    pub fn duty(&self) -> f64 {
        f64::from_bits(self.duty.load(SeqCst))
    }

    /// Engine side: what was last measured of the time between steps of a sequence; `None`: nothing, or nothing that still holds.
    pub fn figures(&self) -> Option<Figures> {
        self.books.lock().control.figures()
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
