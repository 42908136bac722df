//! Parity with transformers and PEFT: runs every case of a fixture folder's manifest that this version supports.
//!
//! The folder is `DELTASERVE_FIXTURES`, else `../shared/fixtures`, else the small committed subset; and always `extra`, the
//! committed cases that `make_extra.py` makes; where it is there, also `activated`, of `make_activated.py`. Nothing here knows a
//! model's name, size or seed. Prints a line per case and a closing count; fails if a supported case fails.

mod cases;
mod fixtures;
mod mixed;
mod real;
mod scores;
mod training;

use fixtures::{Fixtures, Outcome};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--list") {
        println!("golden: test");
        return;
    }
    // `cargo test NAME` gives every binary its filter
    let filter = args.iter().find(|a| !a.starts_with('-')).filter(|f| !"golden".contains(f.as_str())).cloned();
    let committed = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fixtures");
    let mut failed = run(&Fixtures::default_folder(&committed), filter.as_deref());
    failed += run(&committed.with_file_name("extra"), filter.as_deref());
    let activated = committed.with_file_name("activated");
    if activated.join("manifest.json").is_file() {
        failed += run(&activated, filter.as_deref());
    }
    failed += real::run(filter.as_deref());
    if failed > 0 {
        std::process::exit(1);
    }
}

fn run(folder: &std::path::Path, filter: Option<&str>) -> usize {
    let fixtures = match Fixtures::open(folder) {
        Ok(f) => f,
        Err(e) => {
            println!("golden: cannot read {}: {e}", folder.display());
            return 1;
        }
    };
    println!("golden: fixtures of {}", folder.display());
    let (mut passed, mut failed, mut unsupported) = (0, 0, 0);
    let mut report = |id: &str, outcome: Outcome| match outcome {
        Outcome::Passed(what) => {
            passed += 1;
            println!("  ok    {id}: {what}");
        }
        Outcome::Failed(why) => {
            failed += 1;
            println!("  FAIL  {id}: {why}");
        }
        Outcome::Unsupported(why) => {
            unsupported += 1;
            println!("  -     {id}: not yet supported: {why}");
        }
    };
    let wanted = |id: &str| filter.is_none_or(|f| id.contains(f));
    for case in fixtures.list("cases") {
        if wanted(fixtures::id(case)) {
            report(fixtures::id(case), cases::run(&fixtures, case));
        }
    }
    for case in fixtures.list("mixed") {
        if wanted(fixtures::id(case)) {
            report(fixtures::id(case), mixed::run(&fixtures, case));
        }
    }
    for case in fixtures.list("training") {
        if wanted(fixtures::id(case)) {
            report(fixtures::id(case), training::run(&fixtures, case));
        }
    }
    println!("golden: {passed} passed, {failed} failed, {unsupported} not yet supported");
    if passed == 0 && filter.is_none() {
        println!("golden: no case of the folder could be run at all");
        return 1;
    }
    failed
}
