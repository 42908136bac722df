//! Beam search over log-probabilities: which hypotheses go on and which are finished. Pure numbers, as transformers'
//! `generate(num_beams = ..)` (version 5) scores them: every step keeps the best continuations of all beams together, those
//! that end compete by their sum over `length ^ length_penalty`.

use crate::admission::params::EarlyStopping;

/// How to search.
#[derive(Debug, Clone, Copy)]
pub(super) struct Search {
    /// Beams, at least 1.
    pub(super) beams: usize,
    /// Exponent of the length that divides a finished hypothesis' sum.
    pub(super) length_penalty: f32,
    /// When to end.
    pub(super) early_stopping: EarlyStopping,
    /// Most new tokens.
    pub(super) max_new: usize,
    /// How many tokens end an output.
    pub(super) stop_tokens: usize,
}

impl Search {
    /// Continuations of all beams together that a step looks at; no beam needs to name more of its own.
    pub(super) fn candidates(&self) -> usize {
        (1 + self.stop_tokens).max(2) * self.beams
    }
}

/// An output so far, with the sum of its log-probabilities; a finished one's is divided by its length's power.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Output {
    pub(super) tokens: Vec<u32>,
    pub(super) score: f32,
}

/// What no score comes near: marks what may not be chosen.
const NEVER: f32 = -1e9;

/// The state of one search.
#[derive(Debug)]
pub(super) struct Beams {
    search: Search,
    /// Open beams, best first; at the start one, the empty output.
    open: Vec<Output>,
    /// Finished ones, best first, at most as many as beams.
    finished: Vec<Output>,
    /// Whether an open beam may still do better.
    hopeful: bool,
    over: bool,
}

impl Beams {
    pub(super) fn new(search: Search) -> Self {
        let start = Output { tokens: vec![], score: 0.0 };
        Self { search, open: vec![start], finished: vec![], hopeful: true, over: false }
    }

    /// How it searches.
    pub(super) fn search(&self) -> &Search {
        &self.search
    }

    /// Open beams, in the order in which [`Self::step`] takes their continuations.
    pub(super) fn open(&self) -> &[Output] {
        &self.open
    }

    /// Whether the search has ended.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The finished hypotheses, best first.
    pub(super) fn into_finished(self) -> Vec<Output> {
        self.finished
    }

    /// Takes each open beam's likeliest continuations (token, log-probability), at least [`Search::candidates`] where the
    /// vocabulary has them. Returns for each new open beam which old one it continues.
    pub(super) fn step(&mut self, continuations: &[Vec<(u32, f32)>], stops: impl Fn(u32) -> bool) -> Vec<usize> {
        let beams = self.search.beams;
        let mut all: Vec<(usize, u32, f32)> = Vec::new();
        for (beam, (parent, own)) in self.open.iter().zip(continuations).enumerate() {
            all.extend(own.iter().map(|&(token, logprob)| (beam, token, parent.score + logprob)));
        }
        // of equals the one of the better beam, then the smaller token
        all.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)).then(a.1.cmp(&b.1)));
        all.truncate(self.search.candidates());
        let length = 1 + self.open.first().map_or(0, |h| h.tokens.len());
        let ends = |token: u32| stops(token) || length >= self.search.max_new;
        let extended = |&(beam, token, score): &(usize, u32, f32)| {
            let tokens = self.open[beam].tokens.iter().copied().chain([token]).collect();
            Output { tokens, score }
        };
        let full = self.finished.len() == beams;
        let divisor = (length as f32).powf(self.search.length_penalty);
        let may_finish = self.hopeful && !(full && self.search.early_stopping == EarlyStopping::Full);
        let mut finished = std::mem::take(&mut self.finished);
        if may_finish {
            // only the best `beams` continuations may finish
            let ended = all.iter().take(beams).filter(|c| ends(c.1)).map(&extended);
            finished.extend(ended.map(|h| Output { score: h.score / divisor, ..h }));
        }
        finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        finished.truncate(beams);
        let going: Vec<_> = all.iter().filter(|c| !ends(c.1) && c.2 > NEVER).take(beams).collect();
        let (parents, open) = going.iter().map(|&c| (c.0, extended(c))).unzip();
        self.finished = finished;
        self.open = open;
        self.look_ahead(length);
        parents
    }

    /// Whether to go on after outputs of this length.
    fn look_ahead(&mut self, length: usize) {
        let Search { beams, length_penalty, early_stopping, max_new, .. } = self.search;
        let longest = if early_stopping == EarlyStopping::Never && length_penalty > 0.0 { max_new } else { length };
        let best = self.open.first().map_or(NEVER, |h| h.score) / (longest as f32).powf(length_penalty);
        let full = self.finished.len() == beams;
        let worst = if full { self.finished.last().map_or(NEVER, |h| h.score) } else { NEVER };
        self.hopeful &= best > worst;
        let filled = full && early_stopping == EarlyStopping::Full;
        self.over = !self.hopeful || filled || self.open.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn numbers(value: &Value) -> Vec<f32> {
        value.as_array().expect("an array").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
    }

    /// Log-probabilities after a token: a row of a table and one by the length, normalised.
    fn after(recorded: &Value, table: usize, last: u32, length: usize) -> Vec<(u32, f32)> {
        let mut row = numbers(&recorded["tables"][table][last as usize]);
        row.iter_mut().zip(numbers(&recorded["by_length"][length])).for_each(|(a, b)| *a += b);
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let norm = row.iter().map(|x| (x - max).exp()).sum::<f32>().ln() + max;
        row.iter().enumerate().map(|(i, x)| (i as u32, x - norm)).collect()
    }

    /// What transformers' `generate` says for models whose logits depend on the last token and the length
    /// (`tests/golden/make_beams.py`).
    #[test]
    fn results_are_those_of_transformers() {
        let recorded: Value =
            serde_json::from_str(include_str!("../../tests/golden/beams.json")).expect("the recorded searches");
        let cases = recorded["cases"].as_array().expect("cases");
        assert!(cases.len() > 50);
        for case in cases {
            let number = |name: &str| case[name].as_u64().expect("a number");
            let early_stopping = match &case["early_stopping"] {
                Value::Bool(true) => EarlyStopping::Full,
                Value::Bool(false) => EarlyStopping::Heuristic,
                _ => EarlyStopping::Never,
            };
            let search = Search {
                beams: number("beams") as usize,
                length_penalty: case["length_penalty"].as_f64().expect("a number") as f32,
                early_stopping,
                max_new: number("max_new_tokens") as usize,
                stop_tokens: 1,
            };
            let mut beams = Beams::new(search);
            let (table, start) = (number("table") as usize, number("start") as u32);
            while !beams.is_over() {
                let row = |o: &Output| after(&recorded, table, *o.tokens.last().unwrap_or(&start), o.tokens.len());
                let rows: Vec<_> = beams.open().iter().map(row).collect();
                beams.step(&rows, |t| t == 1);
            }
            let got = beams.into_finished();
            let want: Vec<Vec<u32>> = serde_json::from_value(case["tokens"].clone()).expect("tokens");
            assert_eq!(got.iter().map(|o| o.tokens.clone()).collect::<Vec<_>>(), want, "{case}");
            for (output, score) in got.iter().zip(numbers(&case["scores"])) {
                assert!((output.score - score).abs() < 1e-4, "{case}: {}", output.score);
            }
        }
    }
}
