//! The pod of a member: the boot gate, the probes, and nothing that Pod Security `restricted` refuses.

use super::{DigestKey, Scene, digest, names, secret};
use crate::api::v1alpha1::{ANNOTATION_RESTART, ImagePullPolicy, Scheduling};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use valkeeper_core::{
    config::{
        AOF_DIR, CONF_DIR, DATA_DIR, GATE_ADDRESS, GATE_PORT_BLANK, GATE_PORT_HISTORY, PORT, RDB_FILE,
        SECRET_DIR, SHUTDOWN_TIMEOUT_S,
    },
    ids::ShardId,
};

/// Shell that runs the scripts: any POSIX one.
pub const BOOT_SCRIPT_SHELL: [&str; 2] = ["sh", "-c"];
/// User and group of the official image's server.
const USER_ID: u32 = 999;
/// Time to stop in seconds: Valkey waits [`SHUTDOWN_TIMEOUT_S`] for its replicas and then writes a snapshot, which
/// takes as long again for each few GiB.
const GRACE_PERIOD_S: u32 = SHUTDOWN_TIMEOUT_S + 50;
/// Readiness in seconds: it only feeds the `-replicas` Service and people (failover and writes do not wait for it), so
/// two seconds of lag for one short process are a fair price.
const READINESS_PERIOD_S: u32 = 2;
/// Liveness: a server that refuses connections for 50 seconds is broken. Silence alone is the operator's to judge, so
/// the probe asks for a connection and not for an answer; restarts by kubelet would race with fencing.
const LIVENESS: (u32, u32) = (10, 5);
/// Startup: seconds and attempts until the port must be open. Valkey opens it before it loads its data.
const STARTUP: (u32, u32) = (1, 60);
/// Annotations that make a change of what is mounted a change of the template, that is: a rollout.
const ANNOTATION_CONFIG: &str = "valkeeper.io/config";
const ANNOTATION_USERS: &str = "valkeeper.io/users";

/// Decides the boot gate and becomes the server. The server starts as a replica of an address where nobody answers:
/// it serves no one as primary and refuses PSYNC (a replica without link does), so that nothing can copy from it
/// until the operator has spoken. The port says whether there was a data file.
pub fn boot_script(data: &str, conf: &str) -> String {
    format!(
        r#"set -eu
rdb={data}/{RDB_FILE} aof={data}/{AOF_DIR}
gate={GATE_PORT_BLANK}
if [ -e "$rdb" ] || [ -d "$aof" ]; then gate={GATE_PORT_HISTORY}; fi
set -- {conf}/valkey.conf --replicaof {GATE_ADDRESS} "$gate" --replica-announce-ip "$POD_IP"
# With the append-only file on, a server does not look at a snapshot that stands alone: it would start empty.
if [ -e "$rdb" ] && [ ! -d "$aof" ]; then set -- "$@" --appendonly no; fi
exec valkey-server "$@""#
    )
}

/// Ready is: primary, or replica with its link up. Not at the gate, not loading, not in a first synchronisation. The
/// probe's user has no password, so the one given is no secret.
pub fn readiness_script() -> String {
    format!(
        r#"set -- $(valkey-cli -p {PORT} --user {user} --pass none --no-auth-warning role 2>/dev/null)
[ "${{1:-}}" = master ] || {{ [ "${{1:-}}" = slave ] && [ "${{4:-}}" = connected ]; }}"#,
        user = secret::USER_PROBE
    )
}

/// The pod template of a shard, without the annotation of its revision.
pub(super) fn template(scene: &Scene<'_>, shard: ShardId) -> Value {
    let spec = &scene.cluster.spec;
    let mut labels = object(&spec.pod_labels);
    labels.extend(scene.labels(Some(shard)).as_object().cloned().unwrap_or_default());
    json!({
        "metadata": { "labels": labels, "annotations": annotations(scene) },
        "spec": pod_spec(scene, shard),
    })
}

fn annotations(scene: &Scene<'_>) -> Map<String, Value> {
    let workload = &scene.parsed.workload;
    let credentials = &scene.context.credentials;
    let config = digest::text(&workload.config.render(), &DigestKey::none());
    let users = digest::text(&secret::users(credentials), &DigestKey::of(&credentials.operator));
    let mut all = object(&scene.cluster.spec.pod_annotations);
    all.insert(ANNOTATION_CONFIG.to_owned(), json!(config.0));
    all.insert(ANNOTATION_USERS.to_owned(), json!(users.0));
    if let Some(restart) = &workload.restart {
        all.insert(ANNOTATION_RESTART.to_owned(), json!(restart));
    }
    all
}

fn object(map: &BTreeMap<String, String>) -> Map<String, Value> {
    map.iter().map(|(k, v)| (k.clone(), json!(v))).collect()
}

fn pod_spec(scene: &Scene<'_>, shard: ShardId) -> Value {
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": GRACE_PERIOD_S,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [container(scene)],
        "volumes": volumes(scene),
    });
    if !scene.cluster.spec.image_pull_secrets.is_empty() {
        pod["imagePullSecrets"] = json!(scene.cluster.spec.image_pull_secrets);
    }
    schedule(scene, shard, &mut pod);
    pod
}

fn schedule(scene: &Scene<'_>, shard: ShardId, pod: &mut Value) {
    let Scheduling { node_selector, tolerations, affinity, topology_spread_constraints, priority_class_name } =
        &scene.cluster.spec.scheduling;
    if !node_selector.is_empty() {
        pod["nodeSelector"] = json!(node_selector);
    }
    if !tolerations.is_empty() {
        pod["tolerations"] = json!(tolerations);
    }
    if let Some(affinity) = affinity {
        pod["affinity"] = json!(affinity);
    }
    if let Some(class) = priority_class_name {
        pod["priorityClassName"] = json!(class);
    }
    pod["topologySpreadConstraints"] = match topology_spread_constraints {
        Some(constraints) => json!(constraints),
        None => json!(["topology.kubernetes.io/zone", "kubernetes.io/hostname"].map(|domain| json!({
            "maxSkew": 1,
            "topologyKey": domain,
            // Soft: a member in a crowded zone is better than none.
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": scene.selector(Some(shard)) },
        }))),
    };
}

fn container(scene: &Scene<'_>) -> Value {
    let pull = match scene.cluster.spec.image_pull_policy {
        ImagePullPolicy::Always => "Always",
        ImagePullPolicy::IfNotPresent => "IfNotPresent",
        ImagePullPolicy::Never => "Never",
    };
    let [shell, flag] = BOOT_SCRIPT_SHELL;
    let connect = json!({ "port": PORT });
    let mut container = json!({
        "name": names::CONTAINER,
        "image": scene.parsed.workload.image,
        "imagePullPolicy": pull,
        "command": [shell, flag, boot_script(DATA_DIR, CONF_DIR)],
        "env": [{ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
        "ports": [{ "name": "valkey", "containerPort": PORT, "protocol": "TCP" }],
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "startupProbe": { "tcpSocket": connect, "periodSeconds": STARTUP.0, "failureThreshold": STARTUP.1 },
        "livenessProbe": { "tcpSocket": connect, "periodSeconds": LIVENESS.0, "failureThreshold": LIVENESS.1 },
        "readinessProbe": {
            "exec": { "command": [shell, flag, readiness_script()] },
            "periodSeconds": READINESS_PERIOD_S,
            "timeoutSeconds": READINESS_PERIOD_S,
            "failureThreshold": 1,
        },
        "volumeMounts": [
            { "name": names::DATA_VOLUME, "mountPath": DATA_DIR },
            { "name": "tmp", "mountPath": "/tmp" },
            { "name": "conf", "mountPath": CONF_DIR, "readOnly": true },
            { "name": "secret", "mountPath": SECRET_DIR, "readOnly": true },
        ],
    });
    if let Some(resources) = &scene.cluster.spec.resources {
        container["resources"] = json!(resources);
    }
    container
}

fn volumes(scene: &Scene<'_>) -> Value {
    let mut volumes = vec![
        json!({ "name": "tmp", "emptyDir": {} }),
        json!({ "name": "conf", "configMap": { "name": names::config(scene.name()) } }),
        json!({ "name": "secret", "secret": {
            "secretName": names::system(scene.name()),
            // Readable for the server's group only.
            "defaultMode": 0o440,
            // The plain passwords in the Secret are for the operator: they stay out of the pod.
            "items": [{ "key": "users.acl", "path": "users.acl" }, { "key": "auth.conf", "path": "auth.conf" }],
        }}),
    ];
    if scene.parsed.workload.volume.is_none() {
        volumes.push(json!({ "name": names::DATA_VOLUME, "emptyDir": {} }));
    }
    Value::Array(volumes)
}
