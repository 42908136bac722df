//! Variables: initial values, identity with the delta's tensors, snapshots, dropout.

use super::*;
use crate::train::batches::{self, Stream};
use crate::{
    admission::train_params::{BitfitPart, LoraPart, MethodPart},
    delta::Task,
    train::spec::{BaseShape, tests::table},
};

fn make(seed: u64, dropout: f64) -> (SiteTable, Trainable) {
    let sites = table(true);
    let methods = [
        MethodPart::Lora(LoraPart { rank: Some(4), dropout: Some(dropout), ..LoraPart::default() }),
        MethodPart::Bitfit(BitfitPart::default()),
    ];
    let base = BaseShape {
        sites: &sites,
        hidden: 8,
        vocab: 32,
        causal: false,
        encoder_decoder: false,
        inner: None,
        base: None,
    };
    let spec = TrainSpec::resolve(&methods, Task::SeqCls, &["a".into(), "b".into()], base).unwrap();
    let t = Trainable::init(&spec, &sites, seed, &Device::Cpu).unwrap();
    assert_eq!(t.spec.parameters, spec.parameters(&sites));
    (sites, t)
}

fn values(t: &Trainable) -> Vec<Vec<f32>> {
    t.vars().iter().map(|v| v.var.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

#[test]
fn a_fresh_delta_changes_nothing_but_the_head_and_the_seed_decides() {
    let (_, t) = make(3, 0.0);
    for v in t.vars() {
        let max = v.var.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let zero = v.name.ends_with("lora_B") || v.name.ends_with("bias");
        assert_eq!(max == 0.0, zero, "{}", v.name);
        assert!(!v.name.ends_with("lora_A") || max <= 1.0 / 8f32.sqrt());
        assert_eq!(v.decays, !v.name.ends_with("bias"));
    }
    assert_eq!(values(&t), values(&make(3, 0.0).1));
    assert_ne!(values(&t), values(&make(4, 0.0).1));
}

#[test]
fn the_deltas_tensors_are_the_variables() {
    let (_, t) = make(0, 0.0);
    let delta = t.delta(&mut batches::rng(0, Stream::Dropout)).unwrap();
    let loss = match &delta.patches()[0].1 {
        Patch::LowRank(l) => l.b.sum_all().unwrap(),
        other => panic!("{other:?}"),
    };
    let grads = loss.backward().unwrap();
    let b = t.vars().iter().find(|v| v.name.ends_with("lora_B")).unwrap();
    assert!(grads.get(&b.var).is_some());
    assert!(!t.detached().unwrap().patches().iter().any(|(_, p)| matches!(p, Patch::Bias(x) if x.is_variable())));
}

#[test]
fn a_snapshot_keeps_its_values_and_comes_back() {
    let (_, t) = make(0, 0.0);
    let (before, snap) = (values(&t), t.snapshot().unwrap());
    for v in t.vars() {
        v.var.set(&v.var.ones_like().unwrap()).unwrap();
    }
    let kept = t.publishable(&snap).unwrap();
    assert_eq!(kept.head().unwrap().weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(), before[before.len() - 2]);
    t.restore(&snap).unwrap();
    assert_eq!(values(&t), before);
    let bytes = t.checkpoint_bytes(&snap).unwrap().unwrap();
    assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), t.vars().len());
}

#[test]
fn an_existing_delta_is_trained_on_from_its_values() {
    let (sites, t) = make(5, 0.0);
    let again = Trainable::from_delta(&t.detached().unwrap(), &sites).unwrap();
    let sorted = |t: &Trainable| {
        let mut v: Vec<_> = t.vars().iter().map(|v| v.name.clone()).zip(values(t)).collect();
        v.sort_by(|a, b| a.0.cmp(&b.0));
        v
    };
    assert_eq!(sorted(&t), sorted(&again));
}

#[test]
fn dropout_drops_columns_of_a_while_training_only() {
    let (_, t) = make(0, 0.5);
    let delta = t.delta(&mut batches::rng(1, Stream::Dropout)).unwrap();
    let zeros = |d: &Delta| match &d.patches()[0].1 {
        Patch::LowRank(l) => l.a.to_vec2::<f32>().unwrap()[0].iter().filter(|x| **x == 0.0).count(),
        other => panic!("{other:?}"),
    };
    assert!((1..8).contains(&zeros(&delta)));
    assert_eq!(zeros(&t.detached().unwrap()), 0);
}
