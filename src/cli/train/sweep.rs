//! Options of a sweep, and what is shown of one.

use std::fmt;

use clap::Args;

use crate::{admission::eval_metric::EvalMetric, grpc::proto};

#[derive(Debug, Clone, Args)]
pub(super) struct SweepArgs {
    /// Try these peak learning rates side by side in one job, and publish the best by --eval-metric; separated by commas.
    #[arg(long, value_name = "RATES", value_delimiter = ',', conflicts_with = "lr")]
    sweep_lr: Vec<f64>,
    /// Try these ranks of the LoRA, each with every rate of --sweep-lr; separated by commas.
    #[arg(long, value_name = "RANKS", value_delimiter = ',', conflicts_with = "rank")]
    sweep_rank: Vec<u32>,
}

impl SweepArgs {
    /// What they ask for.
    pub(super) fn message(&self) -> Option<proto::Sweep> {
        let sweep = proto::Sweep { learning_rates: self.sweep_lr.clone(), ranks: self.sweep_rank.clone() };
        (sweep != proto::Sweep::default()).then_some(sweep)
    }
}

/// Ahead of a line that is of one candidate.
pub(super) fn whose(candidate: u32) -> String {
    if candidate == 0 { String::new() } else { format!("[{candidate}] ") }
}

fn candidate(learning_rate: f64, rank: u32) -> String {
    if rank == 0 { format!("lr {learning_rate:e}") } else { format!("lr {learning_rate:e}, rank {rank}") }
}

/// The candidates of a plan.
pub(super) fn plan_lines(r: &proto::ResolvedTraining) -> Vec<String> {
    if r.sweep.is_empty() {
        return Vec::new();
    }
    let all: Vec<String> =
        (1..).zip(&r.sweep).map(|(i, c)| format!("[{i}] {}", candidate(c.learning_rate, c.rank))).collect();
    vec![format!("sweep       {} candidates by {}: {}", all.len(), r.eval_metric, all.join("; "))]
}

/// How the candidates came out.
pub(super) fn table(s: &proto::SweepResult) -> Vec<String> {
    let head = format!("{:>10} {:>12} {:>5} {:>14} {:>7}", "candidate", "lr", "rank", s.metric, "step");
    let row = |(i, c): (usize, &proto::SweepOutcome)| {
        let rank = if c.rank == 0 { "-".to_owned() } else { c.rank.to_string() };
        let figure = c.figure.map_or_else(|| "-".to_owned(), |f| format!("{f:.4}"));
        let end = match (c.won, c.failed.as_str()) {
            (true, _) => "  best".to_owned(),
            (false, "") => String::new(),
            (false, why) => format!("  dropped out: {why}"),
        };
        format!("{i:>10} {:>12} {rank:>5} {figure:>14} {:>7}{end}", format!("{:e}", c.learning_rate), c.step)
    };
    std::iter::once(head).chain((1..).zip(&s.candidates).map(row)).collect()
}

/// The best candidate of a sweep so far.
#[derive(Debug)]
pub(super) struct Lead {
    metric: EvalMetric,
    candidates: Vec<proto::SweepCandidate>,
    best: Option<(u32, f64, u32)>,
}

impl Lead {
    /// Of a job, if it is a sweep.
    pub(super) fn of(r: &proto::ResolvedTraining) -> Option<Self> {
        let metric = EvalMetric::ALL.into_iter().find(|m| m.as_str() == r.eval_metric)?;
        (!r.sweep.is_empty()).then(|| Self { metric, candidates: r.sweep.clone(), best: None })
    }

    /// Takes an evaluation in.
    pub(super) fn see(&mut self, e: &proto::EvalResult) {
        let Some(figure) = figure(e, self.metric) else { return };
        if self.best.is_none_or(|(_, best, _)| self.metric.gain(figure, best) > 0.0) {
            self.best = Some((e.candidate, figure, e.step));
        }
    }
}

impl fmt::Display for Lead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((number, figure, step)) = self.best else {
            return write!(f, "{} candidates", self.candidates.len());
        };
        let at = (number as usize).checked_sub(1).and_then(|i| self.candidates.get(i));
        let which = at.map(|c| format!(" ({})", candidate(c.learning_rate, c.rank))).unwrap_or_default();
        write!(f, "best [{number}]{which}: {} {figure:.4} at step {step}", self.metric.as_str())
    }
}

fn figure(e: &proto::EvalResult, metric: EvalMetric) -> Option<f64> {
    match metric {
        EvalMetric::Loss => Some(e.loss),
        EvalMetric::Perplexity => e.perplexity,
        EvalMetric::Accuracy => e.accuracy,
        EvalMetric::MacroF1 => e.macro_f1,
        EvalMetric::Mcc => e.mcc,
        EvalMetric::SpanF1 => e.span_f1,
        EvalMetric::MicroF1 => e.micro_f1,
        EvalMetric::Mse => e.mse,
        EvalMetric::Pearson => e.pearson,
        EvalMetric::RewardAccuracy => e.reward_accuracy,
        EvalMetric::RewardMargin => e.reward_margin,
        EvalMetric::ExactMatch => e.exact_match,
        EvalMetric::Bleu => e.bleu,
        EvalMetric::RougeL => e.rouge_l,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::assert_options, *};

    #[test]
    fn rates_and_ranks_are_lists_and_one_rate_beside_them_is_refused() {
        let sweep =
            |rates: &[f64], ranks: &[u32]| Some(proto::Sweep { learning_rates: rates.to_vec(), ranks: ranks.to_vec() });
        assert_options(
            |spec| spec.sweep,
            [
                ("", Some(None)),
                ("--sweep-lr 1e-4,3e-4,1e-3 --sweep-rank 4,8", Some(sweep(&[1e-4, 3e-4, 1e-3], &[4, 8]))),
                ("--sweep-lr 1e-4,1e-3 --lr 1e-3", None),
                ("--sweep-rank 4,8 --rank 8", None),
            ],
        );
    }

    #[test]
    fn the_best_so_far_is_that_of_the_metric_in_its_direction() {
        let sweep = [(1e-4, 0), (1e-3, 8)].map(|(learning_rate, rank)| proto::SweepCandidate { learning_rate, rank });
        let resolved = |metric: &str| proto::ResolvedTraining {
            eval_metric: metric.into(),
            sweep: sweep.to_vec(),
            ..Default::default()
        };
        let eval = |candidate, step, loss, accuracy| proto::EvalResult {
            candidate,
            step,
            loss,
            accuracy: Some(accuracy),
            ..Default::default()
        };
        let shown = |metric: &str| {
            let mut lead = Lead::of(&resolved(metric)).expect("a sweep");
            assert_eq!(lead.to_string(), "2 candidates");
            [eval(1, 5, 0.5, 0.2), eval(2, 5, 0.7, 0.9), eval(1, 9, 0.6, 0.3)].iter().for_each(|e| lead.see(e));
            lead.to_string()
        };
        assert_eq!(shown("loss"), "best [1] (lr 1e-4): loss 0.5000 at step 5");
        assert_eq!(shown("accuracy"), "best [2] (lr 1e-3, rank 8): accuracy 0.9000 at step 5");
        assert!(Lead::of(&proto::ResolvedTraining { eval_metric: "loss".into(), ..Default::default() }).is_none());
        let lines = plan_lines(&resolved("loss"));
        assert_eq!(lines, ["sweep       2 candidates by loss: [1] lr 1e-4; [2] lr 1e-3, rank 8"]);
    }

    #[test]
    fn the_table_has_a_row_per_candidate() {
        let row = |rank, figure, won, failed: &str| proto::SweepOutcome {
            learning_rate: 3e-4,
            rank,
            step: 7,
            figure,
            won,
            failed: failed.into(),
            steps_done: 9,
        };
        let candidates = vec![row(0, Some(0.25), true, ""), row(8, None, false, "the loss is NaN")];
        let lines = table(&proto::SweepResult { metric: "loss".into(), candidates });
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("loss") && lines[1].contains("0.2500") && lines[1].ends_with("best"), "{lines:?}");
        assert!(lines[2].contains("dropped out: the loss is NaN") && lines[2].contains("3e-4"), "{lines:?}");
    }
}
