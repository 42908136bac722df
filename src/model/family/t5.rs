//! T5 (Raffel et al. 2020): encoder and decoder of the same pre-norm block, positions as biases of the scores by distance,
//! scores that are not scaled, a plain or gated MLP. Also T5 v1.1 and Flan-T5.

use super::{Architecture, Config, ModelError, Names, plain};
use crate::{
    model::{BlockNames, MlpKind, Positions},
    nn::HeadShape,
    ops::Act,
};

/// T5 has no table of positions; this bounds the work of one request where the config states no length.
const MAX_POSITIONS: usize = 2048;

const NAMES: Names = Names {
    embed: "shared",
    block: BlockNames {
        q: "decoder.block.{}.layer.0.SelfAttention.q",
        k: "decoder.block.{}.layer.0.SelfAttention.k",
        v: "decoder.block.{}.layer.0.SelfAttention.v",
        o: "decoder.block.{}.layer.0.SelfAttention.o",
        relative_bias: "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        cross: [
            "decoder.block.{}.layer.1.EncDecAttention.q",
            "decoder.block.{}.layer.1.EncDecAttention.k",
            "decoder.block.{}.layer.1.EncDecAttention.v",
            "decoder.block.{}.layer.1.EncDecAttention.o",
        ],
        up: "decoder.block.{}.layer.2.DenseReluDense.wi",
        down: "decoder.block.{}.layer.2.DenseReluDense.wo",
        norm_attn: "decoder.block.{}.layer.0.layer_norm",
        norm_cross: "decoder.block.{}.layer.1.layer_norm",
        norm_mlp: "decoder.block.{}.layer.2.layer_norm",
        final_norm: "decoder.final_layer_norm",
        ..BlockNames::NONE
    },
    encoder: BlockNames {
        q: "encoder.block.{}.layer.0.SelfAttention.q",
        k: "encoder.block.{}.layer.0.SelfAttention.k",
        v: "encoder.block.{}.layer.0.SelfAttention.v",
        o: "encoder.block.{}.layer.0.SelfAttention.o",
        relative_bias: "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        up: "encoder.block.{}.layer.1.DenseReluDense.wi",
        down: "encoder.block.{}.layer.1.DenseReluDense.wo",
        norm_attn: "encoder.block.{}.layer.0.layer_norm",
        norm_mlp: "encoder.block.{}.layer.1.layer_norm",
        final_norm: "encoder.final_layer_norm",
        ..BlockNames::NONE
    },
    lm_head: "lm_head",
    ..Names::NONE
};

const GATED: Names = Names {
    block: BlockNames {
        gate: "decoder.block.{}.layer.2.DenseReluDense.wi_0",
        up: "decoder.block.{}.layer.2.DenseReluDense.wi_1",
        ..NAMES.block
    },
    encoder: BlockNames {
        gate: "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        up: "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        ..NAMES.encoder
    },
    ..NAMES
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("d_model")?;
    let heads = c.usize("num_heads")?;
    let encoder_layers = c.layers("num_layers")?;
    let layers = if c.get("num_decoder_layers").is_some() { c.layers("num_decoder_layers")? } else { encoder_layers };
    let (gated, act) = feed_forward(c)?;
    let tied = c.bool_or("tie_word_embeddings", true);
    // the library's own values where a config does not speak of them
    let or = |key: &str, usual: u32| if c.lacks(key) { vec![usual] } else { c.tokens(key) };
    let (pad, eos) = (or("pad_token_id", 0).first().copied(), or("eos_token_id", 1));
    Ok(Architecture {
        family: "t5",
        hidden,
        encoder_layers,
        heads: HeadShape { scale: 1.0, ..HeadShape::plain(heads, c.usize("d_kv")?) },
        ff: c.usize("d_ff")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize_or("n_positions", MAX_POSITIONS),
        norm_eps: c.f64_or("layer_norm_epsilon", 1e-6),
        positions: Positions::Relative {
            buckets: c.usize_or("relative_attention_num_buckets", 32),
            max_distance: c.usize_or("relative_attention_max_distance", 128),
        },
        causal: true,
        mlp: if gated { MlpKind::Gated } else { MlpKind::Plain },
        act,
        tied_head: tied,
        head_scale: if tied { (hidden as f64).powf(-0.5) } else { 1.0 },
        // transformers starts with the padding token where the config names no other
        decoder_start: c.tokens("decoder_start_token_id").first().copied().or(pad),
        pad,
        eos,
        ..plain(c, if gated { GATED } else { NAMES }, layers)?
    })
}

/// `feed_forward_proj`: an activation, after `gated-` if gated. `gated-gelu` means the tanh form, as in the library.
fn feed_forward(c: &Config<'_>) -> Result<(bool, Act), ModelError> {
    let text = c.get("feed_forward_proj").and_then(|v| v.as_str()).unwrap_or("relu");
    let (gated, name) = match text.strip_prefix("gated-") {
        Some(name) => (true, if name == "gelu" { "gelu_new" } else { name }),
        None => (false, text),
    };
    match Act::from_hf(name) {
        Some(act) => Ok((gated, act)),
        None => Err(ModelError::Config(format!("feed_forward_proj {text:?} is not known"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::model::{
        Base, LoadOptions,
        testing::{tiny_llama, tiny_t5, write_random},
    };

    /// End of sequence, first token and padding of a base with these two files.
    fn tokens(config: &Value, generation: Option<Value>) -> (Vec<u32>, Option<u32>, Option<u32>) {
        let dir = tempfile::tempdir().unwrap();
        write_random(dir.path(), config, 1).unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        let arch = Base::load(dir.path(), &LoadOptions::default()).unwrap().arch;
        (arch.eos, arch.decoder_start, arch.pad)
    }

    #[test]
    fn special_tokens_come_from_both_configs_and_the_library_s_own_values() {
        let mut config = tiny_t5();
        config["eos_token_id"] = json!(7);
        assert_eq!(tokens(&config, None), (vec![7], Some(0), Some(0)));
        assert_eq!(tokens(&config, Some(json!({"pad_token_id": 0}))), (vec![7], Some(0), Some(0)));
        assert_eq!(tokens(&config, Some(json!({"eos_token_id": [7, 9]}))).0, [7, 9]);
        // a config that does not speak of them means T5's own
        for key in ["eos_token_id", "pad_token_id", "decoder_start_token_id"] {
            config.as_object_mut().unwrap().remove(key);
        }
        assert_eq!(tokens(&config, None), (vec![1], Some(0), Some(0)));
        // one that says null means none
        config["eos_token_id"] = Value::Null;
        config["pad_token_id"] = Value::Null;
        assert_eq!(tokens(&config, None), (vec![], None, None));
        assert_eq!(
            tokens(&config, Some(json!({"eos_token_id": 5, "decoder_start_token_id": 3}))),
            (vec![5], Some(3), None)
        );
        // other families have no values of their own
        let mut llama = tiny_llama();
        llama.as_object_mut().unwrap().remove("eos_token_id");
        assert_eq!(tokens(&llama, None).0, Vec::<u32>::new());
        assert_eq!(
            tokens(&llama, Some(json!({"eos_token_id": 2, "decoder_start_token_id": 3}))),
            (vec![2], None, None)
        );
    }
}
