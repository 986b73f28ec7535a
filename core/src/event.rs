//! Everything that can be in a journal: one enum, numbered. Numbers are never reused; past tense.

use crate::{
    decision::{Decision, Standing},
    ids::{Digest, MemberId, Seq, ShardId, Timestamp, WriterEpoch},
    observation::{
        AgentFacts, Evidence, Executed, NodeFacts, ObjectFacts, ObjectRef, Observed, PodFacts, RouteFacts,
        ServerFacts, SpecFact,
    },
    weights::SlotWeights,
};
use serde::{Deserialize, Serialize};

/// How a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BaselineOrigin {
    /// A new cluster: there is no earlier history.
    Empty,
    /// The cluster was there before the journal (adopted, or the journal was lost): history begins here.
    Observed,
}

/// Why a recorded decision was closed without outcomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CloseReason {
    /// The epoch ended before its outcome was recorded, and the world asks for something else now (or already has it).
    Superseded,
    /// The epoch ended before its outcome was recorded; the same effects were decided again under the same ids.
    Reissued,
}

/// One entry of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The stream began. Always the first record.
    Baseline {
        /// `metadata.uid` of the cluster's resource: the stream's name.
        cluster_uid: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// What came before.
        origin: BaselineOrigin,
    },
    /// A writer claimed the head. Every observation is Unknown again.
    EpochStarted {
        /// Identity of the writer (pod name).
        writer: String,
        /// Version of the writer's program.
        version: String,
        /// A person accepted that records up to this one were acknowledged and are gone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lost_through: Option<Seq>,
    },
    /// The user's resource changed.
    SpecChanged(SpecFact),
    /// A member's pod changed.
    PodChanged {
        /// The member.
        member: MemberId,
        /// What is known now.
        pod: Observed<PodFacts>,
    },
    /// A member's server changed.
    ServerChanged {
        /// The member.
        member: MemberId,
        /// What is known now.
        server: Observed<ServerFacts>,
    },
    /// A member's agent, or what it knows and does, changed.
    AgentChanged {
        /// The member.
        member: MemberId,
        /// What is known now.
        agent: Observed<AgentFacts>,
    },
    /// A member's node in a Valkey Cluster, or what it knows of the others, changed.
    NodeChanged {
        /// The member.
        member: MemberId,
        /// What it says now.
        node: NodeFacts,
    },
    /// What is in the slots of a member's node was counted.
    SlotsWeighed {
        /// The member.
        member: MemberId,
        /// What it said; `None`: it does not tell.
        weights: Option<SlotWeights>,
    },
    /// The write route of a shard changed.
    RouteChanged {
        /// The shard.
        shard: ShardId,
        /// What is known now.
        route: Observed<RouteFacts>,
    },
    /// An owned object, or what is wanted of it, changed.
    ObjectChanged {
        /// The object.
        object: ObjectRef,
        /// What is known now.
        facts: ObjectFacts,
    },
    /// A decision was made. Nothing is executed that is not here.
    Decided {
        /// The decision.
        decision: Box<Decision>,
        /// The readings it was made from.
        evidence: Evidence,
    },
    /// A decision's effects ended.
    EffectsEnded(Executed),
    /// A decision without known outcome was closed.
    DecisionClosed {
        /// Sequence of the deciding record.
        decision: Seq,
        /// Why.
        how: CloseReason,
    },
    /// What is waited for, or what is blocked, changed.
    StandingChanged {
        /// The new standing.
        standing: Standing,
        /// The readings it was found with.
        evidence: Evidence,
    },
    /// The beginning of the stream was taken out of the store. What it folds to takes its place.
    Trimmed {
        /// Last record that is gone.
        through: Seq,
        /// Its hash: where the chain goes on.
        hash: Digest,
        /// SHA-256 of what stands for the records that are gone.
        folded: Digest,
        /// Where they were put before, if they were.
        archive: Option<String>,
    },
    /// From here on the stream may hold what only programs of this level can read.
    LevelRaised {
        /// The level.
        level: u32,
        /// Version of the program that wrote it: the oldest that is known to read on.
        version: String,
    },
}

impl Event {
    /// Number of the kind in a record's envelope. Never reused, never changed.
    pub fn kind(&self) -> u16 {
        match self {
            Event::Baseline { .. } => 1,
            Event::EpochStarted { .. } => 2,
            Event::SpecChanged(_) => 3,
            Event::PodChanged { .. } => 4,
            Event::ServerChanged { .. } => 5,
            Event::RouteChanged { .. } => 6,
            Event::ObjectChanged { .. } => 7,
            Event::Decided { .. } => 8,
            Event::EffectsEnded(_) => 9,
            Event::DecisionClosed { .. } => 10,
            Event::StandingChanged { .. } => 11,
            Event::AgentChanged { .. } => 12,
            Event::Trimmed { .. } => 13,
            Event::LevelRaised { .. } => 14,
            Event::NodeChanged { .. } => 15,
            Event::SlotsWeighed { .. } => 16,
        }
    }

    /// The decision, if one was made.
    pub fn decided(&self) -> Option<&Decision> {
        match self {
            Event::Decided { decision, evidence: _ } => Some(decision),
            Event::Baseline { .. }
            | Event::EpochStarted { .. }
            | Event::SpecChanged(_)
            | Event::PodChanged { .. }
            | Event::ServerChanged { .. }
            | Event::AgentChanged { .. }
            | Event::NodeChanged { .. }
            | Event::SlotsWeighed { .. }
            | Event::RouteChanged { .. }
            | Event::ObjectChanged { .. }
            | Event::EffectsEnded(_)
            | Event::DecisionClosed { .. }
            | Event::StandingChanged { .. }
            | Event::Trimmed { .. }
            | Event::LevelRaised { .. } => None,
        }
    }

    /// Layout of the payload; rises only when an old reader must not ignore a change.
    pub fn schema(&self) -> u16 {
        1
    }

    /// The kind's name in timelines and exports.
    pub fn name(&self) -> &'static str {
        match self {
            Event::Baseline { .. } => "Baseline",
            Event::EpochStarted { .. } => "EpochStarted",
            Event::SpecChanged(_) => "SpecChanged",
            Event::PodChanged { .. } => "PodChanged",
            Event::ServerChanged { .. } => "ServerChanged",
            Event::AgentChanged { .. } => "AgentChanged",
            Event::NodeChanged { .. } => "NodeChanged",
            Event::SlotsWeighed { .. } => "SlotsWeighed",
            Event::RouteChanged { .. } => "RouteChanged",
            Event::ObjectChanged { .. } => "ObjectChanged",
            Event::Decided { .. } => "Decided",
            Event::EffectsEnded(_) => "EffectsEnded",
            Event::DecisionClosed { .. } => "DecisionClosed",
            Event::StandingChanged { .. } => "StandingChanged",
            Event::Trimmed { .. } => "Trimmed",
            Event::LevelRaised { .. } => "LevelRaised",
        }
    }
}

/// An event in its place: what folding needs. The journal adds hashes around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Position in the stream.
    pub seq: Seq,
    /// Epoch of the writer.
    pub epoch: WriterEpoch,
    /// When it was written; never below the record before.
    pub time: Timestamp,
    /// What happened.
    pub event: Event,
}
