//! Operations: what lasts more than one turn, as data in the state that is planned anew at every turn.

use crate::{
    decision::{Reason, Scope},
    ids::{MemberId, Seq, Timestamp},
    slots::SlotSet,
    spec::Verb,
};
use serde::{Deserialize, Serialize};

/// Kind of an operation that lasts more than one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OperationKind {
    /// Unplanned promotion.
    Failover,
    /// Planned promotion.
    Switchover,
    /// Planned restarts of a shard's members.
    Rollout,
    /// Slots from shard to shard.
    Reshard,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// The old primary is being made unable to write.
    Fencing,
    /// The new primary is being promoted.
    Promoting,
    /// Members are being restarted one after the other.
    Restarting,
    /// Slots are being handed over.
    Moving,
}

/// An operation under way: data in state, re-planned at every turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Sequence of the record that opened it: its name in audits.
    pub id: Seq,
    /// Kind.
    pub kind: OperationKind,
    /// Scope.
    pub scope: Scope,
    /// Phase.
    pub phase: Phase,
    /// Who asked: `operator`, the spec by its generation, or the text of the user's token.
    pub asked_by: String,
    /// The user's word by which it goes on, if it needs one: it is spent when the operation ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub word: Option<(Verb, String)>,
    /// The member it is about: the lost primary, the wanted primary, the member being restarted.
    pub member: Option<MemberId>,
    /// Reason of the decision that opened it.
    pub cause: Reason,
    /// When it was opened.
    pub opened_at: Timestamp,
    /// When the present phase was entered.
    pub phase_since: Timestamp,
    /// Reshard only: slots that have another shard since. Count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slots_moved: u32,
    /// Reshard only: the slots that came to where they are since the wish last changed. They are not given on: what is in slots is known by
    /// and large, and what slot goes when is chosen anew all the time.
    #[serde(default, skip_serializing_if = "SlotSet::is_empty")]
    pub settled: SlotSet,
}

/// How an operation is named that the spec asked for, before its generation.
const BY_SPEC: &str = "generation ";

impl Operation {
    /// Who asked, where it was the spec.
    pub fn by_spec(generation: i64) -> String {
        format!("{BY_SPEC}{generation}")
    }

    /// True if the spec asked, and no wish that can be taken back by itself.
    pub fn is_by_spec(&self) -> bool {
        self.asked_by.starts_with(BY_SPEC)
    }
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// How a decision changes an operation of its scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationChange {
    /// Begins one.
    Open {
        /// Kind.
        kind: OperationKind,
        /// First phase.
        phase: Phase,
        /// Who asked.
        asked_by: String,
        /// The member it is about.
        member: Option<MemberId>,
    },
    /// Enters another phase, or the same phase for another member.
    Advance {
        /// Kind of the open operation.
        kind: OperationKind,
        /// Phase entered.
        phase: Phase,
        /// The member it is about now.
        member: Option<MemberId>,
    },
    /// Ends it.
    Close {
        /// Kind of the open operation.
        kind: OperationKind,
    },
}
