//! Wants: a valid spec that was looked at in this epoch, and a namespace that stays.
//! Proof: `SpecChanged` since `EpochStarted`; the API server's refusal to make anything in a namespace that is being deleted.
//! Refuses: to decide anything on a spec that is only remembered, or that never was valid; or for a namespace that ends.
//! Story: operator_restart, namespace_ends.

use crate::{
    decide::StepOutcome,
    decision::{BlockReason, WaitReason},
    spec::DesiredCluster,
    state::ClusterState,
};

/// The spec in force, or why there is none. An invalid spec leaves the last valid one in force: failover goes on.
pub fn step(state: &ClusterState) -> Result<&DesiredCluster, Box<StepOutcome>> {
    if !state.spec_seen {
        return Err(Box::new(StepOutcome::Waiting(WaitReason::NotObserved, None, None)));
    }
    if state.namespace_ends {
        return Err(Box::new(StepOutcome::Blocked(BlockReason::NamespaceEnds, None, Vec::new())));
    }
    match (&state.spec, &state.spec_error) {
        (Some(spec), _) => Ok(spec),
        (None, Some(_)) => Err(Box::new(StepOutcome::Blocked(BlockReason::SpecInvalid, None, Vec::new()))),
        (None, None) => Err(Box::new(StepOutcome::Waiting(WaitReason::NotObserved, None, None))),
    }
}
