//! One number per case: errors and correlation.

/// Running sums of gold and predicted numbers.
#[derive(Debug, Clone, Default)]
pub struct Values {
    pairs: Vec<(f64, f64)>,
}

impl Values {
    /// Counts a case.
    pub fn add(&mut self, gold: f64, predicted: f64) {
        self.pairs.push((gold, predicted));
    }

    /// Mean squared error.
    pub fn mse(&self) -> f64 {
        self.mean(|(x, y)| (x - y) * (x - y))
    }

    /// Mean absolute error.
    pub fn mae(&self) -> f64 {
        self.mean(|(x, y)| (x - y).abs())
    }

    /// Pearson's correlation, -1 to 1; 0 where either side does not vary.
    pub fn pearson(&self) -> f64 {
        let (mx, my) = (self.mean(|(x, _)| x), self.mean(|(_, y)| y));
        let both = self.mean(|(x, y)| (x - mx) * (y - my));
        let scale = (self.mean(|(x, _)| (x - mx) * (x - mx)) * self.mean(|(_, y)| (y - my) * (y - my))).sqrt();
        if scale > 0.0 { both / scale } else { 0.0 }
    }

    fn mean(&self, of: impl Fn((f64, f64)) -> f64) -> f64 {
        self.pairs.iter().map(|p| of(*p)).sum::<f64>() / self.pairs.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_correlation_by_hand() {
        let mut v = Values::default();
        [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)].iter().for_each(|(x, y)| v.add(*x, *y));
        assert!((v.mse() - 2.0 / 3.0).abs() < 1e-12 && (v.mae() - 2.0 / 3.0).abs() < 1e-12);
        assert!((v.pearson() - 0.5).abs() < 1e-12);
        assert_eq!(Values::default().pearson(), 0.0);
    }
}
