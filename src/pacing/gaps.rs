//! Gaps between steps that sequences wait for, with and without training beside them, and how their quantiles compare.
//!
//! How long a step takes depends on its rows first of all, and what is served while training rests is not what is served while
//! it computes. So gaps without training are kept by class of rows, and weighed as often as that class is there beside training
//! (post-stratification): their quantile is that of the same mix of steps, had nothing trained.
//!
//! That is not all that training costs. Where requests come whether or not those before are done, slower steps are steps of more
//! rows, since more sequences are there at a time, and so slower again: [`Compared::company`].

use std::{collections::VecDeque, time::Duration};

/// Classes of steps: by the power of two of their rows.
const CLASSES: usize = 14;
/// Most gaps without training that are kept of a class.
const MOST_OF_CLASS: usize = 1024;
/// Most gaps beside training that are kept: the last.
const MOST_BESIDE: usize = 2048;
/// Gaps are forgotten after this: machines and what else they do change.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);
/// Fewest gaps without training of a class, for its gaps beside training to be compared.
const FEWEST_OF_CLASS: usize = 8;
/// Least share of the tokens beside training whose class can be compared.
const LEAST_COVERED: f64 = 0.8;
/// Most of the time that is taken to grow with the rows: near all of it, nothing holds the queue, and nothing is to be worked out.
const MOST_GROWING: f64 = 0.5;
/// Fewest gaps on each side of a comparison, weights evened out ([`Sorted::effective`]).
const FEWEST: f64 = 100.0;

/// The time between the ends of two steps that follow each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gap {
    /// When it ended.
    pub(super) at: Duration,
    /// In seconds.
    pub(super) length: f32,
    /// Of the step that ended it.
    pub(super) rows: usize,
    /// Sequences that waited for it to get their next token, or several where some were guessed.
    pub(super) tokens: usize,
    /// Serving waited in it for training's floor.
    pub(super) gift: bool,
}

impl Gap {
    fn class(&self) -> usize {
        (self.rows.max(1).ilog2() as usize).min(CLASSES - 1)
    }
}

/// Gaps of both kinds.
#[derive(Debug)]
pub(super) struct Gaps {
    off: [VecDeque<Gap>; CLASSES],
    beside: VecDeque<Gap>,
}

impl Gaps {
    pub(super) fn new() -> Self {
        Self { off: std::array::from_fn(|_| VecDeque::new()), beside: VecDeque::new() }
    }

    /// One in which nothing of training computed.
    pub(super) fn without(&mut self, gap: Gap) {
        if let Some(class) = self.off.get_mut(gap.class()) {
            if class.len() == MOST_OF_CLASS {
                class.pop_front();
            }
            class.push_back(gap);
        }
    }

    /// One while a job trains, whether or not it computed just then.
    pub(super) fn beside(&mut self, gap: Gap) {
        if self.beside.len() == MOST_BESIDE {
            self.beside.pop_front();
        }
        self.beside.push_back(gap);
    }

    /// How many there are beside training.
    pub(super) fn len(&self) -> usize {
        self.beside.len()
    }

    /// Forgets those beside training.
    pub(super) fn begin_anew(&mut self) {
        self.beside.clear();
    }

    /// How many there are without training that ended after `since`.
    pub(super) fn fresh(&self, since: Duration) -> usize {
        self.off.iter().map(|class| class.iter().rev().take_while(|gap| gap.at >= since).count()).sum()
    }

    /// Both kinds, for the mix of steps that was beside training; `None` where there are too few.
    pub(super) fn compare(&mut self, now: Duration) -> Option<Compared> {
        let oldest = now.saturating_sub(FORGOTTEN_AFTER);
        while self.beside.front().is_some_and(|gap| gap.at < oldest) {
            self.beside.pop_front();
        }
        let mut mix = [0.0; CLASSES];
        for gap in &self.beside {
            mix[gap.class()] += gap.tokens as f64;
        }
        let (all, mut covered) = (mix.iter().sum::<f64>(), 0.0);
        let (mut off, mut line) = (Vec::new(), Line::default());
        for (class, mix) in self.off.iter_mut().zip(&mut mix) {
            while class.front().is_some_and(|gap| gap.at < oldest) {
                class.pop_front();
            }
            if class.len() < FEWEST_OF_CLASS {
                *mix = 0.0;
            }
            if *mix > 0.0 {
                covered += *mix;
                let tokens: f64 = class.iter().map(|gap| gap.tokens as f64).sum();
                for gap in class.iter() {
                    let weight = gap.tokens as f64 * *mix / tokens;
                    off.push((gap.length, weight));
                    line.take(gap.rows as f64, f64::from(gap.length), weight);
                }
            }
        }
        if covered < LEAST_COVERED * all || covered == 0.0 {
            return None;
        }
        let beside = |gifts: bool| {
            let gaps = self.beside.iter().filter(|gap| mix[gap.class()] > 0.0 && (gifts || !gap.gift));
            Sorted::of(gaps.map(|gap| (gap.length, gap.tokens as f64)).collect())
        };
        let growing = (line.slope() * self.rows_per_second()).clamp(0.0, MOST_GROWING);
        let company = 1.0 / (1.0 - growing);
        let compared = Compared { off: Sorted::of(off), beside: beside(true), ungiven: beside(false), company };
        (compared.effective() >= FEWEST).then_some(compared)
    }

    /// Rows that were computed beside training, by all the time that went by, idle times included.
    fn rows_per_second(&self) -> f64 {
        let (Some(first), Some(last)) = (self.beside.front(), self.beside.back()) else { return 0.0 };
        let seconds = last.at.saturating_sub(first.at).as_secs_f64() + f64::from(first.length);
        let rows: usize = self.beside.iter().map(|gap| gap.rows).sum();
        if seconds > 0.0 { rows as f64 / seconds } else { 0.0 }
    }
}

/// A straight line through weighed points, by least squares.
#[derive(Debug, Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    fn take(&mut self, x: f64, y: f64, weight: f64) {
        self.weight += weight;
        self.x += weight * x;
        self.y += weight * y;
        self.xx += weight * x * x;
        self.xy += weight * x * y;
    }

    /// By how much y grows with x; 0 where all x are the same.
    fn slope(&self) -> f64 {
        let spread = self.weight * self.xx - self.x * self.x;
        // all the same, but for rounding
        if spread <= 1e-9 * self.weight * self.xx {
            return 0.0;
        }
        (self.weight * self.xy - self.x * self.y) / spread
    }
}

/// Gaps of the same mix of steps.
#[derive(Debug)]
pub(super) struct Compared {
    /// Without training.
    pub(super) off: Sorted,
    /// While a job trains.
    pub(super) beside: Sorted,
    /// The same without those in which serving waited for training's floor.
    pub(super) ungiven: Sorted,
    /// By which factor sequences are slowed more than steps of the same rows, where as many requests come as ever: with n rows in
    /// all per second, and steps that take a + b rows, there are n s rows in a step that takes s (Little 1961). So s = a / (1 - b n),
    /// and s grows by 1 / (1 - b n) percent where a and b do by one.
    pub(super) company: f64,
}

impl Compared {
    /// How many gaps the side with fewer has.
    pub(super) fn effective(&self) -> f64 {
        self.off.effective.min(self.ungiven.effective)
    }
}

/// Weighed gaps, the shortest first.
#[derive(Debug)]
pub(super) struct Sorted {
    gaps: Vec<(f32, f64)>,
    weight: f64,
    /// Gaps of equal weights that tell as much: (sum of weights)² / sum of squared weights (Kish 1965).
    effective: f64,
}

impl Sorted {
    fn of(mut gaps: Vec<(f32, f64)>) -> Self {
        gaps.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let weight: f64 = gaps.iter().map(|gap| gap.1).sum();
        let squares: f64 = gaps.iter().map(|gap| gap.1 * gap.1).sum();
        Self { gaps, weight, effective: if squares > 0.0 { weight * weight / squares } else { 0.0 } }
    }

    /// The quantile that may as well be this one's, `errors` standard errors off: a share of `n` gaps is known to
    /// sqrt(share (1 - share) / n).
    pub(super) fn about(&self, share: f64, errors: f64) -> f64 {
        let error = (share * (1.0 - share) / self.effective.max(1.0)).sqrt();
        self.quantile((share + errors * error).clamp(0.0, 1.0))
    }

    /// The least gap, in seconds, that is no shorter than this share of all; 0 without gaps.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let mut left = self.weight * share;
        for (length, weight) in &self.gaps {
            left -= weight;
            if left <= 1e-9 * self.weight {
                return f64::from(*length);
            }
        }
        self.gaps.last().map_or(0.0, |gap| f64::from(gap.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(at: u64, millis: f32, rows: usize, tokens: usize) -> Gap {
        Gap { at: Duration::from_secs(at), length: millis / 1e3, rows, tokens, gift: false }
    }

    #[test]
    fn quantiles_are_of_tokens() {
        let sorted = Sorted::of(vec![(3.0, 1.0), (1.0, 2.0), (2.0, 1.0)]);
        assert_eq!([0.0, 0.5, 0.75, 0.76, 1.0].map(|q| sorted.quantile(q)), [1.0, 1.0, 2.0, 3.0, 3.0]);
        assert!((sorted.effective - 16.0 / 6.0).abs() < 1e-12);
        assert_eq!((Sorted::of(Vec::new()).quantile(0.5), Sorted::of(Vec::new()).effective), (0.0, 0.0));
    }

    /// Steps of many rows take ten times as long. Without training there were few of them, beside it half are: training alone must
    /// not be blamed for that.
    #[test]
    fn another_mix_of_steps_is_no_slowdown() {
        let mut gaps = Gaps::new();
        for i in 0..400 {
            let many = i % 8 == 0;
            gaps.without(if many { gap(1, 40.0, 100, 2) } else { gap(1, 4.0, 2, 2) });
            gaps.beside(if i % 2 == 0 { gap(2, 44.0, 90, 2) } else { gap(2, 4.4, 3, 2) });
        }
        let compared = gaps.compare(Duration::from_secs(3)).expect("enough");
        for share in [0.25, 0.75, 0.99] {
            let ratio = compared.beside.quantile(share) / compared.off.quantile(share);
            assert!((ratio - 1.1).abs() < 1e-3, "{share}: {ratio}");
        }
    }

    /// Steps of 1 ms and 0.1 ms for each row, 4000 rows per second: a slowdown of one percent is one of 1 / (1 - 0.4).
    #[test]
    fn what_grows_with_the_rows_is_found_with_idle_times_between() {
        let filled = |lengths: fn(usize) -> f32, idle: f64| {
            let (mut gaps, mut now) = (Gaps::new(), 0.0);
            for i in 0..400 {
                let rows = 4 + i % 5;
                let millis = lengths(rows);
                // 6 rows on average in 1.5 ms
                now += 0.0015 + idle;
                let gap = Gap { at: Duration::from_secs_f64(now), ..gap(0, millis, rows, rows) };
                gaps.without(gap);
                gaps.beside(gap);
            }
            gaps.compare(Duration::from_secs_f64(now)).expect("enough").company
        };
        let close = |company: f64, expected: f64| assert!((company - expected).abs() < 0.02, "{company} {expected}");
        close(filled(|rows| 1.0 + 0.1 * rows as f32, 0.0), 1.0 / 0.6);
        close(filled(|rows| 1.0 + 0.1 * rows as f32, 0.0045), 1.0 / 0.9);
        close(filled(|_| 1.0, 0.0), 1.0);
        // fewer rows that take longer, and nothing but rows, are neither less nor without bound
        close(filled(|rows| 2.0 - 0.1 * rows as f32, 0.0), 1.0);
        close(filled(|rows| rows as f32, 0.0), 2.0);
    }

    #[test]
    fn few_old_or_other_gaps_are_not_compared() {
        let filled = |off: &[(usize, Gap)], beside: &[(usize, Gap)]| {
            let mut gaps = Gaps::new();
            off.iter().for_each(|(n, gap)| (0..*n).for_each(|_| gaps.without(*gap)));
            beside.iter().for_each(|(n, gap)| (0..*n).for_each(|_| gaps.beside(*gap)));
            gaps
        };
        let (off, on, at) = (gap(10, 4.0, 4, 4), gap(11, 5.0, 4, 4), Duration::from_secs(12));
        assert!(filled(&[(120, off)], &[(120, on)]).compare(at).is_some());
        assert!(filled(&[(60, off)], &[(500, on)]).compare(at).is_none(), "few without");
        assert!(filled(&[(500, off)], &[(60, on)]).compare(at).is_none(), "few beside");
        assert!(filled(&[(500, off)], &[(500, gap(11, 5.0, 64, 4))]).compare(at).is_none(), "of other rows");
        let late = at + FORGOTTEN_AFTER;
        assert!(filled(&[(500, off)], &[(500, on)]).compare(late).is_none(), "long ago");
        let now = gap(late.as_secs(), 4.0, 4, 4);
        assert!(filled(&[(500, now)], &[(500, on)]).compare(late).is_none(), "beside training long ago");
        assert_eq!(filled(&[(500, off), (7, on)], &[]).fresh(Duration::from_secs(11)), 7);
        // gaps that count for hundreds of tokens are not many gaps
        assert!(filled(&[(500, off)], &[(20, gap(11, 5.0, 4, 400)), (100, gap(11, 5.0, 4, 1))]).compare(at).is_none());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut gaps = Gaps::new();
        for i in 0..10_000 {
            gaps.without(gap(i, 1.0, 1, 1));
            gaps.beside(gap(i, 1.0, 1 << 20, 1));
        }
        assert_eq!((gaps.fresh(Duration::ZERO), gaps.len()), (MOST_OF_CLASS, MOST_BESIDE));
    }
}
