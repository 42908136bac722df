//! Products of many rows on Intel's matrix unit (AMX), each number in two halves of bf16.
//!
//! The unit multiplies bf16 and sums in f32, at some sixteen times the rate of f32 multiply-adds. A number of f32 is taken as
//! `high + low`, both bf16, and of a product of two such sums all but `low * low` is computed, as oneMKL's `BF16X2` mode does.
//! What is rounded or left out is below 3 * 2^-16 of each product, some twenty times less than with TF32, in which GPUs multiply
//! f32 by default when they train; of a whole row's sum it is some 2e-6.

pub(super) mod unit;

use std::{
    cell::{Cell, RefCell},
    mem::MaybeUninit,
    ops::Range,
    str::FromStr,
    thread::LocalKey,
};

use super::{DEPTH, PANEL, Panels, scratch};
use crate::ops::{
    Back,
    team::{each, threads},
};

/// Rows and columns of a tile of sums.
const SIDE: usize = 16;
/// Inner numbers of a tile of factors.
const STEP: usize = 32;
/// Numbers of a tile of factors.
const TILE: usize = SIDE * STEP;
/// Numbers of a step of two tiles side by side: the high halves of both, then the low ones.
const PAIR: usize = 4 * TILE;
/// Rows, or columns, of a pair.
const SPAN: usize = 2 * SIDE;
/// Inner numbers of a block: the factors of one pair of columns stay in the first level while all rows go past them.
const DEEP: usize = 2 * DEPTH;
/// Columns that are computed together: two panels, three pairs.
const WIDE: usize = 2 * PANEL;
/// Rows that are computed together: their factors and sums stay in the second level.
const ROWS: usize = 512;
/// Fewest rows for which making tiles of the weight pays.
const FEWEST_ROWS: usize = 64;
/// Multiply-adds from which on it pays.
const WORTH_IT: usize = 8 << 20;

/// Which products may be computed in halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Halves {
    /// None: all in f32.
    #[default]
    Never,
    /// Those of training steps, forward and backward ([`in_step`]).
    Training,
    /// All.
    Always,
}

impl FromStr for Halves {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "off" => Ok(Self::Never),
            "training" => Ok(Self::Training),
            "all" => Ok(Self::Always),
            _ => Err(format!("is {s:?}; accepted are \"off\", \"training\" and \"all\"")),
        }
    }
}

thread_local! {
    static PERMITTED: Cell<Halves> = const { Cell::new(Halves::Never) };
    static IN_STEP: Cell<bool> = const { Cell::new(false) };
}

/// Permits products in halves to the ops that `f` calls on this thread; they are computed so where the machine has the unit and
/// it pays.
pub fn permitting<T>(halves: Halves, f: impl FnOnce() -> T) -> T {
    let _back = Back(&PERMITTED, PERMITTED.replace(halves));
    f()
}

/// Marks what `f` computes as a training step.
pub fn in_step<T>(f: impl FnOnce() -> T) -> T {
    let _back = Back(&IN_STEP, IN_STEP.replace(true));
    f()
}

/// What products asked: tests see whether a permission, or the mark of a step, reaches them, on machines without the unit too.
#[cfg(test)]
pub(crate) mod asked {
    use std::{
        collections::HashSet,
        thread::{ThreadId, current},
    };

    use parking_lot::Mutex;

    use super::{Halves, IN_STEP, PERMITTED};

    /// Thread, rows, what was permitted, whether in a step.
    type Asked = (ThreadId, usize, Halves, bool);

    static ASKED: Mutex<Option<HashSet<Asked>>> = Mutex::new(None);

    pub(super) fn note(rows: usize) {
        let asked = (current().id(), rows, PERMITTED.get(), IN_STEP.get());
        ASKED.lock().get_or_insert_default().insert(asked);
    }

    /// What was permitted to products of so many rows, on any thread.
    pub(crate) fn permitted(rows: usize) -> HashSet<Halves> {
        let asked = ASKED.lock();
        asked.iter().flatten().filter(|(_, of, ..)| *of == rows).map(|(_, _, halves, _)| *halves).collect()
    }

    /// Whether products of this thread were in a step, since this was last called.
    pub(crate) fn in_step() -> HashSet<bool> {
        let (mut asked, own) = (ASKED.lock(), current().id());
        let all = asked.get_or_insert_default();
        let marks = all.iter().filter(|(thread, ..)| *thread == own).map(|(.., mark)| *mark).collect();
        all.retain(|(thread, ..)| *thread != own);
        marks
    }
}

/// Whether a product of these sizes is to be computed here.
pub(super) fn takes(rows: usize, depth: usize, columns: usize) -> bool {
    #[cfg(test)]
    asked::note(rows);
    let permitted = match PERMITTED.get() {
        Halves::Never => false,
        Halves::Training => IN_STEP.get(),
        Halves::Always => true,
    };
    permitted
        && rows >= FEWEST_ROWS
        && depth.min(columns) >= WIDE
        && rows.saturating_mul(depth).saturating_mul(columns) >= WORTH_IT
        && unit::available()
}

// a block that is turned is one of the packed matrix
const _: () = assert!(WIDE == DEPTH && DEEP.is_multiple_of(PANEL) && DEEP.is_multiple_of(STEP));

/// How the right factor lies in the packed `[k, n]` matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Factor {
    /// It is that matrix.
    Straight,
    /// It is its transpose.
    Turned,
}

/// Some columns of the output, of each row.
type Columns<'a> = Vec<&'a mut [MaybeUninit<f32>]>;

/// `x [m, depth] B + bias` -> `out [m, columns]`, where `B` is the packed `[k, n]` matrix or its transpose. All of `out` is
/// written.
pub(super) fn product<W: Panels>(
    x: &[f32],
    (w, factor): (W, Factor),
    bias: Option<&[f32]>,
    (k, n): (usize, usize),
    out: &mut [MaybeUninit<f32>],
) {
    let (depth, columns) = match factor {
        Factor::Straight => (k, n),
        Factor::Turned => (n, k),
    };
    // rows in even shares
    let m = x.len() / depth;
    let rows = m.div_ceil(m.div_ceil(ROWS).max(1)).next_multiple_of(SPAN);
    let per = columns.div_ceil(WIDE).div_ceil(threads() * 4).max(1) * WIDE;
    for (x, out) in x.chunks(rows * depth).zip(out.chunks_mut(rows * columns)) {
        let left = Left::of(x, depth);
        let mut parts: Vec<Columns<'_>> = (0..columns.div_ceil(per)).map(|_| Vec::with_capacity(rows)).collect();
        for row in out.chunks_mut(columns) {
            parts.iter_mut().zip(row.chunks_mut(per)).for_each(|(part, columns)| part.push(columns));
        }
        each(parts.into_iter().enumerate().collect(), |(i, mut out): (usize, Columns<'_>)| {
            let part = Part { left: &left, w, factor, bias, k, depth };
            part.compute(i * per..columns.min((i + 1) * per), &mut out);
        });
    }
}

/// Numbers that begin on a cache line, as tiles are loaded fastest, whatever they were before: a thread keeps them for its next
/// product, since clearing them would take a sixth of its time.
struct Aligned<T: Kept> {
    numbers: Vec<T>,
    from: usize,
}

/// Numbers that threads keep.
trait Kept: Copy + Default + 'static {
    fn kept() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>>;
}

/// Most bytes of one that is kept; a head's are more.
const MOST_KEPT: usize = 16 << 20;
/// How many a thread keeps of a type.
const FEW: usize = 2;

thread_local! {
    static TILES: RefCell<Vec<Vec<u16>>> = const { RefCell::new(Vec::new()) };
    static SUMS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl Kept for u16 {
    fn kept() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>> {
        &TILES
    }
}

impl Kept for f32 {
    fn kept() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>> {
        &SUMS
    }
}

impl<T: Kept> Aligned<T> {
    fn new(len: usize) -> Self {
        let line = 64 / size_of::<T>();
        let mut numbers = T::kept().with_borrow_mut(Vec::pop).unwrap_or_default();
        if numbers.len() < len + line {
            // what is there need not be moved
            numbers.clear();
            numbers.resize(len + line, T::default());
        }
        let from = numbers.as_ptr().align_offset(64).min(line);
        Self { numbers, from }
    }

    fn get(&self) -> &[T] {
        &self.numbers[self.from..]
    }

    fn get_mut(&mut self) -> &mut [T] {
        &mut self.numbers[self.from..]
    }
}

impl<T: Kept> Drop for Aligned<T> {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        if size_of_val(&*numbers) <= MOST_KEPT {
            // a thread that ends keeps nothing
            let _ = T::kept().try_with(|kept| {
                let mut kept = kept.borrow_mut();
                if kept.len() < FEW {
                    kept.push(numbers);
                }
            });
        }
    }
}

/// The rows of the left factor in tiles: `[blocks of DEEP, spans, steps, PAIR]`, padded with zeros.
struct Left {
    tiles: Aligned<u16>,
    spans: usize,
    depth: usize,
}

impl Left {
    fn of(x: &[f32], depth: usize) -> Self {
        let m = x.len() / depth;
        let (spans, steps) = (m.div_ceil(SPAN), depth.div_ceil(STEP));
        let mut tiles = Aligned::new(spans * steps * PAIR);
        let mut jobs = Vec::with_capacity(spans * depth.div_ceil(DEEP));
        let mut rest = tiles.get_mut();
        for from in (0..depth).step_by(DEEP) {
            let deep = from..depth.min(from + DEEP);
            for span in 0..spans {
                let (own, others) = rest.split_at_mut(deep.len().div_ceil(STEP) * PAIR);
                jobs.push((span, deep.clone(), own));
                rest = others;
            }
        }
        let per = jobs.len().div_ceil(threads() * 4).max(1);
        each(jobs.chunks_mut(per).collect(), |jobs: &mut [(usize, Range<usize>, &mut [u16])]| {
            for (span, deep, out) in jobs {
                for (step, out) in out.chunks_exact_mut(PAIR).enumerate() {
                    let from = deep.start + step * STEP;
                    let to = deep.end.min(from + STEP);
                    let (high, low) = out.split_at_mut(2 * TILE);
                    let halves = high.chunks_exact_mut(STEP).zip(low.chunks_exact_mut(STEP));
                    for (r, (high, low)) in halves.enumerate() {
                        let row = (*span * SPAN + r) * depth;
                        // zeros behind the last row
                        unit::split(x.get(row + from..row + to).unwrap_or_default(), high, low);
                    }
                }
            }
        });
        Self { tiles, spans, depth }
    }

    /// The tiles of a span in a block.
    fn pairs(&self, block: usize, span: usize) -> &[u16] {
        let per = |depth: usize| depth.div_ceil(STEP) * PAIR;
        let own = per(DEEP.min(self.depth - block * DEEP));
        &self.tiles.get()[block * per(DEEP) * self.spans + span * own..][..own]
    }
}

/// What a thread computes columns of the output with.
struct Part<'a, W> {
    left: &'a Left,
    w: W,
    factor: Factor,
    bias: Option<&'a [f32]>,
    k: usize,
    depth: usize,
}

impl<W: Panels> Part<'_, W> {
    /// These columns, of which `out` has each row's.
    fn compute(&self, columns: Range<usize>, out: &mut Columns<'_>) {
        let unit = unit::Unit::enter();
        let spans = self.left.spans;
        let mut sums = Aligned::<f32>::new(spans * SPAN * WIDE);
        let mut right = Aligned::<u16>::new(DEEP / STEP * PAIR * WIDE / SPAN);
        let (sums, right, mut scratch) = (sums.get_mut(), right.get_mut(), scratch::<W>());
        for own in columns.clone().step_by(WIDE).map(|from| from..columns.end.min(from + WIDE)) {
            for (block, from) in (0..self.depth).step_by(DEEP).enumerate() {
                let deep = from..self.depth.min(from + DEEP);
                let steps = deep.len().div_ceil(STEP);
                if !deep.len().is_multiple_of(STEP) {
                    right.fill(0);
                }
                match self.factor {
                    Factor::Straight => straight(&self.w, self.k, (deep, own.clone()), &mut scratch, right),
                    Factor::Turned => turned(&self.w, self.k, (own.clone(), deep), &mut scratch, right),
                }
                let pairs = right.chunks_exact(DEEP / STEP * PAIR).take(own.len().div_ceil(SPAN));
                for (right, sums) in pairs.zip(sums.chunks_exact_mut(spans * SPAN * SPAN)) {
                    for (span, sums) in sums.chunks_exact_mut(SPAN * SPAN).enumerate() {
                        unit.multiply(self.left.pairs(block, span), &right[..steps * PAIR], sums, from == 0);
                    }
                }
            }
            let at = own.start - columns.start;
            for (r, row) in out.iter_mut().enumerate() {
                for (pair, out) in row[at..at + own.len()].chunks_mut(SPAN).enumerate() {
                    let sums = &sums[(pair * spans + r / SPAN) * SPAN * SPAN + r % SPAN * SPAN..][..out.len()];
                    match self.bias {
                        Some(bias) => {
                            let bias = &bias[own.start + pair * SPAN..][..out.len()];
                            out.iter_mut().zip(sums).zip(bias).for_each(|((o, s), b)| _ = o.write(s + b));
                        }
                        None => out.iter_mut().zip(sums).for_each(|(o, s)| _ = o.write(*s)),
                    }
                }
            }
        }
    }
}

/// Where the line of a tile begins: of a pair of columns' tiles, at inner number `deep`, which is even.
fn line(column_tile: usize, deep: usize) -> usize {
    let (pair, side) = (column_tile / 2, column_tile % 2);
    (pair * (DEEP / STEP) + deep / STEP) * PAIR + side * TILE + deep % STEP / 2 * STEP
}

/// Tiles of rows `deep` and columns `own` of the packed matrix, `[pairs, steps of DEEP, PAIR]`; in a line of a tile, numbers of
/// two rows are side by side. What lies behind the last column is left as it is.
fn straight<W: Panels>(
    w: &W,
    k: usize,
    (deep, own): (Range<usize>, Range<usize>),
    scratch: &mut [f32],
    out: &mut [u16],
) {
    for (half, first) in own.step_by(PANEL).enumerate() {
        for from in deep.clone().step_by(DEPTH) {
            let (block, _) = w.block(k, first / PANEL, from..deep.end.min(from + DEPTH), scratch);
            for (i, rows) in block.chunks(2 * PANEL).enumerate() {
                let (one, other) = rows.split_at(PANEL);
                for third in 0..PANEL / SIDE {
                    let at = line(half * PANEL / SIDE + third, from - deep.start + 2 * i);
                    let (high, low) = out[at..].split_at_mut(2 * TILE);
                    let numbers = third * SIDE..(third + 1) * SIDE;
                    let other = other.get(numbers.clone()).unwrap_or(&[0.0; SIDE]);
                    unit::split_pairs(&one[numbers], other, &mut high[..STEP], &mut low[..STEP]);
                }
            }
        }
    }
}

/// The same of the transpose: `own` are rows of the packed matrix, `deep` its columns.
fn turned<W: Panels>(w: &W, k: usize, (own, deep): (Range<usize>, Range<usize>), scratch: &mut [f32], out: &mut [u16]) {
    for (i, first) in deep.step_by(PANEL).enumerate() {
        // as wide as a block is deep, and from a multiple of that
        let (block, _) = w.block(k, first / PANEL, own.clone(), scratch);
        for (tile, rows) in block.chunks(SIDE * PANEL).enumerate() {
            for third in 0..PANEL / SIDE {
                // a panel's padding of zeros fills a step at the end, or what is beyond is never multiplied
                let deep = i * PANEL + third * SIDE;
                let at = line(tile, deep);
                let (high, low) = out[at..].split_at_mut(2 * TILE);
                unit::turn(rows, third * SIDE, &mut high[..TILE / 2], &mut low[..TILE / 2]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
