//! Shared pages: who finds what is exactly known, and nobody's answer depends on it.

use super::*;
use crate::{
    admission::params::{BeamParams, EarlyStopping},
    delta::{DeltaBatch, Prefix, PrefixForm, Proj, Prompt, PromptStage, Site, SiteId, Stack},
    model::{
        Input,
        testing::{tiny_gpt2, tiny_llama, tiny_t5},
    },
    nn::Cx,
    rows::RowLayout,
};

type Held = Option<(DeltaId, Arc<Delta>)>;

/// Each in an engine that keeps nothing and does nothing else.
fn alone(base: &Arc<Base>, jobs: &[Job]) -> Vec<Answer> {
    let engine = Engine::new(base, EngineConfig { prefix_cache: false, ..roomy() });
    let answers: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
    assert!(answers.iter().all(|a| a.failed.is_none()));
    assert_eq!((engine.handle.stats().cache_hits, engine.handle.stats().cache_misses), (0, 0));
    answers
}

/// One after the other.
fn in_turn(engine: &Engine, jobs: &[Job]) -> Vec<Answer> {
    jobs.iter().map(|job| Answer::read(engine.submit(job))).collect()
}

fn cached(answers: &[Answer]) -> Vec<u32> {
    answers.iter().map(Answer::cached).collect()
}

/// Forty tokens that many prompts begin with, and some of its own.
fn text(n: u64, len: usize) -> Vec<u32> {
    [prompt(1000, 40), prompt(n, len - 40)].concat()
}

fn prefix(base: &Base, n: u8, keys: usize, stack: Stack) -> Vec<(SiteId, Patch)> {
    let mut rng = Rng(u64::from(n) * 53 + 11);
    let form = if stack == Stack::Main { PrefixForm::Context } else { PrefixForm::Pinned };
    let sites = base.sites.prefix_sites(stack).into_iter();
    sites
        .map(|(site, width)| {
            let (k, v) = (tensor(&mut rng, &[keys, width], 1.0), tensor(&mut rng, &[keys, width], 1.0));
            (site, Patch::Prefix(Prefix { k, v, form, stack }))
        })
        .collect()
}

fn virtual_rows(base: &Base, n: u8, rows: usize) -> (SiteId, Patch) {
    let rows = tensor(&mut Rng(u64::from(n) * 59 + 13), &[rows, base.arch.hidden], 0.5);
    let prompt = Prompt { rows, stage: PromptStage::Tokens, stack: Stack::Main };
    (base.sites.id(Site::Embedding).expect("site"), Patch::Prompt(prompt))
}

fn held(n: u8, patches: Vec<(SiteId, Patch)>) -> Held {
    Some((DeltaId::from_bytes([n; 32]), Arc::new(Delta::new(spec(Task::CausalLm), patches, None))))
}

fn sampled(seed: u64, max_new_tokens: usize) -> Work {
    let sampling = Sampling { temperature: 1.2, top_k: 40, seed: Some(seed), ..Sampling::default() };
    Work::Generate(Generate {
        sampling,
        max_new_tokens,
        stop_tokens: vec![],
        logprobs: Some(0),
        beams: None,
        speculation: None,
    })
}

fn search(beams: u32, max_new_tokens: usize) -> Work {
    let search = BeamParams { beams, length_penalty: 1.0, early_stopping: EarlyStopping::Heuristic };
    let beams = Some(Beams { search, told: beams as usize });
    let sampling = Sampling::default();
    Work::Generate(Generate { sampling, max_new_tokens, stop_tokens: vec![], logprobs: None, beams, speculation: None })
}

#[test]
fn a_mixed_batch_of_shared_beginnings_says_what_each_says_alone_and_finds_what_is_its_own() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let [first, second] = [delta(&base, 1, 0), delta(&base, 2, 0)];
        let earlier = [
            Job::new(text(1, 45), greedy(12)).of("a"),
            Job::new(text(2, 45), greedy(12)).of("a").with(&first),
            Job::new(text(3, 45), greedy(12)).of("b").with(&first),
        ];
        let before = alone(&base, &earlier);
        // a conversation goes on behind what was said
        let said = [earlier[1].tokens.clone(), before[1].ids(), prompt(77, 7)].concat();
        let cases = [
            (Job::new(text(4, 60), greedy(20)).of("a"), 32),
            (Job::new(text(5, 41), greedy(20)).of("a"), 32),
            (Job::new(text(1, 45), greedy(20)).of("a"), 32),
            (Job::new(text(6, 60), greedy(20)).of("a").with(&first), 32),
            (Job::new(said, sampled(3, 20)).of("a").with(&first), 48),
            // another delta, another tenant, another beginning: nothing
            (Job::new(text(7, 60), greedy(20)).of("a").with(&second), 0),
            (Job::new(text(8, 60), greedy(20)).of("b"), 0),
            (Job::new(prompt(9, 60), greedy(20)).of("a"), 0),
            // the same delta of another tenant: its own
            (Job::new(text(2, 45), greedy(20)).of("b").with(&first), 32),
            (Job { tenant: None, ..Job::new(text(1, 45), greedy(20)) }, 0),
        ];
        let (jobs, found): (Vec<Job>, Vec<u32>) = cases.into_iter().unzip();
        let expected = alone(&base, &jobs);
        let narrow =
            EngineConfig { max_batch_tokens: 16, max_sequences: 5, max_deltas: 1, prefill_chunk: 7, ..roomy() };
        for config in [roomy(), narrow] {
            let engine = Engine::new(&base, config);
            assert_same(&in_turn(&engine, &earlier), &before);
            engine.settle();
            let stats = engine.handle.stats();
            assert_eq!((stats.cache_hits, stats.cache_misses), (0, 3 * 45));
            assert_eq!(stats.pages_cached, 3 * 3, "45 + 12 - 1 positions have three whole pages");
            let answers = engine.together(&jobs);
            assert_same(&answers, &expected);
            assert_eq!(cached(&answers), found);
            engine.settle();
            let after = engine.handle.stats();
            let shared: usize = jobs.iter().filter(|j| j.tenant.is_some()).map(|j| j.tokens.len()).sum();
            let hits = u64::from(found.iter().sum::<u32>());
            assert_eq!(after.cache_hits, hits);
            assert_eq!(after.cache_misses - stats.cache_misses, shared as u64 - hits);
            assert_eq!((after.cache_evictions, after.preemptions), (0, 0));
        }
    }
}

#[test]
fn the_last_token_of_a_prompt_is_always_computed() {
    let base = base(&tiny_llama());
    for (len, found) in [(1, 0), (15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32)] {
        let engine = Engine::new(&base, roomy());
        let job = Job::new(prompt(3, len), greedy(5));
        let answers = in_turn(&engine, &[job.clone(), job]);
        assert_eq!(cached(&answers), [0, found], "of {len}");
        assert_same(&answers[..1], &answers[1..]);
    }
}

#[test]
fn a_seed_says_the_same_behind_cached_pages() {
    let base = base(&tiny_gpt2());
    let jobs: Vec<Job> = (0..4).map(|seed| Job::new(prompt(5, 50), sampled(seed, 25))).collect();
    let expected = alone(&base, &jobs);
    assert_ne!(expected[0].ids(), expected[1].ids());
    let engine = Engine::new(&base, roomy());
    let first = in_turn(&engine, &jobs);
    assert_eq!(cached(&first), [0, 48, 48, 48]);
    assert_same(&first, &expected);
    let again = engine.together(&jobs);
    assert_eq!(cached(&again), [48; 4]);
    assert_same(&again, &expected);
}

#[test]
fn cached_pages_make_room_before_anybody_waits_or_loses_pages() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { kv_pages: 8, ..roomy() });
    let small: Vec<Job> = (0..4).map(|n| Job::new(prompt(n, 30), greedy(3))).collect();
    in_turn(&engine, &small);
    engine.settle();
    assert_eq!(engine.handle.stats().pages_cached, 8, "30 + 3 - 1 positions have two whole pages");
    // two that fill the cache between them, then one that fills it alone
    let two: Vec<Job> = (10..12).map(|n| Job::new(prompt(n, 33), greedy(32))).collect();
    let whole = [Job::new(prompt(20, 100), greedy(28))];
    assert_same(&engine.together(&two), &alone(&base, &two));
    assert_same(&engine.together(&whole), &alone(&base, &whole));
    engine.settle();
    let stats = engine.handle.stats();
    assert_eq!((stats.preemptions, stats.cache_hits), (0, 0));
    assert_eq!(
        (stats.pages_cached, stats.cache_evictions),
        (7, 16),
        "all pages changed hands twice, and the last one is not whole"
    );
    // what was used last was kept
    assert_eq!(cached(&in_turn(&engine, &whole)), [96]);
}

#[test]
fn a_sequence_that_loses_its_pages_goes_on_behind_those_that_are_left() {
    let base = base(&tiny_llama());
    let with = delta(&base, 1, 0);
    let work = |n: u64| if n.is_multiple_of(2) { greedy(60) } else { sampled(n, 60) };
    let jobs: Vec<Job> = (0..6).map(|n| Job::new(prompt(7, 20), work(n)).with(&with)).collect();
    let expected = alone(&base, &jobs);
    for prefill_chunk in [9, 256] {
        let engine = Engine::new(&base, EngineConfig { kv_pages: 12, prefill_chunk, ..roomy() });
        let answers = engine.together(&jobs);
        assert_same(&answers, &expected);
        engine.settle();
        let stats = engine.handle.stats();
        assert!(stats.preemptions > 0, "12 pages cannot hold six sequences of five pages");
        assert!(stats.cache_hits > 0, "the first page is everybody's");
        assert_eq!(cached(&answers), [0; 6], "what a sequence finds of its own is no saving of the client's");
    }
}

#[test]
fn beams_begin_behind_cached_pages_and_write_to_none() {
    let base = base(&tiny_llama());
    let with = delta(&base, 1, 0);
    let jobs: Vec<Job> = [search(4, 20), search(2, 30), greedy(20), search(3, 12)]
        .into_iter()
        .zip(1..)
        .map(|(work, n)| Job::new(text(n, 50), work).with(&with))
        .collect();
    let expected = alone(&base, &jobs);
    let same = |a: &[Answer]| {
        assert_same(a, &expected);
        for (a, b) in a.iter().zip(&expected) {
            let told = |a: &Answer| -> Vec<Vec<u32>> { a.found.iter().flatten().map(|f| f.tokens.clone()).collect() };
            assert_eq!(told(a), told(b));
        }
    };
    let engine = Engine::new(&base, roomy());
    let first = in_turn(&engine, &jobs);
    same(&first);
    assert_eq!(cached(&first), [0, 32, 32, 32]);
    // whatever the beams wrote, the pages that they read are what they were
    let again = engine.together(&jobs);
    same(&again);
    assert_eq!(cached(&again), [48; 4]);
    engine.settle();
    let tight = Engine::new(&base, EngineConfig { kv_pages: 24, ..roomy() });
    same(&tight.together(&jobs));
    tight.settle();
}

#[test]
fn a_prefix_is_there_once_for_all_requests_of_its_delta() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let with = held(41, prefix(&base, 1, 40, Stack::Main));
        let others = [held(42, prefix(&base, 2, 5, Stack::Main)), delta(&base, 1, 0), None];
        // none of these fills a page of its own
        let jobs: Vec<Job> = (0..8).map(|n| Job::new(prompt(n, 5), greedy(10)).with(&with)).collect();
        let mut all = jobs.clone();
        all.extend(others.iter().map(|other| Job::new(prompt(9, 5), greedy(10)).with(other)));
        let expected = alone(&base, &all);
        for prefix_cache in [true, false] {
            let engine = Engine::new(&base, EngineConfig { prefix_cache, ..roomy() });
            assert_same(&engine.together(&all), &expected);
            engine.settle();
            assert_eq!(engine.handle.stats().pages_cached, 3 + 1, "40 keys and 5");
            assert_same(&in_turn(&engine, &all), &expected);
            engine.settle();
            assert_eq!(engine.handle.stats().pages_cached, 3 + 1);
        }
        // beside those of eight sequences, there is no room for the keys of two
        let tight = Engine::new(&base, EngineConfig { kv_pages: 3 + 8, ..roomy() });
        assert_same(&tight.together(&jobs), &expected[..8]);
        tight.settle();
        assert_eq!((tight.handle.stats().steps, tight.handle.stats().preemptions), (10, 0), "all at once");
        // another tenant has its own
        let engine = Engine::new(&base, roomy());
        in_turn(&engine, &[jobs[0].clone(), jobs[1].clone().of("other")]);
        engine.settle();
        assert_eq!(engine.handle.stats().pages_cached, 2 * 3);
    }
}

#[test]
fn a_decoders_prefix_is_shared_behind_an_encoder_and_its_rows_are_not() {
    let base = base(&tiny_t5());
    let patches = [prefix(&base, 1, 20, Stack::Main), prefix(&base, 2, 3, Stack::Memory)].concat();
    let with = held(43, patches);
    let job = |n: u64| Job { source: prompt(n, 20), ..Job::new(vec![0], greedy(40)) }.with(&with);
    let jobs: Vec<Job> = (0..5).map(job).collect();
    let expected = alone(&base, &jobs);
    let engine = Engine::new(&base, roomy());
    for answers in [engine.together(&jobs), in_turn(&engine, &jobs)] {
        assert_same(&answers, &expected);
        assert_eq!(cached(&answers), [0; 5]);
    }
    engine.settle();
    assert_eq!(engine.handle.stats().pages_cached, 2);
}

#[test]
fn rows_behind_virtual_positions_are_found_and_counted_as_tokens() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let lora = delta(&base, 3, 0).map(|(_, d)| d.patches().to_vec()).expect("delta");
        let kinds = [
            // of 20 + 30 rows, 48 are whole pages
            (held(44, vec![virtual_rows(&base, 1, 20)]), 28),
            (held(45, [lora.clone(), vec![virtual_rows(&base, 2, 3)]].concat()), 29),
            (held(46, [lora, prefix(&base, 3, 17, Stack::Main)].concat()), 16),
            (held(47, [vec![virtual_rows(&base, 4, 40)], prefix(&base, 4, 2, Stack::Main)].concat()), 24),
        ];
        for (with, found) in &kinds {
            let jobs: Vec<Job> = (0..2).map(|_| Job::new(prompt(1, 30), greedy(20)).with(with)).collect();
            let expected = alone(&base, &jobs);
            let narrow = EngineConfig { max_batch_tokens: 24, prefill_chunk: 5, ..roomy() };
            for config in [roomy(), narrow] {
                let engine = Engine::new(&base, config);
                let answers = in_turn(&engine, &jobs);
                assert_same(&answers, &expected);
                assert_eq!(cached(&answers), [0, *found]);
                assert_eq!(engine.handle.stats().cache_misses, u64::from(60 - found));
            }
        }
    }
}

#[test]
fn a_delta_that_acts_behind_all_keys_shares_the_bases() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let last = base.arch.layers - 1;
        let low = |n: u8, sites: &[Site]| -> Vec<(SiteId, Patch)> {
            let mut rng = Rng(u64::from(n) * 61 + 17);
            let of = |site: &Site| {
                let id = base.sites.id(*site).expect("site");
                let entry = base.sites.get(id).expect("entry");
                let (a, b) = (tensor(&mut rng, &[3, entry.in_dim], 0.5), tensor(&mut rng, &[3, entry.out_dim], 0.5));
                (id, Patch::LowRank(LowRank { a, b, scale: 1.0 }))
            };
            sites.iter().map(of).collect()
        };
        let at = |layer, proj| Site::Linear { layer, proj };
        let tail = held(51, low(1, &[at(last, Proj::O), at(last, Proj::Down)]));
        let earlier = held(52, low(2, &[at(last, Proj::Down), at(last - 1, Proj::Down)]));
        let keeps = |with: &Held| with.as_ref().is_some_and(|(_, delta)| delta.keeps_keys(&base.sites));
        assert!(keeps(&tail) && !keeps(&earlier) && !keeps(&delta(&base, 1, 0)));
        assert!(!keeps(&held(53, prefix(&base, 1, 3, Stack::Main))));
        assert!(!keeps(&held(54, vec![virtual_rows(&base, 1, 3)])));
        let jobs: Vec<Job> =
            [None, tail, earlier].iter().map(|with| Job::new(prompt(4, 40), greedy(20)).with(with)).collect();
        let expected = alone(&base, &jobs);
        assert!(expected[0].ids() != expected[1].ids() && expected[0].ids() != expected[2].ids());
        let engine = Engine::new(&base, roomy());
        let answers = in_turn(&engine, &jobs);
        assert_same(&answers, &expected);
        assert_eq!(cached(&answers), [0, 32, 0]);
    }
}

#[test]
fn work_that_needs_all_rows_skips_none() {
    let base = base(&tiny_llama());
    let with = delta(&base, 2, 3);
    let works = [
        Work::Score { from: 1 },
        Work::Score { from: 40 },
        Work::Classify,
        Work::ClassifyTokens,
        Work::Embed { pooling: Pooling::Mean, normalize: false },
        Work::Embed { pooling: Pooling::Cls, normalize: false },
        Work::Embed { pooling: Pooling::Last, normalize: true },
    ];
    let jobs: Vec<Job> = works.into_iter().map(|work| Job::new(prompt(6, 50), work).with(&with)).collect();
    let expected = alone(&base, &jobs);
    let engine = Engine::new(&base, roomy());
    let told = in_turn(&engine, &[Job::new(prompt(6, 50), greedy(4)).with(&with)]);
    assert_same(&in_turn(&engine, &jobs), &expected);
    assert_same(&engine.together(&jobs), &expected);
    engine.settle();
    let stats = engine.handle.stats();
    assert_eq!((told[0].cached(), stats.cache_hits, stats.cache_misses, stats.pages_cached), (0, 0, 50, 3));
}

#[test]
fn without_the_cache_or_a_tenant_nothing_is_kept() {
    let base = base(&tiny_llama());
    let job = Job::new(prompt(6, 50), greedy(4));
    let private = Job { tenant: None, ..job.clone() };
    let off = EngineConfig { prefix_cache: false, ..roomy() };
    for (config, job) in [(off, job), (roomy(), private)] {
        let engine = Engine::new(&base, config);
        let answers = in_turn(&engine, &[job.clone(), job]);
        assert_eq!(cached(&answers), [0, 0]);
        assert_same(&answers[..1], &answers[1..]);
        engine.settle();
        let stats = engine.handle.stats();
        assert_eq!((stats.pages_cached, stats.cache_hits, stats.cache_misses), (0, 0, 0));
    }
}

#[test]
fn a_step_that_fails_leaves_nothing_to_be_found() {
    let base = base(&tiny_llama());
    let mut rng = Rng(1);
    let site = base.sites.linears().next().expect("a linear").0;
    let misfit = LowRank { a: tensor(&mut rng, &[2, 5], 1.0), b: tensor(&mut rng, &[2, 3], 1.0), scale: 1.0 };
    let with = held(48, [vec![(site, Patch::LowRank(misfit))], prefix(&base, 1, 40, Stack::Main)].concat());
    let engine = Engine::new(&base, roomy());
    let answer = Answer::read(engine.submit(&Job::new(prompt(1, 40), greedy(8)).with(&with)));
    assert!(matches!(answer.failed, Some(EngineError::Internal(_))), "{answer:?}");
    engine.settle();
    assert_eq!(engine.handle.stats().pages_cached, 0);
}

/// What lies in a prefix's slots is what is read, and it is written only where a row layout says so.
#[test]
fn keys_that_are_there_are_read_as_they_lie() {
    let base = base(&tiny_llama());
    let Some((_, with)) = held(49, prefix(&base, 1, 5, Stack::Main)) else { unreachable!() };
    let (tokens, ahead) = (prompt(2, 7), with.ahead());
    let kv = KvCache::new(base.arch.layers, 64, base.arch.kv_width(), base.dtype, &base.device).expect("a cache");
    let last = |slots: std::ops::Range<u32>, keys: std::ops::Range<u32>, keys_due: bool| -> Vec<f32> {
        let mut rows = RowLayout::default();
        rows.push_shared(ahead, tokens.len(), 0, keys.chain(slots).collect(), keys_due);
        let deltas = DeltaBatch::single(Arc::clone(&with), &rows, base.sites.len());
        let cx = Cx { kv: Some(&kv), ..Cx::new(&rows, &deltas) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("runs");
        let logits = base.transformer.logits(&hidden, &rows.last_rows(), &cx).expect("head");
        logits.flatten_all().and_then(|t| t.to_vec1()).expect("numbers")
    };
    let nothing_there = last(16..23, 0..5, false);
    let written = last(16..23, 0..5, true);
    assert_eq!(last(32..39, 0..5, false), written, "another sequence finds them");
    assert!(nothing_there.iter().zip(&written).any(|(a, b)| (a - b).abs() > 1e-3), "and reads nothing else");
}

#[test]
fn a_damaged_cache_is_found_and_emptied_and_nobody_notices() {
    let base = base(&tiny_llama());
    let jobs = [Job::new(prompt(6, 50), greedy(8)), Job::new(prompt(7, 5), greedy(3))];
    let mut engine = Engine::new(&base, EngineConfig { kv_pages: 16, ..roomy() });
    let expected = in_turn(&engine, &jobs);
    let damages: [fn(&mut Scheduler, &mut Stepper); 3] = [
        // a page that can be found is written: its first position gets the numbers of one that was never used
        |_, stepper| stepper.copy(&[16 * PAGE_SIZE as u32 - 1], &[0]).expect("copied"),
        // a page is held by nobody
        |scheduler, _| scheduler.lose_a_page(),
        // what a page held is remembered as something else
        |scheduler, _| (0..3).for_each(|page| scheduler.seal(page, 1)),
    ];
    for damage in damages {
        engine.settle();
        assert_eq!(engine.handle.stats().pages_cached, 3);
        engine.meddle(damage);
        engine.settle();
        let stats = engine.handle.stats();
        assert_eq!((stats.pages_cached, stats.pages_used), (0, 0));
        let answers = in_turn(&engine, &jobs);
        assert_same(&answers, &expected);
        assert_eq!(cached(&answers), [0, 0], "it was computed again");
    }
    assert_eq!(cached(&in_turn(&engine, &jobs[..1])), [48]);
}
