//! Which numbers of the one vector of all factors act on which rows and columns.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::{RowUpdates, Update};
use crate::ops::part_of;

/// One low-rank update's place: its columns, its ranks within those of its delta, and where its factors begin in the vector.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) columns: Range<usize>,
    pub(super) ranks: Range<usize>,
    pub(super) scale: f32,
    /// Of `A`, behind which `B` lies.
    at: usize,
}

impl Place {
    pub(super) fn a(&self, in_dim: usize) -> Range<usize> {
        self.at..self.at + self.ranks.len() * in_dim
    }

    pub(super) fn b(&self, in_dim: usize) -> Range<usize> {
        let from = self.a(in_dim).end;
        from..from + self.ranks.len() * self.columns.len()
    }
}

/// Consecutive rows of one delta.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) rows: Range<usize>,
    /// Where the run's `[rows, ranks of the delta]` begin in a vector of the small sides of all rows.
    pub(super) low: usize,
}

/// What one delta trains on the linear, and its rows.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) places: Vec<Place>,
    /// Of all places.
    pub(super) ranks: usize,
    /// Where the trained bias `[out]` begins in the vector.
    pub(super) bias: Option<usize>,
    /// In order, apart from one another.
    pub(super) runs: Vec<Run>,
}

impl Share {
    /// Numbers of all `B`.
    pub(super) fn b_numbers(&self) -> usize {
        self.places.iter().map(|p| p.ranks.len() * p.columns.len()).sum()
    }

    /// Its rows, in order.
    pub(super) fn rows(&self) -> Vec<Range<usize>> {
        self.runs.iter().map(|run| run.rows.clone()).collect()
    }
}

/// Consecutive rows of one share, or of none, for one thread.
#[derive(Debug)]
pub(super) struct Piece<'a> {
    pub(super) rows: Range<usize>,
    pub(super) share: Option<&'a Share>,
    pub(super) work: usize,
}

/// All deltas that train something on the linear.
#[derive(Debug)]
pub(super) struct Shares {
    pub(super) all: Vec<Share>,
    /// Numbers of the vector.
    pub(super) numbers: usize,
    /// Numbers of the small sides of all rows, in the order of the rows: each has as many as its delta has ranks.
    pub(super) lows: usize,
    /// All rows in order, and which share has them.
    segments: Vec<(Range<usize>, Option<usize>)>,
}

impl Shares {
    /// The shares, and what their vector is put together of: delta by delta, `A` before `B`, behind them the bias `[out]` if
    /// there is one.
    ///
    /// # Errors
    /// Shapes that do not fit; rows that two deltas have, or that are not there.
    pub(super) fn of(
        updates: &[RowUpdates<'_>],
        (rows, in_dim, out_dim): (usize, usize, usize),
    ) -> Result<(Self, Vec<Tensor>)> {
        let (mut all, mut vector) = (Vec::with_capacity(updates.len()), Vec::new());
        let mut at = 0;
        for RowUpdates { updates, .. } in updates {
            let (mut places, mut ranks) = (Vec::new(), 0);
            for update in updates {
                for (a, b, scale) in &update.low {
                    let (rank, n) = b.dims2()?;
                    if a.dims2()? != (rank, in_dim) || n != update.columns.len() || update.columns.end > out_dim {
                        bail!("linear: factors {:?} and {:?} do not fit {in_dim} -> {n}", a.shape(), b.shape());
                    }
                    vector.extend([a.flatten_all()?, b.flatten_all()?]);
                    let (columns, scale) = (update.columns.clone(), *scale as f32);
                    let place = Place { columns, ranks: ranks..ranks + rank, scale, at };
                    (ranks, at) = (ranks + rank, place.b(in_dim).end);
                    places.push(place);
                }
            }
            let trained = joined_bias(updates, out_dim)?;
            let bias = trained.is_some().then_some(at);
            at += trained.as_ref().map_or(0, Tensor::elem_count);
            vector.extend(trained);
            all.push(Share { places, ranks, bias, runs: Vec::new() });
        }
        let segments = segments(updates, rows)?;
        let mut lows = 0;
        for (rows, share) in &segments {
            let Some(share) = share.and_then(|i| all.get_mut(i)) else { continue };
            share.runs.push(Run { rows: rows.clone(), low: lows });
            lows += rows.len() * share.ranks;
        }
        Ok((Self { all, numbers: at, lows, segments }, vector))
    }

    /// The share that has all rows, if one has.
    pub(super) fn whole(&self) -> Option<&Share> {
        match self.segments.as_slice() {
            [(_, Some(share))] => self.all.get(*share),
            _ => None,
        }
    }

    /// All rows in order, in pieces for threads; `cost` is the work on a row. A run of few rows is a piece, a long one several.
    pub(super) fn pieces(&self, cost: impl Fn(Option<&Share>) -> usize) -> Vec<Piece<'_>> {
        /// Rows that the kernels take together.
        const TILE: usize = 4;
        let segments = || self.segments.iter().map(|(rows, share)| (rows, share.and_then(|i| self.all.get(i))));
        let part = part_of(segments().map(|(rows, share)| rows.len() * cost(share)).sum());
        let mut pieces = Vec::new();
        for (rows, share) in segments() {
            let cost = cost(share);
            let per = part.div_ceil(cost.max(1)).next_multiple_of(TILE);
            pieces.extend(rows.clone().step_by(per).map(|from| {
                let rows = from..(from + per).min(rows.end);
                Piece { work: rows.len() * cost, rows, share }
            }));
        }
        pieces
    }
}

/// All rows in order, and which of the updates have them.
fn segments(updates: &[RowUpdates<'_>], rows: usize) -> Result<Vec<(Range<usize>, Option<usize>)>> {
    let mut owned = Vec::new();
    for (i, update) in updates.iter().enumerate() {
        owned.extend(update.rows.iter().filter(|rows| !rows.is_empty()).map(|rows| (rows.clone(), i)));
    }
    owned.sort_by_key(|(rows, _)| rows.start);
    let mut all: Vec<(Range<usize>, Option<usize>)> = Vec::with_capacity(owned.len() + 1);
    let mut end = 0;
    for (own, i) in owned {
        if own.start < end || own.end > rows {
            bail!("linear: updates of rows {own:?}, of which others have some, or there are only {rows}");
        }
        if own.start > end {
            all.push((end..own.start, None));
        }
        end = own.end;
        match all.last_mut() {
            Some((last, Some(before))) if *before == i && last.end == own.start => last.end = own.end,
            _ => all.push((own, Some(i))),
        }
    }
    if end < rows {
        all.push((end..rows, None));
    }
    Ok(all)
}

/// The updates' biases over all columns, `[out]`.
fn joined_bias(updates: &[Update<'_>], out_dim: usize) -> Result<Option<Tensor>> {
    let mut pieces: Vec<Tensor> = Vec::new();
    let mut end = 0;
    for update in updates.iter().filter(|u| !u.bias.is_empty()) {
        let [first, more @ ..] = update.bias.as_slice() else { continue };
        let mut sum = (*first).clone();
        for b in more {
            sum = (sum + *b)?;
        }
        let fits = sum.dims1()? == update.columns.len() && update.columns.end <= out_dim;
        if !fits || update.columns.start < end {
            bail!("linear: a bias {:?} for columns {:?}", sum.shape(), update.columns);
        }
        if update.columns.start > end {
            pieces.push(Tensor::zeros(update.columns.start - end, sum.dtype(), sum.device())?);
        }
        end = update.columns.end;
        pieces.push(sum);
    }
    let Some(first) = pieces.first() else { return Ok(None) };
    if end < out_dim {
        pieces.push(Tensor::zeros(out_dim - end, first.dtype(), first.device())?);
    }
    if pieces.len() == 1 { Ok(pieces.pop()) } else { Tensor::cat(&pieces, 0).map(Some) }
}
