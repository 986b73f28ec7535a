//! Random lives of a cluster. One fault at a time with rest in between loses no acknowledged write; any faults at all
//! break no invariant, and once they are over the cluster becomes ready without help. A failure prints the shrunk life: make it a story of tests/golden.

#![allow(missing_docs, reason = "tests")]

use proptest::prelude::*;
use valkeeper_core::sim::{Perturbation, Story};

/// A fault that a shard of three survives without loss, followed by rest and a few writes.
fn single_fault() -> impl Strategy<Value = String> {
    let who = 0..3_u16;
    prop_oneof![
        who.clone().prop_map(|o| format!("kill 0-{o}\nrun\nrun")),
        who.clone().prop_map(|o| format!("freeze 0-{o}\nrun 1s\nthaw 0-{o}\nrun")),
        who.clone().prop_map(|o| format!("delete-pod 0-{o}\nrun")),
        who.clone().prop_map(|o| format!("set switchover=0-{o}\nrun")),
        who.clone().prop_map(|o| format!("stop-operator\nkill 0-{o}\nrun 3s\nstart-operator\nrun")),
        who.prop_map(|o| format!("stop-operator\npromote-by-hand 0-{o}\nrun 1s\nstart-operator\nrun")),
        (2..9_u8).prop_map(|r| format!("set revision=rev-{r}\nrun")),
        Just("restart-operator\nrun".to_owned()),
    ]
}

/// Anything, at any moment.
fn anything() -> impl Strategy<Value = String> {
    let who = 0..3_u16;
    prop_oneof![
        3 => who.clone().prop_map(|o| format!("try kill 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try freeze 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try thaw 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try delete-pod 0-{o}")),
        1 => who.clone().prop_map(|o| format!("node-silent 0-{o}")),
        1 => who.clone().prop_map(|o| format!("node-back 0-{o}")),
        1 => who.prop_map(|o| format!("set switchover=0-{o}")),
        1 => (2..9_u8).prop_map(|r| format!("set revision=rev-{r}")),
        1 => (1..4_u8).prop_map(|r| format!("set replicas={r}")),
        1 => Just("stop-operator".to_owned()),
        2 => Just("restart-operator".to_owned()),
        2 => Just("try write 3".to_owned()),
        6 => (1..40_u16).prop_map(|t| format!("run {}ms", t * 100)),
    ]
}

fn lives(text: &str) -> Result<(), TestCaseError> {
    Story::parse(text)
        .run(Perturbation::None, |_, _| {})
        .map(|_| ())
        .map_err(|e| TestCaseError::fail(format!("{e}\n--- the life:\n{text}")))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_fault_at_a_time_loses_no_acknowledged_write(faults in prop::collection::vec(single_fault(), 1..6)) {
        let mut text = String::from("cluster replicas=2\nrun\nwrite 5\n");
        for fault in faults {
            text.push_str(&fault);
            text.push_str("\nexpect ready\nexpect no-write-lost\nwrite 5\n");
        }
        lives(&text)?;
    }

    #[test]
    fn whatever_happens_the_cluster_becomes_ready_when_it_is_over(
        events in prop::collection::vec(anything(), 1..24),
        durable in any::<bool>(),
    ) {
        let profile = if durable { "Durable" } else { "Cache" };
        let mut text = format!("cluster replicas=2 profile={profile}\nrun\ntry write 5\n");
        text.push_str(&events.join("\n"));
        text.push_str("\nset replicas=2\nstart-operator\n");
        for o in 0..4 {
            text.push_str(&format!("try thaw 0-{o}\nnode-back 0-{o}\n"));
        }
        // Data of unproven lineage is not chosen from by the operator: it says so, and a person names the member.
        let end = if durable { "expect ready-or-blocked HistoriesDiverge" } else { "expect ready" };
        text.push_str(&format!("run\n{end}\nexpect quiet\n"));
        lives(&text)?;
    }
}
