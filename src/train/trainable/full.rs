//! Full fine-tuning: all weights of the base, in a copy that belongs to the job, as variables.

use std::sync::Arc;

use candle_core::{Error, Result, Tensor};
use parking_lot::Mutex;

use super::{NamedVar, Snapshot, Trainable, init::Builder};
use crate::{
    delta::{Problem, Task},
    model::{Base, ModelFolder, PrivateCopy},
    train::spec::TrainSpec,
};

/// A copy whose tensors are the first variables of its [`Trainable`].
#[derive(Debug)]
pub(super) struct Copied {
    copy: PrivateCopy,
    /// The base with the weights as they are, in the kernels' form, until the next step.
    plain: Mutex<Option<Arc<Base>>>,
}

impl Copied {
    /// The variables are about to change.
    pub(super) fn changes(&self) {
        *self.plain.lock() = None;
    }
}

impl Builder<'_> {
    /// Makes the copy's variables, ahead of all others.
    pub(super) fn copied(&mut self, task: Task) -> Result<Copied> {
        let base = self.base()?;
        let copy =
            PrivateCopy::read(base, task, |name, t| self.add(name.to_owned(), &t, t.rank() > 1, 1.0).map(|_| ()));
        let copy = copy.map_err(Error::wrap)?;
        Ok(Copied { copy, plain: Mutex::new(None) })
    }
}

impl Trainable {
    /// The variables of full fine-tuning of a base for a task, without a head.
    ///
    /// # Errors
    /// Those of [`PrivateCopy::read`].
    pub fn of_base(base: &Base, task: Task) -> Result<Self> {
        let spec = TrainSpec {
            task,
            problem: Problem::SingleLabel,
            methods: vec!["full".into()],
            labels: vec![],
            patches: vec![],
            head: None,
            vocab: base.arch.vocab,
            positions: Default::default(),
            full: Some(base.trained_by(task)),
        };
        Self::init_on(&spec, base, 0)
    }

    /// Whether a copy of the base is trained instead of a delta for it.
    pub fn is_full(&self) -> bool {
        self.full.is_some()
    }

    fn weights(&self) -> &[NamedVar] {
        let n = self.full.as_ref().map_or(0, |f| f.copy.names().len());
        &self.vars[..n.min(self.vars.len())]
    }

    /// The base for a training forward: the resident one, or the copy, whose gradients reach the variables.
    ///
    /// # Errors
    /// The device.
    pub fn base(&self, resident: &Arc<Base>) -> Result<Arc<Base>> {
        let Some(full) = &self.full else { return Ok(Arc::clone(resident)) };
        full.changes();
        let tensors: Vec<Tensor> = self.weights().iter().map(|v| v.var.as_tensor().clone()).collect();
        full.copy.base(resident, &tensors).map(Arc::new).map_err(Error::wrap)
    }

    /// The base for an evaluation: the resident one, or the copy as it is now with plain tensors, made once between two
    /// steps.
    ///
    /// # Errors
    /// The device.
    pub fn detached_base(&self, resident: &Arc<Base>) -> Result<Arc<Base>> {
        let Some(full) = &self.full else { return Ok(Arc::clone(resident)) };
        let mut plain = full.plain.lock();
        if let Some(base) = &*plain {
            return Ok(Arc::clone(base));
        }
        // copies: a form that shares the variables' storage would change with them
        let tensors = self.weights().iter().map(|v| v.var.as_detached_tensor().copy()).collect::<Result<Vec<_>>>()?;
        let base = Arc::new(full.copy.base(resident, &tensors).map_err(Error::wrap)?);
        *plain = Some(Arc::clone(&base));
        Ok(base)
    }

    /// The model of a snapshot, to be written as a folder; `None` where a delta is trained.
    ///
    /// # Errors
    /// The device.
    pub fn model(&self, snapshot: &Snapshot) -> Result<Option<ModelFolder>> {
        if self.full.is_none() {
            return Ok(None);
        }
        let weights = self.weights().iter().zip(&snapshot.0).map(|(v, t)| (v.name.clone(), t.clone())).collect();
        let head = self.publishable(snapshot)?.head().cloned();
        let (task, problem, labels) = (self.spec.task, self.spec.problem, self.spec.labels.clone());
        Ok(Some(ModelFolder { weights, head, task, problem, labels }))
    }
}
