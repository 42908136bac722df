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
    use super::super::testing::assert_options;
    use crate::grpc::proto::{Preference, PreferenceMethod, Task};

    #[test]
    fn the_task_or_an_option_names_the_loss() {
        let p = |method: PreferenceMethod| Preference { method: method.into(), ..Preference::default() };
        let dpo = Preference { beta: Some(0.3), label_smoothing: Some(0.1), ..p(PreferenceMethod::Dpo) };
        let kto = Preference { desirable_weight: Some(2.0), ..p(PreferenceMethod::Kto) };
        // with the label smoothing that is not that of pairs
        assert_options(
            |spec| (spec.task(), spec.preference, spec.hyper.and_then(|h| h.label_smoothing)),
            [
                ("--label-smoothing 0.1", Some((Task::CausalLm, None, Some(0.1)))),
                ("--task dpo --beta 0.3 --label-smoothing 0.1", Some((Task::CausalLm, Some(dpo), None))),
                ("--task seq2seq --preference kto --desirable-weight 2", Some((Task::Seq2seq, Some(kto), None))),
                ("--task orpo --preference orpo", Some((Task::CausalLm, Some(p(PreferenceMethod::Orpo)), None))),
                ("--task orpo --preference kto", None),
                ("--beta 0.3", None),
            ],
        );
    }
}
