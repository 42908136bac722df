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

#[test]
fn answers_are_compared_or_judged_as_texts_or_as_turns() {
    for (line, format) in [
        (r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#, Format::Pairs),
        (
            r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}]}"#,
            Format::Pairs,
        ),
        (r#"{"prompt": "a", "completion": "b", "label": false}"#, Format::Rated),
        (
            r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}], "label": true}"#,
            Format::Rated,
        ),
        // a remark on an example to learn from
        (r#"{"prompt": "a", "completion": "b", "label": "easy"}"#, Format::PromptCompletion),
    ] {
        let (data, report) = Dataset::parse(line.replace('\n', " ").as_bytes());
        assert!(report.is_ok(), "{line}: {report:?}");
        assert_eq!((data.format, data.rows.len()), (Some(format), 1), "{line}");
    }
    let pairs = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}
        {"prompt": "a", "chosen": "b", "rejected": "b"}
        {"prompt": "a", "chosen": "b"}
        {"prompt": 1, "chosen": " ", "rejected": 2}
        {"chosen": "a", "rejected": "b"}
        {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}
        {"prompt": [{"role": "assistant", "content": "c"}], "chosen": [{"role": "user", "content": "c"}], "rejected": []}
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chosen": "c", "rejected": "d"}
        {"prompt": "a", "completion": "b"}"#;
    let turns = Code::RolesNotAlternating;
    assert_eq!(
        codes(pairs),
        vec![
            (Code::SameAnswers, 2, "/rejected".into()),
            (Code::MissingField, 3, "/rejected".into()),
            (Code::WrongType, 4, "/prompt".into()),
            (Code::EmptyCompletion, 4, "/chosen".into()),
            (Code::WrongType, 4, "/rejected".into()),
            (Code::MissingField, 5, "/prompt".into()),
            (Code::WrongType, 6, "/rejected".into()),
            (turns, 7, "/prompt/0/role".into()),
            (turns, 7, "/chosen/0/role".into()),
            (Code::NoAssistant, 7, "/rejected".into()),
            (turns, 8, "/prompt".into()),
            (Code::MixedFormats, 9, String::new()),
        ]
    );
    let rated = r#"{"prompt": "a", "completion": "b", "label": true}
        {"prompt": "a", "completion": "b"}
        {"prompt": "a", "completion": "b", "label": "yes"}
        {"prompt": "a", "completion": " ", "label": 1}
        {"completion": "b", "label": false}"#;
    assert_eq!(
        codes(rated),
        vec![
            (Code::MissingField, 2, "/label".into()),
            (Code::WrongType, 3, "/label".into()),
            (Code::EmptyCompletion, 4, "/completion".into()),
            (Code::WrongType, 4, "/label".into()),
            (Code::MissingField, 5, "/prompt".into()),
        ]
    );
}
