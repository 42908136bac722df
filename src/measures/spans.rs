//! Spans of tagged words (named entities): which there are, and micro-averaged precision, recall and F1.

use std::collections::{BTreeMap, BTreeSet};

use super::{f1, ratio};

/// A span: its kind, its first word, its last word.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// `person` of `B-person`; `_` where the tag has none.
    pub kind: String,
    /// First word, from 0.
    pub first: usize,
    /// Last word.
    pub last: usize,
}

/// Whether tags mark spans at all: one begins with `B-` or `I-`.
pub fn has_spans<S: AsRef<str>>(tags: &[S]) -> bool {
    tags.iter().any(|t| t.as_ref().starts_with("B-") || t.as_ref().starts_with("I-"))
}

/// The spans of one text's tags by seqeval's default rules (those of conlleval): `B` begins a span, and so does an `I`
/// that follows `O` or another kind; `E` and `S` are known, too.
pub fn spans<S: AsRef<str>>(tags: &[S]) -> Vec<Span> {
    let mut out = Vec::new();
    let (mut first, mut before) = (0, ('O', "_"));
    for (i, tag) in tags.iter().map(AsRef::as_ref).chain(["O"]).enumerate() {
        let now = split(tag);
        if ends(before, now) {
            out.push(Span { kind: before.1.to_owned(), first, last: i.saturating_sub(1) });
        }
        if begins(before, now) {
            first = i;
        }
        before = now;
    }
    out
}

/// `B-creative-work` -> (`B`, `creative-work`); a bare `B` or `O` has the kind `_`.
fn split(tag: &str) -> (char, &str) {
    let mut chars = tag.chars();
    let prefix = chars.next().unwrap_or('O');
    let rest = chars.as_str();
    let kind = rest.split_once('-').map_or(rest, |(_, kind)| kind);
    (prefix, if kind.is_empty() { "_" } else { kind })
}

fn ends((before, kind): (char, &str), (now, next): (char, &str)) -> bool {
    match before {
        'E' | 'S' => true,
        'B' | 'I' if matches!(now, 'B' | 'S' | 'O') => true,
        'O' | '.' => false,
        _ => kind != next,
    }
}

fn begins((before, kind): (char, &str), (now, next): (char, &str)) -> bool {
    match (before, now) {
        (_, 'B' | 'S') | ('E' | 'S' | 'O', 'E' | 'I') => true,
        (_, 'O' | '.') => false,
        _ => kind != next,
    }
}

/// Running counts of gold and predicted spans.
#[derive(Debug, Clone, Default)]
pub struct Spans {
    /// By kind: right, claimed, due.
    kinds: BTreeMap<String, [u64; 3]>,
}

impl Spans {
    /// Counts one text.
    pub fn add<S: AsRef<str>, T: AsRef<str>>(&mut self, gold: &[S], predicted: &[T]) {
        let due: BTreeSet<Span> = spans(gold).into_iter().collect();
        let claimed: BTreeSet<Span> = spans(predicted).into_iter().collect();
        for (set, place) in [(&claimed, 1), (&due, 2)] {
            set.iter().for_each(|s| self.kinds.entry(s.kind.clone()).or_default()[place] += 1);
        }
        due.intersection(&claimed).for_each(|s| self.kinds.entry(s.kind.clone()).or_default()[0] += 1);
    }

    /// Precision, recall and F1 over all spans (`average="micro"`); 0 where nothing was claimed or due.
    pub fn micro(&self) -> [f64; 3] {
        let sum = |place: usize| self.kinds.values().map(|c| c[place]).sum::<u64>();
        figures([sum(0), sum(1), sum(2)])
    }

    /// By kind, in order: precision, recall, F1 and gold spans.
    pub fn by_kind(&self) -> impl Iterator<Item = (&str, [f64; 3], u64)> {
        self.kinds.iter().map(|(kind, counts)| (kind.as_str(), figures(*counts), counts[2]))
    }
}

fn figures([right, claimed, due]: [u64; 3]) -> [f64; 3] {
    [ratio(right, claimed), ratio(right, due), f1(right, claimed, due)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tags: &[&str]) -> Vec<(String, usize, usize)> {
        spans(tags).into_iter().map(|s| (s.kind, s.first, s.last)).collect()
    }

    fn span(kind: &str, first: usize, last: usize) -> (String, usize, usize) {
        (kind.to_owned(), first, last)
    }

    /// `get_entities(["B-PER", "I-PER", "O", "B-LOC"])` of seqeval's documentation, and the lenient cases of conlleval.
    #[test]
    fn spans_are_those_of_seqeval() {
        assert_eq!(found(&["B-PER", "I-PER", "O", "B-LOC"]), [span("PER", 0, 1), span("LOC", 3, 3)]);
        assert_eq!(found(&["O", "I-PER", "I-PER"]), [span("PER", 1, 2)], "an I without a B begins one");
        assert_eq!(found(&["B-PER", "I-LOC"]), [span("PER", 0, 0), span("LOC", 1, 1)], "another kind begins one");
        assert_eq!(found(&["B-PER", "B-PER"]), [span("PER", 0, 0), span("PER", 1, 1)]);
        assert_eq!(found(&["B-creative-work", "I-creative-work"]), [span("creative-work", 0, 1)]);
        assert_eq!(found(&["S-X", "B-Y", "E-Y", "O"]), [span("X", 0, 0), span("Y", 1, 2)]);
        assert_eq!(found(&["B", "I", "O"]), [span("_", 0, 1)]);
        assert!(found(&["O", "O"]).is_empty() && found(&[]).is_empty());
    }

    /// seqeval's documentation of `f1_score`: a MISC span missed by one word, a PER span right: 0.5.
    #[test]
    fn a_span_counts_when_kind_and_borders_are_right() {
        let mut s = Spans::default();
        s.add(
            &["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"],
            &["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"],
        );
        s.add(&["B-PER", "I-PER", "O"], &["B-PER", "I-PER", "O"]);
        assert_eq!(s.micro(), [0.5, 0.5, 0.5]);
        let kinds: Vec<_> = s.by_kind().collect();
        assert_eq!(kinds, [("MISC", [0.0, 0.0, 0.0], 1), ("PER", [1.0, 1.0, 1.0], 1)]);
        let mut none = Spans::default();
        none.add(&["O"], &["O"]);
        assert_eq!(none.micro(), [0.0, 0.0, 0.0]);
    }

    #[test]
    fn tags_without_prefixes_mark_no_spans() {
        assert!(has_spans(&["O", "B-PER"]) && has_spans(&["I-X"]));
        assert!(!has_spans(&["NOUN", "VERB", "Bar"]) && !has_spans::<&str>(&[]));
    }
}
