//! Rows to classify: JSON lines in the forms that training reads, with or without gold. Every bad line is named.

use serde_json::{Map, Value};

use crate::{cli::files, delta::Problem};

/// What answers.
#[derive(Debug, Clone, Default)]
pub(super) struct HeadInfo {
    /// The version, so that all requests of a file get the same.
    pub(super) reference: String,
    /// Label names in index order; may be empty.
    pub(super) labels: Vec<String>,
    /// Whether it labels tokens.
    pub(super) tokens: bool,
    /// How its outputs are read.
    pub(super) problem: Problem,
}

/// What is sent for a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// Nothing to read: no request is made for it.
    Nothing,
    /// A text, and the second of a pair.
    Text(String, Option<String>),
    /// Words, each of which gets a label.
    Words(Vec<String>),
}

impl Input {
    /// About how many bytes it takes in a request.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Text(text, pair) => text.len() + pair.as_ref().map_or(0, String::len),
            Self::Words(words) => words.iter().map(|w| w.len() + 2).sum(),
        }
    }
}

/// What a row should have been given.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Gold {
    /// One label.
    Label(String),
    /// Any number of labels.
    Set(Vec<String>),
    /// A number.
    Value(f64),
    /// One per word.
    Tags(Vec<String>),
}

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// All of its fields, in order.
    pub(super) fields: Map<String, Value>,
    /// What is sent.
    pub(super) input: Input,
    /// Words, for heads that label tokens.
    pub(super) words: Vec<String>,
    /// What is right, if it says so.
    pub(super) gold: Option<Gold>,
}

/// Reads a whole file; blank lines are skipped.
///
/// # Errors
/// Every bad line, by number.
pub(super) fn parse(bytes: &[u8], head: &HeadInfo) -> anyhow::Result<Vec<Row>> {
    files::rows(bytes, |_, fields| row(fields, head))
}

fn row(fields: Map<String, Value>, head: &HeadInfo) -> Result<Row, String> {
    let (input, words, gold) = if head.tokens {
        let words = words(&fields)?;
        let blank = words.iter().all(|w| w.trim().is_empty());
        let input = if blank { Input::Nothing } else { Input::Words(words.clone()) };
        let gold = tags(&fields, words.len(), &head.labels)?;
        (input, words, gold)
    } else {
        (whole(&fields)?, Vec::new(), label(&fields, head)?)
    };
    Ok(Row { fields, input, words, gold })
}

/// `text`, and `pair` if there is one.
fn whole(fields: &Map<String, Value>) -> Result<Input, String> {
    let text = match fields.get("text") {
        Some(Value::String(text)) => text.clone(),
        Some(_) => return Err("text is not a string".to_owned()),
        None if fields.contains_key("tokens") => {
            return Err("has tokens, but the head labels whole texts: text is needed".to_owned());
        }
        None => return Err("has no text".to_owned()),
    };
    let pair = match fields.get("pair") {
        Some(Value::String(pair)) => Some(pair.clone()),
        Some(Value::Null) | None => None,
        Some(_) => return Err("pair is not a string".to_owned()),
    };
    Ok(if text.trim().is_empty() { Input::Nothing } else { Input::Text(text, pair) })
}

/// `tokens`, else the words of `text` between white space.
fn words(fields: &Map<String, Value>) -> Result<Vec<String>, String> {
    match (fields.get("tokens"), fields.get("text")) {
        (Some(Value::Array(tokens)), _) => files::strings("tokens", tokens),
        (Some(_), _) => Err("tokens is not an array".to_owned()),
        (None, Some(Value::String(text))) => Ok(text.split_whitespace().map(str::to_owned).collect()),
        (None, Some(_)) => Err("text is not a string".to_owned()),
        (None, None) => Err("has neither tokens nor text".to_owned()),
    }
}

/// `label`, or `labels` if that is one label.
fn label(fields: &Map<String, Value>, head: &HeadInfo) -> Result<Option<Gold>, String> {
    let names = &head.labels;
    match head.problem {
        Problem::SingleLabel => {}
        Problem::MultiLabel => return set(fields, names),
        Problem::Regression => {
            return match fields.get("label") {
                None | Some(Value::Null) => Ok(None),
                Some(value) => {
                    value.as_f64().map(|x| Some(Gold::Value(x))).ok_or_else(|| "label is not a number".to_owned())
                }
            };
        }
    }
    let (field, value) = match (fields.get("label"), fields.get("labels")) {
        (Some(value), _) => ("label", value),
        (None, Some(Value::Array(list))) if list.len() == 1 => ("labels[0]", &list[0]),
        (None, Some(value)) => ("labels", value),
        (None, None) => return Ok(None),
    };
    match value {
        Value::Null => Ok(None),
        value => Ok(Some(Gold::Label(name(field, value, names)?))),
    }
}

/// `labels`, a list, or `label`, one.
fn set(fields: &Map<String, Value>, names: &[String]) -> Result<Option<Gold>, String> {
    match (fields.get("labels"), fields.get("label")) {
        (Some(Value::Array(list)), _) => {
            let all = list.iter().enumerate().map(|(i, v)| name(&format!("labels[{i}]"), v, names));
            Ok(Some(Gold::Set(all.collect::<Result<_, _>>()?)))
        }
        (None | Some(Value::Null), None | Some(Value::Null)) => Ok(None),
        (None | Some(Value::Null), Some(value)) => Ok(Some(Gold::Set(vec![name("label", value, names)?]))),
        (Some(_), _) => Err("labels is not an array".to_owned()),
    }
}

/// `labels`, `tags` or `ner_tags`: one per word, or null.
fn tags(fields: &Map<String, Value>, words: usize, names: &[String]) -> Result<Option<Gold>, String> {
    let Some((field, value)) = ["labels", "tags", "ner_tags"].iter().find_map(|f| Some((*f, fields.get(*f)?))) else {
        return Ok(None);
    };
    let list = match value {
        Value::Null => return Ok(None),
        Value::Array(list) => list,
        _ => return Err(format!("{field} is not an array")),
    };
    if list.len() != words {
        return Err(format!("{field} has {} labels for {words} words; one per word is needed", list.len()));
    }
    let all = list.iter().enumerate().map(|(i, v)| name(&format!("{field}[{i}]"), v, names));
    Ok(Some(Gold::Tags(all.collect::<Result<_, _>>()?)))
}

/// A label as written: a name, or an index into the head's labels.
fn name(field: &str, value: &Value, names: &[String]) -> Result<String, String> {
    match value {
        Value::String(name) => Ok(name.clone()),
        Value::Number(n) => {
            let known = n.as_u64().and_then(|i| names.get(usize::try_from(i).ok()?));
            known
                .cloned()
                .ok_or_else(|| format!("{field} is {n}; the head's labels are 0 to {}", names.len().max(1) - 1))
        }
        _ => Err(format!("{field} is neither a label's name nor an index")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(tokens: bool) -> HeadInfo {
        HeadInfo {
            reference: String::new(),
            labels: vec!["O".into(), "B-x".into()],
            tokens,
            problem: Problem::SingleLabel,
        }
    }

    fn golds(text: &str, tokens: bool) -> Vec<Option<Gold>> {
        parse(text.as_bytes(), &head(tokens)).unwrap().into_iter().map(|r| r.gold).collect()
    }

    #[test]
    fn labels_are_read_by_name_and_index_under_each_of_their_names() {
        let label = |s: &str| Some(Gold::Label(s.into()));
        let text = "{\"text\":\"a\",\"label\":\"O\"}\n{\"text\":\"a\",\"labels\":1}\n\n{\"text\":\"a\",\"labels\":[\"new\"]}\r\n\
                    {\"text\":\"a\",\"label\":null}\n{\"x\":[1],\"text\":\"\u{1f600}\"}";
        assert_eq!(golds(text, false), [label("O"), label("B-x"), label("new"), None, None]);
        let tags = |t: &[&str]| Some(Gold::Tags(t.iter().map(|s| (*s).into()).collect()));
        let text = "{\"tokens\":[\"a\",\"\"],\"labels\":[\"O\",\"B-x\"]}\n{\"tokens\":[\"a\"],\"tags\":[1]}\n\
                    {\"tokens\":[],\"ner_tags\":[]}\n{\"text\":\"a  b\"}\n{\"tokens\":[\"a\"],\"labels\":null}";
        assert_eq!(golds(text, true), [tags(&["O", "B-x"]), tags(&["B-x"]), tags(&[]), None, None]);
        let rows = parse(text.as_bytes(), &head(true)).unwrap();
        assert_eq!((rows[2].input.clone(), rows[3].words.len()), (Input::Nothing, 2));
        assert_eq!(parse("{\"text\":\" \"}".as_bytes(), &head(false)).unwrap()[0].input, Input::Nothing);
    }

    #[test]
    fn sets_and_numbers_are_gold_where_the_head_gives_them() {
        let golds = |problem, text: &str| {
            let rows = parse(text.as_bytes(), &HeadInfo { problem, ..head(false) });
            rows.map(|rows| rows.into_iter().map(|r| r.gold).collect::<Vec<_>>()).map_err(|e| e.to_string())
        };
        let text = "{\"text\":\"a\",\"labels\":[\"O\",1]}\n{\"text\":\"a\",\"labels\":[]}\n{\"text\":\"a\"}";
        let set = |all: &[&str]| Some(Gold::Set(all.iter().map(|s| (*s).to_owned()).collect()));
        assert_eq!(golds(Problem::MultiLabel, text), Ok(vec![set(&["O", "B-x"]), set(&[]), None]));
        let text = "{\"text\":\"a\",\"label\":-1.5}\n{\"text\":\"a\"}";
        assert_eq!(golds(Problem::Regression, text), Ok(vec![Some(Gold::Value(-1.5)), None]));
        let error = golds(Problem::Regression, "{\"text\":\"a\",\"label\":\"b\"}").unwrap_err();
        assert!(error.contains("line 1: label is not a number"), "{error}");
    }

    #[test]
    fn every_bad_line_is_named() {
        let text = b"{\"text\":\"a\"}\nnonsense\n[]\n{\"tokens\":[]}\n{\"text\":1}\n{\"text\":\"a\",\"label\":2}\n{\"text\":\"\xff\"}";
        let error = parse(text, &head(false)).unwrap_err().to_string();
        for part in ["line 2: is not JSON", "line 3", "line 4: has tokens", "line 5", "line 6: label is 2", "line 7"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains("line 1"));
        let error = parse(b"{\"tokens\":[\"a\"],\"labels\":[]}\n{}", &head(true)).unwrap_err().to_string();
        assert!(error.contains("line 1: labels has 0 labels for 1 words") && error.contains("line 2"), "{error}");
    }
}
