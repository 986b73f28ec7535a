//! Owned objects of this world: what the spec renders to, and who edits, takes and makes them.

use super::world::World;
use crate::{
    effect::Outcome,
    ids::{Digest, MemberId, ShardId},
    observation::{LiveObject, ObjectKind, ObjectRef, RouteFacts},
    spec::DesiredCluster,
};
use std::collections::BTreeMap;

impl World {
    pub(super) fn apply(&mut self, object: &ObjectRef, digest: &Digest) -> Outcome {
        let Some((wanted, revision, shard)) = self.wanted_objects(self.shards_kept()).remove(object) else {
            return Outcome::Superseded("no longer wanted".into());
        };
        if wanted != *digest {
            return Outcome::Superseded("renders to something else now".into());
        }
        if let Some(owner) = self.live.get(object).and_then(|(live, _)| live.taken_by.as_ref()) {
            return Outcome::Superseded(format!("it belongs to {owner}"));
        }
        if self.namespace_ends && !self.live.contains_key(object) {
            return Outcome::Futile("the namespace is being terminated".into());
        }
        if object.kind == ObjectKind::ConfigMap {
            self.conf = self.spec.settings.as_ref().map(|settings| settings.digest.clone());
        }
        let number = self.count();
        if let (ObjectKind::EndpointSlice, Some(shard)) = (object.kind, shard) {
            let fresh = RouteFacts { address: None, resource_version: format!("rv-{number}") };
            self.routes.entry(shard).or_insert(fresh);
        }
        let (uid, digest) = (format!("uid-{number}"), wanted);
        let live =
            LiveObject { uid, digest, revision, foreign_manager: None, taken_by: None, pods_refused: None };
        self.live.insert(object.clone(), (live, self.spec.replicas_per_shard));
        Outcome::Verified
    }

    /// Someone edits an owned object.
    pub fn edit_object(&mut self, object: &ObjectRef, manager: &str) -> Result<(), String> {
        let (live, _) = self.live.get_mut(object).ok_or("there is no such object")?;
        live.digest = Digest("edited".into());
        live.foreign_manager = Some(manager.to_owned());
        Ok(())
    }

    /// Somebody else makes an object of this name, if there is none.
    pub fn take_name(&mut self, object: &ObjectRef, owner: &str) -> Result<(), String> {
        if self.live.contains_key(object) {
            return Err("it is there already".into());
        }
        let taken = LiveObject::taken(format!("uid-{}", self.count()), owner.to_owned());
        self.live.insert(object.clone(), (taken, 0));
        Ok(())
    }

    /// The object of this name goes, if it is somebody else's.
    pub fn free_name(&mut self, object: &ObjectRef) -> Result<(), String> {
        self.live
            .remove(object)
            .filter(|(live, _)| live.taken_by.is_some())
            .map(|_| ())
            .ok_or("it is not".into())
    }

    /// The settings that a member's server has.
    pub fn settings(&self, id: MemberId) -> Option<String> {
        Some(self.places.get(&id)?.pod.as_ref()?.settings.as_ref()?.0.clone())
    }

    pub(super) fn wanted_objects(
        &self,
        shards: u16,
    ) -> BTreeMap<ObjectRef, (Digest, Option<Digest>, Option<ShardId>)> {
        let mut all = BTreeMap::new();
        if let Some(settings) = &self.spec.settings {
            all.insert(conf_name(), (Digest(format!("conf-{}", settings.digest)), None, None));
        }
        if self.has_member_services {
            let kept = DesiredCluster { shards, ..self.spec.clone() };
            all.extend(
                kept.members().map(|id| (service_name(id), (Digest("service".into()), None, Some(id.shard)))),
            );
        }
        for shard in (0..shards).map(ShardId) {
            if self.is_cluster() {
                let digest = Digest(format!("sts-{}-{}", self.spec.replicas_per_shard, self.revision));
                all.insert(sts_name(shard), (digest, Some(self.revision.clone()), Some(shard)));
                continue;
            }
            all.insert(slice_name(shard), (Digest("slice".into()), None, Some(shard)));
            let digest = Digest(format!("sts-{}-{}", self.spec.replicas_per_shard, self.revision));
            all.insert(sts_name(shard), (digest, Some(self.revision.clone()), Some(shard)));
        }
        all
    }
}

pub(super) fn sts_name(shard: ShardId) -> ObjectRef {
    ObjectRef { kind: ObjectKind::StatefulSet, name: format!("story-{shard}") }
}

/// The Service of one member.
pub(super) fn service_name(id: MemberId) -> ObjectRef {
    ObjectRef { kind: ObjectKind::Service, name: format!("story-node-{id}") }
}

fn slice_name(shard: ShardId) -> ObjectRef {
    ObjectRef { kind: ObjectKind::EndpointSlice, name: format!("story-primary-{shard}") }
}

/// The configuration: there is one in stories that have settings.
fn conf_name() -> ObjectRef {
    ObjectRef { kind: ObjectKind::ConfigMap, name: "story-config".to_owned() }
}
