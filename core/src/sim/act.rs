//! Effects on the world, each with its precondition, as the real executor has them.

use super::{
    process::Process,
    world::{Pod, World},
};
use crate::{
    agent::Brief,
    effect::{Effect, Means, Outcome, Promotion, Server},
    ids::{Digest, MemberId, NodeId, ReplId, ShardId},
    observation::RouteFacts,
};
use std::collections::BTreeSet;

impl World {
    /// Does one effect, checking its precondition as the real executor does.
    pub fn execute(&mut self, effect: &Effect, terms: &Brief) -> Outcome {
        match effect {
            Effect::Promote { server, replid, offset, consents, by } => {
                self.promote((server, *by), replid, *offset, (terms, *consents))
            }
            Effect::Promise { member, address: _, candidate: _ } => match self.obeys(*member) {
                Err(outcome) => outcome,
                Ok(()) => verified(self.promise(*member, terms)),
            },
            Effect::Brief { member, address: _ } => match self.learn(*member, terms) {
                Err(outcome) => outcome,
                Ok(()) => {
                    self.told(*member, terms);
                    Outcome::Verified
                }
            },
            Effect::Fence { server } => match self.obeys(server.member) {
                Err(outcome) => outcome,
                Ok(()) if self.process(server.member).is_none_or(|p| p.run_id != server.run_id) => {
                    Outcome::Superseded("another process".into())
                }
                Ok(()) => verified(self.kill(server.member)),
            },
            Effect::Attach { server, to, to_address: _, node } => {
                self.attach(server, (*to, node.as_ref()), terms)
            }
            Effect::Handover { from, to, timeout_ms: _, consents, node: None } => {
                self.hand_over(from, to, (terms, *consents))
            }
            Effect::Handover { from, to, timeout_ms: _, consents, node: Some(_) } => {
                self.hand_over_cluster(from, to, (terms, *consents))
            }
            Effect::Meet { server, member: _, address } => {
                self.told_node(server, |world| world.meet(server.member, address))
            }
            Effect::AddSlots { server, node, slots, epoch } => {
                self.told_node(server, |world| world.add_slots(server.member, node, slots, *epoch))
            }
            Effect::Forget { server, node } => self.told_node(server, |world| {
                world.forget(node);
                Ok(())
            }),
            Effect::Route { shard, to: _, address, resource_version } => {
                self.route(*shard, Some(address), resource_version)
            }
            Effect::Unroute { shard, resource_version } => self.route(*shard, None, resource_version),
            Effect::Label { member, pod_uid, role } => {
                self.with_pod(*member, pod_uid, |p| p.role_label = Some(*role))
            }
            Effect::Configure { server, settings } => self.configure(server, settings),
            Effect::Disconnect { server } => self.server(server).map_or_else(|o| o, |_| Outcome::Verified),
            Effect::DeletePod { member, pod_uid, grace_s } => {
                let at = self.now.plus_millis(grace_s.map_or(200, |s| i64::from(s) * 1_000));
                self.with_pod(*member, pod_uid, |p| p.deleted_at = Some(p.deleted_at.unwrap_or(at)))
            }
            Effect::Apply { object, digest } => self.apply(object, digest),
            Effect::MigrateSlots { server, slots, to: _, node, keys: _, by } => {
                self.told_node(server, |world| match by {
                    Means::Atomic => world.migrate_slots(server.member, slots, node),
                    Means::ByKey => world.hand_over_slot_by_slot(server.member, slots, node),
                })
            }
            Effect::Delete { object, uid } => self.delete(object, uid),
            Effect::ReleaseFinalizer => {
                self.released = true;
                Outcome::Verified
            }
        }
    }

    /// The agent of a member can be told something.
    fn obeys(&mut self, id: MemberId) -> Result<(), Outcome> {
        let away = self.is_apart(id) || self.is_frozen_pod(id) || self.agent(id).is_none();
        if away { Err(Outcome::Failed("no answer".into())) } else { Ok(()) }
    }

    fn accept(&mut self, id: MemberId, terms: &Brief, consents: u64) -> Result<(), Outcome> {
        self.remembers(id)?;
        let accepted = self.places.entry(id).or_default().ledger.accept(terms, consents);
        accepted.map_err(|refusal| Outcome::Superseded(refusal.to_string()))
    }

    fn learn(&mut self, id: MemberId, terms: &Brief) -> Result<(), Outcome> {
        self.obeys(id)?;
        self.remembers(id)?;
        let place = self.places.entry(id).or_default();
        place.ledger.learn(terms).map_err(|refusal| Outcome::Superseded(refusal.to_string()))
    }

    /// The agent of a member can write down what it is told.
    fn remembers(&self, id: MemberId) -> Result<(), Outcome> {
        let full = self.full.contains(&id);
        if full { Err(Outcome::Failed("no space left on device".into())) } else { Ok(()) }
    }

    /// The server, reached through its agent.
    fn server(&mut self, server: &Server) -> Result<&mut Process, Outcome> {
        self.obeys(server.member)?;
        let (now, refuses) = (self.now, self.disobedient.contains(&server.member));
        let process = self.process(server.member).filter(|p| !p.frozen);
        let process = process.ok_or_else(|| Outcome::Failed("no answer".into()))?;
        if process.run_id != server.run_id {
            Err(Outcome::Superseded("another process".into()))
        } else if refuses {
            Err(Outcome::Failed("NOAUTH Authentication required".into()))
        } else if process.loads(now) {
            Err(Outcome::Failed("it is loading its data set".into()))
        } else {
            Ok(process)
        }
    }

    /// A command for the member's node.
    fn told_node(
        &mut self,
        server: &Server,
        command: impl FnOnce(&mut World) -> Result<(), String>,
    ) -> Outcome {
        match self.server(server) {
            Err(outcome) => outcome,
            Ok(_) => command(self).map_or_else(Outcome::Failed, |()| Outcome::Verified),
        }
    }

    fn attach(&mut self, server: &Server, (to, node): (MemberId, Option<&NodeId>), terms: &Brief) -> Outcome {
        if let Err(outcome) = self.server(server) {
            return outcome;
        }
        if let Err(outcome) = self.learn(server.member, terms) {
            return outcome;
        }
        let replicated = match node {
            Some(node) => self.replicate_node(server.member, node),
            None if self.is_cluster() => Err("REPLICAOF not allowed in cluster mode".to_owned()),
            None => Ok(()),
        };
        if let Err(why) = replicated {
            return Outcome::Failed(why);
        }
        match self.server(server) {
            Err(outcome) => outcome,
            Ok(p) => {
                let passes_on = node.is_none() && p.is_primary();
                p.follow(to);
                self.told(server.member, terms);
                if passes_on {
                    self.relay(server.member);
                }
                Outcome::Verified
            }
        }
    }

    /// A server takes all settings or none.
    fn configure(&mut self, server: &Server, settings: &Digest) -> Outcome {
        if let Err(outcome) = self.server(server) {
            return outcome;
        }
        if self.spec.settings.as_ref().is_none_or(|wanted| wanted.digest != *settings) {
            return Outcome::Superseded("the spec has other settings now".into());
        }
        if let Some(words) = &self.settings_refused {
            return Outcome::Refused(words.clone());
        }
        if let Some(pod) = self.places.get_mut(&server.member).and_then(|place| place.pod.as_mut()) {
            pod.settings = Some(settings.clone());
        }
        Outcome::Verified
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

    fn hand_over(&mut self, from: &Server, to: &Server, (terms, consents): (&Brief, u64)) -> Outcome {
        let source = match self.server(from) {
            Ok(p) if p.is_primary() => p.clone(),
            Ok(_) => return Outcome::Superseded("it is not primary".into()),
            Err(outcome) => return outcome,
        };
        let now = self.now;
        let (replid, offset) = match self.server(to) {
            Ok(p) => {
                p.talk(&source, now);
                (p.replid.clone(), p.offset)
            }
            Err(outcome) => return outcome,
        };
        let demoted = self.attach(from, (to.member, None), terms);
        if demoted != Outcome::Verified {
            return demoted;
        }
        let promoted = self.promote((to, Promotion::Detach), &replid, offset, (terms, consents));
        self.replicate(&BTreeSet::new());
        promoted
    }

    /// `CLUSTER FAILOVER` on the replica, after its agent took the grant.
    fn hand_over_cluster(&mut self, from: &Server, to: &Server, (terms, consents): (&Brief, u64)) -> Outcome {
        let source = match self.server(from) {
            Ok(p) if p.is_primary() => p.clone(),
            Ok(_) => return Outcome::Superseded("it is not primary".into()),
            Err(outcome) => return outcome,
        };
        let now = self.now;
        match self.server(to) {
            Ok(p) => p.talk(&source, now),
            Err(outcome) => return outcome,
        }
        if let Err(outcome) = self.accept(to.member, terms, consents) {
            return outcome;
        }
        if let Err(why) = self.hand_over_node(from.member, to.member) {
            return Outcome::Failed(why);
        }
        self.told(to.member, terms);
        self.replicate(&BTreeSet::new());
        Outcome::Verified
    }

    fn promote(
        &mut self,
        (server, by): (&Server, Promotion),
        replid: &ReplId,
        offset: i64,
        (terms, consents): (&Brief, u64),
    ) -> Outcome {
        match self.server(server) {
            Err(outcome) => return outcome,
            Ok(p) if p.is_primary() => return Outcome::Superseded("it is primary already".into()),
            Ok(p) if p.replid != *replid || p.offset < offset => {
                return Outcome::Superseded("other history".into());
            }
            Ok(_) => {}
        }
        let id = server.member;
        if let Err(outcome) = self.accept(id, terms, consents) {
            return outcome;
        }
        if self.is_cluster() {
            if let Err(why) = self.promote_node(id, by) {
                return Outcome::Failed(why);
            }
        } else if let Some(process) = self.process(id) {
            process.promote();
        }
        self.told(id, terms);
        Outcome::Verified
    }

    fn route(&mut self, shard: ShardId, address: Option<&String>, resource_version: &str) -> Outcome {
        let number = self.count();
        match self.routes.get_mut(&shard) {
            Some(route) if route.resource_version == resource_version => {
                let resource_version = format!("rv-{number}");
                *route = RouteFacts { address: address.cloned(), resource_version };
                Outcome::Verified
            }
            Some(_) | None => Outcome::Superseded("resourceVersion moved on".into()),
        }
    }
}

fn verified(result: Result<(), String>) -> Outcome {
    result.map_or_else(Outcome::Superseded, |()| Outcome::Verified)
}
