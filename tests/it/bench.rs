//! `deltaserve bench` with the real binary: what it sends is what was asked for, what it counts is what happened.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::{folders::combination, support::*};

async fn bench(address: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltaserve"));
    command.arg("bench").args(args).env("DELTASERVE_SERVER", address);
    let done = tokio::task::spawn_blocking(move || command.output());
    timely("the run ends", done).await.expect("it is waited for").expect("it runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("a file of results")).expect("JSON")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Three deltas that generate, of two kinds, and a classifier.
async fn publish(world: &World, client: &Client) {
    client.upload("style-a", &world.delta(1)).await.expect("an upload");
    client.upload("style-b", &world.delta(2)).await.expect("an upload");
    client.upload("mixed", &combination(world, 3)).await.expect("an upload");
    client.upload("topic", &world.classifier(4, &["news", "sport"])).await.expect("an upload");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_loop_sends_the_mix_that_its_seed_says_and_counts_what_came() {
    let world = World::new();
    let running = world.start().await;
    publish(&world, &running.client).await;
    let address = format!("http://{}", running.server.grpc);
    let dir = tempfile::tempdir().expect("a folder");
    let (first, second, report) = (dir.path().join("a.json"), dir.path().join("b.json"), dir.path().join("report"));
    let mix = "generate=3,classify=1,score=1,embed=1";
    let workload = ["--requests", "60", "--op", mix, "--deltas", "style-*,mixed,topic", "--popularity", "zipf"];
    let lengths = ["--base-share", "0.2", "--prompt-tokens", "4..12", "-m", "3..6", "--seed", "7"];
    let limits = ["--slo-ttft-ms", "60000", "--slo-itl-ms", "60000", "--max-error-rate", "0"];
    let args = [&workload[..], &lengths, &limits].concat();
    let files = ["-c", "4", "--out", first.to_str().unwrap(), "--report", report.to_str().unwrap()];
    let done = bench(&address, &[&args[..], &files].concat()).await;
    assert!(done.status.success(), "{}", said(&done));
    let table = String::from_utf8(done.stdout).expect("UTF-8");
    for part in ["closed loop, 4 callers: 60 requests", "60 succeeded, 0 failed", "goodput: 100.0 %", "KIND OF DELTA"] {
        assert!(table.contains(part), "{part}: {table}");
    }

    let results = read(&first);
    let point = &results["points"][0];
    let all = &point["all"];
    assert_eq!([&all["requests"], &all["succeeded"], &all["failed"]].map(number), [60, 60, 0], "{all}");
    assert!(point["failures"].as_array().is_some_and(Vec::is_empty) && number(&point["cut"]) == 0);
    assert_eq!(number(&all["goodput"]["met"]), 60);
    // every request is of one operation, and of one kind; of a delta, or of the base
    let sum = |parts: &Value| parts.as_object().expect("parts").values().map(|f| number(&f["requests"])).sum::<u64>();
    assert_eq!((sum(&point["by_op"]), sum(&point["by_kind"])), (60, 60), "{point}");
    let by_op = point["by_op"].as_object().expect("operations");
    assert_eq!(by_op.keys().collect::<Vec<_>>(), ["generate", "classify", "embed", "score"], "{by_op:?}");
    let kinds: Vec<&String> = point["by_kind"].as_object().expect("kinds").keys().collect();
    let listed = running.client.list().await;
    assert!(kinds.iter().any(|kind| *kind == "base"));
    for delta in &listed {
        assert!(kinds.contains(&&delta.methods.join("+")), "{:?} is not in {kinds:?}", delta.methods);
    }
    let deltas = point["by_delta"].as_array().expect("deltas");
    let named: u64 = deltas.iter().map(|d| number(&d["requests"])).sum();
    assert!(named > 30 && named + number(&point["by_kind"]["base"]["requests"]) == 60, "{named}");
    let targets = results["targets"].as_array().expect("targets");
    let names: Vec<&str> = targets.iter().filter_map(|t| t["delta"].as_str()).collect();
    assert_eq!(names, ["style-a", "style-b", "mixed", "topic"]);
    // the classifier is all that classifies, and besides may be embedded with
    let classified = number(&by_op["classify"]["requests"]);
    let topic = deltas.iter().find(|d| number(&d["rank"]) == 4).expect("the classifier was asked");
    assert!(number(&topic["requests"]) >= classified && classified > 0);
    // tokens, as many as were asked for
    let generation = &by_op["generate"];
    let (requests, tokens) = (number(&generation["requests"]), number(&all["output_tokens"]));
    assert!((3 * requests..=6 * requests).contains(&tokens), "{tokens} tokens of {requests} requests");
    assert_eq!(number(&all["ttft_ms"]["count"]), requests);
    let between = number(&all["itl_ms"]["count"]);
    assert!(between > 0 && between <= tokens - requests, "{between} of {tokens}");
    assert!((4 * 60..=20 * 60).contains(&number(&all["input_tokens"])), "{}", all["input_tokens"]);
    // the server had no other load: each request of a delta found it or loaded it
    let server = &point["server"];
    assert_eq!(number(&server["hits"]) + number(&server["misses"]), named, "{server}");
    assert!(number(&server["misses"]) >= 4 && number(&server["peak_resident_bytes"]) > 0, "{server}");

    let page = fs::read_to_string(report.join("index.html")).expect("a report");
    for part in ["<!doctype html>", "<svg", "Time between tokens", "Latency by popularity", "style-a", "None."] {
        assert!(page.contains(part), "{part}");
    }

    // the same seed sends the same requests, whatever the number of callers
    let files = ["-c", "1", "--out", second.to_str().unwrap(), "--json"];
    let done = bench(&address, &[&args[..], &files].concat()).await;
    assert!(done.status.success(), "{}", said(&done));
    let printed: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(printed, read(&second), "what is printed is what is written");
    let again = &printed["points"][0];
    for figure in ["input_tokens", "output_tokens"] {
        assert_eq!(again["all"][figure], all[figure], "{figure}");
    }
    let counts = |point: &Value| -> Vec<(u64, u64)> {
        let deltas = point["by_delta"].as_array().expect("deltas");
        deltas.iter().map(|d| (number(&d["rank"]), number(&d["requests"]))).collect()
    };
    assert_eq!(counts(again), counts(point));

    let done = bench(&address, &["compare", first.to_str().unwrap(), second.to_str().unwrap(), "--json"]).await;
    assert!(done.status.success(), "{}", said(&done));
    let lines = String::from_utf8(done.stdout).expect("UTF-8");
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let rate = lines.iter().find(|l| l["figure"] == "requests/s").expect("a rate");
    let float = |value: &Value| value.as_f64().expect("a number");
    assert!((float(&rate["ratio"]) * float(&rate["a"]) - float(&rate["b"])).abs() < 1e-9, "{rate}");
    assert_eq!(float(&rate["a"]), float(&all["requests_per_second"]));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_keeps_its_rate_and_reads_the_servers_metrics() {
    let world = World::new();
    let spawned = world.spawn().await;
    publish(&world, &spawned.client).await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::write(path("prompts.txt"), "once upon\n\na time there was\n").expect("prompts");
    let (out, prompts, url) = (path("a.json"), path("prompts.txt"), format!("{}/metrics", spawned.http));
    let load = ["--rate", "20", "--arrivals", "uniform", "--duration", "2", "--warmup", "0.5", "--out", &out];
    let rest = ["--delta-prefix", "style-", "--popularity", "round-robin", "-m", "4", "--prompts", &prompts];
    let args = [&load[..], &rest, &["--metrics", &url, "--max-error-rate", "0"]].concat();
    let done = bench(&spawned.address, &args).await;
    assert!(done.status.success(), "{}", said(&done));
    let results = read(Path::new(&out));
    let point = &results["points"][0];
    // 20 a second for two seconds, by the clock; rounding may put one on either side
    let requests = number(&point["all"]["requests"]);
    assert!((39..=41).contains(&requests), "{requests}");
    assert_eq!(number(&point["all"]["succeeded"]), requests);
    assert_eq!(number(&point["all"]["output_tokens"]), 4 * requests);
    let seconds = point["seconds"].as_f64().expect("a time");
    assert!(seconds >= 2.0, "{seconds}");
    let counts: Vec<u64> =
        point["by_delta"].as_array().expect("deltas").iter().map(|d| number(&d["requests"])).collect();
    assert!(counts.len() == 2 && counts[0].abs_diff(counts[1]) <= 1, "{counts:?}");
    let tokens: u64 = point["course"].as_array().expect("a course").iter().map(|b| number(&b["output_tokens"])).sum();
    assert_eq!(tokens, 4 * requests);
    let metrics = point["server"]["metrics"].as_object().expect("metrics");
    let of = |name: &str| -> f64 {
        let values = metrics.iter().filter(|(key, _)| key.split('{').next() == Some(name));
        values.filter_map(|(_, value)| value.as_f64()).sum()
    };
    // the readings are a moment off the end of the warm-up
    assert!(of("deltaserve_requests_total") >= requests as f64 / 2.0, "{metrics:?}");
    assert!(of("deltaserve_step_seconds_count") > 0.0, "{metrics:?}");
    if cfg!(target_os = "linux") {
        let (now, peak) = (of("deltaserve_process_resident_bytes"), of("deltaserve_process_peak_resident_bytes"));
        assert!(now > 0.0 && peak >= now, "{now} {peak}");
    }

    // Poisson arrivals that no server could take: what is not sent is counted, by name, and fails a run that asks for it
    let args = ["--rate", "3000", "--requests", "60", "--max-in-flight", "1", "--deltas", "mixed", "--out", &out];
    let done = bench(&spawned.address, &args).await;
    assert!(done.status.success(), "{}", said(&done));
    let point = &read(Path::new(&out))["points"][0];
    let all = &point["all"];
    let (shed, succeeded) = (number(&all["shed"]), number(&all["succeeded"]));
    assert!(shed > 0 && succeeded > 0 && shed + succeeded == 60, "{all}");
    let failure = &point["failures"][0];
    assert_eq!((failure["reason"].as_str(), number(&failure["count"])), (Some("SHED_BY_CLIENT"), shed));
    let done = bench(&spawned.address, &[&args[..], &["--max-error-rate", "0"]].concat()).await;
    assert!(!done.status.success() && said(&done).contains("--max-error-rate"), "{}", said(&done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_has_a_point_per_load_and_tenants_have_their_own_deltas() {
    let world = World::new();
    let running = world.start().await;
    for (tenant, name, seed) in [("ada", "one", 1), ("ben", "two", 2), ("ben", "one", 3)] {
        running.client.tenant(tenant).upload(name, &world.delta(seed)).await.expect("an upload");
    }
    let address = format!("http://{}", running.server.grpc);
    let dir = tempfile::tempdir().expect("a folder");
    let report = dir.path().join("report");
    let args = ["--tenant", "ada,ben", "--deltas", "*", "--sweep", "concurrency=1,3", "--requests", "30", "-m", "2"];
    let args = [&args[..], &["--json", "--report", report.to_str().unwrap()]].concat();
    let done = bench(&address, &args).await;
    assert!(done.status.success(), "{}", said(&done));
    let results: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    let whose: Vec<(&str, &str)> = results["targets"]
        .as_array()
        .expect("targets")
        .iter()
        .map(|t| (t["tenant"].as_str().expect("a tenant"), t["delta"].as_str().expect("a delta")))
        .collect();
    assert_eq!(whose, [("ada", "one"), ("ben", "one"), ("ben", "two")]);
    let points = results["points"].as_array().expect("points");
    let callers: Vec<u64> = points.iter().map(|p| number(&p["load"]["concurrency"])).collect();
    assert_eq!(callers, [1, 3]);
    for point in points {
        assert_eq!(number(&point["all"]["succeeded"]), 30, "{point}");
        assert_eq!(point["by_delta"].as_array().map(Vec::len), Some(3), "each tenant's deltas are asked for");
    }
    let page = fs::read_to_string(report.join("index.html")).expect("a report");
    assert!(page.contains("All loads") && page.contains("Latency against throughput"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_named_and_what_fails_is_counted() {
    let world = World::new();
    let running = world.start().await;
    publish(&world, &running.client).await;
    let address = format!("http://{}", running.server.grpc);
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    fs::write(path("empty.jsonl"), "\n").expect("a file");
    let (empty, out) = (path("empty.jsonl"), path("out.json"));
    let bad: [(&[&str], &str); 9] = [
        (&["--rate", "0"], "--rate 0"),
        (&["--prompt-tokens", "gamma:2"], "unknown distribution"),
        (&["--deltas", "nobody"], "nobody"),
        (&["--delta-prefix", "none-"], "fits \"none-*\""),
        (&["--deltas", "topic"], "\"topic\" is for seq_cls"),
        (&["--deltas", "style-a", "--op", "generate,classify"], "--op classify"),
        (&["--prompt-tokens", "300"], "context has 256"),
        (&["--prompts", &empty], "has no texts"),
        (&["--metrics", "http://127.0.0.1:1/metrics"], "--metrics http://127.0.0.1:1"),
    ];
    for (args, expected) in bad {
        let done = bench(&address, args).await;
        assert!(!done.status.success() && said(&done).contains(expected), "{args:?}: {}", said(&done));
    }
    let done = bench("http://127.0.0.1:1", &[]).await;
    assert!(!done.status.success() && said(&done).contains("connect to a server"), "{}", said(&done));

    // the base has no head: every request fails, which is what the results say
    let done = bench(&address, &["--op", "classify", "--requests", "5", "-c", "2", "--out", &out]).await;
    assert!(!done.status.success() && said(&done).contains("no request succeeded"), "{}", said(&done));
    let point = &read(Path::new(&out))["points"][0];
    assert_eq!(number(&point["all"]["failed"]), 5, "{point}");
    let failure = &point["failures"][0];
    let parts =
        (failure["op"].as_str(), failure["code"].as_str(), failure["reason"].as_str(), number(&failure["count"]));
    assert_eq!(parts, (Some("classify"), Some("FailedPrecondition"), Some("WRONG_TASK"), 5));
    running.stop().await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_still_reports() {
    let world = World::long();
    let running = world.start().await;
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_deltaserve"))
        .args(["bench", "--duration", "3600", "-c", "2", "-m", "1..400", "--prompt-tokens", "4", "--out"])
        .arg(&out)
        .env("DELTASERVE_SERVER", format!("http://{}", running.server.grpc))
        .stdout(Stdio::null())
        .spawn()
        .expect("it runs");
    // some have ended, some are under way
    let residue = running.client.clone();
    eventually("it puts load on the server", async || residue.running().await == 2).await;
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    let told = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(told.success());
    let ended = timely("it ends early", tokio::task::spawn_blocking(move || child.wait())).await;
    let status = ended.expect("it is waited for").expect("it ends");
    let results = read(&out);
    let point = &results["points"][0];
    assert_eq!(point["interrupted"], true, "{point}");
    assert_eq!(status.success(), number(&point["all"]["succeeded"]) > 0, "{point}");
    assert!(number(&point["cut"]) >= 1 && number(&point["cut"]) <= 2, "{point}");
    assert_eq!(number(&point["all"]["failed"]), 0, "what was given up is no failure: {point}");
    eventually("the server is idle again", async || residue.running().await == 0).await;
    running.stop().await;
}
