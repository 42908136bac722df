//! Deltas made of deltas: weighted merges of LoRA (the conventions of PEFT's `add_weighted_adapter`), and the composition
//! that a request names. Pure tensors; what cannot be combined is refused by name.

mod combine;
mod compose;
mod svd;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};

pub use combine::MajoritySign;
pub use compose::compose;

use crate::delta::{Delta, DeltaSpec, LowRank, Patch, SiteId, SiteTable};

/// One of the deltas that are combined.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Its name, for messages.
    pub name: &'a str,
    /// The delta.
    pub delta: &'a Delta,
    /// Its weight; finite, may be negative.
    pub weight: f64,
}

/// How LoRA deltas become one. With `s_i` a delta's scale (alpha over rank) and `w_i` its weight:
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// `A = sum sign(w_i s_i) sqrt|w_i s_i| A_i`, `B = sum sqrt|w_i s_i| B_i`. Not the sum of the updates. Equal ranks.
    Linear,
    /// `A = [w_i s_i A_i]`, `B = [B_i]`: exactly the weighted sum of the updates; ranks add up.
    Cat,
    /// The best approximation of the weighted sum of the updates of this rank (Eckart and Young 1936); `None` = the largest
    /// rank among the deltas.
    Svd {
        /// Rank of the result.
        rank: Option<usize>,
    },
    /// TIES (Yadav et al. 2023) on A and on B: keep the largest, elect signs, average what agrees. Equal ranks.
    Ties {
        /// Share of the numbers that is kept, (0, 1].
        density: f64,
        /// How signs are elected.
        sign: MajoritySign,
    },
    /// DARE (Yu et al. 2024): drop numbers at random and rescale, then as [`Method::Linear`].
    DareLinear {
        /// Share of the numbers that is kept, (0, 1].
        density: f64,
        /// Of the draw.
        seed: u64,
    },
    /// DARE's dropping, then TIES' signs and averages.
    DareTies {
        /// Share of the numbers that is kept, (0, 1].
        density: f64,
        /// Of the draw.
        seed: u64,
        /// How signs are elected.
        sign: MajoritySign,
    },
}

impl Method {
    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cat => "cat",
            Self::Svd { .. } => "svd",
            Self::Ties { .. } => "ties",
            Self::DareLinear { .. } => "dare_linear",
            Self::DareTies { .. } => "dare_ties",
        }
    }

    fn wants_equal_ranks(self) -> bool {
        !matches!(self, Self::Cat | Self::Svd { .. })
    }
}

/// Why deltas were not combined.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// They cannot be; says which and why.
    #[error("{0}")]
    Refused(String),
    /// The tensors.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A pair at a site, as the methods see it.
struct Pair<'a> {
    /// Weight times scale.
    weight: f64,
    low: &'a LowRank,
}

/// One LoRA delta of several. A site that only some have is merged from those, as in PEFT. The result has scale 1.
///
/// # Errors
/// Fewer than two sources; a delta with anything but plain low-rank pairs; different tasks; different ranks where the method
/// needs equal ones.
pub fn merge(sources: &[Source<'_>], method: Method, sites: &SiteTable) -> Result<Delta, MergeError> {
    let [first, _, ..] = sources else {
        return Err(MergeError::Refused("a merge needs at least two deltas".into()));
    };
    sources.iter().try_for_each(|s| check_plain(s, sites))?;
    if let Some(other) = sources.iter().find(|s| s.delta.spec.task != first.delta.spec.task) {
        let (a, b) = (first.delta.spec.task.as_str(), other.delta.spec.task.as_str());
        return Err(MergeError::Refused(format!("{} is for {a}, but {} is for {b}", first.name, other.name)));
    }
    if method.wants_equal_ranks() {
        check_ranks(sources, method, sites)?;
    }
    let largest = sources.iter().flat_map(|s| ranks(s.delta)).map(|(_, r)| r).max().unwrap_or(1);
    let mut random = combine::draws(method);
    let mut patches = Vec::new();
    for (site, pairs) in by_site(sources) {
        let low = match method {
            Method::Cat => cat(&pairs)?,
            Method::Svd { rank } => svd::best(&pairs, rank.unwrap_or(largest))?,
            _ => combine::pairwise(&pairs, method, &mut random)?,
        };
        patches.push((site, Patch::LowRank(low)));
    }
    let parameters = patches.iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| t.elem_count() as u64).sum();
    let spec = DeltaSpec {
        methods: vec!["lora".into()],
        task: first.delta.spec.task,
        labels: Vec::new(),
        num_virtual_tokens: 0,
        parameters,
        resident_bytes: 0,
    };
    Ok(Delta::new(spec, patches, None))
}

fn label(sites: &SiteTable, site: SiteId) -> String {
    sites.get(site).map(|e| e.label()).unwrap_or_default()
}

/// What a patch is called in refusals.
fn kind(patch: &Patch) -> &'static str {
    match patch {
        Patch::LowRank(_) => "a low-rank pair",
        Patch::Bias(_) => "a bias",
        Patch::Scale(_) => "a scale of the output",
        Patch::InScale(_) => "a scale of the input",
        Patch::Affine(_) => "a whole norm",
        Patch::Dora(_) => "a magnitude (DoRA)",
        Patch::Bottleneck(_) => "a bottleneck adapter",
        Patch::TokenRows(_) => "token rows",
        Patch::Matrix(_) => "a whole matrix",
        Patch::Prompt(_) => "a prompt",
        Patch::Prefix(_) => "a prefix",
    }
}

fn check_plain(s: &Source<'_>, sites: &SiteTable) -> Result<(), MergeError> {
    let mut seen = BTreeSet::new();
    for (site, patch) in s.delta.patches() {
        let module = label(sites, *site);
        if !matches!(patch, Patch::LowRank(_)) {
            let message = format!("{} has {} at {module}; only plain LoRA is merged", s.name, kind(patch));
            return Err(MergeError::Refused(message));
        }
        if !seen.insert(*site) {
            return Err(MergeError::Refused(format!("{} has two low-rank pairs at {module}", s.name)));
        }
    }
    match (seen.is_empty(), s.delta.head()) {
        (true, _) => Err(MergeError::Refused(format!("{} has no low-rank pair; only plain LoRA is merged", s.name))),
        (false, Some(_)) => {
            Err(MergeError::Refused(format!("{} has a head; only LoRA without a head is merged", s.name)))
        }
        (false, None) => Ok(()),
    }
}

fn ranks(delta: &Delta) -> impl Iterator<Item = (SiteId, usize)> {
    delta.patches().iter().filter_map(|(site, p)| match p {
        Patch::LowRank(l) => Some((*site, l.a.dim(0).unwrap_or(0))),
        _ => None,
    })
}

fn check_ranks(sources: &[Source<'_>], method: Method, sites: &SiteTable) -> Result<(), MergeError> {
    let mut known: BTreeMap<SiteId, (usize, &str)> = BTreeMap::new();
    for source in sources {
        for (site, rank) in ranks(source.delta) {
            let (before, name) = *known.entry(site).or_insert((rank, source.name));
            if before != rank {
                let module = label(sites, site);
                return Err(MergeError::Refused(format!(
                    "{} needs equal ranks, but at {module} {name} has rank {before} and {} has rank {rank}; cat and svd do not",
                    method.as_str(),
                    source.name
                )));
            }
        }
    }
    Ok(())
}

fn by_site<'a>(sources: &[Source<'a>]) -> BTreeMap<SiteId, Vec<Pair<'a>>> {
    let mut out: BTreeMap<SiteId, Vec<Pair<'a>>> = BTreeMap::new();
    for source in sources {
        for (site, patch) in source.delta.patches() {
            if let Patch::LowRank(low) = patch {
                out.entry(*site).or_default().push(Pair { weight: source.weight * low.scale, low });
            }
        }
    }
    out
}

/// Side by side: the weights go to A.
fn cat(pairs: &[Pair<'_>]) -> candle_core::Result<LowRank> {
    let a: Vec<Tensor> = pairs.iter().map(|p| &p.low.a * p.weight).collect::<candle_core::Result<_>>()?;
    let b: Vec<&Tensor> = pairs.iter().map(|p| &p.low.b).collect();
    Ok(LowRank { a: Tensor::cat(&a, 0)?, b: Tensor::cat(&b, 0)?, scale: 1.0 })
}

fn on_host(t: &Tensor) -> candle_core::Result<Vec<f32>> {
    t.to_device(&Device::Cpu)?.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()
}
