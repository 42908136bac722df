//! Rows of several deltas, shared out over threads in runs of rows of one delta.

use std::ops::Range;

use candle_core::{Result, bail};

use super::{WORTH_A_THREAD, cut, part_of, share_out, team};

/// Rows that kernels take together.
const TILE: usize = 4;
/// Most rows of a piece: what they read and write stays in the second level.
const MOST: usize = 32;

/// Consecutive rows of one delta.
#[derive(Debug)]
pub(super) struct Piece<'a> {
    /// Which delta's, in the order given.
    pub(super) owner: usize,
    pub(super) rows: Range<usize>,
    /// The rows of the output.
    pub(super) out: &'a mut [f32],
}

/// Calls `f` with pieces of rows of `out` `[rows, width]` until all rows that are somebody's were in one, on several threads if
/// it is worth it. Of each delta, `owners` has its rows and the work on one of them. How rows are cut depends on all of them, so
/// what `f` makes of a row must not depend on the rows beside it.
///
/// # Errors
/// Rows that two deltas have, or that are not there.
pub(super) fn share_rows<'r>(
    out: &mut [f32],
    width: usize,
    owners: impl Iterator<Item = (&'r [Range<usize>], usize)>,
    f: impl Fn(Vec<Piece<'_>>) + Sync,
) -> Result<()> {
    let rows = out.len().checked_div(width).unwrap_or(0);
    let mut runs: Vec<(Range<usize>, usize, usize)> = Vec::new();
    for (owner, (own, cost)) in owners.enumerate() {
        runs.extend(own.iter().filter(|run| !run.is_empty()).map(|run| (run.clone(), owner, cost.max(1))));
    }
    runs.sort_by_key(|(run, ..)| run.start);
    let ends = runs.iter().map(|(run, ..)| run.start).skip(1).chain([rows]);
    if let Some(((run, ..), _)) = runs.iter().zip(ends).find(|((run, ..), end)| run.end > *end) {
        bail!("rows {run:?} of a delta: another one has some of them, or there are only {rows}");
    }
    let work = runs.iter().map(|(run, _, cost)| run.len() * cost).sum::<usize>();
    // a factor is read once a piece, so long runs are cut into as few pieces as keep all threads at work
    let (long, part) = (work.div_ceil(2 * team::threads()).max(WORTH_A_THREAD), part_of(work));
    let (mut rest, mut at, mut load) = (out, 0, 0);
    let (mut parts, mut pieces) = (Vec::new(), Vec::new());
    for (run, owner, cost) in runs {
        cut(&mut rest, (run.start - at) * width);
        at = run.start;
        let per = long.div_ceil(cost).next_multiple_of(TILE).min(MOST);
        while at < run.end {
            let to = run.end.min(at + per);
            pieces.push(Piece { owner, rows: at..to, out: cut(&mut rest, (to - at) * width) });
            load += (to - at) * cost;
            at = to;
            if load >= part {
                parts.push(std::mem::take(&mut pieces));
                load = 0;
            }
        }
    }
    if !pieces.is_empty() {
        parts.push(pieces);
    }
    share_out(parts, work, f);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row of somebody's is in one piece, of its owner, with its own numbers, and no other row is touched.
    #[test]
    fn every_row_is_given_once_to_its_owner() {
        for (cost, width) in [(1, 3), (5_000, 3), (400_000, 1)] {
            let owners: [&[Range<usize>]; 3] = [&[2..3, 90..200], &[], &[3..40, 50..51, 51..52]];
            let mut out: Vec<f32> = (0..210 * width).map(|i| (i / width) as f32).collect();
            share_rows(&mut out, width, owners.iter().map(|rows| (*rows, cost)), |pieces| {
                for Piece { owner, rows, out } in pieces {
                    assert!(out.len() == rows.len() * width && rows.len() <= MOST);
                    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
                        assert!(owners[owner].iter().any(|own| own.contains(&row)));
                        out.iter_mut().for_each(|o| *o = -*o - 1.0);
                        assert_eq!(out[0], -(row as f32) - 1.0, "twice, or another row");
                    }
                }
            })
            .unwrap();
            for (row, out) in out.chunks_exact(width).enumerate() {
                let owned = owners.iter().any(|own| own.iter().any(|run| run.contains(&row)));
                assert_eq!(out[0], if owned { -(row as f32) - 1.0 } else { row as f32 }, "row {row}");
            }
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range of rows is meant")]
    fn rows_of_two_and_rows_that_are_not_there_are_refused() {
        let mut out = [0f32; 8];
        let mut refused = |owners: [&[Range<usize>]; 2]| {
            share_rows(&mut out, 2, owners.into_iter().map(|rows| (rows, 1)), |_| {}).is_err()
        };
        assert!(refused([&[0..2], &[1..3]]) && refused([&[0..5], &[]]) && refused([&[3..5], &[0..1]]));
        assert!(!refused([&[0..2], &[2..4]]) && !refused([&[], &[]]));
    }
}
