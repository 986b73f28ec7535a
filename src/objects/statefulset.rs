//! The workload of a shard. The operator does all rolling: pods are started together and replaced only when it
//! deletes them.

use super::{ANNOTATION_REVISION, DigestKey, Scene, digest, names, pod};
use crate::api::parse::Volume;
use serde_json::{Value, json};
use valkeeper_core::ids::{Digest, ShardId};

/// The StatefulSet and the revision of its pods, which are made from this template.
pub(super) fn render(scene: &Scene<'_>, shard: ShardId, template: &Value) -> (Value, Digest) {
    let mut template = pod::of_shard(template, scene, shard);
    let revision = digest::of(&template, &DigestKey::none());
    template["metadata"]["annotations"][ANNOTATION_REVISION] = json!(revision.0);
    let mut spec = json!({
        "replicas": scene.parsed.desired.replicas_per_shard + 1,
        "serviceName": names::headless(scene.name()),
        "podManagementPolicy": "Parallel",
        "updateStrategy": { "type": "OnDelete" },
        "selector": { "matchLabels": scene.selector(Some(shard)) },
        // Volumes outlive the workload: deleting a cluster must not delete its data.
        "persistentVolumeClaimRetentionPolicy": { "whenDeleted": "Retain", "whenScaled": "Retain" },
        "template": template,
    });
    if let Some(volume) = &scene.parsed.workload.volume {
        spec["volumeClaimTemplates"] = json!([claim(scene, shard, volume)]);
    }
    let mut metadata = scene.metadata(&names::statefulset(scene.name(), shard), Some(shard));
    metadata["labels"]["app.kubernetes.io/version"] = json!(scene.parsed.workload.config.version.to_string());
    let set = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec });
    (set, revision)
}

/// Immutable once the StatefulSet exists: nothing in it may depend on what can change.
fn claim(scene: &Scene<'_>, shard: ShardId, volume: &Volume) -> Value {
    let Volume { size, class } = volume;
    let mut spec = json!({
        "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": size } },
    });
    if let Some(class) = class {
        spec["storageClassName"] = json!(class);
    }
    json!({ "metadata": { "name": names::DATA_VOLUME, "labels": scene.selector(Some(shard)) }, "spec": spec })
}
