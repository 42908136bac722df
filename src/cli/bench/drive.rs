//! Sends the load: a closed loop of callers, or an open loop that goes by the clock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    options::{BenchArgs, Load},
    plan::{Order, Plan},
    record::{MAX_COUNTED, Meta, Record},
    workload::{Arrivals, Stream, generator},
};

/// A server that refuses is not hammered by a caller in a tight loop.
const AFTER_FAILURE: Duration = Duration::from_millis(20);

/// When to begin counting, and when to end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Phases {
    pub(super) warmup: Duration,
    /// From the end of the warm-up.
    pub(super) duration: Option<Duration>,
    /// Most requests that are counted.
    pub(super) requests: u64,
}

impl Phases {
    /// Those of the options.
    ///
    /// # Errors
    /// Times that are none.
    pub(super) fn of(args: &BenchArgs) -> anyhow::Result<Self> {
        Ok(Self {
            warmup: Duration::try_from_secs_f64(args.warmup).context("--warmup")?,
            duration: args.seconds().map(Duration::try_from_secs_f64).transpose().context("--duration")?,
            requests: args.requests.unwrap_or(u64::MAX),
        })
    }
}

/// What one load made.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) record: Record,
    /// From the end of the warm-up to the last answer.
    pub(super) seconds: f64,
    /// Whether it was ended before its time.
    pub(super) interrupted: bool,
    /// Whether it ended since it had counted as many requests as are kept.
    pub(super) full: bool,
}

/// What all callers share.
struct Run {
    plan: Arc<Plan>,
    record: Arc<Mutex<Record>>,
    /// The end of the warm-up.
    counting: Instant,
    stop: CancellationToken,
}

/// Puts one load on the server until its phases are over or `stop` is cancelled; then nothing is sent any more, and what is under
/// way is given up. `begin` is when the warm-up begins.
///
/// # Errors
/// A caller that ended by itself, which is a bug.
pub(super) async fn drive(
    plan: &Arc<Plan>,
    load: Load,
    args: &BenchArgs,
    begin: Instant,
    stop: &CancellationToken,
) -> anyhow::Result<Measured> {
    plan.begin_load();
    let phases = Phases::of(args)?;
    let (kinds, places) = plan.kinds();
    let run = Run {
        plan: Arc::clone(plan),
        record: Arc::new(Mutex::new(Record::new(places, kinds.len(), args.seed))),
        counting: begin + phases.warmup,
        stop: stop.clone(),
    };
    let run = Arc::new(run);
    match load {
        Load::Closed { concurrency } => closed(&run, concurrency, phases).await?,
        Load::Open { rate } => {
            open(&run, rate, args.arrivals, args.max_in_flight, args.seed, begin, phases).await?;
        }
    }
    let record = std::mem::replace(&mut *run.record.lock(), Record::new(vec![], 0, 0));
    Ok(Measured {
        seconds: run.counting.elapsed().as_secs_f64(),
        interrupted: stop.is_cancelled(),
        full: record.is_full() && phases.requests > MAX_COUNTED as u64,
        record,
    })
}

impl Run {
    /// Seconds from the end of the warm-up to a moment; below 0 before it.
    fn at(&self, moment: Instant) -> f64 {
        match moment.checked_duration_since(self.counting) {
            Some(after) => after.as_secs_f64(),
            None => -(self.counting - moment).as_secs_f64(),
        }
    }

    /// Sends an order that was due at a moment and, where it counts, records what became of it. Whether it succeeded.
    async fn perform(&self, order: Order, connection: u64, due: Instant, counted: bool) -> bool {
        let Some(client) = self.plan.client(connection, order.tenant) else { return false };
        let meta =
            Meta { op: order.call.op(), target: order.target, at: self.at(due), lag: due.elapsed().as_secs_f64() };
        let answer = tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            answer = order.call.measure(client, due) => Some(answer),
        };
        match answer {
            Some(answer) => {
                let succeeded = answer.failure.is_none();
                if counted {
                    self.record.lock().add(meta, answer);
                }
                succeeded
            }
            None => {
                self.record.lock().cut += u64::from(counted);
                false
            }
        }
    }
}

/// Each caller sends its next request when it has its answer. A request counts if it is sent after the warm-up.
async fn closed(run: &Arc<Run>, callers: usize, phases: Phases) -> anyhow::Result<()> {
    let (counted, warm) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let end = phases.duration.map(|d| run.counting + d);
    let limit = phases.requests.min(MAX_COUNTED as u64);
    let mut set = JoinSet::new();
    for caller in 0..callers as u64 {
        let (run, counted, warm) = (Arc::clone(run), Arc::clone(&counted), Arc::clone(&warm));
        set.spawn(async move {
            loop {
                let now = Instant::now();
                if run.stop.is_cancelled() || end.is_some_and(|end| now >= end) {
                    break;
                }
                let counts = now >= run.counting;
                let (stream, numbers) = if counts { (Stream::Counted, &counted) } else { (Stream::WarmUp, &warm) };
                let i = numbers.fetch_add(1, Ordering::Relaxed);
                if counts && i >= limit {
                    break;
                }
                let order = run.plan.order(stream, i);
                let succeeded = run.perform(order, caller, Instant::now(), counts).await;
                if !succeeded {
                    tokio::select! {
                        () = run.stop.cancelled() => {}
                        () = tokio::time::sleep(AFTER_FAILURE) => {}
                    }
                }
            }
        });
    }
    join(&mut set).await
}

/// Requests are due at drawn moments, whatever the server does. One that is due when `most` are under way is not sent.
async fn open(
    run: &Arc<Run>,
    rate: f64,
    arrivals: Arrivals,
    most: usize,
    seed: u64,
    begin: Instant,
    phases: Phases,
) -> anyhow::Result<()> {
    let mut rng = generator(seed, Stream::Arrivals, 0);
    let limit = phases.requests.min(MAX_COUNTED as u64);
    let end = phases.duration.map(|d| run.counting + d);
    let mut set = JoinSet::new();
    let (mut counted, mut warm, mut seconds) = (0, 0, 0.0);
    loop {
        seconds += arrivals.gap(rate, &mut rng);
        let due = Duration::try_from_secs_f64(seconds).ok().and_then(|s| begin.checked_add(s));
        let Some(due) = due.filter(|due| end.is_none_or(|end| *due < end)) else { break };
        let counts = due >= run.counting;
        if counts && counted >= limit {
            break;
        }
        // a late arrival is sent at once: time that the client lost is not taken from the load, and counts as latency
        tokio::select! {
            biased;
            () = run.stop.cancelled() => break,
            () = tokio::time::sleep_until(due.into()) => {}
        }
        while let Some(done) = set.try_join_next() {
            done.context("a request's task")?;
        }
        let (stream, number) = if counts { (Stream::Counted, &mut counted) } else { (Stream::WarmUp, &mut warm) };
        let i = *number;
        *number += 1;
        let order = run.plan.order(stream, i);
        if set.len() >= most {
            if counts {
                let (op, target, at) = (order.call.op(), order.target, run.at(due));
                run.record.lock().shed(Meta { op, target, at, lag: 0.0 });
            }
            continue;
        }
        let run = Arc::clone(run);
        set.spawn(async move {
            run.perform(order, i, due, counts).await;
        });
    }
    // an end by time is an end of sending; the phase lasts until then also if nothing is due any more
    if let Some(end) = end {
        tokio::select! {
            () = run.stop.cancelled() => {}
            () = tokio::time::sleep_until(end.into()) => {}
        }
    }
    join(&mut set).await
}

async fn join(set: &mut JoinSet<()>) -> anyhow::Result<()> {
    while let Some(done) = set.join_next().await {
        done.context("a caller's task")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status, codegen::BoxStream};

    use super::*;
    use crate::{
        cli::{
            Common,
            bench::{options::tests::parse, plan::tests::of_base},
            client::Client,
        },
        grpc::proto::{
            self,
            inference_service_server::{InferenceService, InferenceServiceServer},
        },
    };

    /// How long the server takes.
    const WORK: Duration = Duration::from_millis(100);
    /// How late requests are sent.
    const LATE: Duration = Duration::from_secs(2);

    /// A server that classifies, and takes its time.
    struct Slow;

    #[tonic::async_trait]
    impl InferenceService for Slow {
        type GenerateStream = BoxStream<proto::GenerateResponse>;

        async fn classify(
            &self,
            _: Request<proto::ClassifyRequest>,
        ) -> Result<Response<proto::ClassifyResponse>, Status> {
            tokio::time::sleep(WORK).await;
            Ok(Response::new(proto::ClassifyResponse::default()))
        }

        async fn generate(&self, _: Request<proto::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn generate_batch(
            &self,
            _: Request<proto::GenerateBatchRequest>,
        ) -> Result<Response<proto::GenerateBatchResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn embed(&self, _: Request<proto::EmbedRequest>) -> Result<Response<proto::EmbedResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn score(&self, _: Request<proto::ScoreRequest>) -> Result<Response<proto::ScoreResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn tokenize(
            &self,
            _: Request<proto::TokenizeRequest>,
        ) -> Result<Response<proto::TokenizeResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    /// Times of some requests that were due two seconds before this client came to send them.
    async fn late(load: Load) -> anyhow::Result<Record> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let server = listener.local_addr()?.to_string();
        let serve = tonic::transport::Server::builder().add_service(InferenceServiceServer::new(Slow));
        let serving = tokio::spawn(serve.serve_with_incoming(TcpListenerStream::new(listener)));
        let common = Common::plain(server, "a", false);
        let words = ["--op", "classify", "--requests", "5", "--warmup", "0"];
        let args = parse(&words).map_err(anyhow::Error::msg)?;
        let plan = Arc::new(of_base(&words, Client::connect(&common).await?).await?);
        let begin = Instant::now().checked_sub(LATE).context("a young machine")?;
        let measured = drive(&plan, load, &args, begin, &CancellationToken::new()).await?;
        serving.abort();
        anyhow::ensure!(measured.record.failures.is_empty(), "{:?}", measured.record.failures);
        Ok(measured.record)
    }

    #[tokio::test]
    async fn an_open_loops_times_count_from_when_requests_were_due() -> anyhow::Result<()> {
        // all are due within 50 ms
        let record = late(Load::Open { rate: 100.0 }).await?;
        assert_eq!(record.samples.len(), 5);
        let work = WORK.as_secs_f32();
        for sample in &record.samples {
            // counted from the sending, it would be some 0.1 s
            assert!(sample.lag > 1.5 && sample.total >= sample.lag + work, "{sample:?}");
            assert_eq!(sample.first, Some(sample.total));
            assert!((0.0..1.0).contains(&sample.at), "{sample:?}");
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_closed_loops_times_count_from_the_sending() -> anyhow::Result<()> {
        let record = late(Load::Closed { concurrency: 2 }).await?;
        assert_eq!(record.samples.len(), 5);
        let work = WORK.as_secs_f32();
        assert!(record.samples.iter().all(|s| s.lag < 1.0 && s.total >= work && s.at >= 1.9), "{:?}", record.samples);
        Ok(())
    }
}
