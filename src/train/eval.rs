//! Evaluation: mean loss, perplexity, accuracy, macro-averaged F1, gathered over micro-batches.

use candle_core::{D, Result};

use crate::{admission::train_params::EvalEvent, delta::Task, train::objective::Losses};

/// Running sums of one evaluation.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    loss: f64,
    count: u64,
    /// Per label: (true positives, false positives, false negatives).
    labels: Vec<(u64, u64, u64)>,
    right: u64,
}

impl Tally {
    /// An empty tally for this many labels (0 for language modelling).
    pub fn new(labels: usize) -> Self {
        Self { labels: vec![(0, 0, 0); labels], ..Self::default() }
    }

    /// Adds a micro-batch.
    ///
    /// # Errors
    /// The device.
    pub fn add(&mut self, losses: &Losses) -> Result<()> {
        let each = losses.each.to_vec1::<f32>()?;
        self.loss += each.iter().map(|l| f64::from(*l)).sum::<f64>();
        self.count += each.len() as u64;
        if let Some(logits) = &losses.logits {
            for (guess, gold) in logits.argmax(D::Minus1)?.to_vec1::<u32>()?.into_iter().zip(&losses.gold) {
                self.add_label(guess as usize, *gold as usize);
            }
        }
        Ok(())
    }

    fn add_label(&mut self, guess: usize, gold: usize) {
        if guess == gold {
            self.right += 1;
            self.labels.get_mut(gold).into_iter().for_each(|l| l.0 += 1);
        } else {
            self.labels.get_mut(guess).into_iter().for_each(|l| l.1 += 1);
            self.labels.get_mut(gold).into_iter().for_each(|l| l.2 += 1);
        }
    }

    /// The figures after `step` optimizer steps.
    pub fn finish(&self, step: u32, task: Task) -> EvalEvent {
        let n = self.count.max(1) as f64;
        let loss = self.loss / n;
        let classifies = !task.generates();
        let f1 = |&(tp, fp, fn_): &(u64, u64, u64)| 2.0 * tp as f64 / ((2 * tp + fp + fn_).max(1) as f64);
        let macro_f1 = self.labels.iter().map(f1).sum::<f64>() / self.labels.len().max(1) as f64;
        EvalEvent {
            step,
            loss,
            perplexity: (!classifies).then(|| loss.exp()),
            accuracy: classifies.then(|| self.right as f64 / n),
            macro_f1: classifies.then_some(macro_f1),
            best: false,
        }
    }
}

/// Whether an evaluation beats another: by accuracy for classifiers (then by loss), by loss for language models.
pub fn better(a: &EvalEvent, than: &EvalEvent) -> bool {
    match (a.accuracy, than.accuracy) {
        (Some(x), Some(y)) if x != y => x > y,
        _ => a.loss < than.loss,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn figures_by_hand() {
        let logits = Tensor::new(&[[1f32, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        let each = Tensor::new(&[0.5f32, 0.5, 1.0, 2.0], &Device::Cpu).unwrap();
        let mut t = Tally::new(2);
        t.add(&Losses { each, logits: Some(logits), gold: vec![0, 0, 1, 1] }).unwrap();
        let e = t.finish(7, Task::SeqCls);
        assert_eq!((e.step, e.loss, e.accuracy, e.perplexity), (7, 1.0, Some(0.75), None));
        // label 0: 2 right, 1 wrongly claimed; label 1: 1 right, 1 missed
        assert!((e.macro_f1.unwrap() - (4.0 / 5.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
        let mut t = Tally::new(0);
        let each = Tensor::new(&[1f32, 3.0], &Device::Cpu).unwrap();
        t.add(&Losses { each, logits: None, gold: vec![] }).unwrap();
        let lm = t.finish(1, Task::CausalLm);
        assert_eq!((lm.loss, lm.accuracy), (2.0, None));
        assert!((lm.perplexity.unwrap() - 2f64.exp()).abs() < 1e-9);
    }

    #[test]
    fn accuracy_decides_for_classifiers_and_loss_for_language_models() {
        let e = |loss, accuracy| EvalEvent { loss, accuracy, ..EvalEvent::default() };
        assert!(better(&e(2.0, Some(0.9)), &e(1.0, Some(0.8))));
        assert!(better(&e(0.9, Some(0.8)), &e(1.0, Some(0.8))));
        assert!(better(&e(0.9, None), &e(1.0, None)) && !better(&e(1.1, None), &e(1.0, None)));
        assert!(!better(&e(f64::NAN, None), &e(1.0, None)));
    }
}
