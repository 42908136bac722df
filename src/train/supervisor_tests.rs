//! Laws of the job machinery: exactly one terminal state, gap-free events, cancel, limits, restart, failing publishes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use tokio::sync::Notify;

use super::{
    JobWatch, Kept, PublishFailure, PublishJob, Published, Publisher, TrainError, TrainerConfig, TrainerHandle,
    TrainerParts,
    joblog::{JobLog, LogError},
    laws::{shape, tiny},
    memory::MemoryProbe,
    plan::{BaseInfo, Inputs, Prepared, prepare, tests::params},
};
use crate::{
    admission::train_params::{JobEventBody, JobEventInfo, JobState, LoraPart, MethodPart, TrainParams},
    delta::Task,
    ids::{DeltaId, TenantId},
    model::Base,
    pacing::Pacer,
    store::Store,
    train::encode::tests::byte_codec,
};

pub(super) async fn log() -> (tempfile::TempDir, JobLog) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    (dir, JobLog::new(store))
}

pub(super) fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

pub(super) fn request(max_steps: u32) -> (TrainParams, Prepared) {
    let lora = MethodPart::Lora(LoraPart { rank: Some(2), ..LoraPart::default() });
    request_of(&tiny("llama"), lora, max_steps)
}

pub(super) fn request_of(base: &Base, method: MethodPart, max_steps: u32) -> (TrainParams, Prepared) {
    let mut p = params(Task::CausalLm, vec![method]);
    p.hyper.max_steps = Some(max_steps);
    let data = "{\"text\": \"  \\\"!  \"}\n{\"text\": \" ! \\\" #\"}\n";
    let inputs =
        Inputs { params: &p, train: data.as_bytes(), validation: None, forgetting: None, replay: None, start: None };
    let info = BaseInfo { shape: shape(base), max_positions: base.arch.max_positions };
    let prepared = prepare(inputs, info, &byte_codec(true)).unwrap();
    (p, prepared)
}

pub(super) fn accept(count: &Arc<AtomicUsize>) -> Publisher {
    let count = Arc::clone(count);
    Arc::new(move |job: PublishJob| {
        let number = count.fetch_add(1, Ordering::SeqCst) as u64 + 1;
        async move {
            assert!(!job.delta.patches().is_empty());
            Ok(Published::Version { number, id: DeltaId::from_bytes([number as u8; 32]) })
        }
        .boxed()
    })
}

pub(super) async fn trainer(log: &JobLog, publisher: Publisher, config: TrainerConfig) -> TrainerHandle {
    paced(Arc::new(Pacer::new(Duration::from_millis(5), 0.0)), log, publisher, config).await
}

async fn paced(pacer: Arc<Pacer>, log: &JobLog, publisher: Publisher, config: TrainerConfig) -> TrainerHandle {
    let memory = MemoryProbe::of_machine(None, false);
    let parts = TrainerParts { base: tiny("llama"), pacer, log: log.clone(), publisher, memory };
    TrainerHandle::spawn(parts, config).await.unwrap().0
}

/// Longer than anything here takes on a busy machine, short enough to tell a hang.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A watch's next event.
pub(super) async fn next(watch: &mut JobWatch) -> Result<Option<JobEventInfo>, TrainError> {
    tokio::time::timeout(PATIENCE, watch.next()).await.expect("a job that goes on")
}

pub(super) async fn all(mut watch: JobWatch) -> Vec<JobEventInfo> {
    let mut out = Vec::new();
    while let Some(event) = next(&mut watch).await.unwrap() {
        out.push(event);
    }
    out
}

/// Follows a job to a metric of a step after `step`.
pub(super) async fn reaches(watch: &mut JobWatch, step: u32) -> Vec<JobEventInfo> {
    let mut seen = Vec::new();
    loop {
        let event = next(watch).await.unwrap().unwrap();
        let there = matches!(&event.body, JobEventBody::Metrics(m) if m.step > step);
        seen.push(event);
        if there {
            return seen;
        }
    }
}

pub(super) fn states(events: &[JobEventInfo]) -> Vec<JobState> {
    let state = |e: &JobEventInfo| match &e.body {
        JobEventBody::State(s) => Some(s.state),
        _ => None,
    };
    events.iter().filter_map(state).collect()
}

pub(super) fn gap_free(events: &[JobEventInfo], from: u64) {
    let seqs: Vec<u64> = events.iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (from..from + events.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_to_success_with_a_gap_free_replayable_stream() {
    let (_dir, log) = log().await;
    let count = Arc::default();
    let trainer = trainer(&log, accept(&count), TrainerConfig::default()).await;
    let (p, prepared) = request(12);
    let a = tenant("a");
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    assert_eq!((job.state, job.last_seq), (JobState::Queued, 1));
    let live = all(trainer.watch(&a, &job.id, 0).await.unwrap()).await;
    gap_free(&live, 1);
    use JobState::{Publishing, Queued, Running, Succeeded};
    assert_eq!(states(&live), [Queued, Running, Publishing, Succeeded]);
    assert!(live.iter().any(|e| matches!(&e.body, JobEventBody::Metrics(m) if m.step == 12 && m.loss.is_finite())));
    assert_eq!(live, all(trainer.watch(&a, &job.id, 1).await.unwrap()).await, "a replay equals what was sent");
    let tail = all(trainer.watch(&a, &job.id, 3).await.unwrap()).await;
    gap_free(&tail, 3);
    let done = trainer.get(&a, &job.id).await.unwrap();
    assert_eq!((done.state, done.step, done.result.unwrap().number), (JobState::Succeeded, 12, 1));
    assert_eq!(count.load(Ordering::SeqCst), 1);
    // nothing may follow the end, and other tenants see nothing
    let more = log.append(&job.id, 0, live[0].body.clone()).await;
    assert!(matches!(more, Err(LogError::Ended(_))));
    assert!(matches!(trainer.get(&tenant("b"), &job.id).await, Err(TrainError::NotFound(_))));
    assert!(matches!(trainer.watch(&tenant("b"), &job.id, 0).await, Err(TrainError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_ends_waiting_and_running_jobs_and_frees_their_place() {
    let (_dir, log) = log().await;
    let count = Arc::default();
    let config =
        TrainerConfig { max_concurrent_jobs: 1, max_jobs: 2, max_jobs_per_tenant: 9, ..TrainerConfig::default() };
    let trainer = trainer(&log, accept(&count), config).await;
    let (p, prepared) = request(1_000_000);
    let a = tenant("a");
    let running = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &running.id, 0).await.unwrap();
    reaches(&mut watch, 0).await;
    let waiting = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    assert!(matches!(trainer.create(&a, &p, &prepared, Kept::default()).await, Err(TrainError::Overloaded(_))));
    assert_eq!(trainer.cancel(&a, &waiting.id).await.unwrap().state, JobState::Cancelled);
    trainer.cancel(&a, &running.id).await.unwrap();
    assert_eq!(states(&all(watch).await), [JobState::Cancelled]);
    assert_eq!(trainer.cancel(&a, &running.id).await.unwrap().state, JobState::Cancelled, "again changes nothing");
    assert_eq!(count.load(Ordering::SeqCst), 0, "a cancelled job publishes nothing");
    let (p, prepared) = request(2);
    let next = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    assert_eq!(states(&all(trainer.watch(&a, &next.id, 0).await.unwrap()).await).last(), Some(&JobState::Succeeded));
}

/// Serving is always busy, and no slowdown is permitted: training would wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_serving_holds_are_cancelled_paused_and_stopped() {
    let (_dir, log) = log().await;
    let pacer = Arc::new(Pacer::new(Duration::from_secs(3600), 0.0).keeping(0.0));
    let config = TrainerConfig { max_concurrent_jobs: 3, ..TrainerConfig::default() };
    let trainer = paced(Arc::clone(&pacer), &log, accept(&Arc::default()), config).await;
    let (a, (p, prepared)) = (tenant("a"), request(1_000_000));
    let mut jobs = Vec::new();
    for _ in 0..3 {
        let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
        let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
        reaches(&mut watch, 0).await;
        jobs.push((job.id, watch));
    }
    pacer.set_busy(true);
    let Ok([(cancelled, mut first), (paused, mut second), (stopped, _)]) = <[_; 3]>::try_from(jobs) else {
        panic!("three jobs");
    };
    trainer.cancel(&a, &cancelled).await.unwrap();
    for (id, watch, to) in [(&cancelled, &mut first, JobState::Cancelled), (&paused, &mut second, JobState::Paused)] {
        if to == JobState::Paused {
            trainer.pause(&a, id).await.unwrap();
        }
        while !matches!(&next(watch).await.unwrap().expect("goes on").body, JobEventBody::State(s) if s.state == to) {}
    }
    trainer.drain(PATIENCE).await;
    let left = log.get(&a, &stopped).await.unwrap().expect("kept");
    assert_eq!(left.state, JobState::Queued);
    assert!(log.checkpoint(&stopped).await.unwrap().is_some(), "it goes on where it was");
    assert!(pacer.is_busy());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_several_tenants_take_turns() {
    let (_dir, log) = log().await;
    let config =
        TrainerConfig { max_concurrent_jobs: 3, max_jobs: 11, max_jobs_per_tenant: 2, ..TrainerConfig::default() };
    let trainer = trainer(&log, accept(&Arc::default()), config).await;
    let (p, prepared) = request(1_000_000);
    let mut jobs = Vec::new();
    for name in ["a", "b", "c"] {
        jobs.push((tenant(name), trainer.create(&tenant(name), &p, &prepared, Kept::default()).await.unwrap().id));
    }
    trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
    assert!(
        matches!(trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await, Err(TrainError::Overloaded(_))),
        "one tenant's flood"
    );
    for (t, id) in &jobs {
        let mut watch = trainer.watch(t, id, 0).await.unwrap();
        reaches(&mut watch, 3).await;
    }
    trainer.drain(PATIENCE).await;
    for (t, id) in &jobs {
        let job = trainer.get(t, id).await.unwrap();
        assert!(job.state == JobState::Queued && job.step > 3, "{job:?}");
        assert!(log.checkpoint(id).await.unwrap().is_some_and(|c| c.step == u64::from(job.step)));
    }
    assert!(matches!(trainer.create(&tenant("b"), &p, &prepared, Kept::default()).await, Err(TrainError::Draining)));
    assert_eq!(log.unfinished().await.unwrap().len(), 4, "what ran and what waited goes on at the next start");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tenants_queue_does_not_go_ahead_of_anothers() {
    let (_dir, log) = log().await;
    let config = TrainerConfig { max_concurrent_jobs: 1, ..TrainerConfig::default() };
    let trainer = trainer(&log, accept(&Arc::default()), config).await;
    let make = async |name: &str, steps| {
        let (p, prepared) = request(steps);
        trainer.create(&tenant(name), &p, &prepared, Kept::default()).await.unwrap().id
    };
    let first = make("z", 1_000_000).await;
    let mut jobs = Vec::new();
    for name in ["a", "a", "a", "b", "c"] {
        jobs.push((tenant(name), make(name, 2).await));
    }
    trainer.cancel(&tenant("z"), &first).await.unwrap();
    let mut numbers = Vec::new();
    for (t, id) in &jobs {
        all(trainer.watch(t, id, 0).await.unwrap()).await;
        numbers.push(trainer.get(t, id).await.unwrap().result.unwrap().number);
    }
    assert_eq!(numbers, [1, 4, 5, 2, 3], "in turns of tenants");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_publish_fails_the_job_and_keeps_its_weights() {
    let (_dir, log) = log().await;
    let refuse: Publisher = Arc::new(|_| {
        async { Err(PublishFailure { code: "PUBLISH_CONFLICT".into(), message: "replaced meanwhile".into() }) }.boxed()
    });
    let panics: Publisher = Arc::new(|_| async { panic!("disk") }.boxed());
    let at_once: Publisher = Arc::new(|_| panic!("before it waits"));
    for (publisher, code) in [(refuse, "PUBLISH_CONFLICT"), (panics, "INTERNAL"), (at_once, "INTERNAL")] {
        let trainer = trainer(&log, publisher, TrainerConfig::default()).await;
        let (p, prepared) = request(2);
        let job = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
        let events = all(trainer.watch(&tenant("a"), &job.id, 0).await.unwrap()).await;
        assert_eq!(states(&events).last(), Some(&JobState::Failed));
        assert!(events.iter().any(|e| matches!(&e.body, JobEventBody::Checkpoint(c) if !c.blob.is_empty())));
        assert_eq!(trainer.get(&tenant("a"), &job.id).await.unwrap().failure.unwrap().code, code);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverging_job_fails_and_never_publishes() {
    let (_dir, log) = log().await;
    let count = Arc::default();
    let trainer = trainer(&log, accept(&count), TrainerConfig::default()).await;
    let (p, mut prepared) = request(50);
    prepared.reply.resolved.learning_rate = 1e9;
    prepared.reply.resolved.warmup_steps = 0;
    let job = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
    let events = all(trainer.watch(&tenant("a"), &job.id, 0).await.unwrap()).await;
    assert_eq!(states(&events), [JobState::Queued, JobState::Running, JobState::Failed]);
    assert!(events.iter().any(|e| matches!(&e.body, JobEventBody::Checkpoint(_))), "the last good checkpoint is kept");
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_idempotency_key_is_one_job() {
    let (_dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (mut p, prepared) = request(3);
    p.idempotency_key = Some("k".into());
    let first = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
    assert_eq!(trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap().id, first.id);
    assert_ne!(
        trainer.create(&tenant("b"), &p, &prepared, Kept::default()).await.unwrap().id,
        first.id,
        "keys are per tenant"
    );
    p.output_name = "other".into();
    let conflict = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await;
    assert!(matches!(conflict, Err(TrainError::Log(LogError::IdempotencyConflict(_)))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_publish_delays_no_other_job() {
    let (_dir, log) = log().await;
    let gate = Arc::new(Notify::new());
    let slow: Publisher = {
        let gate = Arc::clone(&gate);
        Arc::new(move |job: PublishJob| {
            let gate = Arc::clone(&gate);
            async move {
                if job.tenant.as_str() == "slow" {
                    gate.notified().await;
                }
                Ok(Published::Version { number: 1, id: DeltaId::from_bytes([1; 32]) })
            }
            .boxed()
        })
    };
    let trainer = trainer(&log, slow, TrainerConfig::default()).await;
    let (p, prepared) = request(2);
    let stuck = trainer.create(&tenant("slow"), &p, &prepared, Kept::default()).await.unwrap();
    let other = trainer.create(&tenant("b"), &p, &prepared, Kept::default()).await.unwrap();
    let events = all(trainer.watch(&tenant("b"), &other.id, 0).await.unwrap()).await;
    assert_eq!(states(&events).last(), Some(&JobState::Succeeded));
    assert!(!trainer.get(&tenant("slow"), &stuck.id).await.unwrap().state.is_terminal());
    gate.notify_one();
    let events = all(trainer.watch(&tenant("slow"), &stuck.id, 0).await.unwrap()).await;
    assert_eq!(states(&events).last(), Some(&JobState::Succeeded));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_trainer_thread_has_ended_jobs_are_told_so_and_are_left_to_the_next_start() {
    use super::{
        handle::Shared,
        supervisor::{Parts, Supervisor},
    };
    let (_dir, log) = log().await;
    let shared = Arc::new(Shared::new(log.clone()));
    let (starts, _taken) = std::sync::mpsc::sync_channel(1);
    let (to_self, commands) = tokio::sync::mpsc::channel(1);
    let (dies, reports) = tokio::sync::mpsc::channel(1);
    drop(dies);
    let supervisor = Supervisor::new(Parts {
        shared: Arc::clone(&shared),
        publisher: accept(&Arc::default()),
        memory: MemoryProbe::of_machine(None, false),
        pacer: Arc::new(Pacer::new(Duration::from_millis(5), 0.0)),
        weights: Arc::default(),
        max_running: 1,
        max_paused: 1,
        starts,
        commands,
        to_self: to_self.downgrade(),
        reports,
    });
    supervisor.run().await;
    assert!(matches!(shared.gone(), TrainError::Down));

    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (a, (p, prepared)) = (tenant("a"), request(1_000_000));
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
    reaches(&mut watch, 0).await;
    let alive = trainer.alive();
    assert!(*alive.borrow());
    trainer.shared.set_down();
    trainer.shared.forget_all_but(&[]);
    assert!(!*alive.borrow());
    let refused = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap_err();
    assert!(matches!(refused, TrainError::Down) && refused.to_string().contains("restarted"), "{refused}");
    assert!(matches!(trainer.cancel(&a, &job.id).await, Err(TrainError::Down)));
    let end = loop {
        match next(&mut watch).await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert!(matches!(end, Err(TrainError::Down)), "{end:?}");
}
