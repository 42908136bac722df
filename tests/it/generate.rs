//! Generate and its forms: what streams, what the final message says, what sampling promises.

use deltaserve::grpc::proto;
use futures::StreamExt as _;

use crate::support::*;

fn sampled(seed: u64) -> proto::Sampling {
    proto::Sampling { temperature: Some(1.0), seed: Some(seed), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_its_tokens_then_one_final_message_that_accounts_for_them() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let made = client.upload("style", &world.delta(1)).await.expect("an upload");
    let said = client.generate(ask("style", "once upon", 24)).await.expect("a stream");
    assert_eq!(said.ids.len(), 24);
    assert!(said.pieces >= 24, "{} pieces: one message per token at least", said.pieces);
    let end = &said.finished;
    assert_eq!(end.reason(), proto::FinishReason::Length);
    assert_eq!(end.usage, Some(proto::Usage { prompt_tokens: 9, completion_tokens: 24, ..Default::default() }));
    let by = end.served_by.clone().unwrap_or_default();
    assert_eq!((by.name.as_str(), by.number, &by.id), ("style", 1, &made.id));
    let t = end.timings.unwrap_or_default();
    assert!(t.prefill_ms > 0.0 && t.decode_ms > 0.0 && t.queue_ms >= 0.0, "{t:?}");

    let base = client.generate(ask("", "once upon", 24)).await.expect("a stream");
    let by = base.finished.served_by.unwrap_or_default();
    assert_eq!((by.name.as_str(), by.number, by.id.as_str()), ("", 0, ""), "the base serves under no name");
    assert_ne!(base.ids, said.ids, "the delta changes the answer, or the tests here show nothing");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_equals_its_streams_and_greedy_is_deterministic() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let texts = ["once upon", "a", "The quick brown fox jumps over the lazy dog."];
    let mut alone = Vec::new();
    for text in texts {
        let (first, second) = (client.text("style", text, 20).await, client.text("style", text, 20).await);
        assert_eq!(first, second);
        alone.push(first);
    }
    let prompts = texts.iter().map(|t| prompt(t)).collect();
    let request =
        proto::GenerateBatchRequest { delta: "style".into(), prompts, options: Some(options(20)), deltas: vec![] };
    let batch = client.batch(request).await.expect("a batch");
    let together: Vec<String> = batch.generations.iter().map(|g| g.text.clone()).collect();
    assert_eq!(together, alone);
    assert!(batch.generations.iter().zip(0..).all(|(g, i)| g.prompt_index == i && g.index == 0));
    assert_eq!(batch.usage.unwrap_or_default().completion_tokens, 60);
    assert_eq!(batch.served_by.unwrap_or_default().name, "style");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn n_continuations_are_those_of_consecutive_seeds() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let of = |seed, n| proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: vec![prompt("hello")],
        options: Some(proto::GenerateOptions { sampling: Some(sampled(seed)), n: Some(n), ..options(16) }),
        deltas: vec![],
    };
    let three = client.batch(of(40, 3)).await.expect("a batch").generations;
    assert_eq!(three.iter().map(|g| (g.index, g.seed)).collect::<Vec<_>>(), [(0, 40), (1, 41), (2, 42)]);
    for each in &three {
        let alone = client.batch(of(each.seed, 1)).await.expect("a batch").generations;
        assert_eq!(alone[0].token_ids, each.token_ids, "seed {}", each.seed);
    }
    assert!(three[0].token_ids != three[1].token_ids, "other seeds, other samples");

    let request = proto::GenerateRequest {
        delta: String::new(),
        prompt: Some(prompt("hello")),
        options: Some(proto::GenerateOptions { sampling: Some(sampled(40)), n: Some(3), ..options(16) }),
        ..Default::default()
    };
    let mut stream = client.stream(request).await.expect("a stream");
    let (mut ids, mut ends) = (vec![Vec::new(); 3], 0);
    while let Some(response) = stream.next().await {
        match response.expect("a message").event {
            Some(proto::generate_response::Event::Delta(d)) => ids[d.index as usize].extend(d.token_ids),
            Some(proto::generate_response::Event::Finished(_)) => ends += 1,
            None => panic!("an empty message"),
        }
    }
    assert_eq!(ends, 3, "each continuation has its own final message");
    assert_eq!(ids, three.iter().map(|g| g.token_ids.clone()).collect::<Vec<_>>());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_ends_the_answer_before_it_and_a_stop_token_ends_it_too() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let whole = client.generate(ask("", "once upon", 40)).await.expect("a stream");
    let chars: Vec<char> = whole.text.chars().collect();
    let stop: String = chars[10..13].iter().collect();
    let mut request = ask("", "once upon", 40);
    request.options = Some(proto::GenerateOptions { stop: vec![stop.clone()], ..options(40) });
    let cut = client.generate(request).await.expect("a stream");
    let before = whole.text.split(stop.as_str()).next().unwrap_or_default();
    assert_eq!(cut.text, before);
    assert_eq!(cut.finished.reason(), proto::FinishReason::StopText);

    let token = whole.ids[5];
    let first = whole.ids.iter().position(|id| *id == token).unwrap_or(5);
    let mut request = ask("", "once upon", 40);
    request.options = Some(proto::GenerateOptions { stop_tokens: vec![token], ..options(40) });
    let cut = client.generate(request).await.expect("a stream");
    assert_eq!(cut.finished.reason(), proto::FinishReason::StopToken);
    assert!(cut.ids.len() <= first + 1 && whole.ids.starts_with(&cut.ids[..first]), "{:?} of {:?}", cut.ids, whole.ids);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_are_of_the_tokens_and_greedy_takes_the_top_one() {
    let world = World::new();
    let running = world.start().await;
    let request = proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: vec![prompt("once")],
        options: Some(proto::GenerateOptions { logprobs: Some(4), ..options(12) }),
        deltas: vec![],
    };
    let made = running.client.batch(request).await.expect("a batch").generations.remove(0);
    assert_eq!(made.logprobs.len(), 12);
    for (entry, id) in made.logprobs.iter().zip(&made.token_ids) {
        let token = entry.token.clone().unwrap_or_default();
        assert_eq!((token.id, entry.top.len()), (*id, 4));
        assert_eq!(entry.top[0].id, *id, "greedy takes the most likely");
        assert!(token.logprob < 0.0 && (entry.top[0].logprob - token.logprob).abs() < 1e-4);
        assert!(entry.top.windows(2).all(|w| w[0].logprob >= w[1].logprob), "best first");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_inference_calls_answer_and_say_who_served_them() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("topic", &world.classifier(3, &["news", "sport", "music"])).await.expect("an upload");
    let reply = client.classify("topic", &["a text", "another"]).await.expect("labels");
    assert_eq!(reply.results.len(), 2);
    for result in &reply.results {
        let sum: f32 = result.labels.iter().map(|l| l.probability).sum();
        assert!((sum - 1.0).abs() < 1e-4 && result.labels.len() == 3);
    }
    assert_eq!(reply.served_by.unwrap_or_default().name, "topic");

    let mut inference = client.inference();
    let embed = proto::EmbedRequest { inputs: vec!["a text".into(), "b".into()], ..Default::default() };
    let embedded = inference.embed(client.request(embed)).await.expect("vectors").into_inner();
    assert_eq!(embedded.embeddings.len(), 2);
    let length: f32 = embedded.embeddings[0].values.iter().map(|v| v * v).sum();
    assert!((length - 1.0).abs() < 1e-4, "normalised by default: {length}");

    let input = proto::ScoreInput { prompt: "once".into(), completion: " upon".into() };
    let score = proto::ScoreRequest { inputs: vec![input], ..Default::default() };
    let scored = inference.score(client.request(score)).await.expect("a score").into_inner().results.remove(0);
    assert_eq!(scored.tokens.len(), 5);
    let sum: f64 = scored.tokens.iter().map(|t| f64::from(t.logprob)).sum();
    assert!((sum - scored.log_likelihood).abs() < 1e-3 && sum < 0.0);

    let tokenize = proto::TokenizeRequest { text: "ab c".into(), add_special_tokens: None };
    let tokens = inference.tokenize(client.request(tokenize)).await.expect("tokens").into_inner();
    assert_eq!((tokens.ids.len(), tokens.tokens.len()), (4, 4));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_run_of_tokens_comes_twice_where_that_is_asked_for() {
    let world = World::new();
    let running = world.start().await;
    let twice = |ids: &[u32]| {
        let pairs: Vec<&[u32]> = ids.windows(2).collect();
        (1..pairs.len()).any(|i| pairs[..i].contains(&pairs[i]))
    };
    let mut request = ask("", "once upon", 200);
    assert!(twice(&running.client.generate(request.clone()).await.expect("a stream").ids), "it repeats itself");
    let sampling = proto::Sampling { no_repeat_ngram_size: Some(2), ..Default::default() };
    request.options.as_mut().expect("options").sampling = Some(sampling);
    let ids = running.client.generate(request).await.expect("a stream").ids;
    assert!(ids.len() == 200 && !twice(&ids));
    running.stop().await;
}

/// The outputs of a search come best first, with scores that are those of Score, from Generate and GenerateBatch alike.
#[tokio::test(flavor = "multi_thread")]
async fn a_beam_search_gives_its_best_outputs_with_their_scores() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let search =
        |n: u32| proto::GenerateOptions { num_beams: Some(4), length_penalty: Some(0.5), n: Some(n), ..options(12) };
    let ask = |prompts: &[&str], n| proto::GenerateBatchRequest {
        delta: "style".into(),
        prompts: prompts.iter().map(|p| prompt(p)).collect(),
        options: Some(search(n)),
        deltas: vec![],
    };
    let all = client.batch(ask(&["once upon", "a"], 4)).await.expect("a batch").generations;
    assert_eq!(all.iter().map(|g| (g.prompt_index, g.index)).collect::<Vec<_>>()[3..5], [(0, 3), (1, 0)]);
    for of_prompt in all.chunks(4) {
        let scores: Vec<f32> = of_prompt.iter().map(|g| g.score.expect("a score")).collect();
        assert!(scores.windows(2).all(|w| w[0] >= w[1]), "{scores:?}");
        assert!(of_prompt.iter().all(|g| g.token_ids.len() == 12 && g.reason() == proto::FinishReason::Length));
    }
    let best = &all[0];
    let greedy = proto::GenerateBatchRequest {
        options: Some(proto::GenerateOptions { logprobs: Some(0), ..options(12) }),
        ..ask(&["once upon"], 1)
    };
    let greedy = client.batch(greedy).await.expect("a batch").generations.remove(0);
    let sum: f32 = greedy.logprobs.iter().filter_map(|t| t.token.as_ref()).map(|t| t.logprob).sum();
    assert!(best.score.unwrap_or_default() >= sum / 12f32.sqrt() - 1e-3, "{sum} {best:?}");
    let request = proto::GenerateRequest {
        delta: "style".into(),
        prompt: Some(prompt("once upon")),
        options: Some(search(1)),
        deltas: vec![],
    };
    let said = client.generate(request).await.expect("a stream");
    assert_eq!((said.text, said.ids, said.pieces), (best.text.clone(), best.token_ids.clone(), 1));
    assert_eq!(said.finished.score, best.score);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_go_with_beams_is_refused_by_field() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |options: proto::GenerateOptions| {
        let request = proto::GenerateRequest { options: Some(options), ..ask("", "once upon", 4) };
        client.generate(request).await.expect_err("refused")
    };
    let beams = |n| proto::GenerateOptions { num_beams: Some(n), ..options(4) };
    expect_invalid(&refused(beams(0)).await, "options.num_beams", &["1 to 16"]);
    expect_invalid(&refused(beams(17)).await, "options.num_beams", &["1 to 16"]);
    let of = proto::GenerateOptions { n: Some(3), ..beams(2) };
    expect_invalid(&refused(of).await, "options.n", &["2 beams"]);
    let of = proto::GenerateOptions { length_penalty: Some(f32::NAN), ..beams(2) };
    expect_invalid(&refused(of).await, "options.length_penalty", &["10"]);
    let of = proto::GenerateOptions { sampling: Some(sampled(1)), ..beams(2) };
    expect_invalid(&refused(of).await, "options.sampling", &["num_beams"]);
    let of = proto::GenerateOptions { stop: vec!["x".into()], logprobs: Some(1), ..beams(2) };
    expect_invalid(&refused(of).await, "options.logprobs", &["num_beams"]);
    let of = proto::GenerateOptions { length_penalty: Some(2.0), ..options(4) };
    expect_invalid(&refused(of).await, "options.length_penalty", &["num_beams"]);
    let of = proto::GenerateOptions { early_stopping: 9, ..beams(2) };
    expect_invalid(&refused(of).await, "options.early_stopping", &["9"]);
    running.stop().await;
}
