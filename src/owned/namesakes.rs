//! Objects of somebody else under names that this cluster's objects need: whose they are, and when they are gone. They are never
//! changed or deleted.

use super::last_foreign_manager;
use crate::{
    cluster::{Cluster, ClusterId},
    k8s::{self, API_CALL_MAX, CLUSTER_LABEL, FIELD_MANAGER, MANAGED_BY, apply},
};
use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Secret, Service},
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::Client;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;
use valkeeper_core::observation::{LiveObject, ObjectKind, ObjectRef};

/// Between two looks at an object that no watch shows: the bound of one, so that there is never more than one under way.
const LOOK_AGAIN: std::time::Duration = API_CALL_MAX;

/// Most of an owner's name that is recorded: names of Kubernetes have 253 at most, kinds have no bound. Characters.
const OWNER_CHARS_MAX: usize = 320;

/// The object as facts, if it is not this cluster's. The controller decides: its UID is compared. Without one, what was ever ours says so
/// by an owner or by our labels, as what a deletion with `--cascade=orphan` has left.
pub fn taken(id: &ClusterId, kind: ObjectKind, meta: &ObjectMeta) -> Option<LiveObject> {
    let owner = match owners(meta).find(|owner| owner.controller == Some(true)) {
        Some(owner) if owner.uid == id.uid => return None,
        // It is its Service's, which may have been made anew since.
        Some(owner)
            if kind == ObjectKind::EndpointSlice && is_service_of(meta, owner) && is_labelled(id, meta) =>
        {
            return None;
        }
        Some(owner) => {
            let is_earlier = (owner.kind.as_str(), &owner.name) == ("ValkeyCluster", &id.owner.1);
            let which = if is_earlier { "an earlier " } else { "" };
            format!("{which}{}/{}", owner.kind, owner.name)
        }
        None if is_labelled(id, meta) || owners(meta).any(|owner| owner.uid == id.uid) => return None,
        None => match last_foreign_manager(meta.managed_fields.as_deref().unwrap_or_default()) {
            Some(manager) => format!("nobody, and {manager} wrote it last"),
            None => "nobody".to_owned(),
        },
    };
    let owner = owner.chars().take(OWNER_CHARS_MAX).collect();
    Some(LiveObject::taken(meta.uid.clone().unwrap_or_default(), owner))
}

fn owners(meta: &ObjectMeta) -> impl Iterator<Item = &OwnerReference> {
    meta.owner_references.iter().flatten()
}

fn is_labelled(id: &ClusterId, meta: &ObjectMeta) -> bool {
    let has = |key: &str, value: &str| {
        meta.labels.as_ref().and_then(|labels| labels.get(key)).is_some_and(|found| found == value)
    };
    has(CLUSTER_LABEL, &id.owner.1) && has(MANAGED_BY, FIELD_MANAGER)
}

fn is_service_of(slice: &ObjectMeta, owner: &OwnerReference) -> bool {
    owner.kind == "Service" && slice.name.as_ref() == Some(&owner.name)
}

/// True if a write route and its Service are this cluster's, as far as they are there.
pub fn is_own_route(cluster: &Cluster, slice: &EndpointSlice) -> bool {
    let (id, services) = (&cluster.id, &cluster.shell.world.services);
    let service = slice.metadata.name.as_ref().and_then(|name| services.get(&id.owner.0, name));
    taken(id, ObjectKind::EndpointSlice, &slice.metadata).is_none()
        && service.is_none_or(|service| taken(id, ObjectKind::Service, &service.metadata).is_none())
}

/// What was found under our names, and is without our labels: no watch shows it, or that it goes.
#[derive(Clone, Default)]
pub struct Namesakes(Arc<Mutex<BTreeMap<ObjectRef, Namesake>>>);

struct Namesake {
    live: LiveObject,
    /// When it was last asked for.
    asked_at: Instant,
}

impl Namesakes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectRef, Namesake>> {
        // Never held across an await, and every change under it is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in that there is one.
    pub fn found(&self, object: &ObjectRef, live: LiveObject) {
        self.lock().insert(object.clone(), Namesake { live, asked_at: Instant::now() });
    }

    /// What is known to be there under a name. From time to time that is asked again, beside the turns.
    pub fn get(&self, client: &Client, id: &ClusterId, object: &ObjectRef) -> Option<LiveObject> {
        let mut all = self.lock();
        let known = all.get_mut(object)?;
        if known.asked_at.elapsed() >= LOOK_AGAIN {
            known.asked_at = Instant::now();
            tokio::spawn(self.clone().look_again(client.clone(), id.clone(), object.clone()));
        }
        Some(known.live.clone())
    }

    async fn look_again(self, client: Client, id: ClusterId, object: ObjectRef) {
        match meta(&client, &id.owner.0, &object).await {
            Ok(found) => match found.and_then(|meta| taken(&id, object.kind, &meta)) {
                Some(live) => self.found(&object, live),
                None => {
                    self.lock().remove(&object);
                }
            },
            Err(error) => {
                tracing::warn!(error = k8s::chain(&error), "another's object could not be looked at again");
            }
        }
    }
}

async fn meta(
    client: &Client,
    namespace: &str,
    ObjectRef { kind, name }: &ObjectRef,
) -> Result<Option<ObjectMeta>, k8s::Error> {
    match kind {
        ObjectKind::Secret => apply::meta::<Secret>(client, namespace, name).await,
        ObjectKind::ConfigMap => apply::meta::<ConfigMap>(client, namespace, name).await,
        ObjectKind::Service => apply::meta::<Service>(client, namespace, name).await,
        ObjectKind::EndpointSlice => apply::meta::<EndpointSlice>(client, namespace, name).await,
        ObjectKind::PodDisruptionBudget => apply::meta::<PodDisruptionBudget>(client, namespace, name).await,
        ObjectKind::StatefulSet => apply::meta::<StatefulSet>(client, namespace, name).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Router, http::StatusCode};
    use serde_json::{Value, json};
    use std::sync::atomic::{AtomicBool, Ordering};

    const KIND: ObjectKind = ObjectKind::Service;

    fn id() -> ClusterId {
        ClusterId { owner: ("shop".into(), "orders".into()), uid: "c-1".into() }
    }

    fn object(labels: &Value, owner: &Value) -> ObjectMeta {
        let meta = json!({
            "name": "orders-primary", "uid": "o-1", "labels": labels, "ownerReferences": [owner],
            "managedFields": [{ "manager": "kubectl-create", "operation": "Update", "time": "2026-01-01T00:00:00Z" }],
        });
        serde_json::from_value(meta).unwrap()
    }

    fn owner(kind: &str, name: &str, uid: &str, controller: bool) -> Value {
        json!({ "apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": controller })
    }

    fn ours() -> Value {
        json!({ CLUSTER_LABEL: "orders", MANAGED_BY: FIELD_MANAGER })
    }

    fn taken_by(kind: ObjectKind, meta: &ObjectMeta) -> Option<String> {
        taken(&id(), kind, meta).and_then(|live| live.taken_by)
    }

    #[test]
    fn another_controller_is_named_whatever_the_labels_say() {
        let of = |owner| taken_by(KIND, &object(&ours(), &owner));
        let theirs = of(owner("ValkeyCluster", "orders-primary", "c-2", true));
        assert_eq!(theirs.as_deref(), Some("ValkeyCluster/orders-primary"));
        let earlier = of(owner("ValkeyCluster", "orders", "c-0", true));
        assert_eq!(earlier.as_deref(), Some("an earlier ValkeyCluster/orders"));
        assert_eq!(of(owner("ValkeyCluster", "orders", "c-1", true)), None);
    }

    #[test]
    fn without_a_controller_an_owner_or_our_labels_say_that_it_is_ours() {
        let mut orphan = object(&ours(), &owner("ConfigMap", "theirs", "x", false));
        assert_eq!(taken_by(KIND, &orphan), None);
        orphan.owner_references = None;
        assert_eq!(taken_by(KIND, &orphan), None, "as a deletion with --cascade=orphan leaves it");
        let unlabelled = object(&json!({}), &owner("ValkeyCluster", "orders", "c-1", false));
        assert_eq!(taken_by(KIND, &unlabelled), None);
        let mut strange =
            object(&json!({ CLUSTER_LABEL: "orders" }), &owner("ConfigMap", "theirs", "x", false));
        let by = "nobody, and kubectl-create wrote it last";
        assert_eq!(taken_by(KIND, &strange).as_deref(), Some(by));
        strange.managed_fields = None;
        assert_eq!(taken_by(KIND, &strange).as_deref(), Some("nobody"));
    }

    #[test]
    fn a_write_route_is_its_services_also_of_one_that_was_made_anew() {
        let of = |labels: &Value, name| {
            taken_by(ObjectKind::EndpointSlice, &object(labels, &owner("Service", name, "s-1", true)))
        };
        assert_eq!(of(&ours(), "orders-primary"), None);
        assert_eq!(of(&ours(), "theirs").as_deref(), Some("Service/theirs"));
        assert_eq!(of(&json!({}), "orders-primary").as_deref(), Some("Service/orders-primary"));
    }

    /// An API server that has a Service of somebody else until it is told that it is gone.
    async fn api_server(gone: Arc<AtomicBool>) -> Client {
        let answer = move || {
            let gone = gone.load(Ordering::SeqCst);
            async move {
                let meta = object(&json!({}), &owner("Deployment", "theirs", "d-1", true));
                let found = json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": meta });
                let missing = json!({ "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404 });
                let (code, body) =
                    if gone { (StatusCode::NOT_FOUND, missing) } else { (StatusCode::OK, found) };
                (code, [("content-type", "application/json")], body.to_string())
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await });
        Client::try_from(kube::Config::new(url)).unwrap()
    }

    #[tokio::test]
    async fn what_no_watch_shows_is_known_until_it_is_seen_to_be_gone() {
        let gone = Arc::new(AtomicBool::new(false));
        let client = api_server(Arc::clone(&gone)).await;
        let name = ObjectRef { kind: KIND, name: "orders-primary".into() };
        let namesakes = Namesakes::default();
        assert_eq!(namesakes.get(&client, &id(), &name), None);
        namesakes.found(&name, LiveObject::taken("o-1".into(), "Deployment/theirs".into()));
        let again = || namesakes.clone().look_again(client.clone(), id(), name.clone());
        again().await;
        let known = namesakes.get(&client, &id(), &name).and_then(|live| live.taken_by);
        assert_eq!(known.as_deref(), Some("Deployment/theirs"));
        gone.store(true, Ordering::SeqCst);
        again().await;
        assert_eq!(namesakes.get(&client, &id(), &name), None);
    }
}
