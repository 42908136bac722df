//! The kernels against the reference: every kind of patch of linears and norms, also several of one kind at a site.

use candle_core::Var;
use proptest::prelude::*;

use super::*;
use crate::delta::{Affine, DeltaSpec, Dora, DoraBase, LowRank, Matrix, Task};

/// Widths of the linear at site 1.
const IN: usize = 24;
const OUT: usize = 40;
/// Site of the linear, and of the norm.
const LINEAR: SiteId = 1;
const NORM: SiteId = 2;

fn rand(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
}

fn pair(rank: usize, input: usize) -> LowRank {
    LowRank { a: rand(&[rank, input]), b: rand(&[rank, OUT]), scale: 0.7 }
}

/// What a linear may have, by number; 0 = a low-rank update.
fn of_linear(kind: u8, rank: usize) -> Patch {
    match kind {
        0 => Patch::LowRank(pair(rank, IN)),
        1 => Patch::Bias(rand(&[OUT])),
        2 => Patch::Scale(rand(&[OUT])),
        3 => Patch::InScale(rand(&[IN])),
        kind => {
            let base = DoraBase::new(rand(&[IN, OUT]), (kind == 4).then(|| rand(&[OUT]))).unwrap();
            let magnitude = (rand(&[OUT]).abs().unwrap() + 1.0).unwrap();
            Patch::Dora(Box::new(Dora::new(pair(rank, IN), magnitude, base).unwrap()))
        }
    }
}

/// What a norm may have.
fn of_norm(kind: u8) -> Patch {
    match kind {
        0 => Patch::Bias(rand(&[OUT])),
        1 => Patch::Scale(rand(&[OUT])),
        kind => {
            let bias = (kind == 2).then(|| rand(&[OUT]));
            Patch::Affine(Affine { gain: rand(&[OUT]), bias, center: kind != 3, eps: 1e-5 })
        }
    }
}

pub(super) fn delta(patches: Vec<(SiteId, Patch)>) -> Arc<Delta> {
    let spec = DeltaSpec {
        methods: vec![],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    Arc::new(Delta::new(spec, patches, None))
}

/// Within `1e-4` of the reference's largest number.
fn agree(got: &Tensor, want: &Tensor) -> bool {
    let most = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    most(&(got - want).unwrap()) < 1e-4 * (1.0 + most(want))
}

fn rows_of(t: &Tensor, span: &crate::rows::Span) -> Vec<Vec<f32>> {
    t.narrow(0, span.start, span.len).unwrap().to_vec2::<f32>().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Popularity (identical to distinct), ranks, kinds, their order and number, and span lengths vary; rows without a
    /// delta stay as they are.
    #[test]
    fn kernel_and_reference_agree(
        spans in proptest::collection::vec((1usize..70, 0usize..5), 1..7),
        kinds in proptest::collection::vec(proptest::collection::vec((0u8..6, 1usize..34), 1..5), 4),
    ) {
        let of = |kinds: &Vec<(u8, usize)>| delta(kinds.iter().map(|&(k, r)| (LINEAR, of_linear(k, r))).collect());
        let deltas: Vec<_> = kinds.iter().map(of).collect();
        let layout = RowLayout::packed(&spans.iter().map(|s| s.0).collect::<Vec<_>>());
        let per_span: Vec<_> = spans.iter().map(|s| deltas.get(s.1).cloned()).collect();
        let batch = DeltaBatch::new(&layout, &per_span, 2);
        let x = rand(&[layout.rows(), IN]);
        let out = rand(&[layout.rows(), OUT + 8]);
        let parts = [(0, 0..4), (LINEAR, 4..4 + OUT), (0, 4 + OUT..OUT + 8)];
        // input scales first, as a linear asks for them
        let scaled = batch.scaled_input(LINEAR, &x).unwrap();
        let scaled_want = batch.scaled_input_reference(&batch.input_scales(LINEAR), &x).unwrap();
        prop_assert!(agree(&scaled, &scaled_want));
        let want = batch.patch_reference(&parts, &scaled_want, &out).unwrap();
        let got = batch.patch(&parts, &scaled, out.copy().unwrap()).unwrap();
        prop_assert!(agree(&got, &want), "{kinds:?}");
        for (span, delta) in layout.spans().iter().zip(&per_span) {
            if delta.is_none() {
                prop_assert_eq!(rows_of(&got, span), rows_of(&out, span), "a row without a delta is bitwise untouched");
                prop_assert_eq!(rows_of(&scaled, span), rows_of(&x, span));
            }
        }
    }

    /// Bit for bit, with patches that have a kernel and one that has none (a whole matrix).
    #[test]
    fn a_row_gets_the_same_alone_and_in_any_company(
        spans in proptest::collection::vec((1usize..70, 0usize..5), 1..7),
        kinds in proptest::collection::vec(proptest::collection::vec((0u8..7, 1usize..34), 1..4), 4),
    ) {
        let patch = |&(kind, rank): &(u8, usize)| match kind {
            6 => (LINEAR, Patch::Matrix(Matrix { weight: rand(&[IN, OUT]), bias: Some(rand(&[OUT])) })),
            kind => (LINEAR, of_linear(kind, rank)),
        };
        let deltas: Vec<_> = kinds.iter().map(|kinds| delta(kinds.iter().map(patch).collect())).collect();
        let layout = RowLayout::packed(&spans.iter().map(|s| s.0).collect::<Vec<_>>());
        let per_span: Vec<_> = spans.iter().map(|s| deltas.get(s.1).cloned()).collect();
        let batch = DeltaBatch::new(&layout, &per_span, 2);
        let (x, out) = (rand(&[layout.rows(), IN]), rand(&[layout.rows(), OUT]));
        let parts = [(LINEAR, 0..OUT)];
        let scaled = batch.scaled_input(LINEAR, &x).unwrap();
        let got = batch.patch(&parts, &scaled, out.copy().unwrap()).unwrap();
        for (span, delta) in layout.spans().iter().zip(per_span) {
            // all of its rows, and the last of them
            for (from, len) in [(span.start, span.len), (span.start + span.len - 1, 1)] {
                let own = RowLayout::packed(&[len]);
                let batch = DeltaBatch::new(&own, std::slice::from_ref(&delta), 2);
                let rows = |t: &Tensor| t.narrow(0, from, len).unwrap().force_contiguous().unwrap();
                let scaled = batch.scaled_input(LINEAR, &rows(&x)).unwrap();
                let alone = batch.patch(&parts, &scaled, rows(&out)).unwrap();
                prop_assert_eq!(alone.to_vec2::<f32>().unwrap(), rows(&got).to_vec2::<f32>().unwrap(), "{:?}", kinds);
            }
        }
    }

    /// Rows that are picked get what they get among all, by the kernels and by the reference.
    #[test]
    fn picked_rows_have_their_deltas(
        spans in proptest::collection::vec((1usize..60, 0usize..4), 1..6), keep in proptest::collection::vec(any::<bool>(), 300),
        kinds in proptest::collection::vec(proptest::collection::vec((0u8..6, 1usize..9), 1..4), 3),
    ) {
        let of = |kinds: &Vec<(u8, usize)>| delta(kinds.iter().map(|&(k, r)| (LINEAR, of_linear(k, r))).collect());
        let deltas: Vec<_> = kinds.iter().map(of).collect();
        let layout = RowLayout::packed(&spans.iter().map(|s| s.0).collect::<Vec<_>>());
        let per_span: Vec<_> = spans.iter().map(|s| deltas.get(s.1).cloned()).collect();
        let batch = DeltaBatch::new(&layout, &per_span, 2);
        let pick: Vec<u32> = (0..layout.rows() as u32).filter(|row| keep[*row as usize]).collect();
        prop_assume!(!pick.is_empty());
        let idx = Tensor::new(&pick[..], &Device::Cpu).unwrap();
        let own = |t: &Tensor| t.index_select(&idx, 0).unwrap();
        let (x, out) = (rand(&[layout.rows(), IN]), rand(&[layout.rows(), OUT]));
        let parts = [(LINEAR, 0..OUT)];
        let scaled = batch.scaled_input(LINEAR, &x).unwrap();
        let want = own(&batch.patch_reference(&parts, &scaled, &out).unwrap());
        let picked = batch.picked(&pick);
        let (x, out) = (own(&x), own(&out));
        let scaled = picked.scaled_input(LINEAR, &x).unwrap();
        prop_assert!(agree(&picked.patch_reference(&parts, &scaled, &out).unwrap(), &want));
        prop_assert!(agree(&picked.patch(&parts, &scaled, out).unwrap(), &want));
    }

    /// The same at a norm, whose gain and bias a delta may replace.
    #[test]
    fn kernel_and_reference_agree_at_norms(
        spans in proptest::collection::vec((1usize..70, 0usize..5), 1..7),
        kinds in proptest::collection::vec(proptest::collection::vec(0u8..5, 1..4), 4),
    ) {
        let of = |kinds: &Vec<u8>| delta(kinds.iter().map(|&k| (NORM, of_norm(k))).collect());
        let deltas: Vec<_> = kinds.iter().map(of).collect();
        let layout = RowLayout::packed(&spans.iter().map(|s| s.0).collect::<Vec<_>>());
        let per_span: Vec<_> = spans.iter().map(|s| deltas.get(s.1).cloned()).collect();
        let batch = DeltaBatch::new(&layout, &per_span, 3);
        let (x, out) = (rand(&[layout.rows(), OUT]), rand(&[layout.rows(), OUT]));
        let parts = [(NORM, 0..OUT)];
        let want = batch.patch_reference(&parts, &x, &out).unwrap();
        let got = batch.patch(&parts, &x, out.copy().unwrap()).unwrap();
        prop_assert!(agree(&got, &want), "{kinds:?}");
        for (span, delta) in layout.spans().iter().zip(&per_span) {
            if delta.is_none() {
                prop_assert_eq!(rows_of(&got, span), rows_of(&out, span), "a row without a delta is bitwise untouched");
            }
        }
    }
}

#[test]
fn rows_that_are_spared_are_left_as_they_are() {
    // side by side: all of the first, the end of the second, none of the third, a delta of its own, and the end of the last
    let layout = RowLayout::packed(&[3, 60, 5, 2, 70]);
    let [a, b] = [0, 0].map(|kind| delta(vec![(LINEAR, of_linear(kind, 4))]));
    let per_span = [Some(&a), Some(&a), Some(&a), Some(&b), Some(&a)].map(|delta| delta.cloned());
    let batch = DeltaBatch::sparing(&layout, &per_span, &[0, 4, 5, 0, 10], 2);
    assert_eq!(format!("{:?}", batch.slots[0].rows), "[0..3, 7..63, 80..140]");
    let whole = DeltaBatch::new(&layout, &per_span, 2);
    let (x, out) = (rand(&[layout.rows(), IN]), rand(&[layout.rows(), OUT]));
    let parts = [(LINEAR, 0..OUT)];
    let want = whole.patch_reference(&parts, &x, &out).unwrap();
    let lists = |t: &Tensor| t.to_vec2::<f32>().unwrap();
    for got in [batch.patch(&parts, &x, out.copy().unwrap()).unwrap(), batch.patch_reference(&parts, &x, &out).unwrap()]
    {
        for (row, (got, before)) in lists(&got).iter().zip(lists(&out)).enumerate() {
            let spared = [3..7, 63..68, 70..80].iter().any(|rows| rows.contains(&row));
            if spared {
                assert_eq!(*got, before, "row {row}");
            } else {
                let own = want.get(row).unwrap().to_vec1::<f32>().unwrap();
                assert!(got.iter().zip(&own).all(|(a, b)| (a - b).abs() < 1e-3 * (1.0 + b.abs())), "row {row}");
                assert_ne!(*got, before, "row {row}");
            }
        }
    }
    // where nothing is left, no delta is in the step
    assert_eq!(DeltaBatch::sparing(&RowLayout::packed(&[3]), &[Some(a)], &[3], 2).distinct(), 0);
}

#[test]
fn rows_that_are_picked_side_by_side_are_one_run() {
    let layout = RowLayout::packed(&[3, 2, 3]);
    let [a, b] = [0, 1].map(|kind| delta(vec![(LINEAR, of_linear(kind, 2))]));
    let rows = |batch: &DeltaBatch| format!("{:?}", batch.slots.iter().map(|slot| &slot.rows).collect::<Vec<_>>());
    let single = DeltaBatch::single(Arc::clone(&a), &layout, 2).picked(&[0, 3, 5, 7]);
    assert_eq!((rows(&single).as_str(), single.rows), ("[[0..4]]", 4));
    let mixed = DeltaBatch::new(&layout, &[Some(Arc::clone(&a)), Some(b), Some(a)], 2).picked(&[1, 2, 4, 6]);
    assert_eq!(rows(&mixed), "[[0..2, 3..4], [2..3]]");
}

#[test]
fn the_reference_is_taken_where_a_gradient_is_wanted() {
    let layout = RowLayout::packed(&[3]);
    let var = Var::from_tensor(&rand(&[OUT])).unwrap();
    let own = delta(vec![(LINEAR, of_linear(3, 1)), (LINEAR, Patch::Bias(var.as_tensor().clone()))]);
    let batch = DeltaBatch::single(own, &layout, 2);
    let y = batch.patch(&[(LINEAR, 0..OUT)], &rand(&[3, IN]), rand(&[3, OUT])).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&var).unwrap().to_vec1::<f32>().unwrap(), vec![3.0; OUT]);
}
