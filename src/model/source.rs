//! Texts that an encoder has read, kept with their rows and deltas: what a decoder's forward takes.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{Base, Input};
use crate::{
    delta::{Delta, DeltaBatch},
    nn::{Cx, Encoded, Memory},
    pacing::Pacer,
    rows::RowLayout,
};

/// The encoder's output of some sequences.
#[derive(Debug)]
pub struct Source {
    states: Tensor,
    rows: RowLayout,
    deltas: DeltaBatch,
}

impl Source {
    /// Runs the encoder of an encoder-decoder: `rows` and `tokens` of the texts, one delta (or none) per text.
    ///
    /// # Errors
    /// Those of [`super::Transformer::encode`].
    pub fn encode(
        base: &Base,
        rows: RowLayout,
        tokens: &[u32],
        per_span: &[Option<Arc<Delta>>],
        pacer: Option<&Arc<Pacer>>,
    ) -> Result<Self> {
        let deltas = DeltaBatch::new(&rows, per_span, base.sites.len());
        let cx = Cx { pacer, ..Cx::new(&rows, &deltas) };
        let states = base.transformer.encode(&Input::tokens(tokens), &cx)?;
        Ok(Self { states, rows, deltas })
    }

    /// `[rows, hidden]`.
    pub fn states(&self) -> &Tensor {
        &self.states
    }

    /// Which rows are whose.
    pub fn rows(&self) -> &RowLayout {
        &self.rows
    }

    /// As the decoder takes it.
    pub fn encoded(&self) -> Encoded<'_> {
        Encoded { states: &self.states, rows: &self.rows, deltas: &self.deltas }
    }

    /// For a decoder without a cache, whose spans are these texts in order.
    pub fn memory(&self) -> Memory<'_> {
        Memory { encoded: Some(self.encoded()), slots: &[] }
    }
}
