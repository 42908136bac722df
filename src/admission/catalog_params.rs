//! What clients ask of the catalog and of the server itself, in the domain's own types: pages, versions, aliases, and
//! what the server is. No wire format.

use crate::{
    delta::DeltaFiles,
    ids::{DeltaId, check_name},
};

use super::{
    check::Problems,
    params::{DeltaInfo, PublishPolicy, ServeError},
};
use crate::merge::MAX_SVD_RANK;
pub use crate::merge::{MajoritySign, Method as MergeMethod};

/// Most deltas that are combined.
pub const MAX_COMBINED: usize = 16;
/// Largest weight.
const MAX_WEIGHT: f64 = 100.0;

/// A merge of deltas into a new version.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeParams {
    /// Name to publish under.
    pub name: String,
    /// What may happen to an existing name.
    pub policy: PublishPolicy,
    /// Delta references with their weights, 2 to 16.
    pub deltas: Vec<(String, f64)>,
    /// How.
    pub method: MergeMethod,
}

impl MergeParams {
    /// Checks everything that needs no delta.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        if let Err(error) = check_name(&self.name) {
            problems.push("name", error.to_string());
        }
        check_weighted(&self.deltas, 2, &mut problems);
        if let Some(density) = self.method.density() {
            let ok = density > 0.0 && density <= 1.0;
            problems.require(ok, "density", || format!("is {density}; accepted is over 0 to 1"));
        }
        if let MergeMethod::Svd { rank: Some(rank) } = self.method {
            let most = MAX_SVD_RANK;
            problems.require((1..=most).contains(&rank), "rank", || format!("is {rank}; accepted is 1 to {most}"));
        }
        problems.finish()
    }
}

/// Checks a list of delta references with weights: how many, that each is named once, and the weights.
pub fn check_weighted(deltas: &[(String, f64)], least: usize, problems: &mut Problems) {
    let n = deltas.len();
    problems.require((least..=MAX_COMBINED).contains(&n), "deltas", || {
        format!("has {n} entries; accepted are {least} to {MAX_COMBINED}")
    });
    for (i, (delta, weight)) in deltas.iter().enumerate().take(MAX_COMBINED) {
        problems.require(!delta.is_empty(), &format!("deltas[{i}].delta"), || "must not be empty".into());
        let again = !delta.is_empty() && deltas[..i].iter().any(|(before, _)| before == delta);
        problems.require(!again, &format!("deltas[{i}].delta"), || format!("names {delta} again"));
        let ok = weight.abs() <= MAX_WEIGHT;
        problems.require(ok, &format!("deltas[{i}].weight"), || {
            format!("is {weight}; accepted is -{MAX_WEIGHT} to {MAX_WEIGHT}")
        });
    }
}

/// Which part of a list is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// At most this many, 1 to 1000.
    pub size: u32,
    /// [`Page::next`] of the page before; `None` = the first page.
    pub token: Option<String>,
}

/// Part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Token of the next page; `None` = this was the last.
    pub next: Option<String>,
}

/// A version with its siblings.
#[derive(Debug, Clone)]
pub struct DeltaDetail {
    /// The version asked for.
    pub delta: DeltaInfo,
    /// All live versions of its name, newest first.
    pub versions: Vec<DeltaInfo>,
}

/// A move of a name to one of its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AliasParams {
    /// The name.
    pub name: String,
    /// Number or digest of one of its versions.
    pub version: String,
    /// Move only if this one is current.
    pub expected: Option<DeltaId>,
}

/// A version's files.
#[derive(Debug, Clone)]
pub struct DownloadReply {
    /// Which version.
    pub delta: DeltaInfo,
    /// Its folder.
    pub files: DeltaFiles,
}

/// The resident base, as clients see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseInfo {
    /// Folder name or hub id.
    pub name: String,
    /// `llama`, `gpt2`, `bert` ...
    pub family: String,
    /// Digest of config and tensors, 64 hexadecimal digits.
    pub fingerprint: String,
    /// Whether it can generate.
    pub causal: bool,
    /// Layers.
    pub layers: u32,
    /// Width of hidden states.
    pub hidden_size: u32,
    /// Vocabulary.
    pub vocab_size: u32,
    /// Most tokens of prompt and output together.
    pub context_length: u32,
    /// Numbers in its tensors.
    pub parameters: u64,
    /// Format of most weights of the linears: `f32`, `bf16`, `q8_0` ...
    pub dtype: String,
    /// Bytes of all weights in memory.
    pub weight_bytes: u64,
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// Linears that a LoRA can change, in model order.
    pub target_modules: Vec<String>,
    /// Whether it has a chat template.
    pub has_chat_template: bool,
}

/// The server's limits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LimitsInfo {
    /// Largest message, bytes.
    pub max_message_bytes: u64,
    /// Largest upload, bytes.
    pub max_upload_bytes: u64,
    /// Requests that may wait.
    pub max_queue: u32,
    /// Sequences in a batch.
    pub max_sequences: u32,
    /// Rows of an engine step.
    pub max_batch_tokens: u32,
    /// Positions of the key-value cache.
    pub kv_positions: u32,
    /// Jobs queued or running.
    pub max_train_jobs: u32,
    /// Calls that one tenant may have in progress; 0 = no limit.
    pub tenant_max_concurrent: u32,
    /// Calls per second of one tenant; 0 = no limit.
    pub tenant_rate: f64,
    /// How many of them at once.
    pub tenant_burst: u32,
}

/// Deltas in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResidencyInfo {
    /// In memory.
    pub resident: u64,
    /// In use.
    pub leased: u64,
    /// Bytes, evicted but leased ones included.
    pub bytes: u64,
    /// Most bytes.
    pub budget_bytes: u64,
    /// Found in memory, since start.
    pub hits: u64,
    /// Loaded, since start.
    pub misses: u64,
    /// Evicted, since start.
    pub evictions: u64,
}

/// What is going on now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadInfo {
    /// Requests waiting.
    pub queued: u32,
    /// Sequences in the batch.
    pub running: u32,
    /// Positions of the key-value cache in use.
    pub kv_positions_used: u32,
    /// Jobs queued or running.
    pub train_jobs: u32,
}

/// What the server is and does.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServerInfo {
    /// The base.
    pub base: BaseInfo,
    /// Limits.
    pub limits: LimitsInfo,
    /// Deltas in memory.
    pub residency: ResidencyInfo,
    /// Load.
    pub load: LoadInfo,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// Methods that can be served.
    pub serving_methods: Vec<String>,
    /// Methods that can be trained.
    pub training_methods: Vec<String>,
}
