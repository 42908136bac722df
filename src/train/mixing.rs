//! Learned mixing: deltas that stay as they are, whose weights are what a job trains.
//!
//! The update at a site is `sum_i w_i s_i B_i A_i` (LoraHub, Huang et al. 2023, section 2; there the weights are searched
//! without gradients, here they are trained), and a bias `sum_i w_i b_i`. So the result is the weighted sum that
//! [`compose`] makes, and is published as such.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    admission::{
        params::Violation,
        train_params::{MAX_MIXED, ResolvedMix, StartedFrom},
    },
    delta::{Delta, DeltaSpec, Patch, SiteId, SiteTable},
    merge::{self, Source, compose},
    train::transfer::StartingDelta,
};

const FIELD: &str = "mix.deltas";

/// What is mixed.
#[derive(Debug, Clone)]
pub struct Mix {
    /// The deltas, without heads.
    pub deltas: Vec<Arc<Delta>>,
    /// Whether each layer has weights of its own.
    pub per_layer: bool,
    versions: Vec<StartedFrom>,
}

impl Mix {
    /// What a job that mixes these starts from: their mean, with the leases. It computes: not for an async thread.
    ///
    /// # Errors
    /// A number of deltas out of 2 to [`MAX_MIXED`]; a version that is given twice; a delta with anything but low-rank updates
    /// and biases; ranks that add up to more than a site can have. Each names the delta.
    pub fn start(parts: Vec<StartingDelta>, per_layer: bool, sites: &SiteTable) -> Result<StartingDelta, Violation> {
        if !(2..=MAX_MIXED).contains(&parts.len()) {
            return Err(violation(FIELD.to_owned(), format!("has {}; accepted are 2 to {MAX_MIXED}", parts.len())));
        }
        for (i, part) in parts.iter().enumerate() {
            let at = || format!("{FIELD}[{i}]");
            if let Some(before) = parts[..i].iter().find(|p| p.id() == part.id()) {
                return Err(violation(at(), format!("{} is the same version as {}", part.name(), before.name())));
            }
            if let Some((site, patch)) = part.delta().patches().iter().find(|(_, p)| !merge::adds_up(p)) {
                let (what, module) = (merge::kind(patch), merge::label(sites, *site));
                let message = format!("{} has {what} at {module}; mixed are low-rank updates and biases", part.name());
                return Err(violation(at(), message));
            }
            if part.delta().invocation().is_some() {
                let message =
                    format!("{} is an activated LoRA, which acts on some tokens only; it is not mixed", part.name());
                return Err(violation(at(), message));
            }
            if part.delta().patches().is_empty() {
                return Err(violation(
                    at(),
                    format!("{} changes nothing but its head, which is not mixed", part.name()),
                ));
            }
        }
        let mix = Self::of(&parts, per_layer);
        let weight = 1.0 / parts.len() as f64;
        let sources: Vec<Source<'_>> = (parts.iter().zip(&mix.deltas))
            .map(|(part, delta)| Source { name: part.name(), delta: delta.as_ref(), weight })
            .collect();
        let mean = compose(&sources, sites).map_err(|e| violation(FIELD.to_owned(), e.to_string()))?;
        Ok(StartingDelta::mixed(Arc::new(mean), mix, parts))
    }

    /// Of deltas that [`Self::start`] accepted.
    pub(super) fn of(parts: &[StartingDelta], per_layer: bool) -> Self {
        // what each was for does not matter: only the updates are taken
        let spec = |own: &DeltaSpec| DeltaSpec { methods: own.methods.clone(), ..parts[0].delta().spec.clone() };
        let bare = |d: &Delta| Arc::new(Delta::new(spec(&d.spec), d.patches().to_vec(), None));
        let deltas = parts.iter().map(|p| bare(p.delta())).collect();
        Self { deltas, per_layer, versions: parts.iter().map(StartingDelta::record).collect() }
    }

    /// The layer whose weights a site has; `None`: those of all that has none of its own.
    pub fn layer(&self, site: SiteId, sites: &SiteTable) -> Option<usize> {
        sites.get(site).and_then(|e| e.site.layer()).filter(|_| self.per_layer)
    }

    /// All of these.
    pub fn layers(&self, sites: &SiteTable) -> BTreeSet<Option<usize>> {
        self.deltas.iter().flat_map(|d| d.patches()).map(|(site, _)| self.layer(*site, sites)).collect()
    }

    /// Weights that are trained.
    pub fn parameters(&self, sites: &SiteTable) -> u64 {
        (self.layers(sites).len() * self.deltas.len()) as u64
    }

    /// What a run holds beside its weights: the factors, and twice what they make under weights, with a gradient; f32.
    pub fn bytes(&self) -> u64 {
        let of = |p: &Patch| match p {
            Patch::LowRank(low) => low.a.elem_count() + 4 * low.b.elem_count(),
            other => 4 * other.tensors().into_iter().map(|(_, t)| t.elem_count()).sum::<usize>(),
        };
        4 * self.deltas.iter().flat_map(|d| d.patches()).map(|(_, p)| of(p)).sum::<usize>() as u64
    }

    /// What the job's record says.
    pub fn record(&self) -> ResolvedMix {
        ResolvedMix { deltas: self.versions.clone(), per_layer: self.per_layer }
    }
}

fn violation(field: String, message: String) -> Violation {
    Violation { field, code: String::new(), message }
}
