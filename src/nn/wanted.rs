//! Which final hidden states the caller of a forward reads, and where they are among those that it gets.

use candle_core::{Error, Result, Tensor};

use super::Cx;
use crate::{
    delta::DeltaBatch,
    rows::{RowLayout, Runs},
};

/// The rows that a step computes behind the last layer's keys and values: those that are wanted, and in each sequence those
/// between them.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Of each sequence a run.
    pub(super) runs: Runs,
    /// Which of these rows belong to which delta.
    pub(super) deltas: DeltaBatch,
}

impl Wanted {
    /// For a step with these deltas whose caller reads these rows; `None` where that is (nearly) every row.
    pub fn of(rows: &RowLayout, deltas: &DeltaBatch, wanted: impl IntoIterator<Item = u32>) -> Option<Self> {
        let runs = rows.runs(wanted)?;
        let pick: Vec<u32> = runs.rows().map(|row| row as u32).collect();
        Some(Self { deltas: deltas.picked(&pick), runs })
    }
}

impl Cx<'_> {
    /// Whether the step computes this row's final hidden state.
    pub(crate) fn computes(&self, row: usize) -> bool {
        self.place(row).is_some()
    }

    /// The final hidden states of these rows of the step, `[rows.len(), hidden]`: `hidden` is what the forward gave.
    ///
    /// # Errors
    /// A row that is not computed; those of candle.
    pub(crate) fn states(&self, hidden: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let place = |row: &u32| match self.place(*row as usize) {
            Some(place) => Ok(place as u32),
            None => Err(Error::msg(format!("row {row} is read, and was not wanted of the forward"))),
        };
        let places = rows.iter().map(place).collect::<Result<Vec<u32>>>()?;
        if places.iter().copied().eq(0..hidden.dim(0)? as u32) {
            return hidden.contiguous();
        }
        hidden.contiguous()?.index_select(&Tensor::new(places, hidden.device())?, 0)
    }

    fn place(&self, row: usize) -> Option<usize> {
        match self.wanted {
            Some(wanted) => wanted.runs.place(row),
            None => (row < self.rows.rows()).then_some(row),
        }
    }
}
