//! Chance that can be repeated: a seed that is printed and can be given, and how long a test goes on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use deltaserve::model::testing::Rng;

/// `DELTASERVE_SEED`, or one by the clock. Printed, so that a failure can be run again.
pub(crate) fn seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = number("DELTASERVE_SEED", now.as_micros() as u64 % 1_000_000_000);
    println!("seed: DELTASERVE_SEED={seed}");
    seed
}

/// A number from the environment.
#[track_caller]
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}; a number is accepted")),
        Err(_) => default,
    }
}

/// Draws by a seed.
pub(crate) struct Chance(Rng);

impl Chance {
    /// One of several of a seed: each has draws of its own.
    pub(crate) fn new(seed: u64, which: u64) -> Self {
        let mut mixed = seed ^ which.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for shift in [30, 27, 31] {
            mixed = (mixed ^ (mixed >> shift)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        }
        Self(Rng(mixed | 1))
    }

    /// From 0 to n - 1.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.0.uniform() * n as f32) as usize).min(n.saturating_sub(1))
    }

    /// Whether it happens, in this many of 100 cases.
    pub(crate) fn percent(&mut self, of_100: usize) -> bool {
        self.below(100) < of_100
    }

    pub(crate) fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// From nothing to `most`.
    pub(crate) fn time(&mut self, most: Duration) -> Duration {
        most.mul_f32(self.0.uniform())
    }
}
