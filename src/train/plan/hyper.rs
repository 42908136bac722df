//! What hyper-parameters may be.

use super::{MAX_STEPS, MIN_LENGTH, violation};
use crate::admission::{params::Violation, train_params::HyperParams};

/// Ranges of everything that is set. A learning rate is only asked to be a positive number: one that is too high makes
/// the run diverge, which ends it.
pub(super) fn check(h: &HyperParams, room: usize, max_positions: usize) -> Vec<Violation> {
    let mut out = Vec::new();
    let mut real = |field: &str, value: Option<f64>, ok: fn(f64) -> bool, accepted: &str| {
        if let Some(v) = value
            && !(v.is_finite() && ok(v))
        {
            out.push(violation(&format!("hyper.{field}"), format!("is {v}; accepted is {accepted}")));
        }
    };
    real("epochs", h.epochs, |v| v > 0.0 && v <= 1000.0, "(0, 1000]");
    real("learning_rate", h.learning_rate, |v| v > 0.0, "a positive number");
    real("warmup_ratio", h.warmup_ratio, |v| (0.0..1.0).contains(&v), "[0, 1)");
    real("weight_decay", h.weight_decay, |v| (0.0..=10.0).contains(&v), "[0, 10]");
    real("beta1", h.beta1, |v| (0.0..1.0).contains(&v), "[0, 1)");
    real("beta2", h.beta2, |v| (0.0..1.0).contains(&v), "[0, 1)");
    real("eps", h.eps, |v| v > 0.0 && v <= 1.0, "(0, 1]");
    real("clip_norm", h.clip_norm, |v| v >= 0.0, "0 (off) or a positive number");
    let mut whole = |field: &str, value: Option<u32>, min: u32, max: u32| {
        if let Some(v) = value
            && !(min..=max).contains(&v)
        {
            out.push(violation(&format!("hyper.{field}"), format!("is {v}; accepted is {min} to {max}")));
        }
    };
    whole("max_steps", h.max_steps, 1, MAX_STEPS);
    whole("batch_size", h.batch_size, 1, 4096);
    whole("grad_accumulation", h.grad_accumulation, 1, 4096);
    if let Some(n) = h.max_length.map(|n| n as usize)
        && !(MIN_LENGTH..=room).contains(&n)
    {
        let less = match max_positions - room {
            0 => String::new(),
            ahead => format!(" (the context of {max_positions} less {ahead} virtual tokens)"),
        };
        out.push(violation("hyper.max_length", format!("is {n}; accepted is {MIN_LENGTH} to {room}{less}")));
    }
    out
}
