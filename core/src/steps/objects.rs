//! Wants: every owned object to be what the spec renders to, and none to be left of a shard or a member that is not to be.
//! Proof: digest of the live fields against digest of the rendering; whose slots are whose, as the other shards' primaries say in this look.
//! Refuses: to touch an object of that name which is somebody else's, and to begin a workload meanwhile; to delete the objects of
//!   a shard that goes before the other shards' primaries serve every slot; a new pod template while the shard's rollout
//!   has not begun, to scale a primary away, and while paused or with a refused spec anything but what the members live by (their
//!   certificates).
//! Story: create, spec_change, drift, cluster_scale_in, name_taken.

use crate::{
    decide::{StepOutcome, View},
    decision::{BlockReason, Decision, Reason, Scope, StepName, WaitReason},
    effect::Effect,
    observation::{ObjectFacts, ObjectKind, ObjectRef},
    slots::SlotSet,
    state::failure_key,
    steps::{retry_at, settings},
    topology,
};

/// Applies what differs, all in one decision, in the order of creation.
pub fn step(view: &View<'_>) -> StepOutcome {
    let held = if view.state.spec_error.is_some() {
        Some(BlockReason::SpecInvalid)
    } else if view.spec.paused {
        Some(BlockReason::Paused)
    } else {
        None
    };
    let unknown = |f: &ObjectFacts| f.live.is_unknown() && (held.is_none() || f.vital);
    if held.is_none() && view.state.objects.is_empty() || view.state.objects.values().any(unknown) {
        return StepOutcome::Waiting(WaitReason::NotObserved, None, None);
    }
    let is_taken = view.state.objects.values().any(|f| f.taken_by().is_some());
    let mut decision = Decision::new(StepName::Objects, Scope::Cluster, Reason::ObjectApplied);
    let mut retry: Option<crate::ids::Timestamp> = None;
    let due =
        view.state.objects.iter().filter(|(_, f)| !f.surplus && differs(f) && (held.is_none() || f.vital));
    for (object, facts) in due {
        if (belongs_to_rollout(facts) && serves(view, facts)) || scales_primary_away(view, facts) {
            continue;
        }
        if is_taken && begins_workload(facts) {
            continue;
        }
        if object.kind == ObjectKind::ConfigMap
            && facts.live.present().is_some()
            && settings::hold_configuration(view)
        {
            continue;
        }
        let effect = Effect::Apply { object: object.clone(), digest: facts.wanted.clone() };
        match held_until(view, &effect) {
            Some(at) => retry = Some(retry.map_or(at, |r| r.min(at))),
            None => decision.effects.push(effect),
        }
    }
    if decision.effects.is_empty() && held.is_none() {
        let (reason, removals) = removals(view);
        decision.reason = reason;
        for effect in removals {
            match held_until(view, &effect) {
                Some(at) => retry = Some(retry.map_or(at, |r| r.min(at))),
                None => decision.effects.push(effect),
            }
        }
    }
    let held = if is_taken { Some(BlockReason::NameTaken) } else { held };
    match (decision.effects.is_empty(), held, retry) {
        (false, _, _) => StepOutcome::Decided(Box::new(decision)),
        (true, Some(reason), _) => StepOutcome::Blocked(reason, None, Vec::new()),
        (true, None, Some(at)) => StepOutcome::Waiting(WaitReason::ObjectMissing, None, Some(at)),
        (true, None, None) => StepOutcome::Satisfied,
    }
}

/// True if the live object is missing or not what is wanted, or there and not wanted. What is somebody else's is nothing of that.
pub fn differs(facts: &ObjectFacts) -> bool {
    match facts.live.present() {
        Some(live) if live.taken_by.is_some() => false,
        Some(live) => facts.surplus || live.digest != facts.wanted,
        None => !facts.surplus,
    }
}

/// Deletes what is not to be, in reverse order of creation: what was one member's at once, and what belongs to a shard that goes once all
/// slots are served elsewhere.
fn removals(view: &View<'_>) -> (Reason, Vec<Effect>) {
    let goes = |facts: &ObjectFacts| facts.shard.is_some_and(|id| id.0 >= view.spec.shards);
    let shards_may_go = is_served_without_shards_that_go(view);
    let surplus =
        view.state.objects.iter().rev().filter(|(_, facts)| facts.surplus && facts.live.present().is_some());
    // Of a shard that stays only a member's Service is ever surplus: whatever else counts as that has not been looked at anew.
    let is_of_member =
        |(object, facts): &(&ObjectRef, &ObjectFacts)| object.kind == ObjectKind::Service && !goes(facts);
    let due: Vec<_> = surplus.filter(|all| is_of_member(all) || shards_may_go && goes(all.1)).collect();
    let is_of_shards = due.iter().any(|(_, facts)| goes(facts));
    let delete = |(object, facts): (&ObjectRef, &ObjectFacts)| {
        let uid = facts.live.present()?.uid.clone();
        Some(Effect::Delete { object: object.clone(), uid })
    };
    let reason = if is_of_shards { Reason::ShardRemoved } else { Reason::MemberRemoved };
    (reason, due.into_iter().filter_map(delete).collect())
}

fn is_served_without_shards_that_go(view: &View<'_>) -> bool {
    let mut left = SlotSet::all();
    for shard in view.spec.shard_ids() {
        let primary = topology::serving_primary(view, shard).filter(|id| view.reading(*id).is_some());
        if let Some(node) = primary.and_then(|id| view.member(id)).and_then(|m| m.node()) {
            left = left.without(&node.slots);
        }
    }
    left.is_empty() && !view.state.are_slots_moving(view.now)
}

/// A workload that exists with another pod template changes only when its rollout starts: with OnDelete, any evicted pod
/// takes the template that is there.
pub fn belongs_to_rollout(facts: &ObjectFacts) -> bool {
    facts.live.present().is_some_and(|live| live.revision != facts.wanted_revision)
}

/// True if applying would make a workload. Its pods would start beside what is somebody else's: with its Secret, or without a Service.
fn begins_workload(facts: &ObjectFacts) -> bool {
    facts.wanted_revision.is_some() && facts.live.is_absent()
}

/// True if the object's shard has a primary that a new template could endanger.
fn serves(view: &View<'_>, facts: &ObjectFacts) -> bool {
    facts.shard.and_then(|s| topology::serving_primary(view, s)).is_some()
}

/// True if applying would remove the shard's primary: it is handed over first.
fn scales_primary_away(view: &View<'_>, facts: &ObjectFacts) -> bool {
    let holder = facts.shard.and_then(|s| view.shard(s).holder()).map(|(id, _)| id);
    holder.is_some_and(|id| !view.spec.wants(id)) && facts.live.present().is_some()
}

fn held_until(view: &View<'_>, effect: &Effect) -> Option<crate::ids::Timestamp> {
    let (count, last) = view.state.failures.get(&failure_key(Scope::Cluster, effect))?;
    Some(retry_at(*count, *last)).filter(|at| *at > view.now)
}

/// The shard's StatefulSet and what is known of it; `None` if there is only somebody else's of that name.
pub fn workload<'a>(view: &View<'a>, shard: crate::ids::ShardId) -> Option<(&'a ObjectRef, &'a ObjectFacts)> {
    let is_it =
        |f: &ObjectFacts| f.shard == Some(shard) && f.wanted_revision.is_some() && f.taken_by().is_none();
    view.state.objects.iter().find(|(_, f)| is_it(f))
}
