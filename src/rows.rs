//! Packed rows: which rows of a step belong to which sequence. Pure integers.
//!
//! Hidden states are always `[rows, hidden]`. A [`Span`] is one sequence's share of a step: `len` consecutive rows that
//! continue `context_len` positions which were computed in earlier steps (and whose keys and values are in the cache).

use std::{ops::Range, sync::Arc};

/// One sequence's rows in this step.
#[derive(Debug, Clone)]
pub struct Span {
    /// First row.
    pub start: usize,
    /// Number of rows, at least 1.
    pub len: usize,
    /// Positions that were computed before this step.
    pub context_len: usize,
    /// Cache slots of positions `0 .. context_len + len`, in order; empty when the step runs without a cache.
    pub slots: Arc<[u32]>,
}

impl Span {
    /// The rows of this span.
    pub fn rows(&self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// The layout of one step.
#[derive(Debug, Clone, Default)]
pub struct RowLayout {
    spans: Vec<Span>,
    rows: usize,
}

impl RowLayout {
    /// A layout without a cache: sequences of these lengths, one after the other, each from its first position.
    pub fn packed(lens: &[usize]) -> Self {
        let mut layout = Self::default();
        for &len in lens {
            layout.push(len, 0, Arc::from([]));
        }
        layout
    }

    /// Appends a sequence's rows. `slots` holds the cache slot of every position up to the last row, or nothing.
    pub fn push(&mut self, len: usize, context_len: usize, slots: Arc<[u32]>) {
        debug_assert!(len > 0 && (slots.is_empty() || slots.len() == context_len + len));
        self.spans.push(Span { start: self.rows, len, context_len, slots });
        self.rows += len;
    }

    /// The spans, in row order.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Number of rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The last row of every span.
    pub fn last_rows(&self) -> Vec<u32> {
        self.spans.iter().map(|s| (s.start + s.len - 1) as u32).collect()
    }

    /// Position ids of all rows: each span counts on from its context.
    pub fn positions(&self) -> Vec<u32> {
        self.spans.iter().flat_map(|s| (s.context_len..s.context_len + s.len).map(|p| p as u32)).collect()
    }

    /// Rows are a partition: contiguous, in order, without gaps.
    pub fn check(&self) -> Result<(), String> {
        let mut at = 0;
        for s in &self.spans {
            if s.start != at || s.len == 0 || !(s.slots.is_empty() || s.slots.len() == s.context_len + s.len) {
                return Err(format!("span {s:?} breaks the layout at row {at}"));
            }
            at += s.len;
        }
        if at == self.rows { Ok(()) } else { Err(format!("{} rows, spans cover {at}", self.rows)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn spans_partition_the_rows(lens in proptest::collection::vec(1usize..9, 1..12)) {
            let layout = RowLayout::packed(&lens);
            prop_assert_eq!(layout.check(), Ok(()));
            prop_assert_eq!(layout.rows(), lens.iter().sum::<usize>());
            prop_assert_eq!(layout.positions().len(), layout.rows());
            for (span, last) in layout.spans().iter().zip(layout.last_rows()) {
                prop_assert_eq!(span.rows().end - 1, last as usize);
                prop_assert_eq!(layout.positions()[span.start], 0);
            }
        }
    }
}
