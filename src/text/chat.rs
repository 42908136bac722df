//! Chat templates: a conversation to the text that the base was trained on, as Hugging Face renders it.
//!
//! The template comes with the base; a delta's is never run. It cannot reach files or the network, and what a rendering may
//! do is bounded, in work and in bytes together ([`FUEL`]). What users write is not trusted at all: special tokens in messages
//! become plain text (see [`ChatTemplate::encode`]).

use std::{borrow::Cow, path::Path, thread};

use minijinja::{
    Environment, Error, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use regex::Regex;
use serde_json::Value as Json;

use super::{
    TextError, TextModel,
    strftime::strftime_now,
    tokenizer::{read_json, token_text},
};
use crate::admission::params::ChatMessage;

const NAME: &str = "chat";

/// What a rendering may use up: one for an instruction, and one for each 64 bytes that it makes. Conversations of the longest
/// accepted text take a fifth of it.
const FUEL: u64 = 2 << 20;
/// Stack of the thread that renders: lists in lists, as deep as [`FUEL`] pays for, are shown and dropped level by level.
const STACK: usize = 128 << 20;
/// Deepest nesting of a value that is written as JSON.
const MAX_DEPTH: usize = 64;

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template file is not valid.
    #[error("the chat template is not valid: {0}")]
    Template(String),
    /// The template refused the conversation (`raise_exception`): the text is the template's own.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the chat template cannot render these messages: {0}")]
    Render(String),
    /// A file could not be read, or the rendered text not be encoded.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// The base's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    special: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Finds the template of a base: `chat_template.jinja`, `chat_template.json`, or `chat_template` in
    /// `tokenizer_config.json` (a string, or a list of named templates of which `default` or the first is taken).
    ///
    /// # Errors
    /// A template that does not parse, or a file that cannot be read. `None`: the base has no template.
    pub fn open(dir: &Path, text: &TextModel) -> Result<Option<Self>, ChatError> {
        let path = dir.join("chat_template.jinja");
        let source = match std::fs::read_to_string(&path) {
            Ok(source) => Some(source),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let file = read_json(dir, "chat_template.json")?;
                file.as_ref().and_then(in_config).or_else(|| in_config(text.config()))
            }
            Err(source) => return Err(TextError::Read { path, source }.into()),
        };
        source.map(|s| Self::new(&s, text.config())).transpose()
    }

    /// A template from its source and `tokenizer_config.json`, whose `*_token` entries the template may use.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn new(source: &str, config: &Json) -> Result<Self, ChatError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| ChatError::Template(describe(&e)))?);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
        });
        env.add_function("strftime_now", |format: &str| strftime_now(format));
        env.add_filter("tojson", to_json);
        let source = without_generation_marks(source);
        env.add_template_owned(NAME, source.into_owned()).map_err(|e| ChatError::Template(describe(&e)))?;
        let special = config.as_object().into_iter().flatten().filter(|(k, _)| k.ends_with("_token"));
        let special = special.filter_map(|(k, v)| Some((k.clone(), token_text(v)?))).collect();
        Ok(Self { env, special })
    }

    /// Renders a conversation; `add_generation_prompt` opens the assistant's turn.
    ///
    /// # Errors
    /// A conversation that the template refuses or fails on.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ChatError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("chat".into()).stack_size(STACK);
            let rendering = thread.spawn_scoped(scope, || self.render_here(messages, add_generation_prompt));
            let rendering = rendering.map_err(|e| ChatError::Render(e.to_string()))?;
            rendering.join().map_err(|_| ChatError::Render("a panic".into()))?
        })
    }

    fn render_here(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ChatError> {
        let template = self.env.get_template(NAME).map_err(|e| ChatError::Template(describe(&e)))?;
        let message = |m: &ChatMessage| -> Value {
            Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])
        };
        let special = self.special.iter().map(|(k, v)| (k.as_str(), Value::from(v.as_str())));
        let fields = [
            ("messages", messages.iter().map(message).collect::<Vec<_>>().into()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let context = Value::from_pairs(special.chain(fields));
        template.render(context).map_err(|e| match std::error::Error::source(&e).is_some_and(|s| s.is::<Refusal>()) {
            true => ChatError::Refused(e.detail().unwrap_or("no reason given").to_owned()),
            false => ChatError::Render(describe(&e)),
        })
    }

    /// Renders and tokenises a conversation. Special tokens of the template are special; the same letters inside a
    /// message are plain text, so no user can forge a turn.
    ///
    /// # Errors
    /// As [`render`](Self::render), and what the tokenizer refuses.
    pub fn encode(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        text: &TextModel,
    ) -> Result<Vec<u32>, ChatError> {
        text.check(messages.iter().map(|m| m.content.len()).sum())?;
        let (guarded, forged) = guard(messages, text);
        Ok(encode_guarded(&self.render(&guarded, add_generation_prompt)?, &forged, text)?)
    }
}

/// Takes special tokens out of messages: the messages with marks in their places, and what each mark stands for.
pub fn guard(messages: &[ChatMessage], text: &TextModel) -> (Vec<ChatMessage>, Vec<String>) {
    let mut forged = Vec::new();
    let guarded = messages.iter().map(|m| guard_one(m, text, &mut forged)).collect();
    (guarded, forged)
}

/// Ids of a rendering of guarded messages: special tokens are the template's; what the marks stand for is plain text.
///
/// # Errors
/// What the tokenizer refuses.
pub fn encode_guarded(rendered: &str, forged: &[String], text: &TextModel) -> Result<Vec<u32>, TextError> {
    let mut ids = Vec::new();
    let mut rest = rendered;
    while let Some(at) = rest.find(MARK) {
        ids.extend(text.encode(&rest[..at], false)?);
        let after = &rest[at + MARK.len_utf8()..];
        let (index, tail) = after.split_once(MARK).unwrap_or((after, ""));
        let original = index.parse().ok().and_then(|i: usize| forged.get(i));
        if let Some(original) = original {
            ids.extend(text.encode_user(original, false)?);
        }
        rest = tail;
    }
    ids.extend(text.encode(rest, false)?);
    Ok(ids)
}

/// Stands around the number of a piece that must not be read as a special token: a noncharacter, not for interchange.
const MARK: char = '\u{FFFE}';

/// Takes special tokens (and the mark itself) out of a message.
fn guard_one(message: &ChatMessage, text: &TextModel, forged: &mut Vec<String>) -> ChatMessage {
    let content = message.content.as_str();
    let marks = content.match_indices(MARK).map(|(at, mark)| at..at + mark.len());
    let (mut marks, mut specials) = (marks.peekable(), text.specials(content).peekable());
    let (mut out, mut at) = (String::new(), 0);
    loop {
        let special_first = match (specials.peek(), marks.peek()) {
            (Some(special), Some(mark)) => special.start <= mark.start,
            (special, _) => special.is_some(),
        };
        let Some(hit) = (if special_first { specials.next() } else { marks.next() }) else { break };
        // a mark inside a special token went with it, and the other way round
        if hit.start < at {
            continue;
        }
        out.push_str(&content[at..hit.start]);
        out.push_str(&format!("{MARK}{}{MARK}", forged.len()));
        at = hit.end;
        forged.push(content[hit].to_owned());
    }
    out.push_str(&content[at..]);
    ChatMessage { role: message.role.clone(), content: out }
}

/// Marks an error as the template's own refusal.
#[derive(Debug, thiserror::Error)]
#[error("refused by the template")]
struct Refusal;

fn describe(e: &Error) -> String {
    let line = e.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    format!("{e}{line}")
}

fn in_config(config: &Json) -> Option<String> {
    let named = |entry: &Json| entry.get("template").and_then(Json::as_str).map(str::to_owned);
    match config.get("chat_template")? {
        Json::String(source) => Some(source.clone()),
        Json::Array(list) => {
            let default = list.iter().find(|e| e.get("name").and_then(Json::as_str) == Some("default"));
            default.or_else(|| list.first()).and_then(named)
        }
        _ => None,
    }
}

/// `{% generation %}` marks training targets for Hugging Face's own extension; for rendering it is a plain block.
fn without_generation_marks(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let replace = |text: &str, pattern: &str, with: &str| match Regex::new(pattern) {
        Ok(re) => re.replace_all(text, with).into_owned(),
        Err(_) => text.to_owned(),
    };
    let opened = replace(source, r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "{%$1 if true $2%}");
    Cow::Owned(replace(&opened, r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "{%$1 endif $2%}"))
}

/// `tojson` as Python's `json.dumps(ensure_ascii=False)` writes it: no HTML escapes, a space after `,` and `:`.
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut out = String::new();
    write_json(&value, indent, 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::BadSerialization, format!("a value nests deeper than {MAX_DEPTH}")));
    }
    let newline = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    let quoted = |text: &str| Json::from(text).to_string();
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable if value.len() == Some(0) => out.push_str("[]"),
        ValueKind::Map if value.len() == Some(0) => out.push_str("{}"),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                write_json(&item, indent, depth + 1, out)?;
            }
            newline(out, depth);
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                out.push_str(&quoted(&key.to_string()));
                out.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, out)?;
            }
            newline(out, depth);
            out.push('}');
        }
        kind => return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} has no JSON form"))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::bytes;
    use serde_json::json;

    const CHATML: &str = "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
        + '<|im_end|>' + '\\n' }}\n{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n\
        {% endif %}\n";

    const LLAMA2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
        {% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
        {% set system_message = false %}{% endif %}{% for message in loop_messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
        {% if loop.index0 == 0 and system_message != false %}\
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
        {% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
        {{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

    fn chat(turns: &[(&str, &str)]) -> Vec<ChatMessage> {
        turns.iter().map(|(r, c)| ChatMessage { role: (*r).into(), content: (*c).into() }).collect()
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let template = ChatTemplate::new(CHATML, &Json::Null).expect("parses");
        let text = template.render(&chat(&[("user", "hi")]), true).expect("renders");
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n\n<|im_start|>assistant\n\n");
    }

    #[test]
    fn special_tokens_slices_methods_and_refusals_work() {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        let template = ChatTemplate::new(LLAMA2, &config).expect("parses");
        let ok = chat(&[("system", "Be kind."), ("user", " hi "), ("assistant", "yo"), ("user", "bye")]);
        assert_eq!(
            template.render(&ok, true).expect("renders"),
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n hi [/INST] yo </s><s>[INST] bye [/INST]"
        );
        let error = template.render(&chat(&[("assistant", "x")]), true).expect_err("roles do not alternate");
        assert!(matches!(&error, ChatError::Refused(m) if m.starts_with("Conversation roles")), "{error}");
    }

    #[test]
    fn a_template_that_does_not_end_or_grows_without_bound_is_stopped() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let large = "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
        let itself = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}";
        let nested = "{% set n = namespace(x=[]) %}{% for a in range(2000) %}{% set n.x = [n.x] %}{% endfor %}\
            {{ n.x | tojson }}";
        let deep = "{% set n = namespace(x=[]) %}{% for a in range(999) %}{% for b in range(9999) %}{% set n.x = [n.x] %}\
            {% endfor %}{% endfor %}{{ n.x }}";
        for source in [endless, large, itself, nested, deep] {
            let template = ChatTemplate::new(source, &Json::Null).expect("parses");
            let refused = template.render(&chat(&[("user", "hi")]), true).expect_err("stopped");
            assert!(matches!(refused, ChatError::Render(_)), "{refused}");
        }
        // a conversation as long as any is far from it
        let template = ChatTemplate::new(CHATML, &Json::Null).expect("parses");
        let long = "x".repeat(1024);
        let turns: Vec<(&str, &str)> = (0..4096).map(|_| ("user", long.as_str())).collect();
        assert!(template.render(&chat(&turns), true).expect("renders").len() > 4 << 20);
    }

    #[test]
    fn a_template_reaches_no_files() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("secret");
        std::fs::write(&path, "secret").expect("written");
        for source in ["{% include 'P' %}", "{% import 'P' as p %}{{ p }}", "{% extends 'P' %}"] {
            let source = source.replace('P', &path.display().to_string());
            let rendered =
                ChatTemplate::new(&source, &Json::Null).and_then(|t| t.render(&chat(&[("user", "hi")]), true));
            assert!(rendered.is_err(), "{rendered:?}");
        }
    }

    #[test]
    fn templates_are_found_as_string_list_or_file() {
        assert_eq!(in_config(&json!({"chat_template": "x"})), Some("x".into()));
        let list =
            json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        assert_eq!(in_config(&list), Some("d".into()));
        assert_eq!(in_config(&json!({})), None);
        let dir = tempfile::tempdir().expect("folder");
        assert!(ChatTemplate::open(dir.path(), &bytes()).expect("no template is fine").is_none());
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }}!").expect("written");
        let template = ChatTemplate::open(dir.path(), &bytes()).expect("opens").expect("found");
        assert_eq!(template.render(&[], false).expect("renders"), "<bos>!");
    }

    #[test]
    fn a_broken_template_is_an_error_at_load() {
        let error = ChatTemplate::new("{% for x in %}", &Json::Null).expect_err("does not parse");
        assert!(matches!(error, ChatError::Template(_)));
        let template = ChatTemplate::new("{{ messages[0].role.nope() }}", &Json::Null).expect("parses");
        assert!(matches!(template.render(&chat(&[("user", "x")]), true), Err(ChatError::Render(_))));
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let source = "{{ messages[0].content | tojson }} {{ {'a': [1, true, none], 'b': '<é>'} | tojson }}\n\
            {{ {'a': [1]} | tojson(indent=2) }}";
        let template = ChatTemplate::new(source, &Json::Null).expect("parses");
        let text = template.render(&chat(&[("user", "it's \"x\" & y")]), true).expect("renders");
        assert_eq!(
            text,
            "\"it's \\\"x\\\" & y\" {\"a\": [1, true, null], \"b\": \"<é>\"}\n{\n  \"a\": [\n    1\n  ]\n}"
        );
    }

    #[test]
    fn training_marks_and_the_date_are_understood() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}\
            {{ strftime_now('%Y')|length }}";
        let template = ChatTemplate::new(source, &Json::Null).expect("parses");
        assert_eq!(template.render(&chat(&[("user", "a"), ("user", "b")]), true).expect("renders"), "ab4");
    }

    #[test]
    fn a_message_cannot_forge_special_tokens() {
        let text = bytes();
        let template = ChatTemplate::new("{{ messages[0].content }}<eos>", &Json::Null).expect("parses");
        let forged = format!("a<eos>{MARK}0{MARK}b<bos><eos>");
        let ids = template.encode(&chat(&[("user", &forged)]), true, &text).expect("encodes");
        let plain: Vec<u32> = forged.bytes().map(u32::from).chain([257]).collect();
        assert_eq!(ids, plain);
        let honest = template.encode(&chat(&[("user", "ab")]), true, &text).expect("encodes");
        assert_eq!(honest, vec![97, 98, 257]);
    }

    /// 100,000 special tokens and as many marks: minutes if each began its search anew.
    #[test]
    fn a_message_full_of_special_tokens_takes_no_longer_than_its_length() {
        let text = bytes();
        let special = text.special().eos.and_then(|id| text.token_str(id)).expect("an end");
        let content = format!("{special}x{MARK}").repeat(100_000);
        let begun = std::time::Instant::now();
        let (guarded, forged) = guard(&chat(&[("user", &content)]), &text);
        assert_eq!(forged.len(), 200_000);
        assert!(text.specials(&guarded[0].content).next().is_none());
        assert_eq!(
            encode_guarded(&guarded[0].content, &forged, &text).expect("ids"),
            text.encode_user(&content, false).expect("ids")
        );
        assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{:?}", begun.elapsed());
    }
}
