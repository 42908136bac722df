//! Clients that leave and calls that are late give back what they used.

use std::time::{Duration, Instant};

use deltaserve::grpc::proto;
use tonic::Code;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_frees_its_sequence_and_its_delta() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let mut streams = Vec::new();
    for delta in ["style", "", "style"] {
        let mut stream = client.stream(ask(delta, "once", 16_000)).await.expect("a stream");
        stream.message().await.expect("a message").expect("a token");
        streams.push(stream);
    }
    // a step publishes its figures after its tokens
    eventually("three sequences run", async || client.running().await == 3).await;
    drop(streams);
    let dropped = Instant::now();
    eventually("the sequences end", async || client.running().await == 0).await;
    assert!(dropped.elapsed() < Duration::from_secs(5), "{:?}: they ran to their end", dropped.elapsed());
    eventually("the cache is empty", async || {
        client.info().await.is_ok_and(|i| i.load.unwrap_or_default().kv_positions_used == 0)
    })
    .await;
    eventually("the lease ends", async || {
        client.info().await.is_ok_and(|i| i.residency.unwrap_or_default().leased == 0)
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_late_ends_with_deadline_exceeded_and_frees_its_sequence() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let mut request = client.request(ask("", "once", 16_000));
    request.metadata_mut().insert("grpc-timeout", "300m".parse().expect("ASCII"));
    let mut stream = client.inference().generate(request).await.expect("a stream").into_inner();
    let begun = Instant::now();
    let error = timely("the deadline", async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended by itself"),
                Err(status) => return status,
            }
        }
    })
    .await;
    assert_eq!(kind(&error), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".into()));
    assert!(begun.elapsed() < Duration::from_secs(10));
    eventually("the sequence ends", async || client.running().await == 0).await;

    let batch = proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: vec![prompt("once")],
        options: Some(options(16_000)),
        deltas: vec![],
    };
    let mut request = client.request(batch);
    request.metadata_mut().insert("grpc-timeout", "300m".parse().expect("ASCII"));
    let error = client.inference().generate_batch(request).await.expect_err("late");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    eventually("the sequence ends", async || client.running().await == 0).await;
    assert_eq!(client.text("", "once", 4).await.len(), client.text("", "once", 4).await.len());
    running.stop().await;
}
