//! Certificates of a cluster whose task cannot run, as its journal is broken, full or away. They end by themselves, and an agent whose certificate
//! has ended is confirmed by nobody: so they are renewed without a record, as those of authorities are. Nothing else happens here.

use super::{NotRendered, namesakes::Namesakes, taken};
use crate::{
    clock,
    cluster::{ClusterId, Shell},
    k8s::secrets::{Noticed, SecretCache},
    objects::{self, AddressType, Context, Credentials, Identity},
};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};
use valkeeper_core::{
    ids::{MemberId, ShardId},
    observation::ObjectKind,
};

/// Renews what is due of the leaves that the members of a cluster have.
///
/// # Errors
/// [`NotRendered`]: nothing is lost by trying again.
pub async fn renew(shell: &Shell, id: &ClusterId) -> Result<(), NotRendered> {
    let Some(resource) = shell.resource(id).filter(|r| r.metadata.deletion_timestamp.is_none()) else {
        return Ok(());
    };
    let (namespace, name) = &id.owner;
    let now = clock::wall();
    let pods = shell.world.pods.of(&id.owner);
    let running: BTreeSet<MemberId> =
        pods.iter().filter_map(|pod| objects::names::member_of_pod(name, &pod.name_any())).collect();
    let shards: BTreeSet<ShardId> = running.iter().map(|member| member.shard).collect();
    let secrets = SecretCache::new(shell.clients.requests.clone(), namespace);
    let signing = shell.vault.authority(id).await?;
    let mut due = BTreeMap::new();
    for shard in shards {
        let secret = secrets.get(&objects::names::identity(name, shard), Noticed::ByAgents).await?;
        // What is not there, or somebody else's, is the task's to make.
        let Some(secret) = secret.filter(|s| taken(id, ObjectKind::Secret, &s.metadata).is_none()) else {
            continue;
        };
        let known = Identity::read(&secret);
        // Also those whose pod is just not there.
        let of_secret = known.leaves.keys().map(|ordinal| MemberId { shard, ordinal: *ordinal });
        let members: BTreeSet<MemberId> =
            running.iter().copied().filter(|member| member.shard == shard).chain(of_secret).collect();
        let lifetime = shell.vault.leaf_lifetime();
        let renewed =
            known.clone().complete(&signing.roots, &signing.issuer, members.into_iter(), lifetime, now)?;
        if renewed != known {
            due.insert(shard, renewed);
        }
    }
    if due.is_empty() {
        return Ok(());
    }
    // Certificates render from nothing else.
    let context = Context {
        credentials: Credentials::complete(None, None, &mut rand::rng()),
        identities: due,
        service_uids: BTreeMap::new(),
        address_type: AddressType::default(),
    };
    for rendered in objects::render_vital(&resource, &context) {
        let value = rendered.value();
        let wanted = (&rendered.object, &value);
        let client = &shell.clients.requests;
        match Namesakes::default().apply::<Secret>(client, id, wanted, None).await? {
            Ok(_) => {
                tracing::info!(object = %rendered.object, "certificates are renewed while the task is stopped")
            }
            Err(outcome) => {
                tracing::warn!(object = %rendered.object, ?outcome, "certificates are not renewed")
            }
        }
    }
    Ok(())
}
