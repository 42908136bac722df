//! The composition root: the only file that names every subsystem. Starts them, waits for a signal, drains.

mod base;
mod limits;
mod publish;

use std::{net::SocketAddr, path::Path, sync::Arc, thread, time::Duration};

use anyhow::Context as _;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{
    access::Access,
    admission::{
        Quotas, Service, ServiceLimits, ServiceParts, TenantLimits,
        params::{NgramSpeculation, PublishPolicy, ServeError, UploadParams},
    },
    audit::AuditLog,
    config::Config,
    engine::{self, EngineConfig, EngineHandle},
    grpc, http,
    ids::TenantId,
    interop::{self, InteropError},
    kv::PAGE_SIZE,
    model::Base,
    pacing::Pacer,
    registry::{LoadError, Loader, Registry, RegistryConfig},
    shutdown::{self, Drain},
    store::{Origin, Store},
    telemetry,
    train::{TrainerConfig, TrainerHandle, TrainerParts, joblog::JobLog, memory::MemoryProbe},
};

/// The tenant that sample deltas belong to.
pub const DEFAULT_TENANT: &str = "default";
/// Most memory that the cache takes unless it is told otherwise.
const DEFAULT_KV_BYTES: usize = 1 << 30;
/// How often unused blobs are removed.
const GARBAGE_EVERY: Duration = Duration::from_secs(3600);
/// How often the engine's thread is looked after.
const WATCHDOG: Duration = Duration::from_millis(500);

/// Runs a server until SIGTERM or ctrl-c.
///
/// # Errors
/// If a part cannot start or fails.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    telemetry::init_logs(config.log_format, &config.log_filter).context("start the log")?;
    #[cfg(feature = "failpoints")]
    tracing::warn!("this build has failpoints: it is for tests, not for serving");
    let metrics = telemetry::init_metrics().context("start the metrics")?;
    let started = std::time::Instant::now();
    let server = start(config, Some(metrics)).await?;
    let seconds = started.elapsed().as_secs_f64();
    metrics::gauge!(telemetry::names::START_SECONDS).set(seconds);
    tracing::info!(grpc = %server.grpc, http = ?server.http, seconds, "ready");
    let engine = server.engine.clone();
    let dead = async move {
        while engine.is_alive() {
            tokio::time::sleep(WATCHDOG).await;
        }
    };
    tokio::select! {
        signal = shutdown::signal() => tracing::info!(signal = signal.context("wait for signals")?, "draining"),
        () = dead => {
            server.ready.send_replace(false);
            anyhow::bail!("the engine thread ended; nothing can be served");
        }
    }
    server.stop().await
}

/// A server that runs in this process.
pub struct Server {
    /// Where gRPC listens.
    pub grpc: SocketAddr,
    /// Where metrics and probes are.
    pub http: Option<SocketAddr>,
    /// What the edges call.
    pub service: Service,
    engine: EngineHandle,
    trainer: TrainerHandle,
    store: Store,
    audit: AuditLog,
    drain: Drain,
    grace: Duration,
    ready: watch::Sender<bool>,
    edge: JoinHandle<Result<(), grpc::GrpcError>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Server {
    /// Stops taking calls, lets running ones finish within the grace period, then ends everything.
    ///
    /// # Errors
    /// If the gRPC edge failed.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.ready.send_replace(false);
        // calls and jobs share one grace period
        tokio::join!(self.drain.finish(), self.trainer.drain(self.grace));
        self.engine.shutdown(Duration::ZERO);
        let edge = self.edge.await.context("the gRPC edge")?;
        drop((self.service, self.trainer, self.engine));
        let threads = self.threads;
        let joined = tokio::task::spawn_blocking(move || {
            threads.into_iter().for_each(|t| {
                let name = t.thread().name().unwrap_or("?").to_owned();
                if t.join().is_err() {
                    tracing::error!(thread = name, "ended by a panic");
                }
            });
        });
        if tokio::time::timeout(Duration::from_secs(10), joined).await.is_err() {
            tracing::warn!("a compute thread did not end in time");
        }
        self.audit.close().await;
        self.store.close().await;
        Ok(edge?)
    }
}

/// Starts every part and begins to serve.
///
/// # Errors
/// If a part cannot start.
pub async fn start(config: Config, metrics: Option<PrometheusHandle>) -> anyhow::Result<Server> {
    crate::train::metrics::describe();
    let access = Arc::new(Access::open(&config.access)?);
    let parts = base::load(&config.base).await?;
    let base = Arc::clone(&parts.base);
    crate::ops::keep_freed_memory();
    let audit = AuditLog::open(&config.audit).context("open the audit log (--audit-log)")?;
    let quotas = limits::quotas(&config.tenants).await?;
    let store = Store::open_at(&config.places()).await.context("open the store")?;
    store.set_quotas(quotas.source());
    store.verify(config.store.verify).await.context("verify the store")?;
    let registry_config = RegistryConfig {
        max_resident_bytes: config.max_resident_bytes,
        retry_after: config.delta_retry,
        quotas: Some(quotas.source()),
        ..RegistryConfig::default()
    };
    let registry = Registry::open(store.clone(), base.fingerprint, loader(&base), registry_config)
        .await
        .context("open the registry")?;
    let pacer = Pacer::new(config.train.max_yield, f64::from(config.train.floor_percent) / 100.0);
    let pacer = Arc::new(pacer.keeping(config.train.max_slowdown));
    let engine_config = engine_config(&config, &base);
    let (engine, engine_thread) = engine::spawn(Arc::clone(&base), engine_config, Arc::clone(&pacer))?;
    let trainer_parts = TrainerParts {
        publisher: publish::publisher(&base, &parts.name, &registry, &store, &audit),
        memory: MemoryProbe::of_machine(config.train.max_bytes, base.device.is_cpu()),
        log: JobLog::new(store.clone()),
        base: Arc::clone(&base),
        pacer,
    };
    let (trainer, trainer_thread) = TrainerHandle::spawn(trainer_parts, trainer_config(&config, &quotas)).await?;
    let service = Service::new(ServiceParts {
        base,
        base_name: parts.name,
        text: parts.text,
        chat: parts.chat,
        pooling: parts.pooling,
        codec: parts.codec,
        registry,
        store: store.clone(),
        engine: engine.clone(),
        trainer: trainer.clone(),
        limits: limits(&config, &engine_config),
        tenants: TenantLimits { quotas: quotas.clone(), weights: config.tenants.weights.iter().cloned().collect() },
        audit: audit.clone(),
    });
    if let Some(dir) = &config.adapters_dir {
        register_samples(&service, dir).await?;
    }
    let drain = Drain::new(config.drain);
    let (ready, readiness) = watch::channel(false);
    let listener = TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    let grpc = listener.local_addr()?;
    access.announce(grpc);
    let http = match (config.http, metrics) {
        (Some(address), Some(metrics)) => {
            Some(probes(address, metrics, (readiness.clone(), service.training()), &drain).await?)
        }
        _ => None,
    };
    let edge = drain.spawn(grpc::serve(listener, service.clone(), config.grpc, access, readiness, drain.clone()));
    tokio::spawn({
        let (service, drain) = (service.clone(), drain.clone());
        async move {
            tokio::select! {
                () = async {
                    loop {
                        service.take_up_jobs().await;
                        service.more_jobs_left().await;
                    }
                } => {}
                () = drain.begun() => {}
            }
        }
    });
    tokio::spawn(collect_garbage(store.clone(), drain.clone()));
    if let Some(file) = config.tenants.file {
        tokio::spawn(limits::follow(file, limits::LOOK, quotas, drain.clone()));
    }
    ready.send_replace(true);
    Ok(Server {
        grpc,
        http,
        service,
        engine,
        trainer,
        store,
        audit,
        drain,
        grace: config.drain,
        ready,
        edge,
        threads: vec![engine_thread, trainer_thread],
    })
}

/// Serves metrics and probes; where.
async fn probes(
    address: SocketAddr,
    metrics: PrometheusHandle,
    (readiness, training): (watch::Receiver<bool>, watch::Receiver<bool>),
    drain: &Drain,
) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let local = listener.local_addr()?;
    // not waited for at the end: probes watch the drain until the grace period is over
    tokio::spawn(http::serve(listener, metrics, readiness, training, drain.clone()));
    Ok(local)
}

/// What admission enforces or reports.
fn limits(config: &Config, engine: &EngineConfig) -> ServiceLimits {
    ServiceLimits {
        max_admitted: config.engine.max_queue + config.engine.max_sequences,
        max_message_bytes: config.grpc.max_message_bytes as u64,
        max_upload_bytes: config.grpc.max_upload_bytes,
        max_queue: config.engine.max_queue,
        speculation: NgramSpeculation::of(config.engine.speculative_ngram),
        max_sequences: engine.max_sequences,
        max_batch_tokens: engine.max_batch_tokens,
        kv_positions: engine.kv_pages * PAGE_SIZE,
        max_train_jobs: config.train.max_jobs,
        grammar_bytes: config.engine.constraint_bytes / 2,
    }
}

/// Removes blobs that nothing refers to, now and every hour, until the server drains.
async fn collect_garbage(store: Store, drain: Drain) {
    let mut hours = tokio::time::interval(GARBAGE_EVERY);
    loop {
        tokio::select! {
            _ = hours.tick() => match store.collect_garbage().await {
                Ok(garbage) if garbage.blobs > 0 => tracing::info!(blobs = garbage.blobs, bytes = garbage.bytes, "removed unused blobs"),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "could not remove unused blobs"),
            },
            () = drain.begun() => return,
        }
    }
}

/// The engine's sizes; the cache holds every sequence at full length unless that takes more than a gibibyte.
fn engine_config(config: &Config, base: &Base) -> EngineConfig {
    let arch = &base.arch;
    let sequences = config.engine.max_sequences.min(config.engine.max_batch_tokens);
    let bytes_per_position = (2 * arch.layers * arch.kv_width() * base.dtype.size_in_bytes()).max(1);
    // an encoder-decoder's sequence has two sides
    let longest = arch.max_positions * if arch.is_encoder_decoder() { 2 } else { 1 };
    let wanted = sequences * longest;
    let default = wanted.min(DEFAULT_KV_BYTES / bytes_per_position).max(longest);
    let positions = config.engine.kv_positions.unwrap_or(default);
    EngineConfig {
        max_batch_tokens: config.engine.max_batch_tokens,
        max_sequences: sequences,
        kv_pages: positions.div_ceil(PAGE_SIZE),
        queue: config.engine.max_queue + config.engine.max_sequences,
        prefix_cache: config.engine.prefix_cache,
        // the other half is for what is compiled
        constraint_bytes: config.engine.constraint_bytes / 2,
        halves: config.halves,
        activations: config.engine.activations,
        ..EngineConfig::default()
    }
}

/// The trainer's limits.
fn trainer_config(config: &Config, quotas: &Quotas) -> TrainerConfig {
    let defaults = TrainerConfig::default();
    TrainerConfig {
        max_jobs: config.train.max_jobs.max(1),
        takes_over: config.train.max_jobs > 0,
        max_paused_per_tenant: config.train.max_paused,
        quotas: Some(quotas.source()),
        // as many as may share a pass must be able to run
        max_concurrent_jobs: defaults.max_concurrent_jobs.max(config.train.share),
        weights: Arc::new(config.tenants.weights.iter().cloned().collect()),
        share: config.train.share,
        priority: config.train.priority,
        halves: config.halves,
        ..defaults
    }
}

/// Decodes stored files for this base.
fn loader(base: &Arc<Base>) -> Loader {
    let base = Arc::clone(base);
    Arc::new(move |files| {
        interop::decode(files, &base).map_err(|e| match e {
            InteropError::BaseMismatch(m) => LoadError::BaseMismatch(m),
            InteropError::Tensor(m) => LoadError::Failed(m),
            other => LoadError::Invalid(other.to_string()),
        })
    })
}

/// Registers each sub-folder under its name unless the name is taken; a folder that is not for this base is passed over
/// with a warning, since samples are made for one base.
async fn register_samples(service: &Service, dir: &Path) -> anyhow::Result<()> {
    let tenant = TenantId::new(DEFAULT_TENANT).context("the default tenant")?;
    let mut entries = tokio::fs::read_dir(dir).await.with_context(|| format!("read {}", dir.display()))?;
    while let Some(entry) = entries.next_entry().await? {
        if !entry.file_type().await?.is_dir() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let files = match tokio::task::spawn_blocking(move || interop::read_folder(&path)).await? {
            Ok(folder) => folder.files,
            Err(error) => {
                tracing::warn!(delta = name, %error, "sample delta was passed over");
                continue;
            }
        };
        let params = UploadParams { name: name.clone(), policy: PublishPolicy::Create, labels: vec![], files };
        match service.publish(&tenant, params, Origin::Sample).await {
            Ok(delta) => tracing::info!(delta = name, number = delta.number, "registered a sample delta"),
            Err(ServeError::AlreadyExists(_)) => {}
            Err(error) => tracing::warn!(delta = name, %error, "sample delta was passed over"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::ServeArgs,
        model::testing::{random_base, tiny_llama},
        ops::{Activations, Halves},
    };

    #[test]
    fn the_engine_gets_what_serve_was_told() -> anyhow::Result<()> {
        let base = random_base(&tiny_llama(), 1)?;
        for (bf16x2, halves) in [("all", Halves::Always), ("training", Halves::Training), ("off", Halves::Never)] {
            let args = ServeArgs { bf16x2: bf16x2.into(), max_constraint_mb: 64, ..ServeArgs::for_base("x") };
            let config = Config::try_from(args)?;
            let engine = engine_config(&config, &base);
            assert_eq!((engine.halves, engine.constraint_bytes), (halves, 32 << 20));
            assert_eq!(limits(&config, &engine).grammar_bytes, 32 << 20);
            let trainer = trainer_config(&config, &Quotas::default());
            assert_eq!(trainer.halves, halves);
        }
        for (said, activations) in [("weights", Activations::AsWeights), ("f32", Activations::F32)] {
            let config = Config::try_from(ServeArgs { activations: said.into(), ..ServeArgs::for_base("x") })?;
            assert_eq!(engine_config(&config, &base).activations, activations);
        }
        Ok(())
    }
}
