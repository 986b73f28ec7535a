//! Wants: a deleted resource to be let go.
//! Proof: its deletion timestamp, whatever its spec says and whether or not it can be used.
//! Refuses: any other decision from then on. Volumes are never deleted here; owned objects go by owner reference.
//! Story: deleted.

use crate::{
    decide::StepOutcome,
    decision::{Decision, Reason, Scope, StepName, WaitReason},
    effect::Effect,
    ids::Timestamp,
    state::{ClusterState, failure_key},
    steps::retry_at,
};

/// Releases the finalizer once; tries again with a growing pause if that is refused.
pub fn step(state: &ClusterState, now: Timestamp) -> StepOutcome {
    if !state.deleting {
        return StepOutcome::Satisfied;
    }
    let failed = state.failures.get(&failure_key(Scope::Cluster, &Effect::ReleaseFinalizer));
    let again = failed.map(|(count, last)| retry_at(*count, *last)).filter(|at| *at > now);
    if state.released || state.is_pending(Scope::Cluster) || again.is_some() {
        return StepOutcome::Waiting(WaitReason::EffectsPending, None, again);
    }
    let mut decision = Decision::new(StepName::Finalize, Scope::Cluster, Reason::Finalized);
    decision.effects.push(Effect::ReleaseFinalizer);
    StepOutcome::Decided(Box::new(decision))
}
