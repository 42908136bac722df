//! A piece of a step that is trained in one pass with pieces of other runs: independent jobs, or candidates of a sweep.
//!
//! Nothing of a run changes before its part of the pass is there, so that where a pass fails, each run may be advanced by
//! itself. A run comes to what it comes to alone up to rounding: its rows meet no others, but products of more rows, and of
//! several deltas, may be computed by other kernels.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{Error, Result};
use rand::rngs::StdRng;

use super::{Advance, Outcome, Phase, Run, RunEvents};
use crate::{
    delta::Delta,
    pacing::Pacer,
    train::{
        encode::Encoded,
        gradients::{self, Gradients},
        together::{self, Member},
    },
};

/// What a pass took of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Took {
    busy: Duration,
    yielded: Duration,
}

/// Times a pass.
pub(super) struct Clock<'a> {
    begun: Instant,
    pacer: Option<&'a Arc<Pacer>>,
    yielded: Duration,
}

impl<'a> Clock<'a> {
    pub(super) fn start(pacer: Option<&'a Arc<Pacer>>) -> Self {
        Self { begun: Instant::now(), pacer, yielded: pacer.map(|p| p.yielded()).unwrap_or_default() }
    }

    /// What it took so far of whoever has this part of it, in (0, 1].
    pub(super) fn took(&self, part: f64) -> Took {
        let yielded = self.pacer.map(|p| p.yielded().saturating_sub(self.yielded)).unwrap_or_default();
        Took { busy: self.begun.elapsed().mul_f64(part), yielded: yielded.mul_f64(part) }
    }
}

/// A run's part of what a pass came to: [`Run::take`].
#[derive(Debug)]
pub struct Share {
    found: (f64, Gradients),
    took: Took,
    /// After what was drawn for the pass.
    dropout: StdRng,
}

/// What a run has in a pass.
struct Piece<'a> {
    delta: Arc<Delta>,
    dropout: StdRng,
    examples: Vec<&'a Encoded>,
    rows: usize,
}

/// One forward and one backward pass on the base for the next piece of each of these runs, which are those of
/// [`Run::shared_rows`]. Changes nothing in them: each is to [`Run::take`] its share before it does anything else.
///
/// # Errors
/// Those of the forward and of the losses; a run that is not about to train a piece, or is of another base.
pub fn shared_pass(runs: &[&Run]) -> Result<Vec<Share>> {
    let Some(first) = runs.first() else { return Ok(Vec::new()) };
    if runs.iter().any(|run| !Arc::ptr_eq(&run.base, &first.base)) {
        candle_core::bail!("runs of several bases in one pass");
    }
    let pacer = first.pacer.as_ref();
    let clock = Clock::start(pacer);
    let pieces = runs.iter().map(|run| run.piece()).collect::<Result<Vec<Piece<'_>>>>()?;
    let mut members = Vec::with_capacity(runs.len());
    for (run, piece) in runs.iter().zip(&pieces) {
        members.push(Member {
            delta: Arc::clone(&piece.delta),
            vars: run.trainable.vars(),
            examples: &piece.examples,
            smoothing: run.input.resolved.label_smoothing,
            weight: run.step_weight(),
        });
    }
    let found = together::gradients(&first.base, &members, pacer)?;
    drop(members);
    let all = pieces.iter().map(|piece| piece.rows).sum::<usize>().max(1) as f64;
    let share = |(found, piece): (_, Piece<'_>)| {
        let took = clock.took(piece.rows as f64 / all);
        Share { found, took, dropout: piece.dropout }
    };
    Ok(found.into_iter().zip(pieces).map(share).collect())
}

impl Run {
    /// Rows of its next piece of training, if that may be in one pass with others' ([`shared_pass`]): begins the step if none
    /// is under way. `None` where something else comes next, and of a run whose pieces are trained alone: of a whole model,
    /// whose base is its own; with preferences or a divergence from the base, which compare with a forward of the bare base;
    /// with gradient checkpointing, whose backward pass goes layer by layer; of a head alone, whose backward pass ends there.
    pub fn shared_rows(&mut self) -> Option<usize> {
        let r = &self.input.resolved;
        let alone = self.trainable.is_full()
            || self.trainable.is_head_alone()
            || r.preference.is_some()
            || r.kl_to_base > 0.0
            || r.gradient_checkpointing;
        if alone || self.fisher.is_some() || self.is_through() || !matches!(self.phase, Phase::Train(_)) {
            return None;
        }
        if self.next_piece().is_none() {
            self.phase = Phase::Train(self.begin_step());
        }
        self.next_piece().map(|piece| self.rows_of(piece))
    }

    /// Takes its part of a pass, with the optimizer's step where the piece was the step's last: what [`Self::advance`] does
    /// after a forward and backward pass of its own.
    pub fn take(&mut self, share: Share) -> Advance {
        let mut events = Vec::new();
        let came = self.try_take(share, &mut events);
        self.came_to(came, events)
    }

    fn try_take(&mut self, share: Share, events: &mut RunEvents) -> Result<Option<Outcome>> {
        if let Phase::Train(step) = &mut self.phase {
            step.todo.pop_front();
        }
        self.dropout = share.dropout;
        match self.take_share(share.found, share.took)? {
            None => self.end_micro(events),
            failed => Ok(failed),
        }
    }

    fn next_piece(&self) -> Option<&Vec<usize>> {
        if let Phase::Train(step) = &self.phase { step.todo.front() } else { None }
    }

    fn rows_of(&self, piece: &[usize]) -> usize {
        piece.iter().map(|i| self.lens[*i] + self.input.train[*i].sequences() * self.ahead).sum()
    }

    fn piece(&self) -> Result<Piece<'_>> {
        let piece = self.next_piece().ok_or_else(|| Error::msg("a run that is not about to train"))?;
        let mut dropout = self.dropout.clone();
        let delta = self.trainable.delta(&mut dropout)?;
        let examples = piece.iter().map(|i| &self.input.train[*i]).collect();
        Ok(Piece { delta, dropout, examples, rows: self.rows_of(piece) })
    }

    /// What divides the losses of its step.
    pub(super) fn step_weight(&self) -> f64 {
        if let Phase::Train(step) = &self.phase { step.weight } else { 1.0 }
    }

    /// Adds a piece's share of the loss and the gradients, as [`Run::forward_backward`] does.
    pub(super) fn take_share(&mut self, (loss, found): (f64, Gradients), took: Took) -> Result<Option<Outcome>> {
        let Phase::Train(step) = &mut self.phase else { return Ok(None) };
        step.loss += loss;
        step.busy += took.busy;
        step.yielded += took.yielded;
        if !loss.is_finite() {
            let message = format!("the loss of step {} is {loss}", self.step + 1);
            return Ok(Some(self.fail("NON_FINITE_LOSS", message)));
        }
        for (sum, grad) in step.grads.iter_mut().zip(found) {
            gradients::add(sum, grad)?;
        }
        Ok(None)
    }

    /// The optimizer's step, if that was the step's last piece.
    pub(super) fn end_micro(&mut self, events: &mut RunEvents) -> Result<Option<Outcome>> {
        match &mut self.phase {
            Phase::Train(step) if step.todo.is_empty() => {
                let step = std::mem::take(step);
                self.finish_step(step, events)
            }
            _ => Ok(None),
        }
    }
}
