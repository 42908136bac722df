//! BLEU (Papineni et al. 2002) over a corpus, with sacrebleu's defaults.

use std::collections::HashMap;

/// Longest n-grams counted.
const ORDER: usize = 4;

/// Counts of a corpus. Conventions are those of sacrebleu's `corpus_bleu`: tokens of mteval-v13a, case kept; a case's
/// n-grams are clipped by the most that one of its references has, its reference length is the closest one (the shorter of
/// two); orders without a match are smoothed exponentially (1/2, 1/4, ... of a match); all four orders always count, so a
/// corpus without any 4-gram has the score 0.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bleu {
    right: [u64; ORDER],
    claimed: [u64; ORDER],
    generated: u64,
    reference: u64,
}

impl Bleu {
    /// Counts a case. Without references nothing is counted.
    pub fn add<S: AsRef<str>>(&mut self, generated: &str, references: &[S]) {
        let generated = tokens(generated);
        let references: Vec<Vec<String>> = references.iter().map(|r| tokens(r.as_ref())).collect();
        let lens = references.iter().map(Vec::len);
        let Some(len) = lens.min_by_key(|&len| (len.abs_diff(generated.len()), len)) else { return };
        self.generated += generated.len() as u64;
        self.reference += len as u64;
        for order in 1..=ORDER {
            let mut due: HashMap<&[String], u64> = HashMap::new();
            for reference in &references {
                for (gram, count) in grams(reference, order) {
                    let most = due.entry(gram).or_default();
                    *most = count.max(*most);
                }
            }
            for (gram, count) in grams(&generated, order) {
                self.claimed[order - 1] += count;
                self.right[order - 1] += count.min(due.get(gram).copied().unwrap_or(0));
            }
        }
    }

    /// The score, 0 to 100.
    pub fn score(&self) -> f64 {
        if self.right == [0; ORDER] || self.claimed.contains(&0) {
            return 0.0;
        }
        let (mut smooth, mut logs) = (1.0, 0.0);
        for (&right, &claimed) in self.right.iter().zip(&self.claimed) {
            let right = if right == 0 {
                smooth *= 0.5;
                smooth
            } else {
                right as f64
            };
            logs += (100.0 * right / claimed as f64).ln();
        }
        let short = 1.0 - self.reference as f64 / self.generated as f64;
        short.min(0.0).exp() * (logs / ORDER as f64).exp()
    }
}

fn grams(tokens: &[String], order: usize) -> HashMap<&[String], u64> {
    let mut counts = HashMap::new();
    tokens.windows(order).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// Tokens of mteval-v13a as sacrebleu's tokenizer `13a` has them.
fn tokens(text: &str) -> Vec<String> {
    let text = text.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    let mut spaced: Vec<char> = Vec::with_capacity(text.len() + 2);
    spaced.push(' ');
    for c in text.chars() {
        if is_symbol(c) { spaced.extend([' ', c, ' ']) } else { spaced.push(c) }
    }
    spaced.push(' ');
    let digit = |c: char| c.is_ascii_digit();
    let point = |c: char| matches!(c, '.' | ',');
    let spaced = pairs(&spaced, |a, b| (!digit(a) && point(b)).then_some([a, ' ', b, ' ']));
    let spaced = pairs(&spaced, |a, b| (point(a) && !digit(b)).then_some([' ', a, ' ', b]));
    let spaced = pairs(&spaced, |a, b| (digit(a) && b == '-').then_some([a, ' ', b, ' ']));
    spaced.split(|&c| is_space(c)).filter(|word| !word.is_empty()).map(|word| word.iter().collect()).collect()
}

/// What always stands alone: ASCII punctuation but the apostrophe, the comma, the hyphen and the full stop.
fn is_symbol(c: char) -> bool {
    c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.')
}

/// White space as Python's `str.split` has it: Unicode's, and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Puts four characters in the place of pairs from left to right; pairs do not overlap.
fn pairs(text: &[char], place: impl Fn(char, char) -> Option<[char; 4]>) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 4);
    let mut at = 0;
    while at < text.len() {
        let placed = text.get(at + 1).and_then(|&next| place(text[at], next));
        match placed {
            Some(four) => out.extend(four),
            None => out.push(text[at]),
        }
        at += if placed.is_some() { 2 } else { 1 };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_hyphens_are_split_where_numbers_let_them() {
        let words = |text| tokens(text).join(" ");
        assert_eq!(words("It's 1,000.5 (or 3-4), state-of-the-art."), "It's 1,000.5 ( or 3 - 4 ) , state-of-the-art .");
        assert_eq!(words("a&quot;b&amp;lt; <skipped>over-\nlap\u{1c}x"), "a \" b < overlap x");
        assert_eq!(words("..a...  "), ". . a . . .");
    }

    #[test]
    fn a_corpus_without_references_or_long_n_grams_scores_nothing() {
        let mut bleu = Bleu::default();
        bleu.add("a b c d", &[] as &[&str]);
        assert_eq!((bleu.score(), bleu.generated), (0.0, 0));
        bleu.add("a b c", &["a b c"]);
        assert_eq!(bleu.score(), 0.0, "there is no 4-gram");
        bleu.add("a b c d", &["a b c d"]);
        assert!((bleu.score() - 100.0).abs() < 1e-12);
    }
}
