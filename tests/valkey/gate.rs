//! The boot gate: a server that follows an address where nobody answers cannot be copied from.

use crate::server::{Server, eventually};
use valkeeper_core::effect::Outcome;

#[tokio::test]
async fn replicas_keep_their_keys_when_their_primary_comes_back_empty_at_the_gate() {
    let mut old = Server::start("").await;
    old.run::<String>("DEBUG POPULATE 300").await.unwrap();
    let replica = Server::replica_of(&old).await;
    eventually("300 keys on the replica", || async { (replica.dbsize().await == 300).then_some(()) }).await;

    old.kill();
    old.lose_data();
    old.restart("replicaof 127.0.0.1 2").await;
    eventually("a refused synchronisation", || async {
        replica.log().contains("NOMASTERLINK").then_some(())
    })
    .await;
    assert_eq!((old.dbsize().await, replica.dbsize().await), (0, 300));
    let refused = old.run::<String>("SET key value").await.unwrap_err();
    assert_eq!(refused.code(), Some("READONLY"));

    let (to_replica, look) = replica.linked(1).await;
    assert_eq!(to_replica.promote(&look.run_id, &look.replid, look.offset).await, Outcome::Verified);
    let (to_old, look) = old.linked(1).await;
    assert_eq!(to_old.attach(&look.run_id, "127.0.0.1", replica.port).await, Outcome::Verified);
    eventually("300 keys on both", || async { (old.dbsize().await == 300).then_some(()) }).await;
    assert_eq!(replica.dbsize().await, 300);
}
