//! One step: shares of sequences to packed rows, one forward, and what each sequence gets out of it.

use std::{ops::Range, slice::ChunksExact, sync::Arc};

use candle_core::{D, DType, Device, Result, Storage, Tensor};

use super::{
    request::{TokenOut, Work},
    sampler::{self, History},
    scheduler::Share,
    sequence::Sequence,
    source, wanted,
};
use crate::{
    admission::params::Pooling,
    delta::{Delta, DeltaBatch},
    ids::DeltaId,
    kv::KvCache,
    model::{Base, Input, Source},
    nn::{Cx, Memory, Wanted},
    ops::each,
    rows::{RowLayout, Span},
};

/// One sequence's part in a step.
pub(super) struct Task<'a> {
    pub(super) share: Share,
    pub(super) sequence: &'a Sequence,
    /// Cache slots of its keys up to the last row; empty without a cache.
    pub(super) slots: Arc<[u32]>,
    /// Cache slots of what cross-attention reads of its source; empty without one.
    pub(super) memory: Arc<[u32]>,
}

/// What a sequence gets out of a step.
#[derive(Debug, Clone)]
pub(super) enum Got {
    /// Its rows are in the cache, and nothing else was due.
    Nothing,
    /// The next token, with drafts also those behind it.
    Tokens(Chosen),
    /// The likeliest next tokens of a beam with their log-probabilities, best first.
    Candidates(Vec<(u32, f32)>),
    /// Logits that no token can be chosen from.
    NonFinite,
    /// Classification without a head.
    NoHead,
    /// Numbers to append: label logits, log-probabilities, the pooled row.
    Numbers(Vec<f32>),
    /// Numbers to add up: hidden rows.
    Sum(Vec<f32>),
    /// One vector per row: token classification.
    Rows(Vec<Vec<f32>>),
}

impl Got {
    /// Whether tokens are still to be chosen, behind a constraint that is told of those before.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Tokens(Chosen { rest: Some(_), .. }))
    }
}

/// The tokens of a sequence that a step gives.
#[derive(Debug, Clone, Default)]
pub(super) struct Chosen {
    /// Drafts that were computed with the token that was due.
    pub(super) drafted: usize,
    /// The token that was due and, while drafts were right, those behind it. What ends an output may be among them.
    pub(super) tokens: Vec<TokenOut>,
    /// Of a constrained sequence whose first draft was right: logits `[drafts, vocab]` in host memory, a view of the step's. What
    /// may come there is not known yet.
    pub(super) rest: Option<Logits>,
    /// No token could be chosen behind them.
    pub(super) non_finite: bool,
}

/// Rows of a step's logits that are still to be chosen from: `[rows, vocab]`.
#[derive(Debug, Clone)]
pub(super) struct Logits(pub(super) Tensor);

impl Logits {
    /// Hands the rows to `read`, in order.
    ///
    /// # Errors
    /// Those of candle, in words.
    pub(super) fn read<R>(&self, read: impl FnOnce(ChunksExact<'_, f32>) -> R) -> std::result::Result<R, String> {
        let vocab = self.0.dim(D::Minus1).map_err(|e| e.to_string())?;
        with_numbers(&self.0, |numbers| read(numbers.chunks_exact(vocab))).map_err(|e| e.to_string())
    }
}

/// Which delta each span has, its length, and how many of its first rows the delta leaves as they are: what a compiled batch
/// depends on.
type Shape = Vec<(Option<DeltaId>, usize, usize)>;

/// Runs steps on a base.
pub(super) struct Stepper {
    base: Arc<Base>,
    kv: Option<KvCache>,
    compiled: Option<(Shape, DeltaBatch)>,
}

impl Stepper {
    pub(super) fn new(base: Arc<Base>, kv: Option<KvCache>) -> Self {
        Self { base, kv, compiled: None }
    }

    /// Lets go of the deltas of the last step.
    pub(super) fn forget(&mut self) {
        self.compiled = None;
    }

    /// Copies cached keys and values from slots to others, all at once.
    pub(super) fn copy(&self, from: &[u32], to: &[u32]) -> Result<()> {
        self.kv.as_ref().map_or(Ok(()), |kv| kv.copy(from, to))
    }

    /// A checksum of what all layers have in a page, where it is cheap to have.
    pub(super) fn checksum(&self, page: u32) -> Option<u64> {
        self.kv.as_ref().and_then(|kv| kv.checksum(page))
    }

    /// Computes all tasks in one forward; one result per task, and the number of distinct deltas.
    pub(super) fn run(&mut self, tasks: &[Task<'_>]) -> Result<(Vec<Got>, usize)> {
        let mut rows = RowLayout::default();
        let mut tokens = Vec::new();
        let mut types = Vec::new();
        let typed = tasks.iter().any(|t| t.sequence.request.token_types.is_some());
        for Task { share, sequence, slots, .. } in tasks {
            rows.push_shared(sequence.ahead(), share.len, share.context, Arc::clone(slots), share.keys_due);
            let range = rows.spans().last().map(Span::tokens).unwrap_or_default();
            tokens.extend_from_slice(&sequence.tokens(share.branch)[range.start..range.end - share.drafts]);
            tokens.extend_from_slice(&sequence.drafts()[..share.drafts]);
            if typed {
                let given = sequence.request.token_types.as_deref();
                types.extend(range.map(|i| given.and_then(|t| t.get(i)).copied().unwrap_or(0)));
            }
        }
        let base = Arc::clone(&self.base);
        let spared = |t: &Task<'_>| t.sequence.spared(t.share.context, t.share.len);
        let shape = tasks.iter().map(|t| (t.sequence.delta_id(), t.share.len, spared(t))).collect();
        self.compile(shape, tasks, &rows);
        let none = DeltaBatch::none();
        let deltas = self.compiled.as_ref().map_or(&none, |(_, batch)| batch);
        let source = source::encode(&base, tasks)?;
        let memory_slots: Vec<Arc<[u32]>> = tasks.iter().map(|t| Arc::clone(&t.memory)).collect();
        let encoded = source.as_ref().map(Source::encoded);
        let memory = base.arch.is_encoder_decoder().then_some(Memory { encoded, slots: &memory_slots });
        let cx = Cx { kv: self.kv.as_ref(), memory: memory.as_ref(), ..Cx::new(&rows, deltas) };
        let wanted = Wanted::of(&rows, deltas, wanted::rows(&base, tasks, source.is_some(), &cx));
        let cx = Cx { wanted: wanted.as_ref(), ..cx };
        let input = Input { tokens: &tokens, token_types: typed.then_some(&types[..]) };
        let hidden = base.transformer.forward(&input, &cx)?; // [wanted rows, hidden]
        let mut got = vec![Got::Nothing; tasks.len()];
        let reader = Reader { base: &base, tasks, rows: &rows, hidden: &hidden, cx: &cx };
        reader.tokens(&mut got)?;
        reader.scores(&mut got)?;
        reader.classes(&mut got)?;
        match &source {
            Some(source) => source::embeddings(source, tasks, &mut got)?,
            None => reader.embeddings(&mut got)?,
        }
        Ok((got, deltas.distinct()))
    }

    /// Compiles the deltas of a step, unless the last step had the same ones at the same rows.
    fn compile(&mut self, shape: Shape, tasks: &[Task<'_>], rows: &RowLayout) {
        if self.compiled.as_ref().is_some_and(|(last, _)| *last == shape) {
            return;
        }
        if shape.iter().all(|(delta, len, spared)| delta.is_none() || spared == len) {
            self.compiled = None;
            return;
        }
        let per_span = deltas_of(tasks.iter());
        let spared: Vec<usize> = shape.iter().map(|(_, _, spared)| *spared).collect();
        let batch = DeltaBatch::sparing(rows, &per_span, &spared, self.base.sites.len());
        self.compiled = Some((shape, batch));
    }
}

/// The delta of each task.
pub(super) fn deltas_of<'a>(tasks: impl Iterator<Item = &'a Task<'a>>) -> Vec<Option<Arc<Delta>>> {
    // a version that was evicted and loaded again while it ran has two copies: one of them is enough
    let mut by_id: Vec<(DeltaId, &Arc<Delta>)> = Vec::new();
    tasks
        .map(|task| {
            let held = task.sequence.delta()?;
            let known = by_id.iter().find(|(id, _)| *id == held.id()).map(|(_, delta)| *delta);
            let delta = known.unwrap_or_else(|| {
                by_id.push((held.id(), held.delta()));
                held.delta()
            });
            Some(Arc::clone(delta))
        })
        .collect()
}

/// Reads results out of the final hidden states.
struct Reader<'a> {
    base: &'a Base,
    tasks: &'a [Task<'a>],
    rows: &'a RowLayout,
    /// `[wanted rows, hidden]`.
    hidden: &'a Tensor,
    cx: &'a Cx<'a>,
}

impl Reader<'_> {
    /// The next token of every generating sequence whose last known position was computed.
    fn tokens(&self, got: &mut [Got]) -> Result<()> {
        let due = |t: &Task<'_>| t.share.completes && matches!(t.sequence.request.work, Work::Generate(_));
        let which: Vec<usize> = self.tasks.iter().enumerate().filter(|(_, t)| due(t)).map(|(i, _)| i).collect();
        if which.is_empty() {
            return Ok(());
        }
        let last = self.rows.last_rows();
        let rows = |i: usize| last[i] - self.tasks[i].share.drafts as u32..=last[i];
        let pick: Vec<u32> = which.iter().flat_map(|&i| rows(i)).collect();
        let logits = self.base.transformer.logits(self.hidden, &pick, self.cx)?.to_device(&Device::Cpu)?; // [pick, vocab]
        let vocab = logits.dim(D::Minus1)?;
        let mut at = 0;
        let mut behind = Vec::with_capacity(which.len()); // views of the rows of drafts
        for &i in &which {
            let drafts = self.tasks[i].share.drafts;
            behind.push((drafts > 0).then(|| logits.narrow(0, at + 1, drafts).map(Logits)).transpose()?);
            at += drafts + 1;
        }
        let chosen = with_numbers(&logits, |numbers| {
            let mut chosen: Vec<(Got, &[f32], Option<Logits>)> = Vec::with_capacity(which.len());
            let mut rest = numbers;
            for (&i, behind) in which.iter().zip(behind) {
                let (own, others) = rest.split_at((self.tasks[i].share.drafts + 1) * vocab);
                chosen.push((Got::Nothing, own, behind));
                rest = others;
            }
            each(chosen.iter_mut().zip(&which).collect(), |((chosen, rows, behind), &i)| {
                *chosen = chosen_of(rows, behind.take(), vocab, &self.tasks[i]);
            });
            chosen.into_iter().map(|(chosen, ..)| chosen).collect::<Vec<Got>>()
        })?;
        which.into_iter().zip(chosen).for_each(|(i, token)| got[i] = token);
        Ok(())
    }

    /// Log-probabilities of the scored tokens that these rows predict.
    fn scores(&self, got: &mut [Got]) -> Result<()> {
        let (mut pick, mut targets, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (task, span)) in self.tasks.iter().zip(self.rows.spans()).enumerate() {
            let Work::Score { from } = task.sequence.request.work else { continue };
            let before = pick.len();
            for (row, token) in wanted::scored(task, span, from) {
                pick.push(row);
                targets.push(token);
            }
            counts.push((i, pick.len() - before));
        }
        if pick.is_empty() {
            return Ok(());
        }
        let nll = self.base.transformer.nll(self.hidden, &pick, &targets, self.cx)?.to_vec1::<f32>()?;
        let mut rest = nll.as_slice();
        for (i, count) in counts {
            let (own, others) = rest.split_at(count);
            got[i] = Got::Numbers(own.iter().map(|x| -x).collect());
            rest = others;
        }
        Ok(())
    }

    fn classes(&self, got: &mut [Got]) -> Result<()> {
        let work = |i: usize| &self.tasks[i].sequence.request.work;
        let due = |i: &usize| self.tasks[*i].share.completes && matches!(work(*i), Work::Classify);
        let whole: Vec<usize> = (0..self.tasks.len()).filter(due).collect();
        if !whole.is_empty() {
            let logits = self.base.transformer.classify(self.hidden, self.cx)?;
            for i in whole {
                got[i] = match &logits[i] {
                    Some(logits) => Got::Numbers(logits.to_vec1()?),
                    None => Got::NoHead,
                };
            }
        }
        let each: Vec<usize> = (0..self.tasks.len()).filter(|&i| matches!(work(i), Work::ClassifyTokens)).collect();
        if !each.is_empty() {
            let logits = self.base.transformer.classify_tokens(self.hidden, self.cx)?;
            for i in each {
                got[i] = match &logits[i] {
                    Some(logits) => Got::Rows(logits.to_vec2()?),
                    None if self.rows.spans()[i].token_rows().is_empty() => Got::Nothing,
                    None => Got::NoHead,
                };
            }
        }
        Ok(())
    }

    /// Pooled hidden states of tokens, of a base without an encoder of its own; a mean is summed up chunk by chunk.
    fn embeddings(&self, got: &mut [Got]) -> Result<()> {
        for (i, (task, span)) in self.tasks.iter().zip(self.rows.spans()).enumerate() {
            let Work::Embed { pooling, .. } = task.sequence.request.work else { continue };
            let states = |rows: Range<usize>| {
                let rows: Vec<u32> = rows.map(|row| row as u32).collect();
                self.cx.states(self.hidden, &rows)?.to_dtype(DType::F32)
            };
            let row = |at: usize| states(at..at + 1)?.flatten_all()?.to_vec1::<f32>();
            match pooling {
                Pooling::Mean | Pooling::Default => {
                    let own = span.token_rows();
                    if !own.is_empty() {
                        got[i] = Got::Sum(states(own)?.sum(0)?.to_vec1()?);
                    }
                }
                Pooling::Cls => {
                    if let Some(first) = span.first_token_row() {
                        got[i] = Got::Numbers(row(first)?);
                    }
                }
                Pooling::Last if task.share.completes => got[i] = Got::Numbers(row(span.start + span.len - 1)?),
                Pooling::Last => {}
            }
        }
        Ok(())
    }
}

/// The next tokens of one sequence, from the rows `[drafts + 1, vocab]` behind its last known token and its drafts, or the likeliest
/// ones of its branch. `rest`: the rows behind its drafts again, as what may be kept.
fn chosen_of(logits: &[f32], rest: Option<Logits>, vocab: usize, task: &Task<'_>) -> Got {
    let (sequence, share) = (task.sequence, task.share);
    let Work::Generate(how) = &sequence.request.work else { return Got::Nothing };
    if let Some(n) = sequence.candidates() {
        let found = sampler::candidates(logits, sequence.history(share.branch), &how.sampling, n);
        return found.map_or(Got::NonFinite, Got::Candidates);
    }
    let (due, behind) = logits.split_at(vocab.min(logits.len()));
    let Some(token) = choose(due, sequence, sequence.history(share.branch)) else { return Got::NonFinite };
    let mut chosen = Chosen { drafted: share.drafts, tokens: vec![token], ..Chosen::default() };
    if share.drafts == 0 {
        return Got::Tokens(chosen);
    }
    let mut known = sequence.tokens(share.branch).to_vec();
    for (draft, row) in sequence.drafts().iter().zip(behind.chunks_exact(vocab)) {
        if chosen.tokens.last().is_none_or(|last| last.id != *draft || how.stop_tokens.contains(draft)) {
            break;
        }
        if sequence.allowed().is_some() {
            chosen.rest = rest;
            break;
        }
        known.push(*draft);
        let Some(token) = choose(row, sequence, sequence.split(&known)) else {
            chosen.non_finite = true;
            break;
        };
        chosen.tokens.push(token);
    }
    Got::Tokens(chosen)
}

/// The token of one row behind this history; `None`: none can be chosen.
pub(super) fn choose(logits: &[f32], sequence: &Sequence, history: History<'_>) -> Option<TokenOut> {
    let Work::Generate(how) = &sequence.request.work else { return None };
    let seed = how.sampling.seed.unwrap_or(0);
    let masked = sequence.allowed().map(|allowed| sampler::masked(logits, allowed));
    let row = masked.as_deref().unwrap_or(logits);
    // what is told of the token is the model's opinion, not the constraint's
    let id = sampler::choose(row, history, &how.sampling, seed).ok()?;
    Some(match how.logprobs {
        None => TokenOut { id, logprob: 0.0, top: vec![] },
        Some(n) => {
            let (logprob, top) = sampler::logprobs(logits, id, n).ok()?;
            TokenOut { id, logprob, top }
        }
    })
}

/// Reads a tensor's numbers, without a copy where they lie in host memory.
fn with_numbers<R>(t: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
    {
        let (storage, layout) = t.storage_and_layout();
        if let (Storage::Cpu(cpu), Some((from, to))) = (&*storage, layout.contiguous_offsets()) {
            return Ok(read(&cpu.as_slice::<f32>()?[from..to]));
        }
    }
    Ok(read(&t.flatten_all()?.to_vec1::<f32>()?))
}
