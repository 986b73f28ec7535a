//! Names and labels of a cluster's objects: the one place where they are made.

use valkeeper_core::ids::{MemberId, ShardId};

/// Label: the cluster's name.
pub const CLUSTER_LABEL: &str = "valkeeper.io/cluster";
/// Label: the shard's number.
pub const SHARD_LABEL: &str = "valkeeper.io/shard";
/// Label of pods: `primary`, `replica` or `leaving`, set by routing.
pub const ROLE_LABEL: &str = "valkeeper.io/role";
/// Label of pods that their own Service leads to: `true`, taken away from a pod that goes.
pub const NAMED_LABEL: &str = "valkeeper.io/named";
/// Value of that label.
pub const NAMED: &str = "true";
/// Label of an EndpointSlice: who manages it.
pub const SLICE_MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Value of that label on slices that the operator owns.
pub const SLICE_MANAGER: &str = "valkeeper.io";
/// Name of the init container that brings the agent.
pub const AGENT_CONTAINER: &str = "agent";
/// Name of the Valkey container.
pub const CONTAINER: &str = "valkey";
/// Name of the volume with the data.
pub const DATA_VOLUME: &str = "data";

/// The workload of a shard, and its PodDisruptionBudget.
pub fn statefulset(cluster: &str, shard: ShardId) -> String {
    format!("{cluster}-{shard}")
}

/// A member's pod.
pub fn pod(cluster: &str, member: MemberId) -> String {
    format!("{cluster}-{member}")
}

/// A member's PersistentVolumeClaim.
pub fn claim(cluster: &str, member: MemberId) -> String {
    format!("{DATA_VOLUME}-{cluster}-{member}")
}

/// The member that a pod of this cluster is, from its name.
pub fn member_of_pod(cluster: &str, pod: &str) -> Option<MemberId> {
    pod.strip_prefix(cluster)?.strip_prefix('-')?.parse().ok()
}

/// The write Service of a shard, and its EndpointSlice.
pub fn route(cluster: &str, shard: ShardId) -> String {
    of_shard(format!("{cluster}-primary"), shard)
}

/// The read Service of a shard.
pub fn replicas(cluster: &str, shard: ShardId) -> String {
    of_shard(format!("{cluster}-replicas"), shard)
}

/// The Service that gives every pod a name, ready or not.
pub fn headless(cluster: &str) -> String {
    format!("{cluster}-headless")
}

/// The Service of one member of a Valkey Cluster. Clients keep its name and its address, and both stay when the pod moves.
pub fn node(cluster: &str, member: MemberId) -> String {
    format!("{cluster}-node-{member}")
}

/// The member whose own Service this is, from its name.
pub fn member_of_node(cluster: &str, service: &str) -> Option<MemberId> {
    let member = service.strip_prefix(cluster)?.strip_prefix("-node-")?.parse().ok()?;
    (node(cluster, member) == service).then_some(member)
}

/// True if a Service of another cluster may have this name: a cluster of this name would need it for its own Service, which has the plain
/// name. All other names of one cluster's objects differ from those of any other's.
pub fn is_of_a_service(cluster: &str) -> bool {
    let without_number = |name: &'_ str| {
        let (base, number) = name.rsplit_once('-')?;
        let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        is_number.then(|| base.to_owned())
    };
    let shard = without_number(cluster);
    let member = shard.as_deref().and_then(without_number);
    let base = shard.as_deref().unwrap_or(cluster);
    base.ends_with("-primary")
        || base.ends_with("-replicas")
        || cluster.ends_with("-headless")
        || member.is_some_and(|base| base.ends_with("-node"))
}

/// The ConfigMap with valkey.conf.
pub fn config(cluster: &str) -> String {
    format!("{cluster}-config")
}

/// The Secret for clients.
pub fn auth(cluster: &str) -> String {
    format!("{cluster}-auth")
}

/// The Secret for members and the operator.
pub fn system(cluster: &str) -> String {
    format!("{cluster}-system")
}

/// The Secret with the certificates and keys of a shard's agents.
pub fn identity(cluster: &str, shard: ShardId) -> String {
    format!("{cluster}-identity-{shard}")
}

/// Shard 0 has the plain name: most clusters have one shard.
fn of_shard(base: String, shard: ShardId) -> String {
    if shard.0 == 0 { base } else { format!("{base}-{shard}") }
}
