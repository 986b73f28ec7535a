//! What the operator does to the world. An effect is complete: who, where, and what must still be true, so that the
//! executor has no choices. Names are imperative.

use crate::ids::{Digest, MemberId, NodeId, ReplId, ShardId};
use crate::observation::{ObjectRef, RoleLabel};
use crate::slots::SlotSet;
use serde::{Deserialize, Serialize};

/// A promotion is made at once or not at all: what it was decided from is no longer so after this long. Ten
/// times what look, append and effects take together. Milliseconds.
pub const DECISION_AGE_MAX_MS: u64 = 500;

/// The same for a promotion that follows promises or briefs in its decision: they alone may take until
/// [`DECISION_AGE_MAX_MS`] to begin and 400 ms to end, and a promotion that comes to nothing after them costs
/// the whole way once more. That what it was decided from is still so, the agent checks at the server:
/// process, history and offset. Milliseconds.
const PROMISED_AGE_MAX_MS: u64 = 1_500;

/// A pod or an object is deleted, a server ended, a node forgotten, or a slot given out for what was seen of
/// all, and while an append hangs a silent primary may have come back. Longer than any append of a healthy
/// API server, and no longer than a few turns: what is still so then is decided again. Milliseconds.
const DELETION_AGE_MAX_MS: u64 = 2_000;

/// A server process: a member's address and the `run_id` that must answer there. Another run id is another process,
/// and the effect is superseded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// The member.
    pub member: MemberId,
    /// IP address of its pod.
    pub address: String,
    /// INFO `run_id` that must answer.
    pub run_id: String,
}

/// How a server becomes primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Promotion {
    /// `REPLICAOF NO ONE`.
    #[default]
    Detach,
    /// Its node is a primary already: only the gate is opened.
    Open,
    /// `CLUSTER FAILOVER FORCE`: a majority of the primaries votes for it.
    Force,
    /// `CLUSTER FAILOVER TAKEOVER`: there can be no majority. What makes it safe is the fence before it.
    Takeover,
}

/// How slots are handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Means {
    /// `CLUSTER MIGRATESLOTS`, from Valkey 9.0 on: all slots of a job change hands at once, and there is nothing to clean up after a crash.
    #[default]
    Atomic,
    /// `SETSLOT` and `MIGRATE`: the agent moves one slot after the other, key by key.
    ByKey,
}

impl Means {
    fn is_atomic(&self) -> bool {
        *self == Means::Atomic
    }
}

impl Promotion {
    fn is_default(&self) -> bool {
        *self == Promotion::default()
    }
}

/// One change of the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// The agent takes the shard's grant, numbered by this decision's record, and makes its server primary, if that is
    /// still a replica on history `replid` at `offset` or further.
    Promote {
        /// The server to promote.
        server: Server,
        /// History it must be on.
        replid: ReplId,
        /// Offset it must have reached.
        offset: i64,
        /// Consents that its agent must have given, no more and no less.
        #[serde(default)]
        consents: u64,
        /// How.
        #[serde(default, skip_serializing_if = "Promotion::is_default")]
        by: Promotion,
    },
    /// The agent persists that it supports no grant below this decision's record, unless it has confirmed the present
    /// holder within the isolation window.
    Promise {
        /// The member that promises.
        member: MemberId,
        /// IP address of its pod.
        address: String,
        /// The member that is to get the grant.
        candidate: MemberId,
    },
    /// The agent learns who holds the shard's grant and under which terms.
    Brief {
        /// The member that is told.
        member: MemberId,
        /// IP address of its pod.
        address: String,
    },
    /// The agent ends a server that does not answer, or that the cluster bus does not reach, with SIGKILL, and starts another at the gate. Verified when the process
    /// is gone.
    Fence {
        /// The server. Its run id must be the one the agent started last.
        server: Server,
    },
    /// `REPLICAOF` the address of `to`; in a Valkey Cluster `CLUSTER REPLICATE` its node. A gate is opened by it.
    Attach {
        /// The server that shall follow.
        server: Server,
        /// Whom it shall follow.
        to: MemberId,
        /// Address of `to`.
        to_address: String,
        /// Node of `to`, in a Valkey Cluster.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<NodeId>,
    },
    /// Pause writes, wait until `to` has everything, make the old primary follow it, promote it. Verified when `to` is
    /// primary.
    Handover {
        /// The primary.
        from: Server,
        /// The replica that takes over.
        to: Server,
        /// Consents that the agent of `to` must have given, no more and no less.
        #[serde(default)]
        consents: u64,
        /// Bound on the wait; after it the primary goes on as before. Milliseconds.
        timeout_ms: u32,
        /// Node of `from`, in a Valkey Cluster: there the two servers do all of it among themselves (`CLUSTER FAILOVER`).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<NodeId>,
    },
    /// `CLUSTER MEET`: the node of `server` is told where a member is.
    Meet {
        /// Who is told.
        server: Server,
        /// Who is to be met.
        member: MemberId,
        /// IP address of its pod, where its own agent must be.
        address: String,
    },
    /// `CLUSTER ADDSLOTSRANGE`: slots that nobody owns get an owner.
    AddSlots {
        /// The primary that gets them.
        server: Server,
        /// Its node.
        node: NodeId,
        /// The slots.
        slots: SlotSet,
        /// Config epoch to begin with, of a node that has met nobody yet.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        epoch: Option<u64>,
    },
    /// The node of `server` hands slots over, data and all. Verified when the job is accepted: whether it comes to its end is seen in the
    /// nodes. To itself: what is under way atomically is cancelled, all of it, and slots that are open are closed where they are.
    MigrateSlots {
        /// The primary that gives them.
        server: Server,
        /// The slots.
        slots: SlotSet,
        /// The primary that gets them.
        to: MemberId,
        /// Its node.
        node: NodeId,
        /// How many keys that should be, if it is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keys: Option<u64>,
        /// How.
        #[serde(default, skip_serializing_if = "Means::is_atomic")]
        by: Means,
    },
    /// `CLUSTER FORGET`: a node that is nobody's any more.
    Forget {
        /// Who forgets.
        server: Server,
        /// The node.
        node: NodeId,
    },
    /// Moves the write Service's EndpointSlice by one compare-and-swap.
    Route {
        /// The shard whose slice moves.
        shard: ShardId,
        /// The member it shall list.
        to: MemberId,
        /// Address to list.
        address: String,
        /// resourceVersion the slice must still have.
        resource_version: String,
    },
    /// Empties the write Service's EndpointSlice by one compare-and-swap: who connects is refused at once.
    Unroute {
        /// The shard whose slice it is.
        shard: ShardId,
        /// resourceVersion the slice must still have.
        resource_version: String,
    },
    /// Sets the role label of a pod.
    Label {
        /// The member.
        member: MemberId,
        /// UID the pod must have.
        pod_uid: String,
        /// The label.
        role: RoleLabel,
    },
    /// `CONFIG SET`: a running server takes the settings of the spec, all or none.
    Configure {
        /// The server.
        server: Server,
        /// The settings that the spec must still have.
        settings: Digest,
    },
    /// `CLIENT KILL TYPE normal` on a demoted server, so that clients look for the new primary.
    Disconnect {
        /// The server.
        server: Server,
    },
    /// Deletes a pod, by UID. As a fence (`grace_s` 1) or for a planned restart.
    DeletePod {
        /// The member.
        member: MemberId,
        /// UID the pod must have.
        pod_uid: String,
        /// terminationGracePeriodSeconds to use, `None` for the pod's own. Seconds.
        grace_s: Option<u32>,
    },
    /// Renders the object again and applies it, if the rendering still has this digest.
    Apply {
        /// The object.
        object: ObjectRef,
        /// Digest the rendering must have.
        digest: Digest,
    },
    /// Deletes an owned object that nothing renders to any more.
    Delete {
        /// The object.
        object: ObjectRef,
        /// UID it must have.
        uid: String,
    },
    /// Takes the operator's finalizer off the user's resource.
    ReleaseFinalizer,
}

impl Effect {
    /// How long after its decision it may still begin, in milliseconds; `promised` if members are asked or told
    /// before a promotion in that. What only follows in the same decision must go on.
    pub fn age_max_ms(&self, promised: bool) -> Option<u64> {
        match self {
            Effect::Promote { .. } if promised => Some(PROMISED_AGE_MAX_MS),
            Effect::Promote { .. } | Effect::Promise { .. } | Effect::Handover { .. } => {
                Some(DECISION_AGE_MAX_MS)
            }
            Effect::DeletePod { .. }
            | Effect::Delete { .. }
            | Effect::Fence { .. }
            | Effect::AddSlots { .. }
            | Effect::MigrateSlots { .. }
            | Effect::Forget { .. } => Some(DELETION_AGE_MAX_MS),
            Effect::Attach { .. }
            | Effect::Brief { .. }
            | Effect::Meet { .. }
            | Effect::Route { .. }
            | Effect::Unroute { .. }
            | Effect::Label { .. }
            | Effect::Configure { .. }
            | Effect::Disconnect { .. }
            | Effect::Apply { .. }
            | Effect::ReleaseFinalizer => None,
        }
    }

    /// A short verb for timelines and metrics.
    pub fn verb(&self) -> &'static str {
        match self {
            Effect::Promote { .. } => "promote",
            Effect::Promise { .. } => "promise",
            Effect::Brief { .. } => "brief",
            Effect::Fence { .. } => "fence",
            Effect::Attach { .. } => "attach",
            Effect::Handover { .. } => "handover",
            Effect::Meet { .. } => "meet",
            Effect::AddSlots { .. } => "add-slots",
            Effect::MigrateSlots { .. } => "migrate-slots",
            Effect::Forget { .. } => "forget",
            Effect::Route { .. } => "route",
            Effect::Unroute { .. } => "unroute",
            Effect::Label { .. } => "label",
            Effect::Configure { .. } => "configure",
            Effect::Disconnect { .. } => "disconnect",
            Effect::DeletePod { .. } => "delete-pod",
            Effect::Apply { .. } => "apply",
            Effect::Delete { .. } => "delete",
            Effect::ReleaseFinalizer => "release-finalizer",
        }
    }
}

/// What became of an effect. Past tense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, and seen to be done.
    Verified,
    /// Not attempted: its precondition no longer held. The text says which.
    Superseded(String),
    /// Attempted and refused, or its answer is not known. The text says how.
    Failed(String),
    /// Told to a server that has refused it by its own word: nothing was changed there. The text is its words.
    Refused(String),
    /// Attempted and refused, and it will be for as long as there is this resource: its namespace ends. The text says so.
    Futile(String),
    /// Not attempted because the effect before it was not verified.
    Skipped,
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Effect::Promote { server, replid, offset, consents: _, by } => {
                let how = match by {
                    Promotion::Detach => "",
                    Promotion::Open => " by its gate",
                    Promotion::Force => " by vote",
                    Promotion::Takeover => " by takeover",
                };
                let Server { member, address, run_id: _ } = server;
                write!(f, "promote {member} ({address}) at {}:{offset}{how}", short(&replid.0))
            }
            Effect::Promise { member, candidate, address: _ } => {
                write!(f, "{member} promises to support only {candidate}")
            }
            Effect::Brief { member, address: _ } => write!(f, "brief the agent of {member}"),
            Effect::Fence { server } => write!(f, "end the server of {}", server.member),
            Effect::Attach { server, to, to_address, node: _ } => {
                write!(f, "attach {} to {to} ({to_address})", server.member)
            }
            Effect::Handover { from, to, timeout_ms, consents: _, node: _ } => {
                write!(f, "hand over {} to {} within {timeout_ms} ms", from.member, to.member)
            }
            Effect::Meet { server, member, address } => {
                write!(f, "introduce {member} ({address}) to {}", server.member)
            }
            Effect::AddSlots { server, node: _, slots, epoch: _ } => {
                write!(f, "give {} the slots {slots}", server.member)
            }
            Effect::MigrateSlots { server, slots, to, node: _, keys: _, by } if server.member == *to => {
                match by {
                    Means::Atomic => write!(f, "{to} cancels handing over {slots}"),
                    Means::ByKey => write!(f, "{to} keeps the slots {slots}, and closes those that are open"),
                }
            }
            Effect::MigrateSlots { server, slots, to, node: _, keys, by } => {
                write!(f, "{} hands the slots {slots} over to {to}", server.member)?;
                if *by == Means::ByKey {
                    write!(f, " key by key")?;
                }
                keys.map_or(Ok(()), |keys| write!(f, " (about {keys} keys)"))
            }
            Effect::Forget { server, node } => {
                write!(f, "{} forgets the node {}", server.member, short(&node.to_string()))
            }
            Effect::Route { shard, to, address, .. } => write!(f, "route shard {shard} to {to} ({address})"),
            Effect::Unroute { shard, resource_version: _ } => write!(f, "route shard {shard} to nobody"),
            Effect::Label { member, role, .. } => write!(f, "label {member} {}", role.as_str()),
            Effect::Configure { server, settings } => {
                write!(f, "configure {} ({})", server.member, short(&settings.0))
            }
            Effect::Disconnect { server } => write!(f, "disconnect clients of {}", server.member),
            Effect::DeletePod { member, pod_uid, grace_s: Some(grace) } => {
                write!(f, "delete pod of {member} (uid {}, grace {grace} s)", short(pod_uid))
            }
            Effect::DeletePod { member, pod_uid, grace_s: None } => {
                write!(f, "delete pod of {member} (uid {})", short(pod_uid))
            }
            Effect::Apply { object, digest } => write!(f, "apply {object} ({})", short(&digest.0)),
            Effect::Delete { object, uid } => write!(f, "delete {object} (uid {})", short(uid)),
            Effect::ReleaseFinalizer => write!(f, "release the finalizer"),
        }
    }
}

/// First eight characters: enough for a person to tell two ids apart.
pub fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Verified => write!(f, "verified"),
            Outcome::Superseded(why) => write!(f, "superseded: {why}"),
            Outcome::Failed(why) => write!(f, "failed: {why}"),
            Outcome::Refused(why) => write!(f, "refused: {why}"),
            Outcome::Futile(why) => write!(f, "futile: {why}"),
            Outcome::Skipped => write!(f, "skipped"),
        }
    }
}
