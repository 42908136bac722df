//! TLS: certificates of both sides, their replacement, clients that never finish a handshake, and the command line.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use deltaserve::access::{AccessConfig, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

use crate::{
    access::{Keys, SOON},
    support::*,
};

/// An authority that signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "tests");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate"))
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// Certificate and key.
    fn sign(&self, common: &str, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, common);
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &self.0).expect("a certificate").pem(), key.serialize_pem())
    }

    fn server(&self) -> (String, String) {
        self.sign("server", &["127.0.0.1", "localhost"])
    }
}

/// The files of a server's certificate.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new((certificate, key): &(String, String)) -> Self {
        let files = Self { folder: tempfile::tempdir().expect("a folder") };
        files.put("cert.pem", certificate);
        files.put("key.pem", key);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file");
    }

    fn tls(&self, clients: Option<bool>) -> Option<TlsFiles> {
        let clients = clients.map(|must| (self.path("clients.pem"), must));
        Some(TlsFiles { certificate: self.path("cert.pem"), key: self.path("key.pem"), clients })
    }
}

/// A connection of its own to the server, or why there is none.
async fn connect(
    running: &Running,
    trusted: &str,
    own: Option<&(String, String)>,
) -> Result<Client, tonic::transport::Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(trusted));
    if let Some((certificate, key)) = own {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    let endpoint = Channel::from_shared(format!("https://{}", running.server.grpc)).expect("an address");
    let channel = timely("a connection", endpoint.tls_config(tls)?.connect()).await?;
    Ok(Client { channel, tenant: String::new(), key: None })
}

/// What a first call over a connection of its own says; the code is Unavailable where there is no connection.
async fn first_call(running: &Running, trusted: &str, own: Option<&(String, String)>, key: Option<&str>) -> Code {
    let said: Result<(), Status> = async {
        let client = connect(running, trusted, own).await.map_err(|e| Status::unavailable(e.to_string()))?;
        let client = Client { key: key.map(str::to_owned), ..client };
        timely("an answer", client.info()).await.map(drop)
    }
    .await;
    said.map_or_else(|status| status.code(), |()| Code::Ok)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_certificate_speaks_tls_and_nothing_else() {
    let (mut world, authority, mut keys) = (World::new(), Authority::new(), Keys::new());
    let key = keys.add("ci", "acme", &["infer"]);
    let files = Files::new(&authority.server());
    world.config.access = AccessConfig { tls: files.tls(None), ..keys.config() };
    let running = world.start().await;
    let trusted = authority.pem();
    assert_eq!(first_call(&running, &trusted, None, Some(&key)).await, Code::Ok);
    assert_eq!(first_call(&running, &trusted, None, None).await, Code::Unauthenticated);
    let client = connect(&running, &trusted, None).await.expect("a connection").with_key(&key);
    assert_eq!(client.generate(ask("", "ab", 3)).await.expect("it generates").ids.len(), 3);
    // the client does not trust the server, and the server takes no plaintext
    assert_ne!(first_call(&running, &Authority::new().pem(), None, Some(&key)).await, Code::Ok);
    assert!(running.client.with_key(&key).info().await.is_err(), "plaintext");
    drop(client);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_stands_for_the_identity_that_its_name_has() {
    let (mut world, authority, clients, mut keys) = (World::new(), Authority::new(), Authority::new(), Keys::new());
    let key = keys.add("ci", "acme", &["infer"]);
    let files = Files::new(&authority.server());
    files.put("clients.pem", &clients.pem());
    let rules = json!([
        {"identity": "cn:agent", "tenant": "acme", "permissions": ["infer"]},
        {"identity": "dns:ops.example", "tenant": "*", "permissions": ["admin", "manage"]},
    ]);
    files.put("identities.json", &rules.to_string());
    let trusted = authority.pem();
    let agent = clients.sign("agent", &["agent.example"]);
    let ops = clients.sign("whoever", &["ops.example"]);
    let unmapped = clients.sign("ops.example", &["agent"]);
    let foreign = Authority::new().sign("agent", &["agent.example"]);
    for must in [true, false] {
        world.config.access = AccessConfig {
            tls: files.tls(Some(must)),
            certificates: Some(files.path("identities.json")),
            ..keys.config()
        };
        let running = world.start().await;
        let call = |own, key| first_call(&running, &trusted, own, key);
        assert_eq!(call(Some(&agent), None).await, Code::Ok);
        assert_eq!(call(Some(&unmapped), None).await, Code::Unauthenticated, "no name of one kind passes for another");
        assert_ne!(call(Some(&foreign), None).await, Code::Ok, "another authority's");
        assert_ne!(call(Some(&foreign), Some(&key)).await, Code::Ok, "another authority's, with a good key");
        assert_eq!(call(Some(&unmapped), Some(&key)).await, Code::Ok, "the key says who it is");
        assert_eq!(call(Some(&agent), Some("dsk_0")).await, Code::Unauthenticated, "a bad key is not made good");
        let without = call(None, Some(&key)).await;
        assert_eq!(without == Code::Ok, !must, "without a certificate: {without:?}");
        if !must {
            assert_eq!(call(None, None).await, Code::Unauthenticated);
        }

        let agent = connect(&running, &trusted, Some(&agent)).await.expect("a connection");
        assert_eq!(agent.generate(ask("", "ab", 2)).await.expect("it generates").ids.len(), 2);
        let denied = agent.upload("style", &world.delta(1)).await.expect_err("it may not");
        assert_eq!(kind(&denied), (Code::PermissionDenied, "PERMISSION_DENIED".to_owned()));
        let denied = agent.tenant("other").info().await.expect_err("another tenant");
        assert_eq!(kind(&denied).1, "TENANT_DENIED");
        let ops = connect(&running, &trusted, Some(&ops)).await.expect("a connection");
        assert!(ops.tenant("other").list().await.is_empty());
        drop((agent, ops));
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_replaced_without_a_restart_and_a_bad_one_is_not_taken() {
    let (mut world, old, new) = (World::new(), Authority::new(), Authority::new());
    let files = Files::new(&old.server());
    world.config.access = AccessConfig { tls: files.tls(None), reload_every: SOON, ..AccessConfig::default() };
    let running = world.start().await;
    let trusts = async |authority: &Authority| first_call(&running, &authority.pem(), None, None).await == Code::Ok;
    let before = connect(&running, &old.pem(), None).await.expect("a connection");
    assert!(trusts(&old).await && !trusts(&new).await);

    // between the two files they do not go together
    let (certificate, key) = new.server();
    files.put("cert.pem", &certificate);
    tokio::time::sleep(5 * SOON).await;
    assert!(trusts(&old).await, "half of a pair is not taken");
    files.put("key.pem", &key);
    eventually("new connections see the new certificate", async || trusts(&new).await).await;
    assert!(!trusts(&old).await);
    assert!(before.info().await.is_ok(), "connections that there were stay");

    files.put("cert.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    tokio::time::sleep(5 * SOON).await;
    assert!(trusts(&new).await);
    fs::remove_file(files.path("cert.pem")).expect("it can be removed");
    tokio::time::sleep(5 * SOON).await;
    assert!(trusts(&new).await);
    drop(before);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_never_end_keep_nobody_out() {
    let (mut world, authority) = (World::new(), Authority::new());
    let files = Files::new(&authority.server());
    world.config.access = AccessConfig { tls: files.tls(None), ..AccessConfig::default() };
    let running = world.start().await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(running.server.grpc).await.expect("a connection"));
    }
    let trusted = authority.pem();
    // well below the time that a handshake may take
    let answer = tokio::time::timeout(Duration::from_secs(8), first_call(&running, &trusted, None, None)).await;
    assert_eq!(answer, Ok(Code::Ok));
    drop(silent);
    running.stop().await;
}

async fn run(address: &str, files: &Files, key: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltaserve"));
    command.args(args).arg("--tls-ca").arg(files.path("ca.pem"));
    command.env("DELTASERVE_SERVER", address).env("DELTASERVE_API_KEY", key);
    let done = tokio::task::spawn_blocking(move || command.output());
    timely("the command ends", done).await.expect("it is waited for").expect("it runs")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_calls_such_a_server() {
    let (mut world, authority) = (World::new(), Authority::new());
    let files = Files::new(&authority.server());
    files.put("ca.pem", &authority.pem());
    // the key is made by the command, too
    let path = files.path("keys.json");
    let made = Command::new(env!("CARGO_BIN_EXE_deltaserve"))
        .args(["keys", "new", "--tenant", "acme", "--permission", "infer,manage", "--file"])
        .arg(&path)
        .output()
        .expect("it runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let key = String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned();
    assert!(key.starts_with("dsk_") && !fs::read_to_string(&path).expect("a file").contains(&key));
    world.config.access =
        AccessConfig { tls: files.tls(None), api_keys: Some(path), reload_every: SOON, ..AccessConfig::default() };
    let running = world.start().await;
    let address = running.server.grpc.to_string();

    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let folder = files.path("style");
    write_delta(&folder, &world);
    let folder = folder.to_str().expect("UTF-8");
    let bench = ["bench", "--requests", "4", "-c", "2", "-m", "2", "--prompt-tokens", "4", "--max-error-rate", "0"];
    let commands: [&[&str]; 6] = [
        &["info"],
        &["deltas", "upload", "style", folder],
        &["deltas", "list"],
        &["generate", "ab", "--delta", "style", "--max-new-tokens", "2"],
        &["score", "--prompt", "a", "b", "--tenant", "acme"],
        &bench,
    ];
    for args in commands {
        let done = run(&address, &files, &key, args).await;
        assert!(done.status.success(), "{args:?}: {}", said(&done));
    }
    let wrong = run(&address, &files, "dsk_0", &["info"]).await;
    assert!(!wrong.status.success() && said(&wrong).contains("UNAUTHENTICATED"), "{}", said(&wrong));
    let other = run(&address, &files, &key, &["deltas", "list", "--tenant", "other"]).await;
    assert!(!other.status.success() && said(&other).contains("TENANT_DENIED"), "{}", said(&other));
    let train = run(&address, &files, &key, &["jobs", "list"]).await;
    assert!(!train.status.success() && said(&train).contains("PERMISSION_DENIED"), "{}", said(&train));
    running.stop().await;
}

fn write_delta(folder: &Path, world: &World) {
    fs::create_dir(folder).expect("a folder");
    for (name, data) in &world.delta(1).files {
        fs::write(folder.join(name), data).expect("a file");
    }
}
