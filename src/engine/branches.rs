//! A beam search on its way through the engine: what each open beam has said, and whose keys and values it goes on from.

use super::{
    beam::{Beams, Search},
    request::{Generate, Hypothesis},
};
use crate::admission::params::{BeamParams, FinishReason, Usage};

/// Keys and values to be copied from one branch to another before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) from: usize,
    pub(super) to: usize,
    /// From the first position on: the branch is new. Else the prompt's are there already.
    pub(super) whole: bool,
}

/// The state of a search.
#[derive(Debug)]
pub(super) struct Branches {
    beams: Beams,
    /// Prompt and output of each open beam.
    rows: Vec<Vec<u32>>,
    prompt: usize,
    /// Likeliest continuations of the beams that the step under way has computed.
    found: Vec<Vec<(u32, f32)>>,
    /// For each open beam, the branch whose keys and values it goes on from.
    parents: Vec<usize>,
    /// Branches whose pages hold the prompt.
    filled: usize,
}

impl Branches {
    pub(super) fn new(prompt: &[u32], how: &Generate, beams: &BeamParams) -> Self {
        let search = Search {
            beams: beams.beams as usize,
            length_penalty: beams.length_penalty,
            early_stopping: beams.early_stopping,
            max_new: how.max_new_tokens,
            stop_tokens: how.stop_tokens.len(),
        };
        let rows = vec![prompt.to_vec()];
        Self { beams: Beams::new(search), rows, prompt: prompt.len(), found: vec![], parents: vec![0], filled: 1 }
    }

    /// Starts over.
    pub(super) fn restart(&mut self) {
        self.rows.truncate(1);
        self.rows.iter_mut().for_each(|row| row.truncate(self.prompt));
        self.beams = Beams::new(*self.beams.search());
        self.found.clear();
        (self.parents, self.filled) = (vec![0], 1);
    }

    /// Prompt and output of a branch.
    pub(super) fn tokens(&self, branch: usize) -> &[u32] {
        self.rows.get(branch).map(Vec::as_slice).unwrap_or_default()
    }

    /// Open beams.
    pub(super) fn open(&self) -> usize {
        self.rows.len()
    }

    /// Likeliest continuations that each beam has to name.
    pub(super) fn candidates(&self) -> usize {
        self.beams.search().candidates()
    }

    /// Takes the continuations of the next branch; whether those of all are here.
    pub(super) fn collect(&mut self, found: Vec<(u32, f32)>) -> bool {
        self.found.push(found);
        self.found.len() == self.rows.len()
    }

    /// Chooses the next beams; whether the search is over.
    pub(super) fn select(&mut self, stop_tokens: &[u32]) -> bool {
        let found = std::mem::take(&mut self.found);
        self.parents = self.beams.step(&found, |token| stop_tokens.contains(&token));
        let row = |(&parent, open): (&usize, &super::beam::Output)| {
            let before = self.rows.get(parent).map(Vec::as_slice).unwrap_or_default();
            before.iter().chain(open.tokens.last()).copied().collect()
        };
        self.rows = self.parents.iter().zip(self.beams.open()).map(row).collect();
        self.beams.is_over()
    }

    /// What has to be copied, all at once, before the beams go on.
    pub(super) fn moves(&self) -> Vec<Move> {
        let moved = self.parents.iter().enumerate().filter(|(to, from)| to != *from);
        moved.map(|(to, &from)| Move { from, to, whole: to >= self.filled }).collect()
    }

    /// It was copied.
    pub(super) fn moved(&mut self) {
        self.filled = self.parents.len();
        self.parents = (0..self.filled).collect();
    }

    /// The best outputs, best first; `usage` is that of the prompt.
    pub(super) fn into_best(self, n: usize, stop_tokens: &[u32], usage: Usage) -> Vec<Hypothesis> {
        let finished = self.beams.into_finished().into_iter().take(n);
        let told = finished.map(|mut output| {
            let completion_tokens = output.tokens.len() as u32;
            let stops = output.tokens.last().is_some_and(|last| stop_tokens.contains(last));
            if stops {
                output.tokens.pop();
            }
            let reason = if stops { FinishReason::StopToken } else { FinishReason::Length };
            let usage = Usage { completion_tokens, ..usage };
            Hypothesis { tokens: output.tokens, score: output.score, reason, usage }
        });
        told.collect()
    }
}
