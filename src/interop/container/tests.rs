//! Combinations, and the folder forms of prompts and prefixes.

use candle_core::{Device, Tensor};
use serde_json::json;

use super::{FORMAT, INDEX, decode_within};
use crate::{
    delta::{
        Delta, DeltaFiles, DeltaSpec, Head, LowRank, Patch, Prefix, PrefixForm, Proj, Prompt, PromptStage, Site,
        SiteId, Stack, Task,
    },
    interop::{
        InteropError, decode,
        testing::{random, reread, written},
    },
    model::{
        Base,
        testing::{random_base, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5},
    },
};

fn rand(shape: (usize, usize)) -> Tensor {
    random(shape, 1.0)
}

fn spec(methods: &[&str], task: Task) -> DeltaSpec {
    DeltaSpec {
        methods: methods.iter().map(|m| (*m).to_owned()).collect(),
        task,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    }
}

fn prompt(base: &Base, n: usize, stage: PromptStage) -> (SiteId, Patch) {
    let site = base.sites.id(Site::Embedding).unwrap();
    (site, Patch::Prompt(Prompt { rows: rand((n, base.arch.hidden)), stage, stack: Stack::Main }))
}

fn prefix(base: &Base, n: usize, form: PrefixForm) -> Vec<(SiteId, Patch)> {
    let at = |layer| {
        let site = base.sites.id(Site::KeyValue { layer, stack: Stack::Main }).unwrap();
        let width = base.arch.kv_width();
        (site, Patch::Prefix(Prefix { k: rand((n, width)), v: rand((n, width)), form, stack: Stack::Main }))
    };
    (0..base.arch.layers).map(at).collect()
}

fn lora(base: &Base) -> (SiteId, Patch) {
    let (site, e) =
        base.sites.linears().find(|(_, e)| matches!(e.site, Site::Linear { proj: Proj::Down, .. })).unwrap();
    (site, Patch::LowRank(LowRank { a: rand((2, e.in_dim)), b: rand((2, e.out_dim)), scale: 0.5 }))
}

fn same(a: &Delta, b: &Delta) {
    assert_eq!((a.ahead(), a.spec.task, &a.spec.methods), (b.ahead(), b.spec.task, &b.spec.methods));
    assert_eq!(a.patches().len(), b.patches().len());
    for ((sa, pa), (sb, pb)) in a.patches().iter().zip(b.patches()) {
        assert_eq!(sa, sb);
        for ((na, ta), (nb, tb)) in pa.tensors().into_iter().zip(pb.tensors()) {
            assert_eq!((na, ta.to_vec2::<f32>().unwrap()), (nb, tb.to_vec2::<f32>().unwrap()));
        }
    }
    assert_eq!(a.head().is_some(), b.head().is_some());
}

#[test]
fn prompts_and_prefixes_survive_encode_and_decode() {
    for config in [tiny_llama(), tiny_gpt2(), tiny_bert()] {
        let base = random_base(&config, 3).unwrap();
        let task = if base.arch.is_causal() { Task::CausalLm } else { Task::Feature };
        let stages = [PromptStage::Tokens, PromptStage::Hidden];
        let learned = matches!(base.arch.positions, crate::model::Positions::Learned { .. });
        for stage in stages.into_iter().filter(|s| *s == PromptStage::Tokens || learned) {
            for method in ["prompt", "p_tuning"].into_iter().take(if stage == PromptStage::Tokens { 2 } else { 1 }) {
                let delta = Delta::new(spec(&[method], task), vec![prompt(&base, 5, stage)], None);
                same(&reread(&delta, &base), &delta);
            }
        }
        for form in [PrefixForm::Context, PrefixForm::Pinned] {
            let delta = Delta::new(spec(&["prefix"], task), prefix(&base, 4, form), None);
            same(&reread(&delta, &base), &delta);
        }
    }
}

#[test]
fn a_prefix_of_every_attention_combines_with_others() {
    let base = random_base(&tiny_t5(), 3).unwrap();
    let width = base.arch.kv_width();
    let of = |stack| {
        let at = move |(site, _)| {
            let (k, v) = (rand((4, width)), rand((4, width)));
            (site, Patch::Prefix(Prefix { k, v, form: PrefixForm::Pinned, stack }))
        };
        base.sites.prefix_sites(stack).into_iter().map(at)
    };
    let all: Vec<(SiteId, Patch)> = [Stack::Main, Stack::Encoder, Stack::Memory].into_iter().flat_map(of).collect();
    let (site, _) = base.sites.linears().next().unwrap();
    let low = LowRank { a: rand((2, 32)), b: rand((2, 32)), scale: 0.5 };
    let patches = [vec![(site, Patch::LowRank(low))], all].concat();
    let delta = Delta::new(spec(&["lora", "prefix"], Task::Seq2Seq), patches, None);
    let files = written(&delta, &base);
    assert!(files.files.contains_key("part1.adapter.safetensors"), "{:?}", files.files.keys());
    same(&decode(&files, &base).unwrap(), &delta);
}

fn combination(base: &Base) -> Delta {
    let bias = Tensor::ones(3, candle_core::DType::F32, &Device::Cpu).unwrap();
    let head = Head::linear(rand((3, base.arch.hidden)), Some(bias));
    let patches =
        [vec![lora(base), prompt(base, 3, PromptStage::Tokens)], prefix(base, 2, PrefixForm::Context)].concat();
    let mut spec = spec(&["lora", "prompt", "prefix", "head"], Task::SeqCls);
    spec.labels = ["x", "y", "z"].map(str::to_owned).to_vec();
    Delta::new(spec, patches, Some(head))
}

#[test]
fn a_combination_survives_and_its_parts_load_alone() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let delta = combination(&base);
    let files = written(&delta, &base);
    assert!(files.files.keys().all(|name| crate::ids::check_name(name).is_ok()), "{:?}", files.files.keys());
    let back = decode(&files, &base).unwrap();
    same(&back, &delta);
    assert_eq!(back.spec.labels, ["x", "y", "z"]);
    assert_eq!((back.ahead().rows, back.ahead().keys, back.spec.num_virtual_tokens), (3, 2, 5));
    for part in ["part0", "part1", "part2"] {
        let own = |(name, data): (&String, &bytes::Bytes)| {
            Some((name.strip_prefix(part)?.strip_prefix('.')?.to_owned(), data.clone()))
        };
        let folder = DeltaFiles { files: files.files.iter().filter_map(own).collect() };
        decode(&folder, &base).unwrap();
    }
}

#[test]
fn a_part_that_says_no_task_takes_that_of_the_others() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let patches = [vec![lora(&base)], prefix(&base, 2, PrefixForm::Pinned)].concat();
    let bare = Delta::new(spec(&["lora", "prefix"], Task::SeqCls), patches.clone(), None);
    same(&reread(&bare, &base), &bare);
    let mut headed = spec(&["lora", "prefix", "head"], Task::SeqCls);
    headed.labels = ["x", "y", "z"].map(str::to_owned).to_vec();
    let headed = Delta::new(headed, patches, combination(&base).head().cloned());
    let back = reread(&headed, &base);
    same(&back, &headed);
    assert_eq!(back.spec.labels, ["x", "y", "z"]);
}

#[test]
fn contradictions_between_parts_are_refused() {
    let base = random_base(&tiny_bert(), 3).unwrap();
    let files = written(&combination(&base), &base);
    let refused = |files: DeltaFiles, needle: &str| {
        let e = decode(&files, &base).unwrap_err();
        assert!(e.to_string().contains(needle), "{e} lacks {needle:?}");
    };
    let copy = |from: &str, to: &str| {
        let mut out = files.clone();
        for (name, data) in &files.files {
            if let Some(rest) = name.strip_prefix(from) {
                out.files.insert(format!("{to}{rest}"), data.clone());
            }
        }
        let index =
            r#"{"format": "deltaserve.combination", "version": 1, "parts": ["part0", "part1", "part2", "again"]}"#;
        out.files.insert("delta.json".into(), index.into());
        out
    };
    refused(copy("part1", "again"), "two parts bring prompts, the second of 3 virtual tokens");
    refused(copy("part2", "again"), "both bring a head");
    let mut stranger = files.clone();
    stranger.files.insert("notes.txt".into(), "x".into());
    refused(stranger, "belongs to no part");
    let mut missing = files.clone();
    missing.files.retain(|name, _| !name.starts_with("part1"));
    refused(missing, "part \"part1\" has no files");
    let mut bad = files.clone();
    bad.files
        .insert("delta.json".into(), r#"{"format": "deltaserve.combination", "version": 1, "parts": ["../x"]}"#.into());
    refused(bad, "letters, digits");
    let mut torn = files.clone();
    torn.files.insert("part0.adapter_config.json".into(), r#"{"peft_type": "VERA"}"#.into());
    assert!(
        matches!(decode(&torn, &base), Err(InteropError::Invalid { file, .. }) if file == "part0.adapter_config.json")
    );
}

#[test]
fn files_that_do_not_fit_the_base_name_both_numbers() {
    let (llama, bert) = (random_base(&tiny_llama(), 3).unwrap(), random_base(&tiny_bert(), 3).unwrap());
    let made = Delta::new(spec(&["prefix"], Task::SeqCls), prefix(&bert, 4, PrefixForm::Context), None);
    let files = written(&made, &bert);
    let mut config: serde_json::Value = serde_json::from_slice(&files.files["adapter_config.json"]).unwrap();
    let weights = |n: usize, width: usize| {
        let t = std::collections::BTreeMap::from([("prompt_embeddings", rand((n, width)))]);
        bytes::Bytes::from(safetensors::serialize(t, None).unwrap())
    };
    let refused = |config: &serde_json::Value, data: bytes::Bytes, needles: &[&str]| {
        let mut folder = DeltaFiles::default();
        folder.files.insert("adapter_config.json".into(), config.to_string().into());
        folder.files.insert("adapter_model.safetensors".into(), data);
        let e = decode(&folder, &llama).unwrap_err().to_string();
        assert!(needles.iter().all(|n| e.contains(n)), "{e} lacks {needles:?}");
    };
    // the base keeps 2 heads of 8 for keys
    refused(&config, weights(4, 128), &["token_dim is 32", "has 16"]);
    config["token_dim"] = 16.into();
    refused(&config, weights(4, 128), &["128 numbers", "takes 64"]);
    refused(&config, weights(3, 64), &["num_virtual_tokens is 4", "3"]);
    config["num_layers"] = 7.into();
    refused(&config, weights(4, 64), &["num_layers is 7", "has 2"]);
    let prompt = serde_json::json!({"peft_type": "PROMPT_TUNING"});
    refused(&prompt, weights(4, 48), &["48", "has 32"]);
}

/// Three parts of 64 KiB from files of some bytes: the third is not even read.
#[test]
fn parts_may_not_grow_without_end() {
    let base = random_base(&tiny_llama(), 1).unwrap();
    let names = ["a", "b", "c", "d"];
    let mut files = DeltaFiles::default();
    for name in names {
        files.files.insert(format!("{name}.adapter_config.json"), "{}".into());
    }
    let index = json!({ "format": FORMAT, "version": 1, "parts": names });
    files.files.insert(INDEX.to_owned(), index.to_string().into());
    let read = std::cell::Cell::new(0);
    let one = |_: &DeltaFiles, base: &Base| {
        read.set(read.get() + 1);
        Ok(Delta::new(spec(&["prompt"], Task::CausalLm), vec![prompt(base, 512, PromptStage::Tokens)], None)) // 64 KiB
    };
    let error = decode_within(100 << 10, &files, &base, one).unwrap_err().to_string();
    assert!(error.contains("\"b\"") && error.contains("131072"), "{error}");
    assert_eq!(read.get(), 2);
}
