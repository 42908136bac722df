//! The HTTP edge: metrics for Prometheus and probes for orchestrators, on a port of its own. No inference here.

use std::{io, time::Duration};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, sync::watch};

use crate::{shutdown::Drain, telemetry};

/// How often histograms are folded, so that they stay small when nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Probes {
    metrics: PrometheusHandle,
    ready: watch::Receiver<bool>,
    training: watch::Receiver<bool>,
    drain: Drain,
}

/// Serves until the drain's grace period is over, so that probes can watch the drain.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    metrics: PrometheusHandle,
    ready: watch::Receiver<bool>,
    training: watch::Receiver<bool>,
    drain: Drain,
) -> io::Result<()> {
    let probes = Probes { metrics: metrics.clone(), ready, training, drain: drain.clone() };
    let server = axum::serve(listener, router(probes));
    let upkeep = async {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            metrics.run_upkeep();
        }
    };
    tokio::select! {
        served = server => served,
        () = upkeep => Ok(()),
        () = drain.expired() => Ok(()),
    }
}

fn router(probes: Probes) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/healthz", get(readyz))
        .with_state(probes)
}

async fn metrics(State(probes): State<Probes>) -> impl IntoResponse {
    telemetry::note_process_memory();
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], probes.metrics.render())
}

async fn readyz(State(probes): State<Probes>) -> (StatusCode, &'static str) {
    if probes.drain.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else if *probes.ready.borrow() && !*probes.training.borrow() {
        // all but training still serves: taking the server out would lose that, too
        (StatusCode::OK, "ok, but training is down until the server is restarted\n")
    } else if *probes.ready.borrow() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readiness_follows_the_server_and_the_drain() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let (tx, ready) = watch::channel(false);
        let drain = Drain::new(Duration::from_millis(1));
        let (trains, training) = watch::channel(true);
        let probes = Probes { metrics: recorder.handle(), ready, training, drain: drain.clone() };
        assert_eq!(readyz(State(probes.clone())).await.0, StatusCode::SERVICE_UNAVAILABLE);
        assert!(tx.send(true).is_ok());
        assert_eq!(readyz(State(probes.clone())).await, (StatusCode::OK, "ok\n"));
        assert!(trains.send(false).is_ok());
        let (code, said) = readyz(State(probes.clone())).await;
        assert!(code == StatusCode::OK && said.contains("training is down"), "{said}");
        drain.begin();
        assert_eq!(readyz(State(probes)).await, (StatusCode::SERVICE_UNAVAILABLE, "draining\n"));
    }
}
