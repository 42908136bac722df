//! Training on a quantised base: the gradients are those of the dequantised base, every method learns, and full fine-tuning
//! reads the checkpoint's own numbers.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    laws::{config, examples, hyper, input, positions, shape},
    method_laws::all,
    objective::losses,
    run::{Advance, Outcome, Run},
    spec::TrainSpec,
    testing::{Differences, shake},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{JobEventBody, LoraInit, LoraPart, MethodPart, ResolvedTraining},
    delta::Task,
    model::{Base, LoadOptions, Quantize, testing},
};

/// A base whose linears have 8 bits, and the one with the same numbers in f32.
fn both(kind: &str) -> (Arc<Base>, Arc<Base>) {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &config(kind), 7).unwrap();
    let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
    let quantized = Base::load(dir.path(), &options).unwrap();
    let plain = testing::dequantized(dir.path(), &quantized).unwrap();
    (Arc::new(quantized), Arc::new(plain))
}

/// The methods of every family, and those that add positions.
fn methods(causal: bool) -> Vec<(&'static str, Vec<MethodPart>)> {
    let mut methods = all();
    let part = LoraPart { rank: Some(3), init: LoraInit::Pissa, ..LoraPart::default() };
    methods.push(("pissa", vec![MethodPart::Lora(part)]));
    methods.push(("prefix", vec![positions::prefix(3)]));
    if causal {
        methods.push(("prompt", vec![positions::prompt(3)]));
    }
    methods
}

#[test]
fn gradients_are_those_of_the_dequantised_base() {
    for (family, task) in
        [("llama", Task::CausalLm), ("gpt2", Task::CausalLm), ("bert", Task::SeqCls), ("phi3", Task::CausalLm)]
    {
        let (quantized, plain) = both(family);
        for (name, methods) in methods(task == Task::CausalLm) {
            let spec = TrainSpec::resolve(&methods, task, &labels(task), shape(&plain)).unwrap();
            let examples = examples(task, 6);
            let batch: Vec<&Encoded> = examples.iter().collect();
            // the same variables, moved off their start alike
            let gradients = |base: &Arc<Base>| -> Vec<(String, Vec<f32>)> {
                let t = Trainable::init_on(&spec, base, 3).unwrap();
                shake(t.vars(), 77);
                let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
                let grads = losses(base, delta, &batch, None).unwrap().each.mean_all().unwrap().backward().unwrap();
                let flat = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                t.vars().iter().map(|v| (v.name.clone(), flat(grads.get(&v.var).unwrap()))).collect()
            };
            for ((var, got), (_, want)) in gradients(&quantized).iter().zip(&gradients(&plain)) {
                let size = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(off <= 2e-3 * size + 2e-6, "{family} {name} {var}: {off} of {size}");
            }
        }
    }
}

fn labels(task: Task) -> Vec<String> {
    if task.generates() { vec![] } else { vec!["a".into(), "b".into()] }
}

#[test]
fn gradients_match_central_differences_on_a_quantised_base() {
    for (family, task) in
        [("llama", Task::CausalLm), ("gpt2", Task::CausalLm), ("bert", Task::SeqCls), ("t5", Task::Seq2Seq)]
    {
        let (base, _) = both(family);
        let methods = [MethodPart::Lora(LoraPart { rank: Some(4), ..LoraPart::default() })];
        let input = input(&base, task, &methods, hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
        let loss = || {
            let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
            losses(&base, delta, &batch, None).unwrap().each.mean_all().unwrap()
        };
        let mut draw = testing::Rng(7);
        for v in t.vars().iter().filter(|v| v.name.ends_with("lora_B")) {
            let values: Vec<f32> = (0..v.var.elem_count()).map(|_| 0.2 * draw.uniform() - 0.1).collect();
            v.var.set(&Tensor::from_vec(values, v.var.shape(), &base.device).unwrap()).unwrap();
        }
        Differences::NEAR.assert_all(family, t.vars(), loss);
    }
}

#[test]
fn the_loss_falls_by_more_than_half_on_a_quantised_base() {
    let lora = || vec![MethodPart::Lora(LoraPart { rank: Some(4), alpha: Some(8.0), ..LoraPart::default() })];
    let full = || vec![MethodPart::Full];
    for (family, task, methods) in [
        ("llama", Task::CausalLm, lora()),
        ("gpt2", Task::SeqCls, lora()),
        ("bert", Task::TokenCls, vec![MethodPart::Bitfit(Default::default())]),
        ("llama", Task::CausalLm, full()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config(family), 7).unwrap();
        let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
        let base = Arc::new(Base::load(dir.path(), &options).unwrap());
        let before = base.linear_formats();
        let learning_rate = if methods == full() { 3e-3 } else { 1e-2 };
        let resolved = ResolvedTraining { learning_rate, ..hyper(120) };
        let mut run = Run::new(Arc::clone(&base), None, input(&base, task, &methods, resolved)).unwrap();
        let mut first = None;
        let end = loop {
            match run.advance() {
                Advance::More(events) => {
                    let loss = |e: &JobEventBody| if let JobEventBody::Metrics(m) = e { Some(m.loss) } else { None };
                    first = first.or(events.iter().find_map(loss));
                }
                Advance::Done(_, outcome) => match *outcome {
                    Outcome::Trained(end) => break end,
                    Outcome::Failed(failed) => panic!("{failed:?}"),
                },
            }
        };
        assert!(end.final_loss < 0.5 * first.unwrap(), "{family} {task:?}: {first:?} -> {}", end.final_loss);
        assert_eq!(base.linear_formats(), before, "the base stays in its blocks");
    }
}
