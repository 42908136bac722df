//! Clients that change everything that survives, until the server is gone.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use deltaserve::{
    delta::DeltaFiles,
    grpc::proto::{self, JobState, job_event::Body, method_part::Part},
    ids::DeltaId,
};
use tokio::task::JoinHandle;
use tonic::Status;

use crate::{
    chance::Chance,
    ledger::{Change, Ledger},
    support::*,
};

/// Names, each with one writer.
pub(crate) static NAMES: [&str; 6] = ["w0", "w1", "w2", "w3", "w4", "w5"];
const WRITERS: usize = 3;
/// Deltas of a cycle that no earlier one had.
const FRESH: u64 = 6;

/// What is uploaded, with its digests.
pub(crate) struct Pool {
    deltas: Vec<(DeltaFiles, String)>,
}

impl Pool {
    pub(crate) fn new(world: &World, cycle: u64) -> Self {
        let delta = |i| {
            let files = world.delta(1000 * cycle + i);
            let id = digest(world, &files);
            (files, id)
        };
        Self { deltas: (0..FRESH).map(delta).collect() }
    }
}

/// The digest that a version of these files has.
pub(crate) fn digest(world: &World, files: &DeltaFiles) -> String {
    DeltaId::compute(&world.base.fingerprint, &files.files).to_string()
}

/// Whether the server said no, so that nothing has changed. All else may have been done or not.
pub(crate) fn answered(status: &Status) -> bool {
    let (_, reason) = kind(status);
    !reason.is_empty() && reason != "INTERNAL"
}

/// Clients at work.
pub(crate) struct Load {
    tasks: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

impl Load {
    pub(crate) fn start(
        client: &Client,
        pool: Arc<Pool>,
        ledger: &Arc<Ledger>,
        cycle: u64,
        seed: u64,
        full: bool,
    ) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let work = |which| Work {
            client: client.clone(),
            pool: Arc::clone(&pool),
            ledger: Arc::clone(ledger),
            chance: Chance::new(seed, which),
            over: Arc::clone(&over),
        };
        let mut tasks = Vec::new();
        for (writer, names) in NAMES.chunks(NAMES.len() / WRITERS).enumerate() {
            tasks.push(tokio::spawn(work(writer as u64).write(names)));
        }
        tasks.push(tokio::spawn(work(10).read()));
        tasks.push(tokio::spawn(work(11).train(cycle, full)));
        tasks.push(tokio::spawn(work(12).datasets()));
        Self { tasks, over }
    }

    /// The clients notice that the server is gone.
    pub(crate) async fn ends(self) {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks {
            timely("the clients notice", task).await.expect("no client fails");
        }
    }
}

struct Work {
    client: Client,
    pool: Arc<Pool>,
    ledger: Arc<Ledger>,
    chance: Chance,
    over: Arc<AtomicBool>,
}

impl Work {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    async fn write(mut self, names: &'static [&'static str]) {
        while self.goes_on() {
            let name = *self.chance.of(names);
            let state = self.ledger.state(name);
            let numbers: Vec<u64> = state.versions.keys().copied().collect();
            let (files, id) = self.pool.deltas[self.chance.below(self.pool.deltas.len())].clone();
            let change = match self.chance.below(100) {
                _ if numbers.is_empty() => Change::Upload(id),
                0..55 => Change::Upload(id),
                55..75 => Change::Promote(*self.chance.of(&numbers)),
                75..88 => Change::Delete,
                _ => Change::Pin(!state.pinned),
            };
            self.ledger.begins(name, change.clone());
            match self.change(name, &change, &files).await {
                Ok(number) => self.ledger.done(name, number),
                Err(status) if answered(&status) => self.ledger.refused(name),
                Err(_) => return,
            }
        }
    }

    /// Asks for a change; of an upload, the number.
    async fn change(&self, name: &str, change: &Change, files: &DeltaFiles) -> Result<u64, Status> {
        let (client, name) = (&self.client, name.to_owned());
        Ok(match change {
            Change::Upload(id) => {
                let made = client.upload(&name, files).await?;
                assert_eq!(made.id, *id, "an upload of other bytes");
                made.number
            }
            Change::Promote(number) => client.promote(&name, &number.to_string()).await?.number,
            Change::Delete => {
                let request = proto::DeleteDeltaRequest { name, expected_id: None };
                client.deltas().delete_delta(client.request(request)).await?;
                0
            }
            Change::Pin(pinned) => {
                let request = proto::PinDeltaRequest { name, pinned: *pinned };
                client.deltas().pin_delta(client.request(request)).await?;
                0
            }
        })
    }

    async fn read(mut self) {
        while self.goes_on() {
            let name = if self.chance.percent(10) { "" } else { *self.chance.of(&NAMES) };
            match self.client.generate(ask(name, "x", 3)).await {
                Ok(said) => self.ledger.said(&said.finished.served_by.unwrap_or_default().id, said.ids),
                Err(status) if answered(&status) => tokio::task::yield_now().await,
                Err(_) => return,
            }
        }
    }

    async fn train(mut self, cycle: u64, full: bool) {
        for i in 0u32.. {
            if !self.goes_on() || self.train_one(cycle, i, full && i == 0).await.is_err() {
                return;
            }
        }
    }

    /// One job from its creation to its end. An error: the server is gone.
    async fn train_one(&mut self, cycle: u64, i: u32, full: bool) -> Result<(), ()> {
        let client = self.client.clone();
        let short = Duration::from_millis(20);
        let steps = [4, 4, 40, 100_000][(i % 4) as usize];
        let mut wanted = spec(&format!("job-{cycle}-{i}"), proto::Task::CausalLm, stories(8), steps);
        let hyper = wanted.hyper.as_mut().expect("hyper-parameters");
        match full {
            true => {
                hyper.learning_rate = Some(1e-3);
                wanted.methods = vec![proto::MethodPart { part: Some(Part::Full(proto::FullTuning {})) }];
            }
            false => hyper.checkpoint_every = Some(1),
        }
        let job = match client.create_job(wanted, "").await {
            Ok(job) => job.id,
            Err(status) if answered(&status) => {
                tokio::time::sleep(short).await;
                return Ok(());
            }
            Err(_) => return Err(()),
        };
        self.ledger.job(&job, |_| ());
        self.ledger.count("jobs");
        match i % 4 {
            2 => {
                tokio::time::sleep(self.chance.time(short)).await;
                self.pause_and_resume(&job).await?;
            }
            1 | 3 => {
                tokio::time::sleep(self.chance.time(short * 3)).await;
                self.cancel(&job).await?;
            }
            _ => {}
        }
        let events = client.events(&job, 0).await.map_err(|_| ())?;
        match events.last().and_then(|e| e.body.as_ref()) {
            Some(Body::State(end)) => self.ledger.job_ended(&job, end),
            other => panic!("a watch ended with {other:?}"),
        }
        Ok(())
    }

    async fn pause_and_resume(&self, job: &str) -> Result<(), ()> {
        match self.client.pause(job).await {
            Ok(_) => {}
            // it had ended
            Err(status) if answered(&status) => return Ok(()),
            Err(_) => return Err(()),
        }
        for _ in 0..200 {
            match self.client.job(job).await.map(|job| job.state()) {
                // it is on its way to be paused
                Ok(JobState::Queued | JobState::Running) => {}
                Ok(JobState::Paused) => match self.client.resume(job).await {
                    Ok(_) => return Ok(()),
                    Err(status) if answered(&status) => {}
                    Err(_) => return Err(()),
                },
                Ok(_) => return Ok(()),
                Err(_) => return Err(()),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.cancel(job).await
    }

    async fn cancel(&self, job: &str) -> Result<(), ()> {
        self.ledger.job(job, |note| note.cancelled = true);
        let request = self.client.request(proto::CancelJobRequest { id: job.to_owned() });
        match self.client.training().cancel_job(request).await {
            Ok(_) => Ok(()),
            Err(status) if answered(&status) => Ok(()),
            Err(_) => Err(()),
        }
    }

    async fn datasets(mut self) {
        for i in 0.. {
            if !self.goes_on() {
                return;
            }
            match self.put_dataset(&stories(4 + i % 5)).await {
                Ok(id) => {
                    self.ledger.datasets.lock().insert(id.clone());
                    self.ledger.count("datasets");
                    if self.chance.percent(60) && self.drop_dataset(id).await.is_err() {
                        return;
                    }
                }
                Err(status) if answered(&status) => {}
                Err(_) => return,
            }
            tokio::time::sleep(self.chance.time(Duration::from_millis(10))).await;
        }
    }

    async fn put_dataset(&self, jsonl: &str) -> Result<String, Status> {
        use proto::upload_dataset_request::Message;
        let header = Message::Header(proto::DatasetHeader { name: "texts".into() });
        let messages = [header, Message::Data(jsonl.as_bytes().to_vec().into())];
        let messages = messages.map(|m| proto::UploadDatasetRequest { message: Some(m) });
        let request = self.client.request(futures::stream::iter(messages));
        let reply = self.client.training().upload_dataset(request).await?.into_inner();
        Ok(reply.dataset.expect("a dataset").id)
    }

    async fn drop_dataset(&self, id: String) -> Result<(), Status> {
        self.ledger.dropped.lock().1.insert(id.clone());
        let request = self.client.request(proto::DeleteDatasetRequest { id: id.clone() });
        self.client.training().delete_dataset(request).await?;
        self.ledger.dropped.lock().0.insert(id);
        Ok(())
    }
}

/// The names of all failpoints in the sources. Each is at one place only.
pub(crate) fn failpoints() -> BTreeSet<String> {
    fn collect(folder: &Path, names: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                collect(&path, names);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("src/failpoint.rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                let found = text.split("failpoint!(\"").skip(1).filter_map(|rest| rest.split('"').next());
                names.extend(found.map(str::to_owned));
            }
        }
    }
    let mut names = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
    let all: BTreeSet<String> = names.iter().cloned().collect();
    assert_eq!(all.len(), names.len(), "two places have the same name: {names:?}");
    all
}

#[test]
fn every_change_of_state_has_failpoints_with_names_of_their_own() {
    let names = failpoints();
    for change in ["publish", "delete", "alias", "pin", "job-create", "job-change", "job-blob", "dataset"] {
        for side in ["before-commit", "committed"] {
            assert!(names.contains(&format!("{change}-{side}")), "{change}-{side} is not there: {names:?}");
        }
    }
    assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c == '-')), "{names:?}");
}
