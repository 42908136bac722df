//! Every format against candle's own dequantisation; products against sums of the dequantised matrix.

use candle_core::{DType, Device, quantized::QStorage};

use super::*;
use crate::ops::packed;

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
            let coarse = if kind.form().bits == 4 { 0.35 } else { 0.2 };
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
