//! The same random checkpoints through independent implementations: those of `candle-transformers`.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma2, phi3, qwen3};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Base, Input, LoadOptions, testing};
use crate::{delta::DeltaBatch, nn::Cx, rows::RowLayout};

/// A random checkpoint, as our base and as the oracle's tensors.
fn both<C: DeserializeOwned>(config: &Value) -> (Base, C, VarBuilder<'static>) {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), config, 11).unwrap();
    let tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let base = Base::load(dir.path(), &LoadOptions::default()).unwrap();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    (base, serde_json::from_value(config.clone()).unwrap(), vb)
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| 3 + (i * 37 + 11) % 120).collect()
}

fn assert_close(ours: &Tensor, theirs: &Tensor) {
    let theirs = theirs.flatten_all().unwrap();
    let diff = (ours - &theirs).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let size = theirs.abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(diff <= 2e-5 * size.max(1.0), "logits differ by {diff} of {size}");
}

/// Logits of the last of the first `n` tokens, for several `n`.
fn compare(base: &Base, mut oracle: impl FnMut(&Tensor) -> Result<Tensor>) {
    let all = tokens(19);
    let rows = RowLayout::packed(&[all.len()]);
    let none = DeltaBatch::none();
    let cx = Cx::new(&rows, &none);
    let hidden = base.transformer.forward(&Input::tokens(&all), &cx).unwrap();
    for n in [1, 2, 7, 19] {
        let ours = base.transformer.logits(&hidden, &[n as u32 - 1], &cx).unwrap().get(0).unwrap();
        let ids = Tensor::new(&all[..n], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        assert_close(&ours, &oracle(&ids).unwrap());
    }
}

fn phi3_config(partial: f64, kv_heads: usize) -> Value {
    json!({
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "intermediate_size": 48, "vocab_size": 128,
        "max_position_embeddings": 64, "original_max_position_embeddings": 64, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "partial_rotary_factor": partial,
        "sliding_window": 2047, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
    })
}

#[test]
fn phi3_agrees_with_fused_projections_and_partial_rotation() {
    for (partial, kv_heads) in [(1.0, 4), (0.5, 2)] {
        let (base, config, vb) = both::<phi3::Config>(&phi3_config(partial, kv_heads));
        let mut oracle = phi3::Model::new(&config, vb).unwrap();
        compare(&base, |ids| {
            oracle.clear_kv_cache();
            oracle.forward(ids, 0)
        });
    }
}

#[test]
fn longrope_is_refused_by_name() {
    let mut config = phi3_config(1.0, 4);
    config["rope_scaling"] = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]});
    let error = super::family::from_config(&config).unwrap_err().to_string();
    assert!(error.contains("longrope") && error.contains("llama3"), "{error}");
}

#[test]
fn qwen3_agrees() {
    let mut config = testing::tiny_qwen3();
    for (key, value) in [("attention_bias", json!(false)), ("use_sliding_window", json!(false))] {
        config[key] = value;
    }
    config["max_window_layers"] = json!(2);
    let (base, config, vb) = both::<qwen3::Config>(&config);
    let mut oracle = qwen3::ModelForCausalLM::new(&config, vb).unwrap();
    compare(&base, |ids| {
        oracle.clear_kv_cache();
        oracle.forward(ids, 0)
    });
}

#[test]
fn gemma2_agrees_with_caps() {
    let mut config = testing::tiny_gemma2();
    config["attention_bias"] = json!(false);
    // the oracle scales by the heads' width whatever the config says, and its windows count one position more
    config["query_pre_attn_scalar"] = json!(12);
    config["sliding_window"] = json!(64);
    let (base, c, vb) = both::<gemma2::Config>(&config);
    let mut oracle = gemma2::Model::new(false, &c, vb).unwrap();
    compare(&base, |ids| {
        oracle.clear_kv_cache();
        oracle.forward(ids, 0)
    });
}
