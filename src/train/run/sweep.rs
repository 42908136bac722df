//! A sweep: candidates that are trained side by side, each as it would be alone.
//!
//! Candidates have the same examples in the same order, so their training steps are done together, in one forward and one
//! backward pass on the base (`joint`); a micro-batch is cut so that the rows of all candidates together stay within the bound
//! of one. All else (the optimizer's step, evaluations, patience, checkpoints) each [`Run`] does by itself. When all have ended,
//! the one with the best evaluation is what the sweep comes to.

mod bytes;
mod joint;

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use candle_core::Result;

pub(super) use bytes::check_resumes;
use joint::Joint;

use super::{Advance, Autosave, Failed, Outcome, Phase, Run, RunEvents, RunInput, Saved, code_of, resume::Identity};
use crate::{
    admission::train_params::{
        EvalEvent, JobEventBody, MetricsEvent, NoteEvent, SweepCandidate, SweepEvent, SweepRow, WorstEvent,
    },
    delta::Delta,
    model::Base,
    pacing::Pacer,
    train::{eval::better, plan::Candidate},
};

/// A job's candidates under training.
#[derive(Debug)]
pub struct Sweep {
    base: Arc<Base>,
    pacer: Option<Arc<Pacer>>,
    /// The whole job's.
    input: RunInput,
    members: Vec<Member>,
    /// Slot of the loss metric.
    slot: Option<usize>,
    /// Rows that each training example takes, of every candidate.
    rows: Vec<usize>,
    joint: Option<Joint>,
    /// The best candidate, once all have ended: it alone goes on, to what follows training.
    winner: Option<usize>,
    step: u32,
    last_metrics: Option<Instant>,
    autosave: Autosave,
    identity: OnceLock<Identity>,
}

/// A candidate.
#[derive(Debug)]
struct Member {
    candidate: SweepCandidate,
    state: State,
    /// The examples with the highest loss at its best evaluation, to be told if it wins.
    worst: Option<WorstEvent>,
}

#[derive(Debug)]
enum State {
    Live(Box<Run>),
    Out(Box<Out>),
    /// Another one has won.
    Lost,
}

/// A candidate that dropped out.
#[derive(Debug)]
struct Out {
    failed: Failed,
    step: u32,
    best: Option<EvalEvent>,
}

impl Member {
    fn run(&self) -> Option<&Run> {
        if let State::Live(run) = &self.state { Some(run) } else { None }
    }

    fn run_mut(&mut self) -> Option<&mut Run> {
        if let State::Live(run) = &mut self.state { Some(run) } else { None }
    }

    /// How it stands, for the last event.
    fn row(&self, won: bool) -> SweepRow {
        let (best, step, failed) = match &self.state {
            State::Live(run) => (run.best_eval().cloned(), run.step, String::new()),
            State::Out(out) => (out.best.clone(), out.step, out.failed.message.clone()),
            State::Lost => (None, 0, String::new()),
        };
        SweepRow { candidate: self.candidate, best, step, won, failed }
    }
}

impl Run {
    fn best_eval(&self) -> Option<&EvalEvent> {
        self.bests.first().map(|best| &best.eval)
    }

    fn evaluates(&self) -> bool {
        matches!(self.phase, Phase::Eval { .. })
    }

    /// Whether it has done its last step.
    pub(super) fn is_through(&self) -> bool {
        self.stopped || self.step >= self.input.resolved.total_steps
    }
}

impl RunInput {
    /// What a candidate is alone.
    fn alone(&self, candidate: &Candidate) -> Self {
        Self {
            resolved: candidate.resolved.clone(),
            spec: candidate.spec.clone(),
            candidates: Vec::new(),
            ..self.clone()
        }
    }

    /// The candidates: how they are told, and what each is alone.
    fn apart(&self) -> Result<Vec<(SweepCandidate, Self)>> {
        let named = &self.resolved.sweep;
        if named.len() != self.candidates.len() {
            candle_core::bail!("{} candidates, of which {} are named", self.candidates.len(), named.len());
        }
        Ok(named.iter().zip(&self.candidates).map(|(named, c)| (*named, self.alone(c))).collect())
    }
}

/// A candidate's number, counting from 1.
fn number(i: usize) -> u32 {
    u32::try_from(i).unwrap_or(u32::MAX).saturating_add(1)
}

impl Sweep {
    /// Sets all candidates up.
    ///
    /// # Errors
    /// As [`Run::new`].
    pub fn new(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput) -> Result<Self> {
        let member = |(candidate, own)| {
            let run = Run::new(Arc::clone(&base), pacer.clone(), own)?;
            Ok(Member { candidate, state: State::Live(Box::new(run)), worst: None })
        };
        let members = input.apart()?.into_iter().map(member).collect::<Result<Vec<Member>>>()?;
        Ok(Self::of(base, pacer, input, members))
    }

    fn of(base: Arc<Base>, pacer: Option<Arc<Pacer>>, mut input: RunInput, members: Vec<Member>) -> Self {
        input.start = None; // the runs have copied its values
        let rows = members.iter().find_map(Member::run).map(|run| run.rows(&input.train)).unwrap_or_default();
        let step = members.iter().filter_map(Member::run).map(Run::step).max().unwrap_or(0);
        Self {
            base,
            pacer,
            input,
            members,
            slot: None,
            rows,
            joint: None,
            winner: None,
            step,
            last_metrics: None,
            autosave: Autosave::from_step(step),
            identity: OnceLock::new(),
        }
    }

    /// Shows the first candidate's loss in a slot of the loss metric.
    pub(super) fn show_in_slot(&mut self, slot: usize) {
        self.slot = Some(slot);
        self.members.iter_mut().find_map(Member::run_mut).into_iter().for_each(|run| run.show_in_slot(slot));
    }

    /// Optimizer steps done by the candidate that has done most.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// Each candidate's run, `None` where it has dropped out or lost.
    pub fn runs(&self) -> impl Iterator<Item = Option<&Run>> {
        self.members.iter().map(Member::run)
    }

    /// What the variables of the candidate with the best evaluation so far form; `None` before the first evaluation.
    ///
    /// # Errors
    /// The device.
    pub fn delta(&self) -> Result<Option<Delta>> {
        let best = self.leader().and_then(|i| self.members[i].run());
        best.map(Run::delta).transpose()
    }

    /// Does one micro-step: of all candidates' training, or of one candidate's evaluation.
    pub fn advance(&mut self) -> Advance {
        let mut events = Vec::new();
        match self.try_advance(&mut events) {
            Ok(None) => Advance::More(events),
            Ok(Some(outcome)) => Advance::Done(events, Box::new(outcome)),
            Err(e) => {
                let (code, message) = (code_of(&e), format!("step {}: {e}", self.step + 1));
                let first = || self.members.iter().find_map(Member::run);
                let outcome = match self.leader().and_then(|i| self.members[i].run()).or_else(first) {
                    Some(run) => run.fail(code, message),
                    None => Outcome::Failed(Failed { code, message, checkpoint: None }),
                };
                Advance::Done(events, Box::new(outcome))
            }
        }
    }

    fn try_advance(&mut self, events: &mut RunEvents) -> Result<Option<Outcome>> {
        if let Some(winner) = self.winner {
            return Ok(self.alone(winner, events).map(|outcome| named(outcome, winner)));
        }
        if let Some(i) = self.members.iter().position(|m| m.run().is_some_and(Run::evaluates)) {
            return Ok(match self.alone(i, events) {
                Some(Outcome::Failed(failed)) => {
                    self.drop_out(i, failed, events);
                    None
                }
                other => other,
            });
        }
        let trains = |m: &Member| m.run().is_some_and(|run| !run.is_through());
        let training: Vec<usize> = (0..self.members.len()).filter(|i| trains(&self.members[*i])).collect();
        if training.is_empty() {
            return Ok(self.choose(events));
        }
        self.train(&training, events).map(|()| None)
    }

    /// A micro-step of one candidate by itself.
    fn alone(&mut self, i: usize, events: &mut RunEvents) -> Option<Outcome> {
        let (told, outcome) = match self.members[i].run_mut()?.advance() {
            Advance::More(told) => (told, None),
            Advance::Done(told, outcome) => (told, Some(*outcome)),
        };
        self.tell(i, told, events);
        outcome
    }

    /// Passes a candidate's events on under its number.
    fn tell(&mut self, i: usize, told: RunEvents, events: &mut RunEvents) {
        let candidate = number(i);
        let note = |n: NoteEvent| NoteEvent { message: format!("candidate {candidate}: {}", n.message), ..n };
        for body in told {
            events.push(match body {
                JobEventBody::Metrics(m) => JobEventBody::Metrics(MetricsEvent { candidate, ..m }),
                JobEventBody::Eval(e) => JobEventBody::Eval(EvalEvent { candidate, ..e }),
                JobEventBody::Log(n) => JobEventBody::Log(note(n)),
                JobEventBody::Warning(n) => JobEventBody::Warning(note(n)),
                JobEventBody::Worst(worst) => {
                    self.members[i].worst = Some(worst);
                    continue;
                }
                other => other,
            });
        }
    }

    fn drop_out(&mut self, i: usize, failed: Failed, events: &mut RunEvents) {
        let member = &mut self.members[i];
        let message = format!("candidate {} ({}) drops out: {}", number(i), member.candidate, failed.message);
        tracing::info!(code = failed.code, why = %message, "a candidate of a sweep drops out");
        events.push(JobEventBody::Warning(NoteEvent { code: "CANDIDATE_FAILED".to_owned(), message }));
        let row = member.row(false);
        member.state = State::Out(Box::new(Out { failed, step: row.step, best: row.best }));
        self.slot.into_iter().for_each(|slot| self.show_in_slot(slot));
    }

    /// The candidate with the best evaluation so far; of equal ones, the first.
    fn leader(&self) -> Option<usize> {
        let metric = self.input.resolved.eval_metric;
        let evals = self.members.iter().enumerate().filter_map(|(i, m)| Some((i, m.run()?.best_eval()?)));
        let best = evals.reduce(|best, other| if better(other.1, best.1, metric) { other } else { best });
        best.map(|(i, _)| i)
    }

    /// All have ended: tells how they came out. The winner goes on; without one, the job has failed.
    fn choose(&mut self, events: &mut RunEvents) -> Option<Outcome> {
        let winner = self.leader().or_else(|| self.members.iter().position(|m| m.run().is_some()));
        let candidates = self.members.iter().enumerate().map(|(i, m)| m.row(winner == Some(i))).collect();
        events.push(JobEventBody::Sweep(SweepEvent { metric: self.input.resolved.eval_metric, candidates }));
        let Some(winner) = winner else { return Some(Outcome::Failed(self.all_failed())) };
        events.extend(self.members[winner].worst.take().map(JobEventBody::Worst));
        for (i, member) in self.members.iter_mut().enumerate() {
            if i != winner && matches!(member.state, State::Live(_)) {
                member.state = State::Lost;
            }
        }
        self.winner = Some(winner);
        None
    }

    /// The failure of the candidate that went furthest, in the name of all.
    fn all_failed(&mut self) -> Failed {
        let all = self.members.len();
        let outs = self.members.drain(..).enumerate().filter_map(|(i, m)| match m.state {
            State::Out(out) => Some((i, m.candidate, out)),
            _ => None,
        });
        match outs.max_by_key(|(_, _, out)| out.step) {
            Some((i, candidate, out)) => {
                let Failed { code, message, checkpoint } = out.failed;
                let message =
                    format!("all {all} candidates dropped out; candidate {} ({candidate}): {message}", number(i));
                Failed { code, message, checkpoint }
            }
            None => Failed { code: "INTERNAL", message: "a sweep without candidates".to_owned(), checkpoint: None },
        }
    }

    /// A checkpoint of all candidates, if one is due: between two steps, never after the last.
    ///
    /// # Errors
    /// As [`Run::autosave`].
    pub fn autosave(&mut self) -> Result<Option<Saved>> {
        let mut runs = self.members.iter().filter_map(Member::run);
        let evaluates = runs.clone().any(Run::evaluates);
        let between = self.winner.is_none() && self.joint.is_none() && !evaluates && runs.any(|run| !run.is_through());
        if !between || !self.between_steps() || !self.autosave.is_due(self.step, self.input.resolved.checkpoint_every) {
            return Ok(None);
        }
        let begun = Instant::now();
        let bytes = self.to_bytes()?;
        self.autosave = Autosave::made(self.step, begun.elapsed());
        Ok(bytes.map(|bytes| Saved { step: self.step, bytes }))
    }

    /// Whether no candidate is in the middle of a step.
    fn between_steps(&self) -> bool {
        let between = |run: &Run| matches!(&run.phase, Phase::Train(step) if step.todo.is_empty());
        self.members.iter().filter_map(Member::run).all(between)
    }
}

/// The outcome of the sweep, whose published evaluation says whose it is.
fn named(mut outcome: Outcome, winner: usize) -> Outcome {
    if let Outcome::Trained(trained) = &mut outcome {
        trained.best_eval.iter_mut().for_each(|eval| eval.candidate = number(winner));
    }
    outcome
}
