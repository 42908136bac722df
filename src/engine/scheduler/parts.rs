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
