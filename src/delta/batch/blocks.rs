//! Rows of a training step that several deltas have in blocks, one after the other: each is patched as a piece, and the pieces
//! are put together, so that nothing as wide as the whole step is made once per delta.
//!
//! This is for what linears do not take into their own op (`ops::updated_linear`): patches that are no low-rank updates and
//! biases, patches of norms, and, with pairs side by side, every device but the CPU.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{DeltaBatch, Entry, rows_of};
use crate::delta::{LowRank, Patch};

impl DeltaBatch {
    /// The rows of each slot, if the slots have blocks of rows in order, which are all rows of the step, and a gradient is
    /// wanted.
    fn blocks(&self) -> Option<Vec<Range<usize>>> {
        if !self.tracked || self.slots.len() < 2 {
            return None;
        }
        let mut end = 0;
        let mut blocks = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let [rows] = slot.rows.as_slice() else { return None };
            if rows.start != end || rows.is_empty() {
                return None;
            }
            end = rows.end;
            blocks.push(rows.clone());
        }
        (end == self.rows).then_some(blocks)
    }

    /// One site of rows in blocks: `x` `[rows, in]`, `out` `[rows, out]`; `None` where the rows lie otherwise.
    pub(super) fn patch_blocks(&self, plan: &[Entry], x: &Tensor, out: &Tensor) -> Result<Option<Tensor>> {
        let Some(blocks) = self.blocks().filter(|_| !plan.is_empty()) else { return Ok(None) };
        if let Some(pairs) = self.pairs(plan, &blocks) {
            return self.patch_stacked(&pairs, blocks.len(), x, out).map(Some);
        }
        let (x, out) = (x.contiguous()?, out.contiguous()?);
        let mut pieces = Vec::with_capacity(blocks.len());
        for (i, rows) in blocks.iter().enumerate() {
            let own = |t: &Tensor| rows_of(t, rows);
            let mut piece = own(&out)?;
            if let Some(entry) = plan.iter().find(|(slot, _)| *slot == i) {
                let (_, patches) = self.entry(entry);
                let reads = patches.iter().any(|(_, p)| p.reads_input());
                let own_x = if reads { own(&x)? } else { x.clone() };
                for (_, patch) in patches {
                    piece = patch.apply(&own_x, &piece)?;
                }
            }
            pieces.push(piece);
        }
        Tensor::cat(&pieces, 0).map(Some)
    }

    /// By place within the site, the pair of each slot, where all slots have as many rows and nothing but as many pairs.
    fn pairs(&self, plan: &[Entry], blocks: &[Range<usize>]) -> Option<Vec<Vec<&LowRank>>> {
        let same = blocks.windows(2).all(|w| w[0].len() == w[1].len());
        let all = plan.len() == blocks.len() && plan.iter().enumerate().all(|(i, (slot, _))| *slot == i);
        if !same || !all {
            return None;
        }
        let count = self.entry(plan.first()?).1.len();
        let mut pairs: Vec<Vec<&LowRank>> = vec![Vec::with_capacity(plan.len()); count];
        for entry in plan {
            let (_, patches) = self.entry(entry);
            if patches.len() != count {
                return None;
            }
            for (place, (_, patch)) in pairs.iter_mut().zip(patches) {
                let Patch::LowRank(pair) = patch else { return None };
                place.push(pair);
            }
        }
        Some(pairs)
    }

    /// The pairs of `k` deltas as matrices side by side, smaller ranks filled up with zeros: one product of each kind.
    fn patch_stacked(&self, pairs: &[Vec<&LowRank>], k: usize, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let n = self.rows / k.max(1);
        let x = x.contiguous()?.reshape((k, n, x.dim(1)?))?;
        let mut out = out.clone();
        for place in pairs {
            let ranks = place.iter().map(|p| p.a.dim(0)).collect::<Result<Vec<usize>>>()?;
            let most = ranks.iter().copied().max().unwrap_or(0);
            let filled = |t: &Tensor, rank: usize| {
                let t = t.to_dtype(x.dtype())?;
                if rank < most { t.pad_with_zeros(0, 0, most - rank) } else { Ok(t) }
            };
            let (mut a, mut b) = (Vec::with_capacity(k), Vec::with_capacity(k));
            for (pair, rank) in place.iter().zip(&ranks) {
                a.push(filled(&pair.a, *rank)?);
                b.push((filled(&pair.b, *rank)? * pair.scale)?);
            }
            let (a, b) = (Tensor::stack(&a, 0)?, Tensor::stack(&b, 0)?); // [k, rank, in], [k, rank, out]
            let low = x.matmul(&a.transpose(1, 2)?)?; // [k, rows of each, rank]
            out = (&out + low.matmul(&b)?.reshape(out.shape())?)?;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Var};

    use super::*;
    use crate::{
        delta::{Delta, batch::tests},
        rows::RowLayout,
    };

    fn var(shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn delta(patches: Vec<Patch>) -> Arc<Delta> {
        tests::delta(patches.into_iter().map(|p| (0, p)).collect())
    }

    fn pair(rank: usize, scale: f64) -> Patch {
        Patch::LowRank(LowRank {
            a: var(&[rank, 6]).as_tensor().clone(),
            b: var(&[rank, 5]).as_tensor().clone(),
            scale,
        })
    }

    fn near(a: &Tensor, b: &Tensor) -> bool {
        let apart = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        apart.to_scalar::<f32>().unwrap() < 1e-4
    }

    /// Against each delta on its own rows, alone; the second case has a patch that is no pair, the third unequal blocks.
    #[test]
    fn outputs_and_gradients_are_those_of_each_block_alone() {
        let scale = || Patch::Scale(var(&[5]).as_tensor().clone());
        let bias = || Patch::Bias(var(&[5]).as_tensor().clone());
        let cases = [
            (vec![vec![pair(2, 0.5)], vec![pair(4, 2.0)], vec![pair(1, -1.0)]], [3, 3, 3]),
            (vec![vec![pair(2, 0.5), bias()], vec![pair(3, 2.0), scale()], vec![]], [3, 3, 3]),
            (vec![vec![pair(2, 0.5)], vec![pair(3, 2.0)], vec![pair(3, 1.0)]], [2, 1, 4]),
        ];
        for (patches, lens) in cases {
            let (x, out) = (var(&[lens.iter().sum(), 6]), var(&[lens.iter().sum(), 5]));
            let deltas: Vec<Arc<Delta>> = patches.into_iter().map(delta).collect();
            let layout = RowLayout::packed(&lens);
            let per_span: Vec<_> = deltas.iter().map(|d| Some(Arc::clone(d))).collect();
            let batch = DeltaBatch::new(&layout, &per_span, 1);
            let plan = batch.plan[0].clone();
            let got = batch.patch_blocks(&plan, &x, &out).unwrap().expect("rows in blocks");
            let mut from = 0;
            let alone = deltas.iter().zip(lens).map(|(delta, len)| {
                let own = |t: &Tensor| t.narrow(0, from, len).unwrap();
                let (own_x, mut own_out) = (own(&x), own(&out));
                from += len;
                for (_, patch) in delta.patches() {
                    own_out = patch.apply(&own_x, &own_out).unwrap();
                }
                own_out
            });
            let want = Tensor::cat(&alone.collect::<Vec<_>>(), 0).unwrap();
            assert!(near(&got, &want));
            let weights = Tensor::randn(0f32, 1.0, want.shape(), &Device::Cpu).unwrap();
            let grads = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (grads(&got), grads(&want));
            let patches = deltas.iter().flat_map(|d| d.patches()).flat_map(|(_, p)| p.tensors()).map(|(_, t)| t);
            let mut compared = 0;
            for t in patches.chain([x.as_tensor(), out.as_tensor()]) {
                assert!(near(got.get(t).expect("a gradient"), want.get(t).expect("a gradient")));
                compared += 1;
            }
            assert!(compared >= 6, "{compared}");
        }
    }

    #[test]
    fn rows_that_lie_otherwise_or_want_no_gradient_are_left_to_the_others() {
        let (a, b) = (delta(vec![pair(2, 1.0)]), delta(vec![pair(2, 1.0)]));
        let plain = |d: &Delta| {
            let detached = d.map(&mut |_, t| Ok(t.detach())).unwrap();
            Arc::new(detached)
        };
        let layout = RowLayout::packed(&[2, 2, 2]);
        let has_blocks = |per_span: [Option<&Arc<Delta>>; 3]| {
            let per_span: Vec<_> = per_span.iter().map(|d| d.cloned()).collect();
            DeltaBatch::new(&layout, &per_span, 1).blocks().is_some()
        };
        assert!(has_blocks([Some(&a), Some(&b), Some(&b)]));
        assert!(!has_blocks([Some(&a), Some(&b), Some(&a)]), "not one after the other");
        assert!(!has_blocks([Some(&a), Some(&b), None]), "rows of the bare base");
        assert!(!has_blocks([Some(&a), Some(&a), Some(&a)]), "one delta");
        assert!(!has_blocks([Some(&plain(&a)), Some(&plain(&b)), Some(&plain(&b))]));
    }
}
