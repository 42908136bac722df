//! What decoding lets through, the forward applies: every kind of patch at every site.

use std::sync::Arc;

use candle_core::Tensor;

use super::*;
use crate::{
    delta::{
        Act, Affine, Bottleneck, DeltaBatch, DeltaSpec, Dora, DoraBase, LowRank, Matrix, Prefix, PrefixForm, Proj,
        Prompt, PromptStage, Scaling, Site, SiteEntry, Stack, TokenRows, Wiring,
    },
    interop::testing::random,
    model::{
        Input,
        testing::{random_base, tiny_bert, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_roberta},
    },
    nn::Cx,
    rows::RowLayout,
};

fn rand(shape: &[usize]) -> Tensor {
    random(shape, 0.5)
}

/// One patch of every kind, shaped for the site.
fn every_kind(site: SiteId, e: &SiteEntry, base: &Base) -> Vec<Patch> {
    let input = if e.site == Site::Embedding { base.arch.vocab } else { e.in_dim.max(1) };
    let (out, hidden) = (e.out_dim, base.arch.hidden);
    let pair = || LowRank { a: rand(&[2, input]), b: rand(&[2, out]), scale: 0.5 };
    let matrix = base.linear(site).unwrap().map_or_else(|| rand(&[input, out]), |(w, _)| w);
    let dora = Dora::new(pair(), rand(&[out]), DoraBase::new(matrix, None).unwrap()).unwrap();
    let bottleneck = Bottleneck {
        down: rand(&[3, out]),
        down_bias: rand(&[3]),
        up: rand(&[3, out]),
        up_bias: rand(&[out]),
        act: Act::Silu,
        scaling: Scaling::Fixed(1.0),
        norm_before: None,
        norm_after: None,
        wiring: Wiring::SEQUENTIAL,
    };
    vec![
        Patch::LowRank(pair()),
        Patch::Bias(rand(&[out])),
        Patch::Scale(rand(&[out])),
        Patch::InScale(rand(&[input])),
        Patch::Affine(Affine { gain: rand(&[out]), bias: None, center: true, eps: 1e-5 }),
        Patch::Dora(Box::new(dora)),
        Patch::Bottleneck(Box::new(bottleneck)),
        Patch::TokenRows(TokenRows { ids: vec![9], rows: rand(&[1, hidden]), base: rand(&[1, hidden]) }),
        Patch::Matrix(Matrix { weight: rand(&[input, out]), bias: None }),
        Patch::Prompt(Prompt { rows: rand(&[2, out]), stage: PromptStage::Tokens, stack: Stack::Main }),
        Patch::Prefix(Prefix { k: rand(&[2, out]), v: rand(&[2, out]), form: PrefixForm::Context, stack: Stack::Main }),
    ]
}

fn delta(patches: Vec<(SiteId, Patch)>) -> Delta {
    let spec = DeltaSpec {
        methods: vec![],
        task: Task::Feature,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    Delta::new(spec, patches, None)
}

/// All that the base says of one text with a delta: hidden states of its tokens, logits or the pooled row.
fn outputs(base: &Base, delta: Option<Delta>) -> candle_core::Result<Vec<f32>> {
    let per_span = vec![delta.map(Arc::new)];
    let rows = RowLayout::packed_for(&[5], &per_span);
    let deltas = DeltaBatch::new(&rows, &per_span, base.sites.len());
    let cx = Cx::new(&rows, &deltas);
    let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5]), &cx)?;
    let own = rows.spans()[0].token_rows();
    let more = match base.arch.is_causal() {
        true => base.transformer.logits(&hidden, &rows.last_rows(), &cx)?,
        false => base.transformer.pooled(&hidden, &cx)?,
    };
    let states: Vec<f32> = hidden.narrow(0, own.start, own.len())?.flatten_all()?.to_vec1()?;
    Ok([states, more.flatten_all()?.to_vec1()?].concat())
}

#[test]
fn what_is_let_through_is_applied() {
    for config in [tiny_llama(), tiny_gpt2(), tiny_bert(), tiny_roberta(), tiny_qwen3(), tiny_gemma2()] {
        let base = random_base(&config, 5).unwrap();
        let family = base.arch.family;
        let plain = outputs(&base, None).unwrap();
        for (site, e) in base.sites.iter() {
            for patch in every_kind(site, e, &base) {
                let (what, acts) = (format!("{family} {}: {}", e.label(), patch.kind()), patch.acts_at(e.site));
                let one = delta(match patch {
                    // a prefix is one of all layers
                    Patch::Prefix(_) if acts => (base.sites.iter())
                        .filter(|(_, e)| matches!(e.site, Site::KeyValue { .. }))
                        .map(|(id, _)| (id, patch.clone()))
                        .collect(),
                    _ => vec![(site, patch.clone())],
                });
                assert_eq!(applicable(&one, &base).is_ok(), acts, "{what}: {:?}", applicable(&one, &base));
                if !acts {
                    continue;
                }
                let got = outputs(&base, Some(one)).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(got.iter().all(|v| v.is_finite()), "{what}");
                // without a rotation, a key's bias shifts all scores of a query alike
                let key_bias = matches!((&patch, e.site), (Patch::Bias(_), Site::Linear { proj: Proj::K, .. }));
                assert!(key_bias || got != plain, "{what} changes nothing");
            }
        }
    }
}

#[test]
fn a_shape_that_only_counts_right_is_no_fit() {
    let base = random_base(&tiny_llama(), 5).unwrap();
    for (site, e) in base.sites.iter() {
        for patch in every_kind(site, e, &base).into_iter().filter(|p| p.acts_at(e.site)) {
            if matches!(patch, Patch::Dora(_)) {
                continue; // its norms are made from the pair at once: other shapes cannot be put together
            }
            let mut n = 0;
            let count = patch.tensors().len();
            for at in 0..count {
                let bent = patch.map(&mut |_, t| {
                    n += 1;
                    if (n - 1) % count == at { t.unsqueeze(0) } else { Ok(t.clone()) }
                });
                let bent = delta(vec![(site, bent.unwrap())]);
                assert!(matches!(applicable(&bent, &base), Err(InteropError::Unapplied(_))), "{} {at}", e.label());
            }
        }
    }
}
