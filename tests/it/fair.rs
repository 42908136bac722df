//! Tenants beside each other: a flood beside a trickle, limits of one tenant and what comes after them, priorities.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use deltaserve::grpc::proto;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::*;

/// Tokens of a sequence that does not come to its end by itself.
const MANY: u32 = 16_000;

/// When a refused call may be tried again.
fn retry(status: &Status) -> std::time::Duration {
    let delay = status.get_error_details().retry_info().and_then(|r| r.retry_delay);
    delay.unwrap_or_else(|| panic!("no RetryInfo: {status:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trickle_goes_on_beside_a_flood_and_finds_places_when_the_flood_does_not() {
    let mut world = World::long();
    world.config.engine.max_sequences = 4;
    world.config.engine.max_queue = 60;
    let running = world.start().await;
    let (flood, trickle) = (running.client.tenant("flood"), running.client.tenant("trickle"));
    let (ended, mut tasks) = (Arc::new(AtomicUsize::new(0)), Vec::new());
    // 64 places, of which the last 8 are not for one that has half of them
    for i in 0..56 {
        let stream = flood.stream(ask("", &format!("flood {i}"), 300)).await.expect("admitted");
        let ended = Arc::clone(&ended);
        tasks.push(tokio::spawn(async move {
            let said = finish(Said::default(), stream).await.expect("it goes on to its end");
            ended.fetch_add(1, Ordering::Relaxed);
            said.ids.len()
        }));
    }
    for i in 0..3 {
        let before = ended.load(Ordering::Relaxed);
        let said = trickle.generate(ask("", &format!("trickle {i}"), 5)).await.expect("it has places and turns");
        assert_eq!(said.ids.len(), 5);
        // it waits for one of four places to get free, and all four may at once
        let passed = ended.load(Ordering::Relaxed) - before;
        assert!(passed <= 16, "{passed} of the flood came before number {i} of the trickle");
    }
    for task in tasks {
        assert_eq!(timely("the flood ends", task).await.expect("no panic"), 300);
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_places_are_for_others_than_the_one_that_has_most() {
    let mut world = World::long();
    world.config.engine.max_sequences = 4;
    world.config.engine.max_queue = 12;
    let running = world.start().await;
    let (flood, other) = (running.client.tenant("flood"), running.client.tenant("other"));
    let mut streams = Vec::new();
    for _ in 0..14 {
        streams.push(flood.stream(ask("", "once", MANY)).await.expect("admitted"));
    }
    let refused = flood.stream(ask("", "once", 4)).await.expect_err("two are left to others");
    assert_eq!(kind(&refused), (Code::ResourceExhausted, "OVERLOADED".into()));
    assert!(refused.message().contains("14 of 16") && !retry(&refused).is_zero(), "{refused:?}");
    let stays = other.stream(ask("", "once", MANY)).await.expect("there are places for it");
    drop((streams, stays));
    eventually("places are free again", async || flood.generate(ask("", "hello", 4)).await.is_ok()).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_over_a_tenants_bound_are_refused_until_one_of_them_ends() {
    let mut world = World::long();
    world.config.tenants.max_concurrent = Some(2);
    let running = world.start().await;
    let (one, other) = (running.client.tenant("one"), running.client.tenant("other"));
    assert_eq!(one.info().await.expect("server info").limits.map(|l| l.tenant_max_concurrent), Some(2));
    let first = one.stream(ask("", "once", MANY)).await.expect("admitted");
    let second = one.stream(ask("", "once", MANY)).await.expect("admitted");

    let prompts = vec![prompt("once")];
    let batch = proto::GenerateBatchRequest { prompts, options: Some(options(2)), ..Default::default() };
    let embed = proto::EmbedRequest { inputs: vec!["once".into()], ..Default::default() };
    let all = [
        one.stream(ask("", "once", 4)).await.err(),
        one.batch(batch.clone()).await.err(),
        score(&one, "", scored("once", " upon")).await.err(),
        one.inference().embed(one.request(embed)).await.err(),
    ];
    for refused in all {
        let refused = refused.expect("it has two calls already");
        assert_eq!(kind(&refused), (Code::ResourceExhausted, "TENANT_CONCURRENCY".into()));
        assert!(refused.message().contains("2 calls in progress"), "{refused:?}");
        assert!(!retry(&refused).is_zero());
    }
    // it is nobody else's business, and a bad request is told what is wrong with it
    assert!(other.generate(ask("", "once", 4)).await.is_ok());
    expect_invalid(&one.stream(ask("", "once", 0)).await.expect_err("bad"), "max_new_tokens", &[]);
    drop(first);
    eventually("it may call again", async || one.generate(ask("", "once", 4)).await.is_ok()).await;
    // calls that end by themselves make room for the next at once
    for _ in 0..20 {
        one.generate(ask("", "once", 2)).await.expect("one at a time beside the stream");
        one.batch(batch.clone()).await.expect("one at a time beside the stream");
    }
    drop(second);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_over_a_tenants_rate_are_told_when_to_come_again() {
    let mut world = World::new();
    world.config.tenants.rate = Some((0.25, 2));
    let running = world.start().await;
    let (one, other) = (running.client.tenant("one"), running.client.tenant("other"));
    let limits = one.info().await.expect("server info").limits.unwrap_or_default();
    assert_eq!((limits.tenant_rate, limits.tenant_burst), (0.25, 2));
    let (mut passed, mut refused) = (0, None);
    while refused.is_none() {
        match one.generate(ask("", "once", 2)).await {
            Ok(_) => passed += 1,
            Err(status) => refused = Some(status),
        }
        assert!(passed < 20, "nothing is refused");
    }
    let refused = refused.expect("just seen");
    assert!(passed >= 2, "a burst of two");
    assert_eq!(kind(&refused), (Code::ResourceExhausted, "TENANT_RATE".into()));
    assert!(refused.message().contains("0.25 per second, 2 at once"), "{refused:?}");
    let wait = retry(&refused);
    assert!(wait <= std::time::Duration::from_secs(4) && !wait.is_zero(), "{wait:?}");
    assert!(other.generate(ask("", "once", 2)).await.is_ok(), "each tenant has its own");
    assert!(one.info().await.is_ok(), "questions about the server are no inference");
    tokio::time::sleep(wait).await;
    assert!(one.generate(ask("", "once", 2)).await.is_ok(), "it came when it was told to");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_higher_priority_begins_first_and_a_bad_one_is_named() {
    let mut world = World::long();
    world.config.engine.max_sequences = 1;
    let running = world.start().await;
    let client = &running.client;
    let of = |priority: i32, max_new| {
        let options = Some(proto::GenerateOptions { priority, ..options(max_new) });
        proto::GenerateRequest { options, ..ask("", "once", 4) }
    };
    let ahead = client.stream(of(-100, MANY)).await.expect("admitted");
    eventually("it runs", async || client.running().await == 1).await;
    let (order, mut tasks) = (Arc::new(Mutex::new(Vec::new())), Vec::new());
    for (n, priority) in [0, 100, -5, 7, 0].into_iter().enumerate() {
        let (caller, order) = (client.clone(), Arc::clone(&order));
        let request = of(priority, 200);
        tasks.push(tokio::spawn(async move {
            caller.generate(request).await.expect("it generates");
            order.lock().expect("no panic").push(priority);
        }));
        eventually("it waits", async || queued(client).await == n as u32 + 1).await;
    }
    drop(ahead);
    for task in tasks {
        timely("all end", task).await.expect("no panic");
    }
    assert_eq!(*order.lock().expect("no panic"), [100, 7, 0, 0, -5]);

    for priority in [101, -101, i32::MIN] {
        let refused = client.stream(of(priority, 4)).await.expect_err("out of range");
        expect_invalid(&refused, "options.priority", &["-100 to 100"]);
        let inputs = vec![scored("once", " upon")];
        let request = proto::ScoreRequest { inputs, priority, ..Default::default() };
        let refused = client.inference().score(client.request(request)).await.expect_err("out of range");
        expect_invalid(&refused, "priority", &["-100 to 100"]);
        let request = proto::EmbedRequest { inputs: vec!["a".into()], priority, ..Default::default() };
        let refused = client.inference().embed(client.request(request)).await.expect_err("out of range");
        expect_invalid(&refused, "priority", &["-100 to 100"]);
        let inputs = vec![proto::ClassifyInput { text: "a".into(), ..Default::default() }];
        let request = proto::ClassifyRequest { inputs, priority, ..Default::default() };
        let refused = client.inference().classify(client.request(request)).await.expect_err("out of range");
        expect_invalid(&refused, "priority", &["-100 to 100"]);
    }
    running.stop().await;
}

/// Requests that wait for the engine.
async fn queued(client: &Client) -> u32 {
    client.info().await.expect("server info").load.unwrap_or_default().queued
}
