//! Slots that go key by key, one after the other: an agent does it, and what it leaves open stays open, as its nodes.conf keeps it. Facts in
//! `docs/CLUSTER.md`.

use super::{gossip::Node, world::World};
use crate::{
    ids::{MemberId, NodeId},
    slots::SlotSet,
};

/// Slots that a tick moves: some thousand keys.
const SLOTS_A_TICK: usize = 40;

/// What an agent is about.
#[derive(Clone, Debug)]
pub(super) struct ByKey {
    /// The server that it began with.
    run_id: String,
    to: NodeId,
    left: SlotSet,
}

impl World {
    /// Tells an agent what to hand over, in place of what it was told before; to its own node, what to close.
    pub(super) fn hand_over_slot_by_slot(
        &mut self,
        from: MemberId,
        slots: &SlotSet,
        to: &NodeId,
    ) -> Result<(), String> {
        let node = self.node(from)?;
        if node.id == *to {
            node.migrating.retain(|slot, _| !slots.contains(*slot));
            node.importing.retain(|slot, _| !slots.contains(*slot));
            self.by_key.remove(&from);
            return Ok(());
        }
        if node.primary.is_some() || !slots.without(&node.slots).is_empty() {
            return Err("its node does not serve the slots".to_owned());
        }
        if let Some(words) = self.by_key_failed.remove(&from) {
            return Err(words);
        }
        let run_id = self.process(from).map(|p| p.run_id.clone()).unwrap_or_default();
        self.by_key.insert(from, ByKey { run_id, to: to.clone(), left: slots.clone() });
        Ok(())
    }

    /// What agents do in a tick.
    pub(super) fn hand_over_by_key(&mut self) {
        if self.slots_hang {
            return;
        }
        for (from, mut job) in std::mem::take(&mut self.by_key) {
            let same = self.process(from).filter(|p| p.run_id == job.run_id);
            let Some(frozen) = same.map(|p| p.frozen) else { continue };
            match if frozen { Ok(true) } else { self.some_slots(from, &mut job) } {
                Ok(true) => drop(self.by_key.insert(from, job)),
                Ok(false) => {}
                Err(words) => drop(self.by_key_failed.insert(from, words)),
            }
        }
    }

    /// Moves some slots and opens the next. True if any is left.
    fn some_slots(&mut self, from: MemberId, job: &mut ByKey) -> Result<bool, String> {
        let gone = || "MIGRATE: IOERR error or timeout writing to target instance".to_owned();
        if let Some(why) = &self.slots_refused {
            return Err(why.clone());
        }
        let to = self.member_of(&job.to).ok_or_else(gone)?;
        let serves = self.process(to).is_some_and(|p| p.is_primary() && !p.frozen);
        if !serves || !self.reach(from, to) || self.node(to)?.primary.is_some() {
            return Err(gone());
        }
        let source = self.node(from)?;
        if source.primary.is_some() {
            return Err("its node is a replica".to_owned());
        }
        let (me, served) = (source.id.clone(), source.slots.clone());
        let now: SlotSet = job.left.common(&served).iter().rev().take(SLOTS_A_TICK).collect();
        self.change_hands(from, to, &now)?;
        job.left = job.left.common(&served).without(&now);
        let Some(next) = job.left.iter().next_back() else { return Ok(false) };
        self.node(to)?.importing.insert(next, me);
        self.node(from)?.migrating.insert(next, job.to.clone());
        Ok(true)
    }

    fn change_hands(&mut self, from: MemberId, to: MemberId, slots: &SlotSet) -> Result<(), String> {
        if slots.is_empty() {
            return Ok(());
        }
        let highest = self.places.values().filter_map(|p| p.node.as_ref()).map(|n| n.epoch).max();
        let source = self.node(from)?;
        source.slots = source.slots.without(slots);
        source.migrating.retain(|slot, _| !slots.contains(*slot));
        let target = self.node(to)?;
        target.slots = target.slots.with(slots);
        target.importing.retain(|slot, _| !slots.contains(*slot));
        target.epoch = highest.unwrap_or(0) + 1;
        self.carry_writes(from, to, slots);
        Ok(())
    }

    /// A person begins to move a slot by hand, and leaves.
    pub fn half_move(&mut self, slot: u16, from: MemberId, to: MemberId) -> Result<(), String> {
        let serves = |node: &Node| node.primary.is_none() && node.slots.contains(slot);
        if !serves(self.node(from)?) || from == to || self.node(to)?.primary.is_some() {
            return Err("the one does not serve it, or the other is no primary".to_owned());
        }
        let (me, other) = (self.node(from)?.id.clone(), self.node(to)?.id.clone());
        self.node(to)?.importing.insert(slot, me);
        self.node(from)?.migrating.insert(slot, other);
        Ok(())
    }

    /// True if any primary has a slot that is half moved.
    pub fn has_open_slots(&self) -> bool {
        let open = |n: &Node| n.primary.is_none() && (!n.migrating.is_empty() || !n.importing.is_empty());
        self.places.values().filter_map(|p| p.node.as_ref()).any(open)
    }
}
