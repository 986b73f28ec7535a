//! Pods, servers, write routes and owned objects, as far as decisions can tell. Observed by `look`, changed by `execute`
//! (the operator), by the story (faults, users) and by time.

use super::process::Process;
use crate::{
    effect::{Effect, Outcome, Server},
    ids::{Digest, MemberId, ReplId, ShardId, Timestamp},
    observation::{
        ContainerPhase, Evidence, LiveObject, MemberFacts, NodeHealth, ObjectFacts, ObjectKind, ObjectRef,
        Observed, PodFacts, Reading, RoleLabel, RouteFacts, Seen, ServerFacts, ServerRole, Source, SpecFact,
        Why,
    },
    spec::{DesiredCluster, Profile},
};
use std::collections::{BTreeMap, BTreeSet};

/// Resolution of time. Milliseconds.
const TICK_MS: i64 = 50;
/// From a pod's creation to its server at the gate. Milliseconds.
const POD_START_MS: i64 = 500;
/// From a killed process to its successor in the same pod, as kubelet does it the first time. Milliseconds.
const RESTART_MS: i64 = 300;
/// The same from the second kill on. Milliseconds.
const BACK_OFF_MS: i64 = 5_000;

#[derive(Clone, Debug)]
struct Pod {
    uid: String,
    address: String,
    revision: Digest,
    deleted_at: Option<Timestamp>,
    starts_at: Option<Timestamp>,
    process: Option<Process>,
    role_label: Option<RoleLabel>,
    kills: u32,
}

#[derive(Clone, Debug, Default)]
struct Place {
    pod: Option<Pod>,
    disk: Option<(ReplId, Vec<u64>)>,
    free_since: Timestamp,
}

/// The world of one cluster.
#[derive(Clone, Debug)]
pub struct World {
    now: Timestamp,
    /// The user's wish.
    pub spec: DesiredCluster,
    /// Why the resource is refused, if the story says so.
    pub invalid: Option<String>,
    /// Digest of the wanted pod template.
    pub revision: Digest,
    /// Templates whose pods never start.
    pub broken: BTreeSet<Digest>,
    places: BTreeMap<MemberId, Place>,
    silent_nodes: BTreeSet<MemberId>,
    routes: BTreeMap<ShardId, RouteFacts>,
    live: BTreeMap<ObjectRef, (LiveObject, u16)>,
    acked: BTreeMap<ShardId, BTreeSet<u64>>,
    counter: u64,
    released: bool,
}

impl World {
    /// An empty namespace in which a user has just created the resource.
    pub fn new(spec: DesiredCluster) -> Self {
        World {
            now: Timestamp(1_767_225_600_000_000_000),
            spec,
            invalid: None,
            revision: Digest("rev-1".into()),
            broken: BTreeSet::new(),
            places: BTreeMap::new(),
            silent_nodes: BTreeSet::new(),
            routes: BTreeMap::new(),
            live: BTreeMap::new(),
            acked: BTreeMap::new(),
            counter: 0,
            released: false,
        }
    }

    /// The clock.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// True once the finalizer is off.
    pub fn is_released(&self) -> bool {
        self.released
    }

    fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Lets time pass until `to`.
    pub fn advance(&mut self, to: Timestamp) {
        while self.now < to {
            self.now = self.now.plus_millis(TICK_MS).min(to);
            self.schedule();
            self.terminate();
            self.start();
            self.replicate(&BTreeSet::new());
        }
    }

    /// The StatefulSet controller: missing pods come, surplus pods go.
    fn schedule(&mut self) {
        for shard in 0..self.spec.shards.max(1) {
            let Some((sts, replicas)) = self.live.get(&sts_name(ShardId(shard))).cloned() else {
                continue;
            };
            for ordinal in 0..=replicas {
                let (number, now) = (self.counter + 1, self.now);
                let place = self.places.entry(MemberId::new(shard, ordinal)).or_default();
                if place.pod.is_none() && now >= place.free_since {
                    self.counter = number;
                    place.pod = Some(Pod {
                        uid: format!("pod-{number}"),
                        address: format!("10.0.0.{number}"),
                        revision: sts.revision.clone().unwrap_or_default(),
                        deleted_at: None,
                        starts_at: Some(now.plus_millis(POD_START_MS)),
                        process: None,
                        role_label: None,
                        kills: 0,
                    });
                }
            }
            let now = self.now;
            for (id, place) in self
                .places
                .iter_mut()
                .filter(|(id, _)| id.shard.0 == shard && id.ordinal > replicas)
            {
                if let Some(pod) = place.pod.as_mut().filter(|p| p.deleted_at.is_none()) {
                    pod.deleted_at = Some(now);
                }
                let _ = id;
            }
        }
    }

    /// The kubelet ends deleted pods, unless their node is silent.
    fn terminate(&mut self) {
        let (now, durable) = (self.now, self.spec.profile == Profile::Durable);
        for (id, place) in &mut self.places {
            let due = place
                .pod
                .as_ref()
                .and_then(|p| p.deleted_at)
                .is_some_and(|at| now >= at);
            if !due || self.silent_nodes.contains(id) {
                continue;
            }
            if let Some(process) = place.pod.take().and_then(|p| p.process).filter(|_| durable) {
                place.disk = Some((ReplId(format!("aof-{}", process.run_id)), process.writes));
            }
            place.free_since = now;
        }
    }

    fn start(&mut self) {
        let now = self.now;
        let due: Vec<MemberId> = self
            .places
            .iter()
            .filter(|(_, p)| {
                p.pod
                    .as_ref()
                    .and_then(|p| p.starts_at)
                    .is_some_and(|at| now >= at)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let run_id = format!("run-{}", self.count());
            let Some(place) = self.places.get_mut(&id) else {
                continue;
            };
            let disk = place.disk.clone();
            let Some(pod) = place.pod.as_mut().filter(|p| !self.broken.contains(&p.revision)) else {
                continue;
            };
            pod.starts_at = None;
            pod.process = Some(Process::at_gate(run_id, disk, now));
        }
    }

    fn replicate(&mut self, lagging: &BTreeSet<MemberId>) {
        let sources: BTreeMap<MemberId, Process> = self
            .places
            .iter()
            .filter_map(|(id, p)| Some((*id, p.pod.as_ref()?.process.clone()?)))
            .collect();
        let (now, silent) = (self.now, self.silent_nodes.clone());
        for (id, process) in self
            .processes()
            .filter(|(id, p)| !p.frozen && !lagging.contains(id))
        {
            let Some(Source::Member(of)) = process.source.clone() else {
                continue;
            };
            match sources.get(&of) {
                Some(source) if source.frozen || silent.contains(&of) || silent.contains(&id) => {}
                Some(source) if source.is_primary() => process.talk(source, now),
                Some(_) | None => process.lose_link(),
            }
        }
    }

    fn processes(&mut self) -> impl Iterator<Item = (MemberId, &mut Process)> {
        self.places
            .iter_mut()
            .filter_map(|(id, p)| Some((*id, p.pod.as_mut()?.process.as_mut()?)))
    }

    fn process(&mut self, id: MemberId) -> Option<&mut Process> {
        self.places.get_mut(&id)?.pod.as_mut()?.process.as_mut()
    }

    /// A client writes `n` times through the write Service of a shard; replicas but the lagging ones have it at once. Returns
    /// how many writes were acknowledged.
    pub fn write(&mut self, shard: ShardId, n: u64, lagging: &BTreeSet<MemberId>) -> u64 {
        let mut acked = 0;
        for _ in 0..n {
            let number = self.count();
            let Some(address) = self.routes.get(&shard).and_then(|r| r.address.clone()) else {
                continue;
            };
            let silent = self.silent_nodes.clone();
            let target = self.places.iter_mut().find_map(|(id, p)| {
                let pod = p
                    .pod
                    .as_mut()
                    .filter(|p| p.address == address && !silent.contains(id))?;
                pod.process.as_mut().filter(|p| p.is_primary() && !p.frozen)
            });
            if let Some(primary) = target {
                primary.writes.push(number);
                primary.offset += 1;
                self.acked.entry(shard).or_default().insert(number);
                acked += 1;
            }
            self.replicate(lagging);
        }
        acked
    }

    /// Acknowledged writes of a shard that `member` does not have.
    pub fn lost(&mut self, member: MemberId) -> usize {
        let acked = self.acked.get(&member.shard).cloned().unwrap_or_default();
        let has: BTreeSet<u64> = self
            .process(member)
            .map(|p| p.writes.iter().copied().collect())
            .unwrap_or_default();
        acked.difference(&has).count()
    }

    /// The members that are primary right now.
    pub fn primaries(&mut self, shard: ShardId) -> Vec<MemberId> {
        self.processes()
            .filter(|(id, p)| id.shard == shard && p.is_primary())
            .map(|(id, _)| id)
            .collect()
    }

    /// The member that the write Service of a shard lists.
    pub fn routed(&self, shard: ShardId) -> Option<MemberId> {
        let address = self.routes.get(&shard)?.address.as_ref()?;
        self.places
            .iter()
            .find(|(_, p)| p.pod.as_ref().is_some_and(|p| p.address == *address))
            .map(|(id, _)| *id)
    }

    /// SIGKILL of a member's server.
    pub fn kill(&mut self, id: MemberId) -> Result<(), String> {
        let (now, durable) = (self.now, self.spec.profile == Profile::Durable);
        let place = self.places.get_mut(&id).ok_or("no such member")?;
        let pod = place.pod.as_mut().ok_or("it has no pod")?;
        let process = pod.process.take().ok_or("it runs no server")?;
        if durable {
            place.disk = Some((ReplId(format!("aof-{}", process.run_id)), process.writes));
        }
        pod.kills += 1;
        pod.starts_at = Some(now.plus_millis(if pod.kills > 1 { BACK_OFF_MS } else { RESTART_MS }));
        Ok(())
    }

    /// SIGSTOP or SIGCONT of a member's server.
    pub fn set_frozen(&mut self, id: MemberId, frozen: bool) -> Result<(), String> {
        self.process(id).ok_or("it runs no server")?.frozen = frozen;
        Ok(())
    }

    /// The node of a member stops talking: kubelet, pods and all.
    pub fn set_node_silent(&mut self, id: MemberId, silent: bool) {
        if silent {
            self.silent_nodes.insert(id)
        } else {
            self.silent_nodes.remove(&id)
        };
    }

    /// A user deletes a pod.
    pub fn delete_pod(&mut self, id: MemberId) -> Result<(), String> {
        let now = self.now;
        self.places
            .get_mut(&id)
            .and_then(|p| p.pod.as_mut())
            .ok_or("it has no pod")?
            .deleted_at = Some(now);
        Ok(())
    }

    /// A member's volume is lost (it matters from the next start on).
    pub fn wipe(&mut self, id: MemberId) {
        self.places.entry(id).or_default().disk = None;
    }

    /// A person sends REPLICAOF NO ONE to one member and REPLICAOF it to all others of the shard.
    pub fn promote_by_hand(&mut self, id: MemberId) -> Result<(), String> {
        self.process(id).ok_or("it runs no server")?.promote();
        for (other, process) in self.processes().filter(|(o, _)| o.shard == id.shard && *o != id) {
            let _ = other;
            process.follow(id);
        }
        Ok(())
    }

    /// Someone edits an owned object.
    pub fn edit_object(&mut self, object: &ObjectRef, manager: &str) -> Result<(), String> {
        let (live, _) = self.live.get_mut(object).ok_or("there is no such object")?;
        live.digest = Digest("edited".into());
        live.foreign_manager = Some(manager.to_owned());
        Ok(())
    }

    fn wanted_objects(&self) -> BTreeMap<ObjectRef, (Digest, Option<Digest>, Option<ShardId>)> {
        let mut all = BTreeMap::new();
        for shard in self.spec.shard_ids() {
            all.insert(slice_name(shard), (Digest("slice".into()), None, Some(shard)));
            let digest = Digest(format!("sts-{}-{}", self.spec.replicas_per_shard, self.revision));
            all.insert(
                sts_name(shard),
                (digest, Some(self.revision.clone()), Some(shard)),
            );
        }
        all
    }

    /// What the operator sees when it looks at everything.
    pub fn look(&mut self) -> Seen {
        let mut seen = Seen {
            spec: Some(SpecFact::Valid(self.spec.clone())),
            ..Seen::default()
        };
        if let Some(why) = &self.invalid {
            seen.spec = Some(SpecFact::Invalid(why.clone()));
        }
        let ids: BTreeSet<MemberId> = self.spec.members().chain(self.places.keys().copied()).collect();
        for id in ids {
            let (facts, reading) = self.look_at(id);
            seen.members.insert(id, facts);
            if let Some(reading) = reading {
                let Evidence { readings } = &mut seen.evidence;
                readings.insert(id, reading);
            }
        }
        for shard in self.spec.shard_ids() {
            let route = self
                .routes
                .get(&shard)
                .cloned()
                .map_or(Observed::Absent, Observed::Present);
            seen.routes.insert(shard, route);
        }
        for (object, (wanted, wanted_revision, shard)) in self.wanted_objects() {
            let live = self
                .live
                .get(&object)
                .map_or(Observed::Absent, |(l, _)| Observed::Present(l.clone()));
            seen.objects.insert(
                object,
                ObjectFacts {
                    wanted,
                    wanted_revision,
                    shard,
                    live,
                },
            );
        }
        seen
    }

    fn look_at(&mut self, id: MemberId) -> (MemberFacts, Option<Reading>) {
        let (now, node_silent) = (self.now, self.silent_nodes.contains(&id));
        let replicas_online = self
            .processes()
            .filter(|(_, p)| p.source == Some(Source::Member(id)))
            .count();
        let Some(pod) = self.places.get(&id).and_then(|p| p.pod.as_ref()) else {
            return (
                MemberFacts {
                    pod: Observed::Absent,
                    server: Observed::Absent,
                },
                None,
            );
        };
        let facts = PodFacts {
            uid: pod.uid.clone(),
            address: Some(pod.address.clone()),
            node: format!("node-{id}"),
            node_health: if node_silent {
                NodeHealth::NotReady
            } else {
                NodeHealth::Ready
            },
            deleting: pod.deleted_at.is_some(),
            revision: pod.revision.clone(),
            container: if pod.process.is_some() {
                ContainerPhase::Running
            } else {
                ContainerPhase::Waiting(String::new())
            },
            role_label: pod.role_label,
        };
        let (server, reading) = match &pod.process {
            _ if node_silent => (Observed::Unknown(Why::Silent), None),
            None => (Observed::Absent, None),
            Some(p) if p.frozen => (Observed::Unknown(Why::Silent), None),
            Some(p) => {
                let role = match p.source.clone() {
                    None => ServerRole::Primary,
                    Some(source) => ServerRole::Replica { source, link: p.link },
                };
                let reading = Reading {
                    taken_at: now,
                    offset: p.offset,
                    last_io_ms: p
                        .source
                        .is_some()
                        .then(|| now.millis_since(p.heard_at) / 1_000 * 1_000),
                    replicas_online: u32::try_from(replicas_online).unwrap_or(u32::MAX),
                };
                let (replid2, replid2_offset) = p.before.clone().unzip();
                let (run_id, version, replid) = (p.run_id.clone(), "9.1.2".to_owned(), p.replid.clone());
                let facts = ServerFacts {
                    run_id,
                    version,
                    role,
                    loading: false,
                    replid,
                    replid2,
                    replid2_offset,
                };
                (Observed::Present(facts), Some(reading))
            }
        };
        (
            MemberFacts {
                pod: Observed::Present(facts),
                server,
            },
            reading,
        )
    }

    /// Does one effect, checking its precondition as the real executor does.
    pub fn execute(&mut self, effect: &Effect) -> Outcome {
        match effect {
            Effect::Promote {
                server,
                replid,
                offset,
            } => match self.reach(server) {
                Err(outcome) => outcome,
                Ok(p) if p.is_primary() => Outcome::Superseded("it is primary already".into()),
                Ok(p) if p.replid != *replid || p.offset < *offset => {
                    Outcome::Superseded("other history".into())
                }
                Ok(p) => {
                    p.promote();
                    Outcome::Verified
                }
            },
            Effect::Attach {
                server,
                to,
                to_address: _,
            } => match self.reach(server) {
                Err(outcome) => outcome,
                Ok(p) => {
                    p.follow(*to);
                    Outcome::Verified
                }
            },
            Effect::Handover {
                from,
                to,
                timeout_ms: _,
            } => self.hand_over(from, to),
            Effect::Route {
                shard,
                to: _,
                address,
                resource_version,
            } => {
                let number = self.count();
                match self.routes.get_mut(shard) {
                    Some(route) if route.resource_version == *resource_version => {
                        *route = RouteFacts {
                            address: Some(address.clone()),
                            resource_version: format!("rv-{number}"),
                        };
                        Outcome::Verified
                    }
                    Some(_) | None => Outcome::Superseded("resourceVersion moved on".into()),
                }
            }
            Effect::Label {
                member,
                pod_uid,
                role,
            } => self.with_pod(*member, pod_uid, |p| p.role_label = Some(*role)),
            Effect::Disconnect { server } => self.reach(server).map_or_else(|o| o, |_| Outcome::Verified),
            Effect::DeletePod {
                member,
                pod_uid,
                grace_s,
            } => {
                let at = self
                    .now
                    .plus_millis(grace_s.map_or(200, |s| i64::from(s) * 1_000));
                self.with_pod(*member, pod_uid, |p| {
                    p.deleted_at = Some(p.deleted_at.unwrap_or(at))
                })
            }
            Effect::Apply { object, digest } => self.apply(object, digest),
            Effect::ReleaseFinalizer => {
                self.released = true;
                Outcome::Verified
            }
        }
    }

    fn reach(&mut self, server: &Server) -> Result<&mut Process, Outcome> {
        let silent = self.silent_nodes.contains(&server.member);
        let process = self.process(server.member).filter(|p| !p.frozen && !silent);
        let process = process.ok_or_else(|| Outcome::Failed("no answer".into()))?;
        if process.run_id == server.run_id {
            Ok(process)
        } else {
            Err(Outcome::Superseded("another process".into()))
        }
    }

    fn with_pod(&mut self, id: MemberId, uid: &str, change: impl FnOnce(&mut Pod)) -> Outcome {
        match self.places.get_mut(&id).and_then(|p| p.pod.as_mut()) {
            Some(pod) if pod.uid == uid => {
                change(pod);
                Outcome::Verified
            }
            Some(_) | None => Outcome::Superseded("another pod".into()),
        }
    }

    fn hand_over(&mut self, from: &Server, to: &Server) -> Outcome {
        let source = match self.reach(from) {
            Ok(p) if p.is_primary() => p.clone(),
            Ok(_) => return Outcome::Superseded("it is not primary".into()),
            Err(outcome) => return outcome,
        };
        let now = self.now;
        match self.reach(to) {
            Ok(p) => {
                p.talk(&source, now);
                p.promote();
            }
            Err(outcome) => return outcome,
        }
        let target = to.member;
        if let Some(old) = self.process(from.member) {
            old.follow(target);
        }
        self.replicate(&BTreeSet::new());
        Outcome::Verified
    }

    fn apply(&mut self, object: &ObjectRef, digest: &Digest) -> Outcome {
        let Some((wanted, revision, shard)) = self.wanted_objects().remove(object) else {
            return Outcome::Superseded("no longer wanted".into());
        };
        if wanted != *digest {
            return Outcome::Superseded("renders to something else now".into());
        }
        let number = self.count();
        if let (ObjectKind::EndpointSlice, Some(shard)) = (object.kind, shard) {
            let fresh = RouteFacts {
                address: None,
                resource_version: format!("rv-{number}"),
            };
            self.routes.entry(shard).or_insert(fresh);
        }
        let live = LiveObject {
            uid: format!("uid-{number}"),
            digest: wanted,
            revision,
            foreign_manager: None,
        };
        self.live
            .insert(object.clone(), (live, self.spec.replicas_per_shard));
        Outcome::Verified
    }
}

fn sts_name(shard: ShardId) -> ObjectRef {
    ObjectRef {
        kind: ObjectKind::StatefulSet,
        name: format!("story-{shard}"),
    }
}

fn slice_name(shard: ShardId) -> ObjectRef {
    ObjectRef {
        kind: ObjectKind::EndpointSlice,
        name: format!("story-primary-{shard}"),
    }
}
