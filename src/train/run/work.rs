//! What the trainer advances: one run, or the candidates of a sweep.

use std::sync::Arc;

use candle_core::Result;

use super::{Advance, Run, RunInput, Saved, Sweep};
use crate::{delta::Delta, model::Base, pacing::Pacer};

/// A job under training.
#[derive(Debug)]
pub enum Work {
    /// One run.
    One(Box<Run>),
    /// Several, side by side.
    Sweep(Box<Sweep>),
}

impl Work {
    /// Sets up what the input asks for.
    ///
    /// # Errors
    /// As [`Run::new`].
    pub fn new(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput) -> Result<Self> {
        if input.candidates.is_empty() {
            return Run::new(base, pacer, input).map(|run| Self::One(Box::new(run)));
        }
        Sweep::new(base, pacer, input).map(|sweep| Self::Sweep(Box::new(sweep)))
    }

    /// Goes on from [`Self::to_bytes`], given the same input on the same base.
    ///
    /// # Errors
    /// As [`Run::from_bytes`].
    pub fn from_bytes(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput, bytes: &[u8]) -> Result<Self> {
        if input.candidates.is_empty() {
            return Run::from_bytes(base, pacer, input, bytes).map(|run| Self::One(Box::new(run)));
        }
        Sweep::from_bytes(base, pacer, input, bytes).map(|sweep| Self::Sweep(Box::new(sweep)))
    }

    /// Does one micro-step.
    pub fn advance(&mut self) -> Advance {
        match self {
            Self::One(run) => run.advance(),
            Self::Sweep(sweep) => sweep.advance(),
        }
    }

    /// A checkpoint, if one is due.
    ///
    /// # Errors
    /// As [`Run::autosave`].
    pub fn autosave(&mut self) -> Result<Option<Saved>> {
        match self {
            Self::One(run) => run.autosave(),
            Self::Sweep(sweep) => sweep.autosave(),
        }
    }

    /// All of it as bytes; `None` where there is nothing to go on from.
    ///
    /// # Errors
    /// As [`Run::to_bytes`].
    pub fn to_bytes(&self) -> Result<Option<Vec<u8>>> {
        match self {
            Self::One(run) => run.to_bytes(),
            Self::Sweep(sweep) => sweep.to_bytes(),
        }
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u32 {
        match self {
            Self::One(run) => run.step(),
            Self::Sweep(sweep) => sweep.step(),
        }
    }

    /// The run, if it is one.
    pub(in crate::train) fn run(&self) -> Option<&Run> {
        if let Self::One(run) = self { Some(run) } else { None }
    }

    /// As [`Self::run`].
    pub(in crate::train) fn run_mut(&mut self) -> Option<&mut Run> {
        if let Self::One(run) = self { Some(run) } else { None }
    }

    /// Whether every weight of a private copy is trained.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::One(run) if run.trainable().is_full())
    }

    /// What the variables form now; of a sweep, those of the candidate with the best evaluation so far, `None` before the
    /// first.
    ///
    /// # Errors
    /// The device.
    pub fn delta(&self) -> Result<Option<Delta>> {
        match self {
            Self::One(run) => run.delta().map(Some),
            Self::Sweep(sweep) => sweep.delta(),
        }
    }

    /// Shows its loss in a slot of the loss metric.
    pub(crate) fn show_in_slot(&mut self, slot: usize) {
        match self {
            Self::One(run) => run.show_in_slot(slot),
            Self::Sweep(sweep) => sweep.show_in_slot(slot),
        }
    }
}
