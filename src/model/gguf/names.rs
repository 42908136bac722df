//! How the architectures that are read call their tensors, in a file and in transformers' checkpoints.
//!
//! The names are those of `gguf-py`'s `constants.py` and `tensor_mapping.py`, which llama.cpp's converter writes by.

/// One value of `general.architecture`.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::model) struct Layout {
    /// The value.
    pub(super) arch: &'static str,
    /// The `model_type` of its `config.json`.
    pub(super) model_type: &'static str,
    /// What stands before a layer's number in a checkpoint.
    layers: &'static str,
    /// A layer's modules: in a file, and behind the layer's number in a checkpoint.
    layer: &'static [(&'static str, &'static str)],
    /// The others.
    others: &'static [(&'static str, &'static str)],
    /// Whether the converter permutes the rows of queries and keys.
    pub(super) permutes: bool,
}

/// Divisors of the rotary frequencies (Llama 3.1), which the file has in place of the config's figures.
pub(in crate::model) const FACTORS: &str = "rope_freqs";

const LLAMA_LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

const GEMMA_LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

const PHI3_LAYER: &[(&str, &str)] = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

const GPT2_LAYER: &[(&str, &str)] = &[
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
    ("attn_norm", "ln_1"),
    ("ffn_norm", "ln_2"),
];

/// Of most decoders.
const MODEL: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const LLAMA: Layout = Layout {
    arch: "llama",
    model_type: "llama",
    layers: "model.layers.",
    layer: LLAMA_LAYER,
    others: &[
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("output", "lm_head"),
        (FACTORS, FACTORS),
    ],
    permutes: true,
};

const LAYOUTS: &[Layout] = &[
    LLAMA,
    Layout { arch: "qwen2", model_type: "qwen2", permutes: false, ..LLAMA },
    Layout { arch: "qwen3", model_type: "qwen3", permutes: false, ..LLAMA },
    Layout { arch: "gemma2", model_type: "gemma2", layer: GEMMA_LAYER, others: MODEL, permutes: false, ..LLAMA },
    Layout { arch: "gemma3", model_type: "gemma3_text", layer: GEMMA_LAYER, others: MODEL, permutes: false, ..LLAMA },
    Layout { arch: "phi3", model_type: "phi3", layer: PHI3_LAYER, others: MODEL, permutes: false, ..LLAMA },
    Layout {
        arch: "gpt2",
        model_type: "gpt2",
        layers: "transformer.h.",
        layer: GPT2_LAYER,
        others: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        permutes: false,
    },
];

/// Where a tensor of a file belongs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placed<'a> {
    /// Its name in a checkpoint.
    pub(super) name: String,
    /// Its layer's module in the file; `None` outside the layers.
    pub(super) part: Option<&'a str>,
}

impl Layout {
    /// That of an architecture.
    pub(in crate::model) fn of(arch: &str) -> Option<&'static Self> {
        LAYOUTS.iter().find(|l| l.arch == arch)
    }

    /// All values of `general.architecture`, for messages.
    pub(super) fn known() -> String {
        LAYOUTS.iter().map(|l| l.arch).collect::<Vec<_>>().join(", ")
    }

    /// The place of a tensor by its name in a file; `None` for one that this architecture does not have.
    pub(super) fn place<'a>(&self, stored: &'a str) -> Option<Placed<'a>> {
        let (module, suffix) = stored.rsplit_once('.').filter(|(_, suffix)| matches!(*suffix, "weight" | "bias"))?;
        let known =
            |list: &[(&str, &'static str)], part: &str| list.iter().find(|(n, _)| *n == part).map(|(_, hf)| *hf);
        let layer = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        match layer.and_then(|(n, part)| Some((n.parse::<usize>().ok()?, part))) {
            Some((n, part)) => {
                let name = format!("{}{n}.{}.{suffix}", self.layers, known(self.layer, part)?);
                Some(Placed { name, part: Some(part) })
            }
            None => Some(Placed { name: format!("{}.{suffix}", known(self.others, module)?), part: None }),
        }
    }

    /// The name in a file of a tensor by its name in a checkpoint.
    pub(in crate::model) fn stored_name(&self, name: &str) -> Option<String> {
        let (module, suffix) = name.rsplit_once('.')?;
        let known =
            |list: &[(&'static str, &str)], part: &str| list.iter().find(|(_, hf)| *hf == part).map(|(n, _)| *n);
        match module.strip_prefix(self.layers).and_then(|rest| rest.split_once('.')) {
            Some((n, part)) => Some(format!("blk.{n}.{}.{suffix}", known(self.layer, part)?)),
            None => Some(format!("{}.{suffix}", known(self.others, module)?)),
        }
    }
}
