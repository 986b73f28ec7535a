//! What the operator sees of the world: facts and readings, as the real observer would bring them back.

use super::{
    objects::service_name,
    process::Process,
    world::{Pod, World},
};
use crate::{
    ids::{Digest, MemberId, ShardId, Timestamp},
    observation::{
        ContainerPhase, Evidence, MemberFacts, NodeHealth, ObjectFacts, ObjectRef, Observed, PodFacts,
        Reading, Seen, ServerFacts, ServerRole, Source, SpecFact, Why,
    },
    spec::DesiredCluster,
    state::ClusterState,
    steps::reshard::uncounted,
    weights::SlotWeights,
};
use std::collections::BTreeSet;

/// What a key takes in a story. Bytes.
const BYTES_A_KEY: u64 = 100;

impl World {
    /// What the operator sees when it looks at everything.
    /// `known` is what it knows from before: who is gone is looked for until that is known, too.
    pub fn look(&mut self, known: &ClusterState) -> Seen {
        let mut seen = Seen { spec: Some(SpecFact::Valid(self.spec.clone())), ..Seen::default() };
        if let Some(why) = &self.invalid {
            seen.spec = Some(SpecFact::Invalid(why.clone()));
        }
        if self.deleting {
            seen.spec = Some(SpecFact::Deleting);
        }
        let there = self.places.iter().filter(|(_, place)| place.pod.is_some()).map(|(id, _)| *id);
        let shards = known.shards_kept(self.spec.shards, self.now);
        let kept = DesiredCluster { shards, ..self.spec.clone() };
        let ids: BTreeSet<MemberId> =
            kept.members().chain(there).chain(known.members.keys().copied()).collect();
        let uncounted = uncounted(known);
        for id in ids {
            let (facts, reading) = self.look_at(id);
            let facts = MemberFacts { node: reading.as_ref().and_then(|_| self.node_facts(id)), ..facts };
            let Evidence { readings, last_answers } = &mut seen.evidence;
            if facts.agent.present().is_some() || reading.is_some() {
                self.greet(id);
                self.heard_at.insert(id, self.now());
            }
            if facts.server.is_unknown() {
                last_answers.extend(self.heard_at.get(&id).map(|at| (id, *at)));
            }
            let is_primary = facts.server.present().is_some_and(|s| s.role == ServerRole::Primary);
            if is_primary && uncounted.contains(&id) {
                let counts = self.keys_by_slot(id);
                let bytes = counts.iter().map(|(_, keys)| keys * BYTES_A_KEY).sum();
                let weights = self.tells_keys.then(|| SlotWeights::sum_up(&counts, bytes));
                seen.weights.insert(id, weights);
            }
            readings.extend(reading.map(|r| (id, r)));
            seen.members.insert(id, facts);
        }
        for shard in self.spec.shard_ids().filter(|_| !self.is_cluster()) {
            let route = self.routes.get(&shard).cloned().map_or(Observed::Absent, Observed::Present);
            seen.routes.insert(shard, route);
        }
        let all = self.wanted_objects(shards);
        // The Service of a member goes after its pod; until then it is told once, as it is.
        let running: BTreeSet<ObjectRef> =
            self.places.iter().filter(|(_, p)| p.pod.is_some()).map(|(id, _)| service_name(*id)).collect();
        for (object, facts) in known.objects.iter().filter(|(object, _)| !all.contains_key(*object)) {
            let live = self.live.get(object).map_or(Observed::Absent, |(l, _)| Observed::Present(l.clone()));
            let told = if !running.contains(object) {
                let (wanted, wanted_revision) = (Digest::default(), None);
                ObjectFacts { wanted, wanted_revision, shard: facts.shard, vital: false, surplus: true, live }
            } else if facts.live.is_unknown() {
                ObjectFacts { live, ..facts.clone() }
            } else {
                continue;
            };
            seen.objects.insert(object.clone(), told);
        }
        for (object, (wanted, wanted_revision, shard)) in all {
            let live = self.live.get(&object).map_or(Observed::Absent, |(l, _)| Observed::Present(l.clone()));
            seen.objects.insert(
                object,
                ObjectFacts { wanted, wanted_revision, shard, vital: false, surplus: false, live },
            );
        }
        seen
    }

    /// What keeps a pod from running, as soon as it does: the real observer waits a moment.
    fn trouble_of(&self, shard: ShardId, pod: &Pod) -> Option<String> {
        let is_waiting = pod.agent.is_none() && pod.deleted_at.is_none();
        let finds_no_place = self.unschedulable.contains(&shard) && pod.starts_at.is_none();
        let image = format!("ErrImagePull: {} is not found", pod.revision.0);
        match (is_waiting, self.broken.contains(&pod.revision), finds_no_place) {
            (true, true, _) => Some(image),
            (true, false, true) => Some("Unschedulable: no node takes it".to_owned()),
            (true, false, false) | (false, _, _) => None,
        }
    }

    fn look_at(&mut self, id: MemberId) -> (MemberFacts, Option<Reading>) {
        let (now, apart) = (self.now, self.is_apart(id));
        let replicas_online = self.processes().filter(|(_, p)| p.source == Some(Source::Member(id))).count();
        let Some(pod) = self.places.get(&id).and_then(|p| p.pod.as_ref()) else {
            let gone = MemberFacts {
                pod: Observed::Absent,
                server: Observed::Absent,
                agent: Observed::Absent,
                node: None,
            };
            return (gone, None);
        };
        let facts = PodFacts {
            uid: pod.uid.clone(),
            address: Some(pod.address.clone()),
            node: format!("node-{id}"),
            node_health: if self.not_ready.contains(&id) { NodeHealth::NotReady } else { NodeHealth::Ready },
            cordoned: pod.cordoned,
            deleting: pod.deleted_at.is_some(),
            revision: pod.revision.clone(),
            container: if pod.agent.is_some() {
                ContainerPhase::Running
            } else {
                ContainerPhase::Waiting(String::new())
            },
            role_label: pod.role_label,
            trouble: self.trouble_of(id.shard, pod),
        };
        let (server, reading) = match &pod.process {
            _ if apart => (Observed::Unknown(Why::Silent), None),
            None => (Observed::Absent, None),
            Some(p) if p.frozen => (Observed::Unknown(Why::Silent), None),
            Some(p) => {
                let (server, reading) =
                    answer(p, &self.release, now, u32::try_from(replicas_online).unwrap_or(u32::MAX));
                // Nobody asks for keys where there are no slots to move.
                let keys = self.is_cluster().then(|| self.keys(id));
                (server, reading.map(|r| Reading { keys, ..r }))
            }
        };
        let agent = match self.agent_facts(id).filter(|_| !apart) {
            Some(facts) => Observed::Present(facts),
            None if pod.agent.is_none() => Observed::Absent,
            None => Observed::Unknown(Why::Silent),
        };
        (MemberFacts { pod: Observed::Present(facts), server, agent, node: None }, reading)
    }
}

/// The answer of a server that is there.
fn answer(
    p: &Process,
    release: &str,
    now: Timestamp,
    replicas_online: u32,
) -> (Observed<ServerFacts>, Option<Reading>) {
    let role = match p.source.clone() {
        None => ServerRole::Primary,
        Some(source) => ServerRole::Replica { source, link: p.link },
    };
    let last_io_ms = p.source.is_some().then(|| now.millis_since(p.heard_at) / 1_000 * 1_000);
    let reading = Reading { taken_at: now, offset: p.offset, last_io_ms, replicas_online, keys: None };
    let (replid2, replid2_offset) = p.before.clone().unzip();
    let (run_id, version, replid) = (p.run_id.clone(), release.to_owned(), p.replid.clone());
    let loading = p.loads(now);
    let facts = ServerFacts { run_id, version, role, loading, replid, replid2, replid2_offset };
    (Observed::Present(facts), Some(reading))
}
