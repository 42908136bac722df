//! The two real models of `../shared/models`, against their float64 golden values.

use std::path::{Path, PathBuf};

use deltaserve::{
    delta::DeltaBatch,
    model::{Base, Input, LoadOptions},
    nn::Cx,
    rows::RowLayout,
};
use serde_json::Value;

use crate::cases::greedy;

pub(crate) fn run(filter: Option<&str>) -> usize {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models");
    if filter.is_some_and(|f| !"real".contains(f)) {
        return 0;
    }
    if !models.is_dir() {
        println!("golden: ../shared/models is absent, so the real models are skipped");
        return 0;
    }
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&models).into_iter().flatten().flatten().map(|e| e.path()).collect();
    dirs.retain(|d| d.join("golden.json").is_file());
    dirs.sort();
    let mut failed = 0;
    for dir in dirs {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match check(&dir) {
            Ok(what) => println!("  ok    real/{name}: {what}"),
            Err(why) => {
                failed += 1;
                println!("  FAIL  real/{name}: {why}");
            }
        }
    }
    failed
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().into_iter().flatten().filter_map(Value::as_u64).map(|n| n as u32).collect()
}

fn check(dir: &Path) -> Result<String, String> {
    let golden: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).map_err(|e| e.to_string())?)
        .map_err(|e| e.to_string())?;
    let base = Base::load(dir, &LoadOptions::default()).map_err(|e| e.to_string())?;
    match golden["greedy_from_bos"].as_object() {
        Some(story) => check_story(&base, dir, story),
        None => check_embeddings(&base, &golden),
    }
}

fn check_story(base: &Base, dir: &Path, story: &serde_json::Map<String, Value>) -> Result<String, String> {
    let (prompt, want) = (ids(&story["prompt_ids"]), ids(&story["ids"]));
    let new = want.len() - prompt.len();
    let got = greedy(base, std::slice::from_ref(&prompt), &[None], new).map_err(|e| e.to_string())?;
    if [prompt, got[0].clone()].concat() != want {
        return Err("greedy tokens differ".into());
    }
    let text = story.get("text").and_then(Value::as_str).unwrap_or_default();
    let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).map_err(|e| e.to_string())?;
    let decoded = tokenizer.decode(&want, true).map_err(|e| e.to_string())?;
    if !text.is_empty() && decoded.trim_start() != text.trim_start() {
        return Err(format!("text differs: {decoded:?}"));
    }
    Ok(format!("{new} greedy tokens and their text equal, letter for letter"))
}

fn check_embeddings(base: &Base, golden: &Value) -> Result<String, String> {
    let go = || -> candle_core::Result<(usize, f64)> {
        let sentences: Vec<&Value> = golden["sentences"].as_array().into_iter().flatten().collect();
        let tokens: Vec<Vec<u32>> = sentences.iter().map(|s| ids(&s["ids"])).collect();
        let rows = RowLayout::packed(&tokens.iter().map(Vec::len).collect::<Vec<_>>());
        let none = DeltaBatch::none();
        let cx = Cx::new(&rows, &none);
        let hidden = base.transformer.forward(&Input::tokens(&tokens.concat()), &cx)?;
        let mut worst = 0f64;
        for (span, sentence) in rows.spans().iter().zip(&sentences) {
            let mean = hidden.narrow(0, span.start, span.len)?.mean(0)?;
            let unit = mean.broadcast_div(&mean.sqr()?.sum_all()?.sqrt()?)?.to_vec1::<f32>()?;
            for (got, want) in unit.iter().zip(sentence["embedding_first8"].as_array().into_iter().flatten()) {
                let off = (f64::from(*got) - want.as_f64().unwrap_or(f64::NAN)).abs();
                worst = if off.is_nan() { f64::INFINITY } else { worst.max(off) };
            }
        }
        Ok((sentences.len(), worst))
    };
    let (n, worst) = go().map_err(|e| e.to_string())?;
    if n == 0 || worst > 2e-5 {
        return Err(format!("{n} embeddings differ by {worst:.1e}"));
    }
    Ok(format!("{n} embeddings, max |diff| {worst:.1e}"))
}
