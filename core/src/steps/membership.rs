//! Wants: a first primary, everyone following the rightful one, and planned promotions fulfilled.
//!   A primary that is about to stop hands over first, and one whose node is cordoned before anybody is told to stop; every agent knows who
//!   holds the grant.
//! Proof: every wanted member's role and source, as it says itself, and what its agent says it was told.
//! Refuses: to begin before all wanted members have answered; to choose between two primaries without grants; to hand a shard over in the
//!   middle of a job that moves slots; to leave a cordoned node for another that is.
//! Story: create, replica_pod_deleted, primary_pod_deleted, promise_came_to_nothing, switchover, scale, cluster_reshard_switchover,
//!   node_cordoned, node_cordoned_rollout, cluster_node_cordoned.

use crate::{
    agent::Brief,
    decide::{StepOutcome, View},
    decision::{
        BlockReason, Decision, OperationChange, OperationKind, Phase, Reason, Scope, StepName, WaitReason,
    },
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::{Export, ExportState, Link},
    retry::failing_until,
    spec::Verb,
    state::{MemberState, failure_key, handover_key},
    steps::{
        reshard::{JOB_QUICK_MS, LOOK_AGAIN_MS},
        retry_at, rollout, unless_failing,
    },
    topology::{self, choice},
};

/// A handover that failed this often is given up: something other than bad luck prevents it.
const HANDOVER_TRIES_MAX: u32 = 3;

/// First primary, demotions, attachments, planned promotions; in this order.
pub fn step(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some(primary) = topology::serving_primary(view, shard) else {
        return if view.shard(shard).has_served() {
            StepOutcome::Satisfied
        } else {
            first_primary(view, shard)
        };
    };
    if let Some(decided) = leave(view, shard, primary) {
        return decided;
    }
    let attached = attach_strays(view, shard, primary);
    if attached != StepOutcome::Satisfied {
        return attached;
    }
    let briefed = brief(view, shard, primary);
    if briefed != StepOutcome::Satisfied {
        return briefed;
    }
    switchover(view, shard, primary)
}

/// The primary is about to stop: someone else takes over first, even while planned changes are paused.
fn leave(view: &View<'_>, shard: ShardId, primary: MemberId) -> Option<StepOutcome> {
    if !view.state.is_leaving(primary) {
        return None;
    }
    let to = best_replica(view, shard, primary)?;
    if let Some(waits) = awaits_job(view, primary) {
        return Some(waits);
    }
    let mut decision = hand_over(view, shard, primary, to, "operator", OperationKind::Switchover);
    decision.reason = Reason::PrimaryLeaving;
    Some(unless_failing(view, decision)).filter(|outcome| *outcome != StepOutcome::Satisfied)
}

/// Every agent that answers shall know who holds the grant, and under which terms. If one knows of a higher grant, which came
/// to nothing, the primary gets a new one above it: else that agent would never support it.
fn brief(view: &View<'_>, shard: ShardId, primary: MemberId) -> StepOutcome {
    let Some(wanted) = topology::brief(view, shard) else { return StepOutcome::Satisfied };
    let told = |id: &MemberId| view.member(*id).and_then(|m| m.agent()).map(|a| &a.brief);
    let scope = Scope::Shard(shard);
    let reachable: Vec<MemberId> = view.wanted(shard).filter(|id| told(id).is_some()).collect();
    let outbid = |b: &Brief| b.grant > wanted.grant || (b.grant == wanted.grant && b.holder != wanted.holder);
    let mut decision = Decision::new(StepName::Membership, scope, Reason::AgentBriefed);
    decision.about = Some(primary);
    let ignorant = if reachable.iter().filter_map(told).any(outbid) {
        if told(&primary).is_none() {
            return StepOutcome::Satisfied;
        }
        (decision.reason, decision.grant) = (Reason::GrantRenewed, Some(primary));
        reachable
    } else {
        reachable.into_iter().filter(|id| told(id) != Some(&wanted)).collect()
    };
    for member in ignorant {
        let Some(address) = view.member(member).and_then(|m| m.address()) else { continue };
        let effect = Effect::Brief { member, address: address.to_owned() };
        let failing = view.state.failures.get(&failure_key(scope, &effect));
        if failing.is_none_or(|(count, last)| retry_at(*count, *last) <= view.now) {
            decision.effects.push(effect);
        }
    }
    if decision.effects.is_empty() {
        return StepOutcome::Satisfied;
    }
    unless_failing(view, decision)
}

fn first_primary(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let live: Vec<MemberId> =
        view.state.members_of(shard).filter(|(_, m)| m.is_primary()).map(|(id, _)| id).collect();
    match live.as_slice() {
        [] => {}
        [only] => {
            let mut adopted = Decision::new(StepName::Membership, Scope::Shard(shard), Reason::Adopted);
            (adopted.about, adopted.grant) = (Some(*only), Some(*only));
            return StepOutcome::Decided(Box::new(adopted));
        }
        [first, ..] => return StepOutcome::Blocked(BlockReason::TwoPrimaries, Some(*first), Vec::new()),
    }
    let answered = |id| {
        let member = view.reading(id).and(view.member(id));
        member.is_some_and(|m| m.agent().is_some() && m.server().is_some_and(|s| !s.loading))
    };
    if !view.wanted(shard).all(answered) {
        // Holds nothing: a member that cannot start is the rollout's to mend, and it says who is awaited.
        return StepOutcome::Satisfied;
    }
    if !topology::can_be_routed(view, shard) {
        // The first decision is also the first routing: the slice comes with the other objects, within a moment.
        return StepOutcome::Waiting(WaitReason::ObjectMissing, None, None);
    }
    let mut decision = Decision::new(StepName::Membership, Scope::Shard(shard), Reason::Bootstrap);
    let chosen = if choice::all_blank(view, shard) {
        choice::first_blank(view, shard)
    } else {
        let found = choice::choose(view, shard, None);
        if found.chosen.is_none() {
            return StepOutcome::Blocked(found.blocked(), None, found.candidates);
        }
        (decision.reason, decision.candidates) = (Reason::ShardResumed, found.candidates);
        found.chosen
    };
    let Some(first) = chosen else {
        return StepOutcome::Satisfied;
    };
    (decision.about, decision.grant) = (Some(first), Some(first));
    decision.effects = choice::promote(view, first, &decision.candidates);
    unless_failing(view, decision)
}

/// Everyone who answers and does not follow the primary shall. Writes that only a stray has are named.
fn attach_strays(view: &View<'_>, shard: ShardId, primary: MemberId) -> StepOutcome {
    let mut decision = Decision::new(StepName::Membership, Scope::Shard(shard), Reason::MemberAttached);
    for (id, member) in view.state.members_of(shard).filter(|(id, _)| *id != primary) {
        if member.server().is_none_or(|s| s.loading) || view.reading(id).is_none() {
            continue;
        }
        if topology::follows(view, id, primary) {
            continue;
        }
        let following = topology::replica_link(view, id);
        let Some(effect) = topology::attach(view, id, primary) else {
            continue;
        };
        let failing = view.state.failures.get(&failure_key(Scope::Shard(shard), &effect));
        if failing.is_some_and(|(count, last)| retry_at(*count, *last) > view.now) {
            continue;
        }
        decision.about = decision.about.or(Some(id));
        decision.discards.extend(topology::discard(view, id, primary));
        decision.effects.push(effect.clone());
        if let (None, Effect::Attach { server, to: _, to_address: _, node: _ }) = (following, effect) {
            decision.reason = Reason::StalePrimaryDemoted;
            decision.effects.push(Effect::Disconnect { server });
        }
    }
    unless_failing(view, decision)
}

/// A planned promotion that is open: to whom, why, and who wants it.
struct Wish {
    to: MemberId,
    reason: Reason,
    asked_by: String,
}

/// A planned promotion: asked for by the user, or needed because the primary's ordinal is to go or its node is cordoned.
fn switchover(view: &View<'_>, shard: ShardId, primary: MemberId) -> StepOutcome {
    let scope = Scope::Shard(shard);
    let open = view.state.operation(OperationKind::Switchover, scope);
    let Some(Wish { to, reason, asked_by }) = wish(view, shard, primary) else {
        return if open.is_some() {
            close(shard, primary, Reason::SwitchoverComplete)
        } else {
            StepOutcome::Satisfied
        };
    };
    if to == primary {
        return close(shard, primary, Reason::SwitchoverComplete);
    }
    let tries = view.state.failures.get(&handover_key(to)).map_or(0, |(count, _)| *count);
    if open.is_some() && tries >= HANDOVER_TRIES_MAX {
        return close(shard, primary, Reason::OperationAbandoned);
    }
    if view.spec.paused {
        return StepOutcome::Satisfied;
    }
    if !view.spec.wants(to) || returns_at_once(view, shard, primary, to) {
        return StepOutcome::Blocked(BlockReason::SwitchoverImpossible, Some(to), Vec::new());
    }
    if !can_take_over(view, to, primary) {
        // Holds nothing: what it waits for may come from a rollout.
        return StepOutcome::Satisfied;
    }
    if let Some(waits) = awaits_job(view, primary) {
        return waits;
    }
    let decision = hand_over(view, shard, primary, to, &asked_by, OperationKind::Switchover);
    unless_failing(view, Decision { reason, ..decision })
}

/// Holds back what is planned for a primary that gives or gets slots by a job of atomic migration, until that has ended: in its last moments the
/// taker and the giver's successor could both claim them, each with an epoch of its own, and one would drop what it had acknowledged
/// (Valkey's issue 2724). Only for a moment: a job that takes its time fails when its shard is handed over, and is sent again.
pub fn awaits_job(view: &View<'_>, primary: MemberId) -> Option<StepOutcome> {
    let node = view.member(primary)?.node()?;
    let concerns = |id: MemberId, export: &Export| {
        export.state == ExportState::Running && (id == primary || export.to == node.id)
    };
    let gives = |(id, member): (&MemberId, &MemberState)| {
        member
            .node()
            .is_some_and(|node| node.exports.iter().any(|export| concerns(*id, export)))
            .then_some(*id)
    };
    let is_quick = |source: &MemberId| {
        let since = view.shard(source.shard).handed_at;
        since.is_some_and(|at| view.now.millis_since(at) < JOB_QUICK_MS)
    };
    // What a replaced primary said last says nothing of now.
    let is_primary = |id: &MemberId| view.shard(id.shard).in_force == Some(*id);
    let source = view.state.members.iter().filter_map(gives).filter(is_primary).find(is_quick)?;
    let soon = Some(view.now.plus_millis(LOOK_AGAIN_MS));
    Some(StepOutcome::Waiting(WaitReason::SlotsMoving, Some(source), soon))
}

/// The decision that hands a shard over from `primary` to `to`, as part of an operation of the given kind.
pub fn hand_over(
    view: &View<'_>,
    shard: ShardId,
    primary: MemberId,
    to: MemberId,
    asked_by: &str,
    kind: OperationKind,
) -> Decision {
    let scope = Scope::Shard(shard);
    let mut decision = Decision::new(StepName::Membership, scope, Reason::Switchover);
    (decision.about, decision.grant) = (Some(primary), Some(to));
    let (phase, member) = (Phase::Promoting, Some(to));
    decision.operation = Some(match view.state.operation(kind, scope) {
        Some(_) => OperationChange::Advance { kind, phase, member },
        None => OperationChange::Open { kind, phase, asked_by: asked_by.to_owned(), member },
    });
    decision.effects = topology::hand_over(view, primary, to);
    decision
}

fn close(shard: ShardId, primary: MemberId, reason: Reason) -> StepOutcome {
    let mut decision = Decision::new(StepName::Membership, Scope::Shard(shard), reason);
    decision.about = Some(primary);
    decision.operation = Some(OperationChange::Close { kind: OperationKind::Switchover });
    StepOutcome::Decided(Box::new(decision))
}

/// Who shall be primary and who wants it. What the user asks for goes before a cordon, unless it cannot be done now.
fn wish(view: &View<'_>, shard: ShardId, primary: MemberId) -> Option<Wish> {
    let reason = Reason::Switchover;
    if !view.spec.wants(primary) {
        let to = best_replica(view, shard, primary)?;
        return Some(Wish { to, reason, asked_by: "scale-in".to_owned() });
    }
    let asked = view
        .spec
        .switchover
        .as_ref()
        .filter(|w| w.to.shard == shard && view.is_open(Verb::Switchover, &w.token));
    let asked = asked.map(|w| Wish { to: w.to, reason, asked_by: w.token.clone() });
    let is_possible = |wish: &Wish| {
        let Wish { to, reason: _, asked_by: _ } = wish;
        let can = view.spec.wants(*to) && can_take_over(view, *to, primary);
        *to == primary || (can && !returns_at_once(view, shard, primary, *to))
    };
    if asked.as_ref().is_some_and(is_possible) {
        return asked;
    }
    let cordon = |to: MemberId| Wish { to, reason: Reason::NodeCordoned, asked_by: "cordon".to_owned() };
    refuge(view, shard, primary).map(cordon).or(asked)
}

fn can_take_over(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    topology::is_ready(view, member, primary) && view.reading(member).is_some()
}

/// Where a primary on a cordoned node goes: the best replica on a node that takes pods. None that a rollout would restart before it comes
/// to this primary, as that would only hand back.
fn refuge(view: &View<'_>, shard: ShardId, primary: MemberId) -> Option<MemberId> {
    let stays = !topology::is_cordoned(view, primary);
    let is_next = |id: &MemberId| rollout::is_stale(view, *id) && !rollout::is_stale(view, primary);
    let safe = |id: &MemberId| !topology::is_cordoned(view, *id) && !is_next(id);
    if stays { None } else { best(view, replicas(view, shard, primary).filter(safe)) }
}

/// True if `to` is on a cordoned node and would hand over as soon as it is primary.
fn returns_at_once(view: &View<'_>, shard: ShardId, primary: MemberId, to: MemberId) -> bool {
    let stays = |id: MemberId| !topology::is_cordoned(view, id);
    !stays(to) && (stays(primary) || replicas(view, shard, primary).any(stays))
}

/// The wanted replica to hand over to: in sync, without a handover that failed lately if there is one, on a
/// node that takes pods if there is one, and furthest ahead.
pub fn best_replica(view: &View<'_>, shard: ShardId, primary: MemberId) -> Option<MemberId> {
    best(view, replicas(view, shard, primary))
}

fn best(view: &View<'_>, replicas: impl Iterator<Item = MemberId>) -> Option<MemberId> {
    replicas.max_by_key(|id| {
        let stays = !topology::is_cordoned(view, *id);
        // A handover loses nothing, whoever it is to: one that failed is no reason to wait.
        let failing = std::cmp::Reverse(failing_until(view, &handover_key(*id)));
        (failing, stays, view.reading(*id).map(|r| r.offset), std::cmp::Reverse(*id))
    })
}

/// The wanted replicas that are in sync.
fn replicas<'a>(
    view: &'a View<'_>,
    shard: ShardId,
    primary: MemberId,
) -> impl Iterator<Item = MemberId> + use<'a> {
    let linked = |id: &MemberId| topology::replica_link(view, *id).is_some_and(|(_, link)| link == Link::Up);
    view.wanted(shard)
        .filter(move |id| *id != primary && topology::is_ready(view, *id, primary))
        .filter(linked)
}
