//! How a byte-level BPE cuts up a text before it merges, by the name that llama.cpp's converter gives it
//! (`tokenizer.ggml.pre`): the expressions are those of the models' own `tokenizer.json`.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// GPT-2's.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's, which is that of OpenAI's cl100k: three digits at most.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's: a digit at a time.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of Mistral's Tekken: words are also cut where small letters are followed by capital ones.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a name stands for.
#[derive(Debug)]
pub(super) struct Rules {
    names: &'static [&'static str],
    /// Each cuts the pieces of the one before: what it matches and what lies between are pieces of their own.
    cuts: &'static [&'static str],
    /// Characters are composed first.
    nfc: bool,
    /// A piece that is a token is that token, whatever its merges would come to.
    pub(super) ignore_merges: bool,
    /// Texts begin with a token, unless the file says otherwise.
    pub(super) bos: bool,
}

const PLAIN: Rules = Rules { names: &[], cuts: &[GPT2], nfc: false, ignore_merges: false, bos: false };

const ALL: &[Rules] = &[
    Rules { names: &["gpt-2", "phi-2"], ..PLAIN },
    Rules {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        cuts: &[LLAMA3],
        ignore_merges: true,
        bos: true,
        ..PLAIN
    },
    Rules { names: &["dbrx", "smaug-bpe"], cuts: &[LLAMA3], ..PLAIN },
    Rules { names: &["qwen2"], cuts: &[QWEN2], nfc: true, ..PLAIN },
    Rules { names: &["smollm"], cuts: &[r"\p{N}", GPT2], ..PLAIN },
    Rules { names: &["tekken"], cuts: &[TEKKEN], ignore_merges: true, bos: true, ..PLAIN },
    // llama.cpp's own, of files that were made before it told the models' apart
    Rules { names: &["default"], cuts: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN },
];

/// All names, for messages.
pub(super) fn names() -> String {
    ALL.iter().flat_map(|r| r.names).copied().collect::<Vec<_>>().join(", ")
}

impl Rules {
    /// Those of a name.
    pub(super) fn of(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|rules| rules.names.contains(&name))
    }

    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    /// # Errors
    /// An expression that the library cannot read.
    pub(super) fn pre_tokenizer(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let cut = |regex: &&str| {
            Split::new(SplitPattern::Regex((*regex).to_owned()), SplitDelimiterBehavior::Isolated, false)
                .map(Into::into)
        };
        let mut steps: Vec<PreTokenizerWrapper> = self.cuts.iter().map(cut).collect::<tokenizers::Result<_>>()?;
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}
