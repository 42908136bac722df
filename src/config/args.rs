//! `serve`'s flags as they are given, and their choices.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::AccessArgs;
use crate::telemetry::LogFormat;

/// Flags of `serve`. Each is also read from the environment: `--max-queue` is `DELTASERVE_MAX_QUEUE`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// The base: a folder with config.json, *.safetensors and tokenizer.json, a GGUF file or a folder with one (a
    /// tokenizer.json beside it stands for the file's own), or a hub id (org/name).
    #[arg(long, env = "DELTASERVE_BASE", value_name = "DIR_OR_HUB_ID")]
    pub base: String,
    /// Where deltas, datasets and jobs are kept; made if missing.
    #[arg(long, env = "DELTASERVE_DATA_DIR", value_name = "DIR", default_value = "deltaserve-data")]
    pub data_dir: PathBuf,
    /// Where names, versions, datasets and jobs are kept: a URL of PostgreSQL, which several servers may share
    /// (`postgres://USER:PASSWORD@HOST/DATABASE`). Unset = SQLite in the data directory.
    #[arg(long, env = "DELTASERVE_DATABASE", value_name = "URL", hide_env_values = true)]
    pub database: Option<String>,
    /// Where the bytes of deltas, datasets and checkpoints are kept: `file:///FOLDER`, `s3://BUCKET/PREFIX`, `gs://...` or
    /// `az://...`, with credentials from the environment. Unset = a folder of the data directory. Servers that share a
    /// database share this, too.
    #[arg(long, env = "DELTASERVE_BLOBS", value_name = "URL")]
    pub blobs: Option<String>,
    /// What is verified at start: `quick` (every stored blob is there, with its size) or `full` (its digest, too: reads
    /// everything). What is corrupt is taken out of service, and the rest is served.
    #[arg(long, env = "DELTASERVE_VERIFY", value_name = "quick|full", default_value = "quick")]
    pub verify: String,
    /// Address of the gRPC server; port 0 = any. One that other machines can reach needs credentials, and TLS.
    #[arg(long, env = "DELTASERVE_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub listen: String,
    /// Address of metrics and probes; port 0 = any, `off` = none.
    #[arg(long, env = "DELTASERVE_HTTP", value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub http: String,
    /// Where the base is kept: cpu, cuda:0 ...
    #[arg(long, env = "DELTASERVE_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Number type of the resident weights; default f32 on the CPU, bf16 on a GPU. On the CPU, f32 or bf16: then matrices and
    /// the embedding table, while everything else stays f32.
    #[arg(long, env = "DELTASERVE_DTYPE", value_name = "TYPE")]
    pub dtype: Option<DtypeChoice>,
    /// What the base's linears are quantised to at load, on the CPU; norms, biases and classification heads stay as they are,
    /// as does an embedding table that is no language-model head (that of a causal checkpoint without a head, such as a
    /// classifier's, counts as one).
    #[arg(long, env = "DELTASERVE_QUANTIZE", value_name = "FORMAT")]
    pub quantize: Option<QuantizeChoice>,
    /// What products take of their input when requests are served: `weights` rounds it as the matrix is kept where that is
    /// faster (8 bits with a scale per 32 beside linears of 8 bits, as llama.cpp does; bf16 beside bf16 on machines that
    /// multiply it), `f32` loses none. Training takes f32 in any case, and so does an f32 base.
    #[arg(long, env = "DELTASERVE_ACTIVATIONS", value_name = "weights|f32", default_value = "weights")]
    pub activations: String,
    /// Threads of a matrix product; default the physical cores.
    #[arg(long, env = "DELTASERVE_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Most memory of resident deltas, in MiB.
    #[arg(long, env = "DELTASERVE_MAX_RESIDENT_MB", value_name = "MIB", default_value_t = 1024)]
    pub max_resident_mb: u64,
    /// Most memory of constrained outputs, in MiB: half for compiled constraints, half for the states of the outputs that run.
    #[arg(long, env = "DELTASERVE_MAX_CONSTRAINT_MB", value_name = "MIB", default_value_t = 512)]
    pub max_constraint_mb: u64,
    /// For how long a delta whose load failed is not loaded again: requests for it get the same error, and when it is tried again.
    /// 0 = each request tries.
    #[arg(long, env = "DELTASERVE_DELTA_RETRY_SECONDS", value_name = "S", default_value_t = 5)]
    pub delta_retry_seconds: u64,
    /// Rows (tokens) of one engine step.
    #[arg(long, env = "DELTASERVE_MAX_BATCH_TOKENS", value_name = "N", default_value_t = 512)]
    pub max_batch_tokens: usize,
    /// Sequences in the batch.
    #[arg(long, env = "DELTASERVE_MAX_SEQUENCES", value_name = "N", default_value_t = 32)]
    pub max_sequences: usize,
    /// Positions of the key-value cache over all sequences; default from the base's context length.
    #[arg(long, env = "DELTASERVE_KV_POSITIONS", value_name = "N")]
    pub kv_positions: Option<usize>,
    /// Whether a prompt begins behind what is cached of it from earlier requests of the same tenant and delta version.
    #[arg(long, env = "DELTASERVE_PREFIX_CACHE", value_name = "ON_OR_OFF", default_value = "on")]
    pub prefix_cache: Switch,
    /// Tokens guessed ahead per step, by n-gram lookup, for requests that do not say how many (`speculative_ngram`): up to 16.
    /// 0 = none.
    #[arg(long, env = "DELTASERVE_SPECULATIVE_NGRAM", value_name = "N", default_value_t = 0)]
    pub speculative_ngram: u32,
    /// Requests that may wait for the engine; more are refused. A tenant that has half of all places leaves an eighth of them to
    /// others, where there are 16 or more.
    #[arg(long, env = "DELTASERVE_MAX_QUEUE", value_name = "N", default_value_t = 256)]
    pub max_queue: usize,
    /// Calls of inference that one tenant may have in progress; more are refused until one ends. Unset = no limit.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_CONCURRENT", value_name = "N")]
    pub tenant_max_concurrent: Option<usize>,
    /// Calls of inference per second of one tenant, and how many may come at once (default: those of a second); more are
    /// refused with the time after which the next may come. Unset = no limit.
    #[arg(long, env = "DELTASERVE_TENANT_RATE", value_name = "R[:BURST]")]
    pub tenant_rate: Option<String>,
    /// Tokens of inference, read and generated, per second of one tenant, and how many may come at once (default: those of a
    /// second). They are charged when they come, so that a call may go over: the next is refused until that is paid. Unset = no
    /// limit.
    #[arg(long, env = "DELTASERVE_TENANT_TOKEN_RATE", value_name = "R[:BURST]")]
    pub tenant_token_rate: Option<String>,
    /// Names of deltas that one tenant may have. Unset = no limit, here and for what follows.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_DELTAS", value_name = "N")]
    pub tenant_max_deltas: Option<u64>,
    /// Versions of deltas that one tenant may have.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_VERSIONS", value_name = "N")]
    pub tenant_max_versions: Option<u64>,
    /// Stored files of versions that one tenant may have, in MiB.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_STORED_MB", value_name = "MIB")]
    pub tenant_max_stored_mb: Option<u64>,
    /// Memory of resident deltas that one tenant may have, in MiB: its own that it has not used for longest make room.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_RESIDENT_MB", value_name = "MIB")]
    pub tenant_max_resident_mb: Option<u64>,
    /// Training jobs that one tenant may have queued or running.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_TRAIN_JOBS", value_name = "N")]
    pub tenant_max_train_jobs: Option<u64>,
    /// Datasets that one tenant may have, in MiB.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_DATASET_MB", value_name = "MIB")]
    pub tenant_max_dataset_mb: Option<u64>,
    /// Models of full fine-tuning that one tenant may have, in MiB.
    #[arg(long, env = "DELTASERVE_TENANT_MAX_MODEL_MB", value_name = "MIB")]
    pub tenant_max_model_mb: Option<u64>,
    /// Limits of named tenants in place of those above: a JSON file, read again when it changes.
    #[arg(long, env = "DELTASERVE_TENANT_LIMITS", value_name = "FILE")]
    pub tenant_limits: Option<PathBuf>,
    /// Where it is recorded who changed what: a file that JSON lines are appended to, readable by its owner only, and made
    /// anew when it was moved away. Unset = nowhere.
    #[arg(long, env = "DELTASERVE_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Refuse calls that change something while the audit log cannot be written, and answer none before it is on the disk.
    #[arg(long, env = "DELTASERVE_AUDIT_REQUIRED", requires = "audit_log")]
    pub audit_required: bool,
    /// Shares of the engine's service, and of starts of training jobs, while several tenants wait: NAME=W, 1 to 1000; 1 for those that are not named.
    #[arg(long, env = "DELTASERVE_TENANT_WEIGHT", value_name = "NAME=W,...", value_delimiter = ',')]
    pub tenant_weight: Vec<String>,
    /// Largest gRPC message, in MiB.
    #[arg(long, env = "DELTASERVE_MAX_MESSAGE_MB", value_name = "MIB", default_value_t = 16)]
    pub max_message_mb: u64,
    /// Largest upload of a delta or dataset, in MiB.
    #[arg(long, env = "DELTASERVE_MAX_UPLOAD_MB", value_name = "MIB", default_value_t = 1024)]
    pub max_upload_mb: u64,
    /// Training jobs that may be queued or running; more are refused. 0 = no training.
    #[arg(long, env = "DELTASERVE_MAX_TRAIN_JOBS", value_name = "N", default_value_t = 64)]
    pub max_train_jobs: usize,
    /// Paused training jobs of one tenant; pausing more is refused.
    #[arg(long, env = "DELTASERVE_MAX_PAUSED_JOBS", value_name = "N", default_value_t = 64)]
    pub max_paused_jobs: usize,
    /// Memory that a job of full fine-tuning may take, in MiB; more is refused. Unset = what the machine has free.
    #[arg(long, env = "DELTASERVE_MAX_TRAIN_MB", value_name = "MIB")]
    pub max_train_mb: Option<u64>,
    /// By what share training may raise the p99 of the time between steps of a sequence: what is measured beside it is held within
    /// that of what is measured without, by how much training computes while serving is busy. 0 = training computes in idle time
    /// only, and its floor.
    #[arg(long, env = "DELTASERVE_TRAIN_MAX_SLOWDOWN", value_name = "SHARE", default_value_t = 0.1)]
    pub train_max_slowdown: f64,
    /// Longest wait of training at one of its yield points while serving is busy, in milliseconds, while the slowdown is not measured.
    #[arg(long, env = "DELTASERVE_TRAIN_MAX_YIELD_MS", value_name = "MS", default_value_t = 50)]
    pub train_max_yield_ms: u64,
    /// Which products of many rows with frozen weights may be computed with each number as a sum of two bf16, where the
    /// machine has a matrix unit (Intel's AMX): `off`, `training` (steps, not evaluations) or `all` (long prompts, too).
    #[arg(long, env = "DELTASERVE_BF16X2", value_name = "off|training|all", default_value = "training")]
    pub bf16x2: String,
    /// Share of the time in percent that training has at least while serving is always busy: where it computed less, serving waits
    /// for one layer at a time. 0 = only what serving leaves.
    #[arg(long, env = "DELTASERVE_TRAIN_FLOOR", value_name = "PERCENT", default_value_t = 3)]
    pub train_floor: u32,
    /// Niceness of training's threads beside those of serving, 0 to 19, or `idle`: only where no other thread of the machine
    /// wants the core.
    #[arg(long, env = "DELTASERVE_TRAIN_NICE", value_name = "N|idle", default_value = "idle")]
    pub train_nice: String,
    /// Jobs whose small training steps may share one pass on the base, up to 8. 1 = each by itself; with more, what a job
    /// comes to in company is what it comes to alone up to rounding, not bit for bit.
    #[arg(long, env = "DELTASERVE_TRAIN_SHARE", value_name = "N", default_value_t = 1)]
    pub train_share: usize,
    /// After SIGTERM, running calls get this long to finish.
    #[arg(long, env = "DELTASERVE_DRAIN_SECONDS", value_name = "S", default_value_t = 30)]
    pub drain_seconds: u64,
    /// Form of the log.
    #[arg(long, env = "DELTASERVE_LOG_FORMAT", value_name = "FORM", default_value = "text")]
    pub log_format: LogFormat,
    /// What to log: `info`, `debug`, `deltaserve=debug,warn` ...
    #[arg(long, env = "DELTASERVE_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Sample deltas to register at start: each sub-folder (in PEFT's form) under its name, for the tenant `default`.
    #[arg(long, env = "DELTASERVE_ADAPTERS_DIR", value_name = "DIR")]
    pub adapters_dir: Option<PathBuf>,
    /// Who may call.
    #[command(flatten)]
    pub access: AccessArgs,
}

impl ServeArgs {
    /// The defaults of all flags, for this base.
    pub fn for_base(base: &str) -> Self {
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            args: ServeArgs,
        }
        let mut only = <Only as clap::Parser>::parse_from(["serve", "--base", "unset"]);
        base.clone_into(&mut only.args.base);
        only.args
    }
}

/// Number type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeChoice {
    /// 32-bit.
    F32,
    /// 16-bit, 8 of exponent.
    Bf16,
    /// 16-bit, 5 of exponent.
    F16,
}

/// Whether something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// Fewer bits for the frozen linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeChoice {
    /// 8.5 bits each: hardly to be told from f32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.6 bits each; q8_0 where an input is no multiple of 256 wide, and for a language-model head of its own.
    #[value(name = "q4k")]
    Q4K,
}

/// Where the base is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by index.
    Cuda(usize),
}
