//! What the scheduler is asked and what it answers: counts, no tensors.

use super::SeqId;
use crate::{ids::TenantId, kv::PageKey};

/// A sequence that could never run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::engine) enum NeverFits {
    /// It is too long for the cache.
    #[error("the request needs a cache of {positions} positions; this server has {limit}")]
    Positions {
        /// Positions that it may need.
        positions: usize,
        /// Positions that there are.
        limit: usize,
    },
    /// Its constraint's state is larger than all of them may be.
    #[error("the state of its constraint takes {bytes} bytes; {limit} are there for all")]
    Constraint {
        /// What it takes.
        bytes: u64,
        /// What there is.
        limit: u64,
    },
    /// It has too many branches.
    #[error("the request has {width} branches; this server runs {limit} at a time")]
    Width {
        /// Branches that it may have.
        width: usize,
        /// Sequences that may run.
        limit: usize,
    },
}

/// A sequence as the scheduler sees it: counts of positions. Those of virtual rows are computed like any other; keys
/// without rows (prefixes) only take room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct Demand {
    /// Positions that are known and to be computed, at least 1.
    pub(in crate::engine) total: usize,
    /// Most positions that it can come to.
    pub(in crate::engine) most: usize,
    /// Cache slots ahead of the first computed position's.
    pub(in crate::engine) reserved: usize,
    /// Positions that its encoder reads; 0 for a base that is no encoder-decoder.
    pub(in crate::engine) source: usize,
    /// Cache slots ahead of theirs.
    pub(in crate::engine) source_reserved: usize,
    /// Most branches that it can have, at least 1: beams.
    pub(in crate::engine) width: usize,
    /// By which names others find its pages, and it theirs.
    pub(in crate::engine) names: Names,
    /// Whether its last known position gives a token, and not only numbers.
    pub(in crate::engine) generates: bool,
    /// Bytes that its constraint's state takes from when it begins; 0 without one.
    pub(in crate::engine) constraint_bytes: u64,
    /// Whose it is.
    pub(in crate::engine) claim: Claim,
}

/// What decides when a sequence begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct Claim {
    /// Who is charged; sequences without one are those of one tenant.
    pub(in crate::engine) tenant: Option<TenantId>,
    /// The tenant's share of the service beside others, at least 1.
    pub(in crate::engine) weight: u32,
    /// Among those of its tenant, higher ones come first.
    pub(in crate::engine) priority: i32,
}

/// Names of a sequence's pages. Those without one are its own alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::engine) struct Names {
    /// Of all pages of the slots ahead of its positions; empty: no other sequence shares them.
    pub(in crate::engine) ahead: Vec<PageKey>,
    /// Of the whole pages of its known positions, from the first on.
    pub(in crate::engine) rows: Vec<PageKey>,
}

/// How likely a guess is right, by how the last ones turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::engine) struct Chance(u32);

impl Chance {
    /// Of 1.
    const ONE: u32 = 1 << 16;
    /// Guesses that it looks back on, about.
    const MEMORY: u32 = 4;
    /// It cannot be wrong.
    pub(in crate::engine) const CERTAIN: Self = Self(Self::ONE);
    /// Nothing is known of it.
    pub(in crate::engine) const EVEN: Self = Self(Self::ONE / 2);

    /// With one more guess that turned out so: an exponential moving average.
    pub(in crate::engine) fn with(self, right: bool) -> Self {
        let Self(before) = self;
        Self(before - before.div_ceil(Self::MEMORY) + if right { Self::ONE / Self::MEMORY } else { 0 })
    }

    /// That two guesses are both right, of which one builds on the other.
    pub(in crate::engine) fn and(self, other: Self) -> Self {
        Self((u64::from(self.0) * u64::from(other.0) / u64::from(Self::ONE)) as u32)
    }

    /// Whether another row for it pays in a step of so many rows, which costs as many rows more as `free` whatever is in it: where
    /// it gives more tokens than the same time gives otherwise.
    pub(in crate::engine) fn pays(self, rows: usize, free: usize) -> bool {
        let (rows, free) = (rows as u128, free as u128);
        u128::from(self.0.max(1)) * (free + rows) >= rows * u128::from(Self::ONE)
    }
}

/// One sequence's share of a step, or that of one of its branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Share {
    /// Whose.
    pub(in crate::engine) id: SeqId,
    /// Which branch; 0 of a sequence without others.
    pub(in crate::engine) branch: usize,
    /// Positions computed before.
    pub(in crate::engine) context: usize,
    /// Rows in this step.
    pub(in crate::engine) len: usize,
    /// How many of them, the last ones, are of drafts: tokens that are guessed to follow.
    pub(in crate::engine) drafts: usize,
    /// Rows of its encoder in this step.
    pub(in crate::engine) encode: usize,
    /// Whether the slots ahead of its positions are to be filled in this step.
    pub(in crate::engine) keys_due: bool,
    /// Whether this step computes its last known position.
    pub(in crate::engine) completes: bool,
}

/// The next step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::engine) struct StepPlan {
    /// Shares, decode first.
    pub(in crate::engine) shares: Vec<Share>,
    /// Sequences that lost their pages and start over later.
    pub(in crate::engine) preempted: Vec<SeqId>,
}

impl StepPlan {
    /// Rows of the step.
    pub(in crate::engine) fn rows(&self) -> usize {
        self.shares.iter().map(|s| s.len + s.encode).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chance_follows_how_guesses_turn_out() {
        let after = |from: Chance, right: bool, n: usize| (0..n).fold(from, |chance, _| chance.with(right));
        assert_eq!(after(Chance(0), true, 1), Chance(Chance::ONE / 4));
        assert!(after(Chance(0), true, 5) > Chance(Chance::ONE * 3 / 4));
        assert!(after(Chance::EVEN, false, 5) < Chance(Chance::ONE / 8));
        assert_eq!(after(Chance::CERTAIN, false, 100), Chance(0), "it goes all the way down");
        let most = after(Chance(0), true, 100);
        assert!(most < Chance::CERTAIN && most > Chance(Chance::ONE - 8), "nothing that was seen makes it certain");
        assert_eq!(Chance::EVEN.and(Chance::EVEN), Chance(Chance::ONE / 4));
        assert_eq!(most.and(Chance::CERTAIN), most);
    }

    #[test]
    fn a_row_pays_by_its_chance_and_the_rows_that_are_there() {
        let pays = |percent: u32, rows| Chance(Chance::ONE / 100 * percent).pays(rows, 6);
        assert!(pays(15, 1) && !pays(14, 1));
        assert!(pays(58, 8) && !pays(57, 8));
        assert!(pays(85, 32) && !pays(84, 32));
        assert!(!Chance(0).pays(1, 6) && Chance::CERTAIN.pays(usize::MAX, 0));
        assert!(Chance(0).pays(10_000, usize::MAX), "where rows cost nothing, every guess pays");
    }
}
