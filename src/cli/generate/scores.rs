//! Scores of a file's continuations where its rows have references.

use serde::Serialize;

use crate::{cli::files, measures::Texts};

/// Names of the figures.
pub(in crate::cli) const FIGURES: [&str; 3] = ["exact_match", "bleu", "rouge_l"];

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

    /// Nothing, if all rows were continued.
    ///
    /// # Errors
    /// How many were not.
    pub(super) fn all_continued(&self) -> anyhow::Result<()> {
        let Self { rows, failed, .. } = self;
        anyhow::ensure!(*failed == 0, "{failed} of {rows} rows failed: their `error` says why");
        Ok(())
    }

    /// Figures by name: shares, but BLEU from 0 to 100; none where no row was scored.
    pub(super) fn figures(&self) -> Vec<(&'static str, f64)> {
        let t = &self.texts;
        let values = [t.exact_match(), t.bleu(), t.rouge_l()];
        if self.scored == 0 { Vec::new() } else { FIGURES.into_iter().zip(values).collect() }
    }

    /// The lines that say them: as JSON, or for people.
    pub(super) fn lines(&self, json: bool) -> anyhow::Result<Vec<String>> {
        let remarks = [(self.failed, "failed"), (self.cut, "ended at the most tokens")];
        let summary = format!("{} rows, {} scored", self.rows, self.scored);
        files::figures(json, self, &summary, &remarks, &self.figures())
    }
}
