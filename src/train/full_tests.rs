//! The life of a job that trains every weight: its turn, its memory, a restart while it publishes, and what it leaves.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;

use super::{
    Kept, PublishJob, Published, Publisher, TrainError, TrainerConfig, TrainerHandle, TrainerParts,
    full_laws::kept,
    joblog::{JobLog, NewJob},
    memory::{Memory, MemoryProbe},
    supervisor_tests::{all, log, request_of, states, tenant},
};
use crate::{
    admission::train_params::{JobEventBody, JobInfo, JobState, LoraPart, MethodPart, MetricsEvent, StateEvent},
    ids::DeltaId,
    model::Base,
    pacing::Pacer,
    store::{Models, Store},
};

/// Bytes that are available, to be changed.
#[derive(Clone)]
struct Bytes(Arc<AtomicU64>);

impl Bytes {
    fn probe(&self) -> MemoryProbe {
        let bytes = Arc::clone(&self.0);
        MemoryProbe::new(move || Memory { available: Some(bytes.load(Ordering::SeqCst)), total: Some(u64::MAX) })
    }
}

/// Keeps a folder for a model as the publisher does, with no model in it.
fn keeps(models: &Models) -> Publisher {
    let models = models.clone();
    Arc::new(move |job: PublishJob| {
        let published = match job.model {
            Some(_) => Published::Model(keep(&models, &job.job)),
            None => Published::Version { number: 1, id: DeltaId::from_bytes([1; 32]) },
        };
        async move { Ok(published) }.boxed()
    })
}

fn keep(models: &Models, job: &str) -> crate::admission::train_params::ModelResult {
    let part = models.begin(job).unwrap();
    fs::create_dir(&part).unwrap();
    fs::write(part.join("model.safetensors"), "weights").unwrap();
    models.keep(job, "f".into()).unwrap()
}

async fn trainer(base: &Arc<Base>, log: &JobLog, publisher: Publisher, memory: MemoryProbe) -> TrainerHandle {
    let pacer = Arc::new(Pacer::new(Duration::from_millis(5), 0.0));
    let parts = TrainerParts { base: Arc::clone(base), pacer, log: log.clone(), publisher, memory };
    TrainerHandle::spawn(parts, TrainerConfig::default()).await.unwrap().0
}

async fn trains(trainer: &TrainerHandle, job: &JobInfo) {
    let mut watch = trainer.watch(&tenant("a"), &job.id, 0).await.unwrap();
    while !matches!(watch.next().await.unwrap().unwrap().body, JobEventBody::Metrics(_)) {}
}

async fn ended(trainer: &TrainerHandle, job: &JobInfo) -> JobInfo {
    let watch = trainer.watch(&tenant("a"), &job.id, 0).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), all(watch)).await.unwrap();
    trainer.get(&tenant("a"), &job.id).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trains_every_weight_at_a_time_and_memory_is_asked_again_when_its_turn_comes() {
    let (dir, base) = kept("gpt2");
    let store = Store::open(&dir.path().join("data")).await.unwrap();
    let bytes = Bytes(Arc::new(AtomicU64::new(u64::MAX)));
    let trainer = trainer(&base, &JobLog::new(store.clone()), keeps(&store.models()), bytes.probe()).await;
    let a = tenant("a");
    let (p, prepared) = request_of(&base, MethodPart::Full, 1_000_000);
    let first = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    trains(&trainer, &first).await;
    let second = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let third = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    // a delta is trained beside it, past those that wait
    let (lora, small) = request_of(&base, MethodPart::Lora(LoraPart::default()), 2);
    let delta = trainer.create(&a, &lora, &small, Kept::default()).await.unwrap();
    trains(&trainer, &delta).await;
    assert_eq!(trainer.get(&a, &second.id).await.unwrap().state, JobState::Queued);
    trainer.cancel(&a, &first.id).await.unwrap();
    assert_eq!(ended(&trainer, &first).await.state, JobState::Cancelled);
    trains(&trainer, &second).await;
    assert_eq!(trainer.get(&a, &third.id).await.unwrap().state, JobState::Queued);
    bytes.0.store(17, Ordering::SeqCst);
    assert!(trainer.fit(&mut prepared.clone()).is_ok(), "another one runs: its memory comes back");
    trainer.cancel(&a, &second.id).await.unwrap();
    let failed = ended(&trainer, &third).await;
    let failure = failed.failure.unwrap();
    assert_eq!((failed.state, failure.code.as_str()), (JobState::Failed, "NOT_ENOUGH_MEMORY"));
    assert!(failure.message.contains("17 are available"), "{}", failure.message);
    let Err(TrainError::Memory(shortage)) = trainer.fit(&mut prepared.clone()) else { panic!("17 bytes do") };
    assert!(!shortage.lasting);
    assert!(trainer.fit(&mut small.clone()).is_ok(), "deltas are small");
    bytes.0.store(u64::MAX, Ordering::SeqCst);
    let mut large = prepared.clone();
    large.spec.full = Some(u64::MAX / 8);
    let failure = {
        let job = trainer.create(&a, &p, &large, Kept::default()).await.unwrap();
        ended(&trainer, &job).await.failure.unwrap()
    };
    assert!(failure.code == "DISK_FULL" && failure.message.contains(" left"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_job_waits_for_memory_that_others_have() {
    let (dir, base) = kept("gpt2");
    let store = Store::open(&dir.path().join("data")).await.unwrap();
    let bytes = Bytes(Arc::new(AtomicU64::new(17)));
    let trainer = trainer(&base, &JobLog::new(store.clone()), keeps(&store.models()), bytes.probe()).await;
    let (p, prepared) = request_of(&base, MethodPart::Lora(LoraPart::default()), 1_000_000);
    let delta = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
    trains(&trainer, &delta).await;
    let (p, prepared) = request_of(&base, MethodPart::Full, 2);
    let full = trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(trainer.get(&tenant("a"), &full.id).await.unwrap().state, JobState::Queued);
    bytes.0.store(u64::MAX, Ordering::SeqCst);
    let done = ended(&trainer, &full).await;
    assert_eq!(done.state, JobState::Succeeded, "{:?}", done.failure);
    let model = done.result.unwrap().model.unwrap();
    assert_eq!(store.models().find(&full.id).unwrap(), Some(model));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_small_jobs_do_not_keep_a_full_job_waiting_for_ever() {
    let (dir, base) = kept("gpt2");
    let store = Store::open(&dir.path().join("data")).await.unwrap();
    let bytes = Bytes(Arc::new(AtomicU64::new(17)));
    let trainer = trainer(&base, &JobLog::new(store.clone()), keeps(&store.models()), bytes.probe()).await;
    let a = tenant("a");
    let (lora, small) = request_of(&base, MethodPart::Lora(LoraPart::default()), 1_000_000);
    let create = || trainer.create(&a, &lora, &small, Kept::default());
    let first = create().await.unwrap();
    trains(&trainer, &first).await;
    let (p, prepared) = request_of(&base, MethodPart::Full, 2);
    let full = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let second = create().await.unwrap();
    trains(&trainer, &second).await; // passes the full job, which waits for the first
    trainer.cancel(&a, &first.id).await.unwrap();
    assert_eq!(ended(&trainer, &first).await.state, JobState::Cancelled);
    let third = create().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    for waits in [&full, &third] {
        assert_eq!(trainer.get(&a, &waits.id).await.unwrap().state, JobState::Queued);
    }
    bytes.0.store(u64::MAX, Ordering::SeqCst);
    trainer.cancel(&a, &second.id).await.unwrap();
    assert_eq!(ended(&trainer, &full).await.state, JobState::Succeeded);
    trains(&trainer, &third).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_model_outlives_a_restart_before_its_job_s_end_and_nothing_else_is_left() {
    let (_dir, log) = log().await;
    let (_kept, base) = kept("gpt2");
    let (_, prepared) = request_of(&base, MethodPart::Full, 2);
    let models = log.models();
    for id in ["whole", "half"] {
        let new = NewJob {
            id: id.into(),
            tenant: tenant("a"),
            output_name: id.into(),
            request_json: "{}".into(),
            resolved: prepared.reply.resolved.clone(),
            idempotency_key: None,
            request_digest: String::new(),
            base: String::new(),
            blobs: vec![],
        };
        log.create(new).await.unwrap();
        let loss = MetricsEvent { loss: 1.5, ..MetricsEvent::default() };
        log.append(id, 2, JobEventBody::Metrics(loss)).await.unwrap();
        let state = StateEvent { state: JobState::Publishing, result: None, failure: None };
        log.append(id, 2, JobEventBody::State(state)).await.unwrap();
    }
    let kept = keep(&models, "whole");
    fs::create_dir(models.begin("half").unwrap()).unwrap();
    fs::create_dir(models.path("moved")).unwrap(); // its job was never heard of
    let memory = MemoryProbe::of_machine(None, false);
    let trainer = trainer(&base, &log, keeps(&models), memory.clone()).await;
    let whole = trainer.get(&tenant("a"), "whole").await.unwrap();
    let result = whole.result.unwrap();
    assert_eq!((whole.state, result.final_loss, result.model), (JobState::Succeeded, 1.5, Some(kept.clone())));
    let events = all(trainer.watch(&tenant("a"), "half", 0).await.unwrap()).await;
    assert_eq!(states(&events), [JobState::Publishing, JobState::Interrupted]);
    let left = || {
        let names = fs::read_dir(models.path("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    assert_eq!(left(), ["whole", "whole.json"]);
    drop(trainer);
    let again = self::trainer(&base, &log, keeps(&models), memory).await;
    assert_eq!((left().len(), models.find("whole").unwrap()), (2, Some(kept)), "the next start keeps it");
    assert!(again.unfinished() == 0);
}
