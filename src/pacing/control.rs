//! The controller: how much training may compute while serving is busy, so that the p99 of the time between steps of a sequence
//! stays within a bound of what it is without training. A step gives a sequence one token, or several where some were guessed.
//!
//! A state machine over the engine's steps; its only clock is the time it is told. It compares the gaps between steps while a
//! job trains with those while none did, and where these are few or old, training is held for a probe: a few percent of the busy
//! time. Steps that are slower have more sequences in them, which makes them slower again; that is worked out, since no probe is long
//! enough to show it. What could not be measured again for long is forgotten. What it moves is the
//! *duty*: the share of the time that training computes at while serving is busy, from the least to 1. Below the goal the duty
//! grows by steps that shrink towards it; above, it falls by as much as the slowdown is too large, at most to half.

use std::time::Duration;

use super::gaps::{Gap, Gaps};

/// The duty before anything is known.
const FIRST_DUTY: f64 = 0.1;
/// The least duty there is where any slowdown is permitted: with none at all, it would not be known what more would cost.
const LEAST_DUTY: f64 = 0.01;
/// What is aimed at, as a share of the bound: estimates from some hundred gaps are not exact.
const GOAL: f64 = 0.8;
/// Most that the duty grows by at a time, and by what it grows where it is small: a share of it, and a bit.
const MOST_GROWTH: f64 = 0.06;
const GROWTH: (f64, f64) = (0.3, 0.01);
/// The least that the duty falls to at a time, as a share.
const MOST_FALL: f64 = 0.5;
/// Up to which share of a duty that was too much it is grown as ever. Beyond, growth begins with a share of that, and so much
/// more each time: with layers longer than steps, the p99 leaps at some duty, and it pays to stay below for long.
const KNOWN: f64 = 0.75;
const CALM: f64 = 0.03;
/// By how many standard errors both quantiles must be off for a slowdown above the goal not to be one.
const ERRORS: f64 = 1.5;
/// Busy time beside training between two looks at what the duty has cost.
const WINDOW: Duration = Duration::from_secs(2);
/// Gaps beside training, the last there were, before it falls, and before it grows.
const FEWEST_GAPS: usize = 200;
const ENOUGH_GAPS: usize = 400;
/// Busy time before it is looked again where there was too little to compare.
const AGAIN: Duration = Duration::from_millis(500);
/// The quantile that the bound is on; of fewer gaps a lower one, with so many beyond it.
const TAIL: f64 = 0.99;
const BEYOND: f64 = 4.0;
/// A probe is due where so many gaps without training of this last time are missing.
const FRESH: (usize, Duration) = (200, Duration::from_secs(60));
/// A probe ends with so many gaps without training, or after this busy time with the trainer at rest.
const PROBE: (usize, Duration) = (25, Duration::from_millis(400));
const FIRST_PROBE: (usize, Duration) = (150, Duration::from_millis(1500));
/// Most of the busy time that is probed.
const PROBED: f64 = 0.03;
/// Busy time that the trainer has to come to rest: layers may be longer than probes, and get no core for long.
const ARRIVES: Duration = Duration::from_secs(10);
/// What was measured holds no more after so many steps, and this busy time, in which nothing could be compared.
const STALE: (usize, Duration) = (400, Duration::from_secs(60));

/// What is known of a step that followed another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// From the end of the step before to its end.
    pub(super) gap: Gap,
    /// A job trains.
    pub(super) trains: bool,
    /// Nothing of training computed in the gap.
    pub(super) without: bool,
}

/// What was measured last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// p99 of the time between steps of a sequence while a job trains, in seconds.
    pub p99: f64,
    /// The same quantile without training, in seconds: that of steps of the same numbers of rows, and then of as many fewer rows
    /// as there would be if steps were done sooner.
    pub p99_off: f64,
}

impl Figures {
    /// Of quantiles for the same numbers of rows; `company`: how much more than that is known to be slower it is in all.
    fn of(p99: f64, p99_off: f64, company: f64) -> Self {
        let slower = (p99 / p99_off - 1.0).max(0.0);
        Self { p99, p99_off: p99_off * (1.0 + slower) / (1.0 + slower * company) }
    }

    /// By how much the p99 is higher with training, as a share; below 0 where it is lower.
    pub fn slowdown(&self) -> f64 {
        self.p99 / self.p99_off - 1.0
    }
}

/// The controller.
#[derive(Debug)]
pub(super) struct Control {
    bound: f64,
    least: f64,
    duty: f64,
    /// Up to which duty all is well, as far as is known.
    known: f64,
    /// How often it has grown beyond since it last fell.
    calm: u32,
    gaps: Gaps,
    figures: Option<Figures>,
    /// Steps beside training, and their busy time, since it was last compared.
    since: (usize, Duration),
    /// Time in which serving was busy beside training.
    busy: Duration,
    /// Up to when, in this time, it is not looked at gaps.
    look: Duration,
    probe: Option<Probe>,
    /// Up to when, in this time, no probe begins.
    rest: Duration,
}

/// A time in which training is held.
#[derive(Debug, Clone, Copy)]
struct Probe {
    asked: Duration,
    /// From when the trainer rests.
    begun: Option<Duration>,
    gaps: usize,
}

impl Control {
    /// `bound`: by how much training may raise the p99, as a share; with 0 it computes in idle time only. `floor`: the share of the
    /// time that the duty never goes below otherwise.
    pub(super) fn new(bound: f64, floor: f64) -> Self {
        let least = if bound > 0.0 { floor.clamp(LEAST_DUTY, 1.0) } else { 0.0 };
        Self {
            bound,
            least,
            duty: first_duty(bound, least),
            known: 1.0,
            calm: 0,
            gaps: Gaps::new(),
            figures: None,
            since: (0, Duration::ZERO),
            busy: Duration::ZERO,
            look: WINDOW,
            probe: None,
            rest: Duration::ZERO,
        }
    }

    /// The share of the time that training may compute at while serving is busy.
    pub(super) fn duty(&self) -> f64 {
        self.duty
    }

    /// Whether training is to be held now, whatever the duty.
    pub(super) fn holds(&self) -> bool {
        self.probe.is_some()
    }

    /// What was measured last, if that still holds.
    pub(super) fn figures(&self) -> Option<Figures> {
        self.figures
    }

    /// Whether the duty follows from something measured, or from nothing at all being permitted.
    pub(super) fn is_measured(&self) -> bool {
        self.bound <= 0.0 || self.figures.is_some()
    }

    /// Takes what a step tells.
    pub(super) fn note(&mut self, step: Step) {
        let Step { gap, trains, without } = step;
        // of the gaps between two layers of training, those without it are the short ones
        if without && gap.tokens > 0 && (!trains || self.probe.is_some() || self.bound == 0.0) {
            self.gaps.without(gap);
        }
        if !trains {
            self.begin_anew();
            self.probe = None;
            return;
        }
        let (before, length) = (self.busy, Duration::try_from_secs_f32(gap.length).unwrap_or_default());
        self.busy += length;
        self.since = (self.since.0 + 1, self.since.1 + length);
        if self.figures.is_some() && self.since.0 >= STALE.0 && self.since.1 >= STALE.1 {
            self.forget();
        }
        if let Some(probe) = &mut self.probe {
            if without {
                probe.begun.get_or_insert(before);
                probe.gaps += usize::from(gap.tokens > 0);
            }
            // the first may take longer: until something is known, training may do little anyway
            let (gaps, most) = if self.figures.is_some() { PROBE } else { FIRST_PROBE };
            let over = match probe.begun.map(|begun| self.busy.saturating_sub(begun)) {
                Some(held) if probe.gaps >= gaps || held >= most => Some(held.mul_f64(1.0 / PROBED - 1.0)),
                None if self.busy.saturating_sub(probe.asked) >= ARRIVES => Some(FRESH.1),
                _ => None,
            };
            if let Some(rest) = over {
                self.probe = None;
                self.rest = self.busy + rest;
            }
            return;
        }
        // where nobody waits for tokens there is nothing new to look at
        if gap.tokens > 0 {
            self.gaps.beside(gap);
            if self.busy >= self.look && self.gaps.len() >= FEWEST_GAPS {
                self.look(gap.at);
            }
        }
    }

    /// As at the beginning: what was measured is of another traffic.
    fn forget(&mut self) {
        self.figures = None;
        (self.duty, self.known, self.calm) = (first_duty(self.bound, self.least), 1.0, 0);
        self.begin_anew();
    }

    fn begin_anew(&mut self) {
        self.gaps.begin_anew();
        self.look = self.busy + WINDOW;
    }

    fn look(&mut self, now: Duration) {
        match self.gaps.compare(now) {
            Some(compared) => {
                let figures =
                    Figures::of(compared.beside.quantile(TAIL), compared.off.quantile(TAIL), compared.company);
                let tail = TAIL.min(1.0 - BEYOND / compared.effective());
                // serving's waits for the floor are guaranteed to training: they are reported, and no duty changes them
                let slower = |errors: f64| {
                    let of = |q: f64| compared.ungiven.about(q, -errors) / compared.off.about(q, errors) - 1.0;
                    of(tail).max(of(0.5)) * compared.company
                };
                let (likely, least) = (slower(0.0), slower(ERRORS));
                if figures.slowdown().is_finite() && likely.is_finite() && least.is_finite() {
                    self.figures = Some(figures);
                    self.since = (0, Duration::ZERO);
                    self.move_duty(likely, least);
                }
                self.look = self.busy + WINDOW;
            }
            None => self.look = self.busy + AGAIN,
        }
        // where training may compute nothing beside serving, nearly every gap is one without it
        let due = self.bound > 0.0 && self.gaps.fresh(now.saturating_sub(FRESH.1)) < FRESH.0;
        if due && self.busy >= self.rest {
            self.probe = Some(Probe { asked: self.busy, begun: None, gaps: 0 });
        }
    }

    fn move_duty(&mut self, slowdown: f64, least: f64) {
        if self.bound <= 0.0 {
            return;
        }
        let goal = GOAL * self.bound;
        let duty = if least > goal {
            // what has been is not what comes; otherwise one bad moment would count again and again
            self.begin_anew();
            (self.known, self.calm) = (self.duty * KNOWN, 0);
            self.duty * (goal / slowdown).max(MOST_FALL)
        } else if slowdown <= goal && self.gaps.len() >= ENOUGH_GAPS {
            let mut growth = MOST_GROWTH.min(GROWTH.0 * self.duty + GROWTH.1);
            if self.duty + growth > self.known {
                self.calm += 1;
                growth *= (CALM * f64::from(self.calm)).min(1.0);
            }
            self.duty + growth * (1.0 - slowdown.max(0.0) / goal)
        } else {
            self.duty
        };
        self.duty = duty.clamp(self.least, 1.0);
    }
}

/// The duty before anything is known, where `bound` permits any.
fn first_duty(bound: f64, least: f64) -> f64 {
    if bound > 0.0 { FIRST_DUTY.max(least) } else { 0.0 }
}

#[cfg(test)]
mod tests;
