//! The ConfigMap with valkey.conf. The digest of what needs a restart is in the pod template, so that a change of that is a rollout.

use super::{Scene, names};
use serde_json::{Value, json};

pub(super) fn render(scene: &Scene<'_>) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": scene.metadata(&names::config(scene.name()), None),
        "data": { "valkey.conf": scene.parsed.workload.config.render() },
    })
}
