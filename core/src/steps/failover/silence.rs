//! Wants: a primary that does not answer to be replaced, once it can accept no writes any more.
//! Proof: silence for the whole detection window, no replica that hears from it, and a fence: its agent ended the server, a
//!   majority supports it no more and its agent has stopped it, or its pod is gone.
//! Refuses: to take silence for death; to promote beside a primary that its agent, or a replica, says is alive.
//! Story: primary_frozen, primary_frozen_briefly, primary_isolated, primary_node_lost.

use super::{LOOK_AGAIN_MS, blocked, enter};
use crate::{
    agent::isolation::MEMBERS_MIN,
    decide::{StepOutcome, View},
    decision::{BlockReason, Decision, Operation, OperationKind, Phase, Reason, Scope, StepName, WaitReason},
    effect::{Effect, Server},
    ids::{MemberId, ShardId, Timestamp},
    observation::{Link, ServerProcess, Source},
    retry::refusals,
    spec::FailoverMode,
    state::promise_key,
    steps::unless_failing,
    topology::{self, HEARS_BELOW_MS, choice},
};

/// How long a fence may take before it is called impossible: grace of 1 s, kubelet's sync and API latency, with room.
/// Milliseconds.
const FENCE_MAX_MS: i64 = 15_000;
/// Grace of a fencing deletion: the process does not answer, it will not use the time. Seconds.
const FENCE_GRACE_S: u32 = 1;

/// How a silent primary is kept from writing.
enum Fence {
    /// Its agent answers and says that the server does not: it ends it.
    Agent(Server),
    /// Nobody reaches its agent, which stops the writes by itself; a majority must not confirm it again.
    Majority(Vec<(MemberId, String)>),
    /// Its pod is deleted, by UID.
    Pod(String),
}

/// Judges a holder that does not answer.
pub fn step(view: &View<'_>, shard: ShardId, holder: MemberId) -> StepOutcome {
    let open = view.state.operation(OperationKind::Failover, Scope::Shard(shard));
    let fencing = open.filter(|o| o.phase == Phase::Fencing);
    if let Some(open) = fencing
        && view.state.is_leaving(holder)
    {
        return fence_unfinished(view, holder, open.phase_since);
    }
    if let Some(decided) = demote_stale(view, shard, holder) {
        return decided;
    }
    if let Some(wait) = wait(view, shard, holder, fencing) {
        return wait;
    }
    if view.spec.failover.mode == FailoverMode::Manual {
        return blocked(BlockReason::FailoverManual, holder);
    }
    if let Some(unread) = choice::unread(view, shard, Some(holder)) {
        return again(view, WaitReason::CandidateUnanswered, unread);
    }
    let found = choice::choose(view, shard, Some(holder));
    let Some(chosen) = found.chosen else {
        return StepOutcome::Blocked(found.blocked(), Some(holder), found.candidates);
    };
    let Some(fence) = fence(view, shard, holder, chosen) else {
        return blocked(BlockReason::NothingFenced, holder);
    };
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::PrimarySilent);
    decision.about = Some(holder);
    decision.operation = Some(enter(view, shard, Phase::Fencing, holder, "operator"));
    match fence {
        Fence::Agent(server) => decision.effects.push(Effect::Fence { server }),
        Fence::Pod(pod_uid) => {
            let grace_s = Some(FENCE_GRACE_S);
            decision.effects.push(Effect::DeletePod { member: holder, pod_uid, grace_s });
        }
        Fence::Majority(peers) => {
            decision.reason = Reason::PrimaryIsolated;
            decision.grant = Some(chosen);
            decision.operation = Some(enter(view, shard, Phase::Promoting, holder, "operator"));
            let promise = |(member, address)| Effect::Promise { member, address, candidate: chosen };
            decision.effects.extend(peers.into_iter().map(promise));
            decision.effects.extend(choice::promote(view, chosen, &found.candidates));
        }
    }
    decision.candidates = found.candidates;
    unless_failing(view, decision)
}

/// A former primary that is back while the present one does not answer: it is no candidate before it is a replica again.
fn demote_stale(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<StepOutcome> {
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::StalePrimaryDemoted);
    for (id, _) in view.state.members_of(shard).filter(|(id, _)| choice::is_stale_primary(view, *id)) {
        decision.about = decision.about.or(Some(id));
        decision.effects.extend(topology::attach(view, id, holder));
    }
    Some(unless_failing(view, decision)).filter(|outcome| *outcome != StepOutcome::Satisfied)
}

/// Why nothing may be done about the silence yet, if so.
fn wait(
    view: &View<'_>,
    shard: ShardId,
    holder: MemberId,
    fencing: Option<&Operation>,
) -> Option<StepOutcome> {
    let over = silent_since(view, holder).plus_millis(view.spec.failover.detection_window_ms);
    if fencing.is_none() && view.now < over {
        return Some(StepOutcome::Waiting(WaitReason::DetectionWindow, Some(holder), Some(over)));
    }
    if let Some(witness) = hears(view, shard, holder).filter(|_| !is_outvoted(view, shard, holder)) {
        return Some(again(view, WaitReason::PrimaryAliveForReplicas, witness));
    }
    let agent = view.member(holder).and_then(|m| m.agent());
    match agent.map(|a| &a.server) {
        Some(ServerProcess::Running) => Some(again(view, WaitReason::PrimaryAliveForAgent, holder)),
        Some(ServerProcess::Silent { .. } | ServerProcess::Exited(_)) | None => None,
    }
}

fn again(view: &View<'_>, reason: WaitReason, about: MemberId) -> StepOutcome {
    StepOutcome::Waiting(reason, Some(about), Some(view.now.plus_millis(LOOK_AGAIN_MS)))
}

/// Since when nobody has heard of the holder's server, within this epoch: by its agent if that answers, else by the last
/// answer of either.
fn silent_since(view: &View<'_>, holder: MemberId) -> Timestamp {
    let Some(member) = view.member(holder) else { return view.now };
    let noticed = member.server_since;
    let since = match member.agent().map(|a| &a.server) {
        Some(ServerProcess::Silent { since }) => *since,
        Some(ServerProcess::Running | ServerProcess::Exited(_)) => noticed,
        None => view.evidence.last_answers.get(&holder).copied().unwrap_or(noticed),
    };
    since.min(noticed).max(view.state.epoch_since)
}

/// The fastest fence that is to be had.
fn fence(view: &View<'_>, shard: ShardId, holder: MemberId, chosen: MemberId) -> Option<Fence> {
    let member = view.member(holder)?;
    if let Some(server) = fence_by_agent(view, holder) {
        return Some(Fence::Agent(server));
    }
    // Someone who is primary by another's word is not promoted: nobody can tell whose data is right before the holder is gone.
    let is_primary = view.member(chosen).is_some_and(|m| m.is_primary());
    if let Some(peers) = majority(view, shard, holder).filter(|_| !is_primary) {
        return Some(Fence::Majority(peers));
    }
    // A pod is not deleted while somebody hears from its server.
    if hears(view, shard, holder).is_some() {
        return None;
    }
    let pod = member.facts.pod.present()?;
    topology::can_be_fenced(view, holder).then(|| Fence::Pod(pod.uid.clone()))
}

/// The server that its agent shall end, if that answers.
pub fn fence_by_agent(view: &View<'_>, holder: MemberId) -> Option<Server> {
    let member = view.member(holder)?;
    let (address, run_id) = (member.address()?.to_owned(), member.agent()?.run_id.clone());
    Some(Server { member: holder, address, run_id })
}

/// The members whose promise leaves the holder without a majority, if there is an isolation window and enough of them answer.
fn majority(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<Vec<(MemberId, String)>> {
    let members = view.wanted(shard).count();
    if members < MEMBERS_MIN || view.spec.failover.isolation_ms() == 0 {
        return None;
    }
    // What counts is what the holder's agent was told: with other terms, or another roster, it may still be writing.
    let terms = topology::brief(view, shard)?;
    let told = view.member(holder)?.told.as_ref()?;
    if (told.isolation_ms, &told.roster) != (terms.isolation_ms, &terms.roster) {
        return None;
    }
    // Who hears from the holder confirms it as well, and would refuse.
    let answering = |id: MemberId| {
        let member = view.member(id).filter(|_| !hears_from(view, id, holder))?;
        member.agent()?;
        Some((id, member.address()?.to_owned()))
    };
    let mut peers: Vec<_> = view.wanted(shard).filter(|id| *id != holder).filter_map(answering).collect();
    let refused = |id: MemberId| refusals(view, &promise_key(id));
    // Those that have refused are asked only as far as the others are not enough.
    peers.sort_by_key(|(id, _)| refused(*id));
    let willing = peers.iter().filter(|(id, _)| refused(*id).is_none()).count();
    peers.truncate(willing.max(members - members / 2));
    (members - peers.len() < members / 2 + 1).then_some(peers)
}

/// The fence was ordered and is not seen yet.
pub fn fence_unfinished(view: &View<'_>, holder: MemberId, since: Timestamp) -> StepOutcome {
    if view.now.millis_since(since) > FENCE_MAX_MS {
        return blocked(BlockReason::NothingFenced, holder);
    }
    again(view, WaitReason::FenceUnfinished, holder)
}

/// True if those who hear from the holder are no majority with it, and the others can be asked to support it
/// no more: then its own agent has stopped it by now, or they refuse.
fn is_outvoted(view: &View<'_>, shard: ShardId, holder: MemberId) -> bool {
    let is_reached = view.member(holder).is_none_or(|m| m.agent().is_some());
    !is_reached && majority(view, shard, holder).is_some()
}

/// A replica that has heard from the holder lately.
pub fn hears(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<MemberId> {
    view.state.members_of(shard).map(|(id, _)| id).find(|id| hears_from(view, *id, holder))
}

/// True of a replica that is linked to the holder, with a last byte younger than the threshold.
fn hears_from(view: &View<'_>, id: MemberId, holder: MemberId) -> bool {
    let silence_ms = HEARS_BELOW_MS.max(view.spec.failover.detection_window_ms - 1_000);
    let linked = topology::replica_link(view, id)
        .is_some_and(|(source, link)| source == Source::Member(holder) && link != Link::Down);
    linked && view.reading(id).and_then(|r| r.last_io_ms).is_some_and(|ms| ms < silence_ms)
}
