//! What is trained: the methods' options.

use std::collections::HashMap;

use clap::{Args, ValueEnum};

use crate::{cli::train_positions::PositionArgs, grpc::proto};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodArg {
    /// Low-rank updates.
    Lora,
    /// Biases.
    Bitfit,
    /// Bottleneck adapters.
    Adapter,
    /// (IA)3: scales of activations.
    Ia3,
    /// Gains and biases of norms.
    Ln,
    /// Embedding rows of some tokens.
    Tokens,
    /// Keys and values ahead of each layer's own.
    Prefix,
    /// Embeddings ahead of the tokens.
    Prompt,
    /// A prompt that a network makes while training.
    PTuning,
    /// Every weight of a private copy of the base; makes a model instead of a delta.
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AdapterArg {
    Houlsby,
    Pfeiffer,
    Parallel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BiasArg {
    None,
    LoraOnly,
    All,
}

#[derive(Debug, Clone, Args)]
pub(super) struct MethodArgs {
    /// LoRA: rank.
    #[arg(long)]
    rank: Option<u32>,
    /// LoRA: alpha.
    #[arg(long)]
    alpha: Option<f64>,
    /// LoRA: scale by alpha / sqrt(rank).
    #[arg(long)]
    rslora: bool,
    /// LoRA, (IA)3: linears; ln: norms; separated by commas; nothing = all (IA3: as PEFT chooses).
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// LoRA: dropout.
    #[arg(long)]
    dropout: Option<f64>,
    /// LoRA: a learned magnitude per output (DoRA).
    #[arg(long)]
    dora: bool,
    /// LoRA: start from the largest singular directions of the base (PiSSA).
    #[arg(long)]
    pissa: bool,
    /// LoRA: learning rate of B over that of A (LoRA+).
    #[arg(long)]
    plus_ratio: Option<f64>,
    /// LoRA: which biases are trained, too.
    #[arg(long)]
    bias: Option<BiasArg>,
    /// LoRA: a bias on every B.
    #[arg(long)]
    lora_bias: bool,
    /// LoRA: layers whose linears are targets, separated by commas; nothing = all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<u32>,
    /// LoRA: linears that are no targets, separated by commas.
    #[arg(long, value_delimiter = ',')]
    exclude: Vec<String>,
    /// LoRA: modules that are trained whole, separated by commas.
    #[arg(long, value_delimiter = ',')]
    save_modules: Vec<String>,
    /// LoRA, tokens: ids of tokens whose embedding rows are trained, separated by commas.
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<u32>,
    /// BitFit: add zero biases where the base has none.
    #[arg(long)]
    added_biases: bool,
    /// (IA)3: which targets have their input scaled, separated by commas.
    #[arg(long, value_delimiter = ',')]
    feedforward: Vec<String>,
    /// Adapter: which.
    #[arg(long)]
    adapter: Option<AdapterArg>,
    /// Adapter: hidden size over the bottleneck's width.
    #[arg(long)]
    reduction_factor: Option<f64>,
    /// Adapter: the nonlinearity.
    #[arg(long)]
    activation: Option<String>,
    /// Adapter: the factor of its result.
    #[arg(long, conflicts_with = "learned_scaling")]
    scaling: Option<f64>,
    /// Adapter: learn the factor.
    #[arg(long)]
    learned_scaling: bool,
    /// Adapter: layers without adapters, separated by commas.
    #[arg(long, value_delimiter = ',')]
    leave_out: Vec<u32>,
    /// Adapter: train all norms, too.
    #[arg(long)]
    train_norms: bool,
}

impl MethodArgs {
    /// A method with its options.
    ///
    /// # Errors
    /// Options that the method does not take together.
    pub(super) fn part(&self, method: MethodArg, positions: &PositionArgs) -> anyhow::Result<proto::MethodPart> {
        use proto::method_part::Part;
        let names = || proto::ModuleNames { names: self.targets.clone() };
        let part = match method {
            MethodArg::Lora => Part::Lora(self.lora()),
            MethodArg::Bitfit => Part::Bitfit(proto::Bitfit { added: self.added_biases, ..Default::default() }),
            MethodArg::Adapter => Part::Adapter(self.adapter()),
            MethodArg::Ia3 => Part::Ia3(proto::Ia3 {
                targets: (!self.targets.is_empty()).then(|| proto::ia3::Targets::Modules(names())),
                feedforward: self.feedforward.clone(),
            }),
            MethodArg::Ln => Part::Ln(proto::LnTuning { targets: self.targets.clone() }),
            MethodArg::Tokens => Part::Tokens(proto::Tokens { ids: self.tokens.clone() }),
            MethodArg::Prefix => Part::Prefix(positions.prefix()?),
            MethodArg::Prompt => Part::Prompt(positions.prompt()?),
            MethodArg::PTuning => Part::PTuning(positions.p_tuning()),
            MethodArg::Full => Part::Full(proto::FullTuning {}),
        };
        Ok(proto::MethodPart { part: Some(part) })
    }

    fn lora(&self) -> proto::Lora {
        use proto::lora::Targets;
        let bias = match self.bias {
            None => proto::LoraBias::Unspecified,
            Some(BiasArg::None) => proto::LoraBias::None,
            Some(BiasArg::LoraOnly) => proto::LoraBias::LoraOnly,
            Some(BiasArg::All) => proto::LoraBias::All,
        };
        let init = if self.pissa { proto::LoraInit::Pissa } else { proto::LoraInit::Unspecified };
        proto::Lora {
            rank: self.rank,
            alpha: self.alpha,
            rslora: self.rslora,
            targets: Some(match self.targets.as_slice() {
                [] => Targets::AllLinear(true),
                names => Targets::Modules(proto::ModuleNames { names: names.to_vec() }),
            }),
            rank_pattern: HashMap::new(),
            alpha_pattern: HashMap::new(),
            dropout: self.dropout,
            dora: self.dora,
            bias: bias.into(),
            b_bias: self.lora_bias,
            layers: self.layers.clone(),
            exclude: self.exclude.clone(),
            plus_ratio: self.plus_ratio,
            init: init.into(),
            tokens: self.tokens.clone(),
            save_modules: self.save_modules.clone(),
        }
    }

    fn adapter(&self) -> proto::Adapter {
        use proto::{AdapterVariant, adapter::Scaling};
        let variant = match self.adapter {
            None => AdapterVariant::Unspecified,
            Some(AdapterArg::Houlsby) => AdapterVariant::Houlsby,
            Some(AdapterArg::Pfeiffer) => AdapterVariant::Pfeiffer,
            Some(AdapterArg::Parallel) => AdapterVariant::Parallel,
        };
        proto::Adapter {
            variant: variant.into(),
            reduction_factor: self.reduction_factor,
            reduction_by_layer: HashMap::new(),
            activation: self.activation.clone(),
            scaling: self.scaling.map(Scaling::Fixed).or(self.learned_scaling.then_some(Scaling::Learned(true))),
            leave_out: self.leave_out.clone(),
            train_norms: self.train_norms,
        }
    }
}
