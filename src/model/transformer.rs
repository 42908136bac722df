//! THE forward: serving, training and evaluation of every base and every delta.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{Architecture, Held, Placement, Positions, Walk, table::Table};
use crate::{
    delta::{self, Head, PromptStage, SiteId},
    nn::{Attention, CrossAttention, Cx, Linear, Mlp, Norm, Pass, Style, Sublayer},
    ops::{self, Act, Weight, WeightPart},
};

/// Tokens of a step, packed as the row layout says.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// One per row that is a token; virtual rows have none.
    pub tokens: &'a [u32],
    /// Segment ids, one per token; all 0 if absent. Virtual rows have segment 0.
    pub token_types: Option<&'a [u32]>,
}

impl<'a> Input<'a> {
    /// Tokens without segments.
    pub fn tokens(tokens: &'a [u32]) -> Self {
        Self { tokens, token_types: None }
    }
}

/// A layer. Encoders, decoders and decoders with an encoder differ in their styles and in `cross`.
pub(super) struct Block {
    pub(super) norm_attn: Norm,
    pub(super) attn: Attention,
    pub(super) norm_attn_out: Option<Norm>,
    pub(super) attn_end: Sublayer,
    pub(super) cross: Option<Cross>,
    pub(super) norm_mlp: Norm,
    pub(super) mlp: Mlp,
    pub(super) norm_mlp_out: Option<Norm>,
    pub(super) mlp_end: Sublayer,
}

pub(super) struct Cross {
    pub(super) norm: Norm,
    pub(super) attn: CrossAttention,
}

/// Blocks one after the other.
pub(super) struct Stack {
    pub(super) blocks: Vec<Block>,
    /// Kinds of layers.
    pub(super) styles: Vec<Style>,
    pub(super) final_norm: Option<Norm>,
}

/// Dense, activation, norm: what stands before a masked-language-model head.
pub(super) struct LmTransform {
    pub(super) weight: Weight,
    pub(super) bias: Tensor,
    pub(super) act: Act,
    pub(super) norm: ops::Norm,
}

/// A frozen transformer.
pub struct Transformer {
    pub(super) arch: Architecture,
    pub(super) embed: Table,
    pub(super) embed_site: SiteId,
    pub(super) position: Option<Tensor>,
    pub(super) token_type: Option<Tensor>,
    pub(super) embed_norm: Option<Norm>,
    pub(super) encoder: Option<Stack>,
    pub(super) main: Stack,
    pub(super) pooler: Option<Linear>,
    pub(super) lm_head: Option<Linear>,
    pub(super) lm_transform: Option<LmTransform>,
    pub(super) head: Option<Head>,
    pub(super) device: Device,
}

impl Block {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let cross = self.cross.iter().flat_map(|c| [&c.attn.q, &c.attn.kv, &c.attn.out]);
        [&self.attn.qkv, &self.attn.out, &self.mlp.up, &self.mlp.down].into_iter().chain(cross)
    }

    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let optional = [&self.attn.q_norm, &self.attn.k_norm, &self.norm_attn_out, &self.norm_mlp_out];
        let cross = self.cross.iter().map(|c| &c.norm);
        [&self.norm_attn, &self.norm_mlp].into_iter().chain(optional.into_iter().flatten()).chain(cross)
    }
}

impl Transformer {
    fn stacks(&self) -> impl Iterator<Item = &Stack> {
        self.encoder.iter().chain([&self.main])
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.stacks().flat_map(|s| &s.blocks).flat_map(Block::linears).chain(&self.pooler)
    }

    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let stacks = self.stacks().flat_map(|s| s.blocks.iter().flat_map(Block::norms).chain(&s.final_norm));
        stacks.chain(&self.embed_norm)
    }

    /// Numbers in all weights (a tied head counts once).
    pub(super) fn parameters(&self) -> u64 {
        let count = |t: &Option<Tensor>| t.as_ref().map_or(0, Tensor::elem_count);
        let norm = |n: &ops::Norm| n.gain.elem_count() + count(&n.bias);
        let before = self.lm_transform.as_ref();
        let before = before.map_or(0, |t| t.weight.elem_count() + t.bias.elem_count() + norm(&t.norm));
        self.body_parameters() + self.head_parameters() + before as u64
    }

    /// Numbers in the language-model head that are its own.
    pub(super) fn head_parameters(&self) -> u64 {
        let bias = |h: &Linear| h.bias.as_ref().map_or(0, Tensor::elem_count);
        let own = |h: &Linear| if self.arch.tied_head { bias(h) } else { h.weight.elem_count() + bias(h) };
        self.lm_head.as_ref().map_or(0, own) as u64
    }

    /// Numbers in everything but the language-model head and what stands before it.
    pub(super) fn body_parameters(&self) -> u64 {
        let count = |t: &Option<Tensor>| t.as_ref().map_or(0, Tensor::elem_count);
        let norm = |n: &ops::Norm| n.gain.elem_count() + count(&n.bias);
        let linear = |l: &Linear| l.weight.elem_count() + count(&l.bias);
        let tables = self.embed.elem_count() + count(&self.position) + count(&self.token_type);
        let norms: usize = self.norms().map(|n| norm(&n.norm)).sum();
        let biases = match self.arch.positions {
            Positions::Relative { buckets, .. } => self.stacks().count() * buckets * self.arch.heads.heads,
            Positions::Learned { .. } | Positions::Rotary => 0,
        };
        (self.linears().map(linear).sum::<usize>() + tables + norms + biases) as u64
    }

    /// How the matrices of linears and of a language-model head of its own are kept, by format.
    pub(super) fn linear_formats(&self) -> BTreeMap<&'static str, Held> {
        let mut out: BTreeMap<&'static str, Held> = BTreeMap::new();
        let head = self.lm_head.iter().filter(|_| !self.arch.tied_head);
        for part in self.linears().chain(head).flat_map(|l| l.weight.parts()) {
            let held = out.entry(part.kind).or_default();
            held.matrices += 1;
            held.numbers += part.numbers;
            held.bytes += part.bytes;
        }
        out
    }

    /// Bytes of all weights in memory.
    pub(super) fn bytes(&self) -> u64 {
        let plain = |t: &Tensor| WeightPart::of(t).bytes;
        let norm = |n: &ops::Norm| plain(&n.gain) + n.bias.as_ref().map_or(0, plain);
        let parts = |parts: Vec<WeightPart>| parts.iter().map(|p| p.bytes).sum::<usize>();
        let linears = self.linears().chain(&self.lm_head);
        let linears: usize = linears.map(|l| parts(l.weight.parts()) + l.bias.as_ref().map_or(0, plain)).sum();
        // an encoder's tied head is a view of its table
        let is_head = self.arch.tied_head && self.lm_head.is_some();
        let table = match &self.embed {
            Table::Own(_) if is_head && self.lm_head.as_ref().is_some_and(|h| h.weight.is_view()) => 0,
            table => parts(table.parts(is_head)),
        };
        let tables: usize = [&self.position, &self.token_type].into_iter().flatten().map(plain).sum();
        let norms: usize = self.norms().map(|n| norm(&n.norm)).sum();
        let transform = self.lm_transform.as_ref();
        let transform = transform.map_or(0, |t| parts(t.weight.parts()) + plain(&t.bias) + norm(&t.norm));
        let head = self.head.iter().flat_map(Head::tensors).map(|(_, t)| plain(t)).sum::<usize>();
        (linears + table + tables + norms + transform + head) as u64
    }

    /// Numbers in matrices of several projections.
    pub(super) fn joined_parameters(&self) -> u64 {
        self.linears().filter(|l| l.parts.len() > 1).map(|l| l.weight.elem_count() as u64).sum()
    }

    /// The embeddings of tokens as a prompt's rows stand for them, scaled where the base scales its table's rows:
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    pub fn token_embeddings(&self, tokens: &[u32]) -> Result<Tensor> {
        if let Some(bad) = tokens.iter().find(|&&t| t as usize >= self.arch.vocab) {
            bail!("token {bad} of a vocabulary of {}", self.arch.vocab);
        }
        let rows = self.embed.rows(tokens)?;
        if self.arch.embed_scale != 1.0 { rows * self.arch.embed_scale } else { Ok(rows) }
    }

    /// Final hidden states of the rows that are wanted (`cx.wanted`: all, as a rule), `[wanted rows, hidden]`; of an
    /// encoder-decoder, the decoder's, which sees what `cx.memory` holds of its encoder.
    ///
    /// Positions come from `cx.rows`. Keys and values of spans with cache slots are written to the cache.
    ///
    /// # Errors
    /// Token ids outside the vocabulary, positions outside the context, a decoder without its encoder's output, or those
    /// of candle.
    pub fn forward(&self, input: &Input<'_>, cx: &Cx<'_>) -> Result<Tensor> {
        run(&self.walk(*cx)?, input)
    }

    /// The encoder's output of an encoder-decoder, `[rows, hidden]`: what [`crate::nn::Encoded`] takes. No cache is used.
    ///
    /// # Errors
    /// A base without an encoder of its own; those of [`Self::forward`].
    pub fn encode(&self, input: &Input<'_>, cx: &Cx<'_>) -> Result<Tensor> {
        run(&self.walk_encoder(*cx)?, input)
    }

    pub(super) fn embeddings(
        &self,
        stack: delta::Stack,
        input: &Input<'_>,
        positions: &[u32],
        cx: &Cx<'_>,
    ) -> Result<Tensor> {
        let tokens = per_row(input.tokens, cx)?;
        let mut x = self.embed.rows(&tokens)?; // [rows, hidden]
        x = cx.deltas.embed(self.embed_site, &tokens, x)?;
        if self.arch.embed_scale != 1.0 {
            x = (x * self.arch.embed_scale)?;
        }
        // below the scale: it belongs to the table, and a prompt's rows stand for what the table gives
        x = cx.deltas.virtual_rows(stack, PromptStage::Tokens, cx.rows, x)?;
        if let Some(table) = &self.position {
            let first = self.arch.first_position() as u32;
            let rows: Vec<u32> = positions.iter().map(|p| p + first).collect();
            x = (x + table.index_select(&Tensor::new(rows, &self.device)?, 0)?)?;
        }
        if let Some(table) = &self.token_type {
            let types = match input.token_types {
                Some(types) => per_row(types, cx)?,
                None => vec![0; cx.rows.rows()].into(),
            };
            x = (x + table.index_select(&Tensor::new(&*types, &self.device)?, 0)?)?;
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward(&x, cx)?;
        }
        cx.deltas.virtual_rows(stack, PromptStage::Hidden, cx.rows, x)
    }

    /// A layer: `[rows, hidden]` -> `[rows that go on, hidden]`, all but in the last one.
    pub(super) fn block(&self, b: &Block, x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if pass.ends_with_keys() {
            return self.keys_of_block(b, &x, pass);
        }
        let (cx, after) = (&pass.cx, &pass.after);
        let on = pass.going_on(&x)?; // [rows that go on, hidden]
        // a norm of a half's output stands between it and the residual sum
        let normed =
            |norm: &Option<Norm>, residual: Option<&Tensor>, half: &dyn Fn(Option<&Tensor>) -> Result<Tensor>| {
                let Some(norm) = norm else { return half(residual) };
                let y = norm.forward(&half(None)?, after)?;
                residual.map_or(Ok(y.clone()), |residual| residual + y)
            };
        match self.arch.placement {
            Placement::Pre => {
                let mut x = b.attn_end.run(&on, None, after, |residual| {
                    let h = b.norm_attn.forward(&x, cx)?;
                    normed(&b.norm_attn_out, residual, &|residual| b.attn.forward(&h, residual, pass))
                })?;
                if let Some(cross) = &b.cross {
                    x = cross.attn.forward(&cross.norm.forward(&x, after)?, &x, pass)?;
                }
                b.mlp_end.run(&x, None, after, |residual| {
                    let h = b.norm_mlp.forward(&x, after)?;
                    normed(&b.norm_mlp_out, residual, &|residual| b.mlp.forward(&h, residual, after))
                })
            }
            Placement::Post => {
                let attend = |residual: Option<&Tensor>| b.attn.forward(&x, residual, pass);
                let x = b.attn_end.run(&on, Some(&b.norm_attn), after, attend)?;
                b.mlp_end.run(&x, Some(&b.norm_mlp), after, |residual| b.mlp.forward(&x, residual, after))
            }
        }
    }

    /// A layer behind which no row goes on: its keys and values are for later steps. `[rows, hidden]` -> `[0, hidden]`.
    fn keys_of_block(&self, b: &Block, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match self.arch.placement {
            Placement::Pre => b.attn.keep(&b.norm_attn.forward(x, &pass.cx)?, pass)?,
            Placement::Post => b.attn.keep(x, pass)?,
        }
        if let Some(cross) = &b.cross {
            cross.attn.keep(pass)?;
        }
        x.detach().narrow(0, 0, 0)
    }

    pub(super) fn check(&self, input: &Input<'_>, cx: &Cx<'_>) -> Result<()> {
        let rows = cx.rows.token_rows();
        if input.tokens.len() != rows || input.token_types.is_some_and(|t| t.len() != rows) {
            bail!("{} tokens for {rows} rows of tokens", input.tokens.len());
        }
        if let Some(bad) = input.tokens.iter().find(|&&t| t as usize >= self.arch.vocab) {
            bail!("token {bad} of a vocabulary of {}", self.arch.vocab);
        }
        if let Some(bad) = input.token_types.iter().flat_map(|t| *t).find(|&&t| t as usize >= self.arch.token_types) {
            bail!("segment {bad} of {}", self.arch.token_types);
        }
        Ok(())
    }

    /// The picked rows as the language-model head reads them.
    fn before_head(&self, hidden: &Tensor, pick: &[u32], cx: &Cx<'_>) -> Result<Tensor> {
        let mut x = cx.states(hidden, pick)?; // [pick, hidden]
        if let Some(t) = &self.lm_transform {
            x = ops::norm(&ops::activate(&ops::linear(&x, &t.weight, Some(&t.bias))?, t.act)?, &t.norm)?;
        }
        if self.arch.head_scale != 1.0 { x * self.arch.head_scale } else { Ok(x) }
    }

    /// Logits of picked rows, which are rows of the step: `hidden` `[wanted rows, hidden]` -> `[pick.len(), vocab]` f32.
    ///
    /// # Errors
    /// A base without a language-model head; rows that are not wanted.
    pub fn logits(&self, hidden: &Tensor, pick: &[u32], cx: &Cx<'_>) -> Result<Tensor> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let x = self.before_head(hidden, pick, cx)?;
        let logits = if head.parts.iter().any(|(site, _)| cx.deltas.touches(*site)) {
            let deltas = cx.deltas.picked(pick);
            head.forward(&x, &Cx { deltas: &deltas, ..*cx })?.to_dtype(DType::F32)?
        } else {
            ops::linear(&x, &head.weight, head.bias.as_ref())?.to_dtype(DType::F32)?
        };
        match self.arch.logit_cap.map(f64::from) {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }

    /// Negative log-likelihood of `targets` after the picked rows: `[pick.len()]` f32; differentiable when `hidden` is.
    /// Never keeps `[rows, vocab]`.
    ///
    /// # Errors
    /// As [`Self::logits`]; a target outside the vocabulary.
    pub fn nll(&self, hidden: &Tensor, pick: &[u32], targets: &[u32], cx: &Cx<'_>) -> Result<Tensor> {
        self.smoothed_nll(hidden, (pick, targets), 0.0, cx)
    }

    /// As [`Self::nll`], with label smoothing ([`ops::smoothed_nll`]); `(pick, targets)` have the same length.
    ///
    /// # Errors
    /// As [`Self::nll`].
    pub fn smoothed_nll(
        &self,
        hidden: &Tensor,
        (pick, targets): (&[u32], &[u32]),
        smoothing: f64,
        cx: &Cx<'_>,
    ) -> Result<Tensor> {
        Ok(self.nll_against(hidden, (pick, targets), smoothing, None, cx)?.0)
    }

    /// As [`Self::smoothed_nll`], plus, of each row, so many times its divergence from a reference ([`ops::kl_rows`]), whose
    /// rows are those picked; and the sum of the divergences. Of the reference it never keeps `[rows, vocab]`.
    ///
    /// # Errors
    /// As [`Self::nll`]; a reference of other rows or another vocabulary.
    pub fn nll_against(
        &self,
        hidden: &Tensor,
        (pick, targets): (&[u32], &[u32]),
        smoothing: f64,
        against: Option<(&ops::Reference, f64)>,
        cx: &Cx<'_>,
    ) -> Result<(Tensor, f64)> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let patched = head.parts.iter().any(|(site, _)| cx.deltas.touches(*site));
        // a head that is trained wants the gradient of its matrix, too
        if patched || head.bias.is_some() || head.weight.is_trained() {
            let logits = self.logits(hidden, pick, cx)?;
            let logp = candle_nn::ops::log_softmax(&logits, 1)?;
            let idx = Tensor::new(targets, &self.device)?.reshape((targets.len(), 1))?;
            let each = ops::smoothed_nll(&logp, &idx, smoothing)?;
            let Some((reference, weight)) = against else { return Ok((each, 0.0)) };
            let kl = ops::kl_rows(&logits, reference)?; // [pick]
            let sum = kl.detach().sum_all()?.to_scalar::<f32>()?;
            return Ok(((each + (kl * weight)?)?, sum.into()));
        }
        let x = self.before_head(hidden, pick, cx)?;
        ops::head_nll_against(&x, &head.weight, (targets, smoothing), self.arch.logit_cap, against)
    }

    /// So many times the divergence of each picked row from a reference, `[pick]` f32, and the sum of the divergences: what
    /// [`Self::nll_against`] adds, alone.
    ///
    /// # Errors
    /// As [`Self::nll_against`].
    pub fn divergence(
        &self,
        hidden: &Tensor,
        pick: &[u32],
        (reference, weight): (&ops::Reference, f64),
        cx: &Cx<'_>,
    ) -> Result<(Tensor, f64)> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let patched = head.parts.iter().any(|(site, _)| cx.deltas.touches(*site));
        if patched || head.bias.is_some() || head.weight.is_trained() {
            let kl = ops::kl_rows(&self.logits(hidden, pick, cx)?, reference)?;
            let sum = kl.detach().sum_all()?.to_scalar::<f32>()?;
            return Ok(((kl * weight)?, sum.into()));
        }
        let x = self.before_head(hidden, pick, cx)?;
        ops::head_kl(&x, &head.weight, self.arch.logit_cap, (reference, weight))
    }

    /// What [`Self::nll_against`] compares with: this model's own head on the picked rows, without a delta.
    ///
    /// # Errors
    /// A base without a language-model head.
    pub fn reference(&self, hidden: &Tensor, pick: &[u32], cx: &Cx<'_>) -> Result<ops::Reference> {
        let Some(head) = &self.lm_head else { bail!("this base has no language-model head") };
        let x = self.before_head(hidden, pick, cx)?;
        ops::Reference::new(&x, &head.weight, head.bias.as_ref(), self.arch.logit_cap)
    }

    /// Whether the checkpoint brought a classification head.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// The classification head that the checkpoint brought.
    pub fn own_head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// The linear at a site, and the site's columns.
    pub(super) fn linear_at(&self, site: SiteId) -> Option<(&Linear, Range<usize>)> {
        self.linears()
            .chain(&self.lm_head)
            .flat_map(|l| l.parts.iter().map(move |p| (l, p)))
            .find(|(_, (s, _))| *s == site)
            .map(|(l, (_, columns))| (l, columns.clone()))
    }

    /// The embedding table.
    pub(super) fn table(&self) -> &Table {
        &self.embed
    }

    /// The norm at a site.
    pub(super) fn norm_at(&self, site: SiteId) -> Option<&Norm> {
        self.norms().find(|n| n.part.0 == site)
    }
}

/// Tokens through all layers.
fn run(walk: &Walk<'_>, input: &Input<'_>) -> Result<Tensor> {
    let x = walk.start(input)?; // [rows, hidden]
    let x = (0..walk.layers()).try_fold(x, |x, i| walk.layer(i, x))?;
    walk.end(x)
}

/// One value per row: virtual rows, which have none, get 0 (a valid token, whose embedding is overwritten).
fn per_row<'t>(values: &'t [u32], cx: &Cx<'_>) -> Result<Cow<'t, [u32]>> {
    if values.len() == cx.rows.rows() {
        return Ok(values.into());
    }
    match cx.rows.spread(values, 0) {
        Some(spread) => Ok(spread.into()),
        None => bail!("{} values for {} rows of tokens", values.len(), cx.rows.token_rows()),
    }
}
