//! Every format against candle's own dequantisation; products against sums of the dequantised matrix.

use candle_core::{DType, Device, Var, quantized::QStorage};

use super::*;
use crate::ops::{Ending, RowUpdates, Update, Weight, linear, packed, takes_updates, updated_linear};

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 0.7, shape, &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// What candle makes of the same bytes, `[in, out]`.
fn by_candle(kind: QuantKind, bytes: &[u8], (n, k): (usize, usize)) -> Tensor {
    let storage = QStorage::from_data(bytes.into(), &Device::Cpu, kind.dtype()).unwrap();
    let w = QTensor::new(storage, (n, k)).unwrap().dequantize(&Device::Cpu).unwrap();
    assert_eq!(w.dtype(), DType::F32);
    w.t().unwrap().contiguous().unwrap()
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what} [{i}]: {a} and {b}");
    }
}

#[test]
fn halves_are_read_as_they_are() {
    for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
        assert_eq!(f16_value(bits).to_bits(), half::f16::from_bits(bits).to_f32().to_bits(), "{bits:#06x}");
    }
}

#[test]
fn every_format_holds_the_values_that_candle_reads() {
    for kind in QuantKind::ALL {
        for (n, k) in [(1, 256), (48, 512), (50, 256), (130, 768)] {
            let w = random((n, k));
            let bytes = quantize(&w, kind).unwrap();
            let q = Quantized::from_blocks(kind, &bytes, (n, k)).unwrap();
            let want = flat(&by_candle(kind, &bytes, (n, k)));
            let what = format!("{} {n} {k}", kind.name());
            close(&q.unpack(), &want, 1e-6, &what);
            let ids = [n as u32 - 1, 0, n as u32 / 2];
            for (id, row) in ids.iter().zip(q.columns(&ids).chunks_exact(k)) {
                let column: Vec<f32> = want.iter().skip(*id as usize).step_by(n).copied().collect();
                close(row, &column, 1e-6, &what);
            }
            // in so many bits the numbers themselves come out, which no misplaced code does
            let error = flat(&w.t().unwrap()).iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            let coarse = if kind.form().bits == 4 { 0.5 } else { 0.25 };
            assert!(error < coarse, "{what}: {error}");
        }
    }
}

#[test]
fn products_are_those_of_the_dequantised_matrix() {
    for kind in QuantKind::ALL {
        for (k, n) in [(256, 48), (512, 131), (768, 96)] {
            let bytes = quantize(&random((n, k)), kind).unwrap();
            let q = Quantized::from_blocks(kind, &bytes, (n, k)).unwrap();
            let w = by_candle(kind, &bytes, (n, k));
            let bias = random(n);
            for m in [1, 2, 5, 8, 17, 65, 130] {
                let (x, g) = (random((m, k)), random((m, n)));
                let what = format!("{} {m} {k} {n}", kind.name());
                let want = x.matmul(&w).unwrap().broadcast_add(&bias).unwrap();
                let got = packed::product(&flat(&x), &q, Some(&flat(&bias)), (m, k, n));
                close(&got, &flat(&want), 1e-3, &what);
                let want = g.matmul(&w.t().unwrap()).unwrap();
                close(&packed::product_t(&flat(&g), &q, (m, k, n)), &flat(&want), 1e-3, &what);
            }
        }
    }
    // a depth that no block of 256 fits
    let bytes = quantize(&random((70, 160)), QuantKind::Q8_0).unwrap();
    let q = Quantized::from_blocks(QuantKind::Q8_0, &bytes, (70, 160)).unwrap();
    let (x, w) = (random((3, 160)), by_candle(QuantKind::Q8_0, &bytes, (70, 160)));
    close(&packed::product(&flat(&x), &q, None, (3, 160, 70)), &flat(&x.matmul(&w).unwrap()), 1e-3, "q8_0 of 160");
}

#[test]
fn memory_is_that_of_the_format() {
    let bits = |kind: QuantKind| {
        let bytes = quantize(&random((96, 512)), kind).unwrap();
        let q = Quantized::from_blocks(kind, &bytes, (96, 512)).unwrap();
        (q.bytes() * 8) as f64 / (96.0 * 512.0)
    };
    assert_eq!(bits(QuantKind::Q8_0), 8.5);
    assert_eq!(bits(QuantKind::Q4_0), 4.5);
    assert_eq!(bits(QuantKind::Q4K), 4.625);
}

#[test]
fn what_is_no_matrix_is_an_error() {
    let made = |bytes: &[u8], shape| Quantized::from_blocks(QuantKind::Q8_0, bytes, shape).unwrap_err().to_string();
    assert!(made(&[0; 33], (1, 32)).contains("33 bytes are no matrix [1, 32]"));
    assert!(made(&[0; 34], (2, 16)).contains("no matrix"));
    assert!(made(&[], (1, 0)).contains("no matrix"));
    assert!(made(&[], (usize::MAX, 64)).contains("no matrix"));
    let mut bytes = vec![0u8; 68];
    bytes[34..36].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    assert!(made(&bytes, (2, 32)).contains("row 1 is not finite"));
    assert!(quantize(&random((2, 40)), QuantKind::Q8_0).is_err());
}

#[test]
fn a_number_that_is_not_finite_is_refused_in_every_format() {
    for (kind, bad) in QuantKind::ALL.into_iter().flat_map(|kind| [f32::NAN, f32::NEG_INFINITY].map(|bad| (kind, bad)))
    {
        // behind the rows that are quantised first
        let mut numbers = flat(&random((70, 256)));
        numbers[69 * 256 + 100] = bad;
        let error = quantize(&Tensor::from_vec(numbers, (70, 256), &Device::Cpu).unwrap(), kind).unwrap_err();
        let (error, want) = (error.to_string(), format!("{}: {bad} is not finite", kind.name()));
        assert!(error.contains(&want), "{error} lacks {want}");
    }
}

/// Joined as files of mixed quality have it: 4 bits, f32, and 6 bits, 40 columns each.
fn mixed(k: usize) -> Weight {
    let part = |kind: Option<QuantKind>| {
        let w = random((40, k));
        match kind {
            Some(kind) => Weight::from(Quantized::from_blocks(kind, &quantize(&w, kind).unwrap(), (40, k)).unwrap()),
            None => Weight::from_out_in(&w).unwrap(),
        }
    };
    Weight::joined(vec![part(Some(QuantKind::Q4K)), part(None), part(Some(QuantKind::Q6K))]).unwrap()
}

#[test]
fn a_joined_weight_is_its_parts_side_by_side() {
    let (weight, bias) = (mixed(256), random(120));
    let w = weight.as_in_out().unwrap();
    assert_eq!((w.dims(), weight.elem_count()), (&[256, 120][..], 256 * 120));
    let kinds: Vec<&str> = weight.parts().iter().map(|p| p.kind).collect();
    assert_eq!(kinds, ["q4k", "f32", "q6k"]);
    for m in [1, 3, 66] {
        let x = random((m, 256));
        let want = x.matmul(&w).unwrap().broadcast_add(&bias).unwrap();
        close(&flat(&linear(&x, &weight, Some(&bias)).unwrap()), &flat(&want), 1e-3, &format!("{m} rows"));
    }
    assert!(weight.lookup(&[0]).is_err());
    let narrow = Weight::from_out_in(&random((8, 64))).unwrap();
    assert!(Weight::joined(vec![narrow.clone(), mixed(256)]).is_err() && Weight::joined(vec![]).is_err());
    assert_eq!(Weight::joined(vec![narrow]).unwrap().out_dim(), 8);
}

/// `sum (x W + scale (x A^T) B on columns 30..70 + bias)^2 / 2` in f64.
fn energy(x: &[f32], w: &[f32], bias: &[f32], (a, b): (&[f32], &[f32]), (k, n): (usize, usize)) -> f64 {
    let mut sum = 0.0;
    for x in x.chunks_exact(k) {
        let dot = |v: &dyn Fn(usize) -> f32| (0..k).map(|p| f64::from(x[p]) * f64::from(v(p))).sum::<f64>();
        let low: Vec<f64> = (0..2).map(|r| dot(&|p| a[r * k + p])).collect();
        for j in 0..n {
            let mut y = dot(&|p| w[p * n + j]) + f64::from(bias[j]);
            if (30..70).contains(&j) {
                y += 0.5 * (0..2).map(|r| low[r] * f64::from(b[r * 40 + j - 30])).sum::<f64>();
            }
            sum += y * y / 2.0;
        }
    }
    sum
}

#[test]
fn gradients_are_central_differences_in_f64() {
    let one = |kind| {
        let bytes = quantize(&random((120, 256)), kind).unwrap();
        Weight::from(Quantized::from_blocks(kind, &bytes, (120, 256)).unwrap())
    };
    for weight in [one(QuantKind::Q8_0), one(QuantKind::Q4K), mixed(256)] {
        let (k, n) = (256, 120);
        let bias = random(n);
        let var = |shape: (usize, usize)| Var::from_tensor(&(random(shape) * 0.3).unwrap()).unwrap();
        let (x, a, b) = (var((3, k)), var((2, k)), var((2, 40)));
        let update = Update { columns: 30..70, low: vec![(a.as_tensor(), b.as_tensor(), 0.5)], bias: vec![] };
        let rows = 0..3;
        let updates = [RowUpdates { rows: std::slice::from_ref(&rows), updates: vec![update] }];
        assert!(takes_updates(&x, &weight, Some(&bias), &updates, Ending::default()));
        let fused = updated_linear(&x, &weight, Some(&bias), &updates, Ending::default()).unwrap();
        let apart = linear(&x, &weight, Some(&bias)).unwrap();
        let low = (x.matmul(&a.t().unwrap()).unwrap().matmul(&b).unwrap() * 0.5).unwrap();
        let sides = [apart.narrow(1, 0, 30), apart.narrow(1, 30, 40).and_then(|y| y + low), apart.narrow(1, 70, 50)];
        let apart = Tensor::cat(&sides.map(Result::unwrap), 1).unwrap();
        let w = flat(&weight.as_in_out().unwrap());
        let value = |x: &[f32], a: &[f32], b: &[f32]| energy(x, &w, &flat(&bias), (a, b), (k, n));
        for (way, y) in [("fused", fused), ("apart", apart)] {
            let grads = (y.sqr().unwrap().sum_all().unwrap() / 2.0).unwrap().backward().unwrap();
            let at = [&x, &a, &b].map(|v| flat(v));
            for (i, v) in [&x, &a, &b].into_iter().enumerate() {
                let got = flat(grads.get(v).unwrap());
                for p in (0..got.len()).step_by(7) {
                    let moved = |h: f32| {
                        let mut all = at.clone();
                        all[i][p] += h;
                        (value(&all[0], &all[1], &all[2]), f64::from(all[i][p]))
                    };
                    let ((up, high), (down, low)) = (moved(1e-2), moved(-1e-2));
                    let slope = (up - down) / (high - low);
                    let close = (slope - f64::from(got[p])).abs() <= 1e-3 * slope.abs().max(1.0);
                    assert!(close, "{way} {:?} {i} [{p}]: {slope} {}", weight.parts(), got[p]);
                }
            }
        }
        // a bias that is trained stays in the graph
        let trained = Var::from_tensor(&bias).unwrap();
        let grads = linear(&x, &weight, Some(&trained)).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(grads.get(&trained).unwrap()), [3.0; 120]);
    }
}
