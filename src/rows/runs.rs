//! Some rows of a step: of each sequence a run.

use std::ops::Range;

use super::RowLayout;

/// Rows of one span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which span.
    pub span: usize,
    /// Its rows among those of the step; at least one.
    pub rows: Range<usize>,
    /// The first one's place among the rows of all runs.
    pub at: usize,
}

/// Of each span a run of rows, or none, in row order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    runs: Vec<Run>,
    len: usize,
    /// Rows and spans of the step.
    step: (usize, usize),
}

impl RowLayout {
    /// The least runs that hold these rows: of each span, from the first of them to the last. `None` where hardly a row is
    /// left out (less than a sixteenth), so that it is as well to take the step as it is.
    pub fn runs(&self, rows: impl IntoIterator<Item = u32>) -> Option<Runs> {
        let mut held: Vec<Option<(usize, usize)>> = vec![None; self.spans().len()];
        for row in rows.into_iter().map(|row| row as usize).filter(|row| *row < self.rows()) {
            let span = self.spans().partition_point(|s| s.start <= row) - 1;
            let (first, last) = held[span].unwrap_or((row, row));
            held[span] = Some((first.min(row), last.max(row)));
        }
        let mut len = 0;
        let runs = held.into_iter().enumerate().filter_map(|(span, held)| {
            let rows = held.map(|(first, last)| first..last + 1)?;
            len += rows.len();
            Some(Run { span, at: len - rows.len(), rows })
        });
        let runs: Vec<Run> = runs.collect();
        let left_out = self.rows() - len;
        (left_out * 16 > self.rows()).then(|| Runs { runs, len, step: (self.rows(), self.spans().len()) })
    }
}

impl Runs {
    /// The runs, in row order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Rows of all runs.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether they were made for this step.
    pub fn are_of(&self, step: &RowLayout) -> bool {
        self.step == (step.rows(), step.spans().len())
    }

    /// The step's rows that are in the runs, in order.
    pub fn rows(&self) -> impl Iterator<Item = usize> {
        self.runs.iter().flat_map(|run| run.rows.clone())
    }

    /// Where a row of the step is among the rows of all runs.
    pub fn place(&self, row: usize) -> Option<usize> {
        let run = &self.runs[self.runs.partition_point(|run| run.rows.start <= row).checked_sub(1)?];
        run.rows.contains(&row).then(|| run.at + row - run.rows.start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_what_was_asked_for_and_no_row_outside_of_it(
            lens in proptest::collection::vec(1usize..9, 1..8), asked in proptest::collection::vec(any::<u32>(), 0..6),
        ) {
            let layout = RowLayout::packed(&lens);
            let asked: Vec<u32> = asked.iter().map(|row| row % layout.rows() as u32).collect();
            // by row, whether one of its span that was asked for comes no later, and one no earlier
            let held = |row: usize| {
                let span = layout.spans().iter().find(|s| s.rows().contains(&row)).map(|s| s.rows()).unwrap_or_default();
                let own = || asked.iter().map(|r| *r as usize).filter(|r| span.contains(r));
                own().any(|r| r <= row) && own().any(|r| r >= row)
            };
            let wanted: Vec<usize> = (0..layout.rows()).filter(|row| held(*row)).collect();
            let Some(runs) = layout.runs(asked.iter().copied()) else {
                prop_assert!((layout.rows() - wanted.len()) * 16 <= layout.rows());
                return Ok(());
            };
            prop_assert!((layout.rows() - wanted.len()) * 16 > layout.rows());
            prop_assert_eq!(runs.rows().collect::<Vec<_>>(), wanted.clone());
            prop_assert_eq!((runs.len(), runs.is_empty()), (wanted.len(), wanted.is_empty()));
            prop_assert!(runs.are_of(&layout) && !runs.are_of(&RowLayout::packed(&[layout.rows() + 1])));
            for row in 0..layout.rows() + 2 {
                prop_assert_eq!(runs.place(row), wanted.iter().position(|r| *r == row), "row {}", row);
            }
            let mut at = 0;
            for run in runs.runs() {
                let span = layout.spans()[run.span].rows();
                prop_assert!(span.start <= run.rows.start && run.rows.end <= span.end && !run.rows.is_empty());
                prop_assert_eq!(run.at, at);
                at += run.rows.len();
            }
        }
    }

    #[test]
    fn hardly_a_row_left_out_is_none() {
        let layout = RowLayout::packed(&[1, 1, 1]);
        assert_eq!(layout.runs([0, 1, 2]), None, "a decode step");
        assert_eq!(layout.runs([0, 2]).map(|runs| runs.len()), Some(2));
        assert_eq!(layout.runs([]).map(|runs| runs.len()), Some(0), "no row is wanted");
        let text = RowLayout::packed(&[128]);
        assert_eq!(text.runs(0..127), None, "all but the last one");
        assert_eq!(text.runs(0..121), None);
        assert_eq!(text.runs([0, 118]).map(|runs| runs.len()), Some(119), "from the first to the last");
        assert_eq!(text.runs([7, 500]).map(|runs| runs.len()), Some(1), "rows that are not there are nobody's");
    }
}
