//! Options of `train` for methods that add positions.

use anyhow::bail;
use clap::{Args, ValueEnum};

use crate::grpc::proto;

/// Prompts and prefixes.
#[derive(Debug, Clone, Args)]
pub(super) struct PositionArgs {
    /// Prefix, prompt, P-tuning: virtual tokens.
    #[arg(long, value_name = "N")]
    virtual_tokens: Option<u32>,
    /// Prefix, prompt: where virtual tokens start.
    #[arg(long)]
    virtual_init: Option<VirtualInit>,
    /// Prefix, prompt: text that virtual tokens start from.
    #[arg(long, value_name = "TEXT")]
    init_text: Option<String>,
    /// Prefix: a network makes keys and values while training.
    #[arg(long)]
    projection: bool,
    /// Prefix: whose form it has, and with it what it joins: of an encoder-decoder, PEFT's joins the decoder's
    /// self-attention, AdapterHub's every attention.
    #[arg(long)]
    prefix_form: Option<PrefixForm>,
    /// Prefix, P-tuning: inner width of the network.
    #[arg(long, value_name = "WIDTH")]
    encoder_hidden: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum VirtualInit {
    /// Prompt: tokens drawn from the vocabulary.
    Vocabulary,
    /// A text: `--init-text`, or for a prefix the first examples.
    Text,
    Random,
    /// Prefix only.
    Zeros,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrefixForm {
    Peft,
    Adapterhub,
}

impl PositionArgs {
    pub(super) fn prefix(&self) -> anyhow::Result<proto::PrefixTuning> {
        let init = match self.virtual_init {
            None => proto::PrefixInit::Unspecified,
            Some(VirtualInit::Vocabulary) => bail!("a prefix cannot start from the vocabulary: text, random or zeros"),
            Some(VirtualInit::Text) => proto::PrefixInit::Text,
            Some(VirtualInit::Random) => proto::PrefixInit::Random,
            Some(VirtualInit::Zeros) => proto::PrefixInit::Zeros,
        };
        let form = match self.prefix_form {
            None => proto::PrefixForm::Unspecified,
            Some(PrefixForm::Peft) => proto::PrefixForm::Peft,
            Some(PrefixForm::Adapterhub) => proto::PrefixForm::Adapterhub,
        };
        Ok(proto::PrefixTuning {
            form: form.into(),
            num_virtual_tokens: self.virtual_tokens,
            init: init.into(),
            init_text: self.init_text.clone(),
            projection: self.projection,
            projection_hidden: self.encoder_hidden,
        })
    }

    pub(super) fn prompt(&self) -> anyhow::Result<proto::PromptTuning> {
        let init = match (self.virtual_init, &self.init_text) {
            (None, Some(_)) | (Some(VirtualInit::Text), _) => proto::PromptInit::Text,
            (None, None) => proto::PromptInit::Unspecified,
            (Some(VirtualInit::Zeros), _) => bail!("a prompt cannot start from zeros: vocabulary, text or random"),
            (Some(VirtualInit::Vocabulary), _) => proto::PromptInit::Vocabulary,
            (Some(VirtualInit::Random), _) => proto::PromptInit::Random,
        };
        Ok(proto::PromptTuning {
            num_virtual_tokens: self.virtual_tokens,
            init: init.into(),
            init_text: self.init_text.clone(),
        })
    }

    pub(super) fn p_tuning(&self) -> proto::PTuning {
        proto::PTuning { num_virtual_tokens: self.virtual_tokens, encoder_hidden: self.encoder_hidden }
    }
}
