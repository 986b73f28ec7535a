//! What is folded of the nodes of a Valkey Cluster: who was met, and whose slots are whose.

use super::{ClusterState, MemberState};
use crate::{decision::Scope, ids::ShardId, observation::NodeFacts, slots::SlotSet};

impl ClusterState {
    /// Whoever is known was met: the next introduction, to another address, is a first one again.
    pub(super) fn note_met(&mut self, node: &NodeFacts) {
        let known = |m: &MemberState| m.node().is_some_and(|other| node.knows.contains_key(&other.id));
        for (id, _) in self.members.iter().filter(|(_, m)| known(m)) {
            self.failures.remove(&format!("{}/meet/{id}", Scope::Cluster));
        }
    }

    /// What the member serves whose grant is in force is the shard's, and no other's any more.
    pub(super) fn note_slots(&mut self, id: ShardId) {
        let holder = self.shards.get(&id).and_then(|shard| shard.in_force);
        let holder = holder.and_then(|h| self.members.get(&h)).filter(|m| m.is_primary());
        let Some(slots) = holder.and_then(|m| m.node()).map(|node| node.slots.clone()) else { return };
        self.give_slots(id, &slots);
    }

    pub(super) fn give_slots(&mut self, to: ShardId, slots: &SlotSet) {
        if self.shards.get(&to).is_some_and(|shard| shard.slots == *slots) {
            return;
        }
        for (id, shard) in &mut self.shards {
            shard.slots = if *id == to { shard.slots.with(slots) } else { shard.slots.without(slots) };
        }
    }
}
