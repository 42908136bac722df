//! Bases kept in bf16 on the CPU against the same base with the rounded numbers in f32, and against the base itself.

use candle_core::{DType, Device, Tensor};

use super::{
    Base, Input, LoadOptions, PrivateCopy, Quantize,
    quantize::tests::{apart, families, outputs},
    testing::{self, gguf as writer},
};
use crate::{
    delta::{DeltaBatch, Site, Task},
    nn::Cx,
    ops::QuantKind,
    rows::RowLayout,
};

fn in_bf16() -> LoadOptions {
    LoadOptions { dtype: DType::BF16, ..LoadOptions::default() }
}

#[test]
fn every_family_computes_what_its_rounded_numbers_say() {
    for (name, config) in families() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config, 5).unwrap();
        let plain = Base::load(dir.path(), &LoadOptions::default()).unwrap();
        let base = Base::load(dir.path(), &in_bf16()).unwrap();
        let got = outputs(&base);
        // activations are f32, so it is the same arithmetic on the same numbers
        assert_eq!(got, outputs(&testing::dequantized(dir.path(), &base).unwrap()), "{name}");
        let off = apart(&got, &outputs(&plain));
        assert!(off < 0.05 && off > 1e-5, "{name}: {off} from the base itself");
        assert_eq!(base.fingerprint, plain.fingerprint, "it is the same model");
        assert_eq!((base.parameters, base.sites.len()), (plain.parameters, plain.sites.len()));
        assert_eq!((base.weight_format(), base.dtype), ("bf16", DType::F32), "{name}");
        let (all, held) = (plain.linear_formats()["f32"], base.linear_formats());
        assert_eq!(held.len(), 1, "{name}: {held:?}");
        assert_eq!((held["bf16"].matrices, held["bf16"].numbers), (all.matrices, all.numbers), "{name}");
        assert_eq!(2 * held["bf16"].bytes, all.bytes, "{name}");
        // what is left are norms, biases and tables of positions and segments
        let rest =
            |base: &Base| base.weight_bytes() as usize - base.linear_formats().values().map(|h| h.bytes).sum::<usize>();
        let table = base.arch.vocab * base.arch.hidden;
        assert!(rest(&base) + 2 * table <= rest(&plain), "{name}: the embedding table, too");
        let ids = [3, 0, 3, base.arch.vocab as u32 - 1];
        let index = Tensor::new(&ids, &Device::Cpu).unwrap();
        let want = plain.table().unwrap().index_select(&index, 0).unwrap().to_dtype(DType::BF16).unwrap();
        let rows = |t: Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows(base.table_rows(&ids).unwrap()), rows(want), "{name}");
    }
}

/// The checkpoint of a masked language model has a head that is its table, and a matrix ahead of it.
#[test]
fn a_head_that_is_the_table_is_kept_once() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &testing::tiny_bert(), 3).unwrap();
    let file = dir.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let before = "bert.cls.predictions.transform";
    let norm = format!("{before}.LayerNorm");
    for (name, shape) in [
        (format!("{before}.dense.weight"), vec![32, 32]),
        (format!("{before}.dense.bias"), vec![32]),
        (format!("{norm}.weight"), vec![32]),
        (format!("{norm}.bias"), vec![32]),
    ] {
        tensors.insert(name, Tensor::randn(0f32, 0.2, shape, &Device::Cpu).unwrap());
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let (plain, half) =
        (Base::load(dir.path(), &LoadOptions::default()).unwrap(), Base::load(dir.path(), &in_bf16()).unwrap());
    let (rows, deltas) = (RowLayout::packed(&[5]), DeltaBatch::none());
    let logits = |base: &Base| {
        let cx = Cx::new(&rows, &deltas);
        let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5]), &cx).unwrap();
        let logits = base.transformer.logits(&hidden, &[0, 2, 4], &cx).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let off = apart(&logits(&half), &logits(&plain));
    assert!(off < 0.05 && off > 1e-5, "{off}");
    // the matrix ahead of the head has 32 columns in a panel of 48; a table of its own would be another 8 KiB
    let linears = |base: &Base| base.linear_formats().values().map(|h| h.bytes).sum::<usize>() as u64;
    let (plain, half) = (plain.weight_bytes() - linears(&plain), half.weight_bytes() - linears(&half));
    let (head, table) = (2 * 32 * 144, 4 * 32 * 128);
    assert_eq!(plain - half, table - head + 2 * 32 * 48, "{plain} and {half}");
}

#[test]
fn checkpoints_of_16_bits_are_taken_exactly_or_rounded() {
    for (stored, exact) in [(DType::BF16, true), (DType::F16, false)] {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &testing::tiny_llama(), 8).unwrap();
        let file = dir.path().join("model.safetensors");
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let stored = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(stored).unwrap())).collect();
        candle_core::safetensors::save(&stored, &file).unwrap();
        let (base, plain) =
            (Base::load(dir.path(), &in_bf16()).unwrap(), Base::load(dir.path(), &LoadOptions::default()).unwrap());
        assert_eq!(outputs(&base) == outputs(&plain), exact);
        assert_eq!(base.fingerprint, plain.fingerprint);
    }
}

#[test]
fn floats_of_a_gguf_file_are_kept_in_bf16_and_its_blocks_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &testing::tiny_gpt2(), 23).unwrap();
    let path = dir.path().join("m.gguf");
    writer::convert(dir.path(), &path, candle_core::quantized::GgmlDType::F32).unwrap();
    let (of_file, of_folder) = (Base::load(&path, &in_bf16()).unwrap(), Base::load(dir.path(), &in_bf16()).unwrap());
    assert_eq!(of_file.linear_formats(), of_folder.linear_formats());
    assert!(apart(&outputs(&of_file), &outputs(&of_folder)) < 1e-6);
    writer::convert(dir.path(), &path, candle_core::quantized::GgmlDType::Q8_0).unwrap();
    let blocks = Base::load(&path, &in_bf16()).unwrap();
    assert_eq!(blocks.weight_format(), QuantKind::Q8_0.name());
}

#[test]
fn a_private_copy_has_the_checkpoint_s_own_numbers() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &testing::tiny_llama(), 8).unwrap();
    let (base, plain) =
        (Base::load(dir.path(), &in_bf16()).unwrap(), Base::load(dir.path(), &LoadOptions::default()).unwrap());
    let mut tensors = Vec::new();
    let copy = PrivateCopy::read(&base, Task::CausalLm, |_, t| {
        tensors.push(t);
        Ok(())
    });
    assert_eq!(outputs(&copy.unwrap().base(&base, &tensors).unwrap()), outputs(&plain));
}

#[test]
fn what_is_not_kept_in_bf16_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(dir.path(), &testing::tiny_llama(), 8).unwrap();
    let refused = |options: LoadOptions| Base::load(dir.path(), &options).unwrap_err().to_string();
    let both = refused(LoadOptions { quantize: Some(Quantize::Q8_0), ..in_bf16() });
    assert!(both.contains("bf16 or quantised"), "{both}");
    let f16 = refused(LoadOptions { dtype: DType::F16, ..LoadOptions::default() });
    assert!(f16.contains("F16") && f16.contains("[F32, BF16]"), "{f16}");
}

#[test]
fn a_base_knows_the_matrices_that_it_rounded() {
    for (config, stored) in [
        (testing::tiny_llama(), DType::F32),
        (testing::tiny_llama(), DType::F16),
        (testing::tiny_gpt2(), DType::F32),
        (testing::tiny_bert(), DType::F16),
    ] {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(dir.path(), &config, 8).unwrap();
        let file = dir.path().join("model.safetensors");
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let stored = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(stored).unwrap())).collect();
        candle_core::safetensors::save(&stored, &file).unwrap();
        let (base, plain) =
            (Base::load(dir.path(), &in_bf16()).unwrap(), Base::load(dir.path(), &LoadOptions::default()).unwrap());
        for (site, entry) in plain.sites.iter() {
            let own = match plain.linear(site).unwrap() {
                Some((w, _)) => w.t().unwrap(),
                None if entry.site == Site::Embedding => plain.table().unwrap(),
                None => continue,
            };
            let what = format!("{} {}", plain.arch.model_type, entry.label());
            let rounded = own.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            assert!(base.holds(site, &own).unwrap() && base.holds(site, &rounded).unwrap(), "{what}");
            assert!(!base.holds(site, &(&own * 1.01).unwrap()).unwrap(), "{what}");
            // what is kept as it is is not rounded
            assert!(plain.holds(site, &own).unwrap() && !plain.holds(site, &rounded).unwrap(), "{what}");
        }
    }
}
