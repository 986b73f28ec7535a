//! Owned objects: what the spec renders to, what is there, and how the one becomes the other. Rendering is pure and
//! depends on few things; it is done again only when one of them changed.

mod creation;
mod namesakes;
mod renewal;
mod surplus;

pub use namesakes::is_own_route;
pub use renewal::renew;
use surplus::Kept;
pub use surplus::delete;

use crate::{
    api::{Invalid, Parsed, v1alpha1::ValkeyCluster},
    clock,
    cluster::{Cluster, ClusterId},
    k8s::{self, FIELD_MANAGER, apply::Owned, cache::Cache, secrets::Noticed},
    objects::{self, AddressType, Context, Credentials, Identity, Rendered, SecretText},
    pki,
    vault::{self, Signing},
};
use creation::Creations;
use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Pod, Secret, Service},
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta},
};
use kube::ResourceExt;
use namesakes::{Namesakes, taken};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use valkeeper_core::{
    effect::Outcome,
    ids::{Digest, MemberId, ShardId},
    observation::{LiveObject, ObjectFacts, ObjectKind, ObjectRef, Observed, Why},
    spec::DesiredCluster,
};

/// What rendering depends on, in a form that can be compared.
#[derive(PartialEq)]
struct Basis {
    /// How many shards were rendered; `None` if only what is vital was.
    shards: Option<u16>,
    resource_version: Option<String>,
    context: Context,
}

/// A live object as it was when its digest was taken.
struct Digested {
    resource_version: Option<String>,
    wanted: Digest,
    live: LiveObject,
}

/// What the spec renders to, and what was found of it.
#[derive(Default)]
pub struct OwnedObjects {
    basis: Option<Basis>,
    rendered: Arc<Vec<Rendered>>,
    /// The passwords, and the version of the Secret they came from (`None`: made here, not seen in a Secret yet).
    credentials: Option<(Option<String>, Credentials)>,
    /// What signs the cluster's certificates.
    authority: Signing,
    /// The certificates, once they were read or made. From then on this memory overrules the Secrets.
    identities: BTreeMap<ShardId, Identity>,
    digested: BTreeMap<ObjectRef, Digested>,
    /// What somebody else has under our names.
    namesakes: Namesakes,
    creations: Creations,
    /// What members' agents said that they have mounted.
    mounted: BTreeMap<MemberId, String>,
    /// Generation and annotations of the resource at the last look.
    asked: Option<(Option<i64>, BTreeMap<String, String>)>,
}

impl OwnedObjects {
    /// Takes in what an agent has mounted. True if it had something else: somebody changed a Secret.
    pub fn mounts(&mut self, member: MemberId, mounted: String) -> bool {
        let before = self.mounted.insert(member, mounted);
        before.is_some_and(|before| self.mounted.get(&member) != Some(&before))
    }

    /// Takes in what the user asks for. True if it was something else: whoever changes a Secret may say so by it.
    fn asks(&mut self, resource: &ValkeyCluster) -> bool {
        let asked = (resource.metadata.generation, resource.annotations().clone());
        let before = self.asked.replace(asked);
        before.is_some_and(|before| self.asked.as_ref() != Some(&before))
    }

    /// The password of the operator's login user, once it is known.
    pub fn operator_password(&self) -> Option<SecretText> {
        self.credentials.as_ref().map(|(_, credentials)| credentials.operator.clone())
    }

    /// Everything, or without a usable spec what is vital; only if anything that it depends on has changed.
    fn render(&mut self, resource: &ValkeyCluster, parsed: Option<&Parsed>, context: Context) {
        let shards = parsed.map(|parsed| parsed.desired.shards);
        let basis = Basis { resource_version: resource.resource_version(), shards, context };
        if self.basis.as_ref() != Some(&basis) {
            self.rendered = Arc::new(match parsed {
                Some(parsed) => objects::render_all(resource, parsed, &basis.context),
                None => objects::render_vital(resource, &basis.context),
            });
            self.basis = Some(basis);
        }
    }
}

/// Why there is nothing to compare.
pub enum NotRendered {
    /// A Secret could not be read.
    Unreadable(k8s::Error),
    /// There is nothing to sign certificates with.
    NoAuthority(vault::Error),
    /// The spec names a Secret that cannot be used.
    Refused(Invalid),
}

impl NotRendered {
    /// Says so in the log.
    pub fn warn(&self) {
        match self {
            NotRendered::Unreadable(e) => tracing::warn!(error = k8s::chain(e), "a Secret could not be read"),
            NotRendered::NoAuthority(e) => {
                tracing::warn!(error = k8s::chain(e), "no certificates can be signed");
            }
            NotRendered::Refused(invalid) => tracing::warn!(%invalid, "the spec cannot be used"),
        }
    }
}

impl From<vault::Error> for NotRendered {
    fn from(error: vault::Error) -> Self {
        NotRendered::NoAuthority(error)
    }
}

impl From<pki::Error> for NotRendered {
    fn from(error: pki::Error) -> Self {
        NotRendered::NoAuthority(error.into())
    }
}

impl From<k8s::Error> for NotRendered {
    fn from(error: k8s::Error) -> Self {
        NotRendered::Unreadable(error)
    }
}

/// Renders what is wanted, if anything that it depends on has changed. `parsed` has every shard that has to be there.
///
/// # Errors
/// [`NotRendered`]: what was rendered before stays, and is not compared in this turn.
pub async fn render(
    cluster: &mut Cluster,
    resource: &ValkeyCluster,
    parsed: &Parsed,
) -> Result<(), NotRendered> {
    if cluster.owned.asks(resource) {
        cluster.secrets.doubt();
    }
    let credentials = credentials(cluster, resource).await?;
    identities(cluster, &parsed.desired).await?;
    let world = &cluster.shell.world;
    let mut services = world.services.of(&cluster.id.owner);
    services.retain(|s| taken(&cluster.id, ObjectKind::Service, &s.metadata).is_none());
    let service_uids = services.iter().filter_map(|s| Some((s.name_any(), s.uid()?))).collect();
    // A slice's address type can never change, and there are no pods yet when it is made: the Service knows it.
    let is_v6 = |s: &Service| {
        let families = s.spec.as_ref().and_then(|spec| spec.ip_families.as_ref());
        families.and_then(|f| f.first()).is_some_and(|family| family == "IPv6")
    };
    let address_type = if services.iter().any(|s| is_v6(s)) { AddressType::IPv6 } else { AddressType::IPv4 };
    let identities = cluster.owned.identities.clone();
    let context = Context { credentials, identities, service_uids, address_type };
    cluster.owned.render(resource, Some(parsed), context);
    Ok(())
}

/// Renders only what the members that run by the last valid spec cannot be without.
///
/// # Errors
/// [`NotRendered`].
pub async fn render_vital(cluster: &mut Cluster, resource: &ValkeyCluster) -> Result<(), NotRendered> {
    let Some(spec) = cluster.state.desired(cluster.clock.now()) else {
        (cluster.owned.rendered, cluster.owned.basis) = (Arc::default(), None);
        return Ok(());
    };
    let credentials = own_credentials(cluster, None).await?;
    identities(cluster, &spec).await?;
    let identities = cluster.owned.identities.clone();
    // These render from neither.
    let (service_uids, address_type) = (BTreeMap::new(), AddressType::default());
    cluster.owned.render(resource, None, Context { credentials, identities, service_uids, address_type });
    Ok(())
}

/// The passwords: what the Secrets have, completed once by what they lack. A Secret that is gone is restored from
/// memory, because the members still know these passwords.
async fn credentials(cluster: &mut Cluster, resource: &ValkeyCluster) -> Result<Credentials, NotRendered> {
    let default = match &resource.spec.auth.password_secret {
        None => None,
        Some(reference) => {
            let secret = cluster.secrets.get(&reference.name, Noticed::ByReading).await?;
            Some(Credentials::from_user(reference, secret.as_deref()).map_err(NotRendered::Refused)?)
        }
    };
    own_credentials(cluster, default).await
}

/// The same, with `default` as the user's password if there is one.
async fn own_credentials(
    cluster: &mut Cluster,
    default: Option<SecretText>,
) -> Result<Credentials, NotRendered> {
    let system = own_secret(cluster, &objects::names::system(&cluster.id.owner.1)).await?;
    let version = system.as_ref().and_then(|s| s.resource_version());
    let mut credentials = match &cluster.owned.credentials {
        Some((known, credentials)) if version.is_none() || *known == version => credentials.clone(),
        Some(_) | None => Credentials::complete(system.as_deref(), default.clone(), &mut rand::rng()),
    };
    if let Some(default) = default {
        credentials.default = default;
    }
    cluster.owned.credentials = Some((version, credentials.clone()));
    Ok(credentials)
}

/// The Secret of this name, if it is this cluster's: what others know is no password of ours.
async fn own_secret(cluster: &Cluster, name: &str) -> Result<Option<Arc<Secret>>, k8s::Error> {
    let secret = cluster.secrets.get(name, noticed(&cluster.id, name)).await?;
    Ok(secret.filter(|s| taken(&cluster.id, ObjectKind::Secret, &s.metadata).is_none()))
}

/// The certificates: what the Secrets had when this task began, completed by what is missing or due. A turn comes at least
/// once a second, so a renewal is never late.
async fn identities(cluster: &mut Cluster, spec: &DesiredCluster) -> Result<(), NotRendered> {
    let vault = &cluster.shell.vault;
    let now = clock::wall();
    let authority = cluster.owned.authority.get(vault, &cluster.id, now).await?;
    // Who is no longer wanted and still runs needs its certificate until it is gone.
    let pods = cluster.shell.world.pods.of(&cluster.id.owner);
    let running =
        pods.iter().filter_map(|p| objects::names::member_of_pod(&cluster.id.owner.1, &p.name_any()));
    let all: BTreeSet<MemberId> = spec.members().chain(running).collect();
    let members = |shard: ShardId| all.iter().copied().filter(move |id| id.shard == shard);
    let shards: BTreeSet<ShardId> = spec.shard_ids().collect();
    cluster.owned.identities.retain(|shard, _| shards.contains(shard));
    for shard in shards {
        let known = match cluster.owned.identities.remove(&shard) {
            Some(known) => known,
            None => {
                let name = objects::names::identity(&cluster.id.owner.1, shard);
                let live = own_secret(cluster, &name).await?;
                live.as_deref().map(Identity::read).unwrap_or_default()
            }
        };
        let lifetime = vault.leaf_lifetime();
        let identity = known.complete(&authority.roots, &authority.issuer, members(shard), lifetime, now)?;
        cluster.owned.identities.insert(shard, identity);
    }
    Ok(())
}

/// Wanted and live state of every object that is rendered, or known from before, or left of shards that are not to be.
pub async fn facts(cluster: &mut Cluster) -> BTreeMap<ObjectRef, ObjectFacts> {
    let mut facts = rendered_facts(cluster).await;
    let kept = Kept::of(cluster);
    facts.extend(surplus::look(cluster, &kept).await);
    // A write route is not rendered while its Service is missing, so nobody can say whether it is as wanted. That it is there
    // or not can be said, and must be: what is unknown holds everything.
    let name = &cluster.id.owner.1;
    let is_left = |object| kept.shard_left(name, object).is_some();
    for (object, known) in &cluster.state.objects {
        if !facts.contains_key(object) && known.live.is_unknown() && !is_left(object) {
            let live = match meta(cluster, object) {
                Some(meta) => {
                    let own = || LiveObject {
                        uid: meta.uid.clone().unwrap_or_default(),
                        digest: known.wanted.clone(),
                        revision: known.wanted_revision.clone(),
                        foreign_manager: None,
                        taken_by: None,
                        pods_refused: None,
                    };
                    Observed::Present(taken(&cluster.id, object.kind, &meta).unwrap_or_else(own))
                }
                None => Observed::Absent,
            };
            facts.insert(object.clone(), ObjectFacts { live, ..known.clone() });
        }
    }
    facts
}

/// Wanted and live state of every object that is rendered.
pub async fn rendered_facts(cluster: &mut Cluster) -> BTreeMap<ObjectRef, ObjectFacts> {
    let mut facts = BTreeMap::new();
    for rendered in Arc::clone(&cluster.owned.rendered).iter() {
        let live = live(cluster, rendered).await;
        let live = with_pods_refused(cluster, rendered, live);
        facts.insert(rendered.object.clone(), rendered.facts(live));
    }
    facts
}

/// The same with the words of why a StatefulSet lacks pods.
fn with_pods_refused(
    cluster: &Cluster,
    rendered: &Rendered,
    live: Observed<LiveObject>,
) -> Observed<LiveObject> {
    let (namespace, name) = &cluster.id.owner;
    let Observed::Present(live) = live else { return live };
    if rendered.object.kind != ObjectKind::StatefulSet || live.taken_by.is_some() {
        return Observed::Present(live);
    }
    let world = &cluster.shell.world;
    let set = world.stateful_sets.get(namespace, &rendered.object.name);
    let wanted = set.and_then(|set| set.spec.as_ref()?.replicas).unwrap_or_default();
    let pods = world.pods.of(&cluster.id.owner);
    let of_shard = |pod: &Pod| objects::names::member_of_pod(name, &pod.name_any()).map(|id| id.shard);
    let there = pods.iter().filter(|pod| of_shard(pod) == rendered.shard).count();
    let lacks = there < usize::try_from(wanted).unwrap_or_default();
    let client = &cluster.shell.clients.requests;
    let pods_refused = cluster.owned.creations.told(client, namespace, &live.uid, lacks);
    Observed::Present(LiveObject { pods_refused, ..live })
}

/// Applies an object as it was rendered for this turn, if that is what was decided.
///
/// # Errors
/// The API server's.
pub async fn apply(cluster: &Cluster, object: &ObjectRef, digest: &Digest) -> Result<Outcome, k8s::Error> {
    let Some(rendered) = cluster.owned.rendered.iter().find(|r| r.object == *object) else {
        return Ok(Outcome::Superseded("it is not wanted now".to_owned()));
    };
    if rendered.digest != *digest {
        return Ok(Outcome::Superseded("another content is wanted now".to_owned()));
    }
    let world = &cluster.shell.world;
    Ok(match object.kind {
        ObjectKind::Secret => match apply_one::<Secret>(cluster, rendered, None).await? {
            Ok(secret) => {
                let outcome = of_answer(rendered, &secret);
                cluster.secrets.written(&object.name, secret);
                outcome
            }
            Err(outcome) => {
                cluster.secrets.doubt_one(&object.name);
                outcome
            }
        },
        ObjectKind::ConfigMap => apply_watched::<ConfigMap>(cluster, rendered, &world.config_maps).await?,
        ObjectKind::Service => apply_watched::<Service>(cluster, rendered, &world.services).await?,
        ObjectKind::EndpointSlice => apply_watched::<EndpointSlice>(cluster, rendered, &world.slices).await?,
        ObjectKind::PodDisruptionBudget => {
            apply_watched::<PodDisruptionBudget>(cluster, rendered, &world.budgets).await?
        }
        ObjectKind::StatefulSet => {
            apply_watched::<StatefulSet>(cluster, rendered, &world.stateful_sets).await?
        }
    })
}

/// What the answer says of the object: if it is not as it was sent, it never will be, and only a failure makes the next
/// attempts come more and more slowly.
fn of_answer<K: Owned>(rendered: &Rendered, answer: &K) -> Outcome {
    let value = serde_json::to_value(answer).unwrap_or_default();
    if rendered.live_digest(&value) == rendered.digest {
        return Outcome::Verified;
    }
    Outcome::Failed("the API server changes what it is sent: probably an admission webhook".to_owned())
}

async fn apply_watched<K: Owned>(
    cluster: &Cluster,
    rendered: &Rendered,
    cache: &Cache<K>,
) -> Result<Outcome, k8s::Error> {
    let seen = cache.get(&cluster.id.owner.0, &rendered.object.name);
    Ok(match apply_one::<K>(cluster, rendered, seen.map(|seen| seen.meta().clone())).await? {
        Ok(applied) => {
            cache.written(&applied);
            of_answer(rendered, &applied)
        }
        Err(outcome) => outcome,
    })
}

async fn apply_one<K: Owned>(
    cluster: &Cluster,
    rendered: &Rendered,
    seen: Option<ObjectMeta>,
) -> Result<Result<K, Outcome>, k8s::Error> {
    let Cluster { shell, id, owned, .. } = cluster;
    owned.namesakes.apply(&shell.clients.requests, id, (&rendered.object, &rendered.value()), seen).await
}

async fn live(cluster: &mut Cluster, rendered: &Rendered) -> Observed<LiveObject> {
    let Rendered { object: object @ ObjectRef { kind, name }, .. } = rendered;
    let shell = Arc::clone(&cluster.shell);
    let (world, namespace) = (&shell.world, cluster.id.owner.0.clone());
    let (id, owned) = (&cluster.id, &mut cluster.owned);
    let found = match kind {
        ObjectKind::Secret => match cluster.secrets.get(name, noticed(id, name)).await {
            Ok(secret) => secret.map(|o| facts_of(owned, id, rendered, &*o)),
            Err(_) => return Observed::Unknown(Why::ApiError),
        },
        ObjectKind::ConfigMap => {
            world.config_maps.get(&namespace, name).map(|o| facts_of(owned, id, rendered, &*o))
        }
        ObjectKind::Service => {
            world.services.get(&namespace, name).map(|o| facts_of(owned, id, rendered, &*o))
        }
        ObjectKind::EndpointSlice => {
            world.slices.get(&namespace, name).map(|o| facts_of(owned, id, rendered, &*o))
        }
        ObjectKind::PodDisruptionBudget => {
            world.budgets.get(&namespace, name).map(|o| facts_of(owned, id, rendered, &*o))
        }
        ObjectKind::StatefulSet => {
            world.stateful_sets.get(&namespace, name).map(|o| facts_of(owned, id, rendered, &*o))
        }
    };
    if *kind == ObjectKind::Secret && found.as_ref().is_some_and(|live| live.taken_by.is_some()) {
        cluster.secrets.doubt_one(name);
    }
    let unlabelled = || owned.namesakes.get(&shell.clients.requests, id, object);
    found.or_else(unlabelled).map_or(Observed::Absent, Observed::Present)
}

/// Who notices a change of one of our own Secrets: that of clients is mounted nowhere, and of the passwords only what is made of them.
fn noticed(id: &ClusterId, name: &str) -> Noticed {
    let (_, cluster) = &id.owner;
    let by_reading = [objects::names::auth(cluster), objects::names::system(cluster)];
    if by_reading.iter().any(|known| known == name) { Noticed::ByReading } else { Noticed::ByAgents }
}

/// The live object as facts. Its digest is taken again only when it, or what is wanted of it, changed.
fn facts_of<K: Owned>(owned: &mut OwnedObjects, id: &ClusterId, rendered: &Rendered, live: &K) -> LiveObject {
    if let Some(namesake) = taken(id, rendered.object.kind, live.meta()) {
        return namesake;
    }
    let resource_version = live.resource_version();
    if let Some(known) = owned.digested.get(&rendered.object)
        && (&known.resource_version, &known.wanted) == (&resource_version, &rendered.digest)
    {
        return known.live.clone();
    }
    let value = serde_json::to_value(live).unwrap_or_default();
    let digest = rendered.live_digest(&value);
    let differs = digest != rendered.digest;
    let facts = LiveObject {
        uid: live.uid().unwrap_or_default(),
        revision: template_revision(&value),
        foreign_manager: if differs { last_foreign_manager(live.managed_fields()) } else { None },
        taken_by: None,
        pods_refused: None,
        digest,
    };
    let digested = Digested { resource_version, wanted: rendered.digest.clone(), live: facts.clone() };
    owned.digested.insert(rendered.object.clone(), digested);
    facts
}

fn template_revision(live: &Value) -> Option<Digest> {
    let annotations = live.pointer("/spec/template/metadata/annotations")?;
    annotations.get(objects::ANNOTATION_REVISION)?.as_str().map(|text| Digest(text.to_owned()))
}

/// Who wrote an object last, status aside, if that was not the operator.
fn last_foreign_manager(entries: &[ManagedFieldsEntry]) -> Option<String> {
    let of_spec = entries.iter().filter(|e| e.subresource.as_deref().unwrap_or_default().is_empty());
    let last = of_spec.max_by_key(|e| e.time.as_ref().map(|t| t.0))?;
    last.manager.clone().filter(|m| !m.starts_with(FIELD_MANAGER))
}

fn meta(cluster: &Cluster, object: &ObjectRef) -> Option<ObjectMeta> {
    let ((namespace, _), world) = (&cluster.id.owner, &cluster.shell.world);
    let name = &object.name;
    match object.kind {
        // Always rendered.
        ObjectKind::Secret => None,
        ObjectKind::ConfigMap => world.config_maps.get(namespace, name).map(|o| o.metadata.clone()),
        ObjectKind::Service => world.services.get(namespace, name).map(|o| o.metadata.clone()),
        ObjectKind::EndpointSlice => world.slices.get(namespace, name).map(|o| o.metadata.clone()),
        ObjectKind::PodDisruptionBudget => world.budgets.get(namespace, name).map(|o| o.metadata.clone()),
        ObjectKind::StatefulSet => world.stateful_sets.get(namespace, name).map(|o| o.metadata.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    fn entry(manager: &str, at_s: i64, subresource: &str) -> ManagedFieldsEntry {
        ManagedFieldsEntry {
            manager: Some(manager.to_owned()),
            time: Timestamp::from_second(at_s).ok().map(Time),
            subresource: Some(subresource.to_owned()),
            ..ManagedFieldsEntry::default()
        }
    }

    #[test]
    fn the_last_writer_is_named_if_it_is_someone_else() {
        let edited = [entry("valkeeper", 1, ""), entry("kubectl-edit", 2, "")];
        assert_eq!(last_foreign_manager(&edited).as_deref(), Some("kubectl-edit"));
        let applied_since = [entry("kubectl-edit", 2, ""), entry("valkeeper", 3, "")];
        assert_eq!(last_foreign_manager(&applied_since), None);
    }

    #[test]
    fn an_answer_that_differs_from_what_was_sent_is_a_failure() {
        let resource: ValkeyCluster = serde_json::from_value(serde_json::json!({
            "apiVersion": "valkeeper.io/v1alpha1", "kind": "ValkeyCluster",
            "metadata": { "name": "orders", "namespace": "shop", "uid": "c-1" },
            "spec": { "topology": "Replication" },
        }))
        .unwrap();
        let context = Context {
            credentials: Credentials::complete(None, None, &mut rand::rng()),
            identities: BTreeMap::new(),
            service_uids: BTreeMap::new(),
            address_type: AddressType::IPv4,
        };
        let parsed = crate::api::parse_all(&resource, &crate::api::Defaults::default()).unwrap();
        let all = objects::render_all(&resource, &parsed, &context);
        let sent = all.iter().find(|r| r.object.kind == ObjectKind::ConfigMap).unwrap();
        let mut answer: ConfigMap = serde_json::from_value(sent.value()).unwrap();
        answer.annotations_mut().insert("added".to_owned(), "beside".to_owned());
        assert_eq!(of_answer(sent, &answer), Outcome::Verified);
        answer.data = Some([("valkey.conf".to_owned(), "rewritten".to_owned())].into());
        assert!(matches!(of_answer(sent, &answer), Outcome::Failed(_)));
    }

    #[test]
    fn who_writes_the_status_only_is_no_foreign_writer() {
        let entries = [entry("valkeeper", 1, ""), entry("kube-controller-manager", 5, "status")];
        assert_eq!(last_foreign_manager(&entries), None);
    }
}
