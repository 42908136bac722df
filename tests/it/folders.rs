//! Folders on disk: what the command downloads it uploads again, whatever form the delta has.

use std::{path::Path, process::Command};

use deltaserve::{
    delta::{Act, Bottleneck, Delta, DeltaFiles, Half, Patch, Proj, Scaling, Site, Task, Wiring},
    model::testing::Rng,
};

use crate::support::*;

/// Low-rank pairs, scales, and two bottleneck adapters in order at every MLP: no library has a form for all.
pub(crate) fn combination(world: &World, seed: u64) -> DeltaFiles {
    let (mut rng, hidden) = (Rng(seed), world.base.arch.hidden);
    let mut patches = world.random_delta(seed, Task::CausalLm, None).patches().to_vec();
    for (id, entry) in world.base.sites.iter() {
        match entry.site {
            Site::Linear { proj: Proj::V, .. } => {
                patches.push((
                    id,
                    Patch::Scale((random(&mut rng, (1, entry.out_dim), 0.2) + 1.0).unwrap().squeeze(0).unwrap()),
                ));
            }
            Site::Sublayer { half: Half::Mlp, .. } => {
                patches
                    .extend([3, 5].map(|width| (id, Patch::Bottleneck(Box::new(bottleneck(&mut rng, width, hidden))))));
            }
            _ => {}
        }
    }
    let spec = world.random_delta(seed, Task::CausalLm, None).spec;
    world.encode(&Delta::new(spec, patches, None))
}

fn bottleneck(rng: &mut Rng, width: usize, hidden: usize) -> Bottleneck {
    let mut row = |n| random(rng, (1, n), 0.3).squeeze(0).expect("a row");
    let (down_bias, up_bias) = (row(width), row(hidden));
    Bottleneck {
        down: random(rng, (width, hidden), 0.3),
        down_bias,
        up: random(rng, (width, hidden), 0.3),
        up_bias,
        act: Act::Silu,
        scaling: Scaling::Fixed(1.0),
        norm_before: None,
        norm_after: None,
        wiring: Wiring::SEQUENTIAL,
    }
}

fn run(address: &str, args: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_deltaserve")).args(args).args(["--server", address]).output();
    let out = out.expect("the command runs");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = entries.map(|n| n.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_downloaded_can_be_uploaded_again() {
    let world = World::new();
    let running = world.spawn().await;
    let client = &running.client;
    let parts = combination(&world, 3);
    assert!(parts.files.contains_key("delta.json"), "{:?}", parts.files.keys());
    let temporary = tempfile::tempdir().expect("a folder");
    for (name, files) in [("plain", world.delta(1)), ("combined", parts)] {
        let first = client.upload(name, &files).await.expect("an upload");
        let folder = temporary.path().join(name);
        let path = folder.to_string_lossy().into_owned();
        run(&running.address, &["deltas", "download", name, &path]);
        assert_eq!(names(&folder), files.files.keys().cloned().collect::<Vec<_>>());
        std::fs::write(folder.join("training_log.txt"), "not of the delta").expect("a file more");
        run(&running.address, &["deltas", "upload", &format!("{name}-again"), &path]);
        let again = client.delta(&format!("{name}-again")).await.expect("it is there").delta.expect("a delta");
        assert_eq!(again.id, first.id, "the same bytes, the same id");
        assert_eq!(client.text(name, "once", 8).await, client.text(&format!("{name}-again"), "once", 8).await);
    }
    // parts as folders of their own, as libraries write them
    let flat = temporary.path().join("combined");
    let parts = temporary.path().join("parts");
    for file in names(&flat) {
        let target = match file.split_once('.') {
            Some((part, rest)) if part.starts_with("part") => parts.join(part).join(rest),
            _ => parts.join(&file),
        };
        std::fs::create_dir_all(target.parent().expect("a parent")).expect("a folder");
        std::fs::copy(flat.join(&file), target).expect("a copy");
    }
    run(&running.address, &["deltas", "upload", "parts", &parts.to_string_lossy()]);
    let of = async |name: &str| client.delta(name).await.expect("it is there").delta.expect("a delta").id;
    assert_eq!(of("parts").await, of("combined").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_combination_of_many_methods_is_stored_part_by_part() {
    let world = World::new();
    let files = combination(&world, 5);
    let delta = deltaserve::interop::decode(&files, &world.base).expect("it is read");
    let adapters = delta.patches().iter().filter(|(_, p)| matches!(p, Patch::Bottleneck(_))).count();
    assert_eq!(adapters, 2 * world.base.arch.layers, "both adapters of every sublayer");
    let again = deltaserve::interop::encode(&delta, &world.base, &Default::default()).expect("it is written");
    assert_eq!(again.files, files.files);
    let mut torn = files.clone();
    let part = torn.files.keys().find(|n| n.ends_with(".safetensors")).expect("weights").clone();
    torn.files.remove(&part);
    let running = world.start().await;
    let error = running.client.upload("torn", &torn).await.expect_err("refused");
    expect_invalid(&error, &part, &["missing"]);
    running.stop().await;
}
