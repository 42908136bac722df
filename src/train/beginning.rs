//! What a run takes its first values from, and how a job that waits lets go of it.
//!
//! A job that mixes deltas would hold many of them, and their mean, for as long as it is queued. So it keeps what leases them
//! again ([`Reload`]), and has them loaded when its turn comes.

use std::{any::Any, sync::Arc};

use candle_core::Result;
use futures::future::BoxFuture;

use crate::{
    model::Base,
    train::{
        mixing::Mix,
        run::RunInput,
        spec::TrainSpec,
        trainable::Trainable,
        transfer::{Continued, Ewc, StartingDelta},
    },
};

/// What [`Reload`] comes to: the deltas in the request's order, or why they cannot be had.
pub type Reloaded = std::result::Result<Vec<StartingDelta>, String>;

/// Leases the deltas that a job mixes once more. Given by admission, so that training does not know the registry; until it is
/// dropped, none of the versions goes away.
#[derive(Clone)]
pub struct Reload(Arc<dyn Fn() -> BoxFuture<'static, Reloaded> + Send + Sync>);

impl Reload {
    /// Asks a function.
    pub fn new(load: impl Fn() -> BoxFuture<'static, Reloaded> + Send + Sync + 'static) -> Self {
        Self(Arc::new(load))
    }
}

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reload")
    }
}

/// Deltas whose weights a run trains.
#[derive(Clone)]
pub struct Mixture {
    mix: Arc<Mix>,
    /// Keeps them in memory.
    _leases: Arc<dyn Any + Send + Sync>,
    reload: Option<Reload>,
}

impl Mixture {
    pub(super) fn new(mix: Arc<Mix>, leases: Arc<dyn Any + Send + Sync>, reload: Option<Reload>) -> Self {
        Self { mix, _leases: leases, reload }
    }
}

impl std::fmt::Debug for Mixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mixture").field(&self.mix.record()).finish()
    }
}

/// What a run copies its first values from.
#[derive(Debug, Clone)]
pub enum Beginning {
    /// A delta that it continues.
    Delta(Box<Continued>),
    /// Deltas whose weights it trains.
    Mix(Mixture),
}

impl From<&Continued> for Beginning {
    fn from(start: &Continued) -> Self {
        match start.mixture() {
            Some(mixture) => Self::Mix(mixture),
            None => Self::Delta(Box::new(start.clone())),
        }
    }
}

impl Beginning {
    /// The run's variables, and what it holds on to. The tensors of the deltas may go after this.
    ///
    /// # Errors
    /// The device.
    pub(super) fn begin(self, spec: &TrainSpec, base: &Base, seed: u64) -> Result<(Trainable, Option<Ewc>)> {
        match self {
            Self::Delta(start) => Ok((start.trainable(spec, base, seed)?, start.ewc)),
            Self::Mix(mixture) => Ok((Trainable::mixing(&mixture.mix, spec, base, seed)?, None)),
        }
    }
}

/// The deltas of a job that waits: what leases them again.
#[derive(Debug)]
pub(crate) struct Shelved {
    reload: Reload,
    per_layer: bool,
}

impl Shelved {
    /// Has them loaded.
    ///
    /// # Errors
    /// Why they cannot be had.
    pub(super) async fn load(&self) -> std::result::Result<Beginning, String> {
        let parts = (self.reload.0)().await?;
        let mix = Arc::new(Mix::of(&parts, self.per_layer));
        Ok(Beginning::Mix(Mixture::new(mix, Arc::new(parts), Some(self.reload.clone()))))
    }
}

impl RunInput {
    /// Lets go of the deltas that the job mixes, if they can be loaded again.
    pub(crate) fn shelve(&mut self) -> Option<Shelved> {
        match &self.start {
            Some(Beginning::Mix(Mixture { mix, reload: Some(reload), .. })) => {
                let shelved = Shelved { reload: reload.clone(), per_layer: mix.per_layer };
                self.start = None;
                Some(shelved)
            }
            _ => None,
        }
    }
}
