//! The boot gate: a server that follows an address where nobody answers cannot be copied from.

use crate::{
    agent::{Pair, at, brief},
    server::{eventually, signal},
};

#[tokio::test]
async fn replicas_keep_their_keys_when_their_primary_comes_back_empty_at_the_gate() {
    let Pair { members: [old, replica], agents, .. } = &Pair::start().await;
    let words: Vec<String> = (0..300).map(|number| format!("key:{number} value")).collect();
    old.run::<String>(&format!("MSET {}", words.join(" "))).await.unwrap();
    eventually("300 keys on the replica", || async { (replica.dbsize().await == 300).then_some(()) }).await;

    // Nothing is on its disk: the agent starts it again, blank.
    signal(old.server_pid().await, "KILL");
    let tries = || replica.log().matches("Connecting to PRIMARY").count();
    let before = tries();
    eventually("two tries to synchronise", || async { (tries() >= before + 2).then_some(()) }).await;
    assert_eq!((old.dbsize().await, replica.dbsize().await), (0, 300));
    let refused = old.run::<String>("SET key value").await.unwrap_err();
    assert_eq!(refused.code(), Some("READONLY"));

    let (_link, look) = replica.linked().await;
    agents[1].promote(&replica.process(&look), &brief(2, replica), &at(&look), 0).await.unwrap();
    let (_link, look) = old.linked().await;
    agents[0].attach(&old.process(&look), &brief(2, replica), &replica.endpoint()).await.unwrap();
    eventually("300 keys on both", || async { (old.dbsize().await == 300).then_some(()) }).await;
    assert_eq!(replica.dbsize().await, 300);
}
