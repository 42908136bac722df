//! Options of jobs that are made of existing deltas.

use clap::Args;

use super::{source, upload};
use crate::{
    cli::{Common, client::Client},
    grpc::proto,
};

/// Options that say what a delta is made of.
const OF_METHODS: [&str; 25] = [
    "from_delta",
    "method",
    "rank",
    "alpha",
    "rslora",
    "targets",
    "dropout",
    "dora",
    "pissa",
    "plus_ratio",
    "bias",
    "lora_bias",
    "layers",
    "exclude",
    "save_modules",
    "tokens",
    "added_biases",
    "feedforward",
    "adapter",
    "reduction_factor",
    "activation",
    "scaling",
    "learned_scaling",
    "leave_out",
    "train_norms",
];

#[derive(Debug, Clone, Args)]
pub(super) struct StartArgs {
    /// Start at the values of this delta: name or name@version.
    #[arg(long, value_name = "DELTA")]
    pub(super) from_delta: Option<String>,
    /// Hold on to what that delta knows (EWC): JSON Lines file with examples of its task.
    #[arg(long, value_name = "FILE", requires = "from_delta", requires = "ewc_lambda")]
    pub(super) ewc_file: Option<std::path::PathBuf>,
    /// How strongly.
    #[arg(long, value_name = "LAMBDA", requires = "ewc_file")]
    pub(super) ewc_lambda: Option<f64>,
    /// At most this many of its examples are used.
    #[arg(long, value_name = "N", requires = "ewc_file")]
    pub(super) ewc_examples: Option<u32>,
    /// Learn how much of each of these deltas to take, separated by commas: name or name@version.
    #[arg(long, value_name = "DELTAS", value_delimiter = ',', conflicts_with_all = OF_METHODS)]
    pub(super) mix: Vec<String>,
    /// One weight per delta and layer instead of one per delta.
    #[arg(long, requires = "mix")]
    pub(super) mix_per_layer: bool,
}

impl StartArgs {
    pub(super) async fn ewc(&self, common: &Common, client: &Client) -> anyhow::Result<Option<proto::Ewc>> {
        let (Some(file), Some(lambda)) = (&self.ewc_file, self.ewc_lambda) else { return Ok(None) };
        let id = upload(common, client, file).await?;
        Ok(Some(proto::Ewc { data: Some(source(id)), lambda, max_examples: self.ewc_examples }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::assert_options;
    use crate::grpc::proto::Mix;

    #[test]
    fn a_mix_has_no_method_and_takes_none_of_its_options() {
        let mix = Mix { deltas: vec!["a".to_owned(), "b@2".to_owned()], per_layer: true };
        assert_options(
            |spec| (spec.mix, spec.methods.len()),
            [
                ("--mix a,b@2 --mix-per-layer", Some((Some(mix), 0))),
                ("--mix a,b --rank 4", None),
                ("--mix a,b --method bitfit", None),
                ("--mix a,b --from-delta c", None),
                ("--mix a,b --targets q_proj", None),
                ("--mix-per-layer", None),
            ],
        );
    }
}
