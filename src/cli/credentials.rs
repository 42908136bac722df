//! How a client proves who it is, and knows the server: flags, files, and what may be sent over which connection.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where systems keep the authorities that their programs trust.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Options of all client commands for servers that ask for credentials.
#[derive(Clone, Default, Args)]
pub(crate) struct Credentials {
    /// Authorities of the server's certificate, PEM; default those of the system.
    #[arg(long, global = true, env = "DELTASERVE_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// A certificate of this client with its chain, PEM.
    #[arg(long, global = true, env = "DELTASERVE_TLS_CLIENT_CERT", value_name = "FILE")]
    tls_client_cert: Option<PathBuf>,
    /// The private key of --tls-client-cert, PEM.
    #[arg(long, global = true, env = "DELTASERVE_TLS_CLIENT_KEY", value_name = "FILE")]
    tls_client_key: Option<PathBuf>,
    /// An API key or a token (JWT). Others on this machine may see a command's options: the environment or a file is better.
    #[arg(long, global = true, env = "DELTASERVE_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// File of an API key or a token; goes before --api-key.
    #[arg(long, global = true, env = "DELTASERVE_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Send the key over http:// also to another machine.
    #[arg(long, global = true)]
    plaintext: bool,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.api_key.as_ref().map(|_| "...");
        f.debug_struct("Credentials").field("tls_ca", &self.tls_ca).field("api_key", &key).finish_non_exhaustive()
    }
}

impl Credentials {
    /// How to reach a server: `http://HOST:PORT`, `https://HOST:PORT`, or without a scheme, which is https where TLS is spoken of.
    ///
    /// # Errors
    /// An address that is none; files that cannot be read; options that do not go together.
    pub(super) async fn endpoint(&self, server: &str) -> anyhow::Result<Endpoint> {
        let wants_tls = self.tls_ca.is_some() || self.tls_client_cert.is_some() || self.tls_client_key.is_some();
        let address = match (server.contains("://"), wants_tls) {
            (true, _) => server.to_owned(),
            (false, true) => format!("https://{server}"),
            (false, false) => format!("http://{server}"),
        };
        let endpoint = Endpoint::from_shared(address).context("--server")?.connect_timeout(CONNECT_TIMEOUT);
        match endpoint.uri().scheme_str() {
            Some("https") => Ok(endpoint.tls_config(self.tls().await?)?),
            Some("http") if wants_tls => {
                bail!("--server: is http://, but options for TLS are given; accepted is https://")
            }
            Some("http") => Ok(endpoint),
            _ => bail!("--server: {server:?} is neither http:// nor https://"),
        }
    }

    async fn tls(&self) -> anyhow::Result<ClientTlsConfig> {
        let system = || SYSTEM_AUTHORITIES.iter().map(PathBuf::from).find(|path| path.exists());
        let authorities = self.tls_ca.clone().or_else(system);
        let authorities = authorities.context("--tls-ca: is needed, this system has no list of authorities")?;
        let authorities = read("--tls-ca", &authorities).await?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities)).timeout(CONNECT_TIMEOUT);
        match (&self.tls_client_cert, &self.tls_client_key) {
            (Some(certificate), Some(key)) => {
                let certificate = read("--tls-client-cert", certificate).await?;
                Ok(tls.identity(Identity::from_pem(certificate, read("--tls-client-key", key).await?)))
            }
            (None, None) => Ok(tls),
            (Some(_), None) => bail!("--tls-client-key: is needed with --tls-client-cert"),
            (None, Some(_)) => bail!("--tls-client-cert: is needed with --tls-client-key"),
        }
    }

    /// What goes with every call to this endpoint, if there is a key or token.
    ///
    /// # Errors
    /// A file that cannot be read; what is no key; a key that others could read on its way.
    pub(super) async fn authorization(&self, endpoint: &Endpoint) -> anyhow::Result<Option<MetadataValue<Ascii>>> {
        let (flag, key) = match (&self.api_key_file, &self.api_key) {
            (Some(path), _) => {
                let bytes = read("--api-key-file", path).await?;
                ("--api-key-file", String::from_utf8(bytes).context("--api-key-file: is not UTF-8")?)
            }
            (None, Some(key)) => ("--api-key", key.clone()),
            (None, None) => return Ok(None),
        };
        let key = key.trim();
        ensure!(!key.is_empty() && !key.contains(char::is_whitespace), "{flag}: is no key: it is empty or has spaces");
        ensure!(key.is_ascii(), "{flag}: is no key: it is not ASCII");
        let encrypted = endpoint.uri().scheme_str() == Some("https");
        ensure!(
            encrypted || self.plaintext || endpoint.uri().host().is_some_and(is_loopback),
            "{flag}: others could read the key on its way to http://; accepted are https://, a loopback address, or --plaintext"
        );
        // the text of an error would have the key in it
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {key}").parse().map_err(|_| anyhow::anyhow!("{flag}: is no key: it is not ASCII"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

async fn read(flag: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    tokio::fs::read(path).await.with_context(|| format!("{flag}: read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_key(key: &str) -> Credentials {
        Credentials { api_key: Some(key.into()), ..Credentials::default() }
    }

    async fn sent(credentials: &Credentials, server: &str) -> Result<Option<String>, String> {
        let endpoint = credentials.endpoint(server).await.map_err(|e| format!("{e:#}"))?;
        let value = credentials.authorization(&endpoint).await.map_err(|e| format!("{e:#}"))?;
        Ok(value.map(|v| v.to_str().unwrap_or_default().to_owned()))
    }

    #[tokio::test]
    async fn a_key_goes_to_this_machine_or_over_tls() {
        let key = with_key(" dsk_1\n");
        for server in ["127.0.0.1:1", "http://localhost:1", "http://[::1]:1"] {
            assert_eq!(sent(&key, server).await, Ok(Some("Bearer dsk_1".into())), "{server}");
            assert_eq!(sent(&Credentials::default(), server).await, Ok(None));
        }
        let refused = sent(&key, "http://10.0.0.1:1").await.expect_err("others could read it");
        assert!(refused.contains("--plaintext") && !refused.contains("dsk_1"), "{refused}");
        assert!(sent(&Credentials { plaintext: true, ..key }, "http://10.0.0.1:1").await.is_ok());
        for bad in ["", " ", "a b", "dsk_é"] {
            let refused = sent(&with_key(bad), "127.0.0.1:1").await.expect_err("it is no key");
            assert!(refused.starts_with("--api-key:") && !refused.contains('é'), "{refused}");
        }
        assert!(!format!("{:?}", with_key("dsk_secret")).contains("secret"));
    }

    #[tokio::test]
    async fn options_for_tls_mean_https() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("ca.pem");
        let key = rcgen::KeyPair::generate()?;
        tokio::fs::write(&path, rcgen::CertificateParams::new(vec!["x".to_owned()])?.self_signed(&key)?.pem()).await?;
        let tls = Credentials { tls_ca: Some(path), ..Credentials::default() };
        assert_eq!(tls.endpoint("host:1").await?.uri().scheme_str(), Some("https"));
        assert!(tls.endpoint("http://host:1").await.is_err() && tls.endpoint("ftp://host:1").await.is_err());
        let half = Credentials { tls_client_cert: tls.tls_ca.clone(), ..tls };
        assert!(half.endpoint("host:1").await.is_err_and(|e| e.to_string().starts_with("--tls-client-key:")));
        let absent = Credentials { tls_ca: Some("no/such/file".into()), ..Credentials::default() };
        assert!(absent.endpoint("host:1").await.is_err_and(|e| e.to_string().starts_with("--tls-ca:")));
        Ok(())
    }
}
