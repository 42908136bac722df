//! Jobs that do their next pieces in one pass on the base.
//!
//! A pass of few rows takes the time of reading the base's weights, whoever the rows belong to; one of many is bound by
//! arithmetic, which sharing does not lessen, while everybody waits longer for a turn. So only pieces of few rows go together.
//! A job joins in its own round or one that comes later in it, so nobody waits for more than a round. What is asked of a
//! job (a pause, a cancel) is looked at before each pass, and whatever is no training piece it does by itself.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Active, Ask, End, Turn, Worker, guarded, panic_text};
use crate::train::{
    plan::micro_tokens_of_delta,
    run::{Run, Share, shared_pass},
};

/// Most rows of a shared pass on a CPU, where rows are hardly cheaper in passes of more than 128 than in such: two pieces of
/// so many may still go together. On a GPU, which wants more rows, the bound is that of one job's longest piece. In either
/// case a pass takes no more memory for activations than a job's own may.
const ROWS_ON_CPU: usize = 256;

impl Worker {
    /// The jobs of this job's next pass: it, and those that follow it in the round and can be in one pass with it.
    pub(super) fn company(&mut self, at: usize) -> Vec<usize> {
        let mut jobs = vec![at];
        let most = if self.base.device.is_cpu() { ROWS_ON_CPU } else { micro_tokens_of_delta(false) };
        if self.share < 2 {
            return jobs;
        }
        let Some(mut rows) = offered(&mut self.active[at]) else { return jobs };
        for (other, job) in self.active.iter_mut().enumerate().skip(at + 1).filter(|(_, job)| !job.had) {
            if jobs.len() == self.share || rows >= most {
                break;
            }
            if let Some(own) = offered(job).filter(|own| rows + own <= most) {
                rows += own;
                jobs.push(other);
            }
        }
        jobs
    }

    /// One micro-step of each of these jobs, in one pass. If that fails, each does its own alone, so that only whose fault it is
    /// fails; where it is none's, they share no more.
    pub(super) fn turn_together(&mut self, jobs: &[usize]) -> Vec<Turn> {
        self.pacer.yield_now();
        let shares = match self.pass(jobs) {
            Ok(shares) => shares,
            Err(why) => {
                tracing::warn!(jobs = jobs.len(), %why, "a shared training pass failed; its jobs go on one by one");
                self.passes.apart();
                let turns: Vec<Turn> = jobs.iter().map(|at| self.turn(*at)).collect();
                if !turns.iter().any(|turn| matches!(turn, Turn::Over(End::Failed(_)))) {
                    jobs.iter().for_each(|at| self.active[*at].apart = true);
                }
                return turns;
            }
        };
        self.passes.done(jobs.len());
        jobs.iter().zip(shares).map(|(at, share)| self.took(*at, share)).collect()
    }

    fn pass(&self, jobs: &[usize]) -> Result<Vec<Share>, String> {
        let runs: Vec<&Run> = jobs.iter().filter_map(|at| self.active[*at].run()).collect();
        let made = catch_unwind(AssertUnwindSafe(|| shared_pass(&runs).map_err(|e| e.to_string())));
        made.unwrap_or_else(|panic| Err(panic_text(panic.as_ref())))
    }

    /// Gives a job its share of a pass.
    fn took(&mut self, at: usize, share: Share) -> Turn {
        let Some(run) = self.active[at].run_mut() else { return Turn::Again };
        let came = guarded(run.step() + 1, || run.take(share));
        self.told(at, came)
    }
}

/// Rows that a job has for a shared pass, if any.
fn offered(job: &mut Active) -> Option<usize> {
    if job.apart || job.control.ask() != Ask::GoOn {
        return None;
    }
    let run = job.run_mut()?;
    // one that panics does so again in its own turn, and fails there
    catch_unwind(AssertUnwindSafe(|| run.shared_rows())).ok().flatten()
}
