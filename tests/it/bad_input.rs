//! Bad input: each kind has its code, its reason and its field, and the server answers afterwards.

use std::{fs, path::Path};

use bytes::Bytes;
use deltaserve::{
    delta::DeltaFiles,
    grpc::proto,
    model::testing::{tiny_gpt2, tiny_llama},
};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::support::*;

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

async fn still_answers(client: &Client) {
    assert_eq!(client.generate(ask("", "hello", 4)).await.expect("it still answers").ids.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_delta_is_not_found_and_never_the_base() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let not_found = (Code::NotFound, "DELTA_NOT_FOUND".to_owned());
    assert_eq!(kind(&client.generate(ask("nobody", "x", 1)).await.expect_err("unknown")), not_found);
    assert_eq!(kind(&client.classify("nobody", &["x"]).await.expect_err("unknown")), not_found);
    client.upload("style", &world.delta(1)).await.expect("an upload");
    for reference in ["style@9", "style@0123456789abcdef"] {
        assert_eq!(kind(&client.generate(ask(reference, "x", 1)).await.expect_err("unknown")), not_found);
    }
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_of_another_base_is_refused_naming_both() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    // the same shape, other weights: only the fingerprint tells
    let twin = World::of(tiny_llama(), 8);
    let error = client.upload("twin", &twin.delta(1)).await.expect_err("another base");
    assert_eq!(kind(&error), (Code::FailedPrecondition, "BASE_MISMATCH".into()));
    for fingerprint in [world.base.fingerprint, twin.base.fingerprint] {
        assert!(error.message().contains(&fingerprint.to_string()[..12]), "{}", error.message());
    }
    // another shape, another family
    for other in [
        World::of(
            {
                let mut c = tiny_llama();
                c["hidden_size"] = json!(64);
                c
            },
            7,
        ),
        World::of(tiny_gpt2(), 7),
    ] {
        let error = client.upload("other", &other.delta(1)).await.expect_err("another base");
        assert_eq!(kind(&error), (Code::FailedPrecondition, "BASE_MISMATCH".into()));
    }
    assert!(client.list().await.is_empty());
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_out_of_range_are_refused_by_field_with_the_limit() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |request| client.generate(request).await.expect_err("refused");

    let error = refused(ask("", "0123456789", 250)).await;
    expect_invalid(&error, "max_new_tokens", &["10", "250", "260", "256"]);
    expect_invalid(&refused(ask("", &"x".repeat(1000), 10)).await, "max_new_tokens", &["1000", "256"]);
    expect_invalid(&refused(ask("", "", 4)).await, "prompt", &["empty"]);
    expect_invalid(&refused(proto::GenerateRequest { prompt: None, ..ask("", "", 4) }).await, "prompt", &[]);
    let ids = |ids: Vec<u32>| proto::GenerateRequest {
        prompt: Some(proto::Prompt { prompt: Some(proto::prompt::Prompt::Tokens(proto::TokenIds { ids })) }),
        ..ask("", "", 4)
    };
    expect_invalid(&refused(ids(vec![])).await, "prompt.tokens", &["empty"]);
    expect_invalid(&refused(ids(vec![3, 128])).await, "prompt.tokens", &["128"]);
    expect_invalid(&refused(ask("", "x", 0)).await, "max_new_tokens", &["0", "1"]);
    expect_invalid(&refused(ask("", "x", u32::MAX)).await, "max_new_tokens", &["256"]);

    let of = |sampling| proto::GenerateRequest {
        options: Some(proto::GenerateOptions { sampling: Some(sampling), ..options(4) }),
        ..ask("", "x", 4)
    };
    let none = proto::Sampling::default;
    for (field, sampling) in [
        ("temperature", proto::Sampling { temperature: Some(f32::NAN), ..none() }),
        ("temperature", proto::Sampling { temperature: Some(-0.5), ..none() }),
        ("temperature", proto::Sampling { temperature: Some(f32::INFINITY), ..none() }),
        ("top_p", proto::Sampling { top_p: Some(0.0), ..none() }),
        ("top_p", proto::Sampling { top_p: Some(f32::NAN), ..none() }),
        ("min_p", proto::Sampling { min_p: Some(-1.0), ..none() }),
        ("repetition_penalty", proto::Sampling { repetition_penalty: Some(-1.0), ..none() }),
        ("frequency_penalty", proto::Sampling { frequency_penalty: Some(f32::NAN), ..none() }),
        ("presence_penalty", proto::Sampling { presence_penalty: Some(9.0), ..none() }),
        ("no_repeat_ngram_size", proto::Sampling { no_repeat_ngram_size: Some(1000), ..none() }),
    ] {
        expect_invalid(&refused(of(sampling)).await, &format!("options.sampling.{field}"), &["accepted"]);
    }
    let two = proto::Sampling { temperature: Some(f32::NAN), top_p: Some(2.0), ..none() };
    let error = refused(of(two)).await;
    expect_invalid(&error, "temperature", &[]);
    expect_invalid(&error, "top_p", &["1"]);

    let with = |options| proto::GenerateRequest { options: Some(options), ..ask("", "x", 4) };
    expect_invalid(&refused(with(proto::GenerateOptions { n: Some(0), ..options(4) })).await, "options.n", &["16"]);
    expect_invalid(
        &refused(with(proto::GenerateOptions { n: Some(1_000_000), ..options(4) })).await,
        "options.n",
        &["16"],
    );
    let stop = vec![String::new()];
    expect_invalid(&refused(with(proto::GenerateOptions { stop, ..options(4) })).await, "options.stop[0]", &["1"]);
    let stop = vec!["x".to_owned(); 10_000];
    expect_invalid(&refused(with(proto::GenerateOptions { stop, ..options(4) })).await, "options.stop", &["16"]);
    let batch = proto::GenerateBatchRequest::default();
    expect_invalid(&client.batch(batch).await.expect_err("no prompts"), "prompts", &[]);
    expect_invalid(&client.classify("", &[]).await.expect_err("no inputs"), "inputs", &["0"]);
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_paths_or_unprintable_are_refused_everywhere() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let files = world.delta(1);
    let long = "x".repeat(129);
    for name in ["a/b", "..", "../x", ".hidden", "a\\b", "a\nb", "a\u{0}b", "\u{7f}", "a b", "ａ", "%2e%2e", "", &long]
    {
        expect_invalid(&client.upload(name, &files).await.expect_err(name), "name", &[]);
        let error = client.create_job(spec(name, proto::Task::CausalLm, stories(4), 1), "").await.expect_err(name);
        expect_invalid(&error, "output_name", &[]);
        if !name.is_empty() {
            let error = client.generate(ask(name, "x", 1)).await.expect_err(name);
            assert_eq!(error.code(), Code::InvalidArgument, "{name:?}: {error:?}");
            assert_eq!(client.delta(name).await.expect_err(name).code(), Code::InvalidArgument, "{name:?}");
        }
    }
    let mut odd = files.clone();
    odd.files.insert("../../escape".into(), Bytes::from_static(b"x"));
    expect_invalid(&client.upload("ok", &odd).await.expect_err("a path"), "chunk.file", &[]);
    let stranger = client.tenant("../x");
    expect_invalid(&stranger.generate(ask("", "x", 1)).await.expect_err("a path"), "x-deltaserve-tenant", &[]);
    assert!(client.list().await.is_empty() && client.jobs().await.is_empty());
    still_answers(client).await;
    running.stop().await;
}

/// The files with one of them changed.
fn with(files: &DeltaFiles, name: &str, data: Vec<u8>) -> DeltaFiles {
    let mut files = files.clone();
    files.files.insert(name.into(), data.into());
    files
}

/// A safetensors file from a header and zeros.
fn tensors(header: &serde_json::Value, bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.resize(out.len() + bytes, 0);
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_torn_or_contradict_themselves_are_refused_by_name() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let good = world.delta(1);
    let weights = good.files[WEIGHTS].to_vec();
    let refused = async |files: &DeltaFiles, field: &str, words: &[&str]| {
        expect_invalid(&client.upload("bad", files).await.expect_err("refused"), field, words);
    };
    for cut in [0, 4, 8, 100, weights.len() / 2, weights.len() - 1] {
        refused(&with(&good, WEIGHTS, weights[..cut].to_vec()), WEIGHTS, &[]).await;
    }
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    refused(&with(&good, WEIGHTS, huge), WEIGHTS, &[]).await;

    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let (a, b) = (format!("{q}.lora_A.weight"), format!("{q}.lora_B.weight"));
    let f32s =
        |shape: [usize; 2], from: usize, to: usize| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    let config =
        json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]});
    let small = with(&good, CONFIG, config.to_string().into_bytes());
    let whole = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 4], 512, 1024)});
    client
        .upload("control", &with(&small, WEIGHTS, tensors(&whole, 1024)))
        .await
        .expect("the well-formed one is taken");
    let overlapping = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 4], 256, 768)});
    refused(&with(&small, WEIGHTS, tensors(&overlapping, 768)), WEIGHTS, &[]).await;
    let gapped = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 4], 600, 1112)});
    refused(&with(&small, WEIGHTS, tensors(&gapped, 1112)), WEIGHTS, &[]).await;
    let beyond = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 4], 512, 1024)});
    refused(&with(&small, WEIGHTS, tensors(&beyond, 700)), WEIGHTS, &[]).await;
    let ranks = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 3], 512, 896)});
    refused(&with(&small, WEIGHTS, tensors(&ranks, 896)), WEIGHTS, &["4", "3"]).await;
    let half = json!({&a: f32s([4, 32], 0, 512)});
    refused(&with(&small, WEIGHTS, tensors(&half, 512)), WEIGHTS, &["q_proj"]).await;
    let unknown = json!({&a: f32s([4, 32], 0, 512), &b: f32s([32, 4], 512, 1024), format!("{q}.mystery"): f32s([1, 4], 1024, 1040)});
    refused(&with(&small, WEIGHTS, tensors(&unknown, 1040)), WEIGHTS, &["mystery"]).await;

    refused(&with(&good, CONFIG, b"{".to_vec()), CONFIG, &[]).await;
    refused(&with(&good, CONFIG, b"[]".to_vec()), CONFIG, &[]).await;
    refused(&with(&good, CONFIG, b"{\"peft_type\": \"MYSTERY\"}".to_vec()), CONFIG, &["MYSTERY"]).await;
    refused(&with(&good, CONFIG, [b"{\"a\":".repeat(100_000), b"1".to_vec()].concat()), CONFIG, &[]).await;
    let mut pickle = good.clone();
    pickle.files.remove(WEIGHTS);
    refused(&pickle, WEIGHTS, &["missing"]).await;
    pickle.files.insert("adapter_model.bin".into(), Bytes::from_static(b"\x80\x02"));
    refused(&pickle, "adapter_model.bin", &["pickle"]).await;

    let header = proto::UploadHeader { name: "bad".into(), labels: vec!["one".into()], ..Default::default() };
    let error = client.upload_with(header, &world.classifier(1, &["x", "y"])).await.expect_err("label count");
    expect_invalid(&error, "label", &["2", "1"]);
    assert_eq!(client.list().await.len(), 1, "only the control was stored");
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_without_labels_or_with_broken_lines_trains_nothing() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let create = async |spec| client.create_job(spec, "").await.expect_err("refused");
    // zero labels: unlabelled data, or a single label, teaches no classifier
    expect_invalid(&create(spec("x", proto::Task::SeqCls, stories(8), 1)).await, "data", &["seq_cls"]);
    let one = "{\"text\": \"a\", \"label\": \"same\"}\n{\"text\": \"b\", \"label\": \"same\"}\n";
    expect_invalid(&create(spec("x", proto::Task::SeqCls, one.into(), 1)).await, "", &["label"]);
    let empty = "{\"text\": \"a\", \"label\": \"\"}\n{\"text\": \"b\", \"label\": \"y\"}\n";
    expect_invalid(&create(spec("x", proto::Task::SeqCls, empty.into(), 1)).await, "line 1", &[]);
    expect_invalid(&create(spec("x", proto::Task::CausalLm, String::new(), 1)).await, "spec.data", &["empty"]);
    expect_invalid(&create(spec("x", proto::Task::CausalLm, stories(1), 1)).await, "", &[]);
    let broken = stories(2) + "{\"text\": \"x\"\n";
    expect_invalid(&create(spec("x", proto::Task::CausalLm, broken, 1)).await, "line 3", &["NOT_JSON"]);
    expect_invalid(&create(spec("x", proto::Task::Unspecified, stories(4), 1)).await, "task", &[]);
    let mut rank = spec("x", proto::Task::CausalLm, stories(4), 1);
    rank.methods[0].part = Some(proto::method_part::Part::Lora(proto::Lora { rank: Some(0), ..Default::default() }));
    expect_invalid(&create(rank).await, "rank", &["1", "1024"]);
    let mut lr = spec("x", proto::Task::CausalLm, stories(4), 1);
    lr.hyper.as_mut().expect("hyper").learning_rate = Some(f64::NAN);
    expect_invalid(&create(lr).await, "learning_rate", &["10"]);
    assert!(client.jobs().await.is_empty());
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_queue_holds_is_refused_at_once_with_a_time_to_retry() {
    let mut world = World::long();
    world.config.engine.max_sequences = 1;
    world.config.engine.max_queue = 2;
    let running = world.start().await;
    let client = &running.client;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(client.stream(ask("", "once", 16_000)).await.expect("admitted"));
    }
    let error = client.stream(ask("", "once", 4)).await.expect_err("over the bound");
    assert_eq!(kind(&error), (Code::ResourceExhausted, "OVERLOADED".into()));
    let retry = error.get_error_details().retry_info().and_then(|r| r.retry_delay);
    assert!(retry.is_some_and(|d| !d.is_zero()), "{retry:?}");
    assert!(client.info().await.is_ok(), "questions about the server are still answered");
    drop(streams);
    eventually("places are free again", async || client.generate(ask("", "hello", 4)).await.is_ok()).await;
    running.stop().await;
}

/// 80 places: neither a batch of 96 continuations nor a call of 100 inputs may ask for all at once.
#[tokio::test(flavor = "multi_thread")]
async fn one_call_of_many_sequences_leaves_places_to_others_and_is_not_refused_half_way() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let other = client.stream(ask("", "once", 16_000)).await.expect("admitted");
    let request = proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: (0..12).map(|i| prompt(&format!("once {i}"))).collect(),
        options: Some(proto::GenerateOptions { n: Some(8), ..options(2) }),
        deltas: vec![],
    };
    let said = client.batch(request).await.expect("its later prompts wait for room");
    assert_eq!(said.generations.len(), 96);
    assert!(
        said.generations.iter().enumerate().all(|(i, g)| (g.prompt_index, g.index) == (i as u32 / 8, i as u32 % 8))
    );
    let texts = (0..100).map(|i| format!("text {i}")).collect();
    let request = proto::EmbedRequest { inputs: texts, ..Default::default() };
    let found = client.inference().embed(client.request(request)).await.expect("no more than its share at once");
    assert_eq!(found.into_inner().embeddings.len(), 100);
    drop(other);
    running.stop().await;
}

/// Eight places, seven of them taken for a while: the batch's first prompt finds one, its others wait for those.
#[tokio::test(flavor = "multi_thread")]
async fn the_later_prompts_of_a_batch_wait_for_room() {
    let mut world = World::long();
    world.config.engine.max_sequences = 4;
    world.config.engine.max_queue = 4;
    let running = world.start().await;
    let client = &running.client;
    let mut others = Vec::new();
    for _ in 0..7 {
        let stream = client.stream(ask("", "once", 1_500)).await.expect("admitted");
        others.push(tokio::spawn(finish(Said::default(), stream)));
    }
    let request = proto::GenerateBatchRequest {
        delta: String::new(),
        prompts: (0..4).map(|i| prompt(&format!("once {i}"))).collect(),
        options: Some(options(2)),
        ..Default::default()
    };
    let said = timely("room comes", client.batch(request)).await.expect("none is refused");
    assert_eq!(said.generations.len(), 4);
    for other in others {
        other.await.expect("no panic").expect("it goes on to its end");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lists_of_deltas_are_refused_by_place() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let part = |delta: &str, weight: f64| proto::WeightedDelta { delta: delta.into(), weight: Some(weight) };
    let many: Vec<_> = (0..17).map(|i| part(&format!("d{i}"), 1.0)).collect();
    let x = || part("x", 0.5);
    let cases: Vec<(Vec<proto::WeightedDelta>, &str, &[&str])> = vec![
        (vec![x(), part("y", f64::NAN)], "deltas[1].weight", &["NaN", "-100", "100"]),
        (vec![part("x", f64::INFINITY), part("y", 1.0)], "deltas[0].weight", &["inf", "100"]),
        (vec![x(), part("y", -100.5)], "deltas[1].weight", &["-100.5"]),
        (vec![x(), x()], "deltas[1].delta", &["x"]),
        (vec![x(), part("x@1", 0.5)], "deltas", &["x@1", "twice"]),
        (vec![x(), part("", 0.5)], "deltas[1].delta", &["empty"]),
        (vec![x(), part("no such/name", 0.5)], "deltas[1].delta", &["no such/name"]),
        (many, "deltas", &["17", "16"]),
    ];
    for (deltas, field, words) in cases {
        let request = proto::GenerateRequest { deltas: deltas.clone(), ..ask("", "x", 4) };
        expect_invalid(&client.generate(request).await.expect_err(field), field, words);
        let inputs = vec![scored("a", "b")];
        let score = client.request(proto::ScoreRequest { deltas: deltas.clone(), inputs, ..Default::default() });
        expect_invalid(&client.inference().score(score).await.expect_err(field), field, words);
        let inputs = vec!["a".to_owned()];
        let embed = client.request(proto::EmbedRequest { deltas: deltas.clone(), inputs, ..Default::default() });
        expect_invalid(&client.inference().embed(embed).await.expect_err(field), field, words);
        let method = proto::MergeMethod::Cat.into();
        let merge = proto::MergeDeltasRequest { name: "m".into(), method, deltas, ..Default::default() };
        let field = if field == "deltas" && words.contains(&"twice") { "deltas[1].delta" } else { field };
        let words = if words.contains(&"twice") { &["x@1"] } else { words };
        expect_invalid(&client.deltas().merge_deltas(client.request(merge)).await.expect_err(field), field, words);
    }
    let beside = proto::GenerateRequest { deltas: vec![x()], ..ask("y", "x", 4) };
    expect_invalid(&client.generate(beside).await.expect_err("both"), "deltas", &["delta"]);
    let unknown = proto::GenerateRequest { deltas: vec![x(), part("nobody", 1.0)], ..ask("", "x", 4) };
    let not_found = (Code::NotFound, "DELTA_NOT_FOUND".to_owned());
    assert_eq!(kind(&client.generate(unknown).await.expect_err("unknown")), not_found);
    still_answers(client).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_merges_are_refused_by_field() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let both = ["x", "y"].map(|d| proto::WeightedDelta { delta: d.into(), weight: None }).to_vec();
    let of = |method: proto::MergeMethod| proto::MergeDeltasRequest {
        name: "m".into(),
        method: method.into(),
        deltas: both.clone(),
        ..Default::default()
    };
    use proto::MergeMethod as M;
    let (ties, svd) = (of(M::Ties), of(M::Svd));
    let cases: Vec<(proto::MergeDeltasRequest, &str, &[&str])> = vec![
        (of(M::Unspecified), "method", &["required"]),
        (proto::MergeDeltasRequest { method: 99, ..of(M::Cat) }, "method", &["99"]),
        (proto::MergeDeltasRequest { name: "a/b".into(), ..of(M::Cat) }, "name", &[]),
        (proto::MergeDeltasRequest { deltas: vec![], ..of(M::Cat) }, "deltas", &["0", "2", "16"]),
        (ties.clone(), "density", &["required", "ties"]),
        (proto::MergeDeltasRequest { density: Some(0.0), ..ties.clone() }, "density", &["0", "1"]),
        (proto::MergeDeltasRequest { density: Some(f64::NAN), ..ties.clone() }, "density", &["NaN"]),
        (proto::MergeDeltasRequest { density: Some(0.5), seed: Some(1), ..ties }, "seed", &["ties"]),
        (proto::MergeDeltasRequest { density: Some(0.5), ..of(M::Linear) }, "density", &["linear"]),
        (proto::MergeDeltasRequest { majority_sign: 1, ..of(M::Cat) }, "majority_sign", &["cat"]),
        (proto::MergeDeltasRequest { rank: Some(0), ..svd.clone() }, "rank", &["0", "256"]),
        (proto::MergeDeltasRequest { rank: Some(257), ..svd }, "rank", &["257", "256"]),
        (proto::MergeDeltasRequest { rank: Some(2), ..of(M::Cat) }, "rank", &["cat"]),
    ];
    for (request, field, words) in cases {
        let refused = client.deltas().merge_deltas(client.request(request)).await.expect_err(field);
        expect_invalid(&refused, field, words);
    }
    let mut unknown = of(M::Cat);
    unknown.deltas[1].delta = "nobody".into();
    let refused = client.deltas().merge_deltas(client.request(unknown)).await.expect_err("unknown");
    assert_eq!(kind(&refused), (Code::NotFound, "DELTA_NOT_FOUND".to_owned()));
    assert_eq!(client.list().await.len(), 2, "nothing was published");
    still_answers(client).await;
    running.stop().await;
}

/// Every file below a folder.
fn walk(dir: &Path, out: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()) {
        if entry.is_dir() { walk(&entry, out) } else { out.push(entry) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_stored_delta_is_data_loss_and_the_others_serve() {
    let world = World::new();
    let running = world.start().await;
    let (good, bad) = (world.delta(1), world.delta(2));
    running.client.upload("good", &good).await.expect("an upload");
    running.client.upload("bad", &bad).await.expect("an upload");
    let said = running.client.text("good", "once", 8).await;
    running.stop().await;

    let mut blobs = Vec::new();
    walk(&world.data_dir(), &mut blobs);
    let blob = blobs.iter().find(|p| fs::read(p).is_ok_and(|data| data == bad.files[WEIGHTS])).expect("its blob");
    let mut data = bad.files[WEIGHTS].to_vec();
    let middle = data.len() / 2;
    data[middle] ^= 1;
    fs::write(blob, data).expect("one bit is flipped");

    let running = world.start().await;
    let client = &running.client;
    let lost = (Code::DataLoss, "DELTA_CORRUPT".to_owned());
    for _ in 0..2 {
        assert_eq!(kind(&client.generate(ask("bad", "once", 8)).await.expect_err("corrupt")), lost);
        assert_eq!(client.text("good", "once", 8).await, said);
    }
    assert_eq!(kind(&client.download("bad").await.expect_err("corrupt")), lost);
    let corrupt = async || {
        let listed = client.list().await.into_iter().filter(|d| d.corrupt).map(|d| d.name);
        listed.collect::<Vec<_>>()
    };
    assert_eq!(corrupt().await, ["bad"]);
    still_answers(client).await;
    // a new upload of the same files repairs it
    client.upload("bad", &bad).await.expect("an upload");
    assert_eq!(client.generate(ask("bad", "once", 8)).await.expect("it serves again").ids.len(), 8);
    assert!(corrupt().await.is_empty());
    running.stop().await;
}
