//! A saved classification head: one layer, or two where the family classifies texts so (RoBERTa, DistilBERT).

use candle_core::Tensor;

use super::{InteropError, keys::HeadPart};
use crate::{
    delta::{Head, HeadLayer, HeadPool},
    model::Base,
};

/// A layer's weight and bias.
#[derive(Default)]
struct Layer {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

/// What a file has of a head.
#[derive(Default)]
pub(super) struct HeadTensors {
    inner: Layer,
    out: Layer,
    /// Which name the last layer had.
    named: Option<HeadPart>,
}

impl HeadTensors {
    /// Takes the tensor called `name`: `weight` or `bias` of a layer.
    ///
    /// # Errors
    /// A tensor that the head has already, or of another head than the one that it began with.
    pub(super) fn take(&mut self, part: HeadPart, name: &str, tensor: Tensor) -> Result<(), InteropError> {
        let layer = if part == HeadPart::Inner { &mut self.inner } else { &mut self.out };
        if part != HeadPart::Inner && self.named.replace(part).is_some_and(|before| before != part) {
            return Err(bad(format!("{name} is of a second head; one is accepted")));
        }
        let place = if name.ends_with("weight") { &mut layer.weight } else { &mut layer.bias };
        match place.replace(tensor) {
            Some(_) => Err(bad(format!("{name}: the head has this tensor under another name, too"))),
            None => Ok(()),
        }
    }

    /// Checks it against the base.
    pub(super) fn build(self, base: &Base) -> Result<Option<Head>, InteropError> {
        let names = &base.arch.names;
        let mut width = base.arch.hidden;
        let mut out_name = names.cls_head;
        let (mut layers, mut pool) = (Vec::new(), HeadPool::Base);
        let second = self.named == Some(HeadPart::Out);
        if let Some(known) = names.cls_inner
            && let Some((weight, bias)) = self.inner.checked(known.dense, width, base)?
        {
            if self.named == Some(HeadPart::Only) && known.out != names.cls_head {
                return Err(bad(format!("{}.weight is beside {}, which {} follows", out_name, known.dense, known.out)));
            }
            width = weight.dims().first().copied().unwrap_or(0);
            out_name = known.out;
            layers.push(HeadLayer { weight, bias, act: Some(known.act) });
            pool = HeadPool::First;
        } else if let (Some(known), true) = (names.cls_inner, second) {
            return Err(bad(format!("{}.weight is missing, which is ahead of {}", known.dense, known.out)));
        }
        let Some((weight, bias)) = self.out.checked(out_name, width, base)? else {
            return match layers.is_empty() {
                true => Ok(None),
                false => Err(bad(format!("the head's inner layer is there, {out_name}.weight is missing"))),
            };
        };
        let (labels, most) = (weight.dims().first().copied().unwrap_or(0), super::MAX_LABELS);
        if labels > most {
            return Err(bad(format!("{out_name} has {labels} labels; at most {most} are accepted")));
        }
        Ok(Some(Head { weight, bias, layers, pool }))
    }
}

impl Layer {
    /// The layer on the base's device, if there is any of it: `[out, width]` and `[out]`.
    fn checked(self, name: &str, width: usize, base: &Base) -> Result<Option<(Tensor, Option<Tensor>)>, InteropError> {
        let weight = match (self.weight, &self.bias) {
            (Some(w), _) => w,
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(bad(format!("{name}.bias is there, {name}.weight is missing"))),
        };
        let &[out, takes] = weight.dims() else {
            return Err(bad(format!("{name}.weight is {:?}; [outputs, inputs] is accepted", weight.dims())));
        };
        if takes != width {
            let fingerprint = base.fingerprint.short();
            return Err(InteropError::BaseMismatch(format!(
                "{name}.weight takes hidden size {takes}, this server's base {fingerprint} has {width} there"
            )));
        }
        if self.bias.as_ref().is_some_and(|b| b.dims() != [out]) {
            return Err(bad(format!("{name}.bias does not have {out} numbers")));
        }
        let put = |t: Tensor| t.to_device(&base.device)?.to_dtype(base.dtype);
        Ok(Some((put(weight)?, self.bias.map(put).transpose()?)))
    }
}

fn bad(message: String) -> InteropError {
    InteropError::invalid(super::WEIGHTS[0], message)
}

#[cfg(test)]
mod tests;
