//! Small random bases for tests and benchmarks: written as real Hugging Face folders, then loaded like any other.

pub mod gguf;

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::{Architecture, Base, LoadOptions, ModelError, PrivateCopy};
use crate::delta::{Site, Task};

/// Writes a folder with `config.json` and seeded random weights for it.
///
/// # Errors
/// An unsupported config; a disk that cannot be written.
pub fn write_random(dir: &Path, config: &Value, seed: u64) -> Result<(), ModelError> {
    let io = |source| ModelError::Io { path: dir.to_path_buf(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    std::fs::write(dir.join("config.json"), config.to_string()).map_err(io)?;
    let arch = super::family::from_config(config)?;
    let sites = super::sites::table(&arch, |_| false);
    let mut rng = Rng(seed | 1);
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let n = arch.names;
    let mut add = |name: String, shape: &[usize], center: f32, spread: f32| -> Result<(), ModelError> {
        let count = shape.iter().product();
        let data: Vec<f32> = (0..count).map(|_| center + spread * rng.normal()).collect();
        tensors.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
        Ok(())
    };
    let positions = arch.max_positions + arch.first_position();
    let tables = [(n.embed, arch.vocab), (n.position, positions), (n.token_type, arch.token_types)];
    for (table, rows) in tables {
        if !table.is_empty() && rows > 0 {
            add(format!("{}{table}.weight", n.prefix), &[rows, arch.hidden], 0.0, 0.5)?;
        }
    }
    if let super::Positions::Relative { buckets, .. } = arch.positions {
        for stack in arch.stacks() {
            let module = Architecture::module(stack.names.relative_bias, 0);
            add(format!("{}{module}.weight", n.prefix), &[buckets, arch.heads.heads], 0.0, 0.5)?;
        }
    }
    let layer_norm = arch.norm == super::NormKind::LayerNorm;
    for (_, entry) in sites.iter() {
        use crate::delta::{Proj, Site};
        let name = format!("{}{}", n.prefix, entry.module);
        match entry.site {
            Site::Norm { .. } | Site::EmbeddingNorm | Site::EncoderNorm | Site::FinalNorm => {
                add(format!("{name}.weight"), &[entry.out_dim], 1.0 - arch.norm_offset as f32, 0.1)?;
                if layer_norm {
                    add(format!("{name}.bias"), &[entry.out_dim], 0.0, 0.1)?;
                }
            }
            Site::Linear { proj, .. } => {
                let (i, o) = (entry.in_dim, entry.out_dim);
                let shape = if arch.conv1d { [i, o] } else { [o, i] };
                add(format!("{name}.weight"), &shape, 0.0, 1.0 / (i as f32).sqrt())?;
                // families with mean-centred norms have biases everywhere
                if layer_norm || (arch.model_type == "qwen2" && matches!(proj, Proj::Q | Proj::K | Proj::V)) {
                    add(format!("{name}.bias"), &[o], 0.0, 0.1)?;
                }
            }
            Site::Pooler => {
                add(format!("{name}.weight"), &[entry.out_dim, entry.in_dim], 0.0, 0.2)?;
                add(format!("{name}.bias"), &[entry.out_dim], 0.0, 0.1)?;
            }
            Site::LmHead if !arch.tied_head => {
                add(format!("{}.weight", entry.module), &[entry.out_dim, entry.in_dim], 0.0, 0.3)?;
            }
            _ => {}
        }
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors"))?;
    Ok(())
}

/// A random base of this config, loaded from a temporary folder (which may go: loading copies).
///
/// # Errors
/// Those of [`write_random`] and [`Base::load`].
pub fn random_base(config: &Value, seed: u64) -> Result<Base, ModelError> {
    random_base_as(config, seed, &LoadOptions::default())
}

/// [`random_base`], kept as the options say.
///
/// # Errors
/// As [`random_base`].
pub fn random_base_as(config: &Value, seed: u64, options: &LoadOptions) -> Result<Base, ModelError> {
    let dir =
        std::env::temp_dir().join(format!("deltaserve-base-{}-{seed}-{}", std::process::id(), uuid::Uuid::new_v4()));
    write_random(&dir, config, seed)?;
    let base = Base::load(&dir, options);
    // best effort: the operating system cleans its temporary folder
    let _ = std::fs::remove_dir_all(&dir);
    base
}

/// A folder's base with the numbers that a quantised base of it has of every linear and of the embedding table, in f32.
///
/// # Errors
/// A folder that cannot be read, or is of another shape.
pub fn dequantized(folder: &Path, quantized: &Base) -> Result<Base, ModelError> {
    let io = |source| ModelError::Io { path: folder.to_path_buf(), source };
    let prefix = quantized.arch.names.prefix;
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    let mut put = |module: &str, w: Tensor| -> Result<(), ModelError> {
        let names = [format!("{prefix}{module}.weight"), format!("{module}.weight")];
        // a tied head has no tensor of its own
        let Some(name) = names.into_iter().find(|name| tensors.contains_key(name)) else { return Ok(()) };
        let found = tensors.insert(name, w.contiguous()?);
        match found.filter(|found| found.dims() != w.dims()) {
            Some(other) => Err(ModelError::Checkpoint(format!("{module} is {:?}, not {:?}", other.dims(), w.dims()))),
            None => Ok(()),
        }
    };
    put(quantized.arch.names.embed, quantized.table()?)?;
    for (site, entry) in quantized.sites.iter() {
        let Some((w, _)) = quantized.linear(site)? else { continue };
        let as_it_is = quantized.arch.conv1d && entry.site != Site::LmHead;
        put(&entry.module, if as_it_is { w } else { w.t()? })?;
    }
    let copy = std::env::temp_dir().join(format!("deltaserve-numbers-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir_all(&copy).map_err(io)?;
    std::fs::copy(folder.join("config.json"), copy.join("config.json")).map_err(io)?;
    candle_core::safetensors::save(&tensors, copy.join("model.safetensors"))?;
    let base = Base::load(&copy, &LoadOptions::default());
    // best effort: the operating system cleans its temporary folder
    let _ = std::fs::remove_dir_all(&copy);
    base
}

/// Config of a 2-layer Llama: vocabulary 128, hidden 32, 4 heads over 2, context 256.
pub fn tiny_llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128,
        "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// Config of a 2-layer GPT-2: vocabulary 128, hidden 32, 4 heads, context 256.
pub fn tiny_gpt2() -> Value {
    json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4,
        "vocab_size": 128, "n_positions": 256, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0, "eos_token_id": 0
    })
}

/// Config of a 2-layer BERT: vocabulary 128, hidden 32, 4 heads, context 64.
pub fn tiny_bert() -> Value {
    json!({
        "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 64,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0
    })
}

/// Config of a 2 + 2-layer T5 with a plain MLP and a tied head: vocabulary 128, hidden 32, 4 heads of 8, context 256.
pub fn tiny_t5() -> Value {
    json!({
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8, "d_ff": 64,
        "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 128, "n_positions": 256,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6, "tie_word_embeddings": true, "is_encoder_decoder": true, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0
    })
}

/// Config of a 2-layer Gemma 2 with a short window and both caps: vocabulary 128, hidden 32, 4 heads of 12 over 2.
pub fn tiny_gemma2() -> Value {
    json!({
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 64, "vocab_size": 128,
        "max_position_embeddings": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 16, "sliding_window": 5, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// Config of a 2-layer Gemma 3, a layer with a short window and one without: vocabulary 128, hidden 32, 4 heads of 12 over 2.
pub fn tiny_gemma3() -> Value {
    json!({
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 64, "vocab_size": 128,
        "max_position_embeddings": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": 1, "eos_token_id": 2
    })
}

/// Config of a 2-layer Qwen 3: vocabulary 128, hidden 32, 4 heads of 12 over 2, context 256.
pub fn tiny_qwen3() -> Value {
    json!({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 64, "vocab_size": 128,
        "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// Config of a 2-layer RoBERTa: vocabulary 128, hidden 32, 4 heads, 62 positions after the padding's.
pub fn tiny_roberta() -> Value {
    json!({
        "model_type": "roberta", "architectures": ["RobertaModel"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 64,
        "type_vocab_size": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1
    })
}

/// Config of a 2-layer DistilBERT: vocabulary 128, hidden 32, 4 heads, context 64.
pub fn tiny_distilbert() -> Value {
    json!({
        "model_type": "distilbert", "architectures": ["DistilBertModel"], "dim": 32, "n_layers": 2, "n_heads": 4,
        "hidden_dim": 64, "vocab_size": 128, "max_position_embeddings": 64, "activation": "gelu", "pad_token_id": 0
    })
}

/// Config of a 2-layer Phi-3 (fused projections): vocabulary 128, hidden 32, 4 heads over 2, context 256.
pub fn tiny_phi3() -> Value {
    json!({
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128,
        "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0
    })
}

/// A base's private copy, and its weights by name.
///
/// # Errors
/// Those of [`PrivateCopy::read`].
pub fn private_copy(base: &Base, task: Task) -> Result<(PrivateCopy, Vec<(String, Tensor)>), ModelError> {
    let mut weights = Vec::new();
    let copy = PrivateCopy::read(base, task, |name, t| {
        weights.push((name.to_owned(), t));
        Ok(())
    })?;
    Ok((copy, weights))
}

/// A small seeded generator, so that test weights do not depend on a crate's version.
pub struct Rng(pub u64);

impl Rng {
    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 24) as f32
    }

    /// Standard normal, by the sum of twelve uniforms.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}
