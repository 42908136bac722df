//! `serve`'s flags and environment, checked all at once and grouped by the subsystem that gets them.

mod access;
mod args;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    access::AccessConfig,
    audit::AuditConfig,
    grpc::GrpcConfig,
    ids::TenantId,
    ops::{Activations, Halves, Priority},
    store::{DatabaseUrl, Places, Verify, check_blobs_url},
    telemetry::LogFormat,
};

pub use access::{AccessArgs, ClientAuth};
pub use args::{DeviceChoice, DtypeChoice, QuantizeChoice, ServeArgs, Switch};

/// What the base is and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseConfig {
    /// Folder, GGUF file or hub id.
    pub source: String,
    /// Device.
    pub device: DeviceChoice,
    /// Number type; `None` = the device's default.
    pub dtype: Option<DtypeChoice>,
    /// Format of the linears; `None` = the number type, or what a GGUF file has.
    pub quantize: Option<QuantizeChoice>,
}

/// The engine's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLimits {
    /// Rows of a step.
    pub max_batch_tokens: usize,
    /// Sequences in the batch.
    pub max_sequences: usize,
    /// Positions of the key-value cache; `None` = computed from the base.
    pub kv_positions: Option<usize>,
    /// Whether prompts begin behind what is cached of them.
    pub prefix_cache: bool,
    /// Bytes of constraints: half for compiled ones, half for the states of outputs.
    pub constraint_bytes: u64,
    /// Tokens guessed ahead per step for requests that do not say how many; 0 = none.
    pub speculative_ngram: u32,
    /// Requests that may wait.
    pub max_queue: usize,
    /// What 8-bit linears take of their input.
    pub activations: Activations,
}

/// Limits of each tenant, and their shares; `None` = no limit.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TenantConfig {
    /// Calls in progress; `None` = no limit.
    pub max_concurrent: Option<usize>,
    /// Calls per second and how many at once; `None` = no limit.
    pub rate: Option<(f64, u32)>,
    /// Tokens per second and how many at once; `None` = no limit.
    pub tokens: Option<(f64, u32)>,
    /// Names of deltas.
    pub max_deltas: Option<u64>,
    /// Versions of deltas.
    pub max_versions: Option<u64>,
    /// Bytes of versions' files.
    pub max_stored_bytes: Option<u64>,
    /// Bytes of deltas in memory.
    pub max_resident_bytes: Option<u64>,
    /// Jobs queued or running.
    pub max_train_jobs: Option<u64>,
    /// Bytes of datasets.
    pub max_dataset_bytes: Option<u64>,
    /// Bytes of models.
    pub max_model_bytes: Option<u64>,
    /// Limits of named tenants.
    pub file: Option<PathBuf>,
    /// Shares of the engine's service and of jobs' starts of those that have another than 1.
    pub weights: Vec<(TenantId, u32)>,
}

/// Where the store is, and how it is verified.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreConfig {
    /// A PostgreSQL database; `None`: SQLite in the data directory.
    pub database: Option<DatabaseUrl>,
    /// URL of the blobs; `None`: a folder of the data directory.
    pub blobs: Option<String>,
    /// How thoroughly it is verified at start.
    pub verify: Verify,
}

impl Config {
    /// Where everything is stored.
    pub fn places(&self) -> Places {
        let StoreConfig { database, blobs, .. } = &self.store;
        Places { dir: self.data_dir.clone(), database: database.clone(), blobs: blobs.clone() }
    }
}

/// The trainer's limits.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainLimits {
    /// Jobs queued or running.
    pub max_jobs: usize,
    /// Paused jobs of one tenant.
    pub max_paused: usize,
    /// By what share the p99 of the time between steps of a sequence may be higher beside training.
    pub max_slowdown: f64,
    /// Longest wait at a yield point, until that is measured.
    pub max_yield: Duration,
    /// Bytes that a job of full fine-tuning may take; `None` = what the machine has free.
    pub max_bytes: Option<u64>,
    /// Jobs that may share a pass.
    pub share: usize,
    /// How training's threads are treated beside those of serving.
    pub priority: Priority,
    /// The share of the time that training has at least, in percent.
    pub floor_percent: u32,
}

/// Checked configuration of `serve`. Safe to log.
#[derive(Debug, Clone)]
pub struct Config {
    /// The base.
    pub base: BaseConfig,
    /// Where everything is stored, unless `store` says otherwise.
    pub data_dir: PathBuf,
    /// The store.
    pub store: StoreConfig,
    /// gRPC address.
    pub listen: SocketAddr,
    /// HTTP address; `None` = off.
    pub http: Option<SocketAddr>,
    /// Who may call.
    pub access: AccessConfig,
    /// Limits of the gRPC edge.
    pub grpc: GrpcConfig,
    /// Which products may be computed in halves.
    pub halves: Halves,
    /// Limits of the engine.
    pub engine: EngineLimits,
    /// Limits of each tenant.
    pub tenants: TenantConfig,
    /// Where it is recorded what was changed.
    pub audit: AuditConfig,
    /// Limits of the trainer.
    pub train: TrainLimits,
    /// Most bytes of resident deltas.
    pub max_resident_bytes: u64,
    /// For how long a delta whose load failed is not loaded again.
    pub delta_retry: Duration,
    /// Grace period of a shutdown.
    pub drain: Duration,
    /// Form of the log.
    pub log_format: LogFormat,
    /// Filter of the log.
    pub log_filter: String,
    /// Sample deltas.
    pub adapters_dir: Option<PathBuf>,
}

/// Everything that is wrong with the flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} problem(s) in the configuration:", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for ConfigError {}

const MIB: u64 = 1 << 20;

/// The highest bound of training's slowdown: a p99 of eleven times that without it, which is as good as none.
const MOST_SLOWDOWN: f64 = 10.0;

impl TryFrom<ServeArgs> for Config {
    type Error = ConfigError;

    fn try_from(args: ServeArgs) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        check_numbers(&args, &mut problems);
        if args.base.trim().is_empty() {
            problems.push("--base: must not be empty".to_owned());
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&args.log) {
            problems.push(format!("--log: {error}"));
        }
        let verify = args.verify.parse::<Verify>().unwrap_or_else(|error| {
            problems.push(format!("--verify: {error}"));
            Verify::default()
        });
        let Places { database, blobs, .. } =
            places(&args.data_dir, args.database.as_deref(), args.blobs.as_deref(), &mut problems);
        let listen = address("--listen", &args.listen, &mut problems);
        let http = match args.http.as_str() {
            "off" => None,
            text => Some(address("--http", text, &mut problems)),
        };
        if http.is_some_and(|h| h == listen && h.port() != 0) {
            problems.push(format!("--http: is the same address as --listen ({listen})"));
        }
        let priority = args.train_nice.parse::<Priority>().unwrap_or_else(|error| {
            problems.push(format!("--train-nice: {error}"));
            Priority::default()
        });
        let halves = args.bf16x2.parse::<Halves>().unwrap_or_else(|error| {
            problems.push(format!("--bf16x2: {error}"));
            Halves::default()
        });
        let activations = args.activations.parse::<Activations>().unwrap_or_else(|error| {
            problems.push(format!("--activations: {error}"));
            Activations::default()
        });
        let tenants = tenants(&args, &mut problems);
        let device = device(&args.device, &mut problems);
        let in_bf16 = device == DeviceChoice::Cpu && args.dtype == Some(DtypeChoice::Bf16);
        if device == DeviceChoice::Cpu && args.dtype == Some(DtypeChoice::F16) {
            problems.push(
                "--dtype: f16 is not supported on the CPU; accepted are f32 and bf16, to which f16 is rounded"
                    .to_owned(),
            );
        }
        if in_bf16 && args.quantize.is_some() {
            problems.push("--quantize: takes the place of --dtype bf16 on the CPU; one of them is accepted".to_owned());
        }
        if device != DeviceChoice::Cpu && args.quantize.is_some() {
            problems.push("--quantize: is supported with --device cpu only; a GPU keeps bf16, f16 or f32".to_owned());
        }
        let access = access::access(args.access, listen, &mut problems);
        if !problems.is_empty() {
            return Err(ConfigError(problems));
        }
        Ok(Self {
            base: BaseConfig { source: args.base, device, dtype: args.dtype, quantize: args.quantize },
            data_dir: args.data_dir,
            store: StoreConfig { database, blobs, verify },
            listen,
            http,
            access,
            grpc: GrpcConfig {
                max_message_bytes: (args.max_message_mb * MIB) as usize,
                max_upload_bytes: args.max_upload_mb * MIB,
                // Admission refuses first; this bounds what is not admitted there: watchers, uploads, lists.
                max_calls: args.max_queue + args.max_sequences + 256,
            },
            halves,
            engine: EngineLimits {
                max_batch_tokens: args.max_batch_tokens,
                max_sequences: args.max_sequences,
                kv_positions: args.kv_positions,
                prefix_cache: args.prefix_cache == Switch::On,
                constraint_bytes: args.max_constraint_mb * MIB,
                speculative_ngram: args.speculative_ngram,
                max_queue: args.max_queue,
                activations,
            },
            tenants,
            audit: AuditConfig { file: args.audit_log, required: args.audit_required },
            train: TrainLimits {
                max_jobs: args.max_train_jobs,
                max_paused: args.max_paused_jobs,
                max_slowdown: args.train_max_slowdown,
                max_yield: Duration::from_millis(args.train_max_yield_ms),
                max_bytes: args.max_train_mb.map(|n| n * MIB),
                share: args.train_share,
                priority,
                floor_percent: args.train_floor,
            },
            max_resident_bytes: args.max_resident_mb * MIB,
            delta_retry: Duration::from_secs(args.delta_retry_seconds),
            drain: Duration::from_secs(args.drain_seconds),
            log_format: args.log_format,
            log_filter: args.log,
            adapters_dir: args.adapters_dir,
        })
    }
}

fn check_numbers(args: &ServeArgs, problems: &mut Vec<String>) {
    let numbers = [
        ("--threads", args.threads.map(|n| n as u64), 1, 1024),
        ("--max-resident-mb", Some(args.max_resident_mb), 1, 1 << 24),
        ("--delta-retry-seconds", Some(args.delta_retry_seconds), 0, 3600),
        ("--max-constraint-mb", Some(args.max_constraint_mb), 2, 1 << 20),
        ("--max-batch-tokens", Some(args.max_batch_tokens as u64), 1, 1 << 20),
        ("--max-sequences", Some(args.max_sequences as u64), 1, 65_536),
        ("--kv-positions", args.kv_positions.map(|n| n as u64), 16, 1 << 31),
        ("--speculative-ngram", Some(args.speculative_ngram.into()), 0, 16),
        ("--max-queue", Some(args.max_queue as u64), 1, 1 << 20),
        ("--tenant-max-concurrent", args.tenant_max_concurrent.map(|n| n as u64), 1, 1 << 20),
        ("--max-message-mb", Some(args.max_message_mb), 1, 2047),
        ("--max-upload-mb", Some(args.max_upload_mb), 1, 1 << 20),
        ("--max-train-jobs", Some(args.max_train_jobs as u64), 0, 1 << 20),
        ("--max-paused-jobs", Some(args.max_paused_jobs as u64), 0, 1 << 20),
        ("--max-train-mb", args.max_train_mb, 1, 1 << 24),
        ("--train-max-yield-ms", Some(args.train_max_yield_ms), 0, 60_000),
        ("--train-share", Some(args.train_share as u64), 1, 8),
        ("--train-floor", Some(u64::from(args.train_floor)), 0, 50),
        ("--drain-seconds", Some(args.drain_seconds), 0, 86_400),
    ];
    for (flag, value, low, high) in numbers {
        if let Some(value) = value.filter(|v| !(low..=high).contains(v)) {
            problems.push(format!("{flag}: is {value}; accepted is {low} to {high}"));
        }
    }
    if !(0.0..=MOST_SLOWDOWN).contains(&args.train_max_slowdown) {
        let given = args.train_max_slowdown;
        problems.push(format!(
            "--train-max-slowdown: is {given}; accepted is a share from 0 to {MOST_SLOWDOWN}, e.g. 0.1 for 10 %"
        ));
    }
    if args.max_batch_tokens < args.max_sequences {
        problems.push(format!(
            "--max-batch-tokens: is {}, less than --max-sequences ({}): every sequence needs a row",
            args.max_batch_tokens, args.max_sequences
        ));
    }
}

/// Where everything is kept. Of a database's URL nothing is repeated: it may have a password in it.
pub(crate) fn places(dir: &Path, database: Option<&str>, blobs: Option<&str>, problems: &mut Vec<String>) -> Places {
    let database = database.filter(|url| !url.is_empty()).and_then(|url| {
        url.parse::<DatabaseUrl>().inspect_err(|error| problems.push(format!("--database: {error}"))).ok()
    });
    let blobs = blobs.filter(|url| !url.is_empty());
    if let Some(Err(error)) = blobs.map(check_blobs_url) {
        problems.push(format!("--blobs: {error}"));
    }
    Places { dir: dir.to_owned(), database, blobs: blobs.map(str::to_owned) }
}

fn address(flag: &str, text: &str, problems: &mut Vec<String>) -> SocketAddr {
    text.parse().unwrap_or_else(|_| {
        problems.push(format!("{flag}: {text:?} is not an address; accepted are IP:PORT, e.g. 127.0.0.1:50051"));
        SocketAddr::from(([127, 0, 0, 1], 0))
    })
}

fn tenants(args: &ServeArgs, problems: &mut Vec<String>) -> TenantConfig {
    let mut rate_of = |flag, what, text: &Option<String>, most| {
        text.as_deref().and_then(|text| rate(flag, what, text, most, problems))
    };
    let rate = rate_of("--tenant-rate", "calls", &args.tenant_rate, MOST_CALLS);
    let tokens = rate_of("--tenant-token-rate", "tokens", &args.tenant_token_rate, MOST_TOKENS);
    let bytes = |mib: Option<u64>| mib.map(|n| n.saturating_mul(MIB));
    TenantConfig {
        max_concurrent: args.tenant_max_concurrent,
        rate,
        tokens,
        max_deltas: args.tenant_max_deltas,
        max_versions: args.tenant_max_versions,
        max_stored_bytes: bytes(args.tenant_max_stored_mb),
        max_resident_bytes: bytes(args.tenant_max_resident_mb),
        max_train_jobs: args.tenant_max_train_jobs,
        max_dataset_bytes: bytes(args.tenant_max_dataset_mb),
        max_model_bytes: bytes(args.tenant_max_model_mb),
        file: args.tenant_limits.clone(),
        weights: weights(&args.tenant_weight, problems),
    }
}

/// Fewest per second that a limit may be of.
const LEAST_RATE: f64 = 1e-6;
/// Most calls per second.
const MOST_CALLS: f64 = 1e6;
/// Most tokens per second.
const MOST_TOKENS: f64 = 1e9;

/// `R[:BURST]`; without a burst, the calls or tokens of a second, and one at least.
fn rate(flag: &str, what: &str, text: &str, most: f64, problems: &mut Vec<String>) -> Option<(f64, u32)> {
    let (rate, burst) = text.split_once(':').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
    let rate = rate.parse().ok().filter(|r| (LEAST_RATE..=most).contains(r));
    let burst = match burst {
        None => rate.map(|r: f64| r.ceil().max(1.0) as u32),
        Some(text) => text.parse().ok().filter(|burst| *burst > 0),
    };
    if rate.is_none() || burst.is_none() {
        problems.push(format!(
            "{flag}: is {text:?}; accepted is R[:BURST], R from {LEAST_RATE} to {most} {what} per second, BURST from 1 on"
        ));
    }
    rate.zip(burst)
}

/// `NAME=W` each.
fn weights(texts: &[String], problems: &mut Vec<String>) -> Vec<(TenantId, u32)> {
    let mut out: Vec<(TenantId, u32)> = Vec::new();
    for text in texts {
        let (name, weight) = text.split_once('=').unwrap_or((text, ""));
        let weight = weight.parse().ok().filter(|w| (1..=1000).contains(w));
        match (TenantId::new(name), weight) {
            (Ok(name), _) if out.iter().any(|(known, _)| *known == name) => {
                problems.push(format!("--tenant-weight: {name} is given twice"));
            }
            (Ok(name), Some(weight)) => out.push((name, weight)),
            (Ok(_), None) => {
                problems.push(format!("--tenant-weight: is {text:?}; accepted is NAME=W, W from 1 to 1000"));
            }
            (Err(error), _) => problems.push(format!("--tenant-weight: the name of {text:?} {error}")),
        }
    }
    out
}

fn device(text: &str, problems: &mut Vec<String>) -> DeviceChoice {
    let cuda = text.strip_prefix("cuda").and_then(|rest| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(':')?.parse().ok(),
    });
    match (text, cuda) {
        ("cpu", _) => return DeviceChoice::Cpu,
        (_, Some(index)) if cfg!(feature = "cuda") => return DeviceChoice::Cuda(index),
        (_, Some(_)) => problems.push(format!("--device: {text:?} needs a build with --features cuda")),
        (_, None) => problems.push(format!("--device: {text:?} is unknown; accepted are cpu and cuda:N")),
    }
    DeviceChoice::Cpu
}

#[cfg(test)]
mod tests;
