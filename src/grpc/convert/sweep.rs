//! Sweeps, from the wire and to it.

use crate::{
    admission::train_params::{SweepCandidate, SweepEvent, SweepParams},
    grpc::proto,
};

/// A request's part.
pub(super) fn from_wire(s: proto::Sweep) -> SweepParams {
    SweepParams { learning_rates: s.learning_rates, ranks: s.ranks }
}

/// A candidate.
pub(super) fn candidate(c: SweepCandidate) -> proto::SweepCandidate {
    proto::SweepCandidate { learning_rate: c.learning_rate, rank: c.rank }
}

/// How the candidates came out.
pub(super) fn result(s: SweepEvent) -> proto::SweepResult {
    let metric = s.metric;
    let candidates = s.candidates.into_iter().map(|row| proto::SweepOutcome {
        learning_rate: row.candidate.learning_rate,
        rank: row.candidate.rank,
        step: row.best.as_ref().map_or(0, |eval| eval.step),
        figure: row.best.as_ref().and_then(|eval| metric.of(eval)),
        won: row.won,
        failed: row.failed,
        steps_done: row.step,
    });
    proto::SweepResult { metric: metric.as_str().to_owned(), candidates: candidates.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::train_params::{EvalEvent, EvalMetric, SweepRow};

    #[test]
    fn the_figure_is_that_of_the_metric_and_its_step_that_of_the_evaluation() {
        let row = |accuracy, won, failed: &str| SweepRow {
            candidate: SweepCandidate { learning_rate: 0.1, rank: 4 },
            best: Some(EvalEvent { step: 7, loss: 2.0, accuracy, ..EvalEvent::default() }),
            step: 9,
            won,
            failed: failed.into(),
        };
        let none = SweepRow { best: None, ..row(None, false, "it diverged") };
        let told = SweepEvent { metric: EvalMetric::Accuracy, candidates: vec![row(Some(0.5), true, ""), none] };
        let wire = result(told);
        assert_eq!(wire.metric, "accuracy");
        let [first, second] = &wire.candidates[..] else { panic!("{wire:?}") };
        assert_eq!((first.figure, first.step, first.steps_done, first.won), (Some(0.5), 7, 9, true));
        assert_eq!((first.learning_rate, first.rank, first.failed.as_str()), (0.1, 4, ""));
        assert_eq!((second.figure, second.step, second.won, second.failed.as_str()), (None, 0, false, "it diverged"));
    }
}
