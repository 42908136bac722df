//! Jobs and their events to the wire.

use crate::{
    admission::{
        jobs::{
            EvalEvent, JobEventBody, JobEventInfo, JobFailure, JobInfo, JobResult, JobState, MetricsEvent, ModelResult,
            NoteEvent, WorstEvent, WorstExample,
        },
        params::ServeError,
    },
    grpc::proto,
};

use super::training::{resolved, state_to_wire};

/// The state that ListJobs asks for; unspecified = any.
pub(in crate::grpc) fn job_state_filter(value: i32) -> Result<Option<JobState>, ServeError> {
    use proto::JobState as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Unspecified) => Ok(None),
        Ok(Wire::Queued) => Ok(Some(JobState::Queued)),
        Ok(Wire::Running) => Ok(Some(JobState::Running)),
        Ok(Wire::Publishing) => Ok(Some(JobState::Publishing)),
        Ok(Wire::Succeeded) => Ok(Some(JobState::Succeeded)),
        Ok(Wire::Failed) => Ok(Some(JobState::Failed)),
        Ok(Wire::Cancelled) => Ok(Some(JobState::Cancelled)),
        Ok(Wire::Interrupted) => Ok(Some(JobState::Interrupted)),
        Ok(Wire::Paused) => Ok(Some(JobState::Paused)),
        Err(unknown) => Err(ServeError::field("state", unknown.to_string())),
    }
}

/// A job to the wire.
pub(in crate::grpc) fn job(j: JobInfo) -> proto::Job {
    proto::Job {
        id: j.id,
        output_name: j.output_name,
        state: state_to_wire(j.state),
        resolved: Some(resolved(j.resolved)),
        step: j.step,
        created_ms: j.created_ms,
        updated_ms: j.updated_ms,
        last_seq: j.last_seq,
        result: j.result.map(result),
        failure: j.failure.map(failure),
    }
}

fn result(r: JobResult) -> proto::JobResult {
    proto::JobResult {
        name: r.name,
        number: r.number,
        id: r.id,
        final_loss: r.final_loss,
        best_eval: r.best_eval.map(eval),
        model: r.model.map(model),
    }
}

/// A model to the wire.
pub(in crate::grpc) fn model(m: ModelResult) -> proto::ModelResult {
    proto::ModelResult { path: m.path, fingerprint: m.fingerprint, bytes: m.bytes }
}

fn failure(f: JobFailure) -> proto::JobFailure {
    proto::JobFailure { code: f.code, message: f.message }
}

fn eval(e: EvalEvent) -> proto::EvalResult {
    proto::EvalResult {
        step: e.step,
        loss: e.loss,
        perplexity: e.perplexity,
        accuracy: e.accuracy,
        macro_f1: e.macro_f1,
        mcc: e.mcc,
        span_precision: e.span_precision,
        span_recall: e.span_recall,
        span_f1: e.span_f1,
        micro_f1: e.micro_f1,
        mse: e.mse,
        pearson: e.pearson,
        reward_accuracy: e.reward_accuracy,
        reward_margin: e.reward_margin,
        exact_match: e.exact_match,
        bleu: e.bleu,
        rouge_l: e.rouge_l,
        best: e.best,
        candidate: e.candidate,
    }
}

/// An event to the wire.
pub(in crate::grpc) fn job_event(event: JobEventInfo) -> proto::JobEvent {
    use proto::job_event::Body;
    let body = match event.body {
        JobEventBody::State(s) => Body::State(proto::StateChange {
            state: state_to_wire(s.state),
            result: s.result.map(result),
            failure: s.failure.map(failure),
        }),
        JobEventBody::Metrics(m) => Body::Metrics(metrics(m)),
        JobEventBody::Eval(e) => Body::Eval(eval(e)),
        JobEventBody::Checkpoint(c) => {
            Body::Checkpoint(proto::Checkpoint { step: c.step, blob: c.blob, figure: c.figure, best: c.best })
        }
        JobEventBody::Warning(n) => Body::Warning(note(n)),
        JobEventBody::Log(n) => Body::Log(note(n)),
        JobEventBody::Forgetting(f) => Body::Forgetting(proto::Forgetting {
            step: f.step,
            base_loss: f.base_loss,
            delta_loss: f.delta_loss,
            forgetting: f.delta_loss - f.base_loss,
        }),
        JobEventBody::Resumed(r) => Body::Resumed(proto::Resumed { step: r.step }),
        JobEventBody::Worst(w) => Body::Worst(worst(w)),
        JobEventBody::Mix(m) => Body::Mix(proto::MixWeights {
            deltas: m.deltas,
            rows: m.rows.into_iter().map(|r| proto::MixRow { layer: r.layer, weights: r.weights }).collect(),
        }),
        JobEventBody::Sweep(s) => Body::Sweep(super::sweep::result(s)),
    };
    proto::JobEvent { seq: event.seq, time_ms: event.at_ms, body: Some(body) }
}

fn metrics(m: MetricsEvent) -> proto::Metrics {
    proto::Metrics {
        step: m.step,
        total_steps: m.total_steps,
        epoch: m.epoch,
        loss: m.loss,
        learning_rate: m.learning_rate,
        grad_norm: m.grad_norm,
        tokens_per_second: m.tokens_per_second,
        eta_seconds: m.eta_seconds,
        step_ms: m.step_ms,
        yielded_ms: m.yielded_ms,
        ewc_penalty: m.ewc_penalty,
        kl: m.kl,
        candidate: m.candidate,
    }
}

fn worst(w: WorstEvent) -> proto::WorstExamples {
    let example = |e: WorstExample| proto::WorstExample {
        line: e.line,
        loss: e.loss,
        text: e.text,
        label: e.label,
        predicted: e.predicted,
    };
    proto::WorstExamples {
        step: w.step,
        held_out: w.held_out,
        of_validation: w.of_validation,
        examples: w.examples.into_iter().map(example).collect(),
    }
}

fn note(n: NoteEvent) -> proto::Note {
    proto::Note { code: n.code, message: n.message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_on_the_wire_read_back() {
        for value in 1..=8 {
            let state = job_state_filter(value).ok().flatten();
            assert_eq!(state.map(state_to_wire), Some(value));
        }
        assert!(matches!(job_state_filter(0), Ok(None)));
        assert!(job_state_filter(9).is_err());
    }
}
