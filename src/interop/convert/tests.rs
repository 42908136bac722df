//! Folders of every kind with their tensors in pickles, as `torch.save` writes them, against the same folders as safetensors.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::*;
use crate::{
    interop::decode,
    model::{
        Base,
        testing::{random_base, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5},
    },
};

type Tensors = BTreeMap<String, Tensor>;

fn rand(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// CRC-32 of zip files.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    })
}

/// A zip archive of stored files.
fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in files {
        let at = out.len() as u32;
        let (size, crc) = ((data.len() as u32).to_le_bytes(), crc32(data).to_le_bytes());
        // version 2.0, no flags, stored, the first day of the format
        let length = (name.len() as u16).to_le_bytes();
        let common = [&[20, 0, 0, 0, 0, 0, 0, 0, 33, 0][..], &crc, &size, &size, &length, &[0, 0]].concat();
        out.extend([&b"PK\x03\x04"[..], &common[..], name.as_bytes(), &data[..]].concat());
        let place = at.to_le_bytes();
        directory.extend([&b"PK\x01\x02\x14\x00"[..], &common[..], &[0; 10], &place, name.as_bytes()].concat());
    }
    let (at, size) = ((out.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    let count = (files.len() as u16).to_le_bytes();
    out.extend(directory);
    out.extend([&b"PK\x05\x06"[..], &[0; 4], &count, &count, &size, &at, &[0, 0]].concat());
    out
}

/// A state dict as `torch.save` writes it: a pickle that names a storage per tensor, and the storages.
fn torch_save(tensors: &Tensors) -> Vec<u8> {
    let text = |s: &str| [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat();
    let number = |n: usize| [&b"J"[..], &(n as i32).to_le_bytes()].concat();
    let tuple = |all: Vec<Vec<u8>>| [b"(".to_vec(), all.concat(), b"t".to_vec()].concat();
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    let mut files = Vec::new();
    for (i, (name, t)) in tensors.iter().enumerate() {
        let (class, bytes): (&[u8], Vec<u8>) = match t.dtype() {
            DType::F32 => {
                let numbers = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (b"ctorch\nFloatStorage\n", numbers.iter().flat_map(|n| n.to_le_bytes()).collect())
            }
            DType::F64 => {
                let numbers = t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                (b"ctorch\nDoubleStorage\n", numbers.iter().flat_map(|n| n.to_le_bytes()).collect())
            }
            DType::I64 => {
                let numbers = t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
                (b"ctorch\nLongStorage\n", numbers.iter().flat_map(|n| n.to_le_bytes()).collect())
            }
            other => panic!("{other:?}"),
        };
        let key = i.to_string();
        let storage = tuple(vec![text("storage"), class.to_vec(), text(&key), text("cpu"), number(t.elem_count())]);
        let numbers = |all: &[usize]| tuple(all.iter().map(|n| number(*n)).collect());
        let arguments = tuple(vec![
            [storage, b"Q".to_vec()].concat(),
            number(0),
            numbers(t.dims()),
            numbers(t.stride()),
            b"\x89".to_vec(),
            b"ccollections\nOrderedDict\n)R".to_vec(),
        ]);
        pickle.extend([text(name), b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), arguments, b"R".to_vec()].concat());
        files.push((format!("pytorch_adapter/data/{key}"), bytes));
    }
    pickle.extend(b"u.");
    files.insert(0, ("pytorch_adapter/data.pkl".to_owned(), pickle));
    zip(&files)
}

/// A folder of two files, whose tensors are in a pickle or not, and of a head's.
fn write(dir: &Path, pickled: bool, peft: bool, (config, tensors): &(Value, Tensors), head: Option<&(Value, Tensors)>) {
    let names = match (pickled, peft) {
        (true, true) => "adapter_model.bin",
        (true, false) => "pytorch_adapter.bin",
        (false, true) => "adapter_model.safetensors",
        (false, false) => "adapter.safetensors",
    };
    let data = |t: &Tensors| if pickled { torch_save(t) } else { serialize(t, &[]).unwrap() };
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join(names), data(tensors)).unwrap();
    if let Some((config, tensors)) = head {
        std::fs::write(dir.join("head_config.json"), config.to_string()).unwrap();
        let name = if pickled { "pytorch_model_head.bin" } else { "model_head.safetensors" };
        std::fs::write(dir.join(name), data(tensors)).unwrap();
    }
}

fn hub(base: &Base, own: &Value) -> Value {
    json!({"config": own, "name": "n", "hidden_size": base.arch.hidden, "model_type": base.arch.model_type,
        "version": "adapters.1.3.0"})
}

/// What both folders come to is the same delta.
fn assert_converts(base: &Base, what: &str, peft: bool, files: &(Value, Tensors), head: Option<&(Value, Tensors)>) {
    let (pickles, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(pickles.path(), true, peft, files, head);
    write(plain.path(), false, peft, files, head);
    let refused = folder::read_folder(pickles.path()).and_then(|files| decode(&files, base));
    assert!(refused.is_err(), "{what}: a pickle is not read");
    let got = decode(&convert(pickles.path()).unwrap(), base).unwrap();
    let want = decode(&folder::read_folder(plain.path()).unwrap(), base).unwrap();
    assert!(!want.patches().is_empty(), "{what}");
    let flat = |t: &Tensor| (t.dims().to_vec(), t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let all = |delta: &crate::delta::Delta| -> Vec<_> {
        let of = |(site, patch): &(_, crate::delta::Patch)| {
            patch.tensors().into_iter().map(|(n, t)| (*site, n, flat(t))).collect::<Vec<_>>()
        };
        delta.patches().iter().flat_map(of).collect()
    };
    assert_eq!(all(&got), all(&want), "{what}");
    assert_eq!(got.spec.methods, want.spec.methods, "{what}");
    let head = |delta: &crate::delta::Delta| delta.head().map(|h| (h.layers.len(), flat(&h.weight)));
    assert_eq!(head(&got), head(&want), "{what}");
}

/// Tensors of each layer of BERT, by what follows its number.
fn of_layers(base: &Base, own: &[(&str, &[usize])]) -> Tensors {
    let layers = (0..base.arch.layers).flat_map(|i| own.iter().map(move |(name, shape)| (i, *name, *shape)));
    layers.map(|(i, name, shape)| (format!("bert.encoder.layer.{i}.{name}"), rand(shape))).collect()
}

#[test]
fn pickles_of_every_adapterhub_kind_are_rewritten() {
    let base = random_base(&tiny_bert(), 1).unwrap();
    let (h, kv, layers) = (base.arch.hidden, base.arch.kv_width(), base.arch.layers);
    let bottleneck = of_layers(
        &base,
        &[
            ("output.adapters.n.adapter_down.0.weight", &[8, 32]),
            ("output.adapters.n.adapter_down.0.bias", &[8]),
            ("output.adapters.n.adapter_up.weight", &[32, 8]),
            ("output.adapters.n.adapter_up.bias", &[32]),
        ],
    );
    let mut compacter = of_layers(
        &base,
        &[
            ("output.adapters.n.adapter_down.0.W_left", &[2, 16, 1]),
            ("output.adapters.n.adapter_down.0.W_right", &[2, 1, 4]),
            ("output.adapters.n.adapter_down.0.b", &[8]),
            ("output.adapters.n.adapter_up.W_left", &[2, 4, 1]),
            ("output.adapters.n.adapter_up.W_right", &[2, 1, 16]),
            ("output.adapters.n.adapter_up.b", &[32]),
        ],
    );
    compacter.insert("bert.shared_parameters.n.phm_rule".into(), rand(&[2, 2, 2]));
    let lora = of_layers(
        &base,
        &[("attention.self.query.loras.n.lora_A", &[4, 32]), ("attention.self.query.loras.n.lora_B", &[32, 4])],
    );
    let ia3 = of_layers(
        &base,
        &[("attention.self.key.loras.n.lora_B", &[32, 1]), ("intermediate.dense.loras.n.lora_B", &[64, 1])],
    );
    // the library saves a prefix once per layer, and once of the model
    let flat = rand(&[5 * layers * 2 * kv]);
    let own = ["bert.encoder.layer.0.attention.self.prefix_tuning.pool", "bert.prefix_tuning"];
    let prefix: Tensors =
        own.iter().map(|p| (format!("{p}.prefix_tunings.n.self_prefix.control_trans"), flat.clone())).collect();
    let at = |name: &str| format!("bert.prefix_tuning.prefix_tunings.n.self_prefix.{name}");
    let network: Tensors = [
        (at("wte.weight"), rand(&[5, h])),
        (at("control_trans.0.weight"), rand(&[7, h])),
        (at("control_trans.0.bias"), rand(&[7])),
        (at("control_trans.2.weight"), rand(&[layers * 2 * kv, 7])),
        (at("control_trans.2.bias"), rand(&[layers * 2 * kv])),
    ]
    .into();
    let prompt: Tensors =
        [("bert.prompt_tuning.prompt_tunings.n.prompt_embedding.weight".to_owned(), rand(&[5, h]))].into();
    let of_lora = |mode: &str, r: usize| json!({"architecture": "lora", "r": r, "alpha": 8, "composition_mode": mode, "attn_matrices": ["q", "k", "v"]});
    let adapter = json!({"output_adapter": true, "reduction_factor": 4, "non_linearity": "relu"});
    let phm = json!({"output_adapter": true, "reduction_factor": 4, "non_linearity": "gelu", "phm_layer": true});
    let cases = [
        ("bottleneck", adapter, bottleneck),
        ("compacter", phm, compacter),
        ("lora", of_lora("add", 4), lora),
        ("ia3", of_lora("scale", 1), ia3),
        ("prefix", json!({"architecture": "prefix_tuning", "flat": true, "prefix_length": 5}), prefix),
        ("prefix by a network", json!({"architecture": "prefix_tuning", "flat": false}), network),
        ("prompt", json!({"architecture": "prompt_tuning", "prompt_length": 5}), prompt),
    ];
    let head = (
        hub(&base, &json!({"head_type": "classification", "layers": 2, "activation_function": "tanh"})),
        Tensors::from([
            ("heads.n.1.weight".to_owned(), rand(&[h, h])),
            ("heads.n.1.bias".to_owned(), rand(&[h])),
            ("heads.n.4.weight".to_owned(), rand(&[3, h])),
            ("heads.n.4.bias".to_owned(), rand(&[3])),
        ]),
    );
    for (what, own, tensors) in cases {
        let files = (hub(&base, &own), tensors);
        assert_converts(&base, what, false, &files, None);
        assert_converts(&base, &format!("{what} with a head"), false, &files, Some(&head));
    }
}

#[test]
fn pickles_of_other_bases_and_of_peft_are_rewritten() {
    let gpt2 = random_base(&tiny_gpt2(), 1).unwrap();
    let fused = |i: usize, part: &str| format!("transformer.h.{i}.attn.c_attn.loras.n.{part}");
    let lora: Tensors = (0..gpt2.arch.layers)
        .flat_map(|i| [(fused(i, "lora_A"), rand(&[8, 32])), (fused(i, "lora_B"), rand(&[64, 4]))])
        .collect();
    let config = hub(&gpt2, &json!({"architecture": "lora", "r": 4, "alpha": 8, "attn_matrices": ["q", "v"]}));
    assert_converts(&gpt2, "GPT-2's fused LoRA", false, &(config, lora), None);

    let t5 = random_base(&tiny_t5(), 1).unwrap();
    let width = 3 * t5.arch.layers * 2 * t5.arch.kv_width();
    let groups = ["self", "encoder", "cross"];
    let key = |group: &str| format!("prefix_tuning.prefix_tunings.n.{group}_prefix.control_trans");
    let prefixes: Tensors = groups.iter().map(|group| (key(group), rand(&[width]))).collect();
    let config = hub(&t5, &json!({"architecture": "prefix_tuning", "flat": true}));
    assert_converts(&t5, "T5's prefixes", false, &(config, prefixes), None);

    let llama = random_base(&tiny_llama(), 1).unwrap();
    let q = |part: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight");
    let tensors: Tensors = [(q("A"), rand(&[4, 32])), (q("B"), rand(&[32, 4]))].into();
    let config =
        json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"});
    assert_converts(&llama, "PEFT's LoRA", true, &(config, tensors), None);
}

#[test]
fn doubles_become_floats_and_other_numbers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = |t: Tensor| {
        std::fs::write(dir.path().join("pytorch_adapter.bin"), torch_save(&[("t".to_owned(), t)].into())).unwrap()
    };
    file(Tensor::new(&[1f64, 0.5], &Device::Cpu).unwrap());
    let converted = convert(dir.path()).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&converted.files["adapter.safetensors"], &Device::Cpu).unwrap();
    assert_eq!((tensors["t"].dtype(), tensors["t"].to_vec1::<f32>().unwrap()), (DType::F32, vec![1.0, 0.5]));
    file(Tensor::new(&[1i64, 2], &Device::Cpu).unwrap());
    let said = convert(dir.path()).unwrap_err().to_string();
    assert!(said.contains("pytorch_adapter.bin") && said.contains("t is I64") && said.contains("floats"), "{said}");
    std::fs::write(dir.path().join("pytorch_adapter.bin"), b"PK").unwrap();
    assert!(convert(dir.path()).unwrap_err().to_string().contains("no map of tensors"));
    std::fs::remove_file(dir.path().join("pytorch_adapter.bin")).unwrap();
    assert!(convert(dir.path()).unwrap_err().to_string().contains("has none of adapter_model.bin"));
}
