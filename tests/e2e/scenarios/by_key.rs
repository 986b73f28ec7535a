//! Slots that move key by key: between servers that know no other way, with a version of each on the way, and where a person left them
//! half moved.

use super::{
    World,
    cluster::{REPLICAS, SETTLED_MAX, settled, sized},
    remove_with_claims,
    reshard::{FEW, Fault, RESHARD_MAX, Run, complete, counts, even, strike, under_way},
};
use crate::support::{
    Place,
    journal::Journal,
    keys::Keys,
    nodes::Nodes,
    resp::{PORT, Reply},
    slots,
    subject::Subject,
    wait::until,
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{net::IpAddr, time::Instant};
use valkeeper::api::v1alpha1::ANNOTATION_REBALANCE;

/// Version of the servers that know no atomic slot migration.
const OLDER: &str = "8.1";
/// Small keys over all slots while a few are half moved.
const SPREAD: usize = 20_000;
/// Of one shard, whichever it is: the slot of which a part of the keys is moved, one that is only open at its source, and one that is
/// only open at the other end.
const HALF: [u16; 3] = [1_000, 1_001, 1_002];
/// Keys of the first, and how many of them are moved: `GETKEYSINSLOT` of a part, in a single `MIGRATE`.
const KEYS: usize = 2_000;
/// See there.
const MOVED: usize = 700;

/// Out, with who gives killed on the way, and in again.
pub async fn source_killed(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    subject.apply(&older(world.place, FEW)).await?;
    subject.ready().await?;
    let run = Run::start(subject, FEW).await?;
    let (before, begun) = (counts(subject).await?, Instant::now());
    subject.apply(&older(world.place, FEW + 1)).await?;
    let now = under_way(subject, &before).await?;
    let victim = Fault::Source.victim(&before, &now, FEW + 1);
    let kill = strike(world, Fault::Source, victim).await?.context("nobody was giving")?;
    complete(subject, FEW + 1).await.context("out")?;
    let (out, begun) = (begun.elapsed(), Instant::now());
    subject.apply(&older(world.place, FEW)).await?;
    complete(subject, FEW).await.context("in")?;
    let back = begun.elapsed();
    let told = run.finish(subject, &[kill]).await?;
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(format!(
        "{FEW} -> {} in {:.1} s with its source killed, back in {:.1} s; {told}",
        FEW + 1,
        out.as_secs_f64(),
        back.as_secs_f64()
    ))
}

/// Another version and another shard in one wish, so that shards are of both versions for a while; and without that shard again.
pub async fn upgrade(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    subject.apply(&older(world.place, FEW)).await?;
    subject.ready().await?;
    let run = Run::start(subject, FEW).await?;
    let old = versions(subject).await?;
    if !old.iter().all(|version| version.starts_with(OLDER)) {
        bail!("{old:?} at first");
    }
    let begun = Instant::now();
    subject.apply(&sized(FEW + 1, REPLICAS)).await?;
    complete(subject, FEW + 1).await.context("out")?;
    let out = begun.elapsed();
    let new = versions(subject).await?;
    if new.iter().any(|version| version.starts_with(OLDER)) {
        bail!("{new:?} in the end");
    }
    // Rollouts come first: no slot left or reached a server that knows no other way.
    let journal = Journal::of(subject).await?;
    if let Some(early) = journal.lines("key by key")?.first() {
        bail!("{early}");
    }
    if journal.lines("SlotsHandedOver")?.is_empty() {
        bail!("the journal has no slots handed over");
    }
    let begun = Instant::now();
    subject.apply(&sized(FEW, REPLICAS)).await?;
    complete(subject, FEW).await.context("in")?;
    let back = begun.elapsed();
    let told = run.finish(subject, &[]).await?;
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(format!(
        "{FEW} of {} -> {} of {} in {:.1} s, back to {FEW} in {:.1} s; {told}",
        old.concat(),
        FEW + 1,
        new.concat(),
        out.as_secs_f64(),
        back.as_secs_f64()
    ))
}

/// A person moves a part of a slot, opens two more at one end only, and leaves.
pub async fn half_moved(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    settled(subject, FEW, REPLICAS).await?;
    let [half, ..] = HALF;
    let nodes = Nodes::of(subject).await?;
    let crowd = Keys::write_into(&nodes, half..=half, KEYS, 0).await?;
    let run = Run::with(subject, Keys::write(subject, SPREAD).await?).await?;
    let there = nodes.ask(leave_half_moved).await?;
    let begun = Instant::now();
    until("every open slot to be closed", SETTLED_MAX, || nodes.ask(all_closed)).await?;
    let took = begun.elapsed();
    let owner = nodes.ask(move |nodes| nodes.owner(half)).await?;
    if owner != there {
        bail!("slot {half} was going to {there} and is at {owner}");
    }
    subject.ready().await?;
    settled(subject, FEW, REPLICAS).await?;
    crowd.read(subject).await?;
    subject.annotate(ANNOTATION_REBALANCE, &format!("e2e-{}", std::process::id())).await?;
    until("every shard to have its share", RESHARD_MAX, || async { even(&counts(subject).await?, FEW) })
        .await?;
    complete(subject, FEW).await?;
    crowd.read(subject).await.context("balanced again")?;
    let told = run.finish(subject, &[]).await?;
    Journal::of(subject).await?.holds()?;
    Ok(format!(
        "closed {:.1} s after they were left, {MOVED} of {KEYS} keys moved by hand, all read; {told}",
        took.as_secs_f64()
    ))
}

/// The Valkey Cluster of the scenarios with servers that know no atomic slot migration.
fn older(place: Place, shards: u16) -> Value {
    let mut spec = sized(shards, REPLICAS);
    spec["image"] = json!(match place {
        Place::Local => format!("valkeeper.local/valkey:{OLDER}"),
        Place::Existing => format!("valkey/valkey:{OLDER}"),
    });
    spec
}

/// What the members' servers say they are, each once.
async fn versions(subject: &Subject) -> anyhow::Result<Vec<String>> {
    let nodes = Nodes::of(subject).await?;
    let ask = |nodes: &Nodes| {
        let mut versions = Vec::new();
        for address in &nodes.addresses {
            let version = nodes.open(*address)?.info("server", "valkey_version")?;
            versions.push(version.with_context(|| format!("{address} has no version"))?);
        }
        versions.sort();
        versions.dedup();
        Ok(versions)
    };
    nodes.ask(ask).await
}

/// Leaves slots half moved; where they are on their way to.
fn leave_half_moved(nodes: &Nodes) -> anyhow::Result<IpAddr> {
    let [half, at_source, at_target] = HALF;
    let from = nodes.owner(half)?;
    let runs = slots::runs(&mut nodes.any()?)?;
    let (to, _) =
        slots::counts(&runs).into_iter().find(|(owner, _)| *owner != from).context("only one owner")?;
    let (from_id, to_id) = (nodes.id(from)?, nodes.id(to)?);
    let open = |address, slot: u16, how, other: &str| {
        nodes.tell(address, &["CLUSTER", "SETSLOT", &slot.to_string(), how, other])
    };
    open(to, half, "IMPORTING", &from_id)?;
    open(from, half, "MIGRATING", &to_id)?;
    open(from, at_source, "MIGRATING", &to_id)?;
    open(to, at_target, "IMPORTING", &from_id)?;
    let asked = ["CLUSTER", "GETKEYSINSLOT", &half.to_string(), &MOVED.to_string()];
    let reply = nodes.open(from)?.call(&asked)?;
    let names: Vec<&str> = reply.list().iter().filter_map(Reply::text).collect();
    if names.len() != MOVED {
        bail!("GETKEYSINSLOT {half}: {reply:?}");
    }
    let (host, port) = (to.to_string(), PORT.to_string());
    let mut migrate = vec!["MIGRATE", &host, &port, "", "0", "5000", "AUTH", &nodes.password, "KEYS"];
    migrate.extend(names);
    match nodes.open(from)?.call(&migrate)? {
        Reply::Text(_) => Ok(to),
        other @ (Reply::Error(_) | Reply::Integer(_) | Reply::Nil | Reply::List(_)) => {
            bail!("MIGRATE: {other:?}")
        }
    }
}

/// No node has a slot on its way, or waits for one.
fn all_closed(nodes: &Nodes) -> anyhow::Result<()> {
    for address in &nodes.addresses {
        let reply = nodes.open(*address)?.call(&["CLUSTER", "NODES"])?;
        let text = reply.text().with_context(|| format!("CLUSTER NODES: {reply:?}"))?;
        let is_open = |word: &&str| word.starts_with('[');
        if let Some(open) = text.split_whitespace().find(is_open) {
            bail!("{address} has {open}");
        }
    }
    Ok(())
}
