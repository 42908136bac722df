//! Learning from preferences: which answers people like better.

use serde::{Deserialize, Serialize};

use super::check::{Problems, Range};

/// By which loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceMethod {
    /// Direct preference optimisation (Rafailov et al. 2023): pairs, against the bare base.
    Dpo,
    /// Odds ratio preference optimisation (Hong et al. 2024): pairs, without a reference.
    Orpo,
    /// Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are good or bad, against the bare base.
    Kto,
}

impl PreferenceMethod {
    /// The name in messages and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dpo => "dpo",
            Self::Orpo => "orpo",
            Self::Kto => "kto",
        }
    }
}

/// What a request says of it; `None` = default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PreferenceParams {
    /// The loss.
    pub method: PreferenceMethod,
    /// How closely the delta stays by the base; with ORPO, the weight of the odds ratio. In (0, 100]; default 0.1.
    pub beta: Option<f64>,
    /// DPO: the share of pairs that are labelled the wrong way round, [0, 0.5); default 0.
    pub label_smoothing: Option<f64>,
    /// KTO: weight of good answers, (0, 1000]; default 1.
    pub desirable_weight: Option<f64>,
    /// KTO: weight of bad answers, (0, 1000]; default 1.
    pub undesirable_weight: Option<f64>,
}

/// The same as used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResolvedPreference {
    /// The loss.
    pub method: PreferenceMethod,
    /// As [`PreferenceParams::beta`].
    pub beta: f64,
    /// As [`PreferenceParams::label_smoothing`].
    pub label_smoothing: f64,
    /// As [`PreferenceParams::desirable_weight`].
    pub desirable_weight: f64,
    /// As [`PreferenceParams::undesirable_weight`].
    pub undesirable_weight: f64,
}

impl PreferenceParams {
    /// This method with its defaults.
    pub fn of(method: PreferenceMethod) -> Self {
        Self { method, beta: None, label_smoothing: None, desirable_weight: None, undesirable_weight: None }
    }

    /// With every field set.
    pub fn resolve(&self) -> ResolvedPreference {
        ResolvedPreference {
            method: self.method,
            beta: self.beta.unwrap_or(0.1),
            label_smoothing: self.label_smoothing.unwrap_or(0.0),
            desirable_weight: self.desirable_weight.unwrap_or(1.0),
            undesirable_weight: self.undesirable_weight.unwrap_or(1.0),
        }
    }

    /// Checks ranges, and that a number is given where it is used.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        use PreferenceMethod::{Dpo, Kto};
        const WEIGHT: Range = Range::above(0.0, 1000.0);
        let numbers = [
            ("beta", self.beta, Range::above(0.0, 100.0), self.method),
            ("label_smoothing", self.label_smoothing, Range::below(0.0, 0.5), Dpo),
            ("desirable_weight", self.desirable_weight, WEIGHT, Kto),
            ("undesirable_weight", self.undesirable_weight, WEIGHT, Kto),
        ];
        for (name, value, range, user) in numbers {
            let (Some(value), field) = (value, format!("{at}.{name}")) else { continue };
            let method = self.method.as_str();
            problems
                .require(user == self.method, &field, || format!("is for {}; the method is {method}", user.as_str()));
            problems.range(&field, value, &range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::params::ServeError;

    fn fields(params: PreferenceParams) -> Vec<String> {
        let mut problems = Problems::default();
        params.check("p", &mut problems);
        match problems.finish() {
            Ok(()) => vec![],
            Err(ServeError::Invalid(all)) => all.into_iter().map(|v| format!("{} {}", v.field, v.message)).collect(),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn numbers_are_in_range_and_given_where_they_are_used() {
        use PreferenceMethod::{Dpo, Kto, Orpo};
        for method in [Dpo, Orpo, Kto] {
            assert!(fields(PreferenceParams::of(method)).is_empty());
            let r = PreferenceParams::of(method).resolve();
            assert_eq!((r.beta, r.label_smoothing, r.desirable_weight, r.undesirable_weight), (0.1, 0.0, 1.0, 1.0));
            for beta in [0.0, -0.1, 100.1, f64::NAN, f64::INFINITY] {
                let found = fields(PreferenceParams { beta: Some(beta), ..PreferenceParams::of(method) });
                assert!(found.len() == 1 && found[0].starts_with("p.beta is"), "{found:?}");
            }
        }
        let smooth = |method, x| PreferenceParams { label_smoothing: Some(x), ..PreferenceParams::of(method) };
        assert!(fields(smooth(Dpo, 0.49)).is_empty());
        assert_eq!(fields(smooth(Dpo, 0.5)).len(), 1);
        assert_eq!(fields(smooth(Orpo, 0.1)), ["p.label_smoothing is for dpo; the method is orpo"]);
        let weighed = |method, x| PreferenceParams {
            desirable_weight: Some(x),
            undesirable_weight: Some(x),
            ..PreferenceParams::of(method)
        };
        assert!(fields(weighed(Kto, 1.5)).is_empty());
        assert_eq!((fields(weighed(Kto, 0.0)).len(), fields(weighed(Dpo, 1.0)).len()), (2, 2));
    }
}
