//! Scores of a file's continuations where its rows have references.

use serde::Serialize;

use crate::{cli::output, measures::Texts};

/// Figures of a file, as `--json` prints them.
#[derive(Debug, Default, Serialize)]
pub(super) struct Scores {
    /// Rows written.
    pub(super) rows: u64,
    /// Rows that the server refused or failed; they are not scored.
    pub(super) failed: u64,
    /// Rows with references that were continued.
    pub(super) scored: u64,
    /// Rows that ended at the most tokens.
    pub(super) cut: u64,
    #[serde(skip)]
    texts: Texts,
}

impl Scores {
    /// Counts a continuation against its row's references, if it has any.
    pub(super) fn add(&mut self, generated: &str, references: &[String]) {
        self.texts.add(generated, references);
        self.scored = self.texts.cases();
    }

    /// Figures by name: shares, but BLEU from 0 to 100.
    fn figures(&self) -> [(&'static str, f64); 3] {
        let t = &self.texts;
        [("exact_match", t.exact_match()), ("bleu", t.bleu()), ("rouge_l", t.rouge_l())]
    }

    /// Prints them: as JSON, or for people; to standard error where standard output has the rows.
    pub(super) fn print(&self, json: bool, to_stderr: bool) -> anyhow::Result<()> {
        let say = |text: &str| {
            if to_stderr {
                output::note(text);
                Ok(())
            } else {
                output::line(text)
            }
        };
        if json {
            let mut value = serde_json::to_value(self)?;
            if let (Some(object), true) = (value.as_object_mut(), self.scored > 0) {
                self.figures().into_iter().for_each(|(name, x)| drop(object.insert(name.to_owned(), x.into())));
            }
            return say(&value.to_string());
        }
        let notes = [(self.failed, "failed"), (self.cut, "ended at the most tokens")];
        let notes: String = notes.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!(", {n} {what}")).collect();
        say(&format!("{} rows, {} scored{notes}", self.rows, self.scored))?;
        if self.scored == 0 {
            return Ok(());
        }
        self.figures().iter().try_for_each(|(name, x)| say(&format!("{name:<16} {x:.4}")))
    }
}
