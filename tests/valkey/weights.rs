//! What a node of a Valkey Cluster has in its slots, and that asking for it spoils nothing.

use crate::{
    nodes::{as_node, link, node},
    server::{OPERATOR_PASSWORD, Server, eventually, free_port, link_to, present},
};
use std::{collections::BTreeMap, time::Instant};
use valkeeper::valkey::{Error, MemberLink, member::WEIGH_TIMEOUT};
use valkeeper_core::{
    observation::Observed,
    slots::{SLOTS, SlotSet},
    weights::SlotWeights,
};

/// Hash tags, and how many keys have them: enough that each stands out from all others.
const WRITTEN: [(&str, u64); 3] = [("one", 300), ("two", 500), ("three", 1_200)];

/// A node that owns every slot, with the keys; those by slot.
async fn filled() -> (Server, BTreeMap<u16, u64>) {
    let server = node(free_port()).await;
    server.run::<String>("CLUSTER ADDSLOTSRANGE 0 16383").await.unwrap();
    eventually("a node that serves", || async { server.run::<String>("SET {one}:0 x").await.ok() }).await;
    let mut by_slot = BTreeMap::new();
    for (tag, count) in WRITTEN {
        let mut all = redis::pipe();
        for number in 0..count {
            all.cmd("SET").arg(format!("{{{tag}}}:{number}")).arg("x").ignore();
        }
        all.query_async::<()>(&mut server.app().await).await.unwrap();
        by_slot.insert(server.run::<u16>(&format!("CLUSTER KEYSLOT {tag}")).await.unwrap(), count);
    }
    assert_eq!(by_slot.len(), WRITTEN.len());
    (server, by_slot)
}

async fn may_count(server: &Server) {
    server.run::<String>("ACL SETUSER valkeeper +cluster|countkeysinslot").await.unwrap();
}

/// Looks, and counts what is in the slots that the node says are its own.
async fn weigh(link: &MemberLink) -> Result<SlotWeights, Error> {
    link.weigh(&present(link).await.node.unwrap().slots).await
}

/// How often anybody has connected.
async fn connections(server: &Server) -> u64 {
    server.field("total_connections_received").await.parse().unwrap()
}

#[tokio::test]
async fn a_node_counts_just_the_keys_that_were_written_also_in_a_slot_that_is_open() {
    let bus_port = free_port();
    let ((server, by_slot), other) = (filled().await, node(bus_port).await);
    may_count(&server).await;
    let link = link(&server);
    let weights = weigh(&link).await.unwrap();
    let counts: Vec<(u16, u64)> =
        (0..SLOTS).map(|slot| (slot, by_slot.get(&slot).copied().unwrap_or_default())).collect();
    assert_eq!(weights.runs, SlotWeights::sum_up(&counts, 0).runs);
    assert_eq!((weights.slots().len(), weights.keys()), (usize::from(SLOTS), 2_000));
    let alone = |slot: &u16, keys: &u64| weights.runs.contains(&(SlotSet::from_iter([*slot]), *keys));
    assert!(by_slot.iter().all(|(slot, keys)| alone(slot, keys)), "{weights:?}");
    // A key takes some tens of bytes, and what a server has of its own is no part of it.
    assert!((20_000..2_000_000).contains(&weights.bytes), "{} bytes", weights.bytes);

    server.run::<String>(&format!("CLUSTER MEET 127.0.0.1 {} {bus_port}", other.port)).await.unwrap();
    let other = other.run::<String>("CLUSTER MYID").await.unwrap();
    let slot = by_slot.keys().next().unwrap();
    let open = format!("CLUSTER SETSLOT {slot} MIGRATING {other}");
    eventually("a slot that is open", || async { server.run::<String>(&open).await.ok() }).await;
    assert_eq!(weigh(&link).await.unwrap().runs, weights.runs);
}

#[tokio::test]
async fn some_slots_alone_are_counted_and_none_is_an_answer_too() {
    let (server, by_slot) = filled().await;
    may_count(&server).await;
    let link = link(&server);
    present(&link).await;
    let (slot, keys) = by_slot.first_key_value().unwrap();
    let some = SlotSet::from_iter([*slot]);
    assert_eq!(link.weigh(&some).await.unwrap().runs, [(some, *keys)]);
    let none = link.weigh(&SlotSet::default()).await.unwrap();
    assert_eq!((none.runs.len(), none.bytes > 0), (0, true));
}

#[tokio::test]
async fn who_may_not_count_learns_why_and_goes_on_looking_over_the_same_connection() {
    let (server, _) = filled().await;
    let link = link(&server);
    present(&link).await;
    let before = connections(&server).await;
    assert_eq!(weigh(&link).await, Err(Error::Unauthorized("NOPERM".to_owned())));
    assert_eq!(link.trouble(), None, "nothing is wrong with the server");
    present(&link).await;
    assert_eq!(connections(&server).await - before, 1, "only this test's own");
    may_count(&server).await;
    assert_eq!(weigh(&link).await.unwrap().keys(), 2_000);
}

#[tokio::test]
async fn who_is_too_slow_to_count_is_not_waited_for_and_heard_again_later() {
    let (server, _) = filled().await;
    may_count(&server).await;
    let (link, wake) = link_to(as_node(server.target()), OPERATOR_PASSWORD);
    let slots = present(&link).await.node.unwrap().slots;
    let before = connections(&server).await;
    server.signal("STOP");
    let begun = Instant::now();
    let counted = link.weigh(&slots).await;
    let waited = begun.elapsed();
    server.signal("CONT");
    assert_eq!(counted, Err(Error::Silent));
    assert!(waited >= WEIGH_TIMEOUT && waited < 4 * WEIGH_TIMEOUT, "{waited:?}");
    assert_eq!(weigh(&link).await.unwrap().keys(), 2_000);
    assert_eq!(connections(&server).await - before, 1, "only this test's own");
    let lost = tokio::time::timeout(WEIGH_TIMEOUT / 10, wake.notified()).await;
    assert!(lost.is_err(), "no connection has ended");
}

#[tokio::test]
async fn nothing_is_counted_without_a_look_before_and_a_death_meanwhile_is_seen_by_the_next_one() {
    let (mut server, _) = filled().await;
    may_count(&server).await;
    let link = link(&server);
    let slots = SlotSet::from_iter(0..SLOTS);
    assert_eq!(link.weigh(&slots).await, Err(Error::Closed));
    present(&link).await;
    server.signal("STOP");
    let (counted, _) = tokio::join!(link.weigh(&slots), async { server.kill_now() });
    assert_eq!(counted, Err(Error::Closed));
    assert_eq!(link.look().await, Observed::Absent);
}
