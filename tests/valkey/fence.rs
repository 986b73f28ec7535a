//! A deposed writer changes nothing.

use crate::server::{Server, present, woken};
use valkeeper::valkey::Error;
use valkeeper_core::{
    effect::Outcome,
    ids::WriterEpoch,
    observation::{Observed, Why},
};

async fn users(server: &Server) -> Vec<String> {
    let mut users: Vec<String> = server.run("ACL USERS").await.unwrap();
    users.retain(|user| user.starts_with("op-"));
    users
}

#[tokio::test]
async fn a_newer_epoch_closes_the_older_ones_connections_and_deletes_their_users() {
    let primary = Server::start("").await;
    let replica = Server::replica_of(&primary).await;
    let (old, wake) = replica.link(4);
    let seen = present(&old).await;
    assert_eq!(users(&replica).await, ["op-4"]);

    let (new, _) = replica.linked(7).await;
    woken(&wake).await;
    assert_eq!(users(&replica).await, ["op-7"]);
    let refused = old.promote(&seen.run_id, &seen.replid, 0).await;
    assert!(matches!(refused, Outcome::Superseded(_)), "{refused:?}");
    assert_eq!(replica.field("role").await, "slave");

    assert_eq!(old.look().await, Observed::Unknown(Why::Unauthorized));
    assert_eq!(old.trouble(), Some(Error::Fenced { ours: WriterEpoch(4), theirs: WriterEpoch(7) }));
    assert_eq!(users(&replica).await, ["op-7"], "the deposed one leaves nothing behind");
    present(&new).await;
}

#[tokio::test]
async fn a_deposed_writer_fails_on_the_connection_it_still_believes_in() {
    let primary = Server::start("").await;
    let replica = Server::replica_of(&primary).await;
    let (old, seen) = replica.linked(4).await;
    // Frozen, the server has the promotion's first command and the end of its user in its queues, in either order.
    let mut new = replica.app().await;
    replica.signal("STOP");
    let delete = async { redis::cmd("ACL").arg("DELUSER").arg("op-4").query_async::<i64>(&mut new).await };
    let thaw = async { replica.signal("CONT") };
    let (deleted, outcome, ()) = tokio::join!(delete, old.promote("another", &seen.replid, 0), thaw);
    assert_eq!(deleted.unwrap(), 1);
    assert!(matches!(outcome, Outcome::Superseded(_)), "{outcome:?}");
    let refused = old.promote(&seen.run_id, &seen.replid, 0).await;
    assert!(matches!(refused, Outcome::Superseded(_)), "{refused:?}");
    assert_eq!(replica.field("role").await, "slave");
}

#[tokio::test]
async fn of_writers_that_come_at_once_the_highest_epoch_stays() {
    let server = Server::start("").await;
    let links: Vec<_> = (1..=6).map(|epoch| server.link(epoch).0).collect();
    for _ in 0..3 {
        let looks = links.iter().map(|link| link.look());
        let seen = futures::future::join_all(looks).await;
        assert!(seen.last().is_some_and(|seen| seen.present().is_some()), "{seen:?}");
    }
    assert_eq!(users(&server).await, ["op-6"]);
    for (index, link) in links.iter().take(5).enumerate() {
        let (ours, theirs) = (WriterEpoch(index as u64 + 1), WriterEpoch(6));
        assert_eq!(link.trouble(), Some(Error::Fenced { ours, theirs }));
    }
}

#[tokio::test]
async fn the_epochs_user_can_do_its_work_and_nothing_else() {
    let server = Server::start("").await;
    let (_link, _) = server.linked(1).await;
    for allowed in ["INFO", "REPLICAOF NO ONE", "FAILOVER ABORT", "CLIENT KILL TYPE normal", "PING"] {
        let answer: String = server.run(&format!("ACL DRYRUN op-1 {allowed}")).await.unwrap();
        assert_eq!(answer, "OK", "{allowed}");
    }
    for refused in ["GET key", "FLUSHALL", "SHUTDOWN", "CONFIG GET *", "ACL LIST", "DEBUG SLEEP 0", "KEYS *"]
    {
        let answer: String = server.run(&format!("ACL DRYRUN op-1 {refused}")).await.unwrap();
        assert!(answer.contains("no permissions"), "{refused}: {answer}");
    }
    for refused in ["INFO", "REPLICAOF NO ONE", "GET key"] {
        let answer: String = server.run(&format!("ACL DRYRUN valkeeper {refused}")).await.unwrap();
        assert!(answer.contains("no permissions"), "{refused}: {answer}");
    }
}
