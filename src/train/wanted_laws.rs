//! Laws of the rows that are wanted of a forward: they are those of the whole forward, by the kernels and while training, for
//! every family and method, and so are all gradients.

use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    gradient_laws::methods,
    gradients::{self, LossesOf, Micro},
    laws::{hyper, input, lora, positions, tiny},
    method_laws::BASES,
    objective::{Reads, Sequence, forward, losses_of},
    testing::{assert_near, shake},
    trainable::Trainable,
};
use crate::{
    admission::train_params::MethodPart,
    delta::{Delta, DeltaBatch, Head, HeadPool, Task},
    kv::KvCache,
    model::{Base, Input, Source, testing::Rng},
    nn::{Cx, Wanted},
    rows::RowLayout,
};

/// The families of [`BASES`], and those with other styles.
fn bases() -> Vec<(&'static str, Task)> {
    let mut all = BASES.to_vec();
    all.extend([("gemma3", Task::CausalLm), ("llama", Task::SeqCls)]);
    all
}

fn every_method(base: &Base) -> Vec<(&'static str, Vec<MethodPart>)> {
    let mut all = methods(base);
    all.push(("prefix", vec![positions::prefix(3)]));
    all.push(("prefix everywhere", vec![positions::everywhere(3)]));
    all.push(("prompt and lora", [lora(), vec![positions::prompt(2)]].concat()));
    all
}

/// A delta of a method, away from where it starts.
fn made(base: &Arc<Base>, task: Task, methods: &[MethodPart], seed: u64) -> Trainable {
    let t = Trainable::init_on(&input(base, task, methods, hyper(1)).spec, base, seed).unwrap();
    shake(t.vars(), seed);
    t
}

/// Sequences of a step and, of an encoder-decoder, what they are made of.
struct Step {
    rows: RowLayout,
    tokens: Vec<u32>,
    deltas: DeltaBatch,
    source: Option<Source>,
}

impl Step {
    fn new(base: &Base, lens: &[usize], per_span: &[Option<Arc<Delta>>], draw: &mut Rng) -> Self {
        let rows = RowLayout::packed_for(lens, per_span);
        let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| 3 + (draw.uniform() * 100.0) as u32).collect() };
        let deltas = DeltaBatch::new(&rows, per_span, base.sites.len());
        let source = base.arch.is_encoder_decoder().then(|| {
            let ahead = |d: &Option<Arc<Delta>>| d.as_ref().map(|d| d.source_ahead()).unwrap_or_default();
            let texts = RowLayout::packed_after(lens.iter().zip(per_span).map(|(n, d)| (n + 1, ahead(d))));
            let read = tokens(texts.token_rows());
            Source::encode(base, texts, &read, per_span, None).unwrap()
        });
        Self { tokens: tokens(rows.token_rows()), rows, deltas, source }
    }

    /// Final hidden states of these rows, `[rows of their runs, hidden]`; of all without any.
    fn states(&self, base: &Base, wanted: Option<&Wanted>) -> Tensor {
        let memory = self.source.as_ref().map(Source::memory);
        let cx = Cx { memory: memory.as_ref(), wanted, ..Cx::new(&self.rows, &self.deltas) };
        base.transformer.forward(&Input::tokens(&self.tokens), &cx).unwrap()
    }

    /// Some rows at random, at least one: of a sequence none, its first, its last, or some.
    fn some(&self, draw: &mut Rng) -> Vec<u32> {
        let mut pick = Vec::new();
        for span in self.rows.spans() {
            let (first, last) = (span.start as u32, (span.rows().end - 1) as u32);
            match (draw.uniform() * 4.0) as u32 {
                0 => {}
                1 => pick.push(first),
                2 => pick.push(last),
                _ => pick.extend((first..=last).filter(|_| draw.uniform() < 0.4)),
            }
        }
        if pick.is_empty() { self.rows.last_rows()[..1].to_vec() } else { pick }
    }
}

fn most(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[track_caller]
fn same(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let apart = most(&(got - want).unwrap());
    assert!(apart < 1e-5 * (1.0 + most(want)), "{what}: {apart} of {}", most(want));
}

fn selected(whole: &Tensor, step: &Step, pick: &[u32]) -> Option<(Tensor, Wanted)> {
    let wanted = Wanted::of(&step.rows, &step.deltas, pick.iter().copied())?;
    let rows: Vec<u32> = step.rows.runs(pick.iter().copied())?.rows().map(|row| row as u32).collect();
    Some((whole.index_select(&Tensor::new(rows, whole.device()).unwrap(), 0).unwrap(), wanted))
}

/// In one step: rows of the delta, of another one with it, and of the bare base.
#[test]
fn served_rows_are_those_of_the_whole_forward() {
    let mut compared = 0;
    for (family, task) in bases() {
        let base = tiny(family);
        for (name, methods) in every_method(&base) {
            let [a, b] = [7, 8].map(|seed| Arc::new(made(&base, task, &methods, seed).detached().unwrap()));
            for seed in 0..3 {
                let mut draw = Rng(900 + seed);
                let per_span =
                    [Some(Arc::clone(&a)), None, Some(Arc::clone(&b)), Some(Arc::clone(&a)), Some(Arc::clone(&a))];
                let step = Step::new(&base, &[6, 5, 9, 1, 4], &per_span, &mut draw);
                let pick = step.some(&mut draw);
                let whole = step.states(&base, None);
                let Some((want, wanted)) = selected(&whole, &step, &pick) else { continue };
                same(&format!("{family} {name} {pick:?}"), &step.states(&base, Some(&wanted)), &want);
                compared += 1;
            }
        }
    }
    assert!(compared > 300, "{compared}");
}

/// Runs of rows that are long enough for products and blocks of queries.
#[test]
fn so_are_those_of_long_texts() {
    for (family, task) in BASES.into_iter().filter(|(_, task)| task.generates()).chain([("gemma3", Task::CausalLm)]) {
        let base = tiny(family);
        let a = Arc::new(made(&base, task, &lora(), 7).detached().unwrap());
        let step = Step::new(&base, &[120, 90, 40], &[Some(Arc::clone(&a)), None, Some(a)], &mut Rng(5));
        let pick: Vec<u32> = (50..119).chain([140]).chain(215..250).collect();
        let (want, wanted) = selected(&step.states(&base, None), &step, &pick).unwrap();
        same(family, &step.states(&base, Some(&wanted)), &want);
    }
}

#[test]
fn trained_rows_and_all_gradients_are_those_of_the_whole_forward() {
    for (family, task) in bases() {
        let base = tiny(family);
        for (name, methods) in every_method(&base) {
            for seed in 0..2 {
                let what = format!("{family} {name} {seed}");
                let t = made(&base, task, &methods, 7);
                let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
                let per_span = vec![Some(delta); 4];
                let mut draw = Rng(40 + seed);
                let step = Step::new(&base, &[5, 8, 3, 6], &per_span, &mut draw);
                let pick = step.some(&mut draw);
                let whole = step.states(&base, None);
                let Some((want, wanted)) = selected(&whole, &step, &pick) else { continue };
                let got = step.states(&base, Some(&wanted));
                same(&what, &got, &want);
                let weights = Tensor::randn(0f32, 1.0, want.shape(), want.device()).unwrap();
                let grads = |y: Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
                let (got, want) = (grads(got), grads(want));
                for v in t.vars() {
                    assert_near(&format!("{what} {}", v.name), (got.get(&v.var), want.get(&v.var)), (1e-4, 5e-5));
                }
            }
        }
    }
}

/// A prompt in chunks none of whose rows is read but the last: what is cached of it is what the whole computes.
#[test]
fn chunks_of_a_prompt_are_its_keys_and_its_last_row() {
    for (family, task) in bases() {
        let base = tiny(family);
        if !base.arch.is_causal() || base.arch.is_encoder_decoder() {
            continue;
        }
        for (name, methods) in every_method(&base) {
            let delta = Some(Arc::new(made(&base, task, &methods, 7).detached().unwrap()));
            let step = Step::new(&base, &[11], std::slice::from_ref(&delta), &mut Rng(3));
            let (ahead, n) = (step.rows.spans()[0].ahead, step.rows.rows());
            let whole = step.states(&base, None);
            let slots = ahead.keys + n;
            let cache = KvCache::new(base.arch.layers, slots, base.arch.kv_width(), base.dtype, &base.device).unwrap();
            let mut done = 0;
            while done < n {
                let len = 4.min(n - done);
                let mut rows = RowLayout::default();
                rows.push_after(ahead, len, done, (0..(ahead.keys + done + len) as u32).collect());
                done += len;
                let deltas = DeltaBatch::new(&rows, std::slice::from_ref(&delta), base.sites.len());
                let wanted = Wanted::of(&rows, &deltas, rows.last_rows().into_iter().filter(|_| done == n));
                let cx = Cx { kv: Some(&cache), wanted: wanted.as_ref(), ..Cx::new(&rows, &deltas) };
                let own = &step.tokens[rows.spans()[0].tokens()];
                let got = base.transformer.forward(&Input::tokens(own), &cx).unwrap();
                if done < n {
                    assert_eq!(got.dims(), [0, base.arch.hidden], "{family} {name}");
                } else {
                    same(
                        &format!("{family} {name}"),
                        &got.narrow(0, got.dim(0).unwrap() - 1, 1).unwrap(),
                        &whole.narrow(0, n - 1, 1).unwrap(),
                    );
                }
            }
        }
    }
}

/// Losses and gradients of training, whole and layer by layer, of the rows that are read and of all.
#[test]
fn losses_and_gradients_do_not_depend_on_what_else_is_computed() {
    for (family, task) in bases() {
        let base = tiny(family);
        for (name, methods) in every_method(&base) {
            let (input, t) = (input(&base, task, &methods, hyper(1)), made(&base, task, &methods, 9));
            let examples: Vec<&Encoded> = input.train.iter().take(5).collect();
            let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
            let losses: LossesOf<'_> =
                &|hidden, cx| Ok(losses_of(&base, hidden, (&examples, &sequences), 0.1, cx)?.each);
            let found = |reads: Reads, layers: bool| {
                let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
                let micro =
                    Micro { base: &base, delta, sequences: &sequences, losses, reads, weight: 5.0, pacer: None };
                if layers { gradients::by_layer(&micro, t.vars()) } else { gradients::whole(&micro, t.vars()) }.unwrap()
            };
            let (loss, want) = found(Reads::All, false);
            for layers in [false, true] {
                let what = format!("{family} {task:?} {name}, by layer: {layers}");
                let (own, got) = found(Reads::of(&examples), layers);
                assert!((own - loss).abs() < 1e-5 * (1.0 + loss.abs()), "{what}: {own} {loss}");
                for ((v, a), b) in t.vars().iter().zip(&got).zip(&want) {
                    assert_near(&format!("{what} {}", v.name), (a.as_ref(), b.as_ref()), (1e-4, 1e-5));
                }
            }
        }
    }
}

/// What a loss is given: as many rows as it reads, wherever that is fewer.
#[test]
fn a_loss_is_given_the_rows_that_it_reads() {
    for (family, task) in bases() {
        let base = tiny(family);
        let (input, t) = (input(&base, task, &lora(), hyper(1)), made(&base, task, &lora(), 9));
        let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
        let examples: Vec<&Encoded> = input.train.iter().take(5).collect();
        let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
        let all: usize = sequences.iter().map(|s| s.tokens.len()).sum();
        let reads = Reads::of(&examples);
        let given = forward(&base, &delta, (&sequences, reads), None, |hidden, _| hidden.dim(0)).unwrap();
        let want = match reads {
            Reads::Learned => all - 5, // all but each text's last
            Reads::Heads => 5,
            Reads::All => all,
        };
        assert_eq!((given, reads == Reads::All), (want, task == Task::TokenCls), "{family} {task:?}");
    }
}

fn with_head(delta: &Delta, head: Option<Head>) -> Option<Arc<Delta>> {
    Some(Arc::new(Delta::new(delta.spec.clone(), delta.patches().to_vec(), head)))
}

/// Heads that read the pooled row, the first row as it is, and none; texts whose row is wanted, and texts whose is not.
#[test]
fn heads_of_wanted_rows_are_those_of_the_whole_forward() {
    for family in ["bert", "llama"] {
        let base = tiny(family);
        let of = |seed| made(&base, Task::SeqCls, &lora(), seed).detached().unwrap();
        let (a, b) = (of(7), of(8));
        let first = a.head().map(|head| Head { pool: HeadPool::First, ..head.clone() });
        let own = [
            with_head(&a, a.head().cloned()),
            with_head(&a, first),
            with_head(&b, b.head().cloned()),
            with_head(&b, None),
        ];
        let per_span = [0, 1, 2, 3, 0, 1].map(|i| own[i].clone());
        let step = Step::new(&base, &[5, 4, 6, 3, 7, 5], &per_span, &mut Rng(11));
        let cx = Cx::new(&step.rows, &step.deltas);
        let (whole, rows) = (step.states(&base, None), base.transformer.head_rows(&cx));
        let want = base.transformer.classify(&whole, &cx).unwrap();
        for kept in [vec![0, 1, 2, 3, 4, 5], vec![1], vec![0, 5], vec![2, 3, 4]] {
            let wanted = Wanted::of(&step.rows, &step.deltas, kept.iter().map(|i| rows[*i])).unwrap();
            let cx = Cx { wanted: Some(&wanted), ..cx };
            let hidden = step.states(&base, Some(&wanted));
            assert_eq!(hidden.dim(0).unwrap(), kept.len());
            for (i, (got, want)) in base.transformer.classify(&hidden, &cx).unwrap().iter().zip(&want).enumerate() {
                let want = want.as_ref().filter(|_| kept.contains(&i));
                assert_eq!(got.is_some(), want.is_some(), "{family} {kept:?} {i}");
                if let (Some(got), Some(want)) = (got, want) {
                    same(&format!("{family} {kept:?} {i}"), got, want);
                }
            }
            let pooled = base.transformer.pooled(&hidden, &cx).unwrap().dim(0).unwrap();
            assert!(pooled <= kept.len() && (family == "llama" || pooled == kept.len()));
        }
    }
}

#[test]
fn rows_that_were_not_wanted_are_refused() {
    let base = tiny("llama");
    let delta = Some(Arc::new(made(&base, Task::CausalLm, &lora(), 7).detached().unwrap()));
    let step = Step::new(&base, &[9, 8], &[delta.clone(), delta.clone()], &mut Rng(1));
    let wanted = Wanted::of(&step.rows, &step.deltas, [8, 16]).unwrap();
    let cx = Cx { wanted: Some(&wanted), ..Cx::new(&step.rows, &step.deltas) };
    let hidden = step.states(&base, Some(&wanted));
    assert!(base.transformer.logits(&hidden, &[16, 8, 16], &cx).is_ok());
    let refused = base.transformer.logits(&hidden, &[8, 7], &cx).unwrap_err().to_string();
    assert!(refused.contains("row 7 is read"), "{refused}");
    let other = Step::new(&base, &[9], &[delta], &mut Rng(1));
    let cx = Cx { wanted: Some(&wanted), ..Cx::new(&other.rows, &other.deltas) };
    let refused = base.transformer.forward(&Input::tokens(&other.tokens), &cx).unwrap_err().to_string();
    assert!(refused.contains("wanted of another step"), "{refused}");
}

/// With every weight trained, too.
#[test]
fn gradients_of_weights_are_those_of_the_whole_forward() {
    for (family, task) in super::full_laws::CASES {
        let (_dir, base) = super::full_laws::kept(family);
        let input = super::full_laws::full(&base, task, hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        let (delta, base) = (t.delta(&mut rng(5, Stream::Dropout)).unwrap(), t.base(&base).unwrap());
        let mut draw = Rng(21);
        let step = Step::new(&base, &[5, 8, 3], &vec![Some(delta); 3], &mut draw);
        let pick = [2, 6, 9, 15];
        let (want, wanted) = selected(&step.states(&base, None), &step, &pick).unwrap();
        let got = step.states(&base, Some(&wanted));
        same(family, &got, &want);
        let weights = Var::randn(0f32, 1.0, want.shape(), want.device()).unwrap();
        let grads = |y: Tensor| (y * weights.as_detached_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (grads(got), grads(want));
        for v in t.vars() {
            assert_near(&format!("{family} {}", v.name), (got.get(&v.var), want.get(&v.var)), (1e-4, 5e-5));
        }
    }
}
