//! Decisions and every reason there is. A reason's doc comment is the text of `explain CODE` and the one
//! source of its wording in conditions, Kubernetes Events, metrics and audits.

pub use crate::operation::{Operation, OperationChange, OperationKind, Phase};

use crate::{
    effect::{Effect, Promotion},
    ids::{MemberId, ReplId, Seq, ShardId, Timestamp},
};
use serde::{Deserialize, Serialize};

/// Declares a fieldless enum whose variants are reason codes; the doc comments become `explain()`.
macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $variant:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[doc = $doc])+ $variant,)+ }

        impl $name {
            /// Every code of this kind.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The code, as it appears in conditions, Kubernetes Events, metrics and replay.
            pub fn code(self) -> &'static str {
                match self { $($name::$variant => stringify!($variant)),+ }
            }

            /// What the code means, in full sentences.
            pub fn explain(self) -> &'static str {
                match self { $($name::$variant => concat!($($doc),+).trim_ascii()),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.code())
            }
        }
    };
}
pub(crate) use reasons;

reasons! {
    /// Why something was decided.
    Reason {
        /// Every member of a shard that never had a primary started blank: the first member becomes primary.
        Bootstrap,
        /// Every member of a shard that has served is blank: all that it had is gone, and it begins anew, empty. Profile Cache does that by
        /// itself, Durable when the user has said so by the annotation valkeeper.io/confirm-blank.
        DataLost,
        /// The primary's process is proven gone: its connection ended and a new one is refused, or its pod is gone. The
        /// most advanced replica of the same history becomes primary.
        PrimaryGone,
        /// The primary's server was restarted and holds at the boot gate, without serving. The most advanced member of
        /// the shard's history becomes primary.
        PrimaryRestarted,
        /// The primary has not answered within the detection window and no replica hears from it: it is fenced, by its agent
        /// that ends the server, or by deleting its pod, so that it cannot accept writes when it wakes.
        PrimarySilent,
        /// The silent or shut out primary's server or pod is gone: the most advanced replica of the same history becomes primary.
        PrimaryFenced,
        /// The silent primary cannot be confirmed by a majority any more, and its agent has stopped its writes by now: the
        /// most advanced replica becomes primary, after a majority has promised not to support the old one.
        PrimaryIsolated,
        /// The primary answers, but the cluster bus does not reach it: a majority of the primaries holds it for dead, and it refuses its
        /// clients. Its agent ends it, and a replica in sync that the bus does reach takes over. Look at what blocks port 16379 of its pod.
        PrimaryShutOut,
        /// All members of a shard hold at the boot gate: the most advanced history resumes.
        ShardResumed,
        /// Someone else made another member primary: the live cluster is right, and the operator follows it.
        ExternalPromotion,
        /// A cluster without recorded history runs already: its primary is taken over as it is.
        Adopted,
        /// A person or a planned operation asked for another primary.
        Switchover,
        /// The write Service pointed elsewhere than to the primary.
        RouteMoved,
        /// No server of the shard is left but those that are about to go, and none serves: the write Service lists nobody, so that a client
        /// is refused at once and tries again. A connection to an address that is gone would wait for its timeout.
        RouteClosed,
        /// Pods of a Valkey Cluster are about to go, and are no primaries: their own Services lead nowhere while their
        /// addresses still refuse. A client is refused at once then; a connection to an address that is gone would wait for its timeout.
        NameWithdrawn,
        /// A role label did not say what the member is.
        RoleLabelled,
        /// The primary is about to stop (its pod is being deleted, or its agent was told to end): another takes over first.
        PrimaryLeaving,
        /// The primary's node is cordoned, so its pod is about to go: a member on a node that takes pods becomes primary, before anything is
        /// deleted. Not while planned changes are paused.
        NodeCordoned,
        /// An agent did not know who holds the shard's grant, who the members are, or how long a primary goes on unconfirmed.
        AgentBriefed,
        /// Agents know of a higher grant than the primary's, which came to nothing: the primary gets a new one.
        GrantRenewed,
        /// A member did not follow its shard's primary.
        MemberAttached,
        /// A primary without the highest grant follows the rightful one; what only it had is named in the record.
        StalePrimaryDemoted,
        /// A member's node did not know another where that is now: it is introduced, and gossip tells the rest.
        NodesMet,
        /// A node id that no member has any more, and that nobody reaches, was still known.
        NodesForgotten,
        /// Every shard of a new Valkey Cluster has a primary and no node owns any slot: the slots are given out.
        SlotsAssigned,
        /// Slots had no owner: the shard that had them last gets them again; those of which nobody knows that are given out if the user
        /// has confirmed that they are empty.
        SlotsReclaimed,
        /// The slots were not where the spec wants them: shards that have more than their share hand some over, data and all.
        SlotsHandedOver,
        /// Slots were left half moved, by a crash, by a person or by a wish that was taken back: they are finished, or closed where they are.
        SlotsClosed,
        /// The wish that a handover of slots was for was taken back while it was under way: it is cancelled, and every slot stays where it was.
        HandoverCancelled,
        /// Every shard that shall be there has its share of the slots, and no other has any.
        ReshardComplete,
        /// All slots are where they shall be as far as it is known: not every server told how many keys are in its slots, as its users are an
        /// older operator's or it was too slow over and over, so its slots counted like the others'.
        BalancedUncounted,
        /// The wish that slots be evened out was taken back: they stay where they are by now, and none is on its way any more.
        RebalanceWithdrawn,
        /// A shard that shall not be there any more has given its last slot: its workload is deleted. Its claims stay.
        ShardRemoved,
        /// A member that shall not be there any more is gone, and so is the Service that led to it alone.
        MemberRemoved,
        /// An owned object differed from what the spec renders to.
        ObjectApplied,
        /// A server ran with other settings than the spec's, of those that it takes while it runs: it is told them, and nobody restarts.
        SettingsChanged,
        /// A new revision of the workload begins to roll out, replicas first.
        RolloutStarted,
        /// A member of an old revision is restarted.
        MemberRestarted,
        /// Every member runs the wanted revision and is in sync.
        RolloutComplete,
        /// The promoted member is primary, the write Service points to it and every reachable member follows it.
        FailoverComplete,
        /// The wanted member is primary.
        SwitchoverComplete,
        /// The operation cannot or need not go on; the live state is left as it is.
        OperationAbandoned,
        /// The resource is being deleted: the operator lets go of it. Volumes stay.
        Finalized,
    }
}

reasons! {
    /// Why a step waits. Waiting is not an error and ends by itself.
    WaitReason {
        /// Not everything that the step depends on has been looked at in this epoch.
        NotObserved,
        /// Effects of an earlier decision are not yet seen in the world.
        EffectsPending,
        /// The primary is silent; the detection window is not over.
        DetectionWindow,
        /// The primary does not answer the operator, but at least one replica hears from it: it is alive.
        PrimaryAliveForReplicas,
        /// The primary does not answer the operator, but its agent says that it runs and answers there: it is alive.
        PrimaryAliveForAgent,
        /// The fenced pod is not gone yet.
        FenceUnfinished,
        /// A replica that may be further ahead has not answered yet.
        CandidateUnanswered,
        /// Members of the shard have not started yet.
        MembersStarting,
        /// A replica is not linked to its primary, or still in its first synchronisation.
        ReplicaSyncing,
        /// A restarted member is not back and in sync yet.
        MemberRestarting,
        /// The object does not exist yet on the API server as it is wanted.
        ObjectMissing,
        /// The pod of the member has no address yet.
        NoAddress,
        /// Another shard's nodes elect a primary: a planned handover waits until they have, as two at once take each other's votes.
        ElectionElsewhere,
        /// Another shard is down or about to be: a primary without a replica is not restarted beside it.
        ShardDownElsewhere,
        /// Before slots move, the keys in them are counted: a moment.
        SlotsUncounted,
        /// Slots are on their way from one shard to another.
        SlotsMoving,
        /// A shard hands no slots over, or gets none, before its members are complete and nothing else is done in it.
        ShardUnready,
        /// Members of a shard that gave its last slot are not gone yet.
        ShardGoing,
        /// The last handover of slots came to nothing, or broke off: what had arrived stays there, the rest stayed. It is tried again, with
        /// growing pauses. Where Valkey or the agent said why, the words are beside this.
        HandoverOfSlotsFailed,
        /// For more than two minutes nothing has changed of slots that are on their way atomically, and Valkey neither ends the handover nor
        /// fails it. That is so where one slot has very many keys; if not, look at the logs of both servers. Put spec.shards back, or take the
        /// annotation away that asked for it, to cancel it; a restart of either server ends it, too, and no slot is lost by that.
        HandoverOfSlotsHangs,
        /// The nodes of the Valkey Cluster do not all know each other yet, or not every slot is served by every primary's view; or a planned
        /// handover waits until a majority of the primaries and the member that shall take over know each other where they are now.
        GossipUnsettled,
    }
}

reasons! {
    /// Why a step refuses to go on until someone or something changes the situation.
    BlockReason {
        /// The primary is lost and no member may be promoted; the rejected candidates and reasons are in the record. A
        /// member on another history can be named as the one to go on with by the annotation valkeeper.io/switchover.
        NoCandidate,
        /// The primary's node is unreachable and its pod cannot be fenced: it may still be accepting writes.
        NothingFenced,
        /// Two members are primary and no grant says which is rightful.
        TwoPrimaries,
        /// Every member of a shard that had data is blank. Set the annotation valkeeper.io/confirm-blank to begin anew.
        DataMissing,
        /// Several members have data and nothing proves which is the most advanced. Name the one to resume from with the
        /// annotation valkeeper.io/switchover.
        HistoriesDiverge,
        /// The primary was made to follow a server outside the cluster. The operator does not undo that.
        ForeignPrimary,
        /// Failover is set to Manual in the spec.
        FailoverManual,
        /// The spec cannot be used; the message names the field, the value and what is allowed.
        SpecInvalid,
        /// An object has a name that this resource needs, and belongs to somebody else: it is never changed or deleted. Delete it, or have
        /// its owner give it up; or make this resource anew under another name. It goes on by itself once the name is free.
        NameTaken,
        /// The namespace is being deleted: the API server makes nothing new in it, and nothing is decided any more.
        NamespaceEnds,
        /// The cluster is paused by its spec: planned changes wait, failover does not.
        Paused,
        /// A member does not start: its pod is not made or finds no place, its image cannot be had, or its server ends before it answers.
        /// The message has the words of the API server, the scheduler, of kubelet or of Valkey. It goes on by itself once that is corrected.
        MemberCannotStart,
        /// A member that was restarted with the new revision does not come up; the others keep the old one.
        RolloutStuck,
        /// A server does not take the settings of spec.config; the message has its own words. All servers run on as they are, and
        /// valkey.conf stays as it was. It is tried again with growing pauses, and at once when the spec changes.
        SettingsRefused,
        /// A rollout would restart the only member of a shard, which keeps its data in memory alone: everything in it would be gone. Set the
        /// annotation valkeeper.io/confirm-blank to a new value to have it done for all shards, one at a time; or put the spec back.
        /// Until then the members run on as they are.
        RestartEmpties,
        /// Slots have no owner, and nothing that is known says whose they were: their keys may be on volumes of shards that are not
        /// there. Raise spec.shards, so that those come back; or set the annotation valkeeper.io/confirm-blank to a new value, and
        /// the slots are given out, empty.
        SlotsUnaccounted,
        /// The asked-for primary is no member that could take over; or its node is cordoned, and another member's is not.
        SwitchoverImpossible,
    }
}

reasons! {
    /// Why a member was not chosen.
    RejectReason {
        /// It did not answer.
        NotAnswering,
        /// It is the lost primary itself.
        LostPrimary,
        /// It is loading its data set.
        Loading,
        /// It started without any data file.
        Blank,
        /// It is in the middle of a full synchronisation: its data set is incomplete.
        FullSync,
        /// It is on another history than the shard's.
        OtherHistory,
        /// It follows something that is no member of this shard.
        ForeignSource,
        /// Its link had been down for a while when the primary was lost: the primary's own disk has more, and its owner wants
        /// to keep it. The member can be named by the annotation valkeeper.io/switchover.
        NotInSync,
        /// Its offset is not known or too old.
        NoReading,
        /// Another candidate is further ahead.
        Behind,
        /// It is as far, and another comes first by ordinal.
        TieBreak,
        /// Its promotion came to nothing twice and more, less than 30 s ago or not to be tried again yet, and
        /// another candidate is as good. The outcome of that promotion says why.
        PromotionFailed,
        /// Its pod is being deleted.
        Leaving,
        /// Its agent does not answer: nothing can be told to it.
        AgentAway,
    }
}

reasons! {
    /// Why an agent keeps its restarted server at the boot gate.
    HoldReason {
        /// The operator is there, or was until a moment ago: it decides.
        ForOperator,
        /// The server is starting, or loading its data.
        Starting,
        /// Another member holds the shard's grant: this one waits for it, or for the operator.
        NotHolder,
        /// A member of the shard has not answered since this boot: it may be ahead.
        PeerUnanswered,
        /// A member knows of a higher grant than this one's.
        HigherGrant,
        /// The server started without data: it must not become primary by itself.
        BlankData,
        /// Another member is primary without a grant that says so.
        OtherPrimary,
        /// A member's data is proven to be ahead.
        PeerAhead,
        /// A replica kept running while this server did not, and nothing orders the two: it may have more.
        ReplicaKeptRunning,
        /// A member refused its consent; it is asked again.
        ConsentRefused,
    }
}

/// What a verdict or an operation is about. A wait or block holds later steps of its own scope only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// The whole cluster.
    Cluster,
    /// One shard.
    Shard(ShardId),
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scope::Cluster => write!(f, "cluster"),
            Scope::Shard(id) => write!(f, "shard {id}"),
        }
    }
}

/// The rules, in the order of the table `STEPS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StepName {
    /// Is there anything to decide on.
    Guard,
    /// Deletion of the resource.
    Finalize,
    /// Unplanned promotion.
    Failover,
    /// Write Service and role labels.
    Routing,
    /// Owned objects.
    Objects,
    /// Who follows whom; first primary; planned promotion.
    Membership,
    /// Which node of a Valkey Cluster knows which; whose slots are whose.
    Gossip,
    /// Which shard shall have which slots.
    Reshard,
    /// What servers take of their configuration while they run.
    Settings,
    /// Planned restarts.
    Rollout,
}

/// A member that was considered for promotion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The member.
    pub member: MemberId,
    /// Offset at which it was judged, if known.
    pub offset: Option<i64>,
    /// `None`: chosen. Else why not.
    pub rejected: Option<RejectReason>,
}

/// Writes that only a demoted or returning member has and that its next synchronisation discards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discard {
    /// The member.
    pub member: MemberId,
    /// Its history.
    pub replid: ReplId,
    /// How far it was.
    pub offset: i64,
    /// How far the rightful primary shares that history; `None` if it does not share it at all.
    pub kept_offset: Option<i64>,
}

/// One decision: a reason and the ordered effects that follow from it. Each effect runs only if the one before is verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The rule that decided.
    pub step: StepName,
    /// What it is about.
    pub scope: Scope,
    /// Why.
    pub reason: Reason,
    /// The member that caused it, if one did.
    pub about: Option<MemberId>,
    /// How it changes an operation.
    pub operation: Option<OperationChange>,
    /// The member that gets the shard's grant by this decision.
    pub grant: Option<MemberId>,
    /// Members considered for promotion, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// Writes that will be lost by it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub discards: Vec<Discard>,
    /// What to do, in order.
    pub effects: Vec<Effect>,
    /// Set if this repeats a decision whose outcome is unknown: its effects keep the ids of that record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reissue_of: Option<Seq>,
}

impl Decision {
    /// A decision without operation, grant, candidates or effects; the steps fill in what they need.
    pub fn new(step: StepName, scope: Scope, reason: Reason) -> Self {
        Decision {
            step,
            scope,
            reason,
            about: None,
            operation: None,
            grant: None,
            candidates: Vec::new(),
            discards: Vec::new(),
            effects: Vec::new(),
            reissue_of: None,
        }
    }

    /// Who takes over if nodes of a Valkey Cluster hand over, which asks the other shards' primaries for their votes.
    pub fn successor_of_a_node(&self) -> Option<MemberId> {
        self.effects.iter().find_map(|effect| {
            if let Effect::Handover { to, node: Some(_), .. } = effect { Some(to.member) } else { None }
        })
    }

    /// True if primaries of a Valkey Cluster are asked for their votes.
    pub fn elects(&self) -> bool {
        let forces = |effect: &Effect| matches!(effect, Effect::Promote { by: Promotion::Force, .. });
        self.successor_of_a_node().is_some() || self.effects.iter().any(forces)
    }

    /// True if members are asked before its promotion: they promise not to support the present holder any more,
    /// or are told whose the grant is.
    pub fn promises(&self) -> bool {
        let asks = |effect: &Effect| matches!(effect, Effect::Promise { .. } | Effect::Brief { .. });
        self.promotes() && self.decisive().iter().any(asks)
    }

    /// What must be done before the others of its effects are of any use: as far as the promotion, or the
    /// first.
    pub fn decisive(&self) -> &[Effect] {
        let promotes = |e: &Effect| matches!(e, Effect::Promote { .. } | Effect::Handover { .. });
        let last = self.effects.iter().position(promotes).unwrap_or(0);
        self.effects.get(..=last).unwrap_or_default()
    }

    /// True if it promotes or hands over: such a decision is executed at once or not at all.
    pub fn promotes(&self) -> bool {
        self.effects.iter().any(|e| matches!(e, Effect::Promote { .. } | Effect::Handover { .. }))
    }
}

/// A step that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// The rule.
    pub step: StepName,
    /// What it holds.
    pub scope: Scope,
    /// Why.
    pub reason: WaitReason,
    /// The member waited for, if it is one.
    pub about: Option<MemberId>,
}

/// A step that is blocked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// The rule.
    pub step: StepName,
    /// What it holds.
    pub scope: Scope,
    /// Why.
    pub reason: BlockReason,
    /// The member it is about, if it is one.
    pub about: Option<MemberId>,
    /// Members considered and refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
}

/// What `decide()` found, without the decisions themselves: recorded when it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Steps that wait.
    pub waits: Vec<Wait>,
    /// Steps that are blocked.
    pub blocks: Vec<Block>,
}

/// Result of `decide()`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Decisions, each of another scope; they may be executed side by side.
    pub decisions: Vec<Decision>,
    /// Waits and blocks.
    pub standing: Standing,
    /// When to look again even if nothing wakes the driver.
    pub wake_at: Option<Timestamp>,
}
