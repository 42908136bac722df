//! Scoring, classification and embeddings: sequences of a prompt only, in the same steps as everything else.

use super::*;
use crate::{
    delta::DeltaBatch,
    model::{
        Input,
        testing::{tiny_bert, tiny_gpt2, tiny_llama},
    },
    nn::Cx,
    rows::RowLayout,
};

fn embed(pooling: Pooling, normalize: bool) -> Work {
    Work::Embed { pooling, normalize }
}

fn works() -> Vec<Work> {
    vec![
        Work::Score { from: 1 },
        Work::Score { from: 20 },
        Work::Classify,
        Work::ClassifyTokens,
        embed(Pooling::Mean, true),
        embed(Pooling::Mean, false),
        embed(Pooling::Cls, false),
        embed(Pooling::Last, true),
        embed(Pooling::Default, false),
        greedy(6),
    ]
}

/// The final hidden states of one text, straight from the model.
fn hidden(base: &Base, job: &Job, read: impl Fn(&Tensor, &Cx<'_>) -> Tensor) -> Vec<f32> {
    let rows = RowLayout::packed(&[job.tokens.len()]);
    let deltas = match &job.delta {
        Some((_, delta)) => DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len()),
        None => DeltaBatch::none(),
    };
    let cx = Cx::new(&rows, &deltas);
    let input = Input { tokens: &job.tokens, token_types: job.types.as_deref() };
    let hidden = base.transformer.forward(&input, &cx).expect("forward");
    read(&hidden, &cx).flatten_all().and_then(|t| t.to_vec1()).expect("numbers")
}

#[test]
fn chunks_and_company_change_no_result() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let jobs: Vec<Job> = works()
            .into_iter()
            .enumerate()
            .map(|(i, work)| Job::new(prompt(i as u64, 21 + i * 5), work).with(&delta(&base, 1 + i as u8 % 3, 3)))
            .collect();
        let engine = Engine::new(&base, roomy());
        let expected: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
        assert!(expected.iter().all(|a| a.failed.is_none()));
        let narrow = EngineConfig { max_batch_tokens: 24, prefill_chunk: 8, kv_pages: 14, ..roomy() };
        let engine = Engine::new(&base, narrow);
        assert_same(&engine.together(&jobs), &expected);
        engine.settle();
    }
}

#[test]
fn results_are_those_of_the_model() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let with = delta(&base, 2, 4);
    let run = |work: Work| {
        let job = Job::new(prompt(9, 15), work).with(&with);
        (Answer::read(engine.submit(&job)).numbers(), job)
    };
    let (scores, job) = run(Work::Score { from: 4 });
    let expected = hidden(&base, &job, |h, cx| {
        let pick: Vec<u32> = (3..14).collect();
        let logits = base.transformer.logits(h, &pick, cx).expect("logits");
        let logp = candle_nn::ops::log_softmax(&logits, 1).expect("log-softmax");
        let targets = Tensor::new(&job.tokens[4..], &Device::Cpu).expect("targets");
        logp.gather(&targets.reshape((11, 1)).expect("column"), 1).expect("gather")
    });
    assert_close(&scores, &expected);
    let (mean, job) = run(embed(Pooling::Mean, true));
    let mut expected = hidden(&base, &job, |h, _| h.mean(0).expect("mean"));
    let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
    expected.iter_mut().for_each(|x| *x /= norm);
    assert_close(&mean, &expected);
    let (last, job) = run(embed(Pooling::Default, false));
    assert_close(&last, &hidden(&base, &job, |h, _| h.get(14).expect("last row")));
    let (labels, job) = run(Work::Classify);
    let classify = |h: &Tensor, cx: &Cx<'_>| base.transformer.classify(h, cx).expect("head").remove(0).expect("logits");
    assert_close(&labels, &hidden(&base, &job, classify));
    assert_eq!(labels.len(), 4);
}

#[test]
fn an_encoder_classifies_and_embeds_pairs_without_a_cache() {
    let base = base(&tiny_bert());
    let deltas = [delta(&base, 1, 3), delta(&base, 2, 7), None];
    let jobs: Vec<Job> = (0..9usize)
        .map(|i| {
            let work = [Work::Classify, embed(Pooling::Default, true), embed(Pooling::Cls, false)][i % 3].clone();
            let tokens = prompt(i as u64, 3 + i * 5);
            let types = (i % 2 == 0).then(|| (0..tokens.len() as u32).map(|t| u32::from(t > 2)).collect());
            let with = if matches!(work, Work::Classify) { &deltas[i % 2] } else { &deltas[i / 3] };
            Job { types, ..Job::new(tokens, work).with(with) }
        })
        .collect();
    let engine = Engine::new(&base, roomy());
    let alone: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
    assert_same(&engine.together(&jobs), &alone);
    assert_eq!(engine.handle.stats().pages_total, 0);
    let narrow = Engine::new(&base, EngineConfig { max_batch_tokens: 10, max_deltas: 1, ..roomy() });
    assert_same(&narrow.together(&jobs), &alone);
    assert_eq!((alone[0].numbers().len(), alone[3].numbers().len()), (3, 7));
    let direct = hidden(&base, &jobs[2], |h, _| h.get(0).expect("first row"));
    assert_close(&alone[2].numbers(), &direct);
    let norm: f32 = alone[1].numbers().iter().map(|x| x * x).sum();
    assert!((norm - 1.0).abs() < 1e-4);
}

#[test]
fn classification_without_a_head_fails_alone() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let jobs = [
        Job::new(prompt(1, 5), Work::Classify),
        Job::new(prompt(1, 5), Work::Classify).with(&delta(&base, 1, 2)),
        Job::new(prompt(1, 5), Work::ClassifyTokens).with(&delta(&base, 2, 0)),
        Job::new(prompt(1, 5), greedy(3)),
    ];
    let answers = engine.together(&jobs);
    assert_eq!(answers[0].failed, Some(EngineError::NoHead));
    assert_eq!(answers[1].numbers().len(), 2);
    assert_eq!(answers[2].failed, Some(EngineError::NoHead));
    assert_eq!(answers[3].tokens.len(), 3);
    engine.settle();
}
