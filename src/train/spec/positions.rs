//! Plans of methods that add positions: how many, where they start, and the network that makes them while training.

use crate::{
    admission::train_params::{
        MAX_VIRTUAL_TOKENS, PTuningPart, PrefixInit, PrefixLibrary, PrefixPart, PromptInit, PromptPart,
    },
    delta::{PrefixForm, Site, SiteId, Stack, seq2seq_pair},
    ops::Act,
};

use super::{PatchPlan, Resolver};

/// Virtual tokens of a prompt by default (Lester et al. 2021 find little beyond).
const PROMPT_TOKENS: u32 = 20;
/// Virtual tokens of a prefix by default.
const PREFIX_TOKENS: u32 = 30;
/// Inner width of networks by default.
const ENCODER_HIDDEN: u32 = 512;

/// Where virtual tokens start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// At random: a prompt uniform in +-0.5, a prefix from N(0, 0.02), a network as torch makes it.
    Random,
    /// At zero.
    Zeros,
    /// At tokens drawn from the vocabulary.
    Vocabulary,
    /// At a text's tokens (repeated or cut); empty = the first training examples.
    Text(Vec<u32>),
}

/// The network that makes virtual tokens while training: a table `[n, inputs]`, then linears with a nonlinearity between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderPlan {
    /// Rows of the table.
    pub n: usize,
    /// Widths from the table to the result.
    pub widths: Vec<usize>,
    /// Between the linears.
    pub act: Act,
}

impl EncoderPlan {
    /// Numbers in it.
    pub fn parameters(&self) -> usize {
        let table = self.n * self.widths.first().copied().unwrap_or(0);
        table + self.widths.windows(2).map(|w| (w[0] + 1) * w[1]).sum::<usize>()
    }
}

/// One part that adds positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionPlan {
    /// Virtual tokens.
    pub n: usize,
    /// Where they start.
    pub start: Start,
    /// What makes them, if they are not trained themselves.
    pub encoder: Option<EncoderPlan>,
    /// The part's field, for messages.
    pub field: String,
    /// Text to start from; planning turns it into tokens.
    pub text: Option<String>,
}

/// The parts of a specification that add positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PositionPlans {
    /// Rows ahead of the tokens.
    pub prompt: Option<PositionPlan>,
    /// Keys and values ahead of each layer's own.
    pub prefix: Option<PositionPlan>,
}

impl PositionPlans {
    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &PositionPlan> {
        self.prompt.iter().chain(&self.prefix)
    }

    /// Both.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut PositionPlan> {
        self.prompt.iter_mut().chain(&mut self.prefix)
    }

    /// Positions that they take ahead of the tokens.
    pub fn count(&self) -> usize {
        self.iter().map(|p| p.n).sum()
    }

    /// Numbers in all networks.
    pub fn encoder_parameters(&self) -> usize {
        self.iter().filter_map(|p| p.encoder.as_ref()).map(EncoderPlan::parameters).sum()
    }
}

/// Parts with every field set.
pub fn prompt_defaults(part: &PromptPart) -> PromptPart {
    PromptPart { num_virtual_tokens: part.num_virtual_tokens.or(Some(PROMPT_TOKENS)), ..part.clone() }
}

/// Parts with every field set.
pub fn p_tuning_defaults(part: &PTuningPart) -> PTuningPart {
    PTuningPart {
        num_virtual_tokens: part.num_virtual_tokens.or(Some(PROMPT_TOKENS)),
        encoder_hidden: part.encoder_hidden.or(Some(ENCODER_HIDDEN)),
    }
}

/// Parts with every field set. A decoder with an encoder computes nothing for a text alone, so its prefix starts at random.
/// The form is that which the part names, or PEFT's.
pub fn prefix_defaults(part: &PrefixPart, encoder_decoder: bool) -> PrefixPart {
    let start = if encoder_decoder && part.init.is_none() { PrefixInit::Random } else { part.start() };
    PrefixPart {
        num_virtual_tokens: part.num_virtual_tokens.or(Some(PREFIX_TOKENS)),
        init: Some(start),
        projection_hidden: part.projection_hidden.or(part.projection.then_some(ENCODER_HIDDEN)),
        form: part.form.or(Some(PrefixLibrary::Peft)),
        ..part.clone()
    }
}

impl Resolver<'_> {
    pub(super) fn prompt(&mut self, field: &str, part: &PromptPart) {
        let part = prompt_defaults(part);
        let start = match part.init {
            PromptInit::Vocabulary => Start::Vocabulary,
            PromptInit::Random => Start::Random,
            PromptInit::Text => Start::Text(vec![]),
        };
        self.rows(field, part.num_virtual_tokens, start, None, part.init_text);
    }

    /// Three linears with ReLU between, as PEFT's encoder.
    pub(super) fn p_tuning(&mut self, field: &str, part: &PTuningPart) {
        let part = p_tuning_defaults(part);
        let (inner, width) = (part.encoder_hidden.unwrap_or(ENCODER_HIDDEN) as usize, self.base.hidden);
        self.rows(
            field,
            part.num_virtual_tokens,
            Start::Random,
            Some((vec![width, inner, inner, width], Act::Relu)),
            None,
        );
    }

    fn rows(
        &mut self,
        field: &str,
        n: Option<u32>,
        start: Start,
        network: Option<(Vec<usize>, Act)>,
        text: Option<String>,
    ) {
        let Some(n) = self.virtual_tokens(field, n) else { return };
        if let Some(other) = &self.positions.prompt {
            let message = format!("adds a second prompt to that of {}; give one of prompt and p_tuning", other.field);
            return self.problem(field, message);
        }
        let Some(site) = self.base.sites.id(Site::Embedding) else {
            return self.problem(field, "a prompt needs a base with an embedding table; this one has none");
        };
        let made = network.is_some();
        let encoder = network.map(|(widths, act)| EncoderPlan { n, widths, act });
        self.positions.prompt = Some(PositionPlan { n, start, encoder, field: field.to_owned(), text });
        let stack = if self.base.encoder_decoder { Stack::Encoder } else { Stack::Main };
        self.patches.entry(site).or_default().push(PatchPlan::Prompt { n, made, stack });
    }

    /// Directly, or one linear, tanh, one linear from a table as wide as the base (Li and Liang 2021).
    pub(super) fn prefix(&mut self, field: &str, part: &PrefixPart) {
        let part = prefix_defaults(part, self.base.encoder_decoder);
        let Some(n) = self.virtual_tokens(field, part.num_virtual_tokens) else { return };
        let (form, stacks) = match part.form {
            Some(PrefixLibrary::AdapterHub) => (PrefixForm::Pinned, &[Stack::Main, Stack::Encoder, Stack::Memory][..]),
            Some(PrefixLibrary::Peft) | None => (PrefixForm::Context, &[Stack::Main][..]),
        };
        let of = |&stack| self.base.sites.prefix_sites(stack).into_iter().map(move |site| (site, stack));
        let sites: Vec<((SiteId, usize), Stack)> = stacks.iter().flat_map(of).collect();
        if sites.is_empty() {
            return self.problem(field, "a prefix needs layers with keys and values; this base has none");
        }
        if self.base.encoder_decoder && (part.start() == PrefixInit::Text || part.init_text.is_some()) {
            let message = "a text needs a base without an encoder of its own; random and zeros are accepted";
            return self.problem(&format!("{field}.init"), message);
        }
        let sharing = sharing(&sites, self.base.encoder_decoder && form == PrefixForm::Context);
        let start = match part.start() {
            PrefixInit::Text => Start::Text(vec![]),
            PrefixInit::Random => Start::Random,
            PrefixInit::Zeros => Start::Zeros,
        };
        let encoder = part.projection.then(|| {
            let inner = part.projection_hidden.unwrap_or(ENCODER_HIDDEN) as usize;
            let own = sites.iter().zip(&sharing).filter(|(_, like)| like.is_none());
            let out = own.map(|(((_, width), _), _)| 2 * width).sum();
            EncoderPlan { n, widths: vec![self.base.hidden, inner, out], act: Act::Tanh }
        });
        let made = encoder.is_some();
        self.positions.prefix = Some(PositionPlan { n, start, encoder, field: field.to_owned(), text: part.init_text });
        for (((site, _), stack), like) in sites.into_iter().zip(sharing) {
            self.patches.entry(site).or_default().push(PatchPlan::Prefix { n, made, like, form, stack });
        }
    }

    fn virtual_tokens(&mut self, field: &str, n: Option<u32>) -> Option<usize> {
        const MAX: u32 = MAX_VIRTUAL_TOKENS;
        let n = n.unwrap_or(1);
        if !(1..=MAX).contains(&n) {
            self.problem(&format!("{field}.num_virtual_tokens"), format!("is {n}; accepted is 1 to {MAX}"));
            return None;
        }
        Some(n as usize)
    }
}

/// For each layer, the earlier one that it shares keys and values with.
fn sharing(sites: &[((SiteId, usize), Stack)], shared: bool) -> Vec<Option<SiteId>> {
    let pair = |layer| seq2seq_pair(layer, sites.len());
    let like = |layer| (0..layer).find(|&l| shared && pair(l) == pair(layer)).map(|l| sites[l].0.0);
    (0..sites.len()).map(like).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::train_params::MethodPart,
        delta::{SiteEntry, SiteTable, Task},
        train::spec::{BaseShape, TrainSpec, tests::table},
    };

    fn with_positions() -> SiteTable {
        let mut t = table(false);
        let mut push = |site, out_dim| {
            t.push(SiteEntry { site, module: String::new(), in_dim: 0, out_dim, has_bias: false });
        };
        push(Site::Embedding, 8);
        push(Site::KeyValue { layer: 0, stack: Stack::Main }, 4);
        push(Site::KeyValue { layer: 1, stack: Stack::Main }, 4);
        t
    }

    fn resolve(sites: &SiteTable, methods: &[MethodPart]) -> Result<TrainSpec, Vec<(String, String)>> {
        let base =
            BaseShape { sites, hidden: 8, vocab: 32, causal: true, encoder_decoder: false, inner: None, base: None };
        TrainSpec::resolve(methods, Task::CausalLm, &[], base)
            .map_err(|v| v.into_iter().map(|v| (v.field, v.message)).collect())
    }

    #[test]
    fn parts_are_counted_with_what_makes_them() {
        let sites = with_positions();
        let prompt = MethodPart::Prompt(PromptPart { num_virtual_tokens: Some(5), ..PromptPart::default() });
        let prefix = PrefixPart { num_virtual_tokens: Some(3), ..PrefixPart::default() };
        let spec = resolve(&sites, &[prompt, MethodPart::Prefix(prefix.clone())]).unwrap();
        assert_eq!((spec.positions.count(), spec.parameters(&sites)), (8, 5 * 8 + 3 * 2 * 2 * 4));
        assert_eq!(spec.positions.prefix.unwrap().start, Start::Text(vec![]));
        let made = PrefixPart { projection: true, projection_hidden: Some(6), ..prefix };
        let spec = resolve(&sites, &[MethodPart::Prefix(made)]).unwrap();
        assert_eq!(spec.parameters(&sites), 3 * 8 + 9 * 6 + 7 * 16);
        let p = PTuningPart { num_virtual_tokens: Some(2), encoder_hidden: Some(6) };
        let spec = resolve(&sites, &[MethodPart::PTuning(p)]).unwrap();
        assert_eq!(spec.parameters(&sites), 2 * 8 + 9 * 6 + 7 * 6 + 7 * 8);
    }

    #[test]
    fn a_text_starts_no_prefix_of_an_encoder_decoder() {
        let sites = with_positions();
        let base = BaseShape {
            sites: &sites,
            hidden: 8,
            vocab: 32,
            causal: true,
            encoder_decoder: true,
            inner: None,
            base: None,
        };
        let of = |part: PrefixPart| TrainSpec::resolve(&[MethodPart::Prefix(part)], Task::Seq2Seq, &[], base);
        assert_eq!(of(PrefixPart::default()).unwrap().positions.prefix.unwrap().start, Start::Random);
        for part in [
            PrefixPart { init: Some(PrefixInit::Text), ..PrefixPart::default() },
            PrefixPart { init_text: Some("a".into()), ..PrefixPart::default() },
        ] {
            assert_eq!(of(part).unwrap_err()[0].field, "methods[0].init");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let sites = with_positions();
        let prompt = || MethodPart::Prompt(PromptPart::default());
        let two = resolve(&sites, &[prompt(), MethodPart::PTuning(PTuningPart::default())]).unwrap_err();
        assert!(two[0].0 == "methods[1]" && two[0].1.contains("methods[0]"), "{two:?}");
        let none =
            resolve(&sites, &[MethodPart::Prompt(PromptPart { num_virtual_tokens: Some(0), ..PromptPart::default() })]);
        assert_eq!(none.unwrap_err()[0].0, "methods[0].num_virtual_tokens");
        let bare = table(false);
        for part in [prompt(), MethodPart::Prefix(PrefixPart::default())] {
            let refused = resolve(&bare, &[part]).unwrap_err();
            assert!(refused[0].1.contains("needs"), "{refused:?}");
        }
    }
}
