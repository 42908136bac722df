//! Beam searches: what they find is what whole forwards without a cache find, in any company, and nothing stays behind.

use super::*;
use crate::{
    admission::params::{BeamParams, EarlyStopping},
    delta::{DeltaBatch, Prefix, PrefixForm, Prompt, PromptStage, Site, Stack},
    engine::beam::{Beams as Search, Search as How},
    model::{
        Input, Source,
        testing::{tiny_gpt2, tiny_t5},
    },
    nn::Cx,
    rows::RowLayout,
};

type Held = Option<(DeltaId, Arc<Delta>)>;

fn search(beams: u32, max_new_tokens: usize, stop: Option<u32>, how: Sampling) -> Work {
    let search = BeamParams { beams, length_penalty: 0.7, early_stopping: EarlyStopping::Heuristic };
    let told = beams as usize;
    let stop_tokens = stop.into_iter().collect();
    Work::Generate(Generate {
        sampling: how,
        max_new_tokens,
        stop_tokens,
        logprobs: None,
        beams: Some(Beams { search, told }),
        speculation: None,
    })
}

/// Log-probabilities of all tokens behind these, by a whole forward.
fn plain(base: &Base, job: &Job, tokens: &[u32]) -> Vec<f32> {
    let delta: Option<Arc<Delta>> = job.delta.as_ref().map(|(_, d)| Arc::clone(d));
    let (ahead, source_ahead) = delta.as_ref().map(|d| (d.ahead(), d.source_ahead())).unwrap_or_default();
    let per_span = std::slice::from_ref(&delta);
    let read = (!job.source.is_empty()).then(|| {
        let rows = RowLayout::packed_after([(job.source.len(), source_ahead)]);
        Source::encode(base, rows, &job.source, per_span, None).expect("encodes")
    });
    let memory = read.as_ref().map(Source::memory);
    let rows = RowLayout::packed_after([(tokens.len(), ahead)]);
    let deltas = DeltaBatch::new(&rows, per_span, base.sites.len());
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let hidden = base.transformer.forward(&Input::tokens(tokens), &cx).expect("runs");
    let logits = base.transformer.logits(&hidden, &rows.last_rows(), &cx).expect("head");
    candle_nn::ops::log_softmax(&logits, 1).and_then(|t| t.flatten_all()?.to_vec1()).expect("numbers")
}

/// The same search by whole forwards: outputs (with the token that ends them) and scores.
fn by_hand(base: &Base, job: &Job) -> Vec<(Vec<u32>, f32)> {
    let Work::Generate(Generate { max_new_tokens, stop_tokens, beams: Some(beams), sampling, .. }) = &job.work else {
        unreachable!()
    };
    let how = How {
        beams: beams.search.beams as usize,
        length_penalty: beams.search.length_penalty,
        early_stopping: beams.search.early_stopping,
        max_new: *max_new_tokens,
        stop_tokens: stop_tokens.len(),
    };
    let mut state = Search::new(how);
    while !state.is_over() {
        let continued = |output: &crate::engine::beam::Output| {
            let all = [job.tokens.as_slice(), &output.tokens].concat();
            let mut scores = plain(base, job, &all);
            let n = sampling.no_repeat_ngram_size as usize;
            if n > 0 && all.len() >= n {
                for run in all.windows(n).filter(|run| run[..n - 1] == all[all.len() + 1 - n..]) {
                    scores[run[n - 1] as usize] = f32::NEG_INFINITY;
                }
            }
            scores.into_iter().enumerate().map(|(id, score)| (id as u32, score)).collect()
        };
        let rows: Vec<Vec<(u32, f32)>> = state.open().iter().map(continued).collect();
        state.step(&rows, |t| stop_tokens.contains(&t));
    }
    state.into_finished().into_iter().map(|o| (o.tokens, o.score)).collect()
}

/// Checks what an engine found, best first. Outputs whose scores are closer than rounding may change places.
fn assert_found(base: &Base, job: &Job, answer: &Answer) {
    const CLOSE: f32 = 1e-3;
    let expected = by_hand(base, job);
    let found = answer.found.as_ref().unwrap_or_else(|| panic!("{answer:?}"));
    assert_eq!(found.len(), expected.len());
    let Work::Generate(Generate { stop_tokens, .. }) = &job.work else { unreachable!() };
    let mut left: Vec<&(Vec<u32>, f32)> = expected.iter().collect();
    for (got, (_, score)) in found.iter().zip(&expected) {
        assert!((got.score - score).abs() < CLOSE, "{found:?}\n{expected:?}");
        let same = |(tokens, score): &&(Vec<u32>, f32)| {
            let told = tokens.strip_suffix(stop_tokens.as_slice()).filter(|_| !stop_tokens.is_empty());
            (got.score - score).abs() < CLOSE
                && got.tokens == told.unwrap_or(tokens)
                && got.usage.completion_tokens as usize == tokens.len()
                && (got.reason == FinishReason::StopToken) == told.is_some()
        };
        let at = left.iter().position(same).unwrap_or_else(|| panic!("{got:?} in {found:?}\n{expected:?}"));
        left.swap_remove(at);
    }
}

/// A LoRA, and rows and keys ahead of the tokens.
fn ahead(base: &Base, n: u8, rows: usize, keys: usize) -> Held {
    let mut rng = Rng(u64::from(n) * 41 + 3);
    let mut patches = delta(base, n, 0).map(|(_, d)| d.patches().to_vec()).expect("delta");
    let stack = if base.arch.is_encoder_decoder() { Stack::Encoder } else { Stack::Main };
    if rows > 0 {
        let prompt =
            Prompt { rows: tensor(&mut rng, &[rows, base.arch.hidden], 0.5), stage: PromptStage::Tokens, stack };
        patches.push((base.sites.id(Site::Embedding).expect("site"), Patch::Prompt(prompt)));
    }
    for (site, width) in base.sites.prefix_sites(Stack::Main).into_iter().filter(|_| keys > 0) {
        let (k, v) = (tensor(&mut rng, &[keys, width], 1.0), tensor(&mut rng, &[keys, width], 1.0));
        patches.push((site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Context, stack: Stack::Main })));
    }
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(Task::CausalLm), patches, None))))
}

fn jobs(base: &Base) -> Vec<Job> {
    let deltas = [None, delta(base, 1, 0), ahead(base, 2, 3, 0), ahead(base, 3, 0, 5), ahead(base, 4, 2, 17)];
    let job = |i: usize| {
        let tokens = prompt(i as u64, 2 + (i * 11) % 40);
        let plain = Sampling::default();
        let work = match i % 4 {
            0 => search(3, 12, None, plain),
            1 => search(2, 9, Some(prompt(7, 1)[0]), plain),
            2 => greedy(14),
            _ => search(4, 20, None, Sampling { no_repeat_ngram_size: 2, ..plain }),
        };
        let job = if base.arch.is_encoder_decoder() {
            Job { source: tokens, ..Job::new(vec![0], work) }
        } else {
            Job::new(tokens, work)
        };
        job.with(&deltas[i % deltas.len()])
    };
    (0..10).map(job).collect()
}

#[test]
fn a_search_finds_what_whole_forwards_find_in_any_company() {
    for config in [tiny_llama(), tiny_gpt2(), tiny_t5()] {
        let base = base(&config);
        let jobs = jobs(&base);
        let narrow = EngineConfig {
            kv_pages: 26,
            max_batch_tokens: 24,
            max_sequences: 7,
            prefill_chunk: 9,
            max_deltas: 2,
            ..roomy()
        };
        for config in [roomy(), narrow] {
            let engine = Engine::new(&base, config);
            let together = engine.together(&jobs);
            // by now, whole pages of their prompts are there
            let alone: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
            for (job, answer) in jobs
                .iter()
                .chain(&jobs)
                .zip(together.iter().chain(&alone))
                .filter(|(job, _)| !matches!(&job.work, Work::Generate(g) if g.beams.is_none()))
            {
                assert_found(&base, job, answer);
            }
            assert_same(&together, &alone);
            engine.settle();
        }
    }
}

#[test]
fn a_search_that_loses_its_pages_starts_over_and_finds_the_same() {
    let base = base(&tiny_llama());
    // four beams of 20 + 30 tokens are 16 pages; two such searches do not fit beside each other
    let jobs: Vec<Job> = (0..3).map(|i| Job::new(prompt(i, 20), search(4, 30, None, Sampling::default()))).collect();
    let engine = Engine::new(&base, EngineConfig { kv_pages: 20, ..roomy() });
    for (job, answer) in jobs.iter().zip(engine.together(&jobs)) {
        assert_found(&base, job, &answer);
    }
    engine.settle();
    assert!(engine.handle.stats().preemptions > 0);
}

#[test]
fn the_best_of_as_many_beams_as_tokens_is_the_best_of_all() {
    let base = base(&tiny_gpt2());
    let vocab = base.arch.vocab as u32;
    let work = search(vocab, 2, None, Sampling::default());
    let config = EngineConfig { max_sequences: vocab as usize, kv_pages: 2 * vocab as usize, ..roomy() };
    let engine = Engine::new(&base, config);
    let job = Job::new(prompt(5, 6), work);
    let found = Answer::read(engine.submit(&job)).found.expect("found");
    assert_eq!(found.len(), vocab as usize);
    let first = plain(&base, &job, &job.tokens);
    let mut all = Vec::new();
    for (token, score) in first.iter().enumerate() {
        let second = plain(&base, &job, &[job.tokens.as_slice(), &[token as u32]].concat());
        all.extend(second.iter().enumerate().map(|(next, s)| (score + s, [token as u32, next as u32])));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (got, (score, tokens)) in found.iter().zip(&all).take(20) {
        assert_eq!(got.tokens, tokens);
        assert!((got.score - score / 2f32.powf(0.7)).abs() < 1e-4);
    }
}

#[test]
fn a_client_that_leaves_frees_all_beams() {
    let base = long_base();
    let engine = Engine::new(&base, endless(8));
    let job = Job::new(prompt(1, 4), search(8, ENDLESS, None, Sampling::default())).with(&delta(&base, 1, 0));
    let events = engine.submit(&job);
    until(|| engine.handle.stats().running >= 8 && engine.handle.stats().pages_used >= 8);
    drop(events);
    engine.settle();
    assert_eq!(Arc::strong_count(&job.lease), 1);
    assert!(engine.handle.stats().steps < ENDLESS as u64, "they ran to their end");
}

#[test]
fn beams_that_can_never_run_are_refused() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { kv_pages: 8, max_sequences: 5, ..roomy() });
    let refused = |job: Job| match engine.handle.submit(job.request().0) {
        Err(SubmitError::Invalid(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let of = |beams, len, new| Job::new(prompt(1, len), search(beams, new, None, Sampling::default()));
    assert!(refused(of(6, 4, 4)).contains("6 beams"));
    assert!(refused(of(4, 20, 20)).contains("4 beams of 20 + 20 positions"));
    assert!(Answer::read(engine.submit(&of(4, 20, 10))).found.is_some());
}

/// What transformers finds with the fixtures' models (`tests/golden/make_beams.py`); T5's are in the full folder only.
#[test]
fn real_searches_are_those_of_transformers() {
    use crate::model::LoadOptions;
    use std::path::Path;

    let recorded: Vec<serde_json::Value> =
        serde_json::from_str(include_str!("../../../tests/golden/beam_models.json")).expect("the recorded searches");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut checked = 0;
    for name in ["llama", "gpt2", "qwen2", "t5"] {
        let folders = [root.join("tests/golden/fixtures"), root.join("../shared/fixtures")];
        let Some(dir) = folders.iter().map(|f| f.join("models").join(name)).find(|dir| dir.is_dir()) else { continue };
        let base = Arc::new(Base::load(&dir, &LoadOptions::default()).expect("loads"));
        let cases: Vec<_> = recorded.iter().filter(|case| case["model"] == name).collect();
        let jobs: Vec<Job> = cases
            .iter()
            .map(|case| {
                let ids = |field: &str| -> Vec<u32> { serde_json::from_value(case[field].clone()).expect("ids") };
                let number = |field: &str| case[field].as_u64().expect("a number");
                let early_stopping = match &case["early_stopping"] {
                    serde_json::Value::Bool(true) => EarlyStopping::Full,
                    serde_json::Value::Bool(false) => EarlyStopping::Heuristic,
                    _ => EarlyStopping::Never,
                };
                let length_penalty = case["length_penalty"].as_f64().expect("a number") as f32;
                let beams = number("beams") as u32;
                let no_repeat_ngram_size = number("no_repeat_ngram_size") as u32;
                let work = Work::Generate(Generate {
                    sampling: Sampling { no_repeat_ngram_size, ..Sampling::default() },
                    max_new_tokens: number("max_new_tokens") as usize,
                    stop_tokens: ids("stop"),
                    logprobs: None,
                    beams: Some(Beams {
                        search: BeamParams { beams, length_penalty, early_stopping },
                        told: beams as usize,
                    }),
                    speculation: None,
                });
                match base.arch.decoder_start {
                    Some(start) if base.arch.is_encoder_decoder() => {
                        Job { source: ids("prompt"), ..Job::new(vec![start], work) }
                    }
                    _ => Job::new(ids("prompt"), work),
                }
            })
            .collect();
        let engine = Engine::new(&base, roomy());
        for (case, answer) in cases.iter().zip(engine.together(&jobs)) {
            let found = answer.found.as_ref().unwrap_or_else(|| panic!("{answer:?}"));
            let tokens: Vec<Vec<u32>> = serde_json::from_value(case["tokens"].clone()).expect("tokens");
            let scores: Vec<f32> = serde_json::from_value(case["scores"].clone()).expect("scores");
            let stop: Vec<u32> = serde_json::from_value(case["stop"].clone()).expect("ids");
            assert_eq!(found.len(), tokens.len());
            for (got, (tokens, score)) in found.iter().zip(tokens.iter().zip(&scores)) {
                let ended = got.reason == FinishReason::StopToken;
                let told = if ended { &tokens[..tokens.len() - 1] } else { &tokens[..] };
                assert_eq!(ended, tokens.last().is_some_and(|t| stop.contains(t)), "{case}");
                assert_eq!(got.tokens, told, "{case}");
                assert!((got.score - score).abs() < 1e-3 * (1.0 + score.abs()), "{case}: {}", got.score);
            }
            checked += 1;
        }
    }
    assert!(checked >= 12, "the committed models are there");
}
