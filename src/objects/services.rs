//! Services: writes, reads, one name per pod, and one address per member of a Valkey Cluster.

use super::{Scene, names};
use serde_json::{Value, json};
use valkeeper_core::{
    config::{BUS_PORT, PORT},
    ids::{MemberId, ShardId},
    observation::RoleLabel,
    spec::Topology,
};

/// Label that the StatefulSet controller gives a pod: its name.
const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";

/// `-primary`: no selector; its EndpointSlice is moved by the operator, by one compare-and-swap.
pub(super) fn primary(scene: &Scene<'_>, shard: ShardId) -> Value {
    service(scene, &names::route(scene.name(), shard), Some(shard), json!({ "type": "ClusterIP" }))
}

/// The plain name: every member that is ready, whatever its role. The first address of a client that asks for the topology
/// itself and follows roles; writes of a client that does not belong to `-primary`. In a Valkey Cluster it is the only one for clients.
pub(super) fn members(scene: &Scene<'_>) -> Value {
    let spec = json!({ "type": "ClusterIP", "selector": scene.selector(None) });
    service(scene, scene.name(), None, spec)
}

/// `-replicas`: replicas that are ready, that is: in sync.
pub(super) fn replicas(scene: &Scene<'_>, shard: ShardId) -> Value {
    let mut selector = scene.selector(Some(shard));
    selector[names::ROLE_LABEL] = json!(RoleLabel::Replica.as_str());
    let spec = json!({ "type": "ClusterIP", "selector": selector });
    service(scene, &names::replicas(scene.name(), shard), Some(shard), spec)
}

/// `-headless`: every pod by name, also while it is not ready, as a primary may be just then. Members find each other by it.
pub(super) fn headless(scene: &Scene<'_>) -> Value {
    let spec = json!({
        "type": "ClusterIP",
        "clusterIP": "None",
        "publishNotReadyAddresses": true,
        "selector": scene.selector(None),
    });
    let mut service = service(scene, &names::headless(scene.name()), None, spec);
    match scene.topology() {
        Topology::Replication => {}
        Topology::Cluster => service["spec"]["ports"] = json!([port("valkey", PORT), port("bus", BUS_PORT)]),
    }
    service
}

/// `-node-SHARD-MEMBER`: an address of one member that stays when its pod moves, ready or not, as a server refuses clients by itself
/// until it is to have some. Nobody is led to a pod that goes: its label is taken away.
pub(super) fn node(scene: &Scene<'_>, member: MemberId) -> Value {
    let mut selector = scene.selector(Some(member.shard));
    selector[names::NAMED_LABEL] = json!(names::NAMED);
    selector[POD_NAME_LABEL] = json!(names::pod(scene.name(), member));
    let spec = json!({ "type": "ClusterIP", "publishNotReadyAddresses": true, "selector": selector });
    service(scene, &names::node(scene.name(), member), Some(member.shard), spec)
}

fn port(name: &str, number: u16) -> Value {
    json!({ "name": name, "port": number, "targetPort": number, "protocol": "TCP" })
}

fn service(scene: &Scene<'_>, name: &str, shard: Option<ShardId>, mut spec: Value) -> Value {
    spec["ports"] = json!([port("valkey", PORT)]);
    // Two families would need two slices, and two slices are not one compare-and-swap.
    spec["ipFamilyPolicy"] = json!("SingleStack");
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": scene.metadata(name, shard), "spec": spec })
}
