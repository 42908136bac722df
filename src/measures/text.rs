//! Generated texts against references: exact match, BLEU and ROUGE-L.

mod bleu;
mod rouge;

pub use bleu::Bleu;
pub use rouge::rouge_l;

use super::ratio;

/// Running scores of generated texts, each against one or more references.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    cases: u64,
    exact: u64,
    bleu: Bleu,
    /// Sum of the cases' ROUGE-L.
    rouge: f64,
}

impl Texts {
    /// Counts a case. Without references nothing is counted.
    pub fn add<S: AsRef<str>>(&mut self, generated: &str, references: &[S]) {
        if references.is_empty() {
            return;
        }
        self.cases += 1;
        self.exact += u64::from(references.iter().any(|r| exact_match(generated, r.as_ref())));
        self.bleu.add(generated, references);
        self.rouge += rouge_l(generated, references);
    }

    /// Cases counted.
    pub fn cases(&self) -> u64 {
        self.cases
    }

    /// Share of texts that are one of their references, white space at both ends aside.
    pub fn exact_match(&self) -> f64 {
        ratio(self.exact, self.cases)
    }

    /// Corpus BLEU, 0 to 100 (see [`Bleu`]).
    pub fn bleu(&self) -> f64 {
        self.bleu.score()
    }

    /// Mean of the cases' ROUGE-L, 0 to 1 (see [`rouge_l`]).
    pub fn rouge_l(&self) -> f64 {
        if self.cases == 0 { 0.0 } else { self.rouge / self.cases as f64 }
    }
}

/// Whether two texts are the same but for white space at their ends.
fn exact_match(generated: &str, reference: &str) -> bool {
    generated.trim() == reference.trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores that the packages sacrebleu and rouge-score gave for these texts (`tests/golden/make_text_scores.py`).
    #[derive(serde::Deserialize)]
    struct Recorded {
        name: String,
        hypotheses: Vec<String>,
        references: Vec<Vec<String>>,
        bleu: f64,
        rouge_l: Vec<f64>,
    }

    #[test]
    fn scores_are_those_of_sacrebleu_and_rouge_score() {
        let recorded: Vec<Recorded> =
            serde_json::from_str(include_str!("../../tests/golden/text_scores.json")).expect("the recorded scores");
        assert!(recorded.len() > 20);
        for case in recorded {
            let mut texts = Texts::default();
            for ((hypothesis, references), expected) in case.hypotheses.iter().zip(&case.references).zip(&case.rouge_l)
            {
                texts.add(hypothesis, references);
                let rouge = rouge_l(hypothesis, references);
                assert!(
                    (rouge - expected).abs() < 1e-9,
                    "{}: ROUGE-L of {hypothesis:?}: {rouge}, not {expected}",
                    case.name
                );
            }
            let (bleu, mean) = (texts.bleu(), case.rouge_l.iter().sum::<f64>() / case.rouge_l.len() as f64);
            assert!((bleu - case.bleu).abs() < 1e-9, "{}: BLEU {bleu}, not {}", case.name, case.bleu);
            assert!((texts.rouge_l() - mean).abs() < 1e-9, "{}", case.name);
        }
    }

    #[test]
    fn an_exact_match_is_any_reference_but_for_white_space_at_the_ends() {
        let mut texts = Texts::default();
        texts.add(" a cat\n", &["the cat", "a cat"]);
        texts.add("A cat", &["a cat"]);
        texts.add("a  cat", &["a cat"]);
        texts.add("not counted", &[] as &[&str]);
        assert_eq!((texts.cases(), texts.exact_match()), (3, 1.0 / 3.0));
        let none = Texts::default();
        assert_eq!((none.exact_match(), none.bleu(), none.rouge_l()), (0.0, 0.0, 0.0));
    }
}
