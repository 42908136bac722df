//! Tokenizers written into a GGUF file and read from it against the `tokenizer.json` that they were made of; rules that no
//! tokenizer at hand has, by small vocabularies; files that are refused.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::*;
use crate::{
    model::{
        self,
        testing::{Rng, gguf as writer},
    },
    text::{ChatTemplate, TextModel},
};

/// Folders with a BPE: those of this repository, and others where they are at hand; each with its pre-tokenizer.
fn folders() -> Vec<(PathBuf, &'static str)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = ["adapters/base/tiny-stories", "tests/golden/fixtures/models/gpt2", "tests/golden/fixtures/models/llama"];
    let shared = ["tokenizers/gpt2", "tokenizers/llama2-32k", "stories260k-llama"];
    let shared = shared.map(|f| root.join("../shared/models").join(f));
    let all = own.map(|f| root.join(f)).into_iter().chain(shared.into_iter().filter(|f| f.is_dir()));
    all.map(|folder| (folder, "gpt-2")).collect()
}

/// What a file with these entries says of its tokenizer.
fn in_file(entries: &writer::Metadata) -> Map<String, Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    writer::write(&path, entries, &HashMap::new()).unwrap();
    model::tokenizer_metadata(&path).unwrap()
}

fn texts() -> Vec<String> {
    let fixed = [
        "",
        " ",
        "Once upon a time, there was a little girl named Lily.",
        "I'll say it's 3:14pm; they'RE, WE'VE don't",
        "0 12 345 6789 1234567890 3.14159 \u{b2}\u{2167}\u{664}",
        "  two  spaces\tand\ttabs \n\n\n new\r\nlines   ",
        "caf\u{e9} cafe\u{301} na\u{ef}ve \u{2014} \u{201c}quoted\u{201d}\u{2026}",
        "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{65e5}\u{672c}\u{8a9e} \u{d55c}\u{ad6d}\u{c5b4} \u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{645}\u{631}\u{62d}\u{628}\u{627}",
        "\u{1f600}\u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467} \u{1f1e9}\u{1f1ea} \u{10ffff}\u{fffd}",
        "a\u{0}b\u{7f}\u{80}\u{a0}\u{2009}c\u{2028}d",
        "\u{2581}raw \u{2581}\u{2581} \u{120}the",
        "<s>one</s> <unk><0x0A> <|endoftext|>two<|bos|> <|eos|><|begin_of_text|><|end_of_text|>",
        "fn main() { println!(\"{}\", x[0] + 1); } // ===== >>>>",
    ];
    let mut rng = Rng(3);
    let mut pick = |most: f32| (rng.uniform() * most) as u32;
    let random = (0..60).map(|_| {
        (0..40)
            .filter_map(|_| match pick(6.0) {
                0 => char::from_u32(pick(128.0)),
                1 => char::from_u32(pick(2048.0)),
                2 => char::from_u32(pick(1_114_112.0)),
                3 => Some(' '),
                _ => char::from_u32(97 + pick(26.0)),
            })
            .collect::<String>()
    });
    let random: Vec<String> = random.collect();
    fixed.into_iter().map(str::to_owned).chain(random).collect()
}

/// Both give the same tokens, and say the same of them.
fn assert_same(ours: &TextModel, theirs: &TextModel, what: &str) {
    assert_eq!(ours.vocab_size(), theirs.vocab_size(), "{what}");
    for text in texts() {
        for special in [false, true] {
            let ids = theirs.encode(&text, special).unwrap();
            assert_eq!(ours.encode(&text, special).unwrap(), ids, "{what}: {text:?}");
            assert_eq!(ours.decode(&ids).unwrap(), theirs.decode(&ids).unwrap(), "{what}: {text:?}");
            let user = theirs.encode_user(&text, special).unwrap();
            assert_eq!(ours.encode_user(&text, special).unwrap(), user, "{what}: {text:?} of a user");
        }
        assert_eq!(
            ours.encode_pair(&text, None).unwrap(),
            theirs.encode_pair(&text, None).unwrap(),
            "{what}: {text:?}"
        );
        let specials = |m: &TextModel| m.specials(&text).collect::<Vec<_>>();
        assert_eq!(specials(ours), specials(theirs), "{what}: {text:?}");
    }
    let count = theirs.vocab_size() as u32;
    for id in 0..count {
        let of = |m: &TextModel| (m.token_str(id), m.token_text(id), m.is_silent(id));
        assert_eq!(of(ours), of(theirs), "{what}: {id}");
    }
    // also bytes that are no character
    let mut rng = Rng(4);
    for _ in 0..200 {
        let ids: Vec<u32> = (0..12).map(|_| (rng.uniform() * count as f32) as u32).collect();
        assert_eq!(ours.decode(&ids).unwrap(), theirs.decode(&ids).unwrap(), "{what}: {ids:?}");
    }
}

#[test]
fn a_file_s_tokenizer_is_the_one_that_it_was_made_of() {
    for (folder, pre) in folders() {
        let what = folder.display().to_string();
        let theirs = TextModel::open(&folder).unwrap();
        let ours = TextModel::from_gguf(&in_file(&writer::tokenizer(&folder, pre).unwrap())).unwrap();
        assert_same(&ours, &theirs, &what);
        if folder.join("tokenizer_config.json").is_file() {
            assert_eq!(ours.special(), theirs.special(), "{what}");
            assert_eq!(ours.config()["chat_template"], theirs.config()["chat_template"], "{what}");
        }
    }
}

/// Pieces with scores and types of a SentencePiece model (a protobuf: field 1 are the pieces, of text, score and type).
fn sentence_pieces(data: &[u8]) -> Vec<(String, f32, u64)> {
    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = data.split_first().unwrap();
            *data = rest;
            value |= u64::from(first & 127) << shift;
            if *first < 128 {
                break;
            }
        }
        value
    }
    fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>, u64)> {
        let mut out = Vec::new();
        while !data.is_empty() {
            let tag = varint(&mut data);
            let (bytes, number) = match tag & 7 {
                0 => (0, varint(&mut data)),
                1 => (8, 0),
                2 => (varint(&mut data) as usize, 0),
                5 => (4, 0),
                other => panic!("wire type {other}"),
            };
            let (taken, rest) = data.split_at(bytes);
            data = rest;
            out.push((tag >> 3, taken.to_vec(), number));
        }
        out
    }
    let pieces = fields(data).into_iter().filter(|(field, ..)| *field == 1);
    let piece = |(_, bytes, _): (u64, Vec<u8>, u64)| {
        let mut out = (String::new(), 0.0, 1);
        for (field, bytes, number) in fields(&bytes) {
            match field {
                1 => out.0 = String::from_utf8(bytes).unwrap(),
                2 => out.1 = f32::from_le_bytes(bytes.try_into().unwrap()),
                3 => out.2 = number,
                _ => {}
            }
        }
        out
    };
    pieces.map(piece).collect()
}

#[test]
fn scores_of_a_sentence_piece_model_give_its_merges() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/tokenizers/llama2-32k");
    let Ok(data) = std::fs::read(folder.join("tokenizer.model")) else {
        eprintln!("skipped: {} is not there", folder.display());
        return;
    };
    let pieces = sentence_pieces(&data);
    assert_eq!(pieces.len(), 32_000);
    let metadata = json!({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces.iter().map(|p| p.0.as_str()).collect::<Vec<_>>(),
        "tokenizer.ggml.scores": pieces.iter().map(|p| p.1).collect::<Vec<_>>(),
        "tokenizer.ggml.token_type": pieces.iter().map(|p| p.2).collect::<Vec<_>>(),
    });
    let ours = TextModel::from_gguf(metadata.as_object().unwrap()).unwrap();
    assert_same(&ours, &TextModel::open(&folder).unwrap(), "llama2-32k by its scores");
    let special = ours.special();
    assert_eq!((special.unk, special.bos, special.eos), (Some(0), Some(1), Some(2)), "SentencePiece's usual ids");
}

/// All bytes as single tokens (of the ids 0 to 255), and more behind them, with their types.
fn bytes(pre: &str, more: &[(&str, i32)], merges: &[&str]) -> Map<String, Value> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let more_texts = more.iter().map(|(text, _)| (*text).to_owned());
    let tokens: Vec<String> = alphabet.into_iter().map(String::from).chain(more_texts).collect();
    let kinds: Vec<i32> = std::iter::repeat_n(1, 256).chain(more.iter().map(|(_, kind)| *kind)).collect();
    let all = json!({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": false,
    });
    all.as_object().unwrap().clone()
}

/// Three special tokens, all bytes, a space and some letters, and pieces of letters with scores (from id 263 on).
fn pieces(own: &[(&str, f32, i32)]) -> Map<String, Value> {
    let specials = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().zip([2, 3, 3]);
    let all = specials
        .chain((0..=255).map(|b| (format!("<0x{b:02X}>"), 6)))
        .chain(["\u{2581}", "a", "b", "c"].map(|t| (t.to_owned(), 1)));
    let all: Vec<(String, i32)> = all.chain(own.iter().map(|(t, _, kind)| ((*t).to_owned(), *kind))).collect();
    let scores: Vec<f32> = std::iter::repeat_n(-100.0, 263).chain(own.iter().map(|(_, score, _)| *score)).collect();
    let all = json!({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": all.iter().map(|(t, _)| t).collect::<Vec<_>>(),
        "tokenizer.ggml.token_type": all.iter().map(|(_, kind)| kind).collect::<Vec<_>>(),
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": false, "tokenizer.ggml.add_bos_token": false,
    });
    all.as_object().unwrap().clone()
}

fn with(mut metadata: Map<String, Value>, key: &str, value: Value) -> Map<String, Value> {
    let key = if key.contains('.') { key.to_owned() } else { Fields::key(key) };
    match value {
        Value::Null => drop(metadata.remove(&key)),
        value => drop(metadata.insert(key, value)),
    }
    metadata
}

fn built(metadata: &Map<String, Value>) -> TextModel {
    TextModel::from_gguf(metadata).unwrap()
}

/// How a text is cut up before merges.
fn cut<'a>(pre: &str, text: &'a str) -> Vec<&'a str> {
    let encoded = built(&bytes(pre, &[], &[])).encode_pair(text, None).unwrap();
    let mut out: Vec<(Option<u32>, (usize, usize))> = Vec::new();
    for (word, (start, end)) in encoded.words.into_iter().zip(encoded.offsets) {
        match out.last_mut().filter(|(last, _)| *last == word) {
            Some((_, (_, last_end))) => *last_end = end,
            None => out.push((word, (start, end))),
        }
    }
    out.into_iter().map(|(_, (start, end))| &text[start..end]).collect()
}

#[test]
fn each_pre_tokenizer_cuts_as_its_model_does() {
    let text = "I'M 12345 \u{c5}ngstr\u{f6}m\n\n  don't";
    let name = " \u{c5}ngstr\u{f6}m";
    assert_eq!(cut("gpt-2", text), ["I", "'", "M", " 12345", name, "\n\n ", " don", "'t"]);
    let llama = ["I", "'M", " ", "123", "45", name, "\n\n", " ", " don", "'t"];
    for pre in ["llama-bpe", "llama3", "dbrx", "smaug-bpe"] {
        assert_eq!(cut(pre, text), llama, "{pre}");
    }
    assert_eq!(cut("qwen2", text), ["I", "'M", " ", "1", "2", "3", "4", "5", name, "\n\n", " ", " don", "'t"]);
    assert_eq!(cut("smollm", text), ["I", "'", "M", " ", "1", "2", "3", "4", "5", name, "\n\n ", " don", "'t"]);
    assert_eq!(cut("tekken", "helloWorld 42/\n"), ["hello", "World", " ", "4", "2", "/\n"]);
    assert_eq!(cut("default", "a-b 1234"), ["a", "-", "b", " ", "123", "4"]);
    // Qwen's composes characters first
    let ids = |pre: &str, text: &str| built(&bytes(pre, &[], &[])).encode(text, false).unwrap();
    assert_eq!(ids("qwen2", "e\u{301}"), ids("qwen2", "\u{e9}"));
    assert_ne!(ids("gpt-2", "e\u{301}"), ids("gpt-2", "\u{e9}"));
}

#[test]
fn a_word_that_is_a_token_needs_no_merge_where_the_model_has_it_so() {
    let ids = |pre: &str| built(&bytes(pre, &[("ab", 1)], &[])).encode("ab", false).unwrap();
    for (pre, whole) in [("llama-bpe", true), ("tekken", true), ("gpt-2", false), ("qwen2", false), ("dbrx", false)] {
        assert_eq!(ids(pre) == [256], whole, "{pre}");
    }
}

#[test]
fn the_pair_with_the_highest_score_is_joined_first() {
    let ids = |own: &[(&str, f32, i32)], text: &str| built(&pieces(own)).encode_user(text, false).unwrap();
    // a, b, c are 260, 261, 262
    assert_eq!(ids(&[("ab", -1.0, 1), ("bc", 0.0, 1)], "abc"), [260, 264]);
    assert_eq!(ids(&[("ab", 0.0, 1), ("bc", -1.0, 1)], "abc"), [263, 262]);
    assert_eq!(ids(&[("ab", -1.0, 1), ("bc", -0.0, 1), ("abc", -2.0, 1)], "abc"), [265]);
    // no text comes to a piece of another kind
    for kind in [3, 5, 6] {
        assert_eq!(ids(&[("ab", 0.0, kind)], "ab"), [260, 261], "{kind}");
    }
    assert_eq!(ids(&[("ab", 0.0, 4)], "ab"), [263]);
    // what is no piece is bytes
    assert_eq!(ids(&[], "a\u{e9}"), [260, 3 + 0xC3, 3 + 0xA9]);
}

#[test]
fn spaces_and_ends_follow_the_flags() {
    let own = [("\u{2581}a", 0.0, 1)]; // 263
    let on = with(pieces(&own), "add_space_prefix", Value::Null);
    let (on, off) = (built(&on), built(&pieces(&own)));
    assert_eq!((on.encode("a a", false).unwrap(), off.encode("a a", false).unwrap()), (vec![263, 263], vec![260, 263]));
    assert_eq!((on.decode(&[263, 263]).unwrap(), off.decode(&[263, 263]).unwrap()), ("a a".into(), " a a".into()));
    let ends = |bos: Value, eos: Value| {
        built(&with(with(pieces(&[]), "add_bos_token", bos), "add_eos_token", eos)).encode("a", true).unwrap()
    };
    assert_eq!(
        ends(Value::Null, Value::Null),
        [1, 260],
        "SentencePiece's begin with one unless the file says otherwise"
    );
    assert_eq!(ends(json!(false), json!(true)), [260, 2]);
    assert_eq!(ends(json!(true), json!(true)), [1, 260, 2]);
    let both = built(&with(with(pieces(&[]), "add_bos_token", json!(true)), "add_eos_token", json!(true)));
    let pair = both.encode_pair("a", Some("b")).unwrap();
    assert_eq!((pair.ids, pair.type_ids), (vec![1, 260, 2, 1, 261, 2], vec![0, 0, 0, 1, 1, 1]));
    // Llama 3's begin with one, too, GPT-2's do not
    for (pre, first) in [("llama-bpe", true), ("gpt-2", false)] {
        let metadata = with(bytes(pre, &[("<|b|>", 3)], &[]), "add_bos_token", Value::Null);
        let model = built(&with(metadata, "bos_token_id", json!(256)));
        assert_eq!(model.encode("x", true).unwrap().first() == Some(&256), first, "{pre}");
        assert_eq!(model.special().bos, Some(256));
    }
}

#[test]
fn special_tokens_are_special_and_user_defined_ones_are_found_whole() {
    let metadata = bytes("gpt-2", &[("<|im_end|>", 3), ("<tool>", 4), ("[PAD0]", 5)], &[]);
    let model = built(&with(metadata, "eos_token_id", json!(256)));
    let ids = |text: &str| (model.encode(text, false).unwrap(), model.encode_user(text, false).unwrap());
    let (trusted, user) = ids("<|im_end|>");
    assert_eq!((trusted, user.contains(&256)), (vec![256], false));
    assert_eq!(ids("<tool>"), (vec![257], vec![257]));
    assert!(!ids("[PAD0]").0.contains(&258));
    assert_eq!((model.decode(&[256]).unwrap(), model.decode(&[257]).unwrap()), (String::new(), "<tool>".into()));
    assert_eq!((model.is_silent(256), model.is_silent(257), model.special().eos), (true, false, Some(256)));
}

#[test]
fn tokens_that_end_or_open_a_turn_are_special_and_end_it_whatever_the_file_says() {
    let marks = [("<end_of_turn>", 4), ("<start_of_turn>", 4), ("<|im_end|>", 3), ("<|end|>", 1), ("<tool>", 4)];
    let model = built(&bytes("gpt-2", &marks, &[]));
    for (id, text) in [(256, "<end_of_turn>"), (257, "<start_of_turn>"), (258, "<|im_end|>")] {
        assert_eq!(model.encode(text, false).unwrap(), [id]);
        assert!(!model.encode_user(text, false).unwrap().contains(&id) && model.is_silent(id), "{text}");
    }
    assert!(!model.is_silent(260));
    let mut ends = model.usual_ends();
    ends.sort_unstable();
    assert_eq!(ends, [256, 258], "one that is no special token ends nothing");
}

#[test]
fn the_chat_template_is_the_file_s() {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let model = built(&with(pieces(&[]), "tokenizer.chat_template", json!(source)));
    let nowhere = tempfile::tempdir().unwrap();
    let chat = ChatTemplate::open(nowhere.path(), &model).unwrap().unwrap();
    let message = crate::admission::params::ChatMessage { role: "user".into(), content: "a".into() };
    assert_eq!(chat.render(&[message], false).unwrap(), "<s>[user]a");
    assert!(ChatTemplate::open(nowhere.path(), &built(&pieces(&[]))).unwrap().is_none());
}

#[test]
fn what_is_wrong_is_named() {
    let says = |metadata: Map<String, Value>, words: &[&str]| {
        let said = TextModel::from_gguf(&metadata).unwrap_err().to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said}: {words:?}");
    };
    let (gpt2, llama) = (|| bytes("gpt-2", &[], &[]), || pieces(&[]));
    says(Map::new(), &["tokenizer.ggml.model is missing", "gpt2, llama"]);
    says(with(gpt2(), "model", json!("bert")), &["tokenizer.ggml.model \"bert\"", "gpt2, llama"]);
    says(with(gpt2(), "pre", json!("chameleon")), &["tokenizer.ggml.pre \"chameleon\"", "llama-bpe", "tekken"]);
    says(with(gpt2(), "pre", Value::Null), &["tokenizer.ggml.pre is missing", "qwen2"]);
    says(with(gpt2(), "merges", Value::Null), &["tokenizer.ggml.merges is missing"]);
    says(with(gpt2(), "tokens", Value::Null), &["tokenizer.ggml.tokens is missing"]);
    says(with(gpt2(), "token_type", Value::Null), &["tokenizer.ggml.token_type is missing"]);
    says(with(gpt2(), "add_space_prefix", json!(true)), &["add_space_prefix is true"]);
    says(with(llama(), "scores", Value::Null), &["tokenizer.ggml.scores is missing"]);
    says(with(llama(), "scores", json!([0.0])), &["scores has 1 elements", "tokens has 263"]);
    says(with(llama(), "token_type", json!([1, 1])), &["token_type has 2 elements", "tokens has 263"]);
    says(with(llama(), "token_type", json!([1, 9])), &["token_type[1] is 9", "1 to 6"]);
    says(with(llama(), "scores", json!([0.0, null])), &["scores[1] is null", "a number"]);
    says(with(llama(), "tokens", json!("a")), &["tokenizer.ggml.tokens is no array"]);
    says(with(llama(), "tokens", json!([])), &["token_type has 263 elements"]);
    says(with(with(llama(), "tokens", json!([])), "token_type", json!([])), &["tokens is empty"]);
    says(with(llama(), "bos_token_id", json!(263)), &["bos_token_id is 263", "263 tokens"]);
    says(with(llama(), "add_bos_token", json!(1)), &["add_bos_token is 1", "true or false"]);
    says(with(gpt2(), "add_eos_token", json!(true)), &["eos_token_id is missing"]);
    says(with(gpt2(), "tokenizer.chat_template", json!(3)), &["chat_template is no text"]);
    for merge in ["a b", "ab", "a", "", "a zz", "\u{120}"] {
        says(bytes("gpt-2", &[], &[merge]), &["merges[0]", "no pair of tokens"]);
    }
    says(bytes("gpt-2", &[("a", 1)], &[]), &["\"a\" twice", "256"]);
    says(bytes("gpt-2", &[(&"x".repeat(MAX_TOKEN_BYTES + 1), 1)], &[]), &["tokens[256] has 1025 bytes", "1024"]);
}

#[test]
fn damage_is_an_error_or_another_tokenizer_and_never_a_panic() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures/models/llama");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    writer::write(&path, &writer::tokenizer(&folder, "llama-bpe").unwrap(), &HashMap::new()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut rng = Rng(8);
    for _ in 0..300 {
        let mut damaged = whole.clone();
        for _ in 0..1 + (rng.uniform() * 4.0) as usize {
            let at = (rng.uniform() * whole.len() as f32) as usize;
            damaged[at] = (rng.uniform() * 256.0) as u8;
        }
        std::fs::write(&path, &damaged).unwrap();
        let Ok(metadata) = model::tokenizer_metadata(&path) else { continue };
        if let Ok(model) = TextModel::from_gguf(&metadata) {
            // a token that is named for what no piece is may be gone; that is said where a text needs it
            let _ = model.encode("the quick brown fox", true);
        }
    }
}
