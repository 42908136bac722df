//! Laws of holding on to the base on texts of its own: the divergence alone, beside the job's own loss, and as a run that stops.

use std::sync::Arc;

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    gradients::{self, LossesOf, Micro},
    kl_laws::{BASES, dense, sequences},
    laws::{examples, finish, flat, hyper, input, lora, positions, tiny},
    objective::{Reads, Sequence, bare, divergence, forward, losses},
    resume_laws::{assert_goes_on, busy},
    run::{Advance, Outcome, Run, RunInput},
    testing::{Differences, assert_near, shake},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{JobEventBody, LoraPart, MethodPart, ResolvedTraining, Targets},
    delta::{Delta, Task},
    model::Base,
};

/// Large enough for its gradients to stand out.
const KL: f64 = 20.0;

/// Texts that count downwards, which no training example does.
fn downwards(task: Task, n: usize) -> Arc<[Encoded]> {
    let turned = |e: &Encoded| Encoded { tokens: e.tokens.iter().rev().copied().collect(), ..e.clone() };
    examples(task, n).iter().map(turned).collect()
}

/// By token, `KL` times the divergence, plainly in f64.
fn plain(base: &Base, delta: &Arc<Delta>, of: &[Sequence<'_>]) -> Vec<f64> {
    let each = |kl| dense(base, base, delta, of, kl).0.to_vec1::<f64>().unwrap();
    each(KL).iter().zip(each(0.0)).map(|(with, without)| with - without).collect()
}

#[test]
fn the_value_is_the_dense_one_and_the_gradients_those_of_central_differences_also_layer_by_layer() {
    let head = LoraPart { rank: Some(3), targets: Targets::Modules(vec!["lm_head".into()]), ..LoraPart::default() };
    let mut cases: Vec<_> = BASES.into_iter().map(|(family, task)| (family, task, lora())).collect();
    cases.extend([
        ("llama", Task::CausalLm, vec![MethodPart::Lora(head)]),
        ("gpt2", Task::CausalLm, vec![positions::prefix(3)]),
        ("t5", Task::Seq2Seq, vec![positions::prompt(3)]),
    ]);
    for (family, task, methods) in cases {
        let base = tiny(family);
        let t = Trainable::init_on(&input(&base, task, &methods, hyper(1)).spec, &base, 1).unwrap();
        shake(t.vars(), 7);
        let texts = downwards(task, 6);
        let texts: Vec<&Encoded> = texts.iter().collect();
        let of = sequences(&texts);
        let now = || t.delta(&mut rng(0, Stream::Dropout)).unwrap();
        let reference = bare(&base, &now(), &of, None).unwrap();
        let found = || {
            let against = (&reference, KL);
            let reads = (&of[..], Reads::Learned);
            forward(&base, &now(), reads, None, |hidden, cx| divergence(&base, hidden, &of, against, cx)).unwrap()
        };
        let ((each, sum), want) = (found(), plain(&base, &now(), &of));
        assert!(want.iter().sum::<f64>() > 1e-2, "{family}: it is nothing");
        assert_eq!(each.elem_count(), want.len(), "{family}");
        for (got, want) in flat(&each).iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-3 * (1.0 + want), "{family}: {got} {want}");
        }
        assert!((KL * sum - want.iter().sum::<f64>()).abs() < 1e-3 * (1.0 + KL * sum), "{family}: {sum}");
        Differences::default().assert_all(family, t.vars(), || found().0.mean_all().unwrap());
        let of_hidden: LossesOf<'_> = &|hidden, cx| Ok(divergence(&base, hidden, &of, (&reference, KL), cx)?.0);
        let (losses, reads) = (of_hidden, Reads::Learned);
        let micro = Micro { base: &base, delta: now(), sequences: &of, losses, reads, weight: 5.0, pacer: None };
        let (whole, layers) =
            (gradients::whole(&micro, t.vars()).unwrap(), gradients::by_layer(&micro, t.vars()).unwrap());
        assert!(whole.1.iter().any(Option::is_some) && (whole.0 - layers.0).abs() < 1e-4, "{family}");
        for ((v, a), b) in t.vars().iter().zip(&whole.1).zip(&layers.1) {
            assert_near(&format!("{family} {}", v.name), (a.as_ref(), b.as_ref()), (1e-4, 1e-5));
        }
    }
}

fn replaying(base: &Base, task: Task, methods: &[MethodPart], texts: usize, resolved: ResolvedTraining) -> RunInput {
    let replay = downwards(task, texts);
    let own = input(base, task, methods, resolved);
    let resolved = ResolvedTraining { replay_examples: texts as u32, ..own.resolved };
    RunInput { resolved, replay, ..own }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

#[test]
fn a_step_s_loss_is_that_of_its_examples_and_the_mean_divergence_on_its_texts() {
    for (family, task) in [("llama", Task::CausalLm), ("t5", Task::Seq2Seq)] {
        let base = tiny(family);
        for grad_accumulation in [1, 2] {
            // all four examples and all three texts are in each step
            let batch_size = 4 / grad_accumulation;
            let resolved =
                ResolvedTraining { kl_to_base: KL, batch_size, grad_accumulation, learning_rate: 5e-2, ..hyper(2) };
            let of = replaying(&base, task, &lora(), 3, resolved);
            let of = RunInput { train: examples(task, 4), ..of };
            let (train, replay) = (Arc::clone(&of.train), Arc::clone(&of.replay));
            let mut run = Run::new(Arc::clone(&base), None, of).unwrap();
            while run.step() < 1 {
                assert!(matches!(run.advance(), Advance::More(_)));
            }
            let delta = Arc::new(run.trainable().detached().unwrap());
            // now, since the delta shares the variables, which the second step changes
            let texts: Vec<&Encoded> = replay.iter().collect();
            let apart = mean(plain(&base, &delta, &sequences(&texts)).into_iter());
            let own: Vec<&Encoded> = train.iter().collect();
            let own = mean(flat(&losses(&base, delta, &own, None).unwrap().each).into_iter().map(f64::from));
            let mut told = None;
            while run.step() < 2 {
                let Advance::More(events) = run.advance() else { panic!("it ends early") };
                let kl = |e: &JobEventBody| if let JobEventBody::Metrics(m) = e { m.kl } else { None };
                told = events.iter().find_map(kl).or(told);
            }
            let told = told.expect("the divergence is told");
            assert!(apart > 1e-2 && (KL * told - apart).abs() < 1e-3 * (1.0 + apart), "{family}: {told} {apart}");
            let loss = run.last_loss();
            assert!((loss - own - apart).abs() < 1e-3 * (1.0 + apart), "{family}: {loss} is not {own} + {apart}");
        }
    }
}

#[test]
fn a_run_with_texts_goes_on_bit_for_bit_wherever_it_stops() {
    let with_dropout = vec![MethodPart::Lora(LoraPart { rank: Some(4), dropout: Some(0.3), ..LoraPart::default() })];
    let base = tiny("llama");
    let resolved = || ResolvedTraining { kl_to_base: 0.5, ..busy(6) };
    // six in a step: the second step has what the first one leaves of the ten
    let of = || {
        let of = replaying(&base, Task::CausalLm, &with_dropout, 10, resolved());
        RunInput { validation: examples(Task::CausalLm, 7), ..of }
    };
    assert_goes_on(&base, "texts", &[], &of);
    let t5 = tiny("t5");
    let of = || replaying(&t5, Task::Seq2Seq, &[positions::prompt(3)], 10, resolved());
    assert_goes_on(&t5, "texts of an encoder-decoder", &[3, 7, 11], &of);
    // which texts they are is part of what a checkpoint belongs to
    let mut run = Run::new(Arc::clone(&base), None, of_llama(&base, 10)).unwrap();
    while run.step() < 2 {
        run.advance();
    }
    let bytes = run.to_bytes().unwrap().unwrap();
    let says = |input: RunInput| input.check_resumes(&bytes, &base.fingerprint).map_err(|e| e.to_string());
    assert_eq!(says(of_llama(&base, 10)), Ok(2));
    let mut other = of_llama(&base, 10);
    other.replay = other.replay.iter().rev().cloned().collect();
    assert!(says(other).unwrap_err().contains("other examples"));
}

fn of_llama(base: &Base, texts: usize) -> RunInput {
    replaying(base, Task::CausalLm, &lora(), texts, ResolvedTraining { kl_to_base: 0.5, ..busy(6) })
}

#[test]
fn what_is_held_on_to_is_the_texts_not_the_job_s_own_tokens() {
    let base = tiny("llama");
    let task = Task::CausalLm;
    let end = |kl_to_base: f64, texts: usize| {
        let resolved = ResolvedTraining { kl_to_base, ..hyper(60) };
        let of = replaying(&base, task, &lora(), texts, resolved);
        let (train, replay) = (Arc::clone(&of.train), downwards(task, 6));
        let (_, Outcome::Trained(end)) = finish(Run::new(Arc::clone(&base), None, of).unwrap()) else {
            panic!("it ends well")
        };
        let delta = Arc::new(end.delta);
        let apart = |texts: &[Encoded]| {
            let texts: Vec<&Encoded> = texts.iter().collect();
            mean(plain(&base, &delta, &sequences(&texts)).into_iter())
        };
        (apart(&train), apart(&replay))
    };
    let ((free_own, free), (held_own, held)) = (end(0.0, 0), end(5.0, 6));
    assert!(held < 0.5 * free, "{held} and {free} from the base on the texts");
    let (own_own, _) = end(5.0, 0);
    assert!(held_own > own_own && free_own > own_own, "{free_own} {held_own} {own_own} on the job's own");
}
