//! The write Service's EndpointSlice, without its endpoints: the address is routing, moved by compare-and-swap, and
//! applying the rest never touches it.

use super::{AddressType, Scene, names};
use serde_json::{Value, json};
use valkeeper_core::{config::PORT, ids::ShardId};

/// `None` until the uid of its Service is known: the Service owns it.
pub(super) fn render(scene: &Scene<'_>, shard: ShardId) -> Option<Value> {
    let name = names::route(scene.name(), shard);
    let uid = scene.context.service_uids.get(&name)?;
    let mut metadata = scene.metadata(&name, Some(shard));
    metadata["labels"]["kubernetes.io/service-name"] = json!(name);
    metadata["labels"][names::SLICE_MANAGED_BY] = json!(names::SLICE_MANAGER);
    metadata["ownerReferences"] =
        json!([{ "apiVersion": "v1", "kind": "Service", "name": name, "uid": uid, "controller": true }]);
    let address_type = match scene.context.address_type {
        AddressType::IPv4 => "IPv4",
        AddressType::IPv6 => "IPv6",
    };
    Some(json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": address_type,
        "ports": [{ "name": "valkey", "port": PORT, "protocol": "TCP" }],
    }))
}
