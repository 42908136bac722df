//! Families as declarations: each maps a Hugging Face `config.json` to an [`Architecture`].

mod bert;
mod distilbert;
mod gemma;
mod gpt2;
mod llama;
mod phi3;
mod rope;
mod t5;

use serde_json::Value;

use super::{Architecture, BaseHead, LayerAttn, MlpKind, ModelError, Names, NormKind, Placement, Positions};
use crate::{
    delta::{Problem, Task},
    nn::HeadShape,
    ops::Act,
};

/// Supported values of `model_type`.
pub const MODEL_TYPES: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "bert",
    "roberta",
    "distilbert",
    "t5",
];

/// Reads a config.
///
/// # Errors
/// Unknown `model_type`, missing or contradictory fields.
pub fn from_config(config: &Value) -> Result<Architecture, ModelError> {
    let c = Config(config);
    let arch = match c.str("model_type")?.as_str() {
        "llama" | "mistral" | "qwen2" | "qwen3" => llama::architecture(&c)?,
        "gemma2" | "gemma3_text" => gemma::architecture(&c)?,
        "phi3" => phi3::architecture(&c)?,
        "gpt2" => gpt2::architecture(&c)?,
        "bert" | "roberta" => bert::architecture(&c)?,
        "distilbert" => distilbert::architecture(&c)?,
        "t5" => t5::architecture(&c)?,
        other => {
            return Err(ModelError::Unsupported(format!(
                "config.json: model_type {other:?} is not supported; supported are {}",
                MODEL_TYPES.join(", ")
            )));
        }
    };
    check(&arch)?;
    Ok(arch)
}

/// Takes what `generation_config.json` says beside the config: further tokens that end a sequence, and an encoder-decoder's
/// first token where the config names none.
pub(super) fn complete(arch: &mut Architecture, generation: &Value) {
    let c = Config(generation);
    for id in c.tokens("eos_token_id") {
        if !arch.eos.contains(&id) {
            arch.eos.push(id);
        }
    }
    if arch.is_encoder_decoder() && arch.decoder_start.is_none() {
        arch.decoder_start = c.tokens("decoder_start_token_id").first().copied();
    }
}

/// What most families have in common, to be filled in: sizes are missing, every option is off, norms are RMS and stand
/// before the halves. Special tokens and the checkpoint's own head are read from the config.
fn plain(c: &Config<'_>, names: Names, layers: usize) -> Result<Architecture, ModelError> {
    Ok(Architecture {
        family: "",
        model_type: c.str("model_type")?,
        hidden: 0,
        layers,
        encoder_layers: 0,
        heads: HeadShape::plain(0, 0),
        ff: 0,
        vocab: 0,
        max_positions: 0,
        norm: NormKind::RmsNorm,
        norm_eps: 0.0,
        norm_offset: 0.0,
        placement: Placement::Pre,
        positions: Positions::Rotary,
        causal: false,
        attn: vec![LayerAttn::default(); layers],
        mlp: MlpKind::Plain,
        act: Act::Gelu,
        conv1d: false,
        token_types: 0,
        embed_scale: 1.0,
        tied_head: false,
        head_scale: 1.0,
        logit_cap: None,
        scale_by_layer: false,
        bos: c.tokens("bos_token_id").first().copied(),
        decoder_start: None,
        eos: c.tokens("eos_token_id"),
        pad: c.tokens("pad_token_id").first().copied(),
        head: c.head()?,
        names,
    })
}

/// Largest accepted number of anything but tokens.
const MAX_SIZE: usize = 1 << 20;
/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

fn check(a: &Architecture) -> Result<(), ModelError> {
    let h = &a.heads;
    let bad = |m: String| Err(ModelError::Config(m));
    for (name, v) in [("hidden", a.hidden), ("layers", a.layers), ("heads", h.heads), ("kv heads", h.kv_heads)]
        .into_iter()
        .chain((a.encoder_layers > 0).then_some(("encoder layers", a.encoder_layers)))
    {
        if v == 0 || v > MAX_SIZE {
            return bad(format!("{name} is {v}"));
        }
    }
    if !h.heads.is_multiple_of(h.kv_heads) {
        return bad(format!("{} query heads cannot share {} key heads", h.heads, h.kv_heads));
    }
    if h.head_dim == 0 || (a.positions == Positions::Rotary && !h.head_dim.is_multiple_of(2)) {
        return bad(format!("head_dim is {}", h.head_dim));
    }
    if a.vocab == 0 || a.ff == 0 || a.max_positions == 0 {
        return bad(format!("vocab {}, mlp width {}, positions {}", a.vocab, a.ff, a.max_positions));
    }
    if let Positions::Relative { buckets, max_distance } = a.positions
        && (buckets < 4 || max_distance <= buckets / 2 || max_distance > MAX_SIZE)
    {
        return bad(format!("relative attention with {buckets} buckets up to distance {max_distance}"));
    }
    Ok(())
}

/// A config with typed access; errors name the field.
pub(crate) struct Config<'a>(&'a Value);

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn str(&self, key: &str) -> Result<String, ModelError> {
        match self.get(key).and_then(Value::as_str) {
            Some(s) => Ok(s.to_owned()),
            None => Err(ModelError::Config(format!("{key} is missing or not a string"))),
        }
    }

    fn usize(&self, key: &str) -> Result<usize, ModelError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) => Ok(n as usize),
            None => Err(ModelError::Config(format!("{key} is missing or not a number"))),
        }
    }

    fn usize_or(&self, key: &str, default: usize) -> usize {
        self.get(key).and_then(Value::as_u64).map_or(default, |n| n as usize)
    }

    /// A number of layers, small enough to make a list of.
    fn layers(&self, key: &str) -> Result<usize, ModelError> {
        match self.usize(key)? {
            n @ 1..=MAX_LAYERS => Ok(n),
            n => Err(ModelError::Config(format!("{key} is {n}; accepted is 1 to {MAX_LAYERS}"))),
        }
    }

    fn maybe_usize(&self, key: &str) -> Option<usize> {
        self.get(key).and_then(Value::as_u64).map(|n| n as usize)
    }

    /// A soft cap: `default` where the key is absent, none where it is null.
    fn cap(&self, key: &str, default: Option<f32>) -> Option<f32> {
        match self.0.get(key) {
            None => default,
            Some(v) => v.as_f64().map(|v| v as f32),
        }
    }

    /// An activation by its Hugging Face name.
    fn act(&self, key: &str, default: &str) -> Result<Act, ModelError> {
        let name = self.get(key).and_then(Value::as_str).unwrap_or(default);
        Act::from_hf(name).ok_or_else(|| ModelError::Config(format!("{key} {name:?} is not known")))
    }

    fn f64_or(&self, key: &str, default: f64) -> f64 {
        self.get(key).and_then(Value::as_f64).unwrap_or(default)
    }

    fn bool_or(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// Whether the config does not speak of a key at all; `null` is an answer.
    fn lacks(&self, key: &str) -> bool {
        self.0.get(key).is_none()
    }

    /// A token id, or a list of them.
    fn tokens(&self, key: &str) -> Vec<u32> {
        match self.get(key) {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).map(|n| n as u32).collect(),
            Some(v) => v.as_u64().map(|n| n as u32).into_iter().collect(),
            None => vec![],
        }
    }

    /// The head that the checkpoint's class brings, by the class's name.
    ///
    /// # Errors
    /// A regression of several numbers, which this server does not read.
    fn head(&self) -> Result<Option<BaseHead>, ModelError> {
        let class = self.get("architectures").and_then(|list| list.get(0)?.as_str()).unwrap_or_default();
        let task = if class.ends_with("ForSequenceClassification") {
            Task::SeqCls
        } else if class.ends_with("ForTokenClassification") {
            Task::TokenCls
        } else {
            return Ok(None);
        };
        let mut labels: Vec<(usize, String)> = match self.get("id2label").and_then(Value::as_object) {
            Some(map) => map.iter().filter_map(|(k, v)| Some((k.parse().ok()?, v.as_str()?.to_owned()))).collect(),
            None => (0..self.usize_or("num_labels", 2)).map(|i| (i, format!("LABEL_{i}"))).collect(),
        };
        labels.sort();
        let said = self.get("problem_type").and_then(Value::as_str).and_then(Problem::from_name);
        let usual = if labels.len() == 1 && task == Task::SeqCls { Problem::Regression } else { Problem::SingleLabel };
        let problem = said.filter(|_| task == Task::SeqCls).unwrap_or(usual);
        if problem == Problem::Regression && labels.len() != 1 {
            return Err(ModelError::Unsupported(format!(
                "config.json: problem_type \"regression\" with {} outputs (num_labels); a regression of one is supported",
                labels.len()
            )));
        }
        Ok(Some(BaseHead { task, problem, labels: labels.into_iter().map(|(_, l)| l).collect() }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::from_config;
    use crate::{
        delta::{Problem, Task},
        model::testing::tiny_bert,
    };

    #[test]
    fn a_head_is_read_as_its_problem_says_or_refused_by_name() {
        let with = |class: &str, problem: Option<&str>, labels: usize| {
            let mut config = tiny_bert();
            config["architectures"] = json!([class]);
            config["problem_type"] = json!(problem);
            let names = (0..labels).map(|i| (i.to_string(), json!(format!("LABEL_{i}"))));
            config["id2label"] = names.collect::<serde_json::Map<_, _>>().into();
            from_config(&config).map(|a| a.head.map(|h| (h.task, h.problem, h.labels.len())))
        };
        const TEXTS: &str = "BertForSequenceClassification";
        let read = |problem, labels| with(TEXTS, problem, labels).unwrap().unwrap();
        assert_eq!(read(None, 3), (Task::SeqCls, Problem::SingleLabel, 3));
        assert_eq!(read(None, 1), (Task::SeqCls, Problem::Regression, 1));
        assert_eq!(read(Some("regression"), 1), (Task::SeqCls, Problem::Regression, 1));
        assert_eq!(read(Some("multi_label_classification"), 3), (Task::SeqCls, Problem::MultiLabel, 3));
        let refused = with(TEXTS, Some("regression"), 3).unwrap_err().to_string();
        assert!(refused.contains("\"regression\" with 3 outputs") && refused.contains("one is supported"), "{refused}");
        // transformers' heads for tokens give one label each, whatever the config says
        let tags = with("BertForTokenClassification", Some("regression"), 3).unwrap();
        assert_eq!(tags, Some((Task::TokenCls, Problem::SingleLabel, 3)));
        assert_eq!(with("BertModel", Some("regression"), 3).unwrap(), None);
    }
}
