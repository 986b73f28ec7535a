//! Topology Cluster while nothing is broken and something is asked for: every pod rolled, a primary moved by a wish, pods deleted,
//! replicas added and removed; and two primaries of five killed, for which shards are added and removed. Nobody is killed but there, so
//! nothing that was acknowledged may be gone.

use super::{
    World,
    cluster::{
        GOSSIP_MAX, Outages, REPLICAS, SETTLED_MAX, SHARDS, Shard, acquainted, killed, ledger, load, load_of,
        members_of, none_of, settled, sized,
    },
    reshard::reshard,
};
use crate::support::{
    journal::Journal,
    keys::Keys,
    load::Load,
    resp::{Reply, Role},
    subject::{Member, PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::{Api, api::ListParams};
use serde_json::json;
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

/// Small keys that are there before anything is asked for: some thousand for each shard, written and read in a moment.
const KEYS: usize = 30_000;
/// The writers of a rollout: two share a shard, as clients do.
const ROLLOUT_WRITERS: [&str; 4] = ["0", "1", "2", "0 again"];
/// Shards of which two lose their primary at once: a majority is left that can vote.
const FIVE: u16 = 5;

/// Every pod is replaced for a changed directive, and again for the former one.
pub async fn rollout(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let load = load_of(subject, &before, &ROLLOUT_WRITERS).await?;
    let begun = Instant::now();
    let mut wanted = ledger();
    // Not the value of another run: it must be a change.
    let value = (200 + std::time::UNIX_EPOCH.elapsed()?.as_secs() % 300).to_string();
    wanted["config"] = json!({ "tcp-backlog": value });
    let out = rolled(subject, &wanted).await?;
    for member in subject.members().await? {
        let reply = subject.call(&member, &["CONFIG", "GET", "tcp-backlog"]).await?;
        if reply.list().get(1).and_then(Reply::text) != Some(value.as_str()) {
            bail!("{} has {reply:?}, not {value}", member.name);
        }
    }
    let back = rolled(subject, &ledger()).await.context("back")?;
    let told = undisturbed(subject, load, begun).await?;
    keys.read(subject).await?;
    Ok(format!(
        "rolled in {:.1} s, and back in {:.1} s; {told}; {} keys read",
        out.as_secs_f64(),
        back.as_secs_f64(),
        keys.count()
    ))
}

/// Applies a spec that needs other pods, and waits until there are only those; how long that took.
async fn rolled(subject: &Subject, wanted: &serde_json::Value) -> anyhow::Result<Duration> {
    let old: HashSet<String> = subject.members().await?.into_iter().map(|member| member.uid).collect();
    let begun = Instant::now();
    subject.apply(wanted).await?;
    until("every pod to be another", PATIENCE, || none_of(subject, &old)).await?;
    whole(subject, SHARDS, REPLICAS).await?;
    Ok(begun.elapsed())
}

/// A primary moves to the replica that a user names.
pub async fn switchover(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let from = before.get(1).context("no shard 1")?;
    let to = replica_of(subject, from).await?;
    let load = load(subject, &before).await?;
    let begun = Instant::now();
    wish(subject, &to.name).await?;
    let took = begun.elapsed();
    let after = whole(subject, SHARDS, REPLICAS).await?;
    let told = undisturbed(subject, load, begun).await?;
    same_but(&before, &after, Some(from.number))?;
    let now = after.get(1).context("no shard 1")?;
    Ok(format!(
        "{} -> {}, seen after {:.2} s; {told}",
        from.primary.name,
        now.primary.name,
        took.as_secs_f64()
    ))
}

/// Asks for a member to be primary, and waits until it is.
async fn wish(subject: &Subject, name: &str) -> anyhow::Result<()> {
    let place = name.strip_prefix(&format!("{}-", subject.name)).context("no such member")?;
    // The wish stays with the resource, but comes true once: another one must have another text.
    let token = std::time::UNIX_EPOCH.elapsed()?.as_nanos();
    subject.annotate("valkeeper.io/switchover", &format!("{place}@{token:x}")).await?;
    until(&format!("{name} to be primary"), PATIENCE, || async {
        match subject.roles().await?.iter().find(|(member, _)| member.name == name) {
            Some((_, Role::Primary)) => Ok(()),
            other => bail!("it is {other:?}"),
        }
    })
    .await
    .map(|_| ())
}

/// A primary's pod is deleted, then a replica's: the one is handed over, of the other nobody takes notice.
pub async fn pod_deleted(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let load = load(subject, &before).await?;
    let handovers = Journal::of(subject).await?.lines("PrimaryLeaving")?.len();
    let target = before.get(1).context("no shard 1")?;
    let begun = Instant::now();
    replaced(subject, &target.primary).await?;
    let after = whole(subject, SHARDS, REPLICAS).await?;
    let primarys = undisturbed(subject, load, begun).await?;
    same_but(&before, &after, Some(target.number))?;
    if Journal::of(subject).await?.lines("PrimaryLeaving")?.len() <= handovers {
        bail!("{} was told to stop and nothing was handed over", target.primary.name);
    }
    let load = self::load(subject, &after).await?;
    let replica = replica_of(subject, after.get(2).context("no shard 2")?).await?;
    let begun = Instant::now();
    replaced(subject, &replica).await?;
    let last = whole(subject, SHARDS, REPLICAS).await?;
    let replicas = undisturbed(subject, load, begun).await?;
    same_but(&after, &last, None)?;
    let now = after.get(1).context("no shard 1")?;
    let path = format!("{} -> {}", target.primary.name, now.primary.name);
    Ok(format!("{path}; {primarys} | replica {}; {replicas}", replica.name))
}

/// Replicas of each shard come and go; a primary whose place goes hands over first.
pub async fn replicas(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    // One place that will go is a primary's.
    wish(subject, &format!("{}-1-{REPLICAS}", subject.name)).await?;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let load = load(subject, &before).await?;
    let begun = Instant::now();
    let mut told = vec![format!("{REPLICAS} replica")];
    for replicas in [2, 1, 0, 1] {
        let asked = Instant::now();
        subject.apply(&sized(SHARDS, replicas)).await?;
        subject.ready().await.with_context(|| format!("{replicas} replicas"))?;
        whole(subject, SHARDS, replicas).await.with_context(|| format!("{replicas} replicas"))?;
        load.flows(SETTLED_MAX).await?;
        told.push(format!("{replicas} in {:.1} s", asked.elapsed().as_secs_f64()));
    }
    let gaps = undisturbed(subject, load, begun).await?;
    keys.read(subject).await?;
    Ok(format!("{}; {gaps}; {} keys read", told.join(", "), keys.count()))
}

/// Two primaries of five killed at once, and back to three shards.
pub async fn five_two(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let out = reshard(subject, FIVE).await.context("out")?;
    let told = killed(world, FIVE, &[1, 3]).await?;
    keys.read(subject).await.context("of five shards")?;
    let back = reshard(subject, SHARDS).await.context("in")?;
    keys.read(subject).await.context("of three shards")?;
    Ok(format!(
        "{told}; {} keys read; {SHARDS} -> {FIVE} in {:.1} s, back in {:.1} s",
        keys.count(),
        out.as_secs_f64(),
        back.as_secs_f64()
    ))
}

/// Waits until all is as it shall be by the operator's word and by every node's.
pub(super) async fn whole(subject: &Subject, shards: u16, replicas: u16) -> anyhow::Result<Vec<Shard>> {
    let found = settled(subject, shards, replicas).await?;
    subject.ready().await?;
    let count = members_of(shards, replicas);
    until("every node to know its fellows and nobody else", GOSSIP_MAX, || acquainted(subject, count))
        .await?;
    Ok(found)
}

/// Ends a load of which nothing may be lost; what each shard's clients saw since then.
async fn undisturbed(subject: &Subject, load: Load, since: Instant) -> anyhow::Result<String> {
    load.flows(SETTLED_MAX).await?;
    let faults = (0..SHARDS).map(|number| (number, since)).collect();
    let outages = Outages::of(subject, &load.finish()?, &faults).await?;
    outages.nothing_is_excused()?;
    outages.line()
}

/// Deletes a pod and waits until there is another in its place.
async fn replaced(subject: &Subject, member: &Member) -> anyhow::Result<()> {
    subject.delete_pod(&member.name).await?;
    loses_its_name(subject, member).await?;
    until(&format!("the successor of {}", member.name), PATIENCE, || async {
        match subject.members().await?.iter().find(|now| now.name == member.name) {
            Some(now) if now.uid != member.uid => Ok(()),
            Some(_) => bail!("it is there still"),
            None => bail!("there is none"),
        }
    })
    .await
    .map(|_| ())
}

/// Waits until the member's own Service leads nowhere. Its pod must still be there, which refuses clients: an address that is gone
/// answers nothing.
async fn loses_its_name(subject: &Subject, member: &Member) -> anyhow::Result<()> {
    let slices: Api<EndpointSlice> = Api::namespaced(subject.client.clone(), &subject.namespace);
    let place = member.name.strip_prefix(&subject.name).unwrap_or_default();
    let label = format!("kubernetes.io/service-name={}-node{place}", subject.name);
    let of_names = ListParams::default().labels(&label);
    let is_it = |endpoint: &Endpoint| {
        endpoint.target_ref.as_ref().and_then(|pod| pod.uid.as_ref()) == Some(&member.uid)
    };
    until(&format!("{} to lose its name", member.name), PATIENCE, || async {
        let slices = slices.list(&of_names).await?;
        let named = slices.items.iter().flat_map(|slice| slice.endpoints.iter().flatten()).any(is_it);
        if named { bail!("its name leads to it") } else { Ok(()) }
    })
    .await?;
    let stays = subject.members().await?.iter().any(|now| now.uid == member.uid);
    if stays { Ok(()) } else { bail!("{} went with its name", member.name) }
}

/// Primaries are who they were, except that the one of this shard is another.
fn same_but(before: &[Shard], after: &[Shard], moved: Option<u16>) -> anyhow::Result<()> {
    for (old, new) in before.iter().zip(after) {
        let is_same = old.primary.name == new.primary.name;
        if is_same == (moved == Some(old.number)) {
            bail!("shard {}: {} -> {}", old.number, old.primary.name, new.primary.name);
        }
    }
    Ok(())
}

/// A member of a shard that is not its primary.
pub(super) async fn replica_of(subject: &Subject, shard: &Shard) -> anyhow::Result<Member> {
    let prefix = format!("{}-{}-", subject.name, shard.number);
    let is_it = |member: &Member| member.name.starts_with(&prefix) && member.name != shard.primary.name;
    let found = subject.members().await?.into_iter().find(is_it);
    found.with_context(|| format!("shard {} has no replica", shard.number))
}
