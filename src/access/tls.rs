//! The server's side of TLS: its certificate, and the authorities of client certificates.
//!
//! Two implementations of cryptography are linked into the program; the one that TLS uses is named, never looked up.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

/// What the client may speak behind the handshake.
const PROTOCOL: &[u8] = b"h2";

/// Files of the server's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate with its chain, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The authorities of client certificates, PEM, and whether a client must have one; `None` = clients are not asked.
    pub clients: Option<(PathBuf, bool)>,
}

/// A certificate that is in force.
#[derive(Debug)]
pub(super) struct ServerTls {
    pub(super) config: Arc<ServerConfig>,
    /// Until when the certificate is valid, in seconds since 1970.
    pub(super) not_after: i64,
}

impl TlsFiles {
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        let clients = self.clients.iter().map(|(path, _)| path.clone());
        [self.certificate.clone(), self.key.clone()].into_iter().chain(clients).collect()
    }
}

impl ServerTls {
    /// Reads certificate, key and, if there are, client authorities, in this order.
    ///
    /// # Errors
    /// Which of them is wrong; a key that is not the certificate's.
    pub(super) fn parse(files: &[Vec<u8>], client_must: bool) -> Result<Self, String> {
        let [chain, key, clients @ ..] = files else { return Err("certificate and key are needed".into()) };
        let chain = certificates(chain).map_err(|why| format!("certificate: {why}"))?;
        let leaf = chain.first().ok_or("certificate: has no certificate")?;
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| format!("certificate: {e}"))?;
        let not_after = leaf.validity().not_after.timestamp();
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("key: {e}"))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?;
        let builder = match clients.first() {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(pem).map_err(|why| format!("client authorities: {why}"))? {
                    roots.add(authority).map_err(|e| format!("client authorities: {e}"))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = if client_must { verifier } else { verifier.allow_unauthenticated() };
                builder.with_client_cert_verifier(verifier.build().map_err(|e| format!("client authorities: {e}"))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|e| e.to_string())?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { config: Arc::new(config), not_after })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if all.is_empty() { Err("has no certificate".into()) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair() -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
        let certificate = params.self_signed(&key).expect("a certificate");
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    }

    #[test]
    fn a_pair_makes_a_server_that_speaks_http_2() {
        let ((certificate, key), (other, _)) = (pair(), pair());
        let tls = ServerTls::parse(&[certificate.clone(), key.clone()], false).expect("a server");
        assert_eq!(tls.config.alpn_protocols, [b"h2".to_vec()]);
        assert!(tls.not_after > 4_000_000_000);
        assert!(ServerTls::parse(&[certificate, key, other], true).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let ((certificate, key), (_, other)) = (pair(), pair());
        let refused = |files: &[&[u8]]| {
            let files: Vec<Vec<u8>> = files.iter().map(|f| f.to_vec()).collect();
            ServerTls::parse(&files, true).expect_err("it is refused")
        };
        assert!(refused(&[b"", &key]).starts_with("certificate:"));
        assert!(refused(&[&key, &key]).starts_with("certificate:"));
        assert!(refused(&[&certificate, &certificate]).starts_with("key:"));
        assert!(!refused(&[&certificate, &other]).is_empty(), "the key of another certificate");
        assert!(refused(&[&certificate, &key, b"x"]).starts_with("client authorities:"));
        assert!(!refused(&[&certificate]).is_empty());
    }
}
