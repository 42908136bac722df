//! Identities of client certificates: which names a certificate has, and which identity a name stands for.

use std::sync::Arc;

use serde::Deserialize;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use super::{Identity, rights};

/// What identities are told by, each with the kind of name it is, so that no name of one kind passes for one of another.
const KINDS: [&str; 3] = ["uri:", "dns:", "cn:"];

/// A client's certificate, whose chain the handshake has verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// `uri:...` and `dns:...` of its alternative names, and `cn:...` of its subject.
    names: Vec<String>,
    /// Until when it is valid, in seconds since 1970.
    not_after: i64,
}

impl PeerCertificate {
    /// Reads a leaf certificate; `None` if it is none.
    pub fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let alternatives = certificate.subject_alternative_name().ok()?;
        let general = alternatives.iter().flat_map(|extension| &extension.value.general_names);
        let mut names: Vec<String> = general
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(format!("uri:{uri}")),
                GeneralName::DNSName(host) => Some(format!("dns:{host}")),
                _ => None,
            })
            .collect();
        let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        names.extend(common.map(|name| format!("cn:{name}")));
        Some(Self { names, not_after: certificate.validity().not_after.timestamp() })
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    identity: String,
    tenant: String,
    permissions: Vec<String>,
}

/// The identities of a file.
#[derive(Debug)]
pub(super) struct CertificateRules(Vec<(String, Arc<Identity>)>);

impl CertificateRules {
    /// Reads a file of identities: a JSON array of `{"identity", "tenant", "permissions"}`.
    ///
    /// # Errors
    /// The entry, the field and what is accepted.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let entries: Vec<Entry> = serde_json::from_slice(json).map_err(|e| format!("is no list of identities: {e}"))?;
        let mut rules: Vec<(String, Arc<Identity>)> = Vec::with_capacity(entries.len());
        for (i, entry) in entries.into_iter().enumerate() {
            let at = |why: String| format!("entry {i} ({:?}): {why}", entry.identity);
            let named = KINDS.iter().any(|kind| entry.identity.strip_prefix(kind).is_some_and(|name| !name.is_empty()));
            if !named {
                return Err(at("identity: accepted are uri:NAME, dns:NAME and cn:NAME".into()));
            }
            if rules.iter().any(|(name, _)| *name == entry.identity) {
                return Err(at("identity: is that of another entry, too".into()));
            }
            let (tenancy, permissions) = rights::read(&entry.tenant, &entry.permissions).map_err(at)?;
            let identity = Identity { name: format!("certificate:{}", entry.identity), tenancy, permissions };
            rules.push((entry.identity, Arc::new(identity)));
        }
        Ok(Self(rules))
    }

    /// Whose certificate this is, at a time in seconds since 1970: of several identities the first in the file. A
    /// connection may outlive its certificate, its calls may not.
    pub(super) fn find(&self, certificate: &PeerCertificate, now: u64) -> Option<Arc<Identity>> {
        if certificate.not_after < i64::try_from(now).unwrap_or(i64::MAX) {
            return None;
        }
        let of_it = |(name, _): &&(String, Arc<Identity>)| certificate.names.contains(name);
        self.0.iter().find(of_it).map(|(_, identity)| Arc::clone(identity))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(common: &str, uri: &str) -> PeerCertificate {
        let mut params = CertificateParams::new(vec!["host.example".to_owned()]).expect("names");
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ASCII")));
        let key = KeyPair::generate().expect("a key");
        let made = params.self_signed(&key).expect("a certificate");
        PeerCertificate::read(made.der()).expect("it reads")
    }

    fn rules(names: &[&str]) -> Result<CertificateRules, String> {
        let entry = |name: &&str| serde_json::json!({"identity": name, "tenant": "acme", "permissions": ["infer"]});
        CertificateRules::parse(&serde_json::to_vec(&names.iter().map(entry).collect::<Vec<_>>()).expect("JSON"))
    }

    #[test]
    fn names_keep_their_kind() {
        let certificate = certificate("agent", "spiffe://x/agent");
        assert_eq!(certificate.names, ["dns:host.example", "uri:spiffe://x/agent", "cn:agent"]);
        assert!(certificate.not_after > 4_000_000_000);
        assert_eq!(PeerCertificate::read(b"\x30\x03abc"), None);
        let found = |names: &[&str]| rules(names).expect("rules").find(&certificate, 0).map(|i| i.name.clone());
        assert_eq!(
            found(&["cn:other", "uri:spiffe://x/agent", "cn:agent"]).as_deref(),
            Some("certificate:uri:spiffe://x/agent")
        );
        for other in ["cn:host.example", "dns:agent", "uri:agent", "cn:agen", "cn:AGENT"] {
            assert_eq!(found(&[other]), None, "{other}");
        }
    }

    #[test]
    fn a_certificate_that_has_run_out_is_nobodys() {
        let certificate = PeerCertificate { not_after: 1000, ..certificate("agent", "spiffe://x/agent") };
        let rules = rules(&["cn:agent"]).expect("rules");
        assert!(rules.find(&certificate, 1000).is_some() && rules.find(&certificate, 1001).is_none());
    }

    #[test]
    fn identities_without_a_kind_and_twice_are_refused() {
        for bad in [&["agent"][..], &["cn:"][..], &["cn:a", "cn:a"][..], &["ip:1"][..]] {
            assert!(rules(bad).is_err_and(|why| why.contains("identity:")), "{bad:?}");
        }
        let open = br#"[{"identity": "cn:a", "tenant": "*", "permissions": ["infer"]}]"#;
        assert!(CertificateRules::parse(open).is_err_and(|why| why.contains("tenant:")));
        assert!(CertificateRules::parse(b"[{\"identity\": \"cn:a\", \"admin\": true}]").is_err());
    }
}
