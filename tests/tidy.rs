//! The structure, checked: who may import whom, which crate lives where, module docs, file lengths. A rule is a row of a
//! table; a broken rule names the file and line.

#![allow(clippy::expect_used, reason = "helpers of tests, outside the functions that clippy takes for tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Module of `src/` -> modules of ours that it may name. `main`, `app` and `cli` may name everything.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("failpoint", &[]),
    ("ids", &[]),
    ("rows", &[]),
    ("pacing", &[]),
    ("shutdown", &[]),
    ("measures", &[]),
    ("telemetry", &[]),
    ("access", &["ids", "telemetry"]),
    ("audit", &["telemetry"]),
    ("ops", &[]),
    ("delta", &["ids", "rows", "ops"]),
    ("merge", &["ops", "delta"]),
    ("kv", &["ids", "rows", "ops", "delta"]),
    ("nn", &["delta", "kv", "rows", "ops", "pacing"]),
    ("model", &["nn", "delta", "kv", "rows", "ops", "ids", "pacing"]),
    ("hub", &["ids"]),
    ("interop", &["model", "delta", "ids", "admission"]),
    ("store", &["failpoint", "ids", "delta", "telemetry", "admission"]),
    ("registry", &["failpoint", "ids", "delta", "merge", "store", "telemetry", "admission"]),
    ("text", &["admission"]),
    ("engine", &["model", "nn", "delta", "kv", "rows", "ids", "ops", "pacing", "admission"]),
    ("grammar", &["text", "engine", "admission"]),
    (
        "train",
        &[
            "failpoint",
            "model",
            "nn",
            "delta",
            "kv",
            "rows",
            "ops",
            "ids",
            "store",
            "pacing",
            "admission",
            "measures",
            "merge",
        ],
    ),
    (
        "admission",
        &[
            "audit",
            "engine",
            "grammar",
            "train",
            "registry",
            "store",
            "text",
            "interop",
            "model",
            "delta",
            "merge",
            "kv",
            "ids",
            "shutdown",
            "pacing",
            "telemetry",
        ],
    ),
    ("grpc", &["access", "admission", "audit", "delta", "ids", "shutdown", "telemetry"]),
    ("http", &["admission", "ids", "shutdown", "telemetry"]),
    ("config", &["access", "audit", "grpc", "ids", "ops", "store", "telemetry"]),
];

/// What floors below `admission` may name of it: the domain types and their pure checks, never the service.
const DOMAIN_TYPES: &[&str] =
    &["params", "eval_metric", "classify_params", "train_params", "catalog_params", "jobs", "check"];

/// The floors above `admission`: they call its service.
const ABOVE_ADMISSION: &[&str] = &["admission", "grpc", "http", "cli", "app", "main.rs", "lib.rs"];

/// Everything may be named from here.
const ROOTS: &[&str] = &["main.rs", "lib.rs", "cli", "app", "fuzzing.rs", "fuzzing"];

/// Crate -> the only places in `src/` that may name it.
const CRATE_ONLY_IN: &[(&str, &[&str])] = &[
    ("tonic", &["grpc", "cli"]),
    ("tonic_types", &["grpc", "cli"]),
    ("tonic_health", &["grpc"]),
    ("tonic_reflection", &["grpc"]),
    ("prost", &["grpc"]),
    ("prost_types", &["grpc"]),
    ("axum", &["http"]),
    ("rustls", &["access/tls.rs", "access/mod.rs"]),
    ("tokio_rustls", &["grpc/incoming.rs"]),
    ("jsonwebtoken", &["access/tokens.rs"]),
    ("x509_parser", &["access"]),
    ("subtle", &["access"]),
    ("clap", &["cli", "config.rs", "config/access.rs", "config/args.rs", "config/tests.rs", "main.rs", "telemetry.rs"]),
    ("anyhow", &["cli", "app", "main.rs"]),
    ("fail", &["failpoint.rs"]),
    ("sqlx", &["store"]),
    ("object_store", &["store"]),
    ("rustix", &["store", "pacing/clock.rs"]),
    ("moka", &["registry"]),
    ("llguidance", &["grammar"]),
    ("minijinja", &["text"]),
    ("tokenizers", &["text", "train/encode.rs", "app/base.rs"]),
    ("hf_hub", &["hub.rs"]),
    ("metrics_exporter_prometheus", &["telemetry.rs", "http", "app"]),
    ("indicatif", &["cli"]),
    ("plotters", &["cli/chart.rs"]),
    ("rand_distr", &["cli/bench"]),
    ("hyper_util", &["cli/bench"]),
    ("http_body_util", &["cli/bench"]),
];

/// Places that must not name a crate whose name begins with this.
const NEVER_IN: &[(&str, &[&str])] = &[
    (
        "candle",
        &[
            "engine/scheduler.rs",
            "engine/sequence.rs",
            "kv/pool.rs",
            "registry/catalog.rs",
            "registry/budget.rs",
            "access",
            "admission",
            "grpc",
            "http",
            "cli",
            "text",
        ],
    ),
    // heavy work reaches the async side only through spawn_blocking and the engine
    ("rayon", &["admission", "grpc", "http", "registry", "store"]),
    ("tokio", &["ops", "delta", "nn", "model", "kv", "rows.rs", "ids.rs"]),
];

/// Where `unsafe` may stand: what instructions and system calls need is in `ops`, and nothing else is, but for these.
const UNSAFE_IN: &[(&str, &str)] = &[
    ("ops", "instructions, system calls, outputs that are written before they are read"),
    ("model/weights.rs", "maps the operator's checkpoint"),
    ("model/gguf/mod.rs", "maps the operator's checkpoint"),
    ("app/base.rs", "asks whether there is a CUDA driver"),
    ("main.rs", "sets variables of the environment before there are threads"),
];
/// How many lines above an `unsafe` its reason may stand.
const REASON_ABOVE: usize = 6;

const MAX_LINES: usize = 500;
/// Longer files, with the reason.
const LONGER: &[(&str, &str)] = &[];

struct Source {
    /// Below `src/`, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// The module at the top: `grpc` of `grpc/status.rs`, `ids` of `ids.rs`.
    fn top(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// A file of unit tests: it may reach over floors to build what it tests.
    fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        let folder = ["/tests/", "/laws/"].iter().any(|f| self.path.contains(f));
        folder || name.ends_with("tests.rs") || name.ends_with("laws.rs")
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|p| self.path == *p || self.path.strip_prefix(p).is_some_and(|rest| rest.starts_with('/')))
    }

    /// Lines of code before the unit tests, numbered from 1, comments left out; `mod tests;` may stand anywhere.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines: Vec<&str> = self.text.lines().collect();
        let for_tests = |i: usize| lines.get(i).is_some_and(|line| line.starts_with("#[cfg(test)]"));
        let opens = |i: usize| for_tests(i) && lines.get(i + 1).is_some_and(|l| l.contains("mod ") && l.ends_with('{'));
        let end = (0..lines.len()).find(|&i| opens(i)).unwrap_or(lines.len());
        let kept: Vec<(usize, &str)> =
            (0..end).filter(|&i| !for_tests(i) && (i == 0 || !for_tests(i - 1))).map(|i| (i + 1, lines[i])).collect();
        kept.into_iter()
            .map(|(n, line)| (n, line.split("//").next().unwrap_or_default()))
            .filter(|(_, line)| !line.trim().is_empty())
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let read = |path: PathBuf| Source {
        path: path.strip_prefix(&root).expect("below src").to_string_lossy().replace('\\', "/"),
        text: fs::read_to_string(&path).expect("a readable source"),
    };
    files.into_iter().map(read).collect()
}

fn collect(folder: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Modules of ours named after `crate::` or in a `crate::{...}` group.
fn named_modules(source: &Source) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    let mut depth_in_group: Option<i32> = None;
    for (n, line) in source.code() {
        let mut rest = line;
        if let Some(depth) = &mut depth_in_group {
            scan_group(line, depth, n, &mut out);
            if *depth <= 0 {
                depth_in_group = None;
            }
            continue;
        }
        while let Some(at) = rest.find("crate::") {
            rest = &rest[at + "crate::".len()..];
            if let Some(group) = rest.strip_prefix('{') {
                let mut depth = 1;
                scan_group(group, &mut depth, n, &mut out);
                if depth > 0 {
                    depth_in_group = Some(depth);
                }
                break;
            }
            out.push((n, identifier(rest)));
        }
    }
    out
}

/// Names at depth 1 of `{a::b, c::{d}}`; updates the depth.
fn scan_group(text: &str, depth: &mut i32, n: usize, out: &mut Vec<(usize, String)>) {
    let mut at_start = true;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if *depth <= 0 {
            return;
        }
        match c {
            '{' => *depth += 1,
            '}' => *depth -= 1,
            ',' => at_start = *depth == 1,
            c if c.is_whitespace() => {}
            _ => {
                let name = identifier(rest);
                if at_start && *depth == 1 && !name.is_empty() {
                    out.push((n, name.clone()));
                }
                at_start = false;
                if !name.is_empty() {
                    rest = &rest[name.len()..];
                    continue;
                }
            }
        }
        rest = &rest[c.len_utf8()..];
    }
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Whether code names the crate: `tonic::`, `use tonic;`, `extern crate tonic`.
fn names_crate(line: &str, accept: impl Fn(&str) -> bool) -> bool {
    let mut rest = line;
    let mut before = ' ';
    while !rest.is_empty() {
        let name = identifier(rest);
        if name.is_empty() {
            before = rest.chars().next().unwrap_or(' ');
            rest = &rest[before.len_utf8()..];
            continue;
        }
        let after = &rest[name.len()..];
        if after.starts_with("::") && before != ':' && accept(&name) {
            return true;
        }
        before = name.chars().last().unwrap_or(' ');
        rest = after;
    }
    false
}

fn none_of(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn modules_import_only_from_lower_floors() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|s| !s.is_in(ROOTS) && !s.is_test()) {
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(module, _)| *module == source.top()) else {
            problems.push(format!("src/{}: {} has no row in MAY_IMPORT", source.path, source.top()));
            continue;
        };
        for (n, name) in named_modules(source) {
            if name != source.top() && !allowed.contains(&name.as_str()) {
                problems.push(format!("src/{}:{n}: {} must not import {name}", source.path, source.top()));
            }
        }
    }
    none_of(problems);
}

#[test]
fn lower_floors_know_admissions_types_and_nothing_else_of_it() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|s| !s.is_in(ABOVE_ADMISSION)) {
        for (n, line) in source.code() {
            let Some(at) = line.find("admission::") else { continue };
            let rest = &line[at + "admission::".len()..];
            let mut names = Vec::new();
            match rest.strip_prefix('{') {
                Some(group) => {
                    let mut depth = 1;
                    let below = source.text.lines().skip(n);
                    for line in std::iter::once(group).chain(below) {
                        scan_group(line, &mut depth, n, &mut names);
                        if depth <= 0 {
                            break;
                        }
                    }
                }
                None => names.push((n, identifier(rest))),
            }
            for (_, name) in names.iter().filter(|(_, name)| !DOMAIN_TYPES.contains(&name.as_str())) {
                problems.push(format!("src/{}:{n}: {} must not import admission::{name}", source.path, source.top()));
            }
        }
    }
    none_of(problems);
}

#[test]
fn crates_stay_in_their_places() {
    let mut problems = Vec::new();
    for source in &sources() {
        for (n, line) in source.code() {
            for (name, places) in CRATE_ONLY_IN {
                if !source.is_in(places) && names_crate(line, |found| found == *name) {
                    problems.push(format!("src/{}:{n}: {name} is only for {}", source.path, places.join(", ")));
                }
            }
            for (prefix, places) in NEVER_IN {
                if source.is_in(places) && names_crate(line, |found| found.starts_with(prefix)) {
                    problems.push(format!("src/{}:{n}: {prefix} must not be named here", source.path));
                }
            }
        }
    }
    none_of(problems);
}

/// What waits on something outside the process, or for a reader.
const WAITS: &[&str] = &[
    ".await",
    "async ",
    "block_on",
    "blocking_",
    "fs::",
    "File::",
    "net::",
    "sleep(",
    ".send(",
    "sqlx",
    "object_store",
];

/// A word of `WAITS` in a line of code.
fn waits(line: &str) -> Option<&'static str> {
    WAITS.iter().find(|word| line.contains(**word)).copied()
}

#[test]
fn the_engine_thread_never_awaits_and_does_no_io() {
    let mut problems = Vec::new();
    let places = ["engine", "kv", "ops", "nn", "delta"];
    let all = sources();
    let seen: Vec<&Source> = all.iter().filter(|s| s.is_in(&places) && !s.is_test()).collect();
    assert!(seen.iter().any(|s| s.path == "engine/worker.rs"), "the engine's loop is not where this looks for it");
    for source in seen {
        for (n, line) in source.code() {
            if let Some(word) = waits(line) {
                problems.push(format!("src/{}:{n}: {word} has no place on the engine thread", source.path));
            }
        }
    }
    none_of(problems);
}

/// Lines with `unsafe` that nothing says the reason of: no `SAFETY:` above it; of a function, no `# Safety` and no attribute that
/// says which instructions it needs.
fn unexplained(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let code = |i: usize| lines[i].split("//").next().unwrap_or_default();
    let names = |i: usize| code(i).split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe");
    let explained = |i: usize| {
        let above = &lines[i.saturating_sub(REASON_ABOVE)..=i];
        let function = code(i).contains("unsafe fn ");
        let reasons: &[&str] = if function { &["# Safety", "#[target_feature"] } else { &["SAFETY:"] };
        // a type of functions calls none
        code(i).trim_start().starts_with("type ") || above.iter().any(|l| reasons.iter().any(|r| l.contains(r)))
    };
    (0..lines.len()).filter(|i| names(*i) && !explained(*i)).map(|i| i + 1).collect()
}

#[test]
fn unsafe_code_is_where_it_must_be_and_says_why_it_may() {
    let mut problems = Vec::new();
    let places: Vec<&str> = UNSAFE_IN.iter().map(|(place, _)| *place).collect();
    for source in &sources() {
        problems.extend(unexplained(&source.text).iter().map(|n| format!("src/{}:{n}: no reason", source.path)));
        let allowed = source.text.contains("allow(unsafe_code");
        if allowed && !source.is_in(&places) {
            problems.push(format!("src/{}: unsafe is only for {}", source.path, places.join(", ")));
        }
    }
    let seen: Vec<String> = sources().into_iter().filter(|s| s.text.contains("unsafe {")).map(|s| s.path).collect();
    let within = |place: &str| seen.iter().any(|path| path == place || path.starts_with(&format!("{place}/")));
    problems
        .extend(places.iter().filter(|place| !within(place)).map(|place| format!("{place} has no unsafe any more")));
    none_of(problems);
}

#[test]
fn every_file_says_what_it_owns() {
    let silent = sources().into_iter().filter(|s| !s.text.starts_with("//! "));
    none_of(silent.map(|s| format!("src/{}: no module doc at the top", s.path)).collect());
}

#[test]
fn files_are_at_most_500_lines_long() {
    let listed: BTreeSet<&str> = LONGER.iter().map(|(path, _)| *path).collect();
    let mut problems = Vec::new();
    for source in sources() {
        let (lines, excused) = (source.text.lines().count(), listed.contains(source.path.as_str()));
        match (lines > MAX_LINES, excused) {
            (true, false) => problems.push(format!("src/{}: {lines} lines", source.path)),
            (false, true) => problems.push(format!("src/{}: is short now; take it off LONGER", source.path)),
            _ => {}
        }
    }
    none_of(problems);
}

/// How many invariants there are: ARCHITECTURE.md names a test of each, I1 to this.
const INVARIANTS: usize = 13;

/// Bullets `- **I3 name** ... Test: `module::test``, each joined to one line: number, and what follows `Test:`/`Tests:`.
fn invariants(architecture: &str) -> Vec<(usize, Vec<String>)> {
    let mut bullets: Vec<String> = Vec::new();
    let mut inside = false;
    for line in architecture.lines() {
        if line.starts_with("- **I") {
            bullets.push(line.to_owned());
            inside = true;
        } else if inside && line.starts_with("  ") {
            let last = bullets.last_mut().expect("inside a bullet");
            last.push(' ');
            last.push_str(line.trim());
        } else {
            inside = false;
        }
    }
    let read = |bullet: String| {
        let number =
            bullet["- **I".len()..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()?;
        let after =
            ["Test: ", "Tests: "].iter().filter_map(|word| bullet.split_once(word)).map(|(_, after)| after).next();
        // the odd parts between backticks are what is quoted
        let quoted = after.unwrap_or_default().split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Some((number, quoted))
    };
    bullets.into_iter().filter_map(read).collect()
}

/// Whether a test named `a::b::name` is a function somewhere, or, named as a path, a file or folder.
fn exists(test: &str, code: &[String]) -> bool {
    if test.contains('/') {
        return Path::new(env!("CARGO_MANIFEST_DIR")).join(test).exists();
    }
    let head = format!("fn {}(", test.rsplit("::").next().unwrap_or(test));
    code.iter().any(|text| text.contains(&head))
}

#[test]
fn every_invariant_names_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Ok(architecture) = fs::read_to_string(root.join("ARCHITECTURE.md")) else {
        println!("skipped: ARCHITECTURE.md is absent");
        return;
    };
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    collect(&root.join("tests"), &mut files);
    let code: Vec<String> = files.iter().map(|f| fs::read_to_string(f).expect("a readable source")).collect();
    let named = invariants(&architecture);
    let mut problems = Vec::new();
    for number in 1..=INVARIANTS {
        let tests: Vec<&String> = named.iter().filter(|(n, _)| *n == number).flat_map(|(_, tests)| tests).collect();
        if tests.is_empty() {
            problems.push(format!("ARCHITECTURE.md: I{number} names no test"));
        }
        let missing = tests.into_iter().filter(|test| !exists(test, &code));
        problems.extend(missing.map(|test| format!("ARCHITECTURE.md: I{number} names {test}, which does not exist")));
    }
    none_of(problems);
}

/// How many groups of bad inputs and faults SECURITY.md answers for.
const GROUPS: usize = 72;

/// Rows of tables: the cells between bars.
fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = text.lines().filter(|line| line.starts_with('|') && !line.starts_with("|---"));
    lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

#[test]
fn every_group_of_bad_inputs_has_a_row_and_its_tests_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Ok(security) = fs::read_to_string(root.join("SECURITY.md")) else {
        println!("skipped: SECURITY.md is absent");
        return;
    };
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    collect(&root.join("tests"), &mut files);
    let code: Vec<String> = files.iter().map(|f| fs::read_to_string(f).expect("a readable source")).collect();
    let (mut problems, mut next) = (Vec::new(), 1);
    for row in rows(&security) {
        let tests: Vec<&str> = row[row.len() - 1].split('`').skip(1).step_by(2).collect();
        let numbered = row[0].parse::<usize>().is_ok();
        if numbered {
            if row[0] != next.to_string() {
                problems.push(format!("SECURITY.md: row {} stands where {next} should", row[0]));
            }
            next += 1;
            if tests.is_empty() && !row[row.len() - 1].contains("*None*") {
                problems.push(format!("SECURITY.md: row {} names no test and no reason", row[0]));
            }
        }
        // the tables of tests: groups, and what was found
        let missing = tests.iter().filter(|test| (numbered || row.len() == 4) && !exists(test, &code));
        problems.extend(missing.map(|test| format!("SECURITY.md: {test} does not exist")));
    }
    if next != GROUPS + 1 {
        problems.push(format!("SECURITY.md: {} groups of {GROUPS}", next - 1));
    }
    none_of(problems);
}

#[test]
fn invariants_are_read_as_they_are_written() {
    let text = "# Invariants\n- **I1 order** a law. Test: `a::b::keeps_order`\n- **I2 isolation** a `b` law that goes\n  \
                on. Tests: `x`, `tests/tidy.rs`.\n\n- **I3 none** no test\n";
    let names = |tests: &[&str]| tests.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    let want = [(1, names(&["a::b::keeps_order"])), (2, names(&["x", "tests/tidy.rs"])), (3, names(&[]))];
    assert_eq!(invariants(text), want);
    let code = ["#[test]\nfn keeps_order() {}".to_owned()];
    assert!(exists("a::b::keeps_order", &code) && exists("tests/tidy.rs", &code));
    assert!(!exists("a::order", &code) && !exists("tests/absent.rs", &code));
}

#[test]
fn the_checks_see_what_they_check() {
    let text = "//! Doc.\nuse crate::{\n    a::{x, y},\n    b, c::d,\n};\nfn f() { crate::e::g(); let s = tonic::Status::ok; }\n";
    let source = Source { path: "grpc/x.rs".into(), text: text.into() };
    let names: Vec<String> = named_modules(&source).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["a", "b", "c", "e"]);
    assert!(names_crate("let s = tonic::Status::ok;", |n| n == "tonic"));
    assert!(!names_crate("let s = my::tonic::Status;", |n| n == "tonic"));
    assert!(!names_crate("let s = tonic_types::Status;", |n| n == "tonic"));
    let fine =
        "// SAFETY: x\nunsafe { f() }\n#[target_feature(enable = \"a\")]\nunsafe fn f() {}\ntype F = unsafe fn();\n";
    assert!(unexplained(fine).is_empty() && unexplained("#![allow(unsafe_code)] // unsafe").is_empty());
    assert_eq!(unexplained("fn g() {\n    unsafe { f() }\n}\nunsafe fn h() {}"), [2, 4]);
    assert!(waits("let x = rx.recv().await;").is_some() && waits("events.try_send(event)").is_none());
    assert!(source.is_in(&["grpc"]) && !source.is_in(&["gr"]) && source.is_in(&["grpc/x.rs"]));
}
