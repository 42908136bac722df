//! Identifiers: who is calling, what a delta is called, and which bytes it is.
//!
//! Names move, ids do not: a [`DeltaName`] is an alias that a publish may point at another version; a [`DeltaId`] is a
//! digest over a version's content and never changes its meaning. Names are identifiers, never paths.

use std::{fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};

/// Longest accepted name, in bytes.
pub const MAX_NAME_LEN: usize = 128;

/// Why a name was refused.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// The name is empty.
    #[error("must not be empty")]
    Empty,
    /// The name is longer than [`MAX_NAME_LEN`].
    #[error("is {0} bytes long; at most {MAX_NAME_LEN} are accepted")]
    TooLong(usize),
    /// The name has a character outside the accepted set.
    #[error("has the character {0:?} at byte {1}; accepted are a-z A-Z 0-9 '.' '_' '-'")]
    BadChar(char, usize),
    /// The name starts with a dot or a dash.
    #[error("starts with {0:?}; the first character must be a letter, a digit or '_'")]
    BadStart(char),
}

/// Checks a tenant or delta name: 1 to [`MAX_NAME_LEN`] of `a-z A-Z 0-9 . _ -`, starting with a letter, digit or `_`.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_LEN {
        return Err(NameError::TooLong(name.len()));
    }
    for (at, c) in name.char_indices() {
        if !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')) {
            return Err(NameError::BadChar(c, at));
        }
    }
    match name.chars().next() {
        Some(c @ ('.' | '-')) => Err(NameError::BadStart(c)),
        _ => Ok(()),
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// [`NameError`] says what is wrong and what is accepted.
            pub fn new(name: &str) -> Result<Self, NameError> {
                check_name(name)?;
                Ok(Self(name.into()))
            }

            /// The name as given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// Who owns deltas, datasets and jobs.
    TenantId
);
name_type!(
    /// A tenant's name for a delta; an alias that moves from version to version.
    DeltaName
);

/// Why a digest could not be read.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("is not a digest: 64 hexadecimal digits are accepted")]
pub struct DigestError;

macro_rules! digest_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps the 32 bytes of a SHA-256.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 12 hexadecimal digits, for logs and tables.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..6])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = DigestError;
            fn from_str(s: &str) -> Result<Self, DigestError> {
                let mut out = [0u8; 32];
                hex::decode_to_slice(s, &mut out).map_err(|_| DigestError)?;
                Ok(Self(out))
            }
        }
    };
}

digest_type!(
    /// One immutable version of a delta: SHA-256 over a domain tag, base fingerprint, config and tensors.
    DeltaId
);
digest_type!(
    /// The base model: SHA-256 over a domain tag, its config and its tensors.
    BaseFingerprint
);
digest_type!(
    /// A stored blob: SHA-256 of its bytes.
    BlobId
);

/// Digests as 64 hexadecimal digits: `#[serde(with = "crate::ids::as_hex")]`.
pub mod as_hex {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes the digits.
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<T: Display, S: Serializer>(id: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    /// Reads the digits.
    ///
    /// # Errors
    /// If they are not a digest.
    pub fn deserialize<'de, T: FromStr<Err = super::DigestError>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl BlobId {
    /// The id of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl DeltaId {
    /// The id of a version: the same base, config and weights bytes always give the same id.
    pub fn compute(base: &BaseFingerprint, files: &std::collections::BTreeMap<String, bytes::Bytes>) -> Self {
        let mut h = Sha256::new();
        h.update(b"deltaserve/delta/v1\0");
        h.update(base.as_bytes());
        for (name, data) in files {
            h.update((name.len() as u64).to_le_bytes());
            h.update(name.as_bytes());
            h.update(Sha256::digest(data));
        }
        Self(h.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_identifiers_never_paths() {
        for ok in ["a", "Tenant-1", "v1.2_x", "_hidden", "9"] {
            assert_eq!(check_name(ok), Ok(()));
        }
        for bad in ["", "..", ".", "a/b", "a\\b", "a:b", "a\nb", "a\0", "%2e%2e ", "-x", "naïve", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_id_depends_on_base_names_and_bytes() {
        let files = |n: &str, b: &'static [u8]| [(n.to_owned(), bytes::Bytes::from_static(b))].into();
        let base = BaseFingerprint::from_bytes([1; 32]);
        let id = DeltaId::compute(&base, &files("a", b"x"));
        assert_eq!(id, DeltaId::compute(&base, &files("a", b"x")));
        assert_ne!(id, DeltaId::compute(&base, &files("b", b"x")));
        assert_ne!(id, DeltaId::compute(&base, &files("a", b"y")));
        assert_ne!(id, DeltaId::compute(&BaseFingerprint::from_bytes([2; 32]), &files("a", b"x")));
        assert_eq!(id.to_string().parse::<DeltaId>(), Ok(id));
        assert!("zz".parse::<DeltaId>().is_err());
    }
}
