//! Parts of one op, shared out over threads that are awake.
//!
//! A decode step of a small model is some eighty parallel ops of a few hundred microseconds each. A pool whose threads
//! sleep between them pays two wake-ups per op, and on a virtual machine, where an idle core leaves the guest, each may
//! cost as much as the op itself. So helpers here spin for [`SPIN`] after their last part before they sleep, and the
//! caller never waits for one that has not begun: it closes the op when no part is left and waits for those inside.
//!
//! There is one team, as there is one machine, and another for the background ([`super::background`]), whose threads the
//! others go before. A caller that finds its team at work (another caller, an op inside an op) takes rayon's pool instead,
//! whose queue both can share.

use std::{
    any::Any,
    cell::{RefCell, UnsafeCell},
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rayon::prelude::*;

use super::background::Priority;

/// How long a helper looks for more before it sleeps: longer than what lies between two ops of a step.
const SPIN: Duration = Duration::from_micros(200);
/// Looks between two looks at the clock, or, by the caller, between two offers of its core to others.
const LOOKS: u32 = 64;

static TEAM: LazyLock<Team> = LazyLock::new(|| Team::start(threads() - 1, "ops", Priority::Normal));

thread_local! {
    /// The team of this thread's ops; `None`: the one that is shared.
    static OWN: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Makes a team that of the calling thread, from now on.
pub(super) fn join(team: Arc<Team>) {
    OWN.with(|own| own.replace(Some(team)));
}

/// Threads that work on an op, the caller among them.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads().max(1)
}

/// Runs `f` on every item, on this thread and on the others. A panic of `f` is this call's.
pub(crate) fn each<T: Send>(items: Vec<T>, f: impl Fn(T) + Sync) {
    if items.len() < 2 || threads() == 1 {
        return items.into_iter().for_each(f);
    }
    let own = OWN.with(|own| own.borrow().clone());
    let team = own.as_deref().unwrap_or_else(|| LazyLock::force(&TEAM));
    match team.free.try_lock() {
        Some(_) => team.run(items, &f),
        None => items.into_par_iter().for_each(&f),
    }
}

/// A value on cache lines of its own (two, since lines are fetched in pairs).
#[repr(align(128))]
#[derive(Default)]
struct Apart<T>(T);

/// The op at work: `call(part)` for every part below `parts`.
#[derive(Clone, Copy)]
struct Op {
    call: &'static (dyn Fn(usize) + Sync),
    parts: usize,
}

/// Helpers inside: the lowest 16 bits of the state.
const INSIDE: u64 = 0xffff;
/// Whether helpers may come in.
const OPEN: u64 = INSIDE + 1;
/// Ops so far: the bits above.
const TURN: u64 = OPEN << 1;

/// What caller and helpers see.
struct Desk {
    state: Apart<AtomicU64>,
    /// The next part to be taken.
    next: Apart<AtomicUsize>,
    /// Written by the caller while the desk is closed and empty, read by helpers inside.
    op: UnsafeCell<Option<Op>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Vec<Apart<AtomicBool>>,
    /// No op will come any more.
    over: AtomicBool,
}

#[allow(unsafe_code, reason = "`op` is an UnsafeCell")]
// SAFETY: `op` is written only by the holder of `Team::free`, while `state` is closed and nobody inside; opening it is a
// release that coming in acquires
unsafe impl Sync for Desk {}

pub(super) struct Team {
    desk: Arc<Desk>,
    helpers: Vec<Thread>,
    /// Held by the caller whose op is at work.
    free: Mutex<()>,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("helpers", &self.helpers.len()).finish_non_exhaustive()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.desk.over.store(true, Ordering::SeqCst);
        self.helpers.iter().for_each(Thread::unpark);
    }
}

impl Team {
    /// A team of `wanted` helpers, with this name and priority.
    pub(super) fn start(wanted: usize, name: &'static str, priority: Priority) -> Self {
        let desk = Arc::new(Desk {
            state: Apart::default(),
            next: Apart::default(),
            op: UnsafeCell::new(None),
            panic: Mutex::new(None),
            asleep: (0..wanted.min(INSIDE as usize)).map(|_| Apart::default()).collect(),
            over: AtomicBool::new(false),
        });
        let start = |i: usize| {
            let desk = Arc::clone(&desk);
            let name = format!("{name}-{i}");
            let helper = move || {
                priority.take();
                desk.help(i);
            };
            // without a helper the others do its share
            thread::Builder::new().name(name).spawn(helper).ok().map(|h| h.thread().clone())
        };
        let helpers: Vec<Thread> = (0..desk.asleep.len()).map_while(start).collect();
        if helpers.len() < wanted {
            tracing::warn!(wanted, started = helpers.len(), "threads for the parts of ops could not be started");
        }
        Self { desk, helpers, free: Mutex::new(()) }
    }

    /// The caller holds `free`.
    #[allow(unsafe_code, reason = "helpers borrow the op from this call, which does not end before they left it")]
    fn run<T: Send>(&self, items: Vec<T>, f: &(impl Fn(T) + Sync)) {
        let parts = items.len();
        let items: Vec<Item<T>> = items.into_iter().map(|item| Item(UnsafeCell::new(Some(item)))).collect();
        let call = |part: usize| {
            // SAFETY: `Desk::next` gives every part to one thread
            if let Some(item) = items.get(part).and_then(|item| unsafe { (*item.0.get()).take() }) {
                f(item);
            }
        };
        let call: &(dyn Fn(usize) + Sync) = &call;
        // SAFETY: `Closing` waits, also when a part panics, until no helper is inside, and none comes in after it
        let call: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(call) };
        {
            self.desk.panic.lock().take(); // of an op whose caller panicked, too
            let closing = Closing(&self.desk);
            self.desk.open(Op { call, parts });
            for (asleep, helper) in self.desk.asleep.iter().zip(&self.helpers) {
                if asleep.0.load(Ordering::SeqCst) {
                    helper.unpark();
                }
            }
            while let Some(part) = self.desk.take(parts) {
                call(part);
            }
            drop(closing);
        }
        if let Some(panic) = self.desk.panic.lock().take() {
            resume_unwind(panic);
        }
    }
}

/// An item that one thread will take.
struct Item<T>(UnsafeCell<Option<T>>);

#[allow(unsafe_code, reason = "an UnsafeCell of its own")]
// SAFETY: an item is touched by the one thread that was given its part
unsafe impl<T: Send> Sync for Item<T> {}

/// Closes the desk and waits for those inside.
struct Closing<'a>(&'a Desk);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // those inside after a panic of this thread should not go on with its op
        if thread::panicking() {
            self.0.next.0.store(usize::MAX / 2, Ordering::Relaxed);
        }
        self.0.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.0.state.0.load(Ordering::Acquire) & INSIDE != 0 {
            spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS * LOOKS) {
                // more threads than cores: the one inside may be waiting for this core
                thread::yield_now();
            }
        }
    }
}

impl Desk {
    #[allow(unsafe_code, reason = "as at `Sync`")]
    fn open(&self, op: Op) {
        // SAFETY: the caller holds `Team::free` and the desk is closed and empty
        unsafe { *self.op.get() = Some(op) };
        self.next.0.store(0, Ordering::Relaxed);
        self.state.0.fetch_add(TURN | OPEN, Ordering::SeqCst);
    }

    fn take(&self, parts: usize) -> Option<usize> {
        let part = self.next.0.fetch_add(1, Ordering::Relaxed);
        (part < parts).then_some(part)
    }

    /// A helper's life.
    fn help(&self, me: usize) {
        let mut last = 0;
        while let Some(state) = self.wait(me, last) {
            last = state / TURN;
            // lost against another helper or the caller: look again, unless the op is over
            let mut now = state;
            while now / TURN == last && now & OPEN != 0 {
                match self.state.0.compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => {
                        self.work();
                        self.state.0.fetch_sub(1, Ordering::AcqRel);
                        break;
                    }
                    Err(other) => now = other,
                }
            }
        }
    }

    /// Parts of the op at work, until none is left; this helper is inside.
    #[allow(unsafe_code, reason = "as at `Sync`")]
    fn work(&self) {
        // SAFETY: the caller does not write it while somebody is inside
        let Some(op) = (unsafe { *self.op.get() }) else { return };
        while let Some(part) = self.take(op.parts) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (op.call)(part))) {
                self.panic.lock().get_or_insert(panic);
            }
        }
    }

    /// The state of an open op that is not the `last` one; none when the team is over.
    fn wait(&self, me: usize, last: u64) -> Option<u64> {
        let new = |order| {
            let state = self.state.0.load(order);
            (state & OPEN != 0 && state / TURN != last).then_some(state)
        };
        let mut since = Instant::now();
        let mut looks = 0u32;
        loop {
            if let Some(state) = new(Ordering::Acquire) {
                return Some(state);
            }
            spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) && since.elapsed() > SPIN {
                // either the caller sees this, or this thread sees its op
                self.asleep[me].0.store(true, Ordering::SeqCst);
                if new(Ordering::SeqCst).is_none() && !self.over.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.asleep[me].0.store(false, Ordering::SeqCst);
                if self.over.load(Ordering::SeqCst) {
                    return None;
                }
                since = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(team: &Team, n: u64) -> u64 {
        let sum = AtomicU64::new(0);
        let _free = team.free.lock();
        team.run((1..=n).collect(), &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        sum.into_inner()
    }

    #[test]
    fn every_part_is_done_once_by_helpers_awake_or_asleep() {
        let team = Team::start(3, "ops", Priority::Normal);
        for round in 0..2_000 {
            let n = round % 40 + 1;
            assert_eq!(sum(&team, n), n * (n + 1) / 2, "round {round}");
            if round % 500 == 0 {
                thread::sleep(Duration::from_millis(3)); // they fall asleep
            }
        }
    }

    #[test]
    fn helpers_do_take_part() {
        let team = Team::start(1, "ops", Priority::Normal);
        let names = Mutex::new(std::collections::HashSet::new());
        let _free = team.free.lock();
        let begun = Instant::now();
        // on a busy machine, a helper may come too late for one op
        while names.lock().len() < 2 {
            assert!(begun.elapsed() < Duration::from_secs(60), "no helper comes");
            team.run(vec![(); 20], &|()| {
                thread::sleep(Duration::from_millis(2));
                names.lock().insert(thread::current().id());
            });
        }
    }

    #[test]
    fn a_panic_is_the_callers_and_the_team_goes_on() {
        let team = Team::start(2, "ops", Priority::Normal);
        for bad in [0, 5, 19] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let _free = team.free.lock();
                team.run((0..20).collect(), &|i| {
                    thread::sleep(Duration::from_micros(200));
                    assert!(i != bad, "part {bad}");
                });
            }));
            let text = outcome.expect_err("a panic");
            assert_eq!(text.downcast_ref::<String>(), Some(&format!("part {bad}")));
            assert_eq!(sum(&team, 10), 55);
        }
    }

    #[test]
    fn what_was_not_taken_is_dropped_once() {
        let team = Team::start(1, "ops", Priority::Normal);
        let counted = Arc::new(());
        let items = vec![Arc::clone(&counted); 50];
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let _free = team.free.lock();
            team.run(items, &|_: Arc<()>| panic!("at the first"));
        }));
        assert!(outcome.is_err());
        assert_eq!(Arc::strong_count(&counted), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        /// Ops inside ops and callers beside one another, over the shared team.
        #[test]
        fn callers_do_not_disturb_one_another(sizes in prop::collection::vec(1u64..30, 1..5)) {
            thread::scope(|s| {
                let run = |n: u64| {
                    let total = AtomicU64::new(0);
                    each((1..=n).collect(), |i| each((0..i).collect(), |_| {
                        total.fetch_add(1, Ordering::Relaxed);
                    }));
                    total.into_inner()
                };
                let callers: Vec<_> = sizes.iter().map(|&n| (n, s.spawn(move || (0..20).map(|_| run(n)).collect::<Vec<_>>()))).collect();
                for (n, caller) in callers {
                    assert!(caller.join().expect("no panic").iter().all(|&t| t == n * (n + 1) / 2));
                }
            });
        }
    }
}
