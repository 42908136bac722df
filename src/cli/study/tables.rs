//! Tables of a report, from results: medians over seeds, cells that are missing, Markdown.

use std::collections::BTreeMap;

use super::{
    metric::shown,
    plan::{Plan, Task},
    results::{Key, Outcome, Part},
};

/// Figures of one cell, one per seed.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Cell(pub(super) Vec<f64>);

impl Cell {
    /// The median; the mean of the middle two where their number is even.
    pub(super) fn median(&self) -> Option<f64> {
        let mut v = self.0.clone();
        v.sort_by(f64::total_cmp);
        let n = v.len();
        match (n, v.get(n / 2)) {
            (0, _) | (_, None) => None,
            (_, Some(upper)) if n % 2 == 1 => Some(*upper),
            (_, Some(upper)) => v.get(n / 2 - 1).map(|lower| (lower + upper) / 2.0),
        }
    }

    /// Smallest and largest, where there are several.
    pub(super) fn range(&self) -> Option<(f64, f64)> {
        let fold = |f: fn(f64, f64) -> f64| self.0.iter().copied().reduce(f);
        (self.0.len() > 1).then(|| Some((fold(f64::min)?, fold(f64::max)?))).flatten()
    }
}

/// Results under a plan that still names their base, task and method.
pub(super) struct View<'a> {
    pub(super) plan: &'a Plan,
    keys: &'a [Key],
    outcomes: Vec<&'a Outcome>,
}

impl<'a> View<'a> {
    /// Results of runs that the plan has now; of those with other options or rows, none.
    pub(super) fn new(plan: &'a Plan, outcomes: Vec<&'a Outcome>, keys: &'a [Key]) -> Self {
        let last = |wanted: &dyn Fn(&Key) -> bool| outcomes.iter().rfind(|o| wanted(&o.key)).copied();
        // a line that tells all that the plan does goes before one that does not
        let of = |key: &Key| last(&|k| k == key).or_else(|| last(&|k| k.is(key)));
        let taken: Vec<&Outcome> = keys.iter().filter_map(of).collect();
        let is_taken = |o: &&Outcome| taken.iter().any(|t| std::ptr::eq(*t, *o));
        Self { plan, keys, outcomes: outcomes.iter().copied().filter(is_taken).collect() }
    }

    /// Outcomes of a part.
    pub(super) fn of(&self, wanted: impl Fn(&Part) -> bool) -> Vec<&'a Outcome> {
        self.outcomes.iter().copied().filter(|o| wanted(&o.key.part)).collect()
    }

    /// What failed.
    pub(super) fn failed(&self) -> Vec<(&'a Outcome, &'a str)> {
        self.outcomes.iter().filter_map(|o| Some((*o, o.error.as_deref()?))).collect()
    }

    /// Which runs of the plan a table is made of: how many of each seed there are, and the threads that they ran on.
    pub(super) fn made(&self, wanted: impl Fn(&Key) -> bool) -> String {
        let (mut seeds, mut threads) = (BTreeMap::new(), BTreeMap::new());
        for key in self.keys.iter().filter(|key| wanted(key)) {
            seeds.entry(key.seed).or_insert((0, 0)).1 += 1;
        }
        for o in self.outcomes.iter().filter(|o| wanted(&o.key) && o.error.is_none()) {
            seeds.entry(o.key.seed).or_insert((0, 0)).0 += 1;
            *threads.entry(o.threads).or_insert(0) += 1;
        }
        let seeds: Vec<String> =
            seeds.iter().map(|(seed, (made, all))| format!("{made} of {all} with seed {seed}")).collect();
        let ran = |(threads, runs): (&Option<usize>, &u32)| match threads {
            Some(threads) => format!("{threads} in {runs}"),
            None => format!("not recorded in {runs}"),
        };
        let threads: Vec<String> = threads.iter().map(ran).collect();
        let threads = if threads.is_empty() { "none".to_owned() } else { threads.join(", ") };
        format!("Runs: {}. Threads: {threads}.\n\n", seeds.join(", "))
    }

    /// Figures of the task's metric.
    pub(super) fn cell(&self, base: &str, task: &Task, method: &str, part: impl Fn(&Part) -> bool) -> Cell {
        self.figures(base, task, method, task.metric(), part)
    }

    /// Figures by name.
    pub(super) fn figures(
        &self,
        base: &str,
        task: &Task,
        method: &str,
        figure: &str,
        part: impl Fn(&Part) -> bool,
    ) -> Cell {
        let here = |o: &&&Outcome| o.key.base == base && o.key.task == task.name && o.key.method == method;
        Cell(self.outcomes.iter().filter(here).filter(|o| part(&o.key.part)).filter_map(|o| o.figure(figure)).collect())
    }

    /// Tasks of a base.
    pub(super) fn tasks(&self, base: &str) -> Vec<&'a Task> {
        self.plan.tasks.iter().filter(|t| t.on(base)).collect()
    }

    /// The mean of a step's seeds of a curve, by step.
    pub(super) fn curve(&self, base: &str, task: &Task, method: &str) -> Vec<(f64, f64)> {
        let here = |o: &&&Outcome| o.key.base == base && o.key.task == task.name && o.key.method == method;
        let mut at: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for o in self.outcomes.iter().filter(here).filter(|o| o.key.part == Part::Main) {
            for (step, value) in &o.curve {
                at.entry(*step).or_default().push(*value);
            }
        }
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        at.iter().map(|(step, v)| (f64::from(*step), mean(v))).collect()
    }
}

/// A Markdown table.
pub(super) fn markdown(headings: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule: Vec<String> = (0..headings.len()).map(|i| if i == 0 { "---" } else { "---:" }.to_owned()).collect();
    let body: String = rows.iter().map(|r| line(r)).collect();
    format!("{}{}{body}", line(headings), line(&rule))
}

/// The median of a figure; of several, also the range and their number.
pub(super) fn cell(figure: &str, cell: &Cell) -> String {
    let shown = |value| shown(figure, value);
    match (cell.median(), cell.range()) {
        (None, _) => "–".to_owned(),
        (Some(m), None) => shown(m),
        (Some(m), Some((low, high))) => format!("{} ({}–{}, n={})", shown(m), shown(low), shown(high), cell.0.len()),
    }
}

/// Thousands apart.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_medians_with_their_ranges() {
        assert_eq!(Cell(vec![]).median(), None);
        assert_eq!((Cell(vec![2.0]).median(), Cell(vec![2.0]).range()), (Some(2.0), None));
        assert_eq!(Cell(vec![3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!((Cell(vec![4.0, 1.0]).median(), Cell(vec![4.0, 1.0]).range()), (Some(2.5), Some((1.0, 4.0))));
        assert_eq!(["1", "1,000", "22,715,526"].map(str::to_owned), [1, 1000, 22_715_526].map(count));
        assert_eq!(cell("accuracy", &Cell(vec![0.5, 0.75])), "62.5 (50.0–75.0, n=2)");
        assert_eq!([cell("bleu", &Cell(vec![34.5])), cell("loss", &Cell(vec![]))], ["34.5", "–"]);
        let table = markdown(&["a".into(), "b".into()], &[vec!["1".into(), "2".into()]]);
        assert_eq!(table, "| a | b |\n| --- | ---: |\n| 1 | 2 |\n");
    }
}
