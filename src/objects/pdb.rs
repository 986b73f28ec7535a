//! PodDisruptionBudget of a shard: a drain takes one member at a time.

use super::{Scene, names};
use serde_json::{Value, json};
use valkeeper_core::ids::ShardId;

pub(super) fn render(scene: &Scene<'_>, shard: ShardId) -> Value {
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": scene.metadata(&names::statefulset(scene.name(), shard), Some(shard)),
        "spec": {
            "maxUnavailable": 1,
            "selector": { "matchLabels": scene.selector(Some(shard)) },
            // A member that is not ready serves nobody: it must not hold up the drain of its node.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    })
}
