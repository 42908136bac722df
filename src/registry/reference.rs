//! How a client names a delta: `name`, `name@3`, `name@<digest>`, `name@<first 12 or more digits of the digest>`.

use std::{fmt, str::FromStr};

use super::{RegistryError, VersionRecord};
use crate::ids::{DeltaId, DeltaName};

/// Fewest digits of a digest prefix. Shorter ones, if decimal, are version numbers.
const MIN_PREFIX: usize = 12;
const ACCEPTED: &str = "is not `name`, `name@<number>` or `name@<at least 12 digits of the digest>`";

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaRef {
    /// The name.
    pub name: DeltaName,
    /// Which version; `None`: the current one.
    pub version: Option<VersionSel>,
}

/// One version of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionSel {
    /// By number.
    Number(u64),
    /// By digest.
    Id(DeltaId),
    /// By the digest's first digits (lower case).
    Prefix(String),
}

impl DeltaRef {
    /// The name's current version.
    pub fn current(name: DeltaName) -> Self {
        Self { name, version: None }
    }

    /// This version and no other.
    pub(super) fn exact(version: &VersionRecord) -> Self {
        Self { name: version.name.clone(), version: Some(VersionSel::Number(version.number)) }
    }
}

impl VersionSel {
    pub(super) fn matches(&self, number: u64, id: &DeltaId) -> bool {
        match self {
            Self::Number(n) => *n == number,
            Self::Id(wanted) => wanted == id,
            Self::Prefix(prefix) => id.to_string().starts_with(prefix),
        }
    }
}

impl FromStr for DeltaRef {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let bad = |detail: &str| RegistryError::BadReference { text: text.to_owned(), detail: detail.to_owned() };
        let (name, version) = match text.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        let name = DeltaName::new(name).map_err(|e| bad(&e.to_string()))?;
        let version = version.map(|v| selector(v).ok_or_else(|| bad(ACCEPTED))).transpose()?;
        Ok(Self { name, version })
    }
}

fn selector(text: &str) -> Option<VersionSel> {
    if (1..MIN_PREFIX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().filter(|&n| n > 0).map(VersionSel::Number);
    }
    if !(MIN_PREFIX..=64).contains(&text.len()) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    match text.parse() {
        Ok(id) => Some(VersionSel::Id(id)),
        Err(_) => Some(VersionSel::Prefix(text.to_ascii_lowercase())),
    }
}

impl fmt::Display for DeltaRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            None => self.name.fmt(f),
            Some(VersionSel::Number(n)) => write!(f, "{}@{n}", self.name),
            Some(VersionSel::Id(id)) => write!(f, "{}@{id}", self.name),
            Some(VersionSel::Prefix(prefix)) => write!(f, "{}@{prefix}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_a_name_and_a_number_or_a_digest() {
        let parse = |text: &str| text.parse::<DeltaRef>();
        let id = DeltaId::from_bytes([0xAB; 32]);
        let hex = id.to_string();
        assert_eq!(parse("style").unwrap().version, None);
        assert_eq!(parse("style@3").unwrap().version, Some(VersionSel::Number(3)));
        assert_eq!(parse(&format!("style@{hex}")).unwrap().version, Some(VersionSel::Id(id)));
        assert_eq!(parse(&format!("style@{}", hex.to_uppercase())).unwrap().version, Some(VersionSel::Id(id)));
        let prefix = parse("style@ABABABABABAB").unwrap();
        assert_eq!(prefix.version, Some(VersionSel::Prefix("abababababab".into())));
        assert!(prefix.version.unwrap().matches(1, &id));
        for text in ["style", "style@3", "style@abababababab", &format!("style@{hex}")] {
            assert_eq!(parse(text).unwrap().to_string(), *text);
        }
        let too_long = format!("style@{hex}0");
        let bad = ["", "@3", "../x", "a/b@1", "style@", "style@0", "style@-1", "style@+1", "style@abab", "style@1@2"];
        for text in bad.into_iter().chain([too_long.as_str(), "style@latest", "style@zzzzzzzzzzzzzz"]) {
            assert!(matches!(parse(text), Err(RegistryError::BadReference { .. })), "{text:?}");
        }
    }
}
