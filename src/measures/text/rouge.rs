//! ROUGE-L (Lin 2004) of one text, as the package rouge-score has it.

use std::collections::HashMap;

/// F-measure of the longest common subsequence of words, against the reference where it is best: 0 to 1. Words are runs of
/// `a-z` and `0-9` of the text in lower case, without stemming; a text without any has 0.
pub fn rouge_l<S: AsRef<str>>(generated: &str, references: &[S]) -> f64 {
    let generated = Words::of(generated);
    references.iter().map(|r| f_measure(&generated.all(), &Words::of(r.as_ref()).all())).fold(0.0, f64::max)
}

/// A text in lower case.
struct Words(String);

impl Words {
    fn of(text: &str) -> Self {
        Self(text.to_lowercase())
    }

    fn all(&self) -> Vec<&str> {
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        self.0.split(|c| !word(c)).filter(|w| !w.is_empty()).collect()
    }
}

fn f_measure(generated: &[&str], reference: &[&str]) -> f64 {
    let common = common(generated, reference) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / generated.len() as f64, common / reference.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Length of the longest common subsequence, by rows of the usual table. Words are compared as numbers; one that `b` does not
/// have changes no row.
fn common(a: &[&str], b: &[&str]) -> usize {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let b: Vec<usize> = b
        .iter()
        .map(|word| {
            let next = numbers.len();
            *numbers.entry(word).or_insert(next)
        })
        .collect();
    let mut row = vec![0; b.len() + 1];
    for word in a.iter().filter_map(|word| numbers.get(word)) {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of Lin (2004), section 3.1: S2 = "police kill the gunman" scores 3/4, S3 = "the gunman kill police" 2/4.
    #[test]
    fn common_words_count_in_order() {
        let reference = ["police killed the gunman"];
        assert_eq!(rouge_l("Police kill the gunman!", &reference), 0.75);
        assert_eq!(rouge_l("the gunman kill police", &reference), 0.5);
        // words that come again, and words between them that the other does not have
        assert_eq!(common(&["a", "x", "b", "a", "y", "b"], &["b", "a", "b", "a", "b"]), 4);
        assert_eq!(
            (rouge_l("", &[""]), rouge_l("\u{e9}\u{4f60}", &["\u{e9}"]), rouge_l("a", &[] as &[&str])),
            (0.0, 0.0, 0.0)
        );
    }
}
