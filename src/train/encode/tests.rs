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
    let Target::Tokens(mask) = &e.target else { panic!("not a text") };
    let ids = e.tokens.iter().zip(mask).filter(|(_, m)| **m).map(|(id, _)| *id);
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
