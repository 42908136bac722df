//! Speculative decoding over the wire: the same texts, ends and counts with and without, by request and by the server's default.

use deltaserve::grpc::proto;
use proto::generate_options::Constraint;

use crate::support::*;

const TEXT: &str = "the cat sat on the mat and the cat sat on the mat and the cat sat on";

fn speculating(request: &proto::GenerateRequest, tokens: u32) -> proto::GenerateRequest {
    let mut request = request.clone();
    let how = proto::NgramSpeculation { num_speculative_tokens: Some(tokens), ..Default::default() };
    request.options.get_or_insert_default().speculative_ngram = Some(how);
    request
}

/// Drafts, those that were right, and all other counts.
fn counts(said: &Said) -> (u32, u32, proto::Usage) {
    let usage = said.finished.usage.unwrap_or_default();
    let others = proto::Usage { drafted_tokens: 0, accepted_tokens: 0, cached_tokens: 0, ..usage };
    (usage.drafted_tokens, usage.accepted_tokens, others)
}

/// Greedy, sampled, with a stop text, and one that can hardly but repeat itself.
fn requests(stop: &str) -> Vec<proto::GenerateRequest> {
    let sampling = proto::Sampling { temperature: Some(0.8), seed: Some(7), ..Default::default() };
    let of = |delta: &str, options| proto::GenerateRequest { options: Some(options), ..ask(delta, TEXT, 40) };
    vec![
        ask("", TEXT, 40),
        ask("style", TEXT, 40),
        of("style", proto::GenerateOptions { sampling: Some(sampling), n: Some(1), ..options(40) }),
        of("", proto::GenerateOptions { stop: vec![stop.to_owned()], ..options(40) }),
        of(
            "",
            proto::GenerateOptions {
                constraint: Some(Constraint::Regex("[ab]{36}".into())),
                ignore_eos: false,
                ..options(40)
            },
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_ends_and_counts_are_the_same_with_and_without() {
    let mut world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let whole = client.generate(ask("", TEXT, 40)).await.expect("a stream").text;
    let stop: String = whole.chars().skip(12).take(2).collect();
    let mut plain = Vec::new();
    for request in requests(&stop) {
        let said = client.generate(request).await.expect("a stream");
        assert_eq!((counts(&said).0, counts(&said).1), (0, 0));
        plain.push(said);
    }
    let together = requests(&stop).into_iter().map(|request| client.generate(speculating(&request, 6)));
    let mut last = (0, 0);
    for (said, plain) in futures::future::join_all(together).await.into_iter().zip(&plain) {
        let said = said.expect("a stream");
        assert_eq!((&said.text, &said.ids, said.finished.reason()), (&plain.text, &plain.ids, plain.finished.reason()));
        assert_eq!(counts(&said).2, counts(plain).2);
        last = (counts(&said).0, counts(&said).1);
    }
    assert!(last.1 > 0 && last.0 >= last.1, "{last:?}: what repeats is guessed");
    let request = speculating(&ask("", TEXT, 4), 17);
    let refused = client.generate(request).await.expect_err("too many");
    expect_invalid(&refused, "options.speculative_ngram.num_speculative_tokens", &["17", "0 to 16"]);
    running.stop().await;

    world.config.engine.speculative_ngram = 4;
    let running = world.start().await;
    let client = &running.client;
    let repeats = requests(&stop).pop().expect("the constrained one");
    let said = client.generate(repeats.clone()).await.expect("a stream");
    assert_eq!(Some(&said.text), plain.last().map(|said| &said.text));
    assert!(counts(&said).1 > 0, "the server's default");
    let said = client.generate(speculating(&repeats, 0)).await.expect("a stream");
    assert_eq!((counts(&said).0, counts(&said).1), (0, 0), "a request may want none");
    running.stop().await;
}
