//! What is known of one cluster: a fold over its journal and nothing else.

mod loss;
mod nodes;
mod outcomes;
mod spent;

pub use loss::Loss;
pub use nodes::migration_key;
pub use outcomes::{Failing, SettingsRefused, failure_key, handover_key, promise_key, promotion_key};

use crate::{
    agent::Brief,
    decision::{Decision, Operation, OperationChange, OperationKind, Reason, Scope, Standing},
    event::{Event, Record},
    ids::{MemberId, ReplId, Seq, ShardId, Timestamp, WriterEpoch},
    observation::{
        AgentFacts, Link, MemberFacts, NodeFacts, ObjectFacts, ObjectRef, Observed, PodFacts, RouteFacts,
        ServerFacts, ServerRole, Source, SpecFact, Why,
    },
    slots::SlotSet,
    spec::{Balance, DesiredCluster, Verb},
    weights::SlotWeights,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Histories of a shard that are remembered besides the last two: one a promotion, and a member that missed more than
/// eight of them without being looked at is a stranger. Count.
const HISTORIES_MAX: usize = 8;

/// What is known of a member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Facts as last seen in this epoch.
    pub facts: MemberFacts,
    /// Since when the server is Unknown, Absent or Present (whichever it is), within this epoch.
    pub server_since: Timestamp,
    /// Since when the pod is what it is, within this epoch.
    pub pod_since: Timestamp,
    /// When the server's facts last changed, within this epoch.
    #[serde(default)]
    pub server_changed_at: Timestamp,
    /// Since when its node refuses its clients, as was seen within this epoch, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down_since: Option<Timestamp>,
    /// Since when the server has a link to its source, or has none, within this epoch.
    #[serde(default)]
    pub link_since: Timestamp,
    /// The process of which that is said, by its run id, and whether it has a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked: Option<(String, bool)>,
    /// The last process that had a link, by its run id, in whatever epoch: one that never had one has what its
    /// disk has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub had_link: Option<String>,
    /// Run id of a server that had no link to the serving primary for a while, as an earlier epoch saw it last.
    #[serde(default)]
    pub was_detached: Option<String>,
    /// The grant and its terms as the agent knew them when it was last heard, in whatever epoch.
    #[serde(default)]
    pub told: Option<Brief>,
    /// The settings that its server refused last; `None` since it took some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings_refused: Option<SettingsRefused>,
    /// Run id and replication id of the last process that started without data. A server that still has both has never
    /// finished a synchronisation: it is blank, whomever it follows by now.
    #[serde(default)]
    pub blank_start: Option<(String, ReplId)>,
}

impl MemberState {
    /// The server, if it answers.
    pub fn server(&self) -> Option<&ServerFacts> {
        self.facts.server.present()
    }

    /// The agent, if it answers.
    pub fn agent(&self) -> Option<&AgentFacts> {
        self.facts.agent.present()
    }

    /// Why it does not start, in the words of whoever knows: of its pod, or of its server.
    pub fn trouble(&self) -> Option<&str> {
        let pod = self.facts.pod.present().filter(|pod| !pod.deleting)?;
        let of_server = || self.agent().and_then(|agent| agent.start_failure.as_deref());
        pod.trouble.as_deref().or_else(of_server)
    }

    /// True if the server answers and is known to have no data: it started blank and is still on the history it drew then.
    pub fn is_blank(&self) -> bool {
        let drawn = |s: &ServerFacts| {
            self.blank_start.as_ref().is_some_and(|(run, replid)| *run == s.run_id && *replid == s.replid)
        };
        let told = |s: &ServerFacts| {
            self.agent().is_some_and(|a| a.run_id == s.run_id && a.drawn.as_ref() == Some(&s.replid))
        };
        self.server().is_some_and(|s| s.role != ServerRole::Primary && (told(s) || drawn(s)))
    }

    /// Its node in a Valkey Cluster, as it said last in this epoch.
    pub fn node(&self) -> Option<&NodeFacts> {
        self.facts.node.as_ref()
    }

    /// The pod's address, if there is a pod with one.
    pub fn address(&self) -> Option<&str> {
        self.facts.pod.present().and_then(|p| p.address.as_deref())
    }

    /// True if the server answers and says it is primary.
    pub fn is_primary(&self) -> bool {
        self.server().is_some_and(|s| s.role == ServerRole::Primary)
    }
}

/// What is known of a shard beyond its members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardState {
    /// Grants given: sequence of the latest deciding record that was to make the member primary.
    pub grants: BTreeMap<MemberId, Seq>,
    /// The member whose grant is in force: its promotion was verified, or it was seen to be primary with the highest grant. A
    /// grant that was recorded and came to nothing never is.
    #[serde(default)]
    pub in_force: Option<MemberId>,
    /// When that member was lost, if it does not serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Loss>,
    /// The history (replication id) of the last primary seen with the highest grant. Only ever used to refuse.
    pub history: Option<ReplId>,
    /// The history that `history` continued when that primary was promoted.
    #[serde(default)]
    pub parent_history: Option<ReplId>,
    /// The histories before that, latest first: a member that is still on one of them is far behind, but not a stranger.
    #[serde(default)]
    pub older_histories: Vec<ReplId>,
    /// Where the write Service points.
    pub route: Observed<RouteFacts>,
    /// In a Valkey Cluster: the slots that the shard's primary was seen to serve last, or was given.
    #[serde(default, skip_serializing_if = "SlotSet::is_empty")]
    pub slots: SlotSet,
    /// Slots that were to be handed over to it, until somebody is seen to have them.
    #[serde(default, skip_serializing_if = "SlotSet::is_empty")]
    pub awaited: SlotSet,
    /// Slots that it was told to hand over key by key, until somebody else is seen to have them: its agent may go on at any time.
    #[serde(default, skip_serializing_if = "SlotSet::is_empty")]
    pub by_key: SlotSet,
    /// When what is on its way at this end last changed, was told to go key by key, or a leader began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_at: Option<Timestamp>,
    /// What was said when it was told to hand slots over and did not, until some arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// What is in its slots, counted just before slots move. It counts while the member that said it is the primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weighed: Option<Weighed>,
}

/// What was counted in the slots of a shard's primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weighed {
    /// When.
    pub at: Timestamp,
    /// Who said it.
    pub by: MemberId,
    /// The slots that were its own then.
    pub slots: SlotSet,
    /// What it said; `None`: it does not tell.
    pub weights: Option<SlotWeights>,
}

impl ShardState {
    /// True if a primary with the highest grant was ever seen to serve: from then on, emptiness is a loss and no beginning.
    pub fn has_served(&self) -> bool {
        self.history.is_some()
    }

    /// The member whose grant is in force, and that grant.
    pub fn holder(&self) -> Option<(MemberId, Seq)> {
        self.in_force.map(|id| (id, self.grants.get(&id).copied().unwrap_or_default()))
    }
}

/// A recorded decision whose outcome is not recorded yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The decision.
    pub decision: Decision,
    /// Epoch in which it was recorded; if that is over, the outcome is in doubt.
    pub epoch: WriterEpoch,
}

/// Everything known of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// `metadata.uid` of the resource.
    pub cluster_uid: String,
    /// Namespace of the resource.
    pub namespace: String,
    /// Name of the resource.
    pub name: String,
    /// Sequence of the last record.
    pub head: Seq,
    /// Time of the last record.
    pub head_time: Timestamp,
    /// Writer epoch.
    pub epoch: WriterEpoch,
    /// When this epoch began.
    pub epoch_since: Timestamp,
    /// Level that the stream was finalized at; 0 if it never was.
    #[serde(default)]
    pub level: u32,
    /// True once the spec was looked at in this epoch.
    pub spec_seen: bool,
    /// The spec as last valid.
    pub spec: Option<DesiredCluster>,
    /// Why the present spec is refused, if it is.
    pub spec_error: Option<String>,
    /// Members.
    pub members: BTreeMap<MemberId, MemberState>,
    /// Shards.
    pub shards: BTreeMap<ShardId, ShardState>,
    /// What the shards were evened out by last.
    #[serde(default, skip_serializing_if = "Balance::is_slots")]
    pub balanced_by: Balance,
    /// Owned objects as last seen in this epoch.
    pub objects: BTreeMap<ObjectRef, ObjectFacts>,
    /// Operations under way.
    pub operations: Vec<Operation>,
    /// Decisions without recorded outcome.
    pub pending: BTreeMap<Seq, Pending>,
    /// Pods whose deletion was accepted, by UID: they are on their way out, whatever a slow watch still shows of them.
    #[serde(default)]
    pub condemned: BTreeMap<MemberId, String>,
    /// The user's words that were served or refused for good, the latest last.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub spent: BTreeMap<Verb, Vec<String>>,
    /// The same of every verb, as earlier builds kept them.
    #[serde(default)]
    pub spent_tokens: BTreeSet<String>,
    /// The word of a switchover that was said while no primary of its shard was seen to serve: it names the data
    /// to go on with. One from before the loss says nothing of what was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub named: Option<String>,
    /// Effects that failed since they last succeeded, by `(scope, verb)`: count and time of the last, for back-off.
    pub failures: BTreeMap<String, (u32, Timestamp)>,
    /// What fails in a scope, and since when, by the scope: for whoever looks at the resource.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failing: BTreeMap<String, Failing>,
    /// What was said the last time that an object was not applied or deleted, until it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub refusals: BTreeMap<ObjectRef, String>,
    /// True once the API server has said, in this epoch, that the namespace is being deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub namespace_ends: bool,
    /// What is waited for and what is blocked.
    pub standing: Standing,
    /// True once the resource was seen to be deleted.
    #[serde(default)]
    pub deleting: bool,
    /// True once the finalizer was taken off: nothing is left to do for this resource.
    #[serde(default)]
    pub released: bool,
}

impl ClusterState {
    /// Folds records, in order, into the empty state.
    pub fn fold<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut state = ClusterState::default();
        for record in records {
            state.apply(record);
        }
        state
    }

    /// Folds one record. Total: any sequence of records gives a state.
    pub fn apply(&mut self, record: &Record) {
        self.head = record.seq;
        self.head_time = record.time;
        self.epoch = record.epoch;
        match &record.event {
            Event::Baseline { cluster_uid, namespace, name, origin: _ } => {
                self.cluster_uid.clone_from(cluster_uid);
                self.namespace.clone_from(namespace);
                self.name.clone_from(name);
            }
            Event::EpochStarted { writer: _, version: _, lost_through: _ } => {
                self.forget_observations(record.time)
            }
            Event::SpecChanged(spec) => self.apply_spec(spec),
            Event::PodChanged { member, pod } => {
                let known = self.members.entry(*member).or_default();
                if !same_case(&known.facts.pod, pod) {
                    known.pod_since = record.time;
                }
                known.facts.pod = pod.clone();
                let same = |uid: &String| pod.is_unknown() || pod.present().is_some_and(|p| p.uid == *uid);
                if !self.condemned.get(member).is_some_and(same) {
                    self.condemned.remove(member);
                }
                self.forget_removed();
            }
            Event::ServerChanged { member, .. } | Event::AgentChanged { member, .. }
                if self.is_removed(*member) => {}
            Event::ServerChanged { member, server } => self.apply_server(*member, server, record.time),
            Event::AgentChanged { member, agent } => {
                let known = self.members.entry(*member).or_default();
                known.told = agent.present().map(|a| a.brief.clone()).or(known.told.take());
                known.facts.agent = agent.clone();
            }
            Event::NodeChanged { member, node } => {
                let known = self.members.entry(*member).or_default();
                known.down_since = node.down.then(|| known.down_since.unwrap_or(record.time));
                let before = known.facts.node.replace(node.clone());
                self.note_node(*member, before.as_ref(), node);
                self.forget_removed();
            }
            Event::SlotsWeighed { member, weights } => {
                self.note_weights(*member, weights.as_ref(), record.time)
            }
            Event::RouteChanged { shard, route } => {
                self.shards.entry(*shard).or_default().route = route.clone()
            }
            Event::ObjectChanged { object, facts } if facts.surplus && facts.live.is_absent() => {
                self.objects.remove(object);
                self.refusals.remove(object);
            }
            Event::ObjectChanged { object, facts } => {
                self.objects.insert(object.clone(), facts.clone());
            }
            Event::Decided { decision, evidence: _ } => self.apply_decision(record, decision),
            Event::EffectsEnded(executed) => self.apply_outcomes(executed),
            Event::DecisionClosed { decision, how: _ } => {
                self.pending.remove(decision);
            }
            Event::StandingChanged { standing, evidence: _ } => self.apply_standing(standing),
            Event::LevelRaised { level, version: _ } => self.level = *level,
            // About the store, not about the cluster.
            Event::Trimmed { .. } => {}
        }
    }

    fn apply_spec(&mut self, spec: &SpecFact) {
        self.spec_seen = true;
        match spec {
            SpecFact::Valid(spec) => {
                self.note_wish(spec);
                self.note_named(spec);
                self.spec = Some(spec.clone());
                self.spec_error = None;
                self.forget_removed();
            }
            SpecFact::Invalid(why) => self.spec_error = Some(why.clone()),
            SpecFact::Deleting => self.deleting = true,
        }
    }

    fn forget_observations(&mut self, now: Timestamp) {
        self.epoch_since = now;
        self.spec_seen = false;
        let detached: Vec<MemberId> =
            self.members.keys().copied().filter(|id| self.is_detached(*id, now)).collect();
        for id in detached {
            if let Some(member) = self.members.get_mut(&id) {
                member.was_detached = member.server().map(|s| s.run_id.clone());
            }
        }
        for member in self.members.values_mut() {
            member.facts = MemberFacts::default();
            (member.server_since, member.pod_since) = (now, now);
            (member.server_changed_at, member.link_since) = (now, now);
            (member.down_since, member.linked) = (None, None);
        }
        for shard in self.shards.values_mut() {
            shard.route = Observed::Unknown(Why::NotLooked);
            shard.lost = shard.in_force.map(|of| Loss { of, at: now });
            shard.handed_at = shard.handed_at.map(|_| now);
            shard.weighed = None;
        }
        for object in self.objects.values_mut() {
            object.live = Observed::Unknown(Why::NotLooked);
        }
        self.failures.clear();
        self.refusals.clear();
        self.namespace_ends = false;
        self.sort_spent_words();
        // Durations never span epochs.
        for operation in &mut self.operations {
            operation.phase_since = now;
        }
    }

    fn apply_server(&mut self, id: MemberId, server: &Observed<ServerFacts>, time: Timestamp) {
        let known = self.members.entry(id).or_default();
        if !same_case(&known.facts.server, server) {
            known.server_since = time;
        }
        if let Observed::Present(facts) = server
            && matches!(
                facts.role,
                ServerRole::Replica { source: Source::Gate { had_history: false }, link: _ }
            )
        {
            known.blank_start = Some((facts.run_id.clone(), facts.replid.clone()));
        }
        known.server_changed_at = time;
        let run_id = |server: &Observed<ServerFacts>| server.present().map(|facts| facts.run_id.clone());
        if run_id(&known.facts.server) != run_id(server) {
            // Another process refuses its clients for a while of its own.
            known.down_since = known.down_since.map(|_| time);
        }
        if link_of(server).is_none_or(|(_, link)| link == Link::Up) && server.present().is_some() {
            known.was_detached = None;
        }
        // A synchronisation that began and broke off, another address of its source, or a moment of silence:
        // none of it is a link.
        let linked = server.present().map(|facts| {
            let has_link = link_of(server).is_none_or(|(_, link)| link == Link::Up);
            (facts.run_id.clone(), has_link)
        });
        if let Some((run_id, true)) = &linked {
            known.had_link = Some(run_id.clone());
        }
        if linked.is_some() && known.linked != linked {
            (known.linked, known.link_since) = (linked, time);
        }
        known.facts.server = server.clone();
        self.note_history(id.shard);
        self.note_loss(id.shard);
    }

    /// No grant is above this that was decided here; nor is a record.
    pub fn highest_grant(&self) -> Seq {
        let given = self.shards.values().flat_map(|shard| shard.grants.values().copied());
        given.max().unwrap_or_default().max(self.head)
    }

    /// Number of a grant that is decided at `seq`: that, or one above what an agent was last heard to know. A journal may be younger than
    /// the volumes on which agents remember (kept claims, a lost journal), and a number below would be refused for ever.
    fn grant_number(&self, shard: ShardId, seq: Seq) -> Seq {
        let told = self.members_of(shard).filter_map(|(_, m)| m.told.as_ref()).map(|told| told.grant);
        let given = self.shards.get(&shard).into_iter().flat_map(|s| s.grants.values().copied());
        told.chain(given).max().map_or(seq, |known| known.next().max(seq))
    }

    /// A member that is seen to be primary with a higher grant than the one in force takes over; and the history of the
    /// member whose grant is in force, while it is seen to be primary, is the shard's.
    fn note_history(&mut self, id: ShardId) {
        let Some(shard) = self.shards.get_mut(&id) else { return };
        let serves = |id: &MemberId| self.members.get(id).is_some_and(|m| m.is_primary());
        let ruling = shard.in_force.and_then(|holder| shard.grants.get(&holder)).copied().unwrap_or_default();
        let higher =
            shard.grants.iter().filter(|(m, seq)| **seq > ruling && serves(m)).max_by_key(|(_, seq)| **seq);
        shard.in_force = higher.map(|(member, _)| *member).or(shard.in_force);
        let holder = shard.in_force.filter(serves).and_then(|holder| self.members.get(&holder));
        if let Some(facts) = holder.and_then(|m| m.server()) {
            let older = [shard.parent_history.take(), shard.history.take()].into_iter().flatten();
            for id in older.filter(|id| *id != facts.replid && Some(id) != facts.replid2.as_ref()) {
                shard.older_histories.retain(|known| *known != id);
                shard.older_histories.insert(0, id);
            }
            shard.older_histories.truncate(HISTORIES_MAX);
            shard.history = Some(facts.replid.clone());
            shard.parent_history.clone_from(&facts.replid2);
        }
        self.note_slots(id);
    }

    fn apply_decision(&mut self, record: &Record, decision: &Decision) {
        if let (Some(member), Scope::Shard(shard)) = (decision.grant, decision.scope) {
            let number = self.grant_number(shard, record.seq);
            let known = self.shards.entry(shard).or_default();
            known.grants.insert(member, number);
            if decision.effects.is_empty() {
                // Nothing is to be done for it: the member is primary already.
                known.in_force = Some(member);
            }
            self.note_history(shard);
            self.note_loss(shard);
        }
        self.note_given(decision);
        match &decision.operation {
            Some(OperationChange::Open { kind, phase, asked_by, member }) => {
                self.operations.push(Operation {
                    id: record.seq,
                    kind: *kind,
                    scope: decision.scope,
                    phase: *phase,
                    asked_by: asked_by.clone(),
                    word: self.word_of(*kind, decision, asked_by),
                    member: *member,
                    cause: decision.reason,
                    opened_at: record.time,
                    phase_since: record.time,
                    slots_moved: 0,
                    settled: SlotSet::default(),
                })
            }
            Some(OperationChange::Advance { kind, phase, member }) => {
                let word = self.word_of(*kind, decision, "");
                if let Some(op) =
                    self.operations.iter_mut().find(|o| o.kind == *kind && o.scope == decision.scope)
                {
                    (op.phase, op.member, op.phase_since) = (*phase, *member, record.time);
                    op.word = word.or(op.word.take());
                }
            }
            Some(OperationChange::Close { kind }) => {
                let closed = |o: &Operation| o.kind == *kind && o.scope == decision.scope;
                let words = self.operations.iter().filter(|o| closed(o)).filter_map(|o| o.word.clone());
                for (verb, word) in words.collect::<Vec<_>>() {
                    self.spend(verb, &word);
                }
                self.operations.retain(|o| !closed(o));
            }
            None => {}
        }
        if decision.operation == Some(OperationChange::Close { kind: OperationKind::Rollout }) {
            self.note_rolled();
        }
        if decision.operation == Some(OperationChange::Close { kind: OperationKind::Reshard }) {
            self.note_balanced();
            // What was cancelled is awaited by nobody: another may give it there by hand.
            if decision.reason == Reason::RebalanceWithdrawn {
                self.shards.values_mut().for_each(|shard| shard.awaited = SlotSet::default());
            }
        }
        // A wish that is fulfilled or given up must not come true again after a later failover.
        let closes_switchover =
            decision.operation == Some(OperationChange::Close { kind: OperationKind::Switchover });
        if let (true, Some(wish)) = (closes_switchover, self.spec.as_ref().and_then(|s| s.switchover.clone()))
            && decision.scope == Scope::Shard(wish.to.shard)
        {
            self.spend(Verb::Switchover, &wish.token);
        }
        if !decision.effects.is_empty() {
            self.pending.insert(record.seq, Pending { decision: decision.clone(), epoch: record.epoch });
        }
    }

    /// True if the member's pod is being deleted, or its agent was told to end.
    pub fn is_leaving(&self, id: MemberId) -> bool {
        let Some(member) = self.members.get(&id) else { return false };
        let condemned = |p: &PodFacts| p.deleting || self.condemned.get(&id) == Some(&p.uid);
        member.facts.pod.present().is_some_and(condemned) || member.agent().is_some_and(|a| a.leaving)
    }

    /// The grants that are confirmed to holders who ask: those in force, of shards in which no promotion is on its way and
    /// nobody may have taken a higher grant unseen.
    pub fn confirmed(&self) -> impl Iterator<Item = (MemberId, Seq)> {
        let pending = |id: ShardId| {
            self.pending.values().any(|p| p.decision.scope == Scope::Shard(id) && p.decision.promotes())
        };
        let took = |id: &MemberId| {
            self.members.get(id).and_then(|m| m.server()).is_none_or(|s| s.role == ServerRole::Primary)
        };
        self.shards.iter().filter(move |(id, _)| !pending(**id)).filter_map(move |(_, shard)| {
            let (holder, grant) = shard.holder()?;
            let outbid = shard.grants.iter().any(|(id, seq)| *id != holder && *seq > grant && took(id));
            (!outbid).then_some((holder, grant))
        })
    }

    /// The open operation of this kind and scope.
    pub fn operation(&self, kind: OperationKind, scope: Scope) -> Option<&Operation> {
        self.operations.iter().find(|o| o.kind == kind && o.scope == scope)
    }

    /// Members of a shard, in order.
    pub fn members_of(&self, shard: ShardId) -> impl Iterator<Item = (MemberId, &MemberState)> {
        self.members
            .range(MemberId { shard, ordinal: 0 }..=MemberId { shard, ordinal: u16::MAX })
            .map(|(i, m)| (*i, m))
    }

    /// True if a decision of this scope and epoch has no recorded outcome yet.
    pub fn is_pending(&self, scope: Scope) -> bool {
        self.pending.values().any(|p| p.decision.scope == scope && p.epoch == self.epoch)
    }
}

/// The source and link of a server that answers as replica.
fn link_of(server: &Observed<ServerFacts>) -> Option<(&Source, Link)> {
    match &server.present()?.role {
        ServerRole::Primary => None,
        ServerRole::Replica { source, link } => Some((source, *link)),
    }
}

fn same_case<T>(a: &Observed<T>, b: &Observed<T>) -> bool {
    match (a, b) {
        (Observed::Unknown(_), Observed::Unknown(_))
        | (Observed::Absent, Observed::Absent)
        | (Observed::Present(_), Observed::Present(_)) => true,
        (Observed::Unknown(_) | Observed::Absent | Observed::Present(_), _) => false,
    }
}
