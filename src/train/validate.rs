//! Judges examples across lines: labels, duplicates, and whether there is anything to learn at all.
//!
//! It sees parsed examples only; lines are read by `dataset`, lengths are known after `encode`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use crate::{
    admission::train_params::{PreferenceMethod, TrainParams},
    delta::{Problem, Task},
    train::{
        dataset::{Dataset, Example, Format, Label, Row},
        issue::{Code, Report},
    },
};

/// Fewest examples of a training set.
pub const MIN_EXAMPLES: usize = 2;

pub use crate::admission::check::MAX_LABELS;

/// What examples are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aim {
    /// The task.
    pub task: Task,
    /// Where preferences are learned, how.
    pub preference: Option<PreferenceMethod>,
}

impl From<Task> for Aim {
    fn from(task: Task) -> Self {
        Self { task, preference: None }
    }
}

impl From<&TrainParams> for Aim {
    fn from(params: &TrainParams) -> Self {
        Self { task: params.task, preference: params.preference.map(|p| p.method) }
    }
}

impl Aim {
    fn fits(self, format: Format) -> bool {
        use PreferenceMethod::{Dpo, Kto, Orpo};
        match (format, self.preference) {
            (Format::Pairs, Some(Dpo | Orpo)) | (Format::Rated, Some(Kto)) => true,
            (Format::Pairs | Format::Rated, _) | (_, Some(_)) => false,
            (Format::PromptCompletion, None) => self.task.generates(),
            (Format::Text | Format::Messages, None) => self.task == Task::CausalLm,
            (Format::TextLabel | Format::TextLabels, None) => self.task == Task::SeqCls,
            (Format::TokenLabels, None) => self.task == Task::TokenCls,
        }
    }

    /// Why it cannot use lines of this format.
    fn refusal(self, format: Format) -> String {
        use PreferenceMethod::{Dpo, Kto, Orpo};
        let user = match (self.preference, format) {
            (Some(method @ (Dpo | Orpo)), _) => {
                format!("{} cannot use; it needs {{prompt, chosen, rejected}}", method.as_str())
            }
            (Some(Kto), _) => "kto cannot use; it needs {prompt, completion, label: true or false}".to_owned(),
            (None, Format::Pairs) => "are for dpo and orpo; set preference".to_owned(),
            (None, Format::Rated) => "are for kto; set preference".to_owned(),
            (None, _) => format!("the task {} cannot use", self.task.as_str()),
        };
        format!("has {} lines, which {user}", format.as_str())
    }
}

/// Label names and their indices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSet {
    names: Vec<String>,
    index: HashMap<String, u32>,
    problem: Problem,
}

impl LabelSet {
    /// Label names in index order.
    pub fn new(names: Vec<String>) -> Self {
        let index = names.iter().enumerate().map(|(i, n)| (n.clone(), i as u32)).collect();
        Self { names, index, problem: Problem::SingleLabel }
    }

    /// The same labels for a problem.
    pub fn of_problem(self, problem: Problem) -> Self {
        Self { problem, ..self }
    }

    /// As [`Self::resolve`] for any problem: a regression has one output, `LABEL_0` unless it is given a name.
    pub fn resolve_for(problem: Problem, given: &[String], data: &Dataset, report: &mut Report) -> Self {
        let labels = match (problem, given.is_empty()) {
            (Problem::Regression, true) => Self::new(vec!["LABEL_0".to_owned()]),
            _ => Self::resolve(given, data, report),
        };
        labels.of_problem(problem)
    }

    /// What the labels are for.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// The names, in index order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Number of labels.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The index of a label, if it is one of these.
    pub fn get(&self, label: &Label) -> Option<u32> {
        match label {
            Label::Name(name) => self.index.get(name).copied(),
            Label::Index(i) => u32::try_from(*i).ok().filter(|i| (*i as usize) < self.names.len()),
            Label::Number(_) => None,
        }
    }

    /// Names given by the user, else those of the data: sorted names, or `LABEL_i` up to the largest index.
    pub fn resolve(given: &[String], data: &Dataset, report: &mut Report) -> Self {
        if !given.is_empty() {
            return Self::new(given.to_vec());
        }
        let mut names = BTreeSet::new();
        let mut largest = None;
        for label in data.rows.iter().flat_map(|row| labels_of(&row.example)) {
            match label {
                Label::Name(name) => {
                    names.insert(name.clone());
                }
                Label::Index(i) => largest = largest.max(Some(*i)),
                Label::Number(_) => {} // check_labels names its line
            }
        }
        match largest {
            Some(i) if names.is_empty() && i < MAX_LABELS as u64 => {
                Self::new((0..=i).map(|i| format!("LABEL_{i}")).collect())
            }
            Some(i) if names.is_empty() => {
                report.error(
                    Code::LabelUnknown,
                    0,
                    "",
                    format!("has the label {i}; at most {MAX_LABELS} labels are accepted"),
                );
                Self::default()
            }
            Some(_) => {
                let message = "has labels by name and by index; with both, the request must give the label names";
                report.error(Code::LabelUnknown, 0, "", message);
                Self::new(names.into_iter().collect())
            }
            None => Self::new(names.into_iter().collect()),
        }
    }
}

fn labels_of(example: &Example) -> &[Label] {
    match example {
        Example::TextLabel { label, .. } => std::slice::from_ref(label),
        Example::TextLabels { labels, .. } | Example::TokenLabels { labels, .. } => labels,
        Example::Text(_)
        | Example::PromptCompletion { .. }
        | Example::Messages(_)
        | Example::Pair { .. }
        | Example::Rated { .. } => &[],
    }
}

/// What a training set must be for a task.
pub fn check_train(data: &Dataset, aim: impl Into<Aim>, labels: &LabelSet, report: &mut Report) {
    let aim = aim.into();
    check_common(data, aim, labels, report);
    if data.rows.len() < MIN_EXAMPLES && !data.rows.is_empty() {
        let message = format!("has {} example; at least {MIN_EXAMPLES} are needed", data.rows.len());
        report.error(Code::TooFewExamples, 0, "", message);
    }
    if aim.preference.is_some() {
        check_verdicts(data, report);
    } else if aim.task.generates() {
        check_completions(data, report);
    } else if report.is_ok() && labels.problem != Problem::Regression {
        check_variety(data, labels, report);
    }
}

/// What a validation set must be; rows that are in the training set are pointed out.
pub fn check_validation(data: &Dataset, train: &Dataset, aim: impl Into<Aim>, labels: &LabelSet, report: &mut Report) {
    check_common(data, aim, labels, report);
    let seen: HashSet<u64> = train.rows.iter().map(|r| digest(&r.example)).collect();
    for row in data.rows.iter().filter(|r| seen.contains(&digest(&r.example))) {
        report.warn(Code::TrainValidOverlap, row.line, "", "is in the training data, too: its evaluation says little");
    }
}

/// What any set of examples must be for a task.
pub(super) fn check_common(data: &Dataset, aim: impl Into<Aim>, labels: &LabelSet, report: &mut Report) {
    let (problem, aim) = (labels.problem, aim.into());
    let Some(format) = data.format else { return };
    let fits = aim.fits(format);
    let several = format == Format::TextLabels;
    if aim.task == Task::SeqCls && fits && several != (problem == Problem::MultiLabel) {
        let (line, wanted) = (data.rows.first().map_or(0, |r| r.line), if several { "label" } else { "labels" });
        let message = format!("has {}, but {} needs {wanted} of each text", format.as_str(), problem.as_str());
        report.error(Code::WrongTask, line, "", message);
        return;
    }
    if !fits {
        report.error(Code::WrongTask, 0, "", aim.refusal(format));
        return;
    }
    for row in &data.rows {
        match problem {
            Problem::Regression => check_number(row, report),
            _ => check_labels(row, labels, report),
        }
    }
    let mut first_line = HashMap::new();
    for row in &data.rows {
        let line = *first_line.entry(digest(&row.example)).or_insert(row.line);
        if line != row.line {
            report.warn(Code::Duplicate, row.line, "", format!("is the same example as line {line}"));
        }
    }
}

/// A regression learns numbers.
fn check_number(row: &Row, report: &mut Report) {
    if let Some(label) = labels_of(&row.example).iter().find(|l| !l.number().is_some_and(|x| (x as f32).is_finite())) {
        report.error(Code::WrongType, row.line, "/label", format!("is {label}; a regression needs a number"));
    }
}

fn check_labels(row: &Row, labels: &LabelSet, report: &mut Report) {
    let single = matches!(row.example, Example::TextLabel { .. });
    for (i, label) in labels_of(&row.example).iter().enumerate() {
        if labels.get(label).is_none() {
            let pointer = if single { "/label".to_owned() } else { format!("/labels/{i}") };
            let message = format!("is {label}; accepted are {}", some_of(labels.names()));
            report.error(Code::LabelUnknown, row.line, pointer, message);
        }
    }
}

/// The first few names, for messages.
pub(crate) fn some_of<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 12;
    let mut text = names.iter().take(SHOWN).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

fn check_completions(data: &Dataset, report: &mut Report) {
    let completions: Option<Vec<&str>> = data
        .rows
        .iter()
        .map(|row| match &row.example {
            Example::PromptCompletion { completion, .. } => Some(completion.as_str()),
            _ => None,
        })
        .collect();
    if let Some(all) = completions
        && all.len() >= MIN_EXAMPLES
        && all.windows(2).all(|w| w[0] == w[1])
    {
        let message = "has the same completion in every example: the model will answer it to everything";
        report.warn(Code::IdenticalCompletions, 0, "", message);
    }
}

/// Good answers alone are told apart from nothing.
fn check_verdicts(data: &Dataset, report: &mut Report) {
    let verdict = |row: &Row| match row.example {
        Example::Rated { good, .. } => Some(good),
        _ => None,
    };
    let verdicts: BTreeSet<bool> = data.rows.iter().filter_map(verdict).collect();
    if let (1, Some(only)) = (verdicts.len(), verdicts.first()) {
        let message = format!("has answers with the label {only} only; kto learns more from both kinds");
        report.warn(Code::OneLabel, 0, "", message);
    }
}

/// A classifier needs at least two labels in its data.
fn check_variety(data: &Dataset, labels: &LabelSet, report: &mut Report) {
    let used: BTreeSet<u32> =
        data.rows.iter().flat_map(|r| labels_of(&r.example)).filter_map(|l| labels.get(l)).collect();
    // with several labels allowed, a text without the only one is what it is told apart from
    if let (1, Some(only), Problem::SingleLabel) = (used.len(), used.first(), labels.problem) {
        let name = labels.names().get(*only as usize).map_or("", String::as_str);
        report.error(Code::OneLabel, 0, "", format!("has the label {name:?} only; a classifier needs at least two"));
    }
    for (i, name) in labels.names().iter().enumerate().filter(|(i, _)| !used.contains(&(*i as u32))) {
        report.warn(Code::LabelUnknown, 0, "", format!("has no example of the label {name:?} (index {i})"));
    }
}

// In-process comparison only, never stored: the hasher may change between releases.
fn digest(example: &Example) -> u64 {
    let mut h = DefaultHasher::new();
    example.hash(&mut h);
    h.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::issue::Severity;

    fn check(text: &str, task: Task, given: &[&str]) -> (LabelSet, Report) {
        let (data, mut report) = Dataset::parse(text.as_bytes());
        let given: Vec<_> = given.iter().map(|s| (*s).to_owned()).collect();
        let labels = LabelSet::resolve(&given, &data, &mut report);
        check_train(&data, task, &labels, &mut report);
        (labels, report)
    }

    fn codes(report: &Report) -> Vec<(Code, Severity, u64)> {
        report.issues.iter().map(|i| (i.code, i.severity, i.line)).collect()
    }

    #[test]
    fn labels_come_from_the_request_or_sorted_from_the_data() {
        let two = "{\"text\":\"x\",\"label\":\"b\"}\n{\"text\":\"y\",\"label\":\"a\"}";
        assert_eq!(check(two, Task::SeqCls, &[]).0.names(), ["a", "b"]);
        assert_eq!(check(two, Task::SeqCls, &["b", "a"]).0.names(), ["b", "a"]);
        let by_index = "{\"text\":\"x\",\"label\":0}\n{\"text\":\"y\",\"label\":2}";
        let (labels, report) = check(by_index, Task::SeqCls, &[]);
        assert_eq!(labels.names(), ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert!(report.is_ok() && report.warnings == 1, "label 1 has no example: {report:?}");
        let (labels, report) = check(by_index, Task::SeqCls, &["n", "y", "m"]);
        assert_eq!((labels.get(&Label::Index(2)), report.is_ok()), (Some(2), true));
        let mixed = "{\"text\":\"x\",\"label\":0}\n{\"text\":\"y\",\"label\":\"a\"}";
        assert!(!check(mixed, Task::SeqCls, &[]).1.is_ok());
        assert!(
            !check("{\"text\":\"x\",\"label\":0}\n{\"text\":\"y\",\"label\":99999999999}", Task::SeqCls, &[]).1.is_ok()
        );
    }

    #[test]
    fn unknown_single_and_missing_labels_are_told_apart() {
        let two = "{\"text\":\"x\",\"label\":\"b\"}\n{\"text\":\"y\",\"label\":\"a\"}";
        assert_eq!(codes(&check(two, Task::SeqCls, &["a", "c"]).1), vec![(Code::LabelUnknown, Severity::Error, 1)]);
        let one = "{\"text\":\"x\",\"label\":\"b\"}\n{\"text\":\"y\",\"label\":\"b\"}";
        assert_eq!(codes(&check(one, Task::SeqCls, &[]).1), vec![(Code::OneLabel, Severity::Error, 0)]);
        let tags = "{\"tokens\":[\"x\",\"y\"],\"labels\":[\"O\",\"B\"]}\n{\"tokens\":[\"z\"],\"labels\":[\"Q\"]}";
        assert_eq!(codes(&check(tags, Task::TokenCls, &["O", "B"]).1), vec![(Code::LabelUnknown, Severity::Error, 2)]);
    }

    #[test]
    fn a_set_that_teaches_nothing_is_pointed_out() {
        let same = "{\"prompt\":\"x\",\"completion\":\"b\"}\n{\"prompt\":\"y\",\"completion\":\"b\"}";
        assert_eq!(
            codes(&check(same, Task::CausalLm, &[]).1),
            vec![(Code::IdenticalCompletions, Severity::Warning, 0)]
        );
        let twice = "{\"prompt\":\"x\",\"completion\":\"b\"}\n{\"prompt\":\"x\",\"completion\":\"b\"}\n{\"prompt\":\"q\",\"completion\":\"c\"}";
        assert_eq!(codes(&check(twice, Task::CausalLm, &[]).1), vec![(Code::Duplicate, Severity::Warning, 2)]);
        assert_eq!(
            codes(&check("{\"text\":\"x\"}", Task::CausalLm, &[]).1),
            vec![(Code::TooFewExamples, Severity::Error, 0)]
        );
        assert_eq!(codes(&check("{\"text\":\"x\"}\n{\"text\":\"y\"}", Task::SeqCls, &[]).1)[0].0, Code::WrongTask);
    }

    #[test]
    fn each_way_to_learn_preferences_has_its_own_lines() {
        use PreferenceMethod::{Dpo, Kto, Orpo};
        let line = |i: usize, rest: &str| format!("{{\"prompt\": \"{i}\", {rest}}}\n");
        let three = |rest: [&str; 3]| -> String { (0..3).map(|i| line(i, rest[i])).collect() };
        let pairs = three(["\"chosen\": \"a\", \"rejected\": \"b\""; 3]);
        let (yes, no) = ("\"completion\": \"a\", \"label\": true", "\"completion\": \"a\", \"label\": false");
        let (rated, texts) = (three([yes, no, yes]), three(["\"completion\": \"a\""; 3]));
        let check = |text: &str, preference| {
            let (data, mut report) = Dataset::parse(text.as_bytes());
            check_train(&data, Aim { task: Task::CausalLm, preference }, &LabelSet::default(), &mut report);
            report
        };
        for (text, users) in [(&pairs, &[Some(Dpo), Some(Orpo)][..]), (&rated, &[Some(Kto)][..]), (&texts, &[None][..])]
        {
            for user in [None, Some(Dpo), Some(Orpo), Some(Kto)] {
                let report = check(text, user);
                assert_eq!(report.is_ok(), users.contains(&user), "{text} {user:?} {report:?}");
                assert!(report.is_ok() || report.issues[0].code == Code::WrongTask);
            }
        }
        assert!(check(&texts, Some(Kto)).issues[0].message.contains("label: true or false"));
        assert!(check(&rated, None).issues[0].message.contains("for kto; set preference"));
        assert_eq!(codes(&check(&three([yes; 3]), Some(Kto))), [(Code::OneLabel, Severity::Warning, 0)]);
        assert!(codes(&check(&pairs, Some(Dpo))).is_empty());
    }

    #[test]
    fn rows_shared_with_the_training_set_are_pointed_out() {
        let (train, mut report) = Dataset::parse(b"{\"text\":\"x\"}\n{\"text\":\"y\"}");
        let (valid, _) = Dataset::parse(b"{\"text\":\"z\"}\n{\"text\":\"y\"}");
        check_validation(&valid, &train, Task::CausalLm, &LabelSet::default(), &mut report);
        assert_eq!(codes(&report), vec![(Code::TrainValidOverlap, Severity::Warning, 2)]);
    }

    #[test]
    fn each_problem_has_its_own_targets() {
        let check = |problem: Problem, text: &str, names: &[&str]| {
            let (data, mut report) = Dataset::parse(text.as_bytes());
            let labels = LabelSet::new(names.iter().map(|s| (*s).to_owned()).collect()).of_problem(problem);
            check_train(&data, Task::SeqCls, &labels, &mut report);
            codes(&report)
        };
        let one = "{\"text\":\"x\",\"label\":\"a\"}\n{\"text\":\"y\",\"label\":\"b\"}";
        let many = "{\"text\":\"x\",\"labels\":[\"a\",\"b\"]}\n{\"text\":\"y\",\"labels\":[]}";
        let numbers = "{\"text\":\"x\",\"label\":-1.5}\n{\"text\":\"y\",\"label\":2}";
        assert!(check(Problem::SingleLabel, one, &["a", "b"]).is_empty());
        assert!(check(Problem::MultiLabel, many, &["a", "b"]).is_empty());
        assert!(check(Problem::Regression, numbers, &["LABEL_0"]).is_empty());
        let yes_or_no = "{\"text\":\"x\",\"labels\":[\"a\"]}\n{\"text\":\"y\",\"labels\":[]}";
        assert!(check(Problem::MultiLabel, yes_or_no, &["a"]).is_empty());
        let large = "{\"text\":\"x\",\"label\":1e300}\n{\"text\":\"y\",\"label\":2}";
        assert_eq!(check(Problem::Regression, large, &["LABEL_0"]), [(Code::WrongType, Severity::Error, 1)]);
        assert_eq!(check(Problem::SingleLabel, many, &["a", "b"]), [(Code::WrongTask, Severity::Error, 1)]);
        assert_eq!(check(Problem::MultiLabel, one, &["a", "b"]), [(Code::WrongTask, Severity::Error, 1)]);
        assert_eq!(
            check(Problem::Regression, one, &["LABEL_0"]),
            [(Code::WrongType, Severity::Error, 1), (Code::WrongType, Severity::Error, 2)]
        );
        assert_eq!(check(Problem::MultiLabel, many, &["a", "c"])[0], (Code::LabelUnknown, Severity::Error, 1));
        assert_eq!(check(Problem::SingleLabel, numbers, &["a", "b", "c"])[0], (Code::LabelUnknown, Severity::Error, 1));
    }
}
