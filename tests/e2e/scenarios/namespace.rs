//! A namespace that is deleted with the clusters in it, as a team does that has tidied up.

use super::World;
use crate::support::{
    delete_namespace,
    journal::Journal,
    restricted_namespace,
    subject::{PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::time::Instant;

/// The namespace of this scenario.
const TEMPORARY: &str = "valkeeper-e2e-temporary";
/// Clusters in it, each of one member.
const CLUSTERS: usize = 3;
/// Decisions of a cluster from the deletion of its namespace on: one may be under way, one meets the refusal, others see the member's end
/// before it; one lets the resource go. Before there was a word for it there were 17.
const DECISIONS_MAX: usize = 6;

/// The namespace goes, and the operator does not fight for it.
pub async fn deleted(world: &World) -> anyhow::Result<String> {
    restricted_namespace(&world.client, TEMPORARY).await?;
    let named = |number| Subject {
        namespace: TEMPORARY.to_owned(),
        name: format!("temporary-{number}"),
        ..world.subject.clone()
    };
    let subjects: Vec<Subject> = (0..CLUSTERS).map(named).collect();
    let spec =
        json!({ "topology": "Standalone", "profile": "Cache", "resources": super::spec()["resources"] });
    for subject in &subjects {
        subject.apply(&spec).await?;
    }
    let mut before = Vec::new();
    for subject in &subjects {
        subject.ready().await?;
        let uid = subject.get().await?.uid().context("a resource without UID")?;
        let known = decisions(&Journal::of_uid(&world.client, &uid).await?)?.len();
        before.push((uid, known));
    }
    let begun = Instant::now();
    delete_namespace(&world.client, TEMPORARY).await?;
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    until("the namespace to be gone", PATIENCE, || async {
        if namespaces.get_opt(TEMPORARY).await?.is_none() { Ok(()) } else { bail!("it is there") }
    })
    .await?;
    let gone_after = begun.elapsed();
    let (mut most, mut refused) = (0, 0);
    for (uid, known) in before {
        let journal = Journal::of_uid(&world.client, &uid).await?;
        refused += usize::from(!journal.lines("futile:")?.is_empty());
        let all = decisions(&journal)?;
        let since = all.get(known..).context("the journal became shorter")?;
        if since.len() > DECISIONS_MAX {
            bail!("{} decisions after the namespace was deleted: {since:?}", since.len());
        }
        most = most.max(since.len());
    }
    if refused == 0 {
        bail!("every resource went before any of its objects: nothing was refused, and nothing was tried");
    }
    Ok(format!(
        "{CLUSTERS} clusters gone after {:.1} s, at most {most} decisions of each since, {refused} met the refusal",
        gone_after.as_secs_f64()
    ))
}

/// The reasons of all decisions, oldest first.
fn decisions(journal: &Journal) -> anyhow::Result<Vec<String>> {
    let records = journal.records()?;
    let reason = |record: &Value| {
        record.pointer("/event/Decided/decision/reason").and_then(Value::as_str).map(str::to_owned)
    };
    Ok(records.iter().filter_map(reason).collect())
}
