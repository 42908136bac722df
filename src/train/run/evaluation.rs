//! The evaluations of a run: when, over which examples, and what follows from one.

use std::sync::Arc;

use candle_core::Result;

use super::{Best, Outcome, Phase, Run, RunEvents, Step};
use crate::{
    admission::train_params::{JobEventBody, NoteEvent, WorstEvent},
    train::{
        batches::micro_batches,
        encode::Encoded,
        eval::{Tally, better},
        objective::losses,
        plan::MICRO_TOKENS,
        worst::Worst,
    },
};

impl Run {
    pub(super) fn eval_due(&self) -> bool {
        if self.input.validation.is_empty() {
            return false;
        }
        let every = match self.input.resolved.eval_every {
            0 => self.batches.per_epoch().max(1) as u32,
            n => n,
        };
        self.step.is_multiple_of(every) || self.step == self.input.resolved.total_steps
    }

    pub(super) fn begin_eval(&self) -> Phase {
        let lens: Vec<usize> = self.input.validation.iter().map(Encoded::rows).collect();
        let mut order: Vec<usize> = (0..lens.len()).collect();
        order.sort_by_key(|i| lens[*i]);
        let todo = micro_batches(&order, &self.rows(&lens), 64, MICRO_TOKENS).into();
        let r = &self.input.resolved;
        let worst = Worst::new(r.worst_examples as usize);
        Phase::Eval { todo, tally: Tally::new(r.task, r.problem, &r.labels), worst }
    }

    pub(super) fn eval_micro(&mut self, batch: &[usize]) -> Result<()> {
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.validation[*i]).collect();
        let delta = Arc::new(self.trainable.detached()?);
        let base = self.trainable.detached_base(&self.base)?;
        let losses = losses(&base, delta, &examples, self.pacer.as_ref())?;
        if let Phase::Eval { tally, worst, .. } = &mut self.phase {
            tally.add(&losses)?;
            worst.add(batch, &examples, &losses)?;
        }
        Ok(())
    }

    /// Whether the losses of the training examples are still to be told, since there are none for evaluation.
    pub(super) fn worst_due(&self) -> bool {
        !self.told && self.input.validation.is_empty() && self.input.resolved.worst_examples > 0
    }

    pub(super) fn begin_worst(&self) -> Phase {
        let mut order: Vec<usize> = (0..self.lens.len()).collect();
        order.sort_by_key(|i| self.lens[*i]);
        let todo = micro_batches(&order, &self.rows(&self.lens), 64, MICRO_TOKENS).into();
        Phase::Worst { todo, worst: Worst::new(self.input.resolved.worst_examples as usize) }
    }

    pub(super) fn worst_micro(&mut self, batch: &[usize]) -> Result<()> {
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.train[*i]).collect();
        let delta = Arc::new(self.trainable.detached()?);
        let base = self.trainable.detached_base(&self.base)?;
        let losses = losses(&base, delta, &examples, self.pacer.as_ref())?;
        if let Phase::Worst { worst, .. } = &mut self.phase {
            worst.add(batch, &examples, &losses)?;
        }
        Ok(())
    }

    pub(super) fn finish_worst(&mut self, events: &mut RunEvents) {
        self.told = true;
        if let Phase::Worst { worst, .. } = std::mem::replace(&mut self.phase, Phase::Train(Step::default())) {
            events.push(self.worst_event(&worst, false));
        }
    }

    /// What is told of the worst; numbers that are none cannot be stored, and are a reason to warn.
    fn worst_event(&self, worst: &Worst, held_out: bool) -> JobEventBody {
        let of = if held_out { &self.input.validation } else { &self.input.train };
        let examples = worst.told(of, &self.input.resolved.labels, &self.input.decoder);
        if let Some(sick) = examples.iter().find(|e| !e.loss.is_finite()) {
            let message = format!("the loss of the example in line {} is {}", sick.line, sick.loss);
            return JobEventBody::Warning(NoteEvent { code: "NON_FINITE_LOSS".to_owned(), message });
        }
        let of_validation = held_out && self.input.separate_validation;
        JobEventBody::Worst(WorstEvent { step: self.step, held_out, of_validation, examples })
    }

    pub(super) fn finish_eval(&mut self, events: &mut RunEvents) -> Result<Option<Outcome>> {
        let Phase::Eval { tally, worst, .. } = std::mem::replace(&mut self.phase, Phase::Train(Step::default())) else {
            return Ok(None);
        };
        let mut eval = tally.finish(self.step);
        if !eval.loss.is_finite() {
            let message = format!("the validation loss after step {} is {}", self.step, eval.loss);
            return Ok(Some(self.fail("NON_FINITE_LOSS", message)));
        }
        let metric = self.input.resolved.eval_metric;
        let better = |best: &Best| better(&eval, &best.eval, metric);
        eval.best = self.input.resolved.keep_last || self.best.as_ref().is_none_or(better);
        if eval.best {
            self.best = Some(Best { eval: eval.clone(), snapshot: self.trainable.snapshot()? });
        }
        let (out, best) = (self.patience.is_out(&eval), eval.best);
        events.push(JobEventBody::Eval(eval));
        if best && self.input.resolved.worst_examples > 0 {
            events.push(self.worst_event(&worst, true));
        }
        if let Some(why) = out.filter(|_| self.step < self.input.resolved.total_steps) {
            let message = format!("stopped early after step {}: {why}", self.step);
            events.push(JobEventBody::Log(NoteEvent { code: "EARLY_STOP".to_owned(), message }));
            self.stopped = true;
        }
        Ok(None)
    }
}
