//! What a job that is made of existing deltas starts from, mixes, and holds on to.

use serde::{Deserialize, Serialize};

use super::train_params::TrainData;

/// Elastic weight consolidation (Kirkpatrick et al. 2017); FORMATS 5.6.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EwcParams {
    /// Examples of the old task.
    pub data: TrainData,
    /// Strength, in (0, 1e9].
    pub lambda: f64,
    /// At most this many examples, spread evenly; 1 to 100000, default 512.
    pub max_examples: Option<u32>,
}

/// The version that a job starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedFrom {
    /// `name@number`.
    pub name: String,
    /// Version digest, 64 hexadecimal digits.
    pub id: String,
    /// Whether its head is taken, too.
    pub head: bool,
}

/// EWC as used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResolvedEwc {
    /// Strength.
    pub lambda: f64,
    /// Examples that the Fisher information is taken from.
    pub examples: u32,
}

/// Most deltas that are mixed.
pub const MAX_MIXED: usize = 16;

/// Deltas whose weights are to be learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixParams {
    /// `name` or `name@version`; 2 to [`MAX_MIXED`].
    pub deltas: Vec<String>,
    /// Whether each layer has weights of its own.
    pub per_layer: bool,
}

/// Deltas whose weights are learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedMix {
    /// The versions.
    pub deltas: Vec<StartedFrom>,
    /// Whether each layer has weights of its own.
    pub per_layer: bool,
}
