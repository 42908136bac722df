//! Text: from characters to token ids and back.
//!
//! Owns the tokenizer, chat templates, streamed detokenisation and stop texts. Knows nothing of requests, models or
//! tensors, and never truncates or pads.

mod chat;
mod decode_stream;
mod gguf;
mod stop;
mod strftime;
mod token_bytes;
mod tokenizer;

pub use chat::{ChatError, ChatTemplate, encode_guarded, guard};
pub use decode_stream::DecodeStream;
pub use stop::{StopOutcome, StopStrings};
pub use token_bytes::TokenBytes;
pub use tokenizer::{Encoded, MAX_TEXT_BYTES, SpecialIds, TextError, TextModel};

#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::expect_used, dead_code, reason = "for tests and fuzz targets; these need a part of it")]
pub(crate) mod testing {
    //! Real tokenizers for tests, where the folder with shared models is at hand.

    use std::{path::PathBuf, sync::Arc};

    use super::TextModel;

    /// Folders under `../shared/models` that hold a `tokenizer.json`.
    pub(crate) const FOLDERS: [&str; 5] = [
        "stories260k-llama",
        "all-minilm-l6-v2-bert",
        "tokenizers/gpt2",
        "tokenizers/llama2-32k",
        "tokenizers/t5-legal-32k",
    ];

    /// Opens a shared tokenizer, or says why the test is skipped.
    pub(crate) fn shared(folder: &str) -> Option<Arc<TextModel>> {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/models").join(folder);
        if !dir.join("tokenizer.json").is_file() {
            eprintln!("skipped: {} has no tokenizer.json", dir.display());
            return None;
        }
        Some(Arc::new(TextModel::open(&dir).expect("tokenizer opens")))
    }

    /// A byte-level tokenizer without merges and with the special tokens `<bos>` (256) and `<eos>` (257): id = byte.
    pub(crate) fn bytes() -> TextModel {
        let mut vocab = serde_json::Map::new();
        let printable = |b: u8| (b'!'..=b'~').contains(&b) || (0xA1..=0xAC).contains(&b) || b >= 0xAE;
        let mut extra = 0;
        for b in 0..=255u8 {
            let c = if printable(b) {
                char::from(b)
            } else {
                extra += 1;
                char::from_u32(255 + extra).expect("below the surrogates")
            };
            vocab.insert(c.to_string(), u32::from(b).into());
        }
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let file = serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [special(256, "<bos>"), special(257, "<eos>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]},
                    "<eos>": {"id": "<eos>", "ids": [257], "tokens": ["<eos>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": []}
        });
        let config = serde_json::json!({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"});
        TextModel::from_json(file.to_string().as_bytes(), Some(&config), None).expect("valid tokenizer")
    }
}
