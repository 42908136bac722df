//! Laws of holding on to the base: the loss is cross-entropy plus the divergence, whatever computes it, and who pays for the
//! divergence keeps it small.

use std::sync::Arc;

use candle_core::{DType, Tensor, backprop::GradStore};

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    full_laws::{full, kept},
    gradients::{self, LossesOf, Micro},
    laws::{examples, finish, flat, hyper, input, lora, positions, tiny},
    method_laws::all,
    objective::{Reads, Sequence, bare, forward, losses, next_token_against, smoothed_losses},
    optim::global_norm,
    run::{Advance, Outcome, Run, RunInput, Trained},
    testing::{Differences, assert_near, shake},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{JobEventBody, LoraPart, MethodPart, ResolvedTraining, Targets},
    delta::{Delta, Task},
    model::Base,
    rows::RowLayout,
};

/// Families with heads of all kinds: of its own, tied, tied and scaled, squeezed.
pub(super) const BASES: [(&str, Task); 4] =
    [("llama", Task::CausalLm), ("gpt2", Task::CausalLm), ("t5", Task::Seq2Seq), ("gemma2", Task::CausalLm)];
const KL: f64 = 0.8;
const SMOOTHING: f64 = 0.1;

/// All methods of a base that generates, those included that add positions, have dropout, or change the head.
fn methods(base: &Base) -> Vec<(&'static str, Vec<MethodPart>)> {
    let mut methods = all();
    methods.extend([
        ("prefix", vec![positions::prefix(3)]),
        ("prompt", vec![positions::prompt(3)]),
        ("p-tuning", vec![positions::p_tuning(3)]),
        ("prompt and lora", [lora(), vec![positions::prompt(2)]].concat()),
    ]);
    let part = |part: LoraPart| vec![MethodPart::Lora(LoraPart { rank: Some(3), ..part })];
    methods.push(("lora with dropout", part(LoraPart { dropout: Some(0.3), ..LoraPart::default() })));
    if !base.arch.is_encoder_decoder() {
        let targets = Targets::Modules(vec!["lm_head".into()]);
        methods.push(("lora of the head", part(LoraPart { targets, ..LoraPart::default() })));
    }
    methods
}

pub(super) fn sequences<'a>(examples: &[&'a Encoded]) -> Vec<Sequence<'a>> {
    examples.iter().map(|e| Sequence::from(*e)).collect()
}

/// The losses that are trained on, and the sum of the divergences; `trained` is the resident base, or a copy of it.
fn held(resident: &Base, trained: &Base, delta: &Arc<Delta>, of: &[Sequence<'_>], kl: f64) -> (Tensor, f64) {
    let reference = bare(resident, delta, of, None).unwrap();
    let each = forward(trained, delta, (of, Reads::Learned), None, |hidden, cx| {
        next_token_against(trained, hidden, of, SMOOTHING, (&reference, kl), cx)
    });
    each.unwrap()
}

/// Rows that predict a learned token, and the tokens.
fn picked(of: &[Sequence<'_>], rows: &RowLayout) -> (Vec<u32>, Vec<u32>) {
    let learned = of.iter().zip(rows.spans()).flat_map(|(s, span)| {
        let first = span.token_rows().start;
        (1..s.tokens.len()).filter(move |t| s.learn[*t]).map(move |t| ((first + t - 1) as u32, s.tokens[t]))
    });
    learned.unzip()
}

/// The same, plainly in f64 on whole matrices of logits.
pub(super) fn dense(
    resident: &Base,
    trained: &Base,
    delta: &Arc<Delta>,
    of: &[Sequence<'_>],
    kl: f64,
) -> (Tensor, f64) {
    let off = Arc::new(Delta::new(delta.spec.clone(), vec![], None));
    let logp = |base: &Base, delta: &Arc<Delta>| {
        let found = forward(base, delta, (of, Reads::All), None, |hidden, cx| {
            let (pick, targets) = picked(of, cx.rows);
            let logits = base.transformer.logits(hidden, &pick, cx)?.to_dtype(DType::F64)?;
            Ok((candle_nn::ops::log_softmax(&logits, 1)?, targets))
        });
        found.unwrap()
    };
    let ((p, targets), q) = (logp(trained, delta), logp(resident, &off).0.detach());
    let index = Tensor::new(targets, p.device()).unwrap().unsqueeze(1).unwrap();
    let picked = p.gather(&index, 1).unwrap().squeeze(1).unwrap();
    let nll = ((picked * -(1.0 - SMOOTHING)).unwrap() - (p.mean(1).unwrap() * SMOOTHING).unwrap()).unwrap();
    let apart = (q.exp().unwrap() * (&q - &p).unwrap()).unwrap().sum(1).unwrap();
    let sum = apart.sum_all().unwrap().to_scalar::<f64>().unwrap();
    ((nll + (apart * kl).unwrap()).unwrap(), sum)
}

fn backward(each: &Tensor) -> GradStore {
    each.mean_all().unwrap().backward().unwrap()
}

#[track_caller]
fn near(what: &str, a: Option<&Tensor>, b: Option<&Tensor>) {
    assert_near(what, (a, b), (1e-4, 1e-5));
}

#[track_caller]
fn equals_the_dense_one(what: &str, (resident, trained): (&Base, &Base), t: &Trainable, examples: &[&Encoded]) {
    let (of, delta) = (sequences(examples), t.delta(&mut rng(5, Stream::Dropout)).unwrap());
    let ((each, sum), (slow, slow_sum)) =
        (held(resident, trained, &delta, &of, KL), dense(resident, trained, &delta, &of, KL));
    assert!(slow_sum > 1e-6 && (sum - slow_sum).abs() < 1e-4 * slow_sum + 3e-5, "{what}: {sum} {slow_sum}");
    let slow_each = slow.to_vec1::<f64>().unwrap();
    assert_eq!(each.dims(), slow.dims(), "{what}");
    for (a, b) in flat(&each).iter().zip(&slow_each) {
        assert!((f64::from(*a) - b).abs() < 1e-4 * (1.0 + b.abs()), "{what}: {a} {b}");
    }
    let (fast, slow) = (backward(&each), backward(&slow));
    for v in t.vars() {
        near(&format!("{what} {}", v.name), fast.get(&v.var), slow.get(&v.var));
    }
}

#[test]
fn losses_and_gradients_are_those_of_whole_matrices_for_every_method() {
    for (family, task) in BASES {
        let base = tiny(family);
        for (name, methods) in methods(&base) {
            let input = input(&base, task, &methods, hyper(1));
            let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
            shake(t.vars(), 7);
            let examples: Vec<&Encoded> = input.train.iter().take(5).collect();
            equals_the_dense_one(&format!("{family} {name}"), (&*base, &*base), &t, &examples);
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_whole_matrices_for_full_fine_tuning() {
    for (family, task) in BASES {
        let (_dir, base) = kept(family);
        let input = full(&base, task, hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        shake(&t.vars()[..4], 7);
        let (trained, examples) = (t.base(&base).unwrap(), input.train.iter().take(4).collect::<Vec<_>>());
        equals_the_dense_one(family, (&*base, &*trained), &t, &examples);
    }
}

#[test]
fn gradients_match_central_differences() {
    let head = LoraPart { rank: Some(3), targets: Targets::Modules(vec!["lm_head".into()]), ..LoraPart::default() };
    let mut cases: Vec<_> = BASES.into_iter().map(|(family, task)| (family, task, lora())).collect();
    cases.extend([
        ("llama", Task::CausalLm, vec![MethodPart::Lora(head)]),
        ("gpt2", Task::CausalLm, vec![positions::prefix(3)]),
        ("llama", Task::CausalLm, vec![positions::prompt(3)]),
        ("t5", Task::Seq2Seq, vec![positions::prompt(3)]),
    ]);
    for (family, task, methods) in cases {
        let base = tiny(family);
        let input = input(&base, task, &methods, hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        shake(t.vars(), 7);
        let examples: Vec<&Encoded> = input.train.iter().take(5).collect();
        let of = sequences(&examples);
        let loss = || {
            let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
            held(&base, &base, &delta, &of, KL).0.mean_all().unwrap()
        };
        Differences::default().assert_all(family, t.vars(), loss);
    }
}

#[test]
fn an_untrained_delta_is_not_apart_from_the_base_and_is_not_held_back() {
    for (family, task) in BASES {
        let base = tiny(family);
        let input = input(&base, task, &lora(), hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
        let examples: Vec<&Encoded> = input.train.iter().take(6).collect();
        let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
        let (each, sum) = held(&base, &base, &delta, &sequences(&examples), 100.0);
        assert!(sum.abs() < 1e-6 * each.elem_count() as f64, "{family}: {sum}");
        let plain = smoothed_losses(&base, delta, &examples, SMOOTHING, None).unwrap().each;
        for (a, b) in flat(&each).iter().zip(flat(&plain)) {
            assert!((a - b).abs() < 1e-3, "{family}: {a} {b}");
        }
        let (with, without) = (backward(&each), backward(&plain));
        for v in t.vars() {
            let (a, b) = (with.get(&v.var).unwrap(), without.get(&v.var).unwrap());
            let (norm, apart) = (global_norm([b]).unwrap(), global_norm([&(a - b).unwrap()]).unwrap());
            // rounding, a hundred times
            assert!(apart <= 1e-3 * norm + 1e-4, "{family} {}: {apart} of {norm}", v.name);
        }
    }
}

#[test]
fn layer_by_layer_it_is_the_same() {
    for (family, task) in BASES {
        let base = tiny(family);
        for (name, methods) in methods(&base) {
            let input = input(&base, task, &methods, hyper(1));
            let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
            shake(t.vars(), 7);
            let examples: Vec<&Encoded> = input.train.iter().take(5).collect();
            let of = sequences(&examples);
            let [whole, by_layer] = [gradients::whole, gradients::by_layer].map(|by| {
                let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
                let reference = bare(&base, &delta, &of, None).unwrap();
                let losses: LossesOf<'_> =
                    &|hidden, cx| Ok(next_token_against(&base, hidden, &of, SMOOTHING, (&reference, KL), cx)?.0);
                let reads = Reads::Learned;
                let micro = Micro { base: &base, delta, sequences: &of, losses, reads, weight: 6.0, pacer: None };
                by(&micro, t.vars()).unwrap()
            });
            assert!((whole.0 - by_layer.0).abs() < 1e-5, "{family} {name}: {} {}", whole.0, by_layer.0);
            assert!(whole.1.iter().any(Option::is_some), "{family} {name}");
            for ((v, a), b) in t.vars().iter().zip(&whole.1).zip(&by_layer.1) {
                near(&format!("{family} {name} {}", v.name), a.as_ref(), b.as_ref());
            }
        }
    }
}

fn trained(base: &Arc<Base>, input: RunInput) -> (Vec<JobEventBody>, Trained) {
    match finish(Run::new(Arc::clone(base), None, input).unwrap()) {
        (events, Outcome::Trained(t)) => (events, *t),
        (_, outcome) => panic!("{outcome:?}"),
    }
}

fn told(events: &[JobEventBody]) -> Vec<Option<f64>> {
    events.iter().filter_map(|e| if let JobEventBody::Metrics(m) = e { Some(m.kl) } else { None }).collect()
}

#[test]
fn who_pays_for_the_divergence_forgets_less() {
    for (family, task) in [("llama", Task::CausalLm), ("t5", Task::Seq2Seq)] {
        let base = tiny(family);
        let texts = examples(task, 40);
        let texts: Vec<&Encoded> = texts.iter().collect();
        let ends = [0.0, 5.0].map(|kl_to_base| {
            let resolved = ResolvedTraining { kl_to_base, ..hyper(60) };
            let (events, end) = trained(&base, input(&base, task, &lora(), resolved));
            let kl = told(&events);
            assert!(!kl.is_empty() && kl.iter().all(|k| k.is_some() == (kl_to_base > 0.0)), "{kl:?}");
            if let Some(first) = kl[0] {
                assert!(first.abs() < 1e-5, "the first step begins at the base: {first}");
            }
            let delta = Arc::new(end.delta);
            let of = sequences(&texts);
            let (each, sum) = dense(&base, &base, &delta, &of, 1.0);
            let mean = flat(&losses(&base, delta, &texts, None).unwrap().each);
            let mean = f64::from(mean.iter().sum::<f32>()) / mean.len() as f64;
            (sum / each.elem_count() as f64, mean)
        });
        let [(free, learned), (held, held_loss)] = ends;
        assert!(held < 0.5 * free, "{family}: {held} and {free} from the base");
        let off = Trainable::init(&input(&base, task, &lora(), hyper(1)).spec, &base.sites, 1, &base.device).unwrap();
        let start = flat(&losses(&base, Arc::new(off.detached().unwrap()), &texts, None).unwrap().each);
        let start = f64::from(start.iter().sum::<f32>()) / start.len() as f64;
        assert!(learned < held_loss && held_loss < start, "{family}: {learned} {held_loss} {start}");
    }
}

#[test]
fn accumulation_is_one_large_batch_and_the_told_divergence_its_mean() {
    let base = tiny("llama");
    let run = |batch_size, grad_accumulation| {
        let resolved = ResolvedTraining { batch_size, grad_accumulation, kl_to_base: 0.7, ..hyper(3) };
        let mut run = Run::new(Arc::clone(&base), None, input(&base, Task::CausalLm, &lora(), resolved)).unwrap();
        let mut last = None;
        while run.step() < 3 {
            let Advance::More(events) = run.advance() else { panic!("it ends early") };
            last = told(&events).pop().flatten().or(last);
        }
        let weights: Vec<f32> = run.trainable().vars().iter().flat_map(|v| flat(&v.var)).collect();
        (run.last_loss(), last.unwrap(), weights)
    };
    let ((loss, kl, weights), (split_loss, split_kl, split)) = (run(16, 1), run(2, 8));
    assert!(kl > 1e-6 && (kl - split_kl).abs() < 1e-5, "{kl} {split_kl}");
    assert!((loss - split_loss).abs() < 1e-5, "{loss} {split_loss}");
    let worst = weights.iter().zip(&split).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

#[test]
fn a_whole_model_is_held_to_the_base_that_it_was_copied_from() {
    let (_dir, base) = kept("gpt2");
    let ends = [0.0, 20.0].map(|kl_to_base| {
        let resolved = ResolvedTraining { kl_to_base, learning_rate: 1e-3, ..hyper(25) };
        let mut run = Run::new(Arc::clone(&base), None, full(&base, Task::CausalLm, resolved)).unwrap();
        let mut all = Vec::new();
        while run.step() < 25 {
            let Advance::More(events) = run.advance() else { panic!("it ends early") };
            all.extend(told(&events));
        }
        let copy = run.trainable().detached_base(&base).unwrap();
        let texts = examples(Task::CausalLm, 20);
        let texts: Vec<&Encoded> = texts.iter().collect();
        let delta = Arc::new(run.trainable().detached().unwrap());
        (all, dense(&base, &copy, &delta, &sequences(&texts), 1.0).1)
    });
    let [(none, free), (some, held)] = ends;
    assert!(none.iter().all(Option::is_none) && some.iter().all(Option::is_some), "{none:?} {some:?}");
    assert!(some[0].is_some_and(|first| first.abs() < 1e-5), "the copy begins as the base is: {some:?}");
    assert!(held < 0.5 * free, "{held} and {free} from the base");
}
