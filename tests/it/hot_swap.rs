//! Versions change under load; what a response says served it is what served it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use deltaserve::grpc::proto;

use crate::support::*;

const SWAPS: usize = 1000;
const NAMES: usize = 4;
const VERSIONS: usize = 3;
const CLIENTS: usize = 6;
const PROMPTS: [&str; 3] = ["once upon a time", "the", "Who goes there?"];
const NEW: u32 = 8;

/// Version id -> the text of each prompt.
type Known = BTreeMap<String, Vec<String>>;

async fn published(world: &World, client: &Client) -> Known {
    let mut known = Known::new();
    for name in 0..NAMES {
        for version in 0..VERSIONS {
            let files = world.delta((name * VERSIONS + version) as u64 + 10);
            let made = client.upload(&format!("d{name}"), &files).await.expect("an upload");
            let reference = format!("d{name}@{}", made.number);
            let mut texts = Vec::new();
            for prompt in PROMPTS {
                texts.push(client.text(&reference, prompt, NEW).await);
            }
            known.insert(made.id, texts);
        }
    }
    let distinct: BTreeSet<_> = known.values().collect();
    assert_eq!(distinct.len(), NAMES * VERSIONS, "every version must be told apart by what it says");
    known
}

/// What the clients have asked for so far, and whether they are to stop.
#[derive(Default)]
struct Load {
    requests: AtomicUsize,
    over: AtomicBool,
}

/// Generates until told to stop; the versions that it saw.
async fn generate(client: Client, seat: usize, known: Arc<Known>, load: Arc<Load>) -> BTreeSet<String> {
    let (mut requests, mut seen) = (0, BTreeSet::new());
    while !load.over.load(Ordering::Relaxed) {
        let name = format!("d{}", (requests + seat) % NAMES);
        let which = (requests / NAMES + seat) % PROMPTS.len();
        let said = client.generate(ask(&name, PROMPTS[which], NEW)).await.expect("no request fails");
        let by = said.finished.served_by.unwrap_or_default();
        assert_eq!(by.name, name);
        assert_eq!(known.get(&by.id).map(|texts| &texts[which]), Some(&said.text), "{name} version {}", by.number);
        seen.insert(by.id);
        requests += 1;
        load.requests.fetch_add(1, Ordering::Relaxed);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn in_1000_swaps_under_load_every_answer_is_that_of_the_version_that_it_names() {
    let mut world = World::new();
    // room for what the clients hold at once, not for all versions
    world.config.max_resident_bytes = world.delta_bytes() * (CLIENTS as u64 + 2);
    let running = world.start().await;
    let client = &running.client;
    let known = Arc::new(published(&world, client).await);
    let load = Arc::new(Load::default());
    let task = |i| tokio::spawn(generate(client.clone(), i, Arc::clone(&known), Arc::clone(&load)));
    let clients: Vec<_> = (0..CLIENTS).map(task).collect();
    let requests = || load.requests.load(Ordering::Relaxed);
    let (mut swap, until) = (0, Instant::now() + PATIENCE);
    // where swaps are fast and steps are slow, more of them, until it was a load
    while swap < SWAPS || (requests() < CLIENTS * 10 && Instant::now() < until) {
        let name = format!("d{}", swap % NAMES);
        let version = (swap / NAMES) % VERSIONS;
        if swap % 10 == 0 {
            let files = world.delta(((swap % NAMES) * VERSIONS + version) as u64 + 10);
            client.upload(&name, &files).await.expect("a re-publish");
        } else {
            client.promote(&name, &format!("{}", version + 1)).await.expect("a promotion");
        }
        swap += 1;
    }
    load.over.store(true, Ordering::Relaxed);
    let mut seen = BTreeSet::new();
    for task in clients {
        seen.extend(timely("a client ends", task).await.expect("no client fails"));
    }
    let residency = client.info().await.expect("info").residency.unwrap_or_default();
    println!("{swap} swaps, {} requests, {} versions seen, {residency:?}", requests(), seen.len());
    assert!(requests() >= CLIENTS * 10, "{} requests are no load", requests());
    assert!(seen.len() > NAMES, "versions were swapped while requests ran");
    assert!(residency.evictions > 0, "the budget was never felt");
    assert!(residency.bytes <= residency.budget_bytes, "{residency:?}");
    eventually("all leases end", async || {
        client.info().await.is_ok_and(|i| i.residency.unwrap_or_default().leased == 0)
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_keeps_its_version_while_the_next_request_has_the_new_one() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let v1 = client.upload("style", &world.delta(1)).await.expect("an upload");
    let alone = client.text("style", "once", 2000).await;
    let mut stream = client.stream(ask("style", "once", 2000)).await.expect("a stream");
    let first = stream.message().await.expect("a message").expect("a token");
    let v2 = client.upload("style", &world.delta(2)).await.expect("an upload");
    assert_eq!((v1.number, v2.number), (1, 2));
    let next = client.generate(ask("style", "once", 20)).await.expect("a stream");
    assert_eq!(next.finished.served_by.unwrap_or_default().id, v2.id);
    assert!(!alone.starts_with(&next.text));

    let mut said = Said::default();
    if let Some(proto::generate_response::Event::Delta(d)) = first.event {
        said.text = d.text;
        said.ids = d.token_ids;
    }
    let said = timely("the stream ends", finish(said, stream)).await.expect("the stream goes on");
    assert_eq!(said.finished.served_by.unwrap_or_default().id, v1.id);
    assert!(said.text == alone, "the whole stream is version 1's");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_served_by_one_version_though_its_name_moves_meanwhile() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let v1 = client.upload("style", &world.delta(1)).await.expect("an upload");
    // more than run at a time, for long enough that the name moves meanwhile
    let prompts = (0..40).map(|i| prompt(&format!("once {i}"))).collect();
    let options = Some(options(1_500));
    let request = proto::GenerateBatchRequest { delta: "style".into(), prompts, options, ..Default::default() };
    let batch = tokio::spawn({
        let client = client.clone();
        async move { client.batch(request).await }
    });
    eventually("it has begun", async || client.running().await > 0).await;
    let v2 = client.upload("style", &world.delta(2)).await.expect("an upload");
    assert!(v2.id != v1.id && !batch.is_finished(), "the name moved too late");
    let reply = batch.await.expect("no panic").expect("a batch");
    assert_eq!(reply.generations.len(), 40);
    for g in &reply.generations {
        assert_eq!(g.served_by.clone().unwrap_or_default().id, v1.id, "prompt {}", g.prompt_index);
    }
    running.stop().await;
}
