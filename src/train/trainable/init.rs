//! Initial values of every method.

use candle_core::{DType, Device, Error, Result, Tensor, Var, bail};
use rand::{Rng, rngs::StdRng};

use super::{NamedVar, Part, Trainable};
use crate::{
    delta::{
        Affine, Bottleneck, DeltaSpec, Dora, DoraBase, Head, HeadLayer, HeadPool, LowRank, Matrix, Patch, Scaling,
        Site, SiteEntry, SiteId, SiteTable, TokenRows,
    },
    model::Base,
    train::{
        batches::{self, Stream},
        spec::{AdapterPlan, HeadPlan, LowRankPlan, PatchPlan, ScalingPlan, TrainSpec},
        svd,
    },
};

/// Standard deviation of adapters' and heads' initial weights.
const STD: f32 = 0.02;
/// Epsilon of adapters' own norms (torch's default).
const NORM_EPS: f64 = 1e-5;

pub(super) fn build(
    spec: &TrainSpec,
    sites: &SiteTable,
    base: Option<&Base>,
    seed: u64,
    device: &Device,
) -> Result<Trainable> {
    let mut b = Builder { vars: Vec::new(), rng: batches::rng(seed, Stream::Init), device, base };
    let full = if spec.full.is_some() { Some(b.copied(spec.task)?) } else { None };
    let mut networks = b.networks(spec)?;
    let mut parts = Vec::with_capacity(spec.patches.len());
    for (site, plan) in &spec.patches {
        let entry = sites.get(*site).ok_or_else(|| Error::msg(format!("no site {site}")))?;
        match plan {
            PatchPlan::Prompt { .. } | PatchPlan::Prefix { .. } => {
                let positions = b.positions(*site, plan, entry.out_dim, &mut networks)?;
                parts.push((*site, Part::Positions(positions)));
            }
            _ => b.part(*site, entry, plan, &mut parts)?,
        }
    }
    let head = spec.head.map(|h| b.head(h)).transpose()?;
    let delta_spec = DeltaSpec {
        methods: spec.methods.clone(),
        task: spec.task,
        labels: spec.labels.clone(),
        num_virtual_tokens: 0,
        problem: spec.problem,
        parameters: b.vars.iter().map(|v| v.var.elem_count() as u64).sum(),
        resident_bytes: 0,
    };
    Trainable { spec: delta_spec, vars: b.vars, parts, encoders: networks.encoders, head, live: None, full }.with_live()
}

/// A head with fresh variables, in the order of its tensors.
pub(super) fn fresh_head(plan: HeadPlan, seed: u64, device: &Device) -> Result<(Head, Vec<NamedVar>)> {
    let mut b = Builder { vars: Vec::new(), rng: batches::rng(seed, Stream::Init), device, base: None };
    let (head, _) = b.head(plan)?;
    Ok((head, b.vars))
}

pub(super) struct Builder<'a> {
    vars: Vec<NamedVar>,
    rng: StdRng,
    device: &'a Device,
    base: Option<&'a Base>,
}

impl<'a> Builder<'a> {
    fn part(&mut self, site: SiteId, entry: &SiteEntry, plan: &PatchPlan, out: &mut Vec<(SiteId, Part)>) -> Result<()> {
        let outputs = entry.out_dim;
        let part = match plan {
            PatchPlan::LowRank(p) => self.low_rank(site, entry, p)?,
            PatchPlan::Bias => self.other(entry, Patch::Bias(self.filled(&[outputs], 0.0)?))?,
            PatchPlan::Scale => self.other(entry, Patch::Scale(self.filled(&[outputs], 1.0)?))?,
            PatchPlan::InScale => self.other(entry, Patch::InScale(self.filled(&[entry.in_dim], 1.0)?))?,
            PatchPlan::Affine => {
                let own = self.base()?.norm(site).ok_or_else(|| Error::msg("no norm at this site"))?;
                let (gain, bias) = (own.gain.clone(), own.bias.clone());
                self.other(entry, Patch::Affine(Affine { gain, bias, center: own.center, eps: own.eps }))?
            }
            PatchPlan::Dora(p) => self.dora(site, entry, p)?,
            PatchPlan::Adapter(p) => {
                let patch = self.adapter(entry.out_dim, p)?;
                self.other(entry, Patch::Bottleneck(Box::new(patch)))?
            }
            PatchPlan::Matrix => {
                let (weight, bias) = match self.base()?.linear(site)? {
                    Some((w, b)) => (w.contiguous()?, b),
                    None => (self.base()?.table()?, None),
                };
                self.other(entry, Patch::Matrix(Matrix { weight, bias }))?
            }
            PatchPlan::TokenRows(ids) => return self.token_rows(site, entry, ids, out),
            PatchPlan::Prompt { .. } | PatchPlan::Prefix { .. } => bail!("{plan:?} is made with its network"),
        };
        out.push((site, part));
        Ok(())
    }

    pub(super) fn base(&self) -> Result<&'a Base> {
        self.base.ok_or_else(|| Error::msg("this method starts from the base's weights, which are not at hand"))
    }

    pub(super) fn add(&mut self, name: String, t: &Tensor, decays: bool, rate: f64) -> Result<usize> {
        let var = own_var(t)?;
        self.vars.push(NamedVar { name, var, decays, rate });
        Ok(self.vars.len() - 1)
    }

    fn filled(&self, shape: &[usize], value: f32) -> Result<Tensor> {
        Tensor::full(value, shape, self.device)
    }

    pub(super) fn uniform(&mut self, shape: (usize, usize), bound: f32) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| self.rng.random_range(-bound..=bound)).collect();
        Tensor::from_vec(values, shape, self.device)
    }

    pub(super) fn gaussian(&mut self, shape: (usize, usize), std: f32) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| std * normal(&mut self.rng)).collect();
        Tensor::from_vec(values, shape, self.device)
    }

    /// Every tensor of the patch becomes a variable.
    fn other(&mut self, entry: &SiteEntry, form: Patch) -> Result<Part> {
        let mut vars = Vec::new();
        for (name, t) in form.tensors() {
            vars.push(self.add(format!("{}.{name}", entry.label()), t, t.rank() > 1, 1.0)?);
        }
        Ok(Part::Other { form, vars })
    }

    /// A and B of a fresh pair: `[rank, in]`, `[rank, out]`.
    fn fresh_pair(&mut self, entry: &SiteEntry, rank: usize) -> Result<(Tensor, Tensor)> {
        if entry.site == Site::Embedding {
            // PEFT starts an embedding's pair the other way round: A zero, B normal
            let vocab = self.base()?.arch.vocab;
            let b = self.gaussian((rank, entry.out_dim), 1.0)?;
            return Ok((self.filled(&[rank, vocab], 0.0)?, b));
        }
        let a = self.uniform((rank, entry.in_dim), 1.0 / (entry.in_dim.max(1) as f32).sqrt())?;
        Ok((a, self.filled(&[rank, entry.out_dim], 0.0)?))
    }

    fn low_rank(&mut self, site: SiteId, entry: &SiteEntry, p: &LowRankPlan) -> Result<Part> {
        let (mut pair, mut start) = (None, None);
        if p.pissa {
            let weight = self.base()?.linear(site)?.ok_or_else(|| Error::msg("no matrix at this site"))?.0;
            let (a, b) = svd::principal_pair(&weight, p.rank, p.scale, &mut self.rng)?;
            start = Some(LowRank { a: a.clone(), b: b.neg()?, scale: p.scale });
            pair = Some((a, b));
        }
        let (a, b) = pair.map_or_else(|| self.fresh_pair(entry, p.rank), Ok)?;
        let a = self.add(format!("{}.lora_A", entry.label()), &a, true, 1.0)?;
        let b = self.add(format!("{}.lora_B", entry.label()), &b, true, p.b_rate)?;
        Ok(Part::LowRank { a, b, scale: p.scale, dropout: p.dropout, start })
    }

    fn dora(&mut self, site: SiteId, entry: &SiteEntry, p: &LowRankPlan) -> Result<Part> {
        let (a, b) = self.fresh_pair(entry, p.rank)?;
        let (weight, bias) = self.base()?.linear(site)?.ok_or_else(|| Error::msg("no matrix at this site"))?;
        let base = DoraBase::new(weight, bias)?;
        let magnitude = base.magnitude()?;
        let form = Patch::Dora(Box::new(Dora::new(LowRank { a, b, scale: p.scale }, magnitude, base)?));
        let mut vars = Vec::new();
        for (name, t) in form.tensors() {
            let rate = if name == "lora_B" { p.b_rate } else { 1.0 };
            vars.push(self.add(format!("{}.{name}", entry.label()), t, t.rank() > 1, rate)?);
        }
        Ok(Part::Other { form, vars })
    }

    fn adapter(&mut self, hidden: usize, p: &AdapterPlan) -> Result<Bottleneck> {
        let norm = |on: bool, b: &Self| -> Result<Option<Affine>> {
            let (gain, bias) = (b.filled(&[hidden], 1.0)?, Some(b.filled(&[hidden], 0.0)?));
            Ok(on.then_some(Affine { gain, bias, center: true, eps: NORM_EPS }))
        };
        Ok(Bottleneck {
            down: self.gaussian((p.width, hidden), STD)?,
            down_bias: self.filled(&[p.width], 0.0)?,
            up: self.filled(&[p.width, hidden], 0.0)?,
            up_bias: self.filled(&[hidden], 0.0)?,
            act: p.act,
            scaling: match p.scaling {
                ScalingPlan::Fixed(s) => Scaling::Fixed(s),
                ScalingPlan::Learned => Scaling::Learned(self.filled(&[1], 1.0)?),
                ScalingPlan::Channel => Scaling::Learned(self.filled(&[hidden], 1.0)?),
            },
            norm_before: norm(p.norm_before, self)?,
            norm_after: norm(p.norm_after, self)?,
            wiring: p.wiring,
        })
    }

    /// Rows of the embedding, which a tied head shares: one variable, two patches.
    fn token_rows(
        &mut self,
        site: SiteId,
        entry: &SiteEntry,
        ids: &[u32],
        out: &mut Vec<(SiteId, Part)>,
    ) -> Result<()> {
        let base = self.base()?;
        let tied = base.sites.id(Site::LmHead).filter(|_| base.arch.tied_head);
        let rows = base.table_rows(ids)?; // [ids, hidden]
        let form = Patch::TokenRows(TokenRows { ids: ids.to_vec(), rows: rows.clone(), base: rows });
        let Part::Other { form, vars } = self.other(entry, form)? else { return Ok(()) };
        if let Some(head) = tied {
            out.push((head, Part::Other { form: form.clone(), vars: vars.clone() }));
        }
        out.push((site, Part::Other { form, vars }));
        Ok(())
    }

    fn head(&mut self, plan: HeadPlan) -> Result<(Head, Vec<usize>)> {
        let mut layers = Vec::new();
        if let Some(act) = plan.inner {
            let (weight, bias) = self.layer(plan.hidden, plan)?;
            layers.push(HeadLayer { weight, bias, act: Some(act) });
        }
        let pool = if plan.inner.is_some() { HeadPool::First } else { HeadPool::Base };
        let (weight, bias) = self.layer(plan.labels, plan)?;
        let head = Head { weight, bias, layers, pool };
        let mut vars = Vec::new();
        for (name, t) in head.tensors() {
            vars.push(self.add(name, t, t.rank() > 1, 1.0)?);
        }
        Ok((head, vars))
    }

    /// A head's layer: `[out, hidden]` and `[out]`.
    fn layer(&mut self, out: usize, plan: HeadPlan) -> Result<(Tensor, Option<Tensor>)> {
        let weight = self.gaussian((out, plan.hidden), STD)?;
        let bias = plan.bias.then(|| self.filled(&[out], 0.0)).transpose()?;
        Ok((weight, bias))
    }
}

/// A variable with a tensor's values, in f32: one copy.
pub(super) fn own_var(t: &Tensor) -> Result<Var> {
    Var::from_tensor(&t.to_dtype(DType::F32)?.detach())
}

/// A standard normal draw (Box and Muller 1958).
fn normal(rng: &mut StdRng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}
