//! What is left of shards and members that are not to be any more: found by owner and name, and deleted once the core says so.
//! Volumes stay.

use super::{Cluster, namesakes::taken};
use crate::{
    cluster::ClusterId,
    k8s::{
        self,
        apply::{self, Owned},
        cache::Cache,
        secrets::Noticed,
    },
    objects::names,
};
use k8s_openapi::{api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use valkeeper_core::{
    effect::Outcome,
    ids::{Digest, MemberId, ShardId},
    observation::{LiveObject, ObjectFacts, ObjectKind, ObjectRef, Observed, Why},
};

type Known = BTreeMap<ObjectRef, ObjectFacts>;
type Found = BTreeMap<ObjectRef, Observed<ObjectMeta>>;

/// The shard that an object serves, by its name; `None` if it is not one that every shard has of its own.
pub fn shard_of(cluster: &str, object: &ObjectRef) -> Option<ShardId> {
    let of_shard = |number: &str| number.parse().ok().map(ShardId);
    let number = object.name.rsplit('-').next().and_then(of_shard)?;
    let name = match object.kind {
        ObjectKind::Secret => names::identity(cluster, number),
        ObjectKind::StatefulSet | ObjectKind::PodDisruptionBudget => names::statefulset(cluster, number),
        ObjectKind::Service => {
            return names::member_of_node(cluster, &object.name).map(|member| member.shard);
        }
        ObjectKind::ConfigMap | ObjectKind::EndpointSlice => return None,
    };
    (name == object.name).then_some(number)
}

/// What is to stay of the objects that are a shard's or a member's.
#[derive(Debug, Default)]
pub struct Kept {
    shards: BTreeSet<ShardId>,
    /// Members that are wanted, or whose pods are there still.
    members: BTreeSet<MemberId>,
}

impl Kept {
    /// What was rendered, and what runs.
    pub fn of(cluster: &Cluster) -> Kept {
        let (name, rendered) = (&cluster.id.owner.1, &cluster.owned.rendered);
        let services = rendered.iter().filter(|r| r.object.kind == ObjectKind::Service);
        let wanted = services.filter_map(|r| names::member_of_node(name, &r.object.name));
        let pods = cluster.shell.world.pods.of(&cluster.id.owner);
        let running = pods.iter().filter_map(|pod| names::member_of_pod(name, &pod.name_any()));
        let shards = rendered.iter().filter_map(|r| r.shard).collect();
        Kept { shards, members: wanted.chain(running).collect() }
    }

    /// The shard of an object that is not to stay.
    pub fn shard_left(&self, cluster: &str, object: &ObjectRef) -> Option<ShardId> {
        let shard = shard_of(cluster, object)?;
        let stays = match names::member_of_node(cluster, &object.name) {
            Some(member) if object.kind == ObjectKind::Service => self.members.contains(&member),
            Some(_) | None => self.shards.contains(&shard),
        };
        (!stays).then_some(shard)
    }
}

/// Looks for what there is that is not among `kept`.
pub async fn look(cluster: &Cluster, kept: &Kept) -> Known {
    let world = &cluster.shell.world;
    let mut found = Found::new();
    found.extend(all(ObjectKind::Service, &world.services, &cluster.id));
    found.extend(all(ObjectKind::StatefulSet, &world.stateful_sets, &cluster.id));
    found.extend(all(ObjectKind::PodDisruptionBudget, &world.budgets, &cluster.id));
    // Secrets are read by name only. A shard's is the first of its objects to be made, so one of the others is there, or it is known.
    let name = &cluster.id.owner.1;
    let shards = found.keys().chain(cluster.state.objects.keys()).filter_map(|o| shard_of(name, o));
    for shard in shards.filter(|shard| !kept.shards.contains(shard)).collect::<BTreeSet<_>>() {
        let name = names::identity(name, shard);
        let live = match cluster.secrets.get(&name, Noticed::ByAgents).await {
            Ok(Some(secret)) => Observed::Present(secret.metadata.clone()),
            Ok(None) => Observed::Absent,
            Err(_) => Observed::Unknown(Why::ApiError),
        };
        found.insert(ObjectRef { kind: ObjectKind::Secret, name }, live);
    }
    facts(&cluster.id, kept, &found, &cluster.state.objects)
}

fn all<K>(kind: ObjectKind, cache: &Cache<K>, id: &ClusterId) -> Found
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let of = |live: &K| (ObjectRef { kind, name: live.name_any() }, Observed::Present(live.meta().clone()));
    cache.of(&id.owner).iter().map(|live| of(live)).collect()
}

/// Surplus is what this very resource owns and is not kept; and, for the last time, what was known and is gone.
fn facts(id: &ClusterId, kept: &Kept, found: &Found, known: &Known) -> Known {
    let mut facts = Known::new();
    for object in found.keys().chain(known.keys()) {
        let Some(shard) = kept.shard_left(&id.owner.1, object) else {
            continue;
        };
        let live = match found.get(object).unwrap_or(&Observed::Absent) {
            Observed::Present(meta) if is_owned(id, object.kind, meta) => Observed::Present(LiveObject {
                uid: meta.uid.clone().unwrap_or_default(),
                digest: Digest::default(),
                revision: None,
                foreign_manager: None,
                taken_by: None,
                pods_refused: None,
            }),
            // What someone else has under this name is not there for us.
            Observed::Present(_) | Observed::Absent if known.contains_key(object) => Observed::Absent,
            // Nobody could look: what is known of it stays.
            Observed::Present(_) | Observed::Absent | Observed::Unknown(_) => continue,
        };
        let surplus = ObjectFacts {
            wanted: Digest::default(),
            wanted_revision: None,
            shard: Some(shard),
            vital: false,
            surplus: true,
            live,
        };
        facts.insert(object.clone(), surplus);
    }
    facts
}

fn is_owned(id: &ClusterId, kind: ObjectKind, meta: &ObjectMeta) -> bool {
    taken(id, kind, meta).is_none() && meta.owner_references.iter().flatten().any(|owner| owner.uid == id.uid)
}

/// Deletes an object, unless it is wanted again.
///
/// # Errors
/// The API server's.
pub async fn delete(cluster: &Cluster, object: &ObjectRef, uid: &str) -> Result<Outcome, k8s::Error> {
    if cluster.owned.rendered.iter().any(|r| r.object == *object) {
        return Ok(Outcome::Superseded("it is wanted again".to_owned()));
    }
    let world = &cluster.shell.world;
    match object.kind {
        ObjectKind::Secret => {
            let left: Option<Secret> = delete_one(cluster, object, uid).await?;
            let ended = outcome(left.as_ref());
            cluster.secrets.deleted(&object.name, left);
            Ok(ended)
        }
        ObjectKind::ConfigMap | ObjectKind::EndpointSlice => {
            Ok(Outcome::Superseded("no shard has one of its own".to_owned()))
        }
        ObjectKind::Service => delete_watched(cluster, object, uid, &world.services).await,
        ObjectKind::PodDisruptionBudget => delete_watched(cluster, object, uid, &world.budgets).await,
        ObjectKind::StatefulSet => delete_watched(cluster, object, uid, &world.stateful_sets).await,
    }
}

async fn delete_watched<K: Owned>(
    cluster: &Cluster,
    object: &ObjectRef,
    uid: &str,
    cache: &Cache<K>,
) -> Result<Outcome, k8s::Error> {
    let left: Option<K> = delete_one(cluster, object, uid).await?;
    match &left {
        Some(leaving) => cache.written(leaving),
        None => cache.deleted(&cluster.id.owner.0, &object.name, uid),
    }
    Ok(outcome(left.as_ref()))
}

/// What is still there although it was to go is asked again, more and more slowly: someone's finalizer holds it.
fn outcome<K: Owned>(left: Option<&K>) -> Outcome {
    match left.map(ResourceExt::finalizers) {
        None => Outcome::Verified,
        Some(finalizers) => {
            Outcome::Failed(format!("it is held by the finalizers {}", finalizers.join(", ")))
        }
    }
}

async fn delete_one<K: Owned>(
    cluster: &Cluster,
    object: &ObjectRef,
    uid: &str,
) -> Result<Option<K>, k8s::Error> {
    let (namespace, _) = &cluster.id.owner;
    apply::delete(&cluster.shell.clients.requests, namespace, &object.name, uid).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    fn id() -> ClusterId {
        ClusterId { owner: ("shop".into(), "ledger".into()), uid: "c-1".into() }
    }

    fn object(kind: ObjectKind, name: &str) -> ObjectRef {
        ObjectRef { kind, name: name.to_owned() }
    }

    fn owned_by(owner: &str) -> Observed<ObjectMeta> {
        let owner = OwnerReference { uid: owner.to_owned(), ..OwnerReference::default() };
        Observed::Present(ObjectMeta {
            uid: Some("o-1".into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        })
    }

    fn kept(shards: u16) -> Kept {
        let members = (0..shards).flat_map(|shard| [0, 1].map(|ordinal| MemberId::new(shard, ordinal)));
        Kept { shards: (0..shards).map(ShardId).collect(), members: members.collect() }
    }

    fn known(object: &ObjectRef, live: Observed<LiveObject>) -> Known {
        let facts = ObjectFacts {
            wanted: Digest("d".into()),
            wanted_revision: None,
            shard: None,
            vital: false,
            surplus: false,
            live,
        };
        [(object.clone(), facts)].into()
    }

    #[test]
    fn only_what_a_shard_has_of_its_own_is_a_shards() {
        let of = |kind, name| shard_of("ledger", &object(kind, name)).map(|shard| shard.0);
        assert_eq!(of(ObjectKind::StatefulSet, "ledger-3"), Some(3));
        assert_eq!(of(ObjectKind::PodDisruptionBudget, "ledger-12"), Some(12));
        assert_eq!(of(ObjectKind::Secret, "ledger-identity-3"), Some(3));
        assert_eq!(of(ObjectKind::Secret, "ledger-3"), None);
        assert_eq!(of(ObjectKind::Secret, "ledger-system"), None);
        assert_eq!(of(ObjectKind::StatefulSet, "ledger-1-3"), None, "of the cluster ledger-1");
        assert_eq!(of(ObjectKind::StatefulSet, "ledger-03"), None);
        assert_eq!(of(ObjectKind::Service, "ledger-3"), None);
        assert_eq!(of(ObjectKind::Service, "ledger-node-3-1"), Some(3));
        assert_eq!(of(ObjectKind::Service, "ledger-node-3-01"), None);
        assert_eq!(of(ObjectKind::StatefulSet, "ledger-node-3-1"), None);
    }

    #[test]
    fn what_the_resource_owns_of_a_shard_that_is_not_kept_is_surplus() {
        let set = object(ObjectKind::StatefulSet, "ledger-3");
        let secret = object(ObjectKind::Secret, "ledger-identity-3");
        let found: Found =
            [(set.clone(), owned_by("c-1")), (secret.clone(), owned_by("c-1"))].into_iter().collect();
        let seen = facts(&id(), &kept(3), &found, &Known::new());
        assert_eq!(seen.keys().collect::<Vec<_>>(), [&secret, &set]);
        for facts in seen.values() {
            assert!(facts.surplus && !facts.vital && facts.wanted_revision.is_none());
            assert_eq!((facts.shard, &facts.live.present().unwrap().uid), (Some(ShardId(3)), &"o-1".into()));
        }
        assert_eq!(facts(&id(), &kept(4), &found, &Known::new()), Known::new(), "it is wanted again");
    }

    #[test]
    fn the_service_of_a_member_that_is_neither_wanted_nor_there_is_surplus_also_in_a_shard_that_stays() {
        let services =
            ["ledger-node-0-1", "ledger-node-0-2", "ledger"].map(|name| object(ObjectKind::Service, name));
        let found: Found = services.iter().map(|service| (service.clone(), owned_by("c-1"))).collect();
        let seen = facts(&id(), &kept(1), &found, &Known::new());
        assert_eq!(seen.keys().collect::<Vec<_>>(), [&services[1]]);
        assert!(seen.values().all(|facts| facts.surplus && facts.shard == Some(ShardId(0))));
    }

    #[test]
    fn what_another_resource_owns_is_never_surplus() {
        let set = object(ObjectKind::StatefulSet, "ledger-3");
        let found: Found = [(set.clone(), owned_by("c-0"))].into_iter().collect();
        assert_eq!(facts(&id(), &kept(3), &found, &Known::new()), Known::new());
    }

    #[test]
    fn what_was_known_and_is_gone_is_told_as_absent_and_surplus_whether_it_was_rendered_or_not() {
        let secret = object(ObjectKind::Secret, "ledger-identity-3");
        let live = LiveObject {
            uid: "o-1".into(),
            digest: Digest("d".into()),
            revision: None,
            foreign_manager: None,
            taken_by: None,
            pods_refused: None,
        };
        for before in [Observed::Present(live), Observed::Absent] {
            let seen = facts(&id(), &kept(3), &Found::new(), &known(&secret, before));
            assert!(seen[&secret].surplus && seen[&secret].live.is_absent());
        }
        assert_eq!(facts(&id(), &kept(4), &Found::new(), &known(&secret, Observed::Absent)), Known::new());
    }

    #[test]
    fn what_a_finalizer_holds_is_not_deleted_yet() {
        let mut held = Secret::default();
        held.metadata.finalizers = Some(vec!["example.com/backup".to_owned()]);
        let said = "it is held by the finalizers example.com/backup".to_owned();
        assert_eq!(outcome(Some(&held)), Outcome::Failed(said));
        assert_eq!(outcome::<Secret>(None), Outcome::Verified);
    }

    #[test]
    fn a_secret_that_nobody_could_read_stays_as_it_is_known() {
        let secret = object(ObjectKind::Secret, "ledger-identity-3");
        let found: Found = [(secret.clone(), Observed::Unknown(Why::ApiError))].into_iter().collect();
        assert_eq!(facts(&id(), &kept(3), &found, &known(&secret, Observed::Absent)), Known::new());
    }
}
