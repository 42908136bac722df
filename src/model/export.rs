//! A fully trained model as a Hugging Face folder: `config.json`, `model.safetensors`, and the base's tokenizer files.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::{Base, ModelError, family, weights};
use crate::{
    delta::{Head, Problem, Task},
    ids::BaseFingerprint,
};

/// Files beside weights and config that go with a model, where the base's folder has them.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// What a folder is written of.
#[derive(Debug)]
pub struct ModelFolder {
    /// Stored names and weights, f32.
    pub weights: Vec<(String, Tensor)>,
    /// A classification head.
    pub head: Option<Head>,
    /// The task it was trained for.
    pub task: Task,
    /// How the head's outputs are read.
    pub problem: Problem,
    /// Label names in index order, with a head.
    pub labels: Vec<String>,
}

/// Writes the folder, which must not exist while its parent must: all files are durable when this returns. Backbone tensors
/// are stored under the family's prefix, as `transformers` saves a model with a head; a tied head is stored once, as the
/// embedding table. Gives the fingerprint that [`folder_fingerprint`] must find.
///
/// # Errors
/// [`ModelError`] names the file.
pub fn write_folder(base: &Base, model: &ModelFolder, dir: &Path) -> Result<BaseFingerprint, ModelError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ModelError::Io { path, source }
    };
    fs::create_dir(dir).map_err(io(dir))?;
    let config: Value = serde_json::from_slice(&weights::read(&base.dir, "config.json")?)
        .map_err(|e| ModelError::Config(e.to_string()))?;
    let config = configured(config, base, model);
    let text = serde_json::to_vec_pretty(&config).map_err(|e| ModelError::Config(e.to_string()))?;
    let path = dir.join("config.json");
    fs::write(&path, text).map_err(io(&path))?;
    let info = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = dir.join("model.safetensors");
    let tensors = tensors(base, model)?;
    safetensors::serialize_to_file(&tensors, Some(info), &path)
        .map_err(|e| ModelError::Checkpoint(format!("cannot write {}: {e}", path.display())))?;
    for name in COMPANIONS {
        let from = base.dir.join(name);
        if from.is_file() {
            let to = dir.join(name);
            fs::copy(&from, &to).map_err(io(&to))?;
        }
    }
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        fs::File::open(&path).and_then(|f| f.sync_all()).map_err(io(&path))?;
    }
    fs::File::open(dir).and_then(|f| f.sync_all()).map_err(io(dir))?;
    Ok(weights::fingerprint(&config, tensors.iter().map(|(name, t)| (name.as_str(), t))))
}

/// The fingerprint of a folder as a base, from what is on disk: its config must be one of a known family, its tensors are
/// not kept.
///
/// # Errors
/// [`ModelError`] names the file.
pub fn folder_fingerprint(dir: &Path) -> Result<BaseFingerprint, ModelError> {
    let config: Value =
        serde_json::from_slice(&weights::read(dir, "config.json")?).map_err(|e| ModelError::Config(e.to_string()))?;
    let arch = family::from_config(&config)?;
    weights::Checkpoint::open(dir, arch.names.prefix, DType::F32, &Device::Cpu)?.fingerprint(&config)
}

impl ModelFolder {
    /// Bytes of its weights as a file, without the small files beside.
    pub fn bytes(&self) -> u64 {
        let numbers: usize = self.weights.iter().map(|(_, t)| t.elem_count()).sum();
        let head = self.head.iter().flat_map(Head::tensors).map(|(_, t)| t.elem_count());
        ((numbers + head.sum::<usize>()) * DType::F32.size_in_bytes()) as u64
    }
}

/// Tensors by the names in the file.
fn tensors(base: &Base, model: &ModelFolder) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let n = &base.arch.names;
    let of_head = |name: &str| {
        let own = [n.lm_head, n.lm_bias];
        own.iter().any(|m| !m.is_empty() && name.strip_prefix(m).is_some_and(|rest| rest.starts_with('.')))
    };
    let stored = |name: &str| match name {
        name if name.starts_with(n.prefix) || of_head(name) => name.to_owned(),
        bare => format!("{}{bare}", n.prefix),
    };
    let mut out: BTreeMap<String, Tensor> = model.weights.iter().map(|(name, t)| (stored(name), t.clone())).collect();
    let Some(head) = &model.head else { return Ok(out) };
    let inner = n.cls_inner.filter(|_| !head.layers.is_empty());
    let last = inner.map_or(n.head_of(model.task), |i| i.out);
    out.insert(format!("{last}.weight"), head.weight.clone());
    out.extend(head.bias.iter().map(|b| (format!("{last}.bias"), b.clone())));
    match (inner, head.layers.as_slice()) {
        (_, []) => {}
        (Some(inner), [layer]) => {
            out.insert(format!("{}.weight", inner.dense), layer.weight.clone());
            out.extend(layer.bias.iter().map(|b| (format!("{}.bias", inner.dense), b.clone())));
        }
        _ => return Err(ModelError::Unsupported("a head of several layers has no place in this family".into())),
    }
    Ok(out)
}

/// The base's config with class, type and labels of the new model.
fn configured(mut config: Value, base: &Base, model: &ModelFolder) -> Value {
    config["architectures"] = json!([class(&base.arch.model_type, model.task)]);
    config["torch_dtype"] = "float32".into();
    if let Some(map) = config.as_object_mut() {
        ["dtype", "_name_or_path", "num_labels", "problem_type"].iter().for_each(|key| {
            map.remove(*key);
        });
    }
    if model.task.generates() {
        // as it was resolved when the base was loaded: what is stored goes by that
        config["tie_word_embeddings"] = base.arch.tied_head.into();
    }
    if model.head.is_some() {
        let labels = model.labels.iter().enumerate();
        config["id2label"] =
            labels.clone().map(|(i, l)| (i.to_string(), json!(l))).collect::<serde_json::Map<_, _>>().into();
        if model.task == Task::SeqCls {
            config["problem_type"] = model.problem.as_str().into();
        }
        config["label2id"] = labels.map(|(i, l)| (l.clone(), json!(i))).collect::<serde_json::Map<_, _>>().into();
    }
    config
}

/// The class of `transformers` that reads the folder.
fn class(model_type: &str, task: Task) -> String {
    let family = match model_type {
        "llama" => "Llama",
        "mistral" => "Mistral",
        "qwen2" => "Qwen2",
        "qwen3" => "Qwen3",
        "gemma2" => "Gemma2",
        "gemma3_text" if task.generates() => "Gemma3",
        "gemma3_text" => "Gemma3Text",
        "phi3" => "Phi3",
        "gpt2" => "GPT2",
        "roberta" => "Roberta",
        "distilbert" => "DistilBert",
        "t5" => "T5",
        _ => "Bert",
    };
    match task {
        Task::SeqCls => format!("{family}ForSequenceClassification"),
        Task::TokenCls => format!("{family}ForTokenClassification"),
        Task::Seq2Seq => format!("{family}ForConditionalGeneration"),
        _ if model_type == "gpt2" => "GPT2LMHeadModel".to_owned(),
        _ => format!("{family}ForCausalLM"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        delta::{DeltaBatch, Head},
        model::{Input, LoadOptions, PrivateCopy, Source, testing},
        nn::Cx,
        rows::RowLayout,
    };

    fn hidden(base: &Base, head: bool) -> Vec<f32> {
        let rows = RowLayout::packed(&[5, 4]);
        let deltas = DeltaBatch::none();
        let texts = RowLayout::packed(&[4, 3]);
        let source = (base.arch.is_encoder_decoder())
            .then(|| Source::encode(base, texts, &[9, 4, 3, 8, 6, 40, 5], &[None, None], None).unwrap());
        let memory = source.as_ref().map(Source::memory);
        let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
        let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5, 6, 7, 8, 9]), &cx).unwrap();
        let out = if head { base.transformer.head_logits(&hidden, &cx).unwrap().swap_remove(0).logits } else { hidden };
        out.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A folder, its base, and an untrained private copy.
    fn copy(config: &Value, task: Task) -> (tempfile::TempDir, Base, PrivateCopy, Vec<Tensor>) {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(&dir.path().join("base"), config, 5).unwrap();
        let base = Base::load(&dir.path().join("base"), &LoadOptions::default()).unwrap();
        let (copy, weights) = testing::private_copy(&base, task).unwrap();
        let weights = weights.into_iter().map(|(_, t)| t).collect();
        (dir, base, copy, weights)
    }

    #[test]
    fn an_untrained_copy_is_the_base_bit_for_bit_in_memory_and_as_a_folder() {
        let decoders = [testing::tiny_llama(), testing::tiny_gpt2(), testing::tiny_gemma2(), testing::tiny_qwen3()];
        let encoders = [testing::tiny_bert(), testing::tiny_roberta()];
        let mut untied = testing::tiny_t5();
        (untied["tie_word_embeddings"], untied["feed_forward_proj"]) = (false.into(), "gated-gelu".into());
        let pairs = [testing::tiny_t5(), untied];
        let all = decoders.iter().map(|c| (c, Task::CausalLm)).chain(encoders.iter().map(|c| (c, Task::SeqCls)));
        let all = all.chain(pairs.iter().map(|c| (c, Task::Seq2Seq)));
        for (config, task) in all {
            let (dir, base, copy, weights) = copy(config, task);
            let kind = &base.arch.model_type;
            let numbers: usize = weights.iter().map(Tensor::elem_count).sum();
            assert_eq!(numbers as u64, base.trained_by(task), "{kind}");
            assert!(hidden(&copy.base(&base, &weights).unwrap(), false) == hidden(&base, false), "{kind}");
            let named = copy.names().iter().cloned().zip(weights).collect();
            let model = ModelFolder { weights: named, head: None, task, problem: Problem::SingleLabel, labels: vec![] };
            let written = write_folder(&base, &model, &dir.path().join("out")).unwrap();
            let back = Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap();
            assert_eq!((written, folder_fingerprint(&dir.path().join("out")).unwrap()), (back.fingerprint, written));
            assert!(hidden(&back, false) == hidden(&base, false), "{kind} as a folder");
            assert_eq!(back.arch.tied_head, base.arch.tied_head, "{kind}");
            let config: Value = serde_json::from_slice(&fs::read(dir.path().join("out/config.json")).unwrap()).unwrap();
            let class = config["architectures"][0].as_str().unwrap();
            assert_eq!(class.ends_with("ForConditionalGeneration"), task == Task::Seq2Seq, "{class}");
        }
    }

    #[test]
    fn a_checkpoint_without_the_head_that_its_config_speaks_of_is_tied_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = testing::tiny_llama();
        config["tie_word_embeddings"] = true.into();
        let folder = dir.path().join("base");
        testing::write_random(&folder, &config, 5).unwrap();
        config["tie_word_embeddings"] = false.into();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let base = Base::load(&folder, &LoadOptions::default()).unwrap();
        assert!(base.arch.tied_head);
        let weights = testing::private_copy(&base, Task::CausalLm).unwrap().1;
        let numbers: usize = weights.iter().map(|(_, t)| t.elem_count()).sum();
        assert_eq!(numbers as u64, base.trained_by(Task::CausalLm), "the table counts once");
        let model =
            ModelFolder { weights, head: None, task: Task::CausalLm, problem: Problem::SingleLabel, labels: vec![] };
        write_folder(&base, &model, &dir.path().join("out")).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(dir.path().join("out/config.json")).unwrap()).unwrap();
        assert_eq!(written["tie_word_embeddings"], true, "other readers would make a head of their own");
    }

    #[test]
    fn a_head_is_stored_under_the_class_s_names_with_its_labels() {
        let square = |f: f32| {
            (Tensor::eye(32, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap() * f64::from(f)).unwrap()
        };
        for config in [testing::tiny_bert(), testing::tiny_roberta(), testing::tiny_gpt2()] {
            let (dir, base, copy, weights) = copy(&config, Task::SeqCls);
            let mut head = Head::linear(square(0.5).narrow(0, 0, 3).unwrap().contiguous().unwrap(), None);
            if let Some(inner) = base.arch.names.cls_inner {
                head.layers = vec![crate::delta::HeadLayer { weight: square(2.0), bias: None, act: Some(inner.act) }];
                head.pool = crate::delta::HeadPool::First;
            }
            let labels = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
            let named = copy.names().iter().cloned().zip(weights).collect();
            let (task, problem) = (Task::SeqCls, Problem::MultiLabel);
            let model = ModelFolder { weights: named, head: Some(head), task, problem, labels: labels.clone() };
            write_folder(&base, &model, &dir.path().join("out")).unwrap();
            let back = Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap();
            let head = back.arch.head.as_ref().unwrap();
            assert_eq!((&head.labels, head.problem), (&labels, Problem::MultiLabel));
            assert_eq!(hidden(&back, true).len(), 2 * 3, "{}", base.arch.model_type);
        }
    }

    #[test]
    fn a_folder_that_changed_is_refused() {
        let (dir, base, ..) = copy(&testing::tiny_gpt2(), Task::CausalLm);
        testing::write_random(&dir.path().join("base"), &testing::tiny_gpt2(), 6).unwrap();
        let read = |base: &Base, task| PrivateCopy::read(base, task, |_, _| Ok(()));
        assert!(read(&base, Task::CausalLm).unwrap_err().to_string().contains("has changed"));
    }
}
