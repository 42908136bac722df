//! Laws of methods that add positions: gradients, where they start, and that what is published is what was trained.

use super::*;
use crate::{
    admission::train_params::{PTuningPart, PrefixInit, PrefixPart, PromptInit, PromptPart},
    delta::{Delta, DeltaSpec, Patch, Prefix, PrefixForm},
    interop::{self, EncodeMeta},
    train::start,
};

pub(super) fn prefix(n: u32) -> MethodPart {
    MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(n), ..PrefixPart::default() })
}

pub(super) fn projected(n: u32) -> MethodPart {
    let part = PrefixPart { projection: true, projection_hidden: Some(10), ..PrefixPart::default() };
    MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(n), ..part })
}

pub(super) fn prompt(n: u32) -> MethodPart {
    MethodPart::Prompt(PromptPart { num_virtual_tokens: Some(n), ..PromptPart::default() })
}

pub(super) fn p_tuning(n: u32) -> MethodPart {
    MethodPart::PTuning(PTuningPart { num_virtual_tokens: Some(n), encoder_hidden: Some(12) })
}

fn of(parts: Vec<(usize, Tensor, Tensor)>) -> Arc<Delta> {
    let spec = DeltaSpec {
        methods: vec!["prefix".into()],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    let patch = |(site, k, v)| (site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Context }));
    Arc::new(Delta::new(spec, parts.into_iter().map(patch).collect(), None))
}

#[test]
fn a_prefix_from_a_text_is_that_text_as_context() {
    for family in ["llama", "gpt2"] {
        let base = tiny(family);
        let (text, tokens): (Vec<u32>, Vec<u32>) = ((40..53).collect(), vec![5, 9, 17, 3, 60]);
        let none = DeltaBatch::none();
        let whole = [text.clone(), tokens.clone()].concat();
        let rows = RowLayout::packed(&[whole.len()]);
        let want = base.transformer.forward(&Input::tokens(&whole), &Cx::new(&rows, &none)).unwrap();
        let want = flat(&want.narrow(0, text.len(), tokens.len()).unwrap());
        let delta = of(start::context(&base, &text).unwrap());
        let rows = RowLayout::packed_after([(tokens.len(), delta.ahead())]);
        let batch = DeltaBatch::single(delta, &rows, base.sites.len());
        let got = flat(&base.transformer.forward(&Input::tokens(&tokens), &Cx::new(&rows, &batch)).unwrap());
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{family}: {worst}");
    }
}

#[test]
fn virtual_tokens_start_where_they_are_told_to() {
    let base = tiny("llama");
    let start_of = |part: MethodPart, seed: u64| {
        let input = input(&base, Task::CausalLm, &[part], ResolvedTraining { seed, ..hyper(3) });
        let run = Run::new(Arc::clone(&base), None, input).unwrap();
        run.trainable().vars().iter().flat_map(|v| flat(&v.var)).collect::<Vec<f32>>()
    };
    let table = flat(&base.transformer.token_embeddings(&(0..128).collect::<Vec<_>>()).unwrap());
    let vocabulary = start_of(prompt(4), 1);
    assert!(vocabulary.chunks(32).all(|row| table.chunks(32).any(|t| t == row)), "rows of the table");
    assert_ne!(vocabulary, start_of(prompt(4), 2));
    let random = PromptPart { num_virtual_tokens: Some(4), init: PromptInit::Random, init_text: None };
    assert!(start_of(MethodPart::Prompt(random), 1).iter().all(|x| x.abs() <= 0.5));
    let with = |init| {
        MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(3), init: Some(init), ..PrefixPart::default() })
    };
    assert!(start_of(with(PrefixInit::Zeros), 1).iter().all(|x| *x == 0.0));
    assert!(start_of(with(PrefixInit::Random), 1).iter().any(|x| *x != 0.0));
    // without a text: the first training examples
    let examples: Vec<u32> =
        super::examples(Task::CausalLm, 40).iter().flat_map(|e| e.tokens.clone()).take(3).collect();
    let want: Vec<f32> =
        start::context(&base, &examples).unwrap().iter().flat_map(|(_, k, v)| [flat(k), flat(v)].concat()).collect();
    assert_eq!(start_of(with(PrefixInit::Text), 1), want);
}

#[test]
fn what_is_published_is_what_was_trained() {
    let methods = [
        vec![prefix(3)],
        vec![projected(3)],
        vec![prompt(4)],
        vec![p_tuning(4)],
        [lora(), vec![prompt(2), prefix(3)]].concat(),
    ];
    for (family, task) in
        [("llama", Task::CausalLm), ("gpt2", Task::CausalLm), ("bert", Task::SeqCls), ("bert", Task::TokenCls)]
    {
        for methods in &methods {
            let base = tiny(family);
            let input = input(&base, task, methods, hyper(4));
            let batch: Vec<Encoded> = input.train.iter().take(5).cloned().collect();
            let batch: Vec<&Encoded> = batch.iter().collect();
            let end = train(&base, input);
            let files = interop::encode(&end.delta, &base, &EncodeMeta::default()).unwrap();
            let back = interop::decode(&files, &base).unwrap();
            assert_eq!((back.ahead(), back.spec.methods.clone()), (end.delta.ahead(), end.delta.spec.methods.clone()));
            let each = |delta: Delta| flat(&losses(&base, Arc::new(delta), &batch, None).unwrap().each);
            let worst = each(end.delta).iter().zip(each(back)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{family} {task:?} {methods:?}: {worst}");
        }
    }
}

#[test]
fn prompts_and_prefixes_learn() {
    for (family, task, part, lr) in [
        ("llama", Task::CausalLm, prompt(6), 5e-2),
        ("llama", Task::CausalLm, prefix(6), 5e-2),
        ("gpt2", Task::SeqCls, prefix(6), 2e-2),
        ("bert", Task::SeqCls, prompt(6), 2e-2),
        ("bert", Task::TokenCls, projected(6), 1e-2),
        ("bert", Task::SeqCls, p_tuning(6), 1e-2),
    ] {
        let base = tiny(family);
        let resolved = ResolvedTraining { learning_rate: lr, ..hyper(80) };
        let (events, outcome) = finish(
            Run::new(Arc::clone(&base), None, input(&base, task, std::slice::from_ref(&part), resolved)).unwrap(),
        );
        let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
        let first = events.iter().find_map(|e| if let JobEventBody::Metrics(m) = e { Some(m.loss) } else { None });
        assert!(end.final_loss < 0.8 * first.unwrap(), "{family} {task:?} {part:?}: {first:?} -> {}", end.final_loss);
    }
}
