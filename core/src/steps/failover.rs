//! Wants: every shard that ever had a primary to have one that serves, after an unplanned loss too.
//! Proof: the holder of the grant answers as primary; lost is only who is proven gone, restarted, or silent or shut out and fenced.
//! Refuses: to promote on silence alone, a member that is loading, blank or half synchronised, and while unsure.
//! Story: primary_killed, primary_frozen, primary_isolated, primary_restarts_before_anyone_looks, cluster_bus_cut.

mod shut_out;
mod silence;

use crate::{
    decide::{StepOutcome, View},
    decision::{
        BlockReason, Decision, Operation, OperationChange, OperationKind, Phase, Reason, Scope, StepName,
        WaitReason,
    },
    ids::{MemberId, ShardId},
    observation::Source,
    spec::{FailoverMode, Profile, Verb},
    steps::unless_failing,
    topology::{self, Condition, choice},
};

/// How long to wait for a replica that has not answered while another could be promoted. A replica that is alive answers
/// INFO in about a millisecond; this is two bounds of the driver's quick look. Milliseconds.
const CANDIDATE_WAIT_MAX_MS: i64 = 300;
/// How often to look again while a replica says that it hears from a primary whose process is said to be gone. Milliseconds.
const LINK_DROP_MS: i64 = 5;
/// How often to look again while something is awaited. Milliseconds.
const LOOK_AGAIN_MS: i64 = 200;

/// Judges the holder of the shard's grant.
pub fn step(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some((holder, _)) = view.shard(shard).holder() else {
        return StepOutcome::Satisfied;
    };
    let condition = topology::condition(view, holder);
    if !view.shard(shard).has_served() && condition != Condition::Serving {
        // A first primary that was granted but never served: still a beginning, see membership.
        return StepOutcome::Satisfied;
    }
    let reason = match condition {
        Condition::Serving => {
            return shut_out::step(view, shard, holder).unwrap_or_else(|| finish(view, shard, holder));
        }
        Condition::NotLooked => return StepOutcome::Waiting(WaitReason::NotObserved, Some(holder), None),
        Condition::FollowingForeign => return blocked(BlockReason::ForeignPrimary, holder),
        Condition::Silent => return silence::step(view, shard, holder),
        Condition::Gone => lost_reason(view, shard, holder),
        Condition::Holding => restart_reason(view, shard, holder),
        Condition::Following | Condition::Stranded => unfinished_reason(view, shard),
    };
    let lost = (condition == Condition::Gone).then_some(holder);
    follow_or(view, shard, holder, || {
        match (suspect(view, shard, holder), silence::hears(view, shard, holder)) {
            (Some(other), _) => silence::step(view, shard, other),
            (None, Some(witness)) if lost.is_some() => {
                // A process that dies takes its links with it, within a millisecond or two.
                let again = view.now.plus_millis(LINK_DROP_MS);
                StepOutcome::Waiting(WaitReason::PrimaryAliveForReplicas, Some(witness), Some(again))
            }
            (None, _) => replace(view, shard, holder, lost, reason),
        }
    })
}

/// Another member that may be primary by now, and of which nobody can tell: someone follows it, or it was granted the shard.
fn suspect(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<MemberId> {
    let grants = &view.shard(shard).grants;
    let followed = |id: MemberId| {
        let follows = |other| {
            topology::replica_link(view, other).is_some_and(|(source, _)| source == Source::Member(id))
        };
        view.state.members_of(shard).any(|(other, _)| follows(other))
    };
    let mut silent =
        view.state.members_of(shard).filter(|(id, m)| *id != holder && m.facts.server.is_unknown());
    silent.find(|(id, _)| followed(*id) || grants.get(id) > grants.get(&holder)).map(|(id, _)| id)
}

/// The live cluster decides: if another member is primary already, someone else made it so, and the operator follows. Of
/// several, the one with the highest grant is rightful; without a grant nobody can tell.
fn follow_or(
    view: &View<'_>,
    shard: ShardId,
    holder: MemberId,
    otherwise: impl FnOnce() -> StepOutcome,
) -> StepOutcome {
    let live: Vec<MemberId> = view
        .state
        .members_of(shard)
        .filter(|(id, m)| *id != holder && m.is_primary() && !choice::is_stale_primary(view, *id))
        .map(|(id, _)| id)
        .collect();
    let grants = &view.shard(shard).grants;
    let granted = live.iter().filter(|id| grants.contains_key(id)).max_by_key(|id| grants.get(id)).copied();
    let found = match (live.as_slice(), granted) {
        ([], _) => return otherwise(),
        ([only], _) => *only,
        (_, Some(rightful)) => rightful,
        (_, None) => return blocked(BlockReason::TwoPrimaries, holder),
    };
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::ExternalPromotion);
    (decision.about, decision.grant) = (Some(holder), Some(found));
    StepOutcome::Decided(Box::new(decision))
}

fn blocked(reason: BlockReason, about: MemberId) -> StepOutcome {
    StepOutcome::Blocked(reason, Some(about), Vec::new())
}

/// True for what begins with a fence.
fn is_fenced_by(cause: Reason) -> bool {
    cause == Reason::PrimarySilent || cause == Reason::PrimaryShutOut
}

fn lost_reason(view: &View<'_>, shard: ShardId, holder: MemberId) -> Reason {
    let fenced = |o: &Operation| is_fenced_by(o.cause) && o.member == Some(holder);
    match view.state.operation(OperationKind::Failover, Scope::Shard(shard)) {
        Some(open) if fenced(open) => Reason::PrimaryFenced,
        Some(_) | None => Reason::PrimaryGone,
    }
}

/// The holder was granted the shard but its promotion was not done: whatever began the operation is still the reason.
fn unfinished_reason(view: &View<'_>, shard: ShardId) -> Reason {
    match view.state.operation(OperationKind::Failover, Scope::Shard(shard)).map(|o| o.cause) {
        Some(cause) if is_fenced_by(cause) => Reason::PrimaryFenced,
        Some(cause) => cause,
        None => Reason::PrimaryGone,
    }
}

/// A holder at the gate: alone, it restarted; with every other member at the gate too, the whole shard did.
fn restart_reason(view: &View<'_>, shard: ShardId, holder: MemberId) -> Reason {
    let gated = |id| matches!(topology::replica_link(view, id), Some((Source::Gate { .. }, _)));
    if lost_reason(view, shard, holder) == Reason::PrimaryFenced {
        Reason::PrimaryFenced
    } else if view.wanted(shard).filter(|id| *id != holder).all(gated) {
        Reason::ShardResumed
    } else {
        Reason::PrimaryRestarted
    }
}

/// Promotes the most advanced member, or says why nobody may be promoted.
fn replace(
    view: &View<'_>,
    shard: ShardId,
    holder: MemberId,
    lost: Option<MemberId>,
    reason: Reason,
) -> StepOutcome {
    if view.spec.failover.mode == FailoverMode::Manual {
        return blocked(BlockReason::FailoverManual, holder);
    }
    if let Some(unread) = choice::unread(view, shard, lost) {
        let again = view.now.plus_millis(LOOK_AGAIN_MS);
        return StepOutcome::Waiting(WaitReason::CandidateUnanswered, Some(unread), Some(again));
    }
    if choice::all_blank(view, shard) {
        return begin_anew(view, shard, holder);
    }
    let found = choice::choose(view, shard, lost);
    let since = view.member(holder).map_or(view.now, |m| m.server_changed_at);
    let waited = view.now.millis_since(since) >= CANDIDATE_WAIT_MAX_MS;
    // Whoever is missing may have more; where the user has named one, that was known.
    let is_sure = found.is_proven || (found.chosen.is_some() && found.chosen == choice::named(view));
    if let Some(unknown) = choice::unknown(view, shard, lost)
        && (!waited || (found.chosen.is_some() && !is_sure))
    {
        let again = view.now.plus_millis(LOOK_AGAIN_MS);
        return StepOutcome::Waiting(WaitReason::CandidateUnanswered, Some(unknown), Some(again));
    }
    let Some(chosen) = found.chosen else {
        let restarted = view.state.operation(OperationKind::Rollout, Scope::Shard(shard));
        return match restarted.filter(|o| o.member == Some(holder) && found.unproven.is_empty()) {
            // Nobody can take over, which was known when it was restarted: it comes back, or the rollout is stuck.
            Some(rollout) => super::rollout::awaiting(view, holder, rollout.phase_since),
            None => StepOutcome::Blocked(found.blocked(), Some(holder), found.candidates),
        };
    };
    // One that is still starting may hold the proof.
    let is_starting = |id: &MemberId| {
        let member = view.member(*id);
        member.is_none_or(|m| m.agent().is_none() || m.server().is_none_or(|server| server.loading))
    };
    let starting = view.wanted(shard).find(is_starting);
    if let (false, Some(missing)) = (is_sure, starting) {
        return StepOutcome::Waiting(WaitReason::MembersStarting, Some(missing), None);
    }
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), reason);
    decision.about = Some(
        view.state
            .operation(OperationKind::Failover, Scope::Shard(shard))
            .and_then(|o| o.member)
            .unwrap_or(holder),
    );
    decision.grant = Some(chosen);
    decision.operation = Some(enter(view, shard, Phase::Promoting, holder, "operator"));
    // Who is primary already, though by an old grant, only needs a new one.
    if !view.member(chosen).is_some_and(|m| m.is_primary()) {
        decision.effects = choice::promote(view, chosen, &found.candidates);
    }
    decision.candidates = found.candidates;
    unless_failing(view, decision)
}

/// Every member of a shard that had a primary is blank. A cache begins anew; data that must last waits for a person.
fn begin_anew(view: &View<'_>, shard: ShardId, holder: MemberId) -> StepOutcome {
    let confirmed = view.spec.confirm_blank.as_ref().filter(|t| view.is_open(Verb::ConfirmBlank, t));
    let asked_by = match (view.spec.profile, confirmed) {
        (Profile::Durable, Some(token)) => token.as_str(),
        // It needs no word for that, and uses none up.
        (Profile::Cache, _) => "operator",
        (Profile::Durable, None) => return blocked(BlockReason::DataMissing, holder),
    };
    let Some(first) = choice::first_blank(view, shard) else {
        return StepOutcome::Waiting(WaitReason::MembersStarting, Some(holder), None);
    };
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::DataLost);
    (decision.about, decision.grant) = (Some(holder), Some(first));
    decision.operation = Some(enter(view, shard, Phase::Promoting, holder, asked_by));
    decision.effects = topology::promote(view, first);
    unless_failing(view, decision)
}

fn enter(view: &View<'_>, shard: ShardId, phase: Phase, holder: MemberId, asked_by: &str) -> OperationChange {
    let kind = OperationKind::Failover;
    match view.state.operation(kind, Scope::Shard(shard)) {
        Some(open) => OperationChange::Advance { kind, phase, member: open.member },
        None => OperationChange::Open { kind, phase, asked_by: asked_by.to_owned(), member: Some(holder) },
    }
}

/// The holder serves. An open failover ends when the route points to it and everyone who answers follows it.
fn finish(view: &View<'_>, shard: ShardId, holder: MemberId) -> StepOutcome {
    let Some(open) = view.state.operation(OperationKind::Failover, Scope::Shard(shard)) else {
        return StepOutcome::Satisfied;
    };
    let abandoned = match open.phase {
        Phase::Fencing => {
            if view.state.is_leaving(holder) {
                return silence::fence_unfinished(view, holder, open.phase_since);
            }
            true
        }
        Phase::Promoting | Phase::Restarting | Phase::Moving => false,
    };
    let routed = topology::route(view, holder).is_none();
    let followed = view
        .state
        .members_of(shard)
        .filter(|(id, m)| *id != holder && m.server().is_some())
        .all(|(id, _)| topology::follows(view, id, holder));
    let complete = routed && followed;
    if !(abandoned || complete) {
        return StepOutcome::Satisfied;
    }
    let reason = if abandoned { Reason::OperationAbandoned } else { Reason::FailoverComplete };
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), reason);
    decision.about = Some(holder);
    decision.operation = Some(OperationChange::Close { kind: OperationKind::Failover });
    StepOutcome::Decided(Box::new(decision))
}
