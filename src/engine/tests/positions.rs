//! Prompts and prefixes in the engine: alone and in company, in chunks, after preemption, at the context's end.

use super::*;
use crate::{
    delta::{Prefix, PrefixForm, Prompt, PromptStage, Site, SiteId, Stack},
    model::{
        Input,
        testing::{tiny_bert, tiny_gpt2, tiny_llama},
    },
    nn::Cx,
    rows::RowLayout,
};

pub(super) type Held = Option<(DeltaId, Arc<Delta>)>;

fn rows(base: &Base, rows: Tensor, stage: PromptStage) -> (SiteId, Patch) {
    (base.sites.id(Site::Embedding).expect("site"), Patch::Prompt(Prompt { rows, stage, stack: Stack::Main }))
}

fn random_prefix(base: &Base, seed: u64, n: usize, form: PrefixForm) -> Vec<(SiteId, Patch)> {
    let mut rng = Rng(seed);
    let width = base.arch.kv_width();
    let at = |layer| {
        let site = base.sites.id(Site::KeyValue { layer, stack: Stack::Main }).expect("site");
        let (k, v) = (tensor(&mut rng, &[n, width], 1.0), tensor(&mut rng, &[n, width], 1.0));
        (site, Patch::Prefix(Prefix { k, v, form, stack: Stack::Main }))
    };
    (0..base.arch.layers).map(at).collect()
}

fn held(n: u8, patches: Vec<(SiteId, Patch)>, head: Option<Head>) -> Held {
    let task = if head.is_some() { Task::SeqCls } else { Task::CausalLm };
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(task), patches, head))))
}

/// Every kind of delta that there is a forward for, and their combinations.
pub(super) fn kinds(base: &Base, labels: usize) -> Vec<Held> {
    let mut rng = Rng(99);
    let hidden = base.arch.hidden;
    let prompt = |rng: &mut Rng, n| rows(base, tensor(rng, &[n, hidden], 0.5), PromptStage::Tokens);
    let lora = |n| delta(base, n, labels).map(|(_, d)| (d.patches().to_vec(), d.head().cloned())).expect("delta");
    let (mut out, mut id) = (vec![None, delta(base, 1, labels)], 40);
    let mut add = |patches: Vec<(SiteId, Patch)>| {
        id += 1;
        out.push(held(id, patches, lora(id).1));
    };
    add(vec![prompt(&mut rng, 3)]);
    add(vec![prompt(&mut rng, 17)]);
    add(random_prefix(base, 5, 4, PrefixForm::Context));
    add(random_prefix(base, 6, 18, PrefixForm::Pinned));
    add([lora(2).0, random_prefix(base, 7, 5, PrefixForm::Context)].concat());
    add([lora(3).0, vec![prompt(&mut rng, 2)]].concat());
    add([vec![prompt(&mut rng, 6)], random_prefix(base, 8, 2, PrefixForm::Context)].concat());
    out
}

fn jobs(base: &Base) -> Vec<Job> {
    let kinds = kinds(base, 0);
    let job = |i: usize| {
        let work = if i.is_multiple_of(5) { Work::Score { from: 1 } } else { greedy(1 + (i * 7) % 30) };
        Job::new(prompt(i as u64, 2 + (i * 13) % 60), work).with(&kinds[i % kinds.len()])
    };
    (0..3 * kinds.len()).map(job).collect()
}

fn alone(base: &Arc<Base>, jobs: &[Job]) -> Vec<Answer> {
    let engine = Engine::new(base, roomy());
    let answers: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
    assert!(answers.iter().all(|a| a.failed.is_none()));
    answers
}

#[test]
fn all_kinds_in_one_batch_say_what_each_says_alone() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let jobs = jobs(&base);
        let expected = alone(&base, &jobs);
        let engine = Engine::new(&base, roomy());
        assert_same(&engine.together(&jobs), &expected);
        engine.settle();
        // chunks that end inside virtual rows, few deltas at a time, and so few pages that sequences start over
        let narrow = EngineConfig {
            max_batch_tokens: 16,
            max_sequences: 6,
            max_deltas: 2,
            prefill_chunk: 5,
            kv_pages: 9,
            ..roomy()
        };
        let engine = Engine::new(&base, narrow);
        assert_same(&engine.together(&jobs), &expected);
        engine.settle();
        assert!(engine.handle.stats().preemptions > 0);
    }
}

#[test]
fn other_work_skips_virtual_rows_in_any_chunks() {
    for config in [tiny_llama(), tiny_bert()] {
        let base = base(&config);
        let kinds = kinds(&base, 3);
        let embed = |pooling| Work::Embed { pooling, normalize: false };
        let works =
            [Work::Classify, Work::ClassifyTokens, embed(Pooling::Mean), embed(Pooling::Cls), embed(Pooling::Last)];
        let jobs: Vec<Job> = (0..works.len() * (kinds.len() - 1))
            .map(|i| {
                let types = (!base.arch.is_causal()).then(|| (0..9).map(|t| u32::from(t > 4)).collect());
                let with = &kinds[1 + i / works.len()];
                Job { types, ..Job::new(prompt(i as u64, 9), works[i % works.len()].clone()).with(with) }
            })
            .collect();
        let expected = alone(&base, &jobs);
        assert_eq!(expected[1].numbers().len(), 9 * 3, "one row per token");
        let engine = Engine::new(&base, EngineConfig { max_batch_tokens: 24, prefill_chunk: 4, ..roomy() });
        assert_same(&engine.together(&jobs), &expected);
        for (i, job) in jobs.iter().enumerate() {
            let Work::Embed { pooling, .. } = &job.work else { continue };
            let rows = token_states(&base, job);
            let want: Vec<f32> = match pooling {
                Pooling::Cls => rows[0].clone(),
                Pooling::Last => rows[8].clone(),
                _ => (0..rows[0].len()).map(|c| rows.iter().map(|r| r[c]).sum::<f32>() / 9.0).collect(),
            };
            assert_close(&expected[i].numbers(), &want);
        }
    }
}

/// Final hidden states of a job's tokens, straight from the model.
fn token_states(base: &Base, job: &Job) -> Vec<Vec<f32>> {
    let per_span = vec![job.delta.as_ref().map(|(_, d)| Arc::clone(d))];
    let rows = RowLayout::packed_for(&[job.tokens.len()], &per_span);
    let deltas = crate::delta::DeltaBatch::new(&rows, &per_span, base.sites.len());
    let input = Input { tokens: &job.tokens, token_types: job.types.as_deref() };
    let hidden = base.transformer.forward(&input, &Cx::new(&rows, &deltas)).expect("forward");
    let own = rows.spans()[0].token_rows();
    hidden.narrow(0, own.start, own.len()).and_then(|t| t.to_vec2()).expect("rows")
}

#[test]
fn a_prompt_of_a_texts_embeddings_is_that_text() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let text = prompt(77, 11);
        let embeddings = base.transformer.token_embeddings(&text).expect("embeddings");
        let with = held(9, vec![rows(&base, embeddings, PromptStage::Tokens)], None);
        let own = prompt(78, 7);
        let whole = [text, own.clone()].concat();
        let engine = Engine::new(&base, EngineConfig { prefill_chunk: 6, ..roomy() });
        let bare = Answer::read(engine.submit(&Job::new(whole, greedy(20))));
        let virtual_ = Answer::read(engine.submit(&Job::new(own, greedy(20)).with(&with)));
        assert_same(&[virtual_], &[bare]);
    }
}

#[test]
fn what_exceeds_context_or_cache_with_virtual_positions_is_refused() {
    let base = base(&tiny_gpt2()); // a context of 256
    let engine = Engine::new(&base, EngineConfig { kv_pages: 64, ..roomy() });
    let fits = |kind: &Held, len: usize, new: usize| {
        let (request, _events) = Job::new(prompt(1, len), greedy(new)).with(kind).request();
        engine.handle.submit(request).map_err(|e| e.to_string())
    };
    let context = held(1, random_prefix(&base, 1, 20, PrefixForm::Context), None);
    let pinned = held(2, random_prefix(&base, 1, 20, PrefixForm::Pinned), None);
    let prompt = held(
        3,
        vec![rows(
            &base,
            Tensor::zeros((20, 32), candle_core::DType::F32, &Device::Cpu).expect("rows"),
            PromptStage::Tokens,
        )],
        None,
    );
    for kind in [&context, &prompt] {
        assert_eq!(fits(kind, 200, 36), Ok(()));
        let refused = fits(kind, 200, 37).expect_err("one too many");
        assert!(["20 virtual", "200 prompt", "37 new", "256"].iter().all(|n| refused.contains(n)), "{refused}");
    }
    assert_eq!(fits(&pinned, 200, 56), Ok(()), "pinned keys move no position");
    assert!(fits(&pinned, 200, 57).is_err());
    let of = |kind: &Held| kind.as_ref().map(|(_, d)| d.ahead()).expect("delta");
    assert_eq!((engine.handle.max_tokens(of(&context)), engine.handle.max_tokens(of(&pinned))), (236, 256));
    let small = Engine::new(&base, EngineConfig { kv_pages: 4, ..roomy() });
    // keys have two of its four pages
    assert_eq!((small.handle.max_tokens(of(&context)), small.handle.max_tokens(of(&pinned))), (32, 32));
}
