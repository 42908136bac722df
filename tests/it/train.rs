//! Training through the API: one story per job, told without gaps, ending once, while serving goes on.

use deltaserve::grpc::proto;
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::support::*;

fn terminal(event: &proto::JobEvent) -> bool {
    use JobState::*;
    matches!(&event.body, Some(Body::State(s)) if matches!(s.state(), Succeeded | Failed | Cancelled | Interrupted))
}

fn assert_whole(events: &[proto::JobEvent]) {
    assert!(
        events.iter().zip(1..).all(|(e, seq)| e.seq == seq),
        "{:?}",
        events.iter().map(|e| e.seq).collect::<Vec<_>>()
    );
    assert_eq!(events.iter().filter(|e| terminal(e)).count(), 1);
    assert!(events.last().is_some_and(terminal));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_publishes_what_it_trained_and_its_story_can_be_replayed_from_anywhere() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let before = client.text("", "the red cat", 24).await;
    let job = client.create_job(spec("style", proto::Task::CausalLm, stories(24), 40), "").await.expect("a job");
    let events = client.events(&job.id, 0).await.expect("a watch");
    assert_whole(&events);
    let losses: Vec<f64> =
        events.iter().filter_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(m.loss) } else { None }).collect();
    assert!(losses.last() < losses.first(), "{losses:?}");
    for from in [1, 2, events.len() as u64 / 2, events.len() as u64] {
        let again = client.events(&job.id, from).await.expect("a replay");
        assert_eq!(again, events[from as usize - 1..], "from {from}");
    }
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Succeeded);
    let result = end.result.expect("a result");
    assert_eq!((result.name.as_str(), result.number), ("style", 1));
    let said = client.generate(ask("style", "the red cat", 24)).await.expect("it is served");
    assert_eq!(said.finished.served_by.unwrap_or_default().id, result.id);
    assert_ne!(said.text, before);
    let job = client.job(&job.id).await.expect("the job");
    assert_eq!((job.state(), job.step, job.last_seq), (JobState::Succeeded, 40, events.len() as u64));
    let meta = client.delta("style").await.expect("the delta").delta.unwrap_or_default();
    assert!(meta.origin.contains(&job.id), "{}", meta.origin);

    // what was trained can be taken away and brought back
    let files = client.download("style").await.expect("its files");
    let copy = client.upload("copy", &files).await.expect("an upload");
    assert_eq!(copy.id, result.id, "the same files are the same version");
    assert_eq!(client.text("copy", "the red cat", 24).await, said.text);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn serving_goes_on_while_a_job_runs_and_a_cancelled_job_publishes_nothing() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let alone = client.text("", "once upon", 16).await;
    let mut long = spec("never", proto::Task::CausalLm, stories(64), 1_000_000);
    long.hyper.as_mut().expect("hyper").epochs = Some(1000.0);
    long.hyper.as_mut().expect("hyper").batch_size = Some(1);
    let job = client.create_job(long, "").await.expect("a job");
    eventually("it runs", async || client.job(&job.id).await.is_ok_and(|j| j.step > 0)).await;
    for _ in 0..20 {
        assert_eq!(client.text("", "once upon", 16).await, alone);
    }
    assert_eq!(client.job(&job.id).await.expect("the job").state(), JobState::Running, "it ran all the while");
    let watch = tokio::spawn({
        let (client, id) = (client.clone(), job.id.clone());
        async move { client.events(&id, 0).await }
    });
    let request = client.request(proto::CancelJobRequest { id: job.id.clone() });
    client.training().cancel_job(request).await.expect("a cancel");
    let events = timely("the watcher hears of it", watch).await.expect("no panic").expect("a watch");
    assert_whole(&events);
    assert_eq!(client.ended(&job.id).await.state(), JobState::Cancelled);
    assert_eq!(client.delta("never").await.expect_err("nothing is published").code(), Code::NotFound);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_classifier_is_trained_and_labels_better_than_chance() {
    for world in [World::new(), World::encoder()] {
        let running = world.start().await;
        let client = &running.client;
        let mut spec = spec("first-letter", proto::Task::SeqCls, labelled(32), 80);
        spec.validation = Some(proto::training_spec::Validation::ValidationFraction(0.25));
        let job = client.create_job(spec, "").await.expect("a job");
        let events = client.events(&job.id, 0).await.expect("a watch");
        assert_whole(&events);
        let end = client.ended(&job.id).await;
        assert_eq!(end.state(), JobState::Succeeded, "{end:?}");
        let accuracy = end.result.and_then(|r| r.best_eval).and_then(|e| e.accuracy).unwrap_or_default();
        assert!(accuracy >= 0.75, "{}: {accuracy}", world.base.arch.model_type);
        let reply = client.classify("first-letter", &["aaaa1", "zzzz2"]).await.expect("labels");
        let best: Vec<_> = (reply.results.iter())
            .map(|r| r.labels.iter().max_by(|a, b| a.probability.total_cmp(&b.probability)).expect("a label"))
            .map(|l| l.label.as_str())
            .collect();
        assert_eq!(best, ["first", "last"], "{}", world.base.arch.model_type);
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_is_one_job_and_another_request_under_it_is_refused() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let of = |steps| spec("style", proto::Task::CausalLm, stories(8), steps);
    let first = client.create_job(of(2), "key").await.expect("a job");
    client.ended(&first.id).await;
    let again = client.create_job(of(2), "key").await.expect("the same job");
    assert_eq!(again.id, first.id);
    let error = client.create_job(of(3), "key").await.expect_err("another request");
    assert_eq!(kind(&error), (Code::AlreadyExists, "IDEMPOTENCY_CONFLICT".into()));
    let other = client.tenant("other").create_job(of(3), "key").await.expect("keys are per tenant");
    assert_ne!(other.id, first.id);
    assert_eq!(client.jobs().await.len(), 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_what_a_job_would_do_and_does_nothing() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let wanted = spec("style", proto::Task::CausalLm, stories(16), 10);
    let request = client.request(proto::PlanRequest { spec: Some(wanted.clone()) });
    let plan = client.training().plan(request).await.expect("a plan").into_inner();
    let resolved = plan.resolved.expect("hyper-parameters");
    assert_eq!((plan.train_examples, resolved.total_steps, resolved.batch_size), (16, 10, 4));
    assert!(resolved.beta2 > 0.9 && resolved.eps > 0.0, "defaults are filled in");
    let memory = plan.memory.expect("an estimate");
    assert_eq!(memory.total, memory.parameters + memory.gradients + memory.optimizer + memory.activations);
    assert!(client.jobs().await.is_empty() && client.list().await.is_empty());
    let job = client.create_job(wanted, "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    assert_eq!(
        client.delta("style").await.expect("it").delta.unwrap_or_default().parameters,
        plan.trainable_parameters
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_diverges_fails_with_the_step_and_publishes_nothing() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let mut wild = spec("wild", proto::Task::CausalLm, stories(16), 100_000);
    let hyper = wild.hyper.as_mut().expect("hyper");
    hyper.learning_rate = Some(1e9);
    let error = client.create_job(wild.clone(), "").await.expect_err("out of range");
    expect_invalid(&error, "learning_rate", &["1000000000", "10"]);

    let hyper = wild.hyper.as_mut().expect("hyper");
    hyper.learning_rate = Some(10.0);
    hyper.schedule = proto::Schedule::Constant.into();
    hyper.warmup_ratio = Some(0.0);
    hyper.clip_norm = Some(0.0);
    // a decay of 10 x 10 per step multiplies the weights by -99
    hyper.weight_decay = Some(10.0);
    let job = client.create_job(wild, "").await.expect("a job");
    let events = client.events(&job.id, 0).await.expect("a watch");
    assert_whole(&events);
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Failed);
    let failure = end.failure.unwrap_or_default();
    assert!(["NON_FINITE_LOSS", "DIVERGED"].contains(&failure.code.as_str()), "{failure:?}");
    assert!(failure.message.contains("step"), "{failure:?}");
    assert_eq!(client.delta("wild").await.expect_err("nothing is published").code(), Code::NotFound);
    // the trainer takes the next one
    let job = client.create_job(spec("tame", proto::Task::CausalLm, stories(8), 2), "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_problem_of_the_data_is_reported_with_its_line() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let jsonl = stories(3) + "{not json\n" + &stories(1) + "{\"text\": 5}\n" + &stories(2);
    let error = client.create_job(spec("x", proto::Task::CausalLm, jsonl, 1), "").await.expect_err("bad lines");
    expect_invalid(&error, "line 4", &["NOT_JSON"]);
    expect_invalid(&error, "line 6", &[]);
    assert!(client.jobs().await.is_empty());
    running.stop().await;
}
