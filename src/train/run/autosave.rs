//! When a run's checkpoint is due.

use std::time::{Duration, Instant};

use candle_core::Result;

use super::{Phase, Run, Saved};

/// Time between checkpoints unless the job says its own number of steps.
const EVERY: Duration = Duration::from_secs(30);
/// By the clock, this many times as long passes between checkpoints as making one takes: at most 2 % of the time.
const SHARE: u32 = 50;
/// By steps, this many times: at most a fifth of the time.
const SHARE_BY_STEPS: u32 = 4;

/// The last checkpoint, or the start.
#[derive(Debug)]
pub(super) struct Autosave {
    step: u32,
    at: Instant,
    cost: Duration,
}

impl Autosave {
    pub(super) fn from_step(step: u32) -> Self {
        Self { step, at: Instant::now(), cost: Duration::ZERO }
    }

    /// One that was made now, at this cost.
    pub(super) fn made(step: u32, cost: Duration) -> Self {
        Self { cost, ..Self::from_step(step) }
    }

    pub(super) fn is_due(&self, step: u32, every: u32) -> bool {
        match every {
            0 => step > self.step && self.at.elapsed() >= EVERY.max(self.cost * SHARE),
            // the next multiple, or a later step where that one could not be kept
            every => step / every > self.step / every && self.at.elapsed() >= self.cost * SHARE_BY_STEPS,
        }
    }
}

impl Run {
    /// A checkpoint, if one is due: between two steps, never after the last, which is published at once.
    ///
    /// # Errors
    /// Those of [`Run::to_bytes`].
    pub fn autosave(&mut self) -> Result<Option<Saved>> {
        let r = &self.input.resolved;
        let between = matches!(&self.phase, Phase::Train(step) if step.todo.is_empty());
        let last = self.stopped || self.step >= r.total_steps;
        if !between || last || !self.autosave.is_due(self.step, r.checkpoint_every) {
            return Ok(None);
        }
        let begun = Instant::now();
        let bytes = self.to_bytes()?;
        self.autosave = Autosave::made(self.step, begun.elapsed());
        Ok(bytes.map(|bytes| Saved { step: self.step, bytes }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_at_multiples_or_by_the_clock() {
        let saved = |step| Autosave::from_step(step);
        let due = |last: u32, every| (last..last + 12).find(|step| saved(last).is_due(*step, every));
        assert_eq!((due(0, 5), due(5, 5), due(7, 5), due(3, 1)), (Some(5), Some(10), Some(10), Some(4)));
        assert_eq!(due(0, 0), None, "not at once");
        let ago = |seconds, cost| {
            let at = Instant::now().checked_sub(Duration::from_secs(seconds));
            Autosave { step: 3, at: at.unwrap(), cost: Duration::from_millis(cost) }
        };
        // far from the border where the time that the test itself takes counts against it
        assert!(ago(31, 10).is_due(4, 0) && !ago(31, 10).is_due(3, 0) && !ago(5, 10).is_due(4, 0));
        assert!(!ago(1, 9000).is_due(4, 1) && ago(2, 300).is_due(4, 1), "a fifth of the time, also by steps");
        assert!(!ago(31, 5000).is_due(4, 0) && ago(51, 1000).is_due(4, 0), "a slow one is made less often");
    }
}
