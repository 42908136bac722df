//! A tile of a product: a few rows by a panel's columns, over some groups. In plain code, which compilers turn into what vectors
//! a machine has, and in which every other way is checked.

use super::{BLOCK, GROUP, Group, HEAD};
use crate::ops::{packed::PANEL, prefetch, quantized::f16_value, vectorized};

/// Most rows of a tile.
pub(super) const TILE: usize = 4;
/// Groups of four rows of the weight, which lie side by side, and their bytes.
pub(super) const QUADS: usize = GROUP / 4;
pub(super) const QUAD: usize = 4 * PANEL;
/// Bytes of a cache line.
const LINE: usize = 64;

/// What a tile is computed of.
pub(super) struct Step<'a> {
    /// `[rows, groups]`.
    pub(super) x: &'a [Group],
    /// A panel's blocks of these groups.
    pub(super) blocks: &'a [[u8; BLOCK]],
    /// What is to be asked of memory meanwhile.
    pub(super) ahead: &'a [u8],
    /// Whether sums begin here.
    pub(super) first: bool,
}

impl Step<'_> {
    /// Asks for the share of what lies ahead that falls to a group.
    #[inline(always)]
    pub(super) fn ask(&self, group: usize) {
        let (lines, groups) = (self.ahead.len().div_ceil(LINE), self.blocks.len());
        for line in group * lines / groups..(group + 1) * lines / groups {
            prefetch::<false, _>(self.ahead, line * LINE);
        }
    }
}

/// Adds the products of `R` rows' groups to the rows' sums, group by group.
type Compute = unsafe fn(&Step<'_>, &mut [[f32; PANEL]]);

/// A way to compute tiles of one number of rows.
#[derive(Clone, Copy)]
pub(super) struct Tile(Compute);

impl Tile {
    /// # Safety
    /// This machine must have the instructions that it was compiled for.
    #[allow(unsafe_code, reason = "instructions that not every machine has")]
    pub(super) const unsafe fn new(compute: Compute) -> Self {
        Self(compute)
    }

    /// Of as many rows as it is for.
    #[inline]
    #[allow(unsafe_code, reason = "instructions that not every machine has")]
    pub(super) fn compute(&self, step: &Step<'_>, sums: &mut [[f32; PANEL]]) {
        // SAFETY: whoever made it has seen that this machine has them
        unsafe { (self.0)(step, sums) }
    }
}

/// Tiles in plain code.
#[allow(unsafe_code, reason = "said of all tiles")]
pub(super) fn portable() -> [Tile; TILE] {
    // SAFETY: no instructions in particular
    let tile = |compute| unsafe { Tile::new(compute) };
    [tile(plain::<1>), tile(plain::<2>), tile(plain::<3>), tile(plain::<4>)]
}

fn plain<const R: usize>(step: &Step<'_>, sums: &mut [[f32; PANEL]]) {
    vectorized(
        #[inline(always)]
        || {
            for (x, sums) in step.x.chunks_exact(step.blocks.len()).zip(sums).take(R) {
                if step.first {
                    *sums = [0.0; PANEL];
                }
                for (g, (x, block)) in x.iter().zip(step.blocks).enumerate() {
                    step.ask(g);
                    add(x, block, sums);
                }
            }
        },
    );
}

/// Adds the products of a group.
#[inline(always)]
fn add(x: &Group, block: &[u8; BLOCK], sums: &mut [f32; PANEL]) {
    let (scales, codes) = block.split_at(HEAD);
    let mut dots = [0i32; PANEL];
    for (quad, four) in codes.as_chunks::<QUAD>().0.iter().zip(x.codes.as_chunks::<4>().0) {
        for (dot, codes) in dots.iter_mut().zip(quad.as_chunks::<4>().0) {
            for (code, x) in codes.iter().zip(four) {
                *dot += i32::from((code ^ 128) as i8) * i32::from(*x);
            }
        }
    }
    let scales = scales.as_chunks::<2>().0;
    for c in 0..PANEL {
        let scale = f16_value(u16::from_le_bytes(scales[c])) * x.scale;
        sums[c] = (dots[c] as f32).mul_add(scale, sums[c]);
    }
}
