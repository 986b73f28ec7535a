//! Custom resource -> Kubernetes objects: pure, one file per kind. The same input gives the same bytes, so that a
//! digest says whether anything is to be done.

mod configmap;
pub mod digest;
mod endpointslice;
mod identity;
pub mod names;
mod pdb;
mod pod;
mod secret;
mod services;
mod statefulset;

pub use digest::{DigestKey, live_digest};
pub use identity::Identity;
pub use pod::{AGENT_PORT, METRICS_PORT, OPERATOR_PORT};
pub use secret::{Credentials, SecretText, USER_DEFAULT, USER_OPERATOR, USER_REPLICA};

use crate::api::{Parsed, v1alpha1::ValkeyCluster};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt, ops::Deref};
use valkeeper_core::{
    ids::{Digest, ShardId},
    observation::{LiveObject, ObjectFacts, ObjectKind, ObjectRef, Observed},
    spec::Topology,
};

/// Annotation of every owned object: digest of what it was rendered to. A field that is no longer wanted is not in
/// the projection that [`live_digest`] compares; this text is, so that its removal is seen as well.
pub const ANNOTATION_RENDERED: &str = "valkeeper.io/rendered";
/// Annotation of the pod template: its revision.
pub const ANNOTATION_REVISION: &str = "valkeeper.io/revision";

/// IP family of pod addresses: an EndpointSlice has one, and cannot change it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddressType {
    /// IPv4.
    #[default]
    IPv4,
    /// IPv6.
    IPv6,
}

/// What rendering needs of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Passwords. The caller keeps them until they are seen in the Secret: others would be another rendering.
    pub credentials: Credentials,
    /// Certificates and keys of the agents, by shard. The caller keeps them likewise.
    pub identities: BTreeMap<ShardId, Identity>,
    /// `metadata.uid` of the Services seen, by name. A write Service's EndpointSlice is rendered once its uid is here.
    pub service_uids: BTreeMap<String, String>,
    /// IP family of the pods.
    pub address_type: AddressType,
}

/// An object as it is wanted.
#[derive(Clone)]
pub struct Rendered {
    /// Kind and name.
    pub object: ObjectRef,
    /// Every wanted field as JSON: it is needed when something changes, and takes a tenth of what it does as a tree.
    text: Box<str>,
    /// Digest of the wanted fields; keyed for Secrets.
    pub digest: Digest,
    /// StatefulSets only: digest of the pod template.
    pub revision: Option<Digest>,
    /// StatefulSets only: the shard.
    pub shard: Option<ShardId>,
    /// True if running members need it whatever is wrong with the spec, and while the cluster is paused.
    pub vital: bool,
    key: DigestKey,
}

impl Rendered {
    /// Every wanted field; the body of a server-side apply.
    pub fn value(&self) -> Value {
        // It was written from one.
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// Digest of the wanted fields as they are in `live`: equal to `digest` if nothing wanted differs.
    pub fn live_digest(&self, live: &Value) -> Digest {
        digest::live(&self.value(), live, &self.key)
    }

    /// The facts about this object, given what was seen of it.
    pub fn facts(&self, live: Observed<LiveObject>) -> ObjectFacts {
        ObjectFacts {
            wanted: self.digest.clone(),
            wanted_revision: self.revision.clone(),
            shard: self.shard,
            vital: self.vital,
            surplus: false,
            live,
        }
    }
}

impl fmt::Debug for Rendered {
    /// Never shows the body: it may be a Secret's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.object, self.digest)
    }
}

/// Every object of the cluster, in the order of creation.
pub fn render_all(cluster: &ValkeyCluster, parsed: &Parsed, context: &Context) -> Vec<Rendered> {
    let scene = Scene { frame: Frame { cluster, context }, parsed };
    let mut out = vec![
        scene.seal(ObjectKind::Secret, secret::system(&scene)),
        scene.seal(ObjectKind::Secret, secret::auth(&scene)),
    ];
    out.extend(render_vital(cluster, context));
    out.extend([
        scene.seal(ObjectKind::ConfigMap, configmap::render(&scene)),
        scene.seal(ObjectKind::Service, services::members(&scene)),
        scene.seal(ObjectKind::Service, services::headless(&scene)),
    ]);
    let template = pod::template(&scene);
    for shard in parsed.desired.shard_ids() {
        match scene.topology() {
            Topology::Replication => {
                out.push(scene.seal(ObjectKind::Service, services::primary(&scene, shard)));
                out.push(scene.seal(ObjectKind::Service, services::replicas(&scene, shard)));
                let slice = endpointslice::render(&scene, shard);
                out.extend(slice.map(|slice| scene.seal(ObjectKind::EndpointSlice, slice)));
            }
            // Any node sends a client to whom it looks for, by the name of its Service.
            Topology::Cluster => {
                let members = parsed.desired.members().filter(|member| member.shard == shard);
                let node = |member| scene.seal(ObjectKind::Service, services::node(&scene, member));
                out.extend(members.map(node));
            }
        }
        out.push(scene.seal(ObjectKind::PodDisruptionBudget, pdb::render(&scene, shard)));
        let (set, revision) = statefulset::render(&scene, shard, &template);
        let set = scene.seal(ObjectKind::StatefulSet, set);
        out.push(Rendered { revision: Some(revision), shard: Some(shard), ..set });
    }
    out
}

/// What needs no spec: the certificates of the context. They end by themselves, so neither a pause nor a spec that is refused
/// may keep them from being renewed.
pub fn render_vital(cluster: &ValkeyCluster, context: &Context) -> Vec<Rendered> {
    let frame = Frame { cluster, context };
    let secrets = context.identities.keys().filter_map(|shard| identity::render(&frame, *shard));
    secrets.map(|secret| Rendered { vital: true, ..frame.seal(ObjectKind::Secret, secret) }).collect()
}

/// What every renderer sees.
struct Scene<'a> {
    frame: Frame<'a>,
    parsed: &'a Parsed,
}

impl<'a> Deref for Scene<'a> {
    type Target = Frame<'a>;

    fn deref(&self) -> &Frame<'a> {
        &self.frame
    }
}

impl Scene<'_> {
    fn topology(&self) -> Topology {
        self.parsed.desired.topology
    }
}

/// What there is to see without a spec.
struct Frame<'a> {
    cluster: &'a ValkeyCluster,
    context: &'a Context,
}

impl Frame<'_> {
    fn name(&self) -> &str {
        self.cluster.metadata.name.as_deref().unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.cluster.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Recommended labels and ours, of an object of the cluster or of one shard.
    fn labels(&self, shard: Option<ShardId>) -> Value {
        let mut labels = json!({
            "app.kubernetes.io/name": "valkey",
            "app.kubernetes.io/instance": self.name(),
            "app.kubernetes.io/component": "server",
            "app.kubernetes.io/part-of": "valkeeper",
            "app.kubernetes.io/managed-by": "valkeeper",
            names::CLUSTER_LABEL: self.name(),
        });
        if let Some(shard) = shard {
            labels[names::SHARD_LABEL] = json!(shard.to_string());
        }
        labels
    }

    /// The labels that select the pods of the cluster or of one shard.
    fn selector(&self, shard: Option<ShardId>) -> Value {
        match shard {
            Some(shard) => {
                json!({ names::CLUSTER_LABEL: self.name(), names::SHARD_LABEL: shard.to_string() })
            }
            None => json!({ names::CLUSTER_LABEL: self.name() }),
        }
    }

    /// Metadata of an object that the custom resource owns.
    fn metadata(&self, name: &str, shard: Option<ShardId>) -> Value {
        json!({
            "name": name,
            "namespace": self.namespace(),
            "labels": self.labels(shard),
            "ownerReferences": [{
                "apiVersion": "valkeeper.io/v1alpha1",
                "kind": "ValkeyCluster",
                "name": self.name(),
                "uid": self.cluster.metadata.uid.as_deref().unwrap_or_default(),
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        })
    }

    /// Adds the annotation with the digest of the body, and takes the digest of the whole.
    fn seal(&self, kind: ObjectKind, mut value: Value) -> Rendered {
        let key = match kind {
            // A plain digest of a weak password could be guessed.
            ObjectKind::Secret => DigestKey::of(&self.context.credentials.operator),
            ObjectKind::ConfigMap
            | ObjectKind::Service
            | ObjectKind::EndpointSlice
            | ObjectKind::PodDisruptionBudget
            | ObjectKind::StatefulSet => DigestKey::none(),
        };
        let body = digest::of(&value, &key);
        value["metadata"]["annotations"][ANNOTATION_RENDERED] = json!(body.0);
        let digest = digest::of(&value, &key);
        let name = value["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        Rendered {
            object: ObjectRef { kind, name },
            text: value.to_string().into(),
            digest,
            revision: None,
            shard: None,
            vital: false,
            key,
        }
    }
}

#[cfg(test)]
mod tests;
