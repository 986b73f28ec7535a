//! Wants: a valid spec that was looked at in this epoch.
//! Proof: `SpecChanged` since `EpochStarted`.
//! Refuses: to decide anything on a spec that is only remembered, or that never was valid.
//! Story: operator_restart.

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
    match (&state.spec, &state.spec_error) {
        (Some(spec), _) => Ok(spec),
        (None, Some(_)) => Err(Box::new(StepOutcome::Blocked(BlockReason::SpecInvalid, None, Vec::new()))),
        (None, None) => Err(Box::new(StepOutcome::Waiting(WaitReason::NotObserved, None, None))),
    }
}
