//! A deposed writer changes nothing.

use crate::server::{Server, present, woken};
use valkeeper::valkey::Error;
use valkeeper_core::{
    effect::Outcome,
    ids::WriterEpoch,
    observation::{Observed, Why},
};

/// Epochs that log in at the same time, and how often: enough that some round interleaves them in every order that
/// matters (without the second check of the fence, the test fails within a dozen rounds).
const WRITERS: u64 = 4;
const ROUNDS: u64 = 60;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_writers_that_come_at_once_the_highest_epoch_stays_alone() {
    let server = Server::start("").await;
    for round in 0..ROUNDS {
        let highest = (round + 1) * WRITERS;
        let writers: Vec<_> = (0..WRITERS)
            .map(|below| {
                let (link, _) = server.link(highest - below);
                // The lower ones a little later each round, so that they meet the highest at every step of its login.
                let late = below * round;
                tokio::spawn(async move {
                    for _ in 0..late {
                        tokio::task::yield_now().await;
                    }
                    (link.look().await, link)
                })
            })
            .collect();
        let mut looks = Vec::new();
        for writer in writers {
            looks.push(writer.await.unwrap());
        }
        assert!(looks[0].0.present().is_some(), "{:?}", looks[0].1.trouble());
        assert_eq!(users(&server).await, [format!("op-{highest}")], "round {round}");
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
