//! Members of a Valkey Cluster: the gate is the closed port, and the operator speaks of nodes.

use super::{
    APPEND_ONLY, NOTHING, SNAPSHOTS,
    support::{Member, PATIENCE, Shard, eventually, signal},
};
use std::{
    fs,
    time::{Duration, Instant},
};
use tonic::{Code, Status};
use valkeeper_agent::proto::{self, Promotion};
use valkeeper_core::{
    config::{GATE_PORT_BLANK, GATE_PORT_HISTORY},
    info::Info,
    nodes::Nodes,
    observation::NodeFacts,
    slots::{SLOTS, SlotSet},
};

const NODES: &str = "cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-node-timeout 2000\n\
    cluster-require-full-coverage no\ncluster-allow-replica-migration no";
/// What is handed over to a server is written there as the user of replication. Not in its file: servers below 9.0 do not know all of it.
pub const TAKES_KEYS: &str =
    "~* +@write +pfcount +select +cluster|syncslots -flushall -flushdb -migrate -swapdb";
/// Of the operator, who is the same all the time.
pub const EPOCH: u64 = 1;

impl Member {
    /// What its node says.
    pub async fn node(&self) -> NodeFacts {
        let text: String = self.run_as("valkeeper", "CLUSTER NODES").await.unwrap();
        text.parse::<Nodes>().unwrap().facts()
    }

    /// What it says at the gate that it began with.
    pub async fn mark(&self) -> Option<&'static str> {
        let info: String = self.run_as("valkeeper", "INFO everything").await.unwrap();
        Info::parse(&info).unwrap().gate.map(|gate| match gate.port {
            GATE_PORT_BLANK => "blank",
            GATE_PORT_HISTORY => "history",
            port => panic!("a gate of port {port}"),
        })
    }

    pub async fn keys(&self) -> usize {
        self.run("DBSIZE").await.unwrap()
    }

    /// Waits until its agent has looked at it once more from the beginning to the end.
    async fn is_looked_at(&self) {
        let looks = async || {
            let calls = self.field("cmdstat_cluster|nodes").await;
            calls.split(['=', ',']).nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = looks().await;
        // The first of them may have begun before, and what the last one said is not done with.
        eventually("two looks", async || (looks().await > before + 2).then_some(())).await;
    }

    pub async fn fill(&self, keys: usize) {
        eventually("an open port", || self.client()).await;
        // A primary that has just got slots looks around for up to two seconds before it takes writes.
        eventually("a node that takes writes", || async { self.run::<()>("SET key:0 value").await.ok() })
            .await;
        for n in 1..keys {
            let _: () = self.run(&format!("SET key:{n} value")).await.unwrap();
        }
    }
}

impl Shard {
    pub fn with_nodes(count: u16, conf: &str) -> Shard {
        Shard::start(count, &format!("{NODES}\n{conf}"))
    }

    pub async fn promote_by(&self, ordinal: u16, grant: u64, by: Promotion) -> Result<(), Status> {
        let request = self.promotion(ordinal, EPOCH, grant, 0).await;
        let request = proto::PromoteRequest { by: by.into(), ..request };
        self.agent(ordinal).await.promote(request).await.map(drop)
    }

    async fn add_slots(&self, ordinal: u16, node_id: String, slots: &str) -> Result<(), Status> {
        let run_id = self.members[usize::from(ordinal)].field("run_id").await;
        let config_epoch = u64::from(ordinal) + 1;
        let request =
            proto::AddSlotsRequest { epoch: EPOCH, run_id, node_id, slots: slots.to_owned(), config_epoch };
        self.agent(ordinal).await.add_slots(request).await.map(drop)
    }

    /// Opens a node and gives it slots.
    pub async fn begin(&self, ordinal: u16, grant: u64, slots: &str) {
        let member = &self.members[usize::from(ordinal)];
        self.at_gate(ordinal, EPOCH).await;
        self.promote_by(ordinal, grant, Promotion::Open).await.unwrap();
        self.add_slots(ordinal, member.node().await.id.to_string(), slots).await.unwrap();
    }

    pub async fn meet(&self, ordinal: u16, other: &Member) {
        let member = &self.members[usize::from(ordinal)];
        let (host, port) = (other.ip.to_string(), u32::from(other.port));
        let request = proto::MeetRequest { epoch: EPOCH, run_id: member.field("run_id").await, host, port };
        self.agent(ordinal).await.meet(request).await.unwrap();
        let (mine, theirs) = (member.node().await.id, other.node().await.id);
        eventually("two nodes that know each other", || async {
            let known = member.node().await.knows.contains_key(&theirs)
                && other.node().await.knows.contains_key(&mine);
            known.then_some(())
        })
        .await;
    }

    /// Two primaries that know each other. All slots and these keys are the first one's.
    async fn pair(keys: usize) -> Shard {
        Shard::pair_with(keys, NOTHING).await
    }

    async fn pair_with(keys: usize, conf: &str) -> Shard {
        let shard = Shard::with_nodes(2, conf);
        shard.begin(0, 5, "0-16383").await;
        shard.at_gate(1, EPOCH).await;
        shard.promote_by(1, 5, Promotion::Open).await.unwrap();
        let second = &shard.members[1];
        shard.meet(0, second).await;
        // What it does not know for the other's it does not take.
        eventually("slots that both know", || async { (second.node().await.covered == SLOTS).then_some(()) })
            .await;
        let _: () = second.run(&format!("ACL SETUSER replica {TAKES_KEYS}")).await.unwrap();
        shard.members[0].fill(keys).await;
        shard
    }

    /// What makes the first one hand slots over to the second.
    async fn handing(&self, slots: &str) -> proto::MigrateSlotsRequest {
        proto::MigrateSlotsRequest {
            epoch: EPOCH,
            run_id: self.members[0].field("run_id").await,
            slots: slots.to_owned(),
            node_id: self.members[1].node().await.id.to_string(),
            by_key: false,
        }
    }

    /// Waits until the second has these slots and the first all others, to both of them.
    async fn moved(&self, slots: &SlotSet) {
        let (first, second) = (&self.members[0], &self.members[1]);
        eventually("slots at their new owner", || async {
            let (mine, theirs) = (first.node().await, second.node().await);
            let moved = theirs.slots == *slots && mine.slots == SlotSet::all().without(slots);
            (moved && mine.covered == SLOTS && theirs.covered == SLOTS).then_some(())
        })
        .await;
    }

    /// Attaches a member to another's node and waits until its link is up.
    pub async fn follow(&self, ordinal: u16, to: u16, grant: u64) {
        let (member, source) = (&self.members[usize::from(ordinal)], &self.members[usize::from(to)]);
        let request = proto::AttachRequest {
            epoch: EPOCH,
            brief: Some(self.brief(grant, to, 0)),
            run_id: member.field("run_id").await,
            node_id: source.node().await.id.to_string(),
            ..proto::AttachRequest::default()
        };
        self.agent(ordinal).await.attach(request).await.unwrap();
        member.linked().await;
    }
}

#[tokio::test]
async fn a_blank_node_holds_at_the_gate_until_it_is_opened_where_it_is() {
    let shard = Shard::with_nodes(1, NOTHING);
    let member = &shard.members[0];
    shard.at_gate(0, EPOCH).await;
    assert_eq!(member.mark().await, Some("blank"));
    assert!(member.client().await.is_none(), "no client gets in");
    let (ready, why) = member.page("/readyz").await.unwrap();
    assert_eq!((ready, why.trim()), (503, "at the boot gate"));
    let refused = shard.promote_by(0, 5, Promotion::Unspecified).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(shard.members[0].ledger().brief.holder, None, "a refused promotion leaves no grant");

    shard.promote_by(0, 5, Promotion::Open).await.unwrap();
    assert_eq!((member.mark().await, member.page("/readyz").await.unwrap().0), (None, 200));
    assert!(!member.ledger().blank);
    let refused = shard.promote_by(0, 6, Promotion::Open).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    let id = member.node().await.id.to_string();
    let refused = shard.add_slots(0, "0".repeat(40), "0-16383").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    shard.add_slots(0, id.clone(), "0-100").await.unwrap();
    shard.add_slots(0, id, "0-16383").await.unwrap();
    let node = member.node().await;
    assert_eq!((node.slots, node.covered, node.epoch), (SlotSet::all(), SLOTS, 1));
    member.fill(3).await;
    assert_eq!(member.keys().await, 3);
    assert!(!member.log().contains("of-replicas"), "no password in the log");
}

#[tokio::test]
async fn a_primary_that_comes_back_blank_waits_at_the_gate_and_gets_its_data_from_who_took_over() {
    let shard = Shard::with_nodes(2, NOTHING);
    let (first, second) = (&shard.members[0], &shard.members[1]);
    shard.begin(0, 5, "0-16383").await;
    first.fill(100).await;
    shard.at_gate(1, EPOCH).await;
    shard.meet(0, second).await;
    shard.follow(1, 0, 5).await;
    assert_eq!((second.keys().await, second.mark().await), (100, None));

    signal(first.server_pid().await, "KILL");
    shard.at_gate(0, EPOCH).await;
    assert_eq!(first.mark().await, Some("blank"));
    assert!(first.client().await.is_none());
    assert_eq!(first.node().await.slots, SlotSet::all(), "to the others it is what it was");
    assert_eq!(second.keys().await, 100, "nothing is copied from it");
    shard.promote_by(1, 6, Promotion::Takeover).await.unwrap();
    assert_eq!(second.node().await.slots, SlotSet::all());
    shard.follow(0, 1, 6).await;
    assert_eq!((first.keys().await, first.mark().await), (100, None));
    assert!(first.run::<()>("SET key:1 other").await.is_err(), "it is a replica");
    second.fill(101).await;

    // And back, in order: writes go on at the one or at the other.
    shard.promote_by(0, 7, Promotion::Handover).await.unwrap();
    shard.follow(1, 0, 7).await;
    first.fill(102).await;
    eventually("the last writes", || async { (second.keys().await == 102).then_some(()) }).await;
}

#[tokio::test]
async fn a_majority_of_the_primaries_votes_for_who_is_promoted_by_force() {
    let shard = Shard::with_nodes(4, NOTHING);
    for (ordinal, slots) in [(0, "0-5460"), (1, "5461-10922"), (2, "10923-16383")] {
        shard.begin(ordinal, 5, slots).await;
    }
    shard.at_gate(3, EPOCH).await;
    for other in &shard.members[1..] {
        shard.meet(0, other).await;
    }
    shard.follow(3, 0, 5).await;
    let (first, replica) = (&shard.members[0], &shard.members[3]);
    eventually("three primaries that its replica knows", || async {
        (replica.node().await.covered == SLOTS).then_some(())
    })
    .await;
    signal(first.server_pid().await, "KILL");
    shard.at_gate(0, EPOCH).await;
    // A server does not vote in the first two seconds after its start, and a promotion by vote waits for less.
    eventually("a vote", || async { shard.promote_by(3, 6, Promotion::Force).await.ok() }).await;
    assert_eq!(replica.node().await.slots.to_string(), "0-5460");
    shard.follow(0, 3, 6).await;
    assert_eq!(first.mark().await, None);
    let gone = proto::ForgetRequest {
        epoch: EPOCH,
        run_id: replica.field("run_id").await,
        node_id: first.node().await.id.to_string(),
    };
    shard.agent(3).await.forget(gone.clone()).await.unwrap();
    let stranger = proto::ForgetRequest { node_id: "0".repeat(40), ..gone.clone() };
    shard.agent(3).await.forget(stranger).await.unwrap();
    let deposed = proto::ForgetRequest { epoch: 0, ..gone };
    assert_eq!(shard.agent(3).await.forget(deposed).await.unwrap_err().code(), Code::Aborted);
}

#[tokio::test]
async fn a_replica_at_the_gate_is_not_synchronised_before_it_is_told_to_follow() {
    let shard = Shard::with_nodes(2, NOTHING);
    let (first, second) = (&shard.members[0], &shard.members[1]);
    shard.begin(0, 5, "0-16383").await;
    first.fill(10).await;
    shard.at_gate(1, EPOCH).await;
    shard.meet(0, second).await;
    shard.follow(1, 0, 5).await;
    signal(second.server_pid().await, "KILL");
    shard.at_gate(1, EPOCH).await;
    assert_eq!(second.node().await.primary, Some(first.node().await.id), "nodes.conf says so");
    first.fill(11).await;
    eventually("a synchronisation that is refused", || async {
        second.log().contains("WRONGPASS").then_some(())
    })
    .await;
    assert!(second.mark().await.is_some());
    assert!(!second.field("db0").await.starts_with("keys=11,"), "nothing has come since");
    let refused = shard.promote_by(1, 6, Promotion::Open).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    shard.follow(1, 0, 5).await;
    assert_eq!((second.keys().await, second.mark().await), (11, None));
}

/// A shard of two with 50 keys, and two others that vote.
async fn three_shards() -> (Shard, [Shard; 2]) {
    let shard = Shard::with_nodes(2, NOTHING);
    let others = [Shard::with_nodes(1, NOTHING), Shard::with_nodes(1, NOTHING)];
    let (first, second) = (&shard.members[0], &shard.members[1]);
    shard.begin(0, 5, "0-16381").await;
    for (other, slots) in others.iter().zip(["16382", "16383"]) {
        other.begin(0, 5, slots).await;
        shard.meet(0, &other.members[0]).await;
    }
    shard.at_gate(1, EPOCH).await;
    shard.meet(0, second).await;
    shard.follow(1, 0, 5).await;
    first.fill(50).await;
    eventually("all of the keys", || async { (second.keys().await == 50).then_some(()) }).await;
    eventually("slots that everybody knows", || async {
        let nodes = [first.node().await, second.node().await];
        nodes.iter().all(|node| node.covered == SLOTS).then_some(())
    })
    .await;

    // A replica whose agent has never seen its link up does not stand.
    second.is_looked_at().await;
    (shard, others)
}

async fn is_replaced(shard: &Shard) {
    let (first, second) = (&shard.members[0], &shard.members[1]);
    eventually("a replica that was elected", || async {
        let node = second.node().await;
        (node.primary.is_none() && node.slots.len() == 16_382).then_some(())
    })
    .await;
    eventually("the old primary as its replica", || async {
        let serves = first.client().await.is_some();
        (serves && first.field("master_link_status").await == "up").then_some(())
    })
    .await;
    assert_eq!((first.keys().await, second.keys().await), (50, 50));
    assert_eq!(first.node().await.primary, Some(second.node().await.id));
    second.fill(51).await;
    assert!(first.log().contains("the server is ended"), "it made place");
}

#[tokio::test]
async fn without_the_operator_a_primary_that_has_lost_its_data_makes_place_and_follows_who_is_elected() {
    let (shard, _others) = three_shards().await;
    // From here on nobody greets an agent: the operator is away.
    signal(shard.members[0].server_pid().await, "KILL");
    is_replaced(&shard).await;
}

#[tokio::test]
async fn a_primary_that_died_long_before_the_operator_went_away_is_replaced_all_the_same() {
    let (shard, _others) = three_shards().await;
    signal(shard.members[0].server_pid().await, "KILL");
    // It counts as there and does nothing, as one whose API server does not answer.
    for _ in 0..12 {
        for ordinal in [0, 1] {
            shard.greet(ordinal, EPOCH, "").await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(shard.members[0].mark().await.is_some(), "its agent waits for the operator");
    is_replaced(&shard).await;
}

#[tokio::test]
async fn without_the_operator_nodes_that_were_stopped_in_order_come_back_from_their_append_only_files() {
    come_back(APPEND_ONLY).await;
}

#[tokio::test]
async fn without_the_operator_nodes_that_were_stopped_in_order_come_back_from_their_snapshots() {
    come_back(SNAPSHOTS).await;
}

/// Ends both members in order and starts them again, the operator being away.
async fn come_back(conf: &str) {
    let mut shard = Shard::with_nodes(2, conf);
    shard.begin(0, 5, "0-16383").await;
    shard.at_gate(1, EPOCH).await;
    shard.meet(0, &shard.members[1]).await;
    shard.follow(1, 0, 5).await;
    shard.members[0].fill(20).await;
    for member in &mut shard.members {
        member.terminate();
    }
    for member in &mut shard.members {
        assert!(member.ended().await.success(), "{}", member.log());
        member.start();
    }
    let (first, second) = (&shard.members[0], &shard.members[1]);
    first.fill(21).await;
    eventually("a replica of it that has everything", || async {
        let follows = second.client().await.is_some() && second.field("master_link_status").await == "up";
        (follows && second.keys().await == 21).then_some(())
    })
    .await;
    assert_eq!(second.node().await.primary, Some(first.node().await.id));
    let state = shard.greet(0, EPOCH, "").await;
    assert_eq!((state.gate.as_str(), state.brief.unwrap().grant), ("resumed", 5));
    assert_eq!(shard.greet(1, EPOCH, "").await.attached_to, "0-0");
}

#[tokio::test]
async fn a_member_that_has_lost_its_node_begins_as_a_new_one_and_its_data_is_put_aside() {
    let mut shard = Shard::with_nodes(1, SNAPSHOTS);
    shard.begin(0, 5, "0-16383").await;
    let member = &mut shard.members[0];
    member.fill(10).await;
    let before = member.node().await.id;
    member.terminate();
    assert!(member.ended().await.success());
    let data = member.dir.join("data");
    assert!(data.join("dump.rdb").exists());
    member.start();
    shard.at_gate(0, EPOCH).await;
    let member = &mut shard.members[0];
    assert_eq!(member.mark().await, Some("history"));
    assert_eq!(member.node().await.id, before);
    member.kill();
    fs::remove_file(data.join("nodes.conf")).unwrap();
    member.start();
    shard.at_gate(0, EPOCH).await;
    let member = &shard.members[0];
    assert_eq!(member.mark().await, Some("blank"));
    let node = member.node().await;
    assert!(node.id != before && node.slots.is_empty());
    assert!(data.join("dump.rdb.aside").exists());
}

#[tokio::test]
async fn slots_go_to_another_node_with_their_keys() {
    const KEYS: usize = 200;
    let shard = Shard::pair(KEYS).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    let some = shard.handing("0-8000 9000").await;
    shard.agent(0).await.migrate_slots(some).await.unwrap();
    shard.moved(&"0-8000 9000".parse().unwrap()).await;
    assert!(first.log().contains("the node hands slots over"));
    let (left, gone) = (first.keys().await, second.keys().await);
    assert!(left > 0 && gone > 0 && left + gone == KEYS, "{left} and {gone}");
    for n in 0..KEYS {
        let (read, slot) = (format!("GET key:{n}"), format!("CLUSTER KEYSLOT key:{n}"));
        let is_moved = second.node().await.slots.contains(second.run(&slot).await.unwrap());
        let (owner, other) = if is_moved { (second, first) } else { (first, second) };
        assert_eq!(owner.run::<String>(&read).await.unwrap(), "value");
        let refused = other.run::<String>(&read).await.unwrap_err();
        assert_eq!(refused.code(), Some("MOVED"), "{refused}");
    }

    let rest = shard.handing("8001-8999 9001-16383").await;
    shard.agent(0).await.migrate_slots(rest).await.unwrap();
    shard.moved(&SlotSet::all()).await;
    assert_eq!((first.keys().await, second.keys().await), (0, KEYS));
    assert_eq!(first.node().await.primary, None, "who has given everything away stays what it is");
    second.fill(KEYS + 1).await;
}

/// Writes of every kind that is streamed to another server otherwise than it was asked for, until the slots are not this node's any more;
/// how many were acknowledged.
async fn write_on(member: &Member) -> usize {
    let mut connection = member.connect("default").await;
    let begun = Instant::now();
    let mut acknowledged = 0;
    while begun.elapsed() < PATIENCE {
        let mut writes = redis::pipe();
        writes.atomic().cmd("INCR").arg("{a}count").cmd("RPUSH").arg("{a}list").arg(acknowledged);
        let mut others = redis::pipe();
        others.cmd("EVAL").arg("redis.call('SADD', KEYS[1], ARGV[1]); redis.call('SPOP', KEYS[1])");
        others.arg(1).arg("{a}set").arg(acknowledged);
        others.cmd("PFADD").arg("{a}log").arg(acknowledged).cmd("PFCOUNT").arg("{a}log");
        others.cmd("SORT").arg("{a}list").arg("LIMIT").arg(0).arg(3).arg("STORE").arg("{a}sorted");
        others.cmd("SET").arg("{a}short").arg(1).arg("PX").arg(1);
        others.cmd("GETDEL").arg("{a}sorted").cmd("GETEX").arg("{a}count").arg("PERSIST");
        if let Err(error) = writes.query_async::<redis::Value>(&mut connection).await {
            assert!(error.to_string().to_uppercase().contains("MOVED"), "{error}");
            return acknowledged;
        }
        acknowledged += 1;
        let _: redis::RedisResult<redis::Value> = others.query_async(&mut connection).await;
    }
    panic!("the slots did not go within {PATIENCE:?}");
}

#[tokio::test]
async fn slots_that_are_written_to_go_to_another_node_without_losing_a_write() {
    let shard = Shard::pair(100).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    let all = shard.handing("0-16383").await;
    let handed = async {
        eventually("writes", || async { first.run::<usize>("GET {a}count").await.ok() }).await;
        shard.agent(0).await.migrate_slots(all).await.unwrap();
    };
    let (acknowledged, ()) = tokio::join!(write_on(first), handed);
    shard.moved(&SlotSet::all()).await;
    assert!(acknowledged > 0);
    assert_eq!(second.run::<usize>("GET {a}count").await.unwrap(), acknowledged);
    assert_eq!(second.run::<usize>("LLEN {a}list").await.unwrap(), acknowledged);
}

#[tokio::test]
async fn slots_stay_where_they_are_if_anything_the_handover_was_decided_from_is_not_so() {
    let shard = Shard::pair(10).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    let right = shard.handing("0-100").await;
    let mut agent = shard.agent(0).await;
    let mut refused =
        async |request: proto::MigrateSlotsRequest| agent.migrate_slots(request).await.unwrap_err().code();
    let deposed = proto::MigrateSlotsRequest { epoch: 0, ..right.clone() };
    assert_eq!(refused(deposed).await, Code::Aborted);
    for (run_id, node_id) in [("0".repeat(40), right.node_id.clone()), (right.run_id.clone(), "0".repeat(40))]
    {
        let other = proto::MigrateSlotsRequest { run_id, node_id, ..right.clone() };
        assert_eq!(refused(other.clone()).await, Code::FailedPrecondition, "{other:?}");
    }
    for malformed in [
        proto::MigrateSlotsRequest { slots: String::new(), ..right.clone() },
        proto::MigrateSlotsRequest { slots: "0-16384".to_owned(), ..right.clone() },
        proto::MigrateSlotsRequest { node_id: "nobody".to_owned(), ..right.clone() },
    ] {
        assert_eq!(refused(malformed).await, Code::InvalidArgument);
    }
    // The second serves none of them.
    let other = proto::MigrateSlotsRequest {
        run_id: second.field("run_id").await,
        node_id: first.node().await.id.to_string(),
        ..right.clone()
    };
    let stranger = shard.agent(1).await.migrate_slots(other).await.unwrap_err();
    assert_eq!(stranger.code(), Code::FailedPrecondition, "{stranger}");
    for member in [first, second] {
        let jobs: Vec<redis::Value> = member.run("CLUSTER GETSLOTMIGRATIONS").await.unwrap();
        assert_eq!(jobs, [], "nothing was begun");
    }

    signal(first.server_pid().await, "KILL");
    shard.at_gate(0, EPOCH).await;
    let gated = shard.handing("0-100").await;
    assert_eq!(refused(gated).await, Code::FailedPrecondition, "behind the gate it has nothing to give");
    assert_eq!((first.node().await.slots, first.mark().await.is_some()), (SlotSet::all(), true));
}

#[tokio::test]
async fn what_the_server_refuses_to_hand_over_comes_back_in_its_own_words() {
    let shard = Shard::pair(10).await;
    let second = &shard.members[1];
    let request = shard.handing("0-100").await;
    let node_id = shard.members[0].node().await.id.to_string();
    let cancel = proto::MigrateSlotsRequest { node_id, ..request.clone() };
    let target = second.server_pid().await;
    // While the target does not answer, the job does not come to its end.
    signal(target, "STOP");
    let begun = shard.agent(0).await.migrate_slots(request.clone()).await;
    let again = shard.agent(0).await.migrate_slots(request.clone()).await;
    begun.unwrap();
    let refused = again.unwrap_err();
    // To itself: what is under way is cancelled.
    shard.agent(0).await.migrate_slots(cancel).await.unwrap();
    signal(target, "CONT");
    let told = shard.members[0].run::<Vec<Vec<redis::Value>>>("CLUSTER GETSLOTMIGRATIONS").await.unwrap();
    assert!(format!("{told:?}").contains("cancelled"), "{told:?}");
    assert_eq!(shard.members[0].node().await.slots, SlotSet::all());
    shard.agent(0).await.migrate_slots(request).await.unwrap();
    assert_eq!(refused.code(), Code::Unknown, "{refused}");
    assert!(refused.message().contains("already migrating slot 0"), "{refused}");
    shard.moved(&"0-100".parse().unwrap()).await;
}

#[tokio::test]
async fn slots_that_are_granted_already_are_not_taken_back() {
    let shard = Shard::pair_with(10, &format!("{NOTHING}\nenable-debug-command yes")).await;
    let (first, second) = (&shard.members[0], &shard.members[1]);
    let request = shard.handing("0-100").await;
    let cancel = proto::MigrateSlotsRequest { node_id: first.node().await.id.to_string(), ..request.clone() };
    let granted = async || {
        let jobs = first.run::<Vec<Vec<redis::Value>>>("CLUSTER GETSLOTMIGRATIONS").await.unwrap();
        format!("{jobs:?}").contains("failover-granted").then_some(())
    };
    // The target has the word that the slots are its own, and has not taken them.
    let () = second.run("DEBUG SLOTMIGRATION PREVENT-FAILOVER 1").await.unwrap();
    shard.agent(0).await.migrate_slots(request).await.unwrap();
    eventually("granted slots", granted).await;
    let refused = shard.agent(0).await.migrate_slots(cancel).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("granted"), "{refused}");
    assert!(granted().await.is_some(), "nobody may write to them here");
    let () = second.run("DEBUG SLOTMIGRATION PREVENT-FAILOVER 0").await.unwrap();
    shard.moved(&"0-100".parse().unwrap()).await;
}
