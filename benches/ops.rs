//! Micro-benchmarks of the kernels against candle's own: `cargo bench --bench ops`.
//!
//! Shapes are those of a 124M GPT-2; weights rotate over copies so that caches do not help, as in a real step.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops where anything fails")]

use candle_core::{
    Device, Module, Tensor, Var,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use deltaserve::ops::{self, Act, Activations, Halves, Norm, QuantKind, Quantized, Weight};
use divan::{Bencher, black_box, counter::ItemsCount};

fn main() {
    candle_core::utils::with_threadpool(divan::main);
}

const ROWS: &[usize] = &[1, 8, 32, 128];
const STEP_ROWS: &[usize] = &[32, 128, 512, 2048];
const HIDDEN: usize = 768;
const FF: usize = 3072;
const COPIES: usize = 16;

fn rand(rows: usize, cols: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu).expect("a tensor")
}

/// Floating-point operations per second are the items.
fn flops(rows: usize, k: usize, n: usize) -> ItemsCount {
    ItemsCount::new(2 * rows * k * n)
}

#[divan::bench(args = ROWS)]
fn linear_in_out(b: Bencher<'_, '_>, rows: usize) {
    let weights: Vec<_> = (0..COPIES).map(|_| Weight::from_in_out(&rand(HIDDEN, FF)).expect("weight")).collect();
    let (x, mut i) = (rand(rows, HIDDEN), 0);
    b.counter(flops(rows, HIDDEN, FF)).bench_local(|| {
        i += 1;
        ops::linear(black_box(&x), &weights[i % COPIES], None)
    });
}

/// What a training step does: products of many rows, forward.
#[divan::bench(args = STEP_ROWS)]
fn linear_of_a_step(b: Bencher<'_, '_>, rows: usize) {
    linear_in_out(b, rows);
}

/// The gradient of the input, through the frozen weight.
#[divan::bench(args = STEP_ROWS)]
fn linear_gradient(b: Bencher<'_, '_>, rows: usize) {
    let weights: Vec<_> = (0..COPIES).map(|_| Weight::from_in_out(&rand(HIDDEN, FF)).expect("weight")).collect();
    let (x, mut i) = (Var::from_tensor(&rand(rows, HIDDEN)).expect("a variable"), 0);
    let forward = || {
        i += 1;
        ops::linear(x.as_tensor(), &weights[i % COPIES], None).expect("a product")
    };
    b.counter(flops(rows, HIDDEN, FF)).with_inputs(forward).bench_local_values(|y| black_box(y).backward());
}

/// Both with each number in two halves of bf16, where the machine has a matrix unit; else as above.
#[divan::bench(args = STEP_ROWS)]
fn linear_of_a_step_in_halves(b: Bencher<'_, '_>, rows: usize) {
    in_halves(|| linear_in_out(b, rows));
}

#[divan::bench(args = STEP_ROWS)]
fn linear_gradient_in_halves(b: Bencher<'_, '_>, rows: usize) {
    in_halves(|| linear_gradient(b, rows));
}

fn in_halves(f: impl FnOnce()) {
    ops::permitting(Halves::Always, f);
}

#[divan::bench(args = ROWS)]
fn linear_candle(b: Bencher<'_, '_>, rows: usize) {
    let weights: Vec<_> = (0..COPIES).map(|_| rand(HIDDEN, FF)).collect();
    let (x, mut i) = (rand(rows, HIDDEN), 0);
    b.counter(flops(rows, HIDDEN, FF)).bench_local(|| {
        i += 1;
        black_box(&x).matmul(&weights[i % COPIES])
    });
}

fn linear_quantized(b: Bencher<'_, '_>, rows: usize, kind: QuantKind) {
    let blocks = ops::quantize(&rand(FF, HIDDEN), kind).expect("blocks");
    let one = |_| Weight::from(Quantized::from_blocks(kind, &blocks, (FF, HIDDEN)).expect("panels"));
    let weights: Vec<_> = (0..COPIES).map(one).collect();
    let (x, mut i) = (rand(rows, HIDDEN), 0);
    b.counter(flops(rows, HIDDEN, FF)).bench_local(|| {
        i += 1;
        ops::linear(black_box(&x), &weights[i % COPIES], None)
    });
}

fn linear_candle_quantized(b: Bencher<'_, '_>, rows: usize, dtype: GgmlDType) {
    let one =
        |_| QMatMul::from_qtensor(QTensor::quantize(&rand(FF, HIDDEN), dtype).expect("blocks")).expect("a matrix");
    let weights: Vec<_> = (0..COPIES).map(one).collect();
    let (x, mut i) = (rand(rows, HIDDEN), 0);
    b.counter(flops(rows, HIDDEN, FF)).bench_local(|| {
        i += 1;
        weights[i % COPIES].forward(black_box(&x))
    });
}

#[divan::bench(args = ROWS)]
fn linear_q8_0(b: Bencher<'_, '_>, rows: usize) {
    linear_quantized(b, rows, QuantKind::Q8_0);
}

/// As it is served: activations in 8 bits, too.
#[divan::bench(args = ROWS)]
fn linear_q8_0_int8(b: Bencher<'_, '_>, rows: usize) {
    ops::with_activations(Activations::AsWeights, || linear_quantized(b, rows, QuantKind::Q8_0));
}

#[divan::bench(args = ROWS)]
fn linear_q8_0_candle(b: Bencher<'_, '_>, rows: usize) {
    linear_candle_quantized(b, rows, GgmlDType::Q8_0);
}

#[divan::bench(args = ROWS)]
fn linear_q4k(b: Bencher<'_, '_>, rows: usize) {
    linear_quantized(b, rows, QuantKind::Q4K);
}

#[divan::bench(args = ROWS)]
fn linear_q4k_candle(b: Bencher<'_, '_>, rows: usize) {
    linear_candle_quantized(b, rows, GgmlDType::Q4K);
}

#[divan::bench(args = &[1, 8, 32])]
fn tied_head(b: Bencher<'_, '_>, rows: usize) {
    let weight = Weight::from_out_in(&rand(50_257, HIDDEN)).expect("weight");
    let x = rand(rows, HIDDEN);
    b.counter(flops(rows, HIDDEN, 50_257)).bench_local(|| ops::linear(black_box(&x), &weight, None));
}

#[divan::bench(args = ROWS)]
fn gelu(b: Bencher<'_, '_>, rows: usize) {
    let x = rand(rows, FF);
    b.counter(ItemsCount::new(rows * FF)).bench_local(|| ops::activate(black_box(&x), Act::GeluTanh));
}

#[divan::bench(args = ROWS)]
fn layer_norm(b: Bencher<'_, '_>, rows: usize) {
    let gain = Tensor::ones(HIDDEN, candle_core::DType::F32, &Device::Cpu).expect("gain");
    let norm = Norm { bias: Some(gain.clone()), gain, center: true, eps: 1e-5 };
    let x = rand(rows, HIDDEN);
    b.counter(ItemsCount::new(rows * HIDDEN)).bench_local(|| ops::norm(black_box(&x), &norm));
}

#[divan::bench(args = ROWS)]
fn bias_add(b: Bencher<'_, '_>, rows: usize) {
    let (x, bias) = (rand(rows, FF), rand(1, FF).flatten_all().expect("bias"));
    b.counter(ItemsCount::new(rows * FF)).bench_local(|| black_box(&x).broadcast_add(&bias));
}
