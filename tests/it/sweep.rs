//! Sweeps through the API: every candidate is told, the best is published, and a sweep goes on as other jobs do.

use deltaserve::grpc::proto;
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::support::*;

/// Rates that learn nothing and much, each with two ranks.
fn sweep(name: &str, steps: u32) -> proto::TrainingSpec {
    let plain = spec(name, proto::Task::CausalLm, stories(24), steps);
    let hyper = proto::HyperParameters {
        learning_rate: None,
        eval_every: Some(10),
        checkpoint_every: Some(1),
        ..plain.hyper.unwrap_or_default()
    };
    let lora = proto::Lora { dropout: Some(0.1), ..Default::default() };
    proto::TrainingSpec {
        methods: vec![proto::MethodPart { part: Some(proto::method_part::Part::Lora(lora)) }],
        hyper: Some(hyper),
        validation: Some(proto::training_spec::Validation::ValidationFraction(0.25)),
        sweep: Some(proto::Sweep { learning_rates: vec![1e-7, 5e-3], ranks: vec![2, 4] }),
        ..plain
    }
}

fn result(events: &[proto::JobEvent]) -> proto::SweepResult {
    let of = |e: &proto::JobEvent| if let Some(Body::Sweep(s)) = &e.body { Some(s.clone()) } else { None };
    let all: Vec<proto::SweepResult> = events.iter().filter_map(of).collect();
    assert_eq!(all.len(), 1, "told once");
    all.into_iter().next().expect("one")
}

/// The rank that a published folder names.
async fn rank(client: &Client, name: &str) -> u64 {
    let files = client.download(name).await.expect("its files");
    let config = files.files.get("adapter_config.json").expect("a configuration");
    let config: serde_json::Value = serde_json::from_slice(config).expect("JSON");
    config["r"].as_u64().expect("a rank")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_publishes_the_winner_and_its_events_tell_all_candidates() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let request = client.request(proto::PlanRequest { spec: Some(sweep("style", 30)) });
    let plan = client.training().plan(request).await.expect("a plan").into_inner();
    let job = client.create_job(sweep("style", 30), "").await.expect("a job");
    let resolved = job.resolved.clone().expect("resolved");
    assert_eq!(plan.resolved.as_ref(), Some(&resolved));
    let named: Vec<(f64, u32)> = resolved.sweep.iter().map(|c| (c.learning_rate, c.rank)).collect();
    assert_eq!(named, [(1e-7, 2), (5e-3, 2), (1e-7, 4), (5e-3, 4)]);
    let events = client.events(&job.id, 0).await.expect("a watch");
    assert!(events.iter().zip(1..).all(|(e, seq)| e.seq == seq), "a gap");
    let told = result(&events);
    assert_eq!((told.metric.as_str(), told.candidates.len()), ("loss", 4));
    for (number, row) in (1..).zip(&told.candidates) {
        let evals: Vec<proto::EvalResult> = events
            .iter()
            .filter_map(|e| if let Some(Body::Eval(e)) = &e.body { Some(*e) } else { None })
            .filter(|e| e.candidate == number)
            .collect();
        assert_eq!(evals.iter().map(|e| e.step).collect::<Vec<_>>(), [10, 20, 30], "candidate {number}");
        let best = evals.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).expect("an evaluation");
        assert_eq!((row.figure, row.step, row.steps_done), (Some(best.loss), best.step, 30));
        assert_eq!((row.learning_rate, row.rank), named[number as usize - 1]);
        let metrics = |e: &&proto::JobEvent| matches!(&e.body, Some(Body::Metrics(m)) if m.candidate == number);
        assert!(events.iter().filter(metrics).count() >= 2, "the first step and the last of candidate {number}");
    }
    let figure = |row: &proto::SweepOutcome| row.figure.expect("a figure");
    let least = told.candidates.iter().min_by(|a, b| figure(a).total_cmp(&figure(b))).expect("a candidate");
    let won: Vec<&proto::SweepOutcome> = told.candidates.iter().filter(|row| row.won).collect();
    assert_eq!(won, [least]);
    assert_eq!(least.learning_rate, 5e-3, "the rate that learns");
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Succeeded, "{end:?}");
    let best = end.result.and_then(|r| r.best_eval).expect("its evaluation");
    assert_eq!((Some(best.loss), best.step), (least.figure, least.step));
    assert_eq!(named[best.candidate as usize - 1], (least.learning_rate, least.rank));
    assert_eq!(rank(client, "style").await, u64::from(least.rank));
    assert_ne!(client.text("style", "the red cat", 16).await, client.text("", "the red cat", 16).await);
    let listed: Vec<String> = client.list().await.into_iter().map(|d| d.name).collect();
    assert_eq!(listed, ["style"], "the others are dropped");

    let said = crate::classify_file::cli(&running, &["jobs", "watch", &job.id]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("[4] evaluation at step 30") && said.contains("best"), "{said}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_is_paused_goes_on_to_the_same_bytes_and_can_be_published_on_the_way() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let straight = client.create_job(sweep("straight", 300), "").await.expect("a job");
    assert_eq!(client.ended(&straight.id).await.state(), JobState::Succeeded);
    let job = client.create_job(sweep("paused", 300), "").await.expect("a job");
    eventually("it has been evaluated", async || client.job(&job.id).await.is_ok_and(|j| j.step > 10)).await;
    let paused = client.pause(&job.id).await.expect("a pause");
    assert!(paused.state() == JobState::Paused && paused.step > 10 && paused.step < 300, "{paused:?}");
    let request = proto::PublishCheckpointRequest { id: job.id.clone(), name: "early".into(), ..Default::default() };
    client.training().publish_checkpoint(client.request(request)).await.expect("the best so far");
    assert!([2, 4].contains(&rank(client, "early").await));
    running.stop().await;

    let running = world.start().await;
    let client = &running.client;
    client.resume(&job.id).await.expect("it goes on");
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Succeeded, "{end:?}");
    let files = client.download("paused").await.expect("its files");
    assert!(files == client.download("straight").await.expect("its files"), "other bytes than without a pause");
    assert_eq!(result(&client.events(&job.id, 0).await.expect("a watch")).candidates.len(), 4);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sweep_cannot_be_is_refused_by_name() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |spec: proto::TrainingSpec, field: &str, word: &str| {
        let error = client.create_job(spec, "").await.expect_err("refused");
        assert_eq!(error.code(), Code::InvalidArgument);
        expect_invalid(&error, field, &[word]);
    };
    refused(proto::TrainingSpec { validation: None, ..sweep("x", 5) }, "spec.sweep", "held-out examples").await;
    let one = proto::Sweep { learning_rates: vec![1e-3], ranks: vec![] };
    refused(proto::TrainingSpec { sweep: Some(one), ..sweep("x", 5) }, "spec.sweep", "2 to 16").await;
    let many = proto::Sweep { learning_rates: (1..=17).map(|i| 1e-4 * f64::from(i)).collect(), ranks: vec![] };
    refused(proto::TrainingSpec { sweep: Some(many), ..sweep("x", 5) }, "spec.sweep", "17").await;
    let full = vec![proto::MethodPart { part: Some(proto::method_part::Part::Full(proto::FullTuning {})) }];
    refused(proto::TrainingSpec { methods: full, ..sweep("x", 5) }, "spec.sweep", "full fine-tuning").await;
    let dpo = proto::Preference { method: proto::PreferenceMethod::Dpo.into(), ..Default::default() };
    refused(proto::TrainingSpec { preference: Some(dpo), ..sweep("x", 5) }, "spec.preference", "dpo").await;
    let mut twice = sweep("x", 5);
    twice.hyper.as_mut().expect("hyper").learning_rate = Some(1e-3);
    refused(twice, "spec.hyper.learning_rate", "sweep.learning_rates").await;
    let mut layers = sweep("x", 5);
    layers.hyper.as_mut().expect("hyper").gradient_checkpointing = Some(true);
    refused(layers, "spec.hyper.gradient_checkpointing", "sweep").await;
    assert!(client.jobs().await.is_empty());
    running.stop().await;
}
