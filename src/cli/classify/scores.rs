//! Scores of a classified file where its rows have gold.

use serde::Serialize;

use crate::{
    cli::files,
    measures::{Classes, Sets, Spans, Values, has_spans},
};

use super::rows::Gold;
use crate::delta::Problem;

/// Figures of a file, as `--json` prints them.
#[derive(Debug, Default, Serialize)]
pub(super) struct Scores {
    /// Rows written.
    pub(super) rows: u64,
    /// Rows with gold.
    pub(super) scored: u64,
    /// Rows cut to the base's context.
    pub(super) cut: u64,
    /// Rows without anything to read.
    pub(super) empty: u64,
    #[serde(skip)]
    classes: Classes<String>,
    #[serde(skip)]
    sets: Sets<String>,
    #[serde(skip)]
    values: Values,
    /// What the gold is.
    #[serde(skip)]
    problem: Problem,
    #[serde(skip)]
    spans: Spans,
    /// Whether gold or predictions mark spans.
    #[serde(skip)]
    has_spans: bool,
}

impl Scores {
    /// Counts a row's gold and what was predicted: one label, or one per word.
    pub(super) fn add(&mut self, gold: &Gold, predicted: &[String]) {
        self.scored += 1;
        match gold {
            Gold::Set(labels) => {
                self.problem = Problem::MultiLabel;
                self.sets.add(&labels.iter().cloned().collect(), &predicted.iter().cloned().collect());
            }
            // a text without anything to read has no value, and cannot be scored
            Gold::Value(gold) => {
                self.problem = Problem::Regression;
                match predicted.first().and_then(|p| p.parse().ok()) {
                    Some(predicted) => self.values.add(*gold, predicted),
                    None => self.scored -= 1,
                }
            }
            Gold::Label(label) => self.classes.add(label.clone(), predicted.first().cloned()),
            Gold::Tags(tags) => {
                self.has_spans |= has_spans(tags) || has_spans(predicted);
                self.spans.add(tags, predicted);
                for (i, tag) in tags.iter().enumerate() {
                    self.classes.add(tag.clone(), predicted.get(i).cloned());
                }
            }
        }
    }

    /// Figures by name, the most telling last; none where no row has gold.
    pub(super) fn figures(&self) -> Vec<(&'static str, f64)> {
        if self.scored == 0 {
            return Vec::new();
        }
        match self.problem {
            Problem::SingleLabel => {}
            Problem::MultiLabel => {
                let s = &self.sets;
                return vec![("accuracy", s.accuracy()), ("macro_f1", s.macro_f1()), ("micro_f1", s.micro_f1())];
            }
            Problem::Regression => {
                let v = &self.values;
                return vec![("mae", v.mae()), ("pearson", v.pearson()), ("mse", v.mse())];
            }
        }
        let c = &self.classes;
        let mut all = vec![("accuracy", c.accuracy())];
        if self.has_spans {
            let [precision, recall, f1] = self.spans.micro();
            all.extend([("span_precision", precision), ("span_recall", recall), ("span_f1", f1)]);
        } else {
            all.extend([("macro_recall", c.macro_recall()), ("mcc", c.mcc()), ("macro_f1", c.macro_f1())]);
        }
        all
    }

    /// The lines that say them: as JSON, or for people.
    pub(super) fn lines(&self, json: bool) -> anyhow::Result<Vec<String>> {
        let remarks = [(self.cut, "cut to the base's context"), (self.empty, "with nothing to read")];
        let summary = format!("{} rows, {} with gold", self.rows, self.scored);
        let mut lines = files::figures(json, self, &summary, &remarks, &self.figures())?;
        if json || self.scored == 0 || self.problem != Problem::SingleLabel {
            return Ok(lines);
        }
        lines.push(format!("{:<24} {:>9} {:>9} {:>9} {:>8}", "LABEL", "PRECISION", "RECALL", "F1", "GOLD"));
        let line =
            |label: &str, [p, r, f]: [f64; 3], due: u64| format!("{label:<24} {p:>9.4} {r:>9.4} {f:>9.4} {due:>8}");
        if self.has_spans {
            lines.extend(self.spans.by_kind().map(|(kind, figures, due)| line(kind, figures, due)));
        } else {
            lines.extend(self.classes.by_label().map(|(label, figures, due)| line(label, figures, due)));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(all: &[&str]) -> Vec<String> {
        all.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn texts_are_scored_by_label_and_words_by_span() {
        let mut s = Scores::default();
        s.add(&Gold::Label("a".into()), &strings(&["a"]));
        s.add(&Gold::Label("b".into()), &[]);
        let figures: Vec<_> = s.figures();
        assert_eq!((figures[0], figures[3]), (("accuracy", 0.5), ("macro_f1", 0.5)));
        let mut s = Scores::default();
        s.add(&Gold::Tags(strings(&["B-x", "I-x", "O"])), &strings(&["B-x", "I-x", "B-y"]));
        s.add(&Gold::Tags(vec![]), &[]);
        assert_eq!(s.figures().last(), Some(&("span_f1", 2.0 / 3.0)));
        let mut s = Scores::default();
        s.add(&Gold::Set(strings(&["a", "b"])), &strings(&["b", "a"]));
        s.add(&Gold::Set(vec![]), &strings(&["a"]));
        assert_eq!(s.figures(), [("accuracy", 0.5), ("macro_f1", (2.0 / 3.0 + 1.0) / 2.0), ("micro_f1", 0.8)]);
        let mut s = Scores::default();
        s.add(&Gold::Value(1.0), &strings(&["3"]));
        s.add(&Gold::Value(1.0), &[]);
        assert_eq!((s.scored, s.figures()[2]), (1, ("mse", 4.0)));
        let mut pos = Scores::default();
        pos.add(&Gold::Tags(strings(&["NOUN", "VERB"])), &strings(&["NOUN", "NOUN"]));
        assert_eq!(pos.figures().last().map(|f| f.0), Some("macro_f1"));
    }
}
