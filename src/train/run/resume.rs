//! A run between two steps as bytes: enough to go on as if it had never stopped, bit for bit.
//!
//! The bytes are safetensors: `var.<i>`, `m.<i>` and `v.<i>` of every variable in order, `best.<i>` of the best evaluation's
//! checkpoint, and what is no tensor as JSON in the metadata. The order of the data, the schedule and dropout are functions
//! of the seed and the step, so the step is all that is kept of them.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Device, Error, Result, Tensor, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Best, Phase, Run, RunInput};
use crate::{admission::train_params::EvalEvent, model::Base, pacing::Pacer, train::trainable::Snapshot};

/// Form of the bytes.
const VERSION: u32 = 1;
/// Key of the metadata.
const KEY: &str = "deltaserve.run";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    /// Digest of hyper-parameters and examples.
    input: String,
    step: u32,
    /// Bits of the last loss: JSON has no NaN.
    last_loss: u64,
    best: Option<EvalEvent>,
}

impl RunInput {
    /// SHA-256 of what must be the same for a run to go on: hyper-parameters and every token.
    ///
    /// # Errors
    /// None that a caller could mend.
    pub fn digest(&self) -> Result<String> {
        let mut h = Sha256::new();
        h.update(serde_json::to_vec(&self.resolved).map_err(Error::wrap)?);
        for examples in [&self.train, &self.validation] {
            h.update((examples.len() as u64).to_le_bytes());
            examples.iter().for_each(|e| h.update(format!("{e:?}")));
        }
        Ok(h.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }
}

impl Run {
    /// The run as bytes; `None` within a step or an evaluation.
    ///
    /// # Errors
    /// The device or the encoding.
    pub fn to_bytes(&self) -> Result<Option<Vec<u8>>> {
        let between = matches!(&self.phase, Phase::Train(step) if step.todo.is_empty());
        if !between {
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
        if let Some(best) = &self.best {
            best.snapshot.tensors().iter().enumerate().try_for_each(|(i, t)| put("best", i, t))?;
        }
        let state = State {
            version: VERSION,
            input: self.input.digest()?,
            step: self.step,
            last_loss: self.last_loss.to_bits(),
            best: self.best.as_ref().map(|b| b.eval.clone()),
        };
        let text = serde_json::to_string(&state).map_err(Error::wrap)?;
        safetensors::serialize(&tensors, Some(HashMap::from([(KEY.to_owned(), text)]))).map(Some).map_err(Error::wrap)
    }

    /// Goes on from [`Self::to_bytes`].
    ///
    /// # Errors
    /// Bytes of another form, or of other hyper-parameters or examples; the device.
    pub fn from_bytes(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput, bytes: &[u8]) -> Result<Self> {
        let mut run = Self::new(base, pacer, input)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(Error::wrap)?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let Some(text) = text else { bail!("the checkpoint is no run") };
        let state: State = serde_json::from_str(text).map_err(Error::wrap)?;
        if state.version != VERSION {
            bail!("the checkpoint has form {}, this version reads {VERSION}", state.version);
        }
        if state.input != run.input.digest()? {
            bail!("the checkpoint belongs to other hyper-parameters or examples");
        }
        let tensors = candle_core::safetensors::load_buffer(bytes, &run.base.device)?;
        let all = |kind: &str| -> Result<Vec<Tensor>> {
            let of = |i: usize| tensors.get(&format!("{kind}.{i}")).cloned();
            let found: Vec<Tensor> = (0..run.trainable.vars().len()).map_while(of).collect();
            if found.len() != run.trainable.vars().len() {
                bail!("the checkpoint lacks {kind}.{}", found.len());
            }
            Ok(found)
        };
        let (values, m, v) = (all("var")?, all("m")?, all("v")?);
        let best = match state.best {
            Some(eval) => Some(Best { eval, snapshot: Snapshot::of(all("best")?) }),
            None => None,
        };
        let snapshot = Snapshot::of(values);
        run.trainable.restore(&snapshot)?;
        run.optimizer.restore(state.step, m.into_iter().zip(v))?;
        for _ in 0..state.step {
            run.batches.next_batch();
        }
        run.good = run.good.take().map(|_| (state.step, snapshot));
        (run.step, run.last_loss, run.best) = (state.step, f64::from_bits(state.last_loss), best);
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::train_params::{JobEventBody, LoraPart, MethodPart, Schedule},
        delta::Task,
        train::{
            laws::{examples, hyper, input, tiny},
            run::{Advance, Outcome},
        },
    };

    fn made(dropout: f64, packing: bool) -> RunInput {
        let part = LoraPart { rank: Some(4), dropout: Some(dropout), ..LoraPart::default() };
        let mut resolved = hyper(24);
        resolved.schedule = Schedule::Cosine;
        resolved.warmup_steps = 3;
        resolved.weight_decay = 0.01;
        resolved.grad_accumulation = 2;
        resolved.batch_size = 4;
        resolved.eval_every = 5;
        resolved.packing = packing;
        let mut input = input(&tiny("llama"), Task::CausalLm, &[MethodPart::Lora(part)], resolved);
        input.validation = examples(Task::CausalLm, 6);
        input
    }

    /// Runs to a step, or to the end: losses and evaluations by step, and the bytes at the stop.
    fn advance(run: &mut Run, to: Option<u32>, seen: &mut Vec<(u32, u64)>) -> (Vec<u8>, Option<Vec<u8>>) {
        loop {
            if let (true, Some(bytes)) = (to == Some(run.step()), run.to_bytes().unwrap()) {
                return (bytes, None);
            }
            let (events, end) = match run.advance() {
                Advance::More(events) => (events, None),
                Advance::Done(events, outcome) => (events, Some(outcome)),
            };
            seen.extend(events.iter().filter_map(|e| match e {
                JobEventBody::Eval(e) => Some((e.step, e.loss.to_bits())),
                _ => None,
            }));
            match end.map(|o| *o) {
                Some(Outcome::Trained(t)) => return (vec![], Some(t.checkpoint)),
                Some(Outcome::Failed(f)) => panic!("{f:?}"),
                None => {}
            }
        }
    }

    #[test]
    fn a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not() {
        for (dropout, packing) in [(0.0, false), (0.2, false), (0.1, true)] {
            let base = tiny("llama");
            let start = || Run::new(Arc::clone(&base), None, made(dropout, packing)).unwrap();
            let mut whole = Vec::new();
            let (_, straight) = advance(&mut start(), None, &mut whole);
            for stop in [1, 7, 12, 23] {
                let mut seen = Vec::new();
                let (bytes, _) = advance(&mut start(), Some(stop), &mut seen);
                let mut run = Run::from_bytes(Arc::clone(&base), None, made(dropout, packing), &bytes).unwrap();
                assert_eq!(run.step(), stop);
                assert_eq!(run.to_bytes().unwrap().map(|b| b.len()), Some(bytes.len()));
                let (_, end) = advance(&mut run, None, &mut seen);
                assert!(end == straight && seen == whole, "dropout {dropout}, packing {packing}, stopped at {stop}");
            }
        }
    }

    #[test]
    fn other_examples_or_hyper_parameters_are_refused() {
        let base = tiny("llama");
        let (bytes, _) = advance(&mut Run::new(Arc::clone(&base), None, made(0.0, false)).unwrap(), Some(3), &mut vec![]);
        let refuse = |input: RunInput, bytes: &[u8]| {
            Run::from_bytes(Arc::clone(&base), None, input, bytes).map(|_| ()).unwrap_err().to_string()
        };
        let other = RunInput { train: examples(Task::CausalLm, 39), ..made(0.0, false) };
        assert!(refuse(other, &bytes).contains("other hyper-parameters or examples"));
        let mut other = made(0.0, false);
        other.resolved.learning_rate *= 2.0;
        assert!(refuse(other, &bytes).contains("other hyper-parameters or examples"));
        assert!(!refuse(made(0.0, false), &bytes[..bytes.len() / 2]).is_empty());
        assert!(!refuse(made(0.0, false), b"nonsense").is_empty());
    }
}
