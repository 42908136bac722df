//! The composition root: the only file that names every subsystem. Starts them, waits for a signal, drains.

use anyhow::Context as _;
use tokio::{net::TcpListener, sync::watch};

use crate::{admission::Service, config::Config, grpc, http, shutdown, shutdown::Drain, telemetry};

/// Runs a server until SIGTERM or ctrl-c.
///
/// # Errors
/// If a part cannot start or fails.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    telemetry::init_logs(config.log_format, &config.log_filter).context("start the log")?;
    let metrics = telemetry::init_metrics().context("start the metrics")?;
    let drain = Drain::new(config.drain);
    let (ready, readiness) = watch::channel(false);
    let listener = TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, "gRPC");
    if let Some(address) = config.http {
        let http = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
        tracing::info!(address = %http.local_addr()?, "metrics and probes");
        drain.spawn(http::serve(http, metrics, readiness.clone(), drain.clone()));
    }
    let server = tokio::spawn(grpc::serve(listener, Service::default(), config.grpc, readiness, drain.clone()));
    ready.send_replace(true);
    let signal = shutdown::signal().await.context("wait for signals")?;
    tracing::info!(signal, "draining");
    drain.finish().await;
    server.await.context("the gRPC server")??;
    Ok(())
}
