//! `ValkeyCluster` as the user writes it. Schema and CEL carry every rule they can; the rest is in `parse.rs`.
//! A field is `Option` where its default depends on another field, and has a schema default otherwise.

use k8s_openapi::{
    api::core::v1::{
        Affinity, LocalObjectReference, ResourceRequirements, Toleration, TopologySpreadConstraint,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::Condition},
};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Request for a planned promotion: `<ordinal>` (of shard 0) or `<shard>-<ordinal>`, with an optional `@<token>` that
/// tells one wish from the next of the same text.
pub const ANNOTATION_SWITCHOVER: &str = "valkeeper.io/switchover";
/// Request for a rolling restart: any text; another text is another request.
pub const ANNOTATION_RESTART: &str = "valkeeper.io/restart";
/// Consent to begin anew where every member of a shard that had data came back blank: any text.
pub const ANNOTATION_CONFIRM_BLANK: &str = "valkeeper.io/confirm-blank";
/// Request to even out the slots of a Valkey Cluster once: any text; another text is another request.
pub const ANNOTATION_REBALANCE: &str = "valkeeper.io/rebalance";
/// The operator's finalizer: deletion waits until it is recorded.
pub const FINALIZER: &str = "valkeeper.io/journal";

/// Annotation by which a person accepts that acknowledged records of the journal are gone: the first 12 digits or more of
/// `status.journal.hash`.
pub const ACCEPT_LOSS: &str = "valkeeper.io/accept-journal-loss";

/// Annotation by which a person asks that a damaged journal is written anew from its second copy: as above.
pub const REPAIR: &str = "valkeeper.io/repair-journal";

/// Most shards of one cluster: each is a StatefulSet with its own failover, and one task turns for all of them.
pub const SHARDS_MAX: u16 = 16;
/// Most replicas of one primary: more cost the primary more in replication than they bring in safety.
pub const REPLICAS_MAX: u16 = 5;
/// Longest name: `<name>-primary-15` and the StatefulSet's revision label (name plus 14) must fit in 63 characters.
pub const NAME_LENGTH_MAX: usize = 40;
/// Bounds of the detection window in milliseconds: below one second a healthy server in a long command looks dead,
/// above a minute nobody is helped.
pub const DETECTION_WINDOW_MS: std::ops::RangeInclusive<i64> = 1_000..=60_000;
/// Shortest detection window of topology Cluster in milliseconds: the nodes' own timeout is a second less, and a second at least.
pub const CLUSTER_DETECTION_WINDOW_MIN_MS: i64 = 2_000;
/// Detection window unless the user sets one, in milliseconds.
pub const DETECTION_WINDOW_DEFAULT_MS: i64 = 3_000;
/// Size of a volume unless the user sets one.
pub const VOLUME_SIZE_DEFAULT: &str = "1Gi";

/// A name of an object, as Kubernetes has it (RFC 1123 subdomain).
const OBJECT_NAME: &str = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";
/// The same, or nothing: no StorageClass at all.
const OBJECT_NAME_OR_NONE: &str = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$";

/// A label's value, as Kubernetes has it.
fn label_value() -> serde_json::Value {
    serde_json::json!({
        "type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
    })
}

/// What the user wants of a Valkey cluster.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, Serialize, PartialEq)]
#[kube(
    group = "valkeeper.io",
    version = "v1alpha1",
    kind = "ValkeyCluster",
    plural = "valkeyclusters",
    shortname = "vkc",
    category = "all",
    namespaced,
    status = "ValkeyClusterStatus",
    derive = "PartialEq",
    doc = "A Valkey deployment: its shape, its durability, and when it fails over.",
    validation = Rule::new("self.metadata.name.size() <= 40").message("metadata.name may have 40 characters at most"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must start with a letter and have letters, digits and '-' only"),
    // Not of those that were made before there was this rule: their finalizer could not be taken off.
    validation = Rule::new(
        "oldSelf.hasValue() || !self.metadata.name.matches('(-primary|-replicas)(-[0-9]+)?$|-headless$|-node-[0-9]+-[0-9]+$')"
    )
    .message(
        "metadata.name must not end in -primary, -replicas (with or without a shard's number behind it), -headless or \
         -node with two numbers: \
         Services of other ValkeyClusters have such names; allowed: any other ending"
    )
    .optional_old_self(true),
    printcolumn(name = "Topology", type_ = "string", json_path = ".spec.topology"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.primary"),
    printcolumn(name = "Members", type_ = "string", json_path = ".status.ready", description = "ready / wanted"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Journal", type_ = "integer", json_path = ".status.journal.seq"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.topology != 'Standalone' || !has(self.replicas) || self.replicas == 0")
        .message("topology Standalone has no replicas: leave spec.replicas out, set it to 0, or use Replication")
        .field_path(".replicas"),
    validation = Rule::new("self.profile != 'Durable' || !has(self.persistence.enabled) || self.persistence.enabled")
        .message("profile Durable needs a volume: leave spec.persistence.enabled out, or use profile Cache")
        .field_path(".persistence"),
    validation = Rule::new(
        "(has(self.persistence.enabled) ? self.persistence.enabled : self.profile == 'Durable') == \
         (has(oldSelf.persistence.enabled) ? oldSelf.persistence.enabled : oldSelf.profile == 'Durable')"
    )
    .message("spec.persistence.enabled cannot change: a StatefulSet's volumes are fixed when it is created")
    .field_path(".persistence"),
    validation = Rule::new(
        "self.topology == 'Cluster' || \
         (has(self.shards) ? self.shards : 1) >= (has(oldSelf.shards) ? oldSelf.shards : 1)"
    )
    .message("shards cannot decrease except in topology Cluster: a removed shard is lost data")
    .field_path(".shards"),
    validation = Rule::new("self.topology != 'Cluster' || self.failover.detectionWindowMs >= 2000")
        .message("topology Cluster needs a detectionWindowMs of 2000 or more: the nodes' own timeout is below it")
        .field_path(".failover"),
    validation = Rule::new("self.topology == 'Cluster' || self.balance == 'Slots'")
        .message("only topology Cluster has slots to balance: leave spec.balance out")
        .field_path(".balance"),
    validation = Rule::new("self.topology == 'Cluster' || !has(self.announce)")
        .message("only nodes of topology Cluster name each other to clients: leave spec.announce out")
        .field_path(".announce"),
)]
pub struct ValkeyClusterSpec {
    /// Shape of the cluster. Standalone is a primary without replicas; Replication has shards of one primary and its
    /// replicas, failed over by the operator; Cluster is Valkey Cluster: the shards share the slots. Cannot change.
    #[x_kube(
        validation = Rule::new("self != 'Sentinel'")
            .message("topology Sentinel is not available yet; allowed: Standalone, Replication, Cluster"),
        validation = Rule::new("self == oldSelf").message("topology cannot change"),
    )]
    pub topology: Topology,
    /// Number of shards: independent ones, or in topology Cluster those that share the slots. Default: 3 for Cluster, else 1.
    /// Cannot decrease, except in topology Cluster, where it can change either way: slots are handed over with their
    /// keys, and a shard is removed when it has none left. Its volumes stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub shards: Option<u16>,
    /// What the shards of topology Cluster shall be even by: Slots, their number; Keys, how many are in them; Bytes, what
    /// these take, as if all keys of a node were of one size. They are evened out when shards come or go, when this changes,
    /// and once for each new text of the annotation valkeeper.io/rebalance; not by themselves while keys come and go.
    /// Default: Slots, and other topologies allow nothing else.
    #[serde(default)]
    pub balance: Balance,
    /// How the nodes of topology Cluster name each other to clients: Hostname, the names of the members' own
    /// Services, whose addresses stay when a pod comes back elsewhere; Address, the pods' addresses, for clients that cannot resolve
    /// those names or reach a Service. A change restarts every member, one after the other. Default: Hostname. Other topologies have
    /// no use for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<Announce>,
    /// Replicas of each shard's primary. Default: 2 for Replication and Cluster, 0 for Standalone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 5))]
    pub replicas: Option<u16>,
    /// Image with valkey-server. Default: the operator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Version of Valkey in the image, for images whose tag does not say it (`latest`, digests), e.g. `9.1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+\.[0-9]+(\.[0-9]+)?$"))]
    pub version: Option<String>,
    /// What the data is worth. Durable: nothing is evicted, RDB and AOF on a volume. Cache: least recently used keys
    /// are evicted, no persistence. Cannot change.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("profile cannot change: it decides on volumes"))]
    pub profile: Profile,
    /// Volumes and files.
    #[serde(default)]
    pub persistence: Persistence,
    /// Resources of the Valkey container. maxmemory is derived from the memory limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Directives of valkey.conf. Those that the operator owns (port, dir, replicaof, ...) are refused.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 128))]
    pub config: BTreeMap<String, String>,
    /// Client authentication.
    #[serde(default)]
    pub auth: Auth,
    /// When the operator promotes a replica by itself.
    #[serde(default)]
    pub failover: Failover,
    /// Where members run.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// Further labels of the pods, at most 64.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    pub pod_labels: BTreeMap<String, String>,
    /// Further annotations of the pods, at most 64.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub pod_annotations: BTreeMap<String, String>,
    /// When the image is pulled.
    #[serde(default)]
    pub image_pull_policy: ImagePullPolicy,
    /// Secrets to pull the image with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Stops planned changes. Failover goes on.
    #[serde(default)]
    pub paused: bool,
}

/// Shape of a cluster.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Topology {
    /// One primary.
    Standalone,
    /// One primary with replicas, per shard.
    Replication,
    /// Not available yet.
    Sentinel,
    /// Valkey Cluster: one primary with replicas per shard; clients are sent to the shard that has the key.
    Cluster,
}

/// What the shards of a Valkey Cluster shall be even by.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Balance {
    /// Number of slots.
    #[default]
    Slots,
    /// Number of keys.
    Keys,
    /// Memory that keys take, as if all keys of a node were of one size.
    Bytes,
}

/// How nodes of a Valkey Cluster name each other to clients.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Announce {
    /// By the pods' addresses.
    Address,
    /// By the names of the members' own Services.
    #[default]
    Hostname,
}

/// What the data is worth.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Profile {
    /// May be lost.
    Cache,
    /// Must last.
    #[default]
    Durable,
}

/// Files that Valkey writes on its volume.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum PersistenceMode {
    /// Snapshots only.
    Rdb,
    /// Snapshots and the append-only file.
    RdbAof,
}

/// Volumes and files.
#[derive(Clone, Debug, Deserialize, Serialize, KubeSchema, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "has(self.storageClassName) == has(oldSelf.storageClassName) && \
         (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)"
    )
    .message("storageClassName cannot change"),
    validation = Rule::new("has(self.mode) == has(oldSelf.mode) && (!has(self.mode) || self.mode == oldSelf.mode)")
        .message("mode cannot change: a server that turns to the append-only file at a restart loads no snapshot"),
)]
pub struct Persistence {
    /// Whether members have volumes. Default: true for Durable, false for Cache. Cannot change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Size of each member's volume. Cannot change yet: growing volumes is not available.
    #[serde(default = "defaults::volume_size")]
    #[x_kube(
        validation = Rule::new("isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))")
            .message("size must be a positive quantity such as 8Gi"),
        validation = Rule::new("quantity(self).compareTo(quantity(oldSelf)) >= 0").message("size cannot shrink"),
        validation = Rule::new("quantity(self).compareTo(quantity(oldSelf)) <= 0")
            .message("size cannot grow yet: growing volumes is not available"),
    )]
    #[schemars(length(max = 32))]
    pub size: Quantity,
    /// StorageClass of the volumes. Default: the cluster's. Cannot change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = OBJECT_NAME_OR_NONE))]
    pub storage_class_name: Option<String>,
    /// Files on the volume. Default: RdbAof for Durable, Rdb for Cache. Cannot change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<PersistenceMode>,
}

impl Default for Persistence {
    fn default() -> Self {
        Persistence { enabled: None, size: defaults::volume_size(), storage_class_name: None, mode: None }
    }
}

/// Client authentication.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    /// Secret with the password of user `default`. Without it the operator makes a random one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_secret: Option<SecretKeyRef>,
}

/// A key of a Secret in the cluster's namespace.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub name: String,
    /// Key in it.
    #[serde(default = "defaults::password_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// Whether the operator promotes by itself.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum FailoverMode {
    /// When the evidence is sufficient.
    #[default]
    Automatic,
    /// Never: it only reports.
    Manual,
}

/// When the operator promotes a replica by itself.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Failover {
    /// Whether it does.
    #[serde(default)]
    pub mode: FailoverMode,
    /// How long a primary may be silent before it is fenced, in milliseconds. A dead process needs no window.
    /// Topology Cluster needs 2000 or more.
    #[serde(default = "defaults::detection_window_ms")]
    #[schemars(range(min = 1000, max = 60000))]
    pub detection_window_ms: i64,
    /// Whether the primary of a shard of three or more members stops accepting writes when neither the operator nor a majority
    /// of the members confirms it (with a detection window of 2500 ms or more). Off: it goes on, and another is promoted only
    /// after a fence that can be seen. In YAML the word needs quotes: `"Off"`.
    #[serde(default)]
    pub isolation: Isolation,
}

/// Whether a primary that nobody confirms stops accepting writes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum Isolation {
    /// It stops, a second before another may be promoted.
    #[default]
    On,
    /// It goes on.
    Off,
}

impl Default for Failover {
    fn default() -> Self {
        Failover {
            mode: FailoverMode::default(),
            detection_window_ms: DETECTION_WINDOW_DEFAULT_MS,
            isolation: Isolation::default(),
        }
    }
}

/// Where members run.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Scheduling {
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub tolerations: Vec<Toleration>,
    /// Affinity rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Spread over failure domains. Default: members of a shard over zones and over hosts, where possible. An empty
    /// list turns that off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub priority_class_name: Option<String>,
}

/// When the image is pulled.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub enum ImagePullPolicy {
    /// Always.
    Always,
    /// If the node does not have it.
    #[default]
    IfNotPresent,
    /// Never.
    Never,
}

/// What is there, as last published.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ValkeyClusterStatus {
    /// `metadata.generation` of the spec this status is about; -1 before the operator has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling, Stalled (kstatus), PrimaryAvailable, JournalIntact, CertificatesValid; with an archive JournalArchived.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Pod of each shard's primary, by shard.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub primaries: BTreeMap<String, String>,
    /// Pods of the primaries in one text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub primary: String,
    /// Members that are primary, or replicas in sync.
    #[serde(default)]
    pub ready_members: i32,
    /// Members that shall exist.
    #[serde(default)]
    pub members: i32,
    /// `readyMembers/members`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ready: String,
    /// Certificates that the members' agents serve with, by pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub certificates: BTreeMap<String, CertificateStatus>,
    /// How far slots are on their way between shards. Absent if none is to move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resharding: Option<ReshardingStatus>,
    /// Position of the journal when this was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalPosition>,
    /// What the operator waits for or refuses, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// A certificate of an agent.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// Hex of its SHA-256.
    pub thumbprint: String,
    /// End of its validity, RFC 3339.
    pub not_after: String,
}

/// How far slots are on their way between shards.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ReshardingStatus {
    /// Slots that have another shard since it began.
    pub slots_moved: i64,
    /// Slots that are still to move.
    pub slots_left: i64,
    /// How long that takes at the pace so far, in seconds. Absent while nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<i64>,
    /// Why the last handover came to nothing, in Valkey's words or the agent's. Absent if none did; what is not handed over is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A position in the journal.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
pub struct JournalPosition {
    /// Name of the journal: the resource's UID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stream: String,
    /// Sequence of the last record.
    pub seq: i64,
    /// Writer epoch.
    pub epoch: i64,
    /// Hash of the last record, 64 hex digits: a journal that does not hold it any more is not continued.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hash: String,
}

mod defaults {
    use super::{DETECTION_WINDOW_DEFAULT_MS, Quantity, VOLUME_SIZE_DEFAULT};

    pub(super) fn volume_size() -> Quantity {
        Quantity(VOLUME_SIZE_DEFAULT.to_owned())
    }
    pub(super) fn detection_window_ms() -> i64 {
        DETECTION_WINDOW_DEFAULT_MS
    }
    pub(super) fn password_key() -> String {
        "password".to_owned()
    }
}
