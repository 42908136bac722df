//! The part of an evaluation that generates: prompts are answered by the weights as they are, after the losses.

use std::sync::Arc;

use candle_core::Result;

use super::{Phase, Run};
use crate::{admission::train_params::EvalEvent, train::generate::Answering};

impl Run {
    /// One forward of the answers or, where all are complete, the scores of some; false if there is nothing (more) to do.
    pub(super) fn answer_micro(&mut self) -> Result<bool> {
        let quiz = &self.input.quiz;
        let Phase::Eval { tally, answers, .. } = &mut self.phase else { return Ok(false) };
        // a loss that is no number ends the job
        if quiz.questions.is_empty() || !tally.loss().is_finite() {
            return Ok(false);
        }
        if answers.is_none() {
            let base = self.trainable.detached_base(&self.base)?;
            let delta = Arc::new(self.trainable.detached()?);
            *answers = Some(Box::new(Answering::new(base, delta, quiz)?));
        }
        let Some(answering) = answers else { return Ok(false) };
        Ok(answering.advance(quiz, self.pacer.as_ref())? || answering.score(quiz, &self.input.decoder))
    }
}

/// Puts the figures of answers that were all scored into an evaluation.
pub(super) fn score(eval: &mut EvalEvent, answers: &Answering) {
    let texts = answers.texts();
    (eval.exact_match, eval.bleu, eval.rouge_l) =
        (Some(texts.exact_match()), Some(texts.bleu()), Some(texts.rouge_l()));
}
