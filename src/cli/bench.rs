//! `bench`: a load generator. Closed loop (N callers, each sends the next request when the last is answered) or open
//! loop (Poisson arrivals, whether or not the server keeps up: the honest way to measure latency under load).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::bail;
use clap::{Args, ValueEnum};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;
use tonic::Status;
use tonic_types::StatusExt;

use super::{
    Common,
    bench_stats::{Percentiles, Popularity, Report, Sample, next_arrival},
    client::Client,
    deltas, output,
};
use crate::grpc::proto;

/// Requests that an open loop keeps in flight before it counts further arrivals as failures.
const MAX_IN_FLIGHT: usize = 10_000;
/// Connections, so that one connection's limit on streams is not what is measured.
const CALLS_PER_CONNECTION: usize = 128;
const MAX_CONNECTIONS: usize = 16;

/// Options of `bench`.
#[derive(Debug, Clone, Args)]
pub(super) struct BenchArgs {
    /// Closed loop with this many callers.
    #[arg(long, short, default_value_t = 8, conflicts_with = "rate")]
    concurrency: usize,
    /// Open loop with this many requests per second on average.
    #[arg(long, short)]
    rate: Option<f64>,
    /// Seconds of sending; what is in flight then is waited for.
    #[arg(long, default_value_t = 10.0)]
    duration: f64,
    /// Tokens of the random prompts.
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// This text as prompt instead; it is the same each time, so that a server with a prefix cache reads it once.
    #[arg(long)]
    prompt: Option<String>,
    /// Tokens to generate per request (end-of-sequence tokens are passed over).
    #[arg(long, short = 'm', default_value_t = 32)]
    max_new_tokens: u32,
    /// Deltas to use, separated by commas, most popular first; nothing = the bare base.
    #[arg(long, value_delimiter = ',', conflicts_with = "delta_prefix")]
    deltas: Vec<String>,
    /// Use all deltas whose names begin with this.
    #[arg(long)]
    delta_prefix: Option<String>,
    /// Which delta a request uses.
    #[arg(long, default_value = "uniform")]
    popularity: PopularityArg,
    /// Exponent of zipf.
    #[arg(long, default_value_t = 1.0)]
    zipf_s: f64,
    /// Seed of prompts, deltas and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PopularityArg {
    Uniform,
    Zipf,
}

/// What a run's requests are made of.
struct Plan {
    clients: Vec<Client>,
    deltas: Vec<String>,
    popularity: Popularity,
    prompt: Option<String>,
    prompt_tokens: usize,
    vocab: u32,
    max_new_tokens: u32,
}

impl Plan {
    fn request(&self, rng: &mut StdRng) -> proto::GenerateRequest {
        use proto::prompt::Prompt;
        let prompt = match &self.prompt {
            Some(text) => Prompt::Text(text.clone()),
            None => {
                let ids = (0..self.prompt_tokens).map(|_| rng.random_range(0..self.vocab)).collect();
                Prompt::Tokens(proto::TokenIds { ids })
            }
        };
        let options = proto::GenerateOptions {
            max_new_tokens: Some(self.max_new_tokens),
            ignore_eos: true,
            ..Default::default()
        };
        proto::GenerateRequest {
            delta: self.deltas.get(self.popularity.draw(rng)).cloned().unwrap_or_default(),
            prompt: Some(proto::Prompt { prompt: Some(prompt) }),
            options: Some(options),
            deltas: vec![],
        }
    }

    fn client(&self, index: usize) -> Client {
        self.clients[index % self.clients.len()].clone()
    }
}

/// Puts load on a server and reports.
pub(super) async fn run(common: &Common, args: BenchArgs) -> anyhow::Result<()> {
    let duration = Duration::try_from_secs_f64(args.duration)?;
    if args.rate.is_some_and(|r| !r.is_finite() || r <= 0.0) || args.concurrency == 0 {
        bail!("--rate and --concurrency must be over 0");
    }
    let plan = Arc::new(plan(common, &args).await?);
    let start = Instant::now();
    let samples = match args.rate {
        Some(rate) => open_loop(&plan, rate, start + duration, args.seed).await,
        None => closed_loop(&plan, args.concurrency, start + duration, args.seed).await,
    };
    let report = Report::new(&samples, start.elapsed());
    if common.json { output::json(&report) } else { print(&report) }
}

async fn plan(common: &Common, args: &BenchArgs) -> anyhow::Result<Plan> {
    let wanted = args.rate.map_or(args.concurrency.div_ceil(CALLS_PER_CONNECTION), |_| MAX_CONNECTIONS / 2);
    let mut clients = Vec::new();
    for _ in 0..wanted.clamp(1, MAX_CONNECTIONS) {
        clients.push(Client::connect(common).await?);
    }
    let first = &clients[0];
    let deltas = match &args.delta_prefix {
        Some(prefix) => deltas::list(first, prefix).await?.into_iter().map(|d| d.name).collect(),
        None => args.deltas.clone(),
    };
    if deltas.is_empty() && args.delta_prefix.is_some() {
        bail!("no delta has this prefix");
    }
    let info = first.server().get_server_info(proto::GetServerInfoRequest {}).await?.into_inner();
    let exponent = match args.popularity {
        PopularityArg::Uniform => 0.0,
        PopularityArg::Zipf => args.zipf_s,
    };
    Ok(Plan {
        popularity: Popularity::zipf(deltas.len(), exponent),
        clients,
        deltas,
        prompt: args.prompt.clone(),
        prompt_tokens: args.prompt_tokens.max(1),
        vocab: info.base.map_or(1, |b| b.vocab_size).max(1),
        max_new_tokens: args.max_new_tokens,
    })
}

async fn closed_loop(plan: &Arc<Plan>, callers: usize, end: Instant, seed: u64) -> Vec<Sample> {
    let mut set = JoinSet::new();
    for caller in 0..callers {
        let plan = Arc::clone(plan);
        set.spawn(async move {
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(caller as u64));
            let client = plan.client(caller);
            let mut samples = Vec::new();
            while Instant::now() < end {
                let sample = measure(&client, plan.request(&mut rng)).await;
                let failed = sample.failure.is_some();
                samples.push(sample);
                if failed {
                    // A refusing server is not hammered in a tight loop.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            samples
        });
    }
    set.join_all().await.into_iter().flatten().collect()
}

async fn open_loop(plan: &Arc<Plan>, rate: f64, end: Instant, seed: u64) -> Vec<Sample> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut set = JoinSet::new();
    let mut samples = Vec::new();
    let mut due = Instant::now();
    for arrival in 0.. {
        due += next_arrival(rate, &mut rng);
        if due >= end {
            break;
        }
        // Late arrivals are sent at once: time lost by the generator is not taken from the load.
        tokio::time::sleep_until(due.into()).await;
        while let Some(done) = set.try_join_next() {
            samples.extend(done.ok());
        }
        if set.len() >= MAX_IN_FLIGHT {
            samples.push(Sample { failure: Some("GENERATOR_FULL".to_owned()), ..Sample::default() });
            continue;
        }
        let (client, request) = (plan.client(arrival), plan.request(&mut rng));
        set.spawn(async move { measure(&client, request).await });
    }
    samples.extend(set.join_all().await);
    samples
}

/// One request, measured by this client's clock.
pub(super) async fn measure(client: &Client, request: proto::GenerateRequest) -> Sample {
    let start = Instant::now();
    let mut sample = Sample::default();
    if let Err(status) = follow(client, request, start, &mut sample).await {
        let info = status.get_details_error_info();
        sample.failure = Some(info.map_or_else(|| format!("{:?}", status.code()), |i| i.reason));
    }
    sample.total = start.elapsed().as_secs_f64();
    sample
}

async fn follow(
    client: &Client,
    request: proto::GenerateRequest,
    start: Instant,
    sample: &mut Sample,
) -> Result<(), Status> {
    use proto::generate_response::Event;
    let mut stream = client.inference().generate(request).await?.into_inner();
    let mut last = start;
    let mut finished = false;
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(Event::Delta(delta)) if !delta.token_ids.is_empty() => {
                let now = Instant::now();
                let count = delta.token_ids.len();
                match sample.first_token {
                    None => sample.first_token = Some((now - start).as_secs_f64()),
                    Some(_) => sample.gaps.push((now - last).as_secs_f64() / count as f64),
                }
                sample.tokens += count as u64;
                last = now;
            }
            Some(Event::Finished(_)) => finished = true,
            Some(Event::Delta(_)) | None => {}
        }
    }
    if finished { Ok(()) } else { Err(Status::internal("the stream ended without its end")) }
}

fn print(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{} completed, {} failed in {:.1} s: {:.1} requests/s, {:.1} tokens/s",
        report.completed, report.failed, report.seconds, report.requests_per_second, report.tokens_per_second
    ))?;
    for (reason, count) in &report.failures {
        output::line(&format!("  {count} x {reason}"))?;
    }
    let row = |name: &str, p: Option<Percentiles>| {
        let p = p?;
        let numbers = [p.mean, p.p50, p.p95, p.p99, p.max].map(|x| format!("{x:.2}"));
        Some(std::iter::once(name.to_owned()).chain(numbers).collect::<Vec<_>>())
    };
    let rows = [
        row("first token", report.first_token_ms),
        row("between tokens", report.inter_token_ms),
        row("whole request", report.total_ms),
    ];
    output::table(&["ms", "MEAN", "P50", "P95", "P99", "MAX"], &rows.into_iter().flatten().collect::<Vec<_>>())
}
