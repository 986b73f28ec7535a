//! Watches: they fill the caches, from which every read of a turn comes, and wake the task of the cluster that an
//! object belongs to. A lost wake-up costs latency only.

use super::{
    CLUSTER_LABEL, FIELD_MANAGER, MANAGED_BY,
    cache::{Cache, Owner, owner_of},
    client::{Clients, WATCH_S},
};
use crate::{api::v1alpha1::ValkeyCluster, objects::names};
use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{ConfigMap, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Resource, ResourceExt,
    core::NamespaceResourceScope,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::Notify;

/// Everything watched.
#[derive(Default)]
pub struct World {
    /// The users' resources.
    pub clusters: Cache<ValkeyCluster>,
    /// Pods of members.
    pub pods: Cache<Pod>,
    /// Workloads.
    pub stateful_sets: Cache<StatefulSet>,
    /// Services.
    pub services: Cache<Service>,
    /// Rendered configuration.
    pub config_maps: Cache<ConfigMap>,
    /// PodDisruptionBudgets.
    pub budgets: Cache<PodDisruptionBudget>,
    /// Write routes.
    pub slices: Cache<EndpointSlice>,
    /// Nodes; without namespace.
    pub nodes: Cache<Node>,
}

/// Who is woken by what: one [`Notify`] for each cluster's task, and one for the list of clusters.
#[derive(Default)]
pub struct Wakers {
    tasks: Mutex<HashMap<Owner, Arc<Notify>>>,
    /// Woken when a user's resource appears, changes or goes.
    pub clusters: Notify,
}

impl Wakers {
    /// The waker of a cluster's task; made at first use.
    pub fn of(&self, owner: &Owner) -> Arc<Notify> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tasks.entry(owner.clone()).or_default())
    }

    /// Forgets the waker of a cluster that is gone.
    pub fn forget(&self, owner: &Owner) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).remove(owner);
    }

    fn wake(&self, owner: &Owner) {
        if let Some(task) = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).get(owner) {
            task.notify_one();
        }
    }

    fn wake_all(&self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).values() {
            task.notify_one();
        }
        self.clusters.notify_one();
    }
}

impl World {
    /// Waits until every cache has its first full list.
    pub async fn wait_until_ready(&self) {
        tokio::join!(
            self.clusters.wait_until_ready(),
            self.pods.wait_until_ready(),
            self.stateful_sets.wait_until_ready(),
            self.services.wait_until_ready(),
            self.config_maps.wait_until_ready(),
            self.budgets.wait_until_ready(),
            self.slices.wait_until_ready(),
            self.nodes.wait_until_ready(),
        );
    }
}

/// Runs every watch, for ever. `namespace`: watch the clusters of this one only.
pub async fn run(clients: &Clients, namespace: Option<&str>, world: &World, wakers: &Wakers) {
    // The second term leaves out the journals' ConfigMaps.
    let ours = format!("{MANAGED_BY}={FIELD_MANAGER},{CLUSTER_LABEL}");
    // The endpointslice controller copies a Service's labels to the slices that it makes itself: those are not ours.
    let our_slices = format!("{ours},{}={}", names::SLICE_MANAGED_BY, names::SLICE_MANAGER);
    let (clusters, nodes) = (watch_config(None), watch_config(None));
    let by_label = |o: Option<Owner>| o.map_or(Affects::Nobody, Affects::Cluster);
    tokio::join!(
        follow(stream(clients, namespace, clusters), &world.clusters, wakers, resource),
        follow(stream(clients, namespace, watch_config(Some(&ours))), &world.pods, wakers, |o, _| by_label(
            owner_of(o)
        )),
        follow(
            stream(clients, namespace, watch_config(Some(&ours))),
            &world.stateful_sets,
            wakers,
            |o, _| { by_label(owner_of(o)) }
        ),
        follow(stream(clients, namespace, watch_config(Some(&ours))), &world.services, wakers, |o, _| {
            by_label(owner_of(o))
        }),
        follow(stream(clients, namespace, watch_config(Some(&ours))), &world.config_maps, wakers, |o, _| {
            by_label(owner_of(o))
        }),
        follow(stream(clients, namespace, watch_config(Some(&ours))), &world.budgets, wakers, |o, _| {
            by_label(owner_of(o))
        }),
        follow(stream(clients, namespace, watch_config(Some(&our_slices))), &world.slices, wakers, |o, _| {
            by_label(owner_of(o))
        }),
        follow_nodes(clients, nodes, world, wakers),
    );
}

/// Whom a change concerns.
enum Affects {
    /// A user's resource and its task.
    Resource(Owner),
    /// A cluster's task.
    Cluster(Owner),
    /// Nobody.
    Nobody,
}

/// A resource of which nothing but the status has changed concerns nobody: its task wrote that itself, and would look, record what it
/// saw, and write the status again for ever while slots move.
fn resource(cluster: &ValkeyCluster, known: Option<&ValkeyCluster>) -> Affects {
    if known.is_some_and(|known| asks_the_same(known, cluster)) {
        return Affects::Nobody;
    }
    Affects::Resource((cluster.namespace().unwrap_or_default(), cluster.name_any()))
}

/// True if two states of a resource differ in nothing but their status.
pub fn asks_the_same(a: &ValkeyCluster, b: &ValkeyCluster) -> bool {
    // Every change of the spec has a generation of its own.
    fn asked(cluster: &ValkeyCluster) -> impl PartialEq + '_ {
        let of = &cluster.metadata;
        (&of.uid, of.generation, &of.deletion_timestamp, &of.finalizers, &of.annotations, &of.labels)
    }
    asked(a) == asked(b)
}

type Events<K> = BoxStream<'static, Result<Event<K>, watcher::Error>>;

fn stream<K>(clients: &Clients, namespace: Option<&str>, config: watcher::Config) -> Events<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static,
{
    let client = clients.watches.clone();
    let api: Api<K> = match namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    };
    watcher(api, config).default_backoff().boxed()
}

fn watch_config(labels: Option<&str>) -> watcher::Config {
    let config = watcher::Config::default().timeout(WATCH_S);
    match labels {
        Some(labels) => config.labels(labels),
        None => config,
    }
}

async fn follow<K>(
    mut events: Events<K>,
    cache: &Cache<K>,
    wakers: &Wakers,
    affects: impl Fn(&K, Option<&K>) -> Affects,
) where
    K: Resource<DynamicType = ()> + Clone + Send + 'static,
{
    while let Some(event) = next(&mut events, K::kind(&()).as_ref()).await {
        let affected = match &event {
            Event::Apply(object) => {
                let known = cache.get(&object.namespace().unwrap_or_default(), &object.name_any());
                affects(object, known.as_deref())
            }
            Event::Delete(object) => affects(object, None),
            Event::Init | Event::InitApply(_) | Event::InitDone => Affects::Nobody,
        };
        let changed = cache.take_in(&event);
        match &event {
            Event::Apply(_) | Event::Delete(_) if changed => match affected {
                Affects::Resource(owner) => {
                    wakers.wake(&owner);
                    wakers.clusters.notify_one();
                }
                Affects::Cluster(owner) => wakers.wake(&owner),
                Affects::Nobody => {}
            },
            // Deletions that were missed do not show as events: let everyone look.
            Event::InitDone => wakers.wake_all(),
            Event::Apply(_) | Event::Delete(_) | Event::Init | Event::InitApply(_) => {}
        }
    }
}

/// A node that becomes ready or not, or is cordoned or not, concerns every cluster with a pod on it. Its other changes (images, addresses, sizes)
/// are frequent and concern nobody.
async fn follow_nodes(clients: &Clients, config: watcher::Config, world: &World, wakers: &Wakers) {
    let api: Api<Node> = Api::all(clients.watches.clone());
    let mut events: Events<Node> = watcher(api, config).default_backoff().map(|e| e.map(slim)).boxed();
    while let Some(event) = next(&mut events, "Node").await {
        let before = match &event {
            Event::Apply(node) | Event::Delete(node) => {
                world.nodes.get("", &node.name_any()).map(|n| of_concern(&n))
            }
            Event::Init | Event::InitApply(_) | Event::InitDone => None,
        };
        world.nodes.take_in(&event);
        match &event {
            Event::Apply(node) if before != Some(of_concern(node)) => wake_pods_of(node, world, wakers),
            Event::Delete(node) => wake_pods_of(node, world, wakers),
            Event::InitDone => wakers.wake_all(),
            Event::Apply(_) | Event::Init | Event::InitApply(_) => {}
        }
    }
}

fn wake_pods_of(node: &Node, world: &World, wakers: &Wakers) {
    let name = node.name_any();
    let on_it = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name.as_str());
    for pod in world.pods.all().iter().filter(|pod| on_it(pod)) {
        if let Some(owner) = owner_of(&**pod) {
            wakers.wake(&owner);
        }
    }
}

/// What decisions know of a node.
fn of_concern(node: &Node) -> (bool, bool) {
    (node_ready(node), node_cordoned(node))
}

/// True if the node takes no new pods (`kubectl cordon`, and the first thing that a drain does).
pub fn node_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// True if the node's kubelet reports it ready.
pub fn node_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Only readiness and cordons are of interest, and a node's list of images alone has kilobytes.
fn slim(event: Event<Node>) -> Event<Node> {
    event.modify(|node| {
        node.metadata.managed_fields = None;
        node.metadata.annotations = None;
        if let Some(status) = &mut node.status {
            status.images = None;
            status.volumes_attached = None;
        }
    })
}

/// The next event; errors are logged and the stream goes on by itself, with back-off.
async fn next<K: 'static>(events: &mut Events<K>, kind: &str) -> Option<Event<K>> {
    loop {
        match events.next().await? {
            Ok(event) => return Some(event),
            Err(error) => tracing::warn!(kind, error = super::chain(&error), "a watch was interrupted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::v1alpha1::ValkeyClusterStatus;
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    #[test]
    fn a_node_concerns_its_clusters_when_it_is_ready_or_cordoned_and_was_not() {
        let node = |unschedulable: Option<bool>, ready: &str| -> Node {
            let conditions = serde_json::json!([{ "type": "Ready", "status": ready }]);
            let spec = serde_json::json!({ "unschedulable": unschedulable });
            let node =
                serde_json::json!({ "metadata": {}, "spec": spec, "status": { "conditions": conditions } });
            serde_json::from_value(node).unwrap()
        };
        assert_eq!(of_concern(&node(None, "True")), of_concern(&node(Some(false), "True")));
        assert_eq!(of_concern(&node(Some(true), "True")), (true, true));
        assert_eq!(of_concern(&node(None, "Unknown")), (false, false));
    }

    #[test]
    fn a_resource_of_which_only_the_status_has_changed_wakes_nobody() {
        let spec = serde_json::json!({ "topology": "Replication" });
        let mut known = ValkeyCluster::new("orders", serde_json::from_value(spec).unwrap());
        known.metadata.generation = Some(1);
        let wakes = |change: fn(&mut ValkeyCluster)| {
            let mut now = known.clone();
            now.metadata.resource_version = Some("2".into());
            change(&mut now);
            matches!(resource(&now, Some(&known)), Affects::Resource(_))
        };
        assert!(!wakes(|now| now.status = Some(ValkeyClusterStatus::default())));
        assert!(wakes(|now| now.metadata.generation = Some(2)));
        assert!(wakes(|now| now.metadata.uid = Some("another".into())));
        assert!(wakes(|now| now.metadata.finalizers = Some(vec!["held".into()])));
        assert!(wakes(|now| now.metadata.annotations = Some([("a".into(), "b".into())].into())));
        assert!(wakes(|now| now.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH))));
        assert!(matches!(resource(&known, None), Affects::Resource(_)), "it is new, or gone");
    }
}
