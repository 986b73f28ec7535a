//! Effects on the world, each with its precondition, as the real executor has them.

use super::{
    process::Process,
    world::{Pod, World},
};
use crate::{
    effect::{Effect, Outcome, Server},
    ids::{Digest, MemberId, ReplId, ShardId},
    observation::{LiveObject, ObjectKind, ObjectRef, RouteFacts},
};
use std::collections::BTreeSet;

impl World {
    /// Does one effect, checking its precondition as the real executor does.
    pub fn execute(&mut self, effect: &Effect) -> Outcome {
        match effect {
            Effect::Promote { server, replid, offset } => self.promote(server, replid, *offset),
            Effect::Attach { server, to, to_address: _ } => match self.reach(server) {
                Err(outcome) => outcome,
                Ok(p) => {
                    p.follow(*to);
                    Outcome::Verified
                }
            },
            Effect::Handover { from, to, timeout_ms: _ } => self.hand_over(from, to),
            Effect::Route { shard, to: _, address, resource_version } => {
                self.route(*shard, address, resource_version)
            }
            Effect::Label { member, pod_uid, role } => {
                self.with_pod(*member, pod_uid, |p| p.role_label = Some(*role))
            }
            Effect::Disconnect { server } => self.reach(server).map_or_else(|o| o, |_| Outcome::Verified),
            Effect::DeletePod { member, pod_uid, grace_s } => {
                let at = self.now.plus_millis(grace_s.map_or(200, |s| i64::from(s) * 1_000));
                self.with_pod(*member, pod_uid, |p| p.deleted_at = Some(p.deleted_at.unwrap_or(at)))
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
            let fresh = RouteFacts { address: None, resource_version: format!("rv-{number}") };
            self.routes.entry(shard).or_insert(fresh);
        }
        let live =
            LiveObject { uid: format!("uid-{number}"), digest: wanted, revision, foreign_manager: None };
        self.live.insert(object.clone(), (live, self.spec.replicas_per_shard));
        Outcome::Verified
    }

    fn promote(&mut self, server: &Server, replid: &ReplId, offset: i64) -> Outcome {
        match self.reach(server) {
            Err(outcome) => outcome,
            Ok(p) if p.is_primary() => Outcome::Superseded("it is primary already".into()),
            Ok(p) if p.replid != *replid || p.offset < offset => Outcome::Superseded("other history".into()),
            Ok(p) => {
                p.promote();
                Outcome::Verified
            }
        }
    }

    fn route(&mut self, shard: ShardId, address: &str, resource_version: &str) -> Outcome {
        let number = self.count();
        match self.routes.get_mut(&shard) {
            Some(route) if route.resource_version == resource_version => {
                let resource_version = format!("rv-{number}");
                *route = RouteFacts { address: Some(address.to_owned()), resource_version };
                Outcome::Verified
            }
            Some(_) | None => Outcome::Superseded("resourceVersion moved on".into()),
        }
    }
}
