//! What a run is made of beside its options and rows: the names of its labels, the steps of a memory run, the base's tensors.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::plan::{BaseEntry, Plan, Task};
use crate::model::folder_fingerprint;

/// Of the tasks that a run learns from, and of a memory run its steps: 16 hexadecimal digits.
pub(super) fn inputs<'a>(tasks: impl IntoIterator<Item = &'a Task>, steps: Option<u32>) -> anyhow::Result<String> {
    let mut sha = Sha256::new();
    for task in tasks {
        sha.update(serde_json::to_vec(&task.label_names)?);
    }
    sha.update(serde_json::to_vec(&steps)?);
    Ok(hex::encode(sha.finalize())[..16].to_owned())
}

/// The fingerprint of a base that is a folder; empty of any other, and of one that cannot be read: both are known when the
/// base is loaded.
pub(super) fn fingerprint(plan: &Plan, base: &BaseEntry) -> String {
    let folder = plan.base(base);
    let folder = Path::new(&folder);
    if !folder.is_dir() {
        return String::new();
    }
    folder_fingerprint(folder).map(|f| f.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing;

    fn task(labels: &[&str]) -> Task {
        let row = serde_json::json!({"name": "t", "kind": "seq-cls", "train": "a", "test": "b"});
        let task: Task = serde_json::from_value(row).unwrap();
        Task { label_names: labels.iter().map(|l| (*l).to_owned()).collect(), ..task }
    }

    #[test]
    fn labels_and_steps_make_other_runs() {
        let of = |labels: &[&str], steps| inputs([&task(labels)], steps).unwrap();
        let all = [of(&[], None), of(&["a", "b"], None), of(&["b", "a"], None), of(&[], Some(3)), of(&[], Some(4))];
        for (i, one) in all.iter().enumerate() {
            assert!(one.len() == 16 && !all[..i].contains(one), "{all:?}");
        }
        assert_eq!(of(&["a"], Some(3)), of(&["a"], Some(3)));
        assert_ne!(inputs([&task(&["a"]), &task(&["b"])], None).unwrap(), of(&["a"], None));
    }

    #[test]
    fn a_folder_has_the_fingerprint_that_it_is_loaded_with() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(&dir.path().join("base"), &testing::tiny_llama(), 7).unwrap();
        std::fs::write(dir.path().join("rows.jsonl"), "{\"text\":\"a\",\"label\":\"b\"}\n").unwrap();
        let plan = serde_json::json!({
            "title": "t", "bases": [{"name": "here", "path": "base"}, {"name": "hub", "path": "some/where"}],
            "tasks": [{"name": "t", "kind": "seq-cls", "train": "rows.jsonl", "test": "rows.jsonl"}],
            "methods": [{"name": "lora", "options": ["--method", "lora"]}]
        });
        let path = dir.path().join("plan.json");
        std::fs::write(&path, plan.to_string()).unwrap();
        let plan = Plan::read(&path).unwrap();
        let loaded = crate::model::Base::load(&dir.path().join("base"), &Default::default()).unwrap();
        assert_eq!(fingerprint(&plan, &plan.bases[0]), loaded.fingerprint.to_string());
        assert_eq!(fingerprint(&plan, &plan.bases[1]), "");
    }
}
