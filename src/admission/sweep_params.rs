//! Sweeps: one job that trains several candidates (learning rates, ranks) side by side and publishes the best.

use serde::{Deserialize, Serialize};

use super::{
    check::{Problems, Range},
    eval_metric::EvalMetric,
    train_params::{EvalEvent, LoraPart, MethodPart, TrainParams},
};

/// Most candidates of a sweep.
pub const MAX_CANDIDATES: usize = 16;

/// What is tried: every learning rate with every rank. An empty list = what the job has without a sweep.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SweepParams {
    /// Peak learning rates, (0, 10].
    pub learning_rates: Vec<f64>,
    /// Ranks of the LoRA, 1 to 1024.
    pub ranks: Vec<u32>,
}

/// What sets a candidate apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SweepCandidate {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Rank of the LoRA; 0: the sweep names no ranks.
    pub rank: u32,
}

impl std::fmt::Display for SweepCandidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "learning rate {}", self.learning_rate)?;
        if self.rank > 0 { write!(f, ", rank {}", self.rank) } else { Ok(()) }
    }
}

/// How a sweep came out, told once when the last candidate has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepEvent {
    /// The figure that the candidates were compared by.
    pub metric: EvalMetric,
    /// In the order of the candidates.
    pub candidates: Vec<SweepRow>,
}

/// How a candidate came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepRow {
    /// Which.
    pub candidate: SweepCandidate,
    /// Its best evaluation; none if it dropped out before its first.
    pub best: Option<EvalEvent>,
    /// Optimizer steps that it did.
    pub step: u32,
    /// Whether it is published.
    pub won: bool,
    /// Why it dropped out; empty if it did not.
    pub failed: String,
}

impl SweepParams {
    /// Learning rate and rank of every candidate, `None` where nothing is named: rates vary first.
    pub fn candidates(&self) -> Vec<(Option<f64>, Option<u32>)> {
        let rates = some_or_none(&self.learning_rates);
        let ranks = some_or_none(&self.ranks);
        ranks.iter().flat_map(|rank| rates.iter().map(move |rate| (*rate, *rank))).collect()
    }

    fn check(&self, at: &str, problems: &mut Problems) {
        let (rates, ranks) = (self.learning_rates.len(), self.ranks.len());
        let count = rates.max(1).saturating_mul(ranks.max(1));
        problems.require((2..=MAX_CANDIDATES).contains(&count), at, || {
            format!(
                "has {count} candidates ({rates} learning_rates, {ranks} ranks); accepted are 2 to {MAX_CANDIDATES}, every \
                 rate with every rank"
            )
        });
        for (i, rate) in self.learning_rates.iter().enumerate().take(MAX_CANDIDATES) {
            let field = format!("{at}.learning_rates[{i}]");
            problems.range(&field, *rate, &Range::above(0.0, 10.0));
            let twice = self.learning_rates[..i].contains(rate);
            problems.require(!twice, &field, || format!("{rate} is given twice"));
        }
        for (i, rank) in self.ranks.iter().enumerate().take(MAX_CANDIDATES) {
            let field = format!("{at}.ranks[{i}]");
            problems.integer(&field, *rank, 1, 1024);
            problems.require(!self.ranks[..i].contains(rank), &field, || format!("{rank} is given twice"));
        }
    }
}

fn some_or_none<T: Copy>(values: &[T]) -> Vec<Option<T>> {
    if values.is_empty() { vec![None] } else { values.iter().copied().map(Some).collect() }
}

impl TrainParams {
    /// What does not go with a sweep, each by its own name.
    pub(super) fn check_sweep(&self, problems: &mut Problems) {
        let Some(sweep) = &self.sweep else { return };
        let at = "spec.sweep";
        sweep.check(at, problems);
        problems.require(self.validation.is_some(), at, || {
            "a sweep needs held-out examples to choose by: validation_data or validation_fraction".into()
        });
        problems.require(!self.methods.contains(&MethodPart::Full), at, || {
            "does not go with full fine-tuning: every candidate would be a copy of the whole base".into()
        });
        if let Some(preference) = &self.preference {
            let method = preference.method.as_str();
            problems.push(
                "spec.preference",
                format!("{method} does not go with a sweep, which trains on texts and labels"),
            );
        }
        problems.require(self.ewc.is_none(), "spec.ewc", || "does not go with a sweep".into());
        problems.require(self.mix.is_none(), "spec.mix", || "does not go with a sweep".into());
        let holds = self.hyper.kl_to_base.is_some_and(|kl| kl > 0.0);
        problems.require(!holds, "spec.hyper.kl_to_base", || "does not go with a sweep".into());
        let keeps = self.hyper.keep_best.is_some_and(|n| n > 1);
        problems.require(!keeps, "spec.hyper.keep_best", || {
            "does not go with a sweep, which keeps the best weights of its best candidate only".into()
        });
        problems.require(self.hyper.gradient_checkpointing != Some(true), "spec.hyper.gradient_checkpointing", || {
            "does not go with a sweep, whose candidates share one whole forward".into()
        });
        problems.require(
            sweep.learning_rates.is_empty() || self.hyper.learning_rate.is_none(),
            "spec.hyper.learning_rate",
            || "is given beside sweep.learning_rates; give one of them".into(),
        );
        if sweep.ranks.is_empty() {
            return;
        }
        let lora = |m: &MethodPart| if let MethodPart::Lora(part) = m { Some(part.rank) } else { None };
        let found = self.methods.iter().enumerate().find_map(|(i, m)| lora(m).map(|rank| (i, rank)));
        match found {
            _ if self.from_delta.is_some() => {
                problems.push("spec.sweep.ranks", "from_delta has its ranks already; sweep learning_rates");
            }
            None => problems.push("spec.sweep.ranks", "are those of a LoRA; the methods have none"),
            Some((i, Some(_))) => {
                let field = format!("spec.methods[{i}].lora.rank");
                problems.push(field, "is given beside sweep.ranks; give one of them");
            }
            Some((_, None)) => {}
        }
    }
}

/// The parts with this rank for the LoRA.
pub fn with_rank(methods: &[MethodPart], rank: u32) -> Vec<MethodPart> {
    let part = |m: &MethodPart| match m {
        MethodPart::Lora(p) => MethodPart::Lora(LoraPart { rank: Some(rank), ..p.clone() }),
        other => other.clone(),
    };
    methods.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::{
            params::{PublishPolicy, ServeError},
            train_params::{
                EwcParams, HyperParams, MixParams, PreferenceMethod, PreferenceParams, TrainData, Validation,
            },
        },
        delta::{Problem, Task},
    };

    fn wanted(learning_rates: &[f64], ranks: &[u32]) -> TrainParams {
        TrainParams {
            output_name: "style".into(),
            task: Task::CausalLm,
            problem: Problem::SingleLabel,
            data: TrainData::Dataset("d".into()),
            validation: Some(Validation::Fraction(0.1)),
            forgetting: None,
            replay: None,
            methods: vec![MethodPart::Lora(LoraPart::default())],
            labels: vec![],
            k_per_class: None,
            hyper: HyperParams::default(),
            preference: None,
            sweep: Some(SweepParams { learning_rates: learning_rates.to_vec(), ranks: ranks.to_vec() }),
            publish: PublishPolicy::Upsert,
            from_delta: None,
            ewc: None,
            mix: None,
            idempotency_key: None,
        }
    }

    fn problems(params: &TrainParams) -> Vec<String> {
        match params.check() {
            Ok(()) => vec![],
            Err(ServeError::Invalid(all)) => all.into_iter().map(|v| format!("{}: {}", v.field, v.message)).collect(),
            Err(other) => panic!("{other}"),
        }
    }

    fn assert_refused(params: &TrainParams, wanted: &[(&str, &str)]) {
        let found = problems(params);
        for (field, word) in wanted {
            let named = found.iter().any(|p| p.starts_with(&format!("{field}: ")) && p.contains(word));
            assert!(named, "{field} {word} is not among {found:?}");
        }
        assert_eq!(found.len(), wanted.len(), "{found:?}");
    }

    #[test]
    fn candidates_are_every_rate_with_every_rank() {
        let sweep = |rates: &[f64], ranks: &[u32]| {
            SweepParams { learning_rates: rates.to_vec(), ranks: ranks.to_vec() }.candidates()
        };
        let both = sweep(&[0.1, 0.2], &[4, 8]);
        assert_eq!(both, [(Some(0.1), Some(4)), (Some(0.2), Some(4)), (Some(0.1), Some(8)), (Some(0.2), Some(8))]);
        assert_eq!(sweep(&[0.1, 0.2], &[]), [(Some(0.1), None), (Some(0.2), None)]);
        assert_eq!(sweep(&[], &[4, 8]), [(None, Some(4)), (None, Some(8))]);
        assert_eq!(problems(&wanted(&[0.1, 0.2], &[4, 8])), Vec::<String>::new());
        assert_eq!(problems(&wanted(&[], &[4, 8])), Vec::<String>::new());
    }

    #[test]
    fn two_to_sixteen_distinct_candidates_in_range_are_accepted() {
        assert_refused(&wanted(&[], &[]), &[("spec.sweep", "1 candidates")]);
        assert_refused(&wanted(&[0.1], &[4]), &[("spec.sweep", "2 to 16")]);
        let rates: Vec<f64> = (1..=9).map(|i| f64::from(i) * 0.01).collect();
        assert_refused(&wanted(&rates, &[4, 8]), &[("spec.sweep", "18 candidates")]);
        assert!(problems(&wanted(&rates[..8], &[4, 8])).is_empty());
        assert_refused(
            &wanted(&[0.1, 0.1, f64::NAN, 11.0], &[0, 2000]),
            &[
                ("spec.sweep.learning_rates[1]", "twice"),
                ("spec.sweep.learning_rates[2]", "NaN"),
                ("spec.sweep.learning_rates[3]", "11"),
                ("spec.sweep.ranks[0]", "1 to 1024"),
                ("spec.sweep.ranks[1]", "2000"),
            ],
        );
    }

    #[test]
    fn what_does_not_go_with_a_sweep_is_refused_by_its_name() {
        let two = || wanted(&[0.1, 0.2], &[]);
        assert_refused(&TrainParams { validation: None, ..two() }, &[("spec.sweep", "held-out examples")]);
        assert_refused(
            &TrainParams { methods: vec![MethodPart::Full], ..two() },
            &[("spec.sweep", "full fine-tuning")],
        );
        for method in [PreferenceMethod::Dpo, PreferenceMethod::Orpo, PreferenceMethod::Kto] {
            let of = TrainParams { preference: Some(PreferenceParams::of(method)), ..two() };
            assert_refused(&of, &[("spec.preference", method.as_str())]);
        }
        let ewc = EwcParams { data: TrainData::Dataset("d".into()), lambda: 1.0, max_examples: None };
        let held = TrainParams { ewc: Some(ewc), from_delta: Some("old".into()), ..two() };
        assert_refused(&held, &[("spec.ewc", "sweep")]);
        let mix = Some(MixParams { deltas: vec!["a".into(), "b".into()], per_layer: false });
        assert_refused(&TrainParams { methods: vec![], mix, ..two() }, &[("spec.mix", "sweep")]);
        let hyper = HyperParams { kl_to_base: Some(0.1), keep_best: Some(2), ..HyperParams::default() };
        assert_refused(
            &TrainParams { hyper, ..two() },
            &[("spec.hyper.kl_to_base", "sweep"), ("spec.hyper.keep_best", "sweep")],
        );
        let hyper =
            HyperParams { gradient_checkpointing: Some(true), learning_rate: Some(0.1), ..HyperParams::default() };
        assert_refused(
            &TrainParams { hyper, ..two() },
            &[("spec.hyper.gradient_checkpointing", "sweep"), ("spec.hyper.learning_rate", "sweep.learning_rates")],
        );
        let ranks = || wanted(&[], &[4, 8]);
        assert_refused(
            &TrainParams { from_delta: Some("old".into()), ..ranks() },
            &[("spec.sweep.ranks", "from_delta")],
        );
        let bitfit = vec![MethodPart::Bitfit(Default::default())];
        assert_refused(&TrainParams { methods: bitfit, ..ranks() }, &[("spec.sweep.ranks", "LoRA")]);
        let given = vec![MethodPart::Lora(LoraPart { rank: Some(4), ..LoraPart::default() })];
        assert_refused(&TrainParams { methods: given, ..ranks() }, &[("spec.methods[0].lora.rank", "sweep.ranks")]);
    }
}
