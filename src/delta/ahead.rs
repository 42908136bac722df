//! Positions ahead of the tokens: what prompts and prefixes add to a step.
//!
//! Virtual rows are real rows of the step whose embedding is overwritten. Prefix keys and values have no rows: with a
//! cache they are written to the slots that sequences have for them in the step that says so (the engine's sequences of a
//! delta share these slots, and the first of them says so), and are ordinary context afterwards; without one they lie
//! behind the keys of the step's rows, once for all spans of a delta, and spans name them. The same holds of
//! cross-attention, whose keys are the encoder's rows and whose prefix is written for each sequence.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor, bail};

use super::{DeltaBatch, Patch, PrefixForm, PromptStage, SiteId, Stack};
use crate::{
    ops::KeyRows,
    rows::{Ahead, RowLayout},
};

/// What patches put ahead of the positions of a stack.
pub(super) fn of(patches: &[(SiteId, Patch)], stack: Stack) -> Ahead {
    let mut ahead = Ahead::default();
    let prompt = patches.iter().find_map(|(_, p)| match p {
        Patch::Prompt(p) if p.stack == stack => Some(p),
        _ => None,
    });
    let prefix = patches.iter().find_map(|(_, p)| match p {
        Patch::Prefix(p) if p.stack == stack => Some(p),
        _ => None,
    });
    if let Some(prompt) = prompt {
        ahead.rows = prompt.rows.dims().first().copied().unwrap_or(0);
        if prompt.stage == PromptStage::Hidden {
            ahead.shift -= ahead.rows as isize;
        }
    }
    if let Some(prefix) = prefix {
        ahead.keys = prefix.k.dims().first().copied().unwrap_or(0);
        match prefix.form {
            PrefixForm::Context => ahead.shift += ahead.keys as isize,
            PrefixForm::Pinned => ahead.pinned = true,
        }
    }
    ahead
}

/// A sequence's keys, before prefixes are looked at.
pub(crate) struct Keys<'a> {
    /// Those of this step, among all of the step.
    pub(crate) rows: Range<usize>,
    /// Cache slots of all its keys, a prefix's first; `None` without a cache.
    pub(crate) slots: Option<&'a Arc<[u32]>>,
    /// Whether a prefix's keys are to be written to their slots: they are not there yet.
    pub(crate) begins: bool,
}

/// Prefixes of a step: per delta that has one, the number of its keys and its spans.
#[derive(Debug, Clone, Default)]
pub(crate) struct Prefixes {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// Which of the batch's slots.
    slot: usize,
    /// With a cache: where the keys go.
    begins: Vec<u32>,
    /// How many times they are written: once for each sequence that does not find them.
    times: usize,
}

/// Where the keys of each sequence are and how many of them are a prefix's, and what is to be done about prefixes. The
/// sequences are the spans that the deltas' batch was made for; `fresh` keys are computed in this step.
///
/// # Errors
/// Sequences that are not those of the batch; fewer cache slots than keys.
pub(crate) fn prefix_keys(
    sequences: &[Keys<'_>],
    fresh: usize,
    deltas: &DeltaBatch,
    stack: Stack,
) -> Result<(Vec<(KeyRows, usize)>, Prefixes)> {
    // ordinary steps: rows are keys
    let plain = |s: &Keys<'_>| match s.slots {
        Some(slots) => KeyRows::Slots(Arc::clone(slots)),
        None => KeyRows::From(s.rows.start),
    };
    let mut keys: Vec<(KeyRows, usize)> = sequences.iter().map(|s| (plain(s), 0)).collect();
    let mut prefixes = Prefixes::default();
    let mut behind = fresh;
    for (slot, n, spans) in deltas.prefixed(stack) {
        let mut entry = Entry { slot, begins: Vec::new(), times: 0 };
        let mut appended = false;
        for &at in spans {
            let Some(sequence) = sequences.get(at) else { bail!("span {at} of {}", sequences.len()) };
            keys[at].1 = n;
            match sequence.slots {
                None => {
                    let own = sequence.rows.clone().map(|r| r as u32);
                    keys[at].0 = KeyRows::Slots((behind..behind + n).map(|r| r as u32).chain(own).collect());
                    appended = true;
                }
                Some(slots) if sequence.begins => {
                    let Some(first) = slots.get(..n) else { bail!("{} slots for {n} prefix keys", slots.len()) };
                    entry.begins.extend_from_slice(first);
                    entry.times += 1;
                }
                Some(_) => {}
            }
        }
        behind += if appended { n } else { 0 };
        if appended || entry.times > 0 {
            prefixes.entries.push(entry);
        }
    }
    Ok((keys, prefixes))
}

impl Prefixes {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values of a layer followed by those of all prefixes: `[rows + prefix keys, kv_width]` each.
    ///
    /// # Errors
    /// A delta without a prefix at this layer; shapes that do not fit.
    pub(crate) fn join(&self, site: SiteId, deltas: &DeltaBatch, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (mut ks, mut vs) = (vec![k.clone()], vec![v.clone()]);
        for entry in &self.entries {
            let prefix = deltas.prefix(entry.slot, site)?;
            ks.push(prefix.k.to_dtype(k.dtype())?);
            vs.push(prefix.v.to_dtype(v.dtype())?);
        }
        Ok((Tensor::cat(&ks, 0)?, Tensor::cat(&vs, 0)?))
    }

    /// Hands every prefix of a layer to `write`, with the cache slots that it goes to.
    ///
    /// # Errors
    /// A delta without a prefix at this layer, and those of `write`.
    pub(crate) fn write(
        &self,
        site: SiteId,
        deltas: &DeltaBatch,
        mut write: impl FnMut(&[u32], &Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        for entry in &self.entries {
            let prefix = deltas.prefix(entry.slot, site)?;
            let repeated = |t: &Tensor| if entry.times == 1 { Ok(t.clone()) } else { t.repeat((entry.times, 1)) };
            write(&entry.begins, &repeated(&prefix.k)?, &repeated(&prefix.v)?)?;
        }
        Ok(())
    }
}

impl DeltaBatch {
    /// Puts the rows of this stack's prompts of this stage where the layout has virtual rows: `x` `[rows, hidden]` -> the same.
    /// Differentiable in both.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn virtual_rows(&self, stack: Stack, stage: PromptStage, rows: &RowLayout, x: Tensor) -> Result<Tensor> {
        let mut pieces = vec![x];
        let mut behind = rows.rows();
        let mut pick: Vec<u32> = (0..behind as u32).collect();
        for (prompt, spans) in self.prompts().filter(|(p, _)| p.stage == stage && p.stack == stack) {
            let mut used = false;
            for span in spans.iter().filter_map(|&at| rows.spans().get(at)) {
                for i in 0..span.virtual_len() {
                    pick[span.start + i] = (behind + span.context_len + i) as u32;
                    used = true;
                }
            }
            if used {
                behind += prompt.rows.dim(0)?;
                pieces.push(prompt.rows.to_dtype(pieces[0].dtype())?);
            }
        }
        if pieces.len() == 1 {
            return Ok(pieces.swap_remove(0));
        }
        let pick = Tensor::new(pick, pieces[0].device())?;
        Tensor::cat(&pieces, 0)?.index_select(&pick, 0)
    }
}

/// A layout without a cache for sequences of so many tokens, each after what its delta puts ahead of them.
impl RowLayout {
    /// As [`RowLayout::packed`], for the deltas of the sequences.
    pub fn packed_for(lens: &[usize], per_span: &[Option<Arc<super::Delta>>]) -> Self {
        let ahead = |i: usize| per_span.get(i).and_then(Option::as_ref).map(|d| d.ahead()).unwrap_or_default();
        Self::packed_after(lens.iter().enumerate().map(|(i, &len)| (len, ahead(i))))
    }
}
