//! Laws of methods that add positions: gradients, where they start, and that what is published is what was trained.

use super::*;
use crate::{
    admission::train_params::{PTuningPart, PrefixInit, PrefixLibrary, PrefixPart, PromptInit, PromptPart},
    delta::{Delta, DeltaSpec, Patch, Prefix, PrefixForm, Stack},
    interop::{self, EncodeMeta},
    train::start,
};

pub(in crate::train) fn prefix(n: u32) -> MethodPart {
    MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(n), ..PrefixPart::default() })
}

/// AdapterHub's form: of an encoder-decoder, in every attention.
pub(in crate::train) fn everywhere(n: u32) -> MethodPart {
    let part = PrefixPart { form: Some(PrefixLibrary::AdapterHub), ..PrefixPart::default() };
    MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(n), ..part })
}

pub(in crate::train) fn projected(n: u32) -> MethodPart {
    let part = PrefixPart { projection: true, projection_hidden: Some(10), ..PrefixPart::default() };
    MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(n), ..part })
}

pub(in crate::train) fn prompt(n: u32) -> MethodPart {
    MethodPart::Prompt(PromptPart { num_virtual_tokens: Some(n), ..PromptPart::default() })
}

pub(in crate::train) fn p_tuning(n: u32) -> MethodPart {
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
    let patch = |(site, k, v)| (site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Context, stack: Stack::Main }));
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
fn layers_of_a_decoder_with_an_encoder_share_a_prefix_as_the_file_form_wants_it() {
    for layers in [2, 3, 4] {
        let mut config = testing::tiny_t5();
        config["num_decoder_layers"] = layers.into();
        let base = testing::random_base(&config, 7).unwrap();
        let spec = TrainSpec::resolve(&[prefix(3)], Task::Seq2Seq, &[], shape(&base)).unwrap();
        let t = Trainable::init(&spec, &base.sites, 1, &base.device).unwrap();
        assert_eq!(t.vars().len(), 2 * if layers % 2 == 0 { layers / 2 } else { layers });
        assert_eq!(spec.parameters(&base.sites), t.vars().iter().map(|v| v.var.elem_count() as u64).sum::<u64>());
        let fresh = t.detached().unwrap();
        let back = interop::decode(&interop::encode(&fresh, &base, &EncodeMeta::default()).unwrap(), &base).unwrap();
        let tensors = |d: &Delta| d.patches().iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| flat(t)).collect();
        let (want, got): (Vec<Vec<f32>>, Vec<Vec<f32>>) = (tensors(&fresh), tensors(&back));
        assert_eq!(want, got);
        assert_eq!(Trainable::from_delta(&back, &base.sites).unwrap().vars().len(), t.vars().len(), "still shared");
        // two layers that differ have no place in the file
        let mut at = 0f64;
        let apart = fresh.map(&mut |_, t| {
            at += 1.0;
            t + at
        });
        let written = interop::encode(&apart.unwrap(), &base, &EncodeMeta::default());
        assert_eq!(written.is_err(), layers % 2 == 0);
    }
}

#[test]
fn a_prompt_that_starts_from_the_vocabulary_has_the_scale_of_its_embeddings() {
    let base = tiny("gemma2");
    let input = input(&base, Task::CausalLm, &[prompt(4)], hyper(1));
    let run = Run::new(Arc::clone(&base), None, input).unwrap();
    let rows = flat(&run.trainable().vars()[0].var);
    let table = flat(&base.transformer.token_embeddings(&(0..128).collect::<Vec<_>>()).unwrap());
    assert!(rows.chunks(32).all(|row| table.chunks(32).any(|t| t == row)));
    // a prompt of a token's embedding acts as that token
    let tokens = [7u32, 9, 30, 12];
    let none = DeltaBatch::none();
    let layout = RowLayout::packed(&[4]);
    let want = flat(&base.transformer.forward(&Input::tokens(&tokens), &Cx::new(&layout, &none)).unwrap());
    run.trainable().set_prompt(&base.transformer.token_embeddings(&[1, 1, 7, 9]).unwrap()).unwrap();
    let delta = run.trainable().detached().unwrap();
    let rows = delta.patches().iter().find_map(|(s, p)| match p {
        Patch::Prompt(p) => {
            Some((*s, Patch::Prompt(crate::delta::Prompt { rows: p.rows.narrow(0, 2, 2).unwrap(), ..p.clone() })))
        }
        _ => None,
    });
    let delta = Arc::new(Delta::new(delta.spec.clone(), vec![rows.unwrap()], None));
    let layout = RowLayout::packed_after([(2, delta.ahead())]);
    let batch = DeltaBatch::single(delta, &layout, base.sites.len());
    let got = flat(&base.transformer.forward(&Input::tokens(&tokens[2..]), &Cx::new(&layout, &batch)).unwrap());
    let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
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
    // in AdapterHub's form, of every attention
    let t5 = tiny("t5");
    let hub = |init| PrefixPart {
        init,
        num_virtual_tokens: Some(3),
        form: Some(PrefixLibrary::AdapterHub),
        ..PrefixPart::default()
    };
    let values = |init, seed| {
        let input = input(&t5, Task::Seq2Seq, &[MethodPart::Prefix(hub(init))], ResolvedTraining { seed, ..hyper(3) });
        let run = Run::new(Arc::clone(&t5), None, input).unwrap();
        run.trainable().vars().iter().flat_map(|v| flat(&v.var)).collect::<Vec<f32>>()
    };
    assert_eq!(values(Some(PrefixInit::Zeros), 1), vec![0.0; 6 * 2 * 3 * 32], "6 attentions, key and value, 3 x 32");
    let drawn = values(None, 1);
    let spread = (drawn.iter().map(|x| x * x).sum::<f32>() / drawn.len() as f32).sqrt();
    assert!((spread - 0.02).abs() < 0.002 && drawn != values(None, 2), "N(0, 0.02): {spread}");
    assert!(drawn.chunks(96).enumerate().all(|(i, a)| drawn.chunks(96).take(i).all(|b| a != b)), "none is shared");
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
        vec![everywhere(3)],
        vec![prompt(4)],
        vec![p_tuning(4)],
        [lora(), vec![prompt(2), prefix(3)]].concat(),
    ];
    for (family, task) in [
        ("llama", Task::CausalLm),
        ("gpt2", Task::CausalLm),
        ("bert", Task::SeqCls),
        ("bert", Task::TokenCls),
        ("t5", Task::Seq2Seq),
    ] {
        for methods in &methods {
            let base = tiny(family);
            let input = input(&base, task, methods, hyper(4));
            let batch: Vec<Encoded> = input.train.iter().take(5).cloned().collect();
            let batch: Vec<&Encoded> = batch.iter().collect();
            let end = train(&base, input);
            let files = interop::encode(&end.delta, &base, &EncodeMeta::default()).unwrap();
            let back = interop::decode(&files, &base).unwrap();
            assert_eq!((back.ahead(), back.spec.methods.clone()), (end.delta.ahead(), end.delta.spec.methods.clone()));
            assert_eq!(back.source_ahead(), end.delta.source_ahead());
            let each = |delta: Delta| flat(&losses(&base, Arc::new(delta), &batch, None).unwrap().each);
            let worst = each(end.delta).iter().zip(each(back)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{family} {task:?} {methods:?}: {worst}");
        }
    }
}

#[test]
fn prompts_and_prefixes_learn() {
    // the last number: which share of the first loss is left at most
    for (family, task, part, lr, left) in [
        ("llama", Task::CausalLm, prompt(6), 5e-2, 0.8),
        ("llama", Task::CausalLm, prefix(6), 5e-2, 0.8),
        ("gpt2", Task::SeqCls, prefix(6), 2e-2, 0.8),
        ("bert", Task::SeqCls, prompt(6), 2e-2, 0.8),
        ("bert", Task::TokenCls, projected(6), 1e-2, 0.8),
        ("bert", Task::SeqCls, p_tuning(6), 1e-2, 0.8),
        ("t5", Task::Seq2Seq, prompt(6), 5e-2, 0.95),
        ("t5", Task::Seq2Seq, everywhere(6), 5e-2, 0.8),
    ] {
        let base = tiny(family);
        let resolved = ResolvedTraining { learning_rate: lr, ..hyper(80) };
        let (events, outcome) = finish(
            Run::new(Arc::clone(&base), None, input(&base, task, std::slice::from_ref(&part), resolved)).unwrap(),
        );
        let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
        let first = events.iter().find_map(|e| if let JobEventBody::Metrics(m) = e { Some(m.loss) } else { None });
        assert!(end.final_loss < left * first.unwrap(), "{family} {task:?} {part:?}: {first:?} -> {}", end.final_loss);
    }
}
