//! The most memory that a training job takes beside what the server held before it.

use std::{fs, io::Write as _, path::Path};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    lab::Lab,
    plan::{Memory, Method, Plan},
};
use crate::ops;

/// Bytes of a line of /proc/self/status.
fn status(key: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    let kib = value.and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("/proc/self/status has no {key}"))? * 1024)
}

/// Forgets the peak so far: from here on, `VmHWM` is that of what follows.
fn forget_peak() -> anyhow::Result<()> {
    fs::write("/proc/self/clear_refs", "5").context("reset the peak of memory in /proc/self/clear_refs")
}

/// Whether this system can tell.
pub(super) fn measurable() -> bool {
    status("VmHWM").and_then(|_| forget_peak()).is_ok()
}

/// Bytes that a job of a few steps adds at its peak, the number of trained parameters and the median step in milliseconds.
/// Every row has `memory.length` tokens. Nothing else may run in this process.
///
/// # Errors
/// A job that fails; a system that does not tell.
pub(super) async fn added(
    lab: &Lab,
    plan: &Plan,
    memory: &Memory,
    method: &Method,
    batch: u32,
) -> anyhow::Result<(u64, u64, f64)> {
    let task = plan.task(&memory.task)?;
    let dir = tempfile::tempdir().context("make a temporary folder")?;
    let rows = dir.path().join("rows.jsonl");
    let examples = usize::try_from(u64::from(batch) * u64::from(memory.steps))?.max(16);
    long_rows(&plan.path(&task.train), &rows, examples, memory.length as usize)?;
    let name = format!("memory-{}-{batch}", method.name);
    let more = [
        ("--file", rows.to_string_lossy().into_owned()),
        ("--batch-size", batch.to_string()),
        ("--grad-accumulation", "1".to_owned()),
        ("--max-length", memory.length.to_string()),
        ("--max-steps", memory.steps.to_string()),
    ];
    let more: Vec<String> = more.into_iter().flat_map(|(k, v)| [k.to_owned(), v]).collect();
    // no validation rows: the batches of an evaluation are another matter
    let words = plan.words(task, method, &name, 0, &more);
    ops::give_back_freed_memory();
    let before = status("VmRSS")?;
    forget_peak()?;
    let trained = lab.train(&words, &plan.labels(task)?, task.metric()).await?;
    let peak = status("VmHWM")?;
    lab.clear(&name, &trained, false).await?;
    Ok((peak.saturating_sub(before), trained.trainable, trained.step_ms))
}

/// Rows of a file, each with so much of its text, and of those after it, that it has more than `length` tokens.
fn long_rows(from: &Path, to: &Path, count: usize, length: usize) -> anyhow::Result<()> {
    let text = fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
    let rows: Vec<serde_json::Map<String, Value>> =
        text.lines().filter(|l| !l.trim().is_empty()).map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(!rows.is_empty(), "{} has no rows", from.display());
    let mut out = std::io::BufWriter::new(fs::File::create(to)?);
    for i in 0..count {
        let mut row = rows[i % rows.len()].clone();
        for field in ["text", "completion"] {
            let Some(Value::String(own)) = row.get(field) else { continue };
            let mut long = own.clone();
            let mut next = i;
            // a token is at least a letter, and mostly a word: words beyond the length are cut
            while long.split_whitespace().count() <= length {
                next += 1;
                let more = rows[next % rows.len()].get(field).and_then(Value::as_str).unwrap_or("word");
                long = format!("{long} {}", if more.trim().is_empty() { "word" } else { more });
            }
            row.insert(field.to_owned(), long.into());
        }
        lengthen_words(&mut row, length);
        writeln!(out, "{}", serde_json::to_string(&row)?)?;
    }
    Ok(out.flush()?)
}

/// Words with tags, over and over.
fn lengthen_words(row: &mut serde_json::Map<String, Value>, length: usize) {
    let Some(own) = row.get("tokens").and_then(Value::as_array).map(Vec::len).filter(|n| *n > 0) else { return };
    for field in ["tokens", "labels", "tags", "ner_tags"] {
        if let Some(Value::Array(all)) = row.get_mut(field) {
            let one = all.clone();
            (0..length.div_ceil(own)).for_each(|_| all.extend(one.iter().cloned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_long_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&from, "{\"text\":\"a b\",\"label\":\"x\"}\n{\"tokens\":[\"a\",\"b\"],\"labels\":[\"O\",\"B\"]}\n")
            .unwrap();
        long_rows(&from, &to, 3, 5).unwrap();
        let rows: Vec<Value> =
            fs::read_to_string(&to).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(rows.len(), 3);
        assert!(rows[0]["text"].as_str().unwrap().split(' ').count() > 5 && rows[0]["label"] == "x");
        assert!(rows[1]["tokens"].as_array().unwrap().len() > 5);
        assert_eq!(rows[1]["tokens"].as_array().unwrap().len(), rows[1]["labels"].as_array().unwrap().len());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_is_that_of_what_follows() {
        if !measurable() {
            println!("skipped: this system does not tell peaks");
            return;
        }
        forget_peak().unwrap();
        let before = status("VmRSS").unwrap();
        let big = vec![1_u8; 256 << 20];
        assert!(big.iter().step_by(4096).all(|b| *b == 1));
        drop(big);
        let grown = status("VmHWM").unwrap() - before;
        // less, since tests beside this one free memory, too
        assert!(grown >= 32 << 20, "{grown}");
    }
}
