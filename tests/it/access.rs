//! Who may call what: keys, tokens, permissions and tenants, over plaintext on loopback.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use deltaserve::{
    access::{AccessConfig, KeyEntry, Permission, TokenRules, with_entry},
    grpc::{
        policy::{self, Rule},
        proto,
    },
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};
use prost::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Status, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::*;

const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
/// How often servers of tests look at their files.
pub(crate) const SOON: Duration = Duration::from_millis(50);

/// A file of keys in a folder of its own.
pub(crate) struct Keys {
    folder: TempDir,
    entries: Vec<KeyEntry>,
}

impl Keys {
    pub(crate) fn new() -> Self {
        let keys = Self { folder: tempfile::tempdir().expect("a folder"), entries: vec![] };
        keys.write();
        keys
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("keys.json")
    }

    fn write(&self) {
        let text = self.entries.iter().fold("[]".to_owned(), |text, entry| {
            with_entry(text.as_bytes(), entry).expect("an entry that can be used")
        });
        self.replace(&text);
    }

    /// The whole text at once.
    fn replace(&self, text: &str) {
        let new = self.folder.path().join("new");
        fs::write(&new, text).expect("a file");
        fs::rename(new, self.file()).expect("it takes the place of the old one");
    }

    pub(crate) fn add(&mut self, id: &str, tenant: &str, permissions: &[&str]) -> String {
        let permissions: Vec<String> = permissions.iter().map(|&p| p.to_owned()).collect();
        let (key, entry) = KeyEntry::generate(id, tenant, &permissions, None).expect("a key");
        self.entries.push(entry);
        self.write();
        key
    }

    fn remove(&mut self, id: &str) {
        self.entries.retain(|entry| entry.id != id);
        self.write();
    }

    pub(crate) fn config(&self) -> AccessConfig {
        AccessConfig { api_keys: Some(self.file()), reload_every: SOON, ..AccessConfig::default() }
    }
}

/// A key that no server knows.
fn unknown_key() -> String {
    KeyEntry::generate("x", "acme", &["admin".to_owned()], None).expect("a key").0
}

/// Paths of all RPCs that the protocol describes.
fn rpcs() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).expect("descriptors");
    let mut paths = Vec::new();
    for file in &set.file {
        for service in &file.service {
            let path = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            paths.extend(service.method.iter().map(|method| path(method.name())));
        }
    }
    paths
}

/// One empty message to an RPC of any kind, and the first message that comes back.
async fn call(client: &Client, path: &str) -> Result<(), Status> {
    let mut grpc: Grpc<Channel> = Grpc::new(client.channel.clone());
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let request = client.request(futures::stream::iter([()]));
    let path: PathAndQuery = path.parse().expect("a path");
    let answer = async {
        let mut replies = grpc.streaming(request, path, ProstCodec::<(), ()>::default()).await?.into_inner();
        replies.message().await.map(drop)
    };
    timely("an empty call is answered", answer).await
}

async fn code(client: &Client, path: &str) -> Code {
    call(client, path).await.map_or_else(|status| status.code(), |()| Code::Ok)
}

/// Services that the server itself lists.
async fn listed(client: &Client) -> BTreeSet<String> {
    let message = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(message) };
    let request = client.request(futures::stream::iter([request]));
    let mut reflection = ServerReflectionClient::new(client.channel.clone());
    let mut replies = reflection.server_reflection_info(request).await.expect("a reply").into_inner();
    let reply = replies.message().await.expect("a message").and_then(|m| m.message_response);
    let Some(MessageResponse::ListServicesResponse(list)) = reply else { panic!("{reply:?}") };
    list.service.into_iter().map(|service| service.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_has_a_rule_and_answers_nobody_without_credentials() {
    let (mut world, mut keys) = (World::new(), Keys::new());
    let all = keys.add("all", "acme", &Permission::ALL.map(Permission::name));
    world.config.access = keys.config();
    let running = world.start().await;
    let nobody = Client { tenant: String::new(), ..running.client.clone() };
    let somebody = nobody.with_key(&all);

    let paths = rpcs();
    assert!(paths.len() >= 30, "{paths:?}");
    let service = |path: &String| path.trim_start_matches('/').split('/').next().unwrap_or_default().to_owned();
    let described: BTreeSet<String> = paths.iter().map(service).collect();
    let of_others = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"];
    let serves: BTreeSet<String> =
        listed(&somebody).await.into_iter().filter(|name| !of_others.contains(&name.as_str())).collect();
    assert_eq!(serves, described, "what the server has is what is looked at here");

    let strangers =
        [None, Some(unknown_key()), Some("dsk_".into()), Some("eyJhbGciOiJub25lIn0.e30.".into()), Some("x".into())];
    let mut texts = BTreeSet::new();
    for path in paths.iter().map(String::as_str).chain([REFLECTION]) {
        let rule = policy::rule(path);
        assert!(rule.is_some_and(|rule| rule != Rule::Open), "{path} has the rule {rule:?} in src/grpc/policy.rs");
        for key in &strangers {
            let stranger = Client { key: key.clone(), ..nobody.clone() };
            let status = call(&stranger, path).await.expect_err(path);
            assert_eq!(kind(&status), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()), "{path} {key:?}");
            texts.insert(status.message().to_owned());
        }
        let known = code(&somebody, path).await;
        let refused = [Code::Unauthenticated, Code::PermissionDenied, Code::Unimplemented].contains(&known);
        assert!(!refused, "{path} says {known:?} to one who may do everything");
    }
    assert_eq!(texts.len(), 1, "a text tells which keys there are: {texts:?}");

    // open to probes; and what there is not, is told to those who are known only
    assert_eq!(code(&nobody, HEALTH).await, Code::Ok);
    let nothing = "/deltaserve.v1.ServerService/Nothing";
    assert_eq!(
        (code(&nobody, nothing).await, code(&somebody, nothing).await),
        (Code::Unauthenticated, Code::Unimplemented)
    );
    drop((nobody, somebody));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_may_what_its_permissions_say_and_nothing_else() {
    let (mut world, mut keys) = (World::new(), Keys::new());
    let of = Permission::ALL.map(|permission| (permission, keys.add(permission.name(), "acme", &[permission.name()])));
    world.config.access = keys.config();
    let running = world.start().await;
    let mut may: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for path in rpcs() {
        for (permission, key) in &of {
            let allowed = match policy::rule(&path) {
                Some(Rule::Any(permissions)) => permissions.contains(permission),
                rule => rule.is_some(),
            };
            let status = call(&running.client.with_key(key), &path).await;
            let denied = status.as_ref().is_err_and(|s| s.code() == Code::PermissionDenied);
            assert_eq!(denied, !allowed, "{path} with {permission:?}: {status:?}");
            if denied {
                assert_eq!(kind(&status.expect_err("denied")).1, "PERMISSION_DENIED");
            } else {
                may.entry(permission.name()).or_default().push(path.rsplit('/').next().unwrap_or_default().to_owned());
            }
        }
    }
    let has = |permission: &str, method: &str| may.get(permission).is_some_and(|all| all.iter().any(|m| m == method));
    for (method, permission) in [
        ("Generate", "infer"),
        ("Tokenize", "infer"),
        ("Upload", "manage"),
        ("DeleteDelta", "manage"),
        ("CreateJob", "train"),
    ] {
        for other in Permission::ALL.map(Permission::name) {
            assert_eq!(has(other, method), other == permission, "{method} with {other}");
        }
    }
    assert!(has("infer", "GetDelta") && has("manage", "GetDelta") && !has("admin", "GetDelta"));
    assert!(has("admin", "GetServerInfo"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_is_held_to_its_tenant_whatever_a_call_names() {
    let (mut world, mut keys) = (World::new(), Keys::new());
    let rights = ["infer", "manage"];
    let (acme, other) = (keys.add("acme", "acme", &rights), keys.add("other", "other", &rights));
    let every = keys.add("every", "*", &["admin", "infer"]);
    world.config.access = keys.config();
    let running = world.start().await;
    let [acme, other, every] = [&acme, &other, &every].map(|key| running.client.with_key(key));

    acme.upload("style", &world.delta(1)).await.expect("an upload");
    // the name is the identity's own; naming it again changes nothing
    assert_eq!(acme.list().await.len(), 1);
    assert_eq!(acme.tenant("acme").delta("style").await.expect("it is there").delta.expect("a delta").name, "style");
    for name in ["other", "default"] {
        let status = acme.tenant(name).delta("style").await.expect_err("another's");
        assert_eq!(kind(&status), (Code::PermissionDenied, "TENANT_DENIED".to_owned()), "{name}");
        assert!(!status.message().contains("acme"), "{}", status.message());
    }
    let status = acme.tenant("../x").info().await.expect_err("no name");
    assert_eq!(status.code(), Code::InvalidArgument);
    // another tenant's key reaches it neither by its own name nor by the owner's
    assert_eq!(kind(&other.delta("style").await.expect_err("unknown")).1, "DELTA_NOT_FOUND");
    assert_eq!(kind(&other.tenant("acme").delta("style").await.expect_err("denied")).1, "TENANT_DENIED");
    assert!(other.list().await.is_empty());
    // a key for all tenants is the one that a call names
    assert_eq!(every.tenant("acme").list().await.len(), 1);
    assert!(every.list().await.is_empty() && every.tenant("other").list().await.is_empty());
    drop((acme, other, every));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_and_go_without_a_restart_and_a_bad_file_changes_nothing() {
    let (mut world, mut keys) = (World::new(), Keys::new());
    let first = keys.add("first", "acme", &["infer"]);
    world.config.access = keys.config();
    let running = world.start().await;
    let with = |key: &str| running.client.with_key(key);
    assert!(with(&first).info().await.is_ok());

    let second = keys.add("second", "acme", &["infer"]);
    eventually("a new key is known", async || with(&second).info().await.is_ok()).await;
    assert!(with(&first).info().await.is_ok());
    keys.remove("first");
    eventually("a removed key is refused", async || {
        with(&first).info().await.is_err_and(|status| status.code() == Code::Unauthenticated)
    })
    .await;

    keys.replace("[{\"id\": 1}]");
    tokio::time::sleep(10 * SOON).await;
    assert!(with(&second).info().await.is_ok() && with(&first).info().await.is_err());
    let third = keys.add("third", "acme", &["infer"]);
    eventually("a good file is taken again", async || with(&third).info().await.is_ok()).await;
    running.stop().await;
}

/// An identity provider: its signing key, and the file of its public one.
struct Provider {
    folder: TempDir,
    key: EncodingKey,
}

impl Provider {
    fn new() -> Self {
        let provider = Self { folder: tempfile::tempdir().expect("a folder"), key: Self::any_key() };
        provider.publish(&provider.key);
        provider
    }

    fn any_key() -> EncodingKey {
        let pair = rcgen::KeyPair::generate().expect("a key");
        EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).expect("PKCS 8")
    }

    fn publish(&self, key: &EncodingKey) {
        let mut jwk =
            serde_json::to_value(Jwk::from_encoding_key(key, Algorithm::ES256).expect("a JWK")).expect("JSON");
        jwk["kid"] = "one".into();
        let new = self.folder.path().join("new");
        fs::write(&new, json!({"keys": [jwk]}).to_string()).expect("a file");
        fs::rename(new, self.folder.path().join("jwks.json")).expect("it takes the place of the old one");
    }

    fn config(&self) -> AccessConfig {
        let tokens = TokenRules {
            jwks: self.folder.path().join("jwks.json"),
            issuer: "https://issuer.example".into(),
            audience: "deltaserve".into(),
            tenant_claim: "org".into(),
            permissions_claim: "scope".into(),
        };
        AccessConfig { tokens: Some(tokens), reload_every: SOON, ..AccessConfig::default() }
    }

    fn claims() -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        json!({"iss": "https://issuer.example", "aud": "deltaserve", "exp": now + 600, "sub": "ci", "org": "acme",
            "scope": "openid infer"})
    }

    fn token(&self, changed: &[(&str, Value)]) -> String {
        let mut claims = Self::claims();
        for (name, value) in changed {
            claims[*name] = value.clone();
        }
        sign(Algorithm::ES256, &claims, &self.key)
    }
}

fn sign(algorithm: Algorithm, claims: &Value, key: &EncodingKey) -> String {
    let header = Header { kid: Some("one".into()), ..Header::new(algorithm) };
    encode(&header, claims, key).expect("a token")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_provider_is_taken_and_no_other() {
    let (mut world, provider) = (World::new(), Provider::new());
    world.config.access = provider.config();
    let running = world.start().await;
    let with = |token: &str| running.client.with_key(token);
    let good = provider.token(&[]);
    assert!(with(&good).info().await.is_ok() && with(&good).tenant("acme").info().await.is_ok());
    assert_eq!(
        code(&with(&good).tenant("other"), "/deltaserve.v1.ServerService/GetServerInfo").await,
        Code::PermissionDenied
    );
    assert_eq!(with(&good).generate(ask("", "ab", 2)).await.expect("it generates").ids.len(), 2);
    assert_eq!(code(&with(&good), "/deltaserve.v1.TrainingService/ListJobs").await, Code::PermissionDenied);

    let claims = Provider::claims();
    let payload = good.split('.').nth(1).expect("three parts");
    let refused = [
        ("expired", provider.token(&[("exp", json!(1_700_000_000))])),
        ("without an end", provider.token(&[("exp", Value::Null)])),
        ("another issuer", provider.token(&[("iss", json!("https://other.example"))])),
        ("another audience", provider.token(&[("aud", json!("other"))])),
        ("no audience", provider.token(&[("aud", Value::Null)])),
        ("no tenant", provider.token(&[("org", Value::Null)])),
        ("all tenants", provider.token(&[("org", json!("*"))])),
        ("another's key", sign(Algorithm::ES256, &claims, &Provider::any_key())),
        // {"alg":"none","typ":"JWT"}
        ("unsigned", format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.")),
        ("a shared secret", sign(Algorithm::HS256, &claims, &EncodingKey::from_secret(b"deltaserve"))),
        ("no signature", good.rsplit_once('.').map(|(signed, _)| format!("{signed}.")).expect("three parts")),
        ("an API key", unknown_key()),
    ];
    for (what, token) in refused {
        let status = with(&token).info().await.expect_err(what);
        assert_eq!(kind(&status), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()), "{what}");
    }

    // the provider's key is replaced
    let next = Provider { key: Provider::any_key(), ..provider };
    next.publish(&next.key);
    let newer = next.token(&[]);
    eventually("the new key is known", async || with(&newer).info().await.is_ok()).await;
    assert_eq!(code(&with(&good), REFLECTION).await, Code::Unauthenticated);
    running.stop().await;
}
