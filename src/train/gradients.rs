//! The gradients of a micro-batch: by one backward pass through the whole forward, or layer by layer.
//!
//! Layer by layer (gradient checkpointing, Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost") keeps only
//! what enters each layer; the layer is computed again when its turn comes in the backward pass. It takes one forward
//! more, and the memory of one layer instead of all. The sums that reach a variable are the same, in the same order,
//! unless several layers use it.

use std::sync::Arc;

use candle_core::{Result, Tensor, Var, backprop::GradStore};

use crate::{
    delta::Delta,
    model::{Base, Input, Walk},
    nn::{Cx, Encoded, Memory},
    ops,
    pacing::Pacer,
    train::{
        objective::{Reads, Sequence, Texts, forward},
        trainable::NamedVar,
    },
};

/// Losses, `[n]`, of final hidden states, `[wanted rows, hidden]`.
pub type LossesOf<'a> = &'a dyn Fn(&Tensor, &Cx<'_>) -> Result<Tensor>;

/// What a micro-batch is computed with.
#[derive(Clone)]
pub struct Micro<'a> {
    /// The base; its weights are variables where it is trained.
    pub base: &'a Base,
    /// Formed of variables.
    pub delta: Arc<Delta>,
    /// What is run.
    pub sequences: &'a [Sequence<'a>],
    /// What is minimised.
    pub losses: LossesOf<'a>,
    /// What of the forward that is computed of.
    pub reads: Reads,
    /// Divides the sum of the losses.
    pub weight: f64,
    /// Set by the trainer.
    pub pacer: Option<&'a Arc<Pacer>>,
}

/// A gradient per variable; `None` where nothing reaches it.
pub type Gradients = Vec<Option<Tensor>>;

/// The micro-batch's share of the loss, and its gradients, detached; no gradients where the loss is not finite.
///
/// # Errors
/// Those of the forward and of the losses.
pub fn whole(micro: &Micro<'_>, vars: &[NamedVar]) -> Result<(f64, Gradients)> {
    ops::in_step(|| by_one_pass(micro, vars))
}

fn by_one_pass(micro: &Micro<'_>, vars: &[NamedVar]) -> Result<(f64, Gradients)> {
    let Micro { base, delta, sequences, losses, reads, weight, pacer } = micro;
    let each = forward(base, delta, (sequences, *reads), *pacer, losses)?;
    let share = (each.sum_all()? / *weight)?;
    let mut sums = Sums::of(vars, &[]);
    let loss = f64::from(share.to_scalar::<f32>()?);
    if loss.is_finite() {
        sums.take(&mut share.backward()?)?;
    }
    Ok((loss, sums.grads))
}

/// As [`whole`], layer by layer.
///
/// # Errors
/// As [`whole`].
pub fn by_layer(micro: &Micro<'_>, vars: &[NamedVar]) -> Result<(f64, Gradients)> {
    ops::in_step(|| by_many_passes(micro, vars))
}

fn by_many_passes(micro: &Micro<'_>, vars: &[NamedVar]) -> Result<(f64, Gradients)> {
    let Micro { base, sequences, losses, reads, weight, pacer, .. } = micro;
    let (delta, made) = with_leaves(&micro.delta)?;
    let delta = Arc::new(delta);
    let mut sums = Sums::of(vars, &made);
    let sources = Texts::sources(base, &delta, sequences);
    let encoder = match &sources {
        Some(s) => Some(base.transformer.walk_encoder(s.cx(None, *pacer))?),
        None => None,
    };
    let source = sources.as_ref().map(|s| Input::tokens(&s.tokens));
    let read = match (&encoder, &source) {
        (Some(walk), Some(input)) => Some(Kept::new(walk, input)?),
        _ => None,
    };
    let states = match (&encoder, &read) {
        (Some(walk), Some(kept)) => Some(kept.leaf(walk.end(kept.last.clone())?.detach())?),
        _ => None,
    };
    let encoded = states.as_ref().zip(sources.as_ref());
    let memory = encoded
        .map(|(states, s)| Memory { encoded: Some(Encoded { states, rows: &s.rows, deltas: &s.deltas }), slots: &[] });
    let texts = Texts::of(base, &delta, (sequences, *reads));
    let cx = texts.cx(memory.as_ref(), *pacer);
    let (walk, input) = (base.transformer.walk(cx)?, Input::tokens(&texts.tokens));
    let kept = Kept::new(&walk, &input)?;
    let last = kept.leaf(kept.last.clone())?;
    let each = losses(&walk.end(last.clone())?, &cx)?;
    let share = (each.sum_all()? / *weight)?;
    let loss = f64::from(share.to_scalar::<f32>()?);
    if !loss.is_finite() {
        return Ok((loss, sums.grads(vars.len())));
    }
    let mut to_states = None;
    let mut grads = share.backward()?;
    drop((share, each));
    sums.take(&mut grads)?;
    let mut and_states = |grads: &mut GradStore| match &states {
        Some(states) => add(&mut to_states, grads.remove(states)),
        None => Ok(()),
    };
    and_states(&mut grads)?;
    if let Some(grad) = grads.remove(&last) {
        back(&walk, &input, kept, grad.detach(), &mut |grads| {
            sums.take(grads)?;
            and_states(grads)
        })?;
    }
    if let (Some(walk), Some(input), Some(kept), Some(grad)) = (&encoder, &source, read, to_states) {
        let last = kept.leaf(kept.last.clone())?;
        let mut grads = meet(&walk.end(last.clone())?, &grad)?;
        sums.take(&mut grads)?;
        if let Some(grad) = grads.remove(&last) {
            back(walk, input, kept, grad.detach(), &mut |grads| sums.take(grads))?;
        }
    }
    sums.pass_on(vars.len(), &made)?;
    Ok((loss, sums.grads(vars.len())))
}

/// What enters the layers.
struct Kept {
    /// By layer: its input, and whether a gradient is wanted of that.
    inputs: Vec<(Tensor, bool)>,
    /// What leaves the last layer, and whether a gradient is wanted of it.
    last: Tensor,
    wanted: bool,
}

impl Kept {
    /// Goes through all layers, each layer's graph being dropped before the next.
    fn new(walk: &Walk<'_>, input: &Input<'_>) -> Result<Self> {
        let x = walk.start(input)?; // [rows, hidden]
        let (mut wanted, mut last) = (x.track_op(), x.detach());
        let mut inputs = Vec::with_capacity(walk.layers());
        for i in 0..walk.layers() {
            let x = walk.layer(i, last.clone())?;
            inputs.push((std::mem::replace(&mut last, x.detach()), wanted));
            wanted |= x.track_op();
        }
        Ok(Self { inputs, last, wanted })
    }

    /// A variable in the place of what leaves the last layer, where a gradient of it is wanted.
    fn leaf(&self, x: Tensor) -> Result<Tensor> {
        leaf(x, self.wanted)
    }
}

/// A variable of this value, if a gradient of it is wanted.
fn leaf(x: Tensor, wanted: bool) -> Result<Tensor> {
    if wanted { Ok(Var::from_tensor(&x)?.into_inner()) } else { Ok(x) }
}

/// The gradients of all that `y` comes from, given its own.
fn meet(y: &Tensor, grad: &Tensor) -> Result<GradStore> {
    (y * grad)?.sum_all()?.backward()
}

/// From the last layer to the first, `take` being given what each step finds.
fn back(
    walk: &Walk<'_>,
    input: &Input<'_>,
    kept: Kept,
    mut grad: Tensor,
    take: &mut dyn FnMut(&mut GradStore) -> Result<()>,
) -> Result<()> {
    for (i, (x, wanted)) in kept.inputs.into_iter().enumerate().rev() {
        let x = leaf(x, wanted)?;
        let mut grads = meet(&walk.layer(i, x.clone())?, &grad)?;
        take(&mut grads)?;
        match grads.remove(&x) {
            Some(next) if wanted => grad = next.detach(),
            _ => return Ok(()), // nothing below is trained
        }
    }
    take(&mut meet(&walk.start(input)?, &grad)?)
}

/// The delta with a variable in the place of each tensor that is computed from variables (by a network, or with dropout),
/// so that no layer goes back into what they share; and what each stands for.
fn with_leaves(delta: &Delta) -> Result<(Delta, Vec<(Tensor, Tensor)>)> {
    let mut made = Vec::new();
    let delta = delta.map(&mut |_, t| {
        if !t.track_op() || t.is_variable() {
            return Ok(t.clone());
        }
        let leaf = leaf(t.detach(), true)?;
        made.push((leaf.clone(), t.clone()));
        Ok(leaf)
    })?;
    Ok((delta, made))
}

/// Sums of gradients, of variables and then of leaves.
pub(super) struct Sums {
    of: Vec<Tensor>,
    grads: Gradients,
}

impl Sums {
    pub(super) fn of(vars: &[NamedVar], made: &[(Tensor, Tensor)]) -> Self {
        let leaves = made.iter().map(|(leaf, _)| leaf);
        let of: Vec<Tensor> = vars.iter().map(|v| v.var.as_tensor()).chain(leaves).cloned().collect();
        Self { grads: vec![None; of.len()], of }
    }

    pub(super) fn take(&mut self, found: &mut GradStore) -> Result<()> {
        self.of.iter().zip(&mut self.grads).try_for_each(|(of, sum)| add(sum, found.remove(of)))
    }

    /// What the leaves (those after the first `vars`) have goes on to the variables that they were made of.
    fn pass_on(&mut self, vars: usize, made: &[(Tensor, Tensor)]) -> Result<()> {
        let mut all = None;
        for ((_, made), grad) in made.iter().zip(self.grads.split_off(vars.min(self.grads.len()))) {
            if let Some(grad) = grad {
                add_up(&mut all, (made * grad)?.sum_all()?)?;
            }
        }
        self.of.truncate(vars);
        match all {
            Some(all) => self.take(&mut all.backward()?),
            None => Ok(()),
        }
    }

    pub(super) fn grads(mut self, vars: usize) -> Gradients {
        self.grads.truncate(vars);
        self.grads
    }
}

/// Adds what was found, without its graph.
pub(super) fn add(sum: &mut Option<Tensor>, found: Option<Tensor>) -> Result<()> {
    found.map_or(Ok(()), |found| add_up(sum, found.detach()))
}

fn add_up(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(before) => (before + more)?,
        None => more,
    });
    Ok(())
}
