//! Who reaches whom, and who obeys: parts of a divided network, members that are confined to others, cut links.

use super::world::World;
use crate::ids::MemberId;
use std::collections::{BTreeMap, BTreeSet};

impl World {
    /// The part of the network that a member is in.
    pub(super) fn side(&self, id: MemberId) -> u32 {
        self.sides.get(&id).copied().unwrap_or(0)
    }

    /// The node of a member stops talking: kubelet, pods and all.
    pub fn set_node_silent(&mut self, id: MemberId, silent: bool) {
        if silent {
            self.not_ready.insert(id);
            self.divide(&[id]);
        } else {
            self.not_ready.remove(&id);
            self.sides.remove(&id);
        };
    }

    /// These members talk to each other and to nobody else; the operator is on the other side.
    pub fn divide(&mut self, ids: &[MemberId]) {
        let side = u32::try_from(self.count()).unwrap_or(u32::MAX).max(1);
        self.sides.extend(ids.iter().map(|id| (*id, side)));
    }

    /// A member reaches these members and nobody else.
    pub fn confine(&mut self, id: MemberId, to: BTreeSet<MemberId>) {
        self.only.insert(id, to);
    }

    /// A member's server refuses what its agent tells it, or does it again.
    pub fn set_disobedient(&mut self, id: MemberId, refuses: bool) {
        set(&mut self.disobedient, id, refuses);
    }

    /// A member's agent has no space for what it must remember, or has it again.
    pub fn set_full(&mut self, id: MemberId, full: bool) {
        set(&mut self.full, id, full);
    }

    /// The operator does not reach a member, and everybody else does; or it does again.
    pub fn set_unseen(&mut self, id: MemberId, unseen: bool) {
        set(&mut self.unseen, id, unseen);
    }

    /// True if the operator does not reach a member.
    pub(super) fn is_apart(&self, id: MemberId) -> bool {
        self.side(id) != 0 || self.unseen.contains(&id) || self.only.contains_key(&id)
    }

    /// The network is whole again.
    pub fn unite(&mut self) {
        self.sides.clear();
        self.only.clear();
    }

    /// A replica's link to its source is cut, or healed.
    pub fn set_cut(&mut self, id: MemberId, cut: bool) {
        set(&mut self.cut, id, cut);
    }
}

fn set(members: &mut BTreeSet<MemberId>, id: MemberId, is_in: bool) {
    if is_in {
        members.insert(id)
    } else {
        members.remove(&id)
    };
}

/// True if two members can talk: they are in the same part of the network, and neither is confined to others.
pub(super) fn reach(
    sides: &BTreeMap<MemberId, u32>,
    only: &BTreeMap<MemberId, BTreeSet<MemberId>>,
    a: MemberId,
    b: MemberId,
) -> bool {
    let allows = |a: &MemberId, b: &MemberId| only.get(a).is_none_or(|others| others.contains(b));
    sides.get(&a).unwrap_or(&0) == sides.get(&b).unwrap_or(&0) && allows(&a, &b) && allows(&b, &a)
}
