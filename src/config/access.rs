//! `serve`'s flags of identity and access: what of them goes together, and what a server may not be started with.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum, builder::BoolishValueParser};

use crate::access::{AccessConfig, TlsFiles, TokenRules, is_loopback};

/// Flags of identity and access.
#[derive(Debug, Clone, Args)]
pub struct AccessArgs {
    /// The server's certificate with its chain, PEM; read again when it changes. With it, the address speaks TLS only.
    #[arg(long, env = "DELTASERVE_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, PEM.
    #[arg(long, env = "DELTASERVE_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of client certificates, PEM: clients are asked for one, and one of another authority ends the connection.
    #[arg(long, env = "DELTASERVE_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Whether a client must have a certificate, or may have a key or token instead; default require.
    #[arg(long, env = "DELTASERVE_TLS_CLIENT_AUTH", value_name = "require|optional")]
    pub tls_client_auth: Option<ClientAuth>,
    /// API keys: a JSON file of entries as `deltaserve keys new` makes them; read again when it changes.
    #[arg(long, env = "DELTASERVE_API_KEYS", value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
    /// Tokens (JWT): the JWK set of the identity provider, a file that is read again when it changes.
    #[arg(long, env = "DELTASERVE_JWT_JWKS", value_name = "FILE")]
    pub jwt_jwks: Option<String>,
    /// Who must have issued a token (`iss`).
    #[arg(long, env = "DELTASERVE_JWT_ISSUER", value_name = "TEXT")]
    pub jwt_issuer: Option<String>,
    /// For whom a token must be (`aud`).
    #[arg(long, env = "DELTASERVE_JWT_AUDIENCE", value_name = "TEXT")]
    pub jwt_audience: Option<String>,
    /// The claim of a token that names its tenant.
    #[arg(long, env = "DELTASERVE_JWT_TENANT_CLAIM", value_name = "NAME", default_value = "tenant")]
    pub jwt_tenant_claim: String,
    /// The claim of a token that lists its permissions: a list, or words separated by spaces.
    #[arg(long, env = "DELTASERVE_JWT_PERMISSIONS_CLAIM", value_name = "NAME", default_value = "permissions")]
    pub jwt_permissions_claim: String,
    /// Whose client certificates are: a JSON file of {"identity": "cn:NAME", "tenant", "permissions"}, also dns:NAME and uri:NAME;
    /// read again when it changes.
    #[arg(long, env = "DELTASERVE_MTLS_IDENTITIES", value_name = "FILE")]
    pub mtls_identities: Option<PathBuf>,
    /// Serve without credentials also where other machines can reach the address: whoever does may do everything, as any tenant.
    #[arg(long, env = "DELTASERVE_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,
    /// Take keys and tokens without TLS also where other machines can reach the address, e.g. behind a proxy that ends TLS.
    #[arg(long, env = "DELTASERVE_PLAINTEXT", value_parser = BoolishValueParser::new())]
    pub plaintext: bool,
}

/// Whether clients must have a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClientAuth {
    /// They must.
    Require,
    /// They may.
    Optional,
}

/// The checked form, for a server that listens on this address.
pub(super) fn access(args: AccessArgs, listen: SocketAddr, problems: &mut Vec<String>) -> AccessConfig {
    let config = AccessConfig {
        tls: tls(&args, problems),
        tokens: tokens(&args, problems),
        api_keys: args.api_keys,
        certificates: args.mtls_identities,
        ..AccessConfig::default()
    };
    let asks_clients = config.tls.as_ref().is_some_and(|files| files.clients.is_some());
    if config.certificates.is_some() && !asks_clients {
        problems.push("--mtls-identities: needs --tls-client-ca, whose authorities vouch for the names".into());
    }
    let (asks, reachable) = (config.asks_for_credentials(), !is_loopback(listen));
    if args.insecure && asks {
        problems.push("--insecure: credentials are configured; one of the two is accepted".into());
    }
    if args.plaintext && config.tls.is_some() {
        problems.push("--plaintext: the address speaks TLS; one of the two is accepted".into());
    }
    if reachable && !asks && !args.insecure {
        problems.push(format!(
            "--listen: other machines can reach {listen}, and no credentials are configured; accepted are a loopback address, \
             --api-keys, --jwt-jwks or --mtls-identities, or --insecure to let everybody do everything"
        ));
    }
    if reachable && asks && config.tls.is_none() && !args.plaintext {
        problems.push(format!(
            "--listen: other machines can reach {listen}, and keys and tokens would be sent in plaintext; accepted are \
             --tls-cert with --tls-key, or --plaintext behind a proxy that ends TLS"
        ));
    }
    config
}

fn tls(args: &AccessArgs, problems: &mut Vec<String>) -> Option<TlsFiles> {
    if args.tls_client_auth.is_some() && args.tls_client_ca.is_none() {
        problems.push("--tls-client-auth: needs --tls-client-ca".into());
    }
    match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => {
            let must = args.tls_client_auth != Some(ClientAuth::Optional);
            let clients = args.tls_client_ca.clone().map(|path| (path, must));
            return Some(TlsFiles { certificate: certificate.clone(), key: key.clone(), clients });
        }
        (Some(_), None) => problems.push("--tls-key: is needed with --tls-cert".into()),
        (None, Some(_)) => problems.push("--tls-cert: is needed with --tls-key".into()),
        (None, None) if args.tls_client_ca.is_some() => {
            problems.push("--tls-client-ca: needs --tls-cert and --tls-key".into());
        }
        (None, None) => {}
    }
    None
}

fn tokens(args: &AccessArgs, problems: &mut Vec<String>) -> Option<TokenRules> {
    let Some(jwks) = &args.jwt_jwks else {
        for (flag, given) in [("--jwt-issuer", &args.jwt_issuer), ("--jwt-audience", &args.jwt_audience)] {
            if given.is_some() {
                problems.push(format!("{flag}: needs --jwt-jwks"));
            }
        }
        return None;
    };
    if jwks.contains("://") {
        problems.push(
            "--jwt-jwks: is a URL; accepted is a file, which may be fetched and replaced while the server runs".into(),
        );
    }
    let mut needed = |flag: &str, given: &Option<String>| {
        let text = given.clone().unwrap_or_default();
        if text.is_empty() {
            problems.push(format!("{flag}: is needed with --jwt-jwks, or tokens for other services would be taken"));
        }
        text
    };
    let issuer = needed("--jwt-issuer", &args.jwt_issuer);
    let audience = needed("--jwt-audience", &args.jwt_audience);
    let (tenant_claim, permissions_claim) = (args.jwt_tenant_claim.clone(), args.jwt_permissions_claim.clone());
    Some(TokenRules { jwks: jwks.into(), issuer, audience, tenant_claim, permissions_claim })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: AccessArgs,
    }

    fn config(listen: &str, flags: &[&str]) -> Result<AccessConfig, Vec<String>> {
        let args = Line::try_parse_from(["serve"].iter().chain(flags)).expect("flags parse").args;
        let mut problems = Vec::new();
        let config = access(args, listen.parse().expect("an address"), &mut problems);
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    const TLS: [&str; 2] = ["--tls-cert=c", "--tls-key=k"];
    const LOCAL: &str = "127.0.0.1:1";
    const PUBLIC: &str = "0.0.0.0:1";

    #[test]
    fn without_credentials_only_loopback_is_served_unless_that_is_asked_for() {
        assert_eq!(config(LOCAL, &[]), Ok(AccessConfig::default()));
        assert!(config("[::1]:1", &[]).is_ok() && config(LOCAL, &["--insecure"]).is_ok());
        for flags in [&[][..], &TLS[..], &[TLS[0], TLS[1], "--tls-client-ca=a"][..]] {
            let problems = config(PUBLIC, flags).expect_err("it is open to others");
            assert!(problems.len() == 1 && problems[0].contains("--insecure"), "{problems:?}");
        }
        assert!(config(PUBLIC, &["--insecure"]).is_ok_and(|c| !c.asks_for_credentials()));
        assert!(config(PUBLIC, &["--insecure", TLS[0], TLS[1]]).is_ok_and(|c| c.tls.is_some()));
    }

    #[test]
    fn keys_go_over_tls_unless_that_is_asked_for() {
        assert!(config(LOCAL, &["--api-keys=f"]).is_ok());
        assert!(config(PUBLIC, &["--api-keys=f", TLS[0], TLS[1]]).is_ok());
        let problems = config(PUBLIC, &["--api-keys=f"]).expect_err("keys would be read by others");
        assert!(problems.len() == 1 && problems[0].contains("--plaintext"), "{problems:?}");
        assert!(config(PUBLIC, &["--api-keys=f", "--plaintext"]).is_ok());
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        let refused = |flags: &[&str]| config(LOCAL, flags).expect_err("it is refused").join("; ");
        assert!(refused(&["--tls-cert=c"]).starts_with("--tls-key:"));
        assert!(refused(&["--tls-key=k"]).starts_with("--tls-cert:"));
        assert!(refused(&["--tls-client-ca=a"]).starts_with("--tls-client-ca:"));
        assert!(refused(&[TLS[0], TLS[1], "--tls-client-auth=optional"]).starts_with("--tls-client-auth:"));
        assert!(refused(&[TLS[0], TLS[1], "--mtls-identities=f"]).starts_with("--mtls-identities:"));
        assert!(refused(&["--insecure", "--api-keys=f"]).starts_with("--insecure:"));
        assert!(refused(&[TLS[0], TLS[1], "--plaintext"]).starts_with("--plaintext:"));
        assert!(refused(&["--jwt-issuer=i"]).starts_with("--jwt-issuer:"));
        let both = refused(&["--jwt-jwks=f"]);
        assert!(both.contains("--jwt-issuer:") && both.contains("--jwt-audience:"), "{both}");
        let url = refused(&["--jwt-jwks=https://x/jwks", "--jwt-issuer=i", "--jwt-audience=a"]);
        assert!(url.starts_with("--jwt-jwks: is a URL"), "{url}");
    }

    #[test]
    fn clients_must_have_a_certificate_unless_they_may() {
        let clients = |flags: &[&str]| {
            let flags = [&[TLS[0], TLS[1], "--tls-client-ca=a"][..], flags].concat();
            config(LOCAL, &flags).map(|c| c.tls.and_then(|t| t.clients).map(|(_, must)| must))
        };
        assert_eq!(clients(&[]), Ok(Some(true)));
        assert_eq!(clients(&["--tls-client-auth=require"]), Ok(Some(true)));
        assert_eq!(clients(&["--tls-client-auth=optional", "--mtls-identities=f"]), Ok(Some(false)));
    }
}
