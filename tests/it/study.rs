//! `deltaserve study` on the bundled base, with the real binary: trained, scored, measured, reported, and not made twice.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::{Value, json};

use crate::support::timely;

async fn study(plan: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltaserve"));
    command.arg("study").arg("--plan").arg(plan).arg("--out").arg(out).args(more);
    let done = tokio::task::spawn_blocking(move || command.output());
    timely("the study ends", done).await.expect("it is waited for").expect("it runs")
}

fn results(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("results.jsonl")).expect("results");
    text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_are_compared_and_a_study_goes_on() {
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters");
    let dir = tempfile::tempdir().expect("a folder");
    // two kinds of text that a label tells apart; few rows, since the base is real
    let data = adapters.join("demo-data/text-kind");
    let rows = |file: &str, n: usize| {
        let text = fs::read_to_string(data.join(file)).expect("rows of the demo");
        text.lines().take(n).map(|l| format!("{l}\n")).collect::<String>()
    };
    fs::write(dir.path().join("train.jsonl"), rows("train.jsonl", 64)).expect("rows are written");
    fs::write(dir.path().join("test.jsonl"), rows("heldout.jsonl", 16)).expect("rows are written");
    let task = |name: &str| {
        json!({"name": name, "kind": "seq-cls", "train": "train.jsonl", "validation": 0.25, "test": "test.jsonl",
               "labels": data.join("labels.json"), "options": ["--max-length", "16", "--max-steps", "2"]})
    };
    let mut plan = json!({
        "title": "A small study",
        "bases": [{"name": "tiny", "path": adapters.join("base/tiny-stories")}],
        "tasks": [task("one"), task("two")],
        "methods": [{"name": "full", "options": ["--method", "full"]},
                    {"name": "lora", "options": ["--method", "lora", "--rank", "2"]}],
        "transfer": {"tasks": ["one", "two"], "method": "lora", "k": 2},
        "few_shot": {"tasks": ["one"], "methods": ["lora"], "k": [1, 2]},
        "memory": {"task": "one", "methods": ["full", "lora"], "batch_sizes": [2], "length": 16, "steps": 1},
    });
    let (path, out) = (dir.path().join("plan.json"), dir.path().join("out"));
    fs::write(&path, plan.to_string()).expect("the plan is written");

    let list = study(&path, &out, &["--list"]).await;
    let listed = String::from_utf8(list.stdout).expect("UTF-8");
    assert_eq!(listed.lines().count(), 12, "{listed}");
    assert!(listed.contains("todo main tiny one lora seed 0"), "{listed}");

    let done = study(&path, &out, &["--only", "one"]).await;
    assert!(done.status.success(), "{done:?}");
    assert!(results(&out).iter().all(|run| run.get("error").is_none()), "{:#?}", results(&out));
    let done = study(&path, &out, &[]).await;
    assert!(done.status.success(), "{done:?}");
    let all = results(&out);
    assert_eq!(all.len(), 12, "no run is made twice");
    for run in &all {
        assert!(run.get("error").is_none(), "{run}");
        if run["part"] == "memory" {
            assert!(run["added_bytes"].as_u64().expect("bytes") > 0, "{run}");
        } else {
            let accuracy = run["figures"]["accuracy"].as_f64().expect("an accuracy");
            assert!((0.0..=1.0).contains(&accuracy) && (accuracy * 16.0).fract() == 0.0, "{run}");
            assert_eq!(run["steps"], 2, "{run}");
            // a share of a few examples validates nothing
            let points = run.get("curve").and_then(Value::as_array).map_or(0, Vec::len);
            assert_eq!(points, if run["part"] == "main" { 2 } else { 0 }, "{run}");
        }
    }
    let trained = |method: &str| {
        let run = all.iter().find(|r| r["part"] == "main" && r["method"] == method).expect("a run");
        run["trainable"].as_u64().expect("a number")
    };
    assert!(trained("lora") * 50 < trained("full"));
    let added = |method: &str| {
        let run = all.iter().find(|r| r["part"] == "memory" && r["method"] == method).expect("a run");
        run["added_bytes"].as_u64().expect("a number")
    };
    assert!(added("lora") * 2 < added("full"), "{} {}", added("lora"), added("full"));
    let report = fs::read_to_string(out.join("REPORT.md")).expect("a report");
    let parts =
        ["# A small study", "## Scores: tiny", "| lora |", "## Convergence", "## Memory", "## Few", "## Transfer"];
    for part in parts {
        assert!(report.contains(part), "{part}: {report}");
    }
    for chart in report.lines().filter_map(|l| l.strip_prefix("![")?.split_once("](")?.1.strip_suffix(')')) {
        assert!(fs::read_to_string(out.join(chart)).expect("a chart").contains("<svg"), "{chart}");
    }

    // other options are other runs; one that cannot be is told and does not end the study
    plan["methods"][1]["options"] = json!(["--method", "lora", "--rank", "3"]);
    plan["methods"].as_array_mut().expect("a list").push(json!({"name": "bad", "options": ["--targets", "none"]}));
    fs::write(&path, plan.to_string()).expect("the plan is written");
    let done = study(&path, &out, &["--only", "^main .* one"]).await;
    assert!(done.status.success(), "{done:?}");
    let all = results(&out);
    assert_eq!(all.len(), 14);
    assert!(all[13]["error"].as_str().expect("an error").contains("none"), "{}", all[13]);
    let report = fs::read_to_string(out.join("REPORT.md")).expect("a report");
    assert!(report.contains("## Runs that failed") && !report.contains("## Transfer"), "{report}");

    let list = study(&path, &out, &["--only", "nothing like it"]).await;
    assert!(!list.status.success() && String::from_utf8_lossy(&list.stderr).contains("no run that matches"));
}
