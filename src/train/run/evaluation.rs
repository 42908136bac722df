//! The evaluations of a run: when, over which examples, and what follows from one.

use std::collections::VecDeque;

use candle_core::Result;

use super::{Outcome, Phase, Run, RunEvents, Step, generation, preference::Side};
use crate::{
    admission::train_params::{JobEventBody, NoteEvent, WorstEvent},
    train::{batches::micro_batches, encode::Encoded, eval::Tally, plan::MICRO_TOKENS, worst::Worst},
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
        let todo = self.by_length(Side::Validation);
        let r = &self.input.resolved;
        let worst = Worst::new(r.worst_examples as usize);
        Phase::Eval { todo, tally: Tally::new(r.task, r.problem, &r.labels), worst, answers: None }
    }

    /// All examples in micro-batches, the shortest first.
    fn by_length(&self, side: Side) -> VecDeque<Vec<usize>> {
        let rows = self.rows(self.input.side(side));
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|i| rows[*i]);
        micro_batches(&order, &rows, 64, MICRO_TOKENS).into()
    }

    /// One micro-batch, or one example's reference first, where it is still to be taken.
    pub(super) fn eval_micro(&mut self, batch: Vec<usize>) -> Result<()> {
        if self.refer(Side::Validation, &batch)? {
            if let Phase::Eval { todo, .. } = &mut self.phase {
                todo.push_front(batch);
            }
            return Ok(());
        }
        let losses = self.plain_losses(Side::Validation, &batch)?;
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.validation[*i]).collect();
        if let Phase::Eval { tally, worst, .. } = &mut self.phase {
            tally.add(&losses)?;
            worst.add(&batch, &examples, &losses)?;
        }
        Ok(())
    }

    /// Whether the losses of the training examples are still to be told, since there are none for evaluation.
    pub(super) fn worst_due(&self) -> bool {
        !self.told && self.input.validation.is_empty() && self.input.resolved.worst_examples > 0
    }

    pub(super) fn begin_worst(&self) -> Phase {
        let worst = Worst::new(self.input.resolved.worst_examples as usize);
        Phase::Worst { todo: self.by_length(Side::Train), worst }
    }

    /// As [`Self::eval_micro`].
    pub(super) fn worst_micro(&mut self, batch: Vec<usize>) -> Result<()> {
        if self.refer(Side::Train, &batch)? {
            if let Phase::Worst { todo, .. } = &mut self.phase {
                todo.push_front(batch);
            }
            return Ok(());
        }
        let losses = self.plain_losses(Side::Train, &batch)?;
        let examples: Vec<&Encoded> = batch.iter().map(|i| &self.input.train[*i]).collect();
        if let Phase::Worst { worst, .. } = &mut self.phase {
            worst.add(&batch, &examples, &losses)?;
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
        let ended = std::mem::replace(&mut self.phase, Phase::Train(Step::default()));
        let Phase::Eval { tally, worst, answers, .. } = ended else { return Ok(None) };
        let mut eval = tally.finish(self.step);
        if !eval.loss.is_finite() {
            let message = format!("the validation loss after step {} is {}", self.step, eval.loss);
            return Ok(Some(self.fail("NON_FINITE_LOSS", message)));
        }
        if let Some(answers) = answers {
            generation::score(&mut eval, &answers);
        }
        let best = self.bests.take(&mut eval, || self.trainable.snapshot())?;
        let out = self.patience.is_out(&eval);
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
