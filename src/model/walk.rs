//! A stack of layers, layer by layer: what the forward goes through in one go, and what a backward pass that keeps only
//! the layers' inputs goes through again.

use candle_core::{Result, Tensor, bail};

use super::{Input, Transformer, transformer::Stack};
use crate::{
    delta,
    nn::{Cx, Pass, yield_point},
};

/// A stack on the rows of a step: [`Self::start`], each of [`Self::layers`] by [`Self::layer`], [`Self::end`].
pub struct Walk<'a> {
    transformer: &'a Transformer,
    stack: &'a Stack,
    which: delta::Stack,
    positions: Vec<u32>,
    pass: Pass<'a>,
    /// The last layer's, where not all rows are wanted of it.
    last: Option<Pass<'a>>,
}

impl Transformer {
    /// The layers that [`Self::forward`] runs.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn walk<'a>(&'a self, cx: Cx<'a>) -> Result<Walk<'a>> {
        if !self.arch.is_causal() && cx.rows.spans().iter().any(|s| s.context_len > 0) {
            bail!("an encoder's sequence must be computed in one step");
        }
        Walk::new(self, (&self.main, delta::Stack::Main), cx)
    }

    /// The layers that [`Self::encode`] runs.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn walk_encoder<'a>(&'a self, cx: Cx<'a>) -> Result<Walk<'a>> {
        let Some(encoder) = &self.encoder else { bail!("this base is no encoder-decoder") };
        // cross-attention reads all of it
        Walk::new(self, (encoder, delta::Stack::Encoder), Cx { kv: None, memory: None, wanted: None, ..cx })
    }
}

impl<'a> Walk<'a> {
    fn new(transformer: &'a Transformer, (stack, which): (&'a Stack, delta::Stack), cx: Cx<'a>) -> Result<Self> {
        let positions = cx.rows.positions();
        if let Some(bad) = positions.iter().find(|&&p| p as usize >= transformer.arch.max_positions) {
            bail!("position {bad} of a context of {}", transformer.arch.max_positions);
        }
        let shape = (which, transformer.arch.heads);
        let pass = Pass::new(cx, shape, &stack.styles, &positions, &transformer.device)?;
        let last = pass.of_last()?;
        Ok(Self { transformer, stack, which, positions, pass, last })
    }

    /// How many layers it has.
    pub fn layers(&self) -> usize {
        self.stack.blocks.len()
    }

    /// What enters the first layer, `[rows, hidden]`.
    ///
    /// # Errors
    /// Tokens that do not fit the rows or the vocabulary; those of candle.
    pub fn start(&self, input: &Input<'_>) -> Result<Tensor> {
        self.transformer.check(input, &self.pass.cx)?;
        self.transformer.embeddings(self.which, input, &self.positions, &self.pass.cx)
    }

    /// A layer: `[rows, hidden]` -> the same, or in the last one `[wanted rows, hidden]`. It yields to serving first, where the
    /// step has a pacer.
    ///
    /// # Errors
    /// No such layer; those of candle.
    pub fn layer(&self, i: usize, x: Tensor) -> Result<Tensor> {
        let Some(block) = self.stack.blocks.get(i) else { bail!("layer {i} of {}", self.layers()) };
        let pass = if i + 1 == self.layers() { self.last() } else { &self.pass };
        self.transformer.block(block, yield_point(x, &pass.cx)?, pass)
    }

    /// What leaves the last layer as the heads read it, `[wanted rows, hidden]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn end(&self, x: Tensor) -> Result<Tensor> {
        match &self.stack.final_norm {
            Some(norm) if x.dim(0)? > 0 => norm.forward(&x, &self.last().after),
            _ => Ok(x),
        }
    }

    fn last(&self) -> &Pass<'a> {
        self.last.as_ref().unwrap_or(&self.pass)
    }
}
