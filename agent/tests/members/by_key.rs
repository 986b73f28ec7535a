//! Slots that an agent hands over key by key, whatever happens meanwhile. Every server since 8.0 does it.

use super::{
    cluster::EPOCH,
    support::{Member, PATIENCE, Shard, eventually, signal},
};
use redis::{Pipeline, RedisError, aio::MultiplexedConnection};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use tonic::{Code, Status};
use valkeeper_agent::proto::{MigrateSlotsRequest, Promotion};
use valkeeper_core::slots::SlotSet;

/// What is acknowledged is on disk: with fsync every second a server puts off even the write while a sync is under way, and one that is
/// killed then has lost what it had taken over.
const ON_DISK: &str = "save \"\"\nappendonly yes\nappenddirname appendonlydir\nappendfsync always";
/// What keys come as: the user of replication, who opens and closes slots as well.
const TAKES_KEYS: &str =
    "~* +@write +pfcount +select +cluster|myid +cluster|setslot -flushall -flushdb -migrate -swapdb";
/// Slot of `{a}`.
const SLOT: u16 = 15_495;
/// Keys of one slot that take some hundred turns, so that whatever happens can happen in the middle.
const MANY: usize = 30_000;

impl Shard {
    /// Primaries that know each other. All slots are the first one's.
    async fn primaries(count: u16) -> Shard {
        let shard = Shard::with_nodes(count, ON_DISK);
        shard.open_first(count).await;
        shard
    }

    /// Two primaries, and a replica of the one that has all slots.
    async fn two_and_a_replica() -> Shard {
        let shard = Shard::with_nodes(3, ON_DISK);
        shard.open_first(2).await;
        shard.at_gate(2, EPOCH).await;
        shard.meet(0, &shard.members[2]).await;
        shard.follow(2, 0, 5).await;
        shard
    }

    /// Opens so many of the members as primaries.
    async fn open_first(&self, count: u16) {
        self.begin(0, 5, "0-16383").await;
        self.members[0].takes_keys().await;
        for ordinal in 1..count {
            let member = &self.members[usize::from(ordinal)];
            self.at_gate(ordinal, EPOCH).await;
            self.promote_by(ordinal, 5, Promotion::Open).await.unwrap();
            self.meet(0, member).await;
            member.takes_keys().await;
        }
        for member in &self.members[..usize::from(count)] {
            member.serves().await;
        }
        let _: () = self.members[0].run("SET {b}any value").await.unwrap();
    }

    async fn order(&self, from: u16, to: u16, slots: &str) -> MigrateSlotsRequest {
        MigrateSlotsRequest {
            epoch: EPOCH,
            run_id: self.members[usize::from(from)].field("run_id").await,
            slots: slots.to_owned(),
            node_id: self.members[usize::from(to)].node().await.id.to_string(),
            by_key: true,
        }
    }

    async fn hand(&self, from: u16, to: u16, slots: &str) -> Result<(), Status> {
        let order = self.order(from, to, slots).await;
        self.agent(from).await.migrate_slots(order).await.map(drop)
    }

    /// The first gives the second a slot with many keys, and is in the middle of it.
    async fn hand_half(&self) {
        self.members[0].fill_slot(MANY).await;
        self.hand(0, 1, &SLOT.to_string()).await.unwrap();
        self.members[1].has_some().await;
    }

    /// The first member begins anew, is told again, and finishes.
    async fn finish_after_the_gate(&self) {
        let slots = SLOT.to_string();
        self.at_gate(0, EPOCH).await;
        self.promote_by(0, 6, Promotion::Open).await.unwrap();
        self.members[0].serves().await;
        self.hand(0, 1, &slots).await.unwrap();
        self.arrived(1, &slots).await;
        self.has_all(&[1]).await;
    }

    /// Waits until the target has the slots, and nobody has one in the middle.
    async fn arrived(&self, to: u16, slots: &str) {
        let slots: SlotSet = slots.parse().unwrap();
        eventually("slots at their new owner", || async {
            for member in &self.members {
                let text: String = member.run_as("valkeeper", "CLUSTER NODES").await.ok()?;
                if text.contains("->-") || text.contains("-<-") {
                    return None;
                }
            }
            let has = self.members[usize::from(to)].node().await.slots;
            slots.without(&has).is_empty().then_some(())
        })
        .await;
    }

    /// Repeats it until a job that failed before has told why; its words.
    async fn words(&self, from: u16, to: u16, slots: &str) -> String {
        let refused = eventually("words", || async { self.hand(from, to, slots).await.err() }).await;
        assert_eq!(refused.code(), Code::Unknown, "{refused}");
        refused.message().to_owned()
    }

    /// Every key is somewhere, and only once.
    async fn has_all(&self, members: &[u16]) {
        let mut found = 0;
        for ordinal in members {
            let member = &self.members[usize::from(*ordinal)];
            let count: usize = member.run(&format!("CLUSTER COUNTKEYSINSLOT {SLOT}")).await.unwrap();
            found += count;
        }
        assert_eq!(found, MANY);
    }
}

impl Member {
    async fn takes_keys(&self) {
        let _: () = self.run(&format!("ACL SETUSER replica {TAKES_KEYS}")).await.unwrap();
    }

    /// Keys of one slot.
    async fn fill_slot(&self, keys: usize) {
        let mut connection = self.connect("default").await;
        for begin in (0..keys).step_by(1_000) {
            let mut all = redis::pipe();
            for n in begin..(begin + 1_000).min(keys) {
                all.cmd("SET").arg(format!("{{a}}{n}")).arg("v".repeat(100)).ignore();
            }
            let _: () = all.query_async(&mut connection).await.unwrap();
        }
    }

    /// Waits until it serves: a primary that has just been started looks around for two seconds.
    async fn serves(&self) {
        eventually("a node that serves", || async {
            self.run::<String>("CLUSTER INFO").await.ok().filter(|info| info.contains("cluster_state:ok"))
        })
        .await;
    }

    /// Waits until some keys of the slot have come, and not all.
    async fn has_some(&self) {
        let count = format!("CLUSTER COUNTKEYSINSLOT {SLOT}");
        let some = eventually("keys that come", || async {
            self.run::<usize>(&count).await.ok().filter(|count| *count > 0)
        });
        let some = some.await;
        assert!(some < MANY, "nothing is left to see: {some}");
    }
}

/// Whether a client is sent elsewhere for this one command only.
fn is_sent_once(error: &RedisError) -> bool {
    let code = error.code();
    assert!(matches!(code, Some("ASK" | "MOVED")), "{error}");
    code == Some("ASK")
}

/// Appends to lists of these tags, going where it is sent, until it is told to stop; how much was acknowledged to each.
async fn write_on(members: [&Member; 2], tags: &[&str], stop: &AtomicBool) -> Vec<usize> {
    let mut connections: [MultiplexedConnection; 2] =
        [members[0].connect("default").await, members[1].connect("default").await];
    let (mut acknowledged, mut at) = (vec![0; tags.len()], vec![0; tags.len()]);
    let begun = Instant::now();
    while !stop.load(Ordering::SeqCst) {
        assert!(begun.elapsed() < PATIENCE, "nobody stops it");
        for (n, tag) in tags.iter().enumerate() {
            let push = |pipe: &mut Pipeline| {
                pipe.cmd("RPUSH").arg(format!("{{{tag}}}list")).arg(acknowledged[n]).ignore();
            };
            let mut plain = redis::pipe();
            push(&mut plain);
            let done: redis::RedisResult<()> = plain.query_async(&mut connections[at[n]]).await;
            match done.as_ref().err().map(is_sent_once) {
                None => acknowledged[n] += 1,
                Some(false) => at[n] = 1 - at[n],
                Some(true) => {
                    let mut asking = redis::pipe();
                    asking.cmd("ASKING").ignore();
                    push(&mut asking);
                    let done: redis::RedisResult<()> = asking.query_async(&mut connections[1 - at[n]]).await;
                    // The slot may have come meanwhile.
                    acknowledged[n] += usize::from(done.is_ok());
                }
            }
        }
    }
    acknowledged
}

#[tokio::test]
async fn slots_go_by_key_with_every_key_and_every_acknowledged_write() {
    const TAGS: [&str; 4] = ["a", "c", "d", "e"];
    let shard = Shard::primaries(2).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    first.fill_slot(MANY).await;
    let mut slots: Vec<u16> = (0..40).collect();
    for tag in TAGS {
        slots.push(first.run(&format!("CLUSTER KEYSLOT {{{tag}}}")).await.unwrap());
    }
    assert!(slots.contains(&SLOT));
    let slots = slots.into_iter().collect::<SlotSet>().to_string();
    let stop = AtomicBool::new(false);
    let handed = async {
        eventually("writes", || async { first.run::<usize>("LLEN {e}list").await.ok().filter(|n| *n > 9) })
            .await;
        shard.hand(0, 1, &slots).await.unwrap();
        second.has_some().await;
        shard.arrived(1, &slots).await;
        stop.store(true, Ordering::SeqCst);
    };
    let (acknowledged, ()) = tokio::join!(write_on([first, second], &TAGS, &stop), handed);
    for (tag, acknowledged) in TAGS.iter().zip(acknowledged) {
        let list: Vec<usize> = second.run(&format!("LRANGE {{{tag}}}list 0 -1")).await.unwrap();
        assert!(acknowledged > 10 && list == (0..acknowledged).collect::<Vec<_>>(), "{tag}: {acknowledged}");
    }
    assert_eq!(second.keys().await, MANY + TAGS.len());
    assert_eq!(first.keys().await, 1, "what is in other slots stays");
    assert_eq!(first.node().await.slots, SlotSet::all().without(&second.node().await.slots));
    for member in [first, second] {
        assert!(!member.log().contains("of-replicas"), "no password in the log");
    }
}

#[tokio::test]
async fn a_target_that_is_killed_in_the_middle_of_a_slot_gets_the_rest_when_it_is_back() {
    let shard = Shard::primaries(2).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    first.fill_slot(MANY).await;
    let slots = format!("7 {SLOT}");
    shard.hand(0, 1, &slots).await.unwrap();
    second.has_some().await;
    signal(second.server_pid().await, "KILL");
    shard.at_gate(1, EPOCH).await;
    shard.promote_by(1, 6, Promotion::Open).await.unwrap();
    second.takes_keys().await;
    second.serves().await;
    let words = shard.words(0, 1, &slots).await;
    assert!(words.starts_with(&format!("slot {SLOT}: ")), "{words}");
    println!("{words}");
    assert!(first.log().contains("a slot has not been handed over"));
    shard.hand(0, 1, &slots).await.unwrap();
    shard.arrived(1, &slots).await;
    shard.has_all(&[1]).await;
    assert_eq!(first.keys().await, 1);
}

#[tokio::test]
async fn a_source_that_is_killed_in_the_middle_of_a_slot_finishes_it_when_it_is_told_anew() {
    let shard = Shard::primaries(2).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    first.fill_slot(MANY).await;
    let slots = SLOT.to_string();
    shard.hand(0, 1, &slots).await.unwrap();
    second.has_some().await;
    signal(first.server_pid().await, "KILL");
    shard.at_gate(0, EPOCH).await;
    let refused = shard.hand(0, 1, &slots).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "behind the gate it has nothing to give: {refused}");
    shard.promote_by(0, 6, Promotion::Open).await.unwrap();
    shard.members[0].serves().await;
    let words = shard.words(0, 1, &slots).await;
    assert!(words.starts_with(&format!("slot {SLOT}: ")), "{words}");
    println!("{words}");
    shard.hand(0, 1, &slots).await.unwrap();
    shard.arrived(1, &slots).await;
    shard.has_all(&[1]).await;
}

#[tokio::test]
async fn a_slot_that_an_agent_left_half_way_is_finished_by_the_next_agent() {
    let mut shard = Shard::primaries(2).await;
    shard.hand_half().await;
    shard.members[0].kill();
    shard.members[0].start();
    shard.finish_after_the_gate().await;
}

#[tokio::test]
async fn a_member_that_is_told_to_end_in_the_middle_of_a_slot_does_not_wait_for_it() {
    let mut shard = Shard::primaries(2).await;
    shard.hand_half().await;
    shard.members[0].terminate();
    assert!(shard.members[0].ended().await.success());
    assert!(shard.members[0].log().contains("the member is ending"), "it let go by itself");
    shard.members[0].start();
    shard.finish_after_the_gate().await;
}

#[tokio::test]
async fn a_shard_that_changes_hands_in_the_middle_of_a_slot_goes_on_from_its_new_primary() {
    let shard = Shard::two_and_a_replica().await;
    let [first, second, replica] = &shard.members[..] else { panic!("three members") };
    first.fill_slot(MANY).await;
    let slots = SLOT.to_string();
    shard.hand(0, 1, &slots).await.unwrap();
    second.has_some().await;
    shard.promote_by(2, 6, Promotion::Handover).await.unwrap();
    shard.follow(0, 2, 6).await;
    replica.takes_keys().await;
    // A node that has just seen its only source change hands may say for two seconds that the cluster is down.
    eventually("the rest of the slot", || async {
        let _ = shard.hand(2, 1, &slots).await;
        second.node().await.slots.contains(SLOT).then_some(())
    })
    .await;
    shard.arrived(1, &slots).await;
    shard.has_all(&[1]).await;
    // It may be in the middle of a step, which takes up to a second, when its successor is done.
    let noticed = || first.log().contains("a slot has not been handed over");
    eventually("the word of who gave it first", || async { noticed().then_some(()) }).await;
}

#[tokio::test]
async fn what_is_told_last_is_what_is_still_to_go() {
    let shard = Shard::primaries(2).await;
    let second = &shard.members[1];
    let (all, some) = (shard.order(0, 1, "3 5 7 9").await, shard.order(0, 1, "3").await);
    let mut agent = shard.agent(0).await;
    let pid = second.server_pid().await;
    // While the target does not answer, the highest is in hand.
    signal(pid, "STOP");
    let told = [agent.migrate_slots(all).await, agent.migrate_slots(some).await];
    signal(pid, "CONT");
    for answer in told {
        answer.unwrap();
    }
    shard.arrived(1, "3 9").await;
    eventually("the end of the job", || async {
        shard.members[0].log().contains("the slots are handed over").then_some(())
    })
    .await;
    assert_eq!(second.node().await.slots.to_string(), "3 9");
}

#[tokio::test]
async fn slots_that_are_open_are_closed_where_they_are_when_the_target_is_the_node_itself() {
    let shard = Shard::primaries(3).await;
    let [first, second, third] = &shard.members[..] else { panic!("three members") };
    let id = async |member: &Member| member.node().await.id.to_string();
    let (from, to) = (id(first).await, id(second).await);
    for slot in [3, 5, 7] {
        let _: () = second.run(&format!("CLUSTER SETSLOT {slot} IMPORTING {from}")).await.unwrap();
        let _: () = first.run(&format!("CLUSTER SETSLOT {slot} MIGRATING {to}")).await.unwrap();
    }
    let open = async |member: &Member| {
        let nodes: String = member.run_as("valkeeper", "CLUSTER NODES").await.unwrap();
        nodes.matches("->-").count() + nodes.matches("-<-").count()
    };

    shard.hand(0, 2, "3").await.unwrap();
    let words = shard.words(0, 2, "3").await;
    assert!(words.starts_with(&format!("slot 3: it is half-way to {to}")), "{words}");
    assert_eq!((open(first).await, open(second).await, open(third).await), (3, 3, 0));

    let order = shard.order(0, 0, "0-5").await;
    let mut agent = shard.agent(0).await;
    let other = MigrateSlotsRequest { run_id: "0".repeat(40), ..order.clone() };
    assert_eq!(agent.migrate_slots(other).await.unwrap_err().code(), Code::FailedPrecondition);
    let atomic = MigrateSlotsRequest { by_key: false, ..order.clone() };
    agent.migrate_slots(atomic).await.unwrap();
    assert_eq!(open(first).await, 3, "nothing was under way that could be cancelled");
    agent.migrate_slots(order).await.unwrap();
    assert_eq!((open(first).await, open(second).await), (1, 3));
    shard.hand(1, 1, "0-16383").await.unwrap();
    shard.hand(0, 0, "0-16383").await.unwrap();
    assert_eq!((open(first).await, open(second).await), (0, 0));
    assert_eq!(first.node().await.slots, SlotSet::all(), "nothing has gone");

    shard.hand(0, 2, "3").await.unwrap();
    shard.arrived(2, "3").await;
}

#[tokio::test]
async fn a_slot_that_a_replica_cannot_hear_of_stays_where_it_is() {
    let shard = Shard::two_and_a_replica().await;
    let [first, second, replica] = &shard.members[..] else { panic!("three members") };
    let pid = replica.server_pid().await;
    signal(pid, "STOP");
    let told = shard.hand(0, 1, "3").await;
    let logged = eventually("an end", || async {
        first.log().lines().find(|line| line.contains("a slot has not been handed over")).map(str::to_owned)
    });
    let line = logged.await;
    signal(pid, "CONT");
    told.unwrap();
    assert!(line.contains("SETSLOT MIGRATING: NOREPLICAS"), "{line}");
    assert!(shard.words(0, 1, "3").await.starts_with("slot 3: SETSLOT MIGRATING: NOREPLICAS"));
    assert_eq!(second.node().await.slots, SlotSet::default());
    shard.hand(0, 1, "3").await.unwrap();
    shard.arrived(1, "3").await;
}

#[tokio::test]
async fn keys_in_another_database_are_not_left_behind() {
    // From Valkey 9.0 on.
    let shard = Shard::with_nodes(2, &format!("{ON_DISK}\ncluster-databases 2"));
    let first = &shard.members[0];
    shard.open_first(2).await;
    let mut connection = first.connect("default").await;
    let mut other = redis::pipe();
    other.cmd("SELECT").arg(1).ignore().cmd("SET").arg("{a}other").arg("value").ignore();
    let _: () = other.query_async(&mut connection).await.unwrap();
    shard.hand(0, 1, &SLOT.to_string()).await.unwrap();
    let words = shard.words(0, 1, &SLOT.to_string()).await;
    assert_eq!(words, format!("slot {SLOT}: keys in db1 do not go by key"));
    let nodes: String = first.run_as("valkeeper", "CLUSTER NODES").await.unwrap();
    assert!(!nodes.contains("->-"), "nothing was begun: {nodes}");
}
