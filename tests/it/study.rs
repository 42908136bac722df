//! `deltaserve study` on the bundled base, with the real binary: trained, scored, measured, reported, and not made twice.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use deltaserve::grpc::proto;
use serde_json::{Value, json};

use crate::{
    classify_file::cli,
    support::{Running, World, spec, stories, timely},
};

async fn study(plan: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltaserve"));
    command.arg("study").arg("--plan").arg(plan).arg("--out").arg(out).args(more).env("RAYON_NUM_THREADS", "2");
    let done = tokio::task::spawn_blocking(move || command.output());
    timely("the study ends", done).await.expect("it is waited for").expect("it runs")
}

fn results(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("results.jsonl")).expect("results");
    text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

/// The bundled base and data.
fn adapters() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters")
}

/// The first rows of a file.
fn rows(file: &Path, n: usize) -> String {
    let text = fs::read_to_string(file).expect("rows of the demo");
    text.lines().take(n).map(|l| format!("{l}\n")).collect()
}

/// A server on the store of a study that does not run, for its tenant.
async fn on_store(out: &Path) -> Running {
    let mut world = World::new();
    world.config.base.source = adapters().join("base/tiny-stories").display().to_string();
    world.config.data_dir = out.join("store/tiny");
    let mut running = world.start().await;
    running.client = running.client.tenant("study");
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_are_compared_and_a_study_goes_on() {
    let dir = tempfile::tempdir().expect("a folder");
    // two kinds of text that a label tells apart; few rows, since the base is real
    let data = adapters().join("demo-data/text-kind");
    fs::write(dir.path().join("train.jsonl"), rows(&data.join("train.jsonl"), 64)).expect("rows are written");
    fs::write(dir.path().join("test.jsonl"), rows(&data.join("heldout.jsonl"), 16)).expect("rows are written");
    let task = |name: &str| {
        json!({"name": name, "kind": "seq-cls", "train": "train.jsonl", "validation": 0.25, "test": "test.jsonl",
               "labels": data.join("labels.json"), "options": ["--max-length", "16", "--max-steps", "2"]})
    };
    let mut plan = json!({
        "title": "A small study",
        "bases": [{"name": "tiny", "path": adapters().join("base/tiny-stories")}],
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
        assert_eq!(run["threads"], 2, "{run}");
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
    let parts = [
        "# A small study",
        "## Scores: tiny",
        "| lora |",
        "## Convergence",
        "## Memory",
        "## Few",
        "## Transfer",
        "Threads: 2 in 4.",
    ];
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

    let running = on_store(&out).await;
    let request = running.client.request(proto::ListDatasetsRequest::default());
    let left = running.client.training().list_datasets(request).await.expect("a list").into_inner().datasets;
    assert!(left.is_empty(), "also a job that was refused leaves no data: {left:?}");
    running.stop().await;

    let list = study(&path, &out, &["--only", "nothing like it"]).await;
    assert!(!list.status.success() && String::from_utf8_lossy(&list.stderr).contains("no run that matches"));
}

#[tokio::test(flavor = "multi_thread")]
async fn continuations_are_scored_as_generate_scores_a_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let data = adapters().join("demo-data");
    let file = |name: &str| dir.path().join(name);
    fs::write(file("cards.jsonl"), rows(&data.join("cards/train.jsonl"), 16)).expect("rows are written");
    // one reference is what the base says itself, so that no score is zero
    let running = on_store(&dir.path().join("out")).await;
    let mut test: Vec<Value> =
        rows(&data.join("cards/heldout.jsonl"), 4).lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let options = ["--max-new-tokens", "12", "--num-beams", "2", "--ignore-eos"];
    let written = |test: &[Value]| {
        fs::write(file("test.jsonl"), test.iter().map(|r| format!("{r}\n")).collect::<String>()).expect("rows");
    };
    written(&test);
    let (from, said) = (file("test.jsonl").display().to_string(), file("said.jsonl").display().to_string());
    let asked = [&["generate", "--json", "-f", &from, "-o", &said][..], &options].concat();
    let done = cli(&running, &asked).await;
    assert!(done.status.success(), "{done:?}");
    let first = fs::read_to_string(&said).expect("an output");
    let first: Value = serde_json::from_str(first.lines().next().expect("a row")).expect("JSON");
    test[0]["completion"] = json!(["something else", first["prediction"]]);
    written(&test);
    let done = cli(&running, &asked).await;
    let expected: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    running.stop().await;

    // a step so small that the delta is still the base
    let plan = json!({
        "title": "Cards",
        "bases": [{"name": "tiny", "path": adapters().join("base/tiny-stories")}],
        "tasks": [
            {"name": "cards", "kind": "causal-lm", "train": "cards.jsonl", "test": "test.jsonl", "generate": options,
             "metric": "bleu", "validation": 0.25,
             "options": ["--max-length", "64", "--max-steps", "1", "--lr", "1e-12"]},
            {"name": "style", "kind": "causal-lm", "train": data.join("style/train.jsonl"), "test": "cards.jsonl"},
        ],
        "methods": [{"name": "lora", "options": ["--rank", "2"]}],
        "baseline": "lora",
        "memory": {"task": "style", "methods": ["lora"], "batch_sizes": [2], "length": 24, "steps": 2},
    });
    let (path, out) = (file("plan.json"), file("out"));
    fs::write(&path, plan.to_string()).expect("the plan is written");
    let done = study(&path, &out, &["--only", "^memory|^main .* cards"]).await;
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let all = results(&out);
    assert!(all.len() == 2 && all.iter().all(|run| run.get("error").is_none()), "{all:#?}");
    // rows of many lengths, the most of them longer: examples of one length all the same
    assert!(all[0]["part"] == "memory" && all[0]["added_bytes"].as_u64().is_some_and(|b| b > 0), "{}", all[0]);
    let figures = &all[1]["figures"];
    for name in ["exact_match", "bleu", "rouge_l"] {
        assert_eq!(figures[name], expected[name], "{figures} {expected}");
    }
    assert_eq!(figures["exact_match"], 0.25, "{figures}");
    let bleu = figures["bleu"].as_f64().expect("a number");
    assert!(bleu > 1.0 && figures["perplexity"].as_f64().is_some_and(|p| p > 1.0), "{figures}");
    assert!(said.contains(&format!("bleu {bleu:.1} (")), "points, not a share: {said}");
    assert_eq!(all[1]["curve"].as_array().map(Vec::len), Some(1), "perplexity of the validation rows: {}", all[1]);
    let report = fs::read_to_string(out.join("REPORT.md")).expect("a report");
    let row = format!("| {bleu:.1} |");
    for part in ["cards (bleu)", "## Generation", "--num-beams 2", "| 25.0 |", &row, "Runs: 1 of 2 with seed 0."] {
        assert!(report.contains(part), "{part}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_study_ends_the_job_in_which_it_was_stopped() {
    let dir = tempfile::tempdir().expect("a folder");
    let data = adapters().join("demo-data/text-kind");
    let out = dir.path().join("out");
    let running = on_store(&out).await;
    let left = running.client.create_job(spec("left", proto::Task::CausalLm, stories(8), 100_000), "").await;
    let left = left.expect("a job").id;
    running.client.upload_dataset("left", &stories(4)).await;
    running.stop().await;
    fs::write(dir.path().join("rows.jsonl"), rows(&data.join("train.jsonl"), 16)).expect("rows are written");
    let plan = json!({
        "title": "Again",
        "bases": [{"name": "tiny", "path": adapters().join("base/tiny-stories")}],
        "tasks": [{"name": "one", "kind": "seq-cls", "train": "rows.jsonl", "test": "rows.jsonl",
                   "options": ["--max-length", "8", "--max-steps", "1"]}],
        "methods": [{"name": "lora", "options": ["--rank", "2"]}],
    });
    fs::write(dir.path().join("plan.json"), plan.to_string()).expect("the plan is written");
    let done = study(&dir.path().join("plan.json"), &out, &[]).await;
    assert!(done.status.success(), "{done:?}");
    assert!(results(&out)[0].get("error").is_none(), "{:?}", results(&out));
    let running = on_store(&out).await;
    assert_eq!(running.client.job(&left).await.expect("a job").state(), proto::JobState::Cancelled);
    let request = running.client.request(proto::ListDatasetsRequest::default());
    let datasets = running.client.training().list_datasets(request).await.expect("a list").into_inner().datasets;
    assert!(datasets.is_empty(), "{datasets:?}");
    running.stop().await;
}
