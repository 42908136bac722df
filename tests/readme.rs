//! The README, tested: its marked snippets run against the real binary, and every flag it names exists.
//!
//! A snippet is marked in its fence: ` ```sh readme-test ` or ` ```python readme-test needs=grpc_tools `. They run in
//! the order of the text, in one scratch folder that has `adapters/` and `proto/` in it. A snippet whose `needs` this
//! machine lacks is printed as skipped, and so is everything if the bundled base is not there.
#![cfg(unix)]
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use regex::Regex;

const BINARY: &str = env!("CARGO_BIN_EXE_deltaserve");
const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const BASE: &str = "adapters/base/tiny-stories";
/// Where the README says that a server is; snippets get the test's own addresses instead.
const GRPC: &str = "127.0.0.1:50051";
const HTTP: &str = "127.0.0.1:9464";
const START: Duration = Duration::from_secs(120);
/// Flags of other programs that the text names.
const FOREIGN: [&str; 10] = [
    "--release",
    "--features",
    "--build",
    "--silent",
    "--python_out",
    "--grpc_python_out",
    "--help",
    "--bench",
    "--locked",
    "--version",
];

/// A fenced block.
struct Snippet {
    line: usize,
    language: String,
    tested: bool,
    needs: Option<String>,
    code: String,
}

fn readme() -> String {
    fs::read_to_string(Path::new(ROOT).join("README.md")).expect("README.md")
}

fn snippets(text: &str) -> Vec<Snippet> {
    let mut out = Vec::new();
    let mut open: Option<Snippet> = None;
    for (n, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), open.take()) {
            (Some(""), Some(snippet)) => out.push(snippet),
            (Some(info), None) => {
                let mut words = info.split_whitespace();
                let language = words.next().unwrap_or_default().to_owned();
                let words: Vec<&str> = words.collect();
                let needs = words.iter().find_map(|w| w.strip_prefix("needs=")).map(str::to_owned);
                let tested = words.contains(&"readme-test");
                open = Some(Snippet { line: n + 1, language, tested, needs, code: String::new() });
            }
            (_, Some(mut snippet)) => {
                snippet.code.push_str(line);
                snippet.code.push('\n');
                open = Some(snippet);
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a fence is not closed");
    out
}

/// A server in a scratch folder; killed with the test.
struct Server {
    child: Child,
    grpc: String,
    http: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(folder: &Path) -> Self {
        let mut command = Command::new(BINARY);
        command.args(["serve", "--base", BASE, "--adapters-dir", "adapters/samples", "--data-dir", "server-data"]);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json"]);
        // whatever else the machine does meanwhile
        command.args(["--train-nice", "0"]);
        command.current_dir(folder).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the server starts");
        let stderr = child.stderr.take().expect("its log is piped");
        let (found, addresses) = std::sync::mpsc::channel();
        // reads the log to its end, so that the server never waits for it
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                match event["message"].as_str() {
                    Some("ready") => {
                        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
                        let _ = found.send((text("grpc"), text("http")));
                    }
                    _ => eprintln!("server: {line}"),
                }
            }
        });
        let mut server = Self { child, grpc: String::new(), http: String::new() };
        let (grpc, http) = addresses.recv_timeout(START).expect("the server says where it listens");
        let address = Regex::new(r"\d+\.\d+\.\d+\.\d+:\d+").expect("a pattern");
        let first = |text: &str| address.find(text).map(|m| m.as_str().to_owned()).expect("an address");
        (server.grpc, server.http) = (first(&grpc), first(&http));
        server
    }
}

/// A scratch folder that looks like the repository to the snippets.
fn scratch() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for name in ["adapters", "proto"] {
        std::os::unix::fs::symlink(Path::new(ROOT).join(name), folder.path().join(name)).expect("a link");
    }
    folder
}

fn is_available(needs: &str) -> bool {
    let mut command = match needs {
        "grpc_tools" => {
            let mut python = Command::new("python3");
            python.args(["-c", "import grpc, grpc_tools"]);
            python
        }
        program => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("command -v {program}")]);
            shell
        }
    };
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

fn run(snippet: &Snippet, folder: &Path, server: &Server) -> Result<(), String> {
    let code = snippet.code.replace("cargo run --release --", "deltaserve");
    let code = code.replace(GRPC, &server.grpc).replace(HTTP, &server.http);
    let mut command = match snippet.language.as_str() {
        "sh" => {
            let mut shell = Command::new("sh");
            shell.args(["-e", "-c", &code]);
            shell
        }
        "python" => {
            let mut python = Command::new("python3");
            python.args(["-c", &code]);
            python
        }
        other => return Err(format!("no way to run {other:?}")),
    };
    let programs = Path::new(BINARY).parent().map(Path::to_path_buf).unwrap_or_default();
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(programs).chain(std::env::split_paths(&rest)));
    command.current_dir(folder).env("PATH", path.map_err(|e| e.to_string())?);
    command.env("DELTASERVE_SERVER", format!("http://{}", server.grpc)).stdin(Stdio::null());
    let done = command.output().map_err(|e| e.to_string())?;
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    println!("{out}{err}");
    if !done.status.success() {
        return Err(format!("{}\n{err}", done.status));
    }
    if out.trim().is_empty() { Err("it printed nothing".into()) } else { Ok(()) }
}

#[test]
fn marked_snippets_run_in_the_order_of_the_text() {
    if !Path::new(ROOT).join(BASE).join("model.safetensors").is_file() {
        println!("skipped: {BASE}/model.safetensors is not there");
        return;
    }
    let folder = scratch();
    let server = Server::start(folder.path());
    let mut problems = Vec::new();
    for snippet in snippets(&readme()).iter().filter(|s| s.tested) {
        let place = format!("README.md:{} ({})", snippet.line, snippet.language);
        if let Some(needs) = snippet.needs.as_ref().filter(|n| !is_available(n)) {
            println!("{place}: skipped: {needs} is not on this machine");
            continue;
        }
        let start = Instant::now();
        match run(snippet, folder.path(), &server) {
            Ok(()) => println!("{place}: ok in {:.1} s", start.elapsed().as_secs_f32()),
            Err(why) => problems.push(format!("{place}: {why}")),
        }
    }
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

/// Flags that the help of a command lists.
fn flags_of(command: &[&str]) -> Option<BTreeSet<String>> {
    let help = Command::new(BINARY).args(command).arg("--help").output().expect("the binary runs");
    help.status.success().then(|| flags_in(&String::from_utf8_lossy(&help.stdout)))
}

fn flags_in(text: &str) -> BTreeSet<String> {
    let flag = Regex::new(r"(?:^|[\s`\[(=])(--[a-z][a-z_-]*[a-z])").expect("a pattern");
    text.lines().flat_map(|line| flag.captures_iter(line).map(|c| c[1].to_owned()).collect::<Vec<_>>()).collect()
}

/// The command lines of the program in the shell snippets, one a line, with where they are.
fn command_lines(text: &str) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    for snippet in snippets(text).iter().filter(|s| s.language == "sh") {
        let code = snippet.code.replace("cargo run --release --", "deltaserve").replace("\\\n", " ");
        let lines = code.lines().filter_map(|l| l.trim().strip_prefix("deltaserve ").map(str::to_owned));
        out.extend(lines.map(|l| (snippet.line, l)));
    }
    out
}

#[test]
fn every_flag_in_the_readme_exists() {
    let text = readme();
    let mut known: BTreeMap<Vec<String>, BTreeSet<String>> = BTreeMap::new();
    let mut problems = Vec::new();
    for (line, command) in command_lines(&text) {
        let words: Vec<&str> = command.split_whitespace().collect();
        let nested = matches!(words.first(), Some(&("deltas" | "jobs" | "datasets" | "keys" | "tenants")));
        let name: Vec<String> = words.iter().take(1 + usize::from(nested)).map(|w| (*w).to_owned()).collect();
        if !known.contains_key(&name) {
            let args: Vec<&str> = name.iter().map(String::as_str).collect();
            let Some(flags) = flags_of(&args) else {
                problems.push(format!("README.md:{line}: no command {:?}", name.join(" ")));
                continue;
            };
            known.insert(name.clone(), flags);
        }
        for flag in flags_in(&command).difference(&known[&name]) {
            problems.push(format!("README.md:{line}: {} has no {flag}", name.join(" ")));
        }
    }
    let mut all: BTreeSet<String> = known.into_values().flatten().collect();
    for command in ["serve", "demo", "generate", "classify", "embed", "score", "train", "bench", "info"] {
        all.extend(flags_of(&[command]).unwrap_or_default());
    }
    for command in [["deltas", "merge"], ["tenants", "delete"]] {
        all.extend(flags_of(&command).unwrap_or_default());
    }
    all.extend(FOREIGN.map(str::to_owned));
    let unknown = flags_in(&text).difference(&all).cloned().collect::<Vec<_>>();
    problems.extend(unknown.iter().map(|flag| format!("README.md: no command has {flag}")));
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn the_test_sees_what_it_checks() {
    let text = "a\n```sh readme-test needs=curl\ndeltaserve serve --base x \\\n  --http off\n```\n";
    let text = &format!("{text}`--max-queue` (`--no-such`)\n");
    let found = snippets(text);
    assert_eq!((found.len(), found[0].line, found[0].tested), (1, 2, true));
    assert_eq!(found[0].needs.as_deref(), Some("curl"));
    assert_eq!(command_lines(text)[0].1, "serve --base x    --http off");
    let flags: Vec<String> = flags_in(text).into_iter().collect();
    assert_eq!(flags, ["--base", "--http", "--max-queue", "--no-such"]);
    let tested = snippets(&readme()).iter().filter(|s| s.tested).count();
    assert!(tested >= 5, "only {tested} snippets of the README are tested");
    assert!(PathBuf::from(BINARY).is_file());
}
