//! Merges against PEFT's own results (DARE: with what PEFT drew), and the laws of sums.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::delta::{Affine, Head, Proj, Site, SiteEntry, Task};

fn table(dims: &[(usize, usize)]) -> SiteTable {
    let mut t = SiteTable::default();
    for (layer, (i, o)) in dims.iter().enumerate() {
        t.push(SiteEntry {
            site: Site::Linear { layer, proj: Proj::Q },
            module: format!("layers.{layer}.q"),
            in_dim: *i,
            out_dim: *o,
            has_bias: false,
        });
    }
    t
}

fn delta_of(patches: Vec<(SiteId, Patch)>, head: Option<Head>) -> Delta {
    let spec = DeltaSpec {
        methods: vec!["lora".into()],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    Delta::new(spec, patches, head)
}

fn source<'a>(name: &'a str, delta: &'a Delta, weight: f64) -> Source<'a> {
    Source { name, delta, weight }
}

fn random(rng: &mut StdRng, shape: (usize, usize)) -> Tensor {
    let data: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn lora(rng: &mut StdRng, dims: &[(usize, usize)], rank: usize, scale: f64) -> Delta {
    let pair = |(site, (i, o)): (usize, &(usize, usize)), rng: &mut StdRng| {
        let low = LowRank { a: random(rng, (rank, *i)), b: random(rng, (rank, *o)), scale };
        (site, Patch::LowRank(low))
    };
    delta_of(dims.iter().enumerate().map(|d| pair(d, rng)).collect(), None)
}

fn low(delta: &Delta, site: SiteId) -> &LowRank {
    match delta.patches().iter().find(|(s, _)| *s == site) {
        Some((_, Patch::LowRank(l))) => l,
        other => panic!("{other:?}"),
    }
}

fn merge(sources: &[Source<'_>], method: Method, sites: &SiteTable) -> Result<Delta, MergeError> {
    super::merge(sources, method, sites, &|| false)
}

/// `[in, out]`.
fn update(l: &LowRank) -> Tensor {
    (l.a.t().unwrap().matmul(&l.b).unwrap() * l.scale).unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn merges_are_those_of_peft() {
    let bytes = include_bytes!("../../tests/golden/fixtures/merges/peft.safetensors");
    let all: HashMap<String, Tensor> = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap();
    let modules = ["first", "second"];
    let sites = table(&[(12, 10), (10, 9)]);
    let get = |key: &str, module: &str| -> Option<(Tensor, Tensor)> {
        let a = all.get(&format!("{key}.{module}.a"))?.clone();
        Some((a, all[&format!("{key}.{module}.b")].t().unwrap().contiguous().unwrap()))
    };
    let input = |name: &str| {
        let scale = f64::from(all[&format!("scale.{name}")].to_vec1::<f32>().unwrap()[0]);
        let pairs = modules.iter().enumerate().filter_map(|(site, m)| {
            get(&format!("in.{name}"), m).map(|(a, b)| (site, Patch::LowRank(LowRank { a, b, scale })))
        });
        delta_of(pairs.collect(), None)
    };
    let (x, y, z) = (input("x"), input("y"), input("z"));
    let sign = MajoritySign::Total;
    let methods = [
        ("linear", Method::Linear),
        ("cat", Method::Cat),
        ("svd", Method::Svd { rank: None }),
        ("svd8", Method::Svd { rank: Some(8) }),
        ("ties", Method::Ties { density: 0.5, sign }),
        ("ties_frequency", Method::Ties { density: 0.3, sign: MajoritySign::Frequency }),
        ("magnitude_prune", Method::MagnitudePrune { density: 0.5 }),
        ("dare_linear", Method::DareLinear { density: 0.6, seed: 1 }),
        ("dare_ties", Method::DareTies { density: 0.6, seed: 1, sign }),
    ];
    let check = |name: String, merged: &Delta, updates_only: bool| {
        for (site, module) in modules.iter().enumerate() {
            let (a, b) = get(&format!("out.{name}"), module).unwrap();
            let (got, want) = (low(merged, site), LowRank { a, b, scale: 1.0 });
            assert!(far(&update(got), &update(&want)) < 1e-4, "{name} {module}");
            if !updates_only {
                assert!(far(&got.a, &want.a) < 1e-5 && far(&got.b, &want.b) < 1e-5, "{name} {module}");
            }
        }
    };
    for (set, weights) in [("plain", [0.7, 0.3]), ("negative", [1.2, -0.5])] {
        for (case, method) in methods {
            let sources = [source("x", &x, weights[0]), source("y", &y, weights[1])];
            // what PEFT drew
            let mask = |site: usize, side: &str, delta: &str| {
                let mask = all.get(&format!("mask.{case}_{set}.{}.{delta}.{side}", modules[site]))?;
                let mask = if side == "b" { mask.t().unwrap() } else { mask.clone() };
                Some(mask.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            };
            let order =
                (0..2).flat_map(|site| [(site, "a", "x"), (site, "a", "y"), (site, "b", "x"), (site, "b", "y")]);
            let drawn: Vec<f32> = order.filter_map(|(site, side, delta)| mask(site, side, delta)).flatten().collect();
            assert_eq!(drawn.is_empty(), !case.starts_with("dare"), "{case}");
            let mut drawn = drawn.into_iter();
            let mut keep = || drawn.next().expect("as many draws") == 1.0;
            let merged = merge_with(&sources, method, &sites, &|| false, &mut keep).unwrap();
            assert_eq!(drawn.next(), None, "{case}: every draw is used");
            // singular vectors are theirs up to a sign
            check(format!("{case}_{set}"), &merged, case.starts_with("svd"));
        }
    }
    for (case, method) in [methods[0], methods[4]] {
        let merged = merge(&[source("x", &x, 0.5), source("z", &z, 0.8)], method, &sites).unwrap();
        check(format!("{case}_some"), &merged, false);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn cat_compose_and_svd_at_full_rank_are_the_weighted_sum(
        seed in 0u64..1000, inputs in 1usize..14, outputs in 1usize..14, ra in 1usize..6, rb in 1usize..6,
        wa in -2.0f64..2.0, wb in -2.0f64..2.0,
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let dims = [(inputs, outputs)];
        let (x, y) = (lora(&mut rng, &dims, ra, 0.7), lora(&mut rng, &dims, rb, 2.0));
        let sources = [source("x", &x, wa), source("y", &y, wb)];
        let want = ((update(low(&x, 0)) * wa).unwrap() + (update(low(&y, 0)) * wb).unwrap()).unwrap();
        let sites = table(&dims);
        let full = Method::Svd { rank: Some(ra + rb) };
        for merged in [
            merge(&sources, Method::Cat, &sites).unwrap(),
            merge(&sources, full, &sites).unwrap(),
            compose(&sources, &sites).unwrap(),
        ] {
            let off = far(&update(low(&merged, 0)), &want);
            prop_assert!(off < 2e-5 * (1.0 + (ra + rb) as f32), "{off}");
        }
    }
}

#[test]
fn svd_is_the_best_of_its_rank() {
    let mut rng = StdRng::seed_from_u64(4);
    let dims = [(20, 16)];
    let (x, y) = (lora(&mut rng, &dims, 4, 1.0), lora(&mut rng, &dims, 4, 1.0));
    let sources = [source("x", &x, 1.0), source("y", &y, 0.5)];
    let sites = table(&dims);
    let whole = update(low(&merge(&sources, Method::Cat, &sites).unwrap(), 0));
    let missed = |rank| {
        let merged = merge(&sources, Method::Svd { rank: Some(rank) }, &sites).unwrap();
        let b = &low(&merged, 0).b;
        let values = b.sqr().unwrap().sum(1).unwrap().to_vec1::<f32>().unwrap();
        assert!(values.windows(2).all(|w| w[0] >= w[1]), "singular values fall: {values:?}");
        let left = (&whole - update(low(&merged, 0))).unwrap();
        (left.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), values)
    };
    let (nothing, values) = missed(8);
    assert!(nothing < 1e-8);
    let (left, _) = missed(3);
    let want: f32 = values[3..].iter().sum();
    assert!((left - want).abs() < 1e-3 * want, "{left} and {want}");
}

#[test]
fn a_decomposition_ends_in_the_middle_of_a_site_where_nobody_waits() {
    let mut rng = StdRng::seed_from_u64(4);
    let dims = [(40, 30)];
    let (x, y) = (lora(&mut rng, &dims, 8, 1.0), lora(&mut rng, &dims, 8, 1.0));
    let sources = [source("x", &x, 1.0), source("y", &y, 0.5)];
    let asked = std::cell::Cell::new(0);
    let merged = |most: usize| {
        asked.set(0);
        let stop = || {
            asked.set(asked.get() + 1);
            asked.get() > most
        };
        super::merge(&sources, Method::Svd { rank: Some(3) }, &table(&dims), &stop)
    };
    assert!(merged(usize::MAX).is_ok());
    let all = asked.get();
    assert!(all > 1 + 16 + 16 + 2 * 16, "a row of either factor, and each row of some sweeps: {all}");
    for most in [1, 20, 40, all - 1] {
        assert!(matches!(merged(most), Err(MergeError::Stopped)));
        assert_eq!(asked.get(), most + 1, "at once");
    }
}

#[test]
fn what_cannot_be_merged_is_named() {
    let mut rng = StdRng::seed_from_u64(1);
    let dims = [(6, 5), (5, 4)];
    let sites = table(&dims);
    let (x, y) = (lora(&mut rng, &dims, 2, 1.0), lora(&mut rng, &dims, 3, 1.0));
    let says = |sources: &[Source<'_>], method: Method| merge(sources, method, &sites).unwrap_err().to_string();
    let both = [source("x@1", &x, 1.0), source("y@2", &y, 1.0)];
    let message = says(&both, Method::Linear);
    assert!(message.contains("x@1 has rank 2") && message.contains("y@2 has rank 3"), "{message}");
    assert!(merge(&both, Method::Cat, &sites).is_ok() && merge(&both, Method::Svd { rank: None }, &sites).is_ok());
    let mut patches = x.patches().to_vec();
    patches.push((1, Patch::Bias(Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap())));
    let biased = delta_of(patches, None);
    let message = says(&[source("x", &x, 1.0), source("b", &biased, 1.0)], Method::Linear);
    assert!(message.contains("b has a bias at layers.1.q"), "{message}");
    let headed = delta_of(x.patches().to_vec(), Some(Head::linear(random(&mut rng, (2, 4)), None)));
    assert!(says(&[source("x", &x, 1.0), source("h", &headed, 1.0)], Method::Cat).contains("h has a head"));
    assert!(says(&both[..1], Method::Cat).contains("at least two"));
}

#[test]
fn a_composition_sums_what_adds_up_and_takes_the_rest_from_one() {
    let mut rng = StdRng::seed_from_u64(2);
    let dims = [(6, 5), (5, 4)];
    let sites = table(&dims);
    let bias = |v: f32| Patch::Bias(Tensor::full(v, 5, &Device::Cpu).unwrap());
    let x = delta_of(vec![(0, bias(1.0))], None);
    let y = delta_of(vec![(0, bias(4.0))], None);
    let sum = compose(&[source("x", &x, 0.5), source("y", &y, -0.25)], &sites).unwrap();
    let [(0, Patch::Bias(b))] = sum.patches() else { panic!("one bias") };
    assert_eq!(b.to_vec1::<f32>().unwrap(), [-0.5; 5]);
    let gain = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap();
    let norm = delta_of(vec![(1, Patch::Affine(Affine { gain, bias: None, center: true, eps: 1e-5 }))], None);
    let sum = compose(&[source("x", &x, 0.5), source("n", &norm, 1.0)], &sites).unwrap();
    assert_eq!(sum.patches().len(), 2);
    let says = |sources: &[Source<'_>]| compose(sources, &sites).unwrap_err().to_string();
    assert!(says(&[source("x", &x, 1.0), source("n", &norm, 0.5)]).contains("n has a whole norm at layers.1.q"));
    assert!(says(&[source("m", &norm, 1.0), source("n", &norm, 1.0)]).contains("does not add up with n"));
    let headed = |rng: &mut StdRng| delta_of(vec![(0, bias(1.0))], Some(Head::linear(random(rng, (2, 4)), None)));
    let (h, i) = (headed(&mut rng), headed(&mut rng));
    assert!(says(&[source("h", &h, 1.0), source("i", &i, 1.0)]).contains("both have a head"));
    assert!(says(&[source("h", &h, 0.5), source("x", &x, 1.0)]).contains("cannot be weighted"));
    assert!(compose(&[source("h", &h, 1.0), source("x", &x, 0.5)], &sites).unwrap().head().is_some());
}

#[test]
fn dare_means_what_linear_says_and_the_seed_decides() {
    let mut rng = StdRng::seed_from_u64(6);
    let dims = [(8, 6)];
    let sites = table(&dims);
    let (x, y) = (lora(&mut rng, &dims, 2, 0.5), lora(&mut rng, &dims, 2, 1.5));
    let sources = [source("x", &x, 0.7), source("y", &y, -0.3)];
    let dare = |seed| merge(&sources, Method::DareLinear { density: 0.4, seed }, &sites).unwrap();
    let linear = merge(&sources, Method::Linear, &sites).unwrap();
    const DRAWS: u64 = 4000;
    let mean = |of: fn(&LowRank) -> &Tensor| {
        let sum = (0..DRAWS).map(|seed| of(low(&dare(seed), 0)).clone()).reduce(|a, b| (a + b).unwrap());
        (sum.unwrap() / DRAWS as f64).unwrap()
    };
    // each number deviates by at most |w x| sqrt((1 - d) / d) sqrt(2); five standard errors
    let off = far(&mean(|l| &l.a), &low(&linear, 0).a).max(far(&mean(|l| &l.b), &low(&linear, 0).b));
    assert!(off < 5.0 * 1.5 / (DRAWS as f32).sqrt(), "{off}");
    let same = |a: &Delta, b: &Delta| far(&low(a, 0).a, &low(b, 0).a) == 0.0 && far(&low(a, 0).b, &low(b, 0).b) == 0.0;
    assert!(same(&dare(7), &dare(7)) && !same(&dare(7), &dare(8)) && !same(&dare(7), &linear));
}

#[test]
fn what_would_be_too_much_or_is_for_something_else_is_refused() {
    let mut rng = StdRng::seed_from_u64(9);
    let dims = [(6, 5)];
    let sites = table(&dims);
    let (x, y) = (lora(&mut rng, &dims, 600, 1.0), lora(&mut rng, &dims, 425, 1.0));
    let both = [source("x", &x, 1.0), source("y", &y, 1.0)];
    for message in [merge(&both, Method::Cat, &sites), compose(&both, &sites)].map(|m| m.unwrap_err().to_string()) {
        assert!(message.contains("layers.0.q") && message.contains("1025") && message.contains("1024"), "{message}");
    }
    let message = merge(&both, Method::Svd { rank: Some(2) }, &sites).unwrap_err().to_string();
    assert!(message.contains("1025") && message.contains("256"), "{message}");
    let stopped = super::merge(&both[..], Method::Cat, &sites, &|| true);
    assert!(matches!(stopped, Err(MergeError::Stopped)));

    let mut other = lora(&mut rng, &dims, 2, 1.0);
    other.spec.task = Task::Feature;
    let apart = [source("x", &x, 1.0), source("o", &other, 1.0)];
    for message in [merge(&apart, Method::Cat, &sites), compose(&apart, &sites)].map(|m| m.unwrap_err().to_string()) {
        assert!(message.contains("x is for causal_lm, but o is for feature"), "{message}");
    }
    other.spec.task = Task::CausalLm;
    other.spec.labels = vec!["no".into()];
    let apart = [source("x", &x, 1.0), source("o", &other, 1.0)];
    assert!(compose(&apart, &sites).unwrap_err().to_string().contains("x and o have different labels"));
}
