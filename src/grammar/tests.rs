//! Outputs of models that like anything keep to the constraint, and what keeps to it can be said.

use std::{path::Path, sync::LazyLock, time::Instant};

use regex::Regex;
use serde_json::{Value, json};

use super::*;
use crate::{
    engine::{Ending, TokenSet},
    model::testing::Rng,
    text::{
        DecodeStream,
        testing::{bytes, shared},
    },
};

fn bundled() -> Arc<TextModel> {
    static MODEL: LazyLock<Arc<TextModel>> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/base/tiny-stories");
        Arc::new(TextModel::open(&folder).expect("the bundled tokenizer"))
    });
    Arc::clone(&MODEL)
}

fn of(model: &Arc<TextModel>) -> Grammars {
    Grammars::new(Arc::clone(model), model.special().eos.into_iter().collect(), 256 << 20)
}

/// Those of the bundled base.
pub(super) fn grammars() -> Grammars {
    of(&bundled())
}

/// Models with tokenizers of all kinds whose vocabularies can write JSON.
fn models() -> Vec<Talker> {
    let mut all = vec![Talker::new("bundled", bundled()), Talker::new("bytes", Arc::new(bytes()))];
    for name in ["stories260k-llama", "tokenizers/gpt2", "tokenizers/llama2-32k"] {
        all.extend(shared(name).map(|model| Talker::new(name, model)));
    }
    all
}

fn schema(schema: &Value) -> ConstraintParams {
    ConstraintParams::JsonSchema(schema.to_string())
}

fn regex(text: &str) -> ConstraintParams {
    ConstraintParams::Regex(text.into())
}

fn lark(text: &str) -> ConstraintParams {
    ConstraintParams::Lark(text.into())
}

/// A model with random logits. Closing characters are a little likelier, as in any model that is of use.
struct Talker {
    name: &'static str,
    model: Arc<TextModel>,
    /// By id: whether its text closes something.
    closes: Vec<bool>,
}

impl Talker {
    fn new(name: &'static str, model: Arc<TextModel>) -> Self {
        let closes = |id: u32| model.token_text(id).contains(['"', '}', ']', ',']);
        let closes = (0..model.vocab_size() as u32).map(closes).collect();
        Self { name, model, closes }
    }

    /// What it says after a prompt, and whether it came to an end within `most` tokens.
    fn say(&self, grammar: &Grammar, prompt: &[u32], seed: u64, most: usize) -> (String, bool) {
        let mut decode = DecodeStream::after(Arc::clone(&self.model), prompt).expect("decodes");
        let mut constraint = grammar.start(decode.is_fresh());
        let (mut rng, mut out, mut allowed) = (Rng(seed * 7 + 1), String::new(), TokenSet::default());
        let mut ended = false;
        for _ in 0..most {
            allowed.assign([]);
            let ending = constraint.allowed(&mut allowed).expect("it goes on");
            ended = ending == Ending::Must || (ending == Ending::May && rng.uniform() < 0.3);
            if ended {
                break;
            }
            let ids: Vec<u32> = allowed.iter().collect();
            let closing: Vec<u32> = ids.iter().copied().filter(|id| self.closes[*id as usize]).collect();
            let from = if !closing.is_empty() && rng.uniform() < 0.4 { &closing } else { &ids };
            let id = from[((rng.uniform() * from.len() as f32) as usize).min(from.len() - 1)];
            assert!(!self.model.is_silent(id), "{}: special tokens and no tokens are never allowed", self.name);
            out.extend(decode.push(id).expect("decodes"));
            ended = constraint.accept(id).expect("it was allowed");
            if ended {
                break;
            }
        }
        out.extend(decode.finish().expect("decodes"));
        (out, ended)
    }
}

/// A value, unless a number in it is too large for its parser.
fn parsed(name: &str, text: &str) -> Option<Value> {
    match serde_json::from_str(text) {
        Err(e) if e.to_string().contains("out of range") => None,
        value => Some(value.unwrap_or_else(|e| panic!("{name}: {e} in {text:?}"))),
    }
}

/// Whether a value is valid, by the keywords that these tests use.
fn is_valid(root: &Value, schema: &Value, value: &Value) -> bool {
    let number = |name: &str| schema[name].as_f64();
    if let Some(name) = schema["$ref"].as_str() {
        return is_valid(root, root.pointer(&name[1..]).expect("defined"), value);
    }
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| is_valid(root, option, value));
    }
    if let Some(all) = schema["enum"].as_array() {
        return all.contains(value);
    }
    if !schema["const"].is_null() {
        return schema["const"] == *value;
    }
    match schema["type"].as_str() {
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some(kind @ ("integer" | "number")) => value.as_f64().is_some_and(|x| {
            let whole = kind == "number" || x.fract() == 0.0;
            whole && number("minimum").is_none_or(|low| x >= low) && number("maximum").is_none_or(|high| x <= high)
        }),
        Some("string") => value.as_str().is_some_and(|s| {
            let chars = s.chars().count() as f64;
            let pattern = schema["pattern"].as_str().is_none_or(|p| Regex::new(p).expect("a pattern").is_match(s));
            let short = number("maxLength").is_none_or(|most| chars <= most);
            pattern && short && number("minLength").is_none_or(|least| chars >= least)
        }),
        Some("array") => value.as_array().is_some_and(|all| {
            let count = all.len() as f64;
            let few = number("maxItems").is_none_or(|most| count <= most);
            let items = all.iter().all(|item| schema["items"].is_null() || is_valid(root, &schema["items"], item));
            few && items && number("minItems").is_none_or(|least| count >= least)
        }),
        Some("object") => value.as_object().is_some_and(|object| {
            let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let there = required.into_iter().all(|name| object.contains_key(name));
            let known = &schema["properties"];
            let fits = object.iter().all(|(name, value)| match &known[name] {
                Value::Null => schema["additionalProperties"] != false,
                property => is_valid(root, property, value),
            });
            there && fits
        }),
        other => panic!("a keyword is missing here: {other:?}"),
    }
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer",
            "minimum": 0, "maximum": 130}, "happy": {"type": "boolean"}}, "required": ["name", "age"],
            "additionalProperties": false}),
        json!({"type": "array", "items": {"enum": ["red", "green", 3, null]}, "minItems": 1, "maxItems": 4}),
        json!({"type": "object", "properties": {"kind": {"const": "leaf"}, "value": {"type": "number", "minimum": -1.5,
            "maximum": 2.25}, "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}},
            "required": ["kind", "value", "code"], "additionalProperties": false}),
        json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"name": {"type": "string",
            "minLength": 1, "maxLength": 3}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["name", "next"], "additionalProperties": false}}}),
    ]
}

#[test]
fn whatever_the_model_says_is_valid_json() {
    for talker in models() {
        let (name, grammars) = (talker.name, of(&talker.model));
        let prompt = talker.model.encode_user("Write JSON: a", true).expect("encodes");
        for wanted in schemas() {
            let grammar = grammars.compile(&schema(&wanted)).expect("compiles");
            let mut whole = 0;
            for seed in 0..8 {
                let before: &[u32] = if seed % 2 == 0 { &prompt } else { &[] };
                let (text, ended) = talker.say(&grammar, before, seed, 600);
                let Some(value) = ended.then(|| parsed(name, &text)).flatten() else { continue };
                whole += 1;
                assert!(is_valid(&wanted, &wanted, &value), "{name}: {text} is not {wanted}");
                assert!(!text.starts_with(char::is_whitespace) && !text.ends_with(char::is_whitespace), "{text:?}");
            }
            // numbers may have any number of digits, the rest is bounded
            assert!(whole >= 4, "{name}: {whole} outputs of {wanted} came to an end");
        }
    }
}

#[test]
fn any_object_is_an_object() {
    for talker in models() {
        let grammar = of(&talker.model).compile(&ConstraintParams::JsonObject).expect("compiles");
        let said = (0..10).map(|seed| talker.say(&grammar, &[], seed, 800));
        let whole: Vec<String> = said.filter(|(_, ended)| *ended).map(|(text, _)| text).collect();
        assert!(whole.len() >= 3, "{}: {}", talker.name, whole.len());
        assert!(whole.iter().filter_map(|text| parsed(talker.name, text)).all(|value| value.is_object()), "{whole:?}");
    }
}

#[test]
fn texts_match_the_expression_as_a_whole() {
    let patterns = [
        r"[a-z]{3}-[0-9]{2}",
        r"(yes|no|maybe)( [a-z]{1,4}){0,3}",
        r"/(a|b\.c){2,4}/\d{4}",
        r" {1,2}x[^a-z\n]{0,5}y",
        "é{2}€\n\u{4e2d}",
        r"(?i)once upon",
    ];
    for talker in models() {
        let (grammars, prompt) = (of(&talker.model), talker.model.encode_user("so a", true).expect("encodes"));
        for pattern in patterns {
            let grammar = grammars.compile(&regex(pattern)).expect("compiles");
            let whole = Regex::new(&format!("^(?:{pattern})$")).expect("a pattern");
            for seed in 0..10 {
                let before: &[u32] = if seed % 2 == 0 { &prompt } else { &[] };
                let (text, ended) = talker.say(&grammar, before, seed, 200);
                assert!(ended && whole.is_match(&text), "{}: {text:?} is not {pattern}", talker.name);
            }
        }
    }
}

#[test]
fn a_choice_is_one_of_the_texts_and_each_can_be_it() {
    let texts = ["yes", "no", "yes, \"indeed\"\n", "\\n", "été", " no"].map(str::to_owned);
    for talker in models() {
        let grammar = of(&talker.model).compile(&ConstraintParams::Choice(texts.to_vec())).expect("compiles");
        let said: std::collections::BTreeSet<String> = (0..400)
            .map(|seed| {
                let (text, ended) = talker.say(&grammar, &[], seed, 100);
                assert!(ended && texts.contains(&text), "{}: {text:?}", talker.name);
                text
            })
            .collect();
        assert_eq!(said.len(), texts.len(), "{}: {said:?}", talker.name);
    }
}

#[test]
fn texts_of_a_grammar_are_in_its_language() {
    let sum = "start: sum\nsum: part (\"+\" part){0,3}\npart: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]{1,3}/";
    let grammar = grammars().compile(&lark(sum)).expect("compiles");
    let talker = Talker::new("bundled", bundled());
    let mut whole = 0;
    for seed in 0..30 {
        let (text, ended) = talker.say(&grammar, &[], seed, 300);
        let depth = text.chars().try_fold(0i32, |depth, c| match (c, depth) {
            (')', 0) => None,
            (')', depth) => Some(depth - 1),
            ('(', depth) => Some(depth + 1),
            (_, depth) => Some(depth),
        });
        whole += usize::from(ended);
        assert!(depth.is_some_and(|depth| depth == 0 || !ended), "{text}");
        assert!(text.chars().all(|c| "0123456789+()".contains(c)), "{text}");
    }
    assert!(whole > 10, "{whole}");
}

/// What the tokenizer itself would write has to be possible, not only what is allowed has to be right.
#[test]
fn a_valid_text_can_be_said_in_the_tokenizers_own_tokens() {
    let person = schema(&schemas()[0]);
    let cases = [
        (&person, "{\"name\": \"Ann\", \"age\": 31}"),
        (&person, "{\"name\":\"Zoë\",\"age\":0,\"happy\":true}"),
        (&person, "{\n  \"name\": \"\",\n  \"age\": 7\n}"),
        (&ConstraintParams::JsonObject, "{\"a\": [1, -2.5e3, {\"b\": null}], \"a b\": \"x\\ny \u{1F600}\"}"),
        (&regex("[a-z]+( [a-z]+)*\\."), "once upon a time there was a dog."),
    ];
    for Talker { name, model, .. } in models() {
        let grammars = of(&model);
        for (constraint, text) in &cases {
            let grammar = grammars.compile(constraint).expect("compiles");
            let mut rule = grammar.start(true);
            let mut allowed = TokenSet::default();
            for id in model.encode_user(text, false).expect("encodes") {
                allowed.assign([]);
                let ending = rule.allowed(&mut allowed).expect("it goes on");
                assert!(ending != Ending::Must && allowed.contains(id), "{name}: {:?} in {text}", model.token_text(id));
                rule.accept(id).expect("it was allowed");
            }
            allowed.assign([]);
            assert_ne!(rule.allowed(&mut allowed).expect("a state"), Ending::No, "{name}: {text}");
        }
    }
}

#[test]
fn an_encoder_decoders_vocabulary_is_no_exception() {
    let Some(model) = shared("tokenizers/t5-legal-32k") else { return };
    let grammar = of(&model).compile(&regex("(the|a) [a-z]{2,8}")).expect("compiles");
    let whole = Regex::new("^(the|a) [a-z]{2,8}$").expect("a pattern");
    let talker = Talker::new("t5", Arc::clone(&model));
    for seed in 0..30 {
        let (text, ended) = talker.say(&grammar, &[], seed, 100);
        assert!(ended && whole.is_match(&text), "{text:?}");
    }
    let mut rule = grammar.start(true);
    for id in model.encode_user("the court", false).expect("encodes") {
        let mut allowed = TokenSet::default();
        rule.allowed(&mut allowed).expect("it goes on");
        assert!(allowed.contains(id), "{:?}", model.token_text(id));
        rule.accept(id).expect("it was allowed");
    }
}

#[test]
fn white_space_comes_to_an_end() {
    let model = bundled();
    let grammar = grammars().compile(&schema(&json!({"const": {"a": 1}}))).expect("compiles");
    let mut rule = grammar.start(true);
    let mut said = String::new();
    for _ in 0..400 {
        let mut allowed = TokenSet::default();
        if rule.allowed(&mut allowed).expect("it goes on") == Ending::Must {
            break;
        }
        // white space wherever it may be
        let ids: Vec<u32> = allowed.iter().collect();
        let blank = ids.iter().find(|id| model.token_text(**id).trim().is_empty());
        let id = *blank.unwrap_or(&ids[0]);
        said += &model.token_text(id);
        if rule.accept(id).expect("it was allowed") {
            break;
        }
    }
    assert_eq!(serde_json::from_str::<Value>(&said).expect("JSON"), json!({"a": 1}), "{said:?}");
}

#[test]
fn copies_know_nothing_of_each_other_and_what_was_compiled_is_kept() {
    let grammars = grammars();
    let constraint = ConstraintParams::Choice(vec!["abc".into(), "xyz".into()]);
    assert!(grammars.kept(&constraint).is_none());
    let grammar = grammars.compile(&constraint).expect("compiles");
    assert!(Arc::ptr_eq(&grammar, &grammars.compile(&constraint).expect("kept")));
    assert!(Arc::ptr_eq(&grammar, &grammars.kept(&constraint).expect("kept")));
    let (mut first, mut second) = (grammar.start(false), grammar.start(false));
    let id = |text: &str| bundled().encode_user(text, false).expect("encodes")[0];
    first.accept(id("x")).expect("allowed");
    let mut allowed = TokenSet::default();
    second.allowed(&mut allowed).expect("it goes on");
    assert!(allowed.contains(id("a")) && allowed.contains(id("x")));
    allowed.assign([]);
    first.allowed(&mut allowed).expect("it goes on");
    assert!(!allowed.contains(id("a")) && !allowed.contains(id("x")));
    assert!(first.accept(id("a")).is_err(), "it was not allowed");
}

#[test]
fn what_is_wrong_is_said_of_its_field() {
    let grammars = grammars();
    let cases = [
        (schema(&json!({"not": {}})), "not supported"),
        (schema(&json!({"type": "text"})), "Invalid type: text"),
        (schema(&json!({"type": "string", "format": "shoe-size"})), "shoe-size"),
        (schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})), "Unsatisfiable"),
        (schema(&json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})), "anyOf may do"),
        (schema(&json!({"$ref": "#/$defs/none"})), "not found"),
        (schema(&json!({"$ref": "https://example.com/schema"})), "https://example.com/schema"),
        (
            schema(&json!({"minimum": format!("{}é{}", "a".repeat(98), "b".repeat(50))})),
            "more than the grammar library",
        ),
        (regex("a[b"), "unclosed character class"),
        (regex("a(?=b)b"), "look-around"),
        (regex(r"(a)\1"), "backreferences"),
        (regex("a\\"), "backslash"),
        (regex(""), "empty"),
        (regex(r"[^\s\S]"), "no token"),
        (lark("start: other"), "other"),
        (lark("begin: \"a\""), "start"),
        (lark("start: \"a"), "lexer error"),
        (lark("start: <|eos|>"), "special token"),
        (lark("start[temperature=0.5]: \"a\""), "temperature"),
        (lark(&format!("start: {}\"a\"{}", "(".repeat(900), ")".repeat(900))), "nested"),
    ];
    for (constraint, part) in cases {
        match grammars.compile(&constraint).map(|_| ()) {
            Err(GrammarError::Refused(problems)) => {
                assert_eq!(problems[0].field, constraint.field());
                let message = &problems[0].message;
                assert!(message.contains(part), "{part}: {message}");
                assert!(message.len() <= 4 * MESSAGE && !message.contains("backtrace"), "{message}");
            }
            other => panic!("{constraint:?}: {other:?}"),
        }
    }
    assert!(grammars.compile(&regex("ab?")).is_ok(), "it still works");
}

/// Compiled grammars take room for as long as anybody has them; those that are only kept make room.
#[test]
fn compiled_grammars_take_no_more_room_than_there_is() {
    let compile = |grammars: &Grammars, text: &str| grammars.compile(&regex(text));
    let one = compile(&grammars(), "[a-z]{4}1").expect("compiles").bytes();
    assert!(one > 64 << 10 && one < 4 << 20, "{one}");
    let eos = || bundled().special().eos.into_iter().collect();
    let small = Grammars::new(bundled(), eos(), one / 2);
    assert!(matches!(compile(&small, "[a-z]{4}1"), Err(GrammarError::TooLarge { bytes, .. }) if bytes == one));
    let grammars = Grammars::new(bundled(), eos(), one * 5 / 2);
    let (first, second) = (compile(&grammars, "[a-z]{4}1"), compile(&grammars, "[a-z]{4}2"));
    let (first, second) = (first.expect("compiles"), second.expect("compiles"));
    assert!(matches!(compile(&grammars, "[a-z]{4}3"), Err(GrammarError::NoRoom { .. })));
    // a request that waits holds it, one whose output has begun does not
    let waits = first.outputs(true);
    assert!(matches!(compile(&grammars, "[a-z]{4}3"), Err(GrammarError::NoRoom { .. })));
    assert!(waits.bytes() <= one && waits.begin().bytes() >= waits.bytes());
    drop(waits);
    assert!(compile(&grammars, "[a-z]{4}3").is_ok(), "the first one was only kept");
    assert!(grammars.kept(&regex("[a-z]{4}1")).is_none());
    assert!(grammars.kept(&regex("[a-z]{4}2")).is_some_and(|kept| Arc::ptr_eq(&kept, &second)));
}

#[test]
fn a_state_says_what_it_has_come_to() {
    let grammar = grammars().compile(&regex("(a|b)*a(a|b){8}c")).expect("compiles");
    let mut rule = grammar.start(true);
    let before = rule.bytes();
    let id = |text: &str| bundled().encode_user(text, false).expect("encodes")[0];
    for i in 0..60u32 {
        let mut allowed = TokenSet::default();
        rule.allowed(&mut allowed).expect("it goes on");
        // every such text is another state of the automaton
        rule.accept(id(if i.count_ones() % 2 == 0 { "a" } else { "b" })).expect("it was allowed");
    }
    assert!(rule.bytes() > before, "{before} {}", rule.bytes());
    let fresh = grammar.start(true).bytes();
    assert_eq!(fresh, before, "what one output comes to is its own");
}

/// None of these may take long, much memory, or the process with it; this thread's stack is small.
#[test]
fn hostile_constraints_are_bounded() {
    let chain = |n: usize| {
        let defs: Vec<String> =
            (0..n).map(|i| format!(r##""a{i}":{{"items":{{"$ref":"#/$defs/a{}"}}}}"##, i + 1)).collect();
        format!(r##"{{"$ref":"#/$defs/a0","$defs":{{{},"a{n}":{{"type":"integer"}}}}}}"##, defs.join(","))
    };
    let many = |n: usize, each: &dyn Fn(usize) -> String| (0..n).map(each).collect::<Vec<_>>().join(",");
    let bounds = many(150, &|i| format!(r#"{{"minLength":{i}}}"#));
    let text = "x".repeat(4000);
    let cases = [
        ConstraintParams::JsonSchema(chain(1400)),
        ConstraintParams::JsonSchema(format!(
            r#"{{"const":"{text}","allOf":[{{"anyOf":[{bounds}]}},{{"anyOf":[{bounds}]}}]}}"#
        )),
        schema(&json!({"type": "integer", "multipleOf": 982_451_653})),
        schema(&json!({"type": "string", "pattern": "(a|aa)*b.{0,500}c(x+x+)+y"})),
        regex(&"a?".repeat(2000)),
        regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
        regex(&format!("{}a{}", "(".repeat(2000), ")".repeat(2000))),
        lark("start: s\ns: s s s | s s | \"a\" | \"\""),
        lark("start: ((((\"a\"{1,1000}){1,1000}){1,1000}){1,1000})"),
        lark(&format!("start: T\nT: {}", "\"a\"? ".repeat(3000))),
    ];
    let grammars = grammars();
    let id = bundled().encode_user("a", false).expect("encodes")[0];
    for (i, constraint) in cases.iter().enumerate() {
        let began = Instant::now();
        if let Ok(grammar) = grammars.compile(constraint) {
            let mut rule = grammar.start(true);
            // as far as it goes; an error is an answer
            for _ in 0..60 {
                let mut allowed = TokenSet::default();
                if rule.allowed(&mut allowed).is_err() || rule.accept(id).is_err() {
                    break;
                }
            }
        }
        assert!(began.elapsed().as_secs() < 20, "case {i} took {:?}", began.elapsed());
    }
}

#[test]
fn messages_are_cut_where_the_library_talks_to_its_developers() {
    assert_eq!(clean("too large\n<state>\nTokens: 1"), "too large");
    assert_eq!(clean("NoExtensionBias\n<non-verbose/>"), DEAD_END);
    assert!(!clean("panic: at src/x.rs\n<backtrace>\n0: main").contains("src"));
    let long = clean(&"é".repeat(5000));
    assert!(long.ends_with(" ...") && long.chars().count() == MESSAGE + 4);
}
