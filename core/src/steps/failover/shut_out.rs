//! Wants: a shard of a Valkey Cluster whose primary answers the operator, but not the other nodes, to be served all the same.
//! Proof: the primary's own word that it refuses its clients, for longer than it does after any start; a majority of the primaries that hold
//!   it for dead; a replica in sync that they do hear; all of it said in this look. Its agent ends its server first.
//! Refuses: as long as no replica would do better; without its agent; with failover by hand only.
//! Story: cluster_bus_cut, cluster_bus_cut_replica.

use super::{blocked, enter, silence::fence_by_agent};
use crate::{
    decide::{StepOutcome, View},
    decision::{BlockReason, Decision, Phase, Reason, Scope, StepName},
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::Link,
    spec::FailoverMode,
    steps::unless_failing,
    topology::{self, choice},
};

/// A primary that starts, or is reached again, refuses its clients for two seconds, while others may still hold it for dead (`CLUSTER_WRITABLE_DELAY`
/// and the rejoin delay of valkey's cluster_legacy.c). Milliseconds, on top of the window.
const AFTER_START_MS: i64 = 2_000;

/// Judges a holder that serves as far as its server goes. `None`: nothing is amiss, or nothing better is to be had.
pub fn step(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<StepOutcome> {
    let since = view.member(holder)?.down_since?;
    let patience_ms = view.spec.failover.detection_window_ms + AFTER_START_MS;
    if view.now.millis_since(since) < patience_ms || !topology::is_held_for_dead(view, holder) {
        return None;
    }
    let found = choice::choose(view, shard, Some(holder));
    found.chosen.filter(|chosen| would_serve(view, *chosen, holder))?;
    if view.spec.failover.mode == FailoverMode::Manual {
        return Some(blocked(BlockReason::FailoverManual, holder));
    }
    let server = fence_by_agent(view, holder)?;
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::PrimaryShutOut);
    decision.about = Some(holder);
    decision.operation = Some(enter(view, shard, Phase::Fencing, holder, "operator"));
    decision.candidates = found.candidates;
    decision.effects.push(Effect::Fence { server });
    Some(unless_failing(view, decision))
}

/// It has everything, and the others hear it.
fn would_serve(view: &View<'_>, chosen: MemberId, holder: MemberId) -> bool {
    let follows = topology::follows(view, chosen, holder);
    let is_linked = topology::replica_link(view, chosen).is_some_and(|(_, link)| link == Link::Up);
    follows && is_linked && topology::is_heard(view, chosen) && !topology::is_held_for_dead(view, chosen)
}
