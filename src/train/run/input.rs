//! What a run is given.

use std::sync::Arc;

use crate::{
    admission::train_params::ResolvedTraining,
    train::{
        beginning::Beginning,
        encode::Encoded,
        generate::Quiz,
        plan::{Candidate, Prepared},
        spec::TrainSpec,
        worst::Decoder,
    },
};

/// The data and choices of a run.
#[derive(Debug, Clone)]
pub struct RunInput {
    /// Hyper-parameters.
    pub resolved: ResolvedTraining,
    /// Sites and patches.
    pub spec: TrainSpec,
    /// Training examples.
    pub train: Arc<[Encoded]>,
    /// Validation examples.
    pub validation: Arc<[Encoded]>,
    /// What it starts from; taken by the run when it has copied the values.
    pub start: Option<Beginning>,
    /// The held text whose loss is compared at the end; may be empty.
    pub held: Arc<[Encoded]>,
    /// The texts that the divergence from the base is taken on; empty = the training examples.
    pub replay: Arc<[Encoded]>,
    /// Whether the validation examples have a file of their own; else they were drawn from the training data.
    pub separate_validation: bool,
    /// Ids to text.
    pub decoder: Decoder,
    /// What evaluations ask; may be empty.
    pub quiz: Quiz,
    /// The candidates of a sweep; empty without one.
    pub candidates: Vec<Candidate>,
}

impl From<&Prepared> for RunInput {
    fn from(p: &Prepared) -> Self {
        Self {
            resolved: p.reply.resolved.clone(),
            spec: p.spec.clone(),
            train: Arc::clone(&p.train),
            validation: Arc::clone(&p.validation),
            start: p.start.as_ref().map(Beginning::from),
            held: Arc::clone(&p.held),
            replay: Arc::clone(&p.replay),
            separate_validation: p.separate_validation,
            decoder: p.decoder.clone(),
            quiz: p.quiz.clone(),
            candidates: p.candidates.clone(),
        }
    }
}
