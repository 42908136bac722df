//! A history: every call with its time, what it asked for, and what came of it. Plain data.

use std::collections::{BTreeMap, HashMap};

/// Microseconds since the history began.
pub(crate) type Time = u64;

/// An input, by kind and place in the harness' tables. What a version answers to it is its fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Key {
    Generate(usize),
    Classify(usize),
    Embed(usize),
    Score(usize),
}

/// An answer to an input.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Tokens(Vec<u32>),
    /// Probabilities by label, a vector, or a log-likelihood.
    Numbers(Vec<f32>),
}

/// Which version answered, or was made. The bare base has number 0 and no digest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) number: u64,
    pub(crate) id: String,
}

/// What came of a read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// By whom, and the values; none if only the version was asked for.
    By(Version, Vec<(Key, Value)>),
    NotFound,
    /// Refused or broken off: it says nothing.
    Failed,
}

/// What a write makes of its name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    /// A new current version: its digest, where it is known in advance, and the job that makes it.
    Publish {
        id: Option<String>,
        job: Option<String>,
    },
    /// Another current version.
    Promote(u64),
    Delete,
}

/// What came of a write.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Wrote {
    /// It is done; what is current then.
    Done(Option<Version>),
    /// Nothing was changed, and that is certain.
    Refused,
    /// It may be done or not, now or later.
    Unknown,
}

/// How far a job was when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Queued, running or paused: nothing is published yet.
    Before,
    Publishing,
    Succeeded,
    /// Failed, cancelled or interrupted: nothing will be.
    EndedWithout,
}

/// One call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum What {
    /// Inference, or a look at what is current. `name` is of its tenant (`tenant/name`); empty: the bare base.
    Read {
        name: String,
        number: Option<u64>,
        answer: Answer,
        alone: bool,
    },
    Write {
        name: String,
        change: Change,
        wrote: Wrote,
    },
    Job {
        id: String,
        stage: Stage,
    },
    /// All versions of a name, with their origins.
    List {
        name: String,
        versions: Vec<(Version, String)>,
    },
    /// Bytes in memory, deltas in memory, most bytes; `emptied`: every delta is deleted and nothing runs.
    Memory {
        bytes: u64,
        resident: u64,
        budget: u64,
        emptied: bool,
    },
}

/// A call with its window: what it did happened at some instant within.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    pub(crate) begun: Time,
    pub(crate) ended: Time,
    pub(crate) what: What,
}

/// What is checked.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) calls: Vec<Call>,
    /// What each version answers alone on a server that has no other.
    pub(crate) expected: HashMap<String, BTreeMap<Key, Value>>,
    /// What a server without deltas answers.
    pub(crate) base: BTreeMap<Key, Value>,
    /// Bytes and deltas in memory before anything was loaded.
    pub(crate) baseline: (u64, u64),
    /// Most microseconds that 99 of 100 reads may take while a job trains.
    pub(crate) p99: Time,
}
