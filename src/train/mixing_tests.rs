//! Jobs that mix deltas, while they wait: they hold none of them, and have them loaded when their turn comes.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures::FutureExt as _;

use super::{
    Kept, TrainerConfig, TrainerHandle,
    beginning::{Reload, Reloaded},
    encode::tests::byte_codec,
    laws::{hyper, input, lora, shape, tiny, train},
    mixing::Mix,
    plan::{BaseInfo, Inputs, Prepared, prepare, tests::params},
    resume_tests::resume,
    supervisor_tests::{PATIENCE, accept, all, log, reaches, request, states, tenant, trainer},
    transfer::{Continue, StartingDelta},
};
use crate::{
    admission::train_params::{JobEventBody, JobState, MixParams, ResolvedTraining, TrainParams},
    delta::{Delta, Task},
    ids::DeltaId,
};

/// What leases do here: whoever has a clone holds the deltas.
type Lease = Arc<()>;

fn leased(deltas: &[Arc<Delta>], lease: &Lease) -> Vec<StartingDelta> {
    let one = |(delta, i): (&Arc<Delta>, u8)| {
        StartingDelta::new(format!("d{i}@1"), DeltaId::from_bytes([i; 32]), Arc::clone(delta), Arc::clone(lease))
    };
    deltas.iter().zip(1..).map(one).collect()
}

/// Two deltas, what a job holds of them, and how often they were loaded.
struct Deltas {
    all: Vec<Arc<Delta>>,
    lease: Lease,
    loads: Arc<AtomicUsize>,
}

/// How a load ends.
#[derive(Clone, Copy)]
enum Loads {
    Well,
    Badly,
    Never,
}

impl Deltas {
    fn new() -> Self {
        let base = tiny("llama");
        let one = |seed| {
            let resolved = ResolvedTraining { seed, ..hyper(3) };
            Arc::new(train(&base, input(&base, Task::CausalLm, &lora(), resolved)).delta)
        };
        Self { all: vec![one(0), one(1)], lease: Arc::default(), loads: Arc::default() }
    }

    /// Leases that somebody holds.
    fn held(&self) -> usize {
        Arc::strong_count(&self.lease) - 1
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }

    /// A job of three steps that mixes them.
    fn job(&self, ends: Loads) -> (TrainParams, Prepared) {
        self.job_of(ends, 3)
    }

    fn job_of(&self, ends: Loads, max_steps: u32) -> (TrainParams, Prepared) {
        let base = tiny("llama");
        let (all, lease, loads) = (self.all.clone(), Arc::downgrade(&self.lease), Arc::clone(&self.loads));
        let reload = Reload::new(move || {
            loads.fetch_add(1, Ordering::SeqCst);
            let parts = leased(&all, &lease.upgrade().expect("the test goes on"));
            async move {
                match ends {
                    Loads::Well => Reloaded::Ok(parts),
                    Loads::Badly => Err("no room for d2@1".to_owned()),
                    Loads::Never => std::future::pending().await,
                }
            }
            .boxed()
        });
        let from = Mix::start(leased(&self.all, &self.lease), false, &base.sites).unwrap().reloaded_by(reload);
        let mut p = params(Task::CausalLm, vec![]);
        p.mix = Some(MixParams { deltas: vec!["d1".into(), "d2".into()], per_layer: false });
        p.hyper.max_steps = Some(max_steps);
        let data = "{\"text\": \"  \\\"!  \"}\n{\"text\": \" ! \\\" #\"}\n";
        let start = Some(Continue { from: &from, old: None });
        let inputs =
            Inputs { params: &p, train: data.as_bytes(), validation: None, forgetting: None, replay: None, start };
        let info = BaseInfo { shape: shape(&base), max_positions: base.arch.max_positions };
        let prepared = prepare(inputs, info, &byte_codec(true)).unwrap();
        (p, prepared)
    }

    async fn create(&self, trainer: &TrainerHandle, ends: Loads) -> String {
        let (p, prepared) = self.job(ends);
        trainer.create(&tenant("a"), &p, &prepared, Kept::default()).await.unwrap().id
    }

    /// Waits until they are being loaded.
    async fn until_loading(&self, times: usize) {
        let wait = async {
            while self.loads() < times {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("they are loaded");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_holds_no_delta_and_loads_them_when_its_turn_comes() {
    let (_dir, log) = log().await;
    let config = TrainerConfig { max_concurrent_jobs: 1, ..TrainerConfig::default() };
    let trainer = trainer(&log, accept(&Arc::default()), config).await;
    let (a, deltas) = (tenant("a"), Deltas::new());
    let (p, long) = request(1_000_000);
    let first = trainer.create(&a, &p, &long, Kept::default()).await.unwrap();
    reaches(&mut trainer.watch(&a, &first.id, 0).await.unwrap(), 0).await;
    let planned = deltas.job(Loads::Well);
    assert!(deltas.held() > 0, "a plan has them");
    drop(planned);
    let (well, badly) = (deltas.create(&trainer, Loads::Well).await, deltas.create(&trainer, Loads::Badly).await);
    assert_eq!((deltas.held(), deltas.loads()), (0, 0), "both wait");
    trainer.cancel(&a, &first.id).await.unwrap();
    use JobState::{Failed, Publishing, Queued, Running, Succeeded};
    assert_eq!(
        states(&all(trainer.watch(&a, &well, 0).await.unwrap()).await),
        [Queued, Running, Publishing, Succeeded]
    );
    assert_eq!(states(&all(trainer.watch(&a, &badly, 0).await.unwrap()).await), [Queued, Failed]);
    let failure = trainer.get(&a, &badly).await.unwrap().failure.unwrap();
    assert!(failure.code == "CANNOT_START" && failure.message.contains("no room for d2@1"), "{failure:?}");
    assert_eq!((deltas.held(), deltas.loads()), (0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_its_deltas_are_loaded_a_job_can_be_paused_cancelled_and_left_to_the_next_start() {
    let (_dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (a, deltas) = (tenant("a"), Deltas::new());
    let paused = deltas.create(&trainer, Loads::Never).await;
    deltas.until_loading(1).await;
    assert_eq!(trainer.get(&a, &paused).await.unwrap().state, JobState::Queued, "it still waits");
    assert_eq!(trainer.pause(&a, &paused).await.unwrap().state, JobState::Paused);
    let cancelled = deltas.create(&trainer, Loads::Never).await;
    deltas.until_loading(2).await;
    assert_eq!(trainer.cancel(&a, &cancelled).await.unwrap().state, JobState::Cancelled);
    let left = deltas.create(&trainer, Loads::Never).await;
    deltas.until_loading(3).await;
    trainer.drain(PATIENCE).await;
    assert_eq!(trainer.get(&a, &left).await.unwrap().state, JobState::Queued);
    let open: Vec<String> = log.unfinished().await.unwrap().into_iter().map(|job| job.info.id).collect();
    assert_eq!(open.len(), 2, "{open:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mix_with_a_checkpoint_whose_deltas_cannot_be_loaded_pauses_and_loses_nothing() {
    let (_dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (a, deltas) = (tenant("a"), Deltas::new());
    let (p, prepared) = deltas.job_of(Loads::Well, 1_000_000);
    let id = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap().id;
    drop(prepared);
    let mut watch = trainer.watch(&a, &id, 0).await.unwrap();
    let mut seen = reaches(&mut watch, 3).await;
    trainer.pause(&a, &id).await.unwrap();
    let kept = log.checkpoint(&id).await.unwrap().unwrap();
    // its turn comes again, and one of its deltas has no room
    resume(&trainer, &id, &deltas.job_of(Loads::Badly, 1_000_000).1).await.unwrap();
    deltas.until_loading(2).await;
    let wait = async {
        while trainer.get(&a, &id).await.unwrap().state != JobState::Paused {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it pauses");
    assert_eq!(log.checkpoint(&id).await.unwrap().unwrap().step, kept.step);
    // and once more, with room
    resume(&trainer, &id, &deltas.job_of(Loads::Well, 1_000_000).1).await.unwrap();
    seen.extend(reaches(&mut watch, kept.step as u32 + 2).await);
    use JobState::{Paused, Queued, Running};
    assert_eq!(states(&seen), [Queued, Running, Paused, Queued, Paused, Queued, Running]);
    let warned = |e: &&crate::admission::train_params::JobEventInfo| matches!(&e.body, JobEventBody::Warning(n) if n.code == "CANNOT_RESUME" && n.message.contains("no room for d2@1"));
    assert_eq!(seen.iter().filter(warned).count(), 1);
    let resumed: Vec<u32> =
        seen.iter().filter_map(|e| if let JobEventBody::Resumed(r) = &e.body { Some(r.step) } else { None }).collect();
    assert_eq!(resumed, [kept.step as u32], "only the one that was loaded went on");
    trainer.cancel(&a, &id).await.unwrap();
    all(watch).await;
    assert_eq!((deltas.held(), deltas.loads()), (0, 3));
}
