//! Answers to one prompt: those that are compared, and those that are judged.

use super::{Encoded, Encoder, RowResult, Target};
use crate::train::{dataset::Said, issue::Code};

/// A prompt and an answer to it as tokens; of an encoder-decoder, the decoder's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// By token, whether it is of the answer.
    pub learn: Vec<bool>,
}

impl Encoder<'_> {
    /// Both answers are cut at their ends, so that they keep the same prompt.
    pub(super) fn pair(&mut self, line: u64, prompt: &Said, chosen: &Said, rejected: &Said) -> RowResult {
        let source = self.read(line, prompt)?;
        let chosen = self.answer(line, "/chosen", prompt, chosen)?;
        let rejected = self.answer(line, "/rejected", prompt, rejected)?;
        if chosen.tokens == rejected.tokens {
            let longest = self.max_length;
            let message = format!("has the same tokens in both answers, of which the first {longest} are kept");
            return Err((Code::SameAnswers, message));
        }
        let target = Target::Preferred(chosen.learn, Box::new(rejected));
        self.out.push(Encoded { source, ..Encoded::new(chosen.tokens, target) });
        Ok(())
    }

    pub(super) fn rated(&mut self, line: u64, prompt: &Said, completion: &Said, good: bool) -> RowResult {
        let source = self.read(line, prompt)?;
        let answer = self.answer(line, "/completion", prompt, completion)?;
        let target = Target::Rated(answer.learn, good, None);
        self.out.push(Encoded { source, ..Encoded::new(answer.tokens, target) });
        Ok(())
    }

    /// What an encoder reads; conversations are a decoder's.
    fn read(&mut self, line: u64, prompt: &Said) -> Result<Vec<u32>, (Code, String)> {
        match prompt {
            Said::Text(prompt) => self.source(line, prompt),
            Said::Turns(_) if self.codec.decoder_start.is_some() => {
                Err((Code::ChatTemplate, "is a conversation; encoder-decoders take texts".to_owned()))
            }
            Said::Turns(_) => Ok(Vec::new()),
        }
    }

    fn answer(&mut self, line: u64, pointer: &str, prompt: &Said, answer: &Said) -> Result<Answer, (Code, String)> {
        let whole = match (prompt, answer) {
            (Said::Text(prompt), Said::Text(answer)) => self.completion(prompt, answer)?,
            (Said::Turns(prompt), Said::Turns(answer)) => {
                self.messages(&[prompt.as_slice(), answer.as_slice()].concat(), prompt.len())?
            }
            _ => return Err((Code::WrongType, "has a prompt and an answer of different forms".to_owned())),
        };
        self.cut(line, pointer, whole)
    }
}

/// Gives each rated example the answer of the next one, in a ring, that has another prompt, after its own prompt: what the
/// distance to the reference is estimated on. An example whose prompt all have gets none. Leaves other examples as they are.
pub fn add_mismatched(examples: &mut [Encoded], max_length: usize) {
    if !examples.iter().all(|e| matches!(e.target, Target::Rated(..))) {
        return;
    }
    let n = examples.len();
    let prompt = |e: &Encoded| (e.source.clone(), e.tokens[..answer_start(e)].to_vec());
    let prompts: Vec<_> = examples.iter().map(prompt).collect();
    // from the back, twice round: where the next has the same prompt, what is other to it is other to this
    let mut next: Vec<Option<usize>> = vec![None; n];
    for i in (0..2 * n).rev().map(|i| i % n) {
        let after = (i + 1) % n;
        next[i] = if prompts[after] == prompts[i] { next[after] } else { Some(after) };
    }
    let answers: Vec<Answer> = examples
        .iter()
        .map(|e| {
            let at = answer_start(e);
            Answer { tokens: e.tokens[at..].to_vec(), learn: e.learned()[at..].to_vec() }
        })
        .collect();
    for ((example, prompt), next) in examples.iter_mut().zip(&prompts).zip(next) {
        let (Target::Rated(_, _, mismatched), Some(answer)) = (&mut example.target, next.map(|i| &answers[i])) else {
            continue;
        };
        let mut tokens = prompt.1.clone();
        let mut learn = vec![false; tokens.len()];
        tokens.extend(&answer.tokens);
        learn.extend(&answer.learn);
        tokens.truncate(max_length);
        learn.truncate(max_length);
        *mismatched = Some(Box::new(Answer { tokens, learn }));
    }
}

/// The first token of an example's answer.
fn answer_start(e: &Encoded) -> usize {
    e.learned().iter().position(|learn| *learn).unwrap_or(e.tokens.len())
}
