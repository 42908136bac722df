//! The limits of all tenants: those of everyone, and those that a file names. The file is JSON with a closed schema:
//!
//! ```json
//! {"tenants": {"acme": {"requests_per_second": 5, "max_deltas": 100, "max_stored_bytes": null}}}
//! ```
//!
//! What a named tenant's entry does not say is as for everyone; `null` = no limit.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;
use serde::{Deserialize, Deserializer};

use super::quota::{Quota, QuotaOf, Rate};
use crate::ids::TenantId;

/// Most bytes of a file of limits.
pub const MAX_LIMITS_BYTES: u64 = 16 << 20;

/// The limits of all tenants; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Quotas {
    default: Quota,
    named: Arc<RwLock<Arc<HashMap<TenantId, Quota>>>>,
}

impl Quotas {
    /// The same limits for everyone.
    pub fn new(default: Quota) -> Self {
        Self { default, named: Arc::default() }
    }

    /// The limits of those that are not named.
    pub fn default_quota(&self) -> Quota {
        self.default
    }

    /// The limits of a tenant now.
    pub fn of(&self, tenant: &TenantId) -> Quota {
        self.named.read().get(tenant).copied().unwrap_or(self.default)
    }

    /// Takes the limits of the tenants that a file names, in place of those that were named before. Returns how many.
    ///
    /// # Errors
    /// What is wrong with the text; everything stays as it was then.
    pub fn read(&self, text: &str) -> Result<usize, LimitsError> {
        let named = parse(text, self.default)?;
        let n = named.len();
        *self.named.write() = Arc::new(named);
        Ok(n)
    }

    /// As what other parts ask.
    pub fn source(&self) -> QuotaOf {
        let this = self.clone();
        Arc::new(move |tenant| this.of(tenant))
    }
}

/// What is wrong with a file of limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// It is not JSON of this form; an unknown field is named.
    #[error("{0}")]
    Form(String),
    /// A tenant's name.
    #[error("tenants: the name {0:?} {1}")]
    Name(String, String),
    /// A tenant's limit.
    #[error("tenants.{0}.{1}: {2}")]
    Limit(String, &'static str, String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    tenants: HashMap<String, Entry>,
}

/// Absent: as for everyone. `null`: no limit.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct Entry {
    #[serde(deserialize_with = "said")]
    max_concurrent: Option<Option<usize>>,
    #[serde(deserialize_with = "said")]
    requests_per_second: Option<Option<f64>>,
    requests_burst: Option<u32>,
    #[serde(deserialize_with = "said")]
    tokens_per_second: Option<Option<f64>>,
    tokens_burst: Option<u32>,
    #[serde(deserialize_with = "said")]
    max_deltas: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_versions: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_stored_bytes: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_resident_bytes: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_train_jobs: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_dataset_bytes: Option<Option<u64>>,
    #[serde(deserialize_with = "said")]
    max_model_bytes: Option<Option<u64>>,
}

/// Tells `null` from a field that is not there.
fn said<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(from).map(Some)
}

fn parse(text: &str, default: Quota) -> Result<HashMap<TenantId, Quota>, LimitsError> {
    let file: File = serde_json::from_str(text).map_err(|e| LimitsError::Form(e.to_string()))?;
    let mut named = HashMap::with_capacity(file.tenants.len());
    for (name, entry) in file.tenants {
        let tenant = TenantId::new(&name).map_err(|e| LimitsError::Name(name.clone(), e.to_string()))?;
        let quota = entry.quota(default).map_err(|(field, what)| LimitsError::Limit(name, field, what))?;
        named.insert(tenant, quota);
    }
    Ok(named)
}

impl Entry {
    fn quota(self, default: Quota) -> Result<Quota, (&'static str, String)> {
        if self.max_concurrent == Some(Some(0)) {
            return Err(("max_concurrent", "is 0; accepted is 1 and more, or null for no limit".into()));
        }
        let requests = ("requests_per_second", "requests_burst");
        let tokens = ("tokens_per_second", "tokens_burst");
        Ok(Quota {
            max_concurrent: self.max_concurrent.unwrap_or(default.max_concurrent),
            rate: rate(requests, (self.requests_per_second, self.requests_burst), default.rate)?,
            tokens: rate(tokens, (self.tokens_per_second, self.tokens_burst), default.tokens)?,
            deltas: self.max_deltas.unwrap_or(default.deltas),
            versions: self.max_versions.unwrap_or(default.versions),
            stored_bytes: self.max_stored_bytes.unwrap_or(default.stored_bytes),
            resident_bytes: self.max_resident_bytes.unwrap_or(default.resident_bytes),
            train_jobs: self.max_train_jobs.unwrap_or(default.train_jobs),
            dataset_bytes: self.max_dataset_bytes.unwrap_or(default.dataset_bytes),
            model_bytes: self.max_model_bytes.unwrap_or(default.model_bytes),
        })
    }
}

/// A rate of its own, with what comes in a second as its burst unless that is said; or the default one.
fn rate(
    (field, burst_field): (&'static str, &'static str),
    (per_second, burst): (Option<Option<f64>>, Option<u32>),
    default: Option<Rate>,
) -> Result<Option<Rate>, (&'static str, String)> {
    if burst == Some(0) {
        return Err((burst_field, "is 0; accepted is 1 and more".into()));
    }
    match (per_second, burst) {
        (None, None) => Ok(default),
        (Some(None), None) => Ok(None),
        (None | Some(None), Some(_)) => Err((burst_field, format!("needs {field}"))),
        (Some(Some(per_second)), burst) => {
            if !(1e-6..=1e9).contains(&per_second) {
                return Err((
                    field,
                    format!("is {per_second}; accepted is 0.000001 to 1000000000, or null for no limit"),
                ));
            }
            let burst = burst.unwrap_or_else(|| per_second.ceil().max(1.0) as u32);
            Ok(Some(Rate { per_second, burst }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    #[test]
    fn named_tenants_have_what_is_said_and_the_rest_as_everyone() {
        let everyone = Quota {
            deltas: Some(5),
            versions: Some(9),
            rate: Some(Rate { per_second: 2.0, burst: 3 }),
            ..Quota::default()
        };
        let quotas = Quotas::new(everyone);
        let shared = quotas.clone();
        assert_eq!(quotas.of(&tenant("acme")), everyone);
        let text = r#"{"tenants": {"acme": {"max_deltas": 7, "max_versions": null, "tokens_per_second": 2.5},
                                   "b": {"requests_per_second": null, "max_concurrent": 4}}}"#;
        assert_eq!(quotas.read(text), Ok(2));
        let acme = shared.of(&tenant("acme"));
        assert_eq!((acme.deltas, acme.versions, acme.rate), (Some(7), None, everyone.rate));
        assert_eq!(acme.tokens, Some(Rate { per_second: 2.5, burst: 3 }));
        let b = shared.source()(&tenant("b"));
        assert_eq!((b.rate, b.max_concurrent, b.deltas), (None, Some(4), Some(5)));
        assert_eq!(shared.of(&tenant("c")), everyone);
        assert_eq!(quotas.read(r#"{"tenants": {}}"#), Ok(0));
        assert_eq!(shared.of(&tenant("acme")), everyone);
    }

    #[test]
    fn whatever_is_wrong_is_named_and_changes_nothing() {
        let quotas = Quotas::default();
        quotas.read(r#"{"tenants": {"a": {"max_deltas": 1}}}"#).unwrap();
        for (text, names) in [
            (r#"{"tenants": {"a": {"max_delta": 1}}}"#, "max_delta"),
            (r#"{"tenant": {}}"#, "tenant"),
            (r#"{}"#, "tenants"),
            (r#"{"tenants": {"../a": {}}}"#, "../a"),
            (r#"{"tenants": {"a": {"requests_burst": 3}}}"#, "tenants.a.requests_burst: needs requests_per_second"),
            (r#"{"tenants": {"a": {"tokens_per_second": -1}}}"#, "tenants.a.tokens_per_second: is -1"),
            (r#"{"tenants": {"a": {"tokens_per_second": 1, "tokens_burst": 0}}}"#, "tenants.a.tokens_burst: is 0"),
            (r#"{"tenants": {"a": {"max_concurrent": 0}}}"#, "tenants.a.max_concurrent: is 0"),
            (r#"{"tenants": {"a": {"max_deltas": -1}}}"#, "-1"),
            ("", "EOF"),
        ] {
            let error = quotas.read(text).unwrap_err().to_string();
            assert!(error.contains(names), "{text}: {error}");
            assert_eq!(quotas.of(&tenant("a")).deltas, Some(1));
        }
    }
}
