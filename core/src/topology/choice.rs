//! Who may become primary, and who is first. Never a member that is loading, blank, half synchronised or on a history
//! that is not the shard's.

use crate::{
    decide::View,
    decision::{Candidate, RejectReason},
    ids::{MemberId, ShardId},
    observation::{Link, Observed, ServerFacts, ServerRole, Source},
    spec::Profile,
    state::{MemberState, ShardState},
};

/// How far a member's history can be compared with the shard's. Later is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Lineage {
    /// It has data, but nothing says which: Valkey does not keep the replication id in an append-only file. Counts only
    /// if nobody of known lineage is there.
    Unproven,
    /// The history that the shard's last primary continued when it was promoted.
    Parent,
    /// The history of the shard's last primary.
    Current,
    /// A history that continues it: someone else promoted a member before the operator could see it.
    Continued,
}

/// The result of looking at every member of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The best member, if any may be promoted.
    pub chosen: Option<MemberId>,
    /// Everyone, best first, with the reason for each that was not chosen.
    pub candidates: Vec<Candidate>,
    /// Members that have data of unproven lineage, if that is why nobody was chosen.
    pub unproven: Vec<MemberId>,
}

/// Looks at every member of a shard. `lost` is the primary that is gone or silent and cannot be chosen, if it is.
pub fn choose(view: &View<'_>, shard: ShardId, lost: Option<MemberId>) -> Choice {
    let known = view.shard(shard);
    let mut eligible: Vec<(Lineage, i64, MemberId)> = Vec::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    for (id, _) in view.state.members_of(shard) {
        match judge(view, &known, id, lost) {
            Ok((lineage, offset)) => eligible.push((lineage, offset, id)),
            Err(why) => candidates.push(Candidate {
                member: id,
                offset: view.reading(id).map(|r| r.offset),
                rejected: Some(why),
            }),
        }
    }
    // Most advanced first; of equals, the lowest ordinal.
    eligible.sort_by(|a, b| (b.0, b.1).cmp(&(a.0, a.1)).then(a.2.cmp(&b.2)));
    let chosen = settle(view, &known, &eligible);
    let best = chosen.and_then(|c| eligible.iter().find(|e| e.2 == c)).map(|e| (e.0, e.1));
    let unproven = eligible.iter().filter(|e| e.0 == Lineage::Unproven).map(|e| e.2).collect();
    let judged = eligible.into_iter().map(|(lineage, offset, member)| Candidate {
        member,
        offset: Some(offset),
        rejected: match (chosen == Some(member), best) {
            (true, _) => None,
            (false, None) => Some(RejectReason::OtherHistory),
            (false, Some(b)) if b == (lineage, offset) => Some(RejectReason::TieBreak),
            (false, Some(_)) => Some(RejectReason::Behind),
        },
    });
    let mut all: Vec<Candidate> = judged.collect();
    all.sort_by_key(|c| c.rejected.is_some());
    all.extend(candidates);
    Choice { chosen, candidates: all, unproven: if chosen.is_none() { unproven } else { Vec::new() } }
}

/// The best of the eligible. Members of unproven lineage are only chosen if nobody of known lineage is there, and then
/// only one that is singled out: the only one, the last holder, or the one that the user names.
fn settle(view: &View<'_>, known: &ShardState, eligible: &[(Lineage, i64, MemberId)]) -> Option<MemberId> {
    let (best, _, first) = eligible.first()?;
    match best {
        Lineage::Continued | Lineage::Current | Lineage::Parent => Some(*first),
        Lineage::Unproven => {
            let named = view.spec.switchover.as_ref().map(|w| w.to);
            let singled = |id: Option<MemberId>| id.filter(|i| eligible.iter().any(|e| e.2 == *i));
            let only = (eligible.len() == 1).then_some(*first);
            only.or(singled(named)).or(singled(known.holder().map(|(h, _)| h)))
        }
    }
}

fn judge(
    view: &View<'_>,
    known: &ShardState,
    id: MemberId,
    lost: Option<MemberId>,
) -> Result<(Lineage, i64), RejectReason> {
    if lost == Some(id) {
        return Err(RejectReason::LostPrimary);
    }
    let member = view.member(id).ok_or(RejectReason::NotAnswering)?;
    let facts = match &member.facts.server {
        Observed::Unknown(_) | Observed::Absent => return Err(RejectReason::NotAnswering),
        Observed::Present(facts) => facts,
    };
    if member.facts.pod.present().is_none() || view.state.is_leaving(id) {
        return Err(RejectReason::Leaving);
    }
    if facts.loading {
        return Err(RejectReason::Loading);
    }
    if member.is_blank() {
        return Err(RejectReason::Blank);
    }
    let named = view.spec.switchover.as_ref().is_some_and(|w| w.to == id && view.is_open(&w.token));
    let lineage = match lineage(known, facts) {
        // The user says that this is the data to go on with.
        Err(RejectReason::OtherHistory) if named => Lineage::Unproven,
        judged => judged?,
    };
    let reading = view.reading(id).ok_or(RejectReason::NoReading)?;
    Ok((lineage, reading.offset))
}

fn lineage(known: &ShardState, facts: &ServerFacts) -> Result<Lineage, RejectReason> {
    let gated = match &facts.role {
        ServerRole::Primary => false,
        ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ } => {
            return Err(RejectReason::Blank);
        }
        ServerRole::Replica { source: _, link: Link::Syncing } => return Err(RejectReason::FullSync),
        ServerRole::Replica { source: Source::Foreign(_), link: _ } => {
            return Err(RejectReason::ForeignSource);
        }
        ServerRole::Replica { source: Source::Gate { had_history: true }, link: _ } => true,
        ServerRole::Replica { source: Source::Member(_), link: _ } => false,
    };
    if known.history.as_ref() == Some(&facts.replid) {
        Ok(Lineage::Current)
    } else if known.history.is_some() && known.history == facts.replid2 {
        Ok(Lineage::Continued)
    } else if known.parent_history.as_ref() == Some(&facts.replid) {
        Ok(Lineage::Parent)
    } else if gated || known.history.is_none() {
        Ok(Lineage::Unproven)
    } else {
        Err(RejectReason::OtherHistory)
    }
}

/// True if no wanted member of the shard has any data. Who does not answer may have some, except a cache's member
/// without a pod: its data went with the pod.
pub fn all_blank(view: &View<'_>, shard: ShardId) -> bool {
    let blank =
        |m: &MemberState| m.is_blank() || (view.spec.profile == Profile::Cache && m.facts.pod.is_absent());
    view.wanted(shard).all(|id| view.member(id).is_some_and(blank))
}

/// The first wanted member that has not answered in this look: it might be further ahead than any candidate.
pub fn unanswered(view: &View<'_>, shard: ShardId, lost: Option<MemberId>) -> Option<MemberId> {
    view.wanted(shard).filter(|id| Some(*id) != lost).find(|id| {
        view.member(*id).is_none_or(|m| match &m.facts.server {
            Observed::Unknown(_) => true,
            Observed::Absent => false,
            Observed::Present(_) => view.reading(*id).is_none(),
        })
    })
}
