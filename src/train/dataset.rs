//! Training examples: JSON lines in, typed examples out, with every problem of every line.
//!
//! It knows the formats and their fields. It never tokenises (`encode`) and never judges across lines (`validate`).

mod answers;
mod turns;

use serde_json::{Map, Value};

use crate::{
    admission::params::ChatMessage,
    train::issue::{Code, Report},
};

/// What the lines of a file look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `{"text"}`: continue any text; every token carries loss.
    Text,
    /// `{"prompt", "completion"}`: loss on the completion.
    PromptCompletion,
    /// `{"messages": [{"role", "content"}]}`: loss on the assistant's turns.
    Messages,
    /// `{"text", "label"}`: sequence classification.
    TextLabel,
    /// `{"text", "labels": [..]}`: any number of labels per text.
    TextLabels,
    /// `{"tokens": [..], "labels": [..]}`: one label per word.
    TokenLabels,
    /// `{"prompt", "chosen", "rejected"}`: which of two answers is better.
    Pairs,
    /// `{"prompt", "completion", "label": true | false}`: whether an answer is good.
    Rated,
}

impl Format {
    /// The name in stored records and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::PromptCompletion => "prompt_completion",
            Self::Messages => "messages",
            Self::TextLabel => "label",
            Self::TextLabels => "labels",
            Self::TokenLabels => "tags",
            Self::Pairs => "pairs",
            Self::Rated => "rated",
        }
    }

    /// The format with these fields, the most specific first; `first` is that of the lines before.
    fn detect(object: &Map<String, Value>, first: Option<Self>) -> Option<Self> {
        let has = |field: &str| object.contains_key(field);
        // a label that is no boolean may be any remark on an example, unless the other lines are rated
        let rated = first == Some(Self::Rated) || object.get("label").is_some_and(Value::is_boolean);
        if has("messages") {
            Some(Self::Messages)
        } else if has("chosen") || has("rejected") {
            Some(Self::Pairs)
        } else if rated && (has("prompt") || has("completion")) {
            Some(Self::Rated)
        } else if has("prompt") || has("completion") {
            Some(Self::PromptCompletion)
        } else if has("text") && has("labels") && !has("tokens") {
            Some(Self::TextLabels)
        } else if has("tokens") || TAG_FIELDS.iter().any(|f| has(f)) {
            Some(Self::TokenLabels)
        } else if has("label") {
            Some(Self::TextLabel)
        } else if has("text") {
            Some(Self::Text)
        } else {
            None
        }
    }
}

/// Names that the labels of words go by; the first one present is read.
const TAG_FIELDS: [&str; 3] = ["labels", "tags", "ner_tags"];

/// A label as written: a name, or an index into the names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Label {
    /// By name.
    Name(String),
    /// By index.
    Index(u64),
    /// A number that is no index: the target of a regression (bits of an f64).
    Number(u64),
}

impl Label {
    /// The number that it is, if it is one.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Name(_) => None,
            Self::Index(i) => Some(*i as f64),
            Self::Number(bits) => Some(f64::from_bits(*bits)),
        }
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name:?}"),
            Self::Index(i) => write!(f, "{i}"),
            Self::Number(bits) => write!(f, "{}", f64::from_bits(*bits)),
        }
    }
}

/// One example.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Example {
    /// Any text.
    Text(String),
    /// A prompt and how it should go on.
    PromptCompletion {
        /// Read.
        prompt: String,
        /// Learned.
        completion: String,
    },
    /// A conversation.
    Messages(Vec<ChatMessage>),
    /// A text and its label.
    TextLabel {
        /// Read.
        text: String,
        /// Learned.
        label: Label,
    },
    /// A text and the labels that apply to it.
    TextLabels {
        /// Read.
        text: String,
        /// Learned; may be empty.
        labels: Vec<Label>,
    },
    /// Words and their labels.
    TokenLabels {
        /// Read.
        tokens: Vec<String>,
        /// Learned, one per word.
        labels: Vec<Label>,
    },
    /// Two answers, of which one is better.
    Pair {
        /// Read.
        prompt: Said,
        /// The better one.
        chosen: Said,
        /// The other.
        rejected: Said,
    },
    /// An answer and whether it is good.
    Rated {
        /// Read.
        prompt: Said,
        /// The answer.
        completion: Said,
        /// Whether it is good.
        good: bool,
    },
}

/// A prompt, or an answer to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Said {
    /// As text.
    Text(String),
    /// As turns of a conversation.
    Turns(Vec<ChatMessage>),
}

/// An example and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Line in the file, counting from 1.
    pub line: u64,
    /// The example.
    pub example: Example,
}

/// A parsed file.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The format of its lines; `None` when no line had one.
    pub format: Option<Format>,
    /// The good lines.
    pub rows: Vec<Row>,
}

impl Dataset {
    /// Reads JSON lines. Blank lines are skipped; a line with a problem is reported and left out.
    pub fn parse(bytes: &[u8]) -> (Self, Report) {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut report = Report::default();
        let mut data = Self::default();
        for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
            let line = line.trim_ascii();
            if !line.is_empty() {
                data.push_line(i as u64 + 1, line, &mut report);
            }
        }
        if data.rows.is_empty() && report.is_ok() {
            report.error(Code::EmptyFile, 0, "", "has no examples; one JSON object per line is needed");
        }
        (data, report)
    }

    fn push_line(&mut self, line: u64, bytes: &[u8], report: &mut Report) {
        let Some(object) = parse_object(line, bytes, report) else { return };
        let Some(format) = Format::detect(&object, self.format) else {
            report.error(Code::UnknownFormat, line, "", unknown_format(&object));
            return;
        };
        match self.format {
            Some(first) if first != format => {
                let message = format!("is {}, the lines before are {}", format.as_str(), first.as_str());
                report.error(Code::MixedFormats, line, "", message);
                return;
            }
            _ => self.format = Some(format),
        }
        let mut fields = Fields { object: &object, line, report };
        if let Some(example) = fields.example(format) {
            self.rows.push(Row { line, example });
        }
    }
}

fn parse_object(line: u64, bytes: &[u8], report: &mut Report) -> Option<Map<String, Value>> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) => {
            report.error(Code::NotUtf8, line, "", format!("is not UTF-8 from byte {} of the line", e.valid_up_to()));
            return None;
        }
    };
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(object)) => Some(object),
        Ok(other) => {
            report.error(Code::WrongType, line, "", format!("is {}, a JSON object is needed", kind(&other)));
            None
        }
        Err(e) => {
            let what = e.to_string();
            let what = what.rsplit_once(" at line").map_or(what.as_str(), |(w, _)| w).to_owned();
            report.error(Code::NotJson, line, "", format!("is not JSON: {what} at column {}", e.column()));
            None
        }
    }
}

fn unknown_format(object: &Map<String, Value>) -> String {
    let fields: Vec<_> = object.keys().take(8).map(String::as_str).collect();
    format!(
        "has the fields [{}]; accepted are {{text}}, {{prompt, completion}}, {{messages}}, {{text, label}}, {{text, labels}}, {{tokens, labels}}, {{prompt, chosen, rejected}}, {{prompt, completion, label: true or false}}",
        fields.join(", ")
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Reads the fields of one line and reports what is wrong with them, all of them.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    line: u64,
    report: &'a mut Report,
}

impl<'a> Fields<'a> {
    fn example(&mut self, format: Format) -> Option<Example> {
        match format {
            Format::Text => Some(Example::Text(self.filled("text")?)),
            Format::PromptCompletion => {
                let (prompt, completion) = (self.string("prompt"), self.string("completion"));
                let (prompt, completion) = (prompt?, completion?);
                if completion.trim().is_empty() {
                    self.error(Code::EmptyCompletion, "/completion", "is empty: there is nothing to learn");
                    return None;
                }
                Some(Example::PromptCompletion { prompt, completion })
            }
            Format::Messages => self.messages(),
            Format::TextLabel => {
                let (text, label) = (self.filled("text"), self.label());
                Some(Example::TextLabel { text: text?, label: label? })
            }
            Format::TextLabels => {
                let (text, labels) = (self.filled("text"), self.array("labels"));
                let (text, list) = (text?, labels?);
                let labels: Vec<_> =
                    list.iter().enumerate().filter_map(|(i, v)| self.one_label(v, &format!("/labels/{i}"))).collect();
                (labels.len() == list.len()).then_some(Example::TextLabels { text, labels })
            }
            Format::TokenLabels => self.token_labels(),
            Format::Pairs => self.pair(),
            Format::Rated => self.rated(),
        }
    }

    fn error(&mut self, code: Code, pointer: &str, message: impl Into<String>) {
        self.report.error(code, self.line, pointer, message);
    }

    fn value(&mut self, field: &str) -> Option<&'a Value> {
        let value = self.object.get(field);
        if value.is_none() {
            self.error(Code::MissingField, &format!("/{field}"), "is missing");
        }
        value
    }

    fn string(&mut self, field: &str) -> Option<String> {
        match self.value(field)? {
            Value::String(s) => Some(s.clone()),
            other => {
                let message = format!("is {}, a string is needed", kind(other));
                self.error(Code::WrongType, &format!("/{field}"), message);
                None
            }
        }
    }

    fn filled(&mut self, field: &str) -> Option<String> {
        let text = self.string(field)?;
        if text.trim().is_empty() {
            self.error(Code::EmptyText, &format!("/{field}"), "is empty");
            return None;
        }
        Some(text)
    }

    fn label(&mut self) -> Option<Label> {
        let value = self.value("label")?;
        self.one_label(value, "/label")
    }

    fn one_label(&mut self, value: &Value, pointer: &str) -> Option<Label> {
        match value {
            Value::String(s) if s.trim().is_empty() => {
                self.error(Code::LabelUnknown, pointer, "is empty; a label needs a name");
                None
            }
            Value::String(s) => Some(Label::Name(s.clone())),
            Value::Number(n) if n.is_u64() => n.as_u64().map(Label::Index),
            Value::Number(n) if n.as_f64().is_some_and(f64::is_finite) => {
                n.as_f64().map(|x| Label::Number(x.to_bits()))
            }
            other => {
                let what = kind(other);
                self.error(
                    Code::WrongType,
                    pointer,
                    format!("is {what}; a label is a string, an index from 0, or a number to learn"),
                );
                None
            }
        }
    }

    fn array(&mut self, field: &str) -> Option<&'a Vec<Value>> {
        match self.value(field)? {
            Value::Array(a) => Some(a),
            other => {
                let message = format!("is {}, an array is needed", kind(other));
                self.error(Code::WrongType, &format!("/{field}"), message);
                None
            }
        }
    }

    fn token_labels(&mut self) -> Option<Example> {
        let field = TAG_FIELDS.into_iter().find(|f| self.object.contains_key(*f)).unwrap_or(TAG_FIELDS[0]);
        let (words, tags) = (self.array("tokens"), self.array(field));
        let (words, tags) = (words?, tags?);
        if words.is_empty() {
            self.error(Code::EmptyText, "/tokens", "is empty");
            return None;
        }
        let mut tokens = Vec::with_capacity(words.len());
        for (i, word) in words.iter().enumerate() {
            match word {
                Value::String(s) => tokens.push(s.clone()),
                other => {
                    let message = format!("is {}, a string is needed", kind(other));
                    self.error(Code::WrongType, &format!("/tokens/{i}"), message);
                }
            }
        }
        let labels: Vec<_> =
            tags.iter().enumerate().filter_map(|(i, tag)| self.one_label(tag, &format!("/{field}/{i}"))).collect();
        if words.len() != tags.len() {
            let message = format!("has {} labels for {} tokens; one per token is needed", tags.len(), words.len());
            self.error(Code::TagLengthMismatch, &format!("/{field}"), message);
            return None;
        }
        (tokens.len() == words.len() && labels.len() == tags.len()).then_some(Example::TokenLabels { tokens, labels })
    }
}

#[cfg(test)]
mod tests;
