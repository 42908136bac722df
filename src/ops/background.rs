//! Threads of their own for work in the background, which the machine's other threads go before.
//!
//! Serving and training compute on the same cores. With one pool for both, a step of serving that comes while training is
//! inside a long op finds every thread taken, and waits for parts that are not its own. So what runs inside
//! [`Background::run`] has a team ([`super::team`]) and a rayon pool of its own, whose threads the operating system runs when
//! no other thread wants the core (or, at a milder [`Priority`], with a small share of it).

use std::{io, str::FromStr, sync::Arc};

use parking_lot::Mutex;

use super::team::{self, Team};

/// How the operating system is to treat a thread of the background beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Like every other.
    #[default]
    Normal,
    /// Nice by 1 to 19: beside a busy normal thread it gets about 1 / (1 + 1.25^n) of the core, 10 % at 10 and 1.5 % at 19.
    Nice(u8),
    /// Only where no other thread of the machine wants the core (Linux's `SCHED_IDLE`; elsewhere nice by 19).
    Idle,
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.parse::<u8>() {
            _ if s == "idle" => Ok(Self::Idle),
            Ok(0) => Ok(Self::Normal),
            Ok(n @ 1..=19) => Ok(Self::Nice(n)),
            _ => Err(format!("is {s:?}; accepted is 0 to 19, or \"idle\"")),
        }
    }
}

impl std::fmt::Display for Priority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Normal => f.write_str("0"),
            Self::Nice(n) => write!(f, "{n}"),
            Self::Idle => f.write_str("idle"),
        }
    }
}

impl Priority {
    /// Gives it to the calling thread. A thread cannot get a higher one back.
    pub(super) fn take(self) {
        if let Err(error) = set(self) {
            tracing::warn!(%error, priority = %self, "a thread of the background has the priority of the others");
        }
    }
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code, reason = "calls into libc")]
fn set(priority: Priority) -> io::Result<()> {
    let done = match priority {
        Priority::Normal => return Ok(()),
        // SAFETY: 0 names the calling thread, on Linux; no memory is touched
        Priority::Nice(n) => unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, i32::from(n)) },
        Priority::Idle => {
            // SAFETY: a plain struct of numbers, for which zeros are a value
            let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
            param.sched_priority = 0;
            // SAFETY: 0 names the calling thread; `param` lives through the call
            unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &param) }
        }
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn set(priority: Priority) -> io::Result<()> {
    match priority {
        Priority::Normal => Ok(()),
        Priority::Nice(_) | Priority::Idle => Err(io::Error::other("it can be set on Linux only")),
    }
}

/// Stack of a thread that only does parts of ops.
const SMALL_STACK: usize = 8 << 20;

/// The threads of the background. They end when it is dropped.
#[derive(Debug)]
pub struct Background {
    pool: rayon::ThreadPool,
    team: Arc<Team>,
    priority: Priority,
}

impl Background {
    /// As many threads as ops have elsewhere. The one that [`Self::run`] is on has `stack` bytes of stack.
    ///
    /// # Errors
    /// The operating system's, if it gives no thread.
    pub fn new(priority: Priority, stack: usize) -> io::Result<Self> {
        let team = Arc::new(Team::start(team::threads() - 1, "background-ops", priority));
        Self::of(team, priority, stack)
    }

    /// A pool of its own for work beside what [`Self::run`] does, which shares the team.
    ///
    /// # Errors
    /// The operating system's, if it gives no thread.
    pub fn another(&self) -> io::Result<Self> {
        Self::of(Arc::clone(&self.team), self.priority, SMALL_STACK)
    }

    fn of(team: Arc<Team>, priority: Priority, stack: usize) -> io::Result<Self> {
        let of_pool = Arc::clone(&team);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(team::threads())
            .spawn_handler(|thread| {
                let stack = if thread.index() == 0 { stack } else { SMALL_STACK };
                let name = format!("background-{}", thread.index());
                let team = Arc::clone(&of_pool);
                let run = move || {
                    priority.take();
                    team::join(team);
                    thread.run();
                };
                std::thread::Builder::new().name(name).stack_size(stack).spawn(run).map(drop)
            })
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { pool, team, priority })
    }

    /// Runs `f` on the pool's first thread, while this one waits. What it computes is shared out in the background.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let (f, result) = (Mutex::new(Some(f)), Mutex::new(None));
        self.pool.broadcast(|thread| {
            if thread.index() == 0
                && let Some(f) = f.lock().take()
            {
                *result.lock() = Some(f());
            }
        });
        match result.into_inner() {
            Some(result) => result,
            // a panic of `f` is this call's, and every pool has a first thread
            None => unreachable!("the first thread of a pool has run what it was given"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        time::{Duration, Instant},
    };

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn priorities_are_read_and_written() {
        for (text, priority) in [("0", Priority::Normal), ("7", Priority::Nice(7)), ("idle", Priority::Idle)] {
            assert_eq!(text.parse::<Priority>(), Ok(priority));
            assert_eq!(priority.to_string(), text);
        }
        for bad in ["20", "-1", "", "low", "1.5"] {
            let error = bad.parse::<Priority>().expect_err(bad);
            assert!(error.contains(&format!("{bad:?}")) && error.contains("0 to 19"), "{error}");
        }
    }

    /// Threads that take part in an op, by name.
    fn names(op: impl Fn(&(dyn Fn() + Sync)), wanted: usize) -> HashSet<String> {
        let names = Mutex::new(HashSet::new());
        let begun = Instant::now();
        // on a busy machine, a helper may come too late for one op
        while names.lock().len() < wanted && begun.elapsed() < Duration::from_secs(60) {
            op(&|| {
                std::thread::sleep(Duration::from_millis(2));
                names.lock().insert(std::thread::current().name().unwrap_or_default().to_owned());
            });
        }
        names.into_inner()
    }

    #[test]
    fn ops_of_the_background_are_on_its_own_threads_while_others_are_at_work() {
        let background = Background::new(Priority::Normal, 1 << 20).expect("threads");
        // the shared team at work, and rayon's pool
        let stop = std::sync::atomic::AtomicBool::new(false);
        let going = || !stop.load(std::sync::atomic::Ordering::Relaxed);
        std::thread::scope(|s| {
            s.spawn(|| {
                while going() {
                    team::each(vec![(); 8], |()| std::thread::sleep(Duration::from_millis(1)))
                }
            });
            s.spawn(|| {
                while going() {
                    vec![(); 8].into_par_iter().for_each(|()| std::thread::sleep(Duration::from_millis(1)))
                }
            });
            let (wanted, parts) = (team::threads().min(2), 20);
            let team = background.run(|| names(|part| team::each(vec![(); parts], |()| part()), wanted));
            let pool = background.run(|| names(|part| vec![(); parts].into_par_iter().for_each(|()| part()), wanted));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            for (found, helper) in [(team, "background-ops-"), (pool, "background-")] {
                assert_eq!(found.len(), wanted, "{found:?}");
                assert!(found.iter().all(|n| n.starts_with("background-")), "{found:?}");
                assert!(wanted < 2 || found.iter().any(|n| n.starts_with(helper)), "{found:?}");
            }
        });
    }

    #[cfg(target_os = "linux")]
    #[test]
    #[allow(unsafe_code, reason = "asks libc")]
    fn its_threads_have_its_priority_and_no_other_thread_has() {
        // SAFETY: no memory is touched
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS as _, 0) };
        // SAFETY: the same
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = (nice(), policy());
        let background = Background::new(Priority::Nice(19), 1 << 20).expect("threads");
        assert_eq!(background.run(nice), 19);
        assert_eq!(background.another().expect("threads").run(nice), 19);
        let idle = Background::new(Priority::Idle, 1 << 20).expect("threads");
        assert_eq!(idle.run(policy), libc::SCHED_IDLE);
        assert_eq!((nice(), policy()), before);
    }

    #[test]
    fn its_threads_end_with_it() {
        let background = Background::new(Priority::Normal, 1 << 20).expect("threads");
        background.run(|| team::each(vec![(); 4], |()| std::thread::sleep(Duration::from_millis(1))));
        let team = Arc::downgrade(&background.team);
        drop(background);
        let begun = Instant::now();
        while team.strong_count() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "a thread is still there");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
