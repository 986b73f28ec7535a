//! What one look at the cluster brings back. *Facts* are recorded when they differ from what is known and are folded
//! into state; *readings* change at every look, are never recorded alone and travel as evidence of a decision.

use crate::{
    agent::Brief,
    decision::HoldReason,
    effect::Outcome,
    ids::{Digest, MemberId, NodeId, ReplId, Seq, ShardId, Timestamp},
    slots::SlotSet,
    spec::DesiredCluster,
    weights::SlotWeights,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Three-valued observation: "could not ask" is not "is not there".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Observed<T> {
    /// Nobody could tell.
    Unknown(Why),
    /// Proven not to be there.
    Absent,
    /// Seen.
    Present(T),
}

/// Why an observation is Unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Why {
    /// Nobody has looked in this epoch.
    NotLooked,
    /// No answer within the probe's bound; the connection is open or cannot be refused.
    Silent,
    /// It answers, but refuses the operator's credentials.
    Unauthorized,
    /// It answers with something that cannot be understood.
    Garbled,
    /// The API server did not answer or refused.
    ApiError,
}

impl<T> Observed<T> {
    /// The value, if it was seen.
    pub fn present(&self) -> Option<&T> {
        match self {
            Observed::Present(value) => Some(value),
            Observed::Absent | Observed::Unknown(_) => None,
        }
    }

    /// True if nobody could tell.
    pub fn is_unknown(&self) -> bool {
        match self {
            Observed::Unknown(_) => true,
            Observed::Absent | Observed::Present(_) => false,
        }
    }

    /// True if it is proven not to be there.
    pub fn is_absent(&self) -> bool {
        match self {
            Observed::Absent => true,
            Observed::Unknown(_) | Observed::Present(_) => false,
        }
    }
}

impl<T> Default for Observed<T> {
    fn default() -> Self {
        Observed::Unknown(Why::NotLooked)
    }
}

/// State of the node that a pod runs on, as the API server knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeHealth {
    /// Its kubelet reports.
    Ready,
    /// Its kubelet is silent or says it is not ready.
    NotReady,
}

/// State of the Valkey container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerPhase {
    /// Not started; the reason is kubelet's (`ImagePullBackOff`, `CrashLoopBackOff`, ...) or empty.
    Waiting(String),
    /// Started.
    Running,
    /// Ended with this exit code.
    Terminated(i32),
}

/// Facts about a member's pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFacts {
    /// `metadata.uid`: a pod of the same name is another pod.
    pub uid: String,
    /// Pod IP, once it has one.
    pub address: Option<String>,
    /// Name of its node, once scheduled; empty before.
    pub node: String,
    /// State of that node.
    pub node_health: NodeHealth,
    /// True while that node takes no new pods (`spec.unschedulable`): it is about to be emptied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cordoned: bool,
    /// True once it has a deletion timestamp.
    pub deleting: bool,
    /// Digest of the template it was made from (annotation `valkeeper.io/revision`).
    pub revision: Digest,
    /// State of the Valkey container.
    pub container: ContainerPhase,
    /// Value of the role label, `None` if it has none.
    pub role_label: Option<RoleLabel>,
    /// Why it does not run, in the words of the scheduler, kubelet or what ended in it, once that has stood for a moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// The label `valkeeper.io/role` of a pod: for people, for the `-replicas` Service, and for the pod's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RoleLabel {
    /// `primary`
    Primary,
    /// `replica`
    Replica,
    /// `leaving`: the pod is about to go, and its name leads nowhere any more.
    Leaving,
}

impl RoleLabel {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            RoleLabel::Primary => "primary",
            RoleLabel::Replica => "replica",
            RoleLabel::Leaving => "leaving",
        }
    }
}

/// Whom a replica follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// Nobody: the boot gate, an unreachable address that every (re)started server follows until the operator has
    /// spoken. A replica without link refuses PSYNC, so nothing can copy from it. `had_history` is false if the server
    /// started without a data file: it is *blank*.
    Gate {
        /// True if a data file was there when the server started.
        had_history: bool,
    },
    /// A member of the same cluster.
    Member(MemberId),
    /// An address that is no member's.
    Foreign(String),
}

/// State of a replica's link to its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Link {
    /// Streaming.
    Up,
    /// Not connected.
    Down,
    /// A full synchronisation is under way: the data set is incomplete.
    Syncing,
}

/// What a server says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerRole {
    /// Accepts writes and feeds replicas.
    Primary,
    /// Follows `source`.
    Replica {
        /// Whom it follows.
        source: Source,
        /// State of the link.
        link: Link,
    },
}

/// Facts about a member's valkey-server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    /// INFO `run_id`: another process has another one.
    pub run_id: String,
    /// INFO `valkey_version`.
    pub version: String,
    /// INFO `role` and the source of a replica.
    pub role: ServerRole,
    /// True while it loads its data set.
    pub loading: bool,
    /// INFO `master_replid`: the history it is on.
    pub replid: ReplId,
    /// INFO `master_replid2`: the history it was on before its last promotion; `None` if it never changed.
    pub replid2: Option<ReplId>,
    /// INFO `second_repl_offset`: up to where `replid2` is shared.
    pub replid2_offset: Option<i64>,
}

/// What the agent says of the server it looks after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerProcess {
    /// It runs and answers on the local socket, or is still starting.
    Running,
    /// It runs and has not answered on the local socket since then (the operator's clock).
    Silent {
        /// Since when.
        since: Timestamp,
    },
    /// It ended; the agent starts another at the gate. The text says how: `exit 1`, `signal 9`.
    Exited(String),
}

/// What became of the server's last stay at the boot gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gate {
    /// It is there, for this reason.
    Holding(HoldReason),
    /// The operator's word ended it.
    Commanded,
    /// It resumed as primary under its old grant, with everyone's consent and the operator away.
    Resumed,
    /// It found the holder of the grant and follows it, the operator being away.
    Attached(MemberId),
}

/// The certificate that an agent serves with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateFacts {
    /// Hex of the SHA-256 of its DER form.
    pub thumbprint: String,
    /// End of its validity.
    pub not_after: Timestamp,
}

/// Facts about one member's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentFacts {
    /// Version of its program.
    pub version: String,
    /// The highest grant it knows, with its terms.
    pub brief: Brief,
    /// How often it has consented to a holder's return: a promotion must name the number it was decided from.
    pub consents: u64,
    /// INFO `run_id` of the server that answered last on the local socket, empty if none has.
    pub run_id: String,
    /// The server it looks after.
    pub server: ServerProcess,
    /// The history that this server drew at its start, if it started without a data file. As long as it is on that and is no
    /// primary, it has nothing.
    #[serde(default)]
    pub drawn: Option<ReplId>,
    /// The last stay at the gate.
    pub gate: Gate,
    /// True once it was told to end (SIGTERM).
    pub leaving: bool,
    /// True while it has the port of clients, and passes them on to the primary.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub relays: bool,
    /// How the last server ended that never answered, with its last lines; `None` since one answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<String>,
    /// The settings that this server began with or took since, of those that it takes while it runs; `None`: the agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Digest>,
    /// True while there is no space left for its data.
    #[serde(default)]
    pub disk_full: bool,
    /// How often the kernel has killed a process of the pod for want of memory.
    #[serde(default)]
    pub oom_kills: u64,
    /// True while it keeps its primary from accepting writes, because nobody confirms it.
    pub writes_stopped: bool,
    /// What it serves with.
    pub certificate: CertificateFacts,
}

/// What a member's node says of itself and of the Valkey Cluster that it is in (`CLUSTER NODES`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Its id, kept in `nodes.conf`.
    pub id: NodeId,
    /// The node that it replicates; `None`: it is a primary, whatever gate it may be behind.
    pub primary: Option<NodeId>,
    /// Its config epoch, or its primary's.
    pub epoch: u64,
    /// The slots that it serves by its own word.
    pub slots: SlotSet,
    /// The nodes that it has met, with the IP address at which it knows each.
    pub knows: BTreeMap<NodeId, Option<String>>,
    /// Addresses of nodes that it was told to meet and has not reached yet.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub meeting: BTreeSet<String>,
    /// Those nodes that are held for dead: by a majority of the primaries (`fail`), or, where none is reached, by this node (`fail?`).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub failed: BTreeSet<NodeId>,
    /// Slots that have an owner, not held for dead, by its view.
    pub covered: u16,
    /// Slots that it is handing over (`CLUSTER GETSLOTMIGRATIONS`), and what came of the last try if that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<Export>,
    /// True if that could not be read though its server answers: nobody knows what it is handing over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exports_unread: bool,
    /// The last job that was to bring it slots, if it came to nothing: what it says itself, beside what its source says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_failed: Option<ImportFailed>,
    /// Slots of its own that are open: they leave key by key (`SETSLOT MIGRATING`), with the node that gets each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub migrating: BTreeMap<u16, NodeId>,
    /// Slots that are open at this end: they come key by key (`SETSLOT IMPORTING`), with the node that gives each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub importing: BTreeMap<u16, NodeId>,
    /// True if it refuses its clients (`cluster_state:fail`), as it does for two seconds after its start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub down: bool,
}

impl NodeFacts {
    /// True if it has met this node and knows it at that IP address.
    pub fn knows_at(&self, node: &NodeId, address: &str) -> bool {
        self.knows.get(node).is_some_and(|known| known.as_deref() == Some(address))
    }

    /// True while it is handing slots over atomically, as far as it said.
    pub fn has_job(&self) -> bool {
        self.exports.iter().any(|export| match export.state {
            ExportState::Running => true,
            ExportState::Failed(_) => false,
        })
    }
}

/// A job of atomic slot migration, as its source tells it. One that succeeded is not kept: whose slots they are says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The slots.
    pub slots: SlotSet,
    /// The node that gets them.
    pub to: NodeId,
    /// How far it is.
    pub state: ExportState,
}

/// A job of atomic slot migration that came to nothing, as its target tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportFailed {
    /// The node that was to give the slots.
    pub from: NodeId,
    /// Valkey's own words.
    pub words: String,
}

/// How far a job of atomic slot migration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExportState {
    /// Under way, or queued behind another.
    Running,
    /// It came to nothing; every slot stayed. Valkey's own words.
    Failed(String),
}

/// Facts about one member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberFacts {
    /// Its pod. `Absent`: the API server says there is none of that name.
    pub pod: Observed<PodFacts>,
    /// Its server. `Absent`: the process is proven gone (the held connection ended and a new one is refused, or the
    /// pod is absent). Silence is `Unknown`.
    pub server: Observed<ServerFacts>,
    /// Its agent. `Absent`: there is no pod.
    #[serde(default)]
    pub agent: Observed<AgentFacts>,
    /// Its node in a Valkey Cluster, as it said last. In a look: `None` if it did not say.
    #[serde(default)]
    pub node: Option<NodeFacts>,
}

/// Where the write Service of a shard points.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteFacts {
    /// The address listed, `None` if the slice lists none.
    pub address: Option<String>,
    /// resourceVersion of the EndpointSlice: the precondition of the next move.
    pub resource_version: String,
}

/// Kind of an object the operator owns. The order is the order of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// Passwords and connection details.
    Secret,
    /// Rendered valkey.conf.
    ConfigMap,
    /// A Service.
    Service,
    /// The write Service's EndpointSlice (its metadata; the address is routing, see [`RouteFacts`]).
    EndpointSlice,
    /// PodDisruptionBudget.
    PodDisruptionBudget,
    /// A shard's workload.
    StatefulSet,
}

/// An owned object: kind and name, written `StatefulSet/orders-0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ObjectRef {
    /// Kind.
    pub kind: ObjectKind,
    /// Name; the namespace is the cluster's.
    pub name: String,
}

/// What is there of an owned object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveObject {
    /// `metadata.uid`.
    pub uid: String,
    /// Digest of the fields the operator wants, as they are on the server now.
    pub digest: Digest,
    /// StatefulSets only: revision (annotation `valkeeper.io/revision`) of the pod template on the server.
    #[serde(default)]
    pub revision: Option<Digest>,
    /// Who wrote it last, if that was not the operator (field manager from managedFields).
    #[serde(default)]
    pub foreign_manager: Option<String>,
    /// Whose it is, if it is not this resource's: it only has a name that this resource needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_by: Option<String>,
    /// StatefulSets only: why its pods are not made, in the words of whoever refuses them. In words, as no rule depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods_refused: Option<String>,
}

impl LiveObject {
    /// An object that is somebody else's. What is in it is no concern of ours, so nothing of that is recorded.
    pub fn taken(uid: String, owner: String) -> Self {
        let (digest, revision, foreign_manager) = (Digest::default(), None, None);
        LiveObject { uid, digest, revision, foreign_manager, taken_by: Some(owner), pods_refused: None }
    }
}

/// Wanted and live state of an owned object, as digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectFacts {
    /// Digest of what rendering the current spec gives.
    pub wanted: Digest,
    /// StatefulSets only: digest of the wanted pod template, the revision its pods shall have.
    #[serde(default)]
    pub wanted_revision: Option<Digest>,
    /// StatefulSets only: shard it belongs to.
    #[serde(default)]
    pub shard: Option<ShardId>,
    /// True of what the members live by whatever the spec says: it is applied although the cluster is paused or its spec refused.
    #[serde(default)]
    pub vital: bool,
    /// True if nothing renders to it any more: its shard is not to be. `wanted` says nothing then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub surplus: bool,
    /// What is there.
    pub live: Observed<LiveObject>,
}

impl ObjectFacts {
    /// Whose the object of that name is, if it is not this resource's. It is never changed or deleted.
    pub fn taken_by(&self) -> Option<&str> {
        self.live.present()?.taken_by.as_deref()
    }
}

/// Whether the user's resource can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpecFact {
    /// Parsed and valid.
    Valid(DesiredCluster),
    /// Refused; the text names field, value and what is allowed. The last valid spec stays in force.
    Invalid(String),
    /// The resource is being deleted: whatever its spec says, it is to be let go of.
    Deleting,
}

/// A member's readings at one moment. Numbers only; never folded into state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// When the answer arrived.
    pub taken_at: Timestamp,
    /// Replication offset in bytes: a replica's `slave_repl_offset`, a primary's `master_repl_offset`.
    pub offset: i64,
    /// Replica only: milliseconds since the last byte from its source (INFO `master_last_io_seconds_ago`), `None` without link.
    pub last_io_ms: Option<i64>,
    /// Primary only: number of replicas online.
    pub replicas_online: u32,
    /// Number of keys, if it was asked (`INFO keyspace`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<u64>,
}

/// Everything a decision was made from that is not state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Readings of the members that answered.
    pub readings: BTreeMap<MemberId, Reading>,
    /// When a member whose server does not answer now was heard last in this epoch: its server, or its agent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub last_answers: BTreeMap<MemberId, Timestamp>,
}

/// What became of the effects of one recorded decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// Sequence of the deciding record.
    pub decision: Seq,
    /// One outcome for each effect, in order, with the time each ended.
    pub outcomes: Vec<(Timestamp, Outcome)>,
}

/// One look at the cluster: facts, evidence and the outcomes of what was executed since the last look.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The user's resource; `None` if it was not looked at.
    pub spec: Option<SpecFact>,
    /// Members looked at. A member that is not in the map was not looked at: what is known of it stays.
    pub members: BTreeMap<MemberId, MemberFacts>,
    /// Write routes looked at, by shard.
    pub routes: BTreeMap<ShardId, Observed<RouteFacts>>,
    /// Owned objects looked at.
    pub objects: BTreeMap<ObjectRef, ObjectFacts>,
    /// Readings.
    pub evidence: Evidence,
    /// What the slots of those hold that were asked to count; `None`: it does not tell.
    pub weights: BTreeMap<MemberId, Option<SlotWeights>>,
    /// Outcomes of executed decisions.
    pub executed: Vec<Executed>,
}

impl std::fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}/{}", self.kind, self.name)
    }
}

impl From<ObjectRef> for String {
    fn from(object: ObjectRef) -> String {
        object.to_string()
    }
}

impl TryFrom<String> for ObjectRef {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let (kind, name) = text.split_once('/').ok_or_else(|| format!("{text:?}: expected KIND/NAME"))?;
        let kind = match kind {
            "Secret" => ObjectKind::Secret,
            "ConfigMap" => ObjectKind::ConfigMap,
            "Service" => ObjectKind::Service,
            "EndpointSlice" => ObjectKind::EndpointSlice,
            "PodDisruptionBudget" => ObjectKind::PodDisruptionBudget,
            "StatefulSet" => ObjectKind::StatefulSet,
            other => return Err(format!("{other:?} is not the kind of an owned object")),
        };
        Ok(ObjectRef { kind, name: name.to_owned() })
    }
}
