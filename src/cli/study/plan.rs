//! What a study compares: a JSON file that names bases, tasks and methods, the last two with options of `deltaserve train`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{metric, score};
use crate::cli::{generate, train::TrainArgs};

/// A study. Paths are relative to the plan's folder.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    /// Heading of the report.
    pub(super) title: String,
    /// Paragraphs below it.
    #[serde(default)]
    pub(super) notes: Vec<String>,
    pub(super) bases: Vec<BaseEntry>,
    pub(super) tasks: Vec<Task>,
    pub(super) methods: Vec<Method>,
    /// One run of each method on each task per seed.
    #[serde(default = "first_seed")]
    pub(super) seeds: Vec<u64>,
    /// The method that others are compared with.
    #[serde(default = "full")]
    pub(super) baseline: String,
    pub(super) few_shot: Option<FewShot>,
    pub(super) transfer: Option<Transfer>,
    pub(super) memory: Option<Memory>,
    /// Where the plan lies.
    #[serde(skip)]
    folder: PathBuf,
}

fn first_seed() -> Vec<u64> {
    vec![0]
}

fn full() -> String {
    "full".to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BaseEntry {
    pub(super) name: String,
    /// Folder, or hub id.
    pub(super) path: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Task {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) train: String,
    /// Rows that choose the best checkpoint and make the curve: a file, or a share of the training rows.
    pub(super) validation: Option<Validation>,
    /// Rows that are scored once, at the end.
    pub(super) test: String,
    /// JSON list of labels in index order; without it, they come from the rows.
    pub(super) labels: Option<String>,
    /// The figure that is compared; default by kind.
    pub(super) metric: Option<String>,
    /// Continues the test rows with these options of `deltaserve generate`, and scores that against the references.
    pub(super) generate: Option<Vec<String>>,
    /// Bases that the task is for; nothing = all.
    #[serde(default)]
    pub(super) bases: Vec<String>,
    #[serde(default)]
    pub(super) options: Vec<String>,
    /// Names of `labels` in index order; empty = from the rows.
    #[serde(skip)]
    pub(super) label_names: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Validation {
    File(String),
    Share(f64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    SeqCls,
    TokenCls,
    CausalLm,
    #[serde(rename = "seq2seq")]
    Seq2Seq,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::SeqCls => "seq-cls",
            Self::TokenCls => "token-cls",
            Self::CausalLm => "causal-lm",
            Self::Seq2Seq => "seq2seq",
        }
    }

    fn metrics(self) -> &'static [&'static str] {
        match self {
            Self::SeqCls => &["accuracy", "macro_f1", "mcc", "macro_recall"],
            Self::TokenCls => &["span_f1", "accuracy", "span_precision", "span_recall"],
            Self::CausalLm | Self::Seq2Seq => &["perplexity", "loss"],
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Method {
    pub(super) name: String,
    /// As after `deltaserve train`: `["--method", "lora", "--rank", "8"]`.
    pub(super) options: Vec<String>,
}

/// Scores against the number of examples.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FewShot {
    pub(super) tasks: Vec<String>,
    pub(super) methods: Vec<String>,
    /// Examples per class.
    pub(super) k: Vec<u32>,
    #[serde(default)]
    pub(super) options: Vec<String>,
}

/// What a delta of one task is worth as a start for another with few examples.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Transfer {
    pub(super) tasks: Vec<String>,
    pub(super) method: String,
    /// Examples per class of the task that is learned.
    pub(super) k: u32,
    #[serde(default)]
    pub(super) options: Vec<String>,
}

/// Peak memory of a few steps on rows of one length.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    /// Whose rows are taken, put together to the length.
    pub(super) task: String,
    pub(super) methods: Vec<String>,
    pub(super) batch_sizes: Vec<u32>,
    /// Tokens of each row.
    pub(super) length: u32,
    #[serde(default = "steps")]
    pub(super) steps: u32,
}

fn steps() -> u32 {
    3
}

impl Task {
    pub(super) fn metric(&self) -> &str {
        match (&self.metric, self.kind.metrics()) {
            (Some(metric), _) => metric,
            (None, [first, ..]) => first,
            (None, []) => "loss",
        }
    }

    pub(super) fn on(&self, base: &str) -> bool {
        self.bases.is_empty() || self.bases.iter().any(|b| b == base)
    }

    /// Figures that its test rows have.
    fn metrics(&self) -> Vec<&'static str> {
        let generated = self.generate.iter().flat_map(|_| metric::GENERATED);
        self.kind.metrics().iter().copied().chain(generated).collect()
    }

    /// The figure of the evaluations while it trains: the task's, or the first of its kind where that takes continuations.
    pub(super) fn watched(&self) -> &str {
        match self.kind.metrics() {
            [first, ..] if metric::GENERATED.contains(&self.metric()) => first,
            _ => self.metric(),
        }
    }
}

impl Plan {
    /// Reads and checks a plan: every name, file and option, so that a study does not end after hours at a typing error.
    ///
    /// # Errors
    /// What is wrong, by name.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let mut plan: Self = serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
        plan.folder = path.parent().unwrap_or(Path::new("")).to_owned();
        plan.read_labels().and_then(|()| plan.check()).with_context(|| format!("{}", path.display()))?;
        Ok(plan)
    }

    /// A path of the plan.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A folder of the plan, or a hub id as it is.
    pub(super) fn base(&self, entry: &BaseEntry) -> String {
        let folder = self.path(&entry.path);
        if folder.is_dir() { folder.to_string_lossy().into_owned() } else { entry.path.clone() }
    }

    pub(super) fn task(&self, name: &str) -> anyhow::Result<&Task> {
        self.tasks.iter().find(|t| t.name == name).with_context(|| format!("no task is named {name:?}"))
    }

    pub(super) fn method(&self, name: &str) -> anyhow::Result<&Method> {
        self.methods.iter().find(|m| m.name == name).with_context(|| format!("no method is named {name:?}"))
    }

    fn read_labels(&mut self) -> anyhow::Result<()> {
        for task in &mut self.tasks {
            let Some(file) = &task.labels else { continue };
            let path = self.folder.join(file);
            let text = fs::read(&path).with_context(|| format!("task {}: read {}", task.name, path.display()))?;
            task.label_names = serde_json::from_slice(&text)
                .with_context(|| format!("task {}: {}: a JSON list of names is needed", task.name, path.display()))?;
        }
        Ok(())
    }

    /// The words after `deltaserve train` for a task and a method, without validation rows.
    pub(super) fn words(&self, task: &Task, method: &Method, name: &str, seed: u64, more: &[String]) -> Vec<String> {
        let mut words = vec![name.to_owned(), "--file".into(), self.path(&task.train).to_string_lossy().into_owned()];
        words.extend(["--task".into(), task.kind.as_str().to_owned()]);
        words.extend(task.options.iter().chain(&method.options).chain(more).cloned());
        words.extend(["--seed".into(), seed.to_string()]);
        words
    }

    /// The words for a task's validation rows. A share of the rows is none of a few examples.
    pub(super) fn validation(&self, task: &Task, few: bool) -> Vec<String> {
        match &task.validation {
            Some(Validation::File(file)) => {
                vec!["--validation".into(), self.path(file).to_string_lossy().into_owned()]
            }
            Some(Validation::Share(share)) if !few => vec!["--validation-fraction".into(), share.to_string()],
            Some(Validation::Share(_)) | None => Vec::new(),
        }
    }

    /// Tells runs apart that differ in their options or rows: 16 hexadecimal digits.
    pub(super) fn digest(&self, task: &Task, method: &Method, more: &[String]) -> anyhow::Result<String> {
        let mut sha = Sha256::new();
        for words in [&task.options, &method.options, more] {
            sha.update(serde_json::to_vec(words)?);
        }
        if let Some(words) = &task.generate {
            sha.update(b"generate");
            sha.update(serde_json::to_vec(words)?);
        }
        if let Some(metric) = &task.metric {
            sha.update(b"metric");
            sha.update(metric);
        }
        sha.update([u8::from(task.validation.is_some())]);
        let validation = match &task.validation {
            Some(Validation::File(file)) => Some(file),
            Some(Validation::Share(share)) => {
                sha.update(share.to_le_bytes());
                None
            }
            None => None,
        };
        for file in [Some(&task.train), validation, Some(&task.test)].into_iter().flatten() {
            let path = self.path(file);
            sha.update(Sha256::digest(fs::read(&path).with_context(|| format!("read {}", path.display()))?));
        }
        Ok(hex::encode(sha.finalize())[..16].to_owned())
    }

    fn check(&self) -> anyhow::Result<()> {
        unique("bases", self.bases.iter().map(|b| b.name.as_str()))?;
        unique("tasks", self.tasks.iter().map(|t| t.name.as_str()))?;
        unique("methods", self.methods.iter().map(|m| m.name.as_str()))?;
        ensure!(!self.seeds.is_empty(), "seeds: at least one is needed");
        let bases: BTreeSet<&str> = self.bases.iter().map(|b| b.name.as_str()).collect();
        for task in &self.tasks {
            let name = &task.name;
            if let Some(unknown) = task.bases.iter().find(|b| !bases.contains(b.as_str())) {
                bail!("task {name}: no base is named {unknown:?}");
            }
            let known = task.metrics();
            ensure!(known.contains(&task.metric()), "task {name}: metric is {:?}, not one of {known:?}", task.metric());
            for file in [&task.train, &task.test] {
                ensure!(self.path(file).is_file(), "task {name}: no file {}", self.path(file).display());
            }
            if let Some(Validation::File(file)) = &task.validation {
                ensure!(self.path(file).is_file(), "task {name}: no file {}", self.path(file).display());
            }
            self.check_test(task).with_context(|| format!("task {name}"))?;
            for method in &self.methods {
                self.parses(task, method, &[])?;
            }
        }
        let some = |what: &str, tasks: &[String], methods: &[String], more: &[String]| {
            for task in tasks {
                let task = self.task(task).with_context(|| what.to_owned())?;
                for method in methods {
                    self.parses(task, self.method(method).with_context(|| what.to_owned())?, more)?;
                }
            }
            Ok::<_, anyhow::Error>(())
        };
        if let Some(f) = &self.few_shot {
            some("few_shot", &f.tasks, &f.methods, &f.options)?;
            ensure!(!f.k.is_empty() && !f.k.contains(&0), "few_shot: k needs numbers of at least 1");
        }
        if let Some(t) = &self.transfer {
            some("transfer", &t.tasks, std::slice::from_ref(&t.method), &t.options)?;
            ensure!(t.k > 0, "transfer: k is 0");
        }
        if let Some(m) = &self.memory {
            some("memory", std::slice::from_ref(&m.task), &m.methods, &[])?;
            ensure!(!m.batch_sizes.contains(&0) && m.length >= 2 && m.steps > 0, "memory: sizes of 0");
        }
        Ok(())
    }

    /// Test rows of a language task: what is wrong with them would else be told after the training.
    fn check_test(&self, task: &Task) -> anyhow::Result<()> {
        let path = self.path(&task.test);
        if matches!(task.kind, Kind::CausalLm | Kind::Seq2Seq) {
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            score::inputs(&bytes).with_context(|| path.display().to_string())?;
        }
        match (&task.generate, task.kind) {
            (None, _) => Ok(()),
            (Some(words), Kind::CausalLm | Kind::Seq2Seq) => generate::check_file(words, &path).context("generate"),
            (Some(_), kind) => bail!("generate: {} has labels, which are not generated", kind.as_str()),
        }
    }

    fn parses(&self, task: &Task, method: &Method, more: &[String]) -> anyhow::Result<()> {
        let words = [self.words(task, method, "x", 0, more), self.validation(task, false)].concat();
        match TrainArgs::of_words(&words) {
            Ok(_) => Ok(()),
            Err(e) => bail!("task {}, method {}: {e}", task.name, method.name),
        }
    }
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_+.".contains(c);
        ensure!(
            !name.is_empty() && name.len() <= 40 && name.chars().all(plain),
            "{what}: {name:?} is not a name of 1 to 40 letters, digits and -_+."
        );
        ensure!(seen.insert(name), "{what}: {name:?} is there twice");
    }
    ensure!(!seen.is_empty(), "{what}: at least one is needed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(change: impl FnOnce(&mut serde_json::Value)) -> anyhow::Result<Plan> {
        let dir = tempfile::tempdir()?;
        for file in ["train.jsonl", "test.jsonl"] {
            fs::write(dir.path().join(file), "{\"text\":\"a\",\"label\":\"b\"}\n")?;
        }
        fs::write(dir.path().join("labels.json"), "[\"b\", \"c,d\"]")?;
        fs::write(dir.path().join("lm.jsonl"), "{\"prompt\":\"a\",\"completion\":\"b\"}\n")?;
        let mut value = serde_json::json!({
            "title": "t",
            "bases": [{"name": "b", "path": "nowhere"}],
            "tasks": [{"name": "t1", "kind": "seq-cls", "train": "train.jsonl", "validation": 0.1, "test": "test.jsonl",
                       "labels": "labels.json", "options": ["--epochs", "2"]},
                      {"name": "t2", "kind": "causal-lm", "train": "lm.jsonl", "test": "lm.jsonl"}],
            "methods": [{"name": "lora", "options": ["--method", "lora", "--epochs", "3"]},
                        {"name": "both", "options": ["--method", "lora", "--method", "bitfit"]}],
            "memory": {"task": "t1", "methods": ["lora"], "batch_sizes": [1], "length": 8}
        });
        change(&mut value);
        let path = dir.path().join("plan.json");
        fs::write(&path, value.to_string())?;
        Plan::read(&path)
    }

    #[test]
    fn later_options_stand_and_repeated_methods_add_up() {
        let plan = plan(|_| {}).unwrap();
        let (task, lora) = (plan.task("t1").unwrap(), plan.method("lora").unwrap());
        let words = plan.words(task, lora, "n", 4, &[]);
        assert_eq!(words.iter().filter(|w| *w == "--epochs").count(), 2);
        let args = format!("{:?}", TrainArgs::of_words(&words).unwrap());
        assert!(args.contains("epochs: Some(3.0)") && args.contains("seed: Some(4)"), "{args}");
        let words = plan.words(task, plan.method("both").unwrap(), "n", 0, &[]);
        let args = format!("{:?}", TrainArgs::of_words(&words).unwrap());
        assert!(args.contains("[Lora, Bitfit]"), "{args}");
        assert_eq!((task.metric(), plan.baseline.as_str(), &plan.seeds[..]), ("accuracy", "full", &[0][..]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(&str, Change); 15] = [
            ("unknown field `base`", |v| v["base"] = 1.into()),
            ("no base is named \"x\"", |v| v["tasks"][0]["bases"] = serde_json::json!(["x"])),
            ("not one of", |v| v["tasks"][0]["metric"] = "bleu".into()),
            ("no file", |v| v["tasks"][0]["test"] = "none.jsonl".into()),
            ("method lora", |v| v["methods"][0]["options"] = serde_json::json!(["--rnak", "8"])),
            ("is there twice", |v| v["methods"][1]["name"] = "lora".into()),
            ("no method is named", |v| v["memory"]["methods"] = serde_json::json!(["full"])),
            ("is not a name", |v| v["methods"][1]["name"] = "../x".into()),
            ("at least one", |v| v["seeds"] = serde_json::json!([])),
            ("seq-cls has labels", |v| v["tasks"][0]["generate"] = serde_json::json!([])),
            ("not one of", |v| v["tasks"][1]["metric"] = "bleu".into()),
            ("generate: error: unexpected argument '--beams'", |v| {
                v["tasks"][1]["generate"] = serde_json::json!(["--beams", "2"]);
            }),
            ("line 1: has neither prompt", |v| {
                v["tasks"][1]["generate"] = serde_json::json!([]);
                v["tasks"][1]["test"] = "test.jsonl".into();
            }),
            ("task t1: read ", |v| v["tasks"][0]["labels"] = "none.json".into()),
            ("a JSON list of names", |v| v["tasks"][0]["labels"] = "train.jsonl".into()),
        ];
        for (part, change) in cases {
            let error = format!("{:#}", plan(change).unwrap_err());
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn continuations_have_figures_of_their_own() {
        let of = |metric: &str| {
            plan(|v| {
                v["tasks"][1]["generate"] = serde_json::json!(["--max-new-tokens", "8"]);
                v["tasks"][1]["metric"] = metric.into();
            })
        };
        for metric in metric::GENERATED {
            let plan = of(metric).unwrap();
            let task = plan.task("t2").unwrap();
            assert_eq!((task.metric(), task.watched()), (metric, "perplexity"));
        }
        let plan = of("loss").unwrap();
        assert_eq!((plan.task("t2").unwrap().watched(), plan.task("t1").unwrap().watched()), ("loss", "accuracy"));
        assert_eq!(plan.task("t1").unwrap().label_names, ["b", "c,d"]);
    }

    #[test]
    fn a_digest_changes_with_options_and_rows() {
        let of = |plan: &Plan, more: &[String]| {
            fs::create_dir_all(&plan.folder).unwrap();
            for file in ["train.jsonl", "test.jsonl"] {
                fs::write(plan.path(file), "{}").unwrap();
            }
            let digest = plan.digest(plan.task("t1").unwrap(), plan.method("lora").unwrap(), more).unwrap();
            fs::remove_dir_all(&plan.folder).unwrap();
            digest
        };
        let one = of(&plan(|_| {}).unwrap(), &[]);
        let other = plan(|v| v["methods"][0]["options"] = serde_json::json!(["--method", "lora"])).unwrap();
        assert_eq!(one, of(&plan(|_| {}).unwrap(), &[]));
        // what is in results.jsonl of plans that others have must go on to name the same runs
        assert_eq!(one, "da37672134bd5b0b");
        let mut generated = plan(|_| {}).unwrap();
        generated.tasks[0].generate = Some(Vec::new());
        assert_ne!(one, of(&generated, &[]));
        assert!(one.len() == 16 && one != of(&other, &[]) && one != of(&plan(|_| {}).unwrap(), &["-x".into()]));
    }
}
