//! The report: Markdown with SVG charts beside it, of whatever results there are.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{
    metric::{GENERATED, points, shown},
    plan::{BaseEntry, Plan, Task},
    results::{Key, Part, Results},
    tables::{Cell, View, cell, count, markdown},
};
use crate::cli::chart::{Chart, Series};

const MIB: f64 = 1_048_576.0;

/// Writes `REPORT.md` and its charts into a folder, of those results that are of the plan's runs (`keys`); gives its path.
///
/// # Errors
/// Files that cannot be written.
pub(super) fn write(plan: &Plan, keys: &[Key], results: &Results, out: &Path) -> anyhow::Result<PathBuf> {
    let view = View::new(plan, results.latest(), keys);
    let mut text = format!("# {}\n\n", plan.title);
    for note in &plan.notes {
        writeln!(text, "{note}\n")?;
    }
    writeln!(
        text,
        "Made by `deltaserve study` {}. Seeds of the plan: {}. Each table says which of its runs there are, and on how many \
         threads they ran; a cell with several runs has their median and, in brackets, their range and number. Deltas are \
         trained and scored through the server's own API; test rows are scored once, under the checkpoint that the job \
         publishes. `results.jsonl` has every run.\n",
        env!("CARGO_PKG_VERSION"),
        plan.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
    )?;
    let page = Page { view: &view, plan, out };
    let sections =
        [Page::scores, Page::generation, Page::curves, Page::memory, Page::few_shot, Page::transfer, Page::scale];
    for section in sections {
        text += &section(&page)?;
    }
    let failed = view.failed();
    if !failed.is_empty() {
        text += "## Runs that failed\n\n";
        for (outcome, error) in failed {
            writeln!(text, "- {}: {error}", outcome.key)?;
        }
    }
    let path = out.join("REPORT.md");
    fs::write(&path, text.trim_end().to_owned() + "\n").with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

struct Page<'a> {
    view: &'a View<'a>,
    plan: &'a Plan,
    out: &'a Path,
}

impl Page<'_> {
    /// Draws a chart if it has points, and gives the Markdown that shows it.
    fn chart(&self, file: &str, chart: &Chart<'_>, series: Vec<Series>) -> anyhow::Result<String> {
        let series: Vec<Series> = series.into_iter().filter(|s| !s.points.is_empty()).collect();
        if series.is_empty() {
            return Ok(String::new());
        }
        chart.draw(&self.out.join(file), &series)?;
        Ok(format!("![{}]({file})\n\n", chart.title))
    }

    fn methods(&self) -> impl Iterator<Item = &str> {
        self.plan.methods.iter().map(|m| m.name.as_str())
    }

    fn scores(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for base in &self.plan.bases {
            let main = self.view.of(|p| *p == Part::Main);
            let Some(any) = main.iter().find(|o| o.key.base == base.name && o.base_parameters > 0) else { continue };
            let total = any.base_parameters;
            let tasks = self.view.tasks(&base.name);
            writeln!(text, "## Scores: {}\n\n{} numbers in the base.\n", base.name, count(total))?;
            text += &self.view.made(|k| k.part == Part::Main && k.base == base.name);
            let mut headings = vec!["method".to_owned(), "trained".into(), "of the base".into()];
            headings.extend(tasks.iter().map(|t| format!("{} ({})", t.name, t.metric())));
            headings.push(format!("mean against {}", self.plan.baseline));
            let rows: Vec<Vec<String>> = self
                .methods()
                .filter_map(|method| {
                    let own = main.iter().filter(|o| o.key.base == base.name && o.key.method == method);
                    let trained = own.map(|o| o.trainable).max().filter(|n| *n > 0)?;
                    let cells: Vec<Cell> = tasks.iter().map(|t| self.main(&base.name, t, method)).collect();
                    let mut row = vec![method.to_owned(), count(trained)];
                    row.push(format!("{:.2} %", trained as f64 * 100.0 / total as f64));
                    row.extend(tasks.iter().zip(&cells).map(|(t, c)| cell(t.metric(), c)));
                    row.push(self.against(&base.name, &tasks, method, &cells));
                    Some(row)
                })
                .collect();
            text += &markdown(&headings, &rows);
            text.push('\n');
        }
        Ok(text)
    }

    fn main(&self, base: &str, task: &Task, method: &str) -> Cell {
        self.view.cell(base, task, method, |p| *p == Part::Main)
    }

    /// Continuations of test rows: all figures of the tasks that ask for them.
    fn generation(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for base in &self.plan.bases {
            for task in self.view.tasks(&base.name).into_iter().filter(|t| t.generate.is_some()) {
                let names = ["perplexity"].into_iter().chain(GENERATED);
                let value = |m: &str, name| self.view.figures(&base.name, task, m, name, |p| *p == Part::Main);
                let rows: Vec<Vec<String>> = self
                    .methods()
                    .filter(|m| !value(m, "perplexity").0.is_empty())
                    .map(|m| {
                        let cells = names.clone().map(|name| cell(name, &value(m, name)));
                        std::iter::once(m.to_owned()).chain(cells).collect()
                    })
                    .collect();
                if rows.is_empty() {
                    continue;
                }
                let options = task.generate.iter().flatten().cloned().collect::<Vec<_>>().join(" ");
                writeln!(text, "### {}: {}\n\n`generate --file {options}`\n", base.name, task.name)?;
                text += &self.view.made(|k| k.part == Part::Main && k.base == base.name && k.task == task.name);
                let headings: Vec<String> = std::iter::once("method").chain(names).map(str::to_owned).collect();
                writeln!(text, "{}", markdown(&headings, &rows))?;
            }
        }
        Ok(if text.is_empty() { text } else { format!("## Generation\n\n{text}") })
    }

    /// Mean distance to the baseline in points over the tasks that both have; only figures with points.
    fn against(&self, base: &str, tasks: &[&Task], method: &str, cells: &[Cell]) -> String {
        if method == self.plan.baseline {
            return "–".to_owned();
        }
        let all: Vec<f64> = tasks
            .iter()
            .zip(cells)
            .filter_map(|(t, c)| {
                let other = self.main(base, t, &self.plan.baseline).median()?;
                Some((c.median()? - other) * points(t.metric())?)
            })
            .collect();
        match all.len() {
            0 => "–".to_owned(),
            n => format!("{:+.1} ({n})", all.iter().sum::<f64>() / n as f64),
        }
    }

    fn curves(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for base in &self.plan.bases {
            for task in self.view.tasks(&base.name) {
                let line = |m: &str| Series { name: m.to_owned(), points: self.view.curve(&base.name, task, m) };
                let series = self.methods().map(line).collect();
                let title = format!("{}: {}", base.name, task.name);
                let y = format!("{} on validation rows", task.watched());
                let chart = Chart { title: &title, x: "optimizer steps", y: &y, log_x: false, from_zero: false };
                text += &self.chart(&format!("curve-{}-{}.svg", base.name, task.name), &chart, series)?;
            }
        }
        Ok(if text.is_empty() {
            text
        } else {
            format!("## Convergence\n\nOf the runs that the scores are of.\n\n{text}")
        })
    }

    fn memory(&self) -> anyhow::Result<String> {
        let Some(m) = &self.plan.memory else { return Ok(String::new()) };
        let mut text = String::new();
        for base in &self.plan.bases {
            let all = self.view.of(|p| matches!(p, Part::Memory { .. }));
            let of = |method: &str, batch: u32| {
                let here = |p: &Part| matches!(p, Part::Memory { batch: b, .. } if *b == batch);
                all.iter().rfind(|o| o.key.base == base.name && o.key.method == method && here(&o.key.part)).copied()
            };
            let added = |method: &str, batch| of(method, batch).and_then(|o| o.added_bytes).map(|b| b as f64);
            if !m.methods.iter().any(|method| m.batch_sizes.iter().any(|b| added(method, *b).is_some())) {
                continue;
            }
            writeln!(
                text,
                "### {}\n\nExamples of {} tokens each. MiB that a job adds at its peak beside the resident base; in brackets, how \
                 much of {}'s it saves; the time of a step in milliseconds.\n",
                base.name, m.length, self.plan.baseline
            )?;
            text += &self.view.made(|k| matches!(k.part, Part::Memory { .. }) && k.base == base.name);
            let headings =
                std::iter::once("method".to_owned()).chain(m.batch_sizes.iter().map(|b| format!("batch {b}")));
            let rows: Vec<Vec<String>> = m
                .methods
                .iter()
                .map(|method| {
                    let value = |b: &u32| match (added(method, *b), added(&self.plan.baseline, *b), of(method, *b)) {
                        (Some(own), Some(full), Some(o)) if *method != self.plan.baseline => {
                            let saved = (1.0 - own / full.max(1.0)) * 100.0;
                            format!("{:.0} ({saved:.0} %), {:.0} ms", own / MIB, o.step_ms)
                        }
                        (Some(own), _, Some(o)) => format!("{:.0}, {:.0} ms", own / MIB, o.step_ms),
                        _ => "–".to_owned(),
                    };
                    std::iter::once(method.clone()).chain(m.batch_sizes.iter().map(value)).collect()
                })
                .collect();
            text += &markdown(&headings.collect::<Vec<_>>(), &rows);
            text.push('\n');
            let line = |method: &String| Series {
                name: method.clone(),
                points: m.batch_sizes.iter().filter_map(|b| Some((f64::from(*b), added(method, *b)? / MIB))).collect(),
            };
            let title = format!("{}: peak memory of training", base.name);
            let chart =
                Chart { title: &title, x: "batch size", y: "MiB beside the base", log_x: true, from_zero: true };
            text += &self.chart(&format!("memory-{}.svg", base.name), &chart, m.methods.iter().map(line).collect())?;
        }
        Ok(if text.is_empty() { text } else { format!("## Memory\n\n{text}") })
    }

    fn few_shot(&self) -> anyhow::Result<String> {
        let Some(f) = &self.plan.few_shot else { return Ok(String::new()) };
        let mut text = String::new();
        for (base, name) in self.plan.bases.iter().flat_map(|b| f.tasks.iter().map(move |t| (b, t))) {
            let task = self.plan.task(name)?;
            let at = |m: &str, k: u32| self.view.cell(&base.name, task, m, |p| *p == Part::FewShot { k });
            let line = |m: &String| Series {
                name: m.clone(),
                points: f.k.iter().filter_map(|k| Some((f64::from(*k), at(m, *k).median()?))).collect(),
            };
            let title = format!("{}: {} with few examples", base.name, task.name);
            let chart =
                Chart { title: &title, x: "examples per class", y: task.metric(), log_x: true, from_zero: false };
            let file = format!("few-shot-{}-{}.svg", base.name, task.name);
            let chart = self.chart(&file, &chart, f.methods.iter().map(line).collect())?;
            if chart.is_empty() {
                continue;
            }
            let headings: Vec<String> = std::iter::once(format!("{}, {}", base.name, task.name))
                .chain(f.k.iter().map(|k| format!("k = {k}")))
                .collect();
            let row = |m: &String| {
                std::iter::once(m.clone())
                    .chain(f.k.iter().map(|k| cell(task.metric(), &at(m, *k))))
                    .collect::<Vec<_>>()
            };
            let rows: Vec<_> = f.methods.iter().map(row).collect();
            let few = |k: &Key| matches!(k.part, Part::FewShot { .. }) && k.base == base.name && k.task == task.name;
            write!(text, "{}{}\n{chart}", self.view.made(few), markdown(&headings, &rows))?;
        }
        Ok(if text.is_empty() { text } else { format!("## Few examples\n\n{text}") })
    }

    fn transfer(&self) -> anyhow::Result<String> {
        let Some(t) = &self.plan.transfer else { return Ok(String::new()) };
        let mut text = String::new();
        for base in &self.plan.bases {
            let at = |task: &Task, from: Option<&String>| {
                let wanted = |p: &Part| matches!(p, Part::Transfer { from: f, .. } if f.as_ref() == from);
                self.view.cell(&base.name, task, &t.method, wanted)
            };
            let tasks: Vec<&Task> = t.tasks.iter().map(|n| self.plan.task(n)).collect::<anyhow::Result<_>>()?;
            if tasks.iter().all(|task| at(task, None).median().is_none()) {
                continue;
            }
            writeln!(
                text,
                "### {}\n\n{} on {} examples per class of the task in the column, started from a delta of the task in the \
                 row; in brackets, the gain over a start from nothing.\n",
                base.name, t.method, t.k
            )?;
            text += &self.view.made(|k| matches!(k.part, Part::Transfer { .. }) && k.base == base.name);
            let headings: Vec<String> =
                std::iter::once("from".to_owned()).chain(tasks.iter().map(|t| t.name.clone())).collect();
            let scratch = std::iter::once("nothing".to_owned())
                .chain(tasks.iter().map(|task| cell(task.metric(), &at(task, None))));
            let mut rows: Vec<Vec<String>> = vec![scratch.collect()];
            for from in &t.tasks {
                let value = |task: &&Task| {
                    let metric = task.metric();
                    match (at(task, Some(from)).median(), at(task, None).median(), points(metric)) {
                        _ if task.name == *from => String::new(),
                        (Some(own), Some(nothing), Some(points)) => {
                            format!("{} ({:+.1})", shown(metric, own), (own - nothing) * points)
                        }
                        (Some(own), ..) => shown(metric, own),
                        (None, ..) => "–".to_owned(),
                    }
                };
                rows.push(std::iter::once(from.clone()).chain(tasks.iter().map(value)).collect());
            }
            text += &markdown(&headings, &rows);
            text.push('\n');
        }
        Ok(if text.is_empty() { text } else { format!("## Transfer\n\n{text}") })
    }

    /// Scores against the size of the base, where a task has several.
    fn scale(&self) -> anyhow::Result<String> {
        let main = self.view.of(|p| *p == Part::Main);
        let size = |base: &BaseEntry| {
            main.iter().find(|o| o.key.base == base.name && o.base_parameters > 0).map(|o| o.base_parameters as f64)
        };
        let mut text = String::new();
        for task in &self.plan.tasks {
            let line = |m: &str| {
                let point = |b: &BaseEntry| Some((size(b)?, self.main(&b.name, task, m).median()?));
                let mut points: Vec<(f64, f64)> =
                    self.plan.bases.iter().filter(|b| task.on(&b.name)).filter_map(point).collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series { name: m.to_owned(), points }
            };
            let series: Vec<Series> = self.methods().map(line).filter(|s| s.points.len() > 1).collect();
            let title = format!("{}: power of scale", task.name);
            let chart =
                Chart { title: &title, x: "numbers in the base", y: task.metric(), log_x: true, from_zero: false };
            let chart = self.chart(&format!("scale-{}.svg", task.name), &chart, series)?;
            if !chart.is_empty() {
                text += &self.view.made(|k| k.part == Part::Main && k.task == task.name);
                text += &chart;
            }
        }
        Ok(if text.is_empty() { text } else { format!("## Power of scale\n\n{text}") })
    }
}
