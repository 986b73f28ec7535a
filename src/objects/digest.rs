//! Digests that say whether the server has what is wanted. The server adds defaults, rewrites quantities and drops
//! empty fields; so the live object is projected onto the wanted fields, and both are brought to one form.

use super::SecretText;
use crate::api::quantity;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use valkeeper_core::ids::Digest;

/// Names by which elements of a list are told apart, as the API server does it.
const LIST_KEYS: [&str; 3] = ["/name", "/mountPath", "/metadata/name"];
/// Maps whose values are quantities, and fields that are one.
const QUANTITY_MAPS: [&str; 2] = ["limits", "requests"];
const QUANTITY_FIELDS: [&str; 1] = ["sizeLimit"];

/// Key of a digest over something that must not be guessed from it.
#[derive(Clone)]
pub struct DigestKey(Option<[u8; 32]>);

impl DigestKey {
    /// For what anyone may see.
    pub fn none() -> Self {
        DigestKey(None)
    }

    /// A key that only who knows this (random) password has.
    pub fn of(password: &SecretText) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"valkeeper digest key\0");
        hash.update(password.expose().as_bytes());
        DigestKey(Some(hash.finalize().into()))
    }
}

/// Digest of a value.
pub fn of(value: &Value, key: &DigestKey) -> Digest {
    text(&canonical(value).to_string(), key)
}

/// Digest of a text.
pub fn text(text: &str, DigestKey(key): &DigestKey) -> Digest {
    let inner = match key {
        None => Sha256::digest(text.as_bytes()),
        // Keyed on both sides, as in HMAC: nothing can be appended to what was digested.
        Some(key) => {
            let inner = Sha256::new().chain_update(key).chain_update(text.as_bytes()).finalize();
            Sha256::new().chain_update(key).chain_update(inner).finalize()
        }
    };
    let mut hex = String::with_capacity(64);
    for byte in inner {
        let _ = write!(hex, "{byte:02x}");
    }
    Digest(hex)
}

/// Digest of the fields of `live` that `wanted` has: equal to the digest of `wanted` if and only if none differs.
/// For Secrets use [`super::Rendered::live_digest`], which is keyed.
pub fn live_digest(wanted: &Value, live: &Value) -> Digest {
    self::live(wanted, live, &DigestKey::none())
}

/// The same with a key.
pub fn live(wanted: &Value, live: &Value, key: &DigestKey) -> Digest {
    of(&project(wanted, live), key)
}

fn project(wanted: &Value, live: &Value) -> Value {
    if let (Value::Object(wanted), Value::Object(live)) = (wanted, live) {
        let shared = wanted.iter().filter_map(|(k, w)| Some((k.clone(), project(w, live.get(k)?))));
        return Value::Object(shared.collect::<Map<_, _>>());
    }
    if let (Value::Array(wanted), Value::Array(live)) = (wanted, live) {
        return Value::Array(project_list(wanted, live));
    }
    live.clone()
}

/// Elements with a name are found by it, and others may stand beside them (an injected container). A list without
/// names is one value: its order and length count.
fn project_list(wanted: &[Value], live: &[Value]) -> Vec<Value> {
    let named = |list: &[Value], key: &str| list.iter().all(|e| e.pointer(key).is_some_and(Value::is_string));
    if let Some(key) = LIST_KEYS.iter().find(|key| !wanted.is_empty() && named(wanted, key)) {
        let same = |w: &Value, l: &&Value| l.pointer(key) == w.pointer(key);
        return wanted.iter().filter_map(|w| Some(project(w, live.iter().find(|l| same(w, l))?))).collect();
    }
    let beyond = live.iter().skip(wanted.len()).cloned();
    wanted.iter().zip(live).map(|(w, l)| project(w, l)).chain(beyond).collect()
}

/// One form for what the server may write in several: quantities as numbers, fields that are empty left out.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter().filter_map(|(k, v)| Some((k.clone(), field(k, v)?))).collect::<Map<_, _>>(),
        ),
        Value::Array(list) => Value::Array(list.iter().map(canonical).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

fn field(key: &str, value: &Value) -> Option<Value> {
    let value = match value {
        Value::String(_) if QUANTITY_FIELDS.contains(&key) => amount(value),
        Value::Object(map) if QUANTITY_MAPS.contains(&key) => {
            Value::Object(map.iter().map(|(k, v)| (k.clone(), amount(v))).collect::<Map<_, _>>())
        }
        Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_) => canonical(value),
    };
    let empty = match &value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    (!empty).then_some(value)
}

fn amount(value: &Value) -> Value {
    let nanos = value.as_str().and_then(quantity::nanos);
    nanos.map_or_else(|| value.clone(), |n| Value::String(format!("{n}n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wanted() -> Value {
        json!({
            "metadata": { "name": "a", "labels": { "x": "1" } },
            "spec": {
                "replicas": 3,
                "template": { "spec": {
                    "containers": [{
                        "name": "valkey",
                        "command": ["sh", "-c"],
                        "resources": { "limits": { "memory": "1024Mi", "cpu": "0.5" } },
                        "volumeMounts": [{ "name": "data", "mountPath": "/data" }, { "name": "tmp", "mountPath": "/tmp" }],
                    }],
                    "volumes": [{ "name": "tmp", "emptyDir": {} }],
                    "tolerations": [{ "key": "a", "operator": "Exists" }],
                    "nodeSelector": {},
                }},
            },
        })
    }

    /// As a server returns it: defaults, other people's fields, another order, canonical quantities.
    fn served() -> Value {
        json!({
            "metadata": {
                "name": "a", "labels": { "x": "1", "theirs": "2" }, "uid": "u", "resourceVersion": "5",
                "managedFields": [{ "manager": "valkeeper" }],
            },
            "spec": {
                "replicas": 3,
                "revisionHistoryLimit": 10,
                "template": { "spec": {
                    "containers": [
                        { "name": "injected", "image": "mesh" },
                        {
                            "name": "valkey",
                            "command": ["sh", "-c"],
                            "resources": { "limits": { "cpu": "500m", "memory": "1Gi" } },
                            "terminationMessagePath": "/dev/termination-log",
                            "volumeMounts": [
                                { "name": "tmp", "mountPath": "/tmp" },
                                { "name": "data", "mountPath": "/data" },
                            ],
                        },
                    ],
                    "volumes": [{ "name": "tmp", "emptyDir": {} }],
                    "tolerations": [{ "key": "a", "operator": "Exists" }],
                    "restartPolicy": "Always",
                }},
            },
            "status": { "replicas": 3 },
        })
    }

    #[test]
    fn what_the_server_adds_and_rewrites_is_no_difference() {
        assert_eq!(live_digest(&wanted(), &served()), of(&wanted(), &DigestKey::none()));
    }

    #[test]
    fn every_change_of_a_wanted_field_is_a_difference() {
        let changes: [(&str, Value); 9] = [
            ("/spec/replicas", json!(2)),
            ("/metadata/labels/x", json!("2")),
            ("/metadata/labels", json!({})),
            ("/spec/template/spec/containers/1/command", json!(["sh"])),
            ("/spec/template/spec/containers/1/command", json!(["sh", "-c", "more"])),
            ("/spec/template/spec/containers/1/resources/limits/memory", json!("2Gi")),
            ("/spec/template/spec/containers/1/name", json!("other")),
            ("/spec/template/spec/tolerations", json!([])),
            ("/spec/template/spec/containers", json!([])),
        ];
        for (path, value) in changes {
            let mut live = served();
            *live.pointer_mut(path).unwrap() = value.clone();
            assert_ne!(live_digest(&wanted(), &live), of(&wanted(), &DigestKey::none()), "{path} = {value}");
        }
    }

    #[test]
    fn the_order_of_fields_does_not_count() {
        let one: Value = serde_json::from_str(r#"{"a":1,"b":{"c":2,"d":3}}"#).unwrap();
        let other: Value = serde_json::from_str(r#"{"b":{"d":3,"c":2},"a":1}"#).unwrap();
        assert_eq!(of(&one, &DigestKey::none()), of(&other, &DigestKey::none()));
    }

    #[test]
    fn a_keyed_digest_depends_on_the_key() {
        let keys = [DigestKey::none(), DigestKey::of(&"a".into()), DigestKey::of(&"b".into())];
        let digests: Vec<Digest> = keys.iter().map(|key| of(&wanted(), key)).collect();
        assert!(digests[0] != digests[1] && digests[1] != digests[2]);
    }
}
