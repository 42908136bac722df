//! Which tokens an example becomes, and which of them carry loss.

use super::*;

/// One id per byte; 1 starts and 2 ends a text. Two adjoining `l` become one token, as merges do.
pub(crate) fn byte_codec(bos: bool) -> TextCodec {
    let encode: EncodeFn = Arc::new(move |text, special| {
        let joined = text.replace("ll", "\u{1}");
        let body = joined.bytes().map(|b| 10 + u32::from(b));
        Ok((bos && special).then_some(1).into_iter().chain(body).collect())
    });
    let words: EncodeWordsFn = Arc::new(|list| {
        Ok(list.iter().enumerate().flat_map(|(w, s)| s.bytes().map(move |b| (10 + u32::from(b), w))).collect())
    });
    let render: RenderFn = Arc::new(|messages, open| {
        let mut s: String = messages.iter().map(|m| format!("<{}>{}\n", &m.role[..1], m.content)).collect();
        if open {
            s.push_str("<a>");
        }
        Ok(s)
    });
    let plain = Arc::clone(&encode);
    let chat = ChatCodec {
        guard: Arc::new(|messages| (messages.to_vec(), vec![])),
        render,
        encode: Arc::new(move |text, _| plain(text, false)),
    };
    TextCodec::new(encode, words, Some(chat), vec![2]).unwrap()
}

fn run(text: &str, codec: &TextCodec, labels: &[&str], max_length: usize) -> (Vec<Encoded>, Report) {
    let (data, mut report) = Dataset::parse(text.as_bytes());
    let labels = LabelSet::new(labels.iter().map(|s| (*s).to_owned()).collect());
    let out = encode(&data, codec, &labels, max_length, &mut report);
    (out, report)
}

fn learned(e: &Encoded) -> String {
    said(&e.tokens, e.learned(), true)
}

/// The text of the tokens that are learned, or of the others.
fn said(tokens: &[u32], learn: &[bool], learned: bool) -> String {
    let ids = tokens.iter().zip(learn).filter(|(_, m)| **m == learned).map(|(id, _)| *id);
    ids.map(|id| if id < 10 { '$' } else { char::from((id - 10) as u8) }).collect()
}

#[test]
fn loss_is_on_the_completion_and_its_end_only() {
    let (out, report) = run(r#"{"prompt": "ab", "completion": "cd"}"#, &byte_codec(true), &[], 64);
    assert!(report.is_ok());
    assert_eq!(out[0].tokens, [1, 107, 108, 109, 110, 2]);
    assert_eq!(learned(&out[0]), "cd$");
    let (out, _) = run(r#"{"prompt": "", "completion": "cd"}"#, &byte_codec(false), &[], 64);
    assert_eq!(learned(&out[0]), "d$", "without a start token nothing predicts the first token");
}

#[test]
fn a_merge_across_the_border_does_not_change_the_prompt() {
    let (out, _) = run(r#"{"prompt": "al", "completion": "lo"}"#, &byte_codec(false), &[], 64);
    assert_eq!(out[0].tokens, [107, 118, 118, 121, 2]);
    assert_eq!(learned(&out[0]), "lo$");
}

#[test]
fn loss_is_on_every_assistant_turn() {
    let line = r#"{"messages": [{"role":"user","content":"q"},{"role":"assistant","content":"x"},
        {"role":"user","content":"r"},{"role":"assistant","content":"y"}]}"#
        .replace('\n', " ");
    let (out, report) = run(&line, &byte_codec(false), &[], 64);
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(learned(&out[0]), "x\ny\n$");
    let mut codec = byte_codec(false);
    codec.chat = None;
    assert_eq!(run(&line, &codec, &[], 64).1.issues[0].code, Code::ChatTemplate);
}

#[test]
fn long_texts_become_pieces_and_long_completions_are_cut_with_a_warning() {
    let (out, report) = run(r#"{"text": "abcdefg"}"#, &byte_codec(true), &[], 4);
    assert!(report.issues.is_empty());
    assert_eq!(out.iter().map(|e| e.tokens.len()).collect::<Vec<_>>(), [4, 4]);
    assert_eq!(
        out.iter().map(learned).collect::<Vec<_>>(),
        ["abc", "efg"],
        "8 ids with the start; the lone end is left out"
    );
    let (out, report) = run(r#"{"prompt": "ab", "completion": "cdef"}"#, &byte_codec(false), &[], 4);
    assert_eq!((learned(&out[0]).as_str(), report.issues[0].code), ("cd", Code::TooLong));
    let (out, report) = run(r#"{"prompt": "abcd", "completion": "e"}"#, &byte_codec(false), &[], 4);
    assert!(out.is_empty());
    assert_eq!(report.issues[0].code, Code::NoSupervisedToken);
}

#[test]
fn classification_keeps_the_special_tokens_when_it_cuts() {
    let (out, report) = run(r#"{"text": "abcdef", "label": "y"}"#, &byte_codec(true), &["n", "y"], 4);
    assert_eq!((out[0].tokens.as_slice(), &out[0].target), (&[1, 107, 108, 109][..], &Target::Label(1)));
    assert_eq!(report.issues[0].code, Code::TooLong);
}

#[test]
fn a_tag_belongs_to_the_first_piece_of_its_word() {
    let line = r#"{"tokens": ["ab", "", "c"], "labels": ["O", "O", "B"]}"#;
    let (out, report) = run(line, &byte_codec(true), &["O", "B"], 64);
    assert!(report.is_ok());
    assert_eq!(out[0].target, Target::Tags(vec![(1, 0), (3, 1)]), "the empty word has no piece");
}

#[test]
fn both_answers_keep_the_prompt_and_are_cut_at_their_ends() {
    let line = r#"{"prompt": "ab", "chosen": "cdef", "rejected": "g"}"#;
    let (out, report) = run(line, &byte_codec(true), &[], 64);
    assert!(report.issues.is_empty(), "{report:?}");
    let e = &out[0];
    let other = e.other().unwrap();
    assert_eq!((learned(e).as_str(), said(&other.tokens, &other.learn, true).as_str()), ("cdef$", "g$"));
    assert_eq!(
        (said(&e.tokens, e.learned(), false), said(&other.tokens, &other.learn, false)),
        ("$ab".into(), "$ab".into())
    );
    assert_eq!((e.rows(), e.longest(), e.sequences(), e.weight(), e.supervised()), (13, 8, 2, 1, 7));
    let (out, report) = run(line, &byte_codec(true), &[], 5);
    let other = out[0].other().unwrap();
    assert_eq!((learned(&out[0]).as_str(), said(&other.tokens, &other.learn, true).as_str()), ("cd", "g$"));
    let told: Vec<_> = report.issues.iter().map(|i| (i.code, i.pointer.as_str())).collect();
    assert_eq!(told, [(Code::TooLong, "/chosen")]);
    let same = r#"{"prompt": "ab", "chosen": "cdef", "rejected": "cdxx"}"#;
    assert_eq!(run(same, &byte_codec(true), &[], 5).1.issues.last().unwrap().code, Code::SameAnswers);
    assert_eq!(run(same, &byte_codec(true), &[], 3).1.issues[0].code, Code::NoSupervisedToken);
    // what the assistant said before is read, not learned
    let m = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
    let line = serde_json::json!({
        "prompt": [m("user", "q"), m("assistant", "x"), m("user", "r")],
        "chosen": [m("assistant", "y")],
        "rejected": [m("assistant", "z"), m("user", "s"), m("assistant", "t")],
    });
    let (out, report) = run(&line.to_string(), &byte_codec(false), &[], 64);
    assert!(report.is_ok(), "{report:?}");
    let other = out[0].other().unwrap();
    assert_eq!((learned(&out[0]).as_str(), said(&other.tokens, &other.learn, true).as_str()), ("y\n$", "z\nt\n$"));
    let pairs = byte_codec(true).with_decoder_start(Some(3));
    let (out, _) = run(r#"{"prompt": "ab", "chosen": "c", "rejected": "d"}"#, &pairs, &[], 64);
    assert_eq!(
        (out[0].source.as_slice(), out[0].tokens.as_slice(), out[0].rows()),
        (&[1, 107, 108][..], &[3, 109, 2][..], 12)
    );
    assert_eq!(run(&line.to_string(), &pairs, &[], 64).1.issues[0].code, Code::ChatTemplate);
}

#[test]
fn a_rated_example_meets_the_answer_to_the_next_other_prompt() {
    let line = |prompt: &str, completion: &str| {
        serde_json::json!({"prompt": prompt, "completion": completion, "label": completion < "n"}).to_string() + "\n"
    };
    let met = |rows: &[(&str, &str)], longest: usize| -> Vec<Option<(String, String)>> {
        let text: String = rows.iter().map(|(p, c)| line(p, c)).collect();
        let (mut out, report) = run(&text, &byte_codec(false), &[], longest);
        assert!(report.is_ok(), "{report:?}");
        add_mismatched(&mut out, longest);
        let both = |a: &Answer| (said(&a.tokens, &a.learn, false), said(&a.tokens, &a.learn, true));
        out.iter().map(|e| e.other().map(both)).collect()
    };
    let some = |p: &str, c: &str| Some((p.to_owned(), c.to_owned()));
    let rows = [("p", "a"), ("p", "z"), ("q", "b"), ("rr", "cc"), ("p", "d")];
    assert_eq!(met(&rows, 64), [some("p", "b$"), some("p", "b$"), some("q", "cc$"), some("rr", "d$"), some("p", "b$")]);
    assert_eq!(met(&rows, 4)[2..4], [some("q", "cc"), some("rr", "d$")], "its own answer was cut, too");
    assert_eq!(met(&[("p", "abc"), ("qqq", "d"), ("r", "efg")], 4)[1], some("qqq", "e"));
    assert_eq!(met(&[("p", "a"), ("p", "b")], 64), [None, None]);
    assert_eq!(met(&[("p", "a")], 64), [None]);
}
