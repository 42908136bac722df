//! `deltaserve classify --file`: rows in, rows with predictions out, in order, scored.

use std::{
    fs,
    process::{Command, Output},
};

use deltaserve::grpc::proto;
use serde_json::{Value, json};

use crate::support::*;

/// The real binary against a server of this process.
pub(crate) async fn cli(running: &Running, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltaserve"));
    command.args(args).env("DELTASERVE_SERVER", format!("http://{}", running.server.grpc));
    let done = tokio::task::spawn_blocking(move || command.output());
    timely("the command ends", done).await.expect("it is waited for").expect("it runs")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_a_file_get_the_predictions_of_the_api_in_order() {
    let world = World::encoder();
    let running = world.start().await;
    running.client.upload("kinds", &world.classifier(3, &["a", "b", "c"])).await.expect("an upload");
    let texts: Vec<String> = (0..90).map(|i| format!("row {i} {}", "\u{e9}\u{1f600}x".repeat(i % 7))).collect();
    let mut expected = Vec::new();
    for text in &texts {
        let reply = running.client.classify("kinds", &[text]).await.expect("a reply");
        expected.push(reply.results[0].labels[0].label.clone());
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (from, to) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let mut rows: Vec<Value> = texts.iter().map(|t| json!({"id": [t.len()], "text": t, "label": "a"})).collect();
    rows.push(json!({"text": " ", "label": null}));
    rows.push(json!({"text": "x".repeat(2000)}));
    fs::write(&from, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).expect("rows are written");
    let args = ["classify", "-d", "kinds", "--file", from.to_str().unwrap(), "--out", to.to_str().unwrap(), "--json"];
    let done = cli(&running, &args).await;
    assert!(done.status.success(), "{done:?}");
    let out = lines(&fs::read_to_string(&to).expect("an output"));
    assert_eq!(out.len(), rows.len());
    for ((row, out), expected) in rows.iter().zip(&out).zip(&expected) {
        assert_eq!((&out["id"], &out["text"], &out["label"]), (&row["id"], &row["text"], &row["label"]));
        assert_eq!(out["prediction"], *expected);
        let sum: f64 = out["probabilities"].as_object().expect("by label").values().filter_map(Value::as_f64).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{out}");
    }
    assert_eq!(out[90]["prediction"], Value::Null);
    assert!(out[91]["prediction"].is_string(), "a text over the context is cut");
    let scores = &lines(&String::from_utf8(done.stdout).expect("UTF-8"))[0];
    let right = expected.iter().filter(|e| *e == "a").count() as f64 / 90.0;
    assert_eq!((&scores["rows"], &scores["scored"], &scores["cut"]), (&json!(92), &json!(90), &json!(1)));
    assert!((scores["accuracy"].as_f64().expect("a number") - right).abs() < 1e-9, "{scores}");

    fs::write(&from, "{\"text\": \"a\"}\n{\"text\": 7}\n").expect("rows are written");
    let bad = cli(&running, &["classify", "-d", "kinds", "--file", from.to_str().unwrap()]).await;
    assert!(!bad.status.success() && bad.stdout.is_empty());
    assert!(String::from_utf8_lossy(&bad.stderr).contains("line 2: text is not a string"), "{bad:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn words_of_a_file_get_one_tag_each() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let line =
        |i: usize| json!({"tokens": ["at", "Rome", "x".repeat(i % 5 + 1)], "labels": ["O", "B-place", "I-place"]});
    let jsonl: String = (0..16).map(|i| format!("{}\n", line(i))).collect();
    let mut spec = spec("tags", proto::Task::TokenCls, jsonl.clone(), 20);
    spec.hyper.as_mut().expect("hyper").learning_rate = Some(0.01);
    let job = client.create_job(spec, "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), proto::JobState::Succeeded);
    let dir = tempfile::tempdir().expect("a folder");
    let from = dir.path().join("in.jsonl");
    let odd =
        [json!({"tokens": []}), json!({"text": "at Rome"}), json!({"tokens": ["", "\u{200b}\u{301}"], "tags": [0, 1]})];
    let rows = jsonl + &odd.iter().map(|r| format!("{r}\n")).collect::<String>();
    fs::write(&from, rows).expect("rows are written");
    let done = cli(&running, &["classify", "-d", "tags", "--file", from.to_str().unwrap()]).await;
    assert!(done.status.success(), "{done:?}");
    let out = lines(&String::from_utf8(done.stdout).expect("UTF-8"));
    let tags = |row: &Value| row["prediction"].as_array().map(Vec::len);
    assert!(out[..16].iter().all(|row| tags(row) == Some(3)));
    assert_eq!(out[0]["prediction"], json!(["O", "B-place", "I-place"]), "what was learned is said");
    assert_eq!((tags(&out[16]), tags(&out[17]), tags(&out[18])), (Some(0), Some(2), Some(2)));
    assert_eq!((&out[17]["tokens"], &out[18]["prediction"][0]), (&json!(["at", "Rome"]), &json!("O")));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("19 rows, 17 with gold") && said.contains("span_f1"), "{said}");
    running.stop().await;
}
