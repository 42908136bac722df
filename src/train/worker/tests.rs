//! Laws of rounds: who goes together, that everybody has one turn in each, and that what happens to one job is its own affair.

use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc::sync_channel},
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{Receiver, channel};

use super::*;
use crate::{
    admission::train_params::ResolvedTraining,
    delta::Delta,
    train::{
        encode::{Encoded, Target},
        laws::{flat, hyper, lora, tiny},
        sharing_laws::{Asks, job, texts},
        sweep_laws::{near, smooth},
    },
};

/// A worker without a thread, whose rounds a test asks for.
struct Rounds {
    worker: Worker,
    reports: Receiver<Report>,
    controls: Vec<Arc<Control>>,
    events: BTreeMap<String, Vec<JobEventBody>>,
    ends: BTreeMap<String, End>,
}

impl Rounds {
    /// Jobs `0`, `1`, ...
    fn of(base: &Arc<Base>, share: usize, inputs: &[RunInput]) -> Self {
        Self::paced(Arc::new(Pacer::new(Duration::from_millis(1), 0.0)), base, share, inputs)
    }

    fn paced(pacer: Arc<Pacer>, base: &Arc<Base>, share: usize, inputs: &[RunInput]) -> Self {
        let (_, starts) = sync_channel(1);
        let (send, reports) = channel(4096);
        let mut worker = Worker::new((Arc::clone(base), pacer), share, starts, send);
        let mut controls = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            let control = Arc::new(Control::default());
            controls.push(Arc::clone(&control));
            worker.begin(Start { id: i.to_string(), input: input.clone(), from: None, control, slot: usize::MAX });
        }
        Self { worker, reports, controls, events: BTreeMap::new(), ends: BTreeMap::new() }
    }

    fn round(&mut self) {
        assert!(self.worker.round());
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::Event(id, event) => self.events.entry(id).or_default().push(*event),
                Report::Ended(id, end) => drop(self.ends.insert(id, *end)),
                Report::Saved(..) => panic!("no checkpoint is due"),
            }
        }
    }

    /// Whom the first job goes with in the next round.
    fn next_company(&mut self) -> Vec<usize> {
        self.worker.active.iter_mut().for_each(|job| job.had = false);
        self.worker.company(0)
    }

    fn finish(&mut self) {
        while !self.worker.active.is_empty() {
            self.round();
        }
    }

    fn steps(&self) -> Vec<u32> {
        self.worker.active.iter().map(|job| job.run().expect("a run").step()).collect()
    }
}

/// What a job comes to alone.
fn alone(base: &Arc<Base>, input: &RunInput) -> (f64, Vec<f32>) {
    let mut rounds = Rounds::of(base, 1, std::slice::from_ref(input));
    rounds.finish();
    trained(&rounds.ends["0"])
}

#[track_caller]
fn trained(end: &End) -> (f64, Vec<f32>) {
    let End::Trained(trained) = end else { panic!("{end:?}") };
    (trained.final_loss, numbers(&trained.delta))
}

fn numbers(delta: &Delta) -> Vec<f32> {
    delta.patches().iter().flat_map(|(_, patch)| patch.tensors()).flat_map(|(_, t)| flat(t)).collect()
}

#[track_caller]
fn assert_as_alone(base: &Arc<Base>, input: &RunInput, end: &End) {
    let ((loss, got), (wanted, want)) = (trained(end), alone(base, input));
    assert!(near(loss, wanted), "{loss}, alone {wanted}");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let norm = want.iter().map(|w| square(*w)).sum::<f64>().sqrt();
    let apart = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum::<f64>().sqrt();
    assert!(got.len() == want.len() && apart <= 1e-3 * norm, "{apart} apart of {norm}");
}

/// Jobs of one piece a step.
fn jobs(base: &Base, n: u32, steps: u32) -> Vec<RunInput> {
    let resolved = smooth(ResolvedTraining { batch_size: 4, ..hyper(steps) });
    (1..=n).map(|seed| job(base, (Asks::Next, seed), &lora(), resolved.clone())).collect()
}

fn long(input: &RunInput, tokens: u32) -> RunInput {
    let one = |i: u32| {
        let ids = (0..tokens).map(|t| 3 + (7 * i + t * t) % 90).collect();
        Encoded::new(ids, Target::Tokens((0..tokens).map(|t| t > 0).collect()))
    };
    let resolved = ResolvedTraining { batch_size: 1, ..input.resolved.clone() };
    RunInput { train: (0..6).map(one).collect(), resolved, ..input.clone() }
}

#[test]
fn everybody_has_one_turn_in_a_round_whoever_goes_together() {
    let base = tiny("llama");
    for share in [1, 2, 3, 8] {
        let mut rounds = Rounds::of(&base, share, &jobs(&base, 5, 6));
        for round in 1..6 {
            rounds.round();
            assert_eq!(rounds.steps(), [round; 5], "{share} share");
        }
    }
}

#[test]
fn small_pieces_go_together_and_long_ones_alone() {
    let base = tiny("llama");
    let small = jobs(&base, 4, 6);
    let company = |share, inputs: &[RunInput]| Rounds::of(&base, share, inputs).worker.company(0);
    assert_eq!(company(1, &small), [0]);
    assert_eq!(company(2, &small), [0, 1]);
    assert_eq!(company(8, &small), [0, 1, 2, 3]);
    // 125 rows and 125 are within the bound of 256; 30 more are not, and neither are 4 texts of at least 4 tokens
    let mixed = [long(&small[0], 125), long(&small[1], 125), long(&small[2], 30), small[0].clone()];
    assert_eq!(company(8, &mixed), [0, 1]);
    assert_eq!(company(8, &[long(&small[0], 200), mixed[1].clone(), small[0].clone()]), [0, 2]);
    // one that has had its turn, and one that shares no more
    let mut rounds = Rounds::of(&base, 8, &small);
    rounds.worker.active[1].had = true;
    rounds.worker.active[2].apart = true;
    assert_eq!(rounds.worker.company(0), [0, 3]);
    assert_eq!(rounds.worker.company(2), [2]);
    // what trains otherwise
    let kl =
        RunInput { resolved: ResolvedTraining { kl_to_base: 0.1, ..small[1].resolved.clone() }, ..small[1].clone() };
    assert_eq!(company(8, &[small[0].clone(), kl, small[2].clone()]), [0, 2]);
}

#[test]
fn each_of_several_jobs_ends_as_it_does_alone_and_tells_the_same() {
    let base = tiny("llama");
    let mut inputs = jobs(&base, 3, 9);
    inputs[1].resolved.total_steps = 5;
    inputs[2].resolved.eval_every = 2;
    inputs[2].validation = texts(Asks::Next, 7, 5);
    let mut rounds = Rounds::of(&base, 8, &inputs);
    assert_eq!(rounds.worker.company(0), [0, 1, 2]);
    rounds.finish();
    for (i, input) in inputs.iter().enumerate() {
        assert_as_alone(&base, input, &rounds.ends[&i.to_string()]);
    }
    let evals = |events: &[JobEventBody]| -> Vec<u32> {
        events.iter().filter_map(|e| if let JobEventBody::Eval(e) = e { Some(e.step) } else { None }).collect()
    };
    assert_eq!(evals(&rounds.events["2"]), [2, 4, 6, 8, 9]);
    assert!(evals(&rounds.events["0"]).is_empty());
    for (id, steps) in [("0", 9), ("1", 5), ("2", 9)] {
        let told: Vec<u32> = rounds.events[id]
            .iter()
            .filter_map(|e| if let JobEventBody::Metrics(m) = e { Some(m.step) } else { None })
            .collect();
        assert!(told.first() == Some(&1) && told.last() == Some(&steps), "job {id}: {told:?}");
    }
}

#[test]
fn one_that_is_paused_or_cancelled_leaves_at_once_and_the_others_go_on() {
    let base = tiny("llama");
    let inputs = jobs(&base, 4, 8);
    let mut rounds = Rounds::of(&base, 8, &inputs);
    rounds.round();
    rounds.round();
    rounds.controls[1].cancel();
    rounds.controls[3].pause();
    assert_eq!(rounds.next_company(), [0, 2]);
    rounds.round();
    assert!(matches!(rounds.ends["1"], End::Cancelled));
    let End::Paused(Some(saved)) = &rounds.ends["3"] else { panic!("{:?}", rounds.ends["3"]) };
    assert_eq!((saved.step, rounds.steps()), (2, vec![3, 3]));
    let bytes = Bytes::from(saved.bytes.clone());
    // it goes on among the others
    let control = Arc::new(Control::default());
    let input = inputs[3].clone();
    rounds.worker.begin(Start { id: "again".into(), input, from: Some(bytes), control, slot: usize::MAX });
    assert_eq!(rounds.next_company(), [0, 1, 2]);
    rounds.finish();
    for (id, input) in [("0", &inputs[0]), ("2", &inputs[2]), ("again", &inputs[3])] {
        assert_as_alone(&base, input, &rounds.ends[id]);
    }
}

/// Serving is busy all the time, and no slowdown is permitted.
#[test]
fn a_round_that_serving_holds_ends_when_something_is_asked() {
    let base = tiny("llama");
    let pacer = Arc::new(Pacer::new(Duration::from_secs(3600), 0.0).keeping(0.0));
    let mut rounds = Rounds::paced(Arc::clone(&pacer), &base, 1, &jobs(&base, 3, 50));
    let asked = Arc::clone(&rounds.controls[2]);
    pacer.set_busy(true);
    std::thread::scope(|s| {
        let round = s.spawn(|| rounds.round());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!round.is_finished(), "it is held");
        asked.cancel();
        pacer.hurry();
        let until = Instant::now() + Duration::from_secs(60);
        while !round.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        let heard = round.is_finished();
        pacer.set_busy(false);
        assert!(heard, "the jobs before it in the round are not held either");
    });
    assert!(matches!(rounds.ends["2"], End::Cancelled));
    assert_eq!(rounds.steps(), [1, 1]);
    // and from then on it is held as before
    pacer.set_busy(true);
    std::thread::scope(|s| {
        let round = s.spawn(|| rounds.round());
        std::thread::sleep(Duration::from_millis(100));
        let held = !round.is_finished();
        pacer.set_busy(false);
        assert!(held);
    });
}

/// A token that the base does not have is an error of the forward; a mask longer than its text is a panic of the losses.
#[test]
fn a_pass_that_fails_or_panics_is_the_end_of_the_guilty_job_only() {
    let base = tiny("llama");
    let unknown = Encoded::new(vec![3, 90_000, 5], Target::Tokens(vec![false, true, true]));
    let torn = Encoded::new(vec![3, 4], Target::Tokens(vec![false, true, true]));
    for (bad, panics) in [(unknown, false), (torn, true)] {
        let mut inputs = jobs(&base, 3, 12);
        let good = inputs[1].train.iter().cloned();
        inputs[1].train = good.chain([bad]).collect();
        let mut rounds = Rounds::of(&base, 8, &inputs);
        assert_eq!(rounds.worker.company(0), [0, 1, 2]);
        rounds.finish();
        let End::Failed(failed) = &rounds.ends["1"] else { panic!("{:?}", rounds.ends["1"]) };
        assert_eq!(failed.code, "INTERNAL");
        assert!(failed.message.contains("step "), "{}", failed.message);
        assert!(!panics || failed.message.contains("panicked"), "{}", failed.message);
        for i in [0, 2] {
            assert_as_alone(&base, &inputs[i], &rounds.ends[&i.to_string()]);
        }
    }
}

#[test]
fn jobs_whose_pass_fails_by_nobodys_fault_share_no_more() {
    let base = tiny("llama");
    let inputs = jobs(&base, 3, 4);
    let mut rounds = Rounds::of(&base, 8, &inputs);
    rounds.round();
    // a job with another base is what no job sees alone
    let other = tiny("llama");
    let mut stranger = Work::new(Arc::clone(&other), None, inputs[1].clone()).expect("a run");
    stranger.advance();
    rounds.worker.active[1].stage = Stage::Run(stranger);
    rounds.round();
    assert_eq!(rounds.steps(), [2, 2, 2], "their pieces were done one by one");
    assert!(rounds.worker.active.iter().all(|job| job.apart));
    assert_eq!(rounds.worker.company(0), [0]);
    rounds.finish();
    for i in [0, 2] {
        assert_as_alone(&base, &inputs[i], &rounds.ends[&i.to_string()]);
    }
    assert!(matches!(rounds.ends["1"], End::Trained(_)));
}

#[test]
fn one_whose_loss_is_not_finite_fails_and_the_others_go_on() {
    let base = tiny("llama");
    let mut inputs = jobs(&base, 3, 10);
    inputs[0].resolved = ResolvedTraining { learning_rate: 100.0, weight_decay: 2.4, ..inputs[0].resolved.clone() };
    let mut rounds = Rounds::of(&base, 8, &inputs);
    rounds.finish();
    let End::Failed(failed) = &rounds.ends["0"] else { panic!("{:?}", rounds.ends["0"]) };
    assert!(["NON_FINITE_LOSS", "DIVERGED"].contains(&failed.code), "{}", failed.code);
    for i in [1, 2] {
        assert_as_alone(&base, &inputs[i], &rounds.ends[&i.to_string()]);
    }
}
