//! Pods, servers, write routes and owned objects, as far as decisions can tell. Observed by `look`, changed by `execute`
//! (the operator), by the story (faults, users) and by time.

use super::process::Process;
use crate::{
    ids::{Digest, MemberId, ReplId, ShardId, Timestamp},
    observation::{LiveObject, ObjectKind, ObjectRef, RoleLabel, RouteFacts, Source},
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
pub(super) struct Pod {
    pub(super) uid: String,
    pub(super) address: String,
    pub(super) revision: Digest,
    pub(super) deleted_at: Option<Timestamp>,
    pub(super) starts_at: Option<Timestamp>,
    pub(super) process: Option<Process>,
    pub(super) role_label: Option<RoleLabel>,
    pub(super) kills: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub(super) pod: Option<Pod>,
    pub(super) disk: Option<(ReplId, Vec<u64>)>,
    pub(super) free_since: Timestamp,
}

/// The world of one cluster.
#[derive(Clone, Debug)]
pub struct World {
    pub(super) now: Timestamp,
    /// The user's wish.
    pub spec: DesiredCluster,
    /// True once the user has deleted the resource.
    pub deleting: bool,
    /// Why the resource is refused, if the story says so.
    pub invalid: Option<String>,
    /// Digest of the wanted pod template.
    pub revision: Digest,
    /// Templates whose pods never start.
    pub broken: BTreeSet<Digest>,
    pub(super) places: BTreeMap<MemberId, Place>,
    pub(super) silent_nodes: BTreeSet<MemberId>,
    pub(super) cut: BTreeSet<MemberId>,
    pub(super) routes: BTreeMap<ShardId, RouteFacts>,
    pub(super) live: BTreeMap<ObjectRef, (LiveObject, u16)>,
    pub(super) acked: BTreeMap<ShardId, BTreeSet<u64>>,
    pub(super) counter: u64,
    pub(super) released: bool,
}

impl World {
    /// An empty namespace in which a user has just created the resource.
    pub fn new(spec: DesiredCluster) -> Self {
        World {
            now: Timestamp(1_767_225_600_000_000_000),
            spec,
            deleting: false,
            invalid: None,
            revision: Digest("rev-1".into()),
            broken: BTreeSet::new(),
            places: BTreeMap::new(),
            silent_nodes: BTreeSet::new(),
            cut: BTreeSet::new(),
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

    pub(super) fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// Lets a moment pass in which nothing happens. Milliseconds.
    pub fn pass(&mut self, millis: i64) {
        self.now = self.now.plus_millis(millis);
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
            for (id, place) in
                self.places.iter_mut().filter(|(id, _)| id.shard.0 == shard && id.ordinal > replicas)
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
            let due = place.pod.as_ref().and_then(|p| p.deleted_at).is_some_and(|at| now >= at);
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
            .filter(|(_, p)| p.pod.as_ref().and_then(|p| p.starts_at).is_some_and(|at| now >= at))
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

    pub(super) fn replicate(&mut self, lagging: &BTreeSet<MemberId>) {
        let sources: BTreeMap<MemberId, Process> =
            self.places.iter().filter_map(|(id, p)| Some((*id, p.pod.as_ref()?.process.clone()?))).collect();
        let (now, silent, cut) = (self.now, self.silent_nodes.clone(), self.cut.clone());
        for (id, process) in self.processes().filter(|(id, p)| !p.frozen && !lagging.contains(id)) {
            let Some(Source::Member(of)) = process.source.clone() else {
                continue;
            };
            match sources.get(&of).filter(|_| !cut.contains(&id)) {
                Some(source) if source.frozen || silent.contains(&of) || silent.contains(&id) => {}
                Some(source) if source.is_primary() => process.talk(source, now),
                Some(_) | None => process.lose_link(),
            }
        }
    }

    pub(super) fn processes(&mut self) -> impl Iterator<Item = (MemberId, &mut Process)> {
        self.places.iter_mut().filter_map(|(id, p)| Some((*id, p.pod.as_mut()?.process.as_mut()?)))
    }

    pub(super) fn process(&mut self, id: MemberId) -> Option<&mut Process> {
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
                let pod = p.pod.as_mut().filter(|p| p.address == address && !silent.contains(id))?;
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
        let has: BTreeSet<u64> =
            self.process(member).map(|p| p.writes.iter().copied().collect()).unwrap_or_default();
        acked.difference(&has).count()
    }

    /// The members that are primary right now.
    pub fn primaries(&mut self, shard: ShardId) -> Vec<MemberId> {
        self.processes().filter(|(id, p)| id.shard == shard && p.is_primary()).map(|(id, _)| id).collect()
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

    /// A replica's link to its source is cut, or healed.
    pub fn set_cut(&mut self, id: MemberId, cut: bool) {
        if cut {
            self.cut.insert(id)
        } else {
            self.cut.remove(&id)
        };
    }

    /// A user deletes a pod.
    pub fn delete_pod(&mut self, id: MemberId) -> Result<(), String> {
        let now = self.now;
        self.places.get_mut(&id).and_then(|p| p.pod.as_mut()).ok_or("it has no pod")?.deleted_at = Some(now);
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

    pub(super) fn wanted_objects(&self) -> BTreeMap<ObjectRef, (Digest, Option<Digest>, Option<ShardId>)> {
        let mut all = BTreeMap::new();
        for shard in self.spec.shard_ids() {
            all.insert(slice_name(shard), (Digest("slice".into()), None, Some(shard)));
            let digest = Digest(format!("sts-{}-{}", self.spec.replicas_per_shard, self.revision));
            all.insert(sts_name(shard), (digest, Some(self.revision.clone()), Some(shard)));
        }
        all
    }
}

fn sts_name(shard: ShardId) -> ObjectRef {
    ObjectRef { kind: ObjectKind::StatefulSet, name: format!("story-{shard}") }
}

fn slice_name(shard: ShardId) -> ObjectRef {
    ObjectRef { kind: ObjectKind::EndpointSlice, name: format!("story-primary-{shard}") }
}
