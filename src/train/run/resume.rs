//! A run as bytes: enough to go on as if it had never stopped, bit for bit.
//!
//! The bytes are safetensors, with `<kind>.<i>` for the variable `i`: `var`, AdamW's `m` and `v`, the weights of the `best`
//! evaluation and of the next best ones (`best1`, `best2`, ...), the last `good` ones and those that are `unproven`, EWC's
//! `fisher` and `start`. What is no tensor is JSON in the metadata. The order of the data, the learning rate and dropout are
//! functions of the seed and the step, so the step is all that is kept of them; variables change only where a step ends, so a
//! step under way is begun again.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Device, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Autosave, Phase, Run, RunInput, best::Best, sweep};
use crate::{
    admission::train_params::EvalEvent,
    ids::BaseFingerprint,
    model::Base,
    pacing::Pacer,
    train::{
        encode::{Encoded, Target},
        ewc::Penalty,
        generate::Question,
        trainable::Snapshot,
    },
};

/// Form of the bytes.
pub(super) const FORM: u32 = 1;
/// Key of the metadata.
const KEY: &str = "deltaserve.run";

/// Why a checkpoint does not continue a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// No run, or a torn one.
    #[error("the checkpoint is unreadable: {0}")]
    Unreadable(String),
    /// Of another version of the server.
    #[error("the checkpoint has form {0}; this version reads form {FORM}")]
    Form(u32),
    /// The server has another base now.
    #[error("the checkpoint belongs to the base {was}; this server has {is}")]
    Base {
        /// Fingerprint of the checkpoint's base.
        was: String,
        /// Fingerprint of the server's.
        is: String,
    },
    /// What was resolved from the request is not what it was.
    #[error(
        "the checkpoint belongs to other hyper-parameters: what the request leaves open is resolved differently now"
    )]
    Hyper,
    /// The examples' tokens are not what they were.
    #[error(
        "the checkpoint belongs to other examples: the data or the base's tokenizer has changed (digest {was}, now {is})"
    )]
    Data {
        /// Digest of the checkpoint's examples.
        was: String,
        /// Digest of these.
        is: String,
    },
}

/// What must be the same for a run to go on, as SHA-256 in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    base: String,
    hyper: String,
    data: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    form: u32,
    of: Identity,
    step: u32,
    /// Bits: JSON has no NaN.
    last_loss: u64,
    /// The evaluation after this step is still to be made.
    evaluate: bool,
    stopped: bool,
    best: Option<EvalEvent>,
    /// The next best evaluations that are kept, best first.
    #[serde(default)]
    runners: Vec<EvalEvent>,
    /// Bits of the figure that patience measures by, and evaluations without a gain.
    patience: (Option<u64>, u32),
    good: Option<u32>,
    unproven: Option<u32>,
    /// Bits of EWC's strength.
    ewc: Option<u64>,
    /// The losses of the training examples were told.
    #[serde(default)]
    told: bool,
}

/// The kind of the weights at a place among the best evaluations.
fn kind_of(place: usize) -> String {
    if place == 0 { "best".to_owned() } else { format!("best{place}") }
}

impl RunInput {
    pub(super) fn identity(&self, base: &BaseFingerprint) -> Result<Identity> {
        let hyper = Sha256::digest(serde_json::to_vec(&self.resolved.of_training()).map_err(Error::wrap)?);
        let mut data = Sha256::new();
        for examples in [&self.train, &self.validation, &self.held] {
            data.update((examples.len() as u64).to_le_bytes());
            examples.iter().for_each(|e| add_example(&mut data, e));
        }
        self.quiz.questions.iter().for_each(|q| add_question(&mut data, q));
        if !self.replay.is_empty() {
            data.update((self.replay.len() as u64).to_le_bytes());
            self.replay.iter().for_each(|e| add_example(&mut data, e));
        }
        Ok(Identity { base: base.to_string(), hyper: hex::encode(hyper), data: hex::encode(data.finalize()) })
    }

    /// The step at which a checkpoint continues this input on this base.
    ///
    /// # Errors
    /// [`ResumeError`]: it is unreadable, or belongs to something else.
    pub fn check_resumes(&self, bytes: &[u8], base: &BaseFingerprint) -> std::result::Result<u32, ResumeError> {
        let identity = self.identity(base).map_err(|e| ResumeError::Unreadable(e.to_string()))?;
        if !self.candidates.is_empty() {
            return sweep::check_resumes(self, bytes, (&identity, base));
        }
        Ok(State::read(bytes, &identity)?.step)
    }
}

/// Every list with its length ahead, so that no two examples give the same bytes.
fn add_example(h: &mut Sha256, e: &Encoded) {
    let mut add = |kind: u8, words: &mut dyn ExactSizeIterator<Item = u32>| {
        h.update([kind]);
        h.update((words.len() as u64).to_le_bytes());
        words.for_each(|w| h.update(w.to_le_bytes()));
    };
    add(0, &mut e.tokens.iter().copied());
    add(1, &mut e.source.iter().copied());
    match &e.target {
        Target::Tokens(mask) => add(2, &mut mask.iter().map(|m| u32::from(*m))),
        Target::Label(label) => add(3, &mut [*label].into_iter()),
        Target::Labels(labels) => add(4, &mut labels.iter().copied()),
        Target::Value(bits) => add(5, &mut [*bits].into_iter()),
        Target::Tags(tags) => {
            add(6, &mut tags.iter().map(|(at, _)| *at));
            add(7, &mut tags.iter().map(|(_, label)| *label));
        }
        Target::Preferred(mask, _) => add(8, &mut mask.iter().map(|m| u32::from(*m))),
        Target::Rated(mask, good, _) => {
            add(9, &mut mask.iter().map(|m| u32::from(*m)));
            add(10, &mut [u32::from(*good)].into_iter());
        }
    }
    if let Some(other) = e.other() {
        add(11, &mut other.tokens.iter().copied());
        add(12, &mut other.learn.iter().map(|m| u32::from(*m)));
    }
}

fn add_question(h: &mut Sha256, q: &Question) {
    for words in [&q.prompt, &q.source] {
        h.update((words.len() as u64).to_le_bytes());
        words.iter().for_each(|w| h.update(w.to_le_bytes()));
    }
    h.update((q.gold.len() as u64).to_le_bytes());
    h.update(&q.gold);
}

impl Identity {
    /// Whether a checkpoint of this identity continues a job of the other.
    pub(super) fn check(&self, of: &Self) -> std::result::Result<(), ResumeError> {
        if self.base != of.base {
            return Err(ResumeError::Base { was: self.base.clone(), is: of.base.clone() });
        }
        if self.data != of.data {
            return Err(ResumeError::Data { was: self.data.clone(), is: of.data.clone() });
        }
        if self.hyper != of.hyper {
            return Err(ResumeError::Hyper);
        }
        Ok(())
    }
}

impl State {
    fn read(bytes: &[u8], of: &Identity) -> std::result::Result<Self, ResumeError> {
        let unreadable = |what: &dyn std::fmt::Display| ResumeError::Unreadable(what.to_string());
        // also checks that the bytes are all there
        let whole = safetensors::SafeTensors::deserialize(bytes).map_err(|e| unreadable(&e))?;
        drop(whole);
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| unreadable(&e))?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let text = text.ok_or_else(|| unreadable(&"it is no run"))?;
        let state: serde_json::Value = serde_json::from_str(text).map_err(|e| unreadable(&e))?;
        match state.get("form").and_then(serde_json::Value::as_u64) {
            Some(form) if form != u64::from(FORM) => return Err(ResumeError::Form(form as u32)),
            _ => {}
        }
        let state: Self = serde_json::from_value(state).map_err(|e| unreadable(&e))?;
        state.of.check(of)?;
        Ok(state)
    }
}

impl Run {
    /// The run as bytes, as of the start of the step that is under way. `None` of full fine-tuning, whose checkpoint would
    /// be several models, and before EWC's information is complete: nothing has been trained yet.
    ///
    /// # Errors
    /// The device or the encoding.
    pub fn to_bytes(&self) -> Result<Option<Vec<u8>>> {
        if self.trainable.is_full() || self.fisher.is_some() {
            return Ok(None);
        }
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        let mut put = |kind: &str, i: usize, t: &Tensor| -> Result<()> {
            tensors.insert(format!("{kind}.{i}"), t.to_device(&Device::Cpu)?);
            Ok(())
        };
        for (i, v) in self.trainable.vars().iter().enumerate() {
            put("var", i, &v.var.as_detached_tensor())?;
        }
        for (i, (m, v)) in self.optimizer.moments().enumerate() {
            put("m", i, m)?;
            put("v", i, v)?;
        }
        for (place, best) in self.bests.all().iter().enumerate() {
            for (i, t) in best.snapshot.tensors().iter().enumerate() {
                put(&kind_of(place), i, t)?;
            }
        }
        let kept = [("good", self.good.as_ref().map(|(_, s)| s)), ("unproven", self.unproven.as_ref().map(|(_, s)| s))];
        for (kind, snapshot) in kept {
            for (i, t) in snapshot.map(Snapshot::tensors).unwrap_or_default().iter().enumerate() {
                put(kind, i, t)?;
            }
        }
        for (i, (fisher, start)) in self.penalty.iter().flat_map(Penalty::terms) {
            put("fisher", i, fisher)?;
            put("start", i, start)?;
        }
        let of = match self.identity.get() {
            Some(identity) => identity.clone(),
            None => {
                let identity = self.input.identity(&self.base.fingerprint)?;
                self.identity.get_or_init(|| identity).clone()
            }
        };
        let (reached, without_gain) = self.patience.count();
        let state = State {
            form: FORM,
            of,
            step: self.step,
            last_loss: self.last_loss.to_bits(),
            evaluate: matches!(self.phase, Phase::Eval { .. }),
            stopped: self.stopped,
            best: self.bests.first().map(|b| b.eval.clone()),
            runners: self.bests.all().iter().skip(1).map(|b| b.eval.clone()).collect(),
            patience: (reached.map(f64::to_bits), without_gain),
            good: self.good.as_ref().map(|(step, _)| *step),
            unproven: self.unproven.as_ref().map(|(step, _)| *step),
            ewc: self.penalty.as_ref().map(|p| p.lambda().to_bits()),
            told: self.told,
        };
        let text = serde_json::to_string(&state).map_err(Error::wrap)?;
        safetensors::serialize(&tensors, Some(HashMap::from([(KEY.to_owned(), text)]))).map(Some).map_err(Error::wrap)
    }

    /// Goes on from [`Self::to_bytes`], given the same input on the same base.
    ///
    /// # Errors
    /// [`ResumeError`] as a message, or the device.
    pub fn from_bytes(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput, bytes: &[u8]) -> Result<Self> {
        let identity = input.identity(&base.fingerprint)?;
        let state = State::read(bytes, &identity).map_err(|e| Error::Msg(e.to_string()))?;
        let mut run = Self::new(base, pacer, input)?;
        let tensors = candle_core::safetensors::load_buffer(bytes, &run.base.device)?;
        let n = run.trainable.vars().len();
        let one = |kind: &str, i: usize| {
            let name = format!("{kind}.{i}");
            tensors.get(&name).cloned().ok_or_else(|| Error::Msg(format!("the checkpoint lacks {name}")))
        };
        let all = |kind: &str| (0..n).map(|i| one(kind, i)).collect::<Result<Vec<Tensor>>>();
        run.trainable.restore(&Snapshot::of(all("var")?))?;
        run.optimizer.restore(state.step, all("m")?.into_iter().zip(all("v")?))?;
        let bests = state.best.into_iter().chain(state.runners).enumerate();
        let bests = bests.map(|(place, eval)| Ok(Best { eval, snapshot: Snapshot::of(all(&kind_of(place))?) }));
        run.bests.restore(bests.collect::<Result<_>>()?);
        let kept = |kind: &str, step: Option<u32>| {
            step.map(|step| all(kind).map(|tensors| (step, Snapshot::of(tensors)))).transpose()
        };
        (run.good, run.unproven) = (kept("good", state.good)?, kept("unproven", state.unproven)?);
        run.fisher = None;
        run.penalty = state.ewc.map(|lambda| {
            let term =
                |i| tensors.get(&format!("fisher.{i}")).cloned().zip(tensors.get(&format!("start.{i}")).cloned());
            Penalty::new(f64::from_bits(lambda), (0..n).map(term).collect())
        });
        run.patience.go_on(state.patience.0.map(f64::from_bits), state.patience.1);
        run.batches.skip(state.step as usize);
        run.replays.skip(state.step as usize);
        (run.step, run.begun, run.stopped, run.told) = (state.step, state.step, state.stopped, state.told);
        run.autosave = Autosave::from_step(state.step);
        run.last_loss = f64::from_bits(state.last_loss);
        if state.evaluate {
            run.phase = run.begin_eval();
        }
        // the same by what was just read
        run.identity = identity.into();
        Ok(run)
    }
}
