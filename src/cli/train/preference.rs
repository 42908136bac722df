//! Options of learning preferences.

use anyhow::bail;
use clap::{Args, ValueEnum};

use super::TaskArg;
use crate::grpc::proto;

#[derive(Debug, Clone, Args)]
pub(super) struct PreferenceArgs {
    /// Learn preferences by this loss: with --task seq2seq; --task dpo, orpo and kto are short for it with causal-lm.
    #[arg(long, value_name = "LOSS")]
    preference: Option<PreferenceArg>,
    /// Preferences: how closely the delta stays by the base; with ORPO, the weight of the odds ratio [default: 0.1].
    #[arg(long, value_name = "X")]
    beta: Option<f64>,
    /// KTO: weight of good answers [default: 1].
    #[arg(long, value_name = "X")]
    desirable_weight: Option<f64>,
    /// KTO: weight of bad answers [default: 1].
    #[arg(long, value_name = "X")]
    undesirable_weight: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PreferenceArg {
    Dpo,
    Orpo,
    Kto,
}

impl PreferenceArgs {
    /// What they and the task ask for; label smoothing is that of the pairs, then.
    ///
    /// # Errors
    /// Two losses, or numbers without one.
    pub(super) fn message(
        &self,
        task: TaskArg,
        label_smoothing: Option<f64>,
    ) -> anyhow::Result<Option<proto::Preference>> {
        let by_task = match task {
            TaskArg::Dpo => Some(PreferenceArg::Dpo),
            TaskArg::Orpo => Some(PreferenceArg::Orpo),
            TaskArg::Kto => Some(PreferenceArg::Kto),
            _ => None,
        };
        let method = match (by_task, self.preference) {
            (Some(a), Some(b)) if a != b => bail!("--task and --preference name different losses"),
            (a, b) => a.or(b),
        };
        let numbers = [self.beta, self.desirable_weight, self.undesirable_weight];
        let Some(method) = method else {
            if numbers.iter().any(Option::is_some) {
                bail!("--beta and weights are for preferences: --task dpo, orpo or kto, or --preference");
            }
            return Ok(None);
        };
        let method = match method {
            PreferenceArg::Dpo => proto::PreferenceMethod::Dpo,
            PreferenceArg::Orpo => proto::PreferenceMethod::Orpo,
            PreferenceArg::Kto => proto::PreferenceMethod::Kto,
        };
        let [beta, desirable_weight, undesirable_weight] = numbers;
        Ok(Some(proto::Preference {
            method: method.into(),
            beta,
            label_smoothing,
            desirable_weight,
            undesirable_weight,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{TrainArgs, spec};
    use crate::grpc::proto;

    fn spec_of(words: &[&str]) -> anyhow::Result<proto::TrainingSpec> {
        let words: Vec<String> = ["name", "--dataset", "d"].iter().chain(words).map(|w| (*w).to_owned()).collect();
        spec(&TrainArgs::of_words(&words)?, "d".into(), None)
    }

    #[test]
    fn the_task_or_an_option_names_the_loss() -> anyhow::Result<()> {
        let plain = spec_of(&["--label-smoothing", "0.1"])?;
        assert_eq!((plain.preference, plain.hyper.and_then(|h| h.label_smoothing)), (None, Some(0.1)));
        let dpo = spec_of(&["--task", "dpo", "--beta", "0.3", "--label-smoothing", "0.1"])?;
        let p = dpo.preference.unwrap_or_default();
        assert_eq!((dpo.task(), p.method()), (proto::Task::CausalLm, proto::PreferenceMethod::Dpo));
        assert_eq!(
            (p.beta, p.label_smoothing, dpo.hyper.and_then(|h| h.label_smoothing)),
            (Some(0.3), Some(0.1), None)
        );
        let kto = spec_of(&["--task", "seq2seq", "--preference", "kto", "--desirable-weight", "2"])?;
        let p = kto.preference.unwrap_or_default();
        assert_eq!(
            (kto.task(), p.method(), p.desirable_weight),
            (proto::Task::Seq2seq, proto::PreferenceMethod::Kto, Some(2.0))
        );
        assert!(spec_of(&["--task", "orpo", "--preference", "orpo"]).is_ok());
        assert!(spec_of(&["--task", "orpo", "--preference", "kto"]).is_err());
        assert!(spec_of(&["--beta", "0.3"]).is_err());
        Ok(())
    }
}
