//! `deltaserve generate --file`: rows in, rows with continuations out, in order, scored against their references.

use std::fs;

use serde_json::{Value, json};

use crate::{classify_file::cli, support::*};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_file_get_the_texts_of_the_api_in_order_and_scores() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    let prompts: Vec<String> = (0..20).map(|i| format!("row {i} {}", "once ".repeat(i % 7))).collect();
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(client.text("style", prompt, 20).await);
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (from, to) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let row = |(i, (prompt, text)): (usize, (&String, &String))| match i % 4 {
        0 => json!({"id": i, "prompt": prompt, "completion": text}),
        1 => json!({"id": i, "prompt": prompt, "completion": ["something else", text]}),
        2 => json!({"id": i, "prompt": prompt, "completion": "something else"}),
        _ => json!({"id": i, "prompt": prompt}),
    };
    let mut rows: Vec<Value> = prompts.iter().zip(&expected).enumerate().map(row).collect();
    let write = |rows: &[Value]| {
        fs::write(&from, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).expect("rows are written");
    };
    write(&rows);
    let options = ["--ignore-eos", "-m", "20", "--json", "--in-flight", "5"];
    let files = ["generate", "-d", "style", "--file", from.to_str().unwrap(), "--out", to.to_str().unwrap()];
    let done = cli(&running, &[&files[..], &options[..]].concat()).await;
    assert!(done.status.success(), "{done:?}");
    let out = lines(&fs::read_to_string(&to).expect("an output"));
    assert_eq!(out.len(), rows.len());
    for ((row, out), expected) in rows.iter().zip(&out).zip(&expected) {
        assert_eq!((&out["id"], &out["prompt"], &out["prediction"]), (&row["id"], &row["prompt"], &json!(expected)));
    }
    let scores = &lines(&String::from_utf8(done.stdout).expect("UTF-8"))[0];
    let counts = ["rows", "failed", "scored", "cut"].map(|name| scores[name].as_u64());
    assert_eq!(counts, [Some(20), Some(0), Some(15), Some(20)]);
    let exact = scores["exact_match"].as_f64().expect("a number");
    assert!((exact - 10.0 / 15.0).abs() < 1e-9, "{scores}");
    assert!(["bleu", "rouge_l"].iter().all(|name| scores[*name].is_f64()), "{scores}");

    // a row that is refused alone is named, and the others are written all the same
    rows.truncate(3);
    rows.insert(1, json!({"prompt": "x".repeat(300), "completion": "y"}));
    write(&rows);
    let done = cli(&running, &[&files[..], &options[..]].concat()).await;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("line 2: ") && said.contains("1 of 4 rows failed"), "{said}");
    let out = lines(&fs::read_to_string(&to).expect("an output"));
    assert_eq!((out.len(), &out[1]["prediction"], &out[3]["prediction"]), (4, &Value::Null, &json!(expected[2])));
    assert!(out[1]["error"].as_str().is_some_and(|e| e.contains("context")), "{}", out[1]);
    let scores = &lines(&String::from_utf8(done.stdout).expect("UTF-8"))[0];
    assert_eq!((&scores["failed"], &scores["scored"]), (&json!(1), &json!(3)));

    // what concerns all rows, or a line that cannot be read, leaves the output as it was
    let before = fs::read(&to).expect("an output");
    let unknown = cli(&running, &["generate", "-d", "nobody", "-f", files[4], "-o", files[6]]).await;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("DELTA_NOT_FOUND"), "{unknown:?}");
    let bad = cli(&running, &["generate", "-f", files[4], "-o", files[6], "--top-p", "7"]).await;
    assert!(String::from_utf8_lossy(&bad.stderr).contains("top_p"), "{bad:?}");
    fs::write(&from, "{\"prompt\": \"a\"}\n{\"prompt\": 7}\n").expect("rows are written");
    let unread = cli(&running, &files).await;
    assert!(String::from_utf8_lossy(&unread.stderr).contains("line 2: prompt is not a string"), "{unread:?}");
    assert!([unknown, bad, unread].iter().all(|done| !done.status.success()));
    assert_eq!(fs::read(&to).expect("an output"), before);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_of_a_file_are_messages_after_a_system_message_where_a_chat_is_asked_for() {
    let world = World::new();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}";
    let base = std::path::Path::new(&world.config.base.source);
    fs::write(base.join("chat_template.jinja"), template).expect("a template is written");
    let running = world.start().await;
    let dir = tempfile::tempdir().expect("a folder");
    let from = dir.path().join("in.jsonl");
    let rows = [
        json!({"prompt": "hello"}),
        json!({"messages": [{"role": "user", "content": "hello"}]}),
        json!({"messages": [{"role": "system", "content": "long"}, {"role": "user", "content": "hello"}]}),
    ];
    let write = |rows: &[Value]| {
        fs::write(&from, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).expect("rows are written");
    };
    let ask = async |more: &[&str]| {
        let asked = ["generate", "-f", from.to_str().unwrap(), "-m", "16", "--ignore-eos"];
        cli(&running, &[&asked[..], more].concat()).await
    };
    let said = |done: &std::process::Output| -> Vec<String> {
        assert!(done.status.success(), "{done:?}");
        let all = lines(&String::from_utf8(done.stdout.clone()).expect("UTF-8"));
        all.iter().map(|row| row["prediction"].as_str().expect("a text").to_owned()).collect()
    };
    let mut expected = Vec::new();
    for rendered in ["hello", "user: hello;", "system: brief;user: hello;", "system: long;user: hello;"] {
        expected.push(running.client.text("", rendered, 16).await);
    }
    let of = |all: [usize; 3]| all.map(|i| expected[i].clone());
    assert!(expected[1] != expected[2] && expected[2] != expected[3], "or nothing is shown");
    write(&rows);
    assert_eq!(said(&ask(&[]).await), of([0, 1, 3]));
    assert_eq!(said(&ask(&["--chat"]).await), of([1, 1, 3]));
    assert_eq!(said(&ask(&["--chat", "--system", "brief"]).await), of([2, 2, 3]));
    let plain = ask(&["--system", "brief"]).await;
    let error = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(!plain.status.success() && error.contains("line 1: has a prompt") && error.contains("--chat"), "{error}");
    write(&rows[1..]);
    assert_eq!(said(&ask(&["--system", "brief"]).await), [expected[2].clone(), expected[3].clone()]);
    running.stop().await;
}
