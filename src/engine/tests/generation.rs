//! Continuations: what a sequence says depends on its tokens, its delta and its seed alone.

use super::*;
use crate::{
    model::{
        LoadOptions, Quantize,
        testing::{random_base_as, tiny_gpt2, tiny_llama},
    },
    ops::Activations,
};

/// Jobs of all lengths: bare base and five deltas, some of them shared.
fn jobs(base: &Base) -> Vec<Job> {
    (0..14u64)
        .map(|i| {
            let work = greedy(1 + (i as usize * 7) % 40);
            let which = (i % 6) as u8;
            let job = Job::new(prompt(i, 1 + (i as usize * 13) % 90), work);
            if which == 0 { job } else { job.with(&delta(base, which, 0)) }
        })
        .collect()
}

/// Each in an engine that does nothing else.
fn alone(base: &Arc<Base>, jobs: &[Job]) -> Vec<Answer> {
    let engine = Engine::new(base, roomy());
    jobs.iter().map(|job| Answer::read(engine.submit(job))).collect()
}

/// Every sum has one order, whatever is computed beside it and wherever a prompt is cut: bit for bit the same.
fn assert_identical(a: &[Answer], b: &[Answer]) {
    assert_same(a, b);
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let numbers = |answer: &Answer| {
            let tokens = answer.tokens.iter().map(|token| token.logprob.to_bits());
            let output = answer.output.as_ref().map(|_| answer.numbers()).unwrap_or_default();
            tokens.chain(output.into_iter().map(f32::to_bits)).collect::<Vec<_>>()
        };
        assert_eq!(numbers(a), numbers(b), "request {i}");
    }
}

/// With activations rounded where the machine does so, too.
#[test]
fn a_mixed_batch_on_a_base_in_bf16_says_what_each_request_says_alone() {
    let options = LoadOptions { dtype: candle_core::DType::BF16, ..LoadOptions::default() };
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = Arc::new(random_base_as(&config, 7, &options).expect("base"));
        let jobs = jobs(&base);
        for activations in [Activations::F32, Activations::AsWeights] {
            let config = EngineConfig { activations, prefix_cache: false, ..roomy() };
            let engine = Engine::new(&base, config);
            let expected: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
            let narrow = EngineConfig { max_batch_tokens: 16, max_sequences: 5, prefill_chunk: 7, ..config };
            let (together, cut) = (engine.together(&jobs), Engine::new(&base, narrow).together(&jobs));
            assert_identical(&together, &expected);
            assert_identical(&cut, &expected);
            engine.settle();
        }
    }
}

#[test]
fn a_mixed_batch_says_what_each_request_says_alone() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let jobs = jobs(&base);
        let expected = alone(&base, &jobs);
        let different: std::collections::HashSet<_> = expected.iter().map(Answer::ids).collect();
        assert!(different.len() > 10, "the deltas do something");
        let engine = Engine::new(&base, roomy());
        assert_identical(&engine.together(&jobs), &expected);
        engine.settle();
        // in waves: requests join while others run, in another order
        let backwards: Vec<Job> = jobs.iter().rev().cloned().collect();
        let mut receivers = Vec::new();
        for wave in backwards.chunks(3) {
            receivers.extend(wave.iter().map(|job| engine.submit(job)));
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut answers: Vec<Answer> = receivers.into_iter().map(Answer::read).collect();
        answers.reverse();
        assert_same(&answers, &expected);
        engine.settle();
    }
}

#[test]
fn a_mixed_batch_on_8_bits_says_what_each_request_says_alone() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
        let base = Arc::new(random_base_as(&config, 7, &options).expect("base"));
        let jobs: Vec<Job> = (jobs(&base).into_iter())
            .chain((0..4).map(|i| Job::new(prompt(i, 30), Work::Score { from: 1 }).with(&delta(&base, i as u8, 0))))
            .collect();
        let in_8_bits = EngineConfig { activations: Activations::AsWeights, prefix_cache: false, ..roomy() };
        let engine = Engine::new(&base, in_8_bits);
        let expected: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
        let together = engine.together(&jobs);
        assert_identical(&together, &expected);
        let narrow = EngineConfig { max_batch_tokens: 16, max_sequences: 5, prefill_chunk: 7, ..in_8_bits };
        assert_identical(&Engine::new(&base, narrow).together(&jobs), &expected);
        // nearly what is said in f32
        let in_f32 = Engine::new(&base, roomy());
        for (job, got) in jobs.iter().zip(expected).skip(14) {
            let (got, want) = (got.numbers(), Answer::read(in_f32.submit(job)).numbers());
            let sums = (got.iter().sum::<f32>(), want.iter().sum::<f32>());
            assert!(got != want && (sums.0 - sums.1).abs() < 0.02 * sums.1.abs(), "{sums:?}");
        }
    }
}

#[test]
fn chunks_few_deltas_at_a_time_and_few_places_change_nothing() {
    let base = base(&tiny_llama());
    let jobs = jobs(&base);
    let expected = alone(&base, &jobs);
    let narrow = EngineConfig { max_batch_tokens: 16, max_sequences: 5, max_deltas: 2, prefill_chunk: 7, ..roomy() };
    let engine = Engine::new(&base, narrow);
    assert_identical(&engine.together(&jobs), &expected);
    engine.settle();
}

#[test]
fn a_preempted_sequence_says_what_it_would_have_said() {
    let base = base(&tiny_llama());
    let sampled = |i: u64| {
        Work::Generate(Generate {
            sampling: Sampling { temperature: 1.0, seed: Some(i), ..Sampling::default() },
            max_new_tokens: 60,
            stop_tokens: vec![],
            logprobs: Some(0),
            beams: None,
            speculation: None,
        })
    };
    let jobs: Vec<Job> = (0..6)
        .map(|i| Job::new(prompt(i, 20), if i % 2 == 0 { greedy(60) } else { sampled(i) }))
        .map(|job| job.with(&delta(&base, 1, 0)))
        .collect();
    let expected = alone(&base, &jobs);
    let engine = Engine::new(&base, EngineConfig { kv_pages: 12, prefill_chunk: 9, ..roomy() });
    assert_same(&engine.together(&jobs), &expected);
    engine.settle();
    assert!(engine.handle.stats().preemptions > 0, "12 pages cannot hold six sequences of five pages");
}

#[test]
fn a_seed_reproduces_a_continuation_in_any_company() {
    let base = base(&tiny_gpt2());
    let with_seed = |seed| {
        let sampling = Sampling { temperature: 1.5, top_k: 50, top_p: 0.95, seed: Some(seed), ..Sampling::default() };
        let work = Generate {
            sampling,
            max_new_tokens: 30,
            stop_tokens: vec![],
            logprobs: None,
            beams: None,
            speculation: None,
        };
        Job::new(prompt(1, 10), Work::Generate(work))
    };
    let engine = Engine::new(&base, roomy());
    let first = Answer::read(engine.submit(&with_seed(5))).ids();
    let mut company = jobs(&base);
    company.insert(3, with_seed(5));
    company.push(with_seed(6));
    let answers = engine.together(&company);
    assert_eq!(answers[3].ids(), first);
    assert_ne!(answers[company.len() - 1].ids(), first);
}

#[test]
fn the_end_is_a_stop_token_or_the_length() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let whole = Answer::read(engine.submit(&Job::new(prompt(2, 9), greedy(12))));
    let end = whole.finished.clone().expect("finishes");
    assert_eq!((end.reason, end.usage.prompt_tokens, end.usage.completion_tokens), (FinishReason::Length, 9, 12));
    assert_eq!(whole.tokens.len(), 12);
    let at = whole.ids().iter().position(|id| *id == whole.ids()[5]).expect("it is there");
    let Work::Generate(how) = greedy(12) else { unreachable!() };
    let work = Work::Generate(Generate { stop_tokens: vec![whole.ids()[5]], ..how });
    let stopped = Answer::read(engine.submit(&Job::new(prompt(2, 9), work)));
    assert_eq!(stopped.ids()[..], whole.ids()[..at], "the stop token is not sent");
    let end = stopped.finished.expect("finishes");
    assert_eq!((end.reason, end.usage.completion_tokens as usize), (FinishReason::StopToken, at + 1));
}

#[test]
fn log_probabilities_belong_to_the_greedy_choice() {
    let base = base(&tiny_gpt2());
    let engine = Engine::new(&base, roomy());
    let answer = Answer::read(engine.submit(&Job::new(prompt(3, 9), greedy(10))));
    for token in &answer.tokens {
        assert_eq!(token.top.len(), 3);
        assert_eq!(token.top[0], (token.id, token.logprob));
        assert!(token.logprob <= 0.0 && token.top.windows(2).all(|w| w[0].1 >= w[1].1));
    }
}

#[test]
fn a_real_model_tells_its_story_letter_for_letter_through_the_stream() {
    use crate::{
        model::LoadOptions,
        text::{DecodeStream, testing::shared},
    };
    let Some(text) = shared("stories260k-llama") else { return };
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/stories260k-llama");
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).expect("golden")).expect("json");
    let ids = |v: &serde_json::Value| -> Vec<u32> { serde_json::from_value(v.clone()).expect("ids") };
    let base = Arc::new(Base::load(&dir, &LoadOptions::default()).expect("loads"));
    let engine = Engine::new(&base, EngineConfig { prefill_chunk: 3, ..roomy() });
    let cases: Vec<_> = golden["prompts"].as_array().expect("prompts").iter().collect();
    let jobs: Vec<Job> = cases
        .iter()
        .map(|case| {
            let prompt = text.encode_user(case["prompt"].as_str().expect("prompt"), true).expect("encodes");
            assert_eq!(prompt, ids(&case["prompt_ids"]));
            Job::new(prompt, greedy(ids(&case["greedy_ids"]).len()))
        })
        .collect();
    for (answer, case) in engine.together(&jobs).iter().zip(&cases) {
        let expected = ids(&case["greedy_ids"]);
        assert_eq!(answer.ids(), expected);
        let prompt = ids(&case["prompt_ids"]);
        let mut stream = DecodeStream::after(Arc::clone(&text), &prompt).expect("decodes");
        let mut out = text.decode(&prompt).expect("decodes");
        for id in answer.ids() {
            out.extend(stream.push(id).expect("decodes"));
        }
        out.extend(stream.finish().expect("decodes"));
        assert_eq!(out, text.decode(&[prompt, expected].concat()).expect("decodes"));
    }
    let mean = &golden["mean_nll"];
    let job = Job::new(ids(&mean["ids"]), Work::Score { from: 1 });
    let scores = Answer::read(engine.submit(&job)).numbers();
    let nll = -f64::from(scores.iter().sum::<f32>()) / scores.len() as f64;
    assert!((nll - mean["mean_nll"].as_f64().expect("number")).abs() < 1e-4, "{nll}");
}
