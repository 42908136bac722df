//! Forgetting: the loss on a held text with the delta that is published, and without any.

use std::{collections::VecDeque, sync::Arc};

use candle_core::Result;

use super::{Outcome, Phase, Run, RunEvents};
use crate::{
    admission::train_params::{ForgettingEvent, JobEventBody},
    delta::Delta,
    train::{batches::micro_batches, encode::Encoded, objective::losses, plan::MICRO_TOKENS},
};

/// A comparison under way.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) todo: VecDeque<Vec<usize>>,
    /// The bare base, and the delta.
    deltas: [Arc<Delta>; 2],
    /// Their losses so far.
    sums: [f64; 2],
    tokens: usize,
}

impl Run {
    pub(super) fn begin_held(&mut self) -> Result<Option<Outcome>> {
        let delta = match &self.best {
            Some(best) => self.trainable.publishable(&best.snapshot)?,
            None => self.trainable.publishable(&self.trainable.snapshot()?)?,
        };
        let bare = Delta::new(delta.spec.clone(), Vec::new(), None);
        let lens: Vec<usize> = self.input.held.iter().map(Encoded::rows).collect();
        let order: Vec<usize> = (0..lens.len()).collect();
        let todo = micro_batches(&order, &self.rows(&lens), 64, MICRO_TOKENS).into();
        self.phase = Phase::Held(Held { todo, deltas: [Arc::new(bare), Arc::new(delta)], sums: [0.0; 2], tokens: 0 });
        Ok(None)
    }

    /// One micro-batch, without and with the delta.
    pub(super) fn held_micro(&mut self, batch: &[usize]) -> Result<()> {
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.held[*i]).collect();
        let Phase::Held(held) = &mut self.phase else { return Ok(()) };
        for (delta, sum) in held.deltas.iter().zip(&mut held.sums) {
            let each = losses(&self.base, Arc::clone(delta), &examples, self.pacer.as_ref())?.each;
            *sum += each.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
        }
        held.tokens += examples.iter().map(|e| e.weight()).sum::<usize>();
        Ok(())
    }

    pub(super) fn finish_held(&mut self, events: &mut RunEvents) -> Result<Outcome> {
        if let Phase::Held(held) = &self.phase {
            let [base_loss, delta_loss] = held.sums.map(|sum| sum / held.tokens.max(1) as f64);
            events.push(JobEventBody::Forgetting(ForgettingEvent { step: self.step, base_loss, delta_loss }));
        }
        self.trained()
    }
}
