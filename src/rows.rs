//! Packed rows: which rows of a step belong to which sequence. Pure integers.
//!
//! Hidden states are always `[rows, hidden]`. A [`Span`] is one sequence's share of a step: `len` consecutive rows that
//! continue `context_len` rows which were computed in earlier steps (and whose keys and values are in the cache).
//!
//! A delta may put positions ahead of a sequence's tokens ([`Ahead`]): virtual rows, which are computed like tokens, and
//! keys without rows. So three counts differ and each has one function: the *row* of a sequence (virtual rows first),
//! the *key index* (keys without rows, then rows: what caches and masks count), and the *position id* (what position
//! tables and rotations are asked for).

mod runs;

pub use runs::{Run, Runs};

use std::{ops::Range, sync::Arc};

/// What a delta puts ahead of the tokens of each of its sequences. Nothing by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Ahead {
    /// Virtual rows (prompt tuning): computed like tokens, in the first steps of a sequence.
    pub rows: usize,
    /// Keys and values without rows (prefix tuning): cache slots ahead of the first row's.
    pub keys: usize,
    /// Added to a row's index to get its position id; what would be below 0 is 0.
    pub shift: isize,
    /// Whether the keys are seen by every query, whatever the window; else they are ordinary context.
    pub pinned: bool,
}

impl Ahead {
    /// Cache slots ahead of the first token's.
    pub fn slots(&self) -> usize {
        self.keys + self.rows
    }

    /// Position ids that the tokens of a sequence lose: the first token has this one.
    pub fn first_token_position(&self) -> usize {
        self.position(self.rows)
    }

    /// Most tokens of a sequence, when there are so many position ids and so many cache slots.
    pub fn room(&self, position_ids: usize, slots: usize) -> usize {
        let ids = position_ids.saturating_sub(self.first_token_position());
        ids.min(slots.saturating_sub(self.slots()))
    }

    /// The position id of a sequence's row (virtual rows count).
    pub fn position(&self, row: usize) -> usize {
        row.saturating_add_signed(self.shift)
    }
}

/// One sequence's rows in this step.
#[derive(Debug, Clone)]
pub struct Span {
    /// First row.
    pub start: usize,
    /// Number of rows, at least 1.
    pub len: usize,
    /// Rows of the sequence that were computed before this step, virtual ones included.
    pub context_len: usize,
    /// What its delta puts ahead of its tokens.
    pub ahead: Ahead,
    /// Whether keys without rows are to be put into their cache slots in this step; else they are there.
    pub keys_due: bool,
    /// Cache slots of all its keys up to the last row, in order: keys without rows, then rows; empty when the step runs
    /// without a cache.
    pub slots: Arc<[u32]>,
}

impl Span {
    /// The rows of this span.
    pub fn rows(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// How many of its rows, from the first, are virtual.
    pub fn virtual_len(&self) -> usize {
        self.ahead.rows.saturating_sub(self.context_len).min(self.len)
    }

    /// Its rows that are tokens; may be empty while a sequence begins.
    pub fn token_rows(&self) -> Range<usize> {
        self.start + self.virtual_len()..self.start + self.len
    }

    /// Which of the sequence's tokens its token rows are.
    pub fn tokens(&self) -> Range<usize> {
        let from = (self.context_len + self.virtual_len()).saturating_sub(self.ahead.rows);
        from..from + self.token_rows().len()
    }

    /// The key index of its first row.
    pub fn first_key(&self) -> usize {
        self.ahead.keys + self.context_len
    }

    /// Keys of its sequence up to its last row.
    pub fn keys_len(&self) -> usize {
        self.first_key() + self.len
    }

    /// The row of this span in which the sequence's first token is, if it is in this step.
    pub fn first_token_row(&self) -> Option<usize> {
        let row = self.ahead.rows.checked_sub(self.context_len)?;
        (row < self.len).then_some(self.start + row)
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
        Self::packed_after(lens.iter().map(|&len| (len, Ahead::default())))
    }

    /// A layout without a cache: sequences of so many tokens, each after what its delta puts ahead of them.
    pub fn packed_after(sequences: impl IntoIterator<Item = (usize, Ahead)>) -> Self {
        let mut layout = Self::default();
        for (tokens, ahead) in sequences {
            layout.push_after(ahead, ahead.rows + tokens, 0, Arc::from([]));
        }
        layout
    }

    /// Appends the rows of a sequence with nothing ahead of its tokens. `slots` holds the cache slot of every position
    /// up to the last row, or nothing.
    pub fn push(&mut self, len: usize, context_len: usize, slots: Arc<[u32]>) {
        self.push_after(Ahead::default(), len, context_len, slots);
    }

    /// Appends a sequence's rows: `len` of them (virtual rows count) after `context_len` earlier ones. `slots` holds the
    /// cache slot of every key up to the last row, or nothing.
    pub fn push_after(&mut self, ahead: Ahead, len: usize, context_len: usize, slots: Arc<[u32]>) {
        self.push_shared(ahead, len, context_len, slots, context_len == 0);
    }

    /// As [`Self::push_after`], of a sequence whose first keys may be in the cache because others have put them there:
    /// `keys_due` says whether its keys without rows are not.
    pub fn push_shared(&mut self, ahead: Ahead, len: usize, context_len: usize, slots: Arc<[u32]>, keys_due: bool) {
        debug_assert!(len > 0 && (slots.is_empty() || slots.len() == ahead.keys + context_len + len));
        self.spans.push(Span { start: self.rows, len, context_len, ahead, keys_due, slots });
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
        let of = |s: &Span| {
            let ahead = s.ahead;
            (s.context_len..s.context_len + s.len).map(move |row| ahead.position(row) as u32)
        };
        self.spans.iter().flat_map(of).collect()
    }

    /// Rows that are tokens.
    pub fn token_rows(&self) -> usize {
        self.spans.iter().map(|s| s.token_rows().len()).sum()
    }

    /// One value per row from one per token row; virtual rows get the placeholder. `None` where the counts differ.
    pub fn spread(&self, tokens: &[u32], placeholder: u32) -> Option<Vec<u32>> {
        let mut out = vec![placeholder; self.rows];
        let mut rest = tokens;
        for span in &self.spans {
            let rows = span.token_rows();
            let (own, others) = rest.split_at_checked(rows.len())?;
            out[rows].copy_from_slice(own);
            rest = others;
        }
        rest.is_empty().then_some(out)
    }

    /// Rows are a partition: contiguous, in order, without gaps.
    pub fn check(&self) -> Result<(), String> {
        let mut at = 0;
        for s in &self.spans {
            if s.start != at || s.len == 0 || !(s.slots.is_empty() || s.slots.len() == s.keys_len()) {
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

        /// However a sequence is cut into steps, its rows have the same position ids, key indices and tokens.
        #[test]
        fn chunks_count_as_the_whole_does(
            rows in 0usize..6, keys in 0usize..6, moves: bool, tokens in 1usize..9,
            cuts in proptest::collection::vec(1usize..5, 1..12),
        ) {
            let shift = if moves { keys as isize } else { -(rows as isize) };
            let ahead = Ahead { rows, keys, shift, ..Ahead::default() };
            let whole = RowLayout::packed_after([(tokens, ahead)]);
            prop_assert_eq!(whole.check(), Ok(()));
            prop_assert_eq!((whole.rows(), whole.token_rows()), (rows + tokens, tokens));
            let first = ahead.first_token_position();
            prop_assert_eq!(first, if moves { rows + keys } else { 0 });
            let expected: Vec<u32> = (0..tokens).map(|t| (first + t) as u32).collect();
            prop_assert_eq!(&whole.positions()[rows..], &expected[..]);
            let (mut done, mut positions, mut seen, mut first_rows) = (0, vec![], vec![], 0);
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let len = cut.min(rows + tokens - done);
                if len == 0 { break; }
                let mut layout = RowLayout::default();
                let slots: Arc<[u32]> = (0..(keys + done + len) as u32).collect();
                layout.push_after(ahead, len, done, slots);
                prop_assert_eq!(layout.check(), Ok(()));
                let span = &layout.spans()[0];
                prop_assert_eq!((span.first_key(), span.keys_len()), (keys + done, keys + done + len));
                prop_assert_eq!(span.virtual_len() + span.tokens().len(), len);
                seen.extend(span.tokens());
                first_rows += usize::from(span.first_token_row().is_some());
                if let Some(row) = span.first_token_row() {
                    prop_assert_eq!(span.tokens().start, 0);
                    prop_assert_eq!(row, span.token_rows().start);
                }
                positions.extend(layout.positions());
                done += len;
            }
            prop_assert_eq!(positions, whole.positions());
            prop_assert_eq!(seen, (0..tokens).collect::<Vec<_>>());
            prop_assert_eq!(first_rows, 1);
        }
    }

    #[test]
    fn tokens_are_spread_around_virtual_rows() {
        let two = Ahead { rows: 2, ..Ahead::default() };
        let layout = RowLayout::packed_after([(1, Ahead::default()), (2, two), (1, two)]);
        assert_eq!(layout.spread(&[5, 6, 7, 8], 0), Some(vec![5, 0, 0, 6, 7, 0, 0, 8]));
        assert_eq!(layout.spread(&[5, 6, 7], 0), None);
        assert_eq!(layout.spread(&[5, 6, 7, 8, 9], 0), None);
    }
}
