//! Frozen matrices in fewer bits, in the block formats of ggml, laid in panels as [`super::packed`] multiplies them.
//!
//! A weight is expanded just before it is used, a block of a panel at a time: a product is that of the dequantised matrix,
//! forward and backward, and nothing but the codes and their scales is kept. Where it is permitted, as in serving, codes of 8
//! bits are multiplied as they are with activations that are rounded to 8 bits ([`int8`]). candle's own quantised product keeps
//! a second, repacked copy of the matrix, and runs on one pool whose callers wait for each other, so that a step of training
//! would hold up a step of serving.

mod blocks;
mod int8;

use std::ops::Range;

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};
use rayon::prelude::*;

use self::blocks::Block;
use super::{packed::PANEL, par_rows, prefetch, with_f32};

/// Bytes of codes that are asked of memory ahead of their use.
const AHEAD: usize = 4096;
/// Rows that are quantised at a time.
const ROWS: usize = 64;

/// A block format of ggml: a run of weights along the input that shares its scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(
    missing_docs,
    reason = "named as ggml names them: bits, then 0 (scale), 1 (scale and minimum) or K (nested scales)"
)]
pub enum QuantKind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// How a value is computed from its code: `(code - offset) * d [* sub] [+ min_sign * min [* sub_min]]`.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows of a block.
    depth: usize,
    /// Rows that share a scale.
    group: usize,
    /// Bits of a code: 8 (signed, but for `quads`) or 4 (unsigned).
    bits: usize,
    /// Whether codes lie as [`int8`] multiplies them: four rows of a column side by side, unsigned.
    quads: bool,
    offset: f32,
    /// 0 where there is no minimum.
    min_sign: f32,
    sub: Sub,
}

/// Scales of groups within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sub {
    None,
    Unsigned,
    Signed,
}

impl QuantKind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// `q8_0`, `q4k` ...
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4k",
            Self::Q5K => "q5k",
            Self::Q6K => "q6k",
        }
    }

    fn dtype(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Weights of a block: the input's width must be a multiple.
    pub fn block(self) -> usize {
        self.dtype().block_size()
    }

    /// Bytes of a block as ggml stores it.
    pub fn block_bytes(self) -> usize {
        self.dtype().type_size()
    }

    /// Bytes of `count` weights as ggml stores them; `None` where they are no whole number of blocks.
    pub fn bytes_of(self, count: usize) -> Option<usize> {
        count.is_multiple_of(self.block()).then(|| count / self.block() * self.block_bytes())
    }

    const fn form(self) -> Form {
        let plain = Form { depth: 32, group: 32, bits: 8, quads: false, offset: 0.0, min_sign: 0.0, sub: Sub::None };
        let nested = Form { depth: 256, min_sign: -1.0, sub: Sub::Unsigned, ..plain };
        match self {
            Self::Q4_0 => Form { bits: 4, offset: 8.0, ..plain },
            Self::Q4_1 => Form { bits: 4, min_sign: 1.0, ..plain },
            Self::Q5_0 | Self::Q8_0 => Form { quads: true, offset: 128.0, ..plain },
            Self::Q5_1 => Form { min_sign: 1.0, ..plain },
            Self::Q4K => Form { bits: 4, ..nested },
            Self::Q5K => nested,
            Self::Q6K => Form { depth: 256, group: 16, sub: Sub::Signed, ..plain },
        }
    }
}

impl Form {
    const fn has_min(&self) -> bool {
        self.min_sign != 0.0
    }

    /// Bytes of a panel's block before its groups: the scales and minima of its columns, 16-bit floats.
    const fn head(&self) -> usize {
        PANEL * if self.has_min() { 4 } else { 2 }
    }

    /// Bytes of a group before its codes: its own scales and minima.
    const fn group_head(&self) -> usize {
        match (self.sub, self.has_min()) {
            (Sub::None, _) => 0,
            (_, false) => PANEL,
            (_, true) => 2 * PANEL,
        }
    }

    const fn group_bytes(&self) -> usize {
        self.group_head() + self.group * PANEL * self.bits / 8
    }

    /// Bytes of a panel's block.
    const fn bytes(&self) -> usize {
        self.head() + self.depth / self.group * self.group_bytes()
    }
}

/// A matrix `[in, out]` in panels of codes.
pub struct Quantized {
    kind: QuantKind,
    /// Per panel, per block: the columns' scales, their minima, then per group its scales, its minima and its codes, row by
    /// row (two rows to a byte where codes have 4 bits) or four rows by four (`[rows / 4, PANEL, 4]`).
    data: Vec<u8>,
    in_dim: usize,
    out_dim: usize,
}

impl std::fmt::Debug for Quantized {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quantized({} -> {}, {})", self.in_dim, self.out_dim, self.kind.name())
    }
}

/// The blocks of a matrix `[out, in]`, row by row, as ggml stores them.
///
/// # Errors
/// An input width that is no multiple of the format's block; a number that is not finite; those of candle.
pub fn quantize(w: &Tensor, kind: QuantKind) -> Result<Vec<u8>> {
    let (_, in_dim) = w.dims2()?;
    if in_dim == 0 || !in_dim.is_multiple_of(kind.block()) {
        bail!("{}: rows of {in_dim} are no whole blocks of {}", kind.name(), kind.block());
    }
    let part = |rows: &[f32]| {
        // no format has a code for it, and candle makes a zero of some
        if let Some(bad) = rows.iter().find(|number| !number.is_finite()) {
            bail!("{}: {bad} is not finite; finite numbers are accepted", kind.name());
        }
        let rows = Tensor::from_slice(rows, (rows.len() / in_dim, in_dim), &Device::Cpu)?;
        Ok(QTensor::quantize(&rows, kind.dtype())?.data()?.into_owned())
    };
    with_f32(&w.detach().contiguous()?, |numbers| {
        Ok(numbers.par_chunks(ROWS * in_dim).map(part).collect::<Result<Vec<_>>>()?.concat())
    })
}

impl Quantized {
    /// From the blocks of a matrix `[out, in]`, row by row, as ggml stores them.
    ///
    /// # Errors
    /// A number of bytes that does not fit; a scale that is not finite.
    pub fn from_blocks(kind: QuantKind, bytes: &[u8], (out_dim, in_dim): (usize, usize)) -> Result<Self> {
        let count = in_dim.checked_mul(out_dim);
        if in_dim == 0
            || !in_dim.is_multiple_of(kind.block())
            || count.and_then(|n| kind.bytes_of(n)) != Some(bytes.len())
        {
            bail!("{}: {} bytes are no matrix [{out_dim}, {in_dim}]", kind.name(), bytes.len());
        }
        let (form, blocks) = (kind.form(), in_dim / kind.block());
        let row_bytes = blocks * kind.block_bytes();
        let panel_bytes = blocks * form.bytes();
        let mut data = vec![0u8; out_dim.div_ceil(PANEL) * panel_bytes];
        super::memory::huge_pages(&data);
        let pack = |(panel, out): (usize, &mut [u8])| {
            let rows = bytes[panel * PANEL * row_bytes..].chunks_exact(row_bytes).take(PANEL);
            for (column, row) in rows.enumerate() {
                for (stored, out) in row.chunks_exact(kind.block_bytes()).zip(out.chunks_exact_mut(form.bytes())) {
                    let block = Block::read(kind, stored);
                    if !block.is_finite() {
                        bail!("{}: a scale of row {} is not finite", kind.name(), panel * PANEL + column);
                    }
                    place(&block, &form, column, out);
                }
            }
            Ok(())
        };
        data.par_chunks_mut(panel_bytes).enumerate().try_for_each(pack)?;
        Ok(Self { kind, data, in_dim, out_dim })
    }

    /// The format.
    pub fn kind(&self) -> QuantKind {
        self.kind
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The head of a panel's block that row `row` is in, and the bytes of the row's group.
    #[inline(always)]
    fn group(&self, form: &Form, panel: usize, row: usize) -> (&[u8], &[u8]) {
        let block = panel * (self.in_dim / form.depth) + row / form.depth;
        let group = row % form.depth / form.group;
        let (head, groups) = self.data[block * form.bytes()..][..form.bytes()].split_at(form.head());
        (head, &groups[group * form.group_bytes()..][..form.group_bytes()])
    }

    /// The values of a panel's rows, `[rows, PANEL]`. Rows begin and end at a group's border.
    #[inline(always)]
    pub(super) fn expand(&self, panel: usize, rows: Range<usize>, out: &mut [f32]) {
        // a form that is known when this is compiled
        match self.kind {
            QuantKind::Q4_0 => self.expand_as(const { &QuantKind::Q4_0.form() }, panel, rows, out),
            QuantKind::Q4_1 => self.expand_as(const { &QuantKind::Q4_1.form() }, panel, rows, out),
            QuantKind::Q5_0 | QuantKind::Q8_0 => self.expand_as(const { &QuantKind::Q8_0.form() }, panel, rows, out),
            QuantKind::Q5_1 => self.expand_as(const { &QuantKind::Q5_1.form() }, panel, rows, out),
            QuantKind::Q4K => self.expand_as(const { &QuantKind::Q4K.form() }, panel, rows, out),
            QuantKind::Q5K => self.expand_as(const { &QuantKind::Q5K.form() }, panel, rows, out),
            QuantKind::Q6K => self.expand_as(const { &QuantKind::Q6K.form() }, panel, rows, out),
        }
    }

    #[inline(always)]
    fn expand_as(&self, form: &'static Form, panel: usize, rows: Range<usize>, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(form.group * PANEL).enumerate() {
            let (head, group) = self.group(form, panel, rows.start + i * form.group);
            let (scale, shift) = factors(form, head, group);
            let codes = group[form.group_head()..].as_chunks::<PANEL>().0;
            let out = out.as_chunks_mut::<PANEL>().0;
            if form.quads {
                for (quad, out) in codes.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<4>().0) {
                    for codes in quad {
                        prefetch::<false, _>(codes, AHEAD);
                    }
                    let [first, second, third, fourth] = out;
                    for (c, four) in quad.as_flattened().as_chunks::<4>().0.iter().enumerate() {
                        // of whole columns a shift has a vector form; with a loop over rows, it is not found
                        let four = u32::from_le_bytes(*four);
                        let value = |row: u32| ((four >> (8 * row) & 255) as i32 as f32).mul_add(scale[c], shift[c]);
                        (first[c], second[c], third[c], fourth[c]) = (value(0), value(1), value(2), value(3));
                    }
                }
            } else if form.bits == 8 {
                for (codes, out) in codes.iter().zip(out) {
                    prefetch::<false, _>(codes, AHEAD);
                    for c in 0..PANEL {
                        out[c] = f32::from(codes[c] as i8).mul_add(scale[c], shift[c]);
                    }
                }
            } else {
                for (codes, [low, high]) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
                    prefetch::<false, _>(codes, AHEAD);
                    for c in 0..PANEL {
                        low[c] = f32::from(codes[c] & 15).mul_add(scale[c], shift[c]);
                        high[c] = f32::from(codes[c] >> 4).mul_add(scale[c], shift[c]);
                    }
                }
            }
        }
    }

    /// The matrix, `[in, out]`.
    pub(super) fn unpack(&self) -> Vec<f32> {
        let (k, n, step) = (self.in_dim, self.out_dim, self.kind.block());
        let mut out = vec![0f32; k * n];
        out.par_chunks_mut((step * n).max(1)).enumerate().for_each(|(i, out)| {
            let mut values = vec![0f32; step * PANEL];
            for panel in 0..n.div_ceil(PANEL) {
                self.expand(panel, i * step..(i + 1) * step, &mut values);
                for (row, values) in out.chunks_exact_mut(n).zip(values.chunks_exact(PANEL)) {
                    let columns = panel * PANEL..n.min((panel + 1) * PANEL);
                    row[columns.clone()].copy_from_slice(&values[..columns.len()]);
                }
            }
        });
        out
    }

    /// Columns of the matrix as rows, `[ids, in]`. The ids must be below the output's width.
    pub(super) fn columns(&self, ids: &[u32]) -> Vec<f32> {
        let mut out = vec![0f32; ids.len() * self.in_dim];
        par_rows(&mut out, self.in_dim, self.in_dim, |first, rows| {
            for (id, out) in ids[first..].iter().zip(rows.chunks_exact_mut(self.in_dim.max(1))) {
                self.column(*id as usize, out);
            }
        });
        out
    }

    fn column(&self, id: usize, out: &mut [f32]) {
        let (form, panel, column) = (self.kind.form(), id / PANEL, id % PANEL);
        for (i, out) in out.chunks_exact_mut(form.group).enumerate() {
            let (head, group) = self.group(&form, panel, i * form.group);
            let (scale, shift) = factor(&form, head, group, column);
            let codes = &group[form.group_head()..];
            for (row, out) in out.iter_mut().enumerate() {
                let code = match form.bits {
                    8 if form.quads => f32::from(codes[quad_place(row, column)]),
                    8 => f32::from(codes[row * PANEL + column] as i8),
                    _ => f32::from(codes[row / 2 * PANEL + column] >> (row % 2 * 4) & 15),
                };
                *out = code.mul_add(scale, shift);
            }
        }
    }
}

/// Puts a block into its column of a panel's block.
fn place(block: &Block, form: &Form, column: usize, out: &mut [u8]) {
    let (head, groups) = out.split_at_mut(form.head());
    head[2 * column..2 * column + 2].copy_from_slice(&block.scale.to_le_bytes());
    if form.has_min() {
        head[2 * (PANEL + column)..2 * (PANEL + column) + 2].copy_from_slice(&block.min.to_le_bytes());
    }
    for (i, out) in groups.chunks_exact_mut(form.group_bytes()).enumerate() {
        let (own, codes) = out.split_at_mut(form.group_head());
        for (at, value) in [block.scales[i], block.mins[i]].into_iter().enumerate().take(own.len() / PANEL) {
            own[at * PANEL + column] = value;
        }
        for (row, code) in block.codes[i * form.group..(i + 1) * form.group].iter().enumerate() {
            match form.bits {
                8 if form.quads => codes[quad_place(row, column)] = code ^ 128,
                8 => codes[row * PANEL + column] = *code,
                _ => codes[row / 2 * PANEL + column] |= code << (row % 2 * 4),
            }
        }
    }
}

/// Where a code is, four rows of a column being side by side.
const fn quad_place(row: usize, column: usize) -> usize {
    row / 4 * 4 * PANEL + 4 * column + row % 4
}

/// What a group's codes are multiplied with, and what is added, by column.
#[inline(always)]
fn factors(form: &Form, head: &[u8], group: &[u8]) -> ([f32; PANEL], [f32; PANEL]) {
    let (mut scale, mut shift) = ([0f32; PANEL], [0f32; PANEL]);
    for c in 0..PANEL {
        (scale[c], shift[c]) = factor(form, head, group, c);
    }
    (scale, shift)
}

/// The same of one column.
#[inline(always)]
fn factor(form: &Form, head: &[u8], group: &[u8], c: usize) -> (f32, f32) {
    let half = |at: usize| f16_value(u16::from_le_bytes([head[at], head[at + 1]]));
    let own = match form.sub {
        Sub::None => 1.0,
        Sub::Unsigned => f32::from(group[c]),
        Sub::Signed => f32::from(group[c] as i8),
    };
    let scale = half(2 * c) * own;
    let shift = match (form.has_min(), form.sub) {
        (false, _) => -form.offset * scale,
        (true, Sub::None) => form.min_sign * half(2 * (PANEL + c)),
        (true, _) => form.min_sign * half(2 * (PANEL + c)) * f32::from(group[PANEL + c]),
    };
    (scale, shift)
}

/// A finite 16-bit float; in operations that have a vector form everywhere.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    /// 2^112: from the smaller exponent's bias to the larger's.
    const BIAS: f32 = f32::from_bits(0x7780_0000);
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    f32::from_bits((f32::from_bits(rest) * BIAS).to_bits() | sign)
}

#[cfg(test)]
mod tests;
