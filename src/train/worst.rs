//! The examples with the highest losses. What a model has learned and still finds unlikely is where data is wrong more often
//! than elsewhere: a false label, a text that was cut or mixed up, one of a kind.

use std::sync::Arc;

use candle_core::{D, Result};

use super::{
    encode::{Encoded, Target},
    objective::Losses,
};
use crate::admission::train_params::WorstExample;

/// Most characters of an excerpt on either side of where the learned part begins.
const EXCERPT: usize = 160;

type DecodeFn = dyn Fn(&[u32]) -> String + Send + Sync;

/// Ids -> text, special tokens left out; the empty text where the run has no tokenizer.
#[derive(Clone, Default)]
pub struct Decoder(Option<Arc<DecodeFn>>);

impl Decoder {
    /// Decodes by this function.
    pub fn new(decode: impl Fn(&[u32]) -> String + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(decode)))
    }

    pub(super) fn text(&self, ids: &[u32]) -> String {
        self.0.as_ref().map_or_else(String::new, |decode| decode(ids))
    }

    /// An example for people: all of it where it is short, else the end of what is read and the beginning of what is
    /// learned (of a plain text or a classified one: its beginning).
    fn excerpt(&self, example: &Encoded) -> String {
        // a token without a character of its own is rare: some more than are shown are enough
        let most = 2 * EXCERPT;
        let learned = example.learned().iter().position(|learn| *learn).filter(|at| *at > 1).unwrap_or(0);
        let (before, after) = example.tokens.split_at(learned);
        let read = if example.source.is_empty() { before } else { &example.source };
        let read_text = self.text(&read[read.len().saturating_sub(most)..]);
        let after_text = self.text(&after[..after.len().min(most)]);
        let skipped = read_text.chars().count().saturating_sub(EXCERPT);
        let dots = |cut: bool| if cut { "..." } else { "" };
        let shown: String = read_text.chars().skip(skipped).collect();
        let room = if read.is_empty() { 2 * EXCERPT } else { EXCERPT };
        let learned: String = after_text.chars().take(room).collect();
        let arrow = if example.source.is_empty() { "" } else { " => " };
        let (cut_before, cut_after) =
            (read.len() > most || skipped > 0, learned.len() < after_text.len() || after.len() > most);
        format!("{}{shown}{arrow}{learned}{}", dots(cut_before), dots(cut_after))
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Decoder({})", if self.0.is_some() { "a tokenizer" } else { "none" })
    }
}

/// An example with its loss.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Found {
    loss: f64,
    index: usize,
    line: u64,
    /// The likeliest label, where one is predicted.
    guess: Option<u32>,
}

/// A loss that is no number is the worst of all, whatever its sign bit.
fn rank(loss: f64) -> f64 {
    if loss.is_nan() { f64::INFINITY } else { loss }
}

/// The worst so far, one per line of the file, worst first.
#[derive(Debug, Default)]
pub struct Worst {
    most: usize,
    found: Vec<Found>,
}

impl Worst {
    /// Keeps this many; 0 = none.
    pub fn new(most: usize) -> Self {
        Self { most, found: Vec::new() }
    }

    /// Looks at a micro-batch: the indices of its examples, and their losses as [`super::objective::losses`] gives them.
    /// An example's loss is the mean over its supervised tokens or words.
    ///
    /// # Errors
    /// The device.
    pub fn add(&mut self, batch: &[usize], examples: &[&Encoded], losses: &Losses) -> Result<()> {
        if self.most == 0 {
            return Ok(());
        }
        let each = losses.each.to_vec1::<f32>()?;
        let guesses = match &losses.logits {
            Some(logits) if losses.targets.is_empty() && losses.words.is_empty() => {
                logits.argmax(D::Minus1)?.to_vec1::<u32>()?
            }
            _ => Vec::new(),
        };
        let mut rest = each.as_slice();
        for (i, (&index, example)) in batch.iter().zip(examples).enumerate() {
            let (own, others) = rest.split_at(example.weight().min(rest.len()));
            rest = others;
            let loss = own.iter().map(|l| f64::from(*l)).sum::<f64>() / own.len().max(1) as f64;
            self.put(Found { loss, index, line: example.line, guess: guesses.get(i).copied() });
        }
        Ok(())
    }

    fn put(&mut self, new: Found) {
        // a long text makes several examples; its line is told once, with the worst of them
        match self.found.iter().position(|f| f.line == new.line) {
            Some(at) if rank(self.found[at].loss) < rank(new.loss) => drop(self.found.remove(at)),
            Some(_) => return,
            None => {}
        }
        let before = |f: &Found| rank(f.loss).total_cmp(&rank(new.loss)).reverse().then(f.line.cmp(&new.line)).is_lt();
        let at = self.found.partition_point(before);
        self.found.insert(at, new);
        self.found.truncate(self.most);
    }

    /// They, worst first, with excerpts and the names of their labels.
    pub fn told(&self, examples: &[Encoded], labels: &[String], decoder: &Decoder) -> Vec<WorstExample> {
        let name = |i: u32| labels.get(i as usize).cloned().unwrap_or_default();
        let tell = |f: &Found| {
            let example = examples.get(f.index)?;
            let label = match example.target {
                Target::Label(label) => name(label),
                _ => String::new(),
            };
            let predicted = f.guess.map(name).unwrap_or_default();
            Some(WorstExample { line: f.line, loss: f.loss, text: decoder.excerpt(example), label, predicted })
        };
        self.found.iter().filter_map(tell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn example(line: u64, tokens: &[u32], learn_from: usize) -> Encoded {
        let mask = (0..tokens.len()).map(|i| i >= learn_from).collect();
        Encoded { line, ..Encoded::new(tokens.to_vec(), Target::Tokens(mask)) }
    }

    fn losses(each: &[f32]) -> Losses {
        let each = Tensor::new(each, &Device::Cpu).unwrap();
        Losses::of(each)
    }

    #[test]
    fn the_highest_means_are_kept_in_order_one_per_line() {
        let all = [
            example(1, &[0; 3], 1),
            example(2, &[0; 2], 1),
            example(3, &[0; 2], 1),
            example(3, &[0; 4], 1),
            example(5, &[0; 2], 1),
        ];
        let mut worst = Worst::new(3);
        let refs: Vec<&Encoded> = all.iter().collect();
        // means: line 1: 2, line 2: 1, line 3: 4 and 0.5, line 5: 2
        worst.add(&[0, 1, 2], &refs[..3], &losses(&[1.0, 3.0, 1.0, 4.0])).unwrap();
        worst.add(&[4, 3], &[refs[4], refs[3]], &losses(&[2.0, 0.5, 0.0, 1.0])).unwrap();
        let told: Vec<_> = worst.told(&all, &[], &Decoder::default()).iter().map(|w| (w.line, w.loss)).collect();
        assert_eq!(told, [(3, 4.0), (1, 2.0), (5, 2.0)]);
        let mut sick = Worst::new(2);
        sick.add(&[0, 1, 2], &refs[..3], &losses(&[9.0, 3.0, 1.0, -f32::NAN])).unwrap();
        let told: Vec<_> = sick.told(&all, &[], &Decoder::default()).iter().map(|w| w.line).collect();
        assert_eq!(told, [3, 1], "no number is the worst");
        let mut none = Worst::new(0);
        none.add(&[0], &refs[..1], &losses(&[1.0, 1.0])).unwrap();
        assert!(none.told(&all, &[], &Decoder::default()).is_empty());
    }

    #[test]
    fn excerpts_show_where_the_learned_part_begins() {
        let decoder = Decoder::new(|ids| ids.iter().filter_map(|id| char::from_u32(*id)).collect());
        let ids = |text: &str| text.chars().map(u32::from).collect::<Vec<_>>();
        assert_eq!(decoder.excerpt(&example(1, &ids("The cat"), 4)), "The cat");
        let (prompt, said) = ("p".repeat(400), "s".repeat(400));
        let long = decoder.excerpt(&example(1, &ids(&format!("{prompt}{said}")), 400));
        assert_eq!(long, format!("...{}{}...", "p".repeat(EXCERPT), "s".repeat(EXCERPT)));
        let plain = decoder.excerpt(&example(1, &ids(&said), 1));
        assert_eq!(plain, format!("{}...", "s".repeat(2 * EXCERPT)));
        let pair = Encoded { source: ids("\u{e9}a"), ..example(1, &ids("xb"), 1) };
        assert_eq!(decoder.excerpt(&pair), "\u{e9}a => xb");
    }
}
