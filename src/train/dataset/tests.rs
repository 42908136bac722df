//! Formats and problems of lines.

use super::*;

fn codes(text: &str) -> Vec<(Code, u64, String)> {
    Dataset::parse(text.as_bytes()).1.issues.into_iter().map(|i| (i.code, i.line, i.pointer)).collect()
}

#[test]
fn every_format_is_known_by_its_fields() {
    for (line, format) in [
        (r#"{"text": "a"}"#, Format::Text),
        (r#"{"prompt": "", "completion": "b"}"#, Format::PromptCompletion),
        (r#"{"messages": [{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#, Format::Messages),
        (r#"{"text": "a", "label": "x", "fine_label": "y"}"#, Format::TextLabel),
        (r#"{"text": "a", "label": 1}"#, Format::TextLabel),
        (r#"{"text": "a", "label": -1.5}"#, Format::TextLabel),
        (r#"{"text": "a", "labels": ["x", "y"]}"#, Format::TextLabels),
        (r#"{"text": "a", "labels": []}"#, Format::TextLabels),
        (r#"{"tokens": ["a"], "labels": ["O"]}"#, Format::TokenLabels),
        (r#"{"tokens": ["a"], "tags": ["O"]}"#, Format::TokenLabels),
        (r#"{"tokens": ["a"], "ner_tags": [3]}"#, Format::TokenLabels),
    ] {
        let (data, report) = Dataset::parse(line.as_bytes());
        assert!(report.is_ok(), "{line}: {report:?}");
        assert_eq!((data.format, data.rows.len()), (Some(format), 1), "{line}");
    }
}

#[test]
fn all_problems_are_reported_with_line_and_pointer_not_only_the_first() {
    let text = "{\"prompt\": \"a\", \"completion\": \"b\"}\n\
                {\"prompt\": 1, \"completion\": []}\n\
                nonsense\n\
                \n\
                {\"prompt\": \"a\", \"completion\": \" \"}\n\
                {\"text\": \"a\"}\n\
                {\"x\": 1}\n\
                [1]\n\
                {\"prompt\": \"a\"}\n";
    assert_eq!(
        codes(text),
        vec![
            (Code::WrongType, 2, "/prompt".into()),
            (Code::WrongType, 2, "/completion".into()),
            (Code::NotJson, 3, String::new()),
            (Code::EmptyCompletion, 5, "/completion".into()),
            (Code::MixedFormats, 6, String::new()),
            (Code::UnknownFormat, 7, String::new()),
            (Code::WrongType, 8, String::new()),
            (Code::MissingField, 9, "/completion".into()),
        ]
    );
}

#[test]
fn conversations_have_known_roles_in_turns_and_an_assistant() {
    let m = |roles: &[&str]| {
        let list: Vec<_> = roles.iter().map(|r| serde_json::json!({"role": r, "content": "x"})).collect();
        serde_json::json!({ "messages": list }).to_string()
    };
    assert!(codes(&m(&["system", "user", "assistant", "user", "assistant"])).is_empty());
    assert_eq!(codes(&m(&["user", "tool"])), vec![(Code::BadRole, 1, "/messages/1/role".into())]);
    assert_eq!(codes(&m(&["user", "user"])), vec![(Code::RolesNotAlternating, 1, "/messages/1/role".into())]);
    assert_eq!(codes(&m(&["assistant"])), vec![(Code::RolesNotAlternating, 1, "/messages/0/role".into())]);
    assert_eq!(codes(&m(&["user"])), vec![(Code::NoAssistant, 1, "/messages".into())]);
    assert_eq!(codes(&m(&[])), vec![(Code::NoAssistant, 1, "/messages".into())]);
}

#[test]
fn odd_bytes_are_problems_of_their_line() {
    assert_eq!(codes(""), vec![(Code::EmptyFile, 0, String::new())]);
    assert_eq!(codes("\n \r\n"), vec![(Code::EmptyFile, 0, String::new())]);
    let (data, report) =
        Dataset::parse(b"\xef\xbb\xbf{\"text\": \"a\"}\r\n{\"text\": \"\xff\"}\n{\"text\": \"\\ud800\"}");
    assert_eq!(data.rows.len(), 1);
    let found: Vec<_> = report.issues.iter().map(|i| (i.code, i.line)).collect();
    assert_eq!(found, vec![(Code::NotUtf8, 2), (Code::NotJson, 3)]);
    assert_eq!(
        codes(r#"{"tokens": ["a", "b"], "labels": ["O"]}"#),
        vec![(Code::TagLengthMismatch, 1, "/labels".into())]
    );
    assert_eq!(codes(r#"{"text": "a", "label": [1]}"#), vec![(Code::WrongType, 1, "/label".into())]);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(codes(&deep), vec![(Code::NotJson, 1, String::new())]);
}
