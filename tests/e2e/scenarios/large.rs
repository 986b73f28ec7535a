//! A Valkey Cluster so large that what an operator sees of it first may be more than one batch of its journal: formed, taken over by
//! another operator, and a primary of it killed.

use super::{
    World,
    cluster::{Outages, SETTLED_MAX, kill_at_once, load_of, members_of, settled, sized},
    remove_with_claims,
};
use crate::support::{
    journal::{Journal, number},
    subject::Subject,
    wait::until,
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

/// As many as kubelets on two cores start within [`STARTED_MAX`]; a look at all of them is more than one batch.
const SHARDS: u16 = 11;
const REPLICAS: u16 = 5;
/// Until all is formed: two cores start about one pod in a second.
const STARTED_MAX: Duration = Duration::from_secs(480);
/// Until an operator that has just begun has looked at everybody.
const LOOKED_MAX: Duration = Duration::from_secs(60);
/// Whose primary is killed.
const HIT: u16 = 1;

/// Formed, looked at anew, and one primary lost.
pub async fn formed_and_taken_over(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let mut spec = sized(SHARDS, REPLICAS);
    spec["profile"] = json!("Cache");
    spec["resources"] =
        json!({ "requests": { "cpu": "5m", "memory": "16Mi" }, "limits": { "memory": "128Mi" } });
    if let Some(fields) = spec.as_object_mut() {
        fields.remove("persistence");
    }
    subject.apply(&spec).await?;
    let (_, formed) = subject.condition("Ready", "True", STARTED_MAX).await?;
    let before = settled(subject, SHARDS, REPLICAS).await?;

    world.operator.scale(0).await?;
    let last = Journal::of(subject).await?.records()?.last().map(|record| number(record, "epoch"));
    world.operator.scale(1).await?;
    let look = || largest_turn(subject, last.unwrap_or_default());
    let (bytes, looked) = until("the new operator's look at everybody", LOOKED_MAX, look).await?;
    subject.ready().await?;

    let load = load_of(subject, &before, &["0", "1", "2"]).await?;
    let target = before.iter().find(|shard| shard.number == HIT).context("no such shard")?;
    let faults = kill_at_once(world, &[target])?;
    load.flows(SETTLED_MAX).await.context("after the kill")?;
    let fault = Instant::now();
    settled(subject, SHARDS, REPLICAS).await?;
    subject.ready().await?;
    let whole = fault.elapsed();
    let outages = Outages::of(subject, &load.finish()?, &faults).await?;
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(format!(
        "{} members Ready after {:.1} s; a new operator has seen every node {:.1} s after it was ready, up to {bytes} bytes of records in \
         one turn; a primary killed: whole after {:.1} s; {}",
        members_of(SHARDS, REPLICAS),
        formed.as_secs_f64(),
        looked.as_secs_f64(),
        whole.as_secs_f64(),
        outages.line()?,
    ))
}

/// Bytes, as text, of the largest turn after that epoch, once every node was looked at: who answers late is seen in a later turn.
async fn largest_turn(subject: &Subject, last: i64) -> anyhow::Result<usize> {
    let records = Journal::of(subject).await?.records()?;
    let mut turns: BTreeMap<i64, usize> = BTreeMap::new();
    let mut looked: HashSet<&str> = HashSet::new();
    for record in records.iter().filter(|record| number(record, "epoch") > last) {
        let event = record.pointer("/event");
        *turns.entry(number(record, "time")).or_default() += event.map_or(0, |event| event.to_string().len());
        looked.extend(record.pointer("/event/NodeChanged/member").and_then(Value::as_str));
    }
    let (seen, wanted) = (looked.len(), members_of(SHARDS, REPLICAS));
    if seen == wanted {
        Ok(turns.into_values().max().unwrap_or_default())
    } else {
        bail!("{seen} of {wanted} nodes")
    }
}
