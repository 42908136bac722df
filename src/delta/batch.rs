//! DeltaBatch: which rows of a step belong to which delta, and what each site has to do about it.
//!
//! The plan is an array by site, compiled once per batch composition. A site that no delta of the step touches costs one
//! branch. Rows that need no gradient go through the kernel (`ops::patch_in_place`), others through
//! [`Patch::apply`](super::Patch::apply); a property test ties the two.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Error, Result, Tensor};

mod blocks;
mod embedding;
mod input;
mod sublayer;
mod updates;

use super::{Delta, Head, Patch, Prefix, Prompt, SiteId, Stack};
use crate::{
    ops::{self, PatchRows, SitePatches},
    rows::RowLayout,
};

/// What a delta has at a site: its slot, and the range of the slot's patches.
type Entry = (usize, Range<usize>);

/// The rows of one block: `[rows of it, ..]`.
fn rows_of(t: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    t.narrow(0, rows.start, rows.len())
}

#[derive(Debug, Clone)]
struct Slot {
    delta: Arc<Delta>,
    rows: Vec<Range<usize>>,
    spans: Vec<usize>,
}

impl Slot {
    /// Whether all rows of the step are its own.
    fn covers(&self, rows: usize) -> bool {
        self.rows.len() == 1 && self.rows[0] == (0..rows)
    }

    /// Its rows as an index tensor; `None` if it has none.
    fn index(&self, device: &Device) -> Result<Option<Tensor>> {
        let idx: Vec<u32> = self.rows.iter().flat_map(|r| r.clone().map(|i| i as u32)).collect();
        if idx.is_empty() { Ok(None) } else { Tensor::new(idx, device).map(Some) }
    }
}

/// The deltas of one step.
#[derive(Debug, Clone, Default)]
pub struct DeltaBatch {
    slots: Vec<Slot>,
    /// By site; the same for all rows that a batch may be made for.
    plan: Arc<Vec<Vec<Entry>>>,
    rows: usize,
    spans: usize,
    tracked: bool,
    /// Whether any delta scales a linear's input.
    scales_inputs: bool,
}

/// A part of a site's output: which site, and which columns of the (possibly fused) matrix are its own.
pub type Part = (SiteId, Range<usize>);

impl DeltaBatch {
    /// No delta at all: the bare base.
    pub fn none() -> Self {
        Self::default()
    }

    /// Compiles the plan of a step: `per_span[i]` is the delta of span `i`.
    pub fn new(rows: &RowLayout, per_span: &[Option<Arc<Delta>>], num_sites: usize) -> Self {
        Self::sparing(rows, per_span, &[], num_sites)
    }

    /// As [`Self::new`], of activated deltas ([`Delta::invoked_by`]): the first `spared[i]` rows of span `i` are left as they are. Where
    /// nothing is said, none are.
    pub fn sparing(rows: &RowLayout, per_span: &[Option<Arc<Delta>>], spared: &[usize], num_sites: usize) -> Self {
        let mut slots: Vec<Slot> = Vec::new();
        for (i, (span, delta)) in rows.spans().iter().zip(per_span).enumerate() {
            let own = span.start + spared.get(i).copied().unwrap_or(0)..span.rows().end;
            let Some(delta) = delta.as_ref().filter(|_| !own.is_empty()) else { continue };
            let at = slots.iter().position(|s| Arc::ptr_eq(&s.delta, delta)).unwrap_or_else(|| {
                slots.push(Slot { delta: Arc::clone(delta), rows: Vec::new(), spans: Vec::new() });
                slots.len() - 1
            });
            let slot = &mut slots[at];
            slot.spans.push(i);
            match slot.rows.last_mut() {
                Some(last) if last.end == own.start => last.end = own.end,
                _ => slot.rows.push(own),
            }
        }
        Self::compile(slots, rows.rows(), rows.spans().len(), num_sites)
    }

    /// One delta for every row (training, evaluation).
    pub fn single(delta: Arc<Delta>, rows: &RowLayout, num_sites: usize) -> Self {
        let per_span = vec![Some(delta); rows.spans().len()];
        Self::new(rows, &per_span, num_sites)
    }

    fn compile(slots: Vec<Slot>, rows: usize, spans: usize, num_sites: usize) -> Self {
        let mut plan = vec![Vec::new(); if slots.is_empty() { 0 } else { num_sites }];
        for (at, slot) in slots.iter().enumerate() {
            let patches = slot.delta.patches();
            let mut from = 0;
            while from < patches.len() {
                let site = patches[from].0;
                let to = from + patches[from..].iter().take_while(|(s, _)| *s == site).count();
                // patches that add positions come last at their site and act elsewhere
                let rowwise = patches[from..to].iter().take_while(|(_, p)| !p.adds_positions()).count();
                if let Some(entry) = plan.get_mut(site).filter(|_| rowwise > 0) {
                    entry.push((at, from..from + rowwise));
                }
                from = to;
            }
        }
        let any = |f: fn(&Patch) -> bool| slots.iter().any(|s| s.delta.patches().iter().any(|(_, p)| f(p)));
        let (tracked, scales_inputs) = (any(Patch::tracked), any(|p| matches!(p, Patch::InScale(_))));
        Self { slots, plan: Arc::new(plan), rows, spans, tracked, scales_inputs }
    }

    /// An entry's slot and patches.
    fn entry(&self, (slot, range): &Entry) -> (&Slot, &[(SiteId, Patch)]) {
        let slot = &self.slots[*slot];
        (slot, &slot.delta.patches()[range.clone()])
    }

    /// The slots that have patches at a site, with those patches.
    fn at(&self, site: SiteId) -> impl Iterator<Item = (&Slot, &[(SiteId, Patch)])> {
        self.plan.get(site).into_iter().flatten().map(|entry| self.entry(entry))
    }

    /// The same deltas for a matrix with `times` rows in place of each (the heads of a row).
    pub(crate) fn repeated(&self, times: usize) -> Self {
        let mut out = self.clone();
        for slot in &mut out.slots {
            slot.rows.iter_mut().for_each(|r| *r = r.start * times..r.end * times);
        }
        out.rows = self.rows * times;
        out
    }

    /// The same deltas for the picked rows only, in the given order; the spans are still those of the step.
    pub(crate) fn picked(&self, pick: &[u32]) -> Self {
        let mut out = self.clone();
        for slot in &mut out.slots {
            let inside = |r: u32| slot.rows.iter().any(|range| range.contains(&(r as usize)));
            let mut rows: Vec<Range<usize>> = Vec::new();
            for (i, _) in pick.iter().enumerate().filter(|(_, r)| inside(**r)) {
                match rows.last_mut() {
                    Some(last) if last.end == i => last.end += 1,
                    _ => rows.push(i..i + 1),
                }
            }
            slot.rows = rows;
        }
        out.rows = pick.len();
        out
    }

    /// Distinct deltas in the step.
    pub fn distinct(&self) -> usize {
        self.slots.len()
    }

    /// Whether any delta of the step has a patch at the site.
    pub fn touches(&self, site: SiteId) -> bool {
        self.plan.get(site).is_some_and(|p| !p.is_empty())
    }

    /// Deltas with a prompt, and their spans.
    pub(super) fn prompts(&self) -> impl Iterator<Item = (&Prompt, &[usize])> {
        let has = |s: &&Slot| s.delta.ahead().rows + s.delta.source_ahead().rows > 0;
        self.slots.iter().filter(has).filter_map(|slot| {
            let find = |(_, p): &(SiteId, Patch)| matches!(p, Patch::Prompt(_));
            match slot.delta.patches().iter().find(|p| find(p)) {
                Some((_, Patch::Prompt(prompt))) => Some((prompt, slot.spans.as_slice())),
                _ => None,
            }
        })
    }

    /// Deltas with a prefix of this kind: (slot, keys, spans).
    pub(super) fn prefixed(&self, stack: Stack) -> impl Iterator<Item = (usize, usize, &[usize])> {
        let keys = move |s: &Slot| s.delta.ahead_of(stack).keys;
        let all = self.slots.iter().enumerate().map(move |(i, s)| (i, keys(s), s.spans.as_slice()));
        all.filter(|(_, n, _)| *n > 0)
    }

    /// The prefix of a slot's delta at a layer's site.
    pub(super) fn prefix(&self, slot: usize, site: SiteId) -> Result<&Prefix> {
        let patches = self.slots.get(slot).map_or(&[][..], |s| s.delta.patches());
        let from = patches.partition_point(|(s, _)| *s < site);
        let found = patches[from..].iter().take_while(|(s, _)| *s == site).find_map(|(_, p)| match p {
            Patch::Prefix(prefix) => Some(prefix),
            _ => None,
        });
        found.ok_or_else(|| Error::msg(format!("a delta has a prefix, but none at site {site}")))
    }

    /// Heads: (spans, their delta's head), and the spans that have none of their own.
    pub(crate) fn heads(&self) -> (Vec<(Vec<usize>, &Head)>, Vec<usize>) {
        let mut rest: Vec<bool> = vec![true; self.spans];
        let mut heads = Vec::new();
        for slot in &self.slots {
            if let Some(head) = slot.delta.head() {
                slot.spans.iter().for_each(|&s| rest[s] = false);
                heads.push((slot.spans.clone(), head));
            }
        }
        (heads, rest.iter().enumerate().filter(|(_, r)| **r).map(|(i, _)| i).collect())
    }

    /// Applies all patches of the given parts. `x` `[rows, in]` is the input of the sites,
    /// `out` `[rows, width]` their fresh output, which may be written in place.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn patch(&self, parts: &[Part], x: &Tensor, out: Tensor) -> Result<Tensor> {
        if !parts.iter().any(|(site, _)| self.touches(*site)) {
            return Ok(out);
        }
        if !self.takes_kernels(&[x, &out]) {
            return self.patch_reference(parts, x, &out);
        }
        let x = x.contiguous()?;
        // which way a delta's rows go depends on that delta alone
        let (fast, others) = (0..self.slots.len()).partition::<Vec<_>, _>(|slot| self.has_kernels(*slot, parts));
        self.patch_fast(&fast, parts, &x, &out)?;
        if others.is_empty() { Ok(out) } else { self.patch_others(&others, parts, &x, &out) }
    }

    /// Whether rows may be changed in place: f32 on the CPU, no gradient wanted.
    fn takes_kernels(&self, tensors: &[&Tensor]) -> bool {
        !self.tracked && tensors.iter().all(|t| !t.track_op() && ops::is_cpu_f32(t))
    }

    /// What a slot's delta has at a site.
    fn of_slot(&self, slot: usize, site: SiteId) -> impl Iterator<Item = &Patch> {
        let own = self.plan.get(site).into_iter().flatten().filter(move |(of, _)| *of == slot);
        own.flat_map(move |entry| self.entry(entry).1).map(|(_, patch)| patch)
    }

    fn has_kernels(&self, slot: usize, parts: &[Part]) -> bool {
        parts.iter().all(|(site, _)| self.of_slot(slot, *site).all(Patch::has_kernel))
    }

    /// All parts in one call, for these slots: a delta's rows of the input are read once for all of its sites.
    fn patch_fast(&self, slots: &[usize], parts: &[Part], x: &Tensor, out: &Tensor) -> Result<()> {
        let mut by_slot: Vec<SitePatches<'_>> =
            self.slots.iter().map(|slot| SitePatches { rows: &slot.rows, sites: Vec::new() }).collect();
        for (site, columns) in parts {
            for entry in self.plan.get(*site).into_iter().flatten().filter(|(slot, _)| slots.contains(slot)) {
                let mut ops = Vec::new();
                for (_, patch) in self.entry(entry).1 {
                    row_ops(patch, &mut ops);
                }
                by_slot[entry.0].sites.push((columns.clone(), ops));
            }
        }
        by_slot.retain(|group| group.sites.iter().any(|(_, ops)| !ops.is_empty()));
        if by_slot.is_empty() { Ok(()) } else { ops::patch_in_place(out, x, &by_slot) }
    }

    /// The same for slots that have a patch without a kernel: on rows of their own, which are put back as they are, so that they
    /// come to the same beside any other rows.
    #[allow(clippy::single_range_in_vec_init, reason = "one range of rows is meant")]
    fn patch_others(&self, slots: &[usize], parts: &[Part], x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let out = out.force_contiguous()?;
        for slot in slots {
            let rows: Vec<u32> = self.slots[*slot].rows.iter().flat_map(|r| r.clone().map(|i| i as u32)).collect();
            let Some(idx) = self.slots[*slot].index(out.device())? else { continue };
            let (x, before) = (x.index_select(&idx, 0)?, out.index_select(&idx, 0)?);
            let mut pieces = Vec::with_capacity(parts.len());
            for (site, columns) in parts {
                let mut own = before.narrow(1, columns.start, columns.len())?;
                for patch in self.of_slot(*slot, *site) {
                    if !patch.has_kernel() {
                        own = patch.apply(&x, &own)?;
                        continue;
                    }
                    let mut ops = Vec::new();
                    row_ops(patch, &mut ops);
                    own = own.force_contiguous()?;
                    let all = SitePatches { rows: &[0..rows.len()], sites: vec![(0..columns.len(), ops)] };
                    ops::patch_in_place(&own, &x, &[all])?;
                }
                pieces.push(own);
            }
            ops::write_rows(&out, &rows, &Tensor::cat(&pieces, 1)?)?;
        }
        Ok(out)
    }

    /// The reference: gathers each delta's rows, applies its patches, puts them back. Differentiable, any device.
    pub(crate) fn patch_reference(&self, parts: &[Part], x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let mut pieces = Vec::with_capacity(parts.len());
        for (site, columns) in parts {
            let whole = columns.len() == out.dim(1)?;
            let piece = if whole { out.clone() } else { out.narrow(1, columns.start, columns.len())? };
            pieces.push(self.patch_site(*site, x, piece)?);
        }
        match pieces.len() {
            1 => Ok(pieces.swap_remove(0)),
            _ => Tensor::cat(&pieces, 1),
        }
    }

    /// The reference for one site: `out` `[rows, out]` is exactly the site's.
    pub(crate) fn patch_site(&self, site: SiteId, x: &Tensor, mut out: Tensor) -> Result<Tensor> {
        let Some(plan) = self.plan.get(site) else { return Ok(out) };
        if let Some(patched) = self.patch_blocks(plan, x, &out)? {
            return Ok(patched);
        }
        for (slot, patches) in self.at(site) {
            if slot.covers(self.rows) {
                for (_, patch) in patches {
                    out = patch.apply(x, &out)?;
                }
                continue;
            }
            let Some(idx) = slot.index(out.device())? else { continue };
            let needs_x = patches.iter().any(|(_, p)| p.reads_input());
            let own_x = if needs_x { x.contiguous()?.index_select(&idx, 0)? } else { x.clone() };
            let before = out.contiguous()?.index_select(&idx, 0)?;
            let mut own = before.clone();
            for (_, patch) in patches {
                own = patch.apply(&own_x, &own)?;
            }
            out = out.contiguous()?.index_add(&idx, &(own - before)?, 0)?;
        }
        Ok(out)
    }
}

/// A patch as operations of the row kernel.
fn row_ops<'a>(patch: &'a Patch, out: &mut Vec<PatchRows<'a>>) {
    let low = match patch {
        Patch::LowRank(l) => Some(l),
        Patch::Dora(d) => d.folded().map(|f| {
            out.push(PatchRows::Scale(&f.gain));
            out.extend(f.keep.iter().map(PatchRows::Bias));
            &f.low
        }),
        Patch::Bias(b) => {
            out.push(PatchRows::Bias(b));
            None
        }
        Patch::Scale(s) => {
            out.push(PatchRows::Scale(s));
            None
        }
        Patch::Affine(n) => {
            out.push(PatchRows::Affine { gain: &n.gain, bias: n.bias.as_ref(), center: n.center, eps: n.eps as f32 });
            None
        }
        // applied elsewhere: ahead of the matrix, at the sublayer; or by the reference
        Patch::InScale(_)
        | Patch::Bottleneck(_)
        | Patch::TokenRows(_)
        | Patch::Matrix(_)
        | Patch::Prompt(_)
        | Patch::Prefix(_) => None,
    };
    if let Some(l) = low {
        out.push(PatchRows::LowRank { a: &l.a, b: &l.b, scale: l.scale as f32 });
    }
}

#[cfg(test)]
mod tests;
