//! What a run says of its steps.

use std::time::{Duration, Instant};

use super::{Run, Step};
use crate::admission::train_params::MetricsEvent;

/// Metrics of every step are sent unless steps come faster than this.
pub(super) const METRICS_EVERY: Duration = Duration::from_millis(100);

impl Run {
    pub(super) fn metrics_event(&self, step: &Step, (lr, norm): (f64, f64), busy: Duration) -> MetricsEvent {
        let r = &self.input.resolved;
        let left = f64::from(r.total_steps.saturating_sub(self.step));
        MetricsEvent {
            step: self.step,
            total_steps: r.total_steps,
            epoch: f64::from(self.step) / self.batches.per_epoch().max(1) as f64,
            loss: self.last_loss,
            learning_rate: lr,
            grad_norm: norm,
            tokens_per_second: step.tokens as f64 / busy.as_secs_f64().max(1e-9),
            eta_seconds: self.started.elapsed().as_secs_f64() / f64::from((self.step - self.begun).max(1)) * left,
            step_ms: busy.as_secs_f64() * 1e3,
            yielded_ms: step.yielded.as_secs_f64() * 1e3,
            ewc_penalty: step.penalty,
            kl: (r.kl_to_base > 0.0).then_some(step.kl),
            candidate: 0,
        }
    }

    /// The event if it is time for one: the first and last step always report.
    pub(super) fn due(&mut self, event: MetricsEvent) -> Option<MetricsEvent> {
        let edge = event.step == 1 || event.step == event.total_steps;
        let due = edge || self.last_metrics.is_none_or(|t| t.elapsed() >= METRICS_EVERY);
        due.then(|| {
            self.last_metrics = Some(Instant::now());
            event
        })
    }
}
