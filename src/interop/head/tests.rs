//! Saved heads by family: names, layers that the base lends, and what is refused.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::{
    delta::{Delta, DeltaBatch, DeltaFiles, HeadPool, Task},
    interop::{
        decode,
        testing::{self, random, written},
    },
    model::{
        Base, Input, LoadOptions,
        testing::{random_base, tiny_distilbert, tiny_gpt2, tiny_llama, write_random},
    },
    nn::Cx,
    rows::RowLayout,
};

fn rand(shape: &[usize]) -> Tensor {
    random(shape, 1.0)
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// A folder of a LoRA of one module and a head, as PEFT saves it.
fn folder(task: &str, module: &str, head: &[(&str, &Tensor)]) -> DeltaFiles {
    let config = json!({"peft_type": "LORA", "task_type": task, "r": 2, "lora_alpha": 4, "target_modules": [module],
        "modules_to_save": ["classifier", "score"]});
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    tensors.insert(format!("base_model.model.{module}.lora_A.weight"), rand(&[2, 32]));
    let outputs = if module.ends_with("c_attn") { 96 } else { 32 };
    tensors.insert(format!("base_model.model.{module}.lora_B.weight"), rand(&[outputs, 2]));
    tensors.extend(head.iter().map(|(name, t)| (format!("base_model.model.{name}"), (*t).clone())));
    testing::folder(&config, "adapter_model.safetensors", &tensors)
}

/// A DistilBERT that classifies texts by its own two layers.
fn classifier() -> (Base, Tensor) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_distilbert();
    config["architectures"] = json!(["DistilBertForSequenceClassification"]);
    write_random(dir.path(), &config, 1).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let inner = rand(&[32, 32]);
    for (name, t) in [
        ("pre_classifier.weight", inner.clone()),
        ("pre_classifier.bias", rand(&[32])),
        ("classifier.weight", rand(&[2, 32])),
        ("classifier.bias", rand(&[2])),
    ] {
        weights.insert(name.into(), t);
    }
    candle_core::safetensors::save(&weights, &path).unwrap();
    (Base::load(dir.path(), &LoadOptions::default()).unwrap(), inner)
}

const DISTILBERT: &str = "distilbert.transformer.layer.0.attention.q_lin";
const GPT2: &str = "transformer.h.0.attn.c_attn";

#[test]
fn a_classifier_alone_stands_on_the_base_s_inner_layer() {
    let (base, inner) = classifier();
    let (weight, bias) = (rand(&[3, 32]), rand(&[3]));
    let files = folder("SEQ_CLS", DISTILBERT, &[("classifier.weight", &weight), ("classifier.bias", &bias)]);
    let delta = decode(&files, &base).unwrap();
    let check = |delta: &Delta| {
        let head = delta.head().unwrap();
        assert_eq!((head.layers.len(), head.pool, delta.spec.task), (1, HeadPool::First, Task::SeqCls));
        assert_eq!((flat(&head.layers[0].weight), flat(&head.weight)), (flat(&inner), flat(&weight)));
        // out(relu(inner(first row)))
        let rows = RowLayout::packed(&[4]);
        let batch = DeltaBatch::single(std::sync::Arc::new(delta.clone()), &rows, base.sites.len());
        let cx = Cx::new(&rows, &batch);
        let hidden = base.transformer.forward(&Input::tokens(&[5, 9, 3, 8]), &cx).unwrap();
        let own = base.transformer.own_head().unwrap();
        let x = hidden.narrow(0, 0, 1).unwrap().matmul(&inner.t().unwrap()).unwrap();
        let x = x.broadcast_add(own.layers[0].bias.as_ref().unwrap()).unwrap().relu().unwrap();
        let want = x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let got = base.transformer.classify(&hidden, &cx).unwrap().swap_remove(0).unwrap();
        assert!(flat(&got).iter().zip(flat(&want)).all(|(a, b)| (a - b).abs() < 1e-4), "{got} {want}");
    };
    check(&delta);
    // what is written has both layers, and needs the base's no more
    let again = written(&delta, &base);
    let names = safetensors::SafeTensors::deserialize(&again.files["adapter_model.safetensors"]).unwrap();
    assert!(names.names().contains(&"base_model.model.pre_classifier.weight"), "{:?}", names.names());
    check(&decode(&again, &base).unwrap());
}

#[test]
fn a_classifier_alone_is_refused_where_the_base_has_no_inner_layer() {
    let base = random_base(&tiny_distilbert(), 1).unwrap();
    let weight = rand(&[3, 32]);
    let head = [("classifier.weight", &weight)];
    let refused = decode(&folder("SEQ_CLS", DISTILBERT, &head), &base).unwrap_err().to_string();
    assert!(refused.contains("pre_classifier.weight is missing, and the base has none"), "{refused}");
    // tokens are labelled by one layer
    let delta = decode(&folder("TOKEN_CLS", DISTILBERT, &head), &base).unwrap();
    assert_eq!((delta.head().unwrap().layers.len(), delta.spec.task), (0, Task::TokenCls));
    let (base, _) = classifier();
    let delta = decode(&folder("TOKEN_CLS", DISTILBERT, &head), &base).unwrap();
    assert_eq!(delta.head().unwrap().layers.len(), 0, "also where the base has two for texts");
}

#[test]
fn gpt2_labels_tokens_by_a_classifier_and_texts_by_a_score() {
    let base = random_base(&tiny_gpt2(), 1).unwrap();
    let (weight, bias) = (rand(&[3, 32]), rand(&[3]));
    for (task, name, bias) in [("TOKEN_CLS", "classifier", Some(&bias)), ("SEQ_CLS", "score", None)] {
        let (key, of_bias) = (format!("{name}.weight"), format!("{name}.bias"));
        let head = [(key.as_str(), &weight)].into_iter().chain(bias.map(|b| (of_bias.as_str(), b)));
        let delta = decode(&folder(task, GPT2, &head.collect::<Vec<_>>()), &base).unwrap();
        let own = delta.head().unwrap();
        assert_eq!((flat(&own.weight), own.bias.as_ref().map(flat)), (flat(&weight), bias.map(flat)), "{task}");
        let again = written(&delta, &base);
        let names = safetensors::SafeTensors::deserialize(&again.files["adapter_model.safetensors"]).unwrap();
        let heads: Vec<_> = names.names().into_iter().filter(|n| !n.contains("lora")).collect();
        assert!(heads.iter().all(|n| n.starts_with(&format!("base_model.model.{name}."))), "{task}: {heads:?}");
        assert_eq!(decode(&again, &base).unwrap().spec.task, delta.spec.task);
    }
    // both names at once are two heads
    let head = [("classifier.weight", &weight), ("score.weight", &weight)];
    let refused = decode(&folder("TOKEN_CLS", GPT2, &head), &base).unwrap_err().to_string();
    assert!(refused.contains("another name"), "{refused}");
    // other decoders know one name
    let llama = random_base(&tiny_llama(), 1).unwrap();
    let head = [("classifier.weight", &weight)];
    let refused =
        decode(&folder("TOKEN_CLS", "model.layers.0.self_attn.q_proj", &head), &llama).unwrap_err().to_string();
    assert!(refused.contains("classifier"), "{refused}");
}

#[test]
fn a_gpt2_checkpoint_brings_its_classifier_of_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = tiny_gpt2();
    config["architectures"] = json!(["GPT2ForTokenClassification"]);
    write_random(dir.path(), &config, 1).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    weights.insert("classifier.weight".into(), rand(&[2, 32]));
    weights.insert("classifier.bias".into(), Tensor::ones(2, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&weights, &path).unwrap();
    let base = Base::load(dir.path(), &LoadOptions::default()).unwrap();
    let head = base.transformer.own_head().unwrap();
    assert_eq!((head.weight.dims(), head.bias.as_ref().map(flat)), (&[2, 32][..], Some(vec![1.0, 1.0])));
}
