//! Who may call, and what for: credentials, the identities that they prove, and the files that say so.
//!
//! Knows no protocol: the edge hands over what a caller presented, and asks what the identity that it gets may do. Files are
//! read again when their content changes.

mod certificates;
mod dates;
mod keys;
mod reload;
mod rights;
mod tls;
mod tokens;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustls::ServerConfig;

pub use certificates::PeerCertificate;
pub use keys::{KEY_PREFIX, KeyEntry, with_entry};
pub use rights::{Identity, Permission, Permissions, Tenancy};
pub use tls::TlsFiles;
pub use tokens::TokenRules;

use crate::telemetry::names;
use certificates::CertificateRules;
use keys::ApiKeys;
use reload::Reloaded;
use tls::ServerTls;
use tokens::Tokens;

/// How often files are looked at.
const RELOAD: Duration = Duration::from_secs(2);

/// Which credentials a server takes. The default asks for none, without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessConfig {
    /// The server's certificate; `None` = plaintext.
    pub tls: Option<TlsFiles>,
    /// File of API keys.
    pub api_keys: Option<PathBuf>,
    /// Tokens of an identity provider.
    pub tokens: Option<TokenRules>,
    /// File of identities of client certificates.
    pub certificates: Option<PathBuf>,
    /// How often files are looked at.
    pub reload_every: Duration,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self { tls: None, api_keys: None, tokens: None, certificates: None, reload_every: RELOAD }
    }
}

impl AccessConfig {
    /// Whether a caller must prove who they are.
    pub fn asks_for_credentials(&self) -> bool {
        self.api_keys.is_some() || self.tokens.is_some() || self.certificates.is_some()
    }
}

/// A file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: {why}")]
pub struct AccessError {
    /// The flag that names the file.
    flag: &'static str,
    why: String,
}

/// Why a caller is nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// No credentials were presented.
    Missing,
    /// Those presented are not accepted: unknown, expired, for another server. The caller is not told which.
    Refused,
}

/// What the server knows of callers' credentials, and its own certificate.
#[derive(Debug)]
pub struct Access {
    tls: Option<Reloaded<ServerTls>>,
    keys: Option<Reloaded<ApiKeys>>,
    tokens: Option<Reloaded<Tokens>>,
    certificates: Option<Reloaded<CertificateRules>>,
    anyone: Arc<Identity>,
    reload_every: Duration,
}

impl Access {
    /// Reads all files.
    ///
    /// # Errors
    /// The flag of a file that cannot be read or used, and why.
    pub fn open(config: &AccessConfig) -> Result<Self, AccessError> {
        let tls = config.tls.as_ref().map(|files| {
            let must = files.clients.as_ref().is_some_and(|(_, must)| *must);
            Reloaded::open("--tls-cert, --tls-key", files.paths(), move |files| ServerTls::parse(files, must))
        });
        let keys = config
            .api_keys
            .as_ref()
            .map(|path| Reloaded::open("--api-keys", vec![path.clone()], |files| ApiKeys::parse(first(files))));
        let tokens = config.tokens.clone().map(|rules| {
            let path = rules.jwks.clone();
            Reloaded::open("--jwt-jwks", vec![path], move |files| Tokens::parse(first(files), &rules))
        });
        let certificates = config.certificates.as_ref().map(|path| {
            Reloaded::open("--mtls-identities", vec![path.clone()], |files| CertificateRules::parse(first(files)))
        });
        Ok(Self {
            tls: tls.transpose()?,
            keys: keys.transpose()?,
            tokens: tokens.transpose()?,
            certificates: certificates.transpose()?,
            anyone: Arc::new(Identity::anyone()),
            reload_every: config.reload_every,
        })
    }

    /// Whether a caller must prove who they are.
    pub fn asks_for_credentials(&self) -> bool {
        self.keys.is_some() || self.tokens.is_some() || self.certificates.is_some()
    }

    /// Whose call this is: a key or token decides if there is one, else the client's certificate.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn identify(
        &self,
        bearer: Option<&str>,
        certificate: Option<&PeerCertificate>,
    ) -> Result<Arc<Identity>, Denied> {
        if !self.asks_for_credentials() {
            return Ok(Arc::clone(&self.anyone));
        }
        match (bearer, certificate) {
            (Some(text), _) => self.of_bearer(text).ok_or(Denied::Refused),
            (None, Some(certificate)) => {
                let rules = self.certificates.as_ref().ok_or(Denied::Missing)?.get();
                rules.find(certificate, dates::now()).ok_or(Denied::Refused)
            }
            (None, None) => Err(Denied::Missing),
        }
    }

    fn of_bearer(&self, text: &str) -> Option<Arc<Identity>> {
        if text.starts_with(KEY_PREFIX) {
            return self.keys.as_ref()?.get().find(text, dates::now());
        }
        match self.tokens.as_ref()?.get().verify(text) {
            Ok(identity) => Some(identity),
            Err(why) => {
                tracing::debug!(why, "a token was refused");
                None
            }
        }
    }

    /// How a new connection is encrypted, with the certificate that is in force now; `None` = not at all.
    pub fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.as_ref().map(|tls| Arc::clone(&tls.get().config))
    }

    /// How often to call [`Self::look_again`]; `None` = there are no files.
    pub fn reload_every(&self) -> Option<Duration> {
        (self.asks_for_credentials() || self.tls.is_some()).then_some(self.reload_every)
    }

    /// Reads files again whose content changed. Blocks.
    pub fn look_again(&self) {
        if let Some(tls) = &self.tls {
            tls.look_again();
            let left = tls.get().not_after.saturating_sub_unsigned(dates::now());
            metrics::gauge!(names::TLS_EXPIRES).set(left as f64);
        }
        if let Some(keys) = &self.keys {
            keys.look_again();
        }
        if let Some(tokens) = &self.tokens {
            tokens.look_again();
        }
        if let Some(certificates) = &self.certificates {
            certificates.look_again();
        }
    }

    /// Says in the log what protects this address, loudly if nothing does.
    pub fn announce(&self, listen: SocketAddr) {
        let tls = self.tls.is_some();
        match (self.asks_for_credentials(), is_loopback(listen)) {
            (true, _) => tracing::info!(%listen, tls, "callers are asked for credentials"),
            (false, true) => tracing::warn!(
                %listen, tls, "no credentials are configured: every program on this machine may do everything, as any tenant"
            ),
            (false, false) => tracing::error!(
                %listen, tls,
                "INSECURE: no credentials are configured: whoever reaches this address may do everything, as any tenant"
            ),
        }
    }
}

/// Whether only this machine can reach an address.
pub fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn first(files: &[Vec<u8>]) -> &[u8] {
    files.first().map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_also_where_it_is_written_as_ipv6() {
        for (address, is) in [
            ("127.0.0.1:1", true),
            ("127.8.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("10.0.0.1:1", false),
        ] {
            assert_eq!(address.parse().map(is_loopback), Ok(is), "{address}");
        }
    }

    #[test]
    fn without_credentials_everybody_is_anyone_and_with_them_nobody_is() -> Result<(), Box<dyn std::error::Error>> {
        let open = Access::open(&AccessConfig::default())?;
        assert_eq!(open.identify(Some("dsk_x"), None).map(|i| i.permissions), Ok(Permissions::ALL));
        assert!(open.tls().is_none() && open.reload_every().is_none());

        let dir = tempfile::tempdir()?;
        let path = dir.path().join("keys.json");
        let (key, entry) = KeyEntry::generate("ci", "acme", &["infer".to_owned()], None)?;
        std::fs::write(&path, with_entry(b"", &entry)?)?;
        let config = AccessConfig { api_keys: Some(path), ..AccessConfig::default() };
        let access = Access::open(&config)?;
        assert!(config.asks_for_credentials() && access.asks_for_credentials() && access.reload_every().is_some());
        assert_eq!(access.identify(Some(&key), None).map(|i| i.name.clone()), Ok("key:ci".to_owned()));
        assert_eq!(access.identify(None, None), Err(Denied::Missing));
        for wrong in ["dsk_", "", "a.b.c", &key[4..]] {
            assert_eq!(access.identify(Some(wrong), None), Err(Denied::Refused), "{wrong:?}");
        }
        Ok(())
    }

    #[test]
    fn a_file_that_is_missing_is_named_by_its_flag() {
        let config = AccessConfig { api_keys: Some("no/such/file".into()), ..AccessConfig::default() };
        assert!(Access::open(&config).is_err_and(|e| e.to_string().starts_with("--api-keys: ")));
    }
}
