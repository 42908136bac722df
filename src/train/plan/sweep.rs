//! The candidates of a sweep: what each would be as a job of its own.

use super::{defaults::with_defaults, violation};
use crate::{
    admission::{
        params::Violation,
        train_params::{MethodPart, ResolvedTraining, SweepCandidate, TrainParams, with_rank},
    },
    train::spec::{BaseShape, TrainSpec},
};

/// A candidate of a sweep, resolved as the same request would be with its learning rate and its rank alone.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Hyper-parameters; names no sweep.
    pub resolved: ResolvedTraining,
    /// Sites and patches.
    pub spec: TrainSpec,
}

/// A candidate before the data is known.
pub(super) struct Wish {
    rate: Option<f64>,
    rank: Option<u32>,
    methods: Vec<MethodPart>,
    spec: TrainSpec,
}

/// The candidates that a request names, none without a sweep; `(methods, spec)` are those of the job without ranks. What a rank
/// clashes with is added to the problems.
pub(super) fn resolve(
    params: &TrainParams,
    (methods, spec): (&[MethodPart], Option<&TrainSpec>),
    labels: &[String],
    base: BaseShape<'_>,
    problems: &mut Vec<Violation>,
) -> Vec<Wish> {
    let (Some(sweep), Some(spec)) = (&params.sweep, spec) else { return Vec::new() };
    if spec.full.is_some() {
        problems.push(violation("sweep", "does not go with full fine-tuning"));
        return Vec::new();
    }
    let mut wishes = Vec::new();
    for (rate, rank) in sweep.candidates() {
        let Some(r) = rank else {
            wishes.push(Wish { rate, rank, methods: methods.to_vec(), spec: spec.clone() });
            continue;
        };
        // alpha follows an unset rank's default, so ranks are put to the request's own parts
        let methods = with_defaults(&with_rank(&params.methods, r), params.task, base);
        match TrainSpec::resolve_for(&methods, (params.task, params.problem), labels, base) {
            // virtual tokens and their texts have nothing to do with ranks
            Ok(own) => {
                let spec = TrainSpec { positions: spec.positions.clone(), ..own };
                wishes.push(Wish { rate, rank, methods, spec });
            }
            Err(found) => {
                for v in found {
                    let message = format!("{r}: {} {}", v.field, v.message);
                    if !problems.iter().any(|p| p.message == message) {
                        problems.push(violation("sweep.ranks", message));
                    }
                }
            }
        }
    }
    wishes
}

/// The wishes with all else resolved. The job's own learning rate and rank become those of the first.
pub(super) fn candidates(wishes: Vec<Wish>, spec: &mut TrainSpec, resolved: &mut ResolvedTraining) -> Vec<Candidate> {
    let of = |wish: Wish| {
        let candidate =
            SweepCandidate { learning_rate: wish.rate.unwrap_or(resolved.learning_rate), rank: wish.rank.unwrap_or(0) };
        let resolved = ResolvedTraining {
            learning_rate: candidate.learning_rate,
            methods: wish.methods,
            gradient_checkpointing: false,
            ..resolved.clone()
        };
        (candidate, Candidate { resolved, spec: wish.spec })
    };
    let (named, all): (Vec<SweepCandidate>, Vec<Candidate>) = wishes.into_iter().map(of).unzip();
    if let Some(first) = all.first() {
        *spec = first.spec.clone();
        *resolved = ResolvedTraining { sweep: named, ..first.resolved.clone() };
    }
    all
}

/// Bytes that the mixed rows of a step take beside those of one delta: of every linear, what the updates come to and their
/// sum with its output.
pub(super) fn activations(base: BaseShape<'_>, rows: usize) -> u64 {
    let outputs: usize = base.sites.linears().map(|(_, e)| e.out_dim).sum();
    (2 * rows * outputs * size_of::<f32>()) as u64
}

#[cfg(test)]
mod tests {
    use super::super::tests::{lora, params, run};
    use crate::{
        admission::train_params::{HyperParams, LoraPart, MethodPart, SweepParams, TrainParams, Validation},
        delta::Task,
    };

    fn lines(n: usize) -> String {
        (0..n).map(|i| format!("{{\"text\": \"number {i}\", \"label\": \"{}\"}}\n", ["odd", "even"][i % 2])).collect()
    }

    fn sweep(rates: &[f64], ranks: &[u32], methods: Vec<MethodPart>) -> TrainParams {
        TrainParams {
            validation: Some(Validation::Fraction(0.2)),
            sweep: Some(SweepParams { learning_rates: rates.to_vec(), ranks: ranks.to_vec() }),
            ..params(Task::SeqCls, methods)
        }
    }

    /// What a candidate is alone is asked of the plan itself, without a sweep.
    #[test]
    fn a_candidate_is_what_the_request_is_with_its_rate_and_rank_alone() {
        let unset = || vec![MethodPart::Lora(LoraPart { alpha: Some(5.0), ..LoraPart::default() })];
        for methods in [lora(), unset()] {
            let planned = run(&sweep(&[1e-4, 1e-2], &[2, 16], methods.clone()), &lines(60), None).unwrap();
            let (r, memory) = (&planned.reply.resolved, planned.reply.memory);
            let named: Vec<(f64, u32)> = r.sweep.iter().map(|c| (c.learning_rate, c.rank)).collect();
            assert_eq!(named, [(1e-4, 2), (1e-2, 2), (1e-4, 16), (1e-2, 16)]);
            let (mut parameters, mut variables) = (0, 0);
            for (candidate, (rate, rank)) in planned.candidates.iter().zip(named) {
                let alone = TrainParams {
                    sweep: None,
                    methods: super::with_rank(&methods, rank),
                    hyper: HyperParams { learning_rate: Some(rate), ..HyperParams::default() },
                    ..sweep(&[], &[], vec![])
                };
                let alone = run(&alone, &lines(60), None).unwrap();
                assert_eq!(candidate.resolved, alone.reply.resolved);
                assert_eq!(candidate.spec, alone.spec);
                assert_eq!((&planned.train, &planned.validation), (&alone.train, &alone.validation));
                parameters += alone.reply.trainable_parameters;
                variables += alone.reply.memory.optimizer;
            }
            assert_eq!((planned.reply.trainable_parameters, memory.optimizer), (parameters, variables));
            assert_eq!((r.learning_rate, &planned.spec), (1e-4, &planned.candidates[0].spec));
            assert!(planned.lean.is_none(), "it cannot fall back to gradient checkpointing");
        }
    }

    #[test]
    fn without_a_sweep_there_are_no_candidates_and_without_rates_the_default_is_that_of_all() {
        let alone = run(&TrainParams { sweep: None, ..sweep(&[], &[], lora()) }, &lines(60), None).unwrap();
        assert!(alone.candidates.is_empty() && alone.reply.resolved.sweep.is_empty());
        let planned = run(&sweep(&[], &[2, 4], lora()), &lines(60), None).unwrap();
        let rate = alone.reply.resolved.learning_rate;
        assert!(planned.candidates.iter().all(|c| c.resolved.learning_rate == rate));
        let bitfit = vec![MethodPart::Bitfit(Default::default())];
        let planned = run(&sweep(&[1e-3, 1e-2], &[], bitfit), &lines(60), None).unwrap();
        assert_eq!(planned.reply.resolved.sweep.iter().map(|c| c.rank).collect::<Vec<_>>(), [0, 0]);
        // a rank that no module can have is the sweep's problem
        let error = run(&sweep(&[], &[2, 5000], lora()), &lines(60), None).unwrap_err();
        assert!(error.iter().all(|v| v.field == "sweep.ranks" && v.message.contains("5000")), "{error:?}");
    }
}
