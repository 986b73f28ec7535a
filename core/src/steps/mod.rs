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

use crate::{
    decide::{StepOutcome, View},
    decision::{Decision, WaitReason},
    ids::Timestamp,
    state::failure_key,
};

/// First pause before an effect that failed is tried again; doubles with each failure. Milliseconds: short enough to go
/// unnoticed when a conflict was the cause.
const RETRY_FIRST_MS: i64 = 200;
/// Longest such pause: a repaired cause is noticed within it, and what is refused for ever costs the journal a few records
/// an hour. Milliseconds.
const RETRY_MAX_MS: i64 = 300_000;

/// When an effect that failed `count` times, last at `last`, may be tried again.
pub fn retry_at(count: u32, last: Timestamp) -> Timestamp {
    let doubled = RETRY_FIRST_MS.saturating_mul(1_i64 << count.saturating_sub(1).min(20));
    last.plus_millis(doubled.min(RETRY_MAX_MS))
}

/// The decision, unless its first effect has failed recently: then a wait until it may be tried again. A decision without
/// effects that changes no operation is none.
pub fn unless_failing(view: &View<'_>, decision: Decision) -> StepOutcome {
    let Some(first) = decision.effects.first() else {
        return if decision.operation.is_some() || decision.grant.is_some() {
            StepOutcome::Decided(Box::new(decision))
        } else {
            StepOutcome::Satisfied
        };
    };
    match view.state.failures.get(&failure_key(decision.scope, first)) {
        Some((count, last)) if retry_at(*count, *last) > view.now => {
            StepOutcome::Waiting(WaitReason::EffectsPending, decision.about, Some(retry_at(*count, *last)))
        }
        Some(_) | None => StepOutcome::Decided(Box::new(decision)),
    }
}
