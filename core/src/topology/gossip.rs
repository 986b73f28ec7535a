//! What the nodes of a Valkey Cluster say, taken together: who has to be introduced to whom, which slots have an owner, and which node
//! ids are nobody's any more. Each node only knows its own view, and views differ while gossip is on its way.

use crate::{
    ids::{MemberId, ShardId},
    nodes::{Life, Node, NodeId, Nodes},
    slots::{SLOTS, SlotSet},
};
use std::collections::{BTreeMap, BTreeSet};

/// A member that answers: its address now, and its view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Speaker {
    /// IP address of its pod.
    pub address: String,
    /// What it says.
    pub nodes: Nodes,
}

/// All members that answer.
pub type Speakers = BTreeMap<MemberId, Speaker>;

/// `CLUSTER MEET`: said to one member, about another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    /// Who is told.
    pub at: MemberId,
    /// Who is to be met.
    pub member: MemberId,
    /// Its node id, which must answer there.
    pub node: NodeId,
    /// Its address now.
    pub address: String,
}

/// `CLUSTER FORGET`: said to one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Farewell {
    /// Who is told.
    pub at: MemberId,
    /// The node id that is nobody's.
    pub node: NodeId,
}

/// Who owns which slots, as the owners say themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Slots of each shard.
    pub owned: BTreeMap<ShardId, SlotSet>,
    /// Slots that no member says it serves. Its owner may only be silent.
    pub unowned: SlotSet,
    /// Slots that members of two shards say they serve: one of them has not heard of the other's higher epoch yet.
    pub contested: SlotSet,
    /// Slots in the middle of a classic migration.
    pub open: SlotSet,
}

/// The member that introduces the others: the one that knows most of them where they are now, of equals the first. Once it knows
/// everyone, gossip tells the rest.
pub fn anchor(speakers: &Speakers) -> Option<MemberId> {
    let knows = |at: &Speaker| speakers.values().filter(|other| is_known(at, other)).count();
    let best = speakers.iter().max_by_key(|(id, speaker)| (knows(speaker), std::cmp::Reverse(**id)));
    best.map(|(id, _)| *id)
}

/// Whom the anchor has to meet. A handshake that is under way is left to end by itself.
pub fn introductions(speakers: &Speakers) -> Vec<Introduction> {
    let Some((at, anchor)) = anchor(speakers).and_then(|id| Some((id, speakers.get(&id)?))) else {
        return Vec::new();
    };
    let is_met = |other: &Speaker| {
        let shaking = |node: &Node| {
            node.life == Life::Handshake && node.address.as_deref() == Some(other.address.as_str())
        };
        is_known(anchor, other) || anchor.nodes.others.iter().any(shaking)
    };
    let strangers = speakers.iter().filter(|(id, other)| **id != at && !is_met(other));
    strangers
        .map(|(id, other)| Introduction {
            at,
            member: *id,
            node: other.nodes.myself.id.clone(),
            address: other.address.clone(),
        })
        .collect()
}

/// True if everyone who answers knows everyone else where they are now.
pub fn is_acquainted(speakers: &Speakers) -> bool {
    speakers.values().all(|at| speakers.values().all(|other| is_known(at, other)))
}

/// `at` knows `other` by its id, at its address.
fn is_known(at: &Speaker, other: &Speaker) -> bool {
    let id = &other.nodes.myself.id;
    // Of itself a node may show an address of before; others go by theirs.
    at.nodes.myself.id == *id
        || at.nodes.others.iter().any(|node| {
            node.id == *id
                && node.address.as_deref() == Some(other.address.as_str())
                && node.life != Life::Handshake
        })
}

/// Node ids that are nobody's any more, to be forgotten by everyone who knows them. Only if every member of `wanted` answers: else it may be
/// the id of one who is silent. Never one that serves slots by anybody's word, or that somebody still reaches.
pub fn farewells(speakers: &Speakers, wanted: &BTreeSet<MemberId>) -> Vec<Farewell> {
    if !wanted.iter().all(|id| speakers.contains_key(id)) {
        return Vec::new();
    }
    let mine: BTreeSet<&NodeId> = speakers.values().map(|speaker| &speaker.nodes.myself.id).collect();
    let seen = || speakers.values().flat_map(|speaker| &speaker.nodes.others);
    let alive: BTreeSet<&NodeId> = seen()
        .filter(|node| matches!(node.life, Life::Alive | Life::Handshake) || !node.slots.is_empty())
        .map(|node| &node.id)
        .collect();
    let is_gone = |node: &&Node| !mine.contains(&node.id) && !alive.contains(&node.id);
    let told = speakers.iter().flat_map(|(at, speaker)| {
        speaker.nodes.others.iter().filter(is_gone).map(|node| Farewell { at: *at, node: node.id.clone() })
    });
    told.collect()
}

/// Who owns what. Where two claim a slot, the higher epoch has it, as gossip will settle it.
pub fn coverage(speakers: &Speakers) -> Coverage {
    let mut owners: BTreeMap<u16, (u64, ShardId)> = BTreeMap::new();
    let mut contested = BTreeSet::new();
    let mut open = BTreeSet::new();
    for (id, Speaker { address: _, nodes }) in speakers {
        open.extend(nodes.myself.open.iter().map(|slot| slot.number()));
        for slot in nodes.myself.slots.iter().filter(|_| nodes.myself.primary.is_none()) {
            let claim = (nodes.myself.epoch, id.shard);
            let known = owners.entry(slot).or_insert(claim);
            if known.1 != claim.1 {
                contested.insert(slot);
            }
            *known = claim.max(*known);
        }
    }
    let mut owned: BTreeMap<ShardId, Vec<u16>> = BTreeMap::new();
    for (slot, (_, shard)) in &owners {
        owned.entry(*shard).or_default().push(*slot);
    }
    Coverage {
        owned: owned.into_iter().map(|(shard, slots)| (shard, slots.into_iter().collect())).collect(),
        unowned: (0..SLOTS).filter(|slot| !owners.contains_key(slot)).collect(),
        contested: contested.into_iter().collect(),
        open: open.into_iter().collect(),
    }
}

/// The slots of a new cluster: one run for each shard, as even as can be.
pub fn spread(shards: &BTreeSet<ShardId>) -> BTreeMap<ShardId, SlotSet> {
    let count = shards.len().max(1);
    let begin = |at: usize| u16::try_from(usize::from(SLOTS) * at / count).unwrap_or(SLOTS);
    shards.iter().enumerate().map(|(at, shard)| (*shard, (begin(at)..begin(at + 1)).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::Open;

    fn node_id(id: MemberId) -> NodeId {
        format!("{:020x}{:020x}", id.shard.0 + 1, id.ordinal + 1).parse().unwrap()
    }

    fn node(id: MemberId, address: &str) -> Node {
        Node {
            id: node_id(id),
            address: Some(address.to_owned()),
            primary: None,
            life: Life::Alive,
            epoch: u64::from(id.shard.0) + 1,
            linked: true,
            slots: SlotSet::default(),
            open: Vec::new(),
        }
    }

    fn address(id: MemberId) -> String {
        format!("10.0.{}.{}", id.shard.0, id.ordinal)
    }

    fn members(shards: u16) -> Vec<MemberId> {
        (0..shards).map(|shard| MemberId::new(shard, 0)).collect()
    }

    /// Members who each know these others.
    fn speakers(shards: u16, knows: impl Fn(MemberId, MemberId) -> bool) -> Speakers {
        let all = members(shards);
        let speaker = |me: MemberId| {
            let others = all.iter().filter(|other| **other != me && knows(me, **other));
            let others = others.map(|other| node(*other, &address(*other))).collect();
            let nodes = Nodes { myself: node(me, &address(me)), others };
            (me, Speaker { address: address(me), nodes })
        };
        all.iter().map(|me| speaker(*me)).collect()
    }

    fn met(speakers: &Speakers) -> Vec<(MemberId, MemberId)> {
        introductions(speakers).into_iter().map(|i| (i.at, i.member)).collect()
    }

    #[test]
    fn strangers_are_all_introduced_to_one_of_them() {
        let [a, b, c] = [0, 1, 2].map(|shard| MemberId::new(shard, 0));
        let strangers = speakers(3, |_, _| false);
        assert_eq!(met(&strangers), [(a, b), (a, c)]);
        assert!(!is_acquainted(&strangers));
        // Who knows most introduces the rest.
        let some = speakers(3, |me, other| me == b && other == c || me == c && other == b);
        assert_eq!(met(&some), [(b, a)]);
        let all = speakers(3, |_, _| true);
        assert_eq!(met(&all), []);
        assert!(is_acquainted(&all) && met(&speakers(1, |_, _| true)).is_empty());
        assert_eq!(met(&Speakers::new()), []);
    }

    #[test]
    fn who_came_back_with_another_address_is_met_again_and_a_handshake_is_waited_for() {
        let [a, b] = [0, 1].map(|shard| MemberId::new(shard, 0));
        let mut moved = speakers(2, |_, _| true);
        moved.get_mut(&b).unwrap().address = "10.9.9.9".to_owned();
        // The one that moved knows where the other is, and will tell it where it is itself.
        assert_eq!((anchor(&moved), introductions(&moved), is_acquainted(&moved)), (Some(b), vec![], false));
        // Both moved: nobody can tell anybody.
        moved.get_mut(&a).unwrap().address = "10.8.8.8".to_owned();
        let told = introductions(&moved);
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].at, told[0].member, told[0].address.as_str()), (a, b, "10.9.9.9"));
        assert_eq!(told[0].node, node_id(b));
        let mut shaking = speakers(2, |_, _| false);
        let hand = Node { life: Life::Handshake, ..node(MemberId::new(7, 7), &address(b)) };
        shaking.get_mut(&a).unwrap().nodes.others.push(hand);
        assert_eq!(met(&shaking), []);
    }

    #[test]
    fn an_id_is_forgotten_only_when_it_can_be_nobodys() {
        let wanted: BTreeSet<MemberId> = members(2).into_iter().collect();
        let [a, b] = [0, 1].map(|shard| MemberId::new(shard, 0));
        let old = |life, slots: &str| {
            let mut all = speakers(2, |_, _| true);
            let lost = Node { life, slots: slots.parse().unwrap(), ..node(MemberId::new(9, 9), "10.0.0.9") };
            all.values_mut().for_each(|speaker| speaker.nodes.others.push(lost.clone()));
            all
        };
        let gone = old(Life::Failed, "");
        let told: Vec<MemberId> = farewells(&gone, &wanted).into_iter().map(|f| f.at).collect();
        assert_eq!(told, [a, b]);
        assert_eq!(farewells(&old(Life::Alive, ""), &wanted), []);
        assert_eq!(farewells(&old(Life::Failed, "5"), &wanted), []);
        // Somebody reaches it still.
        let mut reached = gone.clone();
        reached.get_mut(&b).unwrap().nodes.others.iter_mut().for_each(|node| node.life = Life::Alive);
        assert_eq!(farewells(&reached, &wanted), []);
        // It may be the one who does not answer.
        let mut silent = gone;
        silent.remove(&b);
        assert_eq!(farewells(&silent, &wanted), []);
    }

    #[test]
    fn owners_speak_for_their_slots_and_the_higher_epoch_has_what_two_claim() {
        let mut all = speakers(3, |_, _| true);
        let texts = ["0-5460", "5461-10922", "10000-16382"];
        for (speaker, text) in all.values_mut().zip(texts) {
            speaker.nodes.myself.slots = text.parse().unwrap();
        }
        all.get_mut(&MemberId::new(0, 0)).unwrap().nodes.myself.open =
            vec![Open::Migrating(17, node_id(MemberId::new(1, 0)))];
        let Coverage { owned, unowned, contested, open } = coverage(&all);
        let owned: Vec<String> = owned.values().map(SlotSet::to_string).collect();
        assert_eq!(owned, ["0-5460", "5461-9999", "10000-16382"]);
        assert_eq!(
            (unowned.to_string(), contested.to_string(), open.to_string()),
            ("16383".to_owned(), "10000-10922".to_owned(), "17".to_owned())
        );
        // A replica shows its primary's slots nowhere, and claims none.
        all.get_mut(&MemberId::new(2, 0)).unwrap().nodes.myself.primary = Some(node_id(MemberId::new(1, 0)));
        assert_eq!(coverage(&all).contested, SlotSet::default());
    }

    #[test]
    fn a_new_cluster_is_spread_evenly_over_its_shards() {
        for count in [1_u16, 2, 3, 7, 1_000] {
            let shards: BTreeSet<ShardId> = (0..count).map(ShardId).collect();
            let spread = spread(&shards);
            let sizes: Vec<usize> = spread.values().map(SlotSet::len).collect();
            assert_eq!(sizes.iter().sum::<usize>(), usize::from(SLOTS));
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            assert!(spread.values().all(|slots| slots.runs().count() == 1));
        }
        assert_eq!(spread(&BTreeSet::new()), BTreeMap::new());
    }
}
