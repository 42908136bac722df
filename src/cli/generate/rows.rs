//! Rows to continue: JSON lines in the forms that training reads, with or without references. Every bad line is named.

use serde_json::{Map, Value};

use crate::{
    cli::files,
    grpc::proto::{self, prompt::Prompt},
};

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// Its number in the file, from 1.
    pub(super) line: usize,
    /// All of its fields, in order.
    pub(super) fields: Map<String, Value>,
    /// What is continued.
    pub(super) prompt: proto::Prompt,
    /// What a right continuation is, if it says so; any of them.
    pub(super) references: Vec<String>,
}

/// Reads a whole file; blank lines are skipped. With `chat`, a prompt is a user's message. A system message goes ahead of
/// every conversation that has none.
///
/// # Errors
/// Every bad line, by number.
pub(super) fn parse(bytes: &[u8], chat: bool, system: Option<&str>) -> anyhow::Result<Vec<Row>> {
    files::rows(bytes, |line, fields| row(line, fields, chat, system))
}

fn row(line: usize, fields: Map<String, Value>, chat: bool, system: Option<&str>) -> Result<Row, String> {
    let mut references = references(&fields)?;
    let prompt = match (fields.get("messages"), fields.get("prompt")) {
        (Some(_), Some(_)) => return Err("has prompt and messages; one of them is needed".to_owned()),
        (None, None) => return Err("has neither prompt nor messages".to_owned()),
        (None, Some(Value::String(text))) if text.is_empty() => return Err("prompt is empty".to_owned()),
        (None, Some(Value::String(text))) if chat => conversation(vec![message("user", text)], system),
        (None, Some(Value::String(_))) if system.is_some() => {
            return Err(
                "has a prompt, which is plain text and has no place for --system; --chat makes it a user's message"
                    .to_owned(),
            );
        }
        (None, Some(Value::String(text))) => Prompt::Text(text.clone()),
        (None, Some(_)) => return Err("prompt is not a string".to_owned()),
        (Some(list), None) => {
            let mut messages = messages(list)?;
            // a conversation as training has it ends with what is to be said
            if let Some(last) = messages.pop_if(|m| m.role == "assistant")
                && references.is_empty()
            {
                references.push(last.content);
            }
            if messages.is_empty() {
                return Err("messages has nothing to answer".to_owned());
            }
            conversation(messages, system)
        }
    };
    Ok(Row { line, fields, prompt: proto::Prompt { prompt: Some(prompt) }, references })
}

/// A message by its role.
pub(super) fn message(role: &str, content: &str) -> proto::ChatMessage {
    proto::ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// Messages after the system message, unless they have one.
pub(super) fn conversation(mut messages: Vec<proto::ChatMessage>, system: Option<&str>) -> Prompt {
    if let Some(content) = system
        && messages.first().is_none_or(|first| first.role != "system")
    {
        messages.insert(0, message("system", content));
    }
    Prompt::Chat(proto::Chat { messages })
}

/// `completion`, a text or several, else `references`.
pub(in crate::cli) fn references(fields: &Map<String, Value>) -> Result<Vec<String>, String> {
    let Some((field, value)) = ["completion", "references"].iter().find_map(|f| Some((*f, fields.get(*f)?))) else {
        return Ok(Vec::new());
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => files::strings(field, list),
        _ => Err(format!("{field} is neither a string nor an array of strings")),
    }
}

fn messages(list: &Value) -> Result<Vec<proto::ChatMessage>, String> {
    let Value::Array(list) = list else { return Err("messages is not an array".to_owned()) };
    let message = |(i, value): (usize, &Value)| {
        let field = |name: &str| {
            let text = value.get(name).and_then(Value::as_str).map(str::to_owned);
            text.ok_or_else(|| format!("messages[{i}] has no {name} that is a string"))
        };
        Ok(proto::ChatMessage { role: field("role")?, content: field("content")? })
    };
    list.iter().enumerate().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<Row> {
        parse(text.as_bytes(), false, None).unwrap()
    }

    /// Roles of a row's conversation, or the text of a plain prompt.
    fn said(row: &Row) -> String {
        match &row.prompt.prompt {
            Some(Prompt::Chat(chat)) => chat.messages.iter().map(|m| m.role.clone()).collect::<Vec<_>>().join(" "),
            Some(Prompt::Text(text)) => text.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn prompts_come_with_any_number_of_references() {
        let all = rows(
            "{\"prompt\":\"a\",\"completion\":\" b\"}\n\n{\"prompt\":\"a\",\"completion\":[\"b\",\"c\"]}\r\n\
             {\"references\":[\"d\"],\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"completion\":null}\n{\"prompt\":\"\u{1f600}\"}",
        );
        let references: Vec<_> = all.iter().map(|r| (r.line, r.references.join("|"))).collect();
        let expected = [(1, " b"), (3, "b|c"), (4, "d"), (5, ""), (6, "")];
        assert_eq!(references, expected.map(|(n, text)| (n, text.to_owned())));
        assert_eq!(all[4].prompt.prompt, Some(Prompt::Text("\u{1f600}".into())));
    }

    #[test]
    fn the_last_answer_of_a_conversation_is_its_reference() {
        let (user, answer) = ("{\"role\":\"user\",\"content\":\"q\"}", "{\"role\":\"assistant\",\"content\":\"a\"}");
        let system = "{\"role\":\"system\",\"content\":\"s\"}";
        let text = format!(
            "{{\"messages\":[{user},{answer}]}}\n{{\"messages\":[{system},{user},{answer},{user}]}}\n\
             {{\"messages\":[{user},{answer}],\"completion\":\"other\"}}"
        );
        let all = parse(text.as_bytes(), false, Some("be brief")).unwrap();
        let got: Vec<_> = all.iter().map(|r| (said(r), r.references.join("|"))).collect();
        assert_eq!(got[0], ("system user".to_owned(), "a".to_owned()));
        assert_eq!(got[1], ("system user assistant user".to_owned(), String::new()));
        assert_eq!(got[2], ("system user".to_owned(), "other".to_owned()));
        assert_eq!(said(&rows(&text)[0]), "user");
    }

    #[test]
    fn prompts_are_plain_text_unless_they_are_messages_of_a_user() {
        let of =
            |chat, system| parse(b"{\"prompt\":\"a\",\"completion\":\"b\"}", chat, system).map(|all| said(&all[0]));
        assert_eq!(of(false, None).unwrap(), "a");
        assert_eq!(of(true, None).unwrap(), "user");
        assert_eq!(of(true, Some("s")).unwrap(), "system user");
        let error = of(false, Some("s")).unwrap_err().to_string();
        assert!(error.contains("line 1: has a prompt") && error.contains("--chat"), "{error}");
    }

    #[test]
    fn every_bad_line_is_named() {
        let text = b"{\"prompt\":\"a\"}\nnonsense\n[]\n{\"prompt\":1}\n{\"prompt\":\"a\",\"completion\":[1]}\n{\"text\":\"a\"}\n\
            {\"prompt\":\"\"}\n{\"messages\":[{\"role\":\"user\"}]}\n{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\"}]}\n\xff";
        let error = parse(text, false, None).unwrap_err().to_string();
        for part in [
            "line 2: is not JSON",
            "line 3: is not",
            "line 4: prompt is not",
            "line 5: completion[0] is not",
            "line 6: has neither",
            "line 7: prompt is empty",
            "line 8: messages[0] has no content",
            "line 9: messages has nothing to answer",
            "line 10: is not UTF-8",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains("line 1:"));
    }
}
