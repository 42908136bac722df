//! The engine's laws, on tiny random bases with random deltas.

mod activated;
mod beams;
mod caching;
mod constraint;
mod fairness;
mod following;
mod forced;
mod generation;
mod lifecycle;
mod positions;
mod prompt_only;
mod source;
mod speculation;

use std::{sync::Arc, thread::JoinHandle, time::Instant};

use candle_core::{Device, Tensor};
use tokio::sync::mpsc;

use super::*;
use crate::{
    admission::params::{FinishReason, Sampling, Timings},
    delta::{Delta, DeltaSpec, Head, LowRank, Patch, Task},
    ids::{DeltaId, TenantId},
    kv::pages_for,
    model::testing::{Rng, random_base, tiny_llama},
};

/// Sizes at which nothing is split, preempted or kept waiting.
fn roomy() -> EngineConfig {
    EngineConfig { max_batch_tokens: 2048, prefill_chunk: 2048, kv_pages: 512, ..EngineConfig::default() }
}

fn base(config: &serde_json::Value) -> Arc<Base> {
    Arc::new(random_base(config, 7).expect("base"))
}

/// New tokens of a request that is to be caught while it runs: seconds of work.
const ENDLESS: usize = 12_000;

/// A base whose context is long enough for such requests.
fn long_base() -> Arc<Base> {
    let mut config = tiny_llama();
    config["max_position_embeddings"] = 16_384.into();
    base(&config)
}

/// Pages for so many of them.
fn endless(sequences: usize) -> EngineConfig {
    EngineConfig { kv_pages: sequences * pages_for(ENDLESS + PAGE_SIZE), ..roomy() }
}

/// An engine that is shut down and joined at the end of the test.
struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
    pacer: Arc<Pacer>,
    /// How often its cache was broken by the test.
    meddled: u64,
}

impl Engine {
    fn new(base: &Arc<Base>, config: EngineConfig) -> Self {
        let pacer = Arc::new(Pacer::new(Duration::from_millis(1), 0.0));
        let (handle, thread) = spawn(Arc::clone(base), config, Arc::clone(&pacer)).expect("starts");
        Self { handle, thread: Some(thread), pacer, meddled: 0 }
    }

    fn submit(&self, job: &Job) -> mpsc::Receiver<Event> {
        let (request, events) = job.request();
        self.handle.submit(request).expect("taken");
        events
    }

    /// Until the answer is dropped, the engine thread takes nothing: what is submitted meanwhile, it finds all at once.
    fn hold(&self) -> std::sync::mpsc::SyncSender<()> {
        let (held, gate) = std::sync::mpsc::sync_channel(0);
        self.handle.commands.try_send(Command::Hold(gate)).expect("taken");
        held.send(()).expect("the thread stands at the gate");
        held
    }

    /// Has tokens guessed otherwise from now on.
    fn guessing(self, guess: drafts::Guess) -> Self {
        self.handle.commands.try_send(Command::Guess(guess)).expect("taken");
        self
    }

    /// Breaks something while nothing runs, and waits until that was found.
    fn meddle(&mut self, meddle: fn(&mut Scheduler, &mut Stepper)) {
        self.settle();
        self.meddled += 1;
        self.handle.commands.try_send(Command::Meddle(meddle)).expect("taken");
        until(|| {
            // a few pages are looked at each time it becomes idle
            let _ = self.handle.commands.try_send(Command::Wake);
            self.handle.stats().integrity_failures == self.meddled
        });
    }

    /// All at once.
    fn together(&self, jobs: &[Job]) -> Vec<Answer> {
        let held = self.hold();
        let receivers: Vec<_> = jobs.iter().map(|job| self.submit(job)).collect();
        drop(held);
        receivers.into_iter().map(Answer::read).collect()
    }

    /// Waits until nothing runs; then no page may be in use.
    fn settle(&self) {
        until(|| self.handle.stats().running + self.handle.stats().waiting == 0 && !self.pacer.is_busy());
        assert_eq!(self.handle.stats().pages_used, 0);
    }
}

/// Waits for something that the engine does within a few steps.
#[track_caller]
fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(60), "does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.shutdown(Duration::ZERO);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the engine thread ends without a panic");
            assert_eq!(self.handle.stats().integrity_failures, self.meddled, "its cache is whole");
        }
    }
}

#[derive(Clone)]
struct Job {
    tokens: Vec<u32>,
    source: Vec<u32>,
    types: Option<Vec<u32>>,
    delta: Option<(DeltaId, Arc<Delta>)>,
    tenant: Option<TenantId>,
    work: Work,
    priority: i32,
    deadline: Option<Instant>,
    /// What may follow so many tokens.
    constraint: Option<constraint::Allow>,
    /// Stands for the lease: its count falls when the engine lets the request go.
    lease: Arc<()>,
}

impl Job {
    fn new(tokens: Vec<u32>, work: Work) -> Self {
        let (source, tenant, lease) = (vec![], TenantId::new("tenant").ok(), Arc::new(()));
        Self {
            tokens,
            source,
            types: None,
            delta: None,
            tenant,
            work,
            priority: 0,
            deadline: None,
            constraint: None,
            lease,
        }
    }

    fn of(mut self, tenant: &str) -> Self {
        self.tenant = Some(TenantId::new(tenant).expect("a name"));
        self
    }

    fn with(mut self, delta: &Option<(DeltaId, Arc<Delta>)>) -> Self {
        self.delta.clone_from(delta);
        self
    }

    fn request(&self) -> (Request, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(self.work.events().min(1 << 16));
        let delta = self.delta.as_ref();
        let request = Request {
            id: 0,
            tenant: self.tenant.clone(),
            weight: 1,
            priority: self.priority,
            tokens: self.tokens.clone(),
            source: self.source.clone(),
            token_types: self.types.clone(),
            delta: delta.map(|(id, delta)| HeldDelta::new(*id, Arc::clone(delta), Arc::clone(&self.lease))),
            work: self.work.clone(),
            constraint: self.constraint.map(constraint::factory),
            deadline: self.deadline,
            events,
            permit: None,
            arrived: Instant::now(),
        };
        (request, receiver)
    }
}

#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<TokenOut>,
    finished: Option<Finished>,
    found: Option<Vec<Hypothesis>>,
    output: Option<(Output, Timings)>,
    failed: Option<EngineError>,
}

impl Answer {
    fn read(mut events: mpsc::Receiver<Event>) -> Self {
        let mut answer = Self::default();
        while let Some(event) = events.blocking_recv() {
            let last = answer.finished.is_some()
                || answer.found.is_some()
                || answer.output.is_some()
                || answer.failed.is_some();
            assert!(!last, "nothing follows the last event: {event:?}");
            match event {
                Event::Token(token, _) => answer.tokens.push(token),
                Event::Finished(finished) => answer.finished = Some(finished),
                Event::Hypotheses(found, _) => answer.found = Some(found),
                Event::Output(output, timings) => answer.output = Some((output, timings)),
                Event::Failed(error) => answer.failed = Some(error),
            }
        }
        answer
    }

    /// Tokens of its prompt whose keys and values were there.
    fn cached(&self) -> u32 {
        let usage = self.finished.as_ref().map(|f| f.usage);
        let usage = usage.or_else(|| self.found.as_ref().and_then(|f| f.first()).map(|f| f.usage));
        usage.unwrap_or_else(|| panic!("{self:?}")).cached_tokens
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    fn numbers(&self) -> Vec<f32> {
        match &self.output {
            Some((Output::Logits(x) | Output::Embedding(x) | Output::Scores(x), _)) => x.clone(),
            Some((Output::TokenLogits(rows), _)) => rows.concat(),
            None => panic!("no output: {self:?}"),
        }
    }
}

/// Same tokens, numbers within `1e-4`.
fn assert_same(a: &[Answer], b: &[Answer]) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.failed, b.failed, "request {i}");
        assert_eq!(a.ids(), b.ids(), "request {i}");
        for (x, y) in a.tokens.iter().zip(&b.tokens) {
            assert!((x.logprob - y.logprob).abs() < 1e-4, "request {i}: {x:?} {y:?}");
            assert_eq!(x.top.len(), y.top.len());
        }
        assert_eq!(a.output.is_some(), b.output.is_some());
        if a.output.is_some() {
            assert_close(&a.numbers(), &b.numbers());
        }
    }
}

fn assert_close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-4 * (1.0 + x.abs())), "{a:?}\n{b:?}");
}

fn tensor(rng: &mut Rng, shape: &[usize], spread: f32) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| spread * rng.normal()).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).expect("tensor")
}

fn spec(task: Task) -> DeltaSpec {
    DeltaSpec {
        methods: vec!["lora".into()],
        task,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    }
}

/// A random LoRA on every linear, strong enough to change what the base says; with `labels`, a head too.
fn delta(base: &Base, n: u8, labels: usize) -> Option<(DeltaId, Arc<Delta>)> {
    let mut rng = Rng(u64::from(n) * 977 + 1);
    let rank = 1 + usize::from(n % 4);
    let patches = base
        .sites
        .linears()
        .map(|(site, e)| {
            let a = tensor(&mut rng, &[rank, e.in_dim], 0.3);
            let b = tensor(&mut rng, &[rank, e.out_dim], 0.3);
            (site, Patch::LowRank(LowRank { a, b, scale: 1.0 }))
        })
        .collect();
    let hidden = base.arch.hidden;
    let head = (labels > 0).then(|| {
        let weight = tensor(&mut rng, &[labels, hidden], 0.5);
        Head::linear(weight, Some(tensor(&mut rng, &[labels], 0.5)))
    });
    let task = if labels > 0 { Task::SeqCls } else { Task::CausalLm };
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(task), patches, head))))
}

fn prompt(n: u64, len: usize) -> Vec<u32> {
    let mut rng = Rng(n * 31 + 5);
    (0..len).map(|_| 3 + (rng.uniform() * 120.0) as u32).collect()
}

fn greedy(max_new_tokens: usize) -> Work {
    Work::Generate(Generate {
        sampling: Sampling::default(),
        max_new_tokens,
        stop_tokens: vec![],
        logprobs: Some(3),
        beams: None,
        speculation: None,
    })
}
