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
        who.clone().prop_map(|o| format!("cordon 0-{o}\nrun\nuncordon 0-{o}\nrun")),
        // A drain: the next pod is on another node.
        (who.clone(), 0..20_u16)
            .prop_map(|(o, t)| format!("cordon 0-{o}\nrun {}ms\ndelete-pod 0-{o}\nrun", t * 50)),
        who.clone().prop_map(|o| format!("stop-operator\nkill 0-{o}\nrun 3s\nstart-operator\nrun")),
        who.clone().prop_map(|o| format!("part 0-{o}\nrun 10s\nunite\nrun")),
        who.clone().prop_map(|o| format!("freeze-pod 0-{o}\nrun 10s\nthaw-pod 0-{o}\nrun")),
        who.prop_map(|o| format!("stop-operator\npromote-by-hand 0-{o}\nrun 1s\nstart-operator\nrun")),
        (2..9_u8).prop_map(|r| format!("set revision=rev-{r}\nrun")),
        Just("restart-operator\nrun".to_owned()),
    ]
}

/// Servers that hand slots over atomically, and others that do it key by key.
fn release() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("9.1.2"), Just("8.1.1")]
}

/// A fault that a Valkey Cluster of three shards of two survives without loss, followed by rest.
fn single_fault_of_a_valkey_cluster() -> impl Strategy<Value = String> {
    let who = (0..3_u16, 0..2_u16);
    prop_oneof![
        who.clone().prop_map(|(s, o)| format!("try kill {s}-{o}\nrun\nrun")),
        who.clone().prop_map(|(s, o)| format!("try freeze {s}-{o}\nrun 1s\ntry thaw {s}-{o}\nrun")),
        who.clone().prop_map(|(s, o)| format!("try delete-pod {s}-{o}\nrun")),
        (0..2_u16, 0..2_u16).prop_map(|(s, o)| format!("set switchover={s}-{o}\nrun")),
        who.clone().prop_map(|(s, o)| format!("try cordon {s}-{o}\nrun\ntry uncordon {s}-{o}\nrun")),
        // A drain of a node with members of two shards: their next pods are on others.
        (who.clone(), 0..20_u16).prop_map(|((s, o), t)| {
            let both = [format!("{s}-{o}"), format!("{}-{o}", (s + 1) % 3)];
            let each = |verb: &str| both.each_ref().map(|id| format!("try {verb} {id}\n")).concat();
            format!("{}run {}ms\n{}run", each("cordon"), t * 50, each("delete-pod"))
        }),
        who.clone()
            .prop_map(|(s, o)| format!("stop-operator\ntry kill {s}-{o}\nrun 3s\nstart-operator\nrun")),
        (2..6_u16).prop_map(|n| format!("set shards={n}\nrun\nexpect balanced")),
        // In the middle of it.
        (2..6_u16, 10..40_u16, who.clone()).prop_map(|(n, t, (s, o))| {
            format!("set shards={n}\nrun {}ms\ntry kill {s}-{o}\nrun\nexpect balanced", t * 100)
        }),
        (2..6_u16, 10..40_u16).prop_map(|(n, t)| {
            format!("set shards={n}\nrun {}ms\nrestart-operator\nrun\nexpect balanced", t * 100)
        }),
        // Even by keys for a while, with somebody killed on the way there.
        (0..15_000_u16, 1..400_u16, 1..9_u16, who.clone()).prop_map(|(slot, keys, t, (s, o))| {
            let fill = format!("fill {slot}-{} {keys}", slot + 999);
            let kill = format!("run {}ms\ntry kill {s}-{o}\nrun\nrun", t * 100);
            format!("{fill}\nset balance=Keys\n{kill}\nset balance=Slots\nrun\nexpect balanced")
        }),
        who.clone().prop_map(|(s, o)| format!("part {s}-{o}\nrun 10s\nunite\nrun")),
        (who.clone(), 10..120_u16)
            .prop_map(|((s, o), t)| format!("bus-cut {s}-{o}\nrun {}ms\nbus-heal {s}-{o}\nrun", t * 100)),
        who.prop_map(|(s, o)| format!("try freeze-pod {s}-{o}\nrun 10s\ntry thaw-pod {s}-{o}\nrun")),
        Just("kill 0-0 1-0\nrun".to_owned()),
        (2..9_u8).prop_map(|r| format!("set revision=rev-{r}\nrun")),
        Just("restart-operator\nrun".to_owned()),
    ]
}

/// What some see of a member and the rest does not, and its end.
fn one_sided() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("disobey"),
        Just("obey"),
        Just("fill-disk"),
        Just("free-disk"),
        Just("unseen"),
        Just("seen"),
        Just("cut"),
        Just("heal"),
    ]
}

/// Anything, at any moment, in a shard of so many members.
fn anything(members: u16) -> impl Strategy<Value = String> {
    let who = 0..members;
    prop_oneof![
        3 => who.clone().prop_map(|o| format!("try kill 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try freeze 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try thaw 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try delete-pod 0-{o}")),
        1 => who.clone().prop_map(|o| format!("node-silent 0-{o}")),
        1 => who.clone().prop_map(|o| format!("node-back 0-{o}")),
        2 => who.clone().prop_map(|o| format!("try cordon 0-{o}")),
        1 => who.clone().prop_map(|o| format!("try uncordon 0-{o}")),
        1 => who.clone().prop_map(|o| format!("part 0-{o}")),
        1 => who.clone().prop_map(|o| format!("part 0-{o} 0-{}", (o + 1) % 3)),
        1 => (who.clone(), who.clone()).prop_map(|(o, to)| format!("confine 0-{o} to 0-{to}")),
        2 => Just("unite".to_owned()),
        2 => (one_sided(), who.clone()).prop_map(|(verb, o)| format!("{verb} 0-{o}")),
        1 => (0..40_u16, 0..30_u16)
            .prop_map(|(t, l)| format!("set repl-timeout={}ms loading={}ms", 2_000 + t * 250, l * 100)),
        1 => (0..5_u16).prop_map(|t| format!("set append={}ms", t * 100)),
        1 => who.prop_map(|o| format!("set switchover=0-{o}")),
        1 => (2..9_u8).prop_map(|r| format!("set revision=rev-{r}")),
        1 => (1..4_u8).prop_map(|r| format!("set replicas={r}")),
        1 => Just("stop-operator".to_owned()),
        2 => Just("restart-operator".to_owned()),
        2 => Just("try write 3".to_owned()),
        6 => (1..40_u16).prop_map(|t| format!("run {}ms", t * 100)),
    ]
}

/// Anything in a Valkey Cluster of three shards of two.
fn anything_in_a_valkey_cluster() -> impl Strategy<Value = String> {
    let who = (0..3_u16, 0..2_u16);
    let verb = prop_oneof![
        4 => Just("try kill"),
        2 => Just("try freeze"),
        3 => Just("try thaw"),
        3 => Just("try delete-pod"),
        1 => Just("node-silent"),
        1 => Just("node-back"),
        1 => Just("part"),
        2 => Just("try cordon"),
        1 => Just("try uncordon"),
        2 => Just("bus-cut"),
        1 => Just("bus-heal"),
    ];
    prop_oneof![
        10 => (verb, who.clone()).prop_map(|(verb, (s, o))| format!("{verb} {s}-{o}")),
        1 => who.clone().prop_map(|(s, o)| format!("set switchover={s}-{o}")),
        1 => Just("unite".to_owned()),
        1 => (2..9_u8).prop_map(|r| format!("set revision=rev-{r}")),
        2 => (2..6_u16).prop_map(|n| format!("set shards={n}")),
        1 => prop_oneof![Just("Slots"), Just("Keys"), Just("Bytes")].prop_map(|by| format!("set balance={by}")),
        1 => (0..9_u8).prop_map(|n| format!("set rebalance=rebalance@{n}")),
        1 => Just("set rebalance=no".to_owned()),
        1 => (0..15_000_u16, 1..400_u16).prop_map(|(slot, keys)| format!("fill {slot}-{} {keys}", slot + 999)),
        1 => Just("tells-no-keys".to_owned()),
        1 => (0..16_384_u16, who.clone(), who)
            .prop_map(|(slot, (s, o), (t, p))| format!("try half-move {slot} {s}-{o} to {t}-{p}")),
        1 => Just("stop-operator".to_owned()),
        2 => Just("restart-operator".to_owned()),
        2 => (0..3_u16).prop_map(|s| format!("try write 3 to {s}")),
        6 => (1..40_u16).prop_map(|t| format!("run {}ms", t * 100)),
    ]
}

/// What must never make two members of a shard of so many accept writes at the same time.
fn anything_but_by_hand(members: u16) -> impl Strategy<Value = String> {
    let who = 0..members;
    let other = move |o: u16| (o + 1) % members;
    prop_oneof![
        4 => anything(members),
        2 => who.clone().prop_map(|o| format!("part 0-{o}\nrun 4s")),
        2 => who.clone().prop_map(move |o| format!("part 0-{o} 0-{}\nrun 4s", other(o))),
        2 => who.clone().prop_map(move |o| format!("confine 0-{o} to 0-{}\nrun 6s", other(o))),
        1 => who.prop_map(|o| format!("stop-operator\ntry kill 0-{o}\nrun 6s")),
        1 => Just("start-operator\nrun 200ms".to_owned()),
    ]
}

fn lives(text: &str) -> Result<(), TestCaseError> {
    Story::parse(text)
        .run(Perturbation::None, |_, _| {})
        .map(|_| ())
        .map_err(|e| TestCaseError::fail(format!("{e}\n--- the life:\n{text}")))
}

/// Lives per property: as many as CI has time for, or LIVES.
fn cases() -> u32 {
    option_env!("LIVES").and_then(|n| n.parse().ok()).unwrap_or(96)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

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
    fn one_fault_at_a_time_loses_no_acknowledged_write_of_a_valkey_cluster(
        faults in prop::collection::vec(single_fault_of_a_valkey_cluster(), 1..5),
        release in release(),
    ) {
        let mut text = format!("cluster topology=Cluster shards=3 replicas=1 release={release}\nrun\nwrite 5\n");
        for fault in faults {
            text.push_str(&fault);
            text.push_str("\nexpect ready\nexpect no-write-lost\nwrite 5\nwrite 1 to 1\ntry write 1 to 2\n");
        }
        lives(&text)?;
    }

    #[test]
    fn whatever_happens_the_cluster_becomes_ready_when_it_is_over(
        events in prop::collection::vec(anything(3), 1..24),
        durable in any::<bool>(),
    ) {
        let profile = if durable { "Durable" } else { "Cache" };
        let mut text = format!("cluster replicas=2 profile={profile}\nrun\ntry write 5\n");
        text.push_str(&events.join("\n"));
        text.push_str("\nunite\nset replicas=2 append=0ms\nstart-operator\n");
        for o in 0..4 {
            text.push_str(&format!("try thaw 0-{o}\nnode-back 0-{o}\ntry uncordon 0-{o}\n"));
            text.push_str(&format!("obey 0-{o}\nfree-disk 0-{o}\nseen 0-{o}\nheal 0-{o}\n"));
        }
        // Data of unproven lineage is not chosen from by the operator: it says so, and a person names the member.
        let end = if durable { "expect ready-or-blocked HistoriesDiverge" } else { "expect ready" };
        text.push_str(&format!("run\n{end}\nexpect quiet\n"));
        lives(&text)?;
    }

    #[test]
    fn whatever_happens_a_valkey_cluster_becomes_ready_when_it_is_over(
        events in prop::collection::vec(anything_in_a_valkey_cluster(), 1..24),
        durable in any::<bool>(),
        release in release(),
    ) {
        let profile = if durable { "Durable" } else { "Cache" };
        let mut text = format!(
            "cluster topology=Cluster shards=3 replicas=1 profile={profile} release={release}\nrun\ntry write 5\n"
        );
        text.push_str(&events.join("\n"));
        text.push_str("\nunite\nset shards=3\nstart-operator\n");
        for (s, o) in (0..5).flat_map(|s| (0..2).map(move |o| (s, o))) {
            text.push_str(&format!("try thaw {s}-{o}\nnode-back {s}-{o}\nbus-heal {s}-{o}\ntry uncordon {s}-{o}\n"));
        }
        let end = if durable { "expect ready-or-blocked HistoriesDiverge" } else { "expect ready" };
        text.push_str(&format!("run\n{end}\nexpect quiet\n"));
        lives(&text)?;
    }

    #[test]
    fn two_members_never_accept_writes_at_the_same_time(
        (members, events) in prop_oneof![Just(3_u16), Just(5)].prop_flat_map(|members| {
            (Just(members), prop::collection::vec(anything_but_by_hand(members), 1..24))
        }),
        durable in any::<bool>(),
        (lost, repeated, late_ms, seed) in (0..50_u8, 0..50_u8, 0..900_u16, any::<u32>()),
        drift in prop::collection::vec(-1_000..1_000_i32, 5),
    ) {
        let profile = if durable { "Durable" } else { "Cache" };
        let mut text = format!("post lost {lost} repeated {repeated} late {late_ms}ms seed {seed}\n");
        for (o, ppm) in drift.iter().enumerate() {
            text.push_str(&format!("drift 0-{o} {ppm}\n"));
        }
        text.push_str(&format!("cluster replicas={} profile={profile}\nrun\n", members - 1));
        for event in events {
            text.push_str(&format!("{event}\nexpect both-writable 0ms\n"));
        }
        lives(&text)?;
    }
}
