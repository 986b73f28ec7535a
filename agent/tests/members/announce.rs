//! How nodes of a Valkey Cluster are named to clients.

use super::{
    NOTHING,
    cluster::EPOCH,
    support::{Member, Shard, eventually},
};
use valkeeper_agent::proto::Promotion;

const FIRST: &str = "orders-node-0-0.test.svc";
const SECOND: &str = "orders-node-0-1.test.svc";

/// Where a client is sent that asks for a key of another node.
async fn sent_to(member: &Member) -> String {
    let refused = member.run::<Option<String>>("GET key").await.unwrap_err();
    let detail = refused.detail().unwrap_or_default();
    detail.split_whitespace().last().unwrap_or_default().to_owned()
}

/// What it knows of all of them.
async fn nodes(member: &Member) -> String {
    member.run("CLUSTER NODES").await.unwrap()
}

#[tokio::test]
async fn every_node_has_a_name_that_clients_can_be_told_in_the_middle_of_a_rollout_to_names() {
    let mut shard = Shard::with_nodes(2, NOTHING);
    shard.begin(0, 5, "0-16383").await;
    shard.at_gate(1, EPOCH).await;
    shard.promote_by(1, 5, Promotion::Open).await.unwrap();
    shard.meet(0, &shard.members[1]).await;
    let [by_address, by_name] = [shard.members[0].ip.to_string(), FIRST.to_owned()]
        .map(|host| format!("{host}:{}", shard.members[0].port));
    let sends = async |shard: &Shard, to: &str| {
        eventually(to, async || (sent_to(&shard.members[1]).await == to).then_some(())).await;
    };
    sends(&shard, &by_address).await;
    for name in [FIRST, SECOND] {
        eventually(name, async || nodes(&shard.members[0]).await.contains(name).then_some(())).await;
    }

    // Only the second is restarted: the first still tells clients addresses.
    shard.members[1].kill();
    shard.members[1].announce_names();
    shard.members[1].start();
    shard.at_gate(1, EPOCH).await;
    shard.promote_by(1, 5, Promotion::Open).await.unwrap();
    sends(&shard, &by_name).await;
    let slots: redis::Value = shard.members[1].run("CLUSTER SLOTS").await.unwrap();
    assert!(format!("{slots:?}").contains(FIRST), "{slots:?}");
    // What the operator and the agents read is the same as before.
    let (known, id) = (shard.members[1].node().await.knows, shard.members[0].node().await.id);
    assert_eq!(known.get(&id), Some(&Some(shard.members[0].ip.to_string())));
}
