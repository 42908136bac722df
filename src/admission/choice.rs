//! Which deltas a request names.

use std::fmt;

/// Delta references with their weights: none = the bare base, one of weight 1 = that delta, else the weighted sum.
/// A reference is `name`, `name@3` or `name@<digest>`.
#[derive(Clone, Default, PartialEq)]
pub struct DeltaChoice(Vec<(String, f64)>);

impl DeltaChoice {
    /// Several deltas, or one with a weight.
    pub fn weighted(deltas: Vec<(String, f64)>) -> Self {
        Self(deltas)
    }

    /// The references and weights.
    pub fn parts(&self) -> &[(String, f64)] {
        &self.0
    }

    /// The reference of a request that names a delta or the base as it is; `None` for a sum.
    pub fn single(&self) -> Option<&str> {
        match self.0.as_slice() {
            [] => Some(""),
            [(reference, weight)] if *weight == 1.0 => Some(reference),
            _ => None,
        }
    }
}

impl From<String> for DeltaChoice {
    fn from(reference: String) -> Self {
        Self(if reference.is_empty() { vec![] } else { vec![(reference, 1.0)] })
    }
}

impl From<&str> for DeltaChoice {
    fn from(reference: &str) -> Self {
        reference.to_owned().into()
    }
}

/// A reference as given; a sum as `a*0.7 + b*0.3`.
impl fmt::Display for DeltaChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reference) = self.single() {
            return f.write_str(reference);
        }
        let terms: Vec<String> = self.0.iter().map(|(reference, weight)| format!("{reference}*{weight}")).collect();
        f.write_str(&terms.join(" + "))
    }
}

impl fmt::Debug for DeltaChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}
