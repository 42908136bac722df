//! Finished runs: one JSON line each, so that a study that was stopped goes on where it was.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// What a run was for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "part")]
pub(super) enum Part {
    /// A method on a task.
    Main,
    /// The same with few examples.
    FewShot {
        /// Examples per class.
        k: u32,
    },
    /// The same, started from another task's delta.
    Transfer {
        /// Examples per class.
        k: u32,
        /// The other task; none = from nothing.
        from: Option<String>,
    },
    /// Peak memory.
    Memory {
        /// Rows.
        batch: u32,
        /// Tokens of a row.
        length: u32,
    },
}

impl Part {
    /// The part's name.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::FewShot { .. } => "few_shot",
            Self::Transfer { .. } => "transfer",
            Self::Memory { .. } => "memory",
        }
    }
}

/// What tells runs apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    #[serde(flatten)]
    pub(super) part: Part,
    pub(super) base: String,
    pub(super) task: String,
    pub(super) method: String,
    pub(super) seed: u64,
    /// Of options and rows.
    pub(super) digest: String,
    /// Of labels and of a memory run's steps ([`super::inputs`]); empty in older lines, which do not tell.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) inputs: String,
    /// The base's; empty in older lines, and before a base is loaded that is no folder.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) fingerprint: String,
}

impl Key {
    /// Whether it is the same run as far as both tell: what an older line does not say is taken for the same.
    pub(super) fn is(&self, other: &Self) -> bool {
        let same = |a: &str, b: &str| a.is_empty() || b.is_empty() || a == b;
        let untold = |key: &Self| Self { inputs: String::new(), fingerprint: String::new(), ..key.clone() };
        same(&self.inputs, &other.inputs)
            && same(&self.fingerprint, &other.fingerprint)
            && untold(self) == untold(other)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { part, base, task, method, seed, .. } = self;
        write!(f, "{} {base} {task} {method} seed {seed}", part.name())?;
        match part {
            Part::Main => Ok(()),
            Part::FewShot { k } => write!(f, " k {k}"),
            Part::Transfer { k, from } => write!(f, " k {k} from {}", from.as_deref().unwrap_or("nothing")),
            Part::Memory { batch, length } => write!(f, " batch {batch} x {length}"),
        }
    }
}

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    #[serde(flatten)]
    pub(super) key: Key,
    /// Why there is no figure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// Figures of the test rows, by name.
    #[serde(default)]
    pub(super) figures: serde_json::Map<String, serde_json::Value>,
    /// Numbers that are trained.
    #[serde(default)]
    pub(super) trainable: u64,
    /// Numbers of the base.
    #[serde(default)]
    pub(super) base_parameters: u64,
    #[serde(default)]
    pub(super) steps: u32,
    /// Steps and figures of the validation rows, under the task's metric.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) curve: Vec<(u32, f64)>,
    /// From the job's creation to its end.
    #[serde(default)]
    pub(super) seconds: f64,
    /// Median time of an optimizer step in milliseconds.
    #[serde(default)]
    pub(super) step_ms: f64,
    /// Threads that computed; older lines do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) threads: Option<usize>,
    /// Most bytes beside what the server held before the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) added_bytes: Option<u64>,
}

impl Outcome {
    /// A figure of the test rows.
    pub(super) fn figure(&self, name: &str) -> Option<f64> {
        self.figures.get(name)?.as_f64()
    }
}

/// The file of finished runs.
#[derive(Debug)]
pub(super) struct Results {
    path: PathBuf,
    pub(super) all: Vec<Outcome>,
}

impl Results {
    /// Reads what is there. A last line that was cut off by a stop is left out, and its run is made again.
    ///
    /// # Errors
    /// Files that cannot be read; lines in the middle that are no results.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            fs::write(path, &text[..whole]).with_context(|| format!("write {}", path.display()))?;
        }
        let mut all = Vec::new();
        for (i, line) in text[..whole].lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            all.push(serde_json::from_str(line).with_context(|| format!("{} line {}", path.display(), i + 1))?);
        }
        Ok(Self { path: path.to_owned(), all })
    }

    /// Whether a run has its figures; failed ones are tried again.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.all.iter().any(|o| o.key.is(key) && o.error.is_none())
    }

    /// How many of these runs are there by lines alone that do not tell what they were made of.
    pub(super) fn untold<'k>(&self, keys: impl IntoIterator<Item = &'k Key>) -> usize {
        let told = |o: &Outcome| !o.key.inputs.is_empty() && !o.key.fingerprint.is_empty();
        let made = |key: &&Key| {
            let mut own = self.all.iter().filter(|o| o.key.is(key) && o.error.is_none()).peekable();
            own.peek().is_some() && !own.any(told)
        };
        keys.into_iter().filter(made).count()
    }

    /// Keeps a run, in place of an older one under the same key.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn add(&mut self, outcome: Outcome) -> anyhow::Result<()> {
        let context = || format!("write {}", self.path.display());
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path).with_context(context)?;
        let line = serde_json::to_string(&outcome)? + "\n";
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).with_context(context)?;
        self.all.push(outcome);
        Ok(())
    }

    /// The last outcome of each key, in the order of the first.
    pub(super) fn latest(&self) -> Vec<&Outcome> {
        let mut keys: Vec<&Key> = Vec::new();
        for o in &self.all {
            if !keys.contains(&&o.key) {
                keys.push(&o.key);
            }
        }
        let last = |key: &&Key| self.all.iter().rev().find(|o| o.key == **key);
        keys.iter().filter_map(last).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn outcome(method: &str, error: Option<&str>) -> Outcome {
        let (base, task, digest) = ("b".to_owned(), "t".to_owned(), "d".to_owned());
        Outcome {
            key: Key {
                part: Part::Main,
                base,
                task,
                method: method.into(),
                seed: 0,
                digest,
                inputs: "i".into(),
                fingerprint: "f".into(),
            },
            error: error.map(str::to_owned),
            figures: Default::default(),
            trainable: 1,
            base_parameters: 2,
            steps: 3,
            curve: vec![(1, 0.5)],
            seconds: 1.0,
            step_ms: 2.0,
            threads: Some(2),
            added_bytes: None,
        }
    }

    #[test]
    fn a_study_goes_on_after_a_cut_line_and_tries_failed_runs_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let mut results = Results::open(&path).unwrap();
        results.add(outcome("a", None)).unwrap();
        results.add(outcome("b", Some("why"))).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"part\":\"ma").unwrap();
        let mut again = Results::open(&path).unwrap();
        assert_eq!(again.all, results.all);
        assert!(again.has(&outcome("a", None).key) && !again.has(&outcome("b", None).key));
        again.add(outcome("b", None)).unwrap();
        let again = Results::open(&path).unwrap();
        let latest = again.latest();
        assert_eq!((again.all.len(), latest.len(), &latest[1].error), (3, 2, &None));
        fs::write(&path, "nonsense\n{}\n").unwrap();
        let old = serde_json::to_string(&outcome("a", None)).unwrap().replace(",\"threads\":2", "");
        assert_eq!(serde_json::from_str::<Outcome>(&old).unwrap(), Outcome { threads: None, ..outcome("a", None) });
        assert!(format!("{:#}", Results::open(&path).unwrap_err()).contains("results.jsonl line 1"));
    }

    #[test]
    fn a_line_that_tells_other_labels_or_another_base_is_another_run_and_an_older_line_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let new = outcome("a", None);
        let mut old = serde_json::to_value(&new).unwrap();
        let fields = old.as_object_mut().unwrap();
        assert!(fields.remove("inputs").is_some() && fields.remove("fingerprint").is_some());
        fs::write(&path, old.to_string() + "\n").unwrap();
        let mut results = Results::open(&path).unwrap();
        assert_eq!((results.all[0].key.inputs.as_str(), results.all[0].key.fingerprint.as_str()), ("", ""));
        assert!(results.has(&new.key), "it does not tell, and is the same otherwise");
        assert_eq!((results.untold([&new.key]), results.untold([&outcome("b", None).key])), (1, 0));
        results.add(new.clone()).unwrap();
        let results = Results { all: vec![results.all.pop().unwrap()], ..results };
        let with = |inputs: &str, fingerprint: &str| Key {
            inputs: inputs.into(),
            fingerprint: fingerprint.into(),
            ..new.key.clone()
        };
        assert!(results.has(&with("i", "f")) && results.has(&with("i", "")));
        assert!(!results.has(&with("other labels", "f")) && !results.has(&with("i", "other tensors")));
        assert_eq!(results.untold([&new.key]), 0);
    }

    #[test]
    fn parts_read_back() {
        let parts = [
            Part::FewShot { k: 3 },
            Part::Transfer { k: 1, from: None },
            Part::Transfer { k: 1, from: Some("x".into()) },
            Part::Memory { batch: 8, length: 64 },
        ];
        for part in parts {
            let one = Outcome { key: Key { part, ..outcome("a", None).key }, ..outcome("a", None) };
            assert_eq!(serde_json::from_str::<Outcome>(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        }
    }
}
