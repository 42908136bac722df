//! Training that goes on from a delta.

use deltaserve::grpc::proto;
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::support::*;

fn first_metrics(events: &[proto::JobEvent]) -> proto::Metrics {
    let found = events.iter().find_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(*m) } else { None });
    found.expect("a step")
}

fn continues(name: &str, from: &str, jsonl: String, steps: u32) -> proto::TrainingSpec {
    let mut spec = spec(name, proto::Task::CausalLm, jsonl, steps);
    spec.hyper.as_mut().expect("hyper").batch_size = Some(8);
    proto::TrainingSpec { methods: vec![], from_delta: from.into(), ..spec }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_from_a_delta_and_its_record_says_which() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let mut first = spec("old", proto::Task::CausalLm, stories(8), 12);
    let same = proto::training_data::Source::Jsonl(stories(8));
    let same = proto::TrainingData { source: Some(same) };
    first.validation = Some(proto::training_spec::Validation::ValidationData(same.clone()));
    let job = client.create_job(first, "").await.expect("a job");
    let old = client.ended(&job.id).await.result.expect("it ends well");
    let ended_at = old.best_eval.expect("an evaluation").loss;

    let mut next = continues("new", "old@1", stories(8), 2);
    next.ewc = Some(proto::Ewc { data: Some(same), lambda: 10.0, max_examples: Some(3) });
    let job = client.create_job(next, "").await.expect("a job");
    let resolved = job.resolved.clone().expect("hyper-parameters");
    let from = resolved.started_from.expect("it says where it starts");
    assert_eq!((from.name.as_str(), from.id.as_str()), ("old@1", old.id.as_str()));
    assert_eq!((resolved.ewc_lambda, resolved.ewc_examples), (10.0, 3));
    let Some(proto::method_part::Part::Lora(lora)) = &resolved.methods[0].part else { panic!("lora") };
    assert_eq!((lora.rank, lora.alpha), (Some(4), Some(8.0)));
    let events = client.events(&job.id, 0).await.expect("a watch");
    let begun_at = first_metrics(&events).loss;
    assert!((begun_at - ended_at).abs() < 1e-4, "{begun_at} and {ended_at}");
    let penalties: Vec<f64> = events
        .iter()
        .filter_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(m.ewc_penalty) } else { None })
        .collect();
    assert!(penalties[0] == 0.0 && penalties.last().is_some_and(|p| *p > 0.0), "{penalties:?}");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    assert_ne!(client.text("new", "the red cat", 24).await, "");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_continued_is_refused_with_the_reason() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("old", &world.delta(1)).await.expect("an upload");
    let plan = async |client: &Client, spec: proto::TrainingSpec| {
        client.training().plan(client.request(proto::PlanRequest { spec: Some(spec) })).await.map(|r| r.into_inner())
    };
    let fine = plan(client, continues("new", "old", stories(8), 2)).await.expect("it fits");
    assert!(fine.trainable_parameters > 0);
    for (tenant, from) in [("default", "nothing"), ("other", "old")] {
        let error = plan(&client.tenant(tenant), continues("new", from, stories(8), 2)).await.expect_err("unknown");
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
    }
    let mut ranks = continues("new", "old", stories(8), 2);
    ranks.methods = spec("x", proto::Task::CausalLm, String::new(), 1).methods;
    if let Some(proto::method_part::Part::Lora(lora)) = &mut ranks.methods[0].part {
        lora.rank = Some(5);
    }
    let error = plan(client, ranks).await.expect_err("another rank");
    expect_invalid(&error, "spec.methods", &["rank is 5", "delta's is 4"]);
    let mut alone = spec("new", proto::Task::CausalLm, stories(8), 2);
    let data = alone.data.clone();
    alone.ewc = Some(proto::Ewc { data, lambda: 1.0, max_examples: None });
    let error = plan(client, alone).await.expect_err("nothing to hold on to");
    expect_invalid(&error, "spec.ewc", &["from_delta"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_goes_on_with_the_same_labels_in_any_order_and_is_fresh_with_others() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let mut first = spec("old", proto::Task::SeqCls, labelled(32), 60);
    first.labels = vec!["first".into(), "last".into()];
    let job = client.create_job(first, "").await.expect("a job");
    client.ended(&job.id).await;
    let start = async |labels: [&str; 2], jsonl: String| {
        let mut next = continues("new", "old", jsonl, 1);
        next.task = proto::Task::SeqCls.into();
        next.labels = labels.map(str::to_owned).to_vec();
        next.hyper.as_mut().expect("hyper").batch_size = Some(32);
        let job = client.create_job(next, "").await.expect("a job");
        let head = job.resolved.clone().and_then(|r| r.started_from).expect("a start").head;
        (head, first_metrics(&client.events(&job.id, 0).await.expect("a watch")).loss)
    };
    let (kept, loss) = start(["first", "last"], labelled(32)).await;
    let (turned, same) = start(["last", "first"], labelled(32)).await;
    assert!(kept && turned && loss < 0.5 && (loss - same).abs() < 1e-4, "{loss} and {same}");
    let renamed = labelled(32).replace("\"first\"", "\"begin\"");
    let (kept, loss) = start(["begin", "last"], renamed).await;
    assert!(!kept && loss > 0.5, "a fresh head knows nothing: {loss}");
    running.stop().await;
}
