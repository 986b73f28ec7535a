//! Wants: every member to run the wanted revision, one at a time, replicas first, the primary last and handed over.
//! Proof: the revision annotation of each pod; linked and complete before the next one goes.
//! Refuses: to start during a failover, while paused, or before the members' Services are there; to go on while a restarted member is not back; to restart a primary without a
//!   replica while another shard is down, or before the user confirms it where its data is nowhere else.
//! Story: spec_change, bad_image_then_fixed, cluster_rollout_alone, cache_alone_rollout.

use crate::{
    decide::{StepOutcome, View},
    decision::{
        BlockReason, Decision, OperationChange, OperationKind, Phase, Reason, Scope, StepName, WaitReason,
    },
    effect::Effect,
    ids::{Digest, MemberId, ShardId},
    observation::{AgentFacts, ContainerPhase, ObjectFacts, ObjectKind, ServerProcess},
    spec::Verb,
    steps::{membership, objects, settings, unless_failing},
    topology,
};

/// After this a restarted member that is not back is reported as stuck; nothing else happens, and it goes on when the
/// member comes back or the spec changes. Milliseconds: pulling a large image takes a minute.
const MEMBER_BACK_MAX_MS: i64 = 120_000;

/// Starts, continues or ends the shard's rollout; without one, says who is not in sync yet.
pub fn step(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some((object, facts)) = objects::workload(view, shard) else {
        return StepOutcome::Satisfied;
    };
    let Some(wanted) = facts.wanted_revision.as_ref() else {
        return StepOutcome::Satisfied;
    };
    let scope = Scope::Shard(shard);
    let failing_over = view.state.operation(OperationKind::Failover, scope).is_some();
    if !facts.live.is_absent() && objects::differs(facts) && objects::belongs_to_rollout(facts) {
        if view.spec.paused || failing_over || topology::serving_primary(view, shard).is_none() {
            return StepOutcome::Satisfied;
        }
        if lacks_names(view, shard) {
            return StepOutcome::Waiting(WaitReason::ObjectMissing, None, None);
        }
        // Whatever evicts a pod makes it anew by the template that is there.
        return match empties(view, shard) {
            Some(id) => StepOutcome::Blocked(BlockReason::RestartEmpties, Some(id), Vec::new()),
            None => start(view, shard, object.clone(), facts),
        };
    }
    let open = view.state.operation(OperationKind::Rollout, scope);
    let stale: Vec<MemberId> = stale(view, shard, wanted);
    if stale.is_empty() {
        return match (not_ready(view, shard), open) {
            (None, None) => StepOutcome::Satisfied,
            (None, Some(_)) => finish(shard),
            (Some(id), Some(op)) => awaiting(view, id, op.phase_since),
            (Some(id), None) => not_in_sync(view, id),
        };
    }
    if view.spec.paused || failing_over {
        return StepOutcome::Satisfied;
    }
    restart_next(view, shard, wanted, &stale)
}

/// The only member of a shard, if it has its data in memory alone and the user has not confirmed that it may be restarted.
fn empties(view: &View<'_>, shard: ShardId) -> Option<MemberId> {
    let mut wanted = view.wanted(shard);
    let alone = wanted.next().filter(|_| wanted.next().is_none())?;
    let confirmed =
        view.spec.confirm_blank.as_ref().is_some_and(|word| view.is_open(Verb::ConfirmBlank, word));
    (view.spec.volatile && !confirmed).then_some(alone)
}

/// True while a member has no Service of its own yet: a new pod tells clients that name, which has to lead to it.
fn lacks_names(view: &View<'_>, shard: ShardId) -> bool {
    let of_shard =
        view.state.objects.iter().filter(|(_, facts)| facts.shard == Some(shard) && !facts.surplus);
    let mut services = of_shard.filter(|(object, _)| object.kind == ObjectKind::Service);
    services.any(|(_, facts)| facts.live.present().is_none() || facts.taken_by().is_some())
}

/// Members whose pod is not of the wanted revision and not on its way out.
fn stale(view: &View<'_>, shard: ShardId, wanted: &Digest) -> Vec<MemberId> {
    view.wanted(shard).filter(|id| differs(view, *id, wanted) && !view.state.is_leaving(*id)).collect()
}

/// True if the member's pod is not of the revision that the spec wants.
pub fn is_stale(view: &View<'_>, id: MemberId) -> bool {
    let wanted = objects::workload(view, id.shard).and_then(|(_, facts)| facts.wanted_revision.as_ref());
    wanted.is_some_and(|wanted| differs(view, id, wanted))
}

fn differs(view: &View<'_>, id: MemberId, wanted: &Digest) -> bool {
    view.member(id).and_then(|m| m.facts.pod.present()).is_some_and(|pod| pod.revision != *wanted)
}

/// The first wanted member that does not serve its purpose.
fn not_ready(view: &View<'_>, shard: ShardId) -> Option<MemberId> {
    let primary = topology::serving_primary(view, shard);
    view.wanted(shard).find(|id| primary.is_none_or(|p| !topology::is_ready(view, *id, p)))
}

fn not_in_sync(view: &View<'_>, id: MemberId) -> StepOutcome {
    let answers = view.member(id).and_then(|m| m.server()).is_some();
    let reason = if answers { WaitReason::ReplicaSyncing } else { WaitReason::MembersStarting };
    StepOutcome::Waiting(reason, Some(id), None)
}

/// A member that was restarted is not back yet.
pub fn awaiting(view: &View<'_>, id: MemberId, since: crate::ids::Timestamp) -> StepOutcome {
    let until = since.plus_millis(MEMBER_BACK_MAX_MS);
    if view.now >= until {
        return StepOutcome::Blocked(BlockReason::RolloutStuck, Some(id), Vec::new());
    }
    StepOutcome::Waiting(WaitReason::MemberRestarting, Some(id), Some(until))
}

fn start(
    view: &View<'_>,
    shard: ShardId,
    object: crate::observation::ObjectRef,
    facts: &ObjectFacts,
) -> StepOutcome {
    let mut decision = Decision::new(StepName::Rollout, Scope::Shard(shard), Reason::RolloutStarted);
    decision.operation = Some(enter(view, shard, None));
    decision.effects.push(Effect::Apply { object, digest: facts.wanted.clone() });
    unless_failing(view, decision)
}

fn enter(view: &View<'_>, shard: ShardId, member: Option<MemberId>) -> OperationChange {
    let (kind, phase) = (OperationKind::Rollout, Phase::Restarting);
    match view.state.operation(kind, Scope::Shard(shard)) {
        Some(_) => OperationChange::Advance { kind, phase, member },
        None => OperationChange::Open { kind, phase, asked_by: "spec".to_owned(), member },
    }
}

/// Whatever else holds the shard: a member whose pod cannot start is made anew if it is not of the wanted revision, or
/// began with other settings. So a bad spec heals as soon as it is right again.
pub fn repair(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some((_, facts)) = objects::workload(view, shard) else { return StepOutcome::Satisfied };
    let Some(wanted) = facts.wanted_revision.as_ref() else { return StepOutcome::Satisfied };
    if view.spec.paused || facts.live.is_unknown() || objects::belongs_to_rollout(facts) {
        return StepOutcome::Satisfied;
    }
    let cannot_start = |id: &MemberId| {
        view.member(*id).is_some_and(|m| {
            let phase = m.facts.pod.present().map(|p| &p.container);
            let has_ended = |agent: &AgentFacts| matches!(agent.server, ServerProcess::Exited(_));
            let ends = m.agent().is_some_and(|agent| agent.start_failure.is_some() && has_ended(agent));
            m.server().is_none()
                && (ends || matches!(phase, Some(ContainerPhase::Waiting(_) | ContainerPhase::Terminated(_))))
        })
    };
    let made_anew = |id: &MemberId| {
        (differs(view, *id, wanted) || settings::began_with_others(view, *id)) && !view.state.is_leaving(*id)
    };
    match view.wanted(shard).filter(made_anew).find(cannot_start) {
        Some(id) => restart(view, shard, id),
        None => StepOutcome::Satisfied,
    }
}

/// With everyone else in sync: replicas from the highest ordinal; the primary last, after handing over.
fn restart_next(view: &View<'_>, shard: ShardId, wanted: &Digest, stale: &[MemberId]) -> StepOutcome {
    let primary = topology::serving_primary(view, shard);
    let Some(primary) = primary else {
        return StepOutcome::Satisfied;
    };
    if let Some(id) = not_ready(view, shard) {
        if id != primary && stale.contains(&id) {
            // It is no use as it is, and not what is wanted: nothing is lost by making it anew.
            return restart(view, shard, id);
        }
        let open = view.state.operation(OperationKind::Rollout, Scope::Shard(shard));
        return match open {
            // Nothing was restarted here: its node waits for those of other shards.
            Some(op) if op.member.is_none() && id == primary => {
                StepOutcome::Waiting(WaitReason::GossipUnsettled, Some(id), None)
            }
            Some(op) => awaiting(view, id, op.phase_since),
            None => not_in_sync(view, id),
        };
    }
    if let Some(replica) = stale.iter().copied().rfind(|id| *id != primary) {
        return restart(view, shard, replica);
    }
    if let Some(waits) = membership::awaits_job(view, primary) {
        return waits;
    }
    let updated = membership::best_replica(view, shard, primary).filter(|id| {
        view.member(*id).and_then(|m| m.facts.pod.present()).is_some_and(|p| p.revision == *wanted)
    });
    match updated {
        Some(to) => {
            let mut decision =
                membership::hand_over(view, shard, primary, to, "rollout", OperationKind::Rollout);
            decision.step = StepName::Rollout;
            unless_failing(view, decision)
        }
        // Alone: nobody can take over, the outage is the restart. One shard after the other, see decide.
        None => match empties(view, shard) {
            Some(id) => StepOutcome::Blocked(BlockReason::RestartEmpties, Some(id), Vec::new()),
            None => restart(view, shard, primary),
        },
    }
}

fn restart(view: &View<'_>, shard: ShardId, id: MemberId) -> StepOutcome {
    let Some(pod) = view.member(id).and_then(|m| m.facts.pod.present()) else {
        return StepOutcome::Satisfied;
    };
    let mut decision = Decision::new(StepName::Rollout, Scope::Shard(shard), Reason::MemberRestarted);
    decision.about = Some(id);
    decision.operation = Some(enter(view, shard, Some(id)));
    decision.effects.push(Effect::DeletePod { member: id, pod_uid: pod.uid.clone(), grace_s: None });
    unless_failing(view, decision)
}

/// The primary that a decision restarts though nobody has taken over.
pub fn takes_down(view: &View<'_>, decision: &Decision) -> Option<MemberId> {
    let restarts = decision.step == StepName::Rollout && decision.reason == Reason::MemberRestarted;
    let member = decision.about.filter(|_| restarts)?;
    (topology::serving_primary(view, member.shard) == Some(member)).then_some(member)
}

fn finish(shard: ShardId) -> StepOutcome {
    let mut decision = Decision::new(StepName::Rollout, Scope::Shard(shard), Reason::RolloutComplete);
    decision.operation = Some(OperationChange::Close { kind: OperationKind::Rollout });
    StepOutcome::Decided(Box::new(decision))
}
