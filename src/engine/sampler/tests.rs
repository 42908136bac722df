//! The laws of the sampler's filters.

use proptest::prelude::*;

use super::*;

const NONE: History<'static> = History { prompt: &[], output: &[] };

fn warm() -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::default() }
}

/// Every token that some random number reaches.
fn reachable(logits: &[f32], how: &Sampling) -> Vec<u32> {
    let (best, max) = scan(logits).expect("finite");
    let mut out: Vec<u32> = (0..20_000).map(|i| draw(logits, best, max, how, f64::from(i) / 20_000.0)).collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let w: Vec<f64> = logits.iter().map(|l| (f64::from(l - max) / f64::from(temperature)).exp()).collect();
    let sum: f64 = w.iter().sum();
    w.into_iter().map(|x| x / sum).collect()
}

/// Ids, likeliest first.
fn ranked(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| better(logits, a, b));
    ids
}

fn rows() -> impl Strategy<Value = Vec<f32>> {
    proptest::collection::vec(-4.0f32..4.0, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn greedy_takes_the_first_of_the_largest(logits in proptest::collection::vec(-3i8..3, 1..80), seed: u64) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        prop_assert_eq!(choose(&logits, NONE, &Sampling::default(), seed), Ok(ranked(&logits)[0]));
    }

    #[test]
    fn top_k_reaches_only_the_k_likeliest(logits in rows(), k in 1u32..50, t in 0.2f32..3.0) {
        let how = Sampling { top_k: k, temperature: t, ..warm() };
        let allowed = ranked(&logits).into_iter().take(k as usize).collect::<Vec<_>>();
        prop_assert!(reachable(&logits, &how).iter().all(|id| allowed.contains(id)));
    }

    #[test]
    fn top_p_reaches_only_the_smallest_set_with_that_mass(logits in rows(), p in 0.01f32..1.0, t in 0.2f32..3.0) {
        let probs = softmax(&logits, t);
        let mut sum = 0.0;
        let mut allowed = Vec::new();
        for id in ranked(&logits) {
            if sum >= f64::from(p) + 1e-9 {
                break;
            }
            sum += probs[id as usize];
            allowed.push(id);
        }
        let how = Sampling { top_p: p, temperature: t, ..warm() };
        prop_assert!(reachable(&logits, &how).iter().all(|id| allowed.contains(id)));
    }

    #[test]
    fn min_p_reaches_only_tokens_near_the_best(logits in rows(), min_p in 0.0f32..1.0, t in 0.2f32..3.0) {
        let probs = softmax(&logits, t);
        let best = probs.iter().copied().fold(0.0, f64::max);
        let how = Sampling { min_p, temperature: t, ..warm() };
        for id in reachable(&logits, &how) {
            prop_assert!(probs[id as usize] >= f64::from(min_p) * best * (1.0 - 1e-6));
        }
    }

    #[test]
    fn filters_together_never_leave_nothing(
        logits in rows(), k in 0u32..5, p in 0.0f32..1.0, min_p in 0.0f32..=1.0, t in 1e-30f32..100.0, seed: u64,
    ) {
        let how = Sampling { temperature: t, top_k: k, top_p: p, min_p, ..warm() };
        prop_assert!(choose(&logits, NONE, &how, seed).is_ok_and(|id| (id as usize) < logits.len()));
    }

    #[test]
    fn a_token_depends_on_seed_and_position_only(logits in rows(), seed: u64, len in 0usize..30) {
        let (a, b) = (vec![0; len], vec![1; len]);
        let one = choose(&logits, History { prompt: &a, output: &[] }, &warm(), seed);
        prop_assert_eq!(one, choose(&logits, History { prompt: &[], output: &b }, &warm(), seed));
    }

    #[test]
    fn log_probabilities_are_a_log_softmax(logits in rows(), n in 0usize..50) {
        let probs = softmax(&logits, 1.0);
        let (chosen, top) = logprobs(&logits, 0, n).expect("finite");
        prop_assert!((f64::from(chosen).exp() - probs[0]).abs() < 1e-5);
        let ids: Vec<u32> = top.iter().map(|t| t.0).collect();
        prop_assert_eq!(&ids[..], &ranked(&logits)[..n.min(logits.len())]);
        for (id, logprob) in top {
            prop_assert!((f64::from(logprob).exp() - probs[id as usize]).abs() < 1e-5);
        }
    }

    #[test]
    fn large_rows_take_the_same_nucleus_as_a_full_sort(seed: u64, p in 0.5f32..0.999) {
        let logits: Vec<f32> = (0..3000).map(|i| (uniform(seed, i) * 6.0) as f32).collect();
        let weight = |id: u32| f64::from(logits[id as usize]).exp();
        let mut fast: Vec<u32> = (0..3000).collect();
        keep_mass(&mut fast, f64::from(p), &logits, weight);
        let full = ranked(&logits);
        let target = f64::from(p) * full.iter().map(|&id| weight(id)).sum::<f64>();
        prop_assert_eq!(&fast[..], &full[..fast.len()]);
        let mass = |ids: &[u32]| ids.iter().map(|&id| weight(id)).sum::<f64>();
        prop_assert!(mass(&fast) >= target * (1.0 - 1e-9) && mass(&fast[..fast.len() - 1]) < target * (1.0 + 1e-9));
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [1.0, 0.0, 2.0, -1.0];
    let how = Sampling { temperature: 0.7, ..warm() };
    let mut counts = [0u32; 4];
    for seed in 0..40_000 {
        counts[choose(&logits, NONE, &how, seed).expect("finite") as usize] += 1;
    }
    for (count, p) in counts.iter().zip(softmax(&logits, 0.7)) {
        assert!((f64::from(*count) / 40_000.0 - p).abs() < 0.01, "{counts:?}");
    }
}

#[test]
fn uniform_numbers_are_even_over_seeds_and_positions() {
    let mean = |f: &dyn Fn(u64) -> f64| (0..50_000).map(f).sum::<f64>() / 50_000.0;
    assert!((mean(&|i| uniform(i, 3)) - 0.5).abs() < 0.01);
    assert!((mean(&|i| uniform(3, i)) - 0.5).abs() < 0.01);
    // neighbours (seed + i of continuation i) are independent
    let product = mean(&|i| (uniform(i, 0) - 0.5) * (uniform(i + 1, 0) - 0.5));
    assert!(product.abs() < 0.005, "{product}");
    assert_eq!(uniform(42, 7), uniform(42, 7));
}

#[test]
fn penalties_weaken_what_was_seen() {
    let history = History { prompt: &[0], output: &[1, 1] };
    let run = |how: &Sampling| {
        let mut logits = vec![2.0, 4.0, -1.0];
        penalise(&mut logits, history, how);
        logits
    };
    assert_eq!(run(&Sampling { repetition_penalty: 2.0, ..warm() }), vec![1.0, 2.0, -1.0]);
    assert_eq!(run(&Sampling { frequency_penalty: 0.5, ..warm() }), vec![2.0, 3.0, -1.0]);
    assert_eq!(run(&Sampling { presence_penalty: 0.5, ..warm() }), vec![2.0, 3.5, -1.0]);
    let how = Sampling { presence_penalty: 2.0, frequency_penalty: 1.0, ..Sampling::default() };
    assert_eq!(choose(&[2.0, 4.0, 1.0], history, &how, 0), Ok(0), "greedy sees penalties");
    let negative = History { prompt: &[2], output: &[9_999] };
    assert_eq!(choose(&[-3.0, -2.9, -2.0], negative, &Sampling { repetition_penalty: 2.0, ..how }, 0), Ok(1));
}

proptest! {
    #[test]
    fn no_run_comes_twice(logits in proptest::collection::vec(-1.0f32..1.0, 6), n in 1u32..5, cold: bool, seed: u64) {
        let how = Sampling { no_repeat_ngram_size: n, temperature: if cold { 0.0 } else { 1.0 }, ..Sampling::default() };
        let (prompt, n) = (vec![0u32, 1, 2], n as usize);
        let mut tokens = prompt.clone();
        for _ in 0..24 {
            let history = History { prompt: &prompt, output: &tokens[prompt.len()..] };
            let next = choose(&logits, history, &how, seed).unwrap();
            let repeats = |t: u32| {
                let whole = [tokens.as_slice(), &[t]].concat();
                whole.len() > n && whole[..whole.len() - 1].windows(n).any(|w| w == &whole[whole.len() - n..])
            };
            prop_assert!(!repeats(next) || (0..6).all(repeats), "{:?} {}", tokens, next);
            if cold {
                let allowed: Vec<u32> = (0..6).filter(|&t| !repeats(t)).collect();
                let best = ranked(&logits).into_iter().find(|t| allowed.is_empty() || allowed.contains(t));
                prop_assert_eq!(Some(next), best);
                // a beam names the same one first
                let found = candidates(&logits, history, &how, 2).unwrap();
                prop_assert_eq!((found[0].0, found.len()), (next, 2));
            }
            tokens.push(next);
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    for at in [0, 3, 16, 20] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 21];
            logits[at] = bad;
            assert_eq!(choose(&logits, NONE, &warm(), 1), Err(NonFinite));
            assert_eq!(logprobs(&logits, 0, 1), Err(NonFinite));
        }
    }
    assert_eq!(choose(&[f32::NEG_INFINITY; 3], NONE, &warm(), 1), Err(NonFinite));
    assert_eq!(choose(&[], NONE, &warm(), 1), Err(NonFinite));
    assert_eq!(choose(&[f32::NEG_INFINITY, 0.0], NONE, &warm(), 1), Ok(1), "a masked token is no error");
}

#[test]
fn top_k_and_top_p_agree_with_candles_sampler() {
    use candle_core::{Device, Tensor};
    use candle_transformers::generation::{LogitsProcessor, Sampling as Oracle};
    let logits: Vec<f32> = (0..50).map(|i| (uniform(9, i) * 5.0) as f32).collect();
    let tensor = Tensor::new(&logits[..], &Device::Cpu).expect("tensor");
    let cases = [
        (Oracle::TopK { k: 5, temperature: 0.8 }, Sampling { top_k: 5, temperature: 0.8, ..warm() }),
        (Oracle::TopP { p: 0.6, temperature: 1.3 }, Sampling { top_p: 0.6, temperature: 1.3, ..warm() }),
    ];
    for (oracle, how) in cases {
        let mut oracle = LogitsProcessor::from_sampling(1, oracle);
        let mut theirs = vec![0i32; 50];
        let mut ours = vec![0i32; 50];
        for seed in 0..4000 {
            theirs[oracle.sample(&tensor).expect("samples") as usize] += 1;
            ours[choose(&logits, NONE, &how, seed).expect("finite") as usize] += 1;
        }
        for (a, b) in theirs.iter().zip(&ours) {
            assert!((a - b).abs() < 200, "{theirs:?} {ours:?}");
        }
    }
}

#[test]
fn what_is_not_allowed_is_never_chosen_and_numbers_that_are_none_stay() {
    let mut allowed = TokenSet::default();
    [1, 3, 70].into_iter().for_each(|id| allowed.insert(id));
    let logits: Vec<f32> = (0..100u16).map(|i| f32::from(i * 37 % 100)).collect();
    let row = masked(&logits, &allowed);
    assert!((0..100).all(|i| row[i] == if [1, 3, 70].contains(&i) { logits[i] } else { f32::NEG_INFINITY }));
    assert_eq!(choose(&row, NONE, &Sampling::default(), 1), Ok(70));
    let seen: std::collections::BTreeSet<u32> = (0..3000)
        .map(|seed| choose(&row, NONE, &Sampling { temperature: 80.0, top_k: 50, top_p: 0.999, ..warm() }, seed))
        .map(|id| id.expect("finite"))
        .collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 3, 70]);
    let history = History { prompt: &[1, 3], output: &[70, 70] };
    let penalised = Sampling { frequency_penalty: 2.0, repetition_penalty: 90.0, no_repeat_ngram_size: 1, ..warm() };
    assert!((0..300).all(|seed| choose(&row, history, &penalised, seed).is_ok_and(|id| allowed.contains(id))));
    for sick in [f32::NAN, f32::INFINITY] {
        let mut logits = logits.clone();
        logits[50] = sick;
        assert_eq!(choose(&masked(&logits, &allowed), NONE, &Sampling::default(), 1), Err(NonFinite));
    }
    assert_eq!(choose(&masked(&logits, &TokenSet::default()), NONE, &Sampling::default(), 1), Err(NonFinite));
}
