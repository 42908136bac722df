//! Few-shot: a sample of the training examples, the same number of each label.

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{TrainParams, Validation},
    },
    delta::{Problem, Task},
    train::{
        batches,
        dataset::{Dataset, Example},
        validate::LabelSet,
    },
};

/// Leaves `k_per_class` examples of each label in good data, if the request wants that; tells what stands against it.
pub(super) fn take(params: &TrainParams, labels: &LabelSet, data: &mut Dataset) -> Vec<Violation> {
    let Some(k) = params.k_per_class else { return Vec::new() };
    let field = "k_per_class";
    if params.task != Task::SeqCls {
        return vec![violation(field, format!("is for the task seq_cls, this one is {}", params.task.as_str()))];
    }
    if params.problem != Problem::SingleLabel {
        return vec![violation(field, format!("needs one label per text, this job is {}", params.problem.as_str()))];
    }
    if matches!(params.validation, Some(Validation::Fraction(_))) {
        return vec![violation(field, "leaves nothing for validation_fraction; give validation_data")];
    }
    if !(1..=1_000_000).contains(&k) {
        return vec![violation(field, format!("is {k}; accepted is 1 to 1000000"))];
    }
    let class = |example: &Example| match example {
        Example::TextLabel { label, .. } => labels.get(label),
        _ => None,
    };
    let of: Vec<u32> = data.rows.iter().map(|row| class(&row.example).unwrap_or(u32::MAX)).collect();
    match batches::sample(&of, labels.len(), k as usize, params.hyper.seed.unwrap_or(0)) {
        Ok(chosen) => {
            data.rows = chosen.into_iter().map(|i| data.rows[i].clone()).collect();
            Vec::new()
        }
        Err(few) => {
            let name = |i: usize| labels.names().get(i).map_or("", String::as_str);
            let few = few
                .into_iter()
                .map(|(i, n)| violation(field, format!("is {k}, but the label {:?} has {n} examples", name(i))));
            few.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::plan::tests::{lora, params, run};

    #[test]
    fn few_shot_takes_k_of_each_label_and_names_labels_that_have_fewer() {
        let name = |i: usize| if i < 4 { "rare" } else { "often" };
        let line = |i: usize| format!("{{\"text\": \"row {i}\", \"label\": \"{}\"}}\n", name(i));
        let text: String = (0..20).map(line).collect();
        let mut p = params(Task::SeqCls, lora());
        p.k_per_class = Some(4);
        assert_eq!(run(&p, &text, None).unwrap().train.len(), 8);
        p.k_per_class = Some(5);
        let found = run(&p, &text, None).unwrap_err();
        assert_eq!((found.len(), found[0].field.as_str()), (1, "k_per_class"));
        assert!(found[0].message.contains("\"rare\" has 4"), "{found:?}");
        p.k_per_class = Some(2);
        p.validation = Some(Validation::Fraction(0.2));
        assert_eq!(run(&p, &text, None).unwrap_err()[0].field, "k_per_class");
    }
}
