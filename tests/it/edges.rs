//! Health and reflection, as other tools ask for them.

use std::collections::BTreeSet;

use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::*;

const SERVICES: [&str; 5] = ["InferenceService", "DeltaService", "TrainingService", "ServerService", "TenantService"];

#[tokio::test(flavor = "multi_thread")]
async fn health_is_serving_for_the_server_and_for_each_service() {
    let world = World::new();
    let running = world.start().await;
    let mut health = HealthClient::new(running.client.channel.clone());
    let names = SERVICES.iter().map(|s| format!("deltaserve.v1.{s}")).chain([String::new()]);
    for service in names {
        let mut status = ServingStatus::Unknown;
        eventually("it serves", async || {
            let request = HealthCheckRequest { service: service.clone() };
            if let Ok(reply) = health.check(request).await {
                status = reply.into_inner().status();
            }
            status == ServingStatus::Serving
        })
        .await;
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_every_service() {
    let world = World::new();
    let running = world.start().await;
    let mut reflection = ServerReflectionClient::new(running.client.channel.clone());
    let message = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(message) };
    let mut replies =
        reflection.server_reflection_info(futures::stream::iter([request])).await.expect("a reply").into_inner();
    let reply = replies.message().await.expect("a message").and_then(|m| m.message_response);
    let Some(MessageResponse::ListServicesResponse(list)) = reply else { panic!("{reply:?}") };
    let names: BTreeSet<String> = list.service.into_iter().map(|s| s.name).collect();
    for service in SERVICES {
        assert!(names.contains(&format!("deltaserve.v1.{service}")), "{service} is not in {names:?}");
    }
    assert!(names.contains("grpc.health.v1.Health"), "{names:?}");
    drop(replies);
    running.stop().await;
}
