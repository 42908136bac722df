//! A run's losses: those of texts and labels as they stand or, of texts, with the divergence from the bare base; those of
//! preferences with what the reference says.
//!
//! The reference is the resident base without a delta. An example's log-probabilities under it are taken when they are
//! first needed, one example per turn, and kept: an example is alone in that forward, so that they are the same bits
//! whatever shares its step, also after a stop.

use std::{cell::Cell, sync::Arc};

use candle_core::Result;

use super::{Run, RunInput};
use crate::{
    delta::Delta,
    model::Base,
    train::{
        encode::{Encoded, Target},
        gradients::{self, Gradients, LossesOf, Micro},
        objective::{self, Losses, Reads, Sequence, losses, losses_of, next_token, next_token_against},
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

    /// A micro-batch's share of the loss, its gradients, and its share of the divergence from the bare base.
    pub(super) fn gradients(&mut self, batch: &[usize], weight: f64) -> Result<(f64, Gradients, f64)> {
        let delta = self.trainable.delta(&mut self.dropout)?;
        let base = self.trainable.base(&self.base)?;
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.train[*i]).collect();
        let (reads, resolved) = (Reads::of(&examples), &self.input.resolved);
        let take = |sequences: &[Sequence<'_>], losses: LossesOf<'_>| {
            let (delta, pacer) = (Arc::clone(&delta), self.pacer.as_ref());
            let micro = Micro { base: &base, delta, sequences, losses, reads, weight, pacer };
            let gradients = if resolved.gradient_checkpointing { gradients::by_layer } else { gradients::whole };
            gradients(&micro, self.trainable.vars())
        };
        let Some(p) = resolved.preference else {
            let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
            let smoothing = resolved.label_smoothing;
            if resolved.kl_to_base > 0.0 && self.input.replay.is_empty() {
                // the resident base, also where a copy of it is trained
                let reference = objective::bare(&self.base, &delta, &sequences, self.pacer.as_ref())?;
                let (against, apart) = ((&reference, resolved.kl_to_base), Cell::new(0.0));
                let (loss, found) = take(&sequences, &|hidden, cx| {
                    let (each, sum) = next_token_against(&base, hidden, &sequences, smoothing, against, cx)?;
                    apart.set(sum);
                    Ok(each)
                })?;
                return Ok((loss, found, apart.get() / weight));
            }
            let all = (&examples[..], &sequences[..]);
            let (loss, found) = take(&sequences, &|hidden, cx| Ok(losses_of(&base, hidden, all, smoothing, cx)?.each))?;
            return Ok((loss, found, 0.0));
        };
        // of a whole model, plain copies would take more memory than the graph that is dropped at once
        let plain = match self.trainable.is_full() {
            true => (Arc::clone(&base), Arc::clone(&delta)),
            false => (self.trainable.detached_base(&self.base)?, Arc::new(self.trainable.detached()?)),
        };
        let asked = self.asked(Side::Train, batch, &examples, (&plain.0, &plain.1))?;
        let (loss, found) = take(&asked.sequences, &|hidden, cx| {
            let policy = Answered::of(next_token(&base, hidden, &asked.sequences, 0.0, cx)?)?;
            Ok(judge(&asked.judged(policy), &p)?.each)
        })?;
        Ok((loss, found, 0.0))
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
        let asked = self.asked(side, batch, &examples, (&base, &delta))?;
        let policy = log_probs(&base, &delta, &asked.sequences, self.pacer.as_ref())?;
        judge(&asked.judged(policy), &p)
    }

    /// What is asked of examples of preferences, and what is known of them ahead: `plain` makes the answers to other prompts.
    fn asked<'a>(
        &self,
        side: Side,
        batch: &[usize],
        examples: &'a [&'a Encoded],
        (base, delta): (&Arc<Base>, &Arc<Delta>),
    ) -> Result<Asked<'a>> {
        let reference = batch.iter().filter_map(|i| self.references.of(side).get(*i).copied().flatten()).collect();
        let pairs = matches!(examples.first().map(|e| &e.target), Some(Target::Preferred(..)));
        let mut sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
        let others: Vec<Sequence<'_>> = examples.iter().flat_map(|e| e.answers().skip(1)).collect();
        let mismatched = match pairs {
            true => {
                sequences.extend(others);
                Vec::new()
            }
            false => log_probs(base, delta, &others, self.pacer.as_ref())?.sums.to_vec1::<f32>()?,
        };
        Ok(Asked { examples, sequences, mismatched, reference })
    }
}

/// Answers that are to be judged, but for what the delta makes of them.
struct Asked<'a> {
    examples: &'a [&'a Encoded],
    /// Their own answers, and after them, of pairs, the others.
    sequences: Vec<Sequence<'a>>,
    mismatched: Vec<f32>,
    reference: Vec<[f32; 2]>,
}

impl<'a> Asked<'a> {
    fn judged(&self, policy: Answered) -> Judged<'a> {
        let (mismatched, reference) = (self.mismatched.clone(), self.reference.clone());
        Judged { examples: self.examples, policy, mismatched, reference }
    }
}
