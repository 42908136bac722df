//! Elastic weight consolidation (Kirkpatrick et al. 2017) over a delta's variables; FORMATS 5.6.
//!
//! `F_i = 1/N sum_n (d l_n / d theta_i)^2` at the starting values, with `l_n` the mean loss of old example `n` under its own
//! labels (the empirical Fisher information, one example at a time). The penalty `lambda/2 sum_i F_i (theta_i - start_i)^2`
//! has the gradient `lambda F_i (theta_i - start_i)`, which is added as it stands: no graph is kept for it.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Result, Tensor};

use crate::{
    model::Base,
    pacing::Pacer,
    train::{
        batches::{self, Stream},
        objective::losses,
        trainable::{NamedVar, Trainable},
        transfer::Ewc,
    },
};

/// The Fisher information on its way, an example at a time.
#[derive(Debug)]
pub struct Fisher {
    ewc: Ewc,
    trainable: Trainable,
    sums: Vec<Option<Tensor>>,
    done: usize,
}

/// What is added to a step's gradients: by variable, `F` and the starting value.
#[derive(Debug)]
pub struct Penalty {
    lambda: f64,
    terms: Vec<Option<(Tensor, Tensor)>>,
}

impl Fisher {
    /// Nothing summed yet.
    ///
    /// # Errors
    /// The device.
    pub fn new(ewc: Ewc, base: &Base) -> Result<Self> {
        let trainable = Trainable::from_delta(&ewc.delta, &base.sites)?;
        let sums = vec![None; trainable.vars().len()];
        Ok(Self { ewc, trainable, sums, done: 0 })
    }

    /// Adds the next example's squared gradient; false when there is none left.
    ///
    /// # Errors
    /// Those of the forward; a loss that is not finite.
    pub fn advance(&mut self, base: &Base, pacer: Option<&Arc<Pacer>>) -> Result<bool> {
        let Some(example) = self.ewc.examples.get(self.done) else { return Ok(false) };
        let delta = self.trainable.delta(&mut batches::rng(0, Stream::Dropout))?;
        let loss = losses(base, delta, &[example], pacer)?.each.mean_all()?;
        if !loss.to_scalar::<f32>()?.is_finite() {
            candle_core::bail!("the loss of old example {} is not finite", self.done + 1);
        }
        let mut grads = loss.backward()?;
        for (sum, var) in self.sums.iter_mut().zip(self.trainable.vars()) {
            if let Some(grad) = grads.remove(var.var.as_tensor()) {
                let square = grad.detach().sqr()?;
                *sum = Some(match sum.take() {
                    Some(before) => (before + square)?,
                    None => square,
                });
            }
        }
        self.done += 1;
        Ok(true)
    }

    /// The penalty on these variables, matched by name: a fresh head has none.
    ///
    /// # Errors
    /// The device.
    pub fn penalty(self, vars: &[NamedVar]) -> Result<Penalty> {
        let n = self.done.max(1) as f64;
        let mut by_name: HashMap<&str, Tensor> = HashMap::new();
        for (var, sum) in self.trainable.vars().iter().zip(&self.sums) {
            if let Some(sum) = sum {
                by_name.insert(&var.name, (sum / n)?);
            }
        }
        let term = |v: &NamedVar| -> Result<Option<(Tensor, Tensor)>> {
            let fisher = by_name.get(v.name.as_str()).filter(|f| f.dims() == v.var.dims());
            let fisher = fisher.filter(|_| self.ewc.head || !v.name.starts_with("head."));
            fisher.map(|f| Ok((f.clone(), v.var.as_detached_tensor().copy()?))).transpose()
        };
        Ok(Penalty { lambda: self.ewc.lambda, terms: vars.iter().map(term).collect::<Result<_>>()? })
    }
}

impl Penalty {
    /// A penalty of this strength; `terms` by variable.
    pub(super) fn new(lambda: f64, terms: Vec<Option<(Tensor, Tensor)>>) -> Self {
        Self { lambda, terms }
    }

    /// Its strength.
    pub(super) fn lambda(&self) -> f64 {
        self.lambda
    }

    /// Index, `F` and starting value of every variable that has them.
    pub(super) fn terms(&self) -> impl Iterator<Item = (usize, &(Tensor, Tensor))> {
        self.terms.iter().enumerate().filter_map(|(i, t)| t.as_ref().map(|t| (i, t)))
    }

    /// Adds `lambda F (theta - start)` to each variable's gradient, and gives the penalty of these values.
    ///
    /// # Errors
    /// The device.
    pub fn add_to(&self, vars: &[NamedVar], grads: &mut [Tensor]) -> Result<f64> {
        let mut value = 0.0;
        for ((term, var), grad) in self.terms.iter().zip(vars).zip(grads) {
            let Some((fisher, start)) = term else { continue };
            let away = (var.var.as_detached_tensor() - start)?;
            let pull = ((fisher * &away)? * self.lambda)?;
            value += 0.5 * f64::from((&pull * &away)?.sum_all()?.to_scalar::<f32>()?);
            *grad = (&*grad + pull)?;
        }
        Ok(value)
    }
}
