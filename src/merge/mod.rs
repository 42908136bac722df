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
pub(crate) use compose::adds_up;
pub use compose::compose;

use crate::delta::{Delta, DeltaSpec, LowRank, Patch, SiteId, SiteTable};

/// Largest rank that pairs at one site may come to side by side.
pub const MAX_RANK: usize = 1024;
/// Largest such rank that is decomposed: the work grows with its square times the width, and with its third power.
pub const MAX_SVD_RANK: usize = 256;

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

/// How LoRA deltas become one, as PEFT's `add_weighted_adapter` does. `s_i` is a delta's scale (alpha over rank), `w_i` its
/// weight.
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
    /// Keep the largest numbers of each A and each B, then as [`Method::Linear`].
    MagnitudePrune {
        /// Share of the numbers that is kept, (0, 1].
        density: f64,
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
            Self::MagnitudePrune { .. } => "magnitude_prune",
            Self::DareLinear { .. } => "dare_linear",
            Self::DareTies { .. } => "dare_ties",
        }
    }

    /// Share of the numbers that is kept, for the methods that drop some.
    pub fn density(self) -> Option<f64> {
        match self {
            Self::Ties { density, .. }
            | Self::MagnitudePrune { density }
            | Self::DareLinear { density, .. }
            | Self::DareTies { density, .. } => Some(density),
            Self::Linear | Self::Cat | Self::Svd { .. } => None,
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
    /// Nobody waits for it any more.
    #[error("was given up")]
    Stopped,
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

/// One LoRA delta of several. A site that only some have is merged from those, as in PEFT. The result has scale 1. `stop` is
/// asked between sites, and many times in a decomposition: nobody may be waiting any more.
///
/// # Errors
/// Fewer than two sources; a delta with anything but plain low-rank pairs; different tasks or labels; different ranks where the
/// method needs equal ones; ranks over [`MAX_RANK`] or [`MAX_SVD_RANK`]; [`MergeError::Stopped`].
pub fn merge(
    sources: &[Source<'_>],
    method: Method,
    sites: &SiteTable,
    stop: &dyn Fn() -> bool,
) -> Result<Delta, MergeError> {
    let mut keep = combine::draws(method);
    merge_with(sources, method, sites, stop, &mut keep)
}

/// As [`merge`]; `keep` says of one number after the other whether DARE keeps it: site by site, A of each delta, then B.
fn merge_with(
    sources: &[Source<'_>],
    method: Method,
    sites: &SiteTable,
    stop: &dyn Fn() -> bool,
    keep: &mut dyn FnMut() -> bool,
) -> Result<Delta, MergeError> {
    let [first, _, ..] = sources else {
        return Err(MergeError::Refused("a merge needs at least two deltas".into()));
    };
    check_called(sources)?;
    sources.iter().try_for_each(|s| check_plain(s, sites))?;
    check_same_task(sources)?;
    if method.wants_equal_ranks() {
        check_ranks(sources, method, sites)?;
    }
    let largest = sources.iter().flat_map(|s| ranks(s.delta)).map(|(_, r)| r).max().unwrap_or(1);
    let mut patches = Vec::new();
    for (site, pairs) in by_site(sources) {
        if stop() {
            return Err(MergeError::Stopped);
        }
        let low = match method {
            Method::Cat => {
                check_sum(&pairs, MAX_RANK, site, sites)?;
                cat(&pairs)?
            }
            Method::Svd { rank } => {
                check_sum(&pairs, MAX_SVD_RANK, site, sites)?;
                svd::best(&pairs, rank.unwrap_or(largest), stop)?
            }
            _ => combine::pairwise(&pairs, method, keep)?,
        };
        patches.push((site, Patch::LowRank(low)));
    }
    let parameters = patches.iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| t.elem_count() as u64).sum();
    let spec = DeltaSpec { methods: vec!["lora".into()], parameters, ..first.delta.spec.clone() };
    Ok(Delta::new(spec, patches, None))
}

/// What acts on some tokens only does not add up with what acts on others.
fn check_called(sources: &[Source<'_>]) -> Result<(), MergeError> {
    match sources.iter().find(|s| s.delta.invocation().is_some()) {
        Some(called) => Err(MergeError::Refused(format!(
            "{} is an activated LoRA, which acts behind its invocation tokens only; it is combined with nothing",
            called.name
        ))),
        None => Ok(()),
    }
}

/// What deltas without a head are for must be one thing.
fn check_same_task(sources: &[Source<'_>]) -> Result<(), MergeError> {
    let Some((first, others)) = sources.split_first() else { return Ok(()) };
    let a = &first.delta.spec;
    for other in others {
        let b = &other.delta.spec;
        let message = if a.task != b.task {
            format!("{} is for {}, but {} is for {}", first.name, a.task.as_str(), other.name, b.task.as_str())
        } else if (a.problem, &a.labels) != (b.problem, &b.labels) {
            format!("{} and {} have different labels", first.name, other.name)
        } else {
            continue;
        };
        return Err(MergeError::Refused(message));
    }
    Ok(())
}

/// The rank of pairs side by side.
fn check_sum(pairs: &[Pair<'_>], most: usize, site: SiteId, sites: &SiteTable) -> Result<(), MergeError> {
    let rank: usize = pairs.iter().map(|p| p.low.a.dim(0).unwrap_or(0)).sum();
    if rank <= most {
        return Ok(());
    }
    let module = label(sites, site);
    Err(MergeError::Refused(format!("at {module} the ranks add up to {rank}; accepted are up to {most}")))
}

/// A site's name for messages.
pub(crate) fn label(sites: &SiteTable, site: SiteId) -> String {
    sites.get(site).map(|e| e.label()).unwrap_or_default()
}

/// What a patch is called in refusals.
pub(crate) fn kind(patch: &Patch) -> &'static str {
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
