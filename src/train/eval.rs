//! Evaluation: mean loss and the figures of a task, gathered over micro-batches; which evaluation is better, and when there
//! is no more to gain.

use std::collections::BTreeSet;

use candle_core::{D, Result};

use crate::{
    admission::train_params::{EvalEvent, EvalMetric},
    delta::{Problem, Task},
    measures::{Classes, Sets, Spans, Values, has_spans},
    train::{objective::Losses, preference::Rewards},
};

/// Figures that evaluations of a task have; the first is the default.
pub fn metrics_of(task: Task, problem: Problem, labels: &[String]) -> Vec<EvalMetric> {
    use EvalMetric::{
        Accuracy, Bleu, ExactMatch, Loss, MacroF1, Mcc, MicroF1, Mse, Pearson, Perplexity, RougeL, SpanF1,
    };
    match task {
        Task::SeqCls if problem == Problem::MultiLabel => vec![MicroF1, MacroF1, Accuracy, Loss],
        Task::SeqCls if problem == Problem::Regression => vec![Mse, Pearson, Loss],
        Task::TokenCls if has_spans(labels) => vec![SpanF1, Accuracy, MacroF1, Mcc, Loss],
        Task::SeqCls | Task::TokenCls => vec![Accuracy, MacroF1, Mcc, Loss],
        _ => vec![Loss, Perplexity, ExactMatch, Bleu, RougeL],
    }
}

/// Figures that evaluations of preferences have; the first is the default.
pub const METRICS_OF_PREFERENCES: [EvalMetric; 3] =
    [EvalMetric::Loss, EvalMetric::RewardAccuracy, EvalMetric::RewardMargin];

/// Running sums of one evaluation.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    loss: f64,
    count: u64,
    labels: Vec<String>,
    classes: Classes<u32>,
    spans: Option<Spans>,
    problem: Problem,
    sets: Sets<usize>,
    values: Values,
    rewards: Rewards,
}

impl Tally {
    /// An empty tally for these labels (none for language modelling).
    pub fn new(task: Task, problem: Problem, labels: &[String]) -> Self {
        let spans = (task == Task::TokenCls && has_spans(labels)).then(Spans::default);
        Self { labels: if task.generates() { vec![] } else { labels.to_vec() }, spans, problem, ..Self::default() }
    }

    /// Adds a micro-batch.
    ///
    /// # Errors
    /// The device.
    pub fn add(&mut self, losses: &Losses) -> Result<()> {
        let each = losses.each.to_vec1::<f32>()?;
        self.loss += each.iter().map(|l| f64::from(*l)).sum::<f64>();
        self.count += each.len() as u64;
        self.rewards.add(&losses.rewards);
        let Some(logits) = &losses.logits else { return Ok(()) };
        if !losses.targets.is_empty() {
            self.add_targets(&logits.to_vec2::<f32>()?, &losses.targets);
            return Ok(());
        }
        let guesses = logits.argmax(D::Minus1)?.to_vec1::<u32>()?; // [n]
        guesses.iter().zip(&losses.gold).for_each(|(guess, gold)| self.classes.add(*gold, Some(*guess)));
        if let Some(spans) = &mut self.spans {
            let name = |i: &u32| self.labels.get(*i as usize).map_or("O", String::as_str);
            let mut at = 0;
            for len in &losses.words {
                let text = at..at + len;
                at = text.end;
                let tags = |all: &[u32]| all.get(text.clone()).unwrap_or_default().iter().map(name).collect::<Vec<_>>();
                spans.add(&tags(&losses.gold), &tags(&guesses));
            }
        }
        Ok(())
    }

    /// Outputs and targets of texts with one number per output: labels that apply are over 0 (a probability of one half).
    fn add_targets(&mut self, outputs: &[Vec<f32>], targets: &[Vec<f32>]) {
        let set = |row: &[f32], least: f32| (0..row.len()).filter(|i| row[*i] >= least).collect::<BTreeSet<_>>();
        for (output, target) in outputs.iter().zip(targets) {
            match (self.problem, output.first(), target.first()) {
                (Problem::Regression, Some(guess), Some(gold)) => self.values.add((*gold).into(), (*guess).into()),
                _ => self.sets.add(&set(target, 1.0), &set(output, 0.0)),
            }
        }
    }

    /// Mean loss so far.
    pub fn loss(&self) -> f64 {
        self.loss / self.count.max(1) as f64
    }

    /// The figures after `step` optimizer steps.
    pub fn finish(&self, step: u32) -> EvalEvent {
        let loss = self.loss();
        let classifies = !self.labels.is_empty();
        let spans = self.spans.as_ref().map(Spans::micro);
        let event = EvalEvent { step, loss, ..EvalEvent::default() };
        match self.problem {
            Problem::Regression => {
                return EvalEvent { mse: Some(self.values.mse()), pearson: Some(self.values.pearson()), ..event };
            }
            Problem::MultiLabel => {
                return EvalEvent {
                    accuracy: Some(self.sets.accuracy()),
                    micro_f1: Some(self.sets.micro_f1()),
                    macro_f1: Some(self.sets.macro_f1()),
                    ..event
                };
            }
            Problem::SingleLabel => {}
        }
        if let Some(accuracy) = self.rewards.accuracy() {
            return EvalEvent { reward_accuracy: Some(accuracy), reward_margin: self.rewards.margin(), ..event };
        }
        EvalEvent {
            perplexity: (!classifies).then(|| loss.exp()),
            accuracy: classifies.then(|| self.classes.accuracy()),
            macro_f1: classifies.then(|| self.classes.macro_f1()),
            mcc: classifies.then(|| self.classes.mcc()),
            span_precision: spans.map(|s| s[0]),
            span_recall: spans.map(|s| s[1]),
            span_f1: spans.map(|s| s[2]),
            ..event
        }
    }
}

/// Whether an evaluation beats another by a figure; equal ones are told apart by the loss.
pub fn better(a: &EvalEvent, than: &EvalEvent, metric: EvalMetric) -> bool {
    match (metric.of(a), metric.of(than)) {
        (Some(x), Some(y)) if x != y => metric.gain(x, y) > 0.0,
        _ => a.loss < than.loss,
    }
}

/// Early stopping: counts evaluations in a row that gain no more than `min_delta` over the last one that did.
#[derive(Debug, Clone)]
pub struct Patience {
    metric: EvalMetric,
    evaluations: u32,
    min_delta: f64,
    reached: Option<f64>,
    without_gain: u32,
}

impl Patience {
    /// Waits for `evaluations`; 0 = for ever.
    pub fn new(metric: EvalMetric, evaluations: u32, min_delta: f64) -> Self {
        Self { metric, evaluations, min_delta, reached: None, without_gain: 0 }
    }

    /// What it has counted: the figure that the next gain is measured by, and evaluations without one.
    pub fn count(&self) -> (Option<f64>, u32) {
        (self.reached, self.without_gain)
    }

    /// Goes on from a [`Self::count`].
    pub fn go_on(&mut self, reached: Option<f64>, without_gain: u32) {
        (self.reached, self.without_gain) = (reached, without_gain);
    }

    /// Takes an evaluation in; tells why the job should end, if it should.
    pub fn is_out(&mut self, eval: &EvalEvent) -> Option<String> {
        let value = self.metric.of(eval)?;
        if self.reached.is_none_or(|before| self.metric.gain(value, before) > self.min_delta) {
            (self.reached, self.without_gain) = (Some(value), 0);
            return None;
        }
        self.without_gain += 1;
        (self.evaluations > 0 && self.without_gain >= self.evaluations).then(|| {
            let (name, best) = (self.metric.as_str(), self.reached.unwrap_or(value));
            let verb = if self.metric.rises() { "risen" } else { "fallen" };
            let by = if self.min_delta > 0.0 { format!(" by more than {}", self.min_delta) } else { String::new() };
            format!("{name} has not {verb}{by} from {best:.4} in {} evaluations", self.without_gain)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn figures_by_hand() {
        let logits = Tensor::new(&[[1f32, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        let each = Tensor::new(&[0.5f32, 0.5, 1.0, 2.0], &Device::Cpu).unwrap();
        let mut t = Tally::new(Task::SeqCls, Problem::SingleLabel, &names(&["a", "b"]));
        t.add(&Losses { logits: Some(logits), gold: vec![0, 0, 1, 1], ..Losses::of(each) }).unwrap();
        let e = t.finish(7);
        assert_eq!((e.step, e.loss, e.accuracy, e.perplexity, e.span_f1), (7, 1.0, Some(0.75), None, None));
        // label 0: 2 right, 1 wrongly claimed; label 1: 1 right, 1 missed
        assert!((e.macro_f1.unwrap() - (4.0 / 5.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
        assert!((e.mcc.unwrap() - (2.0 - 0.0) / 12f64.sqrt()).abs() < 1e-12);
        let mut t = Tally::new(Task::CausalLm, Problem::SingleLabel, &[]);
        let each = Tensor::new(&[1f32, 3.0], &Device::Cpu).unwrap();
        t.add(&Losses::of(each)).unwrap();
        let lm = t.finish(1);
        assert_eq!((lm.loss, lm.accuracy), (2.0, None));
        assert!((lm.perplexity.unwrap() - 2f64.exp()).abs() < 1e-9);
    }

    #[test]
    fn spans_end_where_their_text_ends() {
        // gold B I | I, predicted B I | O: as one text the last I would belong to the first span
        let logits = Tensor::new(&[[0f32, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        let mut t = Tally::new(Task::TokenCls, Problem::SingleLabel, &names(&["O", "B-x", "I-x"]));
        let each = Tensor::new(&[0f32; 3], &Device::Cpu).unwrap();
        t.add(&Losses { logits: Some(logits), gold: vec![1, 2, 2], words: vec![2, 1], ..Losses::of(each) }).unwrap();
        let e = t.finish(1);
        assert_eq!((e.span_precision, e.span_recall, e.span_f1), (Some(1.0), Some(0.5), Some(2.0 / 3.0)));
        assert_eq!(metrics_of(Task::TokenCls, Problem::SingleLabel, &names(&["O", "B-x"]))[0], EvalMetric::SpanF1);
        assert_eq!(
            metrics_of(Task::TokenCls, Problem::SingleLabel, &names(&["NOUN", "VERB"]))[0],
            EvalMetric::Accuracy
        );
    }

    #[test]
    fn the_chosen_figure_decides_in_its_direction_and_the_loss_between_equals() {
        let e = |loss, accuracy| EvalEvent { loss, accuracy, ..EvalEvent::default() };
        let by = EvalMetric::Accuracy;
        assert!(better(&e(2.0, Some(0.9)), &e(1.0, Some(0.8)), by));
        assert!(better(&e(0.9, Some(0.8)), &e(1.0, Some(0.8)), by));
        assert!(!better(&e(2.0, Some(0.9)), &e(1.0, Some(0.8)), EvalMetric::Loss));
        let (low, high) = (e(0.9, None), e(1.1, None));
        assert!(better(&low, &high, EvalMetric::Loss) && !better(&high, &low, EvalMetric::Loss));
        assert!(!better(&e(f64::NAN, None), &high, EvalMetric::Loss));
    }

    #[test]
    fn patience_counts_evaluations_without_a_gain_of_more_than_the_least() {
        let stops = |metric, patience, least, values: &[f64]| {
            let mut p = Patience::new(metric, patience, least);
            values
                .iter()
                .position(|v| p.is_out(&EvalEvent { loss: *v, accuracy: Some(*v), ..EvalEvent::default() }).is_some())
        };
        assert_eq!(stops(EvalMetric::Loss, 2, 0.0, &[3.0, 2.0, 2.0, 1.9, 1.9, 2.5, 1.0]), Some(5));
        assert_eq!(stops(EvalMetric::Loss, 1, 0.1, &[3.0, 2.95, 1.0]), Some(1));
        assert_eq!(stops(EvalMetric::Loss, 2, 0.1, &[3.0, 2.95, 2.85, 2.8, 2.7]), None, "gains add up");
        assert_eq!(stops(EvalMetric::Accuracy, 1, 0.0, &[0.1, 0.2, 0.2]), Some(2));
        assert_eq!(stops(EvalMetric::Accuracy, 0, 0.0, &[0.2; 50]), None);
    }

    #[test]
    fn sets_and_numbers_have_figures_of_their_own() {
        let dev = Device::Cpu;
        let tally = |problem, outputs: &[[f32; 2]; 2], targets: Vec<Vec<f32>>| {
            let each = Tensor::new(&[1f32, 1.0], &dev).unwrap();
            let logits = Tensor::new(outputs, &dev).unwrap();
            let mut t = Tally::new(Task::SeqCls, problem, &names(&["a", "b"]));
            t.add(&Losses { logits: Some(logits), targets, ..Losses::of(each) }).unwrap();
            t.finish(1)
        };
        let e = tally(Problem::MultiLabel, &[[1.0, -1.0], [1.0, 2.0]], vec![vec![1.0, 0.0], vec![0.0, 1.0]]);
        assert_eq!((e.accuracy, e.micro_f1, e.mcc), (Some(0.5), Some(0.8), None));
        let e = tally(Problem::Regression, &[[1.0, 0.0], [3.0, 0.0]], vec![vec![1.0], vec![2.0]]);
        assert_eq!((e.mse, e.pearson.map(|r| (r * 1e6).round()), e.accuracy), (Some(0.5), Some(1e6), None));
        assert_eq!(metrics_of(Task::SeqCls, Problem::Regression, &[])[0], EvalMetric::Mse);
    }
}
