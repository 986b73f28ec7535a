//! Wants: a shard of a Valkey Cluster whose primary answers the operator, but not the other nodes, to be served all the same.
//! Proof: all of it said in this look: the primary refuses its clients, has done so for longer than after any start, and hears no majority of the
//!   primaries; a majority of those serves and holds it for dead; a replica has all that it has, and they hear that. Its agent ends its server first.
//! Refuses: as long as no replica would do better; without its agent; with failover by hand only.
//! Story: cluster_bus_cut, cluster_bus_cut_pair, cluster_bus_cut_replica.

use super::{enter, silence::fence_by_agent};
use crate::{
    decide::{StepOutcome, View},
    decision::{Decision, Phase, Reason, Scope, StepName},
    effect::Effect,
    ids::{MemberId, ShardId},
    observation::Link,
    spec::FailoverMode,
    steps::unless_failing,
    topology::{self, HEARS_BELOW_MS, choice},
};

/// A primary that starts, or is reached again, refuses its clients for two seconds, while others may still hold it for dead (`CLUSTER_WRITABLE_DELAY`
/// and the rejoin delay of valkey's cluster_legacy.c). Milliseconds, on top of the window.
const AFTER_START_MS: i64 = 2_000;

/// Judges a holder that serves as far as its server goes. `None`: nothing is amiss, or nothing better is to be had.
pub fn step(view: &View<'_>, shard: ShardId, holder: MemberId) -> Option<StepOutcome> {
    let since = view.member(holder)?.down_since?;
    let patience_ms = view.spec.failover.detection_window_ms + AFTER_START_MS;
    let by_hand = view.spec.failover.mode == FailoverMode::Manual;
    if by_hand || view.now.millis_since(since) < patience_ms || !topology::is_shut_out(view, holder) {
        return None;
    }
    if choice::unread(view, shard, Some(holder)).is_some() {
        return None;
    }
    let found = choice::choose(view, shard, Some(holder));
    // What is chosen once it is ended is the same: of equals, one that is heard.
    found.chosen.filter(|chosen| would_serve(view, *chosen, holder))?;
    let server = fence_by_agent(view, holder)?;
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(shard), Reason::PrimaryShutOut);
    decision.about = Some(holder);
    decision.operation = Some(enter(view, shard, Phase::Fencing, holder, "operator"));
    decision.candidates = found.candidates;
    decision.effects.push(Effect::Fence { server });
    Some(unless_failing(view, decision))
}

/// It has all that the holder has, which accepts nothing any more, and the others hear it.
fn would_serve(view: &View<'_>, chosen: MemberId, holder: MemberId) -> bool {
    let follows = topology::follows(view, chosen, holder);
    let is_linked = topology::replica_link(view, chosen).is_some_and(|(_, link)| link == Link::Up);
    let has_all = view.reading(chosen).zip(view.reading(holder)).is_some_and(|(it, holder)| {
        it.offset >= holder.offset && it.last_io_ms.is_some_and(|ms| ms < HEARS_BELOW_MS)
    });
    follows
        && is_linked
        && has_all
        && topology::is_heard(view, chosen)
        && topology::is_electable(view, chosen)
}
