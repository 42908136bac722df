//! Failpoints: named places at which a test stops, delays, fails or kills the server. Without the feature `failpoints` they are
//! nothing at all.
//!
//! Every place where the state of a delta, a job or the store changes has one before and one after the change. `FAILPOINTS` says
//! what happens there, in the words of the crate `fail` (`name=panic;other=5%sleep(20);third=return(why)`), and
//! `DELTASERVE_ABORT_AT=name` or `name:n` ends the process at the first or n-th time that a place is reached, as a kill does:
//! without destructors, and with what the system has of its files.

#[cfg(feature = "failpoints")]
pub use armed::{arm, dies, inject, reached};

/// `failpoint!("name")` marks a place; `failpoint!("name", |message| Err(...))` one that may also return early, as `return(message)`
/// in `FAILPOINTS` asks; `failpoint!("name" => work)` one that does some work before the process ends there, and nothing otherwise.
#[cfg(feature = "failpoints")]
macro_rules! failpoint {
    ($name:literal) => {
        $crate::failpoint::reached($name)
    };
    ($name:literal => $work:expr) => {
        if $crate::failpoint::dies($name) {
            $work;
            std::process::abort();
        }
    };
    ($name:literal, $early:expr) => {
        if let Some(early) = $crate::failpoint::inject($name, $early) {
            return early;
        }
    };
}

/// See the other one: here it is nothing.
#[cfg(not(feature = "failpoints"))]
macro_rules! failpoint {
    ($name:literal) => {};
    ($name:literal => $work:expr) => {};
    ($name:literal, $early:expr) => {};
}

pub(crate) use failpoint;

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    };

    const ABORT_AT: &str = "DELTASERVE_ABORT_AT";

    /// Where the process ends, and how often that place is still passed before.
    struct Abort {
        name: String,
        left: AtomicU64,
    }

    fn abort() -> Option<&'static Abort> {
        static ABORT: OnceLock<Option<Abort>> = OnceLock::new();
        let read = || parse(&std::env::var(ABORT_AT).ok()?);
        ABORT.get_or_init(read).as_ref()
    }

    /// `name` or `name:n`; n counts from 1.
    fn parse(text: &str) -> Option<Abort> {
        let (name, n) = text.split_once(':').unwrap_or((text, "1"));
        let n: u64 = n.parse().ok().filter(|n| *n > 0)?;
        (!name.is_empty()).then(|| Abort { name: name.to_owned(), left: AtomicU64::new(n) })
    }

    impl Abort {
        /// Whether it is this place's turn; counts each time that it is reached.
        fn is_due(&self, name: &str) -> bool {
            self.name == name && self.left.fetch_sub(1, Ordering::AcqRel) == 1
        }
    }

    /// Reads what the environment wants of the failpoints: once, at the start of the process.
    ///
    /// # Panics
    /// If `FAILPOINTS` or `DELTASERVE_ABORT_AT` cannot be read: a test that mistypes one must not pass.
    pub fn arm() {
        // its end would take the configuration back
        std::mem::forget(fail::FailScenario::setup());
        assert!(std::env::var_os(ABORT_AT).is_none() || abort().is_some(), "{ABORT_AT}: wanted is name or name:n");
    }

    /// Whether the process is to end at this place now.
    pub fn dies(name: &str) -> bool {
        abort().is_some_and(|abort| abort.is_due(name))
    }

    /// A place is reached: ends the process, panics, waits or goes on, as was asked for.
    pub fn reached(name: &str) {
        if dies(name) {
            std::process::abort();
        }
        // nothing to return early with
        let _ = fail::eval(name, |_| ());
    }

    /// As [`reached`]; what to return early with, if that was asked for.
    pub fn inject<R>(name: &str, early: impl FnOnce(Option<String>) -> R) -> Option<R> {
        if dies(name) {
            std::process::abort();
        }
        fail::eval(name, early)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_place_is_due_at_its_nth_time_and_once() {
            let third = parse("place:3").unwrap();
            let due: Vec<bool> = (0..5).map(|_| third.is_due("place")).collect();
            assert_eq!(due, [false, false, true, false, false]);
            assert!(!parse("place").unwrap().is_due("other"));
            assert!(parse("place").unwrap().is_due("place"));
            assert!(parse("").is_none() && parse("a:0").is_none() && parse("a:x").is_none());
        }

        #[test]
        fn what_is_configured_happens_and_only_there() {
            fn work() -> Result<u32, String> {
                crate::failpoint!("failpoint-test", |why| Err(why.unwrap_or_default()));
                Ok(1)
            }
            assert_eq!(work(), Ok(1));
            let guard = fail::FailGuard::new("failpoint-test", "1*return(full)").unwrap();
            assert_eq!((work(), work()), (Err("full".to_owned()), Ok(1)));
            drop(guard);
            assert_eq!(work(), Ok(1));
        }
    }
}
