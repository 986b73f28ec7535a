//! Slots on their way from node to node (atomic slot migration), with the writes that live in them; and shards that come and go. Facts in
//! `docs/CLUSTER.md`.

use super::{objects::sts_name, world::World};
use crate::{
    config::is_atomic,
    effect::Outcome,
    ids::{MemberId, NodeId, ShardId, Timestamp},
    observation::{Export, ExportState, ImportFailed, ObjectKind, ObjectRef},
    slots::{SLOTS, SlotSet},
};
use std::collections::BTreeSet;

/// A write of a story stands for so many keys, so that slots are handed over in several jobs. Count.
const KEYS_A_WRITE: u64 = 16_000;
/// What a job takes. Milliseconds.
const JOB_MS: i64 = 150;
/// So much longer takes one of the next shard: on real servers no two end at the same moment. Milliseconds.
const JOB_MORE_MS: i64 = 40;

/// So long before its end a job has granted its slots, and is not cancelled any more. Milliseconds.
const GRANTED_MS: i64 = 50;

/// Between the words of the giver and those of the taker.
const BOTH_ENDS: &str = " | ";

/// A job, in its source's memory only.
#[derive(Clone, Debug)]
pub(super) struct Job {
    from: MemberId,
    /// The process that has it.
    run_id: String,
    to: NodeId,
    slots: SlotSet,
    ends_at: Timestamp,
    state: ExportState,
}

impl World {
    /// `CLUSTER MIGRATESLOTS`: accepted, and the rest is seen later.
    pub(super) fn migrate_slots(
        &mut self,
        from: MemberId,
        slots: &SlotSet,
        to: &NodeId,
    ) -> Result<(), String> {
        if !is_atomic(&self.release, self.spec.io_threads) {
            return Err("unknown subcommand 'MIGRATESLOTS'".to_owned());
        }
        let node = self.node(from)?;
        if node.id == *to {
            return self.cancel_jobs(from);
        }
        if !node.migrating.is_empty() || !node.importing.is_empty() {
            return Err("Slots are being manually imported/migrated".to_owned());
        }
        if node.primary.is_some() || !slots.without(&node.slots).is_empty() {
            return Err("Slots are not served by this node.".to_owned());
        }
        if !node.knows.contains_key(to) {
            return Err(format!("Unknown node name: {to}"));
        }
        let running = |job: &&Job| job.from == from && job.state == ExportState::Running;
        if let Some(busy) = self.jobs.iter().filter(running).find_map(|j| j.slots.common(slots).iter().next())
        {
            return Err(format!("I am already migrating slot {busy}."));
        }
        let run_id = self.process(from).map(|p| p.run_id.clone()).unwrap_or_default();
        let ends_at = self.now.plus_millis(JOB_MS + JOB_MORE_MS * i64::from(from.shard.0));
        // Whoever is told of failures is told of the latest.
        self.jobs.retain(|job| job.from != from || job.state == ExportState::Running);
        let (to, slots, state) = (to.clone(), slots.clone(), ExportState::Running);
        self.jobs.push(Job { from, run_id, to, slots, ends_at, state });
        Ok(())
    }

    /// `CLUSTER CANCELSLOTMIGRATIONS`, as agents say it.
    fn cancel_jobs(&mut self, from: MemberId) -> Result<(), String> {
        let granted_from = self.now.plus_millis(GRANTED_MS);
        let is_running = |job: &Job| job.from == from && job.state == ExportState::Running;
        if !self.slots_hang && self.jobs.iter().any(|job| is_running(job) && job.ends_at <= granted_from) {
            return Err("slots are granted already, and go to their end".to_owned());
        }
        for job in self.jobs.iter_mut().filter(|job| is_running(job)) {
            job.state = ExportState::Failed("cancelled".to_owned());
        }
        Ok(())
    }

    /// Jobs whose time has come end; those of processes that are gone are gone.
    pub(super) fn hand_over_slots(&mut self) {
        let mut jobs = std::mem::take(&mut self.jobs);
        jobs.retain(|job| self.process(job.from).is_some_and(|p| p.run_id == job.run_id));
        let now = self.now;
        if self.slots_hang {
            jobs.iter_mut().filter(|j| now >= j.ends_at).for_each(|j| j.ends_at = now.plus_millis(JOB_MS));
        }
        for job in jobs.iter_mut().filter(|j| j.state == ExportState::Running && now >= j.ends_at) {
            if self.process(job.from).is_some_and(|p| p.frozen) {
                continue;
            }
            job.state = match self.end(job) {
                Ok(()) => continue,
                Err(why) => ExportState::Failed(why),
            };
        }
        let done = |job: &Job| job.state == ExportState::Running && now >= job.ends_at;
        jobs.retain(|job| !done(job) || self.process(job.from).is_some_and(|p| p.frozen));
        self.jobs = jobs;
    }

    /// The slots, and what is in them, are the other's.
    fn end(&mut self, job: &Job) -> Result<(), String> {
        if let Some(why) = &self.slots_refused {
            return Err(why.split(BOTH_ENDS).next().unwrap_or_default().to_owned());
        }
        let source = self.node(job.from)?;
        if source.primary.is_some() || !job.slots.without(&source.slots).is_empty() {
            return Err("Slots are no longer owned by myself".to_owned());
        }
        let lost = || "Connection lost to target".to_owned();
        let to = self.member_of(&job.to).ok_or_else(lost)?;
        let serves = self.process(to).is_some_and(|p| p.is_primary() && !p.frozen);
        if !serves || !self.reach(job.from, to) || self.node(to)?.primary.is_some() {
            return Err(lost());
        }
        let highest = self.places.values().filter_map(|p| p.node.as_ref()).map(|n| n.epoch).max();
        let source = self.node(job.from)?;
        source.slots = source.slots.without(&job.slots);
        let target = self.node(to)?;
        target.slots = target.slots.with(&job.slots);
        target.epoch = highest.unwrap_or(0) + 1;
        self.carry_writes(job.from, to, &job.slots);
        Ok(())
    }

    pub(super) fn carry_writes(&mut self, from: MemberId, to: MemberId, slots: &SlotSet) {
        let gone: BTreeSet<u64> = self
            .slot_of
            .iter()
            .filter(|(_, slot)| slots.contains(**slot))
            .map(|(number, _)| *number)
            .collect();
        let Some(source) = self.process(from) else { return };
        let carried: Vec<u64> = source.writes.iter().copied().filter(|n| gone.contains(n)).collect();
        source.writes.retain(|number| !gone.contains(number));
        source.offset += 1;
        if let Some(target) = self.process(to) {
            target.offset += i64::try_from(carried.len()).unwrap_or(i64::MAX).saturating_add(1);
            target.writes.extend(carried);
        }
        let acked = self.acked.entry(from.shard).or_default();
        let (moved, kept) = std::mem::take(acked).into_iter().partition(|number| gone.contains(number));
        *acked = kept;
        let moved: BTreeSet<u64> = moved;
        self.acked.entry(to.shard).or_default().extend(moved);
    }

    /// What a node says of what it hands over.
    pub(super) fn exports(&self, id: MemberId) -> Vec<Export> {
        let of = |job: &&Job| job.from == id;
        let export = |j: &Job| Export { slots: j.slots.clone(), to: j.to.clone(), state: j.state.clone() };
        self.jobs.iter().filter(of).map(export).collect()
    }

    /// What a node says of the last slots that were to come, where the script has words for both ends.
    pub(super) fn import_failed(&self, id: MemberId) -> Option<ImportFailed> {
        let node_of = |id| Some(self.places.get(&id)?.node.as_ref()?.id.clone());
        let node: NodeId = node_of(id)?;
        let job = self.jobs.iter().rfind(|job| job.to == node)?;
        let (_, words) = self.slots_refused.as_ref()?.split_once(BOTH_ENDS)?;
        let failed = matches!(job.state, ExportState::Failed(_));
        let from = node_of(job.from)?;
        failed.then(|| ImportFailed { from, words: words.to_owned() })
    }

    /// The slot that a write to a member is in: one of its own.
    pub(super) fn place_write(&mut self, id: MemberId, number: u64) {
        let slots = self.node(id).map(|node| node.slots.clone()).unwrap_or_default();
        let at = usize::try_from(number).unwrap_or_default() * 37 % slots.len().max(1);
        if let Some(slot) = slots.iter().nth(at) {
            self.slot_of.insert(number, slot);
        }
    }

    /// Puts so many keys into each of the slots.
    pub(super) fn fill(&mut self, slots: &SlotSet, keys: u64) {
        for (before, _) in &mut self.filled {
            *before = before.without(slots);
        }
        self.filled.push((slots.clone(), keys));
    }

    /// What is in the slots of a node: the keys that its writes stand for are spread over all of them.
    pub(super) fn keys_by_slot(&self, id: MemberId) -> Vec<(u16, u64)> {
        let node = self.places.get(&id).and_then(|place| place.node.as_ref());
        let slots = node.map(|node| node.slots.clone()).unwrap_or_default();
        let (count, filled) = (slots.len() as u64, self.filled_in(&slots));
        let spread = self.keys(id) - filled;
        let each = |at: usize, slot: u16| {
            let more = u64::from((at as u64) < spread % count);
            let filled =
                self.filled.iter().find(|(slots, _)| slots.contains(slot)).map_or(0, |(_, keys)| *keys);
            filled + spread / count + more
        };
        slots.iter().enumerate().map(|(at, slot)| (slot, each(at, slot))).collect()
    }

    fn filled_in(&self, slots: &SlotSet) -> u64 {
        self.filled.iter().map(|(these, keys)| these.common(slots).len() as u64 * keys).sum()
    }

    /// How many keys a server has, primary or not.
    pub(super) fn keys(&self, id: MemberId) -> u64 {
        let Some(place) = self.places.get(&id) else { return 0 };
        let writes = place.pod.as_ref().and_then(|pod| pod.process.as_ref()).map_or(0, |p| p.writes.len());
        let filled = place.node.as_ref().map_or(0, |node| self.filled_in(&node.slots));
        writes as u64 * KEYS_A_WRITE + filled
    }

    /// By how much the shard that is farthest from the mean has more or fewer keys. Percent.
    pub(super) fn keys_off_mean(&self) -> u64 {
        let serves = |id: &&MemberId| self.owns_slots(**id) && self.writable(**id);
        let primaries = self.places.keys().filter(serves);
        let keys: Vec<u64> =
            primaries.map(|id| self.keys_by_slot(*id).iter().map(|(_, keys)| keys).sum()).collect();
        let mean = keys.iter().sum::<u64>() / (keys.len() as u64).max(1);
        keys.iter().map(|keys| keys.abs_diff(mean) * 100 / mean.max(1)).max().unwrap_or_default()
    }

    /// How many shards there have to be: those that are wanted, and any beyond them that owns slots.
    pub(super) fn shards_kept(&self) -> u16 {
        let owns = |(id, place): (&MemberId, &super::world::Place)| {
            place.node.as_ref().filter(|n| n.primary.is_none() && !n.slots.is_empty()).map(|_| id.shard.0 + 1)
        };
        self.places.iter().filter_map(owns).max().unwrap_or_default().max(self.spec.shards)
    }

    /// Deletes an object; a workload's pods go with it, its claims stay.
    pub(super) fn delete(&mut self, object: &ObjectRef, uid: &str) -> Outcome {
        match self.live.get(object) {
            None => return Outcome::Verified,
            Some((live, _)) if live.uid != uid => return Outcome::Superseded("another object".into()),
            Some(_) => {}
        }
        self.live.remove(object);
        if object.kind == ObjectKind::StatefulSet {
            let now = self.now;
            for (id, place) in &mut self.places {
                if let Some(pod) = place.pod.as_mut().filter(|_| sts_name(id.shard) == *object) {
                    pod.deleted_at = pod.deleted_at.or(Some(now));
                }
            }
        }
        Outcome::Verified
    }

    /// Members that have a Service of their own.
    pub(super) fn member_services(&self) -> Vec<String> {
        let services = self.live.keys().filter(|object| object.kind == ObjectKind::Service);
        services.filter_map(|object| object.name.strip_prefix("story-node-")).map(str::to_owned).collect()
    }

    /// The resource goes, and every object and pod with it; claims stay.
    pub fn delete_all(&mut self) {
        self.live.clear();
        let now = self.now;
        for pod in self.places.values_mut().filter_map(|place| place.pod.as_mut()) {
            pod.deleted_at = pod.deleted_at.or(Some(now));
        }
    }

    /// Pods of the shard find no place, or find one again.
    pub fn set_unschedulable(&mut self, shard: ShardId, unschedulable: bool) {
        if unschedulable {
            self.unschedulable.insert(shard);
        } else {
            self.unschedulable.remove(&shard);
        }
        let now = self.now;
        for place in self.places.iter_mut().filter(|(id, _)| id.shard == shard).map(|(_, place)| place) {
            if let Some(pod) = place.pod.as_mut().filter(|p| p.agent.is_none() && !unschedulable) {
                pod.starts_at = Some(now);
            }
        }
    }

    /// The shares of the shards, if they are not what is wanted: as even as can be, and nothing elsewhere.
    pub fn imbalance(&self) -> Option<String> {
        let mut owned = vec![0_usize; usize::from(self.shards_kept())];
        for (id, place) in &self.places {
            let node = place.node.as_ref().filter(|n| n.primary.is_none());
            if let (Some(node), Some(count)) = (node, owned.get_mut(usize::from(id.shard.0))) {
                *count += node.slots.len();
            }
        }
        let share = usize::from(SLOTS) / usize::from(self.spec.shards).max(1);
        let even = owned.len() == usize::from(self.spec.shards)
            && owned.iter().all(|count| (share..=share + 1).contains(count))
            && owned.iter().sum::<usize>() == usize::from(SLOTS);
        (!even).then(|| format!("slots by shard: {owned:?}"))
    }

    /// True if the shard has no workload and no pod.
    pub fn is_removed(&self, shard: ShardId) -> bool {
        let pods = self.places.iter().any(|(id, place)| id.shard == shard && place.pod.is_some());
        !pods && !self.live.contains_key(&sts_name(shard))
    }
}
