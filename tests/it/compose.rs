//! Deltas made of deltas: merged into a new version, or added up for one request.

use candle_core::{DType, Device, Tensor};
use deltaserve::{
    delta::{Delta, DeltaFiles, LowRank, Patch, Task},
    grpc::proto,
};
use proto::MergeMethod as Method;
use tonic::{Code, Status};

use crate::{classify_file::cli, support::*};

fn part(delta: &str, weight: f64) -> proto::WeightedDelta {
    proto::WeightedDelta { delta: delta.into(), weight: Some(weight) }
}

fn wanted(name: &str, method: Method, deltas: Vec<proto::WeightedDelta>) -> proto::MergeDeltasRequest {
    proto::MergeDeltasRequest { name: name.into(), method: method.into(), deltas, ..Default::default() }
}

async fn merge(client: &Client, request: proto::MergeDeltasRequest) -> Result<proto::Delta, Status> {
    let reply = client.deltas().merge_deltas(client.request(request)).await?;
    Ok(reply.into_inner().delta.unwrap_or_default())
}

fn sum(deltas: Vec<proto::WeightedDelta>, text: &str) -> proto::GenerateRequest {
    proto::GenerateRequest { deltas, ..ask("", text, 24) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_is_a_version_like_any_other() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let both = || vec![part("x", 0.6), part("y@1", 0.4)];
    let mut texts = std::collections::BTreeSet::new();
    for (method, density) in [
        (Method::Linear, None),
        (Method::Cat, None),
        (Method::Svd, None),
        (Method::Ties, Some(0.5)),
        (Method::MagnitudePrune, Some(0.5)),
        (Method::DareLinear, Some(0.5)),
        (Method::DareTies, Some(0.5)),
    ] {
        let name = format!("m{}", method as i32);
        let request = proto::MergeDeltasRequest { density, ..wanted(&name, method, both()) };
        let made = merge(client, request.clone()).await.expect("a merge");
        assert_eq!((made.name.as_str(), made.number, made.methods.join("+")), (name.as_str(), 1, "lora".into()));
        assert!(made.origin.starts_with("merge:") && made.origin.contains("x@1*0.6+y@1*0.4"), "{}", made.origin);
        texts.insert(client.text(&name, "the red cat", 24).await);
        assert_eq!(merge(client, request).await.expect("again").id, made.id, "the same merge is the same version");
    }
    assert!(texts.len() > 1, "methods differ");
    let error = merge(client, wanted("m", Method::Ties, both())).await.expect_err("no density");
    expect_invalid(&error, "density", &["required"]);
    let error = merge(client, wanted("m", Method::Cat, vec![part("x", 1.0)])).await.expect_err("one is no merge");
    expect_invalid(&error, "deltas", &["1 entries"]);
    let error = merge(&client.tenant("other"), wanted("m", Method::Cat, both())).await.expect_err("not theirs");
    assert_eq!(error.code(), Code::NotFound);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merges_are_bounded_in_number_and_memory() {
    let mut world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let both = || vec![part("x", 0.6), part("y", 0.4)];
    let calls = (0..40).map(|i| {
        let (client, request) = (client.clone(), wanted(&format!("m{i}"), Method::Svd, both()));
        tokio::spawn(async move { merge(&client, request).await })
    });
    let (mut made, mut refused) = (0, 0);
    for call in calls.collect::<Vec<_>>() {
        match call.await.expect("no panic") {
            Ok(_) => made += 1,
            Err(error) => {
                assert_eq!(kind(&error), (Code::ResourceExhausted, "OVERLOADED".into()));
                refused += 1;
            }
        }
    }
    assert!(made >= 8 && refused > 0, "{made} made, {refused} refused");
    merge(client, wanted("after", Method::Cat, both())).await.expect("there is room again");
    running.stop().await;
    // the result and its files are counted, and what is refused is a field of the request
    world.config.max_resident_bytes = 3 * world.delta_bytes();
    let running = world.start().await;
    let error = merge(&running.client, wanted("m", Method::Cat, both())).await.expect_err("no room");
    expect_invalid(&error, "deltas", &["resident budget"]);
    running.stop().await;
}

/// The vector of a text that is not scaled.
async fn vector(client: &Client, delta: &str, deltas: Vec<proto::WeightedDelta>, text: &str) -> Vec<f32> {
    let inputs = vec![text.into()];
    let request =
        proto::EmbedRequest { delta: delta.into(), deltas, inputs, normalize: Some(false), ..Default::default() };
    let reply = client.inference().embed(client.request(request)).await.expect("a vector").into_inner();
    reply.embeddings.into_iter().next().expect("one").values
}

/// The weighted sum of LoRA deltas with every update formed as a whole matrix: `A` is the identity, `B` the sum.
fn dense(world: &World, parts: &[(&Delta, f64)]) -> DeltaFiles {
    let of = |site: usize, (i, o): (usize, usize)| -> Patch {
        let mut sum = vec![0f64; i * o];
        for (delta, weight) in parts {
            let Some((_, Patch::LowRank(low))) = delta.patches().iter().find(|(s, _)| *s == site) else { continue };
            let (a, b) = (low.a.to_vec2::<f32>().expect("A"), low.b.to_vec2::<f32>().expect("B"));
            for (a, b) in a.iter().zip(&b) {
                for (row, x) in a.iter().enumerate() {
                    for (column, y) in b.iter().enumerate() {
                        sum[row * o + column] += weight * low.scale * f64::from(*x) * f64::from(*y);
                    }
                }
            }
        }
        let a = Tensor::eye(i, DType::F32, &Device::Cpu).expect("the identity");
        let sum = sum.into_iter().map(|x| x as f32).collect();
        Patch::LowRank(LowRank { a, b: Tensor::from_vec::<_, f32>(sum, (i, o), &Device::Cpu).expect("B"), scale: 1.0 })
    };
    let patches = world.base.sites.linears().map(|(site, entry)| (site, of(site, (entry.in_dim, entry.out_dim))));
    world.encode(&Delta::new(parts[0].0.spec.clone(), patches.collect(), None))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_is_the_dense_sum_of_the_updates() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let made: Vec<Delta> = (1..4).map(|seed| world.random_delta(seed, Task::CausalLm, None)).collect();
    for (name, delta) in ["x", "y", "z"].iter().zip(&made) {
        client.upload(name, &world.encode(delta)).await.expect("an upload");
    }
    let weights = [0.6, -0.35, 0.2];
    let parts: Vec<(&Delta, f64)> = made.iter().zip(weights).collect();
    client.upload("dense", &dense(&world, &parts)).await.expect("an upload");
    let three = vec![part("x", weights[0]), part("y", weights[1]), part("z", weights[2])];
    for text in ["the red cat", "x", "once upon a time"] {
        let want = vector(client, "dense", vec![], text).await;
        let got = vector(client, "", three.clone(), text).await;
        let two = vector(client, "", three[..2].to_vec(), text).await;
        let off = |v: &[f32]| v.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let size = want.iter().map(|x| x.abs()).fold(0f32, f32::max);
        assert!(off(&got) < 2e-4 * size, "{text}: {} of {size}", off(&got));
        assert!(off(&two) > 1e-2 * size, "the third counts");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_deltas_add_up_for_a_request_beside_those_of_other_tenants() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let other = client.tenant("other");
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    other.upload("z", &world.delta(3)).await.expect("an upload");
    let both = || vec![part("x", 0.6), part("y", -0.4)];
    let merged = merge(client, wanted("both", Method::Cat, both())).await.expect("a merge");
    let want = client.text("both", "the red cat", 24).await;
    let (x, z) = (client.text("x", "the red cat", 24).await, other.text("z", "the red cat", 24).await);
    let bare = client.text("", "the red cat", 24).await;
    assert!(want != x && want != z && want != bare && merged.number == 1);
    for _ in 0..3 {
        let (a, b, c, d, e) = tokio::join!(
            client.generate(sum(both(), "the red cat")),
            other.text("z", "the red cat", 24),
            client.text("x", "the red cat", 24),
            client.generate(sum(both(), "the red cat")),
            client.text("", "the red cat", 24),
        );
        let (a, d) = (a.expect("a sum"), d.expect("a sum"));
        assert_eq!((&a.text, &b, &c, &d.text, &e), (&want, &z, &x, &want, &bare));
        let served = a.finished.served_by.unwrap_or_default();
        let parts: Vec<_> = served.parts.iter().map(|p| (p.name.as_str(), p.number, p.weight)).collect();
        assert_eq!(parts, [("x", 1, 0.6), ("y", 1, -0.4)]);
        assert!(served.name.is_empty() && served.id.len() == 64 && served.parts[0].id.len() == 64);
    }
    // nothing stays behind
    eventually("leases are given back", async || client.list().await.iter().all(|d| d.leases == 0)).await;
    let alone = client.generate(sum(vec![part("x", 1.0)], "the red cat")).await.expect("one of weight 1");
    assert_eq!((alone.text, alone.finished.served_by.unwrap_or_default().name), (x, "x".into()));
    // a version that replaces one of them serves from the next request on
    client.upload("y", &world.delta(5)).await.expect("an upload");
    let next = client.generate(sum(both(), "the red cat")).await.expect("a sum");
    let numbers: Vec<_> = next.finished.served_by.unwrap_or_default().parts.iter().map(|p| p.number).collect();
    assert_eq!(numbers, [1, 2]);
    assert_ne!(next.text, want);
    let old = client.generate(sum(vec![part("x", 0.6), part("y@1", -0.4)], "the red cat")).await.expect("a sum");
    assert_eq!(old.text, want);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_add_up_is_refused_by_name() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.classifier(seed, &["no", "yes"])).await.expect("an upload");
    }
    let plain = world.random_delta(3, Task::Feature, None);
    client.upload("plain", &world.encode(&plain)).await.expect("an upload");
    let classify = async |deltas: Vec<proto::WeightedDelta>| {
        let inputs = vec![proto::ClassifyInput { text: "a text".into(), ..Default::default() }];
        let request = client.request(proto::ClassifyRequest { inputs, deltas, ..Default::default() });
        client.inference().classify(request).await.map(|r| r.into_inner())
    };
    let error = classify(vec![part("x", 1.0), part("y", 1.0)]).await.expect_err("two heads");
    expect_invalid(&error, "deltas", &["x@1", "y@1", "head"]);
    let error = classify(vec![part("x", 0.5)]).await.expect_err("a weighted head");
    expect_invalid(&error, "deltas", &["x@1", "weight is 0.5"]);
    // one brings the head, another moves what it reads
    let alone = client.classify("x", &["a text"]).await.expect("x").results.remove(0);
    let moved = classify(vec![part("plain", 0.5), part("x", 1.0)]).await.expect("a head and an update");
    let names: Vec<_> = moved.served_by.unwrap_or_default().parts.into_iter().map(|p| p.name).collect();
    assert_eq!(names, ["plain", "x"]);
    assert_eq!(moved.results[0].labels.len(), 2);
    assert_ne!(moved.results[0].labels, alone.labels);
    let still = classify(vec![part("plain", 0.0), part("x", 1.0)]).await.expect("an update of weight 0");
    for (a, b) in still.results[0].labels.iter().zip(&alone.labels) {
        assert!(a.label == b.label && (a.probability - b.probability).abs() < 1e-5);
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_merges_and_adds_up() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for (name, seed) in [("x", 1), ("y", 2)] {
        client.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let json = async |args: &[&str]| -> Vec<serde_json::Value> {
        let done = cli(&running, args).await;
        assert!(done.status.success(), "{done:?}");
        let text = String::from_utf8(done.stdout).expect("UTF-8");
        text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
    };
    let made = json(&["deltas", "merge", "--json", "--name", "m", "--method", "cat", "x=0.6", "y@1=-0.4"]).await;
    assert_eq!((&made[0]["name"], &made[0]["origin"]), (&"m".into(), &"merge:cat:x@1*0.6+y@1*-0.4".into()));
    let want = client.text("m", "the red cat", 8).await;
    for deltas in [&["-d", "x=0.6", "-d", "y=-0.4"][..], &["--delta", "x=0.6,y=-0.4"]] {
        let base = ["generate", "--json", "the red cat", "--max-new-tokens", "8", "--ignore-eos", "--temperature", "0"];
        let said = json(&[&base[..], deltas].concat()).await;
        let text: String = said.iter().filter_map(|l| l["delta"]["text"].as_str()).collect();
        assert_eq!(text, want, "{said:?}");
        let served = &said.last().expect("an end")["finished"]["served_by"]["parts"];
        assert_eq!((&served[0]["name"], &served[1]["weight"]), (&"x".into(), &(-0.4).into()), "{said:?}");
    }
    let refused = cli(&running, &["deltas", "merge", "--name", "m", "--method", "ties", "x", "y"]).await;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("density") && said.contains("required"), "{said}");
    running.stop().await;
}
