//! The gRPC edge: one thin file per service, conversions, statuses, and the server that carries them.
//!
//! Decodes, calls [`crate::admission::Service`], encodes. Knows no tensors and holds no state of its own.

mod audited;
mod convert;
mod deltas;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod gate;
mod guard;
mod incoming;
mod inference;
pub mod policy;
pub mod proto;
mod server_info;
mod status;
mod tenant;
mod tenants;
mod training;
mod upload;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::watch};
use tonic::transport::Server;
use tonic_health::{ServingStatus, server::HealthReporter};

pub use tenant::{DEFAULT_TENANT, TENANT_KEY};

use crate::{access::Access, admission::Service, shutdown::Drain};
use proto::{
    delta_service_server::DeltaServiceServer, inference_service_server::InferenceServiceServer,
    server_service_server::ServerServiceServer, tenant_service_server::TenantServiceServer,
    training_service_server::TrainingServiceServer,
};

/// Calls of one connection at a time; clients open another connection or wait.
const MAX_STREAMS_PER_CONNECTION: u32 = 256;
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Longest frame: the least that the protocol permits.
const MAX_FRAME_BYTES: u32 = 16 * 1024;
/// What one call, and all of a connection, may send ahead of being read.
const CALL_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;
/// Streams that a client reset before anybody looked at them; with more, the connection is closed.
const MAX_PENDING_RESETS: usize = 32;
/// Streams that were reset because of what a client did; with more, the connection is closed.
const MAX_ERROR_RESETS: usize = 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Limits of the edge.
#[derive(Debug, Clone)]
pub struct GrpcConfig {
    /// Largest message, either way.
    pub max_message_bytes: usize,
    /// Largest upload of a delta or dataset.
    pub max_upload_bytes: u64,
    /// Calls at a time over all connections; further ones are refused.
    pub max_calls: usize,
}

/// Why the edge could not serve.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The transport failed.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The embedded protocol description could not be read.
    #[error("server reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `drain` begins and its grace period is over, or all calls have ended, to callers that `access` knows.
/// `ready` is what health checks say:
/// SERVING while true and not draining;
/// of training, while its thread lives.
///
/// # Errors
/// [`GrpcError`].
pub async fn serve(
    listener: TcpListener,
    service: Service,
    config: GrpcConfig,
    access: Arc<Access>,
    ready: watch::Receiver<bool>,
    drain: Drain,
) -> Result<(), GrpcError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let follow = follow_readiness(reporter, ready, service.training(), drain.begun());
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let receiver = upload::Receiver::new(config.max_upload_bytes);
    let max = config.max_message_bytes;
    macro_rules! limited {
        ($server:ident, $service:expr) => {
            $server::new($service).max_decoding_message_size(max).max_encoding_message_size(max)
        };
    }
    let inference = inference::Inference { service: service.clone() };
    let deltas = deltas::Deltas { service: service.clone(), receiver: receiver.clone() };
    let training = training::Training { service: service.clone(), receiver };
    let router = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .initial_stream_window_size(CALL_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(gate::GateLayer::new(config.max_calls))
        .layer(guard::GuardLayer::new(Arc::clone(&access)))
        // inside of what says who calls
        .layer(audited::AuditLayer::new(service.audit().clone()))
        .add_service(health)
        .add_service(reflection)
        .add_service(limited!(InferenceServiceServer, inference))
        .add_service(limited!(DeltaServiceServer, deltas))
        .add_service(limited!(TrainingServiceServer, training))
        .add_service(limited!(TenantServiceServer, tenants::Tenants { service: service.clone() }))
        .add_service(limited!(ServerServiceServer, server_info::Server { service }));
    let incoming = incoming::connections(listener, Arc::clone(&access));
    let server = router.serve_with_incoming_shutdown(incoming, drain.begun());
    tokio::select! {
        served = server => served?,
        () = drain.expired() => tracing::warn!("calls were cut off at the end of the grace period"),
        () = follow => {}
        () = follow_files(access) => {}
    }
    Ok(())
}

/// Has the files of credentials and certificates read again where they change; never ends.
async fn follow_files(access: Arc<Access>) {
    let Some(every) = access.reload_every() else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let access = Arc::clone(&access);
        if let Err(error) = tokio::task::spawn_blocking(move || access.look_again()).await {
            tracing::error!(%error, "files of credentials and certificates could not be looked at");
        }
    }
}

/// Its health is its own: the rest serves on where the trainer thread has ended.
const TRAINING: &str = "deltaserve.v1.TrainingService";

/// Tells health checks what `ready`, the trainer and the drain say; never ends.
async fn follow_readiness(
    reporter: HealthReporter,
    mut ready: watch::Receiver<bool>,
    mut training: watch::Receiver<bool>,
    draining: impl Future<Output = ()> + Send,
) {
    let services = [
        "",
        "deltaserve.v1.InferenceService",
        "deltaserve.v1.DeltaService",
        TRAINING,
        "deltaserve.v1.ServerService",
        "deltaserve.v1.TenantService",
    ];
    let mut draining = std::pin::pin!(draining);
    let (mut over, mut watched) = (false, true);
    loop {
        let serving = *ready.borrow_and_update() && !over;
        let trains = *training.borrow_and_update();
        for name in services {
            let serves = serving && (trains || name != TRAINING);
            let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
            reporter.set_service_status(name, status).await;
        }
        tokio::select! {
            () = &mut draining, if !over => over = true,
            changed = ready.changed(), if !over => over = changed.is_err(),
            changed = training.changed(), if watched => watched = changed.is_ok(),
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Request;
    use tonic_health::{
        pb::{HealthCheckRequest, health_check_response::ServingStatus as Wire, health_server::Health as _},
        server::HealthService,
    };

    use super::*;

    #[tokio::test]
    async fn where_the_trainer_has_died_training_alone_is_not_serving() {
        let reporter = HealthReporter::new();
        let health = HealthService::from_health_reporter(reporter.clone());
        let (_ready, is_ready) = watch::channel(true);
        let (trains, training) = watch::channel(true);
        let task = tokio::spawn(follow_readiness(reporter, is_ready, training, std::future::pending()));
        let becomes = async |name: &str, wanted: Wire| loop {
            let asked = health.check(Request::new(HealthCheckRequest { service: name.into() })).await;
            if asked.is_ok_and(|said| said.into_inner().status == wanted as i32) {
                return;
            }
            tokio::task::yield_now().await;
        };
        let all = async {
            becomes(TRAINING, Wire::Serving).await;
            trains.send_replace(false);
            becomes(TRAINING, Wire::NotServing).await;
            becomes("", Wire::Serving).await;
            becomes("deltaserve.v1.InferenceService", Wire::Serving).await;
        };
        assert!(tokio::time::timeout(Duration::from_secs(60), all).await.is_ok());
        task.abort();
    }
}
