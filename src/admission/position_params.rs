//! Method parts that add positions ahead of the tokens: prompts and prefixes.

use serde::{Deserialize, Serialize};

use super::check::Problems;

/// Prompt tuning: trained embeddings ahead of the tokens (Lester et al. 2021).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptPart {
    /// 1 to 1024; default 20.
    pub num_virtual_tokens: Option<u32>,
    /// Where the embeddings start.
    pub init: PromptInit,
    /// With [`PromptInit::Text`]: the text; repeated or cut to the number of virtual tokens.
    pub init_text: Option<String>,
}

/// Where the embeddings of a prompt start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInit {
    /// Embeddings of tokens drawn from the vocabulary.
    #[default]
    Vocabulary,
    /// Uniform in +-0.5.
    Random,
    /// Embeddings of a text.
    Text,
}

/// P-tuning: a prompt that a network makes while training (Liu et al. 2021). Saved and served as a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PTuningPart {
    /// 1 to 1024; default 20.
    pub num_virtual_tokens: Option<u32>,
    /// Width of the network's two inner layers, 1 to 16384; default 512.
    pub encoder_hidden: Option<u32>,
}

/// Prefix tuning: trained keys and values ahead of each layer's own (Li and Liang 2021).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixPart {
    /// 1 to 1024; default 30.
    pub num_virtual_tokens: Option<u32>,
    /// Where keys and values start; default: a text's, and random with a projection.
    pub init: Option<PrefixInit>,
    /// With [`PrefixInit::Text`]: the text, repeated or cut to the number of virtual tokens; unset = the first training
    /// examples.
    pub init_text: Option<String>,
    /// Whether a network makes keys and values while training. Saved and served as what it made.
    pub projection: bool,
    /// Width of the network's inner layer, 1 to 16384; default 512. Only with `projection`.
    pub projection_hidden: Option<u32>,
    /// Whose prefix it is; default: PEFT's, or that of the delta that is continued.
    #[serde(default)]
    pub form: Option<PrefixLibrary>,
}

/// Whose form a prefix has, and with it what it joins and how it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixLibrary {
    /// The keys are context: they take the first positions, and a sliding window leaves them behind. Of an encoder-decoder it
    /// joins the decoder's self-attention, where layers share keys.
    Peft,
    /// The keys take no positions, and every query sees them. Of an encoder-decoder it joins the encoder's and the decoder's
    /// self-attention and cross-attention.
    AdapterHub,
}

/// Where keys and values of a prefix start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixInit {
    /// What the base computes for a text: the fresh prefix acts as that text ahead of the tokens.
    Text,
    /// From N(0, 0.02).
    Random,
    /// Zeros.
    Zeros,
}

/// Most virtual tokens of a part.
pub const MAX_VIRTUAL_TOKENS: u32 = 1024;
/// Widest inner layer of a network that makes virtual tokens.
pub const MAX_ENCODER_HIDDEN: u32 = 16_384;
/// Longest text to start from, bytes.
const MAX_INIT_TEXT: usize = 64 * 1024;

impl PromptPart {
    /// Checks numbers, and that a text is given exactly where one is used.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        check_count(at, self.num_virtual_tokens, problems);
        let uses = self.init == PromptInit::Text;
        check_text(at, self.init_text.as_deref(), uses, problems);
        let missing = uses && self.init_text.is_none();
        problems.require(!missing, &format!("{at}.init_text"), || "is required when init is text".into());
    }
}

impl PTuningPart {
    /// Checks numbers.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        check_count(at, self.num_virtual_tokens, problems);
        problems.integer(&format!("{at}.encoder_hidden"), self.encoder_hidden.unwrap_or(1), 1, MAX_ENCODER_HIDDEN);
    }
}

impl PrefixPart {
    /// Where keys and values start.
    pub fn start(&self) -> PrefixInit {
        let random = self.projection || self.form == Some(PrefixLibrary::AdapterHub);
        self.init.unwrap_or(if random { PrefixInit::Random } else { PrefixInit::Text })
    }

    /// Checks numbers and contradictions.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        check_count(at, self.num_virtual_tokens, problems);
        check_text(at, self.init_text.as_deref(), self.start() == PrefixInit::Text, problems);
        let clash = self.projection && self.start() != PrefixInit::Random;
        problems.require(!clash, &format!("{at}.init"), || {
            "cannot be chosen with a projection, whose network starts at random".into()
        });
        // a text's keys stand at positions, which this form does not have
        let bare = self.form == Some(PrefixLibrary::AdapterHub) && self.start() == PrefixInit::Text;
        problems.require(!bare, &format!("{at}.init"), || {
            "text needs PEFT's form, whose keys take positions; random and zeros are accepted".into()
        });
        let idle = !self.projection && self.projection_hidden.is_some();
        problems.require(!idle, &format!("{at}.projection_hidden"), || "is given, but projection is off".into());
        let hidden = self.projection_hidden.unwrap_or(1);
        problems.integer(&format!("{at}.projection_hidden"), hidden, 1, MAX_ENCODER_HIDDEN);
    }
}

fn check_count(at: &str, n: Option<u32>, problems: &mut Problems) {
    problems.integer(&format!("{at}.num_virtual_tokens"), n.unwrap_or(1), 1, MAX_VIRTUAL_TOKENS);
}

fn check_text(at: &str, text: Option<&str>, used: bool, problems: &mut Problems) {
    let Some(text) = text else { return };
    let field = format!("{at}.init_text");
    problems.require(used, &field, || "is given, but init is not text".into());
    problems.require(!text.trim().is_empty(), &field, || "must not be empty".into());
    problems.require(text.len() <= MAX_INIT_TEXT, &field, || {
        format!("is {} bytes; at most {MAX_INIT_TEXT} are accepted", text.len())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(check: impl Fn(&mut Problems)) -> Vec<String> {
        let mut problems = Problems::default();
        check(&mut problems);
        match problems.finish() {
            Ok(()) => vec![],
            Err(crate::admission::params::ServeError::Invalid(all)) => all.into_iter().map(|v| v.field).collect(),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn texts_and_networks_are_given_where_they_are_used() {
        let prompt =
            |init, text: Option<&str>| PromptPart { init, init_text: text.map(Into::into), ..PromptPart::default() };
        assert!(fields(|p| prompt(PromptInit::Text, Some("a")).check("m", p)).is_empty());
        assert_eq!(fields(|p| prompt(PromptInit::Text, None).check("m", p)), ["m.init_text"]);
        assert_eq!(fields(|p| prompt(PromptInit::Random, Some("a")).check("m", p)), ["m.init_text"]);
        let prefix = PrefixPart { projection: true, ..PrefixPart::default() };
        assert_eq!(prefix.start(), PrefixInit::Random);
        assert!(fields(|p| prefix.check("m", p)).is_empty());
        let clash = PrefixPart { init: Some(PrefixInit::Zeros), num_virtual_tokens: Some(0), ..prefix };
        assert_eq!(fields(|p| clash.check("m", p)), ["m.num_virtual_tokens", "m.init"]);
        let idle = PrefixPart { projection_hidden: Some(8), ..PrefixPart::default() };
        assert_eq!(fields(|p| idle.check("m", p)), ["m.projection_hidden"]);
        assert_eq!(idle.start(), PrefixInit::Text);
        let hub = PrefixPart { form: Some(PrefixLibrary::AdapterHub), ..PrefixPart::default() };
        assert_eq!((hub.start(), fields(|p| hub.check("m", p))), (PrefixInit::Random, vec![]));
        let text = PrefixPart { init: Some(PrefixInit::Text), ..hub };
        assert_eq!(fields(|p| text.check("m", p)), ["m.init"]);
    }
}
