//! Wants: every shard that shall be there to have its share of the slots, and every other to have none.
//! Proof: whose slots are whose, as each shard's primary said last; what it is handing over, in this look.
//! Refuses: to even out what nobody asked for; to hand anything over while a primary is silent, nodes do not know each other or a slot is
//!   served by nobody, the cluster is paused or its spec refused, the receiver is not complete, or anything else is done in either
//!   shard; a second job of a shard; servers below 9.0.
//! Story: cluster_scale_out, cluster_scale_in, cluster_scale_reverted, cluster_scale_paused, cluster_scale_never_starts,
//!   cluster_scale_in_with_replicas, cluster_scale_in_replica_lost, cluster_reshard_source_killed, cluster_reshard_target_killed,
//!   cluster_reshard_refused.

use crate::{
    config::{ATOMIC_SLOTS_SINCE, ServerVersion},
    decide::{StepOutcome, View},
    decision::{
        Decision, Operation, OperationChange, OperationKind, Phase, Reason, Scope, StepName, WaitReason,
    },
    effect::Effect,
    ids::{MemberId, ShardId, Timestamp},
    observation::ExportState,
    slots::SlotSet,
    spec::Topology,
    state::{ClusterState, failure_key, migration_key},
    steps::{gossip, retry_at},
    topology::{
        self,
        reshard::{Move, first_job, plan},
    },
};
use std::collections::{BTreeMap, BTreeSet};

/// When to look again at slots that are on their way: a job was seen to take 0.1 to 0.6 s. Milliseconds.
const LOOK_AGAIN_MS: i64 = 100;
/// The same where one is under way for so long that looking often is of no use. Milliseconds.
const LOOK_AGAIN_LONG_MS: i64 = 5_000;
/// A job of a second's worth of keys that takes longer than this hangs: Valkey gives up by itself after a minute without any word. Milliseconds.
const JOB_LONG_MS: i64 = 120_000;
/// Slots of a job where nobody knows how many keys they hold. Count.
const JOB_SLOTS_UNKNOWN: usize = 64;

/// Why nothing is handed over now: the reason, whom it is about, when to look again.
type Hindrance = (WaitReason, MemberId, Option<Timestamp>);

/// Hands slots over, one job a shard at a time, until each has its share.
pub fn step(view: &View<'_>) -> StepOutcome {
    match view.spec.topology {
        Topology::Replication => return StepOutcome::Satisfied,
        Topology::Cluster => {}
    }
    let open = view.state.operation(OperationKind::Reshard, Scope::Cluster);
    let moves = planned(view.state);
    if moves.is_empty() {
        // Whoever gave everything away is not gone at once.
        let wanted = view.state.spec.as_ref().map_or(view.spec.shards, |spec| spec.shards);
        let going = view.state.members.keys().find(|id| id.shard.0 >= wanted);
        return match (going, open) {
            (Some(member), _) => StepOutcome::Waiting(WaitReason::ShardGoing, Some(*member), None),
            (None, Some(_)) => close(),
            (None, None) => StepOutcome::Satisfied,
        };
    }
    // Each of these says so itself.
    if view.spec.paused || view.state.spec_error.is_some() || !gossip::is_quiet(view) {
        return StepOutcome::Satisfied;
    }
    let mut decision = Decision::new(StepName::Reshard, Scope::Cluster, Reason::SlotsHandedOver);
    let mut hindrances = Vec::new();
    for from in moves.iter().map(|m| m.from).collect::<BTreeSet<ShardId>>() {
        match hand_over(view, from, moves.iter().filter(|m| m.from == from)) {
            Ok(effect) => decision.effects.push(effect),
            Err(hindrance) => hindrances.extend(hindrance),
        }
    }
    if decision.effects.is_empty() {
        let first = hindrances.iter().min_by_key(|(_, _, at)| (at.is_none(), *at));
        return first.map_or(StepOutcome::Satisfied, |(reason, about, at)| {
            StepOutcome::Waiting(*reason, Some(*about), *at)
        });
    }
    decision.operation = open.is_none().then(|| OperationChange::Open {
        kind: OperationKind::Reshard,
        phase: Phase::Moving,
        asked_by: format!("generation {}", view.spec.generation),
        member: None,
    });
    StepOutcome::Decided(Box::new(decision))
}

/// What has to move: as long as a shard that shall be there owns nothing, or one that shall not be there owns anything; and from then on
/// until all is even. Slots that a person has given to another shard stay there otherwise.
pub fn planned(state: &ClusterState) -> Vec<Move> {
    let Some(spec) = &state.spec else { return Vec::new() };
    let owned: BTreeMap<ShardId, SlotSet> =
        state.shards.iter().map(|(id, shard)| (*id, shard.slots.clone())).collect();
    let wanted: BTreeSet<ShardId> = spec.shard_ids().collect();
    let is_empty = |id: &ShardId| owned.get(id).is_none_or(SlotSet::is_empty);
    let asked = wanted.iter().any(is_empty) || owned.keys().any(|id| !wanted.contains(id) && !is_empty(id));
    let is_open = state.operation(OperationKind::Reshard, Scope::Cluster).is_some();
    if asked || is_open { plan(&owned, &wanted) } else { Vec::new() }
}

/// A handover of slots that came to nothing and was not made good since: whose, and Valkey's words.
pub fn failed(state: &ClusterState) -> Option<(MemberId, &str)> {
    state.members.iter().find_map(|(id, member)| {
        member.server()?;
        state.failures.get(&migration_key(id.shard))?;
        let said = member.node()?.exports.iter().find_map(|export| match &export.state {
            ExportState::Failed(words) => Some(words.as_str()),
            ExportState::Running => None,
        });
        said.map(|words| (*id, words))
    })
}

/// The next job of a shard, or why there is none now.
fn hand_over<'a>(
    view: &View<'_>,
    from: ShardId,
    moves: impl Iterator<Item = &'a Move>,
) -> Result<Effect, Option<Hindrance>> {
    let source = idle(view, from)?;
    let node = view.member(source).and_then(|m| m.node()).ok_or(None)?;
    let soon = Some(view.now.plus_millis(LOOK_AGAIN_MS));
    if node.exports_unread || !hands_over(view, source) {
        return Err(Some((WaitReason::ShardUnready, source, None)));
    }
    if node.is_giving() {
        let told = view.state.failures.get(&migration_key(from)).map(|(_, at)| *at);
        if told.is_some_and(|at| view.now.millis_since(at) > JOB_LONG_MS) {
            let later = view.now.plus_millis(LOOK_AGAIN_LONG_MS);
            return Err(Some((WaitReason::HandoverOfSlotsHangs, source, Some(later))));
        }
        return Err(Some((WaitReason::SlotsMoving, source, soon)));
    }
    let mut hindrance = None;
    for Move { from: _, to, slots } in moves {
        // What it has given already, and nobody was seen to have got yet, it cannot give again.
        let slots = slots.common(&node.slots);
        if slots.is_empty() {
            hindrance = Some((WaitReason::SlotsMoving, source, soon));
            continue;
        }
        match complete(view, *to) {
            Ok(target) => return job(view, source, target, &slots),
            Err(why) => hindrance = why.or(hindrance),
        }
    }
    Err(hindrance)
}

fn job(
    view: &View<'_>,
    source: MemberId,
    target: MemberId,
    slots: &SlotSet,
) -> Result<Effect, Option<Hindrance>> {
    let (giver, getter) =
        (view.member(source).and_then(|m| m.node()), view.member(target).and_then(|m| m.node()));
    let (giver, getter) = (giver.ok_or(None)?, getter.ok_or(None)?);
    let keys = view.reading(source).and_then(|reading| reading.keys);
    let slots = match keys {
        Some(keys) => first_job(slots, giver.slots.len(), keys),
        None => slots.iter().rev().take(JOB_SLOTS_UNKNOWN).collect(),
    };
    let of_these = |keys: u64| keys * slots.len() as u64 / (giver.slots.len() as u64).max(1);
    let (server, node) = (topology::server(view, source).ok_or(None)?, getter.id.clone());
    let effect =
        Effect::MigrateSlots { server, to: target, node, keys: keys.map(of_these), slots: slots.clone() };
    let tried = view.state.failures.get(&failure_key(Scope::Cluster, &effect));
    match tried.map(|(count, last)| (*count, retry_at(*count, *last))).filter(|(_, at)| *at > view.now) {
        None => Ok(effect),
        Some((1, at)) => Err(Some((WaitReason::SlotsMoving, source, Some(at)))),
        Some((_, at)) => Err(Some((WaitReason::HandoverOfSlotsFailed, source, Some(at)))),
    }
}

/// The shard's primary, if it serves and nothing else is done there.
fn idle(view: &View<'_>, shard: ShardId) -> Result<MemberId, Option<Hindrance>> {
    let scope = Scope::Shard(shard);
    let busy = |open: &Operation| open.scope == scope;
    let serving = topology::serving_primary(view, shard).filter(|id| view.reading(*id).is_some());
    let primary = serving.ok_or(Some((WaitReason::ShardUnready, MemberId { shard, ordinal: 0 }, None)))?;
    if view.state.operations.iter().any(busy) || view.state.is_pending(scope) {
        return Err(Some((WaitReason::ShardUnready, primary, None)));
    }
    Ok(primary)
}

/// The same of who gets slots: every member serves, so that what comes is where it would have been.
fn complete(view: &View<'_>, shard: ShardId) -> Result<MemberId, Option<Hindrance>> {
    let primary = idle(view, shard)?;
    let lacks = |id: &MemberId| !topology::is_ready(view, *id, primary);
    match view.wanted(shard).find(lacks).or(Some(primary).filter(|id| !hands_over(view, *id))) {
        Some(missing) => Err(Some((WaitReason::ShardUnready, missing, None))),
        None => Ok(primary),
    }
}

/// True if the server's version knows atomic slot migration.
fn hands_over(view: &View<'_>, id: MemberId) -> bool {
    let version =
        view.member(id).and_then(|m| m.server()).and_then(|s| s.version.parse::<ServerVersion>().ok());
    version.is_some_and(|version| version >= ATOMIC_SLOTS_SINCE)
}

fn close() -> StepOutcome {
    let mut decision = Decision::new(StepName::Reshard, Scope::Cluster, Reason::ReshardComplete);
    decision.operation = Some(OperationChange::Close { kind: OperationKind::Reshard });
    StepOutcome::Decided(Box::new(decision))
}
