//! Every architecture of files against the folder that a file was made of: floats, quantised blocks, tied and own heads, and
//! what only some of them have.

use std::{collections::HashMap, path::Path};

use candle_core::quantized::{
    GgmlDType::{self, BF16, F16, F32, Q4_0, Q4K, Q6K, Q8_0},
    QTensor, gguf_file,
};
use serde_json::{Value as Json, json};

use super::{config, header::Header, names::Layout};
use crate::model::{
    Base, LoadOptions, ModelError, Quantize,
    quantize::tests::{apart, outputs},
    testing::{self, gguf as writer},
};

fn load(path: &Path) -> Result<Base, ModelError> {
    Base::load(path, &LoadOptions::default())
}

fn set(mut config: Json, fields: &[(&str, Json)]) -> Json {
    for (key, value) in fields {
        config[*key] = value.clone();
    }
    config
}

/// As a file has it: scores scaled by the width of a head.
fn gemma2() -> Json {
    set(testing::tiny_gemma2(), &[("query_pre_attn_scalar", json!(16)), ("head_dim", json!(16))])
}

fn gemma3() -> Json {
    set(testing::tiny_gemma3(), &[("query_pre_attn_scalar", json!(16)), ("head_dim", json!(16))])
}

/// A config of every architecture; heads both ways where transformers has them both ways.
fn families() -> Vec<(&'static str, Json)> {
    let heads = |config: Json| [true, false].map(|tied| set(config.clone(), &[("tie_word_embeddings", json!(tied))]));
    let plain = [
        ("llama", testing::tiny_llama()),
        ("llama", set(testing::tiny_llama(), &[("model_type", json!("mistral"))])),
        ("qwen2", set(testing::tiny_llama(), &[("model_type", json!("qwen2"))])),
        ("qwen3", testing::tiny_qwen3()),
        ("gemma2", gemma2()),
        ("gemma3", gemma3()),
        ("phi3", testing::tiny_phi3()),
        ("gpt2", testing::tiny_gpt2()),
    ];
    plain.into_iter().flat_map(|(arch, config)| heads(config).map(|config| (arch, config))).collect()
}

#[test]
fn a_file_computes_what_its_folder_computes() {
    for (arch, config) in families() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config, 21).unwrap();
        let plain = load(dir.path()).unwrap();
        for (format, tolerance) in [(F32, 1e-6), (F16, 4e-3), (BF16, 3e-2)] {
            let path = dir.path().join("m.gguf");
            writer::convert(dir.path(), &path, format).unwrap();
            let base = load(&path).unwrap();
            let what = format!("{arch} {} {format:?}", config["tie_word_embeddings"]);
            let off = apart(&outputs(&base), &outputs(&plain));
            assert!(off <= tolerance, "{what}: {off} from the folder");
            // deltas find the same places, and their files say the same of the base
            let places =
                |base: &Base| -> Vec<_> { base.sites.iter().map(|(_, e)| (e.site, e.module.clone())).collect() };
            assert_eq!(places(&base), places(&plain), "{what}");
            let of = |b: &Base| {
                (b.arch.model_type.clone(), b.arch.tied_head, b.arch.conv1d, b.arch.attn.clone(), b.parameters)
            };
            let mistral = config["model_type"] == "mistral";
            let (mut ours, theirs) = (of(&base), of(&plain));
            if mistral {
                ours.0 = "mistral".into();
            }
            assert_eq!(ours, theirs, "{what}");
            assert_eq!(base.arch.tied_head, config["tie_word_embeddings"] == true, "{what}");
        }
    }
}

#[test]
fn quantised_files_of_every_family_compute_what_their_dequantised_numbers_say() {
    let wide = |config: Json| match config["model_type"].as_str() {
        Some("gpt2") => set(config, &[("n_embd", json!(256)), ("n_inner", json!(512))]),
        _ => set(
            config,
            &[
                ("hidden_size", json!(256)),
                ("intermediate_size", json!(512)),
                ("head_dim", json!(64)),
                ("query_pre_attn_scalar", json!(64)),
            ],
        ),
    };
    for (arch, config) in families().into_iter().filter(|(arch, _)| !matches!(*arch, "llama" | "qwen2" | "qwen3")) {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &wide(config), 22).unwrap();
        for format in [Q4_0, Q8_0, Q4K] {
            let path = dir.path().join("m.gguf");
            let mixed = |name: &str| if name.ends_with("ffn_down.weight") { Q6K } else { format };
            let tensors = writer::tensors(dir.path(), mixed).unwrap();
            writer::write(&path, &writer::metadata(dir.path()).unwrap(), &tensors).unwrap();
            let base = load(&path).unwrap();
            assert!(!base.linear_formats().contains_key("f32"), "{arch}: {:?}", base.linear_formats());
            let mut exact = testing::dequantized(dir.path(), &base).unwrap();
            // GPT-2's table of positions is in blocks, too, and is no linear
            if arch == "gpt2" {
                exact.transformer.position = base.transformer.position.clone();
            }
            let off = apart(&outputs(&base), &outputs(&exact));
            assert!(off < 2e-5, "{arch} {format:?}: {off} from the dequantised numbers");
        }
    }
}

#[test]
fn floats_of_gpt_2_s_files_can_be_quantised() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &testing::tiny_gpt2(), 23).unwrap();
    let path = dir.path().join("m.gguf");
    writer::convert(dir.path(), &path, F32).unwrap();
    let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
    let (of_file, of_folder) = (Base::load(&path, &options).unwrap(), Base::load(dir.path(), &options).unwrap());
    assert_eq!(of_file.linear_formats(), of_folder.linear_formats());
    assert!(apart(&outputs(&of_file), &outputs(&of_folder)) < 1e-6);
}

#[test]
fn part_of_phi_3_s_heads_may_turn_and_its_window_may_be_short() {
    let cases = [
        &[("partial_rotary_factor", json!(0.5))][..],
        &[("sliding_window", json!(4))],
        &[("hidden_size", json!(48)), ("partial_rotary_factor", json!(0.5))], // heads of 12
        &[("rope_scaling", json!({"rope_type": "linear", "factor": 4.0}))],
    ];
    for fields in cases {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &set(testing::tiny_phi3(), fields), 24).unwrap();
        let path = dir.path().join("m.gguf");
        let mut metadata = writer::metadata(dir.path()).unwrap();
        if fields[0].0 == "rope_scaling" {
            metadata.push(("phi3.rope.scaling.type".into(), gguf_file::Value::String("linear".into())));
            metadata.push(("phi3.rope.scaling.factor".into(), gguf_file::Value::F32(4.0)));
        }
        writer::write(&path, &metadata, &writer::tensors(dir.path(), |_| F32).unwrap()).unwrap();
        let (base, plain) = (load(&path).unwrap(), load(dir.path()).unwrap());
        assert_eq!(base.arch.attn, plain.arch.attn, "{fields:?}");
        assert!(apart(&outputs(&base), &outputs(&plain)) < 1e-6, "{fields:?}");
    }
}

/// A file of this config whose metadata is changed, and whose tensors are.
struct File {
    dir: tempfile::TempDir,
    metadata: writer::Metadata,
    tensors: HashMap<String, QTensor>,
}

impl File {
    fn of(config: &Json) -> Self {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), config, 25).unwrap();
        let (metadata, tensors) =
            (writer::metadata(dir.path()).unwrap(), writer::tensors(dir.path(), |_| F32).unwrap());
        Self { dir, metadata, tensors }
    }

    fn with(mut self, key: &str, value: Option<gguf_file::Value>) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.extend(value.map(|v| (key.to_owned(), v)));
        self
    }

    fn tensor(mut self, name: &str, like: &str) -> Self {
        let t = self.tensors[like].dequantize(&candle_core::Device::Cpu).unwrap();
        self.tensors.insert(name.into(), QTensor::quantize(&t, GgmlDType::F32).unwrap());
        self
    }

    fn load(&self) -> Result<Base, ModelError> {
        let path = self.dir.path().join("case.gguf");
        writer::write(&path, &self.metadata, &self.tensors).unwrap();
        load(&path)
    }

    /// The config that the metadata comes to.
    fn config(&self) -> Json {
        let path = self.dir.path().join("case.gguf");
        writer::write(&path, &self.metadata, &self.tensors).unwrap();
        config::read(&Header::read(&std::fs::read(path).unwrap()).unwrap()).unwrap().1
    }
}

#[test]
fn an_own_copy_of_a_tied_head_changes_nothing() {
    // as older converters wrote GPT-2
    let file = File::of(&testing::tiny_gpt2());
    let tied = file.load().unwrap();
    let own = file.tensor("output.weight", "token_embd.weight").load().unwrap();
    assert_eq!((tied.arch.tied_head, own.arch.tied_head), (true, false));
    assert!(apart(&outputs(&own), &outputs(&tied)) < 1e-6);
}

#[test]
fn the_largest_gemmas_scale_their_scores_by_the_model_s_width() {
    use gguf_file::Value::U32;
    for (arch, config, largest) in [("gemma2", gemma2(), 46), ("gemma3", gemma3(), 62)] {
        let scalar = |layers: u32| {
            let file = File::of(&config).with(&format!("{arch}.block_count"), Some(U32(layers)));
            file.config()["query_pre_attn_scalar"].as_f64().unwrap()
        };
        assert_eq!((scalar(largest), scalar(largest - 1)), (32.0 / 4.0, 16.0), "{arch}");
    }
}

#[test]
fn gemma_s_windows_and_frequencies_are_the_file_s() {
    use gguf_file::Value::{F32, String as Text, U32};
    let file = || File::of(&gemma3());
    // a pattern of six, and none: of two layers both slide; without a window none does
    let windows = |file: File| -> Vec<_> { file.load().unwrap().arch.attn.iter().map(|a| a.window).collect() };
    assert_eq!(windows(file()), [Some(5), None]);
    assert_eq!(windows(file().with("gemma3.attention.sliding_window_pattern", None)), [Some(5), Some(5)]);
    assert_eq!(windows(file().with("gemma3.attention.sliding_window", None)), [None, None]);
    let thetas =
        |file: File| -> Vec<_> { file.load().unwrap().arch.attn.iter().map(|a| a.rotary.unwrap().theta).collect() };
    assert_eq!(thetas(file().with("gemma3.rope.freq_base", None)), [1e4, 1e6]);
    assert_eq!(thetas(file().with("gemma3.rope.freq_base_swa", Some(F32(5e3)))), [5e3, 1e6]);
    // scaled are the frequencies of the layers that see all
    let scaled = file()
        .with("gemma3.rope.scaling.type", Some(Text("linear".into())))
        .with("gemma3.rope.scaling.factor", Some(F32(8.0)));
    let scaled = scaled.load().unwrap().arch.attn;
    let plain = file().load().unwrap().arch.attn;
    assert_eq!((scaled[0] == plain[0], scaled[1] == plain[1]), (true, false));
    // Gemma 2's usual figures
    let two = File::of(&gemma2())
        .with("gemma2.attention.sliding_window", None)
        .with("gemma2.attn_logit_softcapping", None)
        .with("gemma2.final_logit_softcapping", None);
    let arch = two.load().unwrap().arch;
    assert_eq!((arch.attn[0].window, arch.heads.cap, arch.logit_cap), (Some(4096), Some(50.0), Some(30.0)));
    let huge = file().with("gemma3.block_count", Some(U32(u32::MAX))).with("gemma3.attention.sliding_window", None);
    assert!(huge.load().unwrap_err().to_string().contains("num_hidden_layers"));
}

#[test]
fn what_is_not_read_is_named() {
    use gguf_file::Value::{String as Text, U32};
    let says = |file: File, words: &[&str]| {
        let said = file.load().unwrap_err().to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said}: {words:?}");
    };
    let known = "llama, qwen2, qwen3, gemma2, gemma3, phi3, gpt2";
    for (arch, why) in
        [("mistral", "say llama"), ("mistral3", "YaRN"), ("gemma", "second"), ("bert", known), ("qwen3moe", known)]
    {
        let file = File::of(&testing::tiny_llama()).with("general.architecture", Some(Text(arch.into())));
        says(file, &[&format!("{arch:?}"), known, why]);
    }
    let phi3 = || File::of(&testing::tiny_phi3());
    says(phi3().tensor("rope_factors_long.weight", "output_norm.weight"), &["rope_factors_long.weight", "longrope"]);
    says(phi3().with("phi3.attention.sliding_window", None), &["phi3.attention.sliding_window is missing"]);
    says(phi3().with("phi3.rope.dimension_count", Some(U32(3))), &["partial_rotary_factor"]);
    says(phi3().tensor("blk.0.attn_q.weight", "blk.0.attn_output.weight"), &["blk.0.attn_q.weight", "none of", "phi3"]);
    let gpt2 = || File::of(&testing::tiny_gpt2());
    says(gpt2().with("gpt2.attention.layer_norm_epsilon", None), &["gpt2.attention.layer_norm_epsilon is missing"]);
    says(gpt2().with("gpt2.attention.head_count_kv", Some(U32(2))), &["head_count_kv is 2", "4 is supported"]);
    says(gpt2().with("gpt2.context_length", Some(U32(300))), &["wpe.weight is [256, 32]", "[300, 32]"]);
    says(gpt2().tensor("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"), &["blk.0.ffn_gate.weight", "none of", "gpt2"]);
}

#[test]
fn names_lead_there_and_back() {
    for (arch, name, stored) in [
        ("llama", "model.layers.11.mlp.gate_proj.weight", "blk.11.ffn_gate.weight"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("gemma3", "model.layers.3.post_feedforward_layernorm.weight", "blk.3.post_ffw_norm.weight"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight"),
        ("gpt2", "transformer.h.2.attn.c_proj.bias", "blk.2.attn_output.bias"),
        ("gpt2", "transformer.wpe.weight", "position_embd.weight"),
    ] {
        let layout = Layout::of(arch).unwrap();
        assert_eq!(layout.place(stored).unwrap().name, name);
        assert_eq!(layout.stored_name(name).as_deref(), Some(stored));
    }
    let llama = Layout::of("llama").unwrap();
    for unknown in
        ["blk.x.ffn_gate.weight", "blk.0.ffn_gate", "blk.0.ffn_gate.scale", "position_embd.weight", "blk", ""]
    {
        assert!(llama.place(unknown).is_none(), "{unknown}");
    }
}
