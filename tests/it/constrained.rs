//! Constrained outputs over the wire: they keep to what was asked for, beside others and in every form of the call; what cannot be
//! kept to is refused by its field.

use deltaserve::grpc::proto;
use proto::generate_options::Constraint;
use serde_json::{Value, json};
use tonic::Code;

use crate::support::*;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "to": {"enum": ["Ann", "Bob"]}},
        "required": ["ok", "n", "to"],
        "additionalProperties": false
    })
}

fn options_of(constraint: Constraint, seed: Option<u64>) -> proto::GenerateOptions {
    let sampling = seed.map(|seed| proto::Sampling { temperature: Some(1.0), seed: Some(seed), ..Default::default() });
    proto::GenerateOptions { constraint: Some(constraint), ignore_eos: false, sampling, ..options(600) }
}

fn asking(delta: &str, constraint: Constraint, seed: Option<u64>) -> proto::GenerateRequest {
    proto::GenerateRequest { options: Some(options_of(constraint, seed)), ..ask(delta, "Write JSON:", 1) }
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"));
    let object = value.as_object().unwrap();
    assert_eq!(object.len(), 3, "{text}");
    assert!(object["ok"].is_boolean() && object["n"].as_u64().is_some_and(|n| n <= 99), "{text}");
    assert!(["Ann", "Bob"].contains(&object["to"].as_str().unwrap()), "{text}");
}

fn json_schema() -> Constraint {
    Constraint::JsonSchema(schema().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_keep_to_the_schema_beside_others_that_notice_nothing() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let free = client.generate(ask("style", "hello", 40)).await.expect("a stream");
    let company = (0..6).map(|i| {
        let delta = if i % 2 == 0 { "style" } else { "" };
        client.generate(asking(delta, json_schema(), (i > 1).then_some(i)))
    });
    let both = futures::future::join(futures::future::join_all(company), client.generate(ask("style", "hello", 40)));
    let (said, again) = both.await;
    assert_eq!(again.expect("a stream").ids, free.ids);
    for (i, said) in said.into_iter().enumerate() {
        let said = said.expect("a stream");
        check(&said.text);
        assert_eq!(said.finished.reason(), proto::FinishReason::StopToken);
        assert!(said.pieces >= said.ids.len(), "it streams");
        let delta = if i % 2 == 0 { "style" } else { "" };
        let alone = client.generate(asking(delta, json_schema(), (i > 1).then_some(i as u64))).await.expect("a stream");
        assert_eq!(alone.ids, said.ids, "the seed decides");
    }
    running.stop().await;
}

/// Whether a text is of its form.
type Holds = fn(&str) -> bool;

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_constraint_works_and_so_does_a_batch() {
    let world = World::long();
    let running = world.start().await;
    let client = &running.client;
    let texts: Vec<String> = ["red", "green, or blue", "reddish"].map(str::to_owned).to_vec();
    let cases: [(Constraint, Holds); 3] = [
        (Constraint::Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}".into()), |t| {
            t.len() == 10
                && t.split('-').map(str::len).eq([4, 2, 2])
                && t.bytes().all(|b| b == b'-' || b.is_ascii_digit())
        }),
        (Constraint::Choice(proto::Choice { texts }), |t| ["red", "green, or blue", "reddish"].contains(&t)),
        (Constraint::LarkGrammar("start: \"[\" ITEM (\"|\" ITEM){2} \"]\"\nITEM: /[a-c]{1,2}/".into()), |t| {
            let items = t.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or_default();
            items.split('|').count() == 3 && items.bytes().all(|b| b"abc|".contains(&b))
        }),
    ];
    for (constraint, holds) in cases {
        for seed in [None, Some(1), Some(2), Some(3)] {
            let said = client.generate(asking("", constraint.clone(), seed)).await.expect("a stream");
            assert!(holds(&said.text), "{:?} is not of {constraint:?}", said.text);
            assert_eq!(said.finished.reason(), proto::FinishReason::StopToken);
        }
    }
    let options = proto::GenerateOptions { n: Some(3), logprobs: Some(2), ..options_of(json_schema(), Some(5)) };
    let prompts = ["one", "two"].map(prompt).to_vec();
    let request = proto::GenerateBatchRequest { delta: String::new(), prompts, options: Some(options), deltas: vec![] };
    let batch = client.batch(request).await.expect("a batch");
    assert_eq!(batch.generations.len(), 6);
    batch.generations.iter().for_each(|g| check(&g.text));
    // any object, as far as a model that knows nothing comes
    let object = proto::GenerateOptions { max_new_tokens: Some(30), ..options_of(Constraint::JsonObject(true), None) };
    let request = proto::GenerateRequest { options: Some(object), ..ask("", "x", 1) };
    assert!(client.generate(request).await.expect("a stream").text.starts_with('{'));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_to_is_refused_by_its_field() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |options| {
        let request = proto::GenerateRequest { options: Some(options), ..ask("", "x", 4) };
        let error = client.generate(request).await.expect_err("refused");
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        error
    };
    let of = |constraint| proto::GenerateOptions { max_new_tokens: Some(20), ..options_of(constraint, None) };
    let json = |text: &str| of(Constraint::JsonSchema(text.into()));
    expect_invalid(&refused(json("{")).await, "options.json_schema", &["JSON"]);
    expect_invalid(&refused(json("")).await, "options.json_schema", &["65536"]);
    expect_invalid(&refused(json(r#"{"uniqueItems": true}"#)).await, "options.json_schema", &["uniqueItems"]);
    expect_invalid(&refused(json(r#"{"items": {"not": {}}}"#)).await, "options.json_schema", &["#/items/not"]);
    expect_invalid(&refused(json(&" ".repeat(70_000))).await, "options.json_schema", &["70000", "65536"]);
    expect_invalid(&refused(of(Constraint::JsonObject(false))).await, "options.json_object", &["false"]);
    expect_invalid(&refused(of(Constraint::Regex("(".into()))).await, "options.regex", &["unclosed"]);
    // this base's vocabulary has no such character
    expect_invalid(&refused(of(Constraint::Regex("é".into()))).await, "options.regex", &["vocabulary"]);
    let choice =
        |texts: &[&str]| of(Constraint::Choice(proto::Choice { texts: texts.iter().map(|t| (*t).into()).collect() }));
    expect_invalid(&refused(choice(&[])).await, "options.choice.texts", &["1000"]);
    expect_invalid(&refused(choice(&["a", ""])).await, "options.choice.texts[1]", &["1024"]);
    expect_invalid(&refused(of(Constraint::LarkGrammar("start: x".into()))).await, "options.lark_grammar", &["x"]);
    // what does not go with it
    let beams = proto::GenerateOptions { num_beams: Some(2), ..of(Constraint::JsonObject(true)) };
    expect_invalid(&refused(beams).await, "options.num_beams", &["options.json_object"]);
    let endless = proto::GenerateOptions { ignore_eos: true, ..of(Constraint::JsonObject(true)) };
    expect_invalid(&refused(endless).await, "options.ignore_eos", &["options.json_object"]);
    // a character that cannot be spelled, in the middle of an output
    let stuck = of(Constraint::Regex("aéb".into()));
    expect_invalid(&refused(stuck).await, "options.constraint", &["vocabulary"]);
    assert_eq!(client.generate(ask("", "hello", 4)).await.expect("it still answers").ids.len(), 4);
    running.stop().await;
}
