//! Nobody sees another's work: requests in one batch, and tenants in one server.

use deltaserve::grpc::proto;
use tonic::Code;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_different_deltas_in_one_batch_answer_as_if_alone() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let mut deltas = vec![String::new()];
    for i in 0..5 {
        deltas.push(format!("d{i}"));
        client.upload(&deltas[i + 1], &world.delta(i as u64 + 20)).await.expect("an upload");
    }
    let texts = ["a", "once upon a time there was", "The quick brown fox"];
    let mut alone = Vec::new();
    for delta in &deltas {
        for text in texts {
            alone.push(client.text(delta, text, 48).await);
        }
    }
    for _ in 0..3 {
        let work = deltas.iter().flat_map(|d| texts.iter().map(move |t| client.text(d, t, 48)));
        let together = timely("all end", futures::future::join_all(work)).await;
        assert_eq!(together, alone);
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anothers_things_are_answered_like_unknown_ones() {
    let world = World::new();
    let running = world.start().await;
    let (a, b) = (running.client.tenant("acme"), running.client.tenant("bolt"));
    let made = a.upload("secret", &world.delta(1)).await.expect("an upload");
    let job = a.create_job(spec("mine", proto::Task::CausalLm, stories(8), 1), "").await.expect("a job");
    let dataset = a.upload_dataset("texts", &stories(8)).await;
    let same = |mine: tonic::Status, unknown: tonic::Status, name: &str, other: &str| {
        assert_eq!(kind(&mine), kind(&unknown));
        assert_eq!(mine.code(), Code::NotFound);
        assert_eq!(mine.message().replace(name, "X"), unknown.message().replace(other, "X"));
    };
    for reference in ["secret", "secret@1", &format!("secret@{}", made.id)] {
        let other = reference.replace("secret", "absent");
        let of = async |r: &str| b.generate(ask(r, "x", 1)).await.expect_err("not found");
        same(of(reference).await, of(&other).await, reference, &other);
        let of = async |r: &str| b.delta(r).await.expect_err("not found");
        same(of(reference).await, of(&other).await, reference, &other);
        let of = async |r: &str| b.download(r).await.expect_err("not found");
        same(of(reference).await, of(&other).await, reference, &other);
    }
    let of = async |n: &str| b.promote(n, "1").await.expect_err("not found");
    same(of("secret").await, of("absent").await, "secret", "absent");
    let of = async |n: &str| {
        let request = proto::DeleteDeltaRequest { name: n.into(), expected_id: None };
        b.deltas().delete_delta(b.request(request)).await.expect_err("not found")
    };
    same(of("secret").await, of("absent").await, "secret", "absent");
    let of = async |n: &str| {
        let request = proto::PinDeltaRequest { name: n.into(), pinned: true };
        b.deltas().pin_delta(b.request(request)).await.expect_err("not found")
    };
    same(of("secret").await, of("absent").await, "secret", "absent");

    let unknown = "01900000-0000-7000-8000-000000000000";
    let of = async |id: &str| b.job(id).await.expect_err("not found");
    same(of(&job.id).await, of(unknown).await, &job.id, unknown);
    let of = async |id: &str| b.events(id, 0).await.expect_err("not found");
    same(of(&job.id).await, of(unknown).await, &job.id, unknown);
    let of = async |id: &str| {
        b.training().cancel_job(b.request(proto::CancelJobRequest { id: id.into() })).await.expect_err("not found")
    };
    same(of(&job.id).await, of(unknown).await, &job.id, unknown);
    let of = async |id: &str| {
        b.training().get_dataset(b.request(proto::GetDatasetRequest { id: id.into() })).await.expect_err("not found")
    };
    same(of(&dataset).await, of(unknown).await, &dataset, unknown);
    let of = async |id: &str| {
        let mut spec = spec("theirs", proto::Task::CausalLm, String::new(), 1);
        spec.data = Some(proto::TrainingData { source: Some(proto::training_data::Source::DatasetId(id.into())) });
        b.create_job(spec, "").await.expect_err("not found")
    };
    same(of(&dataset).await, of(unknown).await, &dataset, unknown);

    assert!(b.list().await.is_empty() && b.jobs().await.is_empty());
    assert_eq!(a.list().await.iter().filter(|d| d.name == "secret").count(), 1, "nothing was changed by all this");
    b.upload("secret", &world.delta(2)).await.expect("names are per tenant");
    assert_eq!(a.delta("secret").await.expect("theirs").delta.unwrap_or_default().id, made.id);
    running.stop().await;
}
