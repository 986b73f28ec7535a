//! Who may become primary, and who is first. Never a member that is loading, blank, half synchronised or on a history
//! that is not the shard's.

use crate::{
    decide::View,
    decision::{BlockReason, Candidate, RejectReason, Scope},
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::{Link, Observed, ServerFacts, ServerRole, Source},
    retry::{failing_until, refusals},
    spec::{Profile, Verb},
    state::{MemberState, ShardState, failure_key, promotion_key},
    topology::{HEARS_BELOW_MS, is_electable},
};

/// How far a member's history can be compared with the shard's. Later is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Lineage {
    /// It has data, but nothing says which: Valkey does not keep the replication id in an append-only file. Counts only
    /// if nobody of known lineage is there.
    Unproven,
    /// One that was the shard's several promotions ago.
    Ancestor,
    /// The history that the shard's last primary continued when it was promoted.
    Parent,
    /// The history of the shard's last primary.
    Current,
    /// A history that continues it: someone else promoted a member before the operator could see it.
    Continued,
}

/// Whether a member's data can be as new as the lost primary's. Later is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It runs, but had no link to the primary when that was lost.
    Detached,
    /// It restarted with what its disk has; the lost primary itself among them.
    Restarted,
    /// It was in sync, and kept running.
    InSync,
}

/// What makes one member better than another: first how its data stands, then its history, then how far it is.
type Rank = (Standing, Lineage, i64);

/// The result of looking at every member of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The best member, if any may be promoted.
    pub chosen: Option<MemberId>,
    /// True if the chosen member's history is known to be the shard's.
    pub is_proven: bool,
    /// Everyone, best first, with the reason for each that was not chosen.
    pub candidates: Vec<Candidate>,
    /// Members that have data of unproven lineage, if that is why nobody was chosen.
    pub unproven: Vec<MemberId>,
}

impl Choice {
    /// Why nobody was chosen.
    pub fn blocked(&self) -> BlockReason {
        if self.unproven.is_empty() { BlockReason::NoCandidate } else { BlockReason::HistoriesDiverge }
    }
}

/// Looks at every member of a shard. `lost` is the primary that is gone or silent and cannot be chosen, if it is.
pub fn choose(view: &View<'_>, shard: ShardId, lost: Option<MemberId>) -> Choice {
    let known = view.shard(shard);
    let mut eligible: Vec<(Rank, MemberId)> = Vec::new();
    let mut rejected: Vec<(MemberId, RejectReason)> = Vec::new();
    for (id, _) in view.state.members_of(shard) {
        match judge(view, known, id, lost) {
            Ok(rank) => eligible.push((rank, id)),
            Err(why) => rejected.push((id, why)),
        }
    }
    reject_forks(view, &mut eligible, &mut rejected);
    // Best first; of equals, one that others would elect, then the lowest ordinal.
    eligible.sort_by_cached_key(|(rank, id)| (std::cmp::Reverse(*rank), !is_electable(view, *id), *id));
    let chosen = settle(view, known, &eligible).map(|first| one_that_obeys(view, &eligible, first));
    let best = chosen.and_then(|c| eligible.iter().find(|e| e.1 == c)).map(|e| e.0);
    let mut candidates: Vec<Candidate> =
        eligible.iter().map(|(rank, member)| told(view, *rank, *member, (chosen, best))).collect();
    candidates.sort_by_key(|c| c.rejected.is_some());
    candidates.extend(rejected.into_iter().map(|(member, why)| Candidate {
        member,
        offset: view.reading(member).map(|r| r.offset),
        rejected: Some(why),
    }));
    let unproven = eligible.iter().filter(|e| e.0.1 == Lineage::Unproven && chosen.is_none()).map(|e| e.1);
    let is_proven = best.is_some_and(|(_, lineage, _)| lineage != Lineage::Unproven);
    Choice { chosen, is_proven, candidates, unproven: unproven.collect() }
}

fn told(
    view: &View<'_>,
    rank: Rank,
    member: MemberId,
    (chosen, best): (Option<MemberId>, Option<Rank>),
) -> Candidate {
    let failed = |id| failing_until(view, &promotion_key(id));
    let passed_over = failed(member).is_some() && chosen.is_some_and(|c| failed(c).is_none());
    let rejected = match (chosen == Some(member), best) {
        (true, _) => None,
        (false, None) => Some(RejectReason::OtherHistory),
        (false, Some(b)) if b == rank && passed_over => Some(RejectReason::PromotionFailed),
        (false, Some(b)) if b == rank => Some(RejectReason::TieBreak),
        (false, Some(_)) => Some(RejectReason::Behind),
    };
    Candidate { member, offset: Some(rank.2), rejected }
}

/// Of members that have the very same data, and would be elected alike, the one whose promotion did not fail
/// lately; if all did, the one that may be tried again first. Who is alone in what it has is waited for.
fn one_that_obeys(view: &View<'_>, eligible: &[(Rank, MemberId)], first: MemberId) -> MemberId {
    let history = |id: MemberId| view.member(id).and_then(|m| m.server()).map(|server| &server.replid);
    let Some((best, _)) = eligible.iter().find(|(_, id)| *id == first) else { return first };
    let is_as_good = |(rank, id): &&(Rank, MemberId)| {
        rank == best && history(*id) == history(first) && is_electable(view, *id) == is_electable(view, first)
    };
    match best.1 {
        // That one was singled out.
        Lineage::Unproven => first,
        Lineage::Ancestor | Lineage::Parent | Lineage::Current | Lineage::Continued => {
            let as_good = eligible.iter().filter(is_as_good).map(|(_, id)| *id);
            as_good.min_by_key(|id| failing_until(view, &promotion_key(*id))).unwrap_or(first)
        }
    }
}

/// Effects that make `chosen` the primary of its shard. Who was passed over is first told whose the grant is:
/// what it was told before may still reach it, and comes too late then. Where it cannot be told that either,
/// it is not waited for.
pub fn promote(view: &View<'_>, chosen: MemberId, candidates: &[Candidate]) -> Vec<Effect> {
    let scope = Scope::Shard(chosen.shard);
    let passed_over = candidates.iter().filter(|c| c.rejected == Some(RejectReason::PromotionFailed));
    let briefed = passed_over.filter_map(|c| {
        let address = view.member(c.member)?.address()?.to_owned();
        let brief = Effect::Brief { member: c.member, address };
        refusals(view, &failure_key(scope, &brief)).is_none().then_some(brief)
    });
    briefed.chain(super::promote(view, chosen)).collect()
}

/// A history that left the shard's before a member that stayed on it is now, is a fork and no continuation.
fn reject_forks(
    view: &View<'_>,
    eligible: &mut Vec<(Rank, MemberId)>,
    rejected: &mut Vec<(MemberId, RejectReason)>,
) {
    let current = eligible.iter().filter(|e| e.0.1 == Lineage::Current).map(|e| e.0.2).max();
    let is_fork = |(rank, id): &(Rank, MemberId)| {
        let left_at = view.member(*id).and_then(|m| m.server()).and_then(|s| s.replid2_offset);
        rank.1 == Lineage::Continued && current.is_some_and(|at| left_at.is_none_or(|left| left <= at))
    };
    rejected.extend(eligible.iter().filter(|e| is_fork(e)).map(|e| (e.1, RejectReason::OtherHistory)));
    eligible.retain(|e| !is_fork(e));
}

/// The best of the eligible. Members of unproven lineage are only chosen if nobody of known lineage is there,
/// and then only one that is singled out: the only one, the one that the user names now, or the last holder,
/// as the journal or the agents remember it; but who is on the very history of that one, and further,
/// provably has all of it and more.
fn settle(view: &View<'_>, known: &ShardState, eligible: &[(Rank, MemberId)]) -> Option<MemberId> {
    let ((_, best, _), first) = eligible.first()?;
    match best {
        Lineage::Continued | Lineage::Current | Lineage::Parent | Lineage::Ancestor => Some(*first),
        Lineage::Unproven => {
            let singled = |id: Option<MemberId>| id.filter(|i| eligible.iter().any(|e| e.1 == *i));
            let named = named(view);
            let only = (eligible.len() == 1).then_some(*first);
            let held = known.holder().map(|(h, _)| h).or(told_holder(view, first.shard));
            let furthest = |of: MemberId| {
                let history = |id: MemberId| view.member(id).and_then(|m| m.server()).map(|s| &s.replid);
                let alike = eligible.iter().filter(|(_, id)| history(*id) == history(of));
                alike.max_by_key(|((_, _, offset), id)| (*offset, *id == of)).map_or(of, |(_, id)| *id)
            };
            only.or(singled(named)).or(singled(held).map(furthest))
        }
    }
}

/// The member that the user names as the one whose data to go on with: since its shard has lost its primary.
pub fn named(view: &View<'_>) -> Option<MemberId> {
    let wish = view.spec.switchover.as_ref();
    let counts =
        |token: &String| view.state.named.as_ref() == Some(token) && view.is_open(Verb::Switchover, token);
    wish.filter(|wish| counts(&wish.token)).map(|wish| wish.to)
}

/// Who held the shard last, as its agents remember: for a journal that is younger than the members' volumes.
fn told_holder(view: &View<'_>, shard: ShardId) -> Option<MemberId> {
    let told = view.state.members_of(shard).filter_map(|(_, m)| m.told.as_ref());
    told.max_by_key(|told| told.grant).and_then(|told| told.holder)
}

fn judge(
    view: &View<'_>,
    known: &ShardState,
    id: MemberId,
    lost: Option<MemberId>,
) -> Result<Rank, RejectReason> {
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
    if member.agent().is_none() {
        return Err(RejectReason::AgentAway);
    }
    if facts.loading {
        return Err(RejectReason::Loading);
    }
    if member.is_blank() {
        return Err(RejectReason::Blank);
    }
    let named = named(view) == Some(id);
    let lineage = match lineage(known, &without_dead_link(view, id, facts)) {
        // The user says that this is the data to go on with.
        Err(RejectReason::OtherHistory) if named => Lineage::Unproven,
        judged => judged?,
    };
    let standing = standing(view, id, facts);
    if standing == Standing::Detached && view.spec.profile == Profile::Durable && !named {
        return Err(RejectReason::NotInSync);
    }
    let reading = view.reading(id).ok_or(RejectReason::NoReading)?;
    Ok((standing, lineage, reading.offset))
}

/// A link towards an address where no member is, from which nothing was heard for long, is dead, whatever the server says of it: its
/// primary's pod is gone, or came back with another address, and nobody has told the connection.
fn without_dead_link(view: &View<'_>, id: MemberId, facts: &ServerFacts) -> ServerFacts {
    let mut facts = facts.clone();
    if let ServerRole::Replica { source: Source::Foreign(_), link } = &mut facts.role
        && view.reading(id).and_then(|r| r.last_io_ms).is_some_and(|ms| ms >= HEARS_BELOW_MS)
    {
        *link = Link::Down;
    }
    facts
}

/// How the member's data stands against the lost primary's. A process that never had a link has what its disk
/// has, whomever it follows by now.
fn standing(view: &View<'_>, id: MemberId, facts: &ServerFacts) -> Standing {
    let had_link = view.member(id).is_some_and(|m| m.had_link.as_ref() == Some(&facts.run_id));
    match &facts.role {
        ServerRole::Replica { source: Source::Gate { .. }, link: _ } => Standing::Restarted,
        ServerRole::Primary | ServerRole::Replica { source: _, link: Link::Up } => Standing::InSync,
        ServerRole::Replica { source: _, link: Link::Down | Link::Syncing } => {
            match (view.state.is_detached(id, view.now), had_link) {
                (true, _) => Standing::Detached,
                (false, false) => Standing::Restarted,
                (false, true) => Standing::InSync,
            }
        }
    }
}

/// True if the member is primary only because it has not been told otherwise yet: a later grant than its own is in force, and its
/// data does not continue what was written under that.
pub fn is_stale_primary(view: &View<'_>, id: MemberId) -> bool {
    let known = view.shard(id.shard);
    let outbid = known.grants.get(&id) < known.holder().map(|(_, grant)| grant).as_ref();
    let granted = known.grants.contains_key(&id);
    let Some(facts) = view.member(id).filter(|m| m.is_primary()).and_then(|m| m.server()) else {
        return false;
    };
    let continues = matches!(lineage(known, facts), Ok(Lineage::Current | Lineage::Continued));
    granted && outbid && !continues
}

fn lineage(known: &ShardState, facts: &ServerFacts) -> Result<Lineage, RejectReason> {
    let gated = match &facts.role {
        ServerRole::Primary => false,
        ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ } => {
            return Err(RejectReason::Blank);
        }
        ServerRole::Replica { source: _, link: Link::Syncing } => return Err(RejectReason::FullSync),
        // It copies from someone else. Without a link, it is the address of a pod that is gone.
        ServerRole::Replica { source: Source::Foreign(_), link: Link::Up } => {
            return Err(RejectReason::ForeignSource);
        }
        ServerRole::Replica { source: Source::Gate { had_history: true }, link: _ } => true,
        ServerRole::Replica { source: Source::Member(_) | Source::Foreign(_), link: _ } => false,
    };
    if known.history.as_ref() == Some(&facts.replid) {
        Ok(Lineage::Current)
    } else if known.history.is_some() && known.history == facts.replid2 {
        Ok(Lineage::Continued)
    } else if known.parent_history.as_ref() == Some(&facts.replid) {
        Ok(Lineage::Parent)
    } else if known.older_histories.contains(&facts.replid) {
        Ok(Lineage::Ancestor)
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

/// The blank member that a shard begins with: the one whose node owns slots, else the first whose promotion
/// did not fail lately.
pub fn first_blank(view: &View<'_>, shard: ShardId) -> Option<MemberId> {
    let blank = || view.wanted(shard).filter(|id| view.member(*id).is_some_and(|m| m.is_blank()));
    let owns = |id: &MemberId| {
        view.member(*id).and_then(|m| m.node()).is_some_and(|n| n.primary.is_none() && !n.slots.is_empty())
    };
    blank().find(owns).or_else(|| blank().min_by_key(|id| failing_until(view, &promotion_key(*id))))
}

/// The first wanted member that was there and did not answer in this look: what is remembered of it may be old, and the next
/// look settles it.
pub fn unread(view: &View<'_>, shard: ShardId, lost: Option<MemberId>) -> Option<MemberId> {
    let is_unread = |id: &MemberId| {
        Some(*id) != lost
            && view.reading(*id).is_none()
            && view.member(*id).and_then(|m| m.server()).is_some()
    };
    view.wanted(shard).find(is_unread)
}

/// The first wanted member of which nobody knows whether it is there: it might be further ahead than any candidate.
pub fn unknown(view: &View<'_>, shard: ShardId, lost: Option<MemberId>) -> Option<MemberId> {
    let untold = |m: &MemberState| m.facts.server.is_unknown() || m.facts.agent.is_unknown();
    let is_unknown = |id: &MemberId| Some(*id) != lost && view.member(*id).is_none_or(untold);
    view.wanted(shard).find(is_unknown)
}
