//! How the rows and columns of a product are shared out over threads.

use std::{borrow::Cow, mem::MaybeUninit, ops::Range};

use super::{PANEL, SPLIT_ROWS, WORTH_A_THREAD};
use crate::ops::team::{each, threads};

/// Some panels' columns of some rows of a product, to be written.
pub(super) struct Output<'a> {
    /// Columns of all panels.
    pub(super) n: usize,
    pub(super) panels: Range<usize>,
    /// The panels' columns of each row.
    pub(super) rows: Vec<&'a mut [MaybeUninit<f32>]>,
}

impl Output<'_> {
    /// Writes the `i`th panel's columns of every row: `sums [rows, PANEL]` and the bias of all columns.
    #[inline(always)]
    pub(super) fn write(&mut self, i: usize, sums: &[f32], bias: Option<&[f32]>) {
        let panel = self.panels.start + i;
        let (at, columns) = (i * PANEL, PANEL.min(self.n - panel * PANEL));
        let bias = bias.map(|b| &b[panel * PANEL..][..columns]);
        for (out, sums) in self.rows.iter_mut().zip(sums.chunks_exact(PANEL)) {
            let out = out[at..at + columns].iter_mut().zip(sums);
            match bias {
                Some(bias) => out.zip(bias).for_each(|((o, s), b)| _ = o.write(s + b)),
                None => out.for_each(|(o, s)| _ = o.write(*s)),
            }
        }
    }
}

/// A product of `x [m, k]` with `n` columns in panels into `all [m, n]`, on several threads if it is worth it: `lay` makes of
/// rows what `run` takes of the same rows, and `run` must write all of its output.
pub(super) fn share_out<'x, X: Clone + Sync + 'x>(
    x: &'x [f32],
    (m, k, n): (usize, usize, usize),
    all: &mut [MaybeUninit<f32>],
    lay: impl Fn(&'x [f32]) -> Cow<'x, [X]> + Sync,
    run: impl Fn(&[X], Output<'_>) + Sync,
) {
    let threads = threads();
    let panels = n.div_ceil(PANEL);
    if threads == 1 || m * k * n < WORTH_A_THREAD {
        run(&lay(x), Output { n, panels: 0..panels, rows: all.chunks_mut(n.max(1)).collect() });
    } else if m >= SPLIT_ROWS {
        let rows = m.div_ceil(2 * threads).next_multiple_of(8);
        let parts = all.chunks_mut(rows * n).zip(x.chunks(rows * k)).collect();
        each(parts, |(out, x): (&mut [_], &'x [f32])| {
            run(&lay(x), Output { n, panels: 0..panels, rows: out.chunks_mut(n).collect() });
        });
    } else {
        // a part's first blocks are not asked for ahead
        let per = panels.div_ceil(threads * 8).max(2);
        let mut parts: Vec<Vec<&mut [_]>> = (0..panels.div_ceil(per)).map(|_| Vec::with_capacity(m)).collect();
        for row in all.chunks_mut(n) {
            parts.iter_mut().zip(row.chunks_mut(per * PANEL)).for_each(|(part, columns)| part.push(columns));
        }
        let x = lay(x);
        each(parts.into_iter().enumerate().collect(), |(i, rows)| {
            run(&x, Output { n, panels: i * per..panels.min((i + 1) * per), rows });
        });
    }
}
