//! `study`: methods compared on tasks and bases that the user names, as the delta-tuning literature compares them. A server
//! in this process trains and scores over gRPC; results are kept line by line, and a Markdown report with charts is written.

mod inputs;
mod lab;
mod memory;
mod metric;
mod plan;
mod report;
mod results;
mod score;
mod tables;

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use self::{
    lab::{Lab, say},
    plan::{BaseEntry, Plan, Task},
    results::{Key, Outcome, Part, Results},
};
use super::{files::blocking, output};

/// Options of `study`.
#[derive(Debug, Clone, clap::Args)]
pub struct StudyArgs {
    /// JSON file that names bases, tasks and methods; see benches/study/README.md.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Folder of results.jsonl, the report and its charts; a study that was stopped goes on there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Only runs whose line matches, e.g. "main .* trec6 lora".
    #[arg(long, value_name = "REGEX")]
    only: Option<regex::Regex>,
    /// Say what would be run, and end.
    #[arg(long, conflicts_with = "report")]
    list: bool,
    /// Write the report of what is there, and end.
    #[arg(long)]
    report: bool,
    /// Begin no run after this many minutes.
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
}

/// Runs a study.
///
/// # Errors
/// A plan that cannot be, a base that cannot be loaded, results that cannot be written. Runs that fail are kept as such, and
/// the study goes on.
pub(super) async fn run(args: StudyArgs) -> anyhow::Result<()> {
    let (path, out) = (args.plan.clone(), args.out.clone());
    let read = move || {
        let plan = Plan::read(&path)?;
        let all = runs(&plan)?;
        fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
        Ok((plan, all, Results::open(&out.join("results.jsonl"))?))
    };
    let (plan, all, mut results) = blocking(read).await?;
    let wanted = |key: &&Key| args.only.as_ref().is_none_or(|only| only.is_match(&key.to_string()));
    let runs: Vec<&Key> = all.iter().filter(wanted).collect();
    ensure!(args.report || !runs.is_empty(), "nothing to run: the plan has no run that matches");
    if args.list {
        return runs
            .iter()
            .try_for_each(|key| output::line(&format!("{} {key}", if results.has(key) { "done" } else { "todo" })));
    }
    if !args.report {
        let until = args.minutes.map(|m| {
            let after = Duration::try_from_secs_f64(m * 60.0).ok().and_then(|d| Instant::now().checked_add(d));
            after.with_context(|| format!("--minutes is {m}; accepted is a number of minutes from 0 on"))
        });
        let until = until.transpose()?;
        let untold = results.untold(runs.iter().copied());
        if untold > 0 {
            output::note(&format!(
                "{untold} runs of results.jsonl do not tell their labels, base and steps; they count as they are: remove a line \
                 to make its run again"
            ));
        }
        make(&plan, &runs, &mut results, &args.out, until).await?;
    }
    let path = blocking(move || report::write(&plan, &all, &results, &args.out)).await?;
    output::line(&path.display().to_string())
}

/// All runs of a plan, in their order: one seed of everything first.
fn runs(plan: &Plan) -> anyhow::Result<Vec<Key>> {
    let mut all = Vec::new();
    let fingerprints: HashMap<&str, String> =
        plan.bases.iter().map(|base| (base.name.as_str(), inputs::fingerprint(plan, base))).collect();
    let mut add = |part: Part, base: &BaseEntry, task: &str, method: &str, seed: u64, more: &[String]| {
        let (t, m) = (plan.task(task)?, plan.method(method)?);
        if t.on(&base.name) {
            // what another task's delta was made of matters, too
            let from = match &part {
                Part::Transfer { from: Some(other), .. } => plan.digest(plan.task(other)?, m, &[])?,
                _ => String::new(),
            };
            let digest = plan.digest(t, m, &[more, &[from]].concat())?;
            let steps = plan.memory.as_ref().filter(|_| matches!(part, Part::Memory { .. })).map(|m| m.steps);
            let other = match &part {
                Part::Transfer { from: Some(other), .. } => Some(plan.task(other)?),
                _ => None,
            };
            let inputs = inputs::inputs(std::iter::once(t).chain(other), steps)?;
            let fingerprint = fingerprints.get(base.name.as_str()).cloned().unwrap_or_default();
            let (base, task, method) = (base.name.clone(), task.to_owned(), method.to_owned());
            all.push(Key { part, base, task, method, seed, digest, inputs, fingerprint });
        }
        Ok::<_, anyhow::Error>(())
    };
    for (i, seed) in plan.seeds.iter().enumerate() {
        for base in &plan.bases {
            if let (0, Some(m)) = (i, &plan.memory) {
                for method in &m.methods {
                    for &batch in &m.batch_sizes {
                        add(Part::Memory { batch, length: m.length }, base, &m.task, method, *seed, &[])?;
                    }
                }
            }
            for task in &plan.tasks {
                for method in &plan.methods {
                    add(Part::Main, base, &task.name, &method.name, *seed, &[])?;
                }
            }
            if let Some(f) = &plan.few_shot {
                for task in &f.tasks {
                    for &k in &f.k {
                        for method in &f.methods {
                            add(Part::FewShot { k }, base, task, method, *seed, &f.options)?;
                        }
                    }
                }
            }
            if let Some(t) = &plan.transfer {
                for task in &t.tasks {
                    let others = t.tasks.iter().filter(|other| *other != task).map(|other| Some(other.clone()));
                    for from in std::iter::once(None).chain(others) {
                        add(Part::Transfer { k: t.k, from }, base, task, &t.method, *seed, &t.options)?;
                    }
                }
            }
        }
    }
    Ok(all)
}

/// Makes the runs that have no figures yet, base by base.
async fn make(
    plan: &Plan,
    runs: &[&Key],
    results: &mut Results,
    out: &std::path::Path,
    until: Option<Instant>,
) -> anyhow::Result<()> {
    let todo: Vec<&Key> = runs.iter().copied().filter(|key| !results.has(key)).collect();
    let total = todo.len();
    let mut done = 0;
    let mut open: Option<(String, Lab)> = None;
    for key in todo {
        if until.is_some_and(|until| Instant::now() >= until) {
            output::note("the time is over; the same command goes on from here");
            break;
        }
        if open.as_ref().is_none_or(|(name, _)| *name != key.base) {
            if let Some((_, lab)) = open.take() {
                lab.close().await?;
            }
            let entry = plan.bases.iter().find(|b| b.name == key.base).context("a base of the plan")?;
            let lab = Lab::open(&plan.base(entry), &out.join("store").join(&entry.name))
                .await
                .with_context(|| format!("base {}", entry.name))?;
            open = Some((key.base.clone(), lab));
        }
        let Some((_, lab)) = &open else { continue };
        let key = &Key { fingerprint: lab.fingerprint.clone(), ..key.clone() };
        let begun = Instant::now();
        let outcome = match one(lab, plan, key).await {
            Ok(outcome) => outcome,
            Err(e) => failed(key, &format!("{e:#}")),
        };
        done += 1;
        say(done, total, &line(plan, &outcome, begun.elapsed().as_secs_f64()));
        results.add(outcome)?;
    }
    match open {
        Some((_, lab)) => lab.close().await,
        None => Ok(()),
    }
}

/// What is said of a finished run.
fn line(plan: &Plan, outcome: &Outcome, seconds: f64) -> String {
    let metric = plan.task(&outcome.key.task).map(Task::metric).unwrap_or_default();
    let what = match (&outcome.error, outcome.added_bytes, outcome.figure(metric)) {
        (Some(error), ..) => format!("FAILED: {error}"),
        (None, Some(bytes), _) => format!("{} more at the peak", output::bytes(bytes)),
        (None, None, Some(value)) => format!("{metric} {}", metric::shown(metric, value)),
        (None, None, None) => "no figure".to_owned(),
    };
    format!("{}: {what} ({seconds:.0} s)", outcome.key)
}

fn failed(key: &Key, error: &str) -> Outcome {
    Outcome {
        key: key.clone(),
        error: Some(error.to_owned()),
        figures: Default::default(),
        trainable: 0,
        base_parameters: 0,
        steps: 0,
        curve: Vec::new(),
        seconds: 0.0,
        step_ms: 0.0,
        threads: Some(rayon::current_num_threads()),
        added_bytes: None,
    }
}

/// One run.
async fn one(lab: &Lab, plan: &Plan, key: &Key) -> anyhow::Result<Outcome> {
    let (task, method) = (plan.task(&key.task)?, plan.method(&key.method)?);
    let blank = Outcome { error: None, base_parameters: lab.parameters, ..failed(key, "") };
    let k = |k: u32| ["--k-per-class".to_owned(), k.to_string()];
    let mut more: Vec<String> = Vec::new();
    match &key.part {
        Part::Memory { batch, .. } => {
            ensure!(memory::measurable(), "this system does not tell a process's peak of memory");
            let m = plan.memory.as_ref().context("memory")?;
            let (added, trainable, step_ms) = memory::added(lab, plan, m, method, *batch).await?;
            return Ok(Outcome { added_bytes: Some(added), trainable, step_ms, steps: m.steps, ..blank });
        }
        Part::Main => {}
        Part::FewShot { k: n } => {
            more.extend(plan.few_shot.iter().flat_map(|f| f.options.clone()));
            more.extend(k(*n));
        }
        Part::Transfer { k: n, from } => {
            more.extend(plan.transfer.iter().flat_map(|t| t.options.clone()));
            more.extend(k(*n));
            if let Some(other) = from {
                let source = source(lab, plan, key, other).await?;
                more.extend(["--from-delta".to_owned(), source]);
            }
        }
    }
    let kept = key.part == Part::Main && plan.transfer.as_ref().is_some_and(|t| t.method == key.method);
    let name = match (&key.part, kept) {
        (Part::Main, true) => source_name(plan, key, &key.task)?,
        _ => "run".to_owned(),
    };
    more.extend(plan.validation(task, key.part != Part::Main));
    let words = plan.words(task, method, &name, key.seed, &more);
    let trained = lab.train(&words, &task.label_names, task.watched(), |_| Ok(())).await?;
    let figures = lab.score(plan, task, &name, &trained).await;
    lab.clear(&name, &trained, kept).await?;
    Ok(Outcome {
        figures: figures?,
        trainable: trained.trainable,
        steps: trained.steps,
        curve: trained.curve,
        seconds: trained.seconds,
        step_ms: trained.step_ms,
        ..blank
    })
}

/// Name of a delta that others start from: another one where what it is made of changes.
fn source_name(plan: &Plan, key: &Key, task: &str) -> anyhow::Result<String> {
    let task = plan.task(task)?;
    let digest = plan.digest(task, plan.method(&key.method)?, &[])?;
    let (inputs, base) = (inputs::inputs([task], None)?, key.fingerprint.get(..16).unwrap_or_default());
    Ok(format!("source-{digest}-{inputs}-{base}-{}", key.seed))
}

/// The delta of another task: that of its main run, or the same made again where the store is not that run's.
async fn source(lab: &Lab, plan: &Plan, key: &Key, other: &str) -> anyhow::Result<String> {
    let name = source_name(plan, key, other)?;
    if !lab.has(&name).await? {
        let task = plan.task(other)?;
        let words = plan.words(task, plan.method(&key.method)?, &name, key.seed, &plan.validation(task, false));
        let trained = lab.train(&words, &task.label_names, task.watched(), |_| Ok(())).await?;
        lab.clear(&name, &trained, true).await?;
    }
    Ok(name)
}
