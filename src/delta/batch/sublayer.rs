//! Bottleneck adapters at the end of a half block.

use candle_core::{Result, Tensor};

use super::{DeltaBatch, Slot, rows_of};
use crate::{
    delta::{AdapterInput, AdapterIo, AdapterResidual, Bottleneck, Patch, SiteId, patch::Scaling},
    ops::{self, AdapterRows, RowScale},
};

/// Which rows beside the sublayer's output any adapter of a site reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct AdapterNeeds {
    /// `h + x`.
    pub(crate) sum: bool,
    /// The block's norm of it.
    pub(crate) normed: bool,
}

impl DeltaBatch {
    fn adapters(&self, site: SiteId) -> impl Iterator<Item = (&Slot, &Bottleneck)> {
        self.at(site).flat_map(|(slot, patches)| {
            patches.iter().filter_map(move |(_, p)| match p {
                Patch::Bottleneck(b) => Some((slot, &**b)),
                _ => None,
            })
        })
    }

    /// What [`Self::adapt`] will read at this site.
    pub(crate) fn adapter_needs(&self, site: SiteId) -> AdapterNeeds {
        let mut needs = AdapterNeeds::default();
        for (_, a) in self.adapters(site) {
            needs.normed |= a.wiring.input == AdapterInput::Sum;
            needs.sum |= a.wiring.residual == AdapterResidual::Sum;
        }
        needs
    }

    /// Puts the adapters of a sublayer to its output: `h` `[rows, hidden]`, which may be written in place. Several of one
    /// delta are applied in order: each changes the `h` that the ones before it left; what `io` holds is the same for all.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn adapt(&self, site: SiteId, h: Tensor, io: &AdapterIo) -> Result<Tensor> {
        let beside = [Some(&io.residual), io.normed.as_ref(), io.sum.as_ref()];
        let all: Vec<&Tensor> = beside.into_iter().flatten().chain([&h]).collect();
        if !self.takes_kernels(&all) {
            return self.adapt_reference(site, h, io);
        }
        let io = io.map(Tensor::contiguous)?;
        for round in self.rounds(site) {
            self.adapt_round(&round, &h, &io)?;
        }
        Ok(h)
    }

    /// The adapters of a sublayer by their number within their delta: each sees what the ones before it left, and the
    /// row kernel has one per row.
    fn rounds(&self, site: SiteId) -> Vec<Vec<(&Slot, &Bottleneck)>> {
        let mut rounds: Vec<Vec<(&Slot, &Bottleneck)>> = Vec::new();
        let mut last: Option<(&Slot, usize)> = None;
        for (slot, a) in self.adapters(site) {
            let at = last.filter(|(s, _)| std::ptr::eq(*s, slot)).map_or(0, |(_, at)| at + 1);
            if at == rounds.len() {
                rounds.push(Vec::new());
            }
            rounds[at].push((slot, a));
            last = Some((slot, at));
        }
        rounds
    }

    /// One adapter per delta, in place.
    fn adapt_round(&self, round: &[(&Slot, &Bottleneck)], h: &Tensor, io: &AdapterIo) -> Result<()> {
        let mut groups = Vec::new();
        for (slot, a) in round {
            if a.is_plain() {
                groups.push(adapter_rows(slot, a, io)?);
                continue;
            }
            for rows in &slot.rows {
                let own = |t: &Tensor| rows_of(t, rows);
                let out = a.apply(&own(h)?, &io.map(own)?)?;
                let slots: Vec<u32> = rows.clone().map(|r| r as u32).collect();
                ops::write_rows(h, &slots, &out)?;
            }
        }
        ops::adapt_in_place(h, &groups)
    }

    /// The reference: gathers each delta's rows and puts them back. Differentiable, any device.
    pub(crate) fn adapt_reference(&self, site: SiteId, mut h: Tensor, io: &AdapterIo) -> Result<Tensor> {
        for (slot, a) in self.adapters(site) {
            if slot.covers(self.rows) {
                h = a.apply(&h, io)?;
                continue;
            }
            let Some(idx) = slot.index(h.device())? else { continue };
            let pick = |t: &Tensor| t.contiguous()?.index_select(&idx, 0);
            let before = pick(&h)?;
            let after = a.apply(&before, &io.map(pick)?)?;
            h = h.contiguous()?.index_add(&idx, &(after - before)?, 0)?;
        }
        Ok(h)
    }

    /// After the block's sum and norm, `y` `[rows, hidden]`: rows whose adapter ends the half itself get `h` back.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn close(&self, site: SiteId, h: &Tensor, mut y: Tensor) -> Result<Tensor> {
        for (slot, _) in self.adapters(site).filter(|(_, a)| !a.wiring.closes) {
            let Some(idx) = slot.index(y.device())? else { continue };
            let pick = |t: &Tensor| t.contiguous()?.index_select(&idx, 0);
            y = y.contiguous()?.index_add(&idx, &(pick(h)? - pick(&y)?)?, 0)?;
        }
        Ok(y)
    }
}

fn adapter_rows<'a>(slot: &'a Slot, a: &'a Bottleneck, io: &'a AdapterIo) -> Result<AdapterRows<'a>> {
    Ok(AdapterRows {
        rows: &slot.rows,
        input: a.input(io)?,
        residual: a.residual(io)?,
        down: &a.down,
        down_bias: &a.down_bias,
        up: &a.up,
        up_bias: &a.up_bias,
        act: a.act,
        scale: match &a.scaling {
            Scaling::Fixed(s) => RowScale::Fixed(*s as f32),
            Scaling::Learned(t) => RowScale::Tensor(t),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Var};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        delta::{Act, Affine, Delta, Wiring, batch::tests},
        rows::RowLayout,
    };

    const HIDDEN: usize = 24;

    fn rand(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
    }

    fn norm(on: bool) -> Option<Affine> {
        on.then(|| Affine { gain: rand(&[HIDDEN]), bias: Some(rand(&[HIDDEN])), center: true, eps: 1e-5 })
    }

    /// Every option follows from the bits of `kind`.
    fn adapter(width: usize, kind: usize) -> Bottleneck {
        let acts = [Act::Relu, Act::Silu, Act::Gelu, Act::GeluTanh, Act::Tanh, Act::LeakyRelu];
        let scaling = match kind % 3 {
            0 => Scaling::Fixed(0.7),
            1 => Scaling::Learned(rand(&[1])),
            _ => Scaling::Learned(rand(&[HIDDEN])),
        };
        Bottleneck {
            down: rand(&[width, HIDDEN]),
            down_bias: rand(&[width]),
            up: rand(&[width, HIDDEN]),
            up_bias: rand(&[HIDDEN]),
            act: acts[kind % acts.len()],
            scaling,
            norm_before: norm(kind % 7 == 1),
            norm_after: norm(kind % 5 == 2),
            wiring: Wiring {
                input: [AdapterInput::Output, AdapterInput::Sum, AdapterInput::Residual][kind / 2 % 3],
                residual: [AdapterResidual::Output, AdapterResidual::Input, AdapterResidual::Sum][kind / 3 % 3],
                residual_first: kind % 4 == 3,
                closes: kind % 6 != 5,
            },
        }
    }

    fn delta(adapters: Vec<Bottleneck>) -> Arc<Delta> {
        tests::delta(adapters.into_iter().map(|b| (1, Patch::Bottleneck(Box::new(b)))).collect())
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Ranks, activations, wirings, how many adapters a delta has, and span lengths vary; rows without an adapter stay
        /// as they are.
        #[test]
        fn kernel_and_reference_agree(
            spans in proptest::collection::vec((1usize..70, 0usize..5), 1..7),
            kinds in proptest::collection::vec(proptest::collection::vec((1usize..20, 0usize..420), 1..4), 4),
        ) {
            let of = |all: &Vec<(usize, usize)>| delta(all.iter().map(|&(w, k)| adapter(w, k)).collect());
            let deltas: Vec<_> = kinds.iter().map(of).collect();
            let layout = RowLayout::packed(&spans.iter().map(|s| s.0).collect::<Vec<_>>());
            let per_span: Vec<_> = spans.iter().map(|s| deltas.get(s.1).cloned()).collect();
            let batch = DeltaBatch::new(&layout, &per_span, 2);
            let h = rand(&[layout.rows(), HIDDEN]);
            let all = || rand(&[layout.rows(), HIDDEN]);
            let io = AdapterIo { residual: all(), sum: Some(all()), normed: Some(all()) };
            let want = batch.adapt_reference(1, h.clone(), &io).unwrap();
            let got = batch.adapt(1, h.copy().unwrap(), &io).unwrap();
            let most = worst(&want, &want.zeros_like().unwrap());
            prop_assert!(worst(&got, &want) < 1e-4 * (1.0 + most));
            let y = all();
            let closed = batch.close(1, &got, y.clone()).unwrap();
            for (span, delta) in layout.spans().iter().zip(&per_span) {
                let rows = |t: &Tensor| t.narrow(0, span.start, span.len).unwrap().to_vec2::<f32>().unwrap();
                if delta.is_none() {
                    prop_assert_eq!(rows(&got), rows(&h), "a row without an adapter is bitwise untouched");
                    prop_assert_eq!(rows(&closed), rows(&y));
                }
            }
        }
    }

    #[test]
    fn every_tensor_of_every_kind_gets_its_gradient() {
        let layout = RowLayout::packed(&[3, 2]);
        let all = || rand(&[5, HIDDEN]);
        for kind in 0..60 {
            let mut vars = Vec::new();
            // smooth: differences across a kink are no derivative
            let act = [Act::Silu, Act::Gelu, Act::Tanh][kind % 3];
            let patch = Patch::Bottleneck(Box::new(Bottleneck { act, ..adapter(6, kind) }));
            let patch = patch
                .map(&mut |name, t| {
                    // a norm behind a scaling near 0 turns within any step
                    let var =
                        if name == "scaling" { Var::from_tensor(&(t.abs()? + 0.5)?)? } else { Var::from_tensor(t)? };
                    vars.push((name, var.clone()));
                    Ok(var.as_tensor().clone())
                })
                .unwrap();
            let Patch::Bottleneck(b) = patch else { panic!("another kind") };
            let delta = delta(vec![*b]);
            let batch = DeltaBatch::new(&layout, &[Some(delta), None], 2);
            let io = AdapterIo { residual: all(), sum: Some(all()), normed: Some(all()) };
            let (h, w) = (all(), all());
            let loss = || {
                let y = batch.adapt(1, h.clone(), &io).unwrap();
                (y * &w).unwrap().sum_all().unwrap()
            };
            let grads = loss().backward().unwrap();
            for (name, var) in &vars {
                let g = grads.get(var).unwrap_or_else(|| panic!("{kind} {name} has no gradient"));
                // along the gradient itself, by central differences
                let norm = g.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap();
                let (at, step) = (var.as_detached_tensor().copy().unwrap(), 1e-2 / f64::from(norm.max(1e-3)));
                let value = |s: f64| {
                    var.set(&(&at + (g.detach() * s).unwrap()).unwrap()).unwrap();
                    f64::from(loss().to_scalar::<f32>().unwrap())
                };
                let slope = (value(step) - value(-step)) / (2.0 * step);
                var.set(&at).unwrap();
                let want = f64::from(norm) * f64::from(norm);
                assert!((slope - want).abs() <= 0.05 * want + 0.02, "{kind} {name}: {slope} {want}");
            }
        }
    }
}
