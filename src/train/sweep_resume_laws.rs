//! Laws of a sweep's checkpoints: one that stops anywhere goes on bit for bit, and bytes that are not its own are refused.

use std::sync::Arc;

use super::{
    laws::{examples, flat, hyper, tiny},
    resume_laws::busy,
    run::{Advance, Outcome, Run, RunInput, Sweep, Work},
    sweep_laws::{lora, smooth, sweep_of, trained, wild},
};
use crate::{
    admission::train_params::{JobEventBody, ResolvedTraining},
    delta::{Delta, Task},
    model::Base,
};

/// What is the same on every machine of a sweep's events, and what each step came to.
fn go(sweep: &mut Sweep, n: usize, story: &mut Vec<String>) -> Option<Outcome> {
    let steps = |sweep: &Sweep| -> Vec<Option<(u32, u64)>> {
        sweep.runs().map(|run| run.map(|run| (run.step(), run.last_loss().to_bits()))).collect()
    };
    for _ in 0..n {
        let before = steps(sweep);
        let (events, end) = match sweep.advance() {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        for (i, (before, after)) in before.into_iter().zip(steps(sweep)).enumerate() {
            if let (Some(before), Some((step, loss))) = (before, after)
                && step != before.0
            {
                story.push(format!("candidate {i} step {step}: {loss:x}"));
            }
        }
        story.extend(events.iter().filter(|e| !matches!(e, JobEventBody::Metrics(_))).map(|e| format!("{e:?}")));
        if end.is_some() {
            return end;
        }
    }
    None
}

#[track_caller]
fn assert_goes_on(base: &Arc<Base>, what: &str, input: &RunInput) {
    let start = || Sweep::new(Arc::clone(base), None, input.clone()).unwrap();
    let (mut told, mut turns, mut sweep) = (Vec::new(), 0, start());
    let straight = loop {
        turns += 1;
        if let Some(end) = go(&mut sweep, 1, &mut told) {
            break trained(end);
        }
    };
    for stop in 1..turns {
        let (mut story, mut sweep) = (Vec::new(), start());
        assert!(go(&mut sweep, stop, &mut story).is_none());
        let bytes = sweep.to_bytes().unwrap().expect("bytes");
        let step = sweep.step();
        assert_eq!(input.check_resumes(&bytes, &base.fingerprint), Ok(step), "{what} {stop}");
        drop(sweep);
        let mut sweep = Sweep::from_bytes(Arc::clone(base), None, input.clone(), &bytes).unwrap();
        assert!(sweep.to_bytes().unwrap().as_deref() == Some(&bytes[..]), "{what}: other bytes after {stop}");
        let end = trained(go(&mut sweep, usize::MAX, &mut story).expect("an end"));
        assert_eq!(story, told, "{what}: stopped after {stop} turns, at step {step}");
        assert!(end.checkpoint == straight.checkpoint, "{what}: other weights, stopped after {stop}");
        assert_eq!(
            (end.final_loss.to_bits(), end.best_eval),
            (straight.final_loss.to_bits(), straight.best_eval.clone())
        );
    }
}

#[test]
fn a_sweep_may_stop_at_any_micro_step() {
    let base = tiny("llama");
    let resolved = ResolvedTraining { eval_every: 2, patience: 1, min_delta: 0.02, worst_examples: 2, ..busy(5) };
    let (_, whole) = sweep_of(&base, Task::CausalLm, &lora(0.2), &resolved, &[(1e-7, 2), (1e-2, 2), (1e-2, 3)]);
    let whole = RunInput { held: examples(Task::CausalLm, 3), ..whole };
    assert_goes_on(&base, "patience, dropout, accumulation, a held text", &whole);
    let (resolved, named) = wild(&[1e-3, 100.0, 1e-2]);
    let (_, whole) = sweep_of(&base, Task::CausalLm, &lora(0.0), &resolved, &named);
    assert_goes_on(&base, "one has dropped out", &whole);
}

#[test]
fn what_a_sweeps_checkpoint_does_not_belong_to_and_a_torn_one_are_refused() {
    let base = tiny("llama");
    let of = |rates: [f64; 2]| {
        let named = rates.map(|rate| (rate, 2));
        sweep_of(&base, Task::CausalLm, &lora(0.0), &busy(6), &named)
    };
    let (jobs, whole) = of([1e-3, 1e-2]);
    let mut sweep = Sweep::new(Arc::clone(&base), None, whole.clone()).unwrap();
    assert!(sweep.delta().unwrap().is_none(), "nothing is known before the first evaluation");
    go(&mut sweep, 5, &mut Vec::new());
    let bytes = sweep.to_bytes().unwrap().unwrap();
    let says = |input: &RunInput, bytes: &[u8]| {
        let checked = input.check_resumes(bytes, &base.fingerprint).map_err(|e| e.to_string());
        let made = Work::from_bytes(Arc::clone(&base), None, input.clone(), bytes).map(|work| work.step());
        assert_eq!(made.map_err(|e| e.to_string()), checked, "both say the same");
        checked
    };
    assert_eq!(says(&whole, &bytes), Ok(sweep.step()));
    assert!(says(&of([1e-3, 2e-2]).1, &bytes).unwrap_err().contains("other hyper-parameters"));
    let other = RunInput { validation: examples(Task::CausalLm, 6), ..whole.clone() };
    assert!(says(&other, &bytes).unwrap_err().contains("other examples"));
    for end in [0, 5, 16, 20, 30, bytes.len() / 2, bytes.len() - 1] {
        assert!(says(&whole, &bytes[..end]).unwrap_err().contains("unreadable"), "{end}");
    }
    let longer = [&bytes[..], b"x"].concat();
    assert!(says(&whole, &longer).unwrap_err().contains("unreadable"));
    let (header, frames) = apart(&bytes);
    let swapped = joined(header.clone(), &[frames[1].clone(), frames[0].clone()]);
    assert!(says(&whole, &swapped).unwrap_err().contains("other hyper-parameters"));
    assert_eq!(apart(&joined(header.clone(), &frames)), (header.clone(), frames.clone()));
    assert_eq!(says(&whole, &joined(header.clone(), &frames)), Ok(sweep.step()), "spaces behind the header or none");
    let mut broken = frames.clone();
    broken[1][..8].fill(0xff);
    assert!(says(&whole, &joined(header.clone(), &broken)).unwrap_err().contains("unreadable"));
    let mut unknown = header.clone();
    unknown["winner"] = 2.into();
    assert!(says(&whole, &joined(unknown, &frames)).unwrap_err().contains("unreadable"));
    let mut newer = header;
    newer["form"] = 99.into();
    assert!(says(&whole, &joined(newer, &frames)).unwrap_err().contains("form 99"));
    // a run is no sweep, and a sweep no run
    let mut run = Run::new(Arc::clone(&base), None, jobs[0].clone()).unwrap();
    run.advance();
    let plain = run.to_bytes().unwrap().unwrap();
    assert!(says(&whole, &plain).unwrap_err().contains("it is no sweep"));
    assert!(says(&jobs[0], &bytes).unwrap_err().contains("unreadable"));
}

/// The header, and the candidates' bytes.
fn apart(bytes: &[u8]) -> (serde_json::Value, Vec<Vec<u8>>) {
    let len = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
    let (header, mut rest) = bytes[24..].split_at(len);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let mut frames = Vec::new();
    for candidate in header["candidates"].as_array().unwrap() {
        let (own, more) = rest.split_at(candidate["bytes"].as_u64().unwrap() as usize);
        frames.push(own.to_vec());
        rest = more;
    }
    (header, frames)
}

/// What [`apart`] takes apart; lengths are those of the frames.
fn joined(mut header: serde_json::Value, frames: &[Vec<u8>]) -> Vec<u8> {
    for (i, frame) in frames.iter().enumerate() {
        header["candidates"][i]["bytes"] = frame.len().into();
    }
    let header = serde_json::to_vec(&header).unwrap();
    let len = (header.len() as u64).to_le_bytes();
    [&b"deltaserve.sweep"[..], &len, &header, &frames.concat()].concat()
}

#[test]
fn what_is_published_of_a_running_sweep_is_the_best_candidate_so_far() {
    let base = tiny("llama");
    let resolved = smooth(ResolvedTraining { eval_every: 3, ..hyper(9) });
    let (_, whole) = sweep_of(&base, Task::CausalLm, &lora(0.0), &resolved, &[(1e-7, 2), (1e-2, 2)]);
    let mut work = Work::new(Arc::clone(&base), None, whole.clone()).unwrap();
    while work.step() < 4 {
        work.advance();
    }
    let bytes = work.to_bytes().unwrap().expect("bytes");
    let again = Work::from_bytes(Arc::clone(&base), None, whole, &bytes).unwrap();
    let delta = again.delta().unwrap().expect("it has been evaluated");
    let Work::Sweep(sweep) = &again else { panic!("a sweep") };
    let leads = sweep.runs().nth(1).flatten().expect("the second learns").delta().unwrap();
    let numbers = |d: &Delta| -> Vec<f32> {
        d.patches().iter().flat_map(|(_, p)| p.tensors()).flat_map(|(_, t)| flat(t)).collect()
    };
    assert_eq!(numbers(&delta), numbers(&leads));
}
