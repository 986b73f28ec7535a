//! The write route: the one EndpointSlice behind `<name>-primary`. It moves by one update against the version that was
//! read, so clients never see two addresses or a mix, and a deposed leader's move is refused.

use super::{Error, FIELD_MANAGER, apply::Owned, bounded};
use k8s_openapi::api::{
    core::v1::ObjectReference,
    discovery::v1::{Endpoint, EndpointConditions, EndpointSlice},
};
use kube::{Api, Client, ResourceExt, api::PostParams};
use valkeeper_core::{ids::WriterEpoch, observation::RouteFacts};

/// Annotation with the writer epoch that last touched the slice.
pub const EPOCH_ANNOTATION: &str = "valkeeper.io/epoch";

/// What a route says.
pub fn facts(slice: &EndpointSlice) -> RouteFacts {
    let endpoints = slice.endpoints.iter().flatten();
    let address = endpoints.flat_map(|e| e.addresses.iter()).next().cloned();
    RouteFacts { address, resource_version: slice.resource_version().unwrap_or_default() }
}

/// Where a route shall point.
#[derive(Clone, Debug)]
pub struct Target {
    /// Address of the pod.
    pub address: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod.
    pub pod_uid: String,
    /// Node of the pod.
    pub node: String,
}

/// Moves the slice to `target` by one update, if it still has `resource_version`.
///
/// # Errors
/// [`Error::Conflict`] if it changed since; else as [`bounded`].
pub async fn route(
    client: &Client,
    live: &EndpointSlice,
    resource_version: &str,
    target: &Target,
    epoch: WriterEpoch,
) -> Result<EndpointSlice, Error> {
    let mut next = live.clone();
    next.endpoints = Some(vec![Endpoint {
        addresses: vec![target.address.clone()],
        // Nobody else fills these in: the endpoint slice controller leaves slices of another manager alone.
        conditions: Some(EndpointConditions {
            ready: Some(true),
            serving: Some(true),
            terminating: Some(false),
        }),
        node_name: Some(target.node.clone()).filter(|n| !n.is_empty()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some(target.pod.clone()),
            namespace: live.namespace(),
            uid: Some(target.pod_uid.clone()),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }]);
    next.metadata.resource_version = Some(resource_version.to_owned());
    replace(client, next, epoch).await
}

/// Empties the slice by one update, if it still has `resource_version`: who connects to the Service is refused.
///
/// # Errors
/// [`Error::Conflict`] if it changed since; else as [`bounded`].
pub async fn unroute(
    client: &Client,
    live: &EndpointSlice,
    resource_version: &str,
    epoch: WriterEpoch,
) -> Result<EndpointSlice, Error> {
    let mut next = live.clone();
    next.endpoints = Some(Vec::new());
    next.metadata.resource_version = Some(resource_version.to_owned());
    replace(client, next, epoch).await
}

/// Writes the epoch into the slice, so that every resourceVersion an earlier leader has read is stale.
///
/// # Errors
/// [`Error::Conflict`] if it changed since it was read; else as [`bounded`].
pub async fn touch(
    client: &Client,
    live: &EndpointSlice,
    epoch: WriterEpoch,
) -> Result<EndpointSlice, Error> {
    replace(client, live.clone(), epoch).await
}

/// Reads the slice from the server itself.
///
/// # Errors
/// As [`bounded`].
pub async fn get(client: &Client, namespace: &str, name: &str) -> Result<Option<EndpointSlice>, Error> {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
    bounded(&format!("get EndpointSlice/{name}"), api.get_opt(name)).await
}

async fn replace(
    client: &Client,
    mut next: EndpointSlice,
    epoch: WriterEpoch,
) -> Result<EndpointSlice, Error> {
    let name = next.name_any();
    let what = format!("replace EndpointSlice/{name}");
    if next.resource_version().is_none_or(|v| v.is_empty()) {
        // Without one the server would overwrite blindly.
        return Err(Error::Malformed { what, problem: "no resourceVersion to compare with" });
    }
    next.annotations_mut().insert(EPOCH_ANNOTATION.to_owned(), epoch.to_string());
    // The fields of this update must not be owned twice: they are not part of what is applied.
    next.metadata.managed_fields = None;
    let api: Api<EndpointSlice> = namespaced(client, &next);
    let params = PostParams { dry_run: false, field_manager: Some(format!("{FIELD_MANAGER}-route")) };
    bounded(&what, api.replace(&name, &params, &next)).await
}

fn namespaced<K: Owned>(client: &Client, object: &K) -> Api<K> {
    Api::namespaced(client.clone(), &object.namespace().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_without_endpoints_lists_no_address() {
        let mut slice = EndpointSlice::default();
        slice.metadata.resource_version = Some("12".into());
        assert_eq!(facts(&slice), RouteFacts { address: None, resource_version: "12".into() });
    }

    #[test]
    fn the_address_of_a_slice_is_its_first_endpoint() {
        let endpoint = Endpoint { addresses: vec!["10.0.0.7".into()], ..Endpoint::default() };
        let slice = EndpointSlice { endpoints: Some(vec![endpoint]), ..EndpointSlice::default() };
        assert_eq!(facts(&slice).address.as_deref(), Some("10.0.0.7"));
    }
}
