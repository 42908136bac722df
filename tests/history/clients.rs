//! Clients that read, write, train and leave with random timing, and write down what they saw.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use deltaserve::{
    delta::DeltaFiles,
    grpc::proto::{self, JobState, job_event::Body},
};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::{
    chance::Chance,
    inputs::{ask_all, keys, refused, text_keys, version},
    prints::{Name, Print},
    record::{Answer, Call, Change, Key, Stage, Time, Version, What, Wrote},
    support::*,
};

const READERS: u64 = 5;
const WRITERS: u64 = 2;

/// What all clients share.
pub(crate) struct Scene {
    pub(crate) client: Client,
    pub(crate) names: Vec<Name>,
    pub(crate) trained: Name,
    started: Instant,
    calls: Mutex<Vec<Call>>,
    /// Soaks write nothing down.
    keeps: bool,
    over: AtomicBool,
    /// Version numbers that were acknowledged, by name.
    numbers: Mutex<BTreeMap<String, BTreeSet<u64>>>,
    /// Files of what jobs published, by digest.
    pub(crate) made: Mutex<BTreeMap<String, DeltaFiles>>,
    pub(crate) operations: AtomicUsize,
    pub(crate) failed: AtomicUsize,
}

impl Scene {
    pub(crate) fn new(client: &Client, names: Vec<Name>, trained: Name, keeps: bool) -> Arc<Self> {
        Arc::new(Self {
            client: client.clone(),
            names,
            trained,
            started: Instant::now(),
            calls: Mutex::default(),
            keeps,
            over: AtomicBool::new(false),
            numbers: Mutex::default(),
            made: Mutex::default(),
            operations: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
        })
    }

    pub(crate) fn now(&self) -> Time {
        self.started.elapsed().as_micros() as Time
    }

    pub(crate) fn add(&self, begun: Time, what: What) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        if self.keeps {
            let ended = self.now();
            self.calls.lock().push(Call { begun, ended, what });
        }
    }

    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock())
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    fn knows(&self, name: &str, number: u64) {
        let mut numbers = self.numbers.lock();
        let known = numbers.entry(name.to_owned()).or_default();
        known.insert(number);
        // old ones are mostly deleted
        while known.len() > 12 {
            known.pop_first();
        }
    }

    fn a_number(&self, name: &str, chance: &mut Chance) -> Option<u64> {
        let numbers = self.numbers.lock();
        let known: Vec<u64> = numbers.get(name)?.iter().copied().collect();
        (!known.is_empty()).then(|| *chance.of(&known))
    }

    /// Starts all clients.
    pub(crate) fn start(self: &Arc<Self>, seed: u64) -> Vec<JoinHandle<()>> {
        let mut tasks = Vec::new();
        for i in 0..READERS {
            tasks.push(tokio::spawn(Arc::clone(self).read(Chance::new(seed, i))));
        }
        for i in 0..WRITERS {
            tasks.push(tokio::spawn(Arc::clone(self).write(Chance::new(seed, 100 + i))));
        }
        tasks.push(tokio::spawn(Arc::clone(self).train(Chance::new(seed, 200))));
        tasks.push(tokio::spawn(Arc::clone(self).leave(Chance::new(seed, 300))));
        tasks.push(tokio::spawn(Arc::clone(self).look(Chance::new(seed, 400))));
        tasks
    }

    /// Tells the clients to stop, and waits until they have.
    pub(crate) async fn stop(&self, tasks: Vec<JoinHandle<()>>) {
        self.over.store(true, Ordering::Relaxed);
        for task in tasks {
            timely("a client ends", task).await.expect("no client fails");
        }
    }

    /// One read, written down. `delta` is what the request says, `name` and `number` what that means.
    pub(crate) async fn ask(&self, client: &Client, (name, number): (&str, Option<u64>), keys: &[Key], alone: bool) {
        let bare = name.rsplit('/').next().unwrap_or_default();
        let reference = number.map_or_else(|| bare.to_owned(), |n| format!("{bare}@{n}"));
        let begun = self.now();
        let answer = match ask_all(client, &reference, keys).await {
            Ok((by, values)) => {
                assert_eq!(by.name, bare, "asked for {reference}");
                Answer::By(version(&by), values)
            }
            Err(status) => self.no_answer(&status),
        };
        self.add(begun, What::Read { name: name.to_owned(), number, answer, alone });
    }

    fn no_answer(&self, status: &Status) -> Answer {
        match status.code() {
            Code::NotFound => Answer::NotFound,
            Code::Unknown | Code::InvalidArgument | Code::Unimplemented => panic!("a read ended with {status:?}"),
            _ => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                Answer::Failed
            }
        }
    }

    async fn read(self: Arc<Self>, mut chance: Chance) {
        while self.goes_on() {
            let at = chance.below(self.names.len() + 2);
            let (client, path, classifies) = match self.names.get(at) {
                Some(name) => (self.client.tenant(name.tenant), name.path(), name.classifies()),
                None if at == self.names.len() => (self.client.clone(), self.trained.path(), false),
                None => (self.client.clone(), String::new(), false),
            };
            let number = if chance.percent(25) { self.a_number(&path, &mut chance) } else { None };
            let all = keys(classifies);
            let first = *chance.of(&all);
            let is_kind = |key: &&Key| std::mem::discriminant(*key) == std::mem::discriminant(&first);
            let wanted: Vec<Key> =
                if chance.percent(30) { all.iter().filter(is_kind).copied().collect() } else { vec![first] };
            self.ask(&client, (&path, number), &wanted, false).await;
            if chance.percent(20) {
                tokio::time::sleep(chance.time(Duration::from_millis(20))).await;
            }
        }
    }

    async fn write(self: Arc<Self>, mut chance: Chance) {
        while self.goes_on() {
            let at = chance.below(self.names.len() + 1);
            let name = self.names.get(at).unwrap_or(&self.trained);
            match chance.below(100) {
                0..45 if !name.prints.is_empty() => self.upload(name, &mut chance).await,
                45..55 => self.must_fail(name, &mut chance).await,
                55..80 => self.promote(name, &mut chance).await,
                80..90 => self.delete(name).await,
                90..100 => self.pin(name, &mut chance).await,
                _ => {}
            }
            tokio::time::sleep(chance.time(Duration::from_millis(15))).await;
        }
    }

    fn wrote(&self, (begun, name): (Time, &str), change: Change, done: Result<Option<Version>, Status>) {
        let wrote = match done {
            Ok(version) => {
                if let Some(version) = &version {
                    self.knows(name, version.number);
                }
                Wrote::Done(version)
            }
            Err(status) if refused(&status) => Wrote::Refused,
            Err(_) => Wrote::Unknown,
        };
        self.add(begun, What::Write { name: name.to_owned(), change, wrote });
    }

    async fn upload(&self, name: &Name, chance: &mut Chance) {
        let print: &Print = chance.of(&name.prints);
        let client = self.client.tenant(name.tenant);
        let begun = self.now();
        let upload = client.upload(name.name, &print.files);
        // some clients hang up, at any time
        let patience = if chance.percent(10) { chance.time(Duration::from_millis(10)) } else { PATIENCE };
        let done = match tokio::time::timeout(patience, upload).await {
            Ok(Ok(made)) => {
                assert_eq!(made.id, print.id, "an upload of other bytes");
                Ok(Some(Version { number: made.number, id: made.id }))
            }
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::cancelled("the client has left")),
        };
        self.wrote((begun, &name.path()), Change::Publish { id: Some(print.id.clone()), job: None }, done);
    }

    /// An upload that must be refused: on the wrong condition, or of files that are broken.
    async fn must_fail(&self, name: &Name, chance: &mut Chance) {
        let Some(never) = &name.never else { return };
        let client = self.client.tenant(name.tenant);
        let mut header = proto::UploadHeader { name: name.name.into(), ..Default::default() };
        let mut files = never.files.clone();
        if chance.percent(50) {
            // never the current one: nobody uploads it
            let mode = proto::PublishMode::CompareAndSwap.into();
            header.policy = Some(proto::PublishPolicy { mode, expected_id: never.id.clone() });
        } else {
            let weights = files.files.get_mut("adapter_model.safetensors").expect("weights");
            *weights = weights.slice(..weights.len() - 1 - chance.below(weights.len() / 2));
        }
        let begun = self.now();
        let Err(status) = client.upload_with(header, &files).await else {
            panic!("an upload of {} had to be refused", name.path());
        };
        let change = Change::Publish { id: Some(never.id.clone()), job: None };
        self.wrote((begun, &name.path()), change, Err(status));
    }

    async fn promote(&self, name: &Name, chance: &mut Chance) {
        let path = name.path();
        let Some(number) = self.a_number(&path, chance) else { return };
        let client = self.client.tenant(name.tenant);
        let begun = self.now();
        let done = client.promote(name.name, &number.to_string()).await;
        let done = done.map(|made| Some(Version { number, id: made.id }));
        self.wrote((begun, &path), Change::Promote(number), done);
    }

    pub(crate) async fn delete(&self, name: &Name) {
        let client = self.client.tenant(name.tenant);
        let request = proto::DeleteDeltaRequest { name: name.name.into(), expected_id: None };
        let begun = self.now();
        let done = client.deltas().delete_delta(client.request(request)).await.map(|_| None);
        self.wrote((begun, &name.path()), Change::Delete, done);
    }

    /// Pins say nothing about what is current; they are there to be in the way.
    async fn pin(&self, name: &Name, chance: &mut Chance) {
        let client = self.client.tenant(name.tenant);
        let request = proto::PinDeltaRequest { name: name.name.into(), pinned: chance.percent(50) };
        match client.deltas().pin_delta(client.request(request)).await {
            Ok(_) => {}
            Err(status) => assert!(refused(&status) || status.code() == Code::Internal, "a pin ended with {status:?}"),
        }
    }

    async fn train(self: Arc<Self>, mut chance: Chance) {
        let client = &self.client;
        while self.goes_on() {
            let mut wanted = spec(self.trained.name, proto::Task::CausalLm, stories(8), 2 + chance.below(6) as u32);
            wanted.hyper.as_mut().expect("hyper-parameters").seed = Some(chance.below(1 << 20) as u64);
            if chance.percent(20) {
                // fails at its end if the name is there then
                let mode = proto::PublishMode::Create.into();
                wanted.publish = Some(proto::PublishPolicy { mode, ..Default::default() });
            }
            let cancels = chance.percent(25);
            let begun = self.now();
            let Ok(job) = client.create_job(wanted, "").await else { continue };
            for _ in 0..1 + chance.below(4) {
                self.look_at(&job.id).await;
                tokio::time::sleep(chance.time(Duration::from_millis(10))).await;
            }
            if cancels {
                let request = client.request(proto::CancelJobRequest { id: job.id.clone() });
                client.training().cancel_job(request).await.expect("a cancel");
            }
            let end = match client.events(&job.id, 0).await.expect("a watch").pop().and_then(|e| e.body) {
                Some(Body::State(end)) => end,
                other => panic!("a watch ended with {other:?}"),
            };
            let made = end.result.as_ref().map(|r| Version { number: r.number, id: r.id.clone() });
            let wrote = if made.is_some() { Wrote::Done(made.clone()) } else { Wrote::Refused };
            let path = self.trained.path();
            let change = Change::Publish { id: None, job: Some(job.id.clone()) };
            self.add(begun, What::Write { name: path.clone(), change, wrote });
            self.look_at(&job.id).await;
            if let Some(version) = made {
                self.knows(&path, version.number);
                // unless it was deleted meanwhile
                if let Ok(files) = client.download(&format!("{}@{}", self.trained.name, version.number)).await
                    && self.keeps
                {
                    self.made.lock().insert(version.id, files);
                }
            }
            tokio::time::sleep(chance.time(Duration::from_millis(100))).await;
        }
    }

    async fn look_at(&self, job: &str) {
        let begun = self.now();
        let state = self.client.job(job).await.expect("the job").state();
        let stage = match state {
            JobState::Succeeded => Stage::Succeeded,
            JobState::Publishing => Stage::Publishing,
            JobState::Failed | JobState::Cancelled | JobState::Interrupted => Stage::EndedWithout,
            _ => Stage::Before,
        };
        self.add(begun, What::Job { id: job.to_owned(), stage });
    }

    /// Streams that are begun and left.
    async fn leave(self: Arc<Self>, mut chance: Chance) {
        while self.goes_on() {
            let name = chance.of(&self.names).clone();
            let client = self.client.tenant(name.tenant);
            if let Ok(mut stream) = client.stream(ask(name.name, "once upon", 150)).await {
                // whether there is a token does not matter
                drop(tokio::time::timeout(chance.time(Duration::from_millis(40)), stream.message()).await);
            }
            tokio::time::sleep(chance.time(Duration::from_millis(40))).await;
        }
    }

    /// Looks at the memory and at every name.
    async fn look(self: Arc<Self>, mut chance: Chance) {
        while self.goes_on() {
            self.look_at_memory(false).await;
            for name in self.names.iter().chain([&self.trained]) {
                self.look_at_name(name).await;
            }
            tokio::time::sleep(chance.time(Duration::from_millis(100))).await;
        }
    }

    pub(crate) async fn look_at_memory(&self, emptied: bool) {
        let begun = self.now();
        let memory = self.client.info().await.expect("server info").residency.unwrap_or_default();
        let (bytes, resident, budget) = (memory.bytes, memory.resident, memory.budget_bytes);
        self.add(begun, What::Memory { bytes, resident, budget, emptied });
    }

    pub(crate) async fn look_at_name(&self, name: &Name) {
        let client = self.client.tenant(name.tenant);
        let begun = self.now();
        let (answer, versions) = match client.delta(name.name).await {
            Ok(reply) => {
                let current = reply.delta.unwrap_or_default();
                let versions = reply.versions.into_iter();
                let versions = versions.map(|v| (Version { number: v.number, id: v.id }, v.origin)).collect();
                (Answer::By(Version { number: current.number, id: current.id }, vec![]), versions)
            }
            Err(status) => (self.no_answer(&status), vec![]),
        };
        self.add(begun, What::Read { name: name.path(), number: None, answer, alone: false });
        self.add(begun, What::List { name: name.path(), versions });
    }
}

/// What a version says alone, one input after the other, on a server where nothing else runs.
pub(crate) async fn says_alone(
    client: &Client,
    reference: &str,
    classifies: bool,
) -> BTreeMap<Key, crate::record::Value> {
    let mut says = BTreeMap::new();
    let all = if reference.is_empty() { text_keys() } else { keys(classifies) };
    for key in all {
        let (_, values) = ask_all(client, reference, &[key]).await.expect("an answer");
        says.extend(values);
    }
    says
}
