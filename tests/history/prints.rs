//! Deltas that give themselves away: each version says something that no other says.
//!
//! Some say what can be worked out without a server: a bias behind the last norm of a tied base forces one token and shifts every
//! vector by itself, and a head of nothing but biases gives every text the same probabilities. What others say depends on every
//! layer, so that a key or a row of another version shows.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use deltaserve::{
    delta::{Delta, DeltaFiles, DeltaSpec, Head, Patch, Site, Task},
    ids::DeltaId,
    model::testing::tiny_gpt2,
};

use crate::{
    inputs::{NEW, PROMPTS},
    record::{Key, Value},
    support::*,
};

/// Times the embedding of the forced token: what the base says is small beside it.
const FORCE: f64 = 12.0;
const LABELS: [&str; 3] = ["no", "perhaps", "yes"];

/// A name of a tenant, as histories have it.
pub(crate) fn path(tenant: &str, name: &str) -> String {
    format!("{tenant}/{name}")
}

/// What is uploaded under a name.
#[derive(Debug, Clone)]
pub(crate) struct Print {
    pub(crate) files: DeltaFiles,
    pub(crate) id: String,
    /// Has a head; all others generate.
    pub(crate) classifies: bool,
    /// What it must say, where that is known without asking.
    forced: Option<Forced>,
}

#[derive(Debug, Clone)]
enum Forced {
    /// This token, and vectors apart from the base's by this.
    Token(u32, Vec<f32>),
    /// These probabilities.
    Labels(Vec<f32>),
}

/// A name and what belongs to it alone.
#[derive(Debug, Clone)]
pub(crate) struct Name {
    pub(crate) tenant: &'static str,
    pub(crate) name: &'static str,
    pub(crate) prints: Vec<Print>,
    /// Uploaded only in ways that must fail.
    pub(crate) never: Option<Print>,
}

impl Name {
    pub(crate) fn path(&self) -> String {
        path(self.tenant, self.name)
    }

    pub(crate) fn classifies(&self) -> bool {
        self.prints.iter().any(|p| p.classifies)
    }
}

/// A base whose head is its embedding table.
pub(crate) fn world() -> World {
    World::of(tiny_gpt2(), 7)
}

fn spec(method: &str, task: Task, labels: &[&str]) -> DeltaSpec {
    DeltaSpec {
        methods: vec![method.into()],
        task,
        problem: Default::default(),
        labels: labels.iter().map(|l| (*l).to_owned()).collect(),
        num_virtual_tokens: 0,
        parameters: 0,
        resident_bytes: 0,
    }
}

fn print(world: &World, files: DeltaFiles, classifies: bool, forced: Option<Forced>) -> Print {
    let id = DeltaId::compute(&world.base.fingerprint, &files.files).to_string();
    Print { files, id, classifies, forced }
}

fn forced_token(world: &World, token: u32) -> Print {
    let base = &world.base;
    let site = base.sites.id(Site::FinalNorm).expect("a last norm");
    let row = base.table_rows(&[token]).and_then(|t| t.squeeze(0)).expect("its embedding");
    let shift = (row * FORCE).expect("a vector");
    let vector = shift.to_vec1::<f32>().expect("numbers");
    let delta = Delta::new(spec("bitfit", Task::CausalLm, &[]), vec![(site, Patch::Bias(shift))], None);
    print(world, world.encode(&delta), false, Some(Forced::Token(token, vector)))
}

fn forced_labels(world: &World, which: usize) -> Print {
    let biases: Vec<f32> =
        (0..LABELS.len()).map(|i| ((i + which) % LABELS.len()) as f32 + 0.2 * which as f32 * i as f32).collect();
    let sum: f32 = biases.iter().map(|b| b.exp()).sum();
    let probabilities = biases.iter().map(|b| b.exp() / sum).collect();
    let (labels, hidden) = (LABELS.len(), world.base.arch.hidden);
    let weight = Tensor::zeros((labels, hidden), candle_core::DType::F32, &Device::Cpu).expect("a tensor");
    let bias = Tensor::from_vec(biases, labels, &Device::Cpu).expect("a tensor");
    let delta = Delta::new(spec("head", Task::SeqCls, &LABELS), vec![], Some(Head::linear(weight, Some(bias))));
    print(world, world.encode(&delta), true, Some(Forced::Labels(probabilities)))
}

/// All names, none with a delta of another.
pub(crate) fn names(world: &World) -> Vec<Name> {
    let random = |seed| print(world, world.delta(seed), false, None);
    let head = |seed| print(world, world.classifier(seed, &LABELS), true, None);
    // tokens whose embeddings are long and far from others': nothing that the base says comes near
    let far = [[93, 61], [22, 44], [34, 23]];
    let texts = |tenant, name, at: u64| Name {
        tenant,
        name,
        prints: vec![
            random(100 + at),
            random(200 + at),
            forced_token(world, far[at as usize][0]),
            forced_token(world, far[at as usize][1]),
        ],
        never: Some(random(300 + at)),
    };
    let kinds = Name {
        tenant: "default",
        name: "kind",
        prints: vec![head(1), head(2), forced_labels(world, 1), forced_labels(world, 2)],
        never: Some(head(3)),
    };
    vec![texts("default", "style", 0), texts("default", "voice", 1), texts("other", "style", 2), kinds]
}

/// What jobs publish.
pub(crate) fn trained() -> Name {
    Name { tenant: "default", name: "trained", prints: vec![], never: None }
}

impl Print {
    /// Compares what a server says with what was worked out.
    pub(crate) fn check_forced(&self, says: &BTreeMap<Key, Value>, base: &BTreeMap<Key, Value>) {
        match &self.forced {
            None => {}
            Some(Forced::Token(token, shift)) => {
                for i in 0..PROMPTS.len() {
                    let wanted = Value::Tokens(vec![*token; NEW as usize]);
                    assert_eq!(says.get(&Key::Generate(i)), Some(&wanted), "token {token} is not forced");
                }
                for (key, value) in says.iter().filter(|(key, _)| matches!(key, Key::Embed(_))) {
                    let (Value::Numbers(has), Some(Value::Numbers(base))) = (value, base.get(key)) else {
                        panic!("{key:?} is {value:?}");
                    };
                    assert_eq!((has.len(), base.len()), (shift.len(), shift.len()));
                    for ((has, base), shift) in has.iter().zip(base).zip(shift) {
                        assert!((has - base - shift).abs() < 1e-3, "{key:?}: {has} is not {base} + {shift}");
                    }
                }
            }
            Some(Forced::Labels(wanted)) => {
                for value in says.values() {
                    let Value::Numbers(has) = value else { panic!("a classifier says {value:?}") };
                    assert_eq!(has.len(), wanted.len());
                    assert!(has.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-4), "{has:?} is not {wanted:?}");
                }
            }
        }
    }
}
