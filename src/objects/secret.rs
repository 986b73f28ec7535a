//! Secrets: `<name>-auth` for clients, `<name>-system` for members and the operator. The only objects with secret
//! bytes in them.

use super::{Scene, names};
use crate::api::{Invalid, v1alpha1::SecretKeyRef};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use rand::{Rng, distr::Alphanumeric};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fmt;
use valkeeper_core::{config::PORT, ids::ShardId, spec::Topology};

/// The user of clients.
pub const USER_DEFAULT: &str = "default";
/// The user that the operator logs in as. It can look and nothing else: what changes a server goes through its agent.
pub const USER_OPERATOR: &str = "valkeeper";
/// The user of replication.
pub const USER_REPLICA: &str = "replica";

/// Length of a made password: 62^32 is about 190 bits.
const PASSWORD_LENGTH: usize = 32;
const KEY_OPERATOR: &str = "operator-password";
const KEY_REPLICA: &str = "replica-password";
const KEY_DEFAULT: &str = "default-password";
const OPERATOR_RULES: &str = "+ping +info +role";
/// The same in a Valkey Cluster: nodes, and whether the gate is open.
const OPERATOR_RULES_CLUSTER: &str = "+ping +info +role +cluster|nodes +acl|users";
const REPLICA_RULES: &str = "+ping +psync +replconf +sync";

/// A secret text. It is shown only by `expose`, so that each use can be found.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(String);

impl SecretText {
    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }

    fn random(rng: &mut impl Rng) -> Self {
        SecretText(rng.sample_iter(Alphanumeric).take(PASSWORD_LENGTH).map(char::from).collect())
    }

    /// As in an ACL rule: `#` and SHA-256 in hex.
    fn hashed(&self) -> String {
        let hex: String = Sha256::digest(self.0.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        format!("#{hex}")
    }
}

impl From<&str> for SecretText {
    fn from(text: &str) -> Self {
        SecretText(text.to_owned())
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// The passwords of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Of clients, user `default`.
    pub default: SecretText,
    /// Of the operator's login user.
    pub operator: SecretText,
    /// Of replication.
    pub replica: SecretText,
}

impl Credentials {
    /// Keeps what the Secret `<name>-system` has and makes what it lacks. `default` is the user's own password for
    /// clients, if the spec names one. Only for a Secret that was seen or is proven absent: what cannot be read must
    /// not be made anew.
    pub fn complete(system: Option<&Secret>, default: Option<SecretText>, rng: &mut impl Rng) -> Self {
        let mut kept = |key: &str| {
            system.and_then(|secret| value(secret, key)).unwrap_or_else(|| SecretText::random(rng))
        };
        let (operator, replica) = (kept(KEY_OPERATOR), kept(KEY_REPLICA));
        let default = default.unwrap_or_else(|| kept(KEY_DEFAULT));
        Credentials { default, operator, replica }
    }

    /// The password of clients from the Secret that the spec names. A newline at its end is not part of it.
    ///
    /// # Errors
    /// The Secret does not exist, or has no such key, or it is empty.
    pub fn from_user(reference: &SecretKeyRef, secret: Option<&Secret>) -> Result<SecretText, Invalid> {
        let SecretKeyRef { name, key } = reference;
        let refusal = |allowed: &str| Invalid {
            field: "spec.auth.passwordSecret".to_owned(),
            value: format!("{name}/{key}"),
            allowed: allowed.to_owned(),
        };
        let secret = secret.ok_or_else(|| refusal("there is no Secret of that name"))?;
        value(secret, key).ok_or_else(|| refusal("the Secret has no text under that key"))
    }
}

fn value(secret: &Secret, key: &str) -> Option<SecretText> {
    let ByteString(bytes) = secret.data.as_ref()?.get(key)?;
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches(['\n', '\r']);
    (!text.is_empty()).then(|| SecretText::from(text))
}

pub(super) fn system(scene: &Scene<'_>) -> Value {
    let Credentials { default, operator, replica } = &scene.context.credentials;
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": scene.metadata(&names::system(scene.name()), None),
        "type": "Opaque",
        "data": {
            "users.acl": encoded(&users(&scene.context.credentials, scene.topology())),
            // The included file: a password in valkey.conf would be in a ConfigMap.
            "auth.conf": encoded(&format!("primaryuser {USER_REPLICA}\nprimaryauth {}\n", replica.expose())),
            KEY_DEFAULT: encoded(default.expose()),
            KEY_OPERATOR: encoded(operator.expose()),
            KEY_REPLICA: encoded(replica.expose()),
        },
    })
}

/// users.acl: hashes only. Rules are read from left to right, a user starts with nothing allowed.
pub(super) fn users(credentials: &Credentials, topology: Topology) -> String {
    let Credentials { default, operator, replica } = credentials;
    let operator_rules = match topology {
        Topology::Replication => OPERATOR_RULES,
        Topology::Cluster => OPERATOR_RULES_CLUSTER,
    };
    format!(
        "user {USER_DEFAULT} on {} ~* &* +@all\n\
         user {USER_OPERATOR} on {} resetchannels -@all {operator_rules}\n\
         user {USER_REPLICA} on {} resetchannels -@all {REPLICA_RULES}\n",
        default.hashed(),
        operator.hashed(),
        replica.hashed(),
    )
}

/// Entries as the Service Binding specification names them.
pub(super) fn auth(scene: &Scene<'_>) -> Value {
    let password = &scene.context.credentials.default;
    let service = match scene.topology() {
        Topology::Replication => names::route(scene.name(), ShardId(0)),
        Topology::Cluster => scene.name().to_owned(),
    };
    let host = format!("{service}.{}.svc", scene.namespace());
    // The scheme that every client library knows.
    let uri = format!("redis://{USER_DEFAULT}:{}@{host}:{PORT}/0", percent_encoded(password.expose()));
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": scene.metadata(&names::auth(scene.name()), None),
        "type": "servicebinding.io/valkey",
        "data": {
            "type": encoded("valkey"),
            "provider": encoded("valkeeper"),
            "host": encoded(&host),
            "port": encoded(&PORT.to_string()),
            "username": encoded(USER_DEFAULT),
            "password": encoded(password.expose()),
            "uri": encoded(&uri),
        },
    })
}

/// Base64, as the API has it.
pub(super) fn encoded(text: &str) -> Value {
    serde_json::to_value(ByteString(text.as_bytes().to_vec())).unwrap_or_default()
}

fn percent_encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
