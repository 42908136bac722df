//! Quantised bases of every family against the same base with the dequantised numbers in f32, and against the base itself.

use candle_core::Tensor;
use serde_json::{Value, json};

use super::*;
use crate::{
    delta::{DeltaBatch, Site},
    model::{Base, Input, LoadOptions, Source, testing},
    nn::Cx,
    rows::RowLayout,
};

/// Hidden states of two texts, and logits of all rows where the base has them.
pub(in crate::model) fn outputs(base: &Base) -> Vec<f32> {
    let (rows, texts) = (RowLayout::packed(&[5, 4]), RowLayout::packed(&[3, 4]));
    let deltas = DeltaBatch::none();
    let source = (base.arch.is_encoder_decoder())
        .then(|| Source::encode(base, texts, &[9, 4, 3, 8, 6, 40, 5], &[None, None], None).unwrap());
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5, 6, 7, 8, 9]), &cx).unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut out = flat(&hidden);
    if base.arch.is_causal() {
        out.extend(flat(&base.transformer.logits(&hidden, &[0, 1, 2, 3, 4, 5, 6, 7, 8], &cx).unwrap()));
    }
    out
}

/// The largest difference, over the largest number.
pub(in crate::model) fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
}

pub(in crate::model) fn families() -> Vec<(&'static str, Value)> {
    use testing::*;
    vec![
        ("llama", tiny_llama()),
        ("gpt2", tiny_gpt2()),
        ("qwen3", tiny_qwen3()),
        ("gemma2", tiny_gemma2()),
        ("gemma3", tiny_gemma3()),
        ("phi3", tiny_phi3()),
        ("bert", tiny_bert()),
        ("roberta", tiny_roberta()),
        ("distilbert", tiny_distilbert()),
        ("t5", tiny_t5()),
    ]
}

/// Wide enough for blocks of 256; rows that are no multiple of a panel.
fn wide(mut config: Value) -> Value {
    let sizes: &[(&str, u64)] = match config["model_type"].as_str().unwrap() {
        "gpt2" => &[("n_embd", 256), ("n_inner", 512)],
        _ => &[("hidden_size", 256), ("intermediate_size", 512)],
    };
    for (key, size) in sizes {
        config[*key] = json!(size);
    }
    config
}

#[test]
fn every_family_computes_what_its_dequantised_numbers_say() {
    let mut cases: Vec<(&str, Value, Quantize)> =
        families().into_iter().map(|(name, config)| (name, config, Quantize::Q8_0)).collect();
    for (name, config) in families().into_iter().filter(|(name, _)| ["llama", "gpt2", "phi3", "bert"].contains(name)) {
        cases.push((name, wide(config), Quantize::Q4K));
    }
    for (name, config, quantize) in cases {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config, 5).unwrap();
        let plain = Base::load(dir.path(), &LoadOptions::default()).unwrap();
        let options = LoadOptions { quantize: Some(quantize), ..LoadOptions::default() };
        let base = Base::load(dir.path(), &options).unwrap();
        let (got, want) = (outputs(&base), outputs(&testing::dequantized(dir.path(), &base).unwrap()));
        let off = apart(&got, &want);
        assert!(off < 2e-5, "{name} {quantize:?}: {off} from the dequantised numbers");
        let (off, most) = (apart(&got, &outputs(&plain)), if quantize == Quantize::Q8_0 { 0.05 } else { 0.4 });
        assert!(off < most && off > 1e-4, "{name} {quantize:?}: {off} from the base itself");
        assert_eq!(base.fingerprint, plain.fingerprint, "it is the same model");
        assert_eq!((base.parameters, base.sites.len()), (plain.parameters, plain.sites.len()));
        assert!(base.weight_bytes() < plain.weight_bytes(), "{name}");
        let formats = base.linear_formats();
        let format = if quantize == Quantize::Q8_0 { "q8_0" } else { "q4k" };
        assert_eq!(base.weight_format(), format);
        let matrices: usize = formats.values().map(|held| held.matrices).sum();
        assert_eq!(matrices, plain.linear_formats()["f32"].matrices, "{name}: {formats:?}");
        // an attention's output of odd heads fits no block, and a head of its own has 8 bits at least
        let odd = plain.sites.linears().filter(|(_, e)| e.in_dim % 32 != 0).count();
        let own_head = plain.arch.is_causal() && !plain.arch.tied_head && quantize == Quantize::Q4K;
        let others = odd + usize::from(own_head);
        assert_eq!(formats[format].matrices, matrices - others, "{name}");
        assert_eq!(plain.weight_format(), "f32");
    }
}

#[test]
fn what_no_block_fits_is_kept_and_said() {
    let mut config = testing::tiny_llama();
    config["intermediate_size"] = json!(40);
    let options = LoadOptions { quantize: Some(Quantize::Q4K), ..LoadOptions::default() };
    let base = testing::random_base_as(&config, 3, &options).unwrap();
    let formats = base.linear_formats();
    let count = |format: &str| formats.get(format).map_or(0, |held| held.matrices);
    // queries, keys and values lie side by side, as do gate and up; the second matrix of each layer's MLP takes 40
    let head = usize::from(!base.arch.tied_head);
    assert_eq!((count("f32"), count("q8_0"), count("q4k")), (2, 6 + head, 0), "{formats:?}");
}

#[test]
fn bytes_are_those_of_what_is_kept() {
    let base = |config: &Value, quantize| {
        testing::random_base_as(config, 3, &LoadOptions { quantize, ..LoadOptions::default() }).unwrap()
    };
    for (name, config) in families() {
        let plain = base(&config, None);
        // panels are padded to 48 columns, so a little more than four bytes a number
        let (bytes, numbers) = (plain.weight_bytes(), 4 * plain.parameters);
        assert!(bytes >= numbers && bytes < 2 * numbers, "{name}: {bytes} for {numbers}");
        let linears: usize = plain.linear_formats().values().map(|held| held.bytes).sum();
        let quantized = base(&config, Some(Quantize::Q8_0));
        let less: usize = quantized.linear_formats().values().map(|held| held.bytes).sum();
        // a table that is a causal head's is kept as one, in 128 or 34 bytes of 32 numbers
        let arch = &plain.arch;
        let is_head = arch.is_causal() && arch.tied_head && arch.hidden.is_multiple_of(32);
        let table = if is_head { arch.vocab.next_multiple_of(48) * arch.hidden / 32 * (128 - 34) } else { 0 };
        assert_eq!(plain.weight_bytes() - quantized.weight_bytes(), (linears - less + table) as u64, "{name}");
        let all = !quantized.linear_formats().contains_key("f32");
        assert!(!all || (less as f64 / linears as f64 - 8.5 / 32.0).abs() < 1e-6, "{name}: {less} of {linears}");
    }
}

#[test]
fn a_table_that_is_a_causal_head_is_quantised_as_one() {
    let load = |config: &Value, quantize| {
        testing::random_base_as(config, 3, &LoadOptions { quantize, ..LoadOptions::default() }).unwrap()
    };
    for (config, quantize) in [
        (testing::tiny_gpt2(), Quantize::Q8_0),
        (wide(testing::tiny_gpt2()), Quantize::Q4K),
        (testing::tiny_gemma2(), Quantize::Q8_0),
        (testing::tiny_t5(), Quantize::Q8_0),
    ] {
        let (plain, base) = (load(&config, None), load(&config, Some(quantize)));
        let (own, kept) = (plain.table().unwrap(), base.table().unwrap());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let off = apart(&flat(&kept), &flat(&own));
        assert!(off > 1e-4 && off < 1.0 / 127.0, "{off}: 8 bits, whatever the linears have");
        // lookups, the whole and the head say one thing
        let ids = [127, 0, 3, 127];
        let rows = flat(&base.table_rows(&ids).unwrap());
        assert_eq!(rows, flat(&kept.index_select(&Tensor::new(&ids, kept.device()).unwrap(), 0).unwrap()));
        let head = base.sites.id(Site::LmHead).unwrap();
        let (w, _) = base.linear(head).unwrap().unwrap();
        assert_eq!(flat(&w.t().unwrap()), flat(&kept));
        // what was saved beside a delta of the plain base is the base's own, what was trained is not
        for site in [head, base.sites.id(Site::Embedding).unwrap()] {
            assert!(base.holds(site, &own).unwrap() && plain.holds(site, &own).unwrap());
            let other = (&own * 1.5).unwrap();
            assert!(!base.holds(site, &other).unwrap() && !plain.holds(site, &other).unwrap());
            assert!(!base.holds(site, &own.narrow(0, 0, 100).unwrap()).unwrap());
        }
    }
    // an encoder's, and one that is no head, stay as they are
    let mut untied = testing::tiny_llama();
    untied["tie_word_embeddings"] = false.into();
    for config in [untied, testing::tiny_bert()] {
        let (plain, base) = (load(&config, None), load(&config, Some(Quantize::Q8_0)));
        let flat = |base: &Base| base.table().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&plain), flat(&base));
    }
}

/// Also in parts of matrices that lie side by side, and where the numbers do not come to the same codes again.
#[test]
fn a_base_knows_what_its_matrices_were_made_of_and_what_they_became() {
    for (config, quantize) in [
        (testing::tiny_llama(), Quantize::Q8_0),
        (wide(testing::tiny_llama()), Quantize::Q4K),
        (wide(testing::tiny_gpt2()), Quantize::Q4K),
        (testing::tiny_bert(), Quantize::Q8_0),
    ] {
        let load = |quantize| {
            testing::random_base_as(&config, 3, &LoadOptions { quantize, ..LoadOptions::default() }).unwrap()
        };
        let (plain, base) = (load(None), load(Some(quantize)));
        let matrix = |base: &Base, site| match base.linear(site).unwrap() {
            Some((w, _)) => w.t().unwrap(),
            None => base.table().unwrap(),
        };
        let sites =
            plain.sites.iter().filter(|(_, e)| matches!(e.site, Site::Linear { .. } | Site::Embedding | Site::LmHead));
        for (site, entry) in sites {
            let what = format!("{} {} {quantize:?}", plain.arch.model_type, entry.label());
            let own = matrix(&plain, site);
            for numbers in [&own, &matrix(&base, site)] {
                assert!(base.holds(site, numbers).unwrap(), "{what}");
                assert!(!base.holds(site, &(numbers * 1.5).unwrap()).unwrap(), "{what}");
            }
            assert!(plain.holds(site, &own).unwrap(), "{what}");
        }
    }
}

#[test]
fn a_number_that_is_not_finite_is_refused_by_the_name_of_its_matrix() {
    let quantized = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
    for (config, module) in [(testing::tiny_llama(), "mlp.down_proj"), (testing::tiny_gpt2(), "wte")] {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config, 8).unwrap();
        let file = dir.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
        let (name, t) = tensors.iter().find(|(name, _)| name.contains(module)).unwrap();
        let mut numbers = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        numbers[77] = f32::NAN;
        let (name, t) = (name.clone(), Tensor::from_vec(numbers, t.dims(), t.device()).unwrap());
        tensors.insert(name, t);
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let error = Base::load(dir.path(), &quantized).unwrap_err().to_string();
        assert!(error.contains(&format!("{module}.weight")) && error.contains("NaN is not finite"), "{error}");
    }
}
