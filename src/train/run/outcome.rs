//! How a run goes on and how it ends.

use candle_core::Result;

use super::{Run, Runner, code_of};
use crate::{
    admission::train_params::{EvalEvent, JobEventBody, MixEvent},
    delta::Delta,
    model::ModelFolder,
};

/// What a run reports beside its end.
pub type RunEvents = Vec<JobEventBody>;

/// How a run goes on.
#[derive(Debug)]
pub enum Advance {
    /// There is more to do.
    More(RunEvents),
    /// It is over.
    Done(RunEvents, Box<Outcome>),
}

/// A run as bytes ([`Run::to_bytes`](super::Run::to_bytes)).
#[derive(Debug)]
pub struct Saved {
    /// Optimizer steps done.
    pub step: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// All steps are done.
    Trained(Box<Trained>),
    /// It cannot go on.
    Failed(Failed),
}

/// A trained delta.
#[derive(Debug)]
pub struct Trained {
    /// The best checkpoint (the last, without evaluation); plain f32 tensors.
    pub delta: Delta,
    /// The whole model of that checkpoint, where one is made instead of a delta.
    pub model: Option<ModelFolder>,
    /// Loss of the last step.
    pub final_loss: f64,
    /// The evaluation of the published checkpoint.
    pub best_eval: Option<EvalEvent>,
    /// The published weights of the deltas that were mixed.
    pub mix: Option<MixEvent>,
    /// A delta's weights as safetensors bytes: kept when publishing fails, so that no training is lost. None of a whole
    /// model, whose publisher keeps what it wrote in full.
    pub checkpoint: Option<Vec<u8>>,
    /// The weights of the next best evaluations, best first, where the job keeps several.
    pub runners: Vec<Runner>,
}

/// Why a run stopped.
#[derive(Debug)]
pub struct Failed {
    /// Stable code.
    pub code: &'static str,
    /// What happened, with the step.
    pub message: String,
    /// The last good checkpoint of a delta: its step and safetensors bytes.
    pub checkpoint: Option<(u32, Vec<u8>)>,
}

impl Run {
    /// What a micro-step that came to this is to whoever advances the run.
    pub(super) fn came_to(&self, came: Result<Option<Outcome>>, mut events: RunEvents) -> Advance {
        match came {
            Ok(None) => Advance::More(events),
            Ok(Some(mut outcome)) => {
                if let Outcome::Trained(trained) = &mut outcome {
                    events.extend(trained.mix.take().map(JobEventBody::Mix));
                }
                Advance::Done(events, Box::new(outcome))
            }
            Err(e) => {
                let failed = self.fail(code_of(&e), format!("step {}: {e}", self.step + 1));
                Advance::Done(events, Box::new(failed))
            }
        }
    }
}
