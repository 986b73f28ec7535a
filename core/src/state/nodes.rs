//! What is folded of the nodes of a Valkey Cluster: who was met, and whose slots are whose.

use super::{ClusterState, MemberState};
use crate::{
    decision::{OperationKind, Scope},
    ids::{MemberId, ShardId},
    observation::NodeFacts,
    slots::SlotSet,
    spec::DesiredCluster,
};

impl ClusterState {
    /// Whoever is known where it is now was met: the next introduction, to another address, is a first one again.
    pub(super) fn note_met(&mut self, node: &NodeFacts) {
        let known = |m: &MemberState| {
            let at = m.node().and_then(|other| node.knows.get(&other.id));
            at.is_some_and(|at| at.is_some() && at.as_deref() == m.address())
        };
        for (id, _) in self.members.iter().filter(|(_, m)| known(m)) {
            self.failures.remove(&format!("{}/meet/{id}", Scope::Cluster));
        }
    }

    /// What the member serves whose grant is in force is the shard's, and no other's any more. While slots are handed over, nodes that
    /// are asked one after the other may claim the same: the higher epoch is right.
    pub(super) fn note_slots(&mut self, id: ShardId) {
        let Some(node) = self.holder_node(id) else { return };
        let rivals = self.shards.keys().filter(|other| **other != id).filter_map(|s| self.holder_node(*s));
        let theirs = rivals.filter(|rival| rival.epoch > node.epoch);
        let slots = theirs.fold(node.slots.clone(), |mine, rival| mine.without(&rival.slots));
        self.give_slots(id, &slots);
    }

    /// What the node says of the member whose grant is in force and that is primary.
    fn holder_node(&self, id: ShardId) -> Option<&NodeFacts> {
        let holder = self.shards.get(&id)?.in_force?;
        self.members.get(&holder).filter(|m| m.is_primary())?.node()
    }

    pub(super) fn give_slots(&mut self, to: ShardId, slots: &SlotSet) {
        let Some(known) = self.shards.get(&to) else { return };
        let more = slots.without(&known.slots);
        if more.is_empty() {
            return;
        }
        let mut moved = 0;
        for (id, shard) in &mut self.shards {
            if *id == to {
                shard.slots = shard.slots.with(&more);
                continue;
            }
            let given = shard.slots.common(&more);
            if !given.is_empty() {
                moved += given.len();
                shard.slots = shard.slots.without(&more);
                // What it was told to hand over arrives: the next job is a first one again.
                self.failures.remove(&migration_key(*id));
            }
        }
        for open in self.operations.iter_mut().filter(|open| open.kind == OperationKind::Reshard) {
            open.slots_moved = open.slots_moved.saturating_add(u32::try_from(moved).unwrap_or(u32::MAX));
        }
    }

    /// How many shards there have to be: those of the spec, and any beyond them that owns slots, or of whose members one says so: a
    /// journal may be younger than the shards.
    pub fn shards_kept(&self, wanted: u16) -> u16 {
        let owns = |node: &NodeFacts| node.primary.is_none() && !node.slots.is_empty();
        let owning = self.shards.iter().filter(|(_, shard)| !shard.slots.is_empty()).map(|(id, _)| *id);
        let saying = self.members.iter().filter(|(_, m)| m.node().is_some_and(owns)).map(|(id, _)| id.shard);
        owning.chain(saying).map(|id| id.0.saturating_add(1)).max().unwrap_or_default().max(wanted)
    }

    /// The valid spec, with every shard that has to be there.
    pub fn desired(&self) -> Option<DesiredCluster> {
        let spec = self.spec.clone()?;
        Some(DesiredCluster { shards: self.shards_kept(spec.shards), ..spec })
    }

    /// True if the member's shard is not to be.
    fn is_beyond(&self, id: MemberId) -> bool {
        self.spec.as_ref().is_some_and(|spec| id.shard.0 >= self.shards_kept(spec.shards))
    }

    /// True of a member that is gone with its shard: what the same look says of its server and agent is about nobody.
    pub(super) fn is_removed(&self, id: MemberId) -> bool {
        !self.members.contains_key(&id) && self.is_beyond(id)
    }

    /// A member whose shard is not to be, and whose pod is gone, was never there; and so is the shard with its last member. If it comes
    /// again it begins anew.
    pub(super) fn forget_removed(&mut self, id: MemberId) {
        let gone = self.members.get(&id).is_some_and(|m| m.facts.pod.is_absent());
        if !gone || !self.is_beyond(id) {
            return;
        }
        self.members.remove(&id);
        if self.members_of(id.shard).next().is_none() {
            self.shards.remove(&id.shard);
            self.operations.retain(|open| open.scope != Scope::Shard(id.shard));
        }
    }
}

/// Key under which jobs of a shard are counted that were accepted and of which nothing was seen yet, and those that were refused.
pub(super) fn migration_key(from: ShardId) -> String {
    format!("{}/migrate-slots/{from}", Scope::Cluster)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decision::{Decision, Reason, StepName},
        effect::{Effect, Outcome, Server},
        event::{Event, Record},
        ids::{Digest, NodeId, Timestamp},
        observation::{ContainerPhase, Evidence, Executed, NodeHealth, Observed, PodFacts},
    };
    use std::collections::{BTreeMap, BTreeSet};

    const ME: MemberId = MemberId { shard: ShardId(0), ordinal: 0 };
    const OTHER: MemberId = MemberId { shard: ShardId(1), ordinal: 0 };

    fn id(digit: char) -> NodeId {
        digit.to_string().repeat(40).parse().unwrap()
    }

    fn node(own: char, knows: &[(char, &str)]) -> NodeFacts {
        NodeFacts {
            id: id(own),
            primary: None,
            epoch: 1,
            slots: SlotSet::default(),
            knows: knows
                .iter()
                .map(|(known, at)| (id(*known), Some((*at).to_owned())))
                .collect::<BTreeMap<_, _>>(),
            meeting: BTreeSet::new(),
            failed: BTreeSet::new(),
            covered: 0,
            exports: Vec::new(),
        }
    }

    fn pod(address: &str) -> Observed<PodFacts> {
        Observed::Present(PodFacts {
            uid: "u".into(),
            address: Some(address.to_owned()),
            node: "n".into(),
            node_health: NodeHealth::Ready,
            deleting: false,
            revision: Digest::default(),
            container: ContainerPhase::Running,
            role_label: None,
        })
    }

    fn add(state: &mut ClusterState, event: Event) {
        let (seq, epoch) = (state.head.next(), state.epoch);
        state.apply(&Record { seq, epoch, time: Timestamp(0), event });
    }

    fn introduce(state: &mut ClusterState) {
        let server = Server { member: ME, address: "10.0.0.1".into(), run_id: "r".into() };
        let mut decision = Decision::new(StepName::Gossip, Scope::Cluster, Reason::NodesMet);
        decision.effects = vec![Effect::Meet { server, member: OTHER, address: "10.0.0.3".into() }];
        add(state, Event::Decided { decision: Box::new(decision), evidence: Evidence::default() });
        let outcomes = vec![(Timestamp(0), Outcome::Verified)];
        add(state, Event::EffectsEnded(Executed { decision: state.head, outcomes }));
    }

    #[test]
    fn introductions_that_come_to_nothing_are_counted_until_the_other_is_known_where_it_is() {
        let mut state = ClusterState::default();
        let count = |state: &ClusterState| state.failures.get("cluster/meet/1-0").map(|(count, _)| *count);
        add(&mut state, Event::PodChanged { member: OTHER, pod: pod("10.0.0.3") });
        add(&mut state, Event::NodeChanged { member: OTHER, node: node('b', &[]) });
        introduce(&mut state);
        introduce(&mut state);
        assert_eq!(count(&state), Some(2), "told, and nothing seen of it");
        add(&mut state, Event::NodeChanged { member: ME, node: node('a', &[('b', "10.0.0.2")]) });
        assert_eq!(count(&state), Some(2), "known where it was before");
        add(&mut state, Event::NodeChanged { member: ME, node: node('a', &[('b', "10.0.0.3")]) });
        assert_eq!(count(&state), None);
    }
}
