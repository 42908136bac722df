//! Products of 8-bit codes with activations in 8 bits, as llama.cpp computes them.
//!
//! A row is cut into groups of 32, as a block of weights is deep. Each is rounded to 8 bits with a scale of its own, the
//! dot product of two groups is one of integers, and the sums of these, times both scales, are f32. What is rounded is some
//! 0.4 % of a group's largest number; a product costs a fourth of the instructions of f32, and the codes are not expanded.
//!
//! Integers are the same whatever computes them, and what is f32 comes in one order, so every path gives the same bits. A row's
//! numbers do not depend on the rows beside it: groups, order and rounding are its own.

mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::{mem::MaybeUninit, ops::Range, sync::LazyLock};

use self::tile::{Step, TILE, Tile};
use super::{QuantKind, Quantized};
use crate::ops::{
    packed::{self, Activations, PANEL, activations},
    team::{each, threads},
    vectorized,
};

/// Weights and activations that share a scale.
const GROUP: usize = 32;
/// Bytes of a panel's block: the columns' scales, then their codes, `[GROUP / 4, PANEL, 4]`.
const BLOCK: usize = HEAD + GROUP * PANEL;
/// Bytes of its scales.
const HEAD: usize = 2 * PANEL;
/// Groups that all rows are multiplied with before the next: they stay in the first level.
const DEEP: usize = 8;
/// Most rows that are computed together: their codes of [`DEEP`] groups and their sums stay in the second level.
const ROWS: usize = 128;
/// Multiply-adds that are worth a second thread.
const WORTH_A_THREAD: usize = 256 * 1024;

// what `Quantized` keeps
const _: () = {
    assert!(QuantKind::Q8_0.form().bytes() == BLOCK && QuantKind::Q8_0.form().quads);
    assert!(QuantKind::Q5_0.form().bytes() == BLOCK && QuantKind::Q5_0.form().quads);
};

/// Numbers of a row in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Group {
    /// -127 to 127.
    codes: [i8; GROUP],
    scale: f32,
    /// What a sum of products with codes that are 128 too large begins with: -128 times the sum of `codes`.
    start: i32,
}

impl Group {
    /// Rounds to the nearest multiple of a 127th of the largest. Numbers below 2^-119 count as zeros, as does their like in
    /// any quotient of f32; where one is not finite, neither is the scale, so that no sum is.
    #[inline(always)]
    fn of(x: &[f32; GROUP]) -> Self {
        /// 1.5 * 2^23: a sum with it is rounded to an integer, the lowest bits of which are its own.
        const WHOLE: f32 = 12_582_912.0;
        // of numbers without a sign, bits are ordered as the numbers are, infinite and undefined ones last
        let largest = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff));
        let finite = largest < f32::INFINITY.to_bits();
        let (largest, zeros) = (f32::from_bits(largest), Self { codes: [0; GROUP], scale: 0.0, start: 0 });
        let scale = largest / 127.0;
        if !finite {
            return Self { scale: f32::NAN, ..zeros };
        }
        if scale < f32::MIN_POSITIVE {
            return zeros;
        }
        let by = 127.0 / largest;
        let codes = x.map(|x| (x * by + WHOLE).to_bits() as i8);
        let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
        Self { codes, scale, start: -128 * sum }
    }

    /// Four codes, as a lane of a vector has them.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn four(&self, quad: usize) -> i32 {
        i32::from_le_bytes(self.codes.as_chunks::<4>().0[quad].map(|code| code as u8))
    }
}

/// Rows `[m, k]` in groups: `[steps of DEEP groups, m, groups of a step]`.
fn groups_of(x: &[f32], k: usize) -> Vec<Group> {
    let groups = k / GROUP;
    let mut out = Vec::with_capacity(x.len() / GROUP);
    vectorized(
        #[inline(always)]
        || {
            for from in (0..groups).step_by(DEEP) {
                let own = from * GROUP..(from + DEEP).min(groups) * GROUP;
                for row in x.chunks_exact(k) {
                    out.extend(row[own.clone()].as_chunks().0.iter().map(Group::of));
                }
            }
        },
    );
    out
}

/// Tiles of one row, of two, and so on.
type Tiles = [Tile; TILE];

/// The tiles that are fastest here.
static BEST: LazyLock<Tiles> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    if let Some(tiles) = x86::vnni().or_else(x86::avx2) {
        return tiles;
    }
    tile::portable()
});

impl Quantized {
    /// `x [rows, in] W + bias` -> `[rows, out]`, with the activations that this thread is to take ([`crate::ops::with_activations`]) where
    /// the codes have 8 bits.
    pub(in crate::ops) fn product(&self, x: &[f32], bias: Option<&[f32]>, rows: usize) -> Vec<f32> {
        match self.kind {
            QuantKind::Q8_0 | QuantKind::Q5_0 if activations() == Activations::AsWeights => {
                self.product_in_8_bits(x, bias, rows, &BEST)
            }
            _ => packed::product(x, self, bias, (rows, self.in_dim, self.out_dim)),
        }
    }

    #[allow(unsafe_code, reason = "an output is not filled with zeros before it is written")]
    fn product_in_8_bits(&self, x: &[f32], bias: Option<&[f32]>, m: usize, tiles: &Tiles) -> Vec<f32> {
        let (k, n) = (self.in_dim, self.out_dim);
        assert_eq!(x.len(), m * k, "rows of a product"); // what is not computed would not be written
        let panels = n.div_ceil(PANEL);
        let threads = if m * k * n < WORTH_A_THREAD { 1 } else { threads() };
        // rows in even shares, columns in several parts per thread; a part's first blocks are not asked for ahead
        let rows = m.div_ceil(m.div_ceil(ROWS).max(1)).next_multiple_of(TILE);
        let shares = m.div_ceil(rows.max(1)).max(1);
        let per = if threads == 1 { panels.max(1) } else { panels.div_ceil((threads * 8).div_ceil(shares)).max(2) };
        let mut data = Vec::with_capacity(m * n);
        let all = &mut data.spare_capacity_mut()[..m * n];
        let mut taken: Vec<(&[f32], Vec<Group>)> = x.chunks((rows * k).max(1)).map(|rows| (rows, Vec::new())).collect();
        let round = |(rows, groups): &mut (&[f32], Vec<Group>)| *groups = groups_of(rows, k);
        if threads == 1 {
            taken.iter_mut().for_each(round)
        } else {
            each(taken.iter_mut().collect(), round)
        }
        let mut parts = Vec::new();
        for ((_, x), all) in taken.iter().zip(all.chunks_mut((rows * n).max(1))) {
            let mut own: Vec<Vec<&mut [_]>> = (0..panels.div_ceil(per)).map(|_| Vec::with_capacity(rows)).collect();
            for row in all.chunks_mut(n.max(1)) {
                own.iter_mut().zip(row.chunks_mut(per * PANEL)).for_each(|(part, columns)| part.push(columns));
            }
            parts.extend(own.into_iter().enumerate().map(|(i, out)| {
                let panels = i * per..panels.min((i + 1) * per);
                Part { x, blocks: self.data.as_chunks().0, bias, groups: k / GROUP, n, panels, out }
            }));
        }
        each(parts, |part: Part<'_>| part.compute(tiles));
        // SAFETY: the parts cover all rows and columns, and each writes all of its own
        unsafe { data.set_len(m * n) };
        data
    }
}

/// Columns of some panels, for some rows.
struct Part<'a> {
    /// As [`groups_of`] lays them.
    x: &'a [Group],
    /// All panels' blocks.
    blocks: &'a [[u8; BLOCK]],
    bias: Option<&'a [f32]>,
    /// Groups of a row.
    groups: usize,
    n: usize,
    panels: Range<usize>,
    /// The panels' columns of each row; all of them are written.
    out: Vec<&'a mut [MaybeUninit<f32>]>,
}

impl Part<'_> {
    fn compute(mut self, tiles: &Tiles) {
        let (rows, groups) = (self.out.len(), self.groups);
        let count = rows.div_ceil(TILE);
        let mut sums = vec![[0f32; PANEL]; rows];
        for (i, panel) in self.panels.clone().enumerate() {
            for from in (0..groups).step_by(DEEP) {
                let deep = DEEP.min(groups - from);
                let (blocks, ahead) = self.blocks[panel * groups + from..].split_at(deep);
                let ahead = ahead[..ahead.len().min(DEEP)].as_flattened();
                let x = &self.x[from * rows..][..deep * rows];
                for (at, (x, sums)) in x.chunks(TILE * deep).zip(sums.chunks_mut(TILE)).enumerate() {
                    // the tiles share the asking for the next blocks
                    let ahead = &ahead[at * ahead.len() / count..(at + 1) * ahead.len() / count];
                    tiles[sums.len() - 1].compute(&Step { x, blocks, ahead, first: from == 0 }, sums);
                }
            }
            let (at, columns) = (i * PANEL, PANEL.min(self.n - panel * PANEL));
            let bias = self.bias.map(|b| &b[panel * PANEL..][..columns]);
            for (out, sums) in self.out.iter_mut().zip(&sums) {
                let out = out[at..at + columns].iter_mut().zip(sums);
                match bias {
                    Some(bias) => out.zip(bias).for_each(|((o, s), b)| _ = o.write(s + b)),
                    None => out.for_each(|(o, s)| _ = o.write(*s)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
