//! Against separate ops.

use super::*;
use candle_core::{Device, Var};

fn diff(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Updates of all rows.
fn of_all<'a>(rows: &'a Range<usize>, updates: Vec<Update<'a>>) -> [RowUpdates<'a>; 1] {
    [RowUpdates { rows: std::slice::from_ref(rows), updates }]
}

fn var(shape: impl Into<Shape>) -> Var {
    Var::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
}

/// Three parts of unequal width: two updates and a bias, a bias alone, an update alone.
#[test]
fn outputs_and_all_gradients_equal_those_of_separate_ops() {
    let dev = Device::Cpu;
    for (rows, k, widths) in [(5, 24, [32, 16, 16]), (67, 33, [7, 19, 40]), (1, 8, [8, 8, 8])] {
        let n: usize = widths.iter().sum();
        let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (n, k), &dev).unwrap()).unwrap();
        let own = Tensor::randn(0f32, 0.5, n, &dev).unwrap();
        let (x, [b0, b1]) = (var((rows, k)), [var(widths[0]), var(widths[1])]);
        let lows: Vec<(Var, Var)> =
            [(3, 0), (8, 0), (5, 2)].iter().map(|&(r, p)| (var((r, k)), var((r, widths[p])))).collect();
        let (first, second) = (0..widths[0], widths[0]..widths[0] + widths[1]);
        let third = second.end..n;
        let low = |i: usize, scale: f64| (lows[i].0.as_tensor(), lows[i].1.as_tensor(), scale);
        let updates = vec![
            Update { columns: first, low: vec![low(0, 2.0), low(1, 0.5)], bias: vec![b0.as_tensor(), b0.as_tensor()] },
            Update { columns: second, low: vec![], bias: vec![b1.as_tensor()] },
            Update { columns: third, low: vec![low(2, -1.5)], bias: vec![] },
        ];
        let all_rows = 0..rows;
        let all_updates = of_all(&all_rows, updates.clone());
        assert!(takes_updates(&x, &weight, Some(&own), &all_updates, Ending::default()));
        let all: Vec<&Var> = lows.iter().flat_map(|(a, b)| [a, b]).chain([&x, &b0, &b1]).collect();
        let residual = var((rows, n));
        let endings =
            [None, Some(Act::Gelu)].into_iter().flat_map(|act| [(act, None), (act, Some(residual.as_tensor()))]);
        for (own, (act, rest)) in [Some(&own), None].into_iter().flat_map(|own| endings.clone().map(move |e| (own, e)))
        {
            let ending = Ending { act, residual: rest };
            let separate = |x: &Tensor| {
                let base = super::super::linear(x, &weight, own).unwrap();
                let pieces: Vec<Tensor> = updates
                    .iter()
                    .map(|u| {
                        let mut y = base.narrow(1, u.columns.start, u.columns.len()).unwrap();
                        for (a, b, s) in &u.low {
                            y = (y + (x.matmul(&a.t().unwrap()).unwrap().matmul(b).unwrap() * *s).unwrap()).unwrap();
                        }
                        u.bias.iter().fold(y, |y, b| y.broadcast_add(b).unwrap())
                    })
                    .collect();
                Tensor::cat(&pieces, 1).unwrap()
            };
            let g = Tensor::randn(0f32, 1.0, (rows, n), &dev).unwrap();
            let (want, got) =
                (ending.apply(separate(&x)).unwrap(), updated_linear(&x, &weight, own, &all_updates, ending).unwrap());
            assert!(diff(&want, &got) < 1e-4);
            let grads = |y: &Tensor| (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let (want, got) = (grads(&want), grads(&got));
            for v in all.iter().copied().chain(rest.map(|_| &residual)) {
                let (want, got) = (want.get(v).unwrap(), got.get(v).unwrap());
                assert!(diff(want, got) < 1e-3, "{:?}: {}", v.shape(), diff(want, got));
            }
            // an input that wants no gradient gets none, and costs none
            let plain = updated_linear(&x.as_detached_tensor(), &weight, own, &all_updates, ending).unwrap();
            let got = grads(&plain);
            assert!(got.get(&x).is_none() && diff(got.get(&b1).unwrap(), want.get(&b1).unwrap()) < 1e-3);
        }
    }
}

#[test]
fn a_bias_alone_and_nothing_at_all() {
    let dev = Device::Cpu;
    let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (12, 8), &dev).unwrap()).unwrap();
    let (x, bias) = (var((4, 8)), var(4));
    let update = Update { columns: 4..8, low: vec![], bias: vec![bias.as_tensor()] };
    let y = updated_linear(&x, &weight, None, &of_all(&(0..4), vec![update]), Ending::default()).unwrap();
    let plain = super::super::linear(&x, &weight, None).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&bias).unwrap().to_vec1::<f32>().unwrap(), [4.0; 4]);
    let moved = (y - &plain).unwrap().to_vec2::<f32>().unwrap();
    let bias = bias.to_vec1::<f32>().unwrap();
    for row in moved {
        assert!(row[..4].iter().chain(&row[8..]).all(|v| *v == 0.0));
        assert!(row[4..8].iter().zip(&bias).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    assert_eq!(diff(&updated_linear(&x, &weight, None, &[], Ending::default()).unwrap(), &plain), 0.0);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let dev = Device::Cpu;
    let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (12, 8), &dev).unwrap()).unwrap();
    let (x, a, b, bias) = (var((4, 8)), var((2, 8)), var((2, 12)), var(5));
    let of = |columns: Range<usize>, low, bias| {
        let (rows, update) = (0..4, Update { columns, low, bias });
        updated_linear(&x, &weight, None, &of_all(&rows, vec![update]), Ending::default()).unwrap_err().to_string()
    };
    assert!(of(0..11, vec![(a.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
    assert!(of(4..16, vec![(a.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
    assert!(of(0..12, vec![(b.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
    assert!(of(0..4, vec![], vec![bias.as_tensor()]).contains("a bias"));
    assert!(of(8..13, vec![], vec![bias.as_tensor()]).contains("a bias"), "columns that are not there");
    assert!(
        updated_linear(&var((4, 7)), &weight, None, &[], Ending::default())
            .unwrap_err()
            .to_string()
            .contains("8 -> 12")
    );
}

/// Without updates: an activation and a residual still become part of the product, and the gradients are those of separate ops.
#[test]
fn endings_without_updates_equal_separate_ops() {
    let dev = Device::Cpu;
    let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (20, 9), &dev).unwrap()).unwrap();
    let (x, residual, frozen) = (var((6, 9)), var((6, 20)), Tensor::randn(0f32, 1.0, (6, 20), &dev).unwrap());
    let g = Tensor::randn(0f32, 1.0, (6, 20), &dev).unwrap();
    for act in [None, Some(Act::Silu)] {
        for rest in [None, Some(residual.as_tensor()), Some(&frozen)] {
            let ending = Ending { act, residual: rest };
            let want = ending.apply(super::super::linear(&x, &weight, None).unwrap()).unwrap();
            let got = updated_linear(&x, &weight, None, &[], ending).unwrap();
            assert!(diff(&want, &got) < 1e-5);
            let grads = |y: &Tensor| (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let (want, got) = (grads(&want), grads(&got));
            assert!(diff(want.get(&x).unwrap(), got.get(&x).unwrap()) < 1e-4);
            let of = |store: &candle_core::backprop::GradStore| store.get(&residual).cloned();
            assert_eq!(of(&want).is_some(), of(&got).is_some());
            if let (Some(want), Some(got)) = (of(&want), of(&got)) {
                assert!(diff(&want, &got) < 1e-6);
            }
        }
    }
    let narrow = Ending { act: None, residual: Some(&x) };
    assert!(updated_linear(&x, &weight, None, &[], narrow).unwrap_err().to_string().contains("a residual"));
}
