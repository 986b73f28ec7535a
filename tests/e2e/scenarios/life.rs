//! From nothing to Ready, from Ready to nothing, and back from the volumes that stayed.

use super::{World, gone, spec};
use crate::support::{
    journal::Journal,
    resp::{Reply, Role},
    wait::until,
};
use anyhow::{Context, bail};
use kube::ResourceExt;
use std::time::{Duration, Instant};

/// Key that must outlive the resource.
const KEY: &str = "tests:kept";

/// A new ValkeyCluster becomes Ready, with one primary that the write Service leads to.
pub async fn create(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.apply(&spec()).await?;
    let took = subject.ready().await?;
    let roles = subject.roles().await?;
    let primary = subject.primary().await?;
    let address = primary.address.map(|a| a.to_string()).unwrap_or_default();
    for (member, role) in &roles {
        let wanted = if *role == Role::Primary { "primary" } else { "replica" };
        if member.label.as_deref() != Some(wanted) {
            bail!("{} is {role:?} and labelled {:?}", member.name, member.label);
        }
    }
    let route = subject.route().await?;
    if roles.len() != 3 || route != [address] {
        bail!("{} servers; the write Service leads to {route:?}", roles.len());
    }
    let pods_ready = pods_ready_after(world).await?;
    Ok(format!(
        "Ready after {:.1} s, pods ready after {pods_ready:.0} s, primary {}",
        took.as_secs_f64(),
        primary.name
    ))
}

/// Seconds from the resource's creation to the last pod's readiness as kubelet saw it.
async fn pods_ready_after(world: &World) -> anyhow::Result<f64> {
    use k8s_openapi::api::core::v1::Pod;
    let subject = &world.subject;
    let created = subject.get().await?.creation_timestamp().context("no creation time")?.0;
    let pods: kube::Api<Pod> = kube::Api::namespaced(subject.client.clone(), &subject.namespace);
    let mut latest = 0.0_f64;
    for member in subject.members().await? {
        let conditions = pods.get(&member.name).await?.status.and_then(|s| s.conditions).unwrap_or_default();
        let ready = conditions.into_iter().find(|c| c.type_ == "Ready").and_then(|c| c.last_transition_time);
        let ready = ready.with_context(|| format!("{} has no condition Ready", member.name))?;
        latest = latest.max((ready.0.as_millisecond() - created.as_millisecond()) as f64 / 1000.0);
    }
    Ok(latest)
}

/// A deleted ValkeyCluster takes its workloads with it and leaves volumes and journal.
pub async fn delete(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let uid = subject.get().await?.uid().context("no UID")?;
    let claims = subject.claims().await?;
    let begun = Instant::now();
    subject.delete().await?;
    gone(subject).await?;
    until("its workloads and Services to be gone", Duration::from_secs(60), || async {
        let left = subject.objects().await?;
        if left.is_empty() { Ok(()) } else { bail!("{left:?} are left") }
    })
    .await?;
    let took = begun.elapsed();
    let left = subject.claims().await?;
    if left != claims || left.len() < 3 {
        bail!("of the claims {claims:?} only {left:?} are left");
    }
    let journal = Journal::of_uid(&world.client, &uid).await?;
    journal.holds()?;
    if journal.lines("Finalized")?.is_empty() {
        bail!("the journal does not end with Finalized");
    }
    Ok(format!("gone after {:.1} s, {} claims and the journal kept", took.as_secs_f64(), left.len()))
}

/// A ValkeyCluster of the same name finds the volumes that stayed. No journal of it says who was primary, but the agents
/// remember, with grants higher than any of the new journal's records.
pub async fn kept_volumes(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let written = subject.call(&subject.primary().await?, &["SET", KEY, "yes"]).await?;
    if written != Reply::Text("OK".to_owned()) {
        bail!("SET: {written:?}");
    }
    world.remove().await?;
    subject.apply(&spec()).await?;
    let took = subject.ready().await?;
    let primary = subject.primary().await?;
    let kept = subject.call(&primary, &["GET", KEY]).await?;
    if kept != Reply::Text("yes".to_owned()) {
        bail!("what was written before the deletion is {kept:?}");
    }
    Ok(format!("Ready after {:.1} s, with the data of before", took.as_secs_f64()))
}
