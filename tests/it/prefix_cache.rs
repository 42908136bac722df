//! Cached beginnings of prompts: usage says what was found, and only the same tenant's requests of the same version find it.

use deltaserve::grpc::proto;

use crate::support::*;

/// 48 tokens, one a letter, of which three whole pages could be cached; the last token is always computed.
const BEGINNING: &str = "once upon a time there was a fox who lived alone";

fn cached(said: &Said) -> u32 {
    said.finished.usage.unwrap_or_default().cached_tokens
}

async fn say(client: &Client, delta: &str, text: &str) -> Said {
    client.generate(ask(delta, text, 12)).await.expect("a stream")
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_says_what_was_cached_for_this_tenant_and_version_and_the_answer_is_the_same() {
    let mut world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let longer = format!("{BEGINNING} in the wood");
    let first = say(client, "style", BEGINNING).await;
    let usage = first.finished.usage.unwrap_or_default();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (48, 0));
    let again = say(client, "style", BEGINNING).await;
    assert_eq!((cached(&again), &again.text), (32, &first.text));
    let behind = say(client, "style", &longer).await;
    assert_eq!(cached(&behind), 48);

    // what was said may be a part of the next prompt
    let next = format!("{BEGINNING}{}", first.text);
    assert!(cached(&say(client, "style", &next).await) >= 48);

    // neither the base nor another tenant knows of it, with the same files under the same name
    assert_eq!(cached(&say(client, "", BEGINNING).await), 0);
    let other = client.tenant("other");
    assert_eq!(cached(&say(&other, "", BEGINNING).await), 0);
    other.upload("style", &world.delta(1)).await.expect("an upload");
    let theirs = say(&other, "style", BEGINNING).await;
    assert_eq!((cached(&theirs), &theirs.text), (0, &first.text));

    // a new version of the name sees nothing of the old one, and the old one is as it was
    client.upload("style", &world.delta(2)).await.expect("an upload");
    let new = say(client, "style", BEGINNING).await;
    assert_eq!((cached(&new), new.finished.served_by.clone().map(|by| by.number)), (0, Some(2)));
    assert_ne!(new.text, first.text);
    let old = say(client, "style@1", BEGINNING).await;
    assert_eq!((cached(&old), &old.text), (32, &first.text));

    // however a continuation ends, and in a batch, where a prompt counts once
    let stop: String = first.text.chars().skip(4).take(2).collect();
    let mut request = ask("style@1", BEGINNING, 12);
    request.options = Some(proto::GenerateOptions { stop: vec![stop], ..options(12) });
    let stopped = client.generate(request).await.expect("a stream");
    assert_eq!((stopped.finished.reason(), cached(&stopped)), (proto::FinishReason::StopText, 32));
    let mut request = ask("style@1", BEGINNING, 12);
    request.options = Some(proto::GenerateOptions { num_beams: Some(3), ..options(12) });
    assert_eq!(cached(&client.generate(request).await.expect("a stream")), 32);
    let sampling = Some(proto::Sampling { temperature: Some(1.0), seed: Some(1), ..Default::default() });
    let request = proto::GenerateBatchRequest {
        delta: "style@1".into(),
        prompts: vec![prompt(BEGINNING), prompt(&longer)],
        options: Some(proto::GenerateOptions { n: Some(2), sampling, ..options(6) }),
        deltas: vec![],
    };
    let batch = client.batch(request).await.expect("a batch");
    let usage = batch.usage.unwrap_or_default();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (48 + 60, 32 + 48));
    let told: Vec<u32> = batch.generations.iter().map(|g| g.usage.unwrap_or_default().cached_tokens).collect();
    assert_eq!(told, [32, 32, 48, 48]);
    running.stop().await;

    // the same without a cache
    world.config.engine.prefix_cache = false;
    let running = world.start().await;
    let client = &running.client;
    for (delta, text, before) in
        [("style@1", BEGINNING, &again), ("style@1", &longer, &behind), ("style@2", BEGINNING, &new)]
    {
        for said in [say(client, delta, text).await, say(client, delta, text).await] {
            assert_eq!((cached(&said), &said.text), (0, &before.text));
        }
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_need_all_rows_tell_of_nothing_cached_and_find_the_same() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let score = || {
        let input = proto::ScoreInput { prompt: String::new(), completion: BEGINNING.into() };
        let request = proto::ScoreRequest { inputs: vec![input], ..Default::default() };
        async { client.inference().score(client.request(request)).await.expect("scores").into_inner() }
    };
    let before = score().await;
    say(client, "", BEGINNING).await;
    assert_eq!(cached(&say(client, "", BEGINNING).await), 32, "it is there");
    let after = score().await;
    assert_eq!(after.usage.map(|u| (u.prompt_tokens, u.cached_tokens)), Some((48, 0)));
    let sum = |reply: &proto::ScoreResponse| reply.results.iter().map(|r| r.log_likelihood).sum::<f64>();
    assert!((sum(&before) - sum(&after)).abs() < 1e-3, "{} {}", sum(&before), sum(&after));
    running.stop().await;
}
