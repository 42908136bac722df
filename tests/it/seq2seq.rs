//! Encoder-decoders over gRPC: every call, mixed batches, and what such a base cannot do.

use candle_core::{Device, Tensor};
use deltaserve::{
    delta::{
        Delta, DeltaBatch, DeltaFiles, DeltaSpec, Patch, Prefix, PrefixForm, Prompt, PromptStage, Site, Stack, Task,
    },
    grpc::proto,
    interop::{self, EncodeMeta},
    model::{
        Input, Source,
        testing::{Rng, tiny_t5},
    },
    nn::Cx,
    rows::RowLayout,
    text::TextModel,
};
use serde_json::Value;
use tonic::Code;

use crate::support::*;

/// Sentinels and byte tokens are all in the tests' tokenizer; the decoder starts with token 0.
fn t5() -> World {
    World::of(tiny_t5(), 7)
}

fn random(rng: &mut Rng, n: usize, width: usize) -> Tensor {
    let data: Vec<f32> = (0..n * width).map(|_| rng.normal()).collect();
    Tensor::from_vec(data, (n, width), &Device::Cpu).expect("a tensor")
}

fn files(world: &World, method: &str, patches: Vec<(usize, Patch)>) -> DeltaFiles {
    let spec = DeltaSpec {
        methods: vec![method.into()],
        task: Task::Seq2Seq,
        problem: Default::default(),
        labels: vec![],
        num_virtual_tokens: 0,
        parameters: 0,
        resident_bytes: 0,
    };
    interop::encode(&Delta::new(spec, patches, None), &world.base, &EncodeMeta::default()).expect("a delta is encoded")
}

/// A prompt of `n` rows ahead of the source.
fn prompt_of(world: &World, n: usize) -> DeltaFiles {
    let rows = random(&mut Rng(11), n, world.base.arch.hidden);
    let prompt = Prompt { rows, stage: PromptStage::Tokens, stack: Stack::Encoder };
    files(world, "prompt", vec![(world.base.sites.id(Site::Embedding).expect("a site"), Patch::Prompt(prompt))])
}

/// A prefix of `n` keys, which both layers share.
fn prefix_of(world: &World, n: usize) -> DeltaFiles {
    let (mut rng, width) = (Rng(12), world.base.arch.kv_width());
    let (k, v) = (random(&mut rng, n, width), random(&mut rng, n, width));
    let prefix = Prefix { k, v, form: PrefixForm::Context, stack: Stack::Main };
    let sites = world.base.sites.prefix_sites(Stack::Main);
    files(world, "prefix", sites.into_iter().map(|(site, _)| (site, Patch::Prefix(prefix.clone()))).collect())
}

/// A prefix of `n` keys in every attention.
fn everywhere(world: &World, n: usize) -> DeltaFiles {
    let (mut rng, width) = (Rng(13), world.base.arch.kv_width());
    let mut patches = Vec::new();
    for stack in [Stack::Main, Stack::Encoder, Stack::Memory] {
        for (site, _) in world.base.sites.prefix_sites(stack) {
            let (k, v) = (random(&mut rng, n, width), random(&mut rng, n, width));
            patches.push((site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Pinned, stack })));
        }
    }
    files(world, "prefix", patches)
}

fn without_start() -> World {
    let mut config = tiny_t5();
    config["decoder_start_token_id"] = Value::Null;
    config["pad_token_id"] = Value::Null;
    World::of(config, 7)
}

async fn embed(client: &Client, delta: &str, text: &str) -> Vec<f32> {
    let request = proto::EmbedRequest { delta: delta.into(), inputs: vec![text.into()], ..Default::default() };
    let reply = client.inference().embed(client.request(request)).await.expect("an embedding").into_inner();
    reply.embeddings[0].values.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn different_deltas_and_sources_in_one_batch_answer_as_if_alone() {
    let world = t5();
    let running = world.start().await;
    let client = &running.client;
    let mut deltas = vec![String::new()];
    for i in 0..3 {
        deltas.push(format!("d{i}"));
        client.upload(&deltas[i + 1], &world.delta(i as u64 + 20)).await.expect("an upload");
    }
    let positions =
        [("prompt", prompt_of(&world, 5)), ("prefix", prefix_of(&world, 3)), ("everywhere", everywhere(&world, 4))];
    for (name, files) in positions {
        client.upload(name, &files).await.expect("an upload");
        deltas.push(name.into());
    }
    let texts = ["a", "once upon a time there was", "The quick brown fox"];
    let pairs: Vec<(&String, &str)> = deltas.iter().flat_map(|d| texts.iter().map(move |t| (d, *t))).collect();
    let (mut said, mut vectors, mut scores) = (vec![], vec![], vec![]);
    for (delta, text) in &pairs {
        said.push(client.text(delta, text, 40).await);
        vectors.push(embed(client, delta, text).await);
        scores.push(score(client, delta, scored(text, "a fine thing")).await.expect("a score"));
    }
    let distinct: std::collections::BTreeSet<&String> = said.iter().collect();
    assert!(distinct.len() > 2, "deltas and sources change what is said: {distinct:?}");
    let generate = futures::future::join_all(pairs.iter().map(|(d, t)| client.text(d, t, 40)));
    let embeds = futures::future::join_all(pairs.iter().map(|(d, t)| embed(client, d, t)));
    let all = pairs.iter().map(|(d, t)| score(client, d, scored(t, "a fine thing")));
    let (together, embedded, likely) =
        timely("all end", async { tokio::join!(generate, embeds, futures::future::join_all(all)) }).await;
    assert_eq!(together, said);
    for (got, want) in embedded.iter().zip(&vectors) {
        assert_eq!(got.len(), world.base.arch.hidden);
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4));
        assert!((got.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4, "unit length");
    }
    for (got, want) in likely.into_iter().zip(&scores) {
        assert!((got.expect("a score") - want).abs() < 1e-3);
    }
    running.stop().await;
}

/// Log-probabilities of output tokens behind a source, by one plain forward.
fn likelihoods(world: &World, source: &[u32], output: &[u32]) -> Vec<f32> {
    let base = &world.base;
    let read = Source::encode(base, RowLayout::packed(&[source.len()]), source, &[None], None).expect("encodes");
    let (memory, none) = (read.memory(), DeltaBatch::none());
    let tokens = [&[0], output].concat();
    let rows = RowLayout::packed(&[tokens.len()]);
    let cx = Cx { memory: Some(&memory), ..Cx::new(&rows, &none) };
    let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("runs");
    let pick: Vec<u32> = (0..output.len() as u32).collect();
    let nll = base.transformer.nll(&hidden, &pick, output, &cx).and_then(|t| t.to_vec1::<f32>()).expect("a head");
    nll.into_iter().map(|x| -x).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_and_generated_tokens_have_the_likelihood_that_the_model_gives_them() {
    let world = t5();
    let text = TextModel::open(world.config.base.source.as_ref()).expect("a tokenizer");
    let ids = |of: &str| text.encode_user(of, true).expect("ids");
    let running = world.start().await;
    let inputs = vec![scored("hello there", "a fine thing"), scored("hello there", "z")];
    let request = proto::ScoreRequest { inputs, ..Default::default() };
    let reply = running.client.inference().score(running.client.request(request)).await.expect("scores").into_inner();
    for (result, completion) in reply.results.iter().zip(["a fine thing", "z"]) {
        let want = likelihoods(&world, &ids("hello there"), &ids(completion));
        let got: Vec<(u32, f32)> = result.tokens.iter().map(|t| (t.id, t.logprob)).collect();
        assert_eq!(got.iter().map(|t| t.0).collect::<Vec<_>>(), ids(completion));
        assert!(got.iter().zip(&want).all(|((_, a), b)| (a - b).abs() < 1e-4), "{got:?} {want:?}");
        let sum: f64 = want.iter().map(|x| f64::from(*x)).sum();
        assert!((result.log_likelihood - sum).abs() < 1e-3, "{} {sum}", result.log_likelihood);
    }
    let mut request = ask("", "hello there", 6);
    request.options.as_mut().expect("options").logprobs = Some(0);
    let mut stream = running.client.stream(request).await.expect("a stream");
    let (mut said, mut likely) = (vec![], vec![]);
    while let Some(response) = stream.message().await.expect("a message") {
        if let Some(proto::generate_response::Event::Delta(d)) = response.event {
            said.extend(d.token_ids);
            likely.extend(d.logprobs.iter().map(|l| l.token.as_ref().map_or(0.0, |t| t.logprob)));
        }
    }
    let want = likelihoods(&world, &ids("hello there"), &said);
    assert_eq!((said.len(), likely.len()), (6, 6));
    assert!(likely.iter().zip(&want).all(|(a, b): (&f32, &f32)| (a - b).abs() < 1e-4), "{likely:?} {want:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_such_a_base_cannot_do_is_said_up_front() {
    let world = t5();
    let running = world.start().await;
    let client = &running.client;
    let refused = client.classify("", &["a text"]).await.expect_err("no head");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    let refused = client.upload("head", &world.classifier(3, &["a", "b"])).await.expect_err("no such head");
    assert!(matches!(refused.code(), Code::InvalidArgument | Code::FailedPrecondition), "{refused:?}");
    let empty = score(client, "", scored("", "x")).await.expect_err("nothing to encode");
    expect_invalid(&empty, "inputs[0]", &["empty prompt"]);
    let steps = client.info().await.expect("info").load.unwrap_or_default();
    assert_eq!(steps.running, 0);
    running.stop().await;
    let world = without_start();
    let running = world.start().await;
    let client = &running.client;
    let no_start = [
        client.generate(ask("", "x", 2)).await.expect_err("no start"),
        score(client, "", scored("x", "y")).await.expect_err("no start"),
    ];
    for status in no_start {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        assert!(status.message().contains("decoder_start_token_id"), "{status:?}");
    }
    running.stop().await;
}
