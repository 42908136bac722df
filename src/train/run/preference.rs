//! A run's losses: those of texts and labels as they stand, those of preferences with what the reference says.
//!
//! The reference is the resident base without a delta. An example's log-probabilities under it are taken when they are
//! first needed, one example per turn, and kept: an example is alone in that forward, so that they are the same bits
//! whatever shares its step, also after a stop.

use std::sync::Arc;

use candle_core::Result;

use super::{Run, RunInput};
use crate::{
    delta::Delta,
    model::Base,
    train::{
        encode::{Encoded, Target},
        objective::{Losses, Sequence, losses, smoothed_losses},
        preference::{Answered, Judged, judge, log_probs},
    },
};

/// Which of a run's examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Train,
    Validation,
}

/// What the reference gives the answers of each example, as far as it is known; empty where nothing is compared with it.
#[derive(Debug)]
pub(super) struct References([Vec<Option<[f32; 2]>>; 2]);

impl References {
    pub(super) fn none_yet(input: &RunInput) -> Self {
        let compares = input.resolved.preference.is_some_and(|p| p.has_reference());
        Self([&input.train, &input.validation].map(|all| vec![None; if compares { all.len() } else { 0 }]))
    }

    fn of(&self, side: Side) -> &[Option<[f32; 2]>] {
        &self.0[side as usize]
    }

    /// An example of the batch that is not known yet.
    pub(super) fn missing(&self, side: Side, batch: &[usize]) -> Option<usize> {
        batch.iter().copied().find(|i| self.of(side).get(*i) == Some(&None))
    }
}

impl RunInput {
    pub(super) fn side(&self, side: Side) -> &[Encoded] {
        match side {
            Side::Train => &self.train,
            Side::Validation => &self.validation,
        }
    }
}

impl Run {
    /// Takes the reference of the first example of the batch that lacks one; false if none does.
    pub(super) fn refer(&mut self, side: Side, batch: &[usize]) -> Result<bool> {
        let Some(i) = self.references.missing(side, batch) else { return Ok(false) };
        let bare = Arc::new(Delta::new(self.trainable.detached()?.spec, Vec::new(), None));
        let answers: Vec<Sequence<'_>> = self.input.side(side)[i].answers().collect();
        let sums = log_probs(&self.base, &bare, &answers, self.pacer.as_ref())?.sums.to_vec1::<f32>()?;
        let of = |answer: usize| sums.get(answer).copied().unwrap_or(0.0);
        self.references.0[side as usize][i] = Some([of(0), of(1)]);
        Ok(true)
    }

    /// The losses that are trained, with their gradients.
    pub(super) fn tracked_losses(&mut self, batch: &[usize]) -> Result<Losses> {
        let delta = self.trainable.delta(&mut self.dropout)?;
        let base = self.trainable.base(&self.base)?;
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.train[*i]).collect();
        let Some(p) = self.input.resolved.preference else {
            let smoothing = self.input.resolved.label_smoothing;
            return smoothed_losses(&base, delta, &examples, smoothing, self.pacer.as_ref());
        };
        // of a whole model, plain copies would take more memory than the graph that is dropped at once
        let plain = match self.trainable.is_full() {
            true => (Arc::clone(&base), Arc::clone(&delta)),
            false => (self.trainable.detached_base(&self.base)?, Arc::new(self.trainable.detached()?)),
        };
        let judged = self.judged(Side::Train, batch, &examples, [(&base, &delta), (&plain.0, &plain.1)])?;
        judge(&judged, &p)
    }

    /// The losses that are evaluated: no gradients, no smoothing.
    pub(super) fn plain_losses(&self, side: Side, batch: &[usize]) -> Result<Losses> {
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.side(side)[*i]).collect();
        let delta = Arc::new(self.trainable.detached()?);
        let base = self.trainable.detached_base(&self.base)?;
        let Some(mut p) = self.input.resolved.preference else {
            return losses(&base, delta, &examples, self.pacer.as_ref());
        };
        p.label_smoothing = 0.0;
        judge(&self.judged(side, batch, &examples, [(&base, &delta); 2])?, &p)
    }

    /// What is needed to judge examples: `own` makes the answers that are learned from, `plain` those to other prompts.
    fn judged<'a>(
        &self,
        side: Side,
        batch: &[usize],
        examples: &'a [&'a Encoded],
        [own, plain]: [(&Arc<Base>, &Arc<Delta>); 2],
    ) -> Result<Judged<'a>> {
        let reference = batch.iter().filter_map(|i| self.references.of(side).get(*i).copied().flatten()).collect();
        let pairs = matches!(examples.first().map(|e| &e.target), Some(Target::Preferred(..)));
        let first: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
        let others: Vec<Sequence<'_>> = examples.iter().flat_map(|e| e.answers().skip(1)).collect();
        let run = |(base, delta): (&Arc<Base>, &Arc<Delta>), sequences: &[Sequence<'_>]| -> Result<Answered> {
            log_probs(base, delta, sequences, self.pacer.as_ref())
        };
        let (policy, mismatched) = match pairs {
            true => (run(own, &[first, others].concat())?, Vec::new()),
            false => (run(own, &first)?, run(plain, &others)?.sums.to_vec1::<f32>()?),
        };
        Ok(Judged { examples, policy, mismatched, reference })
    }
}
