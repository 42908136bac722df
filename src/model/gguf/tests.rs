//! Files in llama.cpp's layout against the folders that they were made of and against candle's own models; damaged ones.

use std::{collections::HashMap, fs::File, io::BufReader};

use candle_core::{
    Device,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_transformers::models::{quantized_llama, quantized_qwen2, quantized_qwen3};
use serde_json::json;

use super::*;
use crate::{
    delta::{DeltaBatch, Task},
    model::{
        Base, Input, LoadOptions, PrivateCopy, Quantize,
        quantize::tests::{apart, outputs},
        testing::{self, Rng, gguf as writer},
    },
    nn::Cx,
    rows::RowLayout,
};

fn qwen2() -> Json {
    let mut config = testing::tiny_llama();
    config["model_type"] = json!("qwen2");
    config
}

fn qwen3() -> Json {
    let mut config = testing::tiny_qwen3();
    config["tie_word_embeddings"] = json!(false);
    config
}

fn tied(mut config: Json) -> Json {
    config["tie_word_embeddings"] = json!(true);
    config
}

/// Wide enough for blocks of 256.
fn wide(mut config: Json) -> Json {
    config["hidden_size"] = json!(256);
    config["intermediate_size"] = json!(512);
    if config.get("head_dim").is_some() {
        config["head_dim"] = json!(64);
    }
    config
}

/// A random folder; the biases of Qwen2's queries, keys and values are there.
fn folder(config: &Json) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), config, 11).unwrap();
    if config["model_type"] == "qwen2" {
        let file = dir.path().join("model.safetensors");
        let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let mut rng = Rng(5);
        let names: Vec<String> =
            tensors.keys().filter(|n| n.contains("self_attn") && !n.contains("o_proj")).cloned().collect();
        for name in names {
            let n = tensors[&name].dim(0).unwrap();
            let bias: Vec<f32> = (0..n).map(|_| 0.3 * rng.normal()).collect();
            tensors.insert(name.replace(".weight", ".bias"), Tensor::from_vec(bias, n, &Device::Cpu).unwrap());
        }
        candle_core::safetensors::save(&tensors, file).unwrap();
    }
    dir
}

fn load(path: &Path) -> Result<Base, ModelError> {
    Base::load(path, &LoadOptions::default())
}

fn tokens() -> Vec<u32> {
    (0..12u32).map(|i| 3 + (i * 37 + 11) % 120).collect()
}

/// Logits of the last token, and the greedy continuation by whole forwards.
fn ours(base: &Base) -> (Vec<f32>, Vec<u32>) {
    let none = DeltaBatch::none();
    let logits = |tokens: &[u32]| -> Vec<f32> {
        let rows = RowLayout::packed(&[tokens.len()]);
        let cx = Cx::new(&rows, &none);
        let hidden = base.transformer.forward(&Input::tokens(tokens), &cx).unwrap();
        let last = base.transformer.logits(&hidden, &[tokens.len() as u32 - 1], &cx).unwrap();
        last.flatten_all().unwrap().to_vec1().unwrap()
    };
    continued(|tokens, _| logits(tokens))
}

/// What candle's model of the file's architecture makes of it, by its own cache.
fn candles(path: &Path, arch: &str) -> (Vec<f32>, Vec<u32>) {
    let mut file = BufReader::new(File::open(path).unwrap());
    let content = gguf_file::Content::read(&mut file).unwrap();
    let device = &Device::Cpu;
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let ids = |tokens: &[u32]| Tensor::new(tokens, device).unwrap().unsqueeze(0).unwrap();
    match arch {
        "llama" => {
            let mut m = quantized_llama::ModelWeights::from_gguf(content, &mut file, device).unwrap();
            continued(|tokens, from| flat(m.forward(&ids(&tokens[from..]), from).unwrap()))
        }
        "qwen2" => {
            let mut m = quantized_qwen2::ModelWeights::from_gguf(content, &mut file, device).unwrap();
            continued(|tokens, from| flat(m.forward(&ids(&tokens[from..]), from).unwrap()))
        }
        _ => {
            let mut m = quantized_qwen3::ModelWeights::from_gguf(content, &mut file, device).unwrap();
            continued(|tokens, from| flat(m.forward(&ids(&tokens[from..]), from).unwrap()))
        }
    }
}

/// The first logits, and ten greedy tokens; `logits` gets all tokens and how many it has seen.
fn continued(mut logits: impl FnMut(&[u32], usize) -> Vec<f32>) -> (Vec<f32>, Vec<u32>) {
    let mut all = tokens();
    let (mut first, mut seen) = (None, 0);
    for _ in 0..10 {
        let found = logits(&all, seen);
        seen = all.len();
        let best = (0..found.len()).max_by(|a, b| found[*a].total_cmp(&found[*b])).unwrap();
        first.get_or_insert(found);
        all.push(best as u32);
    }
    (first.unwrap(), all.split_off(tokens().len()))
}

fn cases() -> Vec<(&'static str, Json)> {
    let (llama, mistral) = (testing::tiny_llama(), {
        let mut config = testing::tiny_llama();
        config["model_type"] = json!("mistral");
        config
    });
    vec![
        ("llama", llama.clone()),
        ("llama", tied(llama)),
        ("llama", mistral),
        ("qwen2", qwen2()),
        ("qwen2", tied(qwen2())),
        ("qwen3", qwen3()),
        ("qwen3", tied(qwen3())),
    ]
}

#[test]
fn a_file_of_floats_is_its_folder_and_what_candle_reads() {
    for (arch, config) in cases() {
        let dir = folder(&config);
        let plain = load(dir.path()).unwrap();
        for (format, tolerance) in [(GgmlDType::F32, 1e-6), (GgmlDType::F16, 2e-3), (GgmlDType::BF16, 2e-2)] {
            let at = tempfile::tempdir().unwrap();
            let path = at.path().join("m.gguf");
            writer::convert(dir.path(), &path, format).unwrap();
            let base = load(&path).unwrap();
            let what = format!("{arch} {} {format:?}", config["tie_word_embeddings"]);
            let off = apart(&outputs(&base), &outputs(&plain));
            assert!(off <= tolerance, "{what}: {off} from the folder");
            assert_eq!((base.parameters, base.arch.attn.len()), (plain.parameters, plain.arch.attn.len()), "{what}");
            assert_eq!((base.arch.bos, &base.arch.eos), (plain.arch.bos, &plain.arch.eos), "{what}");
            assert_ne!(base.fingerprint, plain.fingerprint, "other tensors, other deltas");
            let (first, said) = ours(&base);
            let (theirs, told) = candles(&path, arch);
            assert!(apart(&first, &theirs) < 1e-3, "{what}: {} from candle", apart(&first, &theirs));
            assert_eq!(said, told, "{what}");
            // the folder of one file is the file
            let again = load(at.path()).unwrap();
            assert_eq!((again.fingerprint, again.gguf, again.dir), (base.fingerprint, Some(path), at.path().into()));
        }
    }
}

#[test]
fn quantised_files_compute_what_their_dequantised_numbers_say() {
    use GgmlDType::*;
    for (arch, config) in
        [("llama", wide(testing::tiny_llama())), ("qwen2", wide(tied(qwen2()))), ("qwen3", wide(qwen3()))]
    {
        let dir = folder(&config);
        for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let path = dir.path().join("m.gguf");
            // joined projections of two formats, as files of mixed quality have them; some floats
            let mixed = |name: &str| match name {
                n if n.ends_with("attn_v.weight") => Q6K,
                n if n.ends_with("blk.1.ffn_gate.weight") => F16,
                _ => format,
            };
            let tensors = writer::tensors(dir.path(), mixed).unwrap();
            writer::write(&path, &writer::metadata(dir.path()).unwrap(), &tensors).unwrap();
            let base = load(&path).unwrap();
            let what = format!("{arch} {format:?}");
            let formats = base.linear_formats();
            assert!(formats.contains_key("q6k") && formats.contains_key("f32"), "{what}: {formats:?}");
            assert!(!matches!(base.weight_format(), "f32"), "{what}: {formats:?}");
            let ((first, _), (theirs, _)) = (ours(&base), candles(&path, arch));
            // it rounds activations to 8 bits
            assert!(apart(&first, &theirs) < 0.05, "{what}: {} from candle", apart(&first, &theirs));
            let exact = testing::dequantized(dir.path(), &base).unwrap();
            let off = apart(&outputs(&base), &outputs(&exact));
            assert!(off < 2e-5, "{what}: {off} from the dequantised numbers");
        }
    }
}

#[test]
fn floats_of_a_file_can_be_quantised_and_blocks_stay_as_they_are() {
    let dir = folder(&testing::tiny_llama());
    let path = dir.path().join("m.gguf");
    let format = |name: &str| if name.contains("ffn_down") { GgmlDType::Q4_0 } else { GgmlDType::F16 };
    let tensors = writer::tensors(dir.path(), format).unwrap();
    writer::write(&path, &writer::metadata(dir.path()).unwrap(), &tensors).unwrap();
    let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
    let base = Base::load(&path, &options).unwrap();
    let count = |base: &Base, format: &str| base.linear_formats().get(format).map_or(0, |held| held.matrices);
    assert_eq!((count(&base, "q4_0"), count(&base, "q8_0"), count(&base, "f32")), (2, 7, 0));
    assert_eq!(base.fingerprint, load(&path).unwrap().fingerprint);
}

#[test]
fn divisors_of_frequencies_are_the_config_s_scaling() {
    let mut config = testing::tiny_llama();
    let (factor, low, high, original) = (8.0, 1.0, 4.0, 16.0);
    config["rope_scaling"] = json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original});
    let dir = folder(&config);
    // as llama.cpp's converter computes them, for heads of 8
    let factors: Vec<f32> = (0..4)
        .map(|i| {
            let wavelength = 2.0 * std::f64::consts::PI * 10_000f64.powf(f64::from(i) * 2.0 / 8.0);
            let smooth = (original / wavelength - low) / (high - low);
            let divisor = match () {
                () if wavelength < original / high => 1.0,
                () if wavelength > original / low => factor,
                () => 1.0 / ((1.0 - smooth) / factor + smooth),
            };
            divisor as f32
        })
        .collect();
    assert!(factors.iter().any(|f| *f != 1.0));
    let mut tensors = writer::tensors(dir.path(), |_| GgmlDType::F32).unwrap();
    let divisors = Tensor::new(factors, &Device::Cpu).unwrap();
    tensors.insert("rope_freqs.weight".into(), QTensor::quantize(&divisors, GgmlDType::F32).unwrap());
    let path = dir.path().join("m.gguf");
    writer::write(&path, &writer::metadata(dir.path()).unwrap(), &tensors).unwrap();
    assert!(apart(&outputs(&load(&path).unwrap()), &outputs(&load(dir.path()).unwrap())) < 1e-5);
}

/// A small file, changed, and what is said of it.
struct Case {
    dir: tempfile::TempDir,
    metadata: Vec<(String, gguf_file::Value)>,
    tensors: HashMap<String, QTensor>,
}

impl Case {
    fn new() -> Self {
        let dir = folder(&testing::tiny_llama());
        let metadata = writer::metadata(dir.path()).unwrap();
        let tensors = writer::tensors(dir.path(), |_| GgmlDType::Q8_0).unwrap();
        Self { dir, metadata, tensors }
    }

    fn with(mut self, key: &str, value: Option<gguf_file::Value>) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.extend(value.map(|v| (key.to_owned(), v)));
        self
    }

    fn tensor(mut self, name: &str, shape: Option<&[usize]>, format: GgmlDType) -> Self {
        self.tensors.remove(name);
        if let Some(shape) = shape {
            let t = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            self.tensors.insert(name.into(), QTensor::quantize(&t, format).unwrap());
        }
        self
    }

    fn path(&self) -> PathBuf {
        let path = self.dir.path().join("case.gguf");
        writer::write(&path, &self.metadata, &self.tensors).unwrap();
        path
    }

    fn refused(&self) -> String {
        load(&self.path()).unwrap_err().to_string()
    }
}

#[test]
fn what_is_wrong_is_named() {
    use gguf_file::Value::{String as Text, U32};
    let says = |case: Case, words: &[&str]| {
        let refused = case.refused();
        assert!(words.iter().all(|w| refused.contains(w)), "{refused}: {words:?}");
    };
    let case = Case::new;
    says(case().with("general.architecture", Some(Text("t5".into()))), &["t5", "llama, qwen2, qwen3"]);
    says(case().with("general.architecture", None), &["general.architecture", "missing"]);
    says(case().with("llama.embedding_length", None), &["llama.embedding_length is missing"]);
    says(case().with("llama.block_count", Some(Text("two".into()))), &["llama.block_count", "a number is accepted"]);
    says(case().with("llama.block_count", Some(U32(3))), &["no tensor model.layers.2"]);
    says(case().with("llama.block_count", Some(U32(u32::MAX))), &["num_hidden_layers"]);
    says(case().with("llama.attention.head_count", Some(U32(0))), &["heads"]);
    says(case().with("llama.attention.head_count_kv", Some(U32(3))), &["attn_k", "3 heads"]);
    says(case().with("llama.expert_count", Some(U32(8))), &["llama.expert_count is 8", "0 is supported"]);
    says(case().with("llama.rope.dimension_count", Some(U32(4))), &["rope.dimension_count is 4"]);
    says(case().with("llama.rope.scaling.type", Some(Text("yarn".into()))), &["yarn", "linear"]);
    says(case().with("llama.attention.layer_norm_rms_epsilon", None), &["layer_norm_rms_epsilon is missing"]);
    says(case().with("general.alignment", Some(U32(0))), &["general.alignment", "1 to"]);
    says(case().with("tokenizer.ggml.eos_token_id", Some(Text("x".into()))), &["eos_token_id"]);
    says(case().tensor("token_embd.weight", None, GgmlDType::F32), &["no tensor token_embd.weight"]);
    says(case().tensor("blk.1.ffn_up.weight", None, GgmlDType::F32), &["no tensor model.layers.1.mlp.up_proj.weight"]);
    let shape: Option<&[usize]> = Some(&[64, 64]);
    says(case().tensor("blk.0.ffn_up.weight", shape, GgmlDType::Q8_0), &["up_proj.weight is [64, 64]", "[64, 32]"]);
    says(
        case().tensor("blk.0.ffn_up.weight", Some(&[64, 256]), GgmlDType::Q3K),
        &["blk.0.ffn_up.weight", "Q3_K", "Q6_K"],
    );
    says(case().tensor("blk.0.ffn_gate_inp.weight", shape, GgmlDType::F32), &["blk.0.ffn_gate_inp.weight", "none of"]);
    says(case().tensor("blk.0.attn_norm.weight", Some(&[31]), GgmlDType::F32), &["input_layernorm.weight is [31]"]);
    let missing = load(Path::new("nowhere.gguf")).unwrap_err().to_string();
    assert!(missing.contains("nowhere.gguf"), "{missing}");

    let dir = tempfile::tempdir().unwrap();
    for name in ["a.gguf", "b.GGUF"] {
        std::fs::copy(case().path(), dir.path().join(name)).unwrap();
    }
    let several = load(dir.path()).unwrap_err().to_string();
    assert!(several.contains("several GGUF files (a.gguf, b.GGUF)"), "{several}");
}

#[test]
fn damage_anywhere_is_an_error_or_another_model_and_never_a_panic() {
    let case = Case::new();
    let path = case.path();
    let bytes = std::fs::read(&path).unwrap();
    let header = Header::read(&bytes).unwrap();
    let start = header.tensors.values().map(|t| t.bytes.start).min().unwrap();
    let last = header.tensors.values().map(|t| t.bytes.end).max().unwrap();
    for cut in (0..start).chain([start + 1, last - 1]) {
        let said = Header::read(&bytes[..cut]).unwrap_err();
        assert!(said.contains("ends") || said.contains("GGUF"), "{cut}: {said}");
    }
    std::fs::write(&path, &bytes[..last - 1]).unwrap();
    let said = load(&path).unwrap_err().to_string();
    assert!(said.contains("case.gguf") && said.contains("cut off"), "{said}");
    let mut rng = Rng(9);
    for _ in 0..3000 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + (rng.uniform() * 3.0) as usize {
            let at = (rng.uniform() * start as f32) as usize;
            damaged[at] = (rng.uniform() * 256.0) as u8;
        }
        if let Ok(header) = Header::read(&damaged) {
            assert!(header.tensors.values().all(|t| t.bytes.end <= damaged.len()));
            let _ = header.tokenizer(&damaged);
            let _ = config::read(&header).map(|(layout, config)| entries(header, layout, &config));
        }
    }
}

#[test]
fn counts_that_no_file_has_allocate_nothing() {
    let head = |tensors: u64, entries: u64| {
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    };
    assert!(Header::read(&head(u64::MAX, 0)).is_err() && Header::read(&head(0, u64::MAX)).is_err());
    // one entry, an array of 2^60 numbers; then one of texts; then arrays within arrays
    let entry = |tail: &[u8]| {
        [head(0, 1), 1u64.to_le_bytes().to_vec(), b"k".to_vec(), 9u32.to_le_bytes().to_vec(), tail.to_vec()].concat()
    };
    let array = |kind: u32, n: u64| [kind.to_le_bytes().as_slice(), &n.to_le_bytes()].concat();
    for kind in [4, 8, 9] {
        let said = Header::read(&entry(&array(kind, 1 << 60))).unwrap_err();
        assert!(said.contains('k') && said.contains("ends"), "{said}");
    }
    let nested = Header::read(&entry(&array(9, 1).repeat(20))).unwrap_err();
    assert!(nested.contains("deeper than 8"), "{nested}");
    assert!(Header::read(&entry(&array(77, 0))).is_ok(), "no element, nothing to read");
    // a tensor of 2^64 numbers, and one whose place is beyond counting
    let tensor = |dims: &[u64], offset: u64| {
        let dims: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
        let n = (dims.len() / 8) as u32;
        [
            &head(1, 0)[..],
            &1u64.to_le_bytes(),
            b"t",
            &n.to_le_bytes(),
            &dims[..],
            &0u32.to_le_bytes(),
            &offset.to_le_bytes(),
        ]
        .concat()
    };
    assert!(Header::read(&tensor(&[1 << 32, 1 << 32], 0)).unwrap_err().contains("has the shape"));
    assert!(Header::read(&tensor(&[4, 0], 0)).unwrap_err().contains("has the shape"));
    assert!(Header::read(&tensor(&[4], u64::MAX)).unwrap_err().contains("beyond"));
    assert!(Header::read(&tensor(&[1; 5], 0)).unwrap_err().contains("5 dimensions"));
}

#[test]
fn a_file_is_not_fine_tuned_in_full() {
    let case = Case::new();
    let base = load(&case.path()).unwrap();
    let refused = PrivateCopy::read(&base, Task::CausalLm, |_, _| Ok(())).unwrap_err().to_string();
    assert!(refused.contains("case.gguf"), "{refused}");
}
