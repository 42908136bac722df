//! Ops: the only place that knows kernels.
//!
//! Each op has a plain reference in candle tensors (differentiable, any device and dtype) and, where it pays, a CPU form
//! in f32 with a backward of its own. Model code never asks which one runs: an op looks at the tensor it is given (its
//! device, its dtype, and whether a gradient is wanted: `track_op`), never at a mode flag. Property tests tie the two.
//!
//! Why not candle's fused ops: `softmax_last_dim`, `layer_norm`, `rms_norm` and `rope` cut gradients silently
//! (huggingface/candle issues 2168, 3011, 3569), and its matmul computes gradients of frozen weights (PR 3773).

mod activation;
mod adamw;
mod adapter;
mod attention;
mod attention_cpu;
mod background;
mod columns;
mod in_order;
mod jacobi;
mod kl;
mod linear;
mod low_rank;
mod math;
mod memory;
mod nll;
mod norm;
mod packed;
mod patch;
mod quantized;
mod rope;
mod runs;
mod scatter;
mod team;
mod updated;

pub use activation::{Act, activate, gate};
pub use adamw::{AdamStep, adamw_in_place, sum_of_squares};
pub use adapter::{AdapterRows, RowScale, adapt_in_place};
pub use attention::{
    AttnMask, AttnPlan, AttnSpan, KeyRows, RelativeBias, attends_own_rows, attention, attention_of_joined,
};
pub use background::{Background, Priority};
pub use columns::{add_bias, scale_columns};
pub use in_order::{times, times_turned};
pub(crate) use jacobi::{dot, rotate};
pub use kl::{Reference, kl_rows};
pub use linear::{Weight, WeightPart, linear};
pub(crate) use memory::huge_pages_of;
pub use memory::{give_back_freed_memory, keep_freed_memory};
pub use nll::{head_kl, head_nll, head_nll_against, smoothed_nll};
pub use norm::{Norm, norm};
#[cfg(test)]
pub(crate) use packed::asked;
pub use packed::{Activations, Halves, in_step, permitting, with_activations};
pub use patch::{PatchRows, SitePatches, patch_in_place};
pub use quantized::{QuantKind, Quantized, quantize};
pub use rope::{RopeTable, rope, rope_leading};
pub use scatter::write_rows;
pub(crate) use team::each;
pub use updated::{Ending, RowUpdates, Update, takes_updates, updated_linear};

use std::{cell::Cell, thread::LocalKey};

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// Whether the CPU kernels take this tensor.
pub(crate) fn is_cpu_f32(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

/// The contiguous elements of an f32 storage.
fn f32_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&data[from..to]),
        None => bail!("a kernel was given a tensor that is not contiguous: {layout:?}"),
    }
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor.
fn with_f32<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(f32_slice(cpu, layout)?),
        _ => bail!("a CPU kernel was given a tensor of another device"),
    }
}

/// A custom op's result.
fn cpu_result(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

/// Numbers multiplied and added that are worth a thread: handing over costs some microseconds.
const WORTH_A_THREAD: usize = 16 * 1024;

/// Splits rows of `width` elements over the threads; `f(first_row, rows)` gets whole rows. Small work stays on this
/// thread.
fn par_rows(out: &mut [f32], width: usize, cost_per_row: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 || out.is_empty() {
        return;
    }
    let rows = out.len() / width;
    let per = rows.div_ceil(team::threads() * 4).max(WORTH_A_THREAD.div_ceil(cost_per_row.max(1))).max(1);
    if per >= rows {
        f(0, out);
    } else {
        each(out.chunks_mut(per * width).enumerate().collect(), |(i, chunk): (usize, &mut [f32])| f(i * per, chunk));
    }
}

/// How much of so much work a part should have, for several parts per thread.
fn part_of(work: usize) -> usize {
    work.div_ceil(team::threads() * 8).max(WORTH_A_THREAD)
}

/// Runs `f` on every item, on several threads if the `work` on all of them together is worth it.
fn share_out<T: Send>(items: Vec<T>, work: usize, f: impl Fn(T) + Sync) {
    if work > WORTH_A_THREAD { each(items, f) } else { items.into_iter().for_each(f) }
}

/// Cuts the first `len` elements off what is left.
fn cut<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (own, more) = std::mem::take(rest).split_at_mut(len);
    *rest = more;
    own
}

/// Asks memory for the line that holds an element to be read soon, or, into the second level, later; the place may lie beyond the slice's end.
#[inline(always)]
#[allow(unsafe_code, reason = "a prefetch is a hint: it reads nothing and faults nowhere, whatever the address")]
fn prefetch<const SECOND_LEVEL: bool, T>(data: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let place = data.as_ptr().wrapping_add(at).cast();
        // SAFETY: see the reason above
        unsafe { if SECOND_LEVEL { _mm_prefetch::<_MM_HINT_T1>(place) } else { _mm_prefetch::<_MM_HINT_T0>(place) } };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}

/// Floats of a cache line.
const LINE: usize = 16;

/// Sets a cell of this thread back when it is dropped.
struct Back<T: Copy + 'static>(&'static LocalKey<Cell<T>>, T);

impl<T: Copy> Drop for Back<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Runs `f` compiled for the best vector unit of this machine (AVX-512, AVX2, NEON, or plain).
#[inline]
fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
