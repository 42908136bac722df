//! Files that read well and could not be applied, or not as they say: each is refused by name when it is uploaded, and
//! what another tenant asks meanwhile is not touched.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use deltaserve::{
    delta::DeltaFiles,
    model::testing::{tiny_bert, tiny_roberta},
};
use serde_json::{Value, json};

use crate::support::*;

const WEIGHTS: &str = "adapter_model.safetensors";
const PEFT: &str = "base_model.model.";

/// What is wrong, the files, and what the refusal must say.
struct Hostile {
    what: &'static str,
    files: DeltaFiles,
    words: &'static [&'static str],
}

/// A weights file of small numbers.
fn weights(tensors: &[(&str, &[usize])]) -> bytes::Bytes {
    let full = |(name, shape): &(&str, &[usize])| {
        let t = Tensor::full(0.01f32, *shape, &Device::Cpu).expect("a tensor");
        ((*name).to_owned(), t)
    };
    let map: BTreeMap<String, Tensor> = tensors.iter().map(full).collect();
    safetensors::serialize(map, None).expect("a file").into()
}

fn folder(files: &[(&str, bytes::Bytes)]) -> DeltaFiles {
    DeltaFiles { files: files.iter().map(|(name, data)| ((*name).to_owned(), data.clone())).collect() }
}

fn peft(config: &Value, tensors: &[(&str, &[usize])]) -> DeltaFiles {
    folder(&[("adapter_config.json", config.to_string().into()), (WEIGHTS, weights(tensors))])
}

fn hub(config: &Value, tensors: &[(&str, &[usize])]) -> DeltaFiles {
    let config = json!({"name": "x", "version": "adapters.1.3.0", "config": config});
    folder(&[("adapter_config.json", config.to_string().into()), ("adapter.safetensors", weights(tensors))])
}

/// Parts in order.
fn combined(parts: &[DeltaFiles]) -> DeltaFiles {
    let names: Vec<String> = (0..parts.len()).map(|i| format!("part{i}")).collect();
    let index = json!({"format": "deltaserve.combination", "version": 1, "parts": names});
    let mut out = folder(&[("delta.json", index.to_string().into())]);
    for (name, part) in names.iter().zip(parts) {
        out.files.extend(part.files.iter().map(|(file, data)| (format!("{name}.{file}"), data.clone())));
    }
    out
}

fn lora() -> Value {
    json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
}

fn bitfit() -> Value {
    json!({"peft_type": "BITFIT"})
}

const Q: &str = "model.layers.0.self_attn.q_proj";

/// Patches where the forward has no place for them.
fn misplaced() -> Vec<Hostile> {
    let embed = |rest: &str| format!("{PEFT}model.embed_tokens{rest}");
    let (a, b, b_bias) = (embed(".lora_embedding_A"), embed(".lora_embedding_B"), embed(".lora_B.bias"));
    let scales = json!({"architecture": "lora", "r": 1, "alpha": 1.0, "composition_mode": "scale"});
    vec![
        Hostile {
            what: "a bias of the embedding (BitFit)",
            files: peft(&bitfit(), &[(&embed(".bias"), &[32])]),
            words: &["embed_tokens", "bias", "not apply there"],
        },
        Hostile {
            what: "a bias of the embedding (LoRA)",
            files: peft(&lora(), &[(&embed(".bias"), &[32])]),
            words: &["embed_tokens", "bias", "not apply there"],
        },
        Hostile {
            what: "a bias of B at the embedding",
            files: peft(&lora(), &[(&a, &[4, 128]), (&b, &[32, 4]), (&b_bias, &[32])]),
            words: &["embed_tokens", "bias", "not apply there"],
        },
        Hostile {
            what: "a scale of the embedding (AdapterHub)",
            files: hub(&scales, &[("model.embed_tokens.loras.x.lora_B", &[32, 1])]),
            words: &["embed_tokens", "scale of the output", "not apply there"],
        },
        Hostile {
            what: "a bias with the embedding's own matrix",
            files: peft(&lora(), &[(&embed(".weight"), &[128, 32]), (&embed(".bias"), &[32])]),
            words: &["embed_tokens.bias"],
        },
        Hostile {
            what: "one of the parts has a bias of the embedding",
            files: combined(&[
                peft(&bitfit(), &[(&format!("{PEFT}{Q}.bias"), &[32])]),
                peft(&bitfit(), &[(&embed(".bias"), &[32])]),
            ]),
            words: &["part1", "embed_tokens", "not apply there"],
        },
    ]
}

/// Tensors with the right count of numbers in a wrong shape, and factors of enormous products.
fn misshapen() -> Vec<Hostile> {
    let bottleneck = json!({"output_adapter": true, "mh_adapter": false, "reduction_factor": 4,
        "non_linearity": "relu", "leave_out": [1]});
    let down = "model.layers.0.output_adapters.adapters.x.adapter_down.0";
    let up = "model.layers.0.output_adapters.adapters.x.adapter_up";
    let of = |root: &str, end: &str| format!("{root}.{end}");
    let compacter = json!({"output_adapter": true, "phm_layer": true, "non_linearity": "relu", "leave_out": [1]});
    let phm = |n: usize, columns: usize| {
        let up_left = columns; // [n, width / n, rank]
        hub(
            &compacter,
            &[
                ("shared_parameters.x.phm_rule", &[n, n, n]),
                (&of(down, "W_left"), &[n, 32 / n.min(32), 1]),
                (&of(down, "W_right"), &[n, 1, columns]),
                (&of(up, "W_left"), &[n, up_left, 1]),
                (&of(up, "W_right"), &[n, 1, 32 / n.min(32)]),
            ],
        )
    };
    let (weight, bias) = (format!("{PEFT}lm_head.weight"), format!("{PEFT}lm_head.bias"));
    vec![
        Hostile {
            what: "a bottleneck's bias as a column",
            files: hub(
                &bottleneck,
                &[
                    (&of(down, "weight"), &[8, 32]),
                    (&of(down, "bias"), &[8, 1]),
                    (&of(up, "weight"), &[32, 8]),
                    (&of(up, "bias"), &[32]),
                ],
            ),
            words: &["adapter_down.0", "[8, 1]", "[8] is accepted"],
        },
        Hostile {
            what: "a bottleneck of no width at all",
            files: hub(
                &json!({"output_adapter": true, "reduction_factor": 1e-9, "non_linearity": "relu"}),
                &[(&of(down, "weight"), &[8, 32])],
            ),
            words: &["reduction_factor", "65536"],
        },
        Hostile {
            what: "a matrix that is a vector",
            files: peft(&lora(), &[(&format!("{PEFT}{Q}.weight"), &[1024])]),
            words: &["q_proj.weight", "[1024]", "two dimensions"],
        },
        Hostile {
            what: "the bias of a matrix as a column",
            files: peft(&lora(), &[(&weight, &[128, 32]), (&bias, &[128, 1])]),
            words: &["lm_head.bias", "[128, 1]"],
        },
        Hostile { what: "a rule of many matrices", files: phm(64, 1), words: &["phm_rule", "[64, 64, 64]", "32"] },
        Hostile {
            what: "factors of a bottleneck wider than any",
            files: phm(2, 40_000),
            words: &["32 x 80000", "65536"],
        },
    ]
}

/// More positions and tokens than any.
fn enormous() -> Vec<Hostile> {
    let of = |root: &str, end: &str| format!("{root}.{end}");
    let prefix = "model.prefix_tuning.prefix_tunings.x.self_prefix";
    let projected = json!({"architecture": "prefix_tuning", "non_linearity": "tanh"});
    vec![
        Hostile {
            what: "a network that makes more positions than any",
            files: hub(
                &projected,
                &[
                    (&of(prefix, "wte.weight"), &[70_000, 1]),
                    (&of(prefix, "control_trans.0.weight"), &[1, 1]),
                    (&of(prefix, "control_trans.0.bias"), &[1]),
                    (&of(prefix, "control_trans.2.weight"), &[64, 1]),
                    (&of(prefix, "control_trans.2.bias"), &[64]),
                ],
            ),
            words: &["70000 virtual tokens", "65536"],
        },
        Hostile {
            what: "a network with an enormous layer between",
            files: hub(
                &projected,
                &[
                    (&of(prefix, "wte.weight"), &[60_000, 1]),
                    (&of(prefix, "control_trans.0.weight"), &[9_000, 1]),
                    (&of(prefix, "control_trans.0.bias"), &[9_000]),
                    (&of(prefix, "control_trans.2.weight"), &[64, 9_000]),
                    (&of(prefix, "control_trans.2.bias"), &[64]),
                ],
            ),
            words: &["60000 virtual tokens of 9000", "268435456"],
        },
        Hostile {
            what: "more tokens than any",
            files: peft(
                &json!({"peft_type": "TRAINABLE_TOKENS", "token_indices": vec![3; 10_001]}),
                &[(&format!("{PEFT}model.embed_tokens.trainable_tokens_delta"), &[1, 32])],
            ),
            words: &["10001 tokens", "10000"],
        },
        Hostile {
            what: "rows of one token twice",
            files: peft(
                &json!({"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5, 3]}),
                &[(&format!("{PEFT}model.embed_tokens.trainable_tokens_delta"), &[3, 32])],
            ),
            words: &["token 3 is there twice"],
        },
    ]
}

/// What would be lost without a word.
fn contradictory() -> Vec<Hostile> {
    let (weight, a, b) =
        (format!("{PEFT}{Q}.weight"), format!("{PEFT}{Q}.lora_A.weight"), format!("{PEFT}{Q}.lora_B.weight"));
    let pair: [(&str, &[usize]); 2] = [(&a, &[4, 32]), (&b, &[32, 4])];
    let norm = format!("{PEFT}model.layers.0.input_layernorm");
    let good = peft(&lora(), &pair);
    let rows = format!("{PEFT}model.embed_tokens.token_adapter.trainable_tokens_delta");
    let mut tokens = lora();
    tokens["trainable_token_indices"] = json!({"embed_tokens": [7]});
    vec![
        Hostile {
            what: "a whole matrix after a low-rank update",
            files: combined(&[good.clone(), peft(&lora(), &[(&weight, &[32, 32])])]),
            words: &["q_proj", "low-rank update", "whole matrix", "replace"],
        },
        Hostile {
            what: "a norm replaced after its bias was changed",
            files: combined(&[
                peft(&bitfit(), &[(&format!("{norm}.bias"), &[32])]),
                peft(&json!({"peft_type": "LN_TUNING"}), &[(&format!("{norm}.ln_tuning_layers.weight"), &[32])]),
            ]),
            words: &["input_layernorm", "bias", "norm's gain and bias", "replace"],
        },
        Hostile {
            what: "rows of tokens beside another matrix",
            files: peft(&tokens, &[(&rows, &[1, 32]), (&format!("{PEFT}model.embed_tokens.weight"), &[128, 32])]),
            words: &["embed_tokens", "replaced rows of tokens", "whole matrix"],
        },
        Hostile {
            what: "a tensor under two names",
            files: peft(&lora(), &[pair[0], pair[1], (&format!("{Q}.lora_A.weight"), &[4, 32])]),
            words: &["lora_A.weight", "under another name"],
        },
    ]
}

/// Files that are too many, too few or of a form that there is none of.
fn strangers() -> Vec<Hostile> {
    let (a, b) = (format!("{PEFT}{Q}.lora_A.weight"), format!("{PEFT}{Q}.lora_B.weight"));
    let pair: [(&str, &[usize]); 2] = [(&a, &[4, 32]), (&b, &[32, 4])];
    let good = peft(&lora(), &pair);
    let with = |name: &str, like: &str| {
        let mut files = good.clone();
        files.files.insert(name.to_owned(), good.files[like].clone());
        files
    };
    vec![
        Hostile {
            what: "a file that no delta has",
            files: with("notes.txt", WEIGHTS),
            words: &["notes.txt", "no file"],
        },
        Hostile {
            what: "two weights files",
            files: with("adapter.safetensors", WEIGHTS),
            words: &["adapter.safetensors", WEIGHTS, "one of them"],
        },
        Hostile {
            what: "two configurations",
            files: with("bitfit_config.json", "adapter_config.json"),
            words: &["bitfit_config.json", "one of them"],
        },
        Hostile {
            what: "a combination in one file",
            files: peft(&json!({"peft_type": "COMBINED", "parts": []}), &pair),
            words: &["\"COMBINED\" is not supported"],
        },
        Hostile {
            what: "a part without tensors",
            files: combined(&[good.clone(), peft(&lora(), &[])]),
            words: &["has no tensors"],
        },
        Hostile {
            what: "two prompts",
            files: combined(&[(); 2].map(|()| {
                peft(
                    &json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}),
                    &[("prompt_embeddings", &[3, 32])],
                )
            })),
            words: &["two parts bring prompts"],
        },
    ]
}

/// Refusals that name what is wrong, while another tenant is served the same as ever.
async fn all_refused(world: &World, cases: Vec<Hostile>) {
    let running = world.start().await;
    let client = &running.client;
    let other = client.tenant("other");
    other.upload("style", &world.delta(1)).await.expect("an upload");
    let said = other.text("style", "once upon a time", 24).await;
    for Hostile { what, files, words } in cases {
        let (refused, meanwhile) = tokio::join!(client.upload("hostile", &files), async {
            // what was stored all the same would be asked for in the very steps that serve the other tenant
            let (_, text) =
                tokio::join!(client.generate(ask("hostile", "once", 8)), other.text("style", "once upon a time", 24));
            text
        });
        let error = match refused {
            Err(error) => error,
            Ok(delta) => panic!("{what}: taken as {delta:?}"),
        };
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{what}: {error:?}");
        let message = error.message();
        assert!(words.iter().all(|w| message.contains(w)), "{what}: {message:?} lacks one of {words:?}");
        assert_eq!(meanwhile, said, "{what}");
    }
    assert!(client.list().await.is_empty(), "nothing hostile was stored");
    assert_eq!(other.text("style", "once upon a time", 24).await, said);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn patches_that_the_forward_has_no_place_for_are_refused() {
    all_refused(&World::new(), misplaced()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shapes_that_only_count_right_and_enormous_products_are_refused() {
    all_refused(&World::new(), misshapen().into_iter().chain(enormous()).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_which_a_part_would_be_lost_are_refused() {
    all_refused(&World::new(), contradictory().into_iter().chain(strangers()).collect()).await;
}

/// A bottleneck in layer 0 with AdapterHub's head beside it, and tensors more.
fn headed(more: &[(&str, &[usize])]) -> DeltaFiles {
    let at = "encoder.layer.0.output.adapters.x";
    let (down, up) = (format!("{at}.adapter_down.0"), format!("{at}.adapter_up"));
    let names = [format!("{down}.weight"), format!("{down}.bias"), format!("{up}.weight"), format!("{up}.bias")];
    let shapes: [&[usize]; 4] = [&[8, 32], &[8], &[32, 8], &[32]];
    let mut tensors: Vec<(&str, &[usize])> = names.iter().map(String::as_str).zip(shapes).collect();
    tensors.extend(more);
    let own = json!({"output_adapter": true, "reduction_factor": 4, "non_linearity": "relu", "leave_out": [1]});
    let mut files = hub(&own, &tensors);
    let head = json!({"name": "x", "config": {"head_type": "classification"}});
    files.files.insert("head_config.json".into(), head.to_string().into());
    let own = weights(&[("heads.x.1.weight", &[3, 32]), ("heads.x.1.bias", &[3])]);
    files.files.insert("model_head.safetensors".into(), own);
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_one_and_whole() {
    let classifies = json!({"peft_type": "BITFIT", "task_type": "SEQ_CLS"});
    let refused = async |client: &Client, files: &DeltaFiles, words: &[&str]| {
        let error = client.upload("head", files).await.expect_err("refused");
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
        assert!(words.iter().all(|w| error.message().contains(w)), "{error:?} lacks one of {words:?}");
    };
    let running_world = World::of(tiny_bert(), 7);
    let running = running_world.start().await;
    running.client.upload("control", &headed(&[])).await.expect("one head is taken");
    let mut both = peft(&classifies, &[("base_model.model.classifier.weight", &[3, 32])]);
    for name in ["head_config.json", "model_head.safetensors"] {
        both.files.insert(name.into(), headed(&[]).files[name].clone());
    }
    refused(&running.client, &both, &["second head"]).await;
    let twice = [("base_model.model.classifier.weight", [3usize, 32]), ("classifier.weight", [3, 32])];
    let twice: Vec<(&str, &[usize])> = twice.iter().map(|(n, s)| (*n, s.as_slice())).collect();
    refused(&running.client, &peft(&classifies, &twice), &["under another name"]).await;
    running.stop().await;

    let world = World::of(tiny_roberta(), 7);
    let running = world.start().await;
    let (dense, out, alone) = ("classifier.dense.weight", "classifier.out_proj.weight", "classifier.weight");
    let file = |names: &[(&str, [usize; 2])]| {
        let all: Vec<(&str, &[usize])> = names.iter().map(|(n, s)| (*n, s.as_slice())).collect();
        peft(&classifies, &all)
    };
    running.client.upload("control", &file(&[(dense, [32, 32]), (out, [3, 32])])).await.expect("two layers");
    refused(&running.client, &file(&[(out, [3, 32])]), &["classifier.dense.weight is missing"]).await;
    refused(&running.client, &file(&[(alone, [3, 32])]), &["classifier.dense.weight is missing", "TOKEN_CLS"]).await;
    let torn = file(&[(dense, [32, 32]), (out, [3, 32]), (alone, [3, 32])]);
    refused(&running.client, &torn, &["second head"]).await;
    refused(&running.client, &file(&[(dense, [32, 32]), (alone, [3, 32])]), &["classifier.dense"]).await;
    running.stop().await;
}
