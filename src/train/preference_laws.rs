//! Laws of learning preferences on a whole (tiny) model.

use std::sync::Arc;

use candle_core::Tensor;
use rand::Rng as _;

use super::{
    batches::{Stream, rng},
    encode::{Answer, Encoded, Target, add_mismatched},
    full_laws::kept,
    laws::{finish, flat, hyper, input, lora, positions, tiny, train},
    method_laws::all,
    objective::Sequence,
    preference::{Answered, Judged, judge, log_probs},
    resume_laws::{assert_goes_on, busy},
    run::{Advance, Run, RunInput},
    testing::Differences,
    trainable::Trainable,
};
use crate::{
    admission::train_params::{
        EvalEvent, EvalMetric, JobEventBody, MethodPart, PreferenceMethod, PreferenceParams, ResolvedPreference,
        ResolvedTraining,
    },
    delta::{Delta, Task},
    model::Base,
};

const METHODS: [PreferenceMethod; 3] = [PreferenceMethod::Dpo, PreferenceMethod::Orpo, PreferenceMethod::Kto];

fn of(method: PreferenceMethod) -> ResolvedPreference {
    PreferenceParams::of(method).resolve()
}

/// Prompts of different lengths; good answers are even tokens, bad ones odd, from 60 to 71.
fn examples(method: PreferenceMethod, task: Task, from: usize, n: usize) -> Arc<[Encoded]> {
    let one = |i: usize| {
        let prompt: Vec<u32> = (0..3 + i % 3).map(|j| (3 + (i * 13) % 40 + j) as u32).collect();
        let answer = |odd: u32, len: usize| {
            let said = (0..len).map(|j| 60 + 2 * ((i * 7 + j * 3) % 6) as u32 + odd);
            let start = if task == Task::Seq2Seq { vec![2] } else { prompt.clone() };
            let learn = (0..start.len() + len).map(|at| at >= start.len()).collect();
            Answer { tokens: start.into_iter().chain(said).collect(), learn }
        };
        let (good, bad) = (answer(0, 2 + i % 4), answer(1, 2 + i % 3));
        let (own, target) = match method {
            PreferenceMethod::Kto => {
                let (own, good) = if i.is_multiple_of(2) { (good, true) } else { (bad, false) };
                (own.tokens, Target::Rated(own.learn, good, None))
            }
            _ => (good.tokens, Target::Preferred(good.learn, Box::new(bad))),
        };
        let source = if task == Task::Seq2Seq { prompt.iter().map(|t| t + 1).chain([1]).collect() } else { vec![] };
        Encoded { source, line: i as u64 + 1, ..Encoded::new(own, target) }
    };
    let mut all: Vec<Encoded> = (from..from + n).map(one).collect();
    add_mismatched(&mut all, 32);
    all.into()
}

fn prefers(
    base: &Base,
    (task, method): (Task, PreferenceMethod),
    methods: &[MethodPart],
    resolved: ResolvedTraining,
) -> RunInput {
    let input = input(base, task, methods, resolved);
    RunInput {
        resolved: ResolvedTraining { preference: Some(of(method)), ..input.resolved },
        train: examples(method, task, 0, 24),
        validation: examples(method, task, 24, 10),
        ..input
    }
}

fn run_of(base: &Arc<Base>, delta: &Arc<Delta>, sequences: &[Sequence<'_>]) -> Answered {
    log_probs(base, delta, sequences, None).unwrap()
}

/// The log-probabilities that the method learns from.
fn policy(base: &Arc<Base>, delta: &Arc<Delta>, batch: &[&Encoded], p: &ResolvedPreference) -> Answered {
    let own = batch.iter().map(|e| Sequence::from(*e));
    let others = batch.iter().flat_map(|e| e.answers().skip(1)).filter(|_| p.method != PreferenceMethod::Kto);
    run_of(base, delta, &own.chain(others).collect::<Vec<_>>())
}

/// What a delta makes of examples, and what the bare base does.
fn judged<'a>(base: &Arc<Base>, delta: &Arc<Delta>, batch: &'a [&'a Encoded], p: &ResolvedPreference) -> Judged<'a> {
    let others: Vec<_> = batch.iter().flat_map(|e| e.answers().skip(1)).collect();
    let bare = Arc::new(Delta::new(delta.spec.clone(), vec![], None));
    let alone = |e: &Encoded| {
        let sums = flat(&run_of(base, &bare, &e.answers().collect::<Vec<_>>()).sums);
        [sums[0], sums.get(1).copied().unwrap_or(0.0)]
    };
    let reference = if p.has_reference() { batch.iter().map(|e| alone(e)).collect() } else { vec![] };
    let mismatched = match p.method {
        PreferenceMethod::Kto => flat(&run_of(base, delta, &others).sums),
        _ => vec![],
    };
    Judged { examples: batch, policy: policy(base, delta, batch, p), mismatched, reference }
}

/// Moves every variable a little away from where it starts, where some gradients are zero.
fn shake(t: &Trainable) {
    let mut noise = rng(7, Stream::Init);
    for v in t.vars() {
        let by: Vec<f32> = (0..v.var.elem_count()).map(|_| noise.random_range(-0.05f32..0.05)).collect();
        let by = Tensor::from_vec(by, v.var.shape(), v.var.device()).unwrap();
        v.var.set(&(v.var.as_detached_tensor() + by).unwrap()).unwrap();
    }
}

#[test]
fn gradients_match_central_differences_for_every_method() {
    let mut cases: Vec<_> = all().into_iter().map(|(name, methods)| ("llama", Task::CausalLm, name, methods)).collect();
    cases.extend([
        ("gpt2", Task::CausalLm, "lora", lora()),
        ("llama", Task::CausalLm, "prefix", vec![positions::prefix(3)]),
        ("llama", Task::CausalLm, "prompt", vec![positions::prompt(3)]),
        ("gemma2", Task::CausalLm, "lora", lora()),
        ("t5", Task::Seq2Seq, "lora", lora()),
        ("t5", Task::Seq2Seq, "prompt", vec![positions::prompt(3)]),
    ]);
    for (i, (family, task, name, methods)) in cases.into_iter().enumerate() {
        // every loss on LoRA, one of them on the others
        let losses = if i == 0 { &METHODS[..] } else { &METHODS[i % 3..=i % 3] };
        let base = tiny(family);
        for method in losses {
            let p = ResolvedPreference { beta: 0.5, ..of(*method) };
            let input = prefers(&base, (task, *method), &methods, hyper(10));
            let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
            shake(&t);
            let batch: Vec<&Encoded> = input.train.iter().take(4).collect();
            let at = judged(&base, &Arc::new(t.detached().unwrap()), &batch, &p);
            let loss = || {
                let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
                // the estimate of KL counts as given: no gradient goes through it
                let (mismatched, reference) = (at.mismatched.clone(), at.reference.clone());
                let judged =
                    Judged { examples: &batch, policy: policy(&base, &delta, &batch, &p), mismatched, reference };
                judge(&judged, &p).unwrap().each.mean_all().unwrap()
            };
            let grads = loss().backward().unwrap();
            for v in t.vars() {
                let what = format!("{family} {name} {method:?}");
                // DoRA's norm is a constant to the gradient, so its pair is not compared
                match name != "dora" || v.name.ends_with("magnitude") {
                    true => Differences::default().assert(&what, v, &grads, loss),
                    false => assert!(grads.get(&v.var).is_some(), "{what} {}: cut", v.name),
                }
            }
        }
    }
}

#[test]
fn an_untrained_delta_prefers_nothing() {
    for (family, task) in [("llama", Task::CausalLm), ("t5", Task::Seq2Seq)] {
        let base = tiny(family);
        for (method, start) in [(PreferenceMethod::Dpo, std::f64::consts::LN_2), (PreferenceMethod::Kto, 0.5)] {
            let input = prefers(&base, (task, method), &lora(), hyper(1));
            let t = Trainable::init(&input.spec, &base.sites, 1, &base.device).unwrap();
            let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
            let losses = judge(&judged(&base, &Arc::new(t.detached().unwrap()), &batch, &of(method)), &of(method));
            let losses = losses.unwrap();
            for each in flat(&losses.each) {
                assert!((f64::from(each) - start).abs() < 1e-5, "{family} {method:?} {each}");
            }
            assert!(losses.rewards.margin().unwrap().abs() < 1e-5);
            let (events, _) = finish(Run::new(Arc::clone(&base), None, input).unwrap());
            let first = events.iter().find_map(|e| if let JobEventBody::Metrics(m) = e { Some(m.loss) } else { None });
            assert!((first.unwrap() - start).abs() < 1e-5, "{family} {method:?} {first:?}");
        }
    }
}

fn evals(events: &[JobEventBody]) -> Vec<&EvalEvent> {
    events.iter().filter_map(|e| if let JobEventBody::Eval(e) = e { Some(e) } else { None }).collect()
}

#[test]
fn what_is_preferred_is_learned_and_held_out_answers_are_told_apart() {
    for (family, task, methods) in [
        ("llama", Task::CausalLm, lora()),
        ("gpt2", Task::CausalLm, vec![positions::prefix(4)]),
        ("t5", Task::Seq2Seq, lora()),
        ("llama", Task::CausalLm, vec![MethodPart::Full]),
    ] {
        let (_folder, base) = kept(family);
        for method in METHODS {
            let rate = if methods == [MethodPart::Full] { 3e-3 } else { 1e-2 };
            let resolved = ResolvedTraining {
                learning_rate: rate,
                eval_every: 20,
                eval_metric: EvalMetric::RewardMargin,
                worst_examples: 2,
                ..hyper(80)
            };
            let (events, outcome) =
                finish(Run::new(Arc::clone(&base), None, prefers(&base, (task, method), &methods, resolved)).unwrap());
            let evals = evals(&events);
            let last = evals.last().unwrap_or_else(|| panic!("{outcome:?}"));
            let what = format!("{family} {method:?} {methods:?}: {evals:?}");
            assert_eq!((evals.len(), last.perplexity), (4, None), "{what}");
            // margins are small: one pair of ten may still stand the wrong way round
            assert!(last.reward_accuracy.is_some_and(|a| a >= 0.9), "{what}");
            assert!(last.reward_margin > evals[0].reward_margin, "{what}");
            // ORPO's holds the likelihood of answers, which are made up, and so not to be foreseen
            assert!(last.loss < evals[0].loss || method == PreferenceMethod::Orpo, "{what}");
            assert!(events.iter().any(|e| matches!(e, JobEventBody::Worst(w) if w.held_out && w.examples.len() == 2)));
        }
    }
}

#[test]
fn each_reference_is_taken_once_in_a_turn_of_its_own() {
    let base = tiny("llama");
    let turns = |method| {
        // three passes, an evaluation after each
        let mut run =
            Run::new(Arc::clone(&base), None, prefers(&base, (Task::CausalLm, method), &lora(), hyper(9))).unwrap();
        let mut n = 0;
        while let Advance::More(_) = run.advance() {
            n += 1;
        }
        n
    };
    assert_eq!(turns(PreferenceMethod::Dpo), turns(PreferenceMethod::Orpo) + 24 + 10);
}

#[test]
fn accumulation_equals_one_large_batch_of_pairs() {
    let base = tiny("llama");
    for method in [PreferenceMethod::Dpo, PreferenceMethod::Orpo] {
        let run = |batch_size, grad_accumulation| {
            let resolved = ResolvedTraining { batch_size, grad_accumulation, ..hyper(3) };
            let input = prefers(&base, (Task::CausalLm, method), &lora(), resolved);
            let end = train(&base, RunInput { validation: Arc::from([]), ..input });
            let weights = end.delta.patches().iter().flat_map(|(_, p)| p.tensors()).flat_map(|(_, t)| flat(t));
            (end.final_loss, weights.collect::<Vec<f32>>())
        };
        let ((loss, weights), (split_loss, split)) = (run(12, 1), run(3, 4));
        assert!((loss - split_loss).abs() < 1e-5, "{loss} {split_loss}");
        let worst = weights.iter().zip(&split).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // three steps of 0.01 each; Adam shows the rounding of gradients that are next to nothing
        assert!(worst < 1e-3, "{method:?} {worst}");
    }
}

#[test]
fn preferences_go_on_bit_for_bit() {
    for (family, task) in [("llama", Task::CausalLm), ("t5", Task::Seq2Seq)] {
        let base = tiny(family);
        for method in METHODS {
            let resolved = ResolvedTraining { worst_examples: 3, ..busy(6) };
            let of = || prefers(&base, (task, method), &lora(), resolved.clone());
            // within the references of a step, of an evaluation, and between
            let stops = if family == "llama" { &[1, 5, 8, 11, 23, 31, 38, 44, 52][..] } else { &[9, 40][..] };
            assert_goes_on(&base, &format!("{family} {method:?}"), stops, &of);
        }
    }
}

#[test]
fn a_checkpoint_belongs_to_its_answers() {
    let base = tiny("llama");
    for method in METHODS {
        let of = || prefers(&base, (Task::CausalLm, method), &lora(), hyper(4));
        let bytes = Run::new(Arc::clone(&base), None, of()).unwrap().to_bytes().unwrap().unwrap();
        assert_eq!(of().check_resumes(&bytes, &base.fingerprint), Ok(0));
        let other = |change: &dyn Fn(&mut Encoded)| {
            let mut train = of().train.to_vec();
            change(&mut train[3]);
            let error = RunInput { train: train.into(), ..of() }.check_resumes(&bytes, &base.fingerprint);
            assert!(error.unwrap_err().to_string().contains("other examples"));
        };
        other(&|e| match &mut e.target {
            Target::Preferred(_, other) | Target::Rated(_, _, Some(other)) => other.tokens[2] += 1,
            _ => panic!("no preference"),
        });
        if method == PreferenceMethod::Kto {
            other(&|e| {
                if let Target::Rated(_, good, _) = &mut e.target {
                    *good = !*good
                }
            });
        }
        let mut hotter = of();
        hotter.resolved.preference.iter_mut().for_each(|p| p.beta *= 2.0);
        assert!(hotter.check_resumes(&bytes, &base.fingerprint).unwrap_err().to_string().contains("hyper-parameters"));
    }
}
