//! Encoder-decoders: the source is read once, in the same steps as everything else.

use super::*;
use crate::{
    delta::DeltaBatch,
    model::{Input, Source, testing::tiny_t5},
    nn::Cx,
    rows::RowLayout,
};

fn job(n: u64, len: usize, new: usize) -> Job {
    Job { source: prompt(n, len), ..Job::new(vec![0], greedy(new)) }
}

/// Greedy tokens by whole forwards without a cache.
fn plainly(base: &Base, source: &[u32], delta: Option<Arc<Delta>>, new: usize) -> Vec<u32> {
    let rows = RowLayout::packed(&[source.len()]);
    let read = Source::encode(base, rows, source, std::slice::from_ref(&delta), None).expect("encodes");
    let memory = read.memory();
    let mut tokens = vec![0u32];
    for _ in 0..new {
        let rows = RowLayout::packed(&[tokens.len()]);
        let deltas = DeltaBatch::new(&rows, std::slice::from_ref(&delta), base.sites.len());
        let cx = Cx { memory: Some(&memory), ..Cx::new(&rows, &deltas) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("runs");
        let logits = base.transformer.logits(&hidden, &[tokens.len() as u32 - 1], &cx).expect("head");
        tokens.push(logits.argmax(1).expect("argmax").to_vec1::<u32>().expect("ids")[0]);
    }
    tokens.split_off(1)
}

#[test]
fn outputs_are_those_of_the_plain_forward_in_any_company_and_after_preemption() {
    let base = base(&tiny_t5());
    let deltas = [None, delta(&base, 1, 0), delta(&base, 2, 0)];
    let jobs: Vec<Job> = (0..7).map(|n| job(n, 3 + 9 * n as usize, 20).with(&deltas[n as usize % 3])).collect();
    for config in [roomy(), EngineConfig { kv_pages: 14, max_batch_tokens: 24, prefill_chunk: 8, ..roomy() }] {
        let engine = Engine::new(&base, config);
        for (job, answer) in jobs.iter().zip(engine.together(&jobs)) {
            let own = job.delta.as_ref().map(|(_, delta)| Arc::clone(delta));
            assert_eq!(answer.ids(), plainly(&base, &job.source, own, 20), "{:?}", answer.failed);
            let usage = answer.finished.expect("finished").usage;
            assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens), (job.source.len(), 20));
        }
        engine.settle();
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
