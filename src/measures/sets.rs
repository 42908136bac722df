//! Any number of labels per case: exact match, micro- and macro-averaged F1.

use std::collections::{BTreeMap, BTreeSet};

use super::{f1, ratio};

/// Running counts of gold and predicted sets of labels. A label counts once it is gold or predicted.
#[derive(Debug, Clone)]
pub struct Sets<K> {
    /// Right, claimed, due.
    labels: BTreeMap<K, [u64; 3]>,
    cases: u64,
    right: u64,
}

impl<K> Default for Sets<K> {
    fn default() -> Self {
        Self { labels: BTreeMap::new(), cases: 0, right: 0 }
    }
}

impl<K: Ord + Clone> Sets<K> {
    /// Counts a case.
    pub fn add(&mut self, gold: &BTreeSet<K>, predicted: &BTreeSet<K>) {
        self.cases += 1;
        self.right += u64::from(gold == predicted);
        gold.intersection(predicted).for_each(|l| self.labels.entry(l.clone()).or_default()[0] += 1);
        predicted.iter().for_each(|l| self.labels.entry(l.clone()).or_default()[1] += 1);
        gold.iter().for_each(|l| self.labels.entry(l.clone()).or_default()[2] += 1);
    }

    /// Share of cases whose whole set is right (scikit-learn's `accuracy_score` of label sets).
    pub fn accuracy(&self) -> f64 {
        ratio(self.right, self.cases)
    }

    /// F1 over all labels of all cases (`f1_score(average="micro")`).
    pub fn micro_f1(&self) -> f64 {
        let sum = |place: usize| self.labels.values().map(|c| c[place]).sum::<u64>();
        f1(sum(0), sum(1), sum(2))
    }

    /// F1 averaged over the labels that are gold or predicted somewhere (`f1_score(average="macro")` of these; of an
    /// indicator matrix scikit-learn averages every column, and one that never occurs counts 0 there).
    pub fn macro_f1(&self) -> f64 {
        self.labels.values().map(|c| f1(c[0], c[1], c[2])).sum::<f64>() / self.labels.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_counted_by_hand() {
        let of = |all: &[u8]| all.iter().copied().collect::<BTreeSet<u8>>();
        let mut s = Sets::default();
        s.add(&of(&[0, 1]), &of(&[0, 1]));
        s.add(&of(&[0]), &of(&[0, 2]));
        s.add(&of(&[1]), &of(&[]));
        s.add(&of(&[]), &of(&[]));
        assert_eq!(s.accuracy(), 0.5);
        // right 3, claimed 4, due 4
        assert_eq!(s.micro_f1(), 0.75);
        // label 0: 1; label 1: 2 / 3; label 2: 0
        assert!((s.macro_f1() - (1.0 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
    }
}
