//! Secrets: `<name>-auth` for clients, `<name>-system` for members and the operator. The only objects with secret
//! bytes in them.

use super::{Scene, names};
use crate::api::{Invalid, v1alpha1::SecretKeyRef};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use rand::{Rng, distr::Alphanumeric};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fmt;
use valkeeper_core::{
    config::{ATOMIC_SLOTS_SINCE, PORT},
    ids::ShardId,
    spec::Topology,
};

/// The user of clients.
pub const USER_DEFAULT: &str = "default";
/// The user that the operator logs in as. It can look and nothing else: what changes a server goes through its agent.
pub const USER_OPERATOR: &str = "valkeeper";
/// The user of replication.
pub const USER_REPLICA: &str = "replica";

/// Length of a made password: 62^32 is about 190 bits.
const PASSWORD_LENGTH: usize = 32;
/// Longest password of replication that is kept: Valkey's own limit of `primaryauth` is far above it.
const PASSWORD_CHARS_MAX: usize = 512;
const KEY_OPERATOR: &str = "operator-password";
const KEY_REPLICA: &str = "replica-password";
const KEY_DEFAULT: &str = "default-password";
/// Who may do what.
struct Rules {
    operator: &'static str,
    replica: &'static str,
}

const RULES: Rules = Rules { operator: "+ping +info +role", replica: "+ping +psync +replconf +sync" };
/// In a Valkey Cluster the operator looks at nodes, and how many keys are in their slots. What a shard hands over to another is executed there as
/// the user of replication: slots that are opened and closed, the keys, and then whatever is written meanwhile. None of it empties a data
/// set or goes elsewhere.
const RULES_CLUSTER: Rules = Rules {
    operator: "+ping +info +role +cluster|nodes +cluster|info +cluster|countkeysinslot",
    replica: "+ping +psync +replconf +sync ~* +@write +pfcount +select +cluster|myid +cluster|setslot \
            -flushall -flushdb -migrate -swapdb",
};
/// From Valkey 9.0 on it looks at jobs as well.
const RULES_HANDING_OVER: Rules = Rules {
    operator: "+ping +info +role +cluster|nodes +cluster|info +cluster|countkeysinslot +cluster|getslotmigrations",
    replica: "+ping +psync +replconf +sync ~* +@write +pfcount +select +cluster|myid +cluster|setslot +cluster|syncslots \
        -flushall -flushdb -migrate -swapdb",
};

/// The users of servers below 9.0, and where there is no Valkey Cluster.
const KEY_USERS: &str = "users.acl";
/// The users of servers in a Valkey Cluster from 9.0 on. While an upgrade is under way both kinds run, and a server that does not know a
/// word of its file does not start.
const KEY_USERS_HANDING_OVER: &str = "users-9.0.acl";

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

    /// True if it is itself, and nothing more, in a line of valkey.conf.
    fn is_one_word(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\".contains(&byte);
        self.0.len() <= PASSWORD_CHARS_MAX && self.0.bytes().all(plain)
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
    /// Keeps what the Secret `<name>-system` has and makes what it lacks, also where somebody has written what would be more than one word in
    /// a configuration file. `default` is the user's own password for
    /// clients, if the spec names one. Only for a Secret that was seen or is proven absent: what cannot be read must
    /// not be made anew.
    pub fn complete(system: Option<&Secret>, default: Option<SecretText>, rng: &mut impl Rng) -> Self {
        let kept = |key: &str| system.and_then(|secret| value(secret, key));
        let mut random = || SecretText::random(rng);
        let operator = kept(KEY_OPERATOR).unwrap_or_else(&mut random);
        let replica = kept(KEY_REPLICA).filter(SecretText::is_one_word).unwrap_or_else(&mut random);
        let default = default.or_else(|| kept(KEY_DEFAULT)).unwrap_or_else(random);
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
    let credentials = &scene.context.credentials;
    let Credentials { default, operator, replica } = credentials;
    let mut data = json!({
        // The included file: a password in valkey.conf would be in a ConfigMap.
        "auth.conf": encoded(&format!("primaryuser {USER_REPLICA}\nprimaryauth {}\n", replica.expose())),
        KEY_DEFAULT: encoded(default.expose()),
        KEY_OPERATOR: encoded(operator.expose()),
        KEY_REPLICA: encoded(replica.expose()),
    });
    for (key, rules) in rules(scene.topology()) {
        data[key] = encoded(&users(credentials, rules));
    }
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": scene.metadata(&names::system(scene.name()), None),
        "type": "Opaque",
        "data": data,
    })
}

/// The files of users that there are, by their keys: that of the oldest servers first.
fn rules(topology: Topology) -> &'static [(&'static str, &'static Rules)] {
    match topology {
        Topology::Replication => &[(KEY_USERS, &RULES)],
        Topology::Cluster => &[(KEY_USERS, &RULES_CLUSTER), (KEY_USERS_HANDING_OVER, &RULES_HANDING_OVER)],
    }
}

/// What a pod's server is given of it: the key in the Secret `<name>-system`, and the text.
pub(super) fn given_users(scene: &Scene<'_>) -> (&'static str, String) {
    let handing_over = scene.parsed.workload.config.version >= ATOMIC_SLOTS_SINCE;
    let files = rules(scene.topology());
    let given = if handing_over { files.last() } else { files.first() };
    let (key, rules) = given.copied().unwrap_or((KEY_USERS, &RULES));
    (key, users(&scene.context.credentials, rules))
}

/// users.acl: hashes only. Rules are read from left to right, a user starts with nothing allowed.
fn users(credentials: &Credentials, rules: &Rules) -> String {
    let Credentials { default, operator, replica } = credentials;
    let Rules { operator: operator_rules, replica: replica_rules } = rules;
    format!(
        "user {USER_DEFAULT} on {} ~* &* +@all\n\
         user {USER_OPERATOR} on {} resetchannels -@all {operator_rules}\n\
         user {USER_REPLICA} on {} resetchannels -@all {replica_rules}\n",
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
