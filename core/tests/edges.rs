//! Looks that no story can bring about: what a turn must not conclude from them.
#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "helpers of tests"
)]

use std::collections::BTreeSet;
use valkeeper_core::{
    decision::{Decision, Reason, WaitReason},
    effect::{Effect, Promotion},
    event::{Event, Record},
    ids::{Digest, MemberId, ReplId, ShardId},
    observation::{
        Link, LiveObject, MemberFacts, NodeFacts, ObjectKind, ObjectRef, Observed, Seen, ServerFacts,
        ServerRole, Source, Why,
    },
    projection::status::{ConditionKind, status},
    sim::{Perturbation, Sim, Story},
    spec::{SwitchoverWish, Verb},
    turn::{Turn, changed, turn},
};

fn after(script: &str) -> Sim {
    Story::parse(script).run(Perturbation::None, |_, _| {}).unwrap_or_else(|e| panic!("{e}"))
}

fn member(ordinal: u16) -> MemberId {
    MemberId::new(0, ordinal)
}

fn server(seen: &mut Seen, ordinal: u16) -> &mut ServerFacts {
    match &mut seen.members.get_mut(&member(ordinal)).expect("looked at").server {
        Observed::Present(facts) => facts,
        other => panic!("0-{ordinal} is {other:?}"),
    }
}

fn unlink(facts: &mut ServerFacts) {
    if let ServerRole::Replica { link, .. } = &mut facts.role {
        *link = Link::Down;
    }
}

fn decisions(made: &Turn) -> Vec<&Decision> {
    made.events.iter().filter_map(Event::decided).collect()
}

fn waits_for(made: &Turn, reason: WaitReason) -> bool {
    made.events.iter().any(|e| match e {
        Event::StandingChanged { standing, .. } => standing.waits.iter().any(|w| w.reason == reason),
        _ => false,
    })
}

const THREE: &str = "cluster replicas=2 profile=Durable\nrun\nwrite 1000\nexpect primary 0-0";

#[test]
fn a_refused_connection_proves_nothing_while_replicas_hear_from_the_primary() {
    let mut sim = after(THREE);
    let mut seen = sim.world.look(&sim.state);
    seen.members.get_mut(&member(0)).expect("looked at").server = Observed::Absent;
    seen.evidence.readings.remove(&member(0));
    let made = turn(&sim.state, &seen, sim.world.now());
    assert!(decisions(&made).is_empty(), "{:?}", decisions(&made));
    assert!(waits_for(&made, WaitReason::PrimaryAliveForReplicas));
}

#[test]
fn a_member_that_did_not_answer_this_look_is_waited_for() {
    let mut sim = after(THREE);
    sim.world.kill(member(0)).expect("it runs");
    let mut seen = sim.world.look(&sim.state);
    for ordinal in [1, 2] {
        seen.members.remove(&member(ordinal));
        seen.evidence.readings.remove(&member(ordinal));
    }
    let made = turn(&sim.state, &seen, sim.world.now());
    assert!(decisions(&made).is_empty(), "{:?}", decisions(&made));
}

#[test]
fn replicas_of_an_address_that_is_gone_can_be_promoted() {
    let mut sim = after(THREE);
    let mut seen = sim.world.look(&sim.state);
    seen.members.insert(
        member(0),
        MemberFacts { pod: Observed::Absent, server: Observed::Absent, agent: Observed::Absent, node: None },
    );
    seen.evidence.readings.remove(&member(0));
    for ordinal in [1, 2] {
        let source = Source::Foreign("10.0.0.99:6379".into());
        server(&mut seen, ordinal).role = ServerRole::Replica { source, link: Link::Down };
    }
    let made = turn(&sim.state, &seen, sim.world.now());
    assert_eq!(decisions(&made).first().and_then(|d| d.grant), Some(member(1)));
}

#[test]
fn a_fork_of_the_history_does_not_outrank_who_stayed_on_it() {
    let mut sim = after(THREE);
    sim.world.kill(member(0)).expect("it runs");
    let mut seen = sim.world.look(&sim.state);
    unlink(server(&mut seen, 1));
    let fork = server(&mut seen, 2);
    fork.replid2 = Some(std::mem::replace(&mut fork.replid, ReplId("fork".into())));
    fork.replid2_offset = Some(4);
    unlink(fork);
    seen.evidence.readings.get_mut(&member(2)).expect("read").offset = 5;
    let made = turn(&sim.state, &seen, sim.world.now());
    assert_eq!(decisions(&made).first().and_then(|d| d.grant), Some(member(1)));
}

#[test]
fn a_link_that_breaks_long_after_the_primary_fell_silent_was_there_when_it_was_lost() {
    after(
        "cluster replicas=1 profile=Durable\nrun\nwrite 5\nnode-silent 0-0\nrun 10s\ncut 0-1\nrun 5s\n\
         kill 0-0\nnode-back 0-0\nrun\nexpect primary 0-1\nexpect no-write-lost",
    );
}

/// What becomes of a turn after `seen`.
fn goes_on(sim: &mut Sim, seen: &Seen) {
    let made = turn(&sim.state, seen, sim.world.now());
    for event in made.events {
        let record = Record { seq: sim.state.head.next(), epoch: sim.state.epoch, time: made.now, event };
        sim.state.apply(&record);
    }
}

#[test]
fn a_replica_whose_late_synchronisation_broke_off_has_not_what_the_lost_primary_had() {
    let link = |seen: &mut Seen, link: Link| {
        let source = Source::Member(member(0));
        server(seen, 1).role = ServerRole::Replica { source, link };
    };
    let mut sim = after(
        "cluster replicas=1 profile=Durable\nrun\nwrite 5\ncut 0-1\nrun 5s\nwrite 50\nexpect primary 0-0",
    );
    let mut syncs = sim.world.look(&sim.state);
    link(&mut syncs, Link::Syncing);
    goes_on(&mut sim, &syncs);
    sim.world.pass(500);
    let mut silent = syncs.clone();
    silent.members.get_mut(&member(1)).expect("looked at").server = Observed::Unknown(Why::Silent);
    goes_on(&mut sim, &silent);
    sim.world.kill(member(0)).expect("it runs");
    let mut broken = sim.world.look(&sim.state);
    link(&mut broken, Link::Down);
    let made = turn(&sim.state, &broken, sim.world.now());
    assert!(decisions(&made).is_empty(), "{:?}", decisions(&made));
}

#[test]
fn without_a_journal_a_later_snapshot_of_the_same_history_outranks_the_remembered_holder() {
    let text = |saved: &str| {
        format!(
            "cluster replicas=2 profile=Durable files=Rdb\nrun\nwrite 5\nsave 0-0 0-1 0-2\nwrite 5\nsave {saved}\n\
             stop-operator\nkill 0-0 0-1 0-2\nlose-journal\nrun\nexpect primary {saved}\nexpect no-write-lost\n\
             expect ready\nexpect quiet"
        )
    };
    after(&text("0-1"));
    after(&text("0-0"));
    // Files that prove nothing: the holder that the agents remember.
    after(
        "cluster replicas=2 profile=Durable\nrun\nwrite 5\nset switchover=0-1\nrun\nstop-operator\n\
         kill 0-0 0-1 0-2\nlose-journal\nrun\nexpect primary 0-1\nexpect no-write-lost",
    );
}

#[test]
fn a_replica_that_lost_its_primary_before_its_first_link_has_what_its_disk_had() {
    let mut sim =
        after("cluster replicas=1 profile=Durable files=Rdb\nrun\nwrite 50\nsave 0-0\nexpect primary 0-0");
    let comes_back = |seen: &mut Seen| {
        let facts = server(seen, 1);
        facts.run_id = "a later process".into();
        unlink(facts);
        seen.evidence.readings.get_mut(&member(1)).expect("read").offset = 5;
    };
    let mut attached = sim.world.look(&sim.state);
    comes_back(&mut attached);
    goes_on(&mut sim, &attached);
    sim.world.kill(member(0)).expect("it runs");
    let soon = sim.world.now().plus_millis(1_000);
    sim.world.advance(soon);
    let mut restarted = sim.world.look(&sim.state);
    comes_back(&mut restarted);
    let gate = Source::Gate { had_history: true };
    assert_eq!(server(&mut restarted, 0).role, ServerRole::Replica { source: gate, link: Link::Down });
    let made = turn(&sim.state, &restarted, sim.world.now());
    assert_eq!(decisions(&made).first().and_then(|d| d.grant), Some(member(0)));
}

#[test]
fn slots_of_which_nobody_knows_whose_they_were_are_not_given_out_while_their_keys_may_be_on_a_volume() {
    let made_again = "cluster topology=Cluster shards=2 replicas=0 profile=Durable\nrun\nset shards=3\nrun\nwrite 20 to 2\n\
        set shards=2\nrun 200ms\nexpect unbalanced\nrecreate\nrun\nexpect blocked SlotsUnaccounted\nexpect not-decided SlotsReclaimed";
    let back = "set shards=3\nrun\nexpect ready\nexpect no-write-lost\nset shards=2\nrun\nexpect balanced\nexpect no-write-lost";
    after(&format!("{made_again}\n{back}"));
    let given_up = "set confirm-blank=yes\nrun\nexpect decided SlotsReclaimed\nexpect ready";
    let sim = after(&format!("{made_again}\n{given_up}"));
    assert!(
        sim.state.is_spent(Verb::ConfirmBlank, "yes"),
        "a word for these slots is none for a loss that comes later"
    );
}

#[test]
fn a_shard_that_gives_its_slots_is_not_removed_before_it_has_though_the_journal_was_lost_meanwhile() {
    let moving = "cluster topology=Cluster shards=2 replicas=0 profile=Durable\nrun\nwrite 20 to 0\nset shards=3\nrun\n\
        write 20 to 2\nset shards=2\nrun 300ms\nlose-journal\nrun";
    let after_it = "expect decided Adopted\nexpect decided ShardRemoved\nexpect balanced\nexpect removed 2\nexpect ready\n\
        expect no-write-lost\nexpect quiet";
    let sim = after(&format!("{moving}\n{after_it}"));
    let removed = sim.records.iter().position(|r| {
        r.event.decided().is_some_and(|d| d.effects.iter().any(|e| matches!(e, Effect::Delete { .. })))
    });
    let removed = removed.expect("it is removed");
    assert!(sim.records[..removed].iter().any(|r| {
        r.event.decided().is_some_and(|d| d.effects.iter().any(|e| matches!(e, Effect::MigrateSlots { .. })))
    }));
}

const THREE_SHARDS: &str =
    "cluster topology=Cluster shards=3 replicas=1 profile=Durable\nrun\nwrite 10\nexpect ready";

fn hands_over(made: &Turn) -> bool {
    decisions(made).iter().any(|d| d.effects.iter().any(|e| matches!(e, Effect::Handover { .. })))
}

#[test]
fn a_node_is_handed_over_to_once_a_majority_of_the_primaries_hears_it() {
    let mut sim = after(THREE_SHARDS);
    let to = MemberId::new(0, 1);
    sim.world.spec.switchover = Some(SwitchoverWish { to, token: "now".to_owned() });
    let seen = sim.world.look(&sim.state);
    assert!(hands_over(&turn(&sim.state, &seen, sim.world.now())));
    let heard_by = |primaries: &[u16]| {
        let mut seen = seen.clone();
        let id = seen.members[&to].node.as_ref().expect("a node").id.clone();
        for shard in (0..3).filter(|shard| !primaries.contains(shard)) {
            let other = seen.members.get_mut(&MemberId::new(shard, 0)).and_then(|m| m.node.as_mut());
            other.expect("a node").knows.insert(id.clone(), Some("10.9.9.9".to_owned()));
        }
        let made = turn(&sim.state, &seen, sim.world.now());
        (hands_over(&made), waits_for(&made, WaitReason::GossipUnsettled))
    };
    assert_eq!(heard_by(&[0]), (false, true), "its own primary alone");
    assert!(heard_by(&[0, 2]).0, "two of three");
}

#[test]
fn a_cluster_is_not_ready_while_a_node_refuses_its_clients() {
    let mut sim = after(THREE_SHARDS);
    let mut seen = sim.world.look(&sim.state);
    let node = seen.members.get_mut(&MemberId::new(1, 0)).and_then(|m| m.node.as_mut());
    node.expect("a node").down = true;
    let made = turn(&sim.state, &seen, sim.world.now());
    let mut state = sim.state.clone();
    for event in made.events {
        let record = Record { seq: state.head.next(), epoch: state.epoch, time: made.now, event };
        state.apply(&record);
    }
    let ready = |state| status(state).conditions.into_iter().find(|c| c.kind == ConditionKind::Ready);
    assert_eq!(ready(&sim.state).map(|c| c.holds), Some(true));
    assert_eq!(ready(&state).map(|c| c.holds), Some(false));
}

#[test]
fn what_the_api_server_refuses_is_said_beside_a_member_that_cannot_start() {
    let mut sim = after("cluster replicas=0\nno-place-for 0\nrun 60s\n");
    let ready = |sim: &Sim| {
        let all = status(&sim.state).conditions;
        all.into_iter().find(|c| c.kind == ConditionKind::Ready).expect("it is always told")
    };
    let before = ready(&sim);
    assert_eq!(before.reason.code(), "MemberCannotStart");
    let (object, _) = sim.state.objects.first_key_value().expect("there is one");
    let (object, words) = (object.clone(), "tolerations[0].operator: \"Sometimes\" is not valid");
    sim.state.refusals.insert(object.clone(), words.to_owned());
    assert_eq!(ready(&sim).message, before.message, "it is as wanted: nothing is left to say of it");
    sim.state.objects.get_mut(&object).expect("there is one").wanted = Digest("another".into());
    assert_eq!(ready(&sim).message, format!("{object} is not applied: {words}. {}", before.message));
}

#[test]
fn a_rollout_waits_for_the_names_that_new_pods_tell() {
    let mut sim = after(&THREE_SHARDS.replacen("\n", " member-services=true\n", 1));
    let starts = |sim: &mut Sim, service: Option<Observed<LiveObject>>| {
        let mut seen = sim.world.look(&sim.state);
        let facts = |kind, name: &str| ObjectRef { kind, name: name.to_owned() };
        let workload =
            seen.objects.get_mut(&facts(ObjectKind::StatefulSet, "story-0")).expect("there is one");
        (workload.wanted, workload.wanted_revision) = (Digest("new".into()), Some(Digest("rev-2".into())));
        let known =
            seen.objects.get_mut(&facts(ObjectKind::Service, "story-node-0-1")).expect("there is one");
        known.live = service.unwrap_or_else(|| known.live.clone());
        let made = turn(&sim.state, &seen, sim.world.now());
        made.events.iter().filter_map(Event::decided).any(|d| d.reason == Reason::RolloutStarted)
    };
    assert!(starts(&mut sim, None));
    assert!(!starts(&mut sim, Some(Observed::Absent)), "it leads nowhere yet");
    let theirs = LiveObject::taken("uid-x".into(), "somebody".into());
    assert!(!starts(&mut sim, Some(Observed::Present(theirs))), "it leads elsewhere");
}

#[test]
fn what_is_known_as_surplus_of_a_shard_that_is_wanted_again_is_not_deleted_before_it_is_looked_at() {
    let mut sim = after(THREE_SHARDS);
    let object = ObjectRef { kind: ObjectKind::StatefulSet, name: "story-2".into() };
    sim.state.objects.get_mut(&object).expect("there is one").surplus = true;
    let mut seen = sim.world.look(&sim.state);
    seen.objects.clear();
    let made = turn(&sim.state, &seen, sim.world.now());
    let deletes = |d: &Decision| d.effects.iter().any(|e| matches!(e, Effect::Delete { .. }));
    assert!(!made.events.iter().filter_map(Event::decided).any(deletes));
}

#[test]
fn a_wish_that_a_lost_journal_does_not_know_of_is_not_fulfilled_once_more() {
    let text = "cluster topology=Cluster shards=3 replicas=0 balance=Keys rebalance=rebalance@1\nrun\nexpect ready\n\
                fill 1000-1999 900\nlose-journal\nrun\nexpect ready\nexpect not-decided SlotsHandedOver\n\
                set rebalance=rebalance@2\nrun\nexpect decided SlotsHandedOver\nexpect even-keys 10\nexpect quiet\n";
    Story::parse(text).run(Perturbation::None, |_, _| {}).unwrap();
}

#[test]
fn what_was_counted_ten_minutes_ago_is_counted_again_before_anything_moves() {
    let counted = |rest: &str| {
        let text = format!(
            "cluster topology=Cluster shards=2 replicas=0\nrun\nwrite 20 to 0\nset shards=3\nrun 1150ms\nset paused=true\n\
             {rest}\nset paused=false\nrun\nexpect balanced\nexpect ready\n"
        );
        let sim = after(&text);
        let by_0 = |record: &&Record| matches!(&record.event, Event::SlotsWeighed { member, weights: Some(_) } if member.shard.0 == 0);
        sim.records.iter().filter(by_0).count()
    };
    assert_eq!((counted("run 500s"), counted("run 700s")), (1, 2));
}

/// The world a moment after a job of a reshard has begun, its source not heard in this look.
fn unheard_source(after_ms: i64) -> Turn {
    let mut sim =
        after("cluster topology=Cluster shards=2 replicas=0\nrun\nwrite 20 to 0\nset shards=3\nrun 1150ms");
    assert!(sim.state.shards.values().any(|shard| shard.handed_at.is_some()), "no slot was on its way");
    let mut seen = sim.world.look(&sim.state);
    seen.members.get_mut(&member(0)).expect("looked at").server = Observed::Unknown(Why::Silent);
    seen.evidence.readings.remove(&member(0));
    turn(&sim.state, &seen, sim.world.now().plus_millis(after_ms))
}

#[test]
fn a_source_that_is_not_heard_just_after_slots_moved_is_looked_at_soon_and_later_at_the_usual_pace() {
    let until_next = |made: &Turn| made.wake_at.map(|at| at.millis_since(made.now));
    let soon = unheard_source(0);
    assert!(waits_for(&soon, WaitReason::GossipUnsettled));
    assert_eq!(until_next(&soon), Some(50));
    assert!(until_next(&unheard_source(5_000)) != Some(50));
}

#[test]
fn what_was_cancelled_with_a_wish_is_awaited_by_nobody() {
    let sim = after(
        "cluster topology=Cluster shards=3 replicas=0 balance=Keys\nrun\nwrite 10 to 0\nfill 6000-6999 300\nhang-slots\n\
         set rebalance=rebalance@1\nrun 5s\nset rebalance=no\nrun\nexpect decided RebalanceWithdrawn",
    );
    assert!(sim.state.shards.values().all(|shard| shard.awaited.is_empty()));
}

#[test]
fn a_wish_that_is_taken_back_does_not_end_before_every_primary_is_heard_and_nothing_moves() {
    let mut sim = after(
        "cluster topology=Cluster shards=3 replicas=0 balance=Keys\nrun\nwrite 10 to 0\nfill 6000-6999 300\nhang-slots\n\
         set rebalance=rebalance@1\nrun 5s\nexpect waiting SlotsMoving",
    );
    sim.world.spec.rebalance = None;
    let mut seen = sim.world.look(&sim.state);
    let ended = |made: &Turn| decisions(made).iter().any(|d| d.reason == Reason::RebalanceWithdrawn);
    for node in seen.members.values_mut().filter_map(|facts| facts.node.as_mut()) {
        node.exports.clear();
        node.exports_unread = true;
    }
    assert!(!ended(&turn(&sim.state, &seen, sim.world.now())), "nobody said what is under way");
    for id in seen.members.keys().copied().collect::<Vec<_>>() {
        seen.members.get_mut(&id).expect("looked at").server = Observed::Unknown(Why::Silent);
        seen.evidence.readings.remove(&id);
    }
    assert!(!ended(&turn(&sim.state, &seen, sim.world.now())), "nobody was heard");
}

#[test]
fn a_wish_that_was_taken_back_before_it_came_true_does_not_come_true_by_the_same_text() {
    let spent = "cluster topology=Cluster shards=3 replicas=0 balance=Keys\nrun\nfill 6000-6999 300\nset paused=true rebalance=rebalance@1\n\
                 run\nset rebalance=no\nrun\nset paused=false rebalance=rebalance@1\nrun\nexpect not-decided SlotsHandedOver\n\
                 set rebalance=rebalance@2\nrun\nexpect decided SlotsHandedOver\nexpect even-keys 10";
    after(spent);
}

/// A look in which a primary has been off the cluster bus for long enough, changed by `but`; whether its replica takes its place.
fn replaces_who_is_off_the_bus(but: impl Fn(&mut Seen)) -> bool {
    let mut sim = after(
        "cluster topology=Cluster shards=3 replicas=1\nrun\nwrite 20 to 0\nbus-cut 0-0\nrun 4s\nexpect not-decided PrimaryShutOut",
    );
    let available =
        status(&sim.state).conditions.into_iter().find(|c| c.kind == ConditionKind::PrimaryAvailable);
    assert!(available.is_some_and(|c| !c.holds), "a primary that refuses its clients is not available");
    // Five seconds: the window and two more.
    let since = sim.world.now().plus_millis(-5_000);
    sim.state.members.get_mut(&member(0)).expect("known").down_since = Some(since);
    let mut seen = sim.world.look(&sim.state);
    but(&mut seen);
    let made = turn(&sim.state, &seen, sim.world.now());
    decisions(&made).iter().any(|d| d.reason == Reason::PrimaryShutOut)
}

#[test]
fn a_primary_off_the_bus_is_ended_only_if_all_say_so_and_nothing_is_lost_by_it() {
    let node = |seen: &mut Seen, id: MemberId, change: &dyn Fn(&mut NodeFacts)| {
        change(seen.members.get_mut(&id).and_then(|facts| facts.node.as_mut()).expect("a node"));
    };
    let other = |shard: u16| MemberId::new(shard, 0);
    assert!(replaces_who_is_off_the_bus(|_| {}));
    assert!(!replaces_who_is_off_the_bus(|seen| {
        seen.evidence.readings.get_mut(&member(1)).expect("read").offset -= 1;
    }));
    assert!(!replaces_who_is_off_the_bus(|seen| {
        seen.evidence.readings.get_mut(&member(1)).expect("read").last_io_ms = Some(3_000);
    }));
    assert!(!replaces_who_is_off_the_bus(|seen| seen.evidence.readings.retain(|id, _| *id != member(0))));
    assert!(!replaces_who_is_off_the_bus(|seen| node(seen, member(0), &|node| node.failed.clear())));
    assert!(!replaces_who_is_off_the_bus(|seen| node(seen, other(1), &|node| node.failed.clear())));
    assert!(!replaces_who_is_off_the_bus(|seen| node(seen, other(1), &|node| node.down = true)));
    assert!(!replaces_who_is_off_the_bus(|seen| {
        let replica = seen.members.get(&member(1)).and_then(|facts| facts.node.clone()).expect("a node").id;
        node(seen, other(1), &|node| node.failed.extend([replica.clone()]));
    }));
}

#[test]
fn who_may_be_further_ahead_and_was_not_read_is_waited_for_before_a_primary_off_the_bus_is_ended() {
    let mut sim =
        after("cluster topology=Cluster shards=3 replicas=2\nrun\nwrite 20 to 0\nbus-cut 0-0\nrun 4s");
    let since = sim.world.now().plus_millis(-5_000);
    sim.state.members.get_mut(&member(0)).expect("known").down_since = Some(since);
    let ends = |sim: &mut Sim, unread: bool| {
        let mut seen = sim.world.look(&sim.state);
        seen.evidence.readings.retain(|id, _| !unread || *id != member(2));
        let made = turn(&sim.state, &seen, sim.world.now());
        decisions(&made).iter().any(|d| d.reason == Reason::PrimaryShutOut)
    };
    assert!(!ends(&mut sim, true));
    assert!(ends(&mut sim, false));
}

#[test]
fn nobody_takes_over_who_hears_no_other_primary() {
    let sim = after(
        "cluster topology=Cluster shards=3 replicas=1 profile=Durable\nrun\nwrite 20 to 1\nbus-cut 1-1\nrun 5s\nkill 1-0\nrun 5s\n\
         bus-heal 1-1\nrun\nexpect ready\nexpect no-write-lost",
    );
    let promotions: Vec<Promotion> = sim
        .records
        .iter()
        .filter_map(|record| record.event.decided())
        .flat_map(|decision| &decision.effects)
        .filter_map(|effect| match effect {
            Effect::Promote { server, by, .. } if server.member == MemberId::new(1, 1) => Some(*by),
            _ => None,
        })
        .collect();
    assert!(!promotions.is_empty() && !promotions.contains(&Promotion::Takeover), "{promotions:?}");
}

#[test]
fn thirty_members_at_new_addresses_are_introduced_some_at_a_time() {
    let all: Vec<String> = (0..5).flat_map(|s| (0..6).map(move |o| format!("{s}-{o}"))).collect();
    let sim = after(&format!(
        "cluster topology=Cluster shards=5 replicas=5 profile=Durable\nrun\nwrite 5 to 0\nstop-operator\ndelete-pod {}\nrun 60s\nstart-operator\nrun\n\
         expect acquainted\nexpect ready",
        all.join(" ")
    ));
    let decided = sim.records.iter().filter_map(|record| record.event.decided());
    let meets = decided.filter(|d| d.reason == Reason::NodesMet).map(|d| d.effects.len());
    assert_eq!(meets.max(), Some(64), "all 435 pairs at once are more than a record holds");
}

#[test]
fn many_nodes_are_forgotten_some_at_a_time() {
    let sim = after(
        "cluster topology=Cluster shards=9 replicas=1 profile=Durable\nrun\nwrite 5 to 0\nset shards=4\nrun\nexpect acquainted\nexpect ready",
    );
    let decided = || sim.records.iter().filter_map(|record| record.event.decided());
    let forgets: Vec<usize> =
        decided().filter(|d| d.reason == Reason::NodesForgotten).map(|d| d.effects.len()).collect();
    assert_eq!(forgets.iter().max(), Some(&64), "{forgets:?}");
    let live = sim.state.members.values().filter_map(|m| m.facts.node.as_ref());
    assert!(live.filter(|node| node.knows.len() == 7).count() >= 8, "nobody knows the ten that are gone");
}

/// The shard of which it tells what was seen.
fn shard_seen(event: &Event) -> Option<ShardId> {
    match event {
        Event::PodChanged { member, .. }
        | Event::ServerChanged { member, .. }
        | Event::AgentChanged { member, .. }
        | Event::NodeChanged { member, .. } => Some(member.shard),
        _ => None,
    }
}

#[test]
fn a_look_of_which_a_part_was_recorded_before_a_crash_blocks_nothing() {
    let script = "cluster topology=Cluster shards=4 replicas=2 profile=Durable\nrun\nwrite 20 to 1\nwrite 20 to 2\nkill 1-0 2-0";
    let mut tried = BTreeSet::new();
    for shards in 0..=4 {
        let mut sim = after(script);
        let seen = sim.world.look(&sim.state);
        let events = changed(&sim.state, &seen);
        let part: Vec<Event> =
            events.into_iter().take_while(|e| shard_seen(e).is_none_or(|shard| shard.0 < shards)).collect();
        tried.insert(part.len());
        for event in part {
            let seq = sim.records.last().expect("a story").seq.next();
            let (epoch, time) = (sim.state.epoch, sim.world.now());
            sim.records.push(Record { seq, epoch, time, event });
        }
        sim.start();
        sim.run(None).unwrap_or_else(|e| panic!("{shards} of 4 shards were recorded: {e}"));
        let status = status(&sim.state);
        let ready = status.conditions.iter().find(|c| c.kind == ConditionKind::Ready);
        assert!(ready.is_some_and(|c| c.holds), "{shards} of 4 shards were recorded: {ready:?}");
    }
    assert!(tried.len() > 2, "the parts differ: {tried:?}");
}
