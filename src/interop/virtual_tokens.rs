//! Files of methods that add positions: PEFT's PREFIX_TUNING, PROMPT_TUNING and P_TUNING, AdapterHub's prefix and prompt
//! tuning.
//!
//! PEFT saves one tensor, `prompt_embeddings`: of a prompt `[n, hidden]`, of a prefix `[n, layers * 2 * kv_width]`, for each
//! layer its key and then its value. For encoder-decoders it has rows for two stacks, `[2 n, hidden]`, of which PEFT uses the
//! first half, ahead of the source; and a prefix joins the decoder's self-attention as [`seq2seq_pair`] says. What made them
//! while training (an MLP, an LSTM) is not saved. AdapterHub saves a prefix as it was trained: the values, or a table and an
//! MLP with one hidden layer that the loader runs; for encoder-decoders three of them ([`Group`]).

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    InteropError, Parts,
    head::HeadTensors,
    keys::{self, Owner},
    tensors::TensorFile,
};
use crate::{
    delta::{Patch, Prefix, PrefixForm, Prompt, PromptStage, Site, SiteId, Stack, seq2seq_pair},
    model::{Base, Positions},
};

/// The tensor that PEFT saves.
pub(super) const EMBEDDINGS: &str = "prompt_embeddings";
/// Most virtual positions.
const MAX_VIRTUAL: usize = 65_536;
/// Most numbers of a product that a prefix's network makes: 1 GiB.
const MAX_PRODUCT: usize = 1 << 28;

/// Where in a file something is, for messages.
#[derive(Clone, Copy)]
struct At<'a> {
    file: &'a str,
    base: &'a Base,
}

impl At<'_> {
    fn bad(self, message: String) -> InteropError {
        InteropError::invalid(self.file, message)
    }

    /// A width that is not the base's.
    fn mismatch(self, what: &str, got: usize, want: usize) -> InteropError {
        InteropError::BaseMismatch(format!(
            "{what} is {got}, this server's base {} ({}) has {want}",
            self.base.fingerprint.short(),
            self.base.arch.model_type
        ))
    }

    fn put(self, t: &Tensor) -> Result<Tensor, InteropError> {
        Ok(t.contiguous()?.to_device(&self.base.device)?.to_dtype(self.base.dtype)?)
    }

    /// A prompt's patch of `[n, hidden]`.
    fn prompt(self, rows: &Tensor, stage: PromptStage) -> Result<(SiteId, Patch), InteropError> {
        let stack = if self.base.arch.is_encoder_decoder() { Stack::Encoder } else { Stack::Main };
        let site = self.base.sites.id(Site::Embedding);
        let site = site
            .ok_or_else(|| InteropError::BaseMismatch("the base has no embedding that a prompt could join".into()))?;
        Ok((site, Patch::Prompt(Prompt { rows: self.put(rows)?, stage, stack })))
    }

    /// A prefix's patches of `[n, pairs * 2 * kv_width]`: a pair for every layer, in order; in PEFT's form for an
    /// encoder-decoder, as PEFT hands them out.
    fn prefix(
        self,
        flat: &Tensor,
        what: &str,
        (form, stack): (PrefixForm, Stack),
    ) -> Result<Vec<(SiteId, Patch)>, InteropError> {
        let sites = prefix_sites(self.base, stack)?;
        let (arch, layers) = (&self.base.arch, sites.len());
        let (width, got) = (arch.kv_width(), flat.dim(1)?);
        let (pairs, two) = (got / (2 * width), arch.is_encoder_decoder() && form == PrefixForm::Context);
        if got % (2 * width) != 0 || pairs < layers || (pairs > layers && !two) {
            return Err(InteropError::BaseMismatch(format!(
                "{what} has {got} numbers for a virtual token, this server's base {} ({}) takes {}: keys and values of {layers} \
                 layers, {width} wide",
                self.base.fingerprint.short(),
                arch.model_type,
                2 * width * layers
            )));
        }
        let mut made: BTreeMap<usize, Prefix> = BTreeMap::new();
        let mut patches = Vec::with_capacity(layers);
        for (layer, (site, _)) in sites.into_iter().enumerate() {
            let pair = if two { seq2seq_pair(layer, pairs) } else { layer };
            // layers that share a pair share its tensors, so that training keeps them equal
            let prefix = match made.get(&pair) {
                Some(prefix) => prefix.clone(),
                None => {
                    let at = 2 * width * pair;
                    let (k, v) = (flat.narrow(1, at, width)?, flat.narrow(1, at + width, width)?); // [n, kv_width]
                    Prefix { k: self.put(&k)?, v: self.put(&v)?, form, stack }
                }
            };
            made.insert(pair, prefix.clone());
            patches.push((site, Patch::Prefix(prefix)));
        }
        Ok(patches)
    }
}

/// The sites of a prefix with their widths, in order of the layers.
///
/// # Errors
/// A base whose layers keep no keys and values.
fn prefix_sites(base: &Base, stack: Stack) -> Result<Vec<(SiteId, usize)>, InteropError> {
    let sites = base.sites.prefix_sites(stack);
    if sites.is_empty() {
        return Err(InteropError::BaseMismatch(format!(
            "a prefix needs layers with keys and values; this server's base, a {}, has none",
            base.arch.model_type
        )));
    }
    Ok(sites)
}

/// PEFT's PREFIX_TUNING, PROMPT_TUNING or P_TUNING.
pub(super) fn decode(
    file: &str,
    kind: &str,
    config: &Value,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<Parts, InteropError> {
    let at = At { file, base };
    check_numbers(at, kind, config)?;
    let (embeddings, head) = collect(tensors, base)?;
    let t = embeddings.ok_or_else(|| InteropError::invalid(super::WEIGHTS[0], format!("{EMBEDDINGS} is missing")))?;
    let &[rows, width] = t.dims() else {
        return Err(InteropError::invalid(
            super::WEIGHTS[0],
            format!("{EMBEDDINGS} is {:?}; two dimensions are", t.dims()),
        ));
    };
    let prefix = kind == "PREFIX_TUNING";
    let stacks = if prefix { 1 } else { stacks(at, kind, config)? };
    let n = rows / stacks;
    if n * stacks != rows {
        return Err(at.bad(format!("{EMBEDDINGS} has {rows} rows, which {stacks} stacks cannot share")));
    }
    check_count(at, "num_virtual_tokens", config, n)?;
    let patches = if prefix {
        let patches = at.prefix(&t, EMBEDDINGS, (PrefixForm::Context, Stack::Main))?;
        let pairs = width / (2 * base.arch.kv_width());
        if let Some(said) = count(at, config, "num_layers")?.filter(|said| *said != pairs) {
            return Err(at.mismatch("num_layers", said, pairs));
        }
        patches
    } else {
        if width != base.arch.hidden {
            return Err(at.mismatch(&format!("the width of {EMBEDDINGS}"), width, base.arch.hidden));
        }
        // of an encoder-decoder: the first rows precede the source, the others are not used
        vec![at.prompt(&t.narrow(0, 0, n)?, PromptStage::Tokens)?]
    };
    let method = match kind {
        "PREFIX_TUNING" => "prefix",
        "P_TUNING" => "p_tuning",
        _ => "prompt",
    };
    Ok(Parts { patches, head, methods: vec![method.into()], ..Parts::default() })
}

/// The embeddings and the head of a PEFT file; any other tensor is an error.
fn collect(
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<(Option<Tensor>, Option<crate::delta::Head>), InteropError> {
    let (mut embeddings, mut head) = (None, HeadTensors::default());
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let (module, part) = keys::split(&name);
        match (keys::owner(module, base), part) {
            _ if name == EMBEDDINGS => embeddings = Some(tensors.get(&name)?),
            (Some(Owner::Head(layer)), "weight" | "bias") => head.take(layer, &name, tensors.get(&name)?)?,
            _ => {
                left.push(name);
                continue;
            }
        }
        applied += 1;
    }
    if !left.is_empty() {
        return Err(keys::unapplied(left, applied, base));
    }
    Ok((embeddings, head.build(base)?))
}

/// What the config says of the base must be so; what it does not say is taken from the tensor.
fn check_numbers(at: At<'_>, kind: &str, config: &Value) -> Result<(), InteropError> {
    let arch = &at.base.arch;
    let prefix = kind == "PREFIX_TUNING";
    let width = if prefix { arch.kv_width() } else { arch.hidden };
    if let Some(got) = count(at, config, "token_dim")?.filter(|got| *got != width) {
        return Err(at.mismatch("token_dim", got, width));
    }
    // of an encoder-decoder PEFT notes the encoder's layers, and a prefix's count is checked with its tensor
    if let Some(got) = count(at, config, "num_layers")?
        && got != arch.layers
        && !arch.is_encoder_decoder()
    {
        return Err(at.mismatch("num_layers", got, arch.layers));
    }
    stacks(at, kind, config).map(drop)
}

/// For how many stacks the file has rows.
fn stacks(at: At<'_>, kind: &str, config: &Value) -> Result<usize, InteropError> {
    const KEY: &str = "num_transformer_submodules";
    let most = if at.base.arch.is_encoder_decoder() { 2 } else { 1 };
    let got = count(at, config, KEY)?.unwrap_or(most);
    // PEFT makes a prompt of one stack, too
    let known = got == most || (got < most && kind != "PREFIX_TUNING");
    if known { Ok(got) } else { Err(at.mismatch(KEY, got, most)) }
}

/// The number of virtual tokens that the config states, against that of the tensor.
fn check_count(at: At<'_>, key: &str, config: &Value, n: usize) -> Result<(), InteropError> {
    if n > MAX_VIRTUAL {
        return Err(at.bad(format!("{n} virtual tokens; at most {MAX_VIRTUAL} are accepted")));
    }
    match count(at, config, key)? {
        Some(said) if said != n => Err(at.bad(format!("{key} is {said}, the tensors have {n}"))),
        _ => Ok(()),
    }
}

fn count(at: At<'_>, config: &Value, key: &str) -> Result<Option<usize>, InteropError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0) {
            Some(n) => Ok(Some(n)),
            None => Err(at.bad(format!("{key} is {v}; a whole number from 1 is accepted"))),
        },
    }
}

/// An AdapterHub folder of the architecture `prefix_tuning` or `prompt_tuning`; `config` is the inner `config` of
/// `adapter_config.json`.
///
/// # Errors
/// Options that this server does not apply, tensors that are missing, left over or of another base.
pub(super) fn adapterhub(
    file: &str,
    config: &Value,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<Parts, InteropError> {
    let at = At { file, base };
    let all = (tensors.names().into_iter())
        .map(|name| Ok((name.clone(), tensors.get(&name)?)))
        .collect::<Result<BTreeMap<String, Tensor>, InteropError>>()?;
    let (patches, method) = match config.get("architecture").and_then(Value::as_str) {
        Some("prefix_tuning") => (hub_prefix(at, config, &all)?, "prefix"),
        Some("prompt_tuning") => (hub_prompt(at, config, &all)?, "prompt"),
        other => {
            return Err(at.bad(format!(
                "config.architecture {other:?} is not supported; supported are \"prefix_tuning\", \"prompt_tuning\""
            )));
        }
    };
    Ok(Parts { patches, methods: vec![method.into()], ..Parts::default() })
}

/// Tensors by what follows the adapter's name, e.g. `self_prefix.wte.weight`. The library may hold equal copies: one of
/// each layer and one of the model; the shortest name counts.
fn by_suffix<'a>(
    at: At<'_>,
    tensors: &'a BTreeMap<String, Tensor>,
    infix: &str,
    known: &[&str],
) -> Result<BTreeMap<String, &'a Tensor>, InteropError> {
    let mut found: BTreeMap<String, (&str, &Tensor)> = BTreeMap::new();
    let mut left = Vec::new();
    for (name, t) in tensors {
        let suffix = name.split_once(infix).and_then(|(_, rest)| rest.split_once('.')).map(|(_, suffix)| suffix);
        match suffix.filter(|s| known.contains(s)) {
            Some(suffix) => match found.get(suffix) {
                Some((_, other)) if other.dims() != t.dims() => {
                    return Err(at.bad(format!("{name} is {:?}, its copies are {:?}", t.dims(), other.dims())));
                }
                Some((shorter, _)) if shorter.len() <= name.len() => {}
                _ => drop(found.insert(suffix.to_owned(), (name.as_str(), t))),
            },
            None => left.push(name.clone()),
        }
    }
    if left.is_empty() {
        Ok(found.into_iter().map(|(k, (_, t))| (k, t)).collect())
    } else {
        Err(keys::unapplied(left, found.len(), at.base))
    }
}

fn hub_prefix(
    at: At<'_>,
    config: &Value,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Vec<(SiteId, Patch)>, InteropError> {
    for key in ["use_gating", "leave_out"] {
        let set = match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        };
        if set {
            return Err(at.bad(format!(
                "config.{key} is set, which this server does not apply to prefixes; false, null or an empty list is accepted"
            )));
        }
    }
    let groups = Group::ALL.iter().filter(|g| g.is_of(at.base));
    let used: Vec<&Group> =
        groups.filter(|g| g.switch.is_none_or(|key| config.get(key) != Some(&Value::Bool(false)))).collect();
    let known: Vec<String> = used.iter().flat_map(|g| PREFIX_SUFFIXES.map(|s| format!("{}.{s}", g.name))).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let found = by_suffix(at, tensors, "prefix_tunings.", &known)?;
    let mut patches = Vec::new();
    for group in used {
        patches.extend(hub_group(at, config, &found, group)?);
    }
    Ok(patches)
}

/// One of AdapterHub's prefixes: keys and values of all layers whose attention it joins.
pub(super) struct Group {
    /// In the tensors' names.
    pub(super) name: &'static str,
    pub(super) stack: Stack,
    /// Where the configuration may leave it out.
    pub(super) switch: Option<&'static str>,
}

impl Group {
    const fn new(name: &'static str, stack: Stack, switch: Option<&'static str>) -> Self {
        Self { name, stack, switch }
    }

    /// All that the library has. Bases without an encoder of their own have the first only.
    pub(super) const ALL: [Self; 3] = [
        Self::new("self_prefix", Stack::Main, None),
        Self::new("encoder_prefix", Stack::Encoder, Some("encoder_prefix")),
        Self::new("cross_prefix", Stack::Memory, Some("cross_prefix")),
    ];

    fn is_of(&self, base: &Base) -> bool {
        self.stack == Stack::Main || base.arch.is_encoder_decoder()
    }
}

/// What stands behind a group's name.
const PREFIX_SUFFIXES: [&str; 6] = [
    "control_trans",
    "wte.weight",
    "control_trans.0.weight",
    "control_trans.0.bias",
    "control_trans.2.weight",
    "control_trans.2.bias",
];

/// The patches of one of the library's prefixes.
fn hub_group(
    at: At<'_>,
    config: &Value,
    found: &BTreeMap<String, &Tensor>,
    group: &Group,
) -> Result<Vec<(SiteId, Patch)>, InteropError> {
    let layers = prefix_sites(at.base, group.stack)?;
    let whole: usize = layers.iter().map(|(_, width)| 2 * width).sum();
    let get = |suffix: &str| {
        let name = format!("{}.{suffix}", group.name);
        found.get(&name).copied().ok_or_else(|| at.bad(format!("the tensor of {name} is missing")))
    };
    let flat = if found.contains_key(&format!("{}.control_trans", group.name)) {
        let t = get("control_trans")?.flatten_all()?;
        if t.elem_count() % whole != 0 {
            return Err(at.mismatch("the count of control_trans by virtual tokens", t.elem_count(), whole));
        }
        t.reshape((t.elem_count() / whole, whole))?
    } else {
        let act = config.get("non_linearity").and_then(Value::as_str).unwrap_or("tanh");
        projected(
            at,
            act,
            whole,
            get("wte.weight")?,
            [
                (get("control_trans.0.weight")?, get("control_trans.0.bias")?),
                (get("control_trans.2.weight")?, get("control_trans.2.bias")?),
            ],
        )?
    };
    check_count(at, "prefix_length", config, flat.dim(0)?)?;
    at.prefix(&flat, group.name, (PrefixForm::Pinned, group.stack))
}

/// `W2 act(W1 E + b1) + b2` of `[n, d]`, `[h, d]`, `[out, h]`: `[n, out]`. Small factors make large products: sizes are
/// checked before anything is multiplied.
fn projected(
    at: At<'_>,
    act: &str,
    whole: usize,
    table: &Tensor,
    [(w1, b1), (w2, b2)]: [(&Tensor, &Tensor); 2],
) -> Result<Tensor, InteropError> {
    let fits = match (table.dims(), w1.dims(), b1.dims(), w2.dims(), b2.dims()) {
        (&[_, d], &[h, d1], &[h1], &[o, h2], &[o2]) => d == d1 && h == h1 && h == h2 && o == o2,
        _ => false,
    };
    if !fits {
        let dims = [table, w1, b1, w2, b2].map(|t| format!("{:?}", t.dims())).join(", ");
        return Err(at.bad(format!("wte and control_trans do not fit each other: {dims}")));
    }
    let (n, inner, out) = (table.dim(0)?, w1.dim(0)?, w2.dim(0)?);
    if out != whole {
        return Err(at.mismatch("the output of control_trans", out, whole));
    }
    if n > MAX_VIRTUAL || n.saturating_mul(inner.max(out)) > MAX_PRODUCT {
        return Err(at.bad(format!(
            "{n} virtual tokens of {inner} and {out} numbers; at most {MAX_VIRTUAL} tokens and {MAX_PRODUCT} numbers are \
             accepted"
        )));
    }
    let hidden = table.matmul(&w1.t()?.contiguous()?)?.broadcast_add(b1)?;
    let hidden = match act {
        "tanh" => hidden.tanh()?,
        "relu" => hidden.relu()?,
        "sigmoid" => candle_nn::ops::sigmoid(&hidden)?,
        "swish" | "silu" => hidden.silu()?,
        "gelu" => hidden.gelu_erf()?,
        "gelu_new" => hidden.gelu()?,
        other => {
            return Err(at.bad(format!(
                "non_linearity {other:?} is not supported; supported are tanh, relu, sigmoid, swish, silu, gelu, gelu_new"
            )));
        }
    };
    Ok(hidden.matmul(&w2.t()?.contiguous()?)?.broadcast_add(b2)?)
}

fn hub_prompt(
    at: At<'_>,
    config: &Value,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Vec<(SiteId, Patch)>, InteropError> {
    if at.base.arch.is_encoder_decoder() {
        return Err(InteropError::BaseMismatch(format!(
            "AdapterHub's prompts are not applied to encoder-decoders (PEFT's are), and this server's base is {}",
            at.base.arch.kind()
        )));
    }
    if let Some(combine) = config.get("combine").filter(|c| !c.is_null() && **c != "prefix") {
        return Err(at.bad(format!("config.combine {combine} is not supported; supported is \"prefix\"")));
    }
    const ROWS: &str = "prompt_embedding.weight";
    let found = by_suffix(at, tensors, "prompt_tunings.", &[ROWS])?;
    let rows = found.get(ROWS).ok_or_else(|| at.bad(format!("the tensor of {ROWS} is missing")))?;
    let &[n, width] = rows.dims() else {
        return Err(at.bad(format!("{ROWS} is {:?}; two dimensions are accepted", rows.dims())));
    };
    if width != at.base.arch.hidden {
        return Err(at.mismatch(&format!("the width of {ROWS}"), width, at.base.arch.hidden));
    }
    check_count(at, "prompt_length", config, n)?;
    // the library joins a prompt to the output of the embeddings: behind a position table's part
    let stage = match at.base.arch.positions {
        Positions::Learned { .. } => PromptStage::Hidden,
        Positions::Rotary | Positions::Relative { .. } => PromptStage::Tokens,
    };
    Ok(vec![at.prompt(rows, stage)?])
}
