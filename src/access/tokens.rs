//! Tokens: JSON Web Tokens that an identity provider signed, checked against its published keys (a JWK set).
//!
//! What a token is verified with is decided by the key set alone: a key has one algorithm, an asymmetric one, and a token that
//! says another is refused. Nothing that a token names (`jku`, `x5u`, `jwk`) is looked at.

use std::{path::PathBuf, sync::Arc};

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use serde_json::{Map, Value};

use super::{Identity, Permission, Permissions, rights};

/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 60;
/// Most of a subject that is kept for logs, in characters.
const MAX_SUBJECT: usize = 128;

/// Which tokens are taken, and what they say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRules {
    /// File of the provider's JWK set.
    pub jwks: PathBuf,
    /// Who must have issued a token (`iss`).
    pub issuer: String,
    /// For whom a token must be (`aud`).
    pub audience: String,
    /// The claim that names the tenant.
    pub tenant_claim: String,
    /// The claim that lists permissions: a list, or words separated by spaces.
    pub permissions_claim: String,
}

/// One key of the provider.
struct Key {
    id: Option<String>,
    key: DecodingKey,
    validation: Validation,
}

/// The keys of a provider, and what is asked of its tokens.
pub(super) struct Tokens {
    rules: TokenRules,
    keys: Vec<Key>,
}

impl Tokens {
    /// Reads a JWK set. Keys of kinds that sign no tokens are passed over.
    ///
    /// # Errors
    /// A file that is no set; a secret in it; no key that can be used.
    pub(super) fn parse(json: &[u8], rules: &TokenRules) -> Result<Self, String> {
        let set: Value = serde_json::from_slice(json).map_err(|e| format!("is no JWK set: {e}"))?;
        let all = set.get("keys").and_then(Value::as_array).ok_or("is no JWK set: `keys` is not a list")?;
        let mut keys = Vec::new();
        for (i, value) in all.iter().enumerate() {
            let jwk = match serde_json::from_value::<Jwk>(value.clone()) {
                Ok(jwk) => jwk,
                Err(error) => {
                    tracing::warn!(key = i, %error, "a key of the JWK set is of a kind that is not supported");
                    continue;
                }
            };
            if let AlgorithmParameters::OctetKey(_) = jwk.algorithm {
                return Err(format!("keys[{i}]: is a shared secret (oct); accepted are public keys (RSA, EC, OKP)"));
            }
            if jwk.common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature) {
                continue;
            }
            let algorithm = algorithm(&jwk).ok_or_else(|| format!("keys[{i}]: its alg does not go with its kind"))?;
            let key = DecodingKey::from_jwk(&jwk).map_err(|e| format!("keys[{i}]: {e}"))?;
            keys.push(Key { id: jwk.common.key_id.clone(), key, validation: validation(algorithm, rules) });
        }
        if keys.is_empty() {
            return Err("has no key that signs tokens".into());
        }
        Ok(Self { rules: rules.clone(), keys })
    }

    /// Whose token this is.
    ///
    /// # Errors
    /// Why it is refused, for the log.
    pub(super) fn verify(&self, token: &str) -> Result<Arc<Identity>, String> {
        let header = decode_header(token).map_err(|e| e.to_string())?;
        if header.crit.is_some() {
            return Err("its header asks for extensions (crit)".into());
        }
        let key = match (&header.kid, self.keys.as_slice()) {
            (Some(id), keys) => keys.iter().find(|key| key.id.as_ref() == Some(id)),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let key = key.ok_or("it names no key of the set")?;
        let claims = decode::<Map<String, Value>>(token, &key.key, &key.validation).map_err(|e| e.to_string())?.claims;
        self.identity(&claims)
    }

    fn identity(&self, claims: &Map<String, Value>) -> Result<Arc<Identity>, String> {
        let TokenRules { tenant_claim, permissions_claim, .. } = &self.rules;
        let words: Vec<&str> = match claims.get(permissions_claim) {
            Some(Value::String(words)) => words.split_ascii_whitespace().collect(),
            Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).collect(),
            _ => return Err(format!("its claim {permissions_claim:?} is no list of permissions")),
        };
        // a provider's tokens may have scopes of other services beside ours
        let permissions = words.into_iter().filter_map(Permission::of).fold(Permissions::default(), Permissions::with);
        let tenant = claims.get(tenant_claim).and_then(Value::as_str);
        let tenant = tenant.ok_or_else(|| format!("its claim {tenant_claim:?} is no text"))?;
        let tenancy = rights::tenancy(tenant, permissions)?;
        let subject = claims.get("sub").and_then(Value::as_str).unwrap_or_default();
        let subject: String = subject.chars().filter(|c| !c.is_control()).take(MAX_SUBJECT).collect();
        Ok(Arc::new(Identity { name: format!("token:{subject}"), tenancy, permissions }))
    }
}

/// The one algorithm of a key: what its `alg` says if that goes with its kind, else that of its kind.
fn algorithm(jwk: &Jwk) -> Option<Algorithm> {
    use KeyAlgorithm as Said;
    match (&jwk.algorithm, jwk.common.key_algorithm) {
        (AlgorithmParameters::RSA(_), None | Some(Said::RS256)) => Some(Algorithm::RS256),
        (AlgorithmParameters::RSA(_), Some(Said::RS384)) => Some(Algorithm::RS384),
        (AlgorithmParameters::RSA(_), Some(Said::RS512)) => Some(Algorithm::RS512),
        (AlgorithmParameters::RSA(_), Some(Said::PS256)) => Some(Algorithm::PS256),
        (AlgorithmParameters::RSA(_), Some(Said::PS384)) => Some(Algorithm::PS384),
        (AlgorithmParameters::RSA(_), Some(Said::PS512)) => Some(Algorithm::PS512),
        (AlgorithmParameters::EllipticCurve(key), said) => match (&key.curve, said) {
            (EllipticCurve::P256, None | Some(Said::ES256)) => Some(Algorithm::ES256),
            (EllipticCurve::P384, None | Some(Said::ES384)) => Some(Algorithm::ES384),
            _ => None,
        },
        (AlgorithmParameters::OctetKeyPair(key), None | Some(Said::EdDSA)) if key.curve == EllipticCurve::Ed25519 => {
            Some(Algorithm::EdDSA)
        }
        _ => None,
    }
}

fn validation(algorithm: Algorithm, rules: &TokenRules) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.leeway = LEEWAY;
    validation.validate_nbf = true;
    validation.set_required_spec_claims(&["exp", "iss", "aud"]);
    validation.set_issuer(&[&rules.issuer]);
    validation.set_audience(&[&rules.audience]);
    validation
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;
    use crate::access::{Tenancy, dates::now};

    fn rules() -> TokenRules {
        TokenRules {
            jwks: PathBuf::new(),
            issuer: "https://issuer".into(),
            audience: "deltaserve".into(),
            tenant_claim: "tenant".into(),
            permissions_claim: "permissions".into(),
        }
    }

    /// A signing key, and its public part as a set has it.
    fn pair(id: &str) -> (EncodingKey, Value) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).expect("PKCS 8");
        let jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).expect("its public part");
        let mut jwk = serde_json::to_value(jwk).expect("JSON");
        jwk["kid"] = id.into();
        (key, jwk)
    }

    fn set(keys: &[&Value]) -> Result<Tokens, String> {
        Tokens::parse(json!({"keys": keys}).to_string().as_bytes(), &rules())
    }

    fn claims() -> Value {
        json!({"iss": "https://issuer", "aud": ["other", "deltaserve"], "exp": now() + 600, "sub": "me\n",
            "tenant": "acme", "permissions": "openid infer train"})
    }

    fn signed(key: &EncodingKey, id: Option<&str>, claims: &Value) -> String {
        let header = Header { kid: id.map(str::to_owned), ..Header::new(Algorithm::ES256) };
        encode(&header, claims, key).expect("a token")
    }

    #[test]
    fn a_token_says_who_may_do_what() -> Result<(), String> {
        let (key, jwk) = pair("one");
        let tokens = set(&[&jwk])?;
        for id in [Some("one"), None] {
            let identity = tokens.verify(&signed(&key, id, &claims()))?;
            assert_eq!(identity.name, "token:me");
            assert!(matches!(&identity.tenancy, Tenancy::One(t) if t.as_str() == "acme"));
            assert!(identity.permissions.has(Permission::Infer) && identity.permissions.has(Permission::Train));
            assert!(!identity.permissions.has(Permission::Manage) && !identity.permissions.has(Permission::Admin));
        }
        let mut listed = claims();
        listed["permissions"] = json!(["admin", 3]);
        listed["tenant"] = "*".into();
        assert_eq!(tokens.verify(&signed(&key, None, &listed))?.tenancy, Tenancy::Any);
        Ok(())
    }

    #[test]
    fn a_token_with_a_wrong_or_missing_claim_is_refused() -> Result<(), String> {
        let (key, jwk) = pair("one");
        let tokens = set(&[&jwk])?;
        let wrong = [
            ("iss", json!("https://other")),
            ("iss", Value::Null),
            ("aud", json!("other")),
            ("aud", Value::Null),
            ("exp", json!(now() - 120)),
            ("exp", Value::Null),
            ("exp", json!("never")),
            ("nbf", json!(now() + 120)),
            ("tenant", json!("*")),
            ("tenant", json!("../x")),
            ("tenant", json!(["acme"])),
            ("tenant", Value::Null),
            ("permissions", Value::Null),
            ("permissions", json!(7)),
        ];
        for (claim, value) in wrong {
            let mut claims = claims();
            claims[claim] = value;
            let refused = tokens.verify(&signed(&key, Some("one"), &claims));
            assert!(refused.is_err(), "{claims}");
        }
        // within the leeway
        let mut late = claims();
        late["exp"] = json!(now() - 10);
        assert!(tokens.verify(&signed(&key, Some("one"), &late)).is_ok());
        Ok(())
    }

    #[test]
    fn a_token_is_verified_with_the_key_it_names_and_that_keys_algorithm() -> Result<(), String> {
        let ((one, first), (two, second)) = (pair("one"), pair("two"));
        let tokens = set(&[&first, &second])?;
        assert!(tokens.verify(&signed(&two, Some("two"), &claims())).is_ok());
        for (key, id) in [(&one, Some("two")), (&two, Some("three")), (&two, None)] {
            assert!(tokens.verify(&signed(key, id, &claims())).is_err(), "{id:?}");
        }
        // the public key as a shared secret
        let secret = EncodingKey::from_secret(first["x"].as_str().unwrap_or_default().as_bytes());
        let header = Header { kid: Some("one".into()), ..Header::new(Algorithm::HS256) };
        assert!(tokens.verify(&encode(&header, &claims(), &secret).expect("a token")).is_err());
        let token = signed(&one, Some("one"), &claims());
        let (signed_part, _) = token.rsplit_once('.').expect("three parts");
        for bad in [&token[..token.len() - 4], &format!("{signed_part}."), signed_part, "a.b.c", "", ".."] {
            assert!(tokens.verify(bad).is_err(), "{bad:?}");
        }
        let header =
            Header { crit: Some(vec!["exp".into()]), kid: Some("one".into()), ..Header::new(Algorithm::ES256) };
        assert!(tokens.verify(&encode(&header, &claims(), &one).expect("a token")).is_err());
        Ok(())
    }

    #[test]
    fn secrets_and_sets_without_a_key_are_refused() {
        let (_, good) = pair("one");
        let secret = json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"});
        assert!(set(&[&good, &secret]).err().is_some_and(|why| why.contains("keys[1]")));
        let mut other = good.clone();
        other["alg"] = "RS256".into();
        assert!(set(&[&other]).err().is_some_and(|why| why.contains("alg")));
        let mut encrypts = good.clone();
        encrypts["use"] = "enc".into();
        assert!(set(&[&encrypts]).is_err() && set(&[]).is_err());
        // a kind that is not known does not spoil the others
        assert!(set(&[&json!({"kty": "XYZ"}), &good]).is_ok());
        assert!(Tokens::parse(b"[]", &rules()).is_err() && Tokens::parse(b"{", &rules()).is_err());
    }
}
