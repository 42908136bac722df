//! One label per case: accuracy, macro averages, Matthews correlation.

use std::collections::BTreeMap;

use super::{f1, ratio};

/// Counts of one label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    /// Predicted and right.
    right: u64,
    /// Predicted.
    claimed: u64,
    /// Gold.
    due: u64,
}

/// Running counts of gold and predicted labels. A label counts once it is gold or predicted (as scikit-learn without
/// `labels`); a quotient without cases is 0 (`zero_division=0`).
#[derive(Debug, Clone)]
pub struct Classes<K> {
    labels: BTreeMap<K, Counts>,
    cases: u64,
}

impl<K> Default for Classes<K> {
    fn default() -> Self {
        Self { labels: BTreeMap::new(), cases: 0 }
    }
}

impl<K: Ord> Classes<K> {
    /// Counts a case; without a prediction it is wrong.
    pub fn add(&mut self, gold: K, predicted: Option<K>) {
        self.cases += 1;
        let right = predicted.as_ref() == Some(&gold);
        let due = self.labels.entry(gold).or_default();
        due.due += 1;
        due.right += u64::from(right);
        if let Some(predicted) = predicted {
            self.labels.entry(predicted).or_default().claimed += 1;
        }
    }

    /// Cases counted.
    pub fn cases(&self) -> u64 {
        self.cases
    }

    /// Share of right predictions.
    pub fn accuracy(&self) -> f64 {
        ratio(self.labels.values().map(|c| c.right).sum(), self.cases)
    }

    /// F1 averaged over the labels (`f1_score(average="macro")`).
    pub fn macro_f1(&self) -> f64 {
        self.mean(|c| f1(c.right, c.claimed, c.due))
    }

    /// Recall averaged over the labels (`recall_score(average="macro")`).
    pub fn macro_recall(&self) -> f64 {
        self.mean(|c| ratio(c.right, c.due))
    }

    /// Matthews correlation of any number of labels (`matthews_corrcoef`; Gorodkin 2004): in [-1, 1], 0 where either
    /// side has one label only.
    pub fn mcc(&self) -> f64 {
        let n = self.cases as f64;
        let sum = |of: fn(&Counts) -> f64| self.labels.values().map(of).sum::<f64>();
        let right = sum(|c| c.right as f64);
        let both = sum(|c| c.claimed as f64 * c.due as f64);
        let claimed = n * n - sum(|c| (c.claimed as f64).powi(2));
        let due = n * n - sum(|c| (c.due as f64).powi(2));
        let scale = (claimed * due).sqrt();
        if scale > 0.0 { (right * n - both) / scale } else { 0.0 }
    }

    /// By label, in order: precision, recall, F1 and gold cases.
    pub fn by_label(&self) -> impl Iterator<Item = (&K, [f64; 3], u64)> {
        self.labels.iter().map(|(label, c)| {
            (label, [ratio(c.right, c.claimed), ratio(c.right, c.due), f1(c.right, c.claimed, c.due)], c.due)
        })
    }

    fn mean(&self, of: impl Fn(&Counts) -> f64) -> f64 {
        self.labels.values().map(of).sum::<f64>() / self.labels.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(cases: &[(u8, u8)]) -> Classes<u8> {
        let mut all = Classes::default();
        cases.iter().for_each(|(gold, guess)| all.add(*gold, Some(*guess)));
        all
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    /// The example of scikit-learn's documentation of `f1_score`: macro F1 0.26666..., accuracy 1/3.
    #[test]
    fn three_labels_as_scikit_learn_counts_them() {
        let c = of(&[(0, 0), (1, 2), (2, 1), (0, 0), (1, 0), (2, 1)]);
        near(c.accuracy(), 1.0 / 3.0);
        near(c.macro_f1(), 0.8 / 3.0);
        near(c.macro_recall(), 1.0 / 3.0);
        // c = 2, s = 6, sum p t = 3*2 + 2*2 + 1*2 = 12; (2*6 - 12) = 0
        near(c.mcc(), 0.0);
    }

    /// The example of scikit-learn's documentation of `matthews_corrcoef`: gold + + + -, predicted + - + +: -1/3.
    #[test]
    fn two_labels_as_scikit_learn_correlates_them() {
        near(of(&[(1, 1), (1, 0), (1, 1), (0, 1)]).mcc(), -1.0 / 3.0);
        near(of(&[(0, 0), (1, 1), (2, 2)]).mcc(), 1.0);
        near(of(&[(0, 1), (1, 1)]).mcc(), 0.0);
    }

    #[test]
    fn only_labels_that_occur_are_averaged_and_a_missing_prediction_is_wrong() {
        let mut c = of(&[(3, 3), (3, 3)]);
        near(c.macro_f1(), 1.0);
        c.add(3, None);
        near(c.accuracy(), 2.0 / 3.0);
        near(c.macro_f1(), 0.8); // precision 1, recall 2/3
        assert_eq!(c.by_label().next(), Some((&3, [1.0, 2.0 / 3.0, 0.8], 3)));
        near(Classes::<u8>::default().macro_f1() + Classes::<u8>::default().mcc(), 0.0);
    }
}
