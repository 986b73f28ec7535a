//! The pod of a member: the agent as its first process, which starts the server at the boot gate, and nothing that Pod
//! Security `restricted` refuses.

use super::{DigestKey, Scene, digest, names, secret};
use crate::api::v1alpha1::{ANNOTATION_RESTART, Announce, ImagePullPolicy, Scheduling};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use valkeeper_core::{
    config::{BUS_PORT, CONF_DIR, DATA_DIR, PORT, SECRET_DIR, SHUTDOWN_TIMEOUT_S},
    ids::ShardId,
    spec::Topology,
};

/// Port of the agent's gRPC, for the operator and for the agents of the same shard.
pub const AGENT_PORT: u16 = 7443;
/// Port of the agent's probes and metrics.
pub const METRICS_PORT: u16 = 9121;
/// Port at which the operator takes news from agents.
pub const OPERATOR_PORT: u16 = 8443;
/// Where the init container puts the agent. Not the next: in the operator's image that is the operator's program.
const INSTALL_DIR: &str = "/agent";
/// Where the server's container finds it.
const AGENT_DIR: &str = "/valkeeper";
/// Where the agent finds what it proves itself with.
const IDENTITY_DIR: &str = "/etc/valkeeper/identity";
/// User and group of the official image's server.
const USER_ID: u32 = 999;
/// Longest wait of a leaving primary for its handover in seconds: the agent's own bound.
const HANDOVER_S: u32 = 5;
/// Rate at which a snapshot is written while stopping, in bytes per second: what a slow network volume takes.
const SAVE_RATE_BYTES: u64 = 50 << 20;
/// Time for a snapshot in seconds where no memory limit says how much data there can be: 2 GiB at that rate.
const SAVE_UNLIMITED_S: u32 = 40;
/// Time for everything else in seconds: signals, a last sync of files, the end of the process.
const STOP_MARGIN_S: u32 = 5;
/// Readiness in seconds: it only feeds the `-replicas` Service and people (failover and writes do not wait for it), so
/// two seconds of lag are a fair price.
const READINESS_PERIOD_S: u32 = 2;
/// Liveness, period in seconds and attempts: the agent says when its server is beyond hope, with bounds of its own; this
/// is for an agent that does not answer either.
const LIVENESS: (u32, u32) = (10, 5);
/// Startup: seconds and attempts until the server listens. Valkey does so before it loads its data.
const STARTUP: (u32, u32) = (1, 60);
/// How long the agent of a member that leaves goes on for the clients of a primary that has moved (agent/src/relay.rs, leave.rs).
const PASS_ON_S: u32 = 2;
/// Longest wait for an answer to a probe in seconds: the agent answers from memory.
const PROBE_TIMEOUT_S: u32 = 2;
/// Annotations that make a change of what is mounted a change of the template, that is: a rollout.
const ANNOTATION_CONFIG: &str = "valkeeper.io/config";
const ANNOTATION_USERS: &str = "valkeeper.io/users";

/// Time to stop in seconds: a handover, clients that are passed on, then the server waits for its replicas and writes a snapshot of at most the memory
/// limit.
fn grace_period_s(memory_limit_bytes: Option<u64>) -> u32 {
    let save_s = memory_limit_bytes.map_or(SAVE_UNLIMITED_S, |limit| {
        u32::try_from(limit.div_ceil(SAVE_RATE_BYTES)).unwrap_or(u32::MAX / 2)
    });
    SHUTDOWN_TIMEOUT_S + HANDOVER_S + PASS_ON_S + STOP_MARGIN_S + save_s
}

/// The pod template of every shard, as far as all have the same.
pub(super) fn template(scene: &Scene<'_>) -> Value {
    json!({
        "metadata": { "labels": object(&scene.cluster.spec.pod_labels), "annotations": annotations(scene) },
        "spec": pod_spec(scene),
    })
}

/// That of one shard, without the annotation of its revision.
pub(super) fn of_shard(template: &Value, scene: &Scene<'_>, shard: ShardId) -> Value {
    let mut template = template.clone();
    let mut labels = scene.labels(Some(shard));
    labels[names::NAMED_LABEL] = json!(names::NAMED);
    if let (Some(all), Value::Object(labels)) = (template["metadata"]["labels"].as_object_mut(), labels) {
        all.extend(labels);
    }
    let spec = &mut template["spec"];
    if scene.cluster.spec.scheduling.topology_spread_constraints.is_none() {
        spec["topologySpreadConstraints"] = spread(scene, shard);
    }
    if let Some(volumes) = spec["volumes"].as_array_mut() {
        volumes.push(json!({ "name": "identity", "secret": {
            "secretName": names::identity(scene.name(), shard),
            "defaultMode": 0o440,
        }}));
    }
    template
}

fn annotations(scene: &Scene<'_>) -> Map<String, Value> {
    let workload = &scene.parsed.workload;
    let credentials = &scene.context.credentials;
    // What servers take while they run makes no other template.
    let config = digest::text(&workload.config.fixed_text(), &DigestKey::none());
    let users = digest::text(&secret::given_users(scene).1, &DigestKey::of(&credentials.operator));
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

fn pod_spec(scene: &Scene<'_>) -> Value {
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": grace_period_s(scene.parsed.workload.config.memory_limit_bytes),
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "initContainers": [init_container(scene)],
        "containers": [container(scene)],
        "volumes": volumes(scene),
    });
    if !scene.cluster.spec.image_pull_secrets.is_empty() {
        pod["imagePullSecrets"] = json!(scene.cluster.spec.image_pull_secrets);
    }
    schedule(scene, &mut pod);
    pod
}

fn schedule(scene: &Scene<'_>, pod: &mut Value) {
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
    if let Some(constraints) = topology_spread_constraints {
        pod["topologySpreadConstraints"] = json!(constraints);
    }
}

/// Members of a shard apart from each other.
fn spread(scene: &Scene<'_>, shard: ShardId) -> Value {
    json!(["topology.kubernetes.io/zone", "kubernetes.io/hostname"].map(|domain| json!({
        "maxSkew": 1,
        "topologyKey": domain,
        // Soft: a member in a crowded zone is better than none.
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": { "matchLabels": scene.selector(Some(shard)) },
    })))
}

fn container(scene: &Scene<'_>) -> Value {
    let pull = match scene.cluster.spec.image_pull_policy {
        ImagePullPolicy::Always => "Always",
        ImagePullPolicy::IfNotPresent => "IfNotPresent",
        ImagePullPolicy::Never => "Never",
    };
    let agent = format!("{AGENT_DIR}/valkeeper-agent");
    let conf = format!("{CONF_DIR}/valkey.conf");
    let mut command = vec![agent.as_str(), "run", "--cluster", scene.name()];
    match scene.parsed.workload.announce {
        // The agent's default. Unsaid, so that an agent of before takes its arguments, and pods of before stay as they are.
        Announce::Address => {}
        Announce::Hostname => command.extend(["--announce", "hostname"]),
    }
    command.extend(["--", "valkey-server", &conf]);
    let mut container = json!({
        "name": names::CONTAINER,
        "image": scene.parsed.workload.image,
        "imagePullPolicy": pull,
        "command": command,
        "env": [field("POD_NAME", "metadata.name"), field("POD_NAMESPACE", "metadata.namespace"), field("POD_IP", "status.podIP")],
        "ports": ports(scene.topology()),
        "securityContext": security(),
        "startupProbe": probe("/startupz", STARTUP),
        "livenessProbe": probe("/livez", LIVENESS),
        "readinessProbe": probe("/readyz", (READINESS_PERIOD_S, 1)),
        "volumeMounts": [
            { "name": names::DATA_VOLUME, "mountPath": DATA_DIR },
            { "name": "tmp", "mountPath": "/tmp" },
            { "name": "conf", "mountPath": CONF_DIR, "readOnly": true },
            { "name": "secret", "mountPath": SECRET_DIR, "readOnly": true },
            { "name": "identity", "mountPath": IDENTITY_DIR, "readOnly": true },
            { "name": "agent", "mountPath": AGENT_DIR, "readOnly": true },
        ],
    });
    if let Some(resources) = &scene.cluster.spec.resources {
        container["resources"] = json!(resources);
    }
    container
}

/// Copies the agent to where the Valkey image finds it. Its resources are the server's, so that the pod's class of service is
/// what the user chose; they are not added up.
fn init_container(scene: &Scene<'_>) -> Value {
    let mut container = json!({
        "name": names::AGENT_CONTAINER,
        "image": scene.parsed.workload.agent_image,
        // The operator's own image, which is there or is pulled once.
        "imagePullPolicy": "IfNotPresent",
        "command": ["/valkeeper-agent", "install", INSTALL_DIR],
        "securityContext": security(),
        "volumeMounts": [{ "name": "agent", "mountPath": INSTALL_DIR }],
    });
    if let Some(resources) = &scene.cluster.spec.resources {
        container["resources"] = json!(resources);
    }
    container
}

fn security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "readOnlyRootFilesystem": true,
        "runAsNonRoot": true,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

fn field(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } })
}

fn ports(topology: Topology) -> Vec<Value> {
    let mut ports = vec![port("valkey", PORT), port("agent", AGENT_PORT), port("metrics", METRICS_PORT)];
    match topology {
        Topology::Replication => {}
        Topology::Cluster => ports.push(port("bus", BUS_PORT)),
    }
    ports
}

fn port(name: &str, number: u16) -> Value {
    json!({ "name": name, "containerPort": number, "protocol": "TCP" })
}

fn probe(path: &str, (period_s, failures): (u32, u32)) -> Value {
    json!({
        "httpGet": { "path": path, "port": METRICS_PORT },
        "periodSeconds": period_s,
        "timeoutSeconds": PROBE_TIMEOUT_S,
        "failureThreshold": failures,
    })
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
            "items": [
                { "key": secret::given_users(scene).0, "path": "users.acl" },
                { "key": "auth.conf", "path": "auth.conf" },
            ],
        }}),
        json!({ "name": "agent", "emptyDir": {} }),
    ];
    if scene.parsed.workload.volume.is_none() {
        volumes.push(json!({ "name": names::DATA_VOLUME, "emptyDir": {} }));
    }
    Value::Array(volumes)
}
