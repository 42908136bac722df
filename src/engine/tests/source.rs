//! Encoder-decoders: the source is read once, in the same steps as everything else.

use super::*;
use crate::{
    delta::{DeltaBatch, Prefix, PrefixForm, Prompt, PromptStage, Site, Stack},
    model::{Input, Source, testing::tiny_t5},
    nn::Cx,
    rows::RowLayout,
};

pub(super) fn job(n: u64, len: usize, new: usize) -> Job {
    Job { source: prompt(n, len), ..Job::new(vec![0], greedy(new)) }
}

/// Greedy tokens by whole forwards without a cache.
fn plainly(base: &Base, source: &[u32], delta: Option<Arc<Delta>>, new: usize) -> Vec<u32> {
    let delta_ahead = delta.as_ref().map(|d| (d.source_ahead(), d.ahead())).unwrap_or_default();
    let rows = RowLayout::packed_after([(source.len(), delta_ahead.0)]);
    let read = Source::encode(base, rows, source, std::slice::from_ref(&delta), None).expect("encodes");
    let memory = read.memory();
    let mut tokens = vec![0u32];
    for _ in 0..new {
        let rows = RowLayout::packed_after([(tokens.len(), delta_ahead.1)]);
        let deltas = DeltaBatch::new(&rows, std::slice::from_ref(&delta), base.sites.len());
        let cx = Cx { memory: Some(&memory), ..Cx::new(&rows, &deltas) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("runs");
        let logits = base.transformer.logits(&hidden, &[tokens.len() as u32 - 1], &cx).expect("head");
        tokens.push(logits.argmax(1).expect("argmax").to_vec1::<u32>().expect("ids")[0]);
    }
    tokens.split_off(1)
}

/// A prompt of `rows` ahead of the source, a prefix of `keys` in the decoder, and a LoRA.
fn positions(base: &Base, n: u8, rows: usize, keys: usize) -> Option<(DeltaId, Arc<Delta>)> {
    let mut rng = Rng(u64::from(n) * 31 + 7);
    let mut patches = delta(base, n, 0).map(|(_, d)| d.patches().to_vec()).expect("delta");
    if rows > 0 {
        let prompt = tensor(&mut rng, &[rows, base.arch.hidden], 0.5);
        let prompt = Prompt { rows: prompt, stage: PromptStage::Tokens, stack: Stack::Encoder };
        patches.push((base.sites.id(Site::Embedding).expect("site"), Patch::Prompt(prompt)));
    }
    for (site, width) in base.sites.prefix_sites(Stack::Main).into_iter().filter(|_| keys > 0) {
        let (k, v) = (tensor(&mut rng, &[keys, width], 1.0), tensor(&mut rng, &[keys, width], 1.0));
        patches.push((site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Context, stack: Stack::Main })));
    }
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(Task::Seq2Seq), patches, None))))
}

/// A LoRA and prefixes of these lengths: of the decoder, of the encoder, of cross-attention.
fn everywhere(base: &Base, n: u8, keys: [usize; 3]) -> Option<(DeltaId, Arc<Delta>)> {
    let mut rng = Rng(u64::from(n) * 37 + 5);
    let mut patches = delta(base, n, 0).map(|(_, d)| d.patches().to_vec()).expect("delta");
    for (stack, keys) in [Stack::Main, Stack::Encoder, Stack::Memory].into_iter().zip(keys) {
        for (site, width) in base.sites.prefix_sites(stack).into_iter().filter(|_| keys > 0) {
            let (k, v) = (tensor(&mut rng, &[keys, width], 1.0), tensor(&mut rng, &[keys, width], 1.0));
            patches.push((site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Pinned, stack })));
        }
    }
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(Task::Seq2Seq), patches, None))))
}

#[test]
fn a_prefix_joins_every_attention_and_changes_it() {
    let base = base(&tiny_t5());
    for stack in [Stack::Main, Stack::Encoder, Stack::Memory] {
        assert_eq!(base.sites.prefix_sites(stack).len(), 2, "{stack:?}");
    }
    let delta = everywhere(&base, 9, [3, 4, 5]).expect("delta").1;
    let keys = |stack| (delta.ahead_of(stack).keys, delta.ahead_of(stack).pinned, delta.ahead_of(stack).shift);
    assert_eq!([Stack::Main, Stack::Encoder, Stack::Memory].map(keys), [(3, true, 0), (4, true, 0), (5, true, 0)]);
    assert_eq!(delta.spec.num_virtual_tokens, 5, "of the longest");
    // each of the three by itself
    let source = prompt(3, 12);
    let all: Vec<Vec<f32>> = [[0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 4], [4, 4, 4]]
        .map(|keys| last_logits(&base, &source, everywhere(&base, 9, keys).map(|(_, d)| d)))
        .to_vec();
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            assert!(a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-2), "{i}");
        }
    }
    // the context and the cache know it
    let engine = Engine::new(&base, roomy());
    let with = Some((DeltaId::from_bytes([9; 32]), delta));
    assert!(
        engine.handle.submit(job(1, 256, 4).with(&with).request().0).is_ok(),
        "keys take no position of the encoder"
    );
    let small = Engine::new(&base, EngineConfig { kv_pages: 5, ..roomy() });
    let refused = small.handle.submit(job(1, 28, 30).with(&with).request().0);
    assert!(
        matches!(&refused, Err(SubmitError::Invalid(m)) if m.contains("33 positions of the source")),
        "{refused:?}"
    );
    assert!(small.handle.submit(job(1, 27, 28).with(&with).request().0).is_ok(), "2, 1 and 2 pages");
}

/// Logits behind the start token.
fn last_logits(base: &Base, source: &[u32], delta: Option<Arc<Delta>>) -> Vec<f32> {
    let per_span = std::slice::from_ref(&delta);
    let ahead = delta.as_ref().map(|d| (d.source_ahead(), d.ahead())).unwrap_or_default();
    let read = Source::encode(base, RowLayout::packed_after([(source.len(), ahead.0)]), source, per_span, None);
    let read = read.expect("encodes");
    let (memory, rows) = (read.memory(), RowLayout::packed_after([(1, ahead.1)]));
    let deltas = DeltaBatch::new(&rows, per_span, base.sites.len());
    let cx = Cx { memory: Some(&memory), ..Cx::new(&rows, &deltas) };
    let hidden = base.transformer.forward(&Input::tokens(&[0]), &cx).expect("runs");
    base.transformer.logits(&hidden, &[0], &cx).and_then(|t| t.flatten_all()?.to_vec1()).expect("head")
}

#[test]
fn a_prompt_joins_the_encoder_and_a_prefix_the_decoder() {
    let base = base(&tiny_t5());
    assert_eq!(base.sites.prefix_sites(Stack::Main).len(), base.arch.layers, "the decoder's layers");
    let delta = positions(&base, 9, 5, 3).expect("delta").1;
    assert_eq!((delta.source_ahead().rows, delta.source_ahead().keys), (5, 0));
    assert_eq!((delta.ahead().rows, delta.ahead().keys, delta.spec.num_virtual_tokens), (0, 3, 8));
    let engine = Engine::new(&base, roomy());
    let with = |n| Some((DeltaId::from_bytes([n; 32]), Arc::clone(&delta)));
    let refused = engine.handle.submit(job(1, 254, 4).with(&with(9)).request().0);
    assert!(matches!(refused, Err(SubmitError::Invalid(m)) if m.contains("259 source tokens")));
}

#[test]
fn outputs_are_those_of_the_plain_forward_in_any_company_and_after_preemption() {
    let base = base(&tiny_t5());
    let deltas = [
        None,
        delta(&base, 1, 0),
        positions(&base, 2, 4, 0),
        positions(&base, 3, 0, 5),
        positions(&base, 4, 18, 2),
        everywhere(&base, 5, [3, 6, 2]),
        everywhere(&base, 6, [17, 0, 18]),
        everywhere(&base, 7, [2, 2, 0]),
    ];
    let jobs: Vec<Job> = (0..11).map(|n| job(n, 3 + 6 * n as usize, 20).with(&deltas[n as usize % 8])).collect();
    for config in [roomy(), EngineConfig { kv_pages: 18, max_batch_tokens: 24, prefill_chunk: 8, ..roomy() }] {
        let engine = Engine::new(&base, config);
        for (job, answer) in jobs.iter().zip(engine.together(&jobs)) {
            let own = job.delta.as_ref().map(|(_, delta)| Arc::clone(delta));
            assert_eq!(answer.ids(), plainly(&base, &job.source, own, 20), "{:?}", answer.failed);
            let usage = answer.finished.expect("finished").usage;
            assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens), (job.source.len(), 20));
        }
        engine.settle();
        assert_eq!(engine.handle.stats().preemptions > 0, config.kv_pages == 18);
    }
}

#[test]
fn lengths_are_refused_with_numbers() {
    let base = base(&tiny_t5());
    let engine = Engine::new(&base, roomy());
    let refused = |job: Job| match engine.handle.submit(job.request().0) {
        Err(SubmitError::Invalid(m)) => m,
        other => panic!("{other:?}"),
    };
    assert!(refused(job(1, 300, 4)).contains("300 source tokens"));
    assert!(refused(job(1, 4, 300)).contains("300 new ones"));
    assert!(refused(Job::new(vec![0], greedy(4))).contains("a source"));
}
