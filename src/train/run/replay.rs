//! The divergence from the base on texts of its own, where it is not taken on the job's: in forward and backward passes behind
//! those of the step's examples.

use std::{cell::Cell, collections::VecDeque};

use candle_core::Result;

use super::{Run, RunInput, Step};
use crate::train::{
    batches::{Batches, micro_batches},
    encode::Encoded,
    gradients::{self, Micro},
    objective::{self, Reads, Sequence, divergence},
    plan::{MICRO_TOKENS, micro_tokens_of_delta},
};

/// The texts of a step that are to go.
#[derive(Debug, Default)]
pub(super) struct Replay {
    todo: VecDeque<Vec<usize>>,
    /// Learned tokens of all of the step's.
    weight: f64,
}

/// All texts, over and over: as many in each step as it has examples (packs, where those are packed).
pub(super) fn batches(input: &RunInput) -> Batches {
    let r = &input.resolved;
    let lens: Vec<usize> = input.replay.iter().map(Encoded::rows).collect();
    Batches::new(&lens, r.batch_size as usize * r.grad_accumulation as usize, None, r.seed)
}

impl Step {
    /// Whether nothing of it is to go.
    pub(super) fn is_over(&self) -> bool {
        self.todo.is_empty() && self.replay.todo.is_empty()
    }
}

impl Run {
    /// The texts of the next step.
    pub(super) fn next_replay(&mut self) -> Replay {
        let (batch, texts) = (self.replays.next_batch(), &self.input.replay);
        let of_delta = micro_tokens_of_delta(self.base.device.is_cpu());
        let most = if self.trainable.is_full() { MICRO_TOKENS } else { of_delta };
        let examples = self.input.resolved.batch_size as usize;
        let todo = micro_batches(&batch, &self.rows(texts), examples, most).into();
        let weight = batch.iter().map(|i| texts[*i].weight()).sum::<usize>().max(1) as f64;
        Replay { todo, weight }
    }

    /// Adds some texts' share of the step's divergence to its loss and gradients: normalised by all of the step's texts.
    pub(super) fn replay_micro(&mut self, step: &mut Step) -> Result<f64> {
        let Some(batch) = step.replay.todo.pop_front() else { candle_core::bail!("no examples to train on") };
        let (delta, base) = (self.trainable.delta(&mut self.dropout)?, self.trainable.base(&self.base)?);
        let sequences: Vec<Sequence<'_>> = batch.iter().map(|i| Sequence::from(&self.input.replay[*i])).collect();
        let (r, pacer, weight) = (&self.input.resolved, self.pacer.as_ref(), step.replay.weight);
        // the resident base, also where a copy of it is trained
        let reference = objective::bare(&self.base, &delta, &sequences, pacer)?;
        let apart = Cell::new(0.0);
        let micro = Micro {
            base: &base,
            delta,
            sequences: &sequences,
            losses: &|hidden, cx| {
                let (each, sum) = divergence(&base, hidden, &sequences, (&reference, r.kl_to_base), cx)?;
                apart.set(sum);
                Ok(each)
            },
            reads: Reads::Learned,
            weight,
            pacer,
        };
        let take = if r.gradient_checkpointing { gradients::by_layer } else { gradients::whole };
        let (loss, found) = take(&micro, self.trainable.vars())?;
        step.kl += apart.get() / weight;
        for (sum, grad) in step.grads.iter_mut().zip(found) {
            gradients::add(sum, grad)?;
        }
        Ok(loss)
    }
}
