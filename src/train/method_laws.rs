//! Laws that every method keeps on every family: a fresh delta changes no bit, every variable gets its gradient, and what
//! is published computes what was trained.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    laws::{examples, hyper, input, shape, tiny},
    objective::losses,
    optim::global_norm,
    run::{Advance, Run},
    spec::TrainSpec,
    testing::{Differences, shake},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{
        AdapterPart, AdapterScaling, AdapterVariant, BitfitPart, Ia3Part, LnPart, LoraBias, LoraInit, LoraPart,
        MethodPart, Targets, TokensPart,
    },
    delta::{Delta, DeltaBatch, Task},
    interop::{self, EncodeMeta},
    model::{Base, Input, Source},
    nn::Cx,
    rows::RowLayout,
};

fn lora(part: LoraPart) -> MethodPart {
    MethodPart::Lora(LoraPart { rank: Some(3), ..part })
}

/// With a smooth activation: differences across a kink are no derivative.
fn adapter(variant: AdapterVariant) -> AdapterPart {
    AdapterPart { variant, reduction_factor: Some(4.0), activation: Some("gelu".into()), ..AdapterPart::default() }
}

fn modules(names: &[&str]) -> Targets {
    Targets::Modules(names.iter().map(|n| (*n).to_owned()).collect())
}

/// Methods that every base takes, with their names for messages; all start without an effect.
pub(super) fn all() -> Vec<(&'static str, Vec<MethodPart>)> {
    let tokens = MethodPart::Tokens(TokensPart { ids: vec![3, 9, 40] });
    let one = |m: MethodPart| vec![m];
    vec![
        ("lora", one(lora(LoraPart::default()))),
        ("dora", one(lora(LoraPart { dora: true, ..LoraPart::default() }))),
        ("lora with biases", one(lora(LoraPart { bias: LoraBias::All, ..LoraPart::default() }))),
        ("lora with biases of B", one(lora(LoraPart { b_bias: true, layers: vec![1], ..LoraPart::default() }))),
        (
            "lora and token rows",
            one(lora(LoraPart { tokens: vec![5, 7], plus_ratio: Some(8.0), ..LoraPart::default() })),
        ),
        ("bitfit with added biases", one(MethodPart::Bitfit(BitfitPart { added: true, ..BitfitPart::default() }))),
        ("ia3", one(MethodPart::Ia3(Ia3Part::default()))),
        ("ia3 everywhere", one(MethodPart::Ia3(Ia3Part { targets: Some(Targets::AllLinear), feedforward: None }))),
        ("ln", one(MethodPart::Ln(LnPart::default()))),
        ("houlsby", one(MethodPart::Adapter(adapter(AdapterVariant::Houlsby)))),
        ("pfeiffer", one(MethodPart::Adapter(adapter(AdapterVariant::Pfeiffer)))),
        (
            "parallel",
            one(MethodPart::Adapter(AdapterPart {
                scaling: Some(AdapterScaling::Learned),
                ..adapter(AdapterVariant::Parallel)
            })),
        ),
        (
            "houlsby with norms",
            one(MethodPart::Adapter(AdapterPart { train_norms: true, ..adapter(AdapterVariant::Houlsby) })),
        ),
        ("tokens", one(tokens.clone())),
        (
            "a combination",
            vec![
                lora(LoraPart::default()),
                MethodPart::Ia3(Ia3Part::default()),
                MethodPart::Bitfit(BitfitPart { added: true, ..BitfitPart::default() }),
                MethodPart::Adapter(adapter(AdapterVariant::Pfeiffer)),
                tokens,
            ],
        ),
    ]
}

/// Families, each with a task of theirs.
pub(super) const BASES: [(&str, Task); 10] = [
    ("llama", Task::CausalLm),
    ("gpt2", Task::CausalLm),
    ("bert", Task::SeqCls),
    ("bert", Task::TokenCls),
    ("roberta", Task::SeqCls),
    ("distilbert", Task::SeqCls),
    ("qwen3", Task::CausalLm),
    ("gemma2", Task::CausalLm),
    ("phi3", Task::CausalLm),
    ("t5", Task::Seq2Seq),
];

/// Those whose gradients are compared for every method. `laws` compares LoRA's on Qwen3 and Gemma 2.
const GRADIENTS: [(&str, Task); 8] = [BASES[0], BASES[1], BASES[2], BASES[3], BASES[4], BASES[5], BASES[8], BASES[9]];

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Hidden states, and logits of decoders, of two texts that all have the delta.
fn outputs(base: &Base, delta: Option<&Arc<Delta>>) -> Vec<f32> {
    let rows = RowLayout::packed(&[5, 4]);
    let per_span = [delta.cloned(), delta.cloned()];
    let deltas = DeltaBatch::new(&rows, &per_span, base.sites.len());
    let texts = RowLayout::packed(&[3, 4]);
    let source = (base.arch.is_encoder_decoder())
        .then(|| Source::encode(base, texts, &[9, 4, 3, 8, 6, 40, 5], &per_span, None).unwrap());
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5, 6, 7, 8, 9]), &cx).unwrap();
    let mut out = flat(&hidden);
    if base.arch.is_causal() {
        out.extend(flat(&base.transformer.logits(&hidden, &[1, 4, 8], &cx).unwrap()));
    }
    out
}

#[test]
fn a_fresh_delta_changes_no_bit() {
    for (family, task) in BASES {
        let base = tiny(family);
        let plain = outputs(&base, None);
        for (name, methods) in all() {
            let spec = input(&base, task, &methods, hyper(1)).spec;
            let t = Trainable::init_on(&spec, &base, 3).unwrap();
            let fresh = Arc::new(t.detached().unwrap());
            assert!(outputs(&base, Some(&fresh)) == plain, "{family} {task:?} {name}");
            let parameters: usize = t.vars().iter().map(|v| v.var.elem_count()).sum();
            assert_eq!(parameters as u64, spec.parameters(&base.sites), "{family} {task:?} {name}");
        }
    }
}

/// Which first gradients are zero by design, because their partner starts at zero.
fn waits(name: &str) -> bool {
    ["lora_A", "adapter_down.weight", "adapter_down.bias", "scaling"].iter().any(|end| name.ends_with(end))
}

/// Those that are zero but for rounding: a key's bias and scale beside it shift all scores of a query alike.
fn idle(name: &str) -> bool {
    ["key.bias", "k_proj.bias", ".k.bias", ".k_lin.bias"].iter().any(|end| name.ends_with(end))
}

#[test]
fn every_variable_gets_its_gradient() {
    for (family, task) in GRADIENTS {
        let base = tiny(family);
        for (name, methods) in all() {
            let input = input(&base, task, &methods, hyper(1));
            let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
            let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
            let loss = || {
                let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
                losses(&base, delta, &batch, None).unwrap().each.mean_all().unwrap()
            };
            let first = loss().backward().unwrap();
            for v in t.vars() {
                let g = first.get(&v.var).unwrap_or_else(|| panic!("{family} {name} {}: cut", v.name));
                assert!(global_norm([g]).unwrap().is_finite(), "{family} {name} {}", v.name);
            }
            shake(t.vars(), 77);
            let grads = loss().backward().unwrap();
            for v in t.vars() {
                // along the gradient itself: the change of the loss is the gradient's norm
                let g = grads.get(&v.var).unwrap();
                let norm = global_norm([g]).unwrap();
                assert!(norm > 0.0 || idle(&v.name) || unused(&v.name), "{family} {task:?} {name} {}", v.name);
                if norm < 1e-6 {
                    continue;
                }
                // DoRA's norm is a constant to the gradient (but not to the loss), so its pair is not compared
                if name == "dora" && !v.name.ends_with("magnitude") {
                    continue;
                }
                // a head with ReLU has kinks, which a shorter step rarely crosses
                let step = if family == "distilbert" { 2e-3 } else { 1e-2 };
                let differences = Differences { step, ..Differences::default() };
                differences.assert(&format!("{family} {task:?} {name}"), v, &grads, loss);
            }
        }
    }
}

/// Rows of tokens that no example has.
fn unused(name: &str) -> bool {
    name.ends_with("token_rows")
}

#[test]
fn first_gradients_are_zero_where_the_partner_is_zero() {
    let base = tiny("bert");
    let methods = [MethodPart::Adapter(adapter(AdapterVariant::Houlsby)), lora(LoraPart::default())];
    let input = input(&base, Task::SeqCls, &methods, hyper(1));
    let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
    let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
    let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
    let grads = losses(&base, delta, &batch, None).unwrap().each.mean_all().unwrap().backward().unwrap();
    for v in t.vars() {
        assert_eq!(global_norm([grads.get(&v.var).unwrap()]).unwrap() == 0.0, waits(&v.name), "{}", v.name);
    }
}

/// The head's tensors by name.
fn heads(delta: &Delta) -> Vec<(String, Vec<f32>)> {
    delta.head().iter().flat_map(|h| h.tensors()).map(|(name, t)| (name, flat(t))).collect()
}

#[test]
fn what_is_published_computes_what_was_trained() {
    for (family, task) in BASES {
        let base = tiny(family);
        let mut methods = all();
        let part = LoraPart { init: LoraInit::Pissa, ..LoraPart::default() };
        methods.push(("pissa", vec![lora(part)]));
        if base.arch.is_causal() {
            let part = LoraPart {
                save_modules: vec!["lm_head".into()],
                targets: modules(&["lm_head"]),
                ..LoraPart::default()
            };
            methods.push(("lora of the head", vec![lora(LoraPart { save_modules: vec![], ..part.clone() })]));
        }
        for (name, methods) in methods {
            let mut run = Run::new(Arc::clone(&base), None, input(&base, task, &methods, hyper(3))).unwrap();
            while run.step() < 3 {
                assert!(matches!(run.advance(), Advance::More(_)), "{family} {name}");
            }
            let trained = Arc::new(run.trainable().detached().unwrap());
            let snapshot = run.trainable().snapshot().unwrap();
            let published = run.trainable().publishable(&snapshot).unwrap();
            let files = interop::encode(&published, &base, &EncodeMeta::default())
                .unwrap_or_else(|e| panic!("{family} {task:?} {name}: {e}"));
            let back = interop::decode(&files, &base).unwrap_or_else(|e| panic!("{family} {task:?} {name}: {e}"));
            assert_eq!(back.spec.task, task);
            assert!(heads(&trained) == heads(&back), "{family} {task:?} {name}: the head");
            let (want, got) = (outputs(&base, Some(&trained)), outputs(&base, Some(&Arc::new(back))));
            let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst < 2e-4, "{family} {task:?} {name}: {worst}");
            assert!(outputs(&base, None) != got, "{family} {task:?} {name} learned nothing");
        }
    }
}

#[test]
fn pissa_starts_at_the_base_and_is_saved_at_twice_the_rank() {
    let base = tiny("llama");
    let methods = [lora(LoraPart { init: LoraInit::Pissa, ..LoraPart::default() })];
    let spec = TrainSpec::resolve(&methods, Task::CausalLm, &[], shape(&base)).unwrap();
    let t = Trainable::init_on(&spec, &base, 1).unwrap();
    let fresh = Arc::new(t.detached().unwrap());
    let close = outputs(&base, None).iter().zip(outputs(&base, Some(&fresh))).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(close);
    assert!(t.vars().iter().all(|v| global_norm([v.var.as_tensor()]).unwrap() > 0.0), "A and B are not zero");
    let published = t.publishable(&t.snapshot().unwrap()).unwrap();
    for (_, patch) in published.patches() {
        assert_eq!(patch.tensors()[0].1.dims()[0], 6);
    }
    assert!(!examples(Task::CausalLm, 1).is_empty());
}
