//! Gradients taken layer by layer are those of the whole forward.

use std::sync::Arc;

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    full_laws,
    gradients::{self, Gradients, LossesOf, Micro},
    laws::{hyper, input, lora, tiny},
    method_laws::{BASES, all},
    objective::{Reads, Sequence, forward, losses_of},
    testing::{assert_near, shake},
    together::{self, Member},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{LoraPart, MethodPart, PTuningPart, PrefixPart, PromptPart},
    delta::Task,
    model::Base,
    ops,
    train::run::RunInput,
};

/// Methods of [`all`], and those that something is computed for before the forward: dropout, networks.
pub(super) fn methods(base: &Base) -> Vec<(&'static str, Vec<MethodPart>)> {
    let mut methods = all();
    let dropout = LoraPart { rank: Some(3), dropout: Some(0.3), ..LoraPart::default() };
    methods.push(("lora with dropout", vec![MethodPart::Lora(dropout)]));
    // layers below the first that is trained need no gradient
    let upper = LoraPart { rank: Some(3), layers: vec![1], ..LoraPart::default() };
    methods.push(("lora above", vec![MethodPart::Lora(upper)]));
    let virtual_tokens = Some(2);
    let prompt = MethodPart::Prompt(PromptPart { num_virtual_tokens: virtual_tokens, ..PromptPart::default() });
    let projected = PrefixPart {
        num_virtual_tokens: virtual_tokens,
        projection: true,
        projection_hidden: Some(10),
        ..PrefixPart::default()
    };
    methods.push(("prompt", vec![prompt]));
    methods.push((
        "p-tuning",
        vec![MethodPart::PTuning(PTuningPart { num_virtual_tokens: virtual_tokens, ..PTuningPart::default() })],
    ));
    if !base.arch.is_encoder_decoder() {
        methods.push(("projected prefix", vec![MethodPart::Prefix(projected)]));
    }
    methods
}

/// Loss and gradients both ways, each with the same dropout.
fn both(base: &Arc<Base>, t: &Trainable, input: &RunInput) -> [(f64, Gradients); 2] {
    let examples: Vec<&Encoded> = input.train.iter().take(6).collect();
    [gradients::whole, gradients::by_layer].map(|by| {
        let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
        let base = t.base(base).unwrap();
        let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
        let losses: LossesOf<'_> = &|hidden, cx| Ok(losses_of(&base, hidden, (&examples, &sequences), 0.1, cx)?.each);
        let reads = Reads::of(&examples);
        let micro = Micro { base: &base, delta, sequences: &sequences, losses, reads, weight: 6.0, pacer: None };
        by(&micro, t.vars()).unwrap()
    })
}

fn equal(what: &str, t: &Trainable, [whole, by_layer]: &[(f64, Gradients); 2]) {
    assert!(whole.0.is_finite() && (whole.0 - by_layer.0).abs() < 1e-6, "{what}: {} {}", whole.0, by_layer.0);
    for ((v, a), b) in t.vars().iter().zip(&whole.1).zip(&by_layer.1) {
        let what = format!("{what} {}", v.name);
        assert!(b.as_ref().is_none_or(|b| !b.track_op()), "{what}: the gradient keeps its graph");
        assert_near(&what, (b.as_ref(), a.as_ref()), (1e-5, 1e-6));
    }
}

#[test]
fn of_every_method_on_every_family() {
    for (family, task) in BASES {
        let base = tiny(family);
        for (name, methods) in methods(&base) {
            let input = input(&base, task, &methods, hyper(1));
            let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
            shake(t.vars(), 7);
            let found = both(&base, &t, &input);
            let some = found[0].1.iter().flatten().count();
            assert!(some > 0, "{family} {name}");
            equal(&format!("{family} {task:?} {name}"), &t, &found);
        }
    }
}

#[test]
fn of_full_fine_tuning() {
    for (family, task) in full_laws::CASES {
        let (_dir, base) = full_laws::kept(family);
        let input = full_laws::full(&base, task, hyper(1));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        equal(&format!("{family} {task:?}"), &t, &both(&base, &t, &input));
    }
}

/// Products in halves are for steps alone where only these may have them.
#[test]
fn whatever_computes_gradients_marks_its_products_as_those_of_a_step() {
    let base = tiny("llama");
    let input = input(&base, Task::CausalLm, &lora(), hyper(1));
    let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
    ops::asked::in_step();
    both(&base, &t, &input);
    assert_eq!(ops::asked::in_step(), [true].into(), "forward and backward, as a whole and layer by layer");
    let examples: Vec<&Encoded> = input.train.iter().take(3).collect();
    let delta = t.delta(&mut rng(5, Stream::Dropout)).unwrap();
    let member =
        || Member { delta: Arc::clone(&delta), vars: t.vars(), examples: &examples, smoothing: 0.0, weight: 3.0 };
    together::gradients(&base, &[member(), member()], None).unwrap();
    assert_eq!(ops::asked::in_step(), [true].into(), "in a shared pass");
    // an evaluation is none
    let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
    let losses: LossesOf<'_> = &|hidden, cx| Ok(losses_of(&base, hidden, (&examples, &sequences), 0.0, cx)?.each);
    forward(&base, &delta, (&sequences, Reads::of(&examples)), None, losses).unwrap();
    assert_eq!(ops::asked::in_step(), [false].into());
}
