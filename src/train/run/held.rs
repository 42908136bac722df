//! Forgetting: the loss on a held text with what the job made, and with the bare base.

use std::{collections::VecDeque, sync::Arc};

use candle_core::Result;

use super::{Outcome, Phase, Run, RunEvents};
use crate::{
    admission::train_params::{ForgettingEvent, JobEventBody, NoteEvent},
    delta::Delta,
    model::Base,
    train::{batches::micro_batches, encode::Encoded, objective::losses, plan::MICRO_TOKENS},
};

/// A comparison under way.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) todo: VecDeque<Vec<usize>>,
    /// The bare base, and what was made: a delta on the base, or a base of its own.
    sides: [(Arc<Base>, Arc<Delta>); 2],
    /// Their losses so far.
    sums: [f64; 2],
    tokens: usize,
}

impl Run {
    pub(super) fn begin_held(&mut self) -> Result<()> {
        if let Some(best) = self.bests.first() {
            self.trainable.restore(&best.snapshot)?; // nothing is trained any more
        }
        let made = self.trainable.detached_base(&self.base)?;
        let delta = self.trainable.detached()?;
        let bare = Delta::new(delta.spec.clone(), Vec::new(), None);
        let order: Vec<usize> = (0..self.input.held.len()).collect();
        let todo = micro_batches(&order, &self.rows(&self.input.held), 64, MICRO_TOKENS).into();
        let sides = [(Arc::clone(&self.base), Arc::new(bare)), (made, Arc::new(delta))];
        self.phase = Phase::Held(Held { todo, sides, sums: [0.0; 2], tokens: 0 });
        Ok(())
    }

    /// One micro-batch, on either side.
    pub(super) fn held_micro(&mut self, batch: &[usize]) -> Result<()> {
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.held[*i]).collect();
        let Phase::Held(held) = &mut self.phase else { return Ok(()) };
        for ((base, delta), sum) in held.sides.iter().zip(&mut held.sums) {
            let each = losses(base, Arc::clone(delta), &examples, self.pacer.as_ref())?.each;
            *sum += each.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
        }
        held.tokens += examples.iter().map(|e| e.weight()).sum::<usize>();
        Ok(())
    }

    pub(super) fn finish_held(&mut self, events: &mut RunEvents) -> Result<Outcome> {
        if let Phase::Held(held) = &self.phase {
            let [base_loss, delta_loss] = held.sums.map(|sum| sum / held.tokens.max(1) as f64);
            events.push(if base_loss.is_finite() && delta_loss.is_finite() {
                JobEventBody::Forgetting(ForgettingEvent { step: self.step, base_loss, delta_loss })
            } else {
                let message = format!("the loss on the held text is {delta_loss}, of the bare base {base_loss}");
                JobEventBody::Warning(NoteEvent { code: "NON_FINITE_LOSS".to_owned(), message })
            });
        }
        self.trained()
    }
}
