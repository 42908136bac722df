//! Deltas made of deltas: merged into a new version, or added up for one request.

use deltaserve::grpc::proto;
use proto::MergeMethod as Method;
use tonic::{Code, Status};

use crate::support::*;

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
    assert!(want != x && want != z && merged.number == 1);
    for _ in 0..3 {
        let (a, b, c, d) = tokio::join!(
            client.generate(sum(both(), "the red cat")),
            other.text("z", "the red cat", 24),
            client.text("x", "the red cat", 24),
            client.generate(sum(both(), "the red cat")),
        );
        let (a, d) = (a.expect("a sum"), d.expect("a sum"));
        assert_eq!((&a.text, &b, &c, &d.text), (&want, &z, &x, &want));
        let served = a.finished.served_by.unwrap_or_default();
        let parts: Vec<_> = served.parts.iter().map(|p| (p.name.as_str(), p.number, p.weight)).collect();
        assert_eq!(parts, [("x", 1, 0.6), ("y", 1, -0.4)]);
        assert!(served.name.is_empty() && served.id.len() == 64 && served.parts[0].id.len() == 64);
    }
    // nothing stays behind
    eventually("leases are given back", async || client.list().await.iter().all(|d| d.leases == 0)).await;
    let alone = client.generate(sum(vec![part("x", 1.0)], "the red cat")).await.expect("one of weight 1");
    assert_eq!((alone.text, alone.finished.served_by.unwrap_or_default().name), (x, "x".into()));
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
    client.upload("plain", &world.delta(3)).await.ok();
    let classify = async |deltas: Vec<proto::WeightedDelta>| {
        let inputs = vec![proto::ClassifyInput { text: "a text".into(), pair: None }];
        let request = client.request(proto::ClassifyRequest { inputs, deltas, ..Default::default() });
        client.inference().classify(request).await.map(|r| r.into_inner())
    };
    let error = classify(vec![part("x", 1.0), part("y", 1.0)]).await.expect_err("two heads");
    expect_invalid(&error, "deltas", &["x@1", "y@1", "head"]);
    let error = classify(vec![part("x", 0.5)]).await.expect_err("a weighted head");
    expect_invalid(&error, "deltas", &["x@1", "weight is 0.5"]);
    let error = classify(vec![part("x", f64::NAN)]).await.expect_err("no number");
    expect_invalid(&error, "deltas[0].weight", &[]);
    assert_eq!(classify(vec![part("x", 1.0), part("nothing", 1.0)]).await.expect_err("unknown").code(), Code::NotFound);
    running.stop().await;
}
