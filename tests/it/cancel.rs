//! Clients that leave and calls that are late give back what they used.

use deltaserve::grpc::proto;
use tonic::{Code, Status};

use crate::support::*;

/// Tokens of a sequence that does not come to its end by itself.
const MANY: u32 = 16_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_frees_its_sequence_and_its_delta() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let mut streams = Vec::new();
    for delta in ["style", "", "style"] {
        let mut stream = client.stream(ask(delta, "once", MANY)).await.expect("a stream");
        stream.message().await.expect("a message").expect("a token");
        streams.push(stream);
    }
    // a step publishes its figures after its tokens
    eventually("three sequences run", async || client.running().await == 3).await;
    drop(streams);
    let mut longest = 0;
    eventually("the sequences end", async || {
        let load = client.info().await.expect("server info").load.unwrap_or_default();
        longest = longest.max(load.kv_positions_used);
        load.running == 0
    })
    .await;
    assert!(longest < 3 * MANY / 4 * 3, "{longest} positions: they ran on, to their end");
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

/// What a late call ends with: the server's answer or, where that is late itself, the bare one of the client's transport.
fn assert_late(status: &Status) {
    let bare = status.code() == Code::Cancelled && status.message().contains("Timeout expired");
    assert!(bare || kind(status) == (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".into()), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_late_ends_with_deadline_exceeded_and_frees_its_sequence() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let mut request = client.request(ask("", "once", MANY));
    request.metadata_mut().insert("grpc-timeout", "300m".parse().expect("ASCII"));
    match client.inference().generate(request).await {
        Ok(stream) => {
            let mut stream = stream.into_inner();
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
        }
        // on a busy machine, it was not even admitted
        Err(status) => assert_late(&status),
    }
    eventually("the sequence ends", async || client.running().await == 0).await;

    let batch = proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: vec![prompt("once")],
        options: Some(options(MANY)),
        deltas: vec![],
    };
    let mut request = client.request(batch);
    request.metadata_mut().insert("grpc-timeout", "300m".parse().expect("ASCII"));
    assert_late(&client.inference().generate_batch(request).await.expect_err("late"));
    eventually("the sequence ends", async || client.running().await == 0).await;
    assert_eq!(client.generate(ask("", "once", 4)).await.expect("it serves on").ids.len(), 4);
    running.stop().await;
}
