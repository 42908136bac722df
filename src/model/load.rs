//! A checkpoint's tensors to the blocks of a [`Transformer`], as the [`Architecture`] says.

use candle_core::{DType, Tensor};

use super::{
    Architecture, ClsInner, LoadOptions, MlpKind, ModelError, NormKind, Positions, RotaryShape,
    arch::{LayerAttn, StackShape},
    gguf,
    quantize::{self, Quantize},
    sites,
    table::Table,
    transformer::{Block, Cross, LmTransform, Stack, Transformer},
    weights::Checkpoint,
};
use crate::{
    delta::{self, Half, Head, HeadLayer, HeadPool, NormAt, Part, Proj, Site, SiteId, SiteTable, Task},
    nn::{Attention, CrossAttention, Linear, Mlp, Norm, Rotary, Style, Sublayer},
    ops::{self, AttnMask, Quantized, RelativeBias, Weight},
};

type Loaded<T> = Result<T, ModelError>;

impl Transformer {
    pub(super) fn load(
        arch: &Architecture,
        ckpt: &Checkpoint,
        sites: &SiteTable,
        options: &LoadOptions,
    ) -> Loaded<Self> {
        let loader = Loader { arch, ckpt, sites, options };
        let n = &arch.names;
        let h = arch.hidden;
        // a table is quantised as the head that it is; one that is stored in blocks stays in them
        let tied = arch.is_causal() && arch.tied_head && !n.lm_head.is_empty();
        let wanted = options.quantize.filter(|_| tied).and_then(|_| quantize::of_head(h));
        let quantized = |kind, bytes: &[u8]| -> Loaded<Table> {
            Ok(Table::Packed(Quantized::from_blocks(kind, bytes, (arch.vocab, h))?.into()))
        };
        let embed = match (ckpt.blocks(n.embed, [arch.vocab, h])?, wanted) {
            (Some((kind, bytes)), _) => quantized(kind, &bytes)?,
            (None, wanted) => {
                let table = ckpt.get(n.embed, "weight", &[arch.vocab, h])?;
                match wanted {
                    Some(kind) => quantized(kind, &quantize::blocks(&table, kind, n.embed)?)?,
                    None => Table::Own(table),
                }
            }
        };
        let lm_head = loader.lm_head(&embed)?;
        // a tied head that is no view of the table serves as it; a table that is trained stays a plain tensor
        let shared = lm_head.as_ref().map(|head| &head.weight).filter(|w| !w.is_trained() && !w.is_view());
        let embed = match (shared.filter(|_| arch.tied_head), embed) {
            (Some(shared), _) => Table::Packed(shared.clone()),
            (None, Table::Own(table)) if options.in_bf16() => Table::Own(table.to_dtype(DType::BF16)?),
            (None, embed) => embed,
        };
        let table = |name: &str, rows: usize| -> Loaded<Option<Tensor>> {
            if name.is_empty() || rows == 0 { Ok(None) } else { ckpt.get(name, "weight", &[rows, h]).map(Some) }
        };
        let mut stacks = arch.stacks().map(|s| loader.stack(&s)).collect::<Loaded<Vec<_>>>()?;
        let main = stacks.pop().ok_or_else(|| ModelError::Config("a model without layers".into()))?;
        Ok(Self {
            position: table(n.position, arch.max_positions + arch.first_position())?,
            token_type: table(n.token_type, arch.token_types)?,
            embed_norm: loader.maybe_norm(n.embed_norm, Site::EmbeddingNorm, h)?,
            encoder: stacks.pop(),
            main,
            pooler: if n.pooler.is_empty() { None } else { Some(loader.linear(&[(n.pooler, Site::Pooler, h, h)], 0)?) },
            lm_head,
            lm_transform: loader.lm_transform()?,
            head: loader.head()?,
            embed,
            embed_site: loader.site(Site::Embedding)?,
            arch: arch.clone(),
            device: options.device.clone(),
        })
    }
}

struct Loader<'a> {
    arch: &'a Architecture,
    ckpt: &'a Checkpoint,
    sites: &'a SiteTable,
    options: &'a LoadOptions,
}

impl Loader<'_> {
    fn site(&self, site: Site) -> Loaded<SiteId> {
        self.sites.id(site).ok_or_else(|| ModelError::Config(format!("no site {site:?}")))
    }

    /// One or more projections side by side, as one matrix `[in, sum of outs]`.
    fn linear(&self, parts: &[(&str, Site, usize, usize)], layer: usize) -> Loaded<Linear> {
        let (mut modules, mut bs, mut sites) = (Vec::new(), Vec::new(), Vec::new());
        let (mut at, mut in_dim) = (0, 0);
        for &(template, site, i, o) in parts {
            let module = Architecture::module(template, layer);
            bs.push((o, self.ckpt.find(&module, "bias", &[o])?));
            modules.push((module, o));
            sites.push((self.site(site)?, at..at + o));
            (at, in_dim) = (at + o, i);
        }
        let weight = self.weight(&modules, in_dim)?;
        // fused projections have a bias if any of them has one (Qwen2: all three; others: none)
        let bias = if bs.iter().any(|(_, b)| b.is_some()) {
            let parts: Vec<Tensor> = bs
                .into_iter()
                .map(|(o, b)| match b {
                    Some(b) => Ok(b),
                    None => Tensor::zeros(o, self.options.computed(), &self.options.device),
                })
                .collect::<candle_core::Result<_>>()?;
            Some(Tensor::cat(&parts, 0)?)
        } else {
            None
        };
        Ok(Linear { weight, bias, parts: sites })
    }

    /// The matrix of modules that share an input, side by side.
    fn weight(&self, modules: &[(String, usize)], in_dim: usize) -> Loaded<Weight> {
        let conv1d = self.arch.conv1d && !self.ckpt.is_converted();
        if let Some(weight) =
            quantize::weight(self.ckpt, self.options, self.options.quantize, modules, (in_dim, conv1d))?
        {
            return Ok(weight);
        }
        let shape = |o: usize| if conv1d { [in_dim, o] } else { [o, in_dim] };
        let get = |(module, o): &(String, usize)| self.ckpt.get(module, "weight", &shape(*o));
        let mut ws = modules.iter().map(get).collect::<Loaded<Vec<_>>>()?;
        let w = if ws.len() == 1 { ws.swap_remove(0) } else { Tensor::cat(&ws, usize::from(conv1d))? };
        Ok(if conv1d { self.options.in_out(&w)? } else { self.options.out_in(&w)? })
    }

    /// The numbers of a norm.
    fn norm_at(&self, module: &str, width: usize) -> Loaded<ops::Norm> {
        let center = self.arch.norm == NormKind::LayerNorm;
        let gain = self.ckpt.get(module, "weight", &[width])?;
        let offset = if self.ckpt.is_converted() { 0.0 } else { self.arch.norm_offset };
        Ok(ops::Norm {
            gain: if offset == 0.0 { gain } else { (gain + offset)? },
            bias: if center { Some(self.ckpt.get(module, "bias", &[width])?) } else { None },
            center,
            eps: self.arch.norm_eps,
        })
    }

    fn norm(&self, module: &str, site: Site, width: usize) -> Loaded<Norm> {
        let part: Part = (self.site(site)?, 0..width);
        Ok(Norm { norm: self.norm_at(module, width)?, part })
    }

    fn maybe_norm(&self, module: &str, site: Site, width: usize) -> Loaded<Option<Norm>> {
        if module.is_empty() { Ok(None) } else { self.norm(module, site, width).map(Some) }
    }

    fn stack(&self, stack: &StackShape<'_>) -> Loaded<Stack> {
        // layers that attend alike share a plan and a table of angles
        let mut kinds: Vec<LayerAttn> = Vec::new();
        let mut blocks = Vec::with_capacity(stack.layers);
        for at in 0..stack.layers {
            let kind = stack.attn.get(at).copied().unwrap_or_default();
            let style = kinds.iter().position(|k| *k == kind).unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            blocks.push(self.block(stack, at, style)?);
        }
        let bias = self.relative_bias(stack)?;
        let style = |kind: &LayerAttn| {
            Ok(Style {
                mask: AttnMask { causal: stack.causal, window: kind.window },
                rotary: kind.rotary.map(|r| self.rotary(r)).transpose()?,
                bias: bias.clone(),
            })
        };
        let styles = kinds.iter().map(style).collect::<Loaded<_>>()?;
        let final_norm = self.maybe_norm(stack.names.final_norm, stack.final_norm(), self.arch.hidden)?;
        Ok(Stack { blocks, styles, final_norm })
    }

    /// A config's frequencies, divided as a file says that has divisors in place of the config's figures.
    fn rotary(&self, shape: RotaryShape) -> Loaded<Rotary> {
        let rotary = Rotary::new(self.arch.heads.head_dim, shape.dim, shape.theta, shape.scaling);
        if !self.ckpt.is_converted() {
            return Ok(rotary);
        }
        let Some(factors) = self.ckpt.find(gguf::FACTORS, "weight", &[shape.dim / 2])? else { return Ok(rotary) };
        let factors = factors.to_vec1::<f32>()?;
        if factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
            return Err(ModelError::Checkpoint(format!(
                "{} has {factors:?}; positive numbers are accepted",
                gguf::FACTORS
            )));
        }
        Ok(rotary.divided(&factors))
    }

    fn block(&self, stack: &StackShape<'_>, at: usize, style: usize) -> Loaded<Block> {
        let (a, n, layer) = (self.arch, stack.names, stack.first + at);
        let h = a.hidden;
        let named = |list: &[sites::Named]| -> Vec<_> {
            list.iter().map(|&(t, proj, i, o)| (t, Site::Linear { layer, proj }, i, o)).collect()
        };
        let norm = |name: &str, place: NormAt, width: usize| {
            self.maybe_norm(&Architecture::module(name, at), Site::Norm { layer, at: place }, width)
        };
        let must = |norm: Option<Norm>| norm.ok_or_else(|| ModelError::Config(format!("layer {layer} lacks a norm")));
        let head_dim = a.heads.head_dim;
        Ok(Block {
            norm_attn: must(norm(n.norm_attn, NormAt::Attn, h)?)?,
            attn: Attention {
                qkv: self.linear(&named(&sites::qkv(a, stack)), at)?,
                out: self.linear(&named(&[(n.o, Proj::O, a.q_width(), h)]), at)?,
                q_norm: norm(n.q_norm, NormAt::Query, head_dim)?,
                k_norm: norm(n.k_norm, NormAt::Key, head_dim)?,
                style,
                layer: at,
                keys: self.site(Site::KeyValue { layer, stack: stack.which })?,
                layer_scale: if a.scale_by_layer { 1.0 / (at + 1) as f32 } else { 1.0 },
            },
            norm_attn_out: norm(n.norm_attn_out, NormAt::AttnOut, h)?,
            attn_end: Sublayer { site: self.site(Site::Sublayer { layer, half: Half::Attn })? },
            cross: match norm(n.norm_cross, NormAt::Cross, h)? {
                Some(norm) => {
                    let [q, k, v, o] = sites::cross(a, stack);
                    let attn = CrossAttention {
                        q: self.linear(&named(&[q]), at)?,
                        kv: self.linear(&named(&[k, v]), at)?,
                        out: self.linear(&named(&[o]), at)?,
                        layer: at,
                        keys: self.site(Site::KeyValue { layer, stack: delta::Stack::Memory })?,
                    };
                    Some(Cross { norm, attn })
                }
                None => None,
            },
            norm_mlp: must(norm(n.norm_mlp, NormAt::Mlp, h)?)?,
            mlp: Mlp {
                up: self.linear(&named(&sites::up(a, stack)), at)?,
                down: self.linear(&named(&[(n.down, Proj::Down, a.ff, h)]), at)?,
                act: a.act,
                gated: a.mlp == MlpKind::Gated,
            },
            norm_mlp_out: norm(n.norm_mlp_out, NormAt::MlpOut, h)?,
            mlp_end: Sublayer { site: self.site(Site::Sublayer { layer, half: Half::Mlp })? },
        })
    }

    /// The first layer's table of classes of distances, spread out by distance.
    fn relative_bias(&self, stack: &StackShape<'_>) -> Loaded<Option<RelativeBias>> {
        let Positions::Relative { buckets, max_distance } = self.arch.positions else { return Ok(None) };
        let heads = self.arch.heads.heads;
        let module = Architecture::module(stack.names.relative_bias, 0);
        let table = self.ckpt.get(&module, "weight", &[buckets, heads])?;
        let reach = max_distance as i64;
        let class = |distance: i64| relative_bucket(distance, buckets, max_distance, !stack.causal) as u32;
        let classes = Tensor::from_iter((-reach..=reach).map(class), table.device())?;
        let values = table.index_select(&classes, 0)?.t()?.contiguous()?; // [heads, 2 reach + 1]
        Ok(Some(RelativeBias::new(&values)?))
    }

    fn lm_head(&self, embed: &Table) -> Loaded<Option<Linear>> {
        let a = self.arch;
        let n = &a.names;
        if n.lm_head.is_empty() {
            return Ok(None);
        }
        let part: Option<Part> = self.sites.id(Site::LmHead).map(|site| (site, 0..a.vocab));
        let own = [(n.lm_head.to_owned(), a.vocab)];
        // as `of_head` says
        let wanted = self.options.quantize.map(|_| Quantize::Q8_0);
        let weight = match embed {
            _ if !a.tied_head => match quantize::weight(self.ckpt, self.options, wanted, &own, (a.hidden, false))? {
                Some(weight) => weight,
                None => self.options.out_in(&self.ckpt.get(n.lm_head, "weight", &[a.vocab, a.hidden])?)?,
            },
            Table::Packed(weight) => weight.clone(),
            // an encoder's head is rarely asked, its table at every row; kernels for bf16 take panels only
            Table::Own(table) if a.is_causal() || self.options.in_bf16() => self.options.out_in(table)?,
            Table::Own(table) => Weight::view_of(table)?,
        };
        let bias = if n.lm_bias.is_empty() { None } else { self.ckpt.find(n.lm_bias, "bias", &[a.vocab])? };
        Ok(Some(Linear { weight, bias, parts: part.into_iter().collect() }))
    }

    /// What stands before a masked-language-model head.
    fn lm_transform(&self) -> Loaded<Option<LmTransform>> {
        let (n, h) = (&self.arch.names, self.arch.hidden);
        if n.lm_head.is_empty() || n.lm_dense.is_empty() {
            return Ok(None);
        }
        Ok(Some(LmTransform {
            weight: self.options.out_in(&self.ckpt.get(n.lm_dense, "weight", &[h, h])?)?,
            bias: self.ckpt.get(n.lm_dense, "bias", &[h])?,
            act: self.arch.act,
            norm: self.norm_at(n.lm_norm, h)?,
        }))
    }

    fn head(&self) -> Loaded<Option<Head>> {
        let (n, h) = (&self.arch.names, self.arch.hidden);
        let Some(own) = &self.arch.head else { return Ok(None) };
        let inner = n.cls_inner.filter(|i| own.task == Task::SeqCls && self.ckpt.has(i.dense, "weight"));
        let name = inner.map_or(n.head_of(own.task), |i: ClsInner| i.out);
        let Some(labels) = self.ckpt.rows(name, "weight") else { return Ok(None) };
        let inner = match inner {
            Some(i) => Some(HeadLayer {
                weight: self.ckpt.get(i.dense, "weight", &[h, h])?,
                bias: self.ckpt.find(i.dense, "bias", &[h])?,
                act: Some(i.act),
            }),
            None => None,
        };
        let pool = if inner.is_some() { HeadPool::First } else { HeadPool::Base };
        let (weight, bias) = (self.ckpt.get(name, "weight", &[labels, h])?, self.ckpt.find(name, "bias", &[labels])?);
        Ok(Some(Head { weight, bias, layers: inner.into_iter().collect(), pool }))
    }
}

/// The class of a distance (key - query), as transformers counts: half of the classes are single distances, the other half
/// grow with the logarithm up to `max_distance`; both ways have their own where both are seen.
fn relative_bucket(distance: i64, buckets: usize, max_distance: usize, both_ways: bool) -> usize {
    let (buckets, base) = match (both_ways, distance > 0) {
        (true, true) => (buckets / 2, buckets / 2),
        (true, false) => (buckets / 2, 0),
        (false, _) => (buckets, 0),
    };
    let n = if both_ways { distance.unsigned_abs() } else { (-distance).max(0).unsigned_abs() } as usize;
    let exact = buckets / 2;
    if n < exact {
        return base + n;
    }
    // f32, as the library computes it: the borders fall where its rounding puts them
    let grown = (n as f32 / exact as f32).ln() / ((max_distance as f64 / exact as f64).ln() as f32);
    base + (exact + (grown * (buckets - exact) as f32) as usize).min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::relative_bucket;

    /// Figures of T5's `_relative_position_bucket(distance, bidirectional, 32, 128)`.
    #[test]
    fn distances_fall_into_the_library_s_classes() {
        let both = |d| relative_bucket(d, 32, 128, true);
        assert_eq!([0, 1, -1, 7, -8, 8].map(both), [0, 17, 1, 23, 8, 24]);
        assert_eq!([-15, -16, -32, -63, -127, -128, -5000, 5000].map(both), [9, 10, 12, 13, 15, 15, 15, 31]);
        let causal = |d| relative_bucket(d, 32, 128, false);
        assert_eq!([3, 0, -1, -15, -16, -19, -128, -9999].map(causal), [0, 0, 1, 15, 16, 17, 31, 31]);
    }
}
