//! The best evaluations of a run, with the weights that they saw.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Device, Error, Result, Tensor};

use super::{Run, RunInput};
use crate::{
    admission::train_params::{EvalEvent, EvalMetric},
    delta::Delta,
    model::Base,
    train::{
        eval::better,
        trainable::{Snapshot, Trainable},
    },
};

/// An evaluation and its weights.
#[derive(Debug)]
pub(super) struct Best {
    pub(super) eval: EvalEvent,
    pub(super) snapshot: Snapshot,
}

/// Weights of an evaluation beside the best one.
#[derive(Debug, Clone, PartialEq)]
pub struct Runner {
    /// After this many optimizer steps.
    pub step: u32,
    /// The evaluation's figure that decides.
    pub figure: Option<f64>,
    /// The weights' bytes, from which [`Run::delta_of`] makes the delta.
    pub bytes: Vec<u8>,
}

/// The best evaluations, best first; of equal ones, the earlier first.
#[derive(Debug)]
pub(super) struct Bests {
    metric: EvalMetric,
    most: usize,
    /// Only the last counts.
    last: bool,
    kept: Vec<Best>,
}

impl Bests {
    pub(super) fn of(input: &RunInput) -> Self {
        let r = &input.resolved;
        Self { metric: r.eval_metric, most: (r.keep_best as usize).max(1), last: r.keep_last, kept: Vec::new() }
    }

    /// The best of all.
    pub(super) fn first(&self) -> Option<&Best> {
        self.kept.first()
    }

    /// All of them.
    pub(super) fn all(&self) -> &[Best] {
        &self.kept
    }

    /// Goes on from what [`Self::all`] was.
    pub(super) fn restore(&mut self, kept: Vec<Best>) {
        self.kept = kept;
        self.kept.truncate(self.most);
    }

    /// The place that an evaluation has among them, if it has one.
    fn place(&self, eval: &EvalEvent) -> Option<usize> {
        let at = if self.last {
            0
        } else {
            let beaten = self.kept.iter().position(|b| better(eval, &b.eval, self.metric));
            beaten.unwrap_or(self.kept.len())
        };
        (at < self.most).then_some(at)
    }

    /// Takes an evaluation in, its weights being asked for if it has a place; tells whether it is the best so far.
    pub(super) fn take(&mut self, eval: &mut EvalEvent, weights: impl FnOnce() -> Result<Snapshot>) -> Result<bool> {
        let at = self.place(eval);
        eval.best = at == Some(0);
        if let Some(at) = at {
            // what loses its place makes room before the copy is made
            self.kept.truncate(self.most - 1);
            self.kept.insert(at, Best { eval: eval.clone(), snapshot: weights()? });
        }
        Ok(eval.best)
    }

    /// The others, best first, as bytes.
    pub(super) fn runners(&self) -> Result<Vec<Runner>> {
        let runner = |best: &Best| {
            let bytes = to_bytes(&best.snapshot)?;
            Ok(Runner { step: best.eval.step, figure: self.metric.of(&best.eval), bytes })
        };
        self.kept.iter().skip(1).map(runner).collect()
    }
}

/// Safetensors, with `var.<i>` for the variable `i`.
fn to_bytes(snapshot: &Snapshot) -> Result<Vec<u8>> {
    let tensors = snapshot.tensors().iter().enumerate();
    let named: HashMap<String, Tensor> =
        tensors.map(|(i, t)| Ok((format!("var.{i}"), t.to_device(&Device::Cpu)?))).collect::<Result<_>>()?;
    safetensors::serialize(&named, None).map_err(Error::wrap)
}

fn from_bytes(trainable: &Trainable, bytes: &[u8], device: &Device) -> Result<Snapshot> {
    let tensors = candle_core::safetensors::load_buffer(bytes, device)?;
    let vars = trainable.vars();
    if tensors.len() != vars.len() {
        candle_core::bail!("{} tensors for {} variables", tensors.len(), vars.len());
    }
    let one = |(i, var): (usize, &crate::train::trainable::NamedVar)| match tensors.get(&format!("var.{i}")) {
        Some(t) if t.shape() == var.var.shape() => Ok(t.clone()),
        Some(t) => candle_core::bail!("{} is {:?}, not {:?}", var.name, t.shape(), var.var.shape()),
        None => candle_core::bail!("{} is missing", var.name),
    };
    Ok(Snapshot::of(vars.iter().enumerate().map(one).collect::<Result<_>>()?))
}

impl Run {
    /// How often it has the values of what it trains.
    #[cfg(test)]
    pub(in crate::train) fn copies(&self) -> usize {
        1 + usize::from(self.good.is_some()) + usize::from(self.unproven.is_some()) + self.bests.all().len()
    }

    /// What a [`Runner`]'s weights form, given the input of the run that it was of, on the same base.
    ///
    /// # Errors
    /// Bytes of other variables; the device.
    pub fn delta_of(base: Arc<Base>, input: RunInput, bytes: &[u8]) -> Result<Delta> {
        let run = Self::new(base, None, input)?;
        run.trainable.publishable(&from_bytes(&run.trainable, bytes, &run.base.device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(step: u32, accuracy: f64, loss: f64) -> EvalEvent {
        EvalEvent { step, loss, accuracy: Some(accuracy), ..EvalEvent::default() }
    }

    fn weights(step: u32) -> Snapshot {
        Snapshot::of(vec![Tensor::new(step, &Device::Cpu).unwrap()])
    }

    fn bests(most: usize, last: bool) -> Bests {
        Bests { metric: EvalMetric::Accuracy, most, last, kept: Vec::new() }
    }

    /// Steps that are kept, best first, after each evaluation; each with its own weights.
    fn story(mut bests: Bests, evals: &[(f64, f64)]) -> Vec<Vec<u32>> {
        let mut told = Vec::new();
        for (step, (accuracy, loss)) in (1..).zip(evals) {
            let mut eval = eval(step, *accuracy, *loss);
            let best = bests.take(&mut eval, || Ok(weights(step))).unwrap();
            assert_eq!((best, eval.best), (bests.first().unwrap().eval.step == step, best));
            for kept in bests.all() {
                assert_eq!(kept.snapshot.tensors()[0].to_scalar::<u32>().unwrap(), kept.eval.step);
            }
            told.push(bests.all().iter().map(|b| b.eval.step).collect());
        }
        told
    }

    #[test]
    fn the_best_are_kept_in_order_and_of_equal_ones_the_earlier() {
        let evals = [(0.5, 1.0), (0.7, 1.0), (0.6, 1.0), (0.7, 1.0), (0.9, 1.0), (0.1, 1.0), (0.7, 0.5)];
        let three: [&[u32]; 7] = [&[1], &[2, 1], &[2, 3, 1], &[2, 4, 3], &[5, 2, 4], &[5, 2, 4], &[5, 7, 2]];
        assert_eq!(story(bests(3, false), &evals), three);
        let one: [&[u32]; 7] = [&[1], &[2], &[2], &[2], &[5], &[5], &[5]];
        assert_eq!(story(bests(1, false), &evals), one);
        let last: Vec<Vec<u32>> = (1..=7).map(|step| vec![step]).collect();
        assert_eq!(story(bests(1, true), &evals), last);
    }

    #[test]
    fn weights_that_have_no_place_are_not_copied() {
        let mut bests = bests(2, false);
        for (step, accuracy) in [(1, 0.5), (2, 0.6)] {
            bests.take(&mut eval(step, accuracy, 1.0), || Ok(weights(step))).unwrap();
        }
        let asked = bests.take(&mut eval(3, 0.5, 1.0), || candle_core::bail!("they are not wanted"));
        assert!(!asked.unwrap());
        let runners = bests.runners().unwrap();
        assert_eq!(runners.iter().map(|r| (r.step, r.figure)).collect::<Vec<_>>(), [(1, Some(0.5))]);
    }
}
