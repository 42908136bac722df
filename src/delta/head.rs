//! Classification heads that travel with a delta.

use candle_core::{DType, Result, Tensor};

use crate::ops::{self, Act};

/// Which row of a text a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadPool {
    /// The base's way: an encoder's pooled first row, a decoder's last row (`transformers`, PEFT).
    #[default]
    Base,
    /// The first row as it is, without the pooler (AdapterHub's heads of encoders).
    First,
}

/// A layer ahead of a head's last one.
#[derive(Debug, Clone)]
pub struct HeadLayer {
    /// `[hidden, hidden]`, as `nn.Linear` keeps it.
    pub weight: Tensor,
    /// `[hidden]`.
    pub bias: Option<Tensor>,
    /// What follows.
    pub act: Option<Act>,
}

/// A classification head that replaces the base's.
#[derive(Debug, Clone)]
pub struct Head {
    /// `[labels, hidden]`.
    pub weight: Tensor,
    /// `[labels]`.
    pub bias: Option<Tensor>,
    /// Layers ahead of it, in order.
    pub layers: Vec<HeadLayer>,
    /// Which row it reads (sequence classification).
    pub pool: HeadPool,
}

impl Head {
    /// One linear over the base's pooled row, as `transformers` and PEFT have it.
    pub fn linear(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias, layers: Vec::new(), pool: HeadPool::Base }
    }

    /// Its tensors with their names, in a fixed order.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut all = vec![("head.weight".to_owned(), &self.weight)];
        all.extend(self.bias.iter().map(|b| ("head.bias".to_owned(), b)));
        for (i, layer) in self.layers.iter().enumerate() {
            all.push((format!("head.{i}.weight"), &layer.weight));
            all.extend(layer.bias.iter().map(|b| (format!("head.{i}.bias"), b)));
        }
        all
    }

    /// The same head with each of [`Self::tensors`] put through `f`, in that order.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn map(&self, f: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let weight = f("head.weight", &self.weight)?;
        let bias = self.bias.as_ref().map(|b| f("head.bias", b)).transpose()?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            layers.push(HeadLayer {
                weight: f(&format!("head.{i}.weight"), &layer.weight)?,
                bias: layer.bias.as_ref().map(|b| f(&format!("head.{i}.bias"), b)).transpose()?,
                act: layer.act,
            });
        }
        Ok(Self { weight, bias, layers, pool: self.pool })
    }

    /// `[n, hidden]` -> `[n, labels]` f32; differentiable.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = affine(&x, &layer.weight, layer.bias.as_ref())?;
            if let Some(act) = layer.act {
                x = ops::activate(&x, act)?;
            }
        }
        affine(&x, &self.weight, self.bias.as_ref())?.to_dtype(DType::F32)
    }
}

/// `x W^T + b`.
fn affine(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = ops::times_turned(x, &weight.to_dtype(x.dtype())?)?;
    match bias {
        Some(b) => y.broadcast_add(&b.to_dtype(x.dtype())?),
        None => Ok(y),
    }
}
