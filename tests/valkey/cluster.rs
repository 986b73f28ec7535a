//! The operator's words to the agents of a Valkey Cluster, and what its looks make of it.

use crate::{
    agent::{Member, Operator, Pki, at, brief, place},
    server::{eventually, present, signal},
};
use valkeeper::{
    agents::{AgentLink, Endpoint},
    command::{Side, swap_nodes},
    valkey::MemberLink,
};
use valkeeper_agent::proto::Promotion;
use valkeeper_core::{
    effect::{Means, Outcome},
    ids::{MemberId, NodeId},
    info::{RawRole, RawSource},
    observation::{Link, NodeFacts},
    slots::{SLOTS, SlotSet},
};

/// Keys that must not get lost.
const KEYS: u64 = 200;

/// A shard of two nodes that owns every slot, the first is primary under grant 1.
struct Shard {
    operator: Operator,
    members: [Member; 2],
    links: [MemberLink; 2],
    agents: [AgentLink; 2],
}

async fn node(link: &MemberLink) -> NodeFacts {
    present(link).await.node.unwrap()
}

async fn role(link: &MemberLink) -> RawRole {
    present(link).await.info.role
}

fn gate(port: u16) -> RawRole {
    RawRole::Replica { source: RawSource { host: "127.0.0.1".to_owned(), port }, link: Link::Down }
}

impl Shard {
    async fn start() -> Shard {
        let pki = Pki::new();
        let operator = Operator::new(&pki, 1);
        let (one, link) = Member::start_node(&pki, 0).await;
        let (two, other) = Member::start_node(&pki, 1).await;
        let agents = [operator.reach(&one).await, operator.reach(&two).await];
        let shard = Shard { operator, members: [one, two], links: [link, other], agents };
        shard.form().await;
        shard
    }

    /// As the steps would: opened, given its slots before it has met anybody, introduced, followed.
    async fn form(&self) {
        let Shard { operator: _, members: [one, two], links: [link, other], agents } = self;
        let look = present(link).await;
        assert_eq!((&look.role, role(other).await), (&gate(2), gate(2)), "both are blank");
        let process = one.process(&look);
        agents[0].promote_by(Promotion::Open, &process, &brief(1, one), &at(&look), 0).await.unwrap();
        let id = look.node.unwrap().id;
        agents[0].add_slots(&process, &id, &SlotSet::all(), Some(7)).await.unwrap();
        let owner = node(link).await;
        assert_eq!((owner.slots, owner.covered, owner.epoch), (SlotSet::all(), SLOTS, 7));
        agents[1].prove().await.unwrap();
        agents[0].meet(&process, &two.endpoint()).await.unwrap();
        let newcomer = node(other).await.id;
        eventually("two nodes that know each other", || async {
            let is_known = node(link).await.knows.contains_key(&newcomer);
            (is_known && node(other).await.covered == SLOTS).then_some(())
        })
        .await;
        self.follow(1, 0, 1).await;
    }

    async fn follow(&self, ordinal: usize, to: usize, grant: u64) {
        let [member, source] = [&self.members[ordinal], &self.members[to]];
        let look = present(&self.links[ordinal]).await;
        let id = node(&self.links[to]).await.id;
        let to = Endpoint { node: Some(id), ..source.endpoint() };
        self.agents[ordinal].attach(&member.process(&look), &brief(grant, source), &to).await.unwrap();
        self.is_followed(ordinal, source).await;
    }

    async fn is_followed(&self, ordinal: usize, source: &Member) {
        let source = RawSource { host: "127.0.0.1".to_owned(), port: source.port };
        let following = RawRole::Replica { source, link: Link::Up };
        eventually("a replica in sync", || async {
            (role(&self.links[ordinal]).await == following).then_some(())
        })
        .await;
    }

    async fn fill(&self) {
        let primary = &self.members[0];
        // A primary that has just got slots looks around for up to two seconds before it takes writes.
        eventually("a node that takes writes", || async { primary.run::<()>("SET key:0 value").await.ok() })
            .await;
        for n in 1..KEYS {
            primary.run::<()>(&format!("SET key:{n} value")).await.unwrap();
        }
        let replica = &self.members[1];
        eventually("all keys on the replica", || async { (replica.dbsize().await == KEYS).then_some(()) })
            .await;
    }

    async fn swap(&self, grant: u64, from: usize, to: usize, node: &NodeId) -> Outcome {
        let [old, new] = [&self.members[from], &self.members[to]];
        let (old_process, new_process) =
            (old.process(&present(&self.links[from]).await), new.process(&present(&self.links[to]).await));
        let from = Side { agent: &self.agents[from], link: &self.links[from], server: &old_process };
        let to = Side { agent: &self.agents[to], link: &self.links[to], server: &new_process };
        swap_nodes(&from, &to, node, &brief(grant, new), 0).await.err().unwrap_or(Outcome::Verified)
    }
}

#[tokio::test]
async fn two_nodes_hand_over_between_themselves_and_back_without_losing_a_key() {
    let shard = Shard::start().await;
    shard.fill().await;
    let [first, second] = [node(&shard.links[0]).await.id, node(&shard.links[1]).await.id];
    assert_eq!(shard.swap(2, 0, 1, &first).await, Outcome::Verified);
    let owner = node(&shard.links[1]).await;
    assert_eq!((owner.primary, owner.slots), (None, SlotSet::all()));
    shard.is_followed(0, &shard.members[1]).await;
    // Both agents know the new grant: what it replaced is refused.
    let late = shard.swap(1, 1, 0, &second).await;
    assert!(matches!(late, Outcome::Superseded(_)), "{late}");
    assert_eq!(shard.swap(3, 1, 0, &second).await, Outcome::Verified);
    shard.is_followed(1, &shard.members[0]).await;
    for member in &shard.members {
        assert_eq!(member.dbsize().await, KEYS);
    }
}

#[tokio::test]
async fn a_handover_between_nodes_that_are_no_pair_changes_nothing() {
    let shard = Shard::start().await;
    let [first, second] = [node(&shard.links[0]).await.id, node(&shard.links[1]).await.id];
    for (from, to, id) in [(0, 1, &second), (1, 0, &second), (1, 0, &first)] {
        let outcome = shard.swap(2, from, to, id).await;
        assert!(matches!(outcome, Outcome::Superseded(_)), "{from} to {to}: {outcome}");
    }
    assert_eq!(node(&shard.links[0]).await.slots, SlotSet::all());
    let grant = shard.operator.facts(&shard.members[1]).unwrap().brief.grant;
    assert_eq!(grant, brief(1, &shard.members[0]).grant, "nobody was told of another grant");
}

#[tokio::test]
async fn a_primary_that_was_killed_is_at_the_gate_and_follows_who_took_over() {
    let shard = Shard::start().await;
    shard.fill().await;
    let Shard { members: [first, second], links: [link, other], agents, .. } = &shard;
    let [old, new] = [node(link).await.id, node(other).await.id];
    signal(first.server_pid().await, "KILL");
    eventually("a server at the gate", || async {
        let look = link.look().await;
        look.present().filter(|look| look.role == gate(2)).map(|_| ())
    })
    .await;
    assert_eq!(
        (node(link).await.id, node(link).await.primary),
        (old.clone(), None),
        "to the others a primary"
    );
    let look = present(other).await;
    let process = second.process(&look);
    agents[1].promote_by(Promotion::Takeover, &process, &brief(2, second), &at(&look), 0).await.unwrap();
    shard.follow(0, 1, 2).await;
    assert_eq!(node(link).await.primary, Some(new));
    assert_eq!((first.dbsize().await, second.dbsize().await), (KEYS, KEYS));
    // Who never was is forgotten, and who is there is not met twice.
    agents[1].forget(&process, &"0".repeat(40).parse().unwrap()).await.unwrap();
    agents[1].meet(&process, &first.endpoint()).await.unwrap();
    assert_eq!(node(other).await.knows.keys().collect::<Vec<_>>(), [&old]);
}

#[tokio::test]
async fn slots_go_to_the_node_that_the_operator_names_and_never_twice() {
    let pki = Pki::new();
    let operator = Operator::new(&pki, 1);
    let (one, link) = Member::start_node(&pki, 0).await;
    let (two, other) = Member::start_node(&pki, 1).await;
    let [giver, taker] = [operator.reach(&one).await, operator.reach(&two).await];
    for (agent, member, link) in [(&giver, &one, &link), (&taker, &two, &other)] {
        let look = present(link).await;
        let process = member.process(&look);
        agent.promote_by(Promotion::Open, &process, &brief(1, member), &at(&look), 0).await.unwrap();
    }
    let process = one.process(&present(&link).await);
    let [mine, theirs] = [node(&link).await.id, node(&other).await.id];
    giver.add_slots(&process, &mine, &SlotSet::all(), Some(7)).await.unwrap();
    giver.meet(&process, &two.endpoint()).await.unwrap();
    eventually("two nodes that know each other", || async {
        let is_known = node(&link).await.knows.contains_key(&theirs);
        (is_known && node(&other).await.covered == SLOTS).then_some(())
    })
    .await;
    eventually("a node that takes writes", || async { one.run::<()>("SET key:0 value").await.ok() }).await;
    for n in 1..KEYS {
        one.run::<()>(&format!("SET key:{n} value")).await.unwrap();
    }

    let some: SlotSet = "0-8000 9000".parse().unwrap();
    let stranger =
        giver.migrate_slots(&process, &some, &"0".repeat(40).parse().unwrap(), Means::Atomic).await;
    assert!(matches!(Outcome::from(stranger.unwrap_err()), Outcome::Superseded(_)));
    let target = two.server_pid().await;
    signal(target, "STOP");
    let begun = giver.migrate_slots(&process, &some, &theirs, Means::Atomic).await;
    let again = giver.migrate_slots(&process, &some, &theirs, Means::Atomic).await;
    begun.unwrap();
    let Outcome::Failed(words) = Outcome::from(again.unwrap_err()) else { panic!("it was refused") };
    assert!(words.contains("already migrating slot 0"), "{words}");
    // Cancelled, and once more with nothing to cancel: then it can begin anew.
    for _ in 0..2 {
        giver.migrate_slots(&process, &some, &mine, Means::Atomic).await.unwrap();
    }
    assert_eq!(node(&link).await.slots, SlotSet::all());
    let begun = giver.migrate_slots(&process, &some, &theirs, Means::Atomic).await;
    signal(target, "CONT");
    begun.unwrap();
    eventually("slots at their new owner", || async {
        (node(&other).await.slots == some && node(&link).await.slots == SlotSet::all().without(&some))
            .then_some(())
    })
    .await;
    let (left, gone) = (one.dbsize().await, two.dbsize().await);
    assert!(left > 0 && gone > 0 && left + gone == KEYS, "{left} and {gone}");
    let late = Outcome::from(giver.migrate_slots(&process, &some, &theirs, Means::Atomic).await.unwrap_err());
    assert!(matches!(late, Outcome::Superseded(_)), "it has them no more: {late}");
}

#[tokio::test]
async fn only_the_member_itself_proves_that_it_is_there() {
    let pki = Pki::new();
    let operator = Operator::new(&pki, 1);
    let member = Member::start(&pki, 0).await;
    operator.reach(&member).await.prove().await.unwrap();
    let there = member.place();
    let mistaken = operator.dial_to(place(MemberId::new(0, 1), there.address.port()));
    assert!(mistaken.prove().await.is_err(), "its certificate is another member's");
}
