//! What becomes of a restarted server: it starts at the boot gate, where it serves nobody and feeds nobody, and leaves
//! it by the operator's word or by this rule. Rows of the table in `docs/BOOT-GATE.md` are the arms of [`judge`].

use super::ledger::Ledger;
use crate::{
    decision::HoldReason,
    ids::{MemberId, ReplId, Seq},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Offset of a history of which nothing is known.
pub const HISTORY_NONE: i64 = -1;

/// How far a member is on which history of writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The history.
    pub replid: ReplId,
    /// Replication offset in bytes.
    pub offset: i64,
    /// The history that this one continues and its first offset that is no longer shared, if it continues one.
    #[serde(default)]
    pub before: Option<(ReplId, i64)>,
}

/// What is known of a member's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// It started without a data file.
    Blank,
    /// It has data, and nothing says how far it is (an append-only file after a crash).
    Unproven,
    /// It has data up to here.
    Proven(History),
}

/// What a peer's server is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerServer {
    /// It is primary and may accept writes.
    Primary,
    /// It has been running as replica since before the holder was lost; linked or not.
    Running(Data),
    /// It was restarted and holds at its own gate.
    AtGate(Data),
    /// It is loading, in a first synchronisation, or not there: its data cannot be told yet.
    Starting,
}

/// A peer's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAnswer {
    /// The highest grant it knows.
    pub grant: Seq,
    /// Whose that is.
    pub holder: Option<MemberId>,
    /// Its server.
    pub server: PeerServer,
}

/// What a server at the gate shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Stay.
    Hold(HoldReason, Option<MemberId>),
    /// Follow this member, which serves.
    Attach(MemberId),
    /// Ask every peer for its consent, and become primary again under the old grant when all have given it.
    Resume,
}

/// Judges a server at the gate. `answers` are those given since this boot; `operator_away`: it has not been heard of for a
/// while, so nobody else will decide.
pub fn judge(
    me: MemberId,
    ledger: &Ledger,
    data: &Data,
    operator_away: bool,
    answers: &BTreeMap<MemberId, PeerAnswer>,
) -> Verdict {
    if !operator_away {
        return Verdict::Hold(HoldReason::ForOperator, None);
    }
    if let Some(id) = live_holder(ledger, answers) {
        return Verdict::Attach(id);
    }
    if ledger.brief.holder != Some(me) {
        return Verdict::Hold(HoldReason::NotHolder, ledger.brief.holder);
    }
    let unanswered = |id: &MemberId| answers.get(id).is_none_or(|a| a.server == PeerServer::Starting);
    if let Some(missing) = ledger.peers(me).find(unanswered) {
        return Verdict::Hold(HoldReason::PeerUnanswered, Some(missing));
    }
    if let Some((id, _)) = answers.iter().find(|(_, a)| a.grant > ledger.brief.grant) {
        return Verdict::Hold(HoldReason::HigherGrant, Some(*id));
    }
    if *data == Data::Blank {
        return Verdict::Hold(HoldReason::BlankData, None);
    }
    for (id, answer) in answers {
        if let Some(reason) = ahead(data, &answer.server) {
            return Verdict::Hold(reason, Some(*id));
        }
    }
    Verdict::Resume
}

/// The member that serves under a grant as high as is known here, or higher: whom to follow with the operator away, from the gate or
/// from a link that leads to where nobody is any more.
pub fn live_holder(ledger: &Ledger, answers: &BTreeMap<MemberId, PeerAnswer>) -> Option<MemberId> {
    let serving = |(id, a): &(&MemberId, &PeerAnswer)| {
        a.server == PeerServer::Primary && a.holder == Some(**id) && a.grant >= ledger.brief.grant
    };
    answers.iter().filter(serving).max_by_key(|(_, a)| a.grant).map(|(id, _)| *id)
}

/// The member that a writer is passed on to: it serves, and nobody knows of a higher grant than its own.
pub fn passes_to(ledger: &Ledger, answers: &BTreeMap<MemberId, PeerAnswer>) -> Option<MemberId> {
    let highest = answers.values().map(|answer| answer.grant).max()?;
    live_holder(ledger, answers).filter(|id| answers.get(id).is_some_and(|answer| answer.grant == highest))
}

/// Why a peer's data keeps this member from going on, if it does.
fn ahead(mine: &Data, peer: &PeerServer) -> Option<HoldReason> {
    match peer {
        // Someone else made it so; only the operator can say who is right.
        PeerServer::Primary => Some(HoldReason::OtherPrimary),
        PeerServer::Starting => Some(HoldReason::PeerUnanswered),
        PeerServer::Running(theirs) => match order(mine, theirs) {
            Order::NotBehind => None,
            Order::Behind => Some(HoldReason::PeerAhead),
            Order::Unknown => Some(HoldReason::ReplicaKeptRunning),
        },
        PeerServer::AtGate(theirs) => match order(mine, theirs) {
            // Nothing orders them: the last holder goes on.
            Order::NotBehind | Order::Unknown => None,
            Order::Behind => Some(HoldReason::PeerAhead),
        },
    }
}

enum Order {
    NotBehind,
    Behind,
    Unknown,
}

/// How my data stands against a peer's.
fn order(mine: &Data, theirs: &Data) -> Order {
    match (mine, theirs) {
        (_, Data::Blank) => Order::NotBehind,
        (Data::Blank, Data::Unproven | Data::Proven(_)) => Order::Behind,
        (Data::Unproven, _) | (_, Data::Unproven) => Order::Unknown,
        (Data::Proven(a), Data::Proven(b)) => {
            if a.replid == b.replid {
                return if a.offset >= b.offset { Order::NotBehind } else { Order::Behind };
            }
            let continues = |later: &History, earlier: &History| {
                later.before.as_ref().is_some_and(|(id, at)| *id == earlier.replid && earlier.offset < *at)
            };
            if continues(a, b) {
                Order::NotBehind
            } else if continues(b, a) {
                Order::Behind
            } else {
                Order::Unknown
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Brief;

    #[test]
    fn a_writer_is_passed_on_only_to_who_serves_under_the_highest_grant_anybody_knows() {
        let [one, two] = [1, 2].map(|ordinal| MemberId::new(0, ordinal));
        let says = |grant: u64, holder: MemberId, server: PeerServer| PeerAnswer {
            grant: Seq(grant),
            holder: Some(holder),
            server,
        };
        let running = || PeerServer::Running(Data::Blank);
        let ledger = Ledger { brief: Brief { grant: Seq(5), ..Brief::default() }, ..Ledger::default() };
        let to = |answers: [(MemberId, PeerAnswer); 2]| passes_to(&ledger, &answers.into());
        let serves = || says(9, one, PeerServer::Primary);
        assert_eq!(passes_to(&ledger, &BTreeMap::new()), None);
        assert_eq!(to([(one, serves()), (two, says(5, one, running()))]), Some(one));
        assert_eq!(to([(one, serves()), (two, says(10, two, running()))]), None, "a promotion has begun");
        assert_eq!(to([(one, serves()), (two, says(10, two, PeerServer::Primary))]), Some(two));
        assert_eq!(to([(one, says(9, two, PeerServer::Primary)), (two, says(9, two, running()))]), None);
        assert_eq!(to([(one, says(4, one, PeerServer::Primary)), (two, says(4, one, running()))]), None);
    }
}
