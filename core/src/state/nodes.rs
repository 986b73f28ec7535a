//! What is folded of the nodes of a Valkey Cluster: who was met, and whose slots are whose.

use super::{ClusterState, MemberState};
use crate::{decision::Scope, ids::ShardId, observation::NodeFacts, slots::SlotSet};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decision::{Decision, Reason, StepName},
        effect::{Effect, Outcome, Server},
        event::{Event, Record},
        ids::{Digest, MemberId, NodeId, Timestamp},
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
