//! Preferences, from the wire and to it.

use crate::{
    admission::{
        check::Problems,
        train_params::{PreferenceMethod, PreferenceParams, ResolvedPreference},
    },
    grpc::proto,
};

/// A request's part; `None` with a problem where it names no method.
pub(super) fn from_wire(p: proto::Preference, problems: &mut Problems) -> Option<PreferenceParams> {
    use proto::PreferenceMethod as Wire;
    let method = match Wire::try_from(p.method) {
        Ok(Wire::Dpo) => PreferenceMethod::Dpo,
        Ok(Wire::Orpo) => PreferenceMethod::Orpo,
        Ok(Wire::Kto) => PreferenceMethod::Kto,
        Ok(Wire::Unspecified) => {
            problems.push("spec.preference.method", "is required: dpo, orpo or kto");
            return None;
        }
        Err(unknown) => {
            problems.push("spec.preference.method", unknown.to_string());
            return None;
        }
    };
    Some(PreferenceParams {
        method,
        beta: p.beta,
        label_smoothing: p.label_smoothing,
        desirable_weight: p.desirable_weight,
        undesirable_weight: p.undesirable_weight,
    })
}

/// What is used.
pub(super) fn to_wire(p: ResolvedPreference) -> proto::ResolvedPreference {
    proto::ResolvedPreference {
        method: match p.method {
            PreferenceMethod::Dpo => proto::PreferenceMethod::Dpo,
            PreferenceMethod::Orpo => proto::PreferenceMethod::Orpo,
            PreferenceMethod::Kto => proto::PreferenceMethod::Kto,
        }
        .into(),
        beta: p.beta,
        label_smoothing: p.label_smoothing,
        desirable_weight: p.desirable_weight,
        undesirable_weight: p.undesirable_weight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_named_and_comes_back() {
        for method in 1..=3 {
            let mut problems = Problems::default();
            let params = from_wire(proto::Preference { method, beta: Some(0.3), ..Default::default() }, &mut problems);
            assert!(problems.finish().is_ok());
            let back = params.map(|p| to_wire(p.resolve()));
            assert_eq!(back.map(|p| (p.method, p.beta, p.desirable_weight)), Some((method, 0.3, 1.0)));
        }
        for method in [0, 4] {
            let mut problems = Problems::default();
            assert!(from_wire(proto::Preference { method, ..Default::default() }, &mut problems).is_none());
            assert!(problems.finish().is_err());
        }
    }
}
