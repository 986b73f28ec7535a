//! Wants: the write Service to list the primary, the role labels to say who is what, and the names of pods that go to
//!   lead nowhere.
//! Proof: the EndpointSlice's address and the pods' labels, as last seen.
//! Refuses: to move anything while no member is seen to be the rightful primary; to list nobody while a server of the shard stays.
//! Story: create, primary_moved_by_hand, cluster_two_pods_deleted.

use crate::{
    decide::{StepOutcome, View},
    decision::{Decision, Reason, Scope, StepName, WaitReason},
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::{Observed, RoleLabel},
    spec::Topology,
    state::{MemberState, failure_key},
    topology,
};

/// Moves the route and the labels after the live primary.
pub fn step(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some(primary) = topology::serving_primary(view, shard) else {
        return StepOutcome::Satisfied;
    };
    let labels = labels(view, shard, primary);
    match view.spec.topology {
        Topology::Replication => by_slice(view, shard, primary, labels),
        Topology::Cluster => by_label(view, shard, primary, labels),
    }
}

/// Has the write Service list nobody once no server of the shard is left but those whose pods go. An address that is gone answers
/// nothing: a client that dials it waits for its timeout, and a library without one for ever. A pod that goes refuses for long enough
/// meanwhile. A server that stays is about to become primary, and one change of the route is faster than two.
pub fn close(view: &View<'_>, shard: ShardId) -> StepOutcome {
    let Some(route) = view.shard(shard).route.present().filter(|route| route.address.is_some()) else {
        return StepOutcome::Satisfied;
    };
    let stays = |member: &MemberState| match (&member.facts.pod, &member.facts.server) {
        (Observed::Unknown(_), _) => true,
        (Observed::Absent, _) => false,
        (Observed::Present(pod), _) if pod.deleting => false,
        (Observed::Present(_), Observed::Absent) => member.address() == route.address.as_deref(),
        (Observed::Present(_), Observed::Unknown(_) | Observed::Present(_)) => true,
    };
    let mut members = view.state.members_of(shard);
    if topology::serving_primary(view, shard).is_some() || members.any(|(_, member)| stays(member)) {
        return StepOutcome::Satisfied;
    }
    let mut decision = Decision::new(StepName::Routing, Scope::Shard(shard), Reason::RouteClosed);
    decision.effects = vec![Effect::Unroute { shard, resource_version: route.resource_version.clone() }];
    super::unless_failing(view, decision)
}

/// Takes pods that go out of the names that nodes of a Valkey Cluster are known by, once they serve no slots any more. Their agents refuse
/// clients for a moment longer, so that nobody who looks a name up gets an address that answers nothing.
pub fn withdraw_names(view: &View<'_>, shard: ShardId) -> StepOutcome {
    match view.spec.topology {
        Topology::Replication => return StepOutcome::Satisfied,
        Topology::Cluster => {}
    }
    let role = RoleLabel::Leaving;
    let leaving = view.state.members_of(shard).filter_map(|(id, member)| {
        let pod = member.facts.pod.present()?;
        let is_named = pod.deleting && pod.role_label != Some(role) && !member.is_primary();
        is_named.then(|| Effect::Label { member: id, pod_uid: pod.uid.clone(), role })
    });
    let mut decision = Decision::new(StepName::Routing, Scope::Shard(shard), Reason::NameWithdrawn);
    decision.effects = leaving.filter(|effect| is_due(view, shard, effect)).collect();
    super::unless_failing(view, decision)
}

/// False of an effect that failed and is tried again later: one that fails holds back none of the others.
fn is_due(view: &View<'_>, shard: ShardId, effect: &Effect) -> bool {
    let failing = view.state.failures.get(&failure_key(Scope::Shard(shard), effect));
    failing.is_none_or(|(count, last)| super::retry_at(*count, *last) <= view.now)
}

/// Clients of a Valkey Cluster are sent to the owner of a slot by any node: only the labels are to be true.
fn by_label(view: &View<'_>, shard: ShardId, primary: MemberId, labels: Vec<Effect>) -> StepOutcome {
    let mut decision = Decision::new(StepName::Routing, Scope::Shard(shard), Reason::RoleLabelled);
    (decision.about, decision.effects) = (Some(primary), labels);
    super::unless_failing(view, decision)
}

fn by_slice(view: &View<'_>, shard: ShardId, primary: MemberId, labels: Vec<Effect>) -> StepOutcome {
    match &view.shard(shard).route {
        Observed::Unknown(_) => StepOutcome::Waiting(WaitReason::NotObserved, None, None),
        Observed::Absent => StepOutcome::Satisfied,
        Observed::Present(route) => {
            let Some(address) = view.member(primary).and_then(|m| m.address()) else {
                return StepOutcome::Waiting(WaitReason::NoAddress, Some(primary), None);
            };
            let scope = Scope::Shard(shard);
            let mut decision = if route.address.as_deref() == Some(address) {
                Decision::new(StepName::Routing, scope, Reason::RoleLabelled)
            } else {
                let mut moved = Decision::new(StepName::Routing, scope, Reason::RouteMoved);
                moved.effects.extend(topology::route(view, primary));
                moved
            };
            decision.about = Some(primary);
            decision.effects.extend(labels);
            super::unless_failing(view, decision)
        }
    }
}

/// The label changes that would make every pod's label true.
fn labels(view: &View<'_>, shard: ShardId, primary: MemberId) -> Vec<Effect> {
    let mut effects = Vec::new();
    for (id, member) in view.state.members_of(shard) {
        let role = if id == primary { RoleLabel::Primary } else { RoleLabel::Replica };
        if role == RoleLabel::Replica && member.agent().is_some_and(|agent| agent.relays) {
            // Who comes there does not reach its server.
            continue;
        }
        let Some(pod) = member.facts.pod.present().filter(|p| !p.deleting && p.role_label != Some(role))
        else {
            continue;
        };
        let effect = Effect::Label { member: id, pod_uid: pod.uid.clone(), role };
        if is_due(view, shard, &effect) {
            effects.push(effect);
        }
    }
    effects
}
