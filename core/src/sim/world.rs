//! Pods, servers, write routes and owned objects, as far as decisions can tell. Observed by `look`, changed by `execute`
//! (the operator), by the story (faults, users) and by time.

use super::{
    agent::{Agent, Post, history},
    by_key::ByKey,
    gossip::{Node, Settled},
    network::reach,
    objects::sts_name,
    process::Process,
    reshard::Job,
};
use crate::{
    agent::Ledger,
    ids::{Digest, MemberId, NodeId, ReplId, Seq, ShardId, Timestamp},
    observation::{LiveObject, ObjectRef, RoleLabel, RouteFacts, Source},
    slots::SlotSet,
    spec::{DesiredCluster, Profile},
};
use std::collections::{BTreeMap, BTreeSet};

/// Resolution of time. Milliseconds.
const TICK_MS: i64 = 50;
/// From a pod's creation to its server at the gate. Milliseconds.
const POD_START_MS: i64 = 500;
/// From a killed process to its successor, started by the agent. Milliseconds.
const RESTART_MS: i64 = 100;
/// How long an agent that was told to end waits for the operator to hand over. Milliseconds.
const HANDOVER_WAIT_MS: i64 = 5_000;
/// When every story begins: 2026-01-01.
const BEGINNING: Timestamp = Timestamp(1_767_225_600_000_000_000);

#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) uid: String,
    pub(super) address: String,
    pub(super) revision: Digest,
    pub(super) deleted_at: Option<Timestamp>,
    pub(super) starts_at: Option<Timestamp>,
    pub(super) process: Option<Process>,
    pub(super) role_label: Option<RoleLabel>,
    pub(super) agent: Option<Agent>,
    /// The whole pod is stopped, agent and all, as in a frozen machine.
    pub(super) frozen: bool,
    /// The settings that its server began with or took since.
    pub(super) settings: Option<Digest>,
    /// Its node takes no new pods. The next pod of this member is on another.
    pub(super) cordoned: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub(super) pod: Option<Pod>,
    pub(super) disk: Option<(ReplId, Vec<u64>)>,
    pub(super) free_since: Timestamp,
    /// What the agents of this member remember, on the volume.
    pub(super) ledger: Ledger,
    /// Its node in a Valkey Cluster: nodes.conf, on the volume.
    pub(super) node: Option<Node>,
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
    /// True once the namespace is being deleted: nothing new is made in it.
    pub namespace_ends: bool,
    /// Templates of which the API server makes no pods.
    pub unmade: BTreeSet<Digest>,
    /// Templates whose pods never start.
    pub broken: BTreeSet<Digest>,
    /// Templates, and settings, whose servers end before they answer, under an agent that says so.
    pub refused: BTreeSet<Digest>,
    pub(super) places: BTreeMap<MemberId, Place>,
    /// Which part of a divided network a member is in; the operator and the clients of Services are in part 0.
    pub(super) sides: BTreeMap<MemberId, u32>,
    /// Members that the operator alone does not reach.
    pub(super) unseen: BTreeSet<MemberId>,
    /// Members whose server does nothing that its agent tells it, though it answers the operator.
    pub(super) disobedient: BTreeSet<MemberId>,
    /// Members whose agent cannot remember anything: their disk is full.
    pub(super) full: BTreeSet<MemberId>,
    /// Members that reach those alone.
    pub(super) only: BTreeMap<MemberId, BTreeSet<MemberId>>,
    /// Without a byte for so long a replica gives its link up; `None`: never. Milliseconds.
    pub repl_timeout_ms: Option<i64>,
    /// Servers keep snapshots alone, which are as old as the last time they were saved, and have their
    /// history.
    pub snapshots: bool,
    /// How long a server loads that has data. Milliseconds.
    pub loading_ms: i64,
    /// How long an append to the journal takes. Milliseconds.
    pub append_ms: i64,
    /// Members on nodes whose kubelet does not report.
    pub(super) not_ready: BTreeSet<MemberId>,
    /// True if every member has a Service of its own, as in a real Valkey Cluster: left out of most stories, which it would only lengthen.
    pub(super) has_member_services: bool,
    pub(super) post: Post,
    pub(super) drift_ppm: BTreeMap<MemberId, i64>,
    pub(super) began: Timestamp,
    /// Grants that the operator confirms if asked; empty while it is away.
    pub authority: BTreeSet<(MemberId, Seq)>,
    /// When a member was heard last.
    pub(super) heard_at: BTreeMap<MemberId, Timestamp>,
    /// For how long two members of a shard accepted writes at the same time. Milliseconds.
    pub both_writable_ms: i64,
    pub(super) cut: BTreeSet<MemberId>,
    /// Members that the cluster bus does not reach.
    pub(super) off_bus: BTreeSet<MemberId>,
    pub(super) routes: BTreeMap<ShardId, RouteFacts>,
    pub(super) live: BTreeMap<ObjectRef, (LiveObject, u16)>,
    pub(super) acked: BTreeMap<ShardId, BTreeSet<u64>>,
    pub(super) counter: u64,
    pub(super) released: bool,
    /// Nodes that are not on the bus, and since when.
    pub(super) down_since: BTreeMap<NodeId, Timestamp>,
    /// Slots of nodes whose volume is gone, as the others believe.
    pub(super) ghosts: BTreeMap<NodeId, SlotSet>,
    /// Slots on their way.
    pub(super) jobs: Vec<Job>,
    /// What agents hand over key by key, by who gives.
    pub(super) by_key: BTreeMap<MemberId, ByKey>,
    /// Why the last such ended, until somebody asks.
    pub(super) by_key_failed: BTreeMap<MemberId, String>,
    /// The settings in the configuration that new pods begin with.
    pub(super) conf: Option<Digest>,
    /// Why every server refuses settings, if the story says so.
    pub settings_refused: Option<String>,
    /// The release of every server.
    pub release: String,
    /// No job goes on, and none fails.
    pub slots_hang: bool,
    /// The slot of each write, in a Valkey Cluster.
    pub(super) slot_of: BTreeMap<u64, u16>,
    /// Keys in each of some slots beside those of the writes.
    pub(super) filled: Vec<(SlotSet, u64)>,
    /// Whether servers tell how many keys are in a slot.
    pub(super) tells_keys: bool,
    /// Why every job fails, if the story says so.
    pub slots_refused: Option<String>,
    /// Shards whose pods find no place.
    pub(super) unschedulable: BTreeSet<ShardId>,
    /// How the last round of gossip left the nodes, if it changed nothing.
    pub(super) settled: Option<Settled>,
}

impl World {
    /// An empty namespace in which a user has just created the resource.
    pub fn new(spec: DesiredCluster) -> Self {
        World {
            now: BEGINNING,
            began: BEGINNING,
            spec,
            deleting: false,
            invalid: None,
            revision: Digest("rev-1".into()),
            namespace_ends: false,
            unmade: BTreeSet::new(),
            broken: BTreeSet::new(),
            refused: BTreeSet::new(),
            places: BTreeMap::new(),
            sides: BTreeMap::new(),
            unseen: BTreeSet::new(),
            disobedient: BTreeSet::new(),
            full: BTreeSet::new(),
            only: BTreeMap::new(),
            repl_timeout_ms: None,
            snapshots: false,
            loading_ms: 0,
            append_ms: 0,
            not_ready: BTreeSet::new(),
            has_member_services: false,
            post: Post::default(),
            drift_ppm: BTreeMap::new(),
            authority: BTreeSet::new(),
            heard_at: BTreeMap::new(),
            both_writable_ms: 0,
            cut: BTreeSet::new(),
            off_bus: BTreeSet::new(),
            routes: BTreeMap::new(),
            live: BTreeMap::new(),
            acked: BTreeMap::new(),
            counter: 0,
            released: false,
            down_since: BTreeMap::new(),
            ghosts: BTreeMap::new(),
            jobs: Vec::new(),
            by_key: BTreeMap::new(),
            by_key_failed: BTreeMap::new(),
            conf: None,
            settings_refused: None,
            release: "9.1.2".to_owned(),
            slots_hang: false,
            slot_of: BTreeMap::new(),
            filled: Vec::new(),
            tells_keys: true,
            slots_refused: None,
            unschedulable: BTreeSet::new(),
            settled: None,
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
            self.gossip();
            self.hand_over_slots();
            self.hand_over_by_key();
            self.replicate(&BTreeSet::new());
            self.agents();
            self.both_writable_ms += if self.has_two_writable() { TICK_MS } else { 0 };
        }
    }

    fn has_two_writable(&self) -> bool {
        let writable: Vec<MemberId> =
            self.places.keys().copied().filter(|id| self.writable(*id) && self.owns_slots(*id)).collect();
        writable.iter().any(|a| writable.iter().any(|b| a != b && a.shard == b.shard))
    }

    pub(super) fn is_frozen_pod(&self, id: MemberId) -> bool {
        self.places.get(&id).and_then(|p| p.pod.as_ref()).is_some_and(|p| p.frozen)
    }

    /// The StatefulSet controller: missing pods come, surplus pods go.
    fn schedule(&mut self) {
        let places = self.places.keys().map(|id| id.shard.0 + 1).max().unwrap_or_default();
        for shard in 0..places.max(self.spec.shards) {
            let found = self.live.get(&sts_name(ShardId(shard))).filter(|(sts, _)| sts.taken_by.is_none());
            let Some((sts, replicas)) = found.cloned() else {
                continue;
            };
            let fits = !self.unschedulable.contains(&ShardId(shard));
            let is_made = sts.revision.as_ref().is_none_or(|revision| !self.unmade.contains(revision));
            let mut lacks = false;
            for ordinal in 0..=replicas {
                let (number, now) = (self.counter + 1, self.now);
                let place = self.places.entry(MemberId::new(shard, ordinal)).or_default();
                if place.pod.is_none() && now >= place.free_since && !is_made {
                    lacks = true;
                } else if place.pod.is_none() && now >= place.free_since {
                    self.counter = number;
                    place.pod = Some(Pod {
                        uid: format!("pod-{number}"),
                        address: format!("10.0.0.{number}"),
                        revision: sts.revision.clone().unwrap_or_default(),
                        deleted_at: None,
                        starts_at: fits.then(|| now.plus_millis(POD_START_MS)),
                        process: None,
                        role_label: None,
                        agent: None,
                        frozen: false,
                        settings: None,
                        cordoned: false,
                    });
                }
            }
            if let Some((live, _)) = self.live.get_mut(&sts_name(ShardId(shard))) {
                live.pods_refused = lacks.then(|| "exceeded quota: pods".to_owned());
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

    /// The kubelet ends deleted pods, unless their node is silent. An agent that looks after a primary waits for the
    /// operator, if that is there.
    fn terminate(&mut self) {
        let (now, durable, away) =
            (self.now, self.spec.profile == Profile::Durable, self.authority.is_empty());
        let mut lost = Vec::new();
        for (id, place) in &mut self.places {
            let Some(at) = place.pod.as_ref().and_then(|p| p.deleted_at) else { continue };
            let serves = place
                .pod
                .as_ref()
                .and_then(|p| p.process.as_ref())
                .is_some_and(|p| p.is_primary() && !p.frozen);
            let due = now >= at && (!serves || away || now >= at.plus_millis(HANDOVER_WAIT_MS));
            if !due || self.not_ready.contains(id) {
                continue;
            }
            let process = place.pod.take().and_then(|p| p.process);
            if let Some(process) = process.filter(|_| durable) {
                // Told to end, it saved what it had, and its agent noted how far that was.
                place.ledger.left = (!process.frozen && process.is_complete()).then(|| history(&process));
                place.disk = Some((file_of(&process, self.snapshots), process.writes));
            } else if !durable {
                place.ledger = Ledger::default();
                lost.push(*id);
            }
            place.free_since = now;
        }
        for id in lost {
            self.lose_node(id);
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
            let (number, local, clustered) = (self.count(), self.local(id), self.is_cluster());
            let run_id = format!("run-{number}");
            let Some(place) = self.places.get_mut(&id) else {
                continue;
            };
            let loads_until = now.plus_millis(if place.disk.is_some() { self.loading_ms } else { 0 });
            let fresh = clustered && place.node.is_none();
            place.node = if fresh { Node::new(number) } else { place.node.take() };
            // Data of a node that is gone is put aside.
            let disk = place.disk.clone().filter(|_| !fresh);
            // What is to be mounted has to be there.
            let is_whole = self.conf.is_some() || self.spec.settings.is_none();
            let starts = |pod: &&mut Pod| !self.broken.contains(&pod.revision) && is_whole;
            let Some(pod) = place.pod.as_mut().filter(starts) else {
                continue;
            };
            if pod.agent.is_none() {
                pod.settings.clone_from(&self.conf);
            }
            pod.starts_at = None;
            pod.agent.get_or_insert_with(|| Agent::new(local)).at_gate();
            let is_refused = |digest: &Digest| self.refused.contains(digest);
            let starts = !is_refused(&pod.revision) && !pod.settings.as_ref().is_some_and(is_refused);
            pod.process = starts.then(|| Process { loads_until, ..Process::at_gate(run_id, disk, now) });
        }
    }

    pub(super) fn replicate(&mut self, lagging: &BTreeSet<MemberId>) {
        let sources: BTreeMap<MemberId, Process> =
            self.places.iter().filter_map(|(id, p)| Some((*id, p.pod.as_ref()?.process.clone()?))).collect();
        let (now, cut) = (self.now, self.cut.clone());
        let (sides, only) = (self.sides.clone(), self.only.clone());
        let timeout_ms = self.repl_timeout_ms.unwrap_or(i64::MAX);
        let apart = |a: MemberId, b: MemberId| !reach(&sides, &only, a, b);
        let talks = |id: &MemberId, p: &Process| !p.frozen && !p.loads(now) && !lagging.contains(id);
        for (id, process) in self.processes().filter(|(id, p)| talks(id, p)) {
            let Some(Source::Member(of)) = process.source.clone() else {
                continue;
            };
            match sources.get(&of).filter(|_| !cut.contains(&id)) {
                Some(source) if source.frozen || apart(of, id) => {
                    if now.millis_since(process.heard_at) >= timeout_ms {
                        process.lose_link();
                    }
                }
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
            let target = self.routed(shard);
            if let Some(id) = target.filter(|id| self.side(*id) == 0 && !self.only.contains_key(id))
                && self.write_at(id, number)
            {
                self.acked.entry(shard).or_default().insert(number);
                self.place_write(id, number);
                acked += 1;
            }
            self.replicate(lagging);
        }
        acked
    }

    /// A client beside a member writes to it. True if that was acknowledged; such writes are not counted as the shard's.
    pub fn write_at(&mut self, id: MemberId, number: u64) -> bool {
        if !self.writable(id) {
            return false;
        }
        let Some(primary) = self.process(id) else { return false };
        primary.writes.push(number);
        primary.offset += 1;
        true
    }

    /// True if a client beside the member can write to it.
    pub fn writes_at(&self, id: MemberId) -> bool {
        self.writable(id)
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

    /// Where clients send the writes of a shard: the member that its Service lists, or the owner of its slots.
    pub fn routed(&self, shard: ShardId) -> Option<MemberId> {
        if self.is_cluster() {
            let serves = |id: &MemberId| id.shard == shard && self.writable(*id) && self.owns_slots(*id);
            return self.places.keys().copied().find(serves);
        }
        let address = self.routes.get(&shard)?.address.as_ref()?;
        self.places
            .iter()
            .find(|(_, p)| p.pod.as_ref().is_some_and(|p| p.address == *address))
            .map(|(id, _)| *id)
    }

    /// SIGKILL of a member's server; its agent starts another.
    pub fn kill(&mut self, id: MemberId) -> Result<(), String> {
        let (now, durable) = (self.now, self.spec.profile == Profile::Durable);
        let place = self.places.get_mut(&id).ok_or("no such member")?;
        let pod = place.pod.as_mut().ok_or("it has no pod")?;
        let process = pod.process.take().ok_or("it runs no server")?;
        place.ledger.left = None;
        if durable && !self.snapshots {
            place.disk = Some((file_of(&process, false), process.writes));
        }
        pod.starts_at = Some(now.plus_millis(RESTART_MS));
        Ok(())
    }

    /// A server writes a snapshot of what it has.
    pub fn save(&mut self, id: MemberId) -> Result<(), String> {
        let place = self.places.get_mut(&id).ok_or("no such member")?;
        let process = place.pod.as_ref().and_then(|p| p.process.as_ref()).ok_or("it runs no server")?;
        place.disk = Some((file_of(process, true), process.writes.clone()));
        Ok(())
    }

    /// SIGSTOP or SIGCONT of a member's server.
    pub fn set_frozen(&mut self, id: MemberId, frozen: bool) -> Result<(), String> {
        let now = self.now;
        let process = self.process(id).ok_or("it runs no server")?;
        (process.frozen, process.frozen_at) = (frozen, now);
        Ok(())
    }

    /// The whole pod stops or goes on, agent and all.
    pub fn set_pod_frozen(&mut self, id: MemberId, frozen: bool) -> Result<(), String> {
        self.places.get_mut(&id).and_then(|p| p.pod.as_mut()).ok_or("it has no pod")?.frozen = frozen;
        self.set_frozen(id, frozen)
    }

    /// The node of a member's pod is cordoned, or takes pods again.
    pub fn set_cordoned(&mut self, id: MemberId, cordoned: bool) -> Result<(), String> {
        self.places.get_mut(&id).and_then(|p| p.pod.as_mut()).ok_or("it has no pod")?.cordoned = cordoned;
        Ok(())
    }

    /// A member's clock runs fast (positive) or slow, in millionths.
    pub fn set_drift(&mut self, id: MemberId, ppm: i64) {
        self.drift_ppm.insert(id, ppm);
    }

    /// What happens to messages between agents: shares in percent, lateness in milliseconds.
    pub fn set_post(&mut self, lost_percent: u64, repeated_percent: u64, late_max_ms: i64, seed: u64) {
        let post = &mut self.post;
        (post.lost_percent, post.repeated_percent) = (lost_percent, repeated_percent);
        (post.late_max_ms, post.seed) = (late_max_ms, seed);
    }

    /// A user deletes a pod.
    pub fn delete_pod(&mut self, id: MemberId) -> Result<(), String> {
        let now = self.now;
        self.places.get_mut(&id).and_then(|p| p.pod.as_mut()).ok_or("it has no pod")?.deleted_at = Some(now);
        Ok(())
    }

    /// A member's volume is lost (it matters from the next start on).
    pub fn wipe(&mut self, id: MemberId) {
        let place = self.places.entry(id).or_default();
        (place.disk, place.ledger) = (None, Ledger::default());
        self.lose_node(id);
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
}

/// The history that a server begins with from its files: a snapshot has it, an append-only file has none.
fn file_of(process: &Process, snapshot: bool) -> ReplId {
    if snapshot { process.replid.clone() } else { ReplId(format!("aof-{}", process.run_id)) }
}
