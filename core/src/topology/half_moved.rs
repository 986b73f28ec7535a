//! Slots that are on their way key by key, and what is left of such a way when nobody goes on: after a crash of either end, by a person,
//! or because the wish has changed. An open slot is finished, as a part of its keys is at the other end already; where there is no other
//! end it is closed.

use super::reshard::Move;
use crate::{
    ids::{NodeId, ShardId},
    observation::NodeFacts,
    slots::SlotSet,
    state::ClusterState,
};
use std::collections::BTreeMap;

/// What is open at either end, from the shard that owns it to the one that gets it; from a shard to itself where it is only to be closed.
pub fn half_moved(state: &ClusterState) -> Vec<Move> {
    let mut ways: BTreeMap<u16, (ShardId, ShardId)> = BTreeMap::new();
    for (at, node) in primaries(state) {
        for (slot, from) in &node.importing {
            let owner = if node.slots.contains(*slot) { Some(at) } else { owner(state, *slot) };
            if let Some(owner) = owner.or_else(|| shard_of(state, from)) {
                ways.insert(*slot, (owner, at));
            }
        }
    }
    for (at, node) in primaries(state) {
        for (slot, to) in &node.migrating {
            let owns = node.slots.contains(*slot);
            // Where the node that was told is nobody's any more, whoever imports it.
            let imports = ways.get(slot).filter(|(owner, getter)| *owner == at && *getter != at);
            let getter = shard_of(state, to).or(imports.map(|(_, getter)| *getter));
            ways.insert(*slot, (at, getter.filter(|_| owns).unwrap_or(at)));
        }
    }
    gathered(ways)
}

/// What a shard was told to hand over key by key, has still, and nobody wants from it any more: its agent may be about to go on.
pub fn given_up(state: &ClusterState, wanted: &[Move]) -> Vec<Move> {
    let mut moves = Vec::new();
    for (from, node) in primaries(state) {
        let slots = state.shards.get(&from).map(|shard| shard.by_key.common(&node.slots)).unwrap_or_default();
        if !slots.is_empty() && !wanted.iter().any(|m| m.from == from) {
            moves.push(Move { from, to: from, slots });
        }
    }
    moves
}

fn primaries(state: &ClusterState) -> impl Iterator<Item = (ShardId, &NodeFacts)> {
    state.shards.keys().filter_map(|id| Some((*id, state.holder_node(*id)?)))
}

fn owner(state: &ClusterState, slot: u16) -> Option<ShardId> {
    state.shards.iter().find(|(_, shard)| shard.slots.contains(slot)).map(|(id, _)| *id)
}

/// The shard with this node, whichever of its members that is.
pub fn shard_of(state: &ClusterState, node: &NodeId) -> Option<ShardId> {
    let is_its = |n: &NodeFacts| n.id == *node;
    state.members.iter().find(|(_, m)| m.node().is_some_and(is_its)).map(|(id, _)| id.shard)
}

fn gathered(ways: BTreeMap<u16, (ShardId, ShardId)>) -> Vec<Move> {
    let mut moves: BTreeMap<(ShardId, ShardId), Vec<u16>> = BTreeMap::new();
    for (slot, way) in ways {
        moves.entry(way).or_default().push(slot);
    }
    let collected = moves.into_iter();
    collected
        .map(|((from, to), slots)| Move { from, to, slots: slots.into_iter().collect::<SlotSet>() })
        .collect()
}
