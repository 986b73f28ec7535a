//! Effects: their preconditions, and that what they report has happened.

use crate::{
    proxy::Proxy,
    server::{MANAGER_PASSWORD, Server, eventually, link_to, present, woken},
};
use redis::aio::MultiplexedConnection;
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use valkeeper::valkey::{Look, MemberLink, Target};
use valkeeper_core::{effect::Outcome, ids::ReplId};

async fn pair() -> (Server, Server) {
    let primary = Server::start("").await;
    let replica = Server::replica_of(&primary).await;
    (primary, replica)
}

fn superseded(outcome: Outcome, because: &str) {
    assert!(matches!(&outcome, Outcome::Superseded(why) if why.contains(because)), "{because}: {outcome:?}");
}

#[tokio::test]
async fn a_promotion_whose_precondition_no_longer_holds_is_superseded() {
    let (primary, replica) = pair().await;
    let (link, look) = replica.linked(1).await;
    let Look { run_id, replid, offset, .. } = look;
    let other = "f".repeat(40);
    superseded(link.promote(&other, &replid, offset).await, "another process");
    superseded(link.promote(&run_id, &ReplId(other.clone()), offset).await, "on history");
    superseded(link.promote(&run_id, &replid, offset + 1_000_000).await, "at offset");
    assert_eq!(replica.field("role").await, "slave");
    let (link, look) = primary.linked(1).await;
    superseded(link.promote(&look.run_id, &look.replid, 0).await, "primary already");
}

#[tokio::test]
async fn a_promotion_is_verified_and_keeps_the_old_history_as_the_second() {
    let (mut primary, replica) = pair().await;
    let (link, before) = replica.linked(1).await;
    primary.kill();
    assert_eq!(link.promote(&before.run_id, &before.replid, before.offset).await, Outcome::Verified);
    let after = present(&link).await;
    assert_eq!(after.run_id, before.run_id);
    assert_eq!(after.replid2, Some(before.replid));
    assert_eq!(replica.run::<String>("SET key value").await.unwrap(), "OK");
}

#[tokio::test]
async fn without_a_held_connection_nothing_is_attempted() {
    let (_primary, mut replica) = pair().await;
    let (never_looked, _) = replica.link(1);
    superseded(never_looked.disconnect_clients("any").await, "no connection");

    let (link, wake) = replica.link(1);
    let look = present(&link).await;
    replica.restart("replicaof 127.0.0.1 1").await;
    woken(&wake).await;
    superseded(link.promote(&look.run_id, &look.replid, 0).await, "no connection");
}

#[tokio::test]
async fn an_attached_server_follows_and_is_in_sync() {
    let (primary, other) = (Server::start("").await, Server::start("").await);
    primary.run::<String>("SET key value").await.unwrap();
    let (link, look) = other.linked(1).await;
    superseded(link.attach(&"0".repeat(40), "127.0.0.1", primary.port).await, "another process");
    assert_eq!(other.field("role").await, "master");
    assert_eq!(link.attach(&look.run_id, "127.0.0.1", primary.port).await, Outcome::Verified);
    other.in_sync().await;
    assert_eq!(other.run::<String>("GET key").await.unwrap(), "value");
}

#[tokio::test]
async fn disconnecting_ends_every_client_but_not_the_link_nor_replication() {
    let (primary, replica) = pair().await;
    let mut app = primary.app().await;
    let (link, wake) = primary.link(1);
    let look = present(&link).await;
    superseded(link.disconnect_clients(&"0".repeat(40)).await, "another process");
    assert!(redis::cmd("PING").query_async::<String>(&mut app).await.is_ok());
    assert_eq!(link.disconnect_clients(&look.run_id).await, Outcome::Verified);
    assert!(redis::cmd("PING").query_async::<String>(&mut app).await.is_err());
    assert_eq!(present(&link).await.replicas_online, 1);
    assert_eq!(replica.field("master_link_status").await, "up");
    let woken = tokio::time::timeout(std::time::Duration::ZERO, wake.notified()).await;
    assert!(woken.is_err(), "the link's own connection stays");
}

/// Adds numbers until told to stop; returns those that were acknowledged. After a refusal the other server is tried.
async fn write_until(
    stop: Arc<AtomicBool>,
    mut first: MultiplexedConnection,
    mut second: MultiplexedConnection,
) -> BTreeSet<u64> {
    let mut acknowledged = BTreeSet::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let added = redis::cmd("SADD").arg("numbers").arg(number).query_async::<i64>(&mut first).await;
        if added.is_ok() {
            acknowledged.insert(number);
        } else {
            std::mem::swap(&mut first, &mut second);
        }
    }
    acknowledged
}

async fn linked_pair(from: &Server, to: &Server) -> ((MemberLink, Look), (MemberLink, Look)) {
    (from.linked(1).await, to.linked(1).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handover_under_load_loses_no_acknowledged_write() {
    let (first, second) = pair().await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_until(stop.clone(), first.app().await, second.app().await));
    for (from, to) in [(&first, &second), (&second, &first), (&first, &second)] {
        let begun: u64 = from.run("SCARD numbers").await.unwrap();
        eventually("writes on the primary", || async {
            (from.run::<u64>("SCARD numbers").await.unwrap() > begun + 200).then_some(())
        })
        .await;
        let ((out, out_look), (into, into_look)) = linked_pair(from, to).await;
        let outcome = out.handover(&out_look.run_id, &into, &into_look.run_id, 2000).await;
        assert_eq!(outcome, Outcome::Verified);
        assert_eq!(
            (from.field("role").await, to.field("role").await),
            ("slave".to_owned(), "master".to_owned())
        );
        from.in_sync().await;
    }
    stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.unwrap();
    let kept: BTreeSet<u64> = second.run("SMEMBERS numbers").await.unwrap();
    let lost: Vec<_> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "lost {} of {}: {lost:?}", lost.len(), acknowledged.len());
    assert!(acknowledged.len() > 600, "{}", acknowledged.len());
}

#[tokio::test]
async fn a_handover_to_a_replica_that_cannot_catch_up_fails_and_the_primary_goes_on() {
    let primary = Server::start("").await;
    let proxy = Proxy::to(primary.port).await;
    let replica = Server::start(&format!("replicaof 127.0.0.1 {}", proxy.port)).await;
    replica.in_sync().await;
    // Replication stalls, and both ends still believe in it.
    proxy.deafen();
    primary.run::<String>("SET key value").await.unwrap();
    let (from, _) = link_to(Target { port: proxy.port, ..primary.target() }, 1, MANAGER_PASSWORD);
    let (from_look, (to, to_look)) = (present(&from).await, replica.linked(1).await);
    let outcome = from.handover(&from_look.run_id, &to, &to_look.run_id, 200).await;
    assert!(matches!(&outcome, Outcome::Failed(why) if why.contains("goes on")), "{outcome:?}");
    assert_eq!((primary.field("role").await, replica.field("role").await), ("master".into(), "slave".into()));
    assert_eq!(primary.run::<String>("SET key again").await.unwrap(), "OK");
}

#[tokio::test]
async fn a_handover_between_servers_that_are_no_pair_is_superseded() {
    let (primary, replica) = pair().await;
    let stranger = Server::start("").await;
    let ((from, from_look), (to, to_look)) = linked_pair(&primary, &replica).await;
    let (other, other_look) = stranger.linked(1).await;
    let reversed = to.handover(&to_look.run_id, &from, &from_look.run_id, 500).await;
    superseded(reversed, "not a primary");
    let foreign = from.handover(&from_look.run_id, &other, &other_look.run_id, 500).await;
    superseded(foreign, "not a linked replica");
    replica.signal("STOP");
    superseded(from.handover(&from_look.run_id, &to, &to_look.run_id, 500).await, "could not check");
    assert_eq!(primary.field("role").await, "master");
}
