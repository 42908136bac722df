//! `serve`'s flags and environment, checked all at once and grouped by the subsystem that gets them.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use crate::{
    grpc::GrpcConfig,
    ids::TenantId,
    ops::{Halves, Priority},
    telemetry::LogFormat,
};

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
    /// Address of the gRPC server; port 0 = any. There is no authentication: beyond loopback, put a proxy in front.
    #[arg(long, env = "DELTASERVE_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub listen: String,
    /// Address of metrics and probes; port 0 = any, `off` = none.
    #[arg(long, env = "DELTASERVE_HTTP", value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub http: String,
    /// Where the base is kept: cpu, cuda:0 ...
    #[arg(long, env = "DELTASERVE_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Number type of the resident weights; default f32 on the CPU, bf16 on a GPU.
    #[arg(long, env = "DELTASERVE_DTYPE", value_name = "TYPE")]
    pub dtype: Option<DtypeChoice>,
    /// What the base's linears are quantised to at load, on the CPU; embeddings, norms, biases and heads stay as they are.
    #[arg(long, env = "DELTASERVE_QUANTIZE", value_name = "FORMAT")]
    pub quantize: Option<QuantizeChoice>,
    /// Threads of a matrix product; default the physical cores.
    #[arg(long, env = "DELTASERVE_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Most memory of resident deltas, in MiB.
    #[arg(long, env = "DELTASERVE_MAX_RESIDENT_MB", value_name = "MIB", default_value_t = 1024)]
    pub max_resident_mb: u64,
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
    /// By what share training may raise the p99 of the time between tokens: what is measured beside it is held within that of
    /// what is measured without, by how much training computes while serving is busy. 0 = training computes in idle time only,
    /// and its floor.
    #[arg(long, env = "DELTASERVE_TRAIN_MAX_SLOWDOWN", value_name = "SHARE", default_value_t = 0.1)]
    pub train_max_slowdown: f64,
    /// Longest wait of training at one of its yield points while serving is busy, in milliseconds, until the slowdown is measured.
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
    /// Requests that may wait.
    pub max_queue: usize,
}

/// Limits of each tenant's calls of inference, and their shares.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TenantConfig {
    /// Calls in progress; `None` = no limit.
    pub max_concurrent: Option<usize>,
    /// Calls per second and how many at once; `None` = no limit.
    pub rate: Option<(f64, u32)>,
    /// Shares of the engine's service and of jobs' starts of those that have another than 1.
    pub weights: Vec<(TenantId, u32)>,
}

/// The trainer's limits.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainLimits {
    /// Jobs queued or running.
    pub max_jobs: usize,
    /// Paused jobs of one tenant.
    pub max_paused: usize,
    /// By what share the p99 of the time between tokens may be higher beside training.
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
    /// Where everything is stored.
    pub data_dir: PathBuf,
    /// gRPC address.
    pub listen: SocketAddr,
    /// HTTP address; `None` = off.
    pub http: Option<SocketAddr>,
    /// Limits of the gRPC edge.
    pub grpc: GrpcConfig,
    /// Which products may be computed in halves.
    pub halves: Halves,
    /// Limits of the engine.
    pub engine: EngineLimits,
    /// Limits of each tenant.
    pub tenants: TenantConfig,
    /// Limits of the trainer.
    pub train: TrainLimits,
    /// Most bytes of resident deltas.
    pub max_resident_bytes: u64,
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
        let tenants = TenantConfig {
            max_concurrent: args.tenant_max_concurrent,
            rate: args.tenant_rate.as_deref().and_then(|text| rate(text, &mut problems)),
            weights: weights(&args.tenant_weight, &mut problems),
        };
        let device = device(&args.device, &mut problems);
        if device == DeviceChoice::Cpu && args.dtype.is_some_and(|d| d != DtypeChoice::F32) {
            problems.push("--dtype: on the CPU only f32 is supported; 16-bit checkpoints are converted".to_owned());
        }
        if device != DeviceChoice::Cpu && args.quantize.is_some() {
            problems.push("--quantize: is supported with --device cpu only; a GPU keeps bf16, f16 or f32".to_owned());
        }
        if !problems.is_empty() {
            return Err(ConfigError(problems));
        }
        Ok(Self {
            base: BaseConfig { source: args.base, device, dtype: args.dtype, quantize: args.quantize },
            data_dir: args.data_dir,
            listen,
            http,
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
                max_queue: args.max_queue,
            },
            tenants,
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
        ("--max-batch-tokens", Some(args.max_batch_tokens as u64), 1, 1 << 20),
        ("--max-sequences", Some(args.max_sequences as u64), 1, 65_536),
        ("--kv-positions", args.kv_positions.map(|n| n as u64), 16, 1 << 31),
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

fn address(flag: &str, text: &str, problems: &mut Vec<String>) -> SocketAddr {
    text.parse().unwrap_or_else(|_| {
        problems.push(format!("{flag}: {text:?} is not an address; accepted are IP:PORT, e.g. 127.0.0.1:50051"));
        SocketAddr::from(([127, 0, 0, 1], 0))
    })
}

/// Fewest and most calls per second that a limit may be of.
const RATES: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// `R[:BURST]`; without a burst, the calls of a second, and one at least.
fn rate(text: &str, problems: &mut Vec<String>) -> Option<(f64, u32)> {
    let (rate, burst) = text.split_once(':').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
    let rate = rate.parse().ok().filter(|r| RATES.contains(r));
    let burst = match burst {
        None => rate.map(|r: f64| r.ceil().max(1.0) as u32),
        Some(text) => text.parse().ok().filter(|burst| *burst > 0),
    };
    if rate.is_none() || burst.is_none() {
        problems.push(format!(
            "--tenant-rate: is {text:?}; accepted is R[:BURST], R from {} to {} calls per second, BURST from 1 on",
            RATES.start(),
            RATES.end()
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
