//! What is known of one cluster: a fold over its journal and nothing else.

use crate::{
    decision::{Decision, Operation, OperationChange, OperationKind, Scope, Standing},
    effect::{Effect, Outcome},
    event::{Event, Record},
    ids::{MemberId, ReplId, Seq, ShardId, Timestamp, WriterEpoch},
    observation::{
        Executed, MemberFacts, ObjectFacts, ObjectRef, Observed, RouteFacts, ServerFacts, ServerRole, Source,
        SpecFact, Why,
    },
    spec::DesiredCluster,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What is known of a member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Facts as last seen in this epoch.
    pub facts: MemberFacts,
    /// Since when the server is Unknown, Absent or Present (whichever it is), within this epoch.
    pub server_since: Timestamp,
    /// Since when the pod is what it is, within this epoch.
    pub pod_since: Timestamp,
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

    /// True if the server answers and is known to have no data: it started blank and is still on the history it drew then.
    pub fn is_blank(&self) -> bool {
        let drawn = |s: &ServerFacts| {
            self.blank_start.as_ref().is_some_and(|(run, replid)| *run == s.run_id && *replid == s.replid)
        };
        self.server().is_some_and(|s| s.role != ServerRole::Primary && drawn(s))
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
    /// Grants given: sequence of the latest deciding record that made the member primary. The highest is in force.
    pub grants: BTreeMap<MemberId, Seq>,
    /// The history (replication id) of the last primary seen with the highest grant. Only ever used to refuse.
    pub history: Option<ReplId>,
    /// The history that `history` continued when that primary was promoted.
    #[serde(default)]
    pub parent_history: Option<ReplId>,
    /// Where the write Service points.
    pub route: Observed<RouteFacts>,
}

impl ShardState {
    /// True if a primary with the highest grant was ever seen to serve: from then on, emptiness is a loss and no beginning.
    pub fn has_served(&self) -> bool {
        self.history.is_some()
    }

    /// The member with the highest grant and that grant.
    pub fn holder(&self) -> Option<(MemberId, Seq)> {
        self.grants.iter().max_by_key(|(_, seq)| **seq).map(|(id, seq)| (*id, *seq))
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
    /// Owned objects as last seen in this epoch.
    pub objects: BTreeMap<ObjectRef, ObjectFacts>,
    /// Operations under way.
    pub operations: Vec<Operation>,
    /// Decisions without recorded outcome.
    pub pending: BTreeMap<Seq, Pending>,
    /// Pods whose deletion was accepted, by UID: they are on their way out, whatever a slow watch still shows of them.
    #[serde(default)]
    pub condemned: BTreeMap<MemberId, String>,
    /// Switchover tokens that were served or refused for good.
    pub spent_tokens: BTreeSet<String>,
    /// Effects that failed since they last succeeded, by `(scope, verb)`: count and time of the last, for back-off.
    pub failures: BTreeMap<String, (u32, Timestamp)>,
    /// What is waited for and what is blocked.
    pub standing: Standing,
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
            Event::EpochStarted { writer: _, version: _ } => self.forget_observations(record.time),
            Event::SpecChanged(SpecFact::Valid(spec)) => {
                self.spec_seen = true;
                self.spec = Some(spec.clone());
                self.spec_error = None;
            }
            Event::SpecChanged(SpecFact::Invalid(why)) => {
                self.spec_seen = true;
                self.spec_error = Some(why.clone());
            }
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
            }
            Event::ServerChanged { member, server } => self.apply_server(*member, server, record.time),
            Event::RouteChanged { shard, route } => {
                self.shards.entry(*shard).or_default().route = route.clone()
            }
            Event::ObjectChanged { object, facts } => {
                self.objects.insert(object.clone(), facts.clone());
            }
            Event::Decided { decision, evidence: _ } => self.apply_decision(record, decision),
            Event::EffectsEnded(executed) => self.apply_outcomes(executed),
            Event::DecisionClosed { decision, how: _ } => {
                self.pending.remove(decision);
            }
            Event::StandingChanged { standing, evidence: _ } => self.standing = standing.clone(),
        }
    }

    fn forget_observations(&mut self, now: Timestamp) {
        self.epoch_since = now;
        self.spec_seen = false;
        for member in self.members.values_mut() {
            member.facts = MemberFacts::default();
            (member.server_since, member.pod_since) = (now, now);
        }
        for shard in self.shards.values_mut() {
            shard.route = Observed::Unknown(Why::NotLooked);
        }
        for object in self.objects.values_mut() {
            object.live = Observed::Unknown(Why::NotLooked);
        }
        self.failures.clear();
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
        known.facts.server = server.clone();
        self.note_history(id.shard);
    }

    /// The history of the member that holds the grant, while it is seen to be primary, is the shard's.
    fn note_history(&mut self, id: ShardId) {
        let Some(shard) = self.shards.get_mut(&id) else { return };
        let holder =
            shard.holder().and_then(|(holder, _)| self.members.get(&holder)).filter(|m| m.is_primary());
        if let Some(facts) = holder.and_then(|m| m.server()) {
            shard.history = Some(facts.replid.clone());
            shard.parent_history.clone_from(&facts.replid2);
        }
    }

    fn apply_decision(&mut self, record: &Record, decision: &Decision) {
        if let (Some(member), Scope::Shard(shard)) = (decision.grant, decision.scope) {
            self.shards.entry(shard).or_default().grants.insert(member, record.seq);
            self.note_history(shard);
        }
        match &decision.operation {
            Some(OperationChange::Open { kind, phase, asked_by, member }) => {
                self.operations.push(Operation {
                    id: record.seq,
                    kind: *kind,
                    scope: decision.scope,
                    phase: *phase,
                    asked_by: asked_by.clone(),
                    member: *member,
                    cause: decision.reason,
                    opened_at: record.time,
                    phase_since: record.time,
                })
            }
            Some(OperationChange::Advance { kind, phase, member }) => {
                if let Some(op) =
                    self.operations.iter_mut().find(|o| o.kind == *kind && o.scope == decision.scope)
                {
                    (op.phase, op.member, op.phase_since) = (*phase, *member, record.time);
                }
            }
            Some(OperationChange::Close { kind }) => {
                let closed = |o: &Operation| o.kind == *kind && o.scope == decision.scope;
                for op in self.operations.iter().filter(|o| closed(o)) {
                    self.spent_tokens.insert(op.asked_by.clone());
                }
                self.operations.retain(|o| !closed(o));
            }
            None => {}
        }
        // A wish that is fulfilled or given up must not come true again after a later failover.
        let closes_switchover =
            decision.operation == Some(OperationChange::Close { kind: OperationKind::Switchover });
        if let (true, Some(wish)) =
            (closes_switchover, self.spec.as_ref().and_then(|s| s.switchover.as_ref()))
            && decision.scope == Scope::Shard(wish.to.shard)
        {
            self.spent_tokens.insert(wish.token.clone());
        }
        if !decision.effects.is_empty() {
            self.pending.insert(record.seq, Pending { decision: decision.clone(), epoch: record.epoch });
        }
    }

    fn apply_outcomes(&mut self, executed: &Executed) {
        let Some(Pending { decision, epoch: _ }) = self.pending.remove(&executed.decision) else {
            return;
        };
        for (effect, (at, outcome)) in decision.effects.iter().zip(&executed.outcomes) {
            let key = failure_key(decision.scope, effect);
            match outcome {
                Outcome::Verified => {
                    self.failures.remove(&key);
                    self.released |= matches!(effect, Effect::ReleaseFinalizer);
                    if let Effect::DeletePod { member, pod_uid, grace_s: _ } = effect {
                        self.condemned.insert(*member, pod_uid.clone());
                    }
                }
                Outcome::Failed(_) | Outcome::Superseded(_) => {
                    let (count, last) = self.failures.entry(key).or_default();
                    (*count, *last) = (count.saturating_add(1), *at);
                }
                Outcome::Skipped => {}
            }
        }
    }

    /// True if the member's pod is being deleted.
    pub fn is_leaving(&self, id: MemberId) -> bool {
        let pod = self.members.get(&id).and_then(|m| m.facts.pod.present());
        pod.is_some_and(|p| p.deleting || self.condemned.get(&id) == Some(&p.uid))
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

/// Key under which repeated failures of an effect are counted.
pub fn failure_key(scope: Scope, effect: &Effect) -> String {
    match effect {
        Effect::Apply { object, .. } => format!("{scope}/apply/{object}"),
        Effect::Attach { server, .. } => format!("{scope}/attach/{}", server.member),
        Effect::Label { member, .. } => format!("{scope}/label/{member}"),
        Effect::Promote { .. }
        | Effect::Handover { .. }
        | Effect::Route { .. }
        | Effect::Disconnect { .. }
        | Effect::DeletePod { .. }
        | Effect::ReleaseFinalizer => format!("{scope}/{}", effect.verb()),
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
