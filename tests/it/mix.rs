//! Learned mixing of deltas.

use deltaserve::grpc::proto;
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::support::*;

fn mixes(name: &str, deltas: &[&str], jsonl: String, steps: u32) -> proto::TrainingSpec {
    let mix = proto::Mix { deltas: deltas.iter().map(|d| (*d).to_owned()).collect(), per_layer: false };
    let mut spec = spec(name, proto::Task::CausalLm, jsonl, steps);
    spec.hyper.as_mut().expect("hyper").learning_rate = Some(0.05);
    proto::TrainingSpec { methods: vec![], mix: Some(mix), ..spec }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_learns_how_much_of_each_delta_to_take_and_publishes_their_sum() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let job = client.create_job(spec("knows", proto::Task::CausalLm, stories(8), 30), "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    client.upload("noise", &world.delta(1)).await.expect("an upload");
    let job = client.create_job(mixes("both", &["knows", "noise@1"], stories(8), 40), "").await.expect("a job");
    let resolved = job.resolved.clone().expect("hyper-parameters");
    let mix = resolved.mix.expect("it says what it mixes");
    let names: Vec<&str> = mix.deltas.iter().map(|d| d.name.as_str()).collect();
    assert_eq!((names, mix.per_layer), (vec!["knows@1", "noise@1"], false));
    let events = client.events(&job.id, 0).await.expect("a watch");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    let told = events.iter().find_map(|e| if let Some(Body::Mix(m)) = &e.body { Some(m.clone()) } else { None });
    let told = told.expect("the weights are told");
    assert_eq!(told.deltas, ["knows@1", "noise@1"]);
    let [knows, noise] = told.rows[0].weights[..] else { panic!("two weights: {told:?}") };
    assert!(knows > 0.5 && knows > noise, "{knows} and {noise}");
    // the published delta says what the weighted sum of the two says
    let both = client.text("both", "the red cat", 24).await;
    let mut request = ask("", "the red cat", 24);
    request.deltas = [("knows@1", knows), ("noise@1", noise)]
        .map(|(delta, weight)| proto::WeightedDelta { delta: delta.to_owned(), weight: Some(weight) })
        .to_vec();
    assert_eq!(client.generate(request).await.expect("a sum").text, both);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_mixed_is_refused_with_the_reason() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("one", &world.delta(1)).await.expect("an upload");
    client.upload("two", &world.delta(2)).await.expect("an upload");
    let plan = async |client: &Client, spec: proto::TrainingSpec| {
        client.training().plan(client.request(proto::PlanRequest { spec: Some(spec) })).await.map(|r| r.into_inner())
    };
    let fine = plan(client, mixes("new", &["one", "two"], stories(8), 2)).await.expect("it fits");
    assert_eq!(fine.trainable_parameters, 2);
    for (deltas, words) in [
        (vec!["one"], vec!["2 to 16"]),
        (vec!["one", "one"], vec!["one is given twice"]),
        (vec!["one", "one@1"], vec!["the same version"]),
    ] {
        let error = plan(client, mixes("new", &deltas, stories(8), 2)).await.expect_err("refused");
        expect_invalid(&error, "spec.mix.deltas", &words);
    }
    for (tenant, deltas) in [("default", ["one", "nothing"]), ("other", ["one", "two"])] {
        let error = plan(&client.tenant(tenant), mixes("new", &deltas, stories(8), 2)).await.expect_err("unknown");
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
    }
    let mut both = mixes("new", &["one", "two"], stories(8), 2);
    both.from_delta = "one".into();
    let error = plan(client, both).await.expect_err("two starts");
    expect_invalid(&error, "spec.from_delta", &["mix"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mix_that_waits_holds_no_memory_and_goes_on_though_its_deltas_are_deleted() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("one", &world.delta(1)).await.expect("an upload");
    client.upload("two", &world.delta(2)).await.expect("an upload");
    // as many as train at a time, so that what comes next waits
    let mut long = Vec::new();
    for i in 0..4 {
        let spec = spec(&format!("long{i}"), proto::Task::CausalLm, stories(8), 1_000_000);
        long.push(client.create_job(spec, "").await.expect("a job").id);
    }
    for id in &long {
        eventually("it trains", async || client.job(id).await.is_ok_and(|j| j.state() == JobState::Running)).await;
    }
    let job = client.create_job(mixes("both", &["one", "two"], stories(8), 5), "").await.expect("a job");
    let leased = async || client.info().await.expect("server info").residency.unwrap_or_default().leased;
    assert_eq!((leased().await, client.job(&job.id).await.expect("the job").state()), (0, JobState::Queued));
    for name in ["one", "two"] {
        let request = proto::DeleteDeltaRequest { name: name.to_owned(), expected_id: None };
        client.deltas().delete_delta(client.request(request)).await.expect("deleted");
    }
    let cancel = proto::CancelJobRequest { id: long[0].clone() };
    client.training().cancel_job(client.request(cancel)).await.expect("cancelled");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    assert_eq!(leased().await, 0);
    running.stop().await;
}
