//! The rules, one story per file. Each file starts, continues, refuses and ends its own operation.

pub mod failover;
pub mod finalize;
pub mod gossip;
pub mod guard;
pub mod membership;
pub mod objects;
pub mod reshard;
pub mod rollout;
pub mod routing;
pub mod settings;

use crate::{
    decide::{StepOutcome, View},
    decision::{Decision, WaitReason},
    state::failure_key,
};

pub use crate::retry::retry_at;

/// The decision, unless its first effect, or one that its promotion waits for, has failed recently: then a
/// wait until it may be tried again. A decision without effects that changes no operation is none.
pub fn unless_failing(view: &View<'_>, decision: Decision) -> StepOutcome {
    if decision.effects.is_empty() {
        return if decision.operation.is_some() || decision.grant.is_some() {
            StepOutcome::Decided(Box::new(decision))
        } else {
            StepOutcome::Satisfied
        };
    }
    let failed = |effect| view.state.failures.get(&failure_key(decision.scope, effect));
    let again =
        decision.decisive().iter().filter_map(failed).map(|(count, last)| retry_at(*count, *last)).max();
    match again {
        Some(at) if at > view.now => {
            StepOutcome::Waiting(WaitReason::EffectsPending, decision.about, Some(at))
        }
        Some(_) | None => StepOutcome::Decided(Box::new(decision)),
    }
}
