//! Wants: a deleted resource to be let go.
//! Proof: its deletion timestamp, as part of the spec.
//! Refuses: any other decision from then on. Volumes are never deleted here; owned objects go by owner reference.
//! Story: deleted.

use crate::{
    decide::{StepOutcome, View},
    decision::{Decision, Reason, Scope, StepName, WaitReason},
    effect::Effect,
};

/// Releases the finalizer once.
pub fn step(view: &View<'_>) -> StepOutcome {
    if !view.spec.deleting {
        return StepOutcome::Satisfied;
    }
    if view.state.is_pending(Scope::Cluster) {
        return StepOutcome::Waiting(WaitReason::EffectsPending, None, None);
    }
    let mut decision = Decision::new(StepName::Finalize, Scope::Cluster, Reason::Finalized);
    decision.effects.push(Effect::ReleaseFinalizer);
    StepOutcome::Decided(Box::new(decision))
}
