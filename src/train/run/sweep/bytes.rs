//! A sweep as bytes: a frame around the bytes of every candidate's run.
//!
//! `deltaserve.sweep`, the length of the header (8 bytes, little-endian), the header in JSON (spaces may follow it: its place is
//! kept before all lengths in it are known), and the candidates' bytes one after the other: of one that trains, [`Run::to_bytes`]; of one that dropped out, the weights that it kept, if any.

use std::sync::Arc;

use candle_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Member, Out, State, Sweep};
use crate::{
    admission::train_params::{EvalEvent, WorstEvent},
    ids::BaseFingerprint,
    model::Base,
    pacing::Pacer,
    train::run::{
        Autosave, Failed, ResumeError, Run, RunInput,
        resume::{FORM, Identity},
    },
};

const MAGIC: &[u8] = b"deltaserve.sweep";

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    form: u32,
    of: Identity,
    step: u32,
    winner: Option<usize>,
    candidates: Vec<Frame>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Frame {
    /// Length of its bytes.
    bytes: u64,
    state: Kept,
    worst: Option<WorstEvent>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kept {
    Live,
    Lost,
    Out {
        code: String,
        message: String,
        step: u32,
        best: Option<Box<EvalEvent>>,
        /// The step of the kept weights.
        checkpoint: Option<u32>,
    },
}

impl Header {
    /// The header and every candidate's bytes.
    fn read<'b>(
        bytes: &'b [u8],
        of: &Identity,
        candidates: usize,
    ) -> std::result::Result<(Self, Vec<&'b [u8]>), ResumeError> {
        let unreadable = |what: &dyn std::fmt::Display| ResumeError::Unreadable(what.to_string());
        let torn = || unreadable(&"the candidates' bytes are not all there");
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| unreadable(&"it is no sweep"))?;
        let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(torn)?;
        let (header, mut rest) = take(rest, u64::from_le_bytes(*len)).ok_or_else(torn)?;
        let header: serde_json::Value = serde_json::from_slice(header).map_err(|e| unreadable(&e))?;
        match header.get("form").and_then(serde_json::Value::as_u64) {
            Some(form) if form != u64::from(FORM) => {
                return Err(ResumeError::Form(u32::try_from(form).unwrap_or(u32::MAX)));
            }
            _ => {}
        }
        let header: Self = serde_json::from_value(header).map_err(|e| unreadable(&e))?;
        header.of.check(of)?;
        let mut frames = Vec::with_capacity(header.candidates.len());
        for frame in &header.candidates {
            let (own, more) = take(rest, frame.bytes).ok_or_else(torn)?;
            frames.push(own);
            rest = more;
        }
        if !rest.is_empty() || frames.len() != candidates {
            return Err(unreadable(&format!("it has {} candidates and {} bytes more", frames.len(), rest.len())));
        }
        let lives = |i: usize| header.candidates.get(i).is_some_and(|f| matches!(f.state, Kept::Live));
        if !header.winner.is_none_or(lives) {
            return Err(unreadable(&"its winner is none of the candidates"));
        }
        Ok((header, frames))
    }
}

fn take(bytes: &[u8], len: u64) -> Option<(&[u8], &[u8])> {
    bytes.split_at_checked(usize::try_from(len).ok()?)
}

/// The step at which a sweep's checkpoint continues this input on this base, whose identity is given.
pub(in crate::train::run) fn check_resumes(
    input: &RunInput,
    bytes: &[u8],
    (identity, base): (&Identity, &BaseFingerprint),
) -> std::result::Result<u32, ResumeError> {
    let (header, frames) = Header::read(bytes, identity, input.candidates.len())?;
    for ((candidate, frame), bytes) in input.candidates.iter().zip(&header.candidates).zip(frames) {
        if matches!(frame.state, Kept::Live) {
            input.alone(candidate).check_resumes(bytes, base)?;
        }
    }
    Ok(header.step)
}

/// The codes of a run's failure.
fn known(code: &str) -> &'static str {
    ["NON_FINITE_LOSS", "DIVERGED", "OUT_OF_MEMORY"].into_iter().find(|known| *known == code).unwrap_or("INTERNAL")
}

impl Sweep {
    /// All candidates as bytes, as of the start of the step that is under way; `None` where one of them has none.
    ///
    /// # Errors
    /// As [`Run::to_bytes`].
    pub fn to_bytes(&self) -> Result<Option<Vec<u8>>> {
        let mut header = self.header()?;
        let room = serde_json::to_vec(&header).map_err(Error::wrap)?.len();
        let mut out = Vec::with_capacity(MAGIC.len() + 8 + room);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(room as u64).to_le_bytes());
        let at = out.len()..out.len() + room;
        out.resize(at.end, b' ');
        // one candidate's bytes at a time are there beside the whole
        let left = (1..=self.members.len()).rev();
        for ((member, frame), left) in self.members.iter().zip(&mut header.candidates).zip(left) {
            let before = out.len();
            match &member.state {
                State::Live(run) => {
                    let Some(bytes) = run.to_bytes()? else { return Ok(None) };
                    // those that follow are of like size
                    out.reserve(bytes.len() * left);
                    out.extend_from_slice(&bytes);
                }
                State::Lost => {}
                State::Out(out_of_it) => {
                    out_of_it.failed.checkpoint.iter().for_each(|(_, bytes)| out.extend_from_slice(bytes));
                }
            }
            frame.bytes = (out.len() - before) as u64;
        }
        let header = serde_json::to_vec(&header).map_err(Error::wrap)?;
        match out.get_mut(at).and_then(|place| place.get_mut(..header.len())) {
            Some(place) => place.copy_from_slice(&header),
            None => candle_core::bail!("a header of {} bytes in the place of {room}", header.len()),
        }
        Ok(Some(out))
    }

    /// What is said of the candidates; their lengths, which are not known yet, are the largest.
    fn header(&self) -> Result<Header> {
        let candidates = self.members.iter().map(|member| {
            let state = match &member.state {
                State::Live(_) => Kept::Live,
                State::Lost => Kept::Lost,
                State::Out(out) => Kept::Out {
                    code: out.failed.code.to_owned(),
                    message: out.failed.message.clone(),
                    step: out.step,
                    best: out.best.clone().map(Box::new),
                    checkpoint: out.failed.checkpoint.as_ref().map(|(step, _)| *step),
                },
            };
            Frame { bytes: u64::MAX, state, worst: member.worst.clone() }
        });
        let candidates = candidates.collect();
        let of = match self.identity.get() {
            Some(identity) => identity.clone(),
            None => {
                let identity = self.input.identity(&self.base.fingerprint)?;
                self.identity.get_or_init(|| identity).clone()
            }
        };
        Ok(Header { form: FORM, of, step: self.step, winner: self.winner, candidates })
    }

    /// Goes on from [`Self::to_bytes`], given the same input on the same base.
    ///
    /// # Errors
    /// [`ResumeError`] as a message, or the device.
    pub fn from_bytes(base: Arc<Base>, pacer: Option<Arc<Pacer>>, input: RunInput, bytes: &[u8]) -> Result<Self> {
        let identity = input.identity(&base.fingerprint)?;
        let read = Header::read(bytes, &identity, input.candidates.len());
        let (header, frames) = read.map_err(|e| Error::Msg(e.to_string()))?;
        let mut members = Vec::with_capacity(frames.len());
        for (((candidate, own), frame), bytes) in input.apart()?.into_iter().zip(header.candidates).zip(frames) {
            let state = match frame.state {
                Kept::Live => State::Live(Box::new(Run::from_bytes(Arc::clone(&base), pacer.clone(), own, bytes)?)),
                Kept::Lost => State::Lost,
                Kept::Out { code, message, step, best, checkpoint } => {
                    let checkpoint = checkpoint.map(|step| (step, bytes.to_vec()));
                    let (failed, best) = (Failed { code: known(&code), message, checkpoint }, best.map(|b| *b));
                    State::Out(Box::new(Out { failed, step, best }))
                }
            };
            members.push(Member { candidate, state, worst: frame.worst });
        }
        let mut sweep = Self::of(base, pacer, input, members);
        (sweep.step, sweep.winner) = (header.step, header.winner);
        sweep.autosave = Autosave::from_step(header.step);
        // the same by what was just read
        sweep.identity = identity.into();
        Ok(sweep)
    }
}
