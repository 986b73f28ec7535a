//! Payloads of older layouts, read as today's: one function per step from a layout to the next, never changed once
//! released. What was stored stays as it is; only the reading of it changes.

use serde_json::Value;
use valkeeper_core::event::Event;

/// A step from `schema` of `kind` to the next one.
struct Step {
    kind: u16,
    schema: u16,
    change: fn(Value) -> Value,
}

/// Every step there ever was. Every kind still has its first layout.
const STEPS: &[Step] = &[];

/// The event in a payload of a layout that this program knows.
pub(crate) fn parse(kind: u16, schema: u16, payload: &[u8]) -> Result<Event, serde_json::Error> {
    let Some(first) = STEPS.iter().find(|step| step.kind == kind && step.schema == schema) else {
        return serde_json::from_slice(payload);
    };
    serde_json::from_value(climb(STEPS, first, serde_json::from_slice(payload)?))
}

/// Takes every step from `first` on.
fn climb(steps: &[Step], first: &Step, payload: Value) -> Value {
    let later = steps.iter().filter(|step| step.kind == first.kind && step.schema > first.schema);
    later.fold((first.change)(payload), |payload, step| (step.change)(payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A field was renamed, then its unit changed.
    const PRETENDED: &[Step] = &[
        Step { kind: 1, schema: 1, change: |_| json!("of another kind") },
        Step { kind: 4, schema: 1, change: |old| json!({"window_s": old["window"]}) },
        Step {
            kind: 4,
            schema: 2,
            change: |old| json!({"window_ms": old["window_s"].as_i64().map(|s| s * 1000)}),
        },
    ];

    #[test]
    fn an_old_payload_climbs_every_step_and_a_younger_one_those_that_are_left() {
        let [_, first, second] = PRETENDED else { panic!("three steps") };
        assert_eq!(climb(PRETENDED, first, json!({"window": 3})), json!({"window_ms": 3000}));
        assert_eq!(climb(PRETENDED, second, json!({"window_s": 3})), json!({"window_ms": 3000}));
    }

    #[test]
    fn steps_are_in_order_and_lead_to_todays_layout() {
        for step in STEPS {
            let today = crate::KINDS.iter().find(|kind| kind.number == step.kind).unwrap().schema;
            assert!(step.schema < today, "kind {}", step.kind);
        }
        assert!(STEPS.is_sorted_by_key(|step| (step.kind, step.schema)));
        for kind in crate::KINDS {
            let steps = STEPS.iter().filter(|step| step.kind == kind.number).count();
            assert_eq!(
                steps,
                usize::from(kind.schema - 1),
                "kind {}: a step from each older layout",
                kind.number
            );
        }
    }
}
