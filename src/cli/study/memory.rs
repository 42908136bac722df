//! The most memory that a training job takes beside what the server held before it.

use std::{fs, io::Write as _, path::Path};

use anyhow::{Context as _, ensure};
use serde_json::{Map, Value, json};

use super::{
    lab::Lab,
    plan::{Kind, Memory, Method, Plan},
};
use crate::{
    cli::{files, generate},
    grpc::proto,
    ops,
};

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
/// Every example has `memory.length` tokens. Nothing else may run in this process.
///
/// # Errors
/// Examples of other lengths; a job that fails; a system that does not tell.
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
    let (kind, from, to, length) = (task.kind, plan.path(&task.train), rows.clone(), memory.length as usize);
    files::blocking(move || long_rows(kind, &from, &to, examples, length)).await?;
    let name = format!("memory-{batch}");
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
    let accepts = |plan: &proto::PlanResponse| of_one_length(plan, task.kind, batch, memory.length);
    let trained = lab.train(&words, &task.label_names, task.watched(), accepts).await?;
    let peak = status("VmHWM")?;
    lab.clear(&name, &trained, false).await?;
    Ok((peak.saturating_sub(before), trained.trainable, trained.step_ms))
}

/// Refuses a job whose batches are not what the table says: `batch` examples of `length` tokens each.
fn of_one_length(plan: &proto::PlanResponse, kind: Kind, batch: u32, length: u32) -> anyhow::Result<()> {
    // an encoder-decoder reads so many and writes so many
    let each = u64::from(length) * if kind == Kind::Seq2Seq { 2 } else { 1 };
    let (examples, tokens) = (plan.train_examples, plan.train_tokens);
    // no example is longer than the longest that is allowed: only if all are as long, the sum is that of as many
    ensure!(
        tokens == examples * each,
        "a memory run needs examples of {each} tokens, but {examples} examples have {tokens} tokens, not {}",
        examples * each
    );
    let made = plan.resolved.as_ref().map_or(0, |r| r.batch_size);
    ensure!(
        made == batch && examples >= u64::from(batch),
        "a memory run needs batches of {batch} examples, but there are {examples} in batches of {made}"
    );
    ensure!(plan.validation_examples == 0, "a memory run has no evaluations: their batches are another matter");
    Ok(())
}

/// Writes rows that become one example of `length` tokens each once they are cut to it: each has the texts of the row of its
/// number and of those after it until there are more words than that. Texts without a label are written as completions,
/// since a text would be split where it is cut.
fn long_rows(kind: Kind, from: &Path, to: &Path, count: usize, length: usize) -> anyhow::Result<()> {
    let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    let rows = files::rows(&bytes, |_, fields| Ok(fields)).with_context(|| from.display().to_string())?;
    let texts: Vec<String> = rows.iter().map(text).collect();
    let words = kind == Kind::TokenCls;
    ensure!(words || texts.iter().any(|t| !t.trim().is_empty()), "{} has no text", from.display());
    ensure!(!rows.is_empty(), "{} has no rows", from.display());
    let mut out = std::io::BufWriter::new(fs::File::create(to)?);
    for i in 0..count {
        let own = i % rows.len();
        // a word is a token at least
        let long = || {
            let all = texts.iter().cycle().skip(own).flat_map(|t| t.split_whitespace());
            all.take(length + 1).collect::<Vec<_>>().join(" ")
        };
        let mut row = rows[own].clone();
        match kind {
            Kind::SeqCls => drop(row.insert("text".to_owned(), long().into())),
            Kind::TokenCls => lengthen_words(&mut row, length),
            Kind::CausalLm => {
                row = Map::from_iter([("prompt".to_owned(), json!("")), ("completion".to_owned(), json!(long()))])
            }
            Kind::Seq2Seq => {
                row = Map::from_iter(["prompt", "completion"].map(|field| (field.to_owned(), json!(long()))));
            }
        }
        writeln!(out, "{}", serde_json::to_string(&row)?)?;
    }
    Ok(out.flush()?)
}

/// All that a row says: its text, or its prompt and the first reference, or its messages.
fn text(row: &Map<String, Value>) -> String {
    let own = ["text", "prompt"].into_iter().filter_map(|field| Some(row.get(field)?.as_str()?.to_owned()));
    let reference = generate::references(row).unwrap_or_default().into_iter().take(1);
    let messages = row.get("messages").and_then(Value::as_array).into_iter().flatten();
    let messages = messages.filter_map(|m| Some(m.get("content")?.as_str()?.to_owned()));
    own.chain(reference).chain(messages).collect::<Vec<_>>().join(" ")
}

/// Words with tags, over and over.
fn lengthen_words(row: &mut Map<String, Value>, length: usize) {
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
        let of = |kind, text: &str| {
            fs::write(&from, text).unwrap();
            long_rows(kind, &from, &to, 3, 5).unwrap();
            let rows: Vec<Value> =
                fs::read_to_string(&to).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            assert_eq!(rows.len(), 3);
            rows
        };
        let rows = of(Kind::SeqCls, "{\"text\":\"a b\",\"label\":\"x\"}\n{\"text\":\" \",\"label\":\"y\"}\n");
        assert_eq!((&rows[0], &rows[1]["label"]), (&json!({"text": "a b a b a b", "label": "x"}), &json!("y")));
        let rows = of(Kind::TokenCls, "{\"tokens\":[\"a\",\"b\"],\"labels\":[\"O\",\"B\"]}\n");
        assert!(rows[1]["tokens"].as_array().unwrap().len() > 5);
        assert_eq!(rows[1]["tokens"].as_array().unwrap().len(), rows[1]["labels"].as_array().unwrap().len());
        let said = "{\"text\":\"a\"}\n{\"prompt\":\"b\",\"references\":[\"c\"]}\n\
                    {\"messages\":[{\"role\":\"user\",\"content\":\"d e\"}]}\n";
        let rows = of(Kind::CausalLm, said);
        assert_eq!(rows[0], json!({"prompt": "", "completion": "a b c d e a"}));
        assert_eq!(of(Kind::Seq2Seq, said)[2], json!({"prompt": "d e a b c d", "completion": "d e a b c d"}));
        fs::write(&from, "{\"text\":\" \"}").unwrap();
        let error = long_rows(Kind::CausalLm, &from, &to, 3, 5).unwrap_err().to_string();
        assert!(error.contains("has no text"), "{error}");
    }

    #[test]
    fn batches_that_the_table_does_not_name_are_refused() {
        let plan = |examples, tokens, batch_size, validation_examples| proto::PlanResponse {
            train_examples: examples,
            train_tokens: tokens,
            validation_examples,
            resolved: Some(proto::ResolvedTraining { batch_size, ..Default::default() }),
            ..Default::default()
        };
        let of = |plan, kind| of_one_length(&plan, kind, 2, 8).map_err(|e| e.to_string());
        assert_eq!(of(plan(16, 128, 2, 0), Kind::CausalLm), Ok(()));
        assert_eq!(of(plan(16, 256, 2, 0), Kind::Seq2Seq), Ok(()));
        let cases = [
            (plan(17, 128, 2, 0), "17 examples have 128 tokens, not 136"),
            (plan(16, 128, 1, 0), "16 in batches of 1"),
            (plan(1, 8, 2, 0), "there are 1 in batches of 2"),
            (plan(16, 128, 2, 4), "no evaluations"),
        ];
        for (plan, part) in cases {
            let error = of(plan, Kind::SeqCls).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
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
