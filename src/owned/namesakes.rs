//! Objects of somebody else under names that this cluster's objects need: whose they are, and when they are gone. They are never
//! changed or deleted.

use super::last_foreign_manager;
use crate::{
    cluster::{Cluster, ClusterId},
    k8s::{
        self, API_CALL_MAX, CLUSTER_LABEL, FIELD_MANAGER, MANAGED_BY,
        apply::{self, Owned},
    },
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
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;
use valkeeper_core::{
    effect::Outcome,
    observation::{LiveObject, ObjectKind, ObjectRef},
    words,
};

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
    let owner = words::of_others(&owner, OWNER_CHARS_MAX);
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

    /// Applies an object, by force: never what is somebody else's. What no watch has `seen` is read first. `Err`: it was not sent.
    ///
    /// # Errors
    /// The API server's.
    pub async fn apply<K: Owned>(
        &self,
        client: &Client,
        id: &ClusterId,
        (object, wanted): (&ObjectRef, &Value),
        seen: Option<ObjectMeta>,
    ) -> Result<Result<K, Outcome>, k8s::Error> {
        let (namespace, name) = (&id.owner.0, &object.name);
        let live = match seen {
            Some(meta) => Some(meta),
            None => apply::meta::<K>(client, namespace, name).await?,
        };
        if let Some(namesake) = live.as_ref().and_then(|meta| taken(id, object.kind, meta)) {
            let owner = namesake.taken_by.clone().unwrap_or_default();
            self.found(object, namesake);
            return Ok(Err(Outcome::Superseded(format!("it belongs to {owner}"))));
        }
        let uid = live.and_then(|meta| meta.uid);
        apply::apply(client, namespace, name, wanted, uid.as_deref()).await.map(Ok)
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
    use serde_json::json;

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

    /// An API server that has a Service of this owner, or none, and what was asked of it.
    async fn api_server(there: Arc<Mutex<Option<Value>>>) -> (Client, Arc<Mutex<Vec<String>>>) {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = Arc::clone(&asked);
        let answer = move |request: axum::extract::Request| async move {
            let method = request.method().to_string();
            let body = axum::body::to_bytes(request.into_body(), 10_000).await.unwrap();
            told.lock().unwrap().push(format!("{method} {}", String::from_utf8_lossy(&body)));
            let owner = there.lock().unwrap().clone();
            let (code, body) = match owner {
                _ if method == "PATCH" => {
                    (200, json!({ "apiVersion": "v1", "kind": "Service", "metadata": {} }))
                }
                Some(owner) => {
                    let kind = json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata" });
                    let mut found = kind;
                    found["metadata"] = json!(object(&json!({}), &owner));
                    (200, found)
                }
                None => {
                    let gone = json!({ "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound",
                        "code": 404 });
                    (404, gone)
                }
            };
            let code = StatusCode::from_u16(code).unwrap();
            (code, [("content-type", "application/json")], body.to_string())
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await });
        (Client::try_from(kube::Config::new(url)).unwrap(), asked)
    }

    fn name() -> ObjectRef {
        ObjectRef { kind: KIND, name: "orders-primary".into() }
    }

    #[tokio::test]
    async fn what_no_watch_shows_is_known_until_it_is_seen_to_be_gone() {
        let there = Arc::new(Mutex::new(Some(owner("Deployment", "theirs", "d-1", true))));
        let (client, _) = api_server(Arc::clone(&there)).await;
        let namesakes = Namesakes::default();
        assert_eq!(namesakes.get(&client, &id(), &name()), None);
        namesakes.found(&name(), LiveObject::taken("o-1".into(), "somebody".into()));
        let again = || namesakes.clone().look_again(client.clone(), id(), name());
        again().await;
        let known = namesakes.get(&client, &id(), &name()).and_then(|live| live.taken_by);
        assert_eq!(known.as_deref(), Some("Deployment/theirs"));
        *there.lock().unwrap() = None;
        again().await;
        assert_eq!(namesakes.get(&client, &id(), &name()), None);
    }

    #[tokio::test]
    async fn somebody_elses_object_is_read_and_never_written() {
        let there = Arc::new(Mutex::new(Some(owner("Deployment", "theirs", "d-1", true))));
        let (client, asked) = api_server(Arc::clone(&there)).await;
        let (id, name, wanted, namesakes) = (id(), name(), json!({ "metadata": {} }), Namesakes::default());
        let apply = |seen| namesakes.apply::<Service>(&client, &id, (&name, &wanted), seen);
        let lines = || std::mem::take(&mut *asked.lock().unwrap());
        let superseded = Outcome::Superseded("it belongs to Deployment/theirs".into());
        assert_eq!(apply(None).await.unwrap().unwrap_err(), superseded);
        assert_eq!(lines(), ["GET "]);
        assert!(namesakes.get(&client, &id, &name).is_some());
        let labelled = object(&ours(), &owner("Deployment", "theirs", "d-1", true));
        assert_eq!(apply(Some(labelled)).await.unwrap().unwrap_err(), superseded);
        assert_eq!(lines(), Vec::<String>::new(), "the watch said whose it is");
        // Ours is written under its UID: a namesake that takes its place meanwhile is refused by the server.
        *there.lock().unwrap() = Some(owner("ValkeyCluster", "orders", "c-1", true));
        apply(None).await.unwrap().unwrap();
        assert_eq!(lines(), ["GET ", r#"PATCH {"metadata":{"uid":"o-1"}}"#]);
        *there.lock().unwrap() = None;
        apply(None).await.unwrap().unwrap();
        assert_eq!(lines(), ["GET ", r#"PATCH {"metadata":{}}"#]);
    }
}
