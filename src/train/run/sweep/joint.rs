//! A training micro-step of all candidates in one forward and one backward pass.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use candle_core::{Error, Result};

use super::{Run, RunEvents, Sweep};
use crate::{
    delta::Delta,
    train::{
        batches::micro_batches,
        encode::Encoded,
        gradients::Gradients,
        plan::micro_tokens_of_delta,
        run::{
            Outcome, Phase,
            shared::{Clock, Took},
            telling::METRICS_EVERY,
        },
        together::{self, Member},
    },
};

/// A micro-batch under way, of each candidate the same.
#[derive(Debug)]
pub(super) struct Joint {
    /// The candidates.
    candidates: Vec<usize>,
    /// Those of them that go together, one after the other: all, unless an example is too long for that.
    groups: VecDeque<Group>,
}

/// Candidates whose rows are in one forward.
#[derive(Debug)]
struct Group {
    /// They, and what they train with in this micro-batch: with dropout, what they would have drawn alone.
    deltas: Vec<(usize, Arc<Delta>)>,
    /// Pieces of the micro-batch that are to go, small enough for all of them together.
    todo: VecDeque<Vec<usize>>,
}

impl Sweep {
    /// One piece of the step of these candidates; where it is the last, their optimizers' steps, too.
    pub(super) fn train(&mut self, training: &[usize], events: &mut RunEvents) -> Result<()> {
        let mut joint = match self.joint.take() {
            Some(joint) => joint,
            None => self.begin(training)?,
        };
        let (deltas, piece) = match joint.groups.front_mut() {
            Some(group) => (&group.deltas, group.todo.pop_front().unwrap_or_default()),
            None => candle_core::bail!("no examples to train on"),
        };
        let (found, took) = self.share(deltas, &piece)?;
        let own: Vec<usize> = deltas.iter().map(|(i, _)| *i).collect();
        for (i, found) in own.into_iter().zip(found) {
            let failed = self.members[i].run_mut().map(|run| run.take_share(found, took)).transpose()?;
            if let Some(Some(Outcome::Failed(failed))) = failed {
                joint.groups.iter_mut().for_each(|group| group.deltas.retain(|(at, _)| *at != i));
                self.drop_out(i, failed, events);
            }
        }
        joint.groups.retain(|group| !group.deltas.is_empty() && !group.todo.is_empty());
        if joint.groups.is_empty() {
            return self.end_micro(&joint.candidates, events);
        }
        self.joint = Some(joint);
        Ok(())
    }

    /// Loss and gradients of a piece for each of these candidates, and what it took of each.
    fn share(&self, deltas: &[(usize, Arc<Delta>)], piece: &[usize]) -> Result<(Vec<(f64, Gradients)>, Took)> {
        let clock = Clock::start(self.pacer.as_ref());
        let examples: Vec<&Encoded> = piece.iter().map(|i| &self.input.train[*i]).collect();
        let member = |(i, delta): &(usize, Arc<Delta>)| {
            let run = self.members[*i].run()?;
            Some(Member {
                delta: Arc::clone(delta),
                vars: run.trainable.vars(),
                examples: &examples,
                smoothing: run.input.resolved.label_smoothing,
                weight: run.step_weight(),
            })
        };
        let members: Vec<Member<'_>> = deltas.iter().filter_map(member).collect();
        let found = together::gradients(&self.base, &members, self.pacer.as_ref())?;
        let each = 1.0 / found.len().max(1) as f64;
        Ok((found, clock.took(each)))
    }

    /// The end of a micro-batch, with the optimizers' steps if it was the step's last.
    fn end_micro(&mut self, candidates: &[usize], events: &mut RunEvents) -> Result<()> {
        let each = u32::try_from(candidates.len()).unwrap_or(u32::MAX);
        // of a step, the metrics of all candidates are told, or none
        let due = self.last_metrics.is_none_or(|t| t.elapsed() >= METRICS_EVERY * each);
        let mut stepped = false;
        for &i in candidates {
            let Some(run) = self.members[i].run_mut() else { continue };
            run.last_metrics = (!due).then(Instant::now);
            let (before, mut told) = (run.step, Vec::new());
            let failed = run.end_micro(&mut told)?;
            stepped |= run.step > before;
            self.step = self.step.max(run.step);
            self.tell(i, told, events);
            if let Some(Outcome::Failed(failed)) = failed {
                self.drop_out(i, failed, events);
            }
        }
        if due && stepped {
            self.last_metrics = Some(Instant::now());
        }
        Ok(())
    }

    /// The next micro-batch, which is the same of all.
    fn begin(&mut self, training: &[usize]) -> Result<Joint> {
        let (mut deltas, mut batch) = (Vec::with_capacity(training.len()), None);
        for &i in training {
            let Some(run) = self.members[i].run_mut() else { continue };
            let (own, delta) = run.next_micro()?;
            if *batch.get_or_insert_with(|| own.clone()) != own {
                candle_core::bail!("candidate {} is out of step with the others", super::number(i));
            }
            deltas.push((i, delta));
        }
        let (candidates, batch) = (deltas.iter().map(|(i, _)| *i).collect(), batch.unwrap_or_default());
        let longest = batch.iter().map(|i| self.rows[*i]).max().unwrap_or(1).max(1);
        let most = micro_tokens_of_delta(self.base.device.is_cpu());
        let size = group_size(deltas.len(), longest, most);
        let group = |deltas: &[(usize, Arc<Delta>)]| {
            let most = most / deltas.len().max(1);
            // the number of examples is bounded by the micro-batch that they are cut from
            let todo = micro_batches(&batch, &self.rows, usize::MAX, most).into();
            Group { deltas: deltas.to_vec(), todo }
        };
        Ok(Joint { candidates, groups: deltas.chunks(size).map(group).collect() })
    }
}

/// Candidates that go together where an example has so many rows: as many as keep the bound, in groups of like size.
fn group_size(candidates: usize, longest: usize, rows: usize) -> usize {
    let most = (rows / longest).clamp(1, candidates.max(1));
    candidates.div_ceil(candidates.div_ceil(most).max(1)).max(1)
}

impl Run {
    /// The next micro-batch of its step, and the delta that it trains with in it.
    fn next_micro(&mut self) -> Result<(Vec<usize>, Arc<Delta>)> {
        if !matches!(&self.phase, Phase::Train(step) if !step.todo.is_empty()) {
            self.phase = Phase::Train(self.begin_step());
        }
        let batch = match &mut self.phase {
            Phase::Train(step) => step.todo.pop_front(),
            _ => None,
        };
        let batch = batch.ok_or_else(|| Error::msg("no examples to train on"))?;
        Ok((batch, self.trainable.delta(&mut self.dropout)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_keep_the_bound_wherever_one_candidate_does() {
        for candidates in 1..=16 {
            for longest in [1, 60, 64, 65, 128, 512, 1000, 1024, 5000] {
                let size = group_size(candidates, longest, 1024);
                assert!((1..=candidates).contains(&size), "{candidates} {longest}: {size}");
                assert!(size == 1 || size * longest <= 1024, "{candidates} {longest}: {size}");
            }
        }
        assert_eq!((group_size(16, 64, 1024), group_size(5, 300, 1024), group_size(16, 100, 1024)), (16, 3, 8));
    }
}
