//! What is folded of the nodes of a Valkey Cluster: who was met, and whose slots are whose.

use super::{ClusterState, MemberState, ShardState, Weighed};
use crate::{
    decision::{Decision, Operation, OperationKind, Reason, Scope},
    effect::{Effect, Means},
    ids::{MemberId, ShardId, Timestamp},
    observation::NodeFacts,
    slots::SlotSet,
    spec::{DesiredCluster, Topology, Verb},
    weights::SlotWeights,
};

/// Longer than a look, and than an effect is executed after it was decided. Milliseconds.
const TOLD_LATELY_MS: i64 = 3_000;

impl ClusterState {
    /// What a node says now, and what it said before.
    pub(super) fn note_node(&mut self, of: MemberId, before: Option<&NodeFacts>, node: &NodeFacts) {
        self.note_met(of, node);
        self.note_open(of.shard, before, node);
        self.note_slots(of.shard);
    }

    /// Whom a node knows where it is now it has met: their next introduction, at another address, is a first one again.
    fn note_met(&mut self, me: MemberId, node: &NodeFacts) {
        let known = |m: &MemberState| {
            let at = m.node().and_then(|other| node.knows.get(&other.id));
            at.is_some_and(|at| at.is_some() && at.as_deref() == m.address())
        };
        for (id, _) in self.members.iter().filter(|(_, m)| known(m)) {
            self.failures.remove(&format!("{}/meet/{me}/{id}", Scope::Cluster));
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
    pub fn holder_node(&self, id: ShardId) -> Option<&NodeFacts> {
        let holder = self.shards.get(&id)?.in_force?;
        self.members.get(&holder).filter(|m| m.is_primary())?.node()
    }

    /// Slots that are to be given out, or handed over.
    pub(super) fn note_given(&mut self, decision: &Decision) {
        if decision.reason == Reason::SlotsReclaimed && self.gives_unrecorded(&decision.effects) {
            // The user's word was for these slots, and for nothing that is lost later.
            if let Some(word) = self.spec.as_ref().and_then(|spec| spec.confirm_blank.clone()) {
                self.spend(Verb::ConfirmBlank, &word);
            }
        }
        for effect in &decision.effects {
            if let Effect::MigrateSlots { server, slots, to, node: _, keys: _, by } = effect {
                let from = server.member.shard;
                // What is only closed, or cancelled, goes nowhere.
                if from == to.shard {
                    continue;
                }
                let getter = self.shards.entry(to.shard).or_default();
                getter.awaited = getter.awaited.with(slots);
                let giver = self.shards.entry(from).or_default();
                match by {
                    Means::Atomic => {}
                    Means::ByKey => {
                        giver.by_key = giver.by_key.with(slots);
                        giver.handed_at = Some(self.head_time);
                    }
                }
            }
            if let Effect::AddSlots { server, node: _, slots, epoch: _ } = effect {
                self.shards.entry(server.member.shard).or_default();
                self.give_slots(server.member.shard, slots);
            }
        }
    }

    /// Slots are on their way as long as what is open or under way changes, or what is to leave becomes less.
    fn note_open(&mut self, id: ShardId, before: Option<&NodeFacts>, node: &NodeFacts) {
        let now = self.head_time;
        let Some(shard) = self.shards.get_mut(&id) else { return };
        let is_open =
            |n: &NodeFacts| !n.migrating.is_empty() || !n.importing.is_empty() || !n.exports.is_empty();
        if !is_open(node) && !before.is_some_and(is_open) && shard.by_key.is_empty() {
            return;
        }
        let said =
            |n: &NodeFacts| (n.migrating.clone(), n.importing.clone(), n.exports.clone(), n.slots.clone());
        let same = |b: &NodeFacts| said(b) == said(node);
        if !before.is_some_and(same) {
            shard.handed_at = Some(now);
        }
    }

    /// Another number of shards, or another balance, is another plan, from what is in the slots by then. What a journal begins with is how it
    /// is, and no wish: whether it was fulfilled before nobody knows, and slots may be where a person has put them.
    pub(super) fn note_wish(&mut self, spec: &DesiredCluster) {
        let Some(before) = self.spec.clone() else {
            self.balanced_by = spec.balance;
            self.spend_rebalance(spec.rebalance.clone());
            return;
        };
        let wish = |spec: &DesiredCluster| (spec.shards, spec.balance, spec.rebalance.clone());
        if wish(&before) == wish(spec) {
            return;
        }
        // Each text is a wish once, also one that did not come true.
        if before.rebalance != spec.rebalance {
            self.spend_rebalance(before.rebalance.clone());
        }
        for open in self.operations.iter_mut().filter(|open| open.kind == OperationKind::Reshard) {
            open.settled = SlotSet::default();
            // Whoever asked for it, it is what the spec wants now, also when his wish is taken back.
            if (before.shards, before.balance) != (spec.shards, spec.balance) {
                open.asked_by = Operation::by_spec(spec.generation);
            }
        }
        for shard in self.shards.values_mut() {
            shard.weighed = None;
        }
    }

    /// What was counted in the slots of a primary; who is none says nothing of his shard. One that does not tell is not asked again for a
    /// while.
    pub(super) fn note_weights(&mut self, by: MemberId, weights: Option<&SlotWeights>, at: Timestamp) {
        let is_primary = self.members.get(&by).is_some_and(MemberState::is_primary);
        let Some(shard) = self.shards.get_mut(&by.shard).filter(|s| is_primary && s.in_force == Some(by))
        else {
            return;
        };
        let counted = weights.map(SlotWeights::slots).unwrap_or_default();
        let slots = shard.slots.with(&counted);
        shard.weighed = Some(Weighed { at, by, slots, weights: weights.cloned() });
    }

    /// All slots are where they shall be. What was counted in them is of no use any more, and what the user asked for is done.
    pub(super) fn note_balanced(&mut self) {
        for shard in self.shards.values_mut() {
            shard.weighed = None;
        }
        if let Some(spec) = &self.spec {
            self.balanced_by = spec.balance;
            self.spend_rebalance(spec.rebalance.clone());
        }
    }

    fn spend_rebalance(&mut self, word: Option<String>) {
        if let Some(word) = word {
            self.spend(Verb::Rebalance, &word);
        }
    }

    /// Slots that were on their way key by key are not any more: nobody goes on with them.
    pub(super) fn note_closed(&mut self, at: ShardId, slots: &SlotSet) {
        for shard in self.shards.values_mut() {
            shard.awaited = shard.awaited.without(slots);
        }
        if let Some(shard) = self.shards.get_mut(&at) {
            shard.by_key = shard.by_key.without(slots);
            shard.refusal = None;
        }
    }

    /// Why slots were not handed over.
    pub(super) fn note_refused(&mut self, effect: &Effect, why: &str) {
        if let Effect::MigrateSlots { server, .. } = effect
            && let Some(shard) = self.shards.get_mut(&server.member.shard)
        {
            shard.refusal = Some(why.to_owned());
        }
    }

    /// True if slots are given out of which nobody knows whose they were.
    fn gives_unrecorded(&self, effects: &[Effect]) -> bool {
        let mut given = SlotSet::default();
        for effect in effects {
            if let Effect::AddSlots { server: _, node: _, slots, epoch: _ } = effect {
                given = given.with(slots);
            }
        }
        !self.shards.values().fold(given, |left, shard| left.without(&shard.slots)).is_empty()
    }

    fn give_slots(&mut self, to: ShardId, slots: &SlotSet) {
        let Some(known) = self.shards.get(&to) else { return };
        let more = slots.without(&known.slots);
        if more.is_empty() {
            return;
        }
        let mut moved = SlotSet::default();
        for (id, shard) in &mut self.shards {
            shard.by_key = shard.by_key.without(&more);
            if *id == to {
                shard.slots = shard.slots.with(&more);
                shard.awaited = shard.awaited.without(&more);
                continue;
            }
            shard.awaited = shard.awaited.without(&more);
            let given = shard.slots.common(&more);
            if !given.is_empty() {
                moved = moved.with(&given);
                shard.slots = shard.slots.without(&more);
                // What it was told to hand over arrives: the next job is a first one again.
                shard.refusal = None;
                self.failures.remove(&migration_key(*id));
            }
        }
        for open in self.operations.iter_mut().filter(|open| open.kind == OperationKind::Reshard) {
            open.slots_moved =
                open.slots_moved.saturating_add(u32::try_from(moved.len()).unwrap_or(u32::MAX));
            open.settled = open.settled.with(&moved);
        }
    }

    /// How many shards there have to be: those of the spec, and any beyond them that owns slots, that may have got some, or of whose
    /// members one says so: a journal may be younger than the shards. What a member said whose pod is gone counts for nothing.
    pub fn shards_kept(&self, wanted: u16, now: Timestamp) -> u16 {
        // An open slot has keys at both ends.
        let has = |node: &NodeFacts| !node.slots.is_empty() || !node.importing.is_empty();
        let owns = |node: &NodeFacts| node.primary.is_none() && has(node);
        let may_own =
            |id: &ShardId, shard: &ShardState| !shard.slots.is_empty() || self.may_have_got(*id, shard, now);
        let owning = self.shards.iter().filter(|(id, shard)| may_own(id, shard)).map(|(id, _)| *id);
        let is_there = |m: &&MemberState| !m.facts.pod.is_absent();
        let says = |m: &MemberState| Some(m).filter(is_there).and_then(|m| m.node()).is_some_and(owns);
        let saying = self.members.iter().filter(|(_, m)| says(m)).map(|(id, _)| id.shard);
        owning.chain(saying).map(|id| id.0.saturating_add(1)).max().unwrap_or_default().max(wanted)
    }

    /// True if slots were to be handed over to the shard of which nobody is seen to have them: their giver may have given them.
    fn may_have_got(&self, id: ShardId, shard: &ShardState, now: Timestamp) -> bool {
        if shard.awaited.is_empty() {
            return false;
        }
        let others = self.shards.keys().filter(|other| **other != id);
        let seen = others.filter(|other| !self.was_told_lately(**other, now)).filter_map(|other| {
            let holder = self.shards.get(other)?.in_force?;
            self.members.get(&holder).filter(|m| m.server().is_some())?;
            let node = self.holder_node(*other).filter(|node| !node.exports_unread && !node.has_job())?;
            let open: SlotSet = node.migrating.keys().copied().collect();
            let by_key = self.shards.get(other).map(|shard| shard.by_key.with(&open)).unwrap_or_default();
            Some(node.slots.without(&by_key))
        });
        !seen.fold(shard.awaited.clone(), |left, slots| left.without(&slots)).is_empty()
    }

    /// True if the shard was told so lately to hand slots over that what is known of its node may be from before.
    pub fn was_told_lately(&self, from: ShardId, now: Timestamp) -> bool {
        let told = self.failures.get(&migration_key(from));
        told.is_some_and(|(_, at)| now.millis_since(*at) < TOLD_LATELY_MS)
    }

    /// True while slots may be on their way: a node says so, cannot be asked, or was told to a moment ago.
    pub fn are_slots_moving(&self, now: Timestamp) -> bool {
        let answers = |m: &&MemberState| m.server().is_some();
        let nodes = self.members.values().filter(answers).filter_map(|m| m.node());
        // A replica may still know of what was open when it was primary.
        let open = |node: &NodeFacts| !node.migrating.is_empty() || !node.importing.is_empty();
        let moves = |node: &NodeFacts| node.has_job() || node.primary.is_none() && open(node);
        nodes.into_iter().any(|node| node.exports_unread || moves(node))
            || self.shards.values().any(|shard| !shard.by_key.common(&shard.slots).is_empty())
            || self.shards.keys().any(|id| self.was_told_lately(*id, now))
    }

    /// The valid spec, with every shard that has to be there.
    pub fn desired(&self, now: Timestamp) -> Option<DesiredCluster> {
        let spec = self.spec.clone()?;
        Some(DesiredCluster { shards: self.shards_kept(spec.shards, now), ..spec })
    }

    /// True if the member's shard is not to be.
    fn is_beyond(&self, id: MemberId) -> bool {
        self.spec.as_ref().is_some_and(|spec| id.shard.0 >= self.shards_kept(spec.shards, self.head_time))
    }

    /// True of a member that is gone with its shard: what the same look says of its server and agent is about nobody.
    pub(super) fn is_removed(&self, id: MemberId) -> bool {
        !self.members.contains_key(&id) && self.is_beyond(id)
    }

    /// Members whose shard is not to be, and whose pods are gone, were never there; and so is a shard without members. If it comes again it
    /// begins anew.
    pub(super) fn forget_removed(&mut self) {
        let Some(spec) = self.spec.as_ref().filter(|spec| spec.topology == Topology::Cluster) else { return };
        let kept = ShardId(self.shards_kept(spec.shards, self.head_time));
        self.members.retain(|id, member| id.shard < kept || !member.facts.pod.is_absent());
        let (members, shards) = (&self.members, &mut self.shards);
        shards.retain(|id, _| *id < kept || members.keys().any(|member| member.shard == *id));
        self.operations.retain(|open| match open.scope {
            Scope::Cluster => true,
            Scope::Shard(id) => id < kept || shards.contains_key(&id),
        });
    }
}

/// Key under which jobs of a shard are counted that were accepted and of which nothing was seen yet, and those that were refused.
pub fn migration_key(from: ShardId) -> String {
    format!("{}/migrate-slots/{from}", Scope::Cluster)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decision::StepName,
        effect::{Outcome, Server},
        event::{Event, Record},
        ids::{Digest, NodeId, ReplId},
        observation::{
            ContainerPhase, Evidence, Executed, Export, ExportState, NodeHealth, Observed, PodFacts,
            ServerFacts, ServerRole, Why,
        },
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
            exports_unread: false,
            import_failed: None,
            migrating: BTreeMap::new(),
            importing: BTreeMap::new(),
            down: false,
        }
    }

    fn pod(address: &str) -> Observed<PodFacts> {
        Observed::Present(PodFacts {
            uid: "u".into(),
            address: Some(address.to_owned()),
            node: "n".into(),
            node_health: NodeHealth::Ready,
            cordoned: false,
            deleting: false,
            revision: Digest::default(),
            container: ContainerPhase::Running,
            role_label: None,
            trouble: None,
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
        let count =
            |state: &ClusterState| state.failures.get("cluster/meet/0-0/1-0").map(|(count, _)| *count);
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

    /// Both members are primaries in force; the first has half of the slots, the second the others.
    fn two_shards() -> ClusterState {
        let mut state = ClusterState::default();
        for (member, own, slots) in [(ME, 'a', "0-8191"), (OTHER, 'b', "8192-16383")] {
            let shard = ShardState { in_force: Some(member), ..ShardState::default() };
            state.shards.insert(member.shard, shard);
            let server = ServerFacts {
                run_id: "r".into(),
                version: "9.1.2".into(),
                role: ServerRole::Primary,
                loading: false,
                replid: ReplId("x".into()),
                replid2: None,
                replid2_offset: None,
            };
            add(&mut state, Event::PodChanged { member, pod: pod("10.0.0.9") });
            add(&mut state, Event::ServerChanged { member, server: Observed::Present(server) });
            add(&mut state, Event::NodeChanged { member, node: serving(own, 1, slots) });
        }
        state
    }

    fn serving(own: char, epoch: u64, slots: &str) -> NodeFacts {
        NodeFacts { epoch, slots: slots.parse().unwrap(), ..node(own, &[]) }
    }

    #[test]
    fn only_the_primary_in_force_says_what_is_in_the_slots_of_its_shard() {
        let weights = |slot| Some(SlotWeights::sum_up(&[(slot, 7)], 0));
        let says = |state: &ClusterState| state.shards[&ME.shard].weighed.clone().map(|w| (w.by, w.weights));
        let mut state = two_shards();
        let replica = MemberId { shard: ME.shard, ordinal: 1 };
        add(&mut state, Event::SlotsWeighed { member: replica, weights: weights(1) });
        assert_eq!(says(&state), None);
        add(&mut state, Event::SlotsWeighed { member: ME, weights: weights(2) });
        assert_eq!(says(&state), Some((ME, weights(2))));
        add(&mut state, Event::SlotsWeighed { member: ME, weights: None });
        assert_eq!(says(&state), Some((ME, None)), "it does not tell any more");
        add(&mut state, Event::ServerChanged { member: ME, server: Observed::Unknown(Why::Silent) });
        add(&mut state, Event::SlotsWeighed { member: ME, weights: weights(3) });
        assert_eq!(says(&state), Some((ME, None)), "who does not serve says nothing");
        let begins = Event::EpochStarted { writer: "w".into(), version: "v".into(), lost_through: None };
        add(&mut state, begins);
        assert_eq!(says(&state), None, "durations and facts never span epochs");
    }

    fn slots_of(state: &ClusterState) -> [String; 2] {
        [ME, OTHER].map(|member| state.shards[&member.shard].slots.to_string())
    }

    #[test]
    fn slots_on_their_way_are_whose_epoch_is_higher_whoever_is_asked_first() {
        let after = ["0-8091".to_owned(), "8092-16383".to_owned()];
        let got = |state: &mut ClusterState| {
            add(state, Event::NodeChanged { member: OTHER, node: serving('b', 2, "8092-16383") });
        };
        let given = |state: &mut ClusterState| {
            add(state, Event::NodeChanged { member: ME, node: serving('a', 1, "0-8091") });
        };
        let mut state = two_shards();
        got(&mut state);
        assert_eq!(slots_of(&state), after);
        // Of something else, and from before it had given them.
        let stale = NodeFacts { covered: 1, ..serving('a', 1, "0-8191") };
        add(&mut state, Event::NodeChanged { member: ME, node: stale });
        assert_eq!(slots_of(&state), after, "what a node with a lower epoch still says");
        given(&mut state);
        assert_eq!(slots_of(&state), after);
        let mut state = two_shards();
        given(&mut state);
        assert_eq!(slots_of(&state)[0], "0-8191", "nobody is seen to have them: they are still the giver's");
        got(&mut state);
        assert_eq!(slots_of(&state), after);
    }

    #[test]
    fn a_shard_that_may_have_got_slots_is_kept_until_its_giver_is_seen_to_have_them() {
        let mut state = two_shards();
        let to = MemberId { shard: ShardId(2), ordinal: 0 };
        let server = Server { member: ME, address: "10.0.0.9".into(), run_id: "r".into() };
        let slots: SlotSet = "8000-8191".parse().unwrap();
        let job = Effect::MigrateSlots {
            server,
            slots: slots.clone(),
            to,
            node: id('c'),
            keys: None,
            by: Means::Atomic,
        };
        let mut decision = Decision::new(StepName::Reshard, Scope::Cluster, Reason::SlotsHandedOver);
        decision.effects = vec![job];
        add(&mut state, Event::Decided { decision: Box::new(decision), evidence: Evidence::default() });
        let (decision, outcomes) = (state.head, vec![(Timestamp(0), Outcome::Verified)]);
        add(&mut state, Event::EffectsEnded(Executed { decision, outcomes }));
        assert_eq!(state.shards_kept(2, state.head_time), 3, "its giver was told a moment ago");
        state.head_time = Timestamp(0).plus_millis(TOLD_LATELY_MS);
        assert_eq!(state.shards_kept(2, state.head_time), 2, "its giver has them all");
        let running = Export { slots, to: id('c'), state: ExportState::Running };
        for node in [
            NodeFacts { exports: vec![running], ..serving('a', 1, "0-8191") },
            NodeFacts { exports_unread: true, ..serving('a', 1, "0-8191") },
            serving('a', 1, "0-7999"),
        ] {
            let mut after = state.clone();
            after.members.get_mut(&ME).unwrap().facts.node = Some(node.clone());
            assert_eq!(after.shards_kept(2, after.head_time), 3, "{node:?}");
        }
        let mut silent = state.clone();
        silent.members.get_mut(&ME).unwrap().facts.server = Observed::Unknown(Why::Silent);
        assert_eq!(silent.shards_kept(2, silent.head_time), 3, "its giver does not answer");
        add(&mut state, Event::NodeChanged { member: OTHER, node: serving('b', 3, "8000-16383") });
        add(&mut state, Event::NodeChanged { member: ME, node: serving('a', 1, "0-7999") });
        assert_eq!(state.shards_kept(2, state.head_time), 2, "someone else has them");
    }
}
