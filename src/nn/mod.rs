//! Building blocks of the one forward. Each knows its own sites; none knows whether it serves or trains.

mod attention;
mod linear;
mod mlp;
mod norm;
mod rotary;
mod sublayer;

pub use attention::Attention;
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::Norm;
pub use rotary::{RopeScaling, Rotary};
pub use sublayer::Sublayer;

use std::sync::Arc;

use candle_core::{CustomOp1, Result, Tensor};

use crate::{
    delta::DeltaBatch,
    kv::KvCache,
    ops::{AttnMask, AttnPlan, AttnSpan, KeyRows, RopeTable},
    pacing::Pacer,
    rows::RowLayout,
};

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
}

impl<'a> Cx<'a> {
    /// A step without a cache and without pacing.
    pub fn new(rows: &'a RowLayout, deltas: &'a DeltaBatch) -> Self {
        Self { rows, deltas, kv: None, pacer: None }
    }
}

/// What all layers of one forward share, computed once.
pub struct Pass<'a> {
    /// The step.
    pub cx: Cx<'a>,
    /// Angles of the step's rows, for rotary models.
    pub rope: Option<RopeTable>,
    /// Sequences as attention sees them.
    pub attention: Arc<AttnPlan>,
    /// Cache slots of the step's rows; empty without a cache.
    pub slots: Vec<u32>,
}

impl<'a> Pass<'a> {
    /// Shapes of heads: (heads, kv_heads, head_dim, scale).
    pub(crate) fn new(cx: Cx<'a>, rope: Option<RopeTable>, heads: HeadShape, mask: AttnMask) -> Self {
        let cached = cx.kv.is_some() && cx.rows.spans().iter().all(|s| !s.slots.is_empty());
        let mut slots = Vec::new();
        let spans = cx
            .rows
            .spans()
            .iter()
            .map(|s| {
                let keys = if cached {
                    slots.extend_from_slice(&s.slots[s.context_len..]);
                    KeyRows::Slots(Arc::clone(&s.slots))
                } else {
                    KeyRows::From(s.start)
                };
                AttnSpan { q_start: s.start, q_len: s.len, context_len: s.context_len, keys }
            })
            .collect();
        let HeadShape { heads, kv_heads, head_dim, scale } = heads;
        Self { cx, rope, attention: Arc::new(AttnPlan { spans, mask, heads, kv_heads, head_dim, scale }), slots }
    }
}

/// Heads of attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
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
