//! What frozen linears are trained to add, by delta and rows, where one op can do all of it.

use super::{DeltaBatch, Part};
use crate::{
    delta::Patch,
    ops::{RowUpdates, Update},
};

impl DeltaBatch {
    /// What each delta's rows of a linear of these parts get, where a gradient is wanted and that is all: low-rank updates and
    /// biases. Rows of other deltas get nothing. `rows` are those of the linear's input.
    pub(crate) fn updates(&self, parts: &[Part], rows: usize) -> Option<Vec<RowUpdates<'_>>> {
        if !self.tracked || self.rows != rows {
            return None;
        }
        // a delta alone on a few rows of a pass (pooled ones) keeps the ops whose last bits its checkpoints were made with
        if let [slot] = self.slots.as_slice()
            && !slot.covers(rows)
        {
            return None;
        }
        let mut by_slot: Vec<Vec<Update<'_>>> = vec![Vec::new(); self.slots.len()];
        for (site, columns) in parts {
            for entry in self.plan.get(*site).into_iter().flatten() {
                let mut update = Update { columns: columns.clone(), low: Vec::new(), bias: Vec::new() };
                for (_, patch) in self.entry(entry).1 {
                    match patch {
                        Patch::LowRank(l) => update.low.push((&l.a, &l.b, l.scale)),
                        Patch::Bias(b) => update.bias.push(b),
                        _ => return None,
                    }
                }
                by_slot[entry.0].push(update);
            }
        }
        // a delta without rows gets no gradient
        let own = self.slots.iter().zip(by_slot).filter(|(slot, own)| !slot.rows.is_empty() && !own.is_empty());
        let all: Vec<_> = own.map(|(slot, updates)| RowUpdates { rows: &slot.rows, updates }).collect();
        (!all.is_empty()).then_some(all)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::{
        delta::{Delta, LowRank, batch::tests},
        ops::{self, Ending, Weight},
        rows::RowLayout,
    };

    const IN: usize = 20;
    /// Of the parts: sites 0, 1 and 2 side by side.
    const WIDTHS: [usize; 3] = [24, 8, 16];

    fn rand(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
    }

    fn var(shape: &[usize]) -> Tensor {
        Var::from_tensor(&rand(shape)).unwrap().as_tensor().clone()
    }

    fn pair(site: usize, rank: usize) -> (usize, Patch) {
        (site, Patch::LowRank(LowRank { a: var(&[rank, IN]), b: var(&[rank, WIDTHS[site]]), scale: 0.5 }))
    }

    fn bias(site: usize) -> (usize, Patch) {
        (site, Patch::Bias(var(&[WIDTHS[site]])))
    }

    fn parts() -> Vec<Part> {
        let mut from = 0;
        let part = |(site, width)| {
            from += width;
            (site, from - width..from)
        };
        WIDTHS.into_iter().enumerate().map(part).collect()
    }

    fn near(a: &Tensor, b: &Tensor) -> bool {
        let apart = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        apart.to_scalar::<f32>().unwrap() < 1e-3
    }

    fn batch_of(layout: &RowLayout, deltas: &[Arc<Delta>], spans: &[Option<usize>]) -> DeltaBatch {
        let per_span: Vec<_> = spans.iter().map(|i| i.map(|i| Arc::clone(&deltas[i]))).collect();
        DeltaBatch::new(layout, &per_span, WIDTHS.len())
    }

    /// One op against gathered rows and an op per patch: deltas with several pairs, with biases, with nothing at a part or at
    /// all; rows one delta after the other, in turns, and with rows of the bare base between them.
    #[test]
    fn one_op_comes_to_what_gathered_rows_come_to() {
        let deltas: Vec<Arc<Delta>> = [
            vec![pair(0, 3), pair(0, 5), pair(2, 8), bias(2)],
            vec![bias(0), bias(1), bias(2)],
            vec![pair(1, 1)],
            vec![],
            vec![pair(0, 4), pair(1, 16), pair(2, 2)],
        ]
        .map(tests::delta)
        .into();
        let spans = [
            vec![Some(0), Some(1), Some(2), Some(3), Some(4)],
            vec![Some(4), Some(0), None, Some(4), Some(2), Some(0), None],
            vec![None, Some(3), Some(1), Some(1), None],
            vec![Some(2), Some(2), Some(2)],
        ];
        let n = WIDTHS.iter().sum::<usize>();
        let weight = Weight::from_out_in(&rand(&[n, IN])).unwrap();
        let own = rand(&[n]);
        for (spans, seed) in spans.iter().zip(0..) {
            let lens: Vec<usize> = (0..spans.len()).map(|i| 1 + (seed + 5 * i) % 9).collect();
            let layout = RowLayout::packed(&lens);
            let batch = batch_of(&layout, &deltas, spans);
            let x = var(&[layout.rows(), IN]);
            let updates = batch.updates(&parts(), layout.rows()).expect("low-rank updates and biases only");
            assert!(ops::takes_updates(&x, &weight, Some(&own), &updates, Ending::default()));
            let got = ops::updated_linear(&x, &weight, Some(&own), &updates, Ending::default()).unwrap();
            let plain = ops::linear(&x, &weight, Some(&own)).unwrap();
            let want = batch.patch_reference(&parts(), &x, &plain).unwrap();
            assert!(near(&got, &want), "{spans:?}");
            let g = rand(&[layout.rows(), n]);
            let grads = |y: &Tensor| (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (grads(&got), grads(&want));
            let patches = deltas.iter().flat_map(|d| d.patches()).flat_map(|(_, p)| p.tensors());
            let mut compared = 0;
            for (name, t) in patches.chain([("x", &x)]) {
                match (got.get(t), want.get(t)) {
                    (Some(got), Some(want)) => assert!(near(got, want), "{spans:?} {name}"),
                    (got, want) => assert_eq!(got.is_some(), want.is_some(), "{spans:?} {name}"),
                }
                compared += usize::from(got.get(t).is_some());
            }
            assert!(compared >= 3, "{spans:?}: {compared}");
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range of rows is meant")]
    fn anything_else_is_left_to_separate_ops() {
        let scale = || (1, Patch::Scale(var(&[WIDTHS[1]])));
        let deltas: Vec<Arc<Delta>> =
            [vec![pair(0, 2)], vec![pair(0, 3), scale()], vec![pair(2, 1), bias(1)]].map(tests::delta).into();
        let layout = RowLayout::packed(&[2, 3, 1]);
        let of = |batch: &DeltaBatch, sites: &[usize], rows: usize| {
            let parts: Vec<Part> = parts().into_iter().filter(|(site, _)| sites.contains(site)).collect();
            batch.updates(&parts, rows).map(|all| all.iter().map(|one| one.rows.to_vec()).collect::<Vec<_>>())
        };
        let mixed = batch_of(&layout, &deltas, &[Some(0), Some(1), Some(2)]);
        assert_eq!(
            of(&mixed, &[0], 6),
            Some(vec![vec![0..2], vec![2..5]]),
            "a delta without a patch there has no part"
        );
        assert_eq!(of(&mixed, &[2], 6), Some(vec![vec![5..6]]));
        assert_eq!(of(&mixed, &[0, 1], 6), None, "a factor of the output");
        assert_eq!(of(&mixed, &[0], 5), None, "other rows than the step's");
        assert_eq!(of(&mixed.picked(&[5, 0, 1]), &[0, 2], 3), Some(vec![vec![1..3], vec![0..1]]));
        let turns = batch_of(&layout, &deltas, &[Some(2), None, Some(2)]);
        assert_eq!(of(&turns, &[1, 2], 6), None, "one delta, but not on all rows");
        let alone = batch_of(&layout, &deltas, &[Some(2), Some(2), Some(2)]);
        assert_eq!(of(&alone, &[1, 2], 6), Some(vec![vec![0..6]]));
        assert_eq!(of(&alone, &[0], 6), None, "nothing is trained there");
        let plain = |d: &Arc<Delta>| Arc::new(d.map(&mut |_, t| Ok(t.detach())).unwrap());
        let plain: Vec<Arc<Delta>> = deltas.iter().map(plain).collect();
        assert_eq!(
            of(&batch_of(&layout, &plain, &[Some(0), Some(1), Some(2)]), &[0], 6),
            None,
            "no gradient is wanted"
        );
    }
}
