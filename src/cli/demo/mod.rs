//! `demo`: a server in this process on the bundled base; three tenants train deltas while it answers live traffic.
//!
//! Everything printed is measured in this run. The base is tiny, so its quality is modest; the mechanism is the real one.

mod measure;
mod traffic;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use self::{measure::Before, traffic::Traffic};
use super::output;
use crate::{
    admission::{
        Service,
        params::{PublishPolicy, UploadParams},
        train_params::{
            HyperParams, JobEventBody, JobState, LoraPart, MethodPart, Targets, TrainData, TrainParams, WatchParams,
        },
    },
    app,
    config::{Config, QuantizeChoice, ServeArgs},
    delta::Task,
    ids::TenantId,
    telemetry,
};

/// Options of `demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {
    /// Folder with the bundled base, samples and data; default: `adapters` here, or where the program was built.
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    /// Share of the usual training (1 = as the texts say; less is faster and worse).
    #[arg(long, default_value_t = 1.0)]
    effort: f64,
    /// What the base's linears are quantised to.
    #[arg(long, env = "DELTASERVE_QUANTIZE", value_name = "FORMAT")]
    quantize: Option<QuantizeChoice>,
}

/// Live requests per second while the tenants train.
const TRAFFIC_RATE: f64 = 5.0;
/// Resident deltas of the cache's part: more deltas than this fit are asked for.
const RESIDENT_MB: u64 = 4;

/// One tenant of the demo.
struct Tenant {
    name: &'static str,
    delta: &'static str,
    folder: &'static str,
    task: Task,
    epochs: f64,
    batch: u32,
}

const TENANTS: [Tenant; 3] = [
    Tenant { name: "ada", delta: "style", folder: "style", task: Task::CausalLm, epochs: 1.5, batch: 16 },
    Tenant { name: "ben", delta: "cards", folder: "cards", task: Task::CausalLm, epochs: 4.0, batch: 16 },
    Tenant { name: "cleo", delta: "kind", folder: "text-kind", task: Task::SeqCls, epochs: 1.5, batch: 32 },
];

/// Runs the demo.
pub(super) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let adapters = folder(args.adapters.as_deref())?;
    let data_dir = tempfile::tempdir().context("make a temporary data directory")?;
    let metrics = telemetry::init_metrics().context("start the metrics")?;
    let mut serve = ServeArgs::for_base(&adapters.join("base/tiny-stories").to_string_lossy());
    serve.data_dir = data_dir.path().to_path_buf();
    serve.adapters_dir = Some(adapters.join("samples"));
    serve.max_resident_mb = RESIDENT_MB;
    serve.quantize = args.quantize;
    (serve.listen, serve.http) = ("127.0.0.1:0".into(), "127.0.0.1:0".into());
    let server = app::start(Config::try_from(serve)?, Some(metrics)).await?;
    let info = server.service.server_info().await?;
    heading("1. One base, resident")?;
    output::line(&format!(
        "{}: {} parameters, {} layers, loaded once; gRPC on {}, metrics on http://{}/metrics",
        info.base.name,
        info.base.parameters,
        info.base.layers,
        server.grpc,
        server.http.map(|h| h.to_string()).unwrap_or_default()
    ))?;

    heading("2. What the bare base does with the three tenants' tasks")?;
    let before = Before::measure(&server.service, &adapters).await?;
    before.print()?;

    heading("3. Three tenants train at once, on the same weights, while requests are served")?;
    let traffic = Traffic::start(server.grpc, TRAFFIC_RATE).await?;
    output::line(&format!(
        "live traffic: {TRAFFIC_RATE} requests/s of the bare base and two deltas, 24 tokens each; first 6 s without training"
    ))?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let quiet = traffic.mark();
    train_all(&server.service, &adapters, args.effort).await?;
    let busy = traffic.mark();
    traffic.stop().await;
    measure::latency(&quiet, &busy)?;

    heading("4. The same questions again, each tenant with its own delta")?;
    before.compare(&server.service, &adapters).await?;

    heading("5. More deltas than fit")?;
    cache(&server.service, &adapters).await?;

    heading("6. Where to look")?;
    output::line("proto/deltaserve/v1/*.proto is the API; `deltaserve serve --base DIR` serves a base of yours;")?;
    output::line(
        "calls, latencies, the cache, and loss and time of training steps are metrics under /metrics (deltaserve_*);",
    )?;
    output::line(
        "the tasks' scores are not. Quality is modest: the base has 2.8 million parameters and read 2 MB of text;",
    )?;
    output::line("what you saw was measured in this run.")?;
    output::line(&format!("done in {:.0} s", began.elapsed().as_secs_f64()))?;
    server.stop().await
}

fn heading(text: &str) -> anyhow::Result<()> {
    output::line(&format!("\n== {text}"))
}

/// Where the bundled files are.
fn folder(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters");
    let candidates = match asked {
        Some(dir) => vec![dir.to_path_buf()],
        None => vec![PathBuf::from("adapters"), built],
    };
    match candidates.iter().find(|d| d.join("base/tiny-stories/config.json").is_file()) {
        Some(dir) => Ok(dir.clone()),
        None => bail!("no bundled base in {candidates:?}: run from the repository, or name the folder with --adapters"),
    }
}

fn tenant(name: &str) -> anyhow::Result<TenantId> {
    Ok(TenantId::new(name)?)
}

/// One job per tenant, all at once, each with its own progress.
async fn train_all(service: &Service, adapters: &Path, effort: f64) -> anyhow::Result<()> {
    let bars = MultiProgress::new();
    let began = Instant::now();
    let mut jobs = Vec::new();
    for t in &TENANTS {
        let text = std::fs::read_to_string(adapters.join("demo-data").join(t.folder).join("train.jsonl"))?;
        let params = TrainParams {
            output_name: t.delta.into(),
            task: t.task,
            data: TrainData::Jsonl(text),
            validation: None,
            methods: vec![MethodPart::Lora(LoraPart {
                rank: Some(8),
                alpha: Some(16.0),
                targets: Targets::AllLinear,
                ..LoraPart::default()
            })],
            labels: vec![],
            k_per_class: None,
            preference: None,
            sweep: None,
            problem: Default::default(),
            forgetting: None,
            replay: None,
            hyper: HyperParams {
                epochs: Some(t.epochs * effort),
                batch_size: Some(t.batch),
                learning_rate: Some(3e-3),
                seed: Some(7),
                ..HyperParams::default()
            },
            publish: PublishPolicy::Upsert,
            from_delta: None,
            mix: None,
            ewc: None,
            idempotency_key: None,
        };
        let id = tenant(t.name)?;
        let job = service.create_job(&id, params).await?;
        let watch = WatchParams { job: job.id, from_seq: 0, timeout: None };
        let events = service.watch_job(&id, watch).await?;
        let bar = bars.add(ProgressBar::new(1).with_style(style()?).with_prefix(format!("{}/{}", t.name, t.delta)));
        jobs.push(tokio::spawn(follow(events, bar, t.name)));
    }
    for job in jobs {
        output::line(&job.await.context("watch a job")??)?;
    }
    output::line(&format!("three jobs in {:.1} s", began.elapsed().as_secs_f64()))
}

fn style() -> anyhow::Result<ProgressStyle> {
    Ok(ProgressStyle::with_template("{prefix:<12} [{bar:30}] {pos}/{len} {msg}")?.progress_chars("=> "))
}

/// Shows a job's progress and says how it ended.
async fn follow(
    mut events: crate::admission::Pieces<crate::admission::train_params::JobEventInfo>,
    bar: ProgressBar,
    name: &'static str,
) -> anyhow::Result<String> {
    let mut last = String::new();
    let plain = !std::io::IsTerminal::is_terminal(&std::io::stderr());
    while let Some(event) = events.next().await {
        match event?.body {
            JobEventBody::Metrics(m) => {
                bar.set_length(u64::from(m.total_steps));
                bar.set_position(u64::from(m.step));
                last = format!("loss {:.3}, {:.0} tokens/s", m.loss, m.tokens_per_second);
                bar.set_message(format!("{last}, {:.0} s left", m.eta_seconds));
                if plain && m.step % 25 == 0 {
                    output::line(&format!(
                        "  {name}: step {}/{}, {last}, {:.0} s left",
                        m.step, m.total_steps, m.eta_seconds
                    ))?;
                }
            }
            JobEventBody::State(s) if s.state == JobState::Succeeded => {
                bar.finish_and_clear();
                let r = s.result.context("a succeeded job has a result")?;
                return Ok(format!(
                    "  {name}: published {}@{} ({}), {last}",
                    r.name,
                    r.number,
                    &r.id[..12.min(r.id.len())]
                ));
            }
            JobEventBody::State(s) if s.state.is_terminal() => {
                let why = s.failure.map(|f| f.message).unwrap_or_default();
                bail!("{name}'s job ended as {}: {why}", s.state.as_str());
            }
            _ => {}
        }
    }
    bail!("{name}'s job sent no terminal event")
}

/// Sixteen deltas, of which a few fit: each is asked twice in a row, in rounds.
async fn cache(service: &Service, adapters: &Path) -> anyhow::Result<()> {
    const DELTAS: usize = 16;
    let id = tenant("cache")?;
    let sample = adapters.join("samples/shakespeare");
    for i in 0..DELTAS {
        let mut files = std::collections::BTreeMap::new();
        let weights = std::fs::read(sample.join("adapter_model.safetensors"))?;
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(sample.join("adapter_config.json"))?)?;
        // another strength is another delta: its own digest, its own bytes in memory
        config["lora_alpha"] = serde_json::json!(8 + i);
        files.insert("adapter_config.json".to_owned(), serde_json::to_vec(&config)?.into());
        files.insert("adapter_model.safetensors".to_owned(), weights.into());
        let params = UploadParams { name: format!("delta-{i}"), policy: PublishPolicy::Upsert, labels: vec![], files };
        service.upload(&id, params).await?;
    }
    let before = service.server_info().await?.residency;
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _round in 0..2 {
        for i in 0..DELTAS {
            for again in [false, true] {
                let t = Instant::now();
                measure::complete(service, &id, &format!("delta-{i}"), "Once", 1).await?;
                if again { warm.push(t.elapsed()) } else { cold.push(t.elapsed()) }
            }
        }
    }
    let after = service.server_info().await?.residency;
    let mean = |v: &[Duration]| v.iter().map(Duration::as_secs_f64).sum::<f64>() * 1e3 / v.len().max(1) as f64;
    output::line(&format!(
        "{DELTAS} deltas asked for in turn, twice each: {} hits, {} loads, {} evictions; {} resident in {:.1} of {} MiB",
        after.hits - before.hits,
        after.misses - before.misses,
        after.evictions - before.evictions,
        after.resident,
        after.bytes as f64 / f64::from(1 << 20),
        RESIDENT_MB,
    ))?;
    output::line(&format!(
        "one token of a delta that must be loaded: {:.1} ms; of a resident one: {:.1} ms",
        mean(&cold),
        mean(&warm)
    ))
}
