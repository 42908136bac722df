//! The kernels against the reference.

use super::*;
use candle_core::Var;
use proptest::prelude::*;

fn diff(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
}

fn plan(spans: Vec<AttnSpan>, mask: AttnMask) -> AttnPlan {
    let (heads, kv_heads, head_dim) = (4, 2, 12);
    AttnPlan { spans: spans.into(), mask, heads, kv_heads, head_dim, scale: 0.3, cap: None, bias: None }
}

fn selves(lens: &[usize], mask: AttnMask) -> (AttnPlan, usize) {
    let mut spans = Vec::new();
    let mut at = 0;
    for &len in lens {
        let keys = KeyRows::From(at);
        spans.push(AttnSpan { q_start: at, q_len: len, context_len: 0, position: 0, pinned: 0, keys, keys_len: len });
        at += len;
    }
    (plan(spans, mask), at)
}

fn bias(reach: usize) -> RelativeBias {
    RelativeBias::new(&Tensor::randn(0f32, 1.0, (4, 2 * reach + 1), &Device::Cpu).unwrap()).unwrap()
}

fn trained_bias(reach: usize) -> RelativeBias {
    let values = Var::randn(0f32, 1.0, (4, 2 * reach + 1), &Device::Cpu).unwrap();
    RelativeBias::new(values.as_tensor()).unwrap()
}

/// Outputs and all three gradients, and that of the bias if it is trained.
fn compare(plan: AttnPlan, rows: usize, keys: usize) {
    let (plan, dev) = (Arc::new(plan), Device::Cpu);
    let q = Var::randn(0f32, 1.0, (rows, 48), &dev).unwrap();
    let k = Var::randn(0f32, 1.0, (keys, 24), &dev).unwrap();
    let v = Var::randn(0f32, 1.0, (keys, 24), &dev).unwrap();
    let w = Tensor::randn(0f32, 1.0, (plan.queries(), 48), &dev).unwrap();
    let fast = attention(&q, &k, &v, &plan).unwrap();
    let slow = reference(&q, &k, &v, &plan).unwrap();
    assert!(diff(&fast, &slow) < 1e-5);
    if rows == keys && attends_own_rows(&plan) {
        joined_agrees(&plan, [&q, &k, &v], &w);
    }
    let g1 = (fast * &w).unwrap().sum_all().unwrap().backward().unwrap();
    let g2 = (slow * &w).unwrap().sum_all().unwrap().backward().unwrap();
    let trained = plan.bias.as_ref().and_then(|b| b.trained.as_ref());
    for t in [&*q, &*k, &*v].into_iter().chain(trained) {
        let (got, want) = (g1.get(t).unwrap(), g2.get(t).unwrap());
        // sums of many rows: what they round is in proportion to the largest
        let largest = diff(want, &want.zeros_like().unwrap()).max(1.0);
        assert!(diff(got, want) < 3e-5 * largest, "{} of at most {largest}", diff(got, want));
    }
}

/// The same of query, key and value side by side.
fn joined_agrees(plan: &Arc<AttnPlan>, qkv: [&Var; 3], w: &Tensor) {
    let joined = Tensor::cat(&qkv.map(|v| v.as_tensor()), 1).unwrap();
    let joined = Var::from_tensor(&joined.detach()).unwrap();
    let widths = [48, 24, 24];
    let mut at = 0;
    let parts = widths.map(|width| {
        at += width;
        joined.narrow(1, at - width, width).unwrap()
    });
    let fast = attention_of_joined(&joined, plan).unwrap();
    let slow = reference(&parts[0], &parts[1], &parts[2], plan).unwrap();
    assert!(diff(&fast, &slow) < 1e-5);
    let grad = |y: Tensor| {
        let store = (y * w).unwrap().sum_all().unwrap().backward().unwrap();
        store.get(&joined).unwrap().clone()
    };
    assert!(diff(&grad(fast), &grad(slow)) < 3e-5);
}

/// The plan with some of each span's queries only, a run of them or none; and which rows these are.
fn narrowed(plan: &AttnPlan, cuts: &[(usize, usize)]) -> (AttnPlan, Vec<u32>) {
    let (mut spans, mut rows) = (Vec::new(), Vec::new());
    for (span, (a, b)) in plan.spans.iter().zip(cuts) {
        let (a, b) = (a % (span.q_len + 1), b % (span.q_len + 1));
        let (from, to) = (a.min(b), a.max(b));
        if from < to {
            let (context_len, position) = (span.context_len + from, span.position + from);
            rows.extend((span.q_start + from..span.q_start + to).map(|row| row as u32));
            let (q_start, q_len) = (span.q_start + from, to - from);
            spans.push(AttnSpan { q_start, q_len, context_len, position, ..span.clone() });
        }
    }
    (AttnPlan { spans: spans.into(), ..plan.clone() }, rows)
}

/// Queries of these rows give what they give among all; the gradients are those of the whole where the others' output counts
/// nothing.
fn some_are_as_among_all((whole, part): (AttnPlan, AttnPlan), pick: &[u32], rows: usize) {
    let (whole, part, dev) = (Arc::new(whole), Arc::new(part), Device::Cpu);
    let qkv = Var::randn(0f32, 1.0, (rows, 96), &dev).unwrap();
    let [q, k, v] = [(0, 48), (48, 24), (72, 24)].map(|(at, width)| qkv.narrow(1, at, width).unwrap());
    let w = Tensor::randn(0f32, 1.0, (pick.len(), 48), &dev).unwrap();
    let pick = Tensor::new(pick, &dev).unwrap();
    let found = |y: Tensor| {
        let grads = (&y * &w).unwrap().sum_all().unwrap().backward().unwrap();
        (y, grads.get(&qkv).unwrap().clone())
    };
    let want = found(reference(&q, &k, &v, &whole).unwrap().index_select(&pick, 0).unwrap());
    let mut ways = vec![attention(&q, &k, &v, &part).unwrap(), reference(&q, &k, &v, &part).unwrap()];
    if part.trained_bias().is_none() {
        assert!(attends_own_rows(&part));
        ways.push(attention_of_joined(&qkv, &part).unwrap());
    }
    for got in ways.into_iter().map(found) {
        assert!(diff(&got.0, &want.0) < 1e-5 && diff(&got.1, &want.1) < 3e-5);
    }
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let mask = AttnMask { causal: true, window: None };
    let (whole, rows) = selves(&[3, 4], mask);
    let make = |rows: usize, width: usize| Tensor::zeros((rows, width), DType::F32, &Device::Cpu).unwrap();
    let runs = |plan: AttnPlan, rows: usize| {
        let (q, kv) = (make(rows, 48), make(rows, 24));
        attention(&q, &kv, &kv, &Arc::new(plan)).is_ok()
    };
    assert!(runs(whole.clone(), rows) && !runs(whole.clone(), rows - 1), "keys and queries outside of the rows");
    let [first, second] = [0, 1].map(|i| whole.spans[i].clone());
    assert!(runs(plan(vec![second.clone()], mask), rows), "rows that are nobody's");
    assert!(!runs(plan(vec![second.clone(), first.clone()], mask), rows), "not in order");
    assert!(!runs(plan(vec![AttnSpan { q_len: 4, ..first.clone() }, second.clone()], mask), rows), "a row of two");
    let elsewhere = AttnSpan { context_len: 1, ..second };
    assert!(!attends_own_rows(&plan(vec![elsewhere], mask)), "a query whose key is in another row");
    assert!(!attends_own_rows(&plan(
        vec![first.clone(), AttnSpan { q_start: 3, q_len: 0, context_len: 3, ..first }],
        mask
    )));
}

/// All query heads with one key head.
fn one_key_head(own: AttnPlan, rows: usize) {
    let plan = Arc::new(AttnPlan { kv_heads: 1, ..own });
    let random = |width| Tensor::randn(0f32, 1.0, (rows, width), &Device::Cpu).unwrap();
    let (q, k, v) = (random(48), random(12), random(12));
    assert!(diff(&attention(&q, &k, &v, &plan).unwrap(), &reference(&q, &k, &v, &plan).unwrap()) < 1e-5);
}

/// Runs of several blocks of queries, runs of less than a block's worth beside them, a last block that is not whole.
#[test]
fn runs_in_blocks_agree_forward_and_backward() {
    for (causal, window, cap, reach) in [
        (false, None, None, None),
        (true, None, None, None),
        (true, Some(9), Some(1.5), None),
        (true, None, Some(2.0), Some(4)),
        (false, None, None, Some(5)),
    ] {
        for trained in [false, true] {
            let (plan, rows) = selves(&[70, 8, 33, 5, 64], AttnMask { causal, window });
            let bias = reach.map(|reach| if trained { trained_bias(reach) } else { bias(reach) });
            compare(AttnPlan { cap, bias, ..plan }, rows, rows);
        }
    }
    // fewer heads than threads: the queries of one are shared out, the last part not whole
    for causal in [false, true] {
        let (own, rows) = selves(&[150], AttnMask { causal, window: None });
        compare(own.clone(), rows, rows);
        one_key_head(own, rows);
    }
    // queries behind a context, keys in slots
    let keys = KeyRows::Slots((0..60u32).rev().collect());
    let span = AttnSpan { q_start: 0, q_len: 41, context_len: 19, position: 19, pinned: 0, keys, keys_len: 60 };
    let mask = AttnMask { causal: true, window: None };
    compare(AttnPlan { bias: Some(bias(3)), ..plan(vec![span], mask) }, 41, 60);
}

/// Queries one by one, in runs that are computed row by row and in blocks: all the same, however a sequence is cut.
#[test]
fn a_query_s_output_is_the_same_wherever_its_sequence_is_cut() {
    const N: usize = 70;
    let random = |width| Tensor::randn(0f32, 1.0, (N, width), &Device::Cpu).unwrap();
    let (q, k, v) = (random(48), random(24), random(24));
    for (causal, window, cap, reach) in [
        (true, None, None, None),
        (true, Some(9), Some(1.5), None),
        (true, None, None, Some(4)),
        (false, None, Some(2.0), Some(5)),
    ] {
        let bias = reach.map(bias);
        let of = |from: usize, q_len: usize| {
            let keys_len = if causal { from + q_len } else { N };
            let (context_len, position, keys) = (from, from, KeyRows::From(0));
            let span = AttnSpan { q_start: 0, q_len, context_len, position, pinned: 0, keys, keys_len };
            let own = plan(vec![span], AttnMask { causal, window });
            let own = Arc::new(AttnPlan { cap, bias: bias.clone(), ..own });
            attention(&q.narrow(0, from, q_len).unwrap(), &k, &v, &own).unwrap()
        };
        let whole = of(0, N);
        for cut in [1, 3, 7, 8, 13, 33, 69] {
            for from in (0..N).step_by(cut) {
                let len = cut.min(N - from);
                let got = of(from, len);
                assert_eq!(
                    diff(&got, &whole.narrow(0, from, len).unwrap()),
                    0.0,
                    "{len} from {from}, {causal} {window:?}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn fast_and_reference_agree_forward_and_backward(
        lens in proptest::collection::vec(1usize..14, 1..5), causal: bool, window in proptest::option::of(1usize..6),
        cap in proptest::option::of(0.5f32..4.0), reach in proptest::option::of(1usize..6), trained: bool,
    ) {
        let window = if causal { window } else { None };
        let (plan, rows) = selves(&lens, AttnMask { causal, window });
        let bias = reach.map(|reach| if trained { trained_bias(reach) } else { bias(reach) });
        compare(AttnPlan { cap, bias, ..plan }, rows, rows);
    }

    #[test]
    fn some_queries_agree_forward_and_backward(
        sequences in proptest::collection::vec((1usize..40, any::<(usize, usize)>()), 1..5), causal: bool,
        window in proptest::option::of(1usize..6), cap in proptest::option::of(0.5f32..4.0),
        reach in proptest::option::of(1usize..6), trained: bool,
    ) {
        let window = if causal { window } else { None };
        let (lens, cuts): (Vec<usize>, Vec<(usize, usize)>) = sequences.into_iter().unzip();
        let (own, rows) = selves(&lens, AttnMask { causal, window });
        let bias = reach.map(|reach| if trained { trained_bias(reach) } else { bias(reach) });
        let own = AttnPlan { cap, bias, ..own };
        let (part, pick) = narrowed(&own, &cuts);
        prop_assume!(!pick.is_empty());
        compare(part.clone(), rows, rows);
        some_are_as_among_all((own, part), &pick, rows);
    }

    #[test]
    fn cross_attention_agrees_forward_and_backward(
        lens in proptest::collection::vec((1usize..6, 1usize..9), 1..5), cap in proptest::option::of(0.5f32..4.0),
    ) {
        let (mut spans, mut rows, mut keys) = (Vec::new(), 0, 0);
        for (q_len, keys_len) in lens {
            let from = KeyRows::From(keys);
            let (q_start, context_len, position, pinned) = (rows, 0, 0, 0);
            spans.push(AttnSpan { q_start, q_len, context_len, position, pinned, keys: from, keys_len });
            (rows, keys) = (rows + q_len, keys + keys_len);
        }
        compare(AttnPlan { cap, ..plan(spans, AttnMask { causal: false, window: None }) }, rows, keys);
    }

    /// Prefix rows lie behind the step's own, and spans share them; gradients of shared rows add up.
    #[test]
    fn shared_and_pinned_keys_agree_forward_and_backward(
        lens in proptest::collection::vec((1usize..9, 0usize..3), 1..6), prefix in proptest::collection::vec(1usize..6, 2),
        causal: bool, window in proptest::option::of(1usize..6), pinned: bool,
        cap in proptest::option::of(0.5f32..4.0), reach in proptest::option::of(1usize..6),
    ) {
        let window = if causal { window } else { None };
        let rows: usize = lens.iter().map(|l| l.0).sum();
        let total = rows + prefix.iter().sum::<usize>();
        let mut spans = Vec::new();
        let mut at = 0;
        for &(len, which) in &lens {
            let own = (at..at + len).map(|r| r as u32);
            let from = rows + prefix.iter().take(which).sum::<usize>();
            let n = prefix.get(which).copied().unwrap_or(0);
            let keys: Vec<u32> = (from..from + n).map(|r| r as u32).chain(own).collect();
            let pinned = if pinned { n } else { 0 };
            let (keys, keys_len) = (KeyRows::Slots(keys.into()), n + len);
            let position = n - pinned;
            spans.push(AttnSpan { q_start: at, q_len: len, context_len: n, position, pinned, keys, keys_len });
            at += len;
        }
        let plan = plan(spans, AttnMask { causal, window });
        compare(AttnPlan { cap, bias: reach.map(bias), ..plan }, rows, total);
    }

    /// Seen keys are in order, without gaps but for the one behind the pinned ones, and each is seen for a reason.
    #[test]
    fn seen_keys_are_the_pinned_and_the_window(
        keys in 1usize..20, at in 0usize..20, pinned in 0usize..6, causal: bool, window in proptest::option::of(1usize..8)
    ) {
        let (at, pinned) = (at % keys, pinned.min(at % keys));
        let seen = AttnMask { causal, window }.seen(at, keys, pinned);
        let got: Vec<usize> = (0..seen.len()).map(|i| seen.at(i)).collect();
        let wanted: Vec<usize> = (0..keys)
            .filter(|&j| j < pinned || ((!causal || j <= at) && window.is_none_or(|w| j + w > at)))
            .collect();
        prop_assert_eq!(got, wanted);
    }

    #[test]
    fn cached_keys_in_any_slots_equal_keys_in_order(len in 1usize..9, context in 0usize..20, seed: u64) {
        let dev = Device::Cpu;
        let n = context + len;
        let total = n + 7;
        // a permutation of slots, by a small generator
        let mut slots: Vec<u32> = (0..total as u32).collect();
        let mut s = seed | 1;
        for i in (1..slots.len()).rev() {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            slots.swap(i, (s >> 33) as usize % (i + 1));
        }
        slots.truncate(n);
        let q = Tensor::randn(0f32, 1.0, (len, 48), &dev).unwrap();
        let k = Tensor::randn(0f32, 1.0, (total, 24), &dev).unwrap();
        let v = Tensor::randn(0f32, 1.0, (total, 24), &dev).unwrap();
        let mask = AttnMask { causal: true, window: None };
        let bias = bias(3);
        let make = |keys| {
            let (context_len, position) = (context, context);
            let span = AttnSpan { q_start: 0, q_len: len, context_len, position, pinned: 0, keys, keys_len: n };
            Arc::new(AttnPlan { bias: Some(bias.clone()), ..plan(vec![span], mask) })
        };
        let idx = Tensor::new(&slots[..], &dev).unwrap();
        let (ko, vo) = (k.index_select(&idx, 0).unwrap(), v.index_select(&idx, 0).unwrap());
        let ordered = attention(&q, &ko, &vo, &make(KeyRows::From(0))).unwrap();
        let by_slot = attention(&q, &k, &v, &make(KeyRows::Slots(slots.into()))).unwrap();
        prop_assert_eq!(diff(&ordered, &by_slot), 0.0);
    }
}
