//! THE forward: serving, training and evaluation of every base and every delta.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    Architecture, LoadOptions, MlpKind, ModelError, NormKind, Placement, Positions, sites, weights::Checkpoint,
};
use crate::{
    delta::{Half, Head, NormAt, Part, Proj, Site, SiteId, SiteTable},
    nn::{Attention, Cx, Linear, Mlp, Norm, Pass, Rotary, Sublayer, yield_point},
    ops::{self, Weight},
};

/// Tokens of a step, packed as the row layout says.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// One per row.
    pub tokens: &'a [u32],
    /// Segment ids, one per row; all 0 if absent.
    pub token_types: Option<&'a [u32]>,
}

impl<'a> Input<'a> {
    /// Tokens without segments.
    pub fn tokens(tokens: &'a [u32]) -> Self {
        Self { tokens, token_types: None }
    }
}

struct Block {
    norm_attn: Norm,
    attn: Attention,
    attn_end: Sublayer,
    norm_mlp: Norm,
    mlp: Mlp,
    mlp_end: Sublayer,
}

/// A frozen transformer.
pub struct Transformer {
    pub(super) arch: Architecture,
    embed: Tensor,
    embed_site: SiteId,
    position: Option<Tensor>,
    token_type: Option<Tensor>,
    embed_norm: Option<Norm>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    pub(super) pooler: Option<Linear>,
    pub(super) lm_head: Option<Linear>,
    pub(super) head: Option<Head>,
    rotary: Option<Rotary>,
    pub(super) device: Device,
}

impl Transformer {
    pub(super) fn load(
        arch: &Architecture,
        ckpt: &Checkpoint,
        sites: &SiteTable,
        options: &LoadOptions,
    ) -> std::result::Result<Self, ModelError> {
        let loader = Loader { arch, ckpt, sites };
        let n = &arch.names;
        let h = arch.hidden;
        let embed = ckpt.get(n.embed, "weight", &[arch.vocab, h])?;
        let table = |name: &str, rows: usize| -> std::result::Result<Option<Tensor>, ModelError> {
            if name.is_empty() || rows == 0 { Ok(None) } else { ckpt.get(name, "weight", &[rows, h]).map(Some) }
        };
        let blocks = (0..arch.layers).map(|l| loader.block(l)).collect::<std::result::Result<_, _>>()?;
        let norm_of = |name: &str, site| if name.is_empty() { Ok(None) } else { loader.norm(name, site).map(Some) };
        Ok(Self {
            position: table(n.position, arch.max_positions)?,
            token_type: table(n.token_type, arch.token_types)?,
            embed_norm: norm_of(n.embed_norm, Site::EmbeddingNorm)?,
            final_norm: norm_of(n.final_norm, Site::FinalNorm)?,
            pooler: if n.pooler.is_empty() { None } else { Some(loader.linear(&[(n.pooler, Site::Pooler, h, h)], 0)?) },
            lm_head: loader.lm_head(&embed)?,
            head: loader.head()?,
            rotary: match arch.positions {
                Positions::Rotary { theta, scaling } => Some(Rotary::new(arch.heads.head_dim, theta, scaling)),
                Positions::Learned => None,
            },
            blocks,
            embed,
            embed_site: loader.site(Site::Embedding)?,
            arch: arch.clone(),
            device: options.device.clone(),
        })
    }

    /// Numbers in all weights (a tied head counts once).
    pub(super) fn parameters(&self) -> u64 {
        let norm = |n: &Norm| n.norm.gain.elem_count() + n.norm.bias.as_ref().map_or(0, Tensor::elem_count);
        let linear =
            |l: &Linear| l.weight.in_dim() * l.weight.out_dim() + l.bias.as_ref().map_or(0, Tensor::elem_count);
        let blocks: usize = self
            .blocks
            .iter()
            .map(|b| {
                norm(&b.norm_attn)
                    + norm(&b.norm_mlp)
                    + linear(&b.attn.qkv)
                    + linear(&b.attn.out)
                    + linear(&b.mlp.up)
                    + linear(&b.mlp.down)
            })
            .sum();
        let tables = [Some(&self.embed), self.position.as_ref(), self.token_type.as_ref()];
        let tables: usize = tables.iter().flatten().map(|t| t.elem_count()).sum();
        let norms: usize = [&self.embed_norm, &self.final_norm].into_iter().flatten().map(norm).sum();
        let head = if self.arch.tied_head { 0 } else { self.lm_head.as_ref().map_or(0, linear) };
        (blocks + tables + norms + head + self.pooler.as_ref().map_or(0, linear)) as u64
    }

    /// Final hidden states of all rows, `[rows, hidden]`.
    ///
    /// Positions come from `cx.rows`. Keys and values of spans with cache slots are written to the cache.
    ///
    /// # Errors
    /// Token ids outside the vocabulary, positions outside the context, or those of candle.
    pub fn forward(&self, input: &Input<'_>, cx: &Cx<'_>) -> Result<Tensor> {
        let positions = cx.rows.positions();
        self.check(input, cx, &positions)?;
        let mut x = self.embed.index_select(&Tensor::new(input.tokens, &self.device)?, 0)?; // [rows, hidden]
        x = cx.deltas.embed(self.embed_site, input.tokens, x)?;
        if let Some(table) = &self.position {
            x = (x + table.index_select(&Tensor::new(&positions[..], &self.device)?, 0)?)?;
        }
        if let Some(table) = &self.token_type {
            let zeros;
            let types = match input.token_types {
                Some(t) => t,
                None => {
                    zeros = vec![0u32; input.tokens.len()];
                    &zeros
                }
            };
            x = (x + table.index_select(&Tensor::new(types, &self.device)?, 0)?)?;
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward(&x, cx)?;
        }
        let rope = self.rotary.as_ref().map(|r| r.table(&positions, &self.device)).transpose()?;
        let pass = Pass::new(*cx, rope, self.arch.heads, self.arch.mask);
        for block in &self.blocks {
            x = yield_point(x, cx)?;
            x = self.block(block, x, &pass)?;
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x, cx),
            None => Ok(x),
        }
    }

    fn block(&self, b: &Block, x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let cx = &pass.cx;
        match self.arch.placement {
            Placement::Pre => {
                let h = b.attn.forward(&b.norm_attn.forward(&x, cx)?, pass)?;
                let x = b.attn_end.close(&x, h, None, cx)?;
                let h = b.mlp.forward(&b.norm_mlp.forward(&x, cx)?, cx)?;
                b.mlp_end.close(&x, h, None, cx)
            }
            Placement::Post => {
                let x = b.attn_end.close(&x, b.attn.forward(&x, pass)?, Some(&b.norm_attn), cx)?;
                b.mlp_end.close(&x, b.mlp.forward(&x, cx)?, Some(&b.norm_mlp), cx)
            }
        }
    }

    fn check(&self, input: &Input<'_>, cx: &Cx<'_>, positions: &[u32]) -> Result<()> {
        let rows = cx.rows.rows();
        if input.tokens.len() != rows || input.token_types.is_some_and(|t| t.len() != rows) {
            bail!("{} tokens for {rows} rows", input.tokens.len());
        }
        if let Some(bad) = input.tokens.iter().find(|&&t| t as usize >= self.arch.vocab) {
            bail!("token {bad} of a vocabulary of {}", self.arch.vocab);
        }
        if let Some(bad) = input.token_types.iter().flat_map(|t| *t).find(|&&t| t as usize >= self.arch.token_types) {
            bail!("segment {bad} of {}", self.arch.token_types);
        }
        if let Some(bad) = positions.iter().find(|&&p| p as usize >= self.arch.max_positions) {
            bail!("position {bad} of a context of {}", self.arch.max_positions);
        }
        if !self.arch.is_causal() && cx.rows.spans().iter().any(|s| s.context_len > 0) {
            bail!("an encoder's sequence must be computed in one step");
        }
        Ok(())
    }

    /// Logits of picked rows: `hidden` `[rows, hidden]` -> `[pick.len(), vocab]` f32.
    ///
    /// # Errors
    /// A base without a language-model head.
    pub fn logits(&self, hidden: &Tensor, pick: &[u32], cx: &Cx<'_>) -> Result<Tensor> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let x = hidden.contiguous()?.index_select(&Tensor::new(pick, &self.device)?, 0)?; // [pick, hidden]
        if head.parts.iter().any(|(site, _)| cx.deltas.touches(*site)) {
            let deltas = cx.deltas.picked(pick);
            return head.forward(&x, &Cx { deltas: &deltas, ..*cx })?.to_dtype(DType::F32);
        }
        ops::linear(&x, &head.weight, head.bias.as_ref())?.to_dtype(DType::F32)
    }

    /// Negative log-likelihood of `targets` after the picked rows: `[pick.len()]` f32; differentiable when `hidden` is.
    /// Never keeps `[rows, vocab]`.
    ///
    /// # Errors
    /// A base without a language-model head, a target outside the vocabulary.
    pub fn nll(&self, hidden: &Tensor, pick: &[u32], targets: &[u32], cx: &Cx<'_>) -> Result<Tensor> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let patched = head.parts.iter().any(|(site, _)| cx.deltas.touches(*site));
        if patched || head.bias.is_some() {
            let logits = self.logits(hidden, pick, cx)?;
            let logp = candle_nn::ops::log_softmax(&logits, 1)?;
            let idx = Tensor::new(targets, &self.device)?.reshape((targets.len(), 1))?;
            return logp.gather(&idx, 1)?.neg()?.flatten_all();
        }
        let x = hidden.contiguous()?.index_select(&Tensor::new(pick, &self.device)?, 0)?;
        ops::head_nll(&x, &head.weight, targets)
    }

    /// Whether the checkpoint brought a classification head.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// The linear at a site, and the site's columns.
    pub(super) fn linear_at(&self, site: SiteId) -> Option<(&Linear, Range<usize>)> {
        let of_blocks = self.blocks.iter().flat_map(|b| [&b.attn.qkv, &b.attn.out, &b.mlp.up, &b.mlp.down]);
        let all = of_blocks.chain(&self.pooler).chain(&self.lm_head);
        all.flat_map(|l| l.parts.iter().map(move |p| (l, p)))
            .find(|(_, (s, _))| *s == site)
            .map(|(l, (_, columns))| (l, columns.clone()))
    }

    /// The embedding table, `[vocab, hidden]`.
    pub(super) fn table(&self) -> &Tensor {
        &self.embed
    }

    /// The norm at a site.
    pub(super) fn norm_at(&self, site: SiteId) -> Option<&Norm> {
        let of_blocks = self.blocks.iter().flat_map(|b| [&b.norm_attn, &b.norm_mlp]);
        of_blocks.chain(&self.embed_norm).chain(&self.final_norm).find(|n| n.part.0 == site)
    }
}

struct Loader<'a> {
    arch: &'a Architecture,
    ckpt: &'a Checkpoint,
    sites: &'a SiteTable,
}

impl Loader<'_> {
    fn site(&self, site: Site) -> std::result::Result<SiteId, ModelError> {
        self.sites.id(site).ok_or_else(|| ModelError::Config(format!("no site {site:?}")))
    }

    /// One or more projections side by side, as one matrix `[in, sum of outs]`.
    fn linear(&self, parts: &[(&str, Site, usize, usize)], layer: usize) -> std::result::Result<Linear, ModelError> {
        let conv1d = self.arch.conv1d;
        let (mut ws, mut bs, mut sites) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for &(template, site, i, o) in parts {
            let module = Architecture::module(template, layer);
            let shape = if conv1d { [i, o] } else { [o, i] };
            ws.push(self.ckpt.get(&module, "weight", &shape)?);
            bs.push((o, self.ckpt.find(&module, "bias", &[o])?));
            sites.push((self.site(site)?, at..at + o));
            at += o;
        }
        let w = if ws.len() == 1 { ws.swap_remove(0) } else { Tensor::cat(&ws, usize::from(conv1d))? };
        let weight = if conv1d { Weight::from_in_out(&w)? } else { Weight::from_out_in(&w)? };
        // fused projections have a bias if any of them has one (Qwen2: all three; others: none)
        let bias = if bs.iter().any(|(_, b)| b.is_some()) {
            let parts: Vec<Tensor> = bs
                .into_iter()
                .map(|(o, b)| match b {
                    Some(b) => Ok(b),
                    None => Tensor::zeros(o, w.dtype(), w.device()),
                })
                .collect::<Result<_>>()?;
            Some(Tensor::cat(&parts, 0)?)
        } else {
            None
        };
        Ok(Linear { weight, bias, parts: sites })
    }

    fn norm(&self, module: &str, site: Site) -> std::result::Result<Norm, ModelError> {
        let h = self.arch.hidden;
        let center = self.arch.norm == NormKind::LayerNorm;
        let norm = ops::Norm {
            gain: self.ckpt.get(module, "weight", &[h])?,
            bias: if center { Some(self.ckpt.get(module, "bias", &[h])?) } else { None },
            center,
            eps: self.arch.norm_eps,
        };
        let part: Part = (self.site(site)?, 0..h);
        Ok(Norm { norm, part })
    }

    fn block(&self, layer: usize) -> std::result::Result<Block, ModelError> {
        let a = self.arch;
        let n = &a.names;
        let named = |list: Vec<(&'static str, Proj, usize, usize)>| -> Vec<_> {
            list.into_iter().map(|(t, proj, i, o)| (t, Site::Linear { layer, proj }, i, o)).collect()
        };
        let q_width = a.heads.heads * a.heads.head_dim;
        let attn_norm = Architecture::module(n.norm_attn, layer);
        let mlp_norm = Architecture::module(n.norm_mlp, layer);
        Ok(Block {
            norm_attn: self.norm(&attn_norm, Site::Norm { layer, at: NormAt::Attn })?,
            attn: Attention {
                qkv: self.linear(&named(sites::qkv(a)), layer)?,
                out: self.linear(&[(n.o, Site::Linear { layer, proj: Proj::O }, q_width, a.hidden)], layer)?,
                layer,
                layer_scale: if a.scale_by_layer { 1.0 / (layer + 1) as f32 } else { 1.0 },
            },
            attn_end: Sublayer { site: self.site(Site::Sublayer { layer, half: Half::Attn })? },
            mlp_end: Sublayer { site: self.site(Site::Sublayer { layer, half: Half::Mlp })? },
            norm_mlp: self.norm(&mlp_norm, Site::Norm { layer, at: NormAt::Mlp })?,
            mlp: Mlp {
                up: self.linear(&named(sites::up(a)), layer)?,
                down: self.linear(&[(n.down, Site::Linear { layer, proj: Proj::Down }, a.ff, a.hidden)], layer)?,
                act: a.act,
                gated: a.mlp == MlpKind::Gated,
            },
        })
    }

    fn lm_head(&self, embed: &Tensor) -> std::result::Result<Option<Linear>, ModelError> {
        let a = self.arch;
        if a.names.lm_head.is_empty() {
            return Ok(None);
        }
        let part: Part = (self.site(Site::LmHead)?, 0..a.vocab);
        // a classification checkpoint has no head of its own; the embedding table then serves, as when tied
        let weight = if a.tied_head || !self.ckpt.has(a.names.lm_head, "weight") {
            Weight::tied(embed)?
        } else {
            Weight::from_out_in(&self.ckpt.get(a.names.lm_head, "weight", &[a.vocab, a.hidden])?)?
        };
        Ok(Some(Linear { weight, bias: None, parts: vec![part] }))
    }

    fn head(&self) -> std::result::Result<Option<Head>, ModelError> {
        let name = self.arch.names.cls_head;
        let (Some(_), Some(labels)) = (&self.arch.head, self.ckpt.rows(name, "weight")) else { return Ok(None) };
        let weight = self.ckpt.get(name, "weight", &[labels, self.arch.hidden])?;
        Ok(Some(Head::linear(weight, self.ckpt.find(name, "bias", &[labels])?)))
    }
}
