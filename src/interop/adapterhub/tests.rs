//! AdapterHub's options, one by one: what is applied, and what is refused by name.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use crate::{
    delta::{
        Act, AdapterInput, AdapterResidual, Delta, DeltaFiles, HeadPool, Patch, Problem, PromptStage, Stack, Task,
    },
    interop::{
        EncodeMeta, InteropError, decode, encode,
        testing::{folder, random, reread},
    },
    model::{
        Base,
        testing::{random_base, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5},
    },
};

fn rand(shape: &[usize]) -> Tensor {
    random(shape, 1.0)
}

/// A base, and how its sublayers' adapters are called before the layer's own name.
fn places(base: &Base, layer: usize) -> [String; 2] {
    match base.arch.model_type.as_str() {
        "bert" => ["attention.output", "output"].map(|h| format!("bert.encoder.layer.{layer}.{h}.adapters.my-name")),
        "gpt2" => ["attention", "output"].map(|h| format!("transformer.h.{layer}.{h}_adapters.adapters.my-name")),
        _ => ["attention", "output"].map(|h| format!("model.layers.{layer}.{h}_adapters.adapters.my-name")),
    }
}

fn config(base: &Base, own: Value) -> Value {
    json!({
        "config": own, "name": "my-name", "hidden_size": base.arch.hidden, "model_type": base.arch.model_type,
        "version": "adapters.1.3.0",
    })
}

fn weights(base: &Base, halves: &[usize], width: usize) -> HashMap<String, Tensor> {
    let h = base.arch.hidden;
    let mut out = HashMap::new();
    for layer in 0..base.arch.layers {
        for half in halves {
            let at = &places(base, layer)[*half];
            out.insert(format!("{at}.adapter_down.0.weight"), rand(&[width, h]));
            out.insert(format!("{at}.adapter_down.0.bias"), rand(&[width]));
            out.insert(format!("{at}.adapter_up.weight"), rand(&[h, width]));
            out.insert(format!("{at}.adapter_up.bias"), rand(&[h]));
        }
    }
    out
}

fn pack(config: &Value, tensors: &HashMap<String, Tensor>) -> DeltaFiles {
    folder(config, "adapter.safetensors", tensors)
}

fn first(delta: &Delta) -> &crate::delta::Bottleneck {
    match &delta.patches()[0].1 {
        Patch::Bottleneck(b) => b,
        other => panic!("{other:?}"),
    }
}

#[test]
fn places_and_wirings_follow_the_configuration() {
    for base in [tiny_bert(), tiny_gpt2(), tiny_llama()].map(|c| random_base(&c, 1).unwrap()) {
        let both = config(
            &base,
            json!({"mh_adapter": true, "output_adapter": true, "reduction_factor": 4,
            "non_linearity": "swish", "original_ln_before": false}),
        );
        let delta = decode(&pack(&both, &weights(&base, &[0, 1], 8)), &base).unwrap();
        assert_eq!((delta.patches().len(), delta.spec.methods.as_slice()), (4, ["adapter".to_owned()].as_slice()));
        let b = first(&delta);
        assert_eq!((b.act, b.wiring.input, b.wiring.closes), (Act::Silu, AdapterInput::Output, true));
        let parallel = config(
            &base,
            json!({"output_adapter": true, "reduction_factor": {"default": 4, "1": 4.0},
            "is_parallel": true, "scaling": "learned", "non_linearity": "relu"}),
        );
        let mut tensors = weights(&base, &[1], 8);
        for layer in 0..2 {
            tensors.insert(format!("{}.scaling", places(&base, layer)[1]), rand(&[1]));
        }
        let delta = decode(&pack(&parallel, &tensors), &base).unwrap();
        assert_eq!(first(&delta).wiring.input, AdapterInput::Residual);
        // written again, it is the same adapter
        let again = reread(&delta, &base);
        for ((s1, p1), (s2, p2)) in delta.patches().iter().zip(again.patches()) {
            assert_eq!(s1, s2);
            for ((n1, t1), (n2, t2)) in p1.tensors().into_iter().zip(p2.tensors()) {
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!((n1, flat(t1)), (n2, flat(t2)));
            }
        }
        assert_eq!(first(&again).wiring, first(&delta).wiring);
    }
}

#[test]
fn old_configurations_and_other_residuals() {
    let base = random_base(&tiny_bert(), 1).unwrap();
    let own = json!({"output_adapter": true, "reduction_factor": 4, "non_linearity": "gelu", "original_ln_before": true,
        "residual_before_ln": "post_add"});
    let mut old = config(&base, own);
    let tensors = weights(&base, &[1], 8);
    let new = decode(&pack(&old, &tensors), &base).unwrap();
    assert_eq!((first(&new).act, first(&new).wiring.residual), (Act::Gelu, AdapterResidual::Sum));
    old.as_object_mut().unwrap().remove("version");
    assert_eq!(first(&decode(&pack(&old, &tensors), &base).unwrap()).act, Act::GeluTanh);
    old["config"]["residual_before_ln"] = json!(false);
    assert_eq!(first(&decode(&pack(&old, &tensors), &base).unwrap()).wiring.residual, AdapterResidual::Input);
}

#[test]
fn folders_that_would_be_applied_wrongly_are_refused_by_name() {
    let base = random_base(&tiny_bert(), 1).unwrap();
    let good = weights(&base, &[1], 8);
    let own = json!({"output_adapter": true, "mh_adapter": false, "reduction_factor": 4, "non_linearity": "relu"});
    let refuse = |change: Value, tensors: &HashMap<String, Tensor>, needle: &str| {
        let mut own = own.clone();
        own.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let e = decode(&pack(&config(&base, own), tensors), &base).unwrap_err();
        assert!(e.to_string().contains(needle), "{e} lacks {needle:?}");
    };
    assert!(decode(&pack(&config(&base, own.clone()), &good), &base).is_ok());
    refuse(json!({"use_gating": true}), &good, "use_gating");
    refuse(json!({"inv_adapter": "nice"}), &good, "inv_adapter");
    refuse(json!({"non_linearity": "prelu"}), &good, "\"prelu\"");
    refuse(json!({"reduction_factor": 16}), &good, "reduction_factor asks for a bottleneck of 2");
    refuse(json!({"scaling": "huge"}), &good, "scaling");
    refuse(json!({"scaling": "learned"}), &good, "scaling is missing");
    refuse(json!({"mh_adapter": true}), &good, "encoder.layer.0.attention.output.adapters");
    refuse(json!({"leave_out": [1]}), &good, "puts no adapter at encoder.layer.1.output.adapters");
    refuse(json!({"residual_before_ln": "post_add"}), &good, "residual_before_ln");
    for architecture in [json!("reft"), json!("union"), json!("mtl_lora"), json!("vera"), json!(3)] {
        refuse(
            json!({"architecture": architecture}),
            &good,
            &format!("config.architecture {architecture} is not supported"),
        );
    }
    refuse(json!({"architecture": "union"}), &good, "delta.json");
    refuse(
        json!({"use_gating": true}),
        &good,
        "config.use_gating is set, which this server does not apply; false or null",
    );
    let mut odd = good.clone();
    odd.insert(format!("{}.gate.weight", places(&base, 0)[1]), rand(&[1, 32]));
    refuse(json!({}), &odd, "gate.weight");
    let mut torn = good.clone();
    torn.remove(&format!("{}.adapter_up.bias", places(&base, 1)[1]));
    refuse(json!({}), &torn, "adapter_up.bias is missing");
    let mut other = config(&base, own.clone());
    other["hidden_size"] = json!(768);
    assert!(matches!(decode(&pack(&other, &good), &base), Err(InteropError::BaseMismatch(_))));
    let mut renamed = config(&base, own);
    renamed["name"] = json!("other");
    assert!(decode(&pack(&renamed, &good), &base).is_err());
    let mut pickle = pack(&config(&base, json!({})), &good);
    pickle.files.remove("adapter.safetensors");
    pickle.files.insert("pytorch_adapter.bin".into(), bytes::Bytes::from_static(b"PK"));
    let e = decode(&pickle, &base).unwrap_err();
    assert!(matches!(e, InteropError::Pickle(_)) && e.to_string().contains("deltas convert"), "{e}");
}

/// The tensors of prefixes of an encoder-decoder with this many virtual tokens, and their configuration.
fn prefixes(base: &Base, groups: &[(&str, usize)]) -> (Value, HashMap<String, Tensor>) {
    let (layers, width) = (base.arch.layers, base.arch.kv_width());
    let key = |group: &str| format!("prefix_tuning.prefix_tunings.my-name.{group}_prefix.control_trans");
    let tensors = groups.iter().map(|(group, n)| (key(group), rand(&[n * layers * 2 * width]))).collect();
    let has = |group: &str| groups.iter().any(|(g, _)| *g == group);
    let own = json!({"architecture": "prefix_tuning", "flat": true, "encoder_prefix": has("encoder"),
        "cross_prefix": has("cross")});
    (own, tensors)
}

#[test]
fn prefixes_of_an_encoder_decoder_join_every_attention_and_survive() {
    let base = random_base(&tiny_t5(), 1).unwrap();
    let (layers, width) = (base.arch.layers, base.arch.kv_width());
    for (groups, len) in [
        (&[("self", 4), ("encoder", 4), ("cross", 4)][..], 6),
        (&[("self", 4), ("cross", 4)][..], 4),
        (&[("self", 4), ("encoder", 4)][..], 4),
        (&[("self", 4)][..], 2),
    ] {
        let (own, tensors) = prefixes(&base, groups);
        let delta = decode(&pack(&config(&base, own), &tensors), &base).unwrap();
        assert_eq!((delta.patches().len(), delta.spec.num_virtual_tokens, delta.spec.task), (len, 4, Task::Seq2Seq));
        let again = reread(&delta, &base);
        assert_eq!(again.patches().len(), len);
        for (group, stack) in [("self", Stack::Main), ("encoder", Stack::Encoder), ("cross", Stack::Memory)] {
            let file = tensors.get(&format!("prefix_tuning.prefix_tunings.my-name.{group}_prefix.control_trans"));
            for delta in [&delta, &again] {
                assert_eq!(delta.ahead_of(stack).keys, if file.is_some() { 4 } else { 0 });
                let own = base.sites.prefix_sites(stack);
                let found = delta.patches().iter().filter(|(s, _)| own.iter().any(|(site, _)| site == s));
                for (layer, (_, patch)) in found.enumerate() {
                    // [n, layers, key and value, width]
                    let file = file.unwrap().reshape((4, layers, 2, width)).unwrap();
                    for (i, (_, t)) in patch.tensors().into_iter().enumerate() {
                        let want =
                            file.narrow(1, layer, 1).unwrap().narrow(2, i, 1).unwrap().reshape((4, width)).unwrap();
                        assert_eq!(t.to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap(), "{group} {layer}");
                    }
                }
            }
        }
    }
}

#[test]
fn prefixes_of_an_encoder_decoder_that_lack_a_part_are_refused_by_name() {
    let base = random_base(&tiny_t5(), 1).unwrap();
    let refuse = |own: Value, tensors: &HashMap<String, Tensor>, needle: &str| {
        let e = decode(&pack(&config(&base, own), tensors), &base).unwrap_err();
        assert!(e.to_string().contains(needle), "{e} lacks {needle:?}");
    };
    let (own, tensors) = prefixes(&base, &[("self", 4), ("encoder", 4), ("cross", 4)]);
    for group in ["self", "encoder", "cross"] {
        let mut torn = tensors.clone();
        torn.retain(|key, _| !key.contains(group));
        refuse(own.clone(), &torn, &format!("{group}_prefix.wte.weight is missing"));
    }
    let mut off = own.clone();
    off["cross_prefix"] = json!(false);
    refuse(off, &tensors, "cross_prefix.control_trans");
    let mut long = own.clone();
    long["prefix_length"] = json!(5);
    refuse(long, &tensors, "prefix_length is 5, the tensors have 4");
    let mut prompt = own;
    prompt["architecture"] = json!("prompt_tuning");
    refuse(prompt, &tensors, "prompts are not applied to encoder-decoders");
    // an encoder alone has one prefix
    let bert = random_base(&tiny_bert(), 1).unwrap();
    let (own, tensors) = prefixes(&bert, &[("self", 4), ("cross", 4)]);
    let e = decode(&pack(&config(&bert, own), &tensors), &bert).unwrap_err();
    assert!(e.to_string().contains("cross_prefix"), "{e}");
}

#[test]
fn prompts_are_loaded_and_written() {
    for (config, stage) in
        [(tiny_bert(), PromptStage::Hidden), (tiny_gpt2(), PromptStage::Hidden), (tiny_llama(), PromptStage::Tokens)]
    {
        let base = random_base(&config, 1).unwrap();
        let key = format!("{}prompt_tuning.prompt_tunings.my-name.prompt_embedding.weight", base.arch.names.prefix);
        let rows = rand(&[5, base.arch.hidden]);
        let own = json!({"architecture": "prompt_tuning", "combine": "prefix", "init_weights_seed": null,
            "prompt_init": "random_uniform", "prompt_init_text": null, "prompt_length": 5});
        let files =
            |own: &Value| pack(&self::config(&base, own.clone()), &HashMap::from([(key.clone(), rows.clone())]));
        let delta = decode(&files(&own), &base).unwrap();
        assert_eq!(
            (delta.spec.methods.as_slice(), delta.spec.num_virtual_tokens),
            (["prompt".to_owned()].as_slice(), 5)
        );
        // one that joins the embeddings of tokens is written in PEFT's form, which says the same
        let again = decode(&encode(&delta, &base, &EncodeMeta::default()).unwrap(), &base).unwrap();
        for delta in [&delta, &again] {
            let Patch::Prompt(p) = &delta.patches()[0].1 else { panic!("{:?}", delta.patches()) };
            assert_eq!((p.stage, p.rows.to_vec2::<f32>().unwrap()), (stage, rows.to_vec2::<f32>().unwrap()));
        }
        for (change, needle) in [
            (json!({"combine": "prefix_after_bos"}), "config.combine \"prefix_after_bos\" is not supported"),
            (json!({"combine": 1}), "config.combine 1 is not supported"),
            (json!({"prompt_length": 6}), "prompt_length is 6, the tensors have 5"),
        ] {
            let mut own = own.clone();
            own.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let e = decode(&files(&own), &base).unwrap_err().to_string();
            assert!(e.contains(needle), "{e} lacks {needle:?}");
        }
    }
}

#[test]
fn what_a_lora_of_adapterhub_may_not_have_is_named() {
    let base = random_base(&tiny_bert(), 1).unwrap();
    let at = "bert.encoder.layer.0.attention.self.query.loras.my-name";
    let tensors = HashMap::from([(format!("{at}.lora_A"), rand(&[4, 32])), (format!("{at}.lora_B"), rand(&[32, 4]))]);
    let own = json!({"architecture": "lora", "r": 4, "alpha": 8, "composition_mode": "add", "use_gating": false,
        "use_dora": false, "vera_b": null, "vera_d": null});
    let said = |change: Value| {
        let mut own = own.clone();
        own.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        decode(&pack(&config(&base, own), &tensors), &base).map(|d| d.patches().len()).map_err(|e| e.to_string())
    };
    assert_eq!(said(json!({})), Ok(1));
    for (change, needle) in [
        (json!({"use_gating": true}), "config.use_gating is set"),
        (json!({"use_dora": true}), "config.use_dora is set"),
        (json!({"vera_d": 0.1}), "config.vera_d is set"),
        (json!({"composition_mode": "mul"}), "config.composition_mode is \"mul\"; accepted are add, scale"),
        (json!({"r": 0}), "config.r is not a whole number from 1"),
        (json!({"attn_matrices": ["o"]}), "config.attn_matrices has \"o\"; accepted are q, k, v"),
    ] {
        let e = said(change).unwrap_err();
        assert!(e.contains(needle), "{e} lacks {needle:?}");
    }
}

#[test]
fn heads_bring_their_layers_and_labels() {
    let base = random_base(&tiny_bert(), 1).unwrap();
    let own = json!({"output_adapter": true, "reduction_factor": 4, "non_linearity": "relu"});
    let mut files = pack(&config(&base, own), &weights(&base, &[1], 8));
    let head = json!({"head_type": "classification", "layers": 2, "activation_function": "tanh", "num_labels": 3,
        "label2id": {"b": 1, "a": 0, "c": 2}, "use_pooler": false});
    let tensors: HashMap<String, Tensor> = [
        ("heads.my-name.1.weight", rand(&[32, 32])),
        ("heads.my-name.1.bias", rand(&[32])),
        ("heads.my-name.4.weight", rand(&[3, 32])),
        ("heads.my-name.4.bias", rand(&[3])),
    ]
    .into_iter()
    .map(|(k, t)| (k.to_owned(), t))
    .collect();
    files.files.insert("head_config.json".into(), config(&base, head.clone()).to_string().into());
    assert!(decode(&files, &base).unwrap_err().to_string().contains("model_head.safetensors"));
    files.files.insert("model_head.safetensors".into(), safetensors::serialize(&tensors, None).unwrap().into());
    let delta = decode(&files, &base).unwrap();
    assert_eq!((delta.spec.task, delta.spec.labels.join("")), (Task::SeqCls, "abc".to_owned()));
    let h = delta.head().unwrap();
    assert_eq!((h.layers.len(), h.pool, h.layers[0].act), (1, HeadPool::First, Some(Act::Tanh)));
    let again = reread(&delta, &base);
    assert_eq!((again.spec.labels.join(""), again.head().unwrap().layers.len()), ("abc".to_owned(), 1));
    assert_eq!(again.spec.problem, Problem::SingleLabel);
    let mut other = head;
    other["head_type"] = json!("multilabel_classification");
    files.files.insert("head_config.json".into(), config(&base, other.clone()).to_string().into());
    let several = decode(&files, &base).unwrap();
    let again = reread(&several, &base);
    assert_eq!((several.spec.problem, again.spec.problem), (Problem::MultiLabel, Problem::MultiLabel));
    other["head_type"] = json!("multiple_choice");
    files.files.insert("head_config.json".into(), config(&base, other).to_string().into());
    assert!(decode(&files, &base).unwrap_err().to_string().contains("multiple_choice"));
    assert_eq!(h.weight.dtype(), DType::F32);
}
