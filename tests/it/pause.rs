//! Jobs that stop and go on: what they make is, byte for byte, what they would have made; or there is a clear answer.

use std::path::Path;

use deltaserve::{delta::DeltaFiles, grpc::proto};
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::support::*;

/// Everything with a state: dropout, accumulation, evaluations, a schedule; a checkpoint at every step that can be kept.
fn busy(name: &str, steps: u32) -> proto::TrainingSpec {
    let lora = proto::Lora { rank: Some(4), dropout: Some(0.1), ..Default::default() };
    let plain = spec(name, proto::Task::CausalLm, stories(30), steps);
    let hyper = proto::HyperParameters {
        grad_accumulation: Some(2),
        schedule: proto::Schedule::Cosine.into(),
        weight_decay: Some(0.01),
        eval_every: Some(7),
        checkpoint_every: Some(1),
        ..plain.hyper.unwrap_or_default()
    };
    proto::TrainingSpec {
        methods: vec![proto::MethodPart { part: Some(proto::method_part::Part::Lora(lora)) }],
        hyper: Some(hyper),
        validation: Some(proto::training_spec::Validation::ValidationFraction(0.2)),
        ..plain
    }
}

/// Steps of those jobs: enough to be caught in the middle, also where a checkpoint is a second on its way to the disk.
const STEPS: u32 = 1_000;

/// Waits until a job has a checkpoint of this step or a later one.
async fn saved(client: &Client, job: &str, step: u32) {
    let request = client.request(proto::WatchJobRequest { id: job.into(), from_seq: 0 });
    let mut events = client.training().watch_job(request).await.expect("a watch").into_inner();
    timely("a checkpoint", async {
        while let Some(event) = events.message().await.expect("an event") {
            if matches!(event.body, Some(Body::Checkpoint(c)) if c.step >= step) {
                return;
            }
        }
        panic!("the job ended before a checkpoint of step {step}");
    })
    .await;
}

fn states(events: &[proto::JobEvent]) -> Vec<JobState> {
    let state = |e: &proto::JobEvent| match &e.body {
        Some(Body::State(s)) => Some(s.state()),
        _ => None,
    };
    events.iter().filter_map(state).collect()
}

/// A job's end, its gap-free story, and what it made.
async fn made(client: &Client, job: &str, name: &str) -> (Vec<JobState>, Vec<u32>, DeltaFiles) {
    let events = client.events(job, 0).await.expect("a watch");
    assert!(events.iter().zip(1..).all(|(e, seq)| e.seq == seq), "{name}: a gap");
    let states = states(&events);
    assert_eq!(states.last(), Some(&JobState::Succeeded), "{name}: {events:?}");
    let resumed = events.iter().filter_map(|e| if let Some(Body::Resumed(r)) = &e.body { Some(r.step) } else { None });
    (states, resumed.collect(), client.download(name).await.expect("its files"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_a_stop_and_a_kill_change_no_byte_of_what_a_job_makes() {
    use JobState::{Paused, Publishing, Queued, Running, Succeeded};
    let world = World::new();
    let mut spawned = world.spawn().await;
    let client = spawned.client.clone();
    let straight = client.create_job(busy("straight", STEPS), "").await.expect("a job");
    let (states, resumed, files) = made(&client, &straight.id, "straight").await;
    assert_eq!((states, resumed.len()), (vec![Queued, Running, Publishing, Succeeded], 0));

    let job = client.create_job(busy("paused", STEPS), "").await.expect("a job");
    saved(&client, &job.id, 20).await;
    let paused = client.pause(&job.id).await.expect("a pause");
    assert!(paused.state() == Paused && (20..STEPS).contains(&paused.step), "{paused:?}");
    let resumed = client.resume(&job.id).await.expect("it goes on");
    assert_eq!((resumed.id.as_str(), resumed.state() == Paused), (job.id.as_str(), false));
    let (states, from, got) = made(&client, &job.id, "paused").await;
    assert_eq!(states, [Queued, Running, Paused, Queued, Running, Publishing, Succeeded]);
    assert_eq!(from, [paused.step]);
    assert!(got == files, "a pause changed the files");

    let job = client.create_job(busy("killed", STEPS), "key").await.expect("a job");
    saved(&client, &job.id, 20).await;
    spawned.kill();
    let mut spawned = world.spawn().await;
    let client = spawned.client.clone();
    assert_eq!(client.create_job(busy("killed", STEPS), "key").await.expect("the job").id, job.id);
    let (states, from, got) = made(&client, &job.id, "killed").await;
    assert_eq!(states, [Queued, Running, Queued, Running, Publishing, Succeeded]);
    assert!(from.len() == 1 && from[0] >= 20, "{from:?}");
    assert!(got == files, "a kill changed the files");

    let job = client.create_job(busy("stopped", STEPS), "").await.expect("a job");
    saved(&client, &job.id, 5).await;
    spawned.terminate();
    eventually("it ends", async || spawned.child.try_wait().expect("its state").is_some()).await;
    let spawned = world.spawn().await;
    let (states, from, got) = made(&spawned.client, &job.id, "stopped").await;
    assert_eq!(states, [Queued, Running, Queued, Running, Publishing, Succeeded]);
    assert!(from.len() == 1 && from[0] >= 5, "{from:?}");
    assert!(got == files, "a stop changed the files");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_waits_or_trains_is_paused_only_what_is_paused_goes_on_and_the_answer_names_the_state() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let done = client.create_job(spec("done", proto::Task::CausalLm, stories(8), 2), "").await.expect("a job");
    client.ended(&done.id).await;
    let job_state = (Code::FailedPrecondition, "JOB_STATE".to_owned());
    for error in [client.pause(&done.id).await, client.resume(&done.id).await] {
        let error = error.expect_err("it has ended");
        assert!(kind(&error) == job_state && error.message().contains("succeeded"), "{error:?}");
    }
    let job = client.create_job(busy("style", 100_000), "").await.expect("a job");
    eventually("it runs", async || client.job(&job.id).await.is_ok_and(|j| j.step > 0)).await;
    let error = client.resume(&job.id).await.expect_err("it runs");
    assert!(kind(&error) == job_state && error.message().contains("is running, not paused"), "{error:?}");
    let other = client.tenant("other");
    for error in [other.pause(&job.id).await, other.resume(&job.id).await, client.pause("nothing").await] {
        assert_eq!(error.expect_err("not theirs").code(), Code::NotFound);
    }
    // a watcher stays through the pause
    let watch = tokio::spawn({
        let (client, id) = (client.clone(), job.id.clone());
        async move { client.events(&id, 0).await }
    });
    assert_eq!(client.pause(&job.id).await.expect("a pause").state(), JobState::Paused);
    let request = proto::ListJobsRequest { state: JobState::Paused.into(), ..Default::default() };
    let listed = client.training().list_jobs(client.request(request)).await.expect("a list").into_inner().jobs;
    assert_eq!(listed.iter().map(|j| j.id.as_str()).collect::<Vec<_>>(), [job.id.as_str()]);
    eventually("it takes no place", async || {
        client.info().await.is_ok_and(|i| i.load.unwrap_or_default().train_jobs == 0)
    })
    .await;
    let request = client.request(proto::CancelJobRequest { id: job.id.clone() });
    client.training().cancel_job(request).await.expect("a cancel");
    let events = timely("the watcher hears of it", watch).await.expect("no panic").expect("a watch");
    assert_eq!(states(&events)[1..], [JobState::Running, JobState::Paused, JobState::Cancelled]);
    let error = client.resume(&job.id).await.expect_err("it is cancelled");
    assert!(kind(&error) == job_state && error.message().contains("cancelled"), "{error:?}");
    running.stop().await;
}

/// A tokenizer that has two letters the other way round.
fn swap(tokenizer: &str) -> String {
    let swapped = tokenizer.replace("\"a\":", "\"%%\":").replacen("\"t\":", "\"a\":", 1);
    swapped.replacen("\"%%\":", "\"t\":", 1)
}

/// The file of a blob in the data directory.
fn blob(dir: &Path, digest: &str) -> std::path::PathBuf {
    dir.join("blobs").join(&digest[..2]).join(digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_keeps_its_data_and_goes_on_with_no_other() {
    let mut world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let dataset = client.upload_dataset("stories", &stories(30)).await;
    let get = proto::GetDatasetRequest { id: dataset.clone() };
    let stored = client.training().get_dataset(client.request(get)).await.expect("it").into_inner().dataset;
    let digest = stored.unwrap_or_default().digest;
    let source = Some(proto::training_data::Source::DatasetId(dataset.clone()));
    let of = |name: &str, steps| proto::TrainingSpec {
        data: Some(proto::TrainingData { source: source.clone() }),
        ..busy(name, steps)
    };
    let job = client.create_job(of("style", STEPS), "").await.expect("a job");
    let ran = client.create_job(of("ran", 100_000), "").await.expect("a job");
    eventually("both run", async || {
        client.job(&job.id).await.is_ok_and(|j| j.step > 3) && client.job(&ran.id).await.is_ok_and(|j| j.step > 3)
    })
    .await;
    let paused = client.pause(&job.id).await.expect("a pause");
    let delete = proto::DeleteDatasetRequest { id: dataset };
    client.training().delete_dataset(client.request(delete)).await.expect("it is not needed");
    running.stop().await;

    let cannot = (Code::FailedPrecondition, "CANNOT_RESUME".to_owned());
    let refused = async |world: &World, words: &str| {
        let running = world.start().await;
        let client = &running.client;
        let error = client.resume(&job.id).await.expect_err("another world");
        assert!(kind(&error) == cannot && error.message().contains(words), "{error:?}");
        let same = client.job(&job.id).await.expect("the job");
        assert!(same.state() == JobState::Paused && same.step == paused.step, "{same:?}");
        assert!(client.list().await.is_empty(), "nothing is published");
        running
    };
    // another base: the job that ran waits, too
    let source = world.config.base.source.clone();
    let other = World::of(deltaserve::model::testing::tiny_llama(), 8);
    world.config.base.source = other.config.base.source.clone();
    let running = refused(&world, "was made for the base").await;
    eventually("it is paused", async || running.client.job(&ran.id).await.is_ok_and(|j| j.state() == JobState::Paused))
        .await;
    running.stop().await;
    world.config.base.source = source;
    // the data's bytes are not what they were
    let file = blob(&world.data_dir(), &digest);
    let bytes = std::fs::read(&file).expect("it is kept");
    std::fs::write(&file, stories(29)).expect("it is changed");
    refused(&world, "cannot be prepared").await.stop().await;
    std::fs::write(&file, &bytes).expect("it is healed");
    // the same texts come to other tokens
    let tokenizer = Path::new(&world.config.base.source).join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).expect("a tokenizer");
    let swapped = swap(&text);
    assert_ne!(swapped, text);
    std::fs::write(&tokenizer, swapped).expect("it is changed");
    refused(&world, "belongs to other examples").await.stop().await;
    std::fs::write(&tokenizer, &text).expect("it is healed");

    let running = world.start().await;
    let client = &running.client;
    client.resume(&job.id).await.expect("all is as it was");
    let (_, from, files) = made(client, &job.id, "style").await;
    assert_eq!(from, [paused.step]);
    let straight = client.create_job(busy("straight", STEPS), "").await.expect("a job");
    let (_, _, same) = made(client, &straight.id, "straight").await;
    assert!(files == same, "other bytes than without a pause");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_ran_fails_with_the_reason_when_its_data_is_not_what_it_was() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let job = client.create_job(busy("style", 100_000), "").await.expect("a job");
    saved(client, &job.id, 3).await;
    running.stop().await;
    let tokenizer = Path::new(&world.config.base.source).join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).expect("a tokenizer");
    let swapped = swap(&text);
    std::fs::write(&tokenizer, swapped).expect("it is changed");
    let running = world.start().await;
    let end = running.client.ended(&job.id).await;
    let failure = end.failure.clone().unwrap_or_default();
    assert_eq!((end.state(), failure.code.as_str()), (JobState::Failed, "CANNOT_RESUME"));
    assert!(failure.message.contains("belongs to other examples"), "{failure:?}");
    assert!(running.client.list().await.is_empty(), "nothing is published");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_served_under_a_name_of_its_own_while_its_job_goes_on() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let job = client.create_job(busy("final", STEPS), "").await.expect("a job");
    saved(client, &job.id, 10).await;
    client.pause(&job.id).await.expect("a pause");
    let publish = async |id: &str, name: &str| {
        let request = proto::PublishCheckpointRequest { id: id.into(), name: name.into(), ..Default::default() };
        let reply = client.training().publish_checkpoint(client.request(request)).await?;
        Ok::<_, tonic::Status>(reply.into_inner().delta.expect("a delta"))
    };
    let early = publish(&job.id, "early").await.expect("it is published");
    let step = client.job(&job.id).await.expect("the job").step;
    assert!(early.origin.ends_with(&format!("{}@{step}", job.id)), "{}", early.origin);
    let said = client.generate(ask("early", "the red cat", 24)).await.expect("it is served");
    assert_eq!(said.finished.served_by.unwrap_or_default().id, early.id);
    assert_eq!(publish(&job.id, "again").await.expect("the same").id, early.id);
    client.resume(&job.id).await.expect("it goes on");
    // also while it runs, whatever it stores meanwhile
    let later = publish(&job.id, "early").await;
    let (_, _, files) = made(client, &job.id, "final").await;
    match later {
        Ok(later) => assert!(later.number == 2 || later.id == early.id, "{later:?}"),
        Err(error) => assert_eq!(kind(&error).1, "JOB_STATE", "it had ended: {error:?}"),
    }
    assert!(client.download("early@1").await.expect("its files") != files);
    let error = publish(&job.id, "late").await.expect_err("it has ended");
    assert_eq!(kind(&error), (Code::FailedPrecondition, "JOB_STATE".into()));
    expect_invalid(&publish(&job.id, "a/b").await.expect_err("no name"), "name", &[]);
    assert_eq!(publish("nothing", "x").await.expect_err("no job").code(), Code::NotFound);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_job_had_come_to_is_still_to_be_had_also_after_a_restart() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let policy = proto::PublishPolicy { mode: proto::PublishMode::Create.into(), expected_id: String::new() };
    let wanted = proto::TrainingSpec { publish: Some(policy), ..busy("taken", STEPS) };
    let job = client.create_job(wanted, "").await.expect("a job");
    saved(client, &job.id, 10).await;
    client.upload("taken", &world.delta(3)).await.expect("somebody takes the name");
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Failed, "{end:?}");
    running.stop().await;
    let running = world.start().await;
    let client = &running.client;
    let request = proto::PublishCheckpointRequest { id: job.id.clone(), name: "rescued".into(), ..Default::default() };
    let reply = client.training().publish_checkpoint(client.request(request)).await.expect("it is published");
    let rescued = reply.into_inner().delta.expect("a delta");
    assert!(rescued.origin.contains(&job.id), "{}", rescued.origin);
    client.generate(ask("rescued", "the red cat", 8)).await.expect("it is served");
    assert_eq!(client.job(&job.id).await.expect("the job").state(), JobState::Failed);
    running.stop().await;
}
