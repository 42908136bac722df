//! What a delta folder may hold: what is read, what is written back, and what is refused.

use std::collections::HashMap;

use bytes::Bytes;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::{
    testing::{folder, random, reread, written},
    *,
};
use crate::{
    delta::{LowRank, Proj, Site},
    model::testing::{random_base, tiny_bert, tiny_gpt2, tiny_llama, write_random},
};

fn pack(config: &Value, tensors: &HashMap<String, Tensor>) -> DeltaFiles {
    folder(config, "adapter_model.safetensors", tensors)
}

fn lora(r: usize) -> Value {
    json!({"peft_type": "LORA", "r": r, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]})
}

fn pair(path: &str, r: usize, i: usize, o: usize) -> HashMap<String, Tensor> {
    let rand = |s: (usize, usize)| random(s, 1.0);
    HashMap::from([
        (format!("base_model.model.{path}.lora_A.weight"), rand((r, i))),
        (format!("base_model.model.{path}.lora_B.weight"), rand((o, r))),
    ])
}

const Q: &str = "model.layers.1.self_attn.q_proj";

#[test]
fn files_that_would_be_applied_wrongly_are_refused_by_name() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let good = pair(Q, 4, 32, 32);
    assert!(decode(&pack(&lora(4), &good), &base).is_ok());
    let expect = |files: DeltaFiles, needle: &str| {
        let e = decode(&files, &base).unwrap_err();
        assert!(e.to_string().contains(needle), "{e} lacks {needle:?}");
        e
    };
    let mut other = good.clone();
    other.insert(
        "base_model.model.model.layers.1.self_attn.q_proj.mystery".into(),
        good.values().next().unwrap().clone(),
    );
    assert!(matches!(expect(pack(&lora(4), &other), "q_proj.mystery"), InteropError::Unapplied(_)));
    let far = pair("model.layers.9.self_attn.q_proj", 4, 32, 32);
    assert!(matches!(expect(pack(&lora(4), &far), "layers.9"), InteropError::BaseMismatch(_)));
    assert!(matches!(expect(pack(&lora(4), &pair(Q, 4, 48, 32)), "48"), InteropError::BaseMismatch(_)));
    let mut torn = good.clone();
    torn.insert(
        format!("base_model.model.{Q}.lora_B.weight"),
        Tensor::ones((32, 3), candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    expect(pack(&lora(4), &torn), "lora_A has rank 4, lora_B has rank 3");
    let mut half = good.clone();
    half.remove(&format!("base_model.model.{Q}.lora_B.weight"));
    expect(pack(&lora(4), &half), "no lora_B");
    expect(pack(&lora(5), &good), "config says rank 5");
    let mut nan = good.clone();
    nan.insert(format!("base_model.model.{Q}.lora_A.weight"), Tensor::full(f32::NAN, (4, 32), &Device::Cpu).unwrap());
    expect(pack(&lora(4), &nan), "not finite");
    let mut ints = good.clone();
    ints.insert(
        format!("base_model.model.{Q}.lora_A.weight"),
        Tensor::ones((4, 32), candle_core::DType::U32, &Device::Cpu).unwrap(),
    );
    expect(pack(&lora(4), &ints), "U32");
    let mut qalora = lora(4);
    qalora["use_qalora"] = json!(true);
    expect(pack(&qalora, &good), "use_qalora");
    let mut newer = lora(4);
    newer["option_of_a_later_peft"] = json!({});
    assert!(decode(&pack(&newer, &good), &base).is_ok(), "an option that is off changes nothing");
    newer["option_of_a_later_peft"] = json!(0.5);
    expect(pack(&newer, &good), "option_of_a_later_peft");
    expect(pack(&json!({"peft_type": "VERA", "projection_prng_key": 7}), &good), "VERA");
    expect(pack(&json!({}), &good), "peft_type is missing");
    let mut pickle = pack(&lora(4), &good);
    pickle.files.remove("adapter_model.safetensors");
    pickle.files.insert("adapter_model.bin".into(), Bytes::from_static(b"\x80\x02"));
    assert!(matches!(expect(pickle, "pickle"), InteropError::Pickle(_)));
}

#[test]
fn an_activated_lora_is_read_with_the_tokens_that_call_it_and_written_again() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let called = |tokens: Value| {
        let mut config = lora(4);
        config["alora_invocation_tokens"] = tokens;
        config
    };
    let good = pair(Q, 4, 32, 32);
    let read = |config: &Value, tensors: &HashMap<String, Tensor>| decode(&pack(config, tensors), &base);
    let delta = read(&called(json!([5, 6])), &good).unwrap();
    assert_eq!(
        (delta.invocation().map(|t| t.to_vec()), &delta.spec.methods[..]),
        (Some(vec![5, 6]), &["alora".to_owned()][..])
    );
    let from = |prompt: &[u32]| delta.acts_from(prompt);
    assert_eq!([from(&[5, 6, 1]), from(&[5, 6, 5, 6]), from(&[1, 5, 5, 6])], [Some(0), Some(2), Some(2)]);
    assert_eq!([from(&[6, 5]), from(&[5]), from(&[])], [None; 3]);
    let again = reread(&delta, &base);
    assert_eq!((again.invocation(), &again.spec.methods), (delta.invocation(), &delta.spec.methods));
    let mapped = delta.map(&mut |_, t| Ok(t.clone())).unwrap();
    assert_eq!(mapped.invocation(), delta.invocation());
    for off in [Value::Null, json!([])] {
        let plain = read(&called(off), &good).unwrap();
        assert_eq!((plain.invocation(), plain.acts_from(&[1])), (None, Some(0)));
    }
    let refused = |config: &Value, tensors: &HashMap<String, Tensor>, needle: &str| {
        let e = read(config, tensors).unwrap_err().to_string();
        assert!(e.contains("alora_invocation_tokens") && e.contains(needle), "{e} lacks {needle:?}");
    };
    let vocab = base.arch.vocab as u32;
    for odd in [json!("x"), json!([vocab]), json!([-1]), json!([1.5]), json!(vec![1; 1025]), json!({"a": 1})] {
        refused(&called(odd), &good, "token ids below");
    }
    let mut dora = called(json!([5]));
    dora["use_dora"] = json!(true);
    let mut magnitudes = good.clone();
    magnitudes.insert(format!("base_model.model.{Q}.lora_magnitude_vector"), random(32usize, 1.0));
    refused(&dora, &magnitudes, "accepted are plain low-rank pairs");
    let mut other = delta.clone();
    other.spec.task = Task::Feature;
    assert!(check::activated("config", &other, &base).unwrap_err().to_string().contains("CAUSAL_LM"));
    refused(&json!({"peft_type": "IA3", "alora_invocation_tokens": [5]}), &good, "LORA");
}

#[test]
fn broken_containers_are_refused_without_allocation() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let good = pack(&lora(4), &pair(Q, 4, 32, 32));
    let weights = good.files["adapter_model.safetensors"].clone();
    let with = |data: Vec<u8>| {
        let mut files = good.clone();
        files.files.insert("adapter_model.safetensors".into(), data.into());
        decode(&files, &base).unwrap_err()
    };
    for cut in [0, 4, 8, 20, weights.len() / 2, weights.len() - 1] {
        assert!(matches!(with(weights[..cut].to_vec()), InteropError::Invalid { .. }), "cut at {cut}");
    }
    for header in [0u64, u64::MAX, 1 << 63, 99 << 20] {
        let mut data = weights.to_vec();
        data[..8].copy_from_slice(&header.to_le_bytes());
        assert!(matches!(with(data), InteropError::Invalid { .. }), "header {header}");
    }
    let raw = |header: &str, body: usize| {
        let mut data = (header.len() as u64).to_le_bytes().to_vec();
        data.extend(header.as_bytes());
        data.extend(vec![0u8; body]);
        data
    };
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert!(matches!(with(raw(overlap, 12)), InteropError::Invalid { .. }));
    let huge = r#"{"a":{"dtype":"F32","shape":[18446744073709551615,8],"data_offsets":[0,8]}}"#;
    assert!(matches!(with(raw(huge, 8)), InteropError::Invalid { .. }));
    let deep = "[".repeat(100_000);
    let mut files = good.clone();
    files.files.insert("adapter_config.json".into(), deep.into());
    assert!(matches!(decode(&files, &base), Err(InteropError::Invalid { .. })));
}

#[test]
fn a_head_is_read_as_its_files_say() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let rand = |s: (usize, usize)| random(s, 1.0);
    let delta = |outputs: usize, problem: Problem| {
        let (id, entry) = base.sites.linears().next().unwrap();
        let pair = LowRank { a: rand((2, entry.in_dim)), b: rand((2, entry.out_dim)), scale: 1.0 };
        let spec = DeltaSpec {
            methods: vec!["lora".into()],
            task: Task::SeqCls,
            labels: (0..outputs).map(|i| format!("l{i}")).collect(),
            num_virtual_tokens: 0,
            problem,
            parameters: 0,
            resident_bytes: 0,
        };
        Delta::new(spec, vec![(id, Patch::LowRank(pair))], Some(Head::linear(rand((outputs, 32)), None)))
    };
    let files = |outputs, problem| written(&delta(outputs, problem), &base);
    let config = |files: &DeltaFiles| -> Value { serde_json::from_slice(&files.files["adapter_config.json"]).unwrap() };
    for (outputs, problem) in
        [(3, Problem::SingleLabel), (3, Problem::MultiLabel), (1, Problem::MultiLabel), (1, Problem::Regression)]
    {
        let files = files(outputs, problem);
        assert_eq!(decode(&files, &base).unwrap().spec.problem, problem, "{outputs} outputs");
        let said = config(&files).get("problem_type").and_then(|v| v.as_str().map(str::to_owned));
        assert_eq!(said.as_deref(), (problem != Problem::SingleLabel).then_some(problem.as_str()));
    }
    let with = |outputs, change: &dyn Fn(&mut Value)| {
        let mut files = files(outputs, Problem::SingleLabel);
        let mut config = config(&files);
        change(&mut config);
        files.files.insert("adapter_config.json".into(), serde_json::to_vec(&config).unwrap().into());
        decode(&files, &base).map(|d| d.spec.problem).map_err(|e| e.to_string())
    };
    // as transformers has it: one output is a number unless something else is said
    assert_eq!(with(1, &|_| {}), Ok(Problem::Regression));
    assert_eq!(with(1, &|c| c["problem_type"] = "multi_label_classification".into()), Ok(Problem::MultiLabel));
    assert_eq!(with(3, &|c| c["problem_type"] = Value::Null), Ok(Problem::SingleLabel));
    assert!(with(3, &|c| c["problem_type"] = "regression".into()).unwrap_err().contains("the head has 3 outputs"));
    for odd in [json!("ranking"), json!(3), json!(["regression"])] {
        assert!(with(3, &|c| c["problem_type"] = odd.clone()).unwrap_err().contains("accepted are single_label"));
    }
    let tags = with(3, &|c| (c["task_type"], c["problem_type"]) = ("TOKEN_CLS".into(), "regression".into()));
    assert!(tags.unwrap_err().contains("is for SEQ_CLS"));
}

#[test]
fn a_delta_survives_encode_and_decode() {
    for config in [tiny_llama(), tiny_gpt2(), tiny_bert()] {
        let base = random_base(&config, 3).unwrap();
        let causal = base.arch.is_causal();
        let mut patches = Vec::new();
        for (id, entry) in base.sites.iter() {
            let rand = |s: (usize, usize)| random(s, 1.0);
            if let Site::Linear { layer, proj } = entry.site
                && proj != Proj::Down
            {
                let r = 2 + layer;
                let (a, b) = (rand((r, entry.in_dim)), rand((r, entry.out_dim)));
                patches.push((id, Patch::LowRank(LowRank { a, b, scale: 16.0 / r as f64 })));
            }
        }
        let head = Head::linear(
            Tensor::randn(0f32, 1.0, (3, 32), &Device::Cpu).unwrap(),
            (!causal).then(|| Tensor::randn(0f32, 1.0, 3, &Device::Cpu).unwrap()),
        );
        let spec = DeltaSpec {
            methods: vec!["lora".into(), "head".into()],
            task: Task::SeqCls,
            labels: vec!["x".into(), "y".into(), "z".into()],
            num_virtual_tokens: 0,
            problem: Default::default(),
            parameters: 0,
            resident_bytes: 0,
        };
        let delta = Delta::new(spec, patches, Some(head));
        let files = written(&delta, &base);
        for _ in 0..8 {
            assert!(files == written(&delta, &base), "the same bytes each time");
        }
        let back = decode(&files, &base).unwrap();
        assert_eq!(back.spec.labels, ["x", "y", "z"]);
        assert_eq!(back.spec.methods, ["lora", "head"]);
        assert_eq!(back.patches().len(), delta.patches().len());
        for ((s1, p1), (s2, p2)) in back.patches().iter().zip(delta.patches()) {
            let (Patch::LowRank(l1), Patch::LowRank(l2)) = (p1, p2) else { panic!("kinds differ") };
            assert_eq!(s1, s2);
            assert!((l1.scale - l2.scale).abs() < 1e-9);
            assert_eq!(l1.a.to_vec2::<f32>().unwrap(), l2.a.to_vec2::<f32>().unwrap());
            assert_eq!(l1.b.to_vec2::<f32>().unwrap(), l2.b.to_vec2::<f32>().unwrap());
        }
        // another base of the same shape is not this base
        let other = random_base(&config, 4).unwrap();
        assert!(matches!(decode(&files, &other), Err(InteropError::BaseMismatch(_))));
    }
}

#[test]
fn target_modules_name_exactly_the_patched_modules() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let site = base.sites.by_module("encoder.layer.0.output.dense").unwrap();
    let e = base.sites.get(site).unwrap();
    let a = Tensor::ones((1, e.in_dim), candle_core::DType::F32, &Device::Cpu).unwrap();
    let b = Tensor::ones((1, e.out_dim), candle_core::DType::F32, &Device::Cpu).unwrap();
    let spec = DeltaSpec {
        methods: vec![],
        task: Task::Feature,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    let delta = Delta::new(spec, vec![(site, Patch::LowRank(LowRank { a, b, scale: 1.0 }))], None);
    let files = written(&delta, &base);
    let config: Value = serde_json::from_slice(&files.files["adapter_config.json"]).unwrap();
    // "output.dense" alone would also name attention.output.dense of both layers
    assert_eq!(config["target_modules"], json!(["0.output.dense"]));
}

#[test]
fn a_dora_delta_counts_all_that_it_holds_and_holds_no_matrix_of_the_base() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let mut tensors = pair(Q, 1, 32, 32);
    let magnitude = Tensor::ones(32, candle_core::DType::F32, &Device::Cpu).unwrap();
    tensors.insert(format!("base_model.model.{Q}.lora_magnitude_vector"), magnitude);
    let mut config = lora(1);
    config["use_dora"] = true.into();
    let delta = decode(&pack(&config, &tensors), &base).unwrap();
    assert!((5 * 128..32 * 32 * 4).contains(&delta.bytes()), "{} bytes", delta.bytes());
}

#[test]
fn patterns_are_bounded_before_they_are_compiled() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let good = pair(Q, 4, 32, 32);
    let with = |patterns: Value| {
        let mut config = lora(4);
        config["alpha_pattern"] = patterns;
        decode(&pack(&config, &good), &base)
    };
    assert!(with(json!({"layers.1.self_attn.q_proj": 8})).is_ok());
    let many: serde_json::Map<_, _> = (0..1025).map(|i| (format!("m{i}"), json!(8))).collect();
    let long = "x".repeat(1025);
    for (patterns, needle) in [(json!(many), "1024"), (json!({long: 8}), "1025"), (json!({"(a{200}){200}": 8}), "size")]
    {
        let error = with(patterns).unwrap_err().to_string();
        assert!(error.contains(needle) && error.len() < 400, "{error}");
    }
}

#[test]
fn labels_need_a_head_and_a_headless_delta_takes_the_task_of_the_bases_own_head() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let mut files = pack(&lora(4), &pair(Q, 4, 32, 32));
    files.files.insert(LABELS.into(), r#"["a", "b"]"#.into());
    assert!(decode(&files, &base).unwrap_err().to_string().contains("no head"));

    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_bert();
    config["architectures"] = json!(["BertForSequenceClassification"]);
    config["id2label"] = json!({"0": "no", "1": "yes"});
    write_random(dir.path(), &config, 1).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    weights.insert("classifier.weight".into(), Tensor::ones((2, 32), candle_core::DType::F32, &Device::Cpu).unwrap());
    weights.insert("classifier.bias".into(), Tensor::ones(2, candle_core::DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&weights, &path).unwrap();
    let options = crate::model::LoadOptions::default();
    let base = Base::load(dir.path(), &options).unwrap();
    assert!(base.transformer.has_head());
    let mut config = lora(4);
    config["task_type"] = Value::Null;
    let files = pack(&config, &pair("encoder.layer.0.attention.self.query", 4, 32, 32));
    let spec = decode(&files, &base).unwrap().spec;
    let own = base.arch.head.as_ref().unwrap();
    assert_eq!((spec.task, &spec.labels), (Task::SeqCls, &own.labels));
}

#[test]
fn a_small_alpha_survives() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    for alpha in [4e-7, 0.1, 16.0, 3.25] {
        let mut config = lora(4);
        config["lora_alpha"] = json!(alpha);
        let delta = decode(&pack(&config, &pair(Q, 4, 32, 32)), &base).unwrap();
        let again = reread(&delta, &base);
        let scale = |d: &Delta| match &d.patches()[0].1 {
            Patch::LowRank(low) => low.scale,
            other => panic!("{other:?}"),
        };
        assert!((scale(&again) / scale(&delta) - 1.0).abs() < 1e-6, "{alpha}");
    }
}

#[test]
fn biases_go_to_peft_beside_a_pair_that_adds_nothing() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let meta = EncodeMeta::default();
    let spec = DeltaSpec {
        methods: vec!["bitfit".into()],
        task: Task::Feature,
        labels: Vec::new(),
        num_virtual_tokens: 0,
        problem: Problem::SingleLabel,
        parameters: 0,
        resident_bytes: 0,
    };
    let bias = |id: SiteId| Some((id, Patch::Bias(base.bias(id).unwrap()?.rand_like(-1.0, 1.0).unwrap())));
    let biases: Vec<_> = base.sites.iter().filter_map(|(id, _)| bias(id)).collect();
    let delta = Delta::new(spec.clone(), biases.clone(), None);
    let ours = encode(&delta, &base, &meta).unwrap();
    let theirs = for_peft(ours, &base, &meta).unwrap();
    let config: Value = serde_json::from_slice(&theirs.files["adapter_config.json"]).unwrap();
    assert_eq!((&config["peft_type"], &config["bias"], &config["r"]), (&json!("LORA"), &json!("all"), &json!(1)));
    let back = decode(&theirs, &base).unwrap();
    let own = |d: &Delta| -> Vec<(SiteId, Vec<f32>)> {
        let bias = |(id, p): &(SiteId, Patch)| match p {
            Patch::Bias(b) => Some((*id, b.to_vec1().unwrap())),
            _ => None,
        };
        d.patches().iter().filter_map(bias).collect()
    };
    let (had, has) = (own(&delta), own(&back));
    assert_eq!(had.len(), has.len());
    for ((a, had), (b, has)) in had.iter().zip(&has) {
        assert!(a == b && had.iter().zip(has).all(|(x, y)| (x - y).abs() < 1e-5), "{a:?}");
    }
    let pair = back.patches().iter().find_map(|(_, p)| if let Patch::LowRank(l) = p { Some(l) } else { None }).unwrap();
    assert!(pair.b.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|b| *b == 0.0));
    // what is PEFT's already stays, and what it has nothing for is refused
    assert!(for_peft(theirs.clone(), &base, &meta).unwrap().files == theirs.files);
    let norms = biases.into_iter().filter(|(id, _)| base.norm(*id).is_some()).collect();
    let norms = encode(&Delta::new(spec, norms, None), &base, &meta).unwrap();
    assert!(for_peft(norms, &base, &meta).unwrap_err().to_string().contains("norms alone"));
}

/// GPT-2's linears are Conv1Ds, saved `[in, out]`; its head is none, and is saved `[vocab, hidden]`.
#[test]
fn matrices_of_gpt2_are_saved_as_its_modules_have_them() {
    let mut untied = tiny_gpt2();
    untied["tie_word_embeddings"] = false.into();
    for config in [tiny_gpt2(), untied] {
        let base = random_base(&config, 3).unwrap();
        for (module, shape, is_head) in [("lm_head", [128, 32], true), ("h.0.mlp.c_proj", [128, 32], false)] {
            let site = base.sites.by_module(module).unwrap();
            let key = format!("base_model.model.{}{module}.weight", if is_head { "" } else { "transformer." });
            let with = |w: &Tensor| {
                let mut tensors = pair("transformer.h.1.attn.c_attn", 4, 32, 96);
                tensors.insert(key.clone(), w.contiguous().unwrap());
                decode(&pack(&lora(4), &tensors), &base)
            };
            // as it is applied, [in, out]
            let matrix = |delta: &Delta| {
                let of = |(at, p): &(SiteId, Patch)| match p {
                    Patch::Matrix(m) if *at == site => Some(m.weight.to_vec2::<f32>().unwrap()),
                    _ => None,
                };
                delta.patches().iter().find_map(of)
            };
            let own = base.linear(site).unwrap().unwrap().0;
            let saved = |w: &Tensor| if is_head { w.t().unwrap() } else { w.clone() };
            assert_eq!(saved(&own).dims(), shape);
            assert_eq!(matrix(&with(&saved(&own)).unwrap()), None, "{module}: the base's own");
            let trained = (&own + random(own.dims(), 0.1)).unwrap();
            let want = Some(trained.to_vec2::<f32>().unwrap());
            let read = with(&saved(&trained)).unwrap();
            assert_eq!(matrix(&read), want, "{module}");
            let files = written(&read, &base);
            let tensors =
                candle_core::safetensors::load_buffer(&files.files["adapter_model.safetensors"], &Device::Cpu).unwrap();
            assert_eq!(tensors[&key].to_vec2::<f32>().unwrap(), saved(&trained).to_vec2::<f32>().unwrap(), "{module}");
            assert_eq!(matrix(&decode(&files, &base).unwrap()), want, "{module}");
            let turned = with(&saved(&trained).t().unwrap());
            if is_head {
                // as versions have it that were stored before
                assert_eq!(matrix(&turned.unwrap()), want);
                assert_eq!(matrix(&with(&own).unwrap()), None);
            } else {
                let error = turned.unwrap_err();
                assert!(
                    matches!(error, InteropError::BaseMismatch(_)) && error.to_string().contains("[128, 32] there")
                );
            }
        }
        let tensors = HashMap::from([("base_model.model.lm_head.weight".to_owned(), random((120, 32), 1.0))]);
        let error = decode(&pack(&lora(4), &tensors), &base).unwrap_err().to_string();
        assert!(error.contains("[120, 32]") && error.contains("[128, 32] there"), "{error}");
    }
}
