//! Topology Cluster when a person tells its nodes something else than the operator would: what fits the spec stays, everything else is put
//! right, and no acknowledged write is lost over it.

use super::{
    World,
    cluster::{Outages, REPLICAS, SETTLED_MAX, SHARDS, acquainted, load, members_of, settled, shards_now},
    cluster_life::{replica_of, whole},
    cluster_lost::{node_id, shard},
};
use crate::support::{
    journal::Journal,
    keys::Keys,
    nodes::Nodes,
    resp::Role,
    subject::{Member, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use std::{collections::BTreeMap, time::Instant};

/// Keys spread over all slots, read one by one afterwards.
const KEYS: usize = 30_000;
/// The slot that its owner gives up.
const TAKEN: u16 = 6_000;
/// Keys in it.
const KEYS_TAKEN: usize = 500;

/// A primary moved, a replica sent to another shard, one that is reset, a member forgotten by the others, a slot that its owner gives up.
pub async fn told_otherwise(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let in_slot = Keys::write_into(&Nodes::of(subject).await?, TAKEN..=TAKEN, KEYS_TAKEN, 0).await?;
    let mut told = Vec::new();
    let to = replica_of(subject, shard(&settled(subject, SHARDS, REPLICAS).await?, 1)?).await?;
    told.push(story(subject, "a primary moved", &["ExternalPromotion"], moved(subject, &to)).await?);
    let stays = shard(&settled(subject, SHARDS, REPLICAS).await?, 1)?.primary.name.clone();
    if stays != to.name {
        bail!("{} was made primary by hand, and {stays} is", to.name);
    }
    let decided = ["MemberAttached"];
    told.push(story(subject, "a replica of another shard", &decided, of_another_shard(subject)).await?);
    let decided = ["NodesMet", "NodesForgotten"];
    told.push(story(subject, "a replica reset", &decided, reset(subject)).await?);
    // The node makes itself known again: nothing has to be decided.
    told.push(story(subject, "a member forgotten", &[], forgotten(subject)).await?);
    told.push(story(subject, "a slot without an owner", &["SlotsReclaimed"], taken(subject)).await?);
    in_slot.read(subject).await.context("of the slot that was given up")?;
    keys.read(subject).await?;
    Ok(format!("{}; {} keys read", told.join(" | "), keys.count() + in_slot.count()))
}

/// One of them under load: how long until all is as it shall be, and what clients saw. Each of `decided` must be in the journal for it.
async fn story(
    subject: &Subject,
    name: &str,
    decided: &[&str],
    act: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<String> {
    let shards = settled(subject, SHARDS, REPLICAS).await?;
    let load = load(subject, &shards).await?;
    let before = last(subject, decided).await?;
    let begun = Instant::now();
    let healed = async {
        act.await?;
        whole(subject, SHARDS, REPLICAS).await?;
        anyhow::Ok(begun.elapsed())
    };
    let healed = healed.await.with_context(|| name.to_owned())?;
    load.flows(SETTLED_MAX).await.with_context(|| name.to_owned())?;
    let after = last(subject, decided).await?;
    if let Some((reason, _)) = after.iter().find(|(reason, line)| before.get(*reason) == Some(*line)) {
        bail!("{name}: nothing was decided for {reason}");
    }
    let faults = (0..SHARDS).map(|number| (number, begun)).collect::<BTreeMap<_, _>>();
    let outages = Outages::of(subject, &load.finish()?, &faults).await?;
    outages.nothing_is_excused().with_context(|| name.to_owned())?;
    Ok(format!("{name}: whole after {:.1} s, {}", healed.as_secs_f64(), outages.line()?))
}

/// The last record of each of these reasons.
async fn last<'a>(subject: &Subject, reasons: &[&'a str]) -> anyhow::Result<BTreeMap<&'a str, String>> {
    let journal = Journal::of(subject).await?;
    let last = |reason: &&'a str| Ok((*reason, journal.lines(reason)?.pop().unwrap_or_default()));
    reasons.iter().map(last).collect()
}

/// The handover that a person asks a replica for.
async fn moved(subject: &Subject, replica: &Member) -> anyhow::Result<()> {
    tell(subject, replica, &["CLUSTER", "FAILOVER"]).await?;
    until(&format!("{} to be primary and labelled so", replica.name), SETTLED_MAX, || async {
        let now = shards_now(subject, SHARDS, REPLICAS).await?;
        let primary = &shard(&now, 1)?.primary;
        if primary.name == replica.name { Ok(()) } else { bail!("it is {}", primary.name) }
    })
    .await?;
    Ok(())
}

/// A replica that copies another shard's primary instead of its own.
async fn of_another_shard(subject: &Subject) -> anyhow::Result<()> {
    let shards = settled(subject, SHARDS, REPLICAS).await?;
    let replica = replica_of(subject, shard(&shards, 0)?).await?;
    let other = node_id(subject, &shard(&shards, 2)?.primary.name).await?;
    tell(subject, &replica, &["CLUSTER", "REPLICATE", &other]).await?;
    back_in(subject, &replica, 0).await
}

/// A replica that knows nobody any more: a second primary in its shard, by its own word.
async fn reset(subject: &Subject) -> anyhow::Result<()> {
    let shards = settled(subject, SHARDS, REPLICAS).await?;
    let replica = replica_of(subject, shard(&shards, 2)?).await?;
    tell(subject, &replica, &["CLUSTER", "RESET", "HARD"]).await?;
    back_in(subject, &replica, 2).await
}

/// A primary that is told to forget another shard's replica, and tells the others. A node that hears nothing from others introduces itself
/// again: that takes it some node timeouts.
async fn forgotten(subject: &Subject) -> anyhow::Result<()> {
    let shards = settled(subject, SHARDS, REPLICAS).await?;
    let replica = replica_of(subject, shard(&shards, 1)?).await?;
    let id = node_id(subject, &replica.name).await?;
    tell(subject, &shard(&shards, 0)?.primary, &["CLUSTER", "FORGET", &id]).await?;
    let count = members_of(SHARDS, REPLICAS);
    until("every node to know it again", SETTLED_MAX, || acquainted(subject, count)).await?;
    Ok(())
}

/// A slot that its owner is told to give up; the keys in it are there still.
async fn taken(subject: &Subject) -> anyhow::Result<()> {
    let take = |nodes: &Nodes| nodes.tell(nodes.owner(TAKEN)?, &["CLUSTER", "DELSLOTS", &TAKEN.to_string()]);
    Nodes::of(subject).await?.ask(take).await
}

/// Waits until a member follows its shard's primary.
async fn back_in(subject: &Subject, member: &Member, number: u16) -> anyhow::Result<()> {
    until(&format!("{} to follow its shard's primary", member.name), SETTLED_MAX, || async {
        let roles = subject.roles().await?;
        let now = shards_now(subject, SHARDS, REPLICAS).await?;
        let primary = shard(&now, number)?.primary.address.context("no address")?.to_string();
        match roles.iter().find(|(other, _)| other.name == member.name) {
            Some((_, Role::Replica { of, link })) if *of == primary && link == "connected" => Ok(()),
            other => bail!("it is {other:?}"),
        }
    })
    .await?;
    Ok(())
}

async fn tell(subject: &Subject, member: &Member, words: &[&str]) -> anyhow::Result<()> {
    let reply = subject.call(member, words).await?;
    if reply.text() == Some("OK") { Ok(()) } else { bail!("{}, {}: {reply:?}", member.name, words.join(" ")) }
}
