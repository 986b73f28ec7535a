//! Writing objects: server-side apply under one field manager, and changes that name what they expect to find.

use super::{Error, FIELD_MANAGER, bounded};
use k8s_openapi::{
    NamespaceResourceScope, api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Debug};

/// Field manager of statuses: one of its own, so that applying an object never takes its status away.
const STATUS_MANAGER: &str = "valkeeper-status";

/// What a namespaced kind must be able to do to be written here.
pub trait Owned:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> Owned for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// `Kind/name`, for messages.
fn title<K: Owned>(name: &str) -> String {
    format!("{}/{name}", K::kind(&()))
}

/// Brings an owned object to what `wanted` says, by server-side apply. Fields that others manage stay as they are; the
/// operator's own are taken back by force, so the caller knows that it is the operator's. `uid`: of what is there; `None`: nothing is.
///
/// # Errors
/// [`Error::Conflict`] if the name belongs to another object now, or to none; else as [`bounded`].
pub async fn apply<K: Owned>(
    client: &Client,
    namespace: &str,
    name: &str,
    wanted: &Value,
    uid: Option<&str>,
) -> Result<K, Error> {
    let what = format!("apply {}", title::<K>(name));
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let mut wanted = wanted.clone();
    if let Some(uid) = uid {
        // It is compared with the live one, as in every patch.
        wanted["metadata"]["uid"] = json!(uid);
    }
    bounded(&what, api.patch(name, &params, &Patch::Apply(&wanted))).await
}

/// The metadata of an object, whatever its labels; `None` if there is none.
///
/// # Errors
/// As [`bounded`].
pub async fn meta<K: Owned>(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Option<ObjectMeta>, Error> {
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let found = bounded(&format!("get {}", title::<K>(name)), api.get_metadata_opt(name)).await?;
    Ok(found.map(|object| object.metadata))
}

/// Sets labels of a pod, and takes away those without a value, if it is still the pod of this UID.
///
/// # Errors
/// [`Error::Conflict`] if the name belongs to another pod now; else as [`bounded`].
pub async fn label_pod(
    client: &Client,
    namespace: &str,
    name: &str,
    uid: &str,
    labels: &BTreeMap<&str, Option<&str>>,
) -> Result<Pod, Error> {
    // A UID in the patch is compared with the live one; a different one is a conflict.
    let patch = json!({ "metadata": { "uid": uid, "labels": labels } });
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    bounded(&format!("label Pod/{name}"), api.patch(name, &params, &Patch::Merge(patch))).await
}

/// The pod of this name, whatever its labels; `None` if there is none.
///
/// # Errors
/// As [`bounded`].
pub async fn get_pod(client: &Client, namespace: &str, name: &str) -> Result<Option<Pod>, Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    bounded(&format!("get Pod/{name}"), api.get_opt(name)).await
}

/// Asks for the deletion of a pod, if it is still the pod of this UID. `Ok(None)`: it is gone already.
///
/// # Errors
/// [`Error::Conflict`] if the name belongs to another pod now; else as [`bounded`].
pub async fn delete_pod(
    client: &Client,
    namespace: &str,
    name: &str,
    uid: &str,
    grace_s: Option<u32>,
) -> Result<Option<Pod>, Error> {
    let params = DeleteParams {
        grace_period_seconds: grace_s,
        preconditions: Some(Preconditions { resource_version: None, uid: Some(uid.to_owned()) }),
        ..DeleteParams::default()
    };
    delete_by(client, namespace, name, &params).await
}

/// Asks for the deletion of an owned object, if it is still the one of this UID, and of what it owns after it. `Ok(None)`: it is gone
/// already.
///
/// # Errors
/// [`Error::Conflict`] if the name belongs to another object now; else as [`bounded`].
pub async fn delete<K: Owned>(
    client: &Client,
    namespace: &str,
    name: &str,
    uid: &str,
) -> Result<Option<K>, Error> {
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { resource_version: None, uid: Some(uid.to_owned()) }),
        ..DeleteParams::default()
    };
    delete_by(client, namespace, name, &params).await
}

async fn delete_by<K: Owned>(
    client: &Client,
    namespace: &str,
    name: &str,
    params: &DeleteParams,
) -> Result<Option<K>, Error> {
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    match bounded(&format!("delete {}", title::<K>(name)), api.delete(name, params)).await {
        Ok(answer) => Ok(answer.left()),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Puts the finalizer on an object, or takes it off, if the object still has this UID.
///
/// # Errors
/// [`Error::Conflict`] if it changed in between; else as [`bounded`].
pub async fn set_finalizers<K: Owned>(
    client: &Client,
    live: &K,
    finalizers: Vec<String>,
) -> Result<K, Error> {
    let name = live.name_any();
    let patch = json!({ "metadata": {
        "uid": live.uid(), "resourceVersion": live.resource_version(), "finalizers": finalizers,
    } });
    patch_object(client, live, &format!("set the finalizers of {}", title::<K>(&name)), &patch).await
}

/// Makes `status` the status of an object, if it still has this UID. Fields that were ours and are not in it go.
///
/// # Errors
/// [`Error::Conflict`] if the name belongs to another object now; else as [`bounded`].
pub async fn apply_status<K: Owned>(client: &Client, live: &K, status: Value) -> Result<K, Error> {
    let name = live.name_any();
    let what = format!("publish the status of {}", title::<K>(&name));
    let Some(namespace) = live.namespace() else {
        return Err(Error::Malformed { what, problem: "no namespace" });
    };
    let patch = json!({
        "apiVersion": K::api_version(&()), "kind": K::kind(&()),
        "metadata": { "name": name, "namespace": namespace, "uid": live.uid() },
        "status": status,
    });
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PatchParams::apply(STATUS_MANAGER).force();
    bounded(&what, api.patch_status(&name, &params, &Patch::Apply(patch))).await
}

async fn patch_object<K: Owned>(client: &Client, live: &K, what: &str, patch: &Value) -> Result<K, Error> {
    let Some(namespace) = live.namespace() else {
        return Err(Error::Malformed { what: what.to_owned(), problem: "no namespace" });
    };
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    bounded(what, api.patch(&live.name_any(), &params, &Patch::Merge(patch))).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::StatefulSet;
    use std::sync::{Arc, Mutex};

    /// What an API server was asked, and its client; it answers with this code.
    async fn api_server(code: u16) -> (Client, Arc<Mutex<Vec<String>>>) {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = Arc::clone(&asked);
        let answer = move |request: axum::extract::Request| async move {
            let line = format!("{} {}", request.method(), request.uri().path());
            let body = axum::body::to_bytes(request.into_body(), 10_000).await.unwrap();
            told.lock().unwrap().push(format!("{line} {}", String::from_utf8_lossy(&body)));
            let status = json!({ "apiVersion": "v1", "kind": "Status", "code": code, "message": "words",
                "status": if code == 200 { "Success" } else { "Failure" } });
            let code = axum::http::StatusCode::from_u16(code).unwrap();
            (code, [("content-type", "application/json")], status.to_string())
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async { axum::serve(listener, axum::Router::new().fallback(answer)).await });
        (Client::try_from(kube::Config::new(url)).unwrap(), asked)
    }

    #[tokio::test]
    async fn an_object_is_deleted_by_name_and_uid_and_what_it_owns_after_it() {
        let (client, asked) = api_server(200).await;
        assert_eq!(delete::<StatefulSet>(&client, "shop", "ledger-3", "u-3").await.unwrap(), None);
        let asked = asked.lock().unwrap().pop().unwrap();
        let (line, body) = asked.split_once(" {").unwrap();
        assert_eq!(line, "DELETE /apis/apps/v1/namespaces/shop/statefulsets/ledger-3");
        let body: Value = serde_json::from_str(&format!("{{{body}")).unwrap();
        assert_eq!(
            (&body["preconditions"]["uid"], &body["propagationPolicy"]),
            (&json!("u-3"), &json!("Background"))
        );
    }

    #[tokio::test]
    async fn what_is_gone_needs_no_deletion_and_a_namesake_is_left_alone() {
        let (client, _) = api_server(404).await;
        assert_eq!(delete::<StatefulSet>(&client, "shop", "ledger-3", "u-3").await.unwrap(), None);
        let (client, _) = api_server(409).await;
        let refused = delete::<StatefulSet>(&client, "shop", "ledger-3", "u-3").await;
        assert!(refused.is_err_and(|error| error.is_conflict()));
    }
}
