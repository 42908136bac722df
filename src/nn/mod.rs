//! Building blocks of the one forward. Each knows its own sites; none knows whether it serves or trains.

mod attention;
mod cross;
mod linear;
mod mlp;
mod norm;
mod pass;
mod rotary;
mod sublayer;
mod wanted;

pub use attention::Attention;
pub use cross::CrossAttention;
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::Norm;
pub use pass::{HeadShape, Pass, Style};
pub use rotary::{RopeScaling, Rotary};
pub use sublayer::Sublayer;
pub use wanted::Wanted;

use std::sync::Arc;

use candle_core::{CustomOp1, Result, Tensor};

use crate::{delta::DeltaBatch, kv::KvCache, pacing::Pacer, rows::RowLayout};

/// Everything a forward needs to know about its step: an argument, never a global.
#[derive(Clone, Copy)]
pub struct Cx<'a> {
    /// Which rows belong to which sequence.
    pub rows: &'a RowLayout,
    /// Which rows belong to which delta.
    pub deltas: &'a DeltaBatch,
    /// The cache, if spans have slots.
    pub kv: Option<&'a KvCache>,
    /// Set by the trainer: layer borders yield to serving.
    pub pacer: Option<&'a Arc<Pacer>>,
    /// What a decoder sees of its encoder; `None` for all other models.
    pub memory: Option<&'a Memory<'a>>,
    /// The rows whose final hidden states are read: the last layer computes no others behind its keys and values. `None`: all.
    pub wanted: Option<&'a Wanted>,
}

impl<'a> Cx<'a> {
    /// A step without a cache and without pacing, all of whose rows are read.
    pub fn new(rows: &'a RowLayout, deltas: &'a DeltaBatch) -> Self {
        Self { rows, deltas, kv: None, pacer: None, memory: None, wanted: None }
    }
}

/// What the decoder of an encoder-decoder sees of its encoder.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    /// Outputs that were computed for this step: one span per span of the decoder, in order, or with a cache per span of
    /// the decoder that begins (has no context).
    pub encoded: Option<Encoded<'a>>,
    /// By span of the decoder: the cache slots of what cross-attention reads, a prefix's keys and then its encoder's rows.
    /// Empty without a cache.
    pub slots: &'a [Arc<[u32]>],
}

/// The encoder's output.
#[derive(Clone, Copy)]
pub struct Encoded<'a> {
    /// `[rows, hidden]`, of [`crate::model::Transformer::encode`].
    pub states: &'a Tensor,
    /// Which rows belong to which sequence.
    pub rows: &'a RowLayout,
    /// Which rows belong to which delta.
    pub deltas: &'a DeltaBatch,
}

/// The identity, at a layer border: forward and backward both yield to serving there.
struct YieldPoint(Arc<Pacer>);

impl CustomOp1 for YieldPoint {
    fn name(&self) -> &'static str {
        "yield-point"
    }

    fn cpu_fwd(
        &self,
        storage: &candle_core::CpuStorage,
        layout: &candle_core::Layout,
    ) -> Result<(candle_core::CpuStorage, candle_core::Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &candle_core::Layout,
    ) -> Result<(candle_core::CudaStorage, candle_core::Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.yield_now();
        Ok(Some(grad.clone()))
    }
}

/// Marks a layer border: yields now, and again when backward passes here.
pub(crate) fn yield_point(x: Tensor, cx: &Cx<'_>) -> Result<Tensor> {
    let Some(pacer) = cx.pacer else { return Ok(x) };
    pacer.yield_now();
    if x.track_op() { x.contiguous()?.apply_op1(YieldPoint(Arc::clone(pacer))) } else { Ok(x) }
}
