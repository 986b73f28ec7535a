//! Wants: every shard that shall be there to have its share of the slots, every other to have none, and no slot to be left half moved.
//! Proof: whose slots are whose, as each shard's primary said last; what it is handing over, in this look.
//! Refuses: to even out what nobody asked for; to begin before the keys in the slots are counted; to hand anything over while a primary is silent, nodes do not know each other or a slot is
//!   served by nobody, the cluster is paused or its spec refused, the receiver is not complete, or anything else is done in either
//!   shard; a second job of a shard; to touch what went on by itself in the last seconds.
//! Story: cluster_scale_out, cluster_scale_in, cluster_scale_reverted, cluster_scale_paused, cluster_scale_never_starts,
//!   cluster_scale_in_with_replicas, cluster_scale_in_replica_lost, cluster_reshard_source_killed, cluster_reshard_target_killed,
//!   cluster_reshard_refused, cluster_reshard_hangs, cluster_reshard_switchover_of_many, cluster_scale_by_key, cluster_scale_by_key_killed, cluster_scale_by_key_reverted,
//!   cluster_scale_by_key_switchover, cluster_slots_half_moved, cluster_balance_by_keys, cluster_balance_untold, cluster_rebalance,
//!   cluster_rebalance_withdrawn, cluster_rebalance_withdrawn_by_key, cluster_rebalance_beside_shards.

use crate::{
    config::is_atomic,
    decide::{StepOutcome, View},
    decision::{
        Decision, Operation, OperationChange, OperationKind, Phase, Reason, Scope, StepName, Wait, WaitReason,
    },
    effect::{Effect, Means},
    ids::{MemberId, NodeId, ShardId, Timestamp},
    observation::{ExportState, NodeFacts},
    slots::SlotSet,
    spec::{Balance, Topology, Verb},
    state::{ClusterState, Weighed, failure_key, migration_key},
    steps::{gossip, retry_at},
    topology::{
        self,
        half_moved::{given_up, half_moved, shard_of},
        reshard::{Course, JOB, JOB_BY_KEY, Move, first_job, plan},
    },
    weights::{Loads, UNIT, share},
};
use std::collections::{BTreeMap, BTreeSet};

/// When to look again at slots that are on their way: a job was seen to take 0.1 to 0.6 s, and the next one waits for it to be seen.
/// Milliseconds.
pub(super) const LOOK_AGAIN_MS: i64 = 50;
/// Most jobs have ended after this; one that has not takes its time. Milliseconds.
pub(super) const JOB_QUICK_MS: i64 = 2_000;
/// When to look again at a job that hangs: looking often is of no use. Milliseconds.
const LOOK_AGAIN_LONG_MS: i64 = 5_000;
/// A job of a second's worth of keys that takes longer than this hangs: Valkey gives up by itself after a minute without any word. Milliseconds.
const JOB_LONG_MS: i64 = 120_000;
/// When to look again at slots that go key by key, or at a long job. Milliseconds.
const LOOK_AGAIN_BY_KEY_MS: i64 = 500;
/// Slots that go key by key and of which nothing changes for this long may not be on their way any more: most take far less, and who is
/// still at one is told the same again. Milliseconds.
pub const BY_KEY_SILENT_MS: i64 = 3_000;
/// Slots of a job where nobody knows how many keys they hold. Count.
const JOB_SLOTS_UNKNOWN: usize = 64;
/// What was counted longer ago than this is counted again before anything moves. Milliseconds.
const COUNTED_AGE_MAX_MS: i64 = 600_000;

/// Why nothing is handed over now: the reason, whom it is about, when to look again.
type Hindrance = (WaitReason, MemberId, Option<Timestamp>);

/// Hands slots over, one job a shard at a time, until each has its share.
pub fn step(view: &View<'_>) -> StepOutcome {
    match view.spec.topology {
        Topology::Replication => return StepOutcome::Satisfied,
        Topology::Cluster => {}
    }
    let open = view.state.operation(OperationKind::Reshard, Scope::Cluster);
    let wanted = planned(view.state);
    let uncounted = first_uncounted(view);
    let mut moves = half_moved(view.state);
    let mut unwanted = BTreeMap::new();
    // What is planned by load without knowing what is in the slots is not to be taken at its word.
    if uncounted.is_none() || view.spec.balance == Balance::Slots {
        moves.extend(given_up(view.state, &wanted));
        unwanted = unneeded(view.state, &wanted);
    }
    // Each of these says so itself.
    let rests = view.spec.paused || view.state.spec_error.is_some() || !gossip::is_quiet(view);
    if wanted.is_empty() && moves.is_empty() && unwanted.is_empty() {
        return rest(view, uncounted, rests);
    }
    if rests {
        return StepOutcome::Satisfied;
    }
    let mut decision = Decision::new(StepName::Reshard, Scope::Cluster, Reason::SlotsClosed);
    let mut hindrances = Vec::new();
    for (from, slots) in &unwanted {
        match cancel(view, *from, slots) {
            Ok(effect) => {
                decision.reason = Reason::HandoverCancelled;
                decision.effects.push(effect);
            }
            Err(hindrance) => hindrances.extend(hindrance),
        }
    }
    let mut is_handed_over = false;
    let sources = moves.iter().chain(&wanted).map(|m| m.from).filter(|from| !unwanted.contains_key(from));
    for from in sources.collect::<BTreeSet<ShardId>>() {
        let left = moves.iter().find(|m| m.from == from);
        let told = match left {
            Some(left) => finish(view, left),
            None => hand_over(view, from, wanted.iter().filter(|m| m.from == from))
                .and_then(|effect| uncounted.map_or(Ok(effect), |why| Err(Some(why)))),
        };
        is_handed_over |= left.is_none() && told.is_ok();
        match told {
            Ok(effect) => decision.effects.push(effect),
            Err(hindrance) => hindrances.extend(hindrance),
        }
    }
    if decision.effects.is_empty() {
        let uncounted = |(reason, _, _): &&Hindrance| *reason == WaitReason::SlotsUncounted;
        let first = hindrances.iter().find(uncounted);
        let first = first.or_else(|| hindrances.iter().min_by_key(|(_, _, at)| (at.is_none(), *at)));
        return first.copied().map_or(StepOutcome::Satisfied, waiting);
    }
    if is_handed_over && decision.reason != Reason::HandoverCancelled {
        decision.reason = Reason::SlotsHandedOver;
    }
    // What a person has left half moved is mended, and not evened out.
    decision.operation = (open.is_none() && is_handed_over).then(|| OperationChange::Open {
        kind: OperationKind::Reshard,
        phase: Phase::Moving,
        asked_by: asked_by(view),
        member: None,
    });
    StepOutcome::Decided(Box::new(decision))
}

/// Nothing has to move: ends what is open, once that is known.
fn rest(view: &View<'_>, uncounted: Option<Hindrance>, rests: bool) -> StepOutcome {
    let open = view.state.operation(OperationKind::Reshard, Scope::Cluster);
    if open.is_some_and(|open| is_withdrawn(view.state, open)) {
        return withdraw(view);
    }
    // Whoever gave everything away is not gone at once.
    let shards = view.state.spec.as_ref().map_or(view.spec.shards, |spec| spec.shards);
    let going = view.state.members.keys().find(|id| id.shard.0 >= shards);
    // What was wished for may be so already, as far as it can be.
    let ends = open.is_some() || is_wished(view.state) && !rests;
    match (uncounted, going) {
        (Some(why), _) if ends => waiting(why),
        (_, Some(member)) => StepOutcome::Waiting(WaitReason::ShardGoing, Some(*member), None),
        (None, None) if ends => close(view.state),
        (_, None) => StepOutcome::Satisfied,
    }
}

/// A wish is named only where nothing else asks: it can be taken back, and what the spec asks for goes on.
fn asked_by(view: &View<'_>) -> String {
    let wish = open_wish(view.state).filter(|_| !is_specified(view.state));
    wish.unwrap_or_else(|| Operation::by_spec(view.spec.generation))
}

/// What has to move: from when somebody asks for it until all is even. Slots that a person has given to another shard stay there otherwise.
pub fn planned(state: &ClusterState) -> Vec<Move> {
    let Some(spec) = state.spec.as_ref().filter(|_| is_asked(state)) else { return Vec::new() };
    let owned: BTreeMap<ShardId, SlotSet> =
        state.shards.iter().map(|(id, shard)| (*id, shard.slots.clone())).collect();
    let wanted: BTreeSet<ShardId> = spec.shard_ids().collect();
    let settled = state.operation(OperationKind::Reshard, Scope::Cluster).map(|open| open.settled.clone());
    let course = Course { settled: settled.unwrap_or_default(), awaited: on_the_way(state) };
    let weighed = weighed(state);
    let counted = weighed.iter().filter_map(|w| w.weights.as_ref());
    plan(&owned, &wanted, Loads::of(counted, spec.balance).as_ref(), &course)
}

/// What is on its way, by who gets it. What was awaited and was cancelled or refused since is not.
fn on_the_way(state: &ClusterState) -> BTreeMap<ShardId, SlotSet> {
    let mut leaving = SlotSet::default();
    for (from, shard) in &state.shards {
        leaving = leaving.with(&shard.by_key);
        if state.was_told_lately(*from, state.head_time) {
            leaving = leaving.with(&shard.slots);
        }
        let exports = state.holder_node(*from).map(|node| node.exports.as_slice()).unwrap_or_default();
        let running = exports.iter().filter(|export| export.state == ExportState::Running);
        leaving = running.fold(leaving, |all, export| all.with(&export.slots));
    }
    state.shards.iter().map(|(to, shard)| (*to, shard.awaited.common(&leaving))).collect()
}

/// True while slots are evened out, or shall be: as the spec has it, or the user wishes it. What he wishes no more ends first.
fn is_asked(state: &ClusterState) -> bool {
    let Some(Topology::Cluster) = state.spec.as_ref().map(|spec| spec.topology) else { return false };
    match state.operation(OperationKind::Reshard, Scope::Cluster) {
        Some(open) => !is_withdrawn(state, open),
        None => is_specified(state) || is_wished(state),
    }
}

/// True if it is the spec by which slots are not where they shall be: a shard that shall be there owns nothing, one that shall not be there
/// owns anything, or they shall be even by something else than they are.
fn is_specified(state: &ClusterState) -> bool {
    let Some(spec) = &state.spec else { return false };
    spec.balance != state.balanced_by
        || spec.shard_ids().any(|id| is_empty(state, id))
        || state.shards.keys().any(|id| id.0 >= spec.shards && !is_empty(state, *id))
}

/// True if slots were being evened out because the user wished it, and he does not any more.
fn is_withdrawn(state: &ClusterState, open: &Operation) -> bool {
    let wish = state.spec.as_ref().and_then(|spec| spec.rebalance.as_ref());
    !open.is_by_spec() && wish != Some(&open.asked_by) && open_wish(state).is_none()
}

/// True if the user wishes slots to be evened out, or to be even by something else than they are. Slots that are still to be given out are
/// not evened out.
fn is_wished(state: &ClusterState) -> bool {
    let Some(spec) = &state.spec else { return false };
    let differs = spec.balance != state.balanced_by || open_wish(state).is_some();
    differs && !spec.shard_ids().any(|id| is_empty(state, id))
}

fn is_empty(state: &ClusterState, id: ShardId) -> bool {
    state.shards.get(&id).is_none_or(|shard| shard.slots.is_empty())
}

/// The user's wish that slots be evened out, if it has not been fulfilled.
fn open_wish(state: &ClusterState) -> Option<String> {
    let wish = state.spec.as_ref()?.rebalance.clone()?;
    (!state.is_spent(Verb::Rebalance, &wish)).then_some(wish)
}

/// What was counted in the slots of the primaries that there are, the latest last.
fn weighed(state: &ClusterState) -> Vec<&Weighed> {
    let of =
        |weighed: &&Weighed| state.shards.get(&weighed.by.shard).and_then(|s| s.in_force) == Some(weighed.by);
    let mut all: Vec<&Weighed> =
        state.shards.values().filter_map(|s| s.weighed.as_ref()).filter(of).collect();
    all.sort_by_key(|weighed| weighed.at);
    all
}

/// The members whose slots have to be counted before anything moves: all primaries, and those to whom slots have come from elsewhere since.
fn lacking(state: &ClusterState) -> BTreeSet<MemberId> {
    if !is_asked(state) {
        return BTreeSet::new();
    }
    let fresh = |w: &&Weighed| state.head_time.millis_since(w.at) <= COUNTED_AGE_MAX_MS;
    let counted = weighed(state).into_iter().filter(fresh);
    let known = counted.fold(SlotSet::default(), |all, w| all.with(&w.slots));
    let lacks = state.shards.values().filter(|shard| !shard.slots.without(&known).is_empty());
    lacks.filter_map(|shard| shard.in_force).collect()
}

/// The members who have to be asked in the next look what is in their slots: nothing else is waited for.
pub fn uncounted(state: &ClusterState) -> BTreeSet<MemberId> {
    let is_waited_for = state.standing.waits.iter().any(|wait| wait.reason == WaitReason::SlotsUncounted);
    if is_waited_for { lacking(state) } else { BTreeSet::new() }
}

/// Who does not serve cannot be asked: its return is seen anyhow.
fn first_uncounted(view: &View<'_>) -> Option<Hindrance> {
    let member = lacking(view.state).into_iter().next()?;
    let serves = topology::serving_primary(view, member.shard) == Some(member);
    let at = serves.then(|| view.now.plus_millis(LOOK_AGAIN_MS));
    Some((WaitReason::SlotsUncounted, member, at))
}

fn waiting((reason, about, at): Hindrance) -> StepOutcome {
    StepOutcome::Waiting(reason, Some(about), at)
}

/// A handover of slots that came to nothing and was not made good since: whose, and what was said, at both ends if both said something.
pub fn failed(state: &ClusterState) -> Option<(MemberId, String)> {
    state.members.iter().find_map(|(id, member)| {
        member.server()?;
        state.failures.get(&migration_key(id.shard))?;
        let said = member.node()?.exports.iter().find_map(|export| match &export.state {
            ExportState::Failed(words) => Some(format!("{words}{}", theirs(state, *id, &export.to))),
            ExportState::Running => None,
        });
        let shard = state.shards.get(&id.shard).filter(|shard| shard.in_force == Some(*id));
        said.or_else(|| shard?.refusal.clone()).map(|words| (*id, words))
    })
}

/// What the node says that was to get slots from this member.
fn theirs(state: &ClusterState, from: MemberId, to: &NodeId) -> String {
    let giver = state.members.get(&from).and_then(|member| member.node()).map(|node| &node.id);
    let takers = state.members.iter().filter_map(|(id, member)| Some((id, member.node()?)));
    let taker = takers.filter(|(_, node)| node.id == *to).find_map(|(id, node)| {
        let failed = node.import_failed.as_ref().filter(|failed| Some(&failed.from) == giver)?;
        Some(format!("; {id}: {}", failed.words))
    });
    taker.unwrap_or_default()
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
    if node.exports_unread {
        return Err(Some((WaitReason::ShardUnready, source, None)));
    }
    under_way(view, source)?;
    if !view.shard(from).by_key.common(&node.slots).is_empty() {
        quiet(view, source, [from, from])?;
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

/// What is left half moved, once nobody goes on with it.
fn finish(view: &View<'_>, Move { from, to, slots }: &Move) -> Result<Effect, Option<Hindrance>> {
    let source = idle(view, *from)?;
    under_way(view, source)?;
    let giver = view.member(source).and_then(|m| m.node()).ok_or(None)?;
    // Where the source has it open it is the one that says whether anybody goes on: others may give to the same target.
    let leaves = slots.iter().all(|slot| giver.migrating.contains_key(&slot));
    quiet(view, source, [*from, if leaves { *from } else { *to }])?;
    // What is split is made whole as soon as there is who can take it, complete or not.
    let target = if from == to { source } else { idle(view, *to)? };
    let slots = if from == to { slots.clone() } else { slots.common(&giver.slots) };
    if slots.is_empty() {
        return Err(None);
    }
    let node = view.member(target).and_then(|m| m.node()).ok_or(None)?.id.clone();
    let server = topology::server(view, source).ok_or(None)?;
    let effect = Effect::MigrateSlots { server, to: target, node, keys: None, slots, by: Means::ByKey };
    untried(view, source, effect)
}

/// Refuses while a job of atomic migration is under way.
fn under_way(view: &View<'_>, source: MemberId) -> Result<(), Option<Hindrance>> {
    if !view.member(source).and_then(|m| m.node()).is_some_and(NodeFacts::has_job) {
        return Ok(());
    }
    let since = view.shard(source.shard).handed_at;
    if since.is_some_and(|at| view.now.millis_since(at) > JOB_LONG_MS) {
        let later = view.now.plus_millis(LOOK_AGAIN_LONG_MS);
        return Err(Some((WaitReason::HandoverOfSlotsHangs, source, Some(later))));
    }
    let is_quick = since.is_some_and(|at| view.now.millis_since(at) < JOB_QUICK_MS);
    let soon = view.now.plus_millis(if is_quick { LOOK_AGAIN_MS } else { LOOK_AGAIN_BY_KEY_MS });
    Err(Some((WaitReason::SlotsMoving, source, Some(soon))))
}

/// Slots that are on their way atomically, as the operator had told, and that nobody wants to go there any more. By who gives them.
fn unneeded(state: &ClusterState, wanted: &[Move]) -> BTreeMap<ShardId, SlotSet> {
    let mut found = BTreeMap::new();
    let by_load = state.spec.as_ref().filter(|spec| spec.balance != Balance::Slots);
    for from in state.shards.keys() {
        let Some(node) = state.holder_node(*from) else { continue };
        let running = node.exports.iter().filter(|export| export.state == ExportState::Running);
        let slots = running.fold(SlotSet::default(), |all, export| {
            let to = shard_of(state, &export.to);
            let told = to.and_then(|to| Some(state.shards.get(&to)?.awaited.common(&export.slots)));
            // By load it matters little who of those that stay gets a slot, and what arrives elsewhere changes that.
            let is_welcome = by_load.is_some_and(|spec| to.is_some_and(|to| to.0 < spec.shards));
            let is_wanted = |m: &Move| {
                let same = Some(m.to) == to || is_welcome;
                m.from == *from && same && !m.slots.common(&export.slots).is_empty()
            };
            if wanted.iter().any(is_wanted) { all } else { all.with(&told.unwrap_or_default()) }
        });
        if !slots.is_empty() {
            found.insert(*from, slots);
        }
    }
    found
}

/// Has a shard cancel what it is handing over: every slot is still its own.
fn cancel(view: &View<'_>, from: ShardId, slots: &SlotSet) -> Result<Effect, Option<Hindrance>> {
    let source = free(view, from)?;
    let node = view.member(source).and_then(|m| m.node()).ok_or(None)?.id.clone();
    let (server, slots, by) = (topology::server(view, source).ok_or(None)?, slots.clone(), Means::Atomic);
    untried(view, source, Effect::MigrateSlots { server, to: source, node, keys: None, slots, by })
}

/// Refuses while keys are on their way at either end: an agent, or a person, goes on by itself.
fn quiet(view: &View<'_>, source: MemberId, ends: [ShardId; 2]) -> Result<(), Option<Hindrance>> {
    let last = ends.into_iter().filter_map(|id| view.shard(id).handed_at).max();
    match last.map(|at| at.plus_millis(BY_KEY_SILENT_MS)).filter(|until| *until > view.now) {
        None => Ok(()),
        Some(until) => {
            let soon = view.now.plus_millis(LOOK_AGAIN_BY_KEY_MS).min(until);
            Err(Some((WaitReason::SlotsMoving, source, Some(soon))))
        }
    }
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
    let (by, limits) =
        if both_atomic(view, source, target) { (Means::Atomic, JOB) } else { (Means::ByKey, JOB_BY_KEY) };
    let keys = view.reading(source).and_then(|reading| reading.keys).map(|all| {
        let weighed = weighed(view.state);
        let is_counted = weighed.iter().any(|w| w.by == source && w.weights.is_some());
        let counted = Loads::of_keys(weighed.into_iter().filter_map(|w| w.weights.as_ref()));
        let counted = counted.filter(|_| is_counted).map(|loads| loads.grown(&giver.slots, all));
        counted.unwrap_or_else(|| Loads::even(share(all, giver.slots.len())))
    });
    let slots = match &keys {
        Some(keys) => first_job(slots, keys, limits),
        None => slots.iter().rev().take(JOB_SLOTS_UNKNOWN).collect(),
    };
    let (server, node) = (topology::server(view, source).ok_or(None)?, getter.id.clone());
    let keys = keys.map(|keys| keys.sum(&slots) / UNIT);
    untried(view, source, Effect::MigrateSlots { server, to: target, node, keys, slots, by })
}

/// The effect, unless it came to nothing a moment ago.
fn untried(view: &View<'_>, source: MemberId, effect: Effect) -> Result<Effect, Option<Hindrance>> {
    let tried = view.state.failures.get(&failure_key(Scope::Cluster, &effect));
    let is_by_key = matches!(effect, Effect::MigrateSlots { by: Means::ByKey, .. });
    match tried.map(|(count, last)| (*count, retry_at(*count, *last))).filter(|(_, at)| *at > view.now) {
        None => Ok(effect),
        Some((1, at)) => Err(Some((WaitReason::SlotsMoving, source, Some(at)))),
        // Told again, because nothing was seen to change; nobody has said that it failed.
        Some((_, at)) if is_by_key && view.shard(source.shard).refusal.is_none() => {
            Err(Some((WaitReason::SlotsMoving, source, Some(at))))
        }
        Some((_, at)) => Err(Some((WaitReason::HandoverOfSlotsFailed, source, Some(at)))),
    }
}

/// The shard's primary, if it serves and nothing else is done there.
fn free(view: &View<'_>, shard: ShardId) -> Result<MemberId, Option<Hindrance>> {
    let scope = Scope::Shard(shard);
    let busy = |open: &Operation| open.scope == scope;
    let serving = topology::serving_primary(view, shard).filter(|id| view.reading(*id).is_some());
    let primary = serving.ok_or(Some((WaitReason::ShardUnready, MemberId { shard, ordinal: 0 }, None)))?;
    let (leaves, decided) = (view.state.is_leaving(primary), view.decided.iter().any(|d| d.scope == scope));
    if leaves || decided || view.state.operations.iter().any(busy) || view.state.is_pending(scope) {
        return Err(Some((WaitReason::ShardUnready, primary, None)));
    }
    Ok(primary)
}

/// The same, if no handover waits there for slots to arrive: that would never have its turn where several shards give to one.
fn idle(view: &View<'_>, shard: ShardId) -> Result<MemberId, Option<Hindrance>> {
    let primary = free(view, shard)?;
    let awaits = |wait: &Wait| wait.scope == Scope::Shard(shard) && wait.reason == WaitReason::SlotsMoving;
    if view.state.standing.waits.iter().any(awaits) {
        return Err(Some((WaitReason::ShardUnready, primary, None)));
    }
    Ok(primary)
}

/// The same of who gets slots: every member serves, so that what comes is where it would have been.
fn complete(view: &View<'_>, shard: ShardId) -> Result<MemberId, Option<Hindrance>> {
    let primary = idle(view, shard)?;
    let lacks = |id: &MemberId| !topology::is_ready(view, *id, primary);
    match view.wanted(shard).find(lacks) {
        Some(missing) => Err(Some((WaitReason::ShardUnready, missing, None))),
        None => Ok(primary),
    }
}

/// True if both servers know atomic slot migration. Valkey refuses it for slots that are open.
fn both_atomic(view: &View<'_>, source: MemberId, target: MemberId) -> bool {
    let release = |id: MemberId| view.member(id).and_then(|m| m.server()).map(|s| s.version.as_str());
    let knows = |id: MemberId| release(id).is_some_and(|release| is_atomic(release, view.spec.io_threads));
    knows(source) && knows(target)
}

fn close(state: &ClusterState) -> StepOutcome {
    let by_load = state.spec.as_ref().is_some_and(|spec| spec.balance != Balance::Slots);
    let untold = weighed(state).iter().any(|w| w.weights.is_none());
    let reason = if by_load && untold { Reason::BalancedUncounted } else { Reason::ReshardComplete };
    closed(reason)
}

/// Ends what the user wishes no more, once it is seen that nothing is on its way.
fn withdraw(view: &View<'_>) -> StepOutcome {
    if gossip::is_quiet(view) && !view.state.are_slots_moving(view.now) {
        return closed(Reason::RebalanceWithdrawn);
    }
    let soon = view.now.plus_millis(LOOK_AGAIN_BY_KEY_MS);
    StepOutcome::Waiting(WaitReason::SlotsMoving, None, Some(soon))
}

fn closed(reason: Reason) -> StepOutcome {
    let mut decision = Decision::new(StepName::Reshard, Scope::Cluster, reason);
    decision.operation = Some(OperationChange::Close { kind: OperationKind::Reshard });
    StepOutcome::Decided(Box::new(decision))
}
