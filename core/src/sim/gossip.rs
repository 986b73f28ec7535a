//! The nodes of a Valkey Cluster, as far as decisions can tell: who has met whom, whose slots are whose, elections. Gossip is a tick: what
//! nodes in contact can know of each other, they know. Facts in `docs/CLUSTER.md`.

use super::{process::Process, world::World};
use crate::{
    effect::Promotion,
    ids::{MemberId, NodeId, Timestamp},
    observation::{NodeFacts, Source},
    slots::SlotSet,
    spec::Topology,
};
use std::collections::{BTreeMap, BTreeSet};

/// Without an answer for this long a node is held for dead. Milliseconds.
const NODE_TIMEOUT_MS: i64 = 2_000;
/// From then until a replica is elected. Milliseconds.
const ELECTION_MS: i64 = 1_000;

/// One node, as its nodes.conf keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) primary: Option<NodeId>,
    pub(super) epoch: u64,
    pub(super) slots: SlotSet,
    pub(super) knows: BTreeMap<NodeId, String>,
    /// Slots that leave key by key, and for which node.
    pub(super) migrating: BTreeMap<u16, NodeId>,
    /// Slots that come so, and from which node.
    pub(super) importing: BTreeMap<u16, NodeId>,
}

/// What gossip has nothing to add to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    up: BTreeMap<MemberId, String>,
    nodes: Vec<(MemberId, Node)>,
    sides: BTreeMap<MemberId, u32>,
}

impl Node {
    /// A node that has met nobody.
    pub(super) fn new(number: u64) -> Option<Node> {
        let id = format!("{number:040x}").parse().ok()?;
        let (primary, slots, knows) = (None, SlotSet::default(), BTreeMap::new());
        let (migrating, importing) = (BTreeMap::new(), BTreeMap::new());
        Some(Node { id, primary, epoch: 0, slots, knows, migrating, importing })
    }

    fn is_voter(&self) -> bool {
        self.primary.is_none() && !self.slots.is_empty()
    }
}

impl World {
    pub(super) fn is_cluster(&self) -> bool {
        match self.spec.topology {
            Topology::Replication => false,
            Topology::Cluster => true,
        }
    }

    pub(super) fn node(&mut self, id: MemberId) -> Result<&mut Node, String> {
        self.places.get_mut(&id).and_then(|p| p.node.as_mut()).ok_or_else(|| "it has no node".to_owned())
    }

    pub(super) fn member_of(&self, node: &NodeId) -> Option<MemberId> {
        let is_its = |id: &NodeId| id == node;
        self.places.iter().find(|(_, p)| p.node.as_ref().is_some_and(|n| is_its(&n.id))).map(|(id, _)| *id)
    }

    /// Members whose server runs, gated or not, and their addresses.
    fn running(&self) -> BTreeMap<MemberId, String> {
        let up = |(id, place): (&MemberId, &super::world::Place)| {
            let pod = place.pod.as_ref()?;
            pod.process.as_ref().filter(|p| !p.frozen && !p.loads(self.now))?;
            Some((*id, pod.address.clone()))
        };
        self.places.iter().filter_map(up).collect()
    }

    /// Those of them that the bus reaches.
    fn on_the_bus(&self) -> BTreeMap<MemberId, String> {
        let mut up = self.running();
        up.retain(|id, _| !self.off_bus.contains(id));
        up
    }

    /// The bus reaches a member no more, or again: all else does.
    pub fn set_off_bus(&mut self, id: MemberId, off: bool) {
        if off {
            self.off_bus.insert(id)
        } else {
            self.off_bus.remove(&id)
        };
        self.gossip();
    }

    /// True if it has been off the bus for so long that it refuses its clients: it reaches no majority of the primaries.
    pub(super) fn is_shut_out(&self, id: MemberId) -> bool {
        let node = self.places.get(&id).and_then(|p| p.node.as_ref());
        self.off_bus.contains(&id) && node.is_some_and(|node| self.is_held_for_dead(&node.id))
    }

    fn is_held_for_dead(&self, node: &NodeId) -> bool {
        self.down_since.get(node).is_some_and(|since| self.now.millis_since(*since) >= NODE_TIMEOUT_MS)
    }

    /// Pairs of members in contact: at least one knows the other where it is.
    fn contacts(&self) -> Vec<(MemberId, MemberId)> {
        let up = self.on_the_bus();
        let knows = |a: MemberId, b: MemberId| {
            let node = |id: MemberId| self.places.get(&id).and_then(|p| p.node.as_ref());
            let known = node(a).zip(node(b)).and_then(|(a, b)| a.knows.get(&b.id));
            known.is_some() && known == up.get(&b)
        };
        let pairs = up.keys().flat_map(|a| up.keys().filter(move |b| *b != a).map(move |b| (*a, *b)));
        pairs.filter(|(a, b)| self.reach(*a, *b) && (knows(*a, *b) || knows(*b, *a))).collect()
    }

    /// One round of gossip.
    pub(super) fn gossip(&mut self) {
        if !self.is_cluster() {
            return;
        }
        let up = self.on_the_bus();
        for (id, place) in &self.places {
            let Some(node) = &place.node else { continue };
            if up.contains_key(id) {
                self.down_since.remove(&node.id);
            } else {
                self.down_since.entry(node.id.clone()).or_insert(self.now);
            }
        }
        let now = Settled { up, nodes: self.nodes(), sides: self.sides.clone() };
        if self.settled.as_ref() != Some(&now) {
            let contacts = self.contacts();
            self.spread_addresses(&contacts, &now.up);
            self.settle_slots(&contacts);
            self.follow_primaries();
            // Another round would change nothing: stories have tens of thousands of them.
            self.settled = Some(now).filter(|before| before.nodes == self.nodes());
        }
        // With the operator there nobody stands for election: see the agent's `election`.
        if !self.down_since.is_empty() && self.authority.is_empty() {
            let contacts = self.contacts();
            self.elect(&contacts);
        }
        self.obey_roles();
    }

    fn nodes(&self) -> Vec<(MemberId, Node)> {
        self.places.iter().filter_map(|(id, place)| Some((*id, place.node.clone()?))).collect()
    }

    fn spread_addresses(&mut self, contacts: &[(MemberId, MemberId)], up: &BTreeMap<MemberId, String>) {
        for (a, b) in contacts {
            // The other, and whom the other is in contact with.
            let told: BTreeSet<MemberId> =
                contacts.iter().filter(|(from, _)| from == b).map(|(_, to)| *to).chain([*b]).collect();
            for other in told.into_iter().filter(|other| other != a) {
                let heard = self.node(other).ok().map(|n| n.id.clone()).zip(up.get(&other).cloned());
                if let (Ok(node), Some((id, address))) = (self.node(*a), heard) {
                    node.knows.insert(id, address);
                }
            }
        }
    }

    /// Where two claim a slot, the higher epoch has it; who has lost all follows the winner.
    fn settle_slots(&mut self, contacts: &[(MemberId, MemberId)]) {
        for (a, b) in contacts {
            let (Ok(mine), Ok(theirs)) = (self.node(*a).cloned(), self.node(*b).cloned()) else { continue };
            if mine.primary.is_some()
                || theirs.primary.is_some()
                || (mine.epoch, &mine.id) <= (theirs.epoch, &theirs.id)
            {
                continue;
            }
            if theirs.slots.common(&mine.slots).is_empty() {
                continue;
            }
            if let Ok(loser) = self.node(*b) {
                loser.slots = theirs.slots.without(&mine.slots);
                if loser.slots.is_empty() {
                    (loser.primary, loser.epoch) = (Some(mine.id.clone()), mine.epoch);
                }
            }
        }
    }

    /// A replica whose primary became a replica follows that one's primary.
    fn follow_primaries(&mut self) {
        let of: BTreeMap<NodeId, Option<NodeId>> = self
            .places
            .values()
            .filter_map(|p| p.node.as_ref())
            .map(|n| (n.id.clone(), n.primary.clone()))
            .collect();
        let up = self.on_the_bus();
        for id in up.keys() {
            let Ok(node) = self.node(*id) else { continue };
            let next = node.primary.as_ref().and_then(|p| of.get(p).cloned().flatten());
            if let Some(next) = next.filter(|next| *next != node.id) {
                node.primary = Some(next);
            }
        }
    }

    /// A replica that kept running, whose primary is held for dead by a majority, takes its place.
    fn elect(&mut self, contacts: &[(MemberId, MemberId)]) {
        let now = self.now;
        let due = |since: &Timestamp| now.millis_since(*since) >= NODE_TIMEOUT_MS + ELECTION_MS;
        let ids: Vec<MemberId> = self.on_the_bus().into_keys().collect();
        for id in ids {
            let Some(primary) = self.node(id).ok().and_then(|n| n.primary.clone()) else { continue };
            // Whose link to its primary is up does not stand for election: its agent keeps it from that.
            let running = self.running();
            let is_linked = |of: &MemberId| self.off_bus.contains(of) && running.contains_key(of);
            let linked = self.member_of(&primary).as_ref().is_some_and(is_linked);
            let dead = !linked && self.down_since.get(&primary).is_some_and(due);
            // Nobody votes for one that never had its primary's data (`cluster-replica-validity-factor`).
            let has_data = |p: &Process| p.is_complete() && p.drawn.as_ref() != Some(&p.replid);
            let fit = self
                .process(id)
                .is_some_and(|p| has_data(p) && !matches!(p.source, Some(Source::Gate { .. })));
            let heir = contacts.iter().all(|(_, other)| {
                let rival = self.places.get(other).and_then(|p| p.node.as_ref());
                rival.is_none_or(|n| n.primary.as_ref() != Some(&primary) || id <= *other)
            });
            if dead && fit && heir && self.votes_for(id, contacts) {
                self.take_over(id);
            }
        }
    }

    fn votes_for(&mut self, id: MemberId, contacts: &[(MemberId, MemberId)]) -> bool {
        let voters = self.places.values().filter_map(|p| p.node.as_ref()).filter(|n| n.is_voter()).count();
        let votes = |other: &MemberId| {
            let place = self.places.get(other)?;
            let process = place.pod.as_ref()?.process.as_ref()?;
            // One that has just started refuses its vote.
            let counts = place.node.as_ref()?.is_voter() && process.is_primary();
            counts.then_some(())
        };
        let given = contacts.iter().filter(|(from, to)| *from == id && votes(to).is_some()).count();
        given > voters / 2
    }

    /// The member's node has its primary's slots, under an epoch above all others.
    fn take_over(&mut self, id: MemberId) {
        let highest = self.places.values().filter_map(|p| p.node.as_ref()).map(|n| n.epoch).max();
        let primary = self.node(id).ok().and_then(|n| n.primary.clone());
        let slots = primary.as_ref().and_then(|p| {
            let of_member =
                self.member_of(p).and_then(|m| self.places.get(&m)?.node.as_ref().map(|n| n.slots.clone()));
            of_member.or_else(|| self.ghosts.get(p).cloned())
        });
        if let Ok(node) = self.node(id) {
            (node.primary, node.epoch) = (None, highest.unwrap_or(0) + 1);
            node.slots = slots.unwrap_or_default();
        }
        if let Some(process) = self.process(id) {
            process.promote();
        }
    }

    /// An open server is what its node is.
    fn obey_roles(&mut self) {
        let ids: Vec<MemberId> = self.running().into_keys().collect();
        for id in ids {
            let of = self.node(id).ok().and_then(|n| n.primary.clone());
            let source = of.as_ref().map(|p| self.member_of(p));
            let Some(process) = self.process(id).filter(|p| !matches!(p.source, Some(Source::Gate { .. })))
            else {
                continue;
            };
            match source {
                None => process.promote(),
                Some(Some(primary)) => process.follow(primary),
                // The node of a volume that is gone.
                Some(None) => process.lose_link(),
            }
        }
    }

    /// Makes a member's server primary, as its agent does it.
    pub(super) fn promote_node(&mut self, id: MemberId, by: Promotion) -> Result<(), String> {
        let is_primary = self.node(id)?.primary.is_none();
        let contacts = self.contacts();
        match by {
            Promotion::Detach => return Err("REPLICAOF not allowed in cluster mode".to_owned()),
            Promotion::Open if is_primary => {
                self.process(id).ok_or("it runs no server")?.open();
                return Ok(());
            }
            Promotion::Open => return Err("its node is a replica".to_owned()),
            Promotion::Force | Promotion::Takeover if is_primary => {
                return Err("You should send CLUSTER FAILOVER to a replica".to_owned());
            }
            Promotion::Force if !self.votes_for(id, &contacts) => return Err("no majority".to_owned()),
            Promotion::Force | Promotion::Takeover => self.take_over(id),
        }
        self.gossip();
        Ok(())
    }

    /// `CLUSTER FAILOVER`: the primary takes part and votes. It is told over the bus (`MFSTART`), and without it nothing begins.
    pub(super) fn hand_over_node(&mut self, from: MemberId, to: MemberId) -> Result<(), String> {
        if !self.reach(to, from) || [from, to].iter().any(|id| self.off_bus.contains(id)) {
            return Err("its primary is not heard on the bus".to_owned());
        }
        let contacts = self.contacts();
        if !self.votes_for(to, &contacts) {
            return Err("no majority".to_owned());
        }
        self.take_over(to);
        self.gossip();
        Ok(())
    }

    /// `CLUSTER REPLICATE`; who still has slots is made a replica by gossip or not at all.
    pub(super) fn replicate_node(&mut self, id: MemberId, of: &NodeId) -> Result<(), String> {
        self.gossip();
        let node = self.node(id)?;
        if node.primary.as_ref() == Some(of) {
            return Ok(());
        }
        if !node.knows.contains_key(of) {
            return Err(format!("Unknown node {of}"));
        }
        if !node.slots.is_empty() {
            return Err("To set a master the node must be empty and without assigned slots".to_owned());
        }
        node.primary = Some(of.clone());
        Ok(())
    }

    /// `CLUSTER MEET`.
    pub(super) fn meet(&mut self, id: MemberId, address: &str) -> Result<(), String> {
        let met = self.on_the_bus().into_iter().find(|(other, a)| a == address && self.reach(id, *other));
        if let Some(known) = met.and_then(|(other, _)| self.node(other).ok().map(|n| n.id.clone())) {
            self.node(id)?.knows.insert(known, address.to_owned());
        }
        self.gossip();
        Ok(())
    }

    /// `CLUSTER ADDSLOTSRANGE`.
    pub(super) fn add_slots(
        &mut self,
        id: MemberId,
        node: &NodeId,
        slots: &SlotSet,
        epoch: Option<u64>,
    ) -> Result<(), String> {
        let known: BTreeSet<NodeId> = self.node(id)?.knows.keys().cloned().collect();
        let others = self.places.values().filter_map(|p| p.node.as_ref()).filter(|n| known.contains(&n.id));
        let owned = others
            .map(|n| n.slots.clone())
            .chain(self.ghosts.iter().filter(|(g, _)| known.contains(g)).map(|(_, s)| s.clone()));
        let busy = owned.fold(SlotSet::default(), |all, s| all.with(&s)).common(slots);
        let mine = self.node(id)?;
        if mine.id != *node {
            return Err("it is another node".to_owned());
        }
        if !busy.without(&mine.slots).is_empty() {
            return Err(format!("Slot {busy} is already busy"));
        }
        mine.slots = mine.slots.with(slots);
        mine.epoch = epoch.filter(|_| mine.knows.is_empty()).unwrap_or(mine.epoch);
        Ok(())
    }

    /// `CLUSTER FORGET`: gossip carries it to the others.
    pub(super) fn forget(&mut self, node: &NodeId) {
        for place in self.places.values_mut() {
            if let Some(known) = place.node.as_mut() {
                known.knows.remove(node);
            }
        }
        self.ghosts.remove(node);
    }

    /// The volume with `nodes.conf` is gone: whoever knew the node goes on believing in it.
    pub(super) fn lose_node(&mut self, id: MemberId) {
        if let Some(node) = self.places.get_mut(&id).and_then(|p| p.node.take()) {
            self.down_since.entry(node.id.clone()).or_insert(self.now);
            self.ghosts.insert(node.id, node.slots);
        }
    }

    /// What a member's node says.
    pub(super) fn node_facts(&self, id: MemberId) -> Option<NodeFacts> {
        let node = self.places.get(&id)?.node.as_ref().filter(|_| self.is_cluster())?;
        let down = self.is_shut_out(id);
        let dead = |known: &&NodeId| down || self.is_held_for_dead(known);
        let failed: BTreeSet<NodeId> = node.knows.keys().filter(dead).cloned().collect();
        let others = self.places.values().filter_map(|p| p.node.as_ref());
        let served = others.filter(|n| {
            n.primary.is_none()
                && (n.id == node.id || node.knows.contains_key(&n.id))
                && !failed.contains(&n.id)
        });
        let covered = served.fold(SlotSet::default(), |all, n| all.with(&n.slots));
        Some(NodeFacts {
            id: node.id.clone(),
            primary: node.primary.clone(),
            epoch: node.epoch,
            slots: if node.primary.is_none() { node.slots.clone() } else { SlotSet::default() },
            knows: node.knows.iter().map(|(known, at)| (known.clone(), Some(at.clone()))).collect(),
            meeting: BTreeSet::new(),
            failed,
            covered: u16::try_from(covered.len()).unwrap_or(u16::MAX),
            exports: self.exports(id),
            exports_unread: false,
            import_failed: self.import_failed(id),
            migrating: node.migrating.clone(),
            importing: node.importing.clone(),
            down,
        })
    }

    /// True if every node knows every other where it is now.
    pub(super) fn is_acquainted(&self) -> bool {
        let up = self.on_the_bus();
        let node = |id: MemberId| self.places.get(&id).and_then(|p| p.node.as_ref());
        let knows = |a: MemberId, b: MemberId| {
            node(a).zip(node(b)).and_then(|(a, b)| a.knows.get(&b.id)) == up.get(&b)
        };
        up.keys().all(|a| up.keys().all(|b| a == b || knows(*a, *b)))
    }

    /// True if clients of the member's slots are sent to it.
    pub(super) fn owns_slots(&self, id: MemberId) -> bool {
        !self.is_cluster() || self.places.get(&id).and_then(|p| p.node.as_ref()).is_some_and(Node::is_voter)
    }
}

impl Process {
    /// The gate is opened before a node that is a primary already.
    pub(super) fn open(&mut self) {
        (self.source, self.link, self.synced_at) = (None, crate::observation::Link::Up, None);
    }
}
