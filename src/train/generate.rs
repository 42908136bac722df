//! Evaluation by generation: prompts of validation examples are answered by the weights under training, and the answers are
//! scored against what the examples say.
//!
//! A forward per call, through the model, the layouts and the cache that serving uses; the token is the one that serving
//! chooses at temperature 0. Several prompts are answered side by side in a cache of their own.

use std::{collections::VecDeque, sync::Arc};

use candle_core::Result;

use super::{plan::MICRO_TOKENS, worst::Decoder};
use crate::{
    delta::{Delta, DeltaBatch, Stack},
    kv::KvCache,
    measures::Texts,
    model::{Base, Input, Source},
    nn::{Cx, Memory, Wanted},
    pacing::Pacer,
    rows::RowLayout,
};

/// Most prompts side by side.
const GROUP: usize = 32;
/// Most cache slots that they take, unless one alone takes more.
const GROUP_SLOTS: usize = 2 * MICRO_TOKENS;
/// Most tokens of a gold answer that generated ones are scored against: ROUGE-L compares every word with every word.
pub const MAX_GOLD_TOKENS: usize = 4096;
/// Letters of gold times generated tokens that are scored in one turn, unless one answer alone has more.
const SCORED_AT_ONCE: usize = 1 << 24;
/// Tokens of a prompt that the first new token is decoded with, as serving does: so the first word keeps its space.
const NEIGHBOURS: usize = 6;

/// A prompt to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Token ids that are continued; of an encoder-decoder, the start of its output.
    pub prompt: Vec<u32>,
    /// What an encoder-decoder's encoder reads; else empty.
    pub source: Vec<u32>,
    /// The right answer.
    pub gold: String,
    /// Most new tokens, at least 1.
    pub most: usize,
}

impl Question {
    /// Rows of its first forward and cache slots in all, where a delta adds `ahead` positions.
    fn size(&self, ahead: usize) -> (usize, usize) {
        let rows = ahead + self.source.len() + self.prompt.len();
        (rows, rows + self.most)
    }
}

/// What an evaluation asks.
#[derive(Debug, Clone, Default)]
pub struct Quiz {
    /// The prompts; empty = nothing is asked.
    pub questions: Arc<[Question]>,
    /// Tokens that end an answer.
    pub stop: Arc<[u32]>,
}

impl Quiz {
    /// Questions that are answered side by side, the shortest first.
    fn groups(&self, ahead: usize) -> Vec<Vec<usize>> {
        let sizes: Vec<(usize, usize)> = self.questions.iter().map(|q| q.size(ahead)).collect();
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|i| sizes[*i]);
        let mut out: Vec<Vec<usize>> = Vec::new();
        let mut sum = (0, 0);
        for i in order {
            let (rows, slots) = sizes[i];
            sum = (sum.0 + rows, sum.1 + slots);
            match out.last_mut() {
                Some(group) if group.len() < GROUP && sum.0 <= MICRO_TOKENS && sum.1 <= GROUP_SLOTS => group.push(i),
                _ => {
                    out.push(vec![i]);
                    sum = (rows, slots);
                }
            }
        }
        out
    }

    /// Cache slots that its largest group takes, where a delta adds `ahead` positions to each sequence.
    pub fn slots(&self, ahead: usize) -> usize {
        let slots = |group: Vec<usize>| group.iter().map(|i| self.questions[*i].size(ahead).1).sum::<usize>();
        self.groups(ahead).into_iter().map(slots).max().unwrap_or(0)
    }
}

/// An answer under way.
#[derive(Debug)]
struct Open {
    question: usize,
    /// Rows in the cache, virtual ones included.
    computed: usize,
    /// Its first cache slot; the others follow.
    first: u32,
    /// Cache slots of what cross-attention reads.
    memory: Arc<[u32]>,
}

/// The answers to a quiz, under way.
#[derive(Debug)]
pub struct Answering {
    base: Arc<Base>,
    delta: Arc<Delta>,
    cache: KvCache,
    todo: VecDeque<Vec<usize>>,
    open: Vec<Open>,
    /// New tokens by question, without the one that ends them.
    said: Vec<Vec<u32>>,
    /// Questions that `texts` has, the first ones.
    scored: usize,
    texts: Texts,
}

impl Answering {
    /// Nothing answered yet. `base` and `delta` must stay as they are until the end: plain tensors.
    ///
    /// # Errors
    /// No memory for the cache.
    pub fn new(base: Arc<Base>, delta: Arc<Delta>, quiz: &Quiz) -> Result<Self> {
        let ahead = delta.ahead().slots() + delta.ahead_of(Stack::Memory).keys + delta.source_ahead().rows;
        let arch = &base.arch;
        let cache = KvCache::new(arch.layers, quiz.slots(ahead), arch.kv_width(), base.dtype, &base.device)?;
        let (todo, said) = (quiz.groups(ahead).into(), vec![Vec::new(); quiz.questions.len()]);
        Ok(Self { base, delta, cache, todo, open: Vec::new(), said, scored: 0, texts: Texts::default() })
    }

    /// One forward: a token for each answer under way. False if all are complete.
    ///
    /// # Errors
    /// Those of the forward.
    pub fn advance(&mut self, quiz: &Quiz, pacer: Option<&Arc<Pacer>>) -> Result<bool> {
        if self.open.is_empty() {
            let Some(group) = self.todo.pop_front() else { return Ok(false) };
            self.open = self.seated(&group, quiz);
        }
        let chosen = self.forward(quiz, pacer)?;
        let mut goes_on = Vec::with_capacity(chosen.len());
        for (open, token) in self.open.iter().zip(chosen) {
            let (said, most) = (&mut self.said[open.question], quiz.questions[open.question].most);
            // without a number to choose by, the answer is what has been said so far
            let token = token.filter(|id| !quiz.stop.contains(id));
            said.extend(token);
            goes_on.push(token.is_some() && said.len() < most);
        }
        let mut goes_on = goes_on.into_iter();
        self.open.retain(|_| goes_on.next().unwrap_or(false));
        Ok(true)
    }

    /// New tokens by question so far.
    pub fn said(&self) -> &[Vec<u32>] {
        &self.said
    }

    /// Holds some more of the complete answers against the gold, as texts: a bounded amount of work. False if that was all.
    pub fn score(&mut self, quiz: &Quiz, decoder: &Decoder) -> bool {
        let mut work = 0_usize;
        while let (Some(question), Some(said)) = (quiz.questions.get(self.scored), self.said.get(self.scored)) {
            let more = question.gold.len().saturating_mul(said.len() + 1);
            if work > 0 && work.saturating_add(more) > SCORED_AT_ONCE {
                return true;
            }
            work = work.saturating_add(more.max(1));
            let before: &[u32] = if question.source.is_empty() { &question.prompt } else { &[] };
            self.texts.add(&text_after(before, said, decoder), &[question.gold.as_str()]);
            self.scored += 1;
        }
        false
    }

    /// The scores so far ([`Self::score`]).
    pub fn texts(&self) -> &Texts {
        &self.texts
    }

    /// Gives each question of a group its share of the cache.
    fn seated(&self, group: &[usize], quiz: &Quiz) -> Vec<Open> {
        let (ahead, source_ahead) = (self.delta.ahead(), self.delta.source_ahead());
        let mut next = 0;
        let mut take = |n: usize| {
            let first = next;
            next += n as u32;
            first
        };
        let seat = |&question: &usize| {
            let Question { prompt, source, most, .. } = &quiz.questions[question];
            let read = match source.len() {
                0 => 0,
                n => self.delta.ahead_of(Stack::Memory).keys + source_ahead.rows + n,
            };
            let memory = take(read);
            // the last new token is never computed
            let first = take(ahead.slots() + prompt.len() + most - 1);
            Open { question, computed: 0, first, memory: (memory..memory + read as u32).collect() }
        };
        group.iter().map(seat).collect()
    }

    /// The next token of each answer under way; `None` where the logits are no numbers.
    fn forward(&mut self, quiz: &Quiz, pacer: Option<&Arc<Pacer>>) -> Result<Vec<Option<u32>>> {
        let ahead = self.delta.ahead();
        let (mut rows, mut tokens) = (RowLayout::default(), Vec::new());
        let begins = self.open.iter().all(|open| open.computed == 0);
        for open in &mut self.open {
            let (context, said) = (open.computed, &self.said[open.question]);
            let (virtual_rows, given) = match said.last() {
                Some(last) => (0, std::slice::from_ref(last)),
                None => (ahead.rows, quiz.questions[open.question].prompt.as_slice()),
            };
            open.computed += virtual_rows + given.len();
            let keys = (ahead.keys + open.computed) as u32;
            rows.push_after(ahead, open.computed - context, context, (open.first..open.first + keys).collect());
            tokens.extend_from_slice(given);
        }
        let encodes = self.base.arch.is_encoder_decoder();
        let source = if encodes && begins { Some(self.encode(quiz, pacer)?) } else { None };
        let slots: Vec<Arc<[u32]>> = self.open.iter().map(|open| Arc::clone(&open.memory)).collect();
        let memory = encodes.then(|| Memory { encoded: source.as_ref().map(Source::encoded), slots: &slots });
        let deltas = DeltaBatch::single(Arc::clone(&self.delta), &rows, self.base.sites.len());
        let last = rows.last_rows();
        let wanted = Wanted::of(&rows, &deltas, last.iter().copied());
        let (kv, memory, wanted) = (Some(&self.cache), memory.as_ref(), wanted.as_ref());
        let cx = Cx { rows: &rows, deltas: &deltas, kv, pacer, memory, wanted };
        let hidden = self.base.transformer.forward(&Input::tokens(&tokens), &cx)?; // [open, hidden]
        let logits = self.base.transformer.logits(&hidden, &last, &cx)?; // [open, vocab]
        Ok(logits.to_vec2::<f32>()?.iter().map(|row| likeliest(row)).collect())
    }

    /// What the encoder reads for the answers under way.
    fn encode(&self, quiz: &Quiz, pacer: Option<&Arc<Pacer>>) -> Result<Source> {
        let sources = || self.open.iter().map(|open| &quiz.questions[open.question].source);
        let rows = RowLayout::packed_after(sources().map(|source| (source.len(), self.delta.source_ahead())));
        let tokens: Vec<u32> = sources().flatten().copied().collect();
        let deltas = vec![Some(Arc::clone(&self.delta)); self.open.len()];
        Source::encode(&self.base, rows, &tokens, &deltas, pacer)
    }
}

/// The first index of the largest logit; `None` where one is NaN or infinite, or none is finite: serving fails there.
fn likeliest(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (i, &logit) in (0u32..).zip(logits) {
        if logit.is_nan() || logit == f32::INFINITY {
            return None;
        }
        if logit > best.map_or(f32::NEG_INFINITY, |(_, most)| most) {
            best = Some((i, logit));
        }
    }
    best.map(|(i, _)| i)
}

/// The text of tokens that follow others.
fn text_after(before: &[u32], ids: &[u32], decoder: &Decoder) -> String {
    let near = &before[before.len().saturating_sub(NEIGHBOURS)..];
    let known = decoder.text(near);
    // nothing to lean on, or a character that the prompt leaves open
    if !known.is_empty() && !known.ends_with(char::REPLACEMENT_CHARACTER) {
        let whole = decoder.text(&[near, ids].concat());
        if let Some(text) = whole.strip_prefix(known.as_str()) {
            return text.to_owned();
        }
    }
    decoder.text(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(prompt: usize, source: usize, most: usize) -> Question {
        Question { prompt: vec![3; prompt], source: vec![4; source], gold: String::new(), most }
    }

    #[test]
    fn groups_are_bounded_in_number_rows_and_slots_and_hold_every_question_once() {
        let short = (0..70).map(|i| question(1 + i % 5, 0, 4));
        let long = (0..5).map(|i| question(1, 900 + i, 1200));
        let questions: Vec<Question> = short.chain(long).chain([question(3 * MICRO_TOKENS, 0, 1)]).collect();
        let quiz = Quiz { questions: questions.into(), ..Quiz::default() };
        let groups = quiz.groups(2);
        let sum = |group: &[usize]| {
            let sizes = group.iter().map(|i| quiz.questions[*i].size(2));
            sizes.fold((0, 0), |(rows, slots), (r, s)| (rows + r, slots + s))
        };
        for group in &groups {
            let (rows, slots) = sum(group);
            assert!(group.len() <= GROUP, "{group:?}");
            assert!(group.len() == 1 || (rows <= MICRO_TOKENS && slots <= GROUP_SLOTS), "{group:?} {rows} {slots}");
        }
        let largest = groups.iter().map(|group| sum(group).1).max();
        assert_eq!(Some(quiz.slots(2)), largest);
        let mut all = groups.concat();
        all.sort_unstable();
        assert_eq!(all, (0..76).collect::<Vec<_>>());
        assert_eq!(groups[0].len(), GROUP);
        assert_eq!(Quiz::default().slots(3), 0);
    }

    #[test]
    fn a_turn_scores_a_bounded_amount_and_at_least_one_answer() {
        use crate::{delta::DeltaSpec, model::testing};
        let base = Arc::new(testing::random_base(&testing::tiny_llama(), 7).unwrap());
        let spec = DeltaSpec {
            methods: vec![],
            task: crate::delta::Task::CausalLm,
            problem: Default::default(),
            labels: vec![],
            num_virtual_tokens: 0,
            parameters: 0,
            resident_bytes: 0,
        };
        let delta = Arc::new(Delta::new(spec, vec![], None));
        const SAID: usize = 4095;
        // two of a little more than half a turn, one of several turns, and short ones
        let turn = SCORED_AT_ONCE / (SAID + 1);
        let golds = [turn / 2, turn / 2, 4 * turn, 1, 1].map(|letters| "ab ".repeat(letters / 3 + 1));
        let questions = golds.iter().map(|gold| Question { gold: gold.clone(), ..question(1, 0, 3) });
        let quiz = Quiz { questions: questions.collect(), ..Quiz::default() };
        let mut answering = Answering::new(base, delta, &quiz).unwrap();
        for said in &mut answering.said {
            *said = vec![1; SAID];
        }
        let decoder = Decoder::new(|ids| if ids.len() == SAID { "ab ab ab".to_owned() } else { String::new() });
        let mut turns = Vec::new();
        while answering.score(&quiz, &decoder) {
            turns.push(answering.texts().cases());
        }
        assert_eq!((turns, answering.texts().cases()), (vec![1, 2, 3], 5));
        let mut whole = Texts::default();
        golds.iter().for_each(|gold| whole.add("ab ab ab", &[gold]));
        let figures = |t: &Texts| (t.exact_match(), t.bleu(), t.rouge_l());
        assert_eq!(figures(answering.texts()), figures(&whole));
        assert!(!answering.score(&quiz, &decoder), "it is over");
    }

    #[test]
    fn the_first_of_the_largest_is_chosen_and_no_number_is_none() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(likeliest(&[0.5, 2.0, -1.0, 2.0]), Some(1));
        assert_eq!(likeliest(&[-inf, -3.0, -inf]), Some(1));
        assert_eq!([&[-inf, -inf][..], &[1.0, nan], &[inf, 1.0], &[]].map(likeliest), [None; 4]);
    }

    #[test]
    fn a_text_is_decoded_with_what_it_follows() {
        // words with a space between them: the first of a text has none
        let decoder = Decoder::new(|ids| {
            let words: Vec<String> = ids.iter().filter(|id| **id > 0).map(|id| format!("w{id}")).collect();
            words.join(" ")
        });
        assert_eq!(text_after(&[7, 8, 9], &[1, 2], &decoder), " w1 w2");
        assert_eq!(text_after(&[], &[1, 2], &decoder), "w1 w2");
        assert_eq!(text_after(&[0, 0], &[1, 0], &decoder), "w1");
        let open = Decoder::new(|ids| if ids == [5] { "\u{fffd}".to_owned() } else { format!("{ids:?}") });
        assert_eq!(text_after(&[5], &[6], &open), "[6]");
    }
}
