//! Training metrics: handles made once per owner; names are described here and nowhere else.

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::admission::train_params::{JobState, MetricsEvent};

/// Jobs that can show their loss at a time: bounds the metric's label.
pub const LOSS_SLOTS: usize = 8;

/// Describes every metric of training; called once by telemetry.
pub fn describe() {
    describe_histogram!("deltaserve_train_step_seconds", Unit::Seconds, "duration of one optimizer step");
    describe_gauge!("deltaserve_train_loss", "loss of the last step, by slot of the running job (0 to 7)");
    describe_counter!("deltaserve_train_tokens_total", "tokens trained on");
    describe_gauge!("deltaserve_train_yielded_seconds_total", Unit::Seconds, "time given to serving, only growing");
    describe_counter!(
        "deltaserve_train_shared_passes_total",
        "passes shared by the pieces of several jobs, by outcome: done, apart (failed, and done job by job)"
    );
    describe_histogram!("deltaserve_train_shared_pass_jobs", "jobs of a shared pass");
    describe_gauge!("deltaserve_train_jobs", "jobs that have not ended, by state");
    describe_counter!("deltaserve_train_jobs_ended_total", "jobs that have ended, by state");
}

/// What one run reports.
#[derive(Clone)]
pub(crate) struct TrainMetrics {
    step_seconds: Histogram,
    tokens: Counter,
    yielded: Gauge,
    loss: Option<Gauge>,
}

impl std::fmt::Debug for TrainMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrainMetrics")
    }
}

impl TrainMetrics {
    /// With the loss shown in a slot, if there is such a slot.
    pub(crate) fn in_slot(slot: usize) -> Self {
        let loss = (slot < LOSS_SLOTS).then(|| gauge!("deltaserve_train_loss", "job" => slot.to_string()));
        Self {
            step_seconds: histogram!("deltaserve_train_step_seconds"),
            tokens: counter!("deltaserve_train_tokens_total"),
            yielded: gauge!("deltaserve_train_yielded_seconds_total"),
            loss,
        }
    }

    pub(crate) fn step(&self, event: &MetricsEvent, tokens: usize) {
        self.step_seconds.record(event.step_ms / 1e3);
        self.tokens.increment(tokens as u64);
        self.yielded.increment(event.yielded_ms / 1e3);
        if let Some(loss) = &self.loss {
            loss.set(event.loss);
        }
    }
}

/// Passes that several jobs share.
pub(crate) struct SharedPasses {
    done: Counter,
    apart: Counter,
    jobs: Histogram,
}

impl SharedPasses {
    pub(crate) fn new() -> Self {
        let of = |outcome: &'static str| counter!("deltaserve_train_shared_passes_total", "outcome" => outcome);
        Self { done: of("done"), apart: of("apart"), jobs: histogram!("deltaserve_train_shared_pass_jobs") }
    }

    /// One was done, of so many jobs.
    pub(crate) fn done(&self, jobs: usize) {
        self.done.increment(1);
        self.jobs.record(jobs as f64);
    }

    /// One failed.
    pub(crate) fn apart(&self) {
        self.apart.increment(1);
    }
}

/// Jobs by state.
#[derive(Clone)]
pub(crate) struct JobGauges {
    queued: Gauge,
    running: Gauge,
    publishing: Gauge,
    paused: Gauge,
    ended: [(JobState, Counter); 4],
}

impl JobGauges {
    pub(crate) fn new() -> Self {
        let live = |state: JobState| gauge!("deltaserve_train_jobs", "state" => state.as_str());
        let ended = |state: JobState| (state, counter!("deltaserve_train_jobs_ended_total", "state" => state.as_str()));
        Self {
            queued: live(JobState::Queued),
            running: live(JobState::Running),
            publishing: live(JobState::Publishing),
            paused: live(JobState::Paused),
            ended: [JobState::Succeeded, JobState::Failed, JobState::Cancelled, JobState::Interrupted].map(ended),
        }
    }

    pub(crate) fn set(&self, queued: usize, running: usize, publishing: usize, paused: usize) {
        self.queued.set(queued as f64);
        self.running.set(running as f64);
        self.publishing.set(publishing as f64);
        self.paused.set(paused as f64);
    }

    pub(crate) fn ended(&self, state: JobState) {
        self.ended.iter().filter(|(s, _)| *s == state).for_each(|(_, c)| c.increment(1));
    }
}
