//! API keys: long random texts of which the server knows SHA-256 digests only.
//!
//! A key has 256 random bits, so a fast digest is enough: there is nothing to guess from a list of words.

use std::{collections::HashSet, sync::Arc};

use rand::{TryRngCore as _, rngs::OsRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

use super::{Identity, dates, rights};
use crate::ids::check_name;

/// What every key begins with: it tells keys from tokens, and lets scanners find keys that leaked.
pub const KEY_PREFIX: &str = "dsk_";

/// A key as the file of keys has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// Its name in logs; a name like a tenant's, unique in the file.
    pub id: String,
    /// SHA-256 of the whole key with its prefix, 64 hexadecimal digits.
    pub sha256: String,
    /// Whose key it is; `*` = any tenant's that a call names, with the permission `admin` only.
    pub tenant: String,
    /// What it may be used for: `infer`, `train`, `manage`, `admin`.
    pub permissions: Vec<String>,
    /// From when on it is refused, in UTC: `2027-01-31` or `2027-01-31T12:00:00Z`; unset = never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

impl KeyEntry {
    /// A new random key and its entry, which is all that a server needs to know of it.
    ///
    /// # Errors
    /// What is wrong with the tenant, the permissions or the lifetime, or a system without random numbers.
    pub fn generate(
        id: &str,
        tenant: &str,
        permissions: &[String],
        days: Option<u32>,
    ) -> Result<(String, Self), String> {
        let mut secret = [0u8; 32];
        OsRng.try_fill_bytes(&mut secret).map_err(|e| format!("random numbers: {e}"))?;
        let key = format!("{KEY_PREFIX}{}", hex::encode(secret));
        let entry = Self {
            id: id.to_owned(),
            sha256: hex::encode(Sha256::digest(key.as_bytes())),
            tenant: tenant.to_owned(),
            permissions: permissions.to_vec(),
            expires: days.map(|days| dates::format(dates::now() + u64::from(days) * 86_400)),
        };
        entry.check()?;
        Ok((key, entry))
    }

    fn check(&self) -> Result<Key, String> {
        check_name(&self.id).map_err(|e| format!("id: {e}"))?;
        let mut digest = [0; 32];
        hex::decode_to_slice(&self.sha256, &mut digest)
            .map_err(|_| "sha256: is no digest; accepted are 64 hexadecimal digits".to_owned())?;
        let (tenancy, permissions) = rights::read(&self.tenant, &self.permissions)?;
        let expires = match &self.expires {
            None => u64::MAX,
            Some(text) => dates::parse(text).ok_or_else(|| {
                format!("expires: is {text:?}; accepted are 2027-01-31 and 2027-01-31T12:00:00Z, in UTC")
            })?,
        };
        let identity = Arc::new(Identity { name: format!("key:{}", self.id), tenancy, permissions });
        Ok(Key { digest, expires, identity })
    }
}

#[derive(Debug)]
struct Key {
    digest: [u8; 32],
    /// Seconds since 1970.
    expires: u64,
    identity: Arc<Identity>,
}

/// The keys of a file.
#[derive(Debug)]
pub(super) struct ApiKeys(Vec<Key>);

impl ApiKeys {
    /// Reads a file of keys: a JSON array of [`KeyEntry`].
    ///
    /// # Errors
    /// The entry, the field and what is accepted.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let entries = entries(json)?;
        let (mut ids, mut digests) = (HashSet::new(), HashSet::new());
        let mut keys = Vec::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            let at = |why: String| format!("entry {i} ({:?}): {why}", entry.id);
            let key = entry.check().map_err(at)?;
            if !ids.insert(entry.id.as_str()) {
                return Err(at("id: is that of another entry, too".into()));
            }
            if !digests.insert(key.digest) {
                return Err(at("sha256: is that of another entry, too".into()));
            }
            keys.push(key);
        }
        Ok(Self(keys))
    }

    /// Whose key this is, at a time in seconds since 1970. Takes as long whether and where the key is found.
    pub(super) fn find(&self, key: &str, now: u64) -> Option<Arc<Identity>> {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut found = u64::MAX;
        for (i, known) in self.0.iter().enumerate() {
            found.conditional_assign(&(i as u64), known.digest.ct_eq(&digest));
        }
        let key = self.0.get(usize::try_from(found).ok()?)?;
        (now < key.expires).then(|| Arc::clone(&key.identity))
    }
}

/// The entries of a file of keys, not yet looked at.
///
/// # Errors
/// What is not in the form of the file.
pub(super) fn entries(json: &[u8]) -> Result<Vec<KeyEntry>, String> {
    serde_json::from_slice(json).map_err(|e| format!("is no list of keys: {e}"))
}

/// The file of keys with one more entry.
///
/// # Errors
/// If the file, or the file with this entry, cannot be used.
pub fn with_entry(json: &[u8], entry: &KeyEntry) -> Result<String, String> {
    let mut all = if json.trim_ascii().is_empty() { Vec::new() } else { entries(json)? };
    all.push(entry.clone());
    let text = serde_json::to_string_pretty(&all).map_err(|e| e.to_string())? + "\n";
    ApiKeys::parse(text.as_bytes())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Permission, Tenancy};

    fn made(id: &str, days: Option<u32>) -> (String, KeyEntry) {
        KeyEntry::generate(id, "acme", &["infer".to_owned(), "train".to_owned()], days).expect("a key")
    }

    #[test]
    fn a_key_is_found_by_its_digest_and_by_nothing_else() {
        let ((first, a), (second, b)) = (made("a", None), made("b", None));
        assert!(first.starts_with(KEY_PREFIX) && first.len() == 68 && first != second);
        let text = with_entry(with_entry(b"", &a).expect("a file").as_bytes(), &b).expect("a file");
        assert!(!text.contains(&first[4..]), "the key is nowhere in the file");
        let keys = ApiKeys::parse(text.as_bytes()).expect("keys");
        let found = keys.find(&second, 0).expect("the second");
        assert_eq!((found.name.as_str(), found.permissions.has(Permission::Train)), ("key:b", true));
        assert!(matches!(&found.tenancy, Tenancy::One(t) if t.as_str() == "acme"));
        assert!(!found.permissions.has(Permission::Admin));
        for wrong in ["", KEY_PREFIX, &first[..67], &format!("{first}0"), &first.to_uppercase(), &a.sha256] {
            assert!(keys.find(wrong, 0).is_none(), "{wrong:?}");
        }
        assert!(ApiKeys::parse(b"[]").expect("no keys").find(&first, 0).is_none());
    }

    #[test]
    fn a_key_ends_at_its_time() {
        let (key, entry) = made("a", Some(1));
        let keys = ApiKeys::parse(with_entry(b"[]", &entry).expect("a file").as_bytes()).expect("keys");
        let end = dates::parse(entry.expires.as_deref().expect("a time")).expect("a time");
        assert!(keys.find(&key, end - 1).is_some() && keys.find(&key, end).is_none());
        assert!((86_000..=86_400).contains(&(end - dates::now())), "{end}");
    }

    #[test]
    fn a_bad_entry_is_named_with_its_field() {
        let (_, good) = made("a", None);
        let refused =
            |entry: KeyEntry| ApiKeys::parse(&serde_json::to_vec(&[entry]).expect("JSON")).expect_err("it is refused");
        assert!(refused(KeyEntry { id: "a/b".into(), ..good.clone() }).contains("id:"));
        assert!(refused(KeyEntry { sha256: "12".into(), ..good.clone() }).contains("sha256: is no digest"));
        assert!(refused(KeyEntry { tenant: "*".into(), ..good.clone() }).contains("tenant:"));
        assert!(refused(KeyEntry { permissions: vec!["all".into()], ..good.clone() }).contains("permissions:"));
        assert!(refused(KeyEntry { expires: Some("soon".into()), ..good.clone() }).contains("expires:"));
        let text = with_entry(b"[]", &good).expect("a file");
        assert!(with_entry(text.as_bytes(), &good).expect_err("it is there already").contains("id:"));
        let again = KeyEntry { id: "b".into(), ..good };
        assert!(with_entry(text.as_bytes(), &again).expect_err("it is there already").contains("sha256:"));
        for bad in ["{}", "[1]", "[{\"id\": \"a\"}]", &text.replace("\"id\"", "\"key\": \"x\", \"id\"")] {
            assert!(ApiKeys::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
