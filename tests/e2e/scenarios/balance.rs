//! Shards that are even by keys and not by number of slots, under load: as soon as the spec says so, once more when the user asks, and back.

use super::{
    World,
    cluster::{GOSSIP_MAX, acquainted, members_of, settled, sized},
    remove_with_claims,
    reshard::{FEW, RESHARD_MAX, Run, counts, even, shard_of},
};
use crate::support::{journal::Journal, keys::Keys, nodes::Nodes, subject::Subject, wait::until};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    time::{Duration, Instant},
};
use valkeeper::api::v1alpha1::ANNOTATION_REBALANCE;

/// None: what is counted is what primaries have, and this machine has to take a quarter of a million keys.
const REPLICAS: u16 = 0;
/// Keys that are spread over all slots. A slot counts as one key more, so that much fewer would not be even.
const SPREAD: usize = 40_000;
/// Keys that are in a third of them at first.
const CROWDED: usize = 200_000;
/// That third: the slots of shard 0 of a new cluster.
const CROWD: RangeInclusive<u16> = 0..=5_460;
/// Keys that come to others later: five jobs and more, so that there is a middle in which a wish can be taken back.
const LATER: usize = 300_000;
/// Where: slots that stay with shard 2 while it only gets some.
const LATER_CROWD: RangeInclusive<u16> = 12_000..=16_383;
/// How far from the mean a shard may be. Percent.
const OFF_MAX: u64 = 10;
/// How far it has to be at first for anything to be shown. Percent.
const OFF_MIN: u64 = 30;
/// How long nothing may move while nobody asks for it: many turns of the operator.
const STILL: Duration = Duration::from_secs(5);

/// Keys by shard.
type Sizes = BTreeMap<u16, u64>;

/// Even by keys when the spec says so, again when the user asks, and even by slots in the end.
pub async fn by_keys(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    subject.apply(&balanced("Slots")).await?;
    subject.ready().await?;
    settled(subject, FEW, REPLICAS).await?;
    let nodes = Nodes::of(subject).await?;
    let crowd = Keys::write_into(&nodes, CROWD, CROWDED, 0).await?;
    let run = Run::with(subject, Keys::write(subject, SPREAD).await?).await?;
    let first = uneven(subject).await?;

    let begun = Instant::now();
    subject.apply(&balanced("Keys")).await?;
    let by_spec = balanced_by_keys(subject, "generation ").await.context("by the spec")?;
    let took = begun.elapsed();

    let later = Keys::write_into(&nodes, LATER_CROWD, LATER, 0).await?;
    let second = uneven(subject).await?;
    still(subject).await?;
    withdrawn(subject).await.context("a wish that is taken back")?;
    let begun = Instant::now();
    subject.annotate(ANNOTATION_REBALANCE, "e2e-1").await?;
    let by_wish = balanced_by_keys(subject, "rebalance@e2e-1").await.context("by the user's wish")?;
    let again = begun.elapsed();

    subject.apply(&balanced("Slots")).await?;
    subject.annotate(ANNOTATION_REBALANCE, "e2e-2").await?;
    until("every shard to have its share of slots", RESHARD_MAX, || async {
        even(&counts(subject).await?, FEW)
    })
    .await?;
    complete(subject).await?;
    even(&counts(subject).await?, FEW)?;

    let told = run.finish(subject, &[]).await?;
    for keys in [&crowd, &later] {
        keys.read(subject).await?;
    }
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(format!(
        "keys {first:?} -> {by_spec:?} in {:.1} s by the spec; {second:?} -> {by_wish:?} in {:.1} s by the user's wish; even by slots \
         again; {told}, and {} that were not spread",
        took.as_secs_f64(),
        again.as_secs_f64(),
        crowd.count() + later.count()
    ))
}

fn balanced(by: &str) -> Value {
    let mut spec = sized(FEW, REPLICAS);
    spec["balance"] = json!(by);
    spec
}

/// Waits until no shard is far from the mean, nothing moves any more, and the journal has the reshard as asked for by whom it was.
async fn balanced_by_keys(subject: &Subject, asked_by: &str) -> anyhow::Result<Sizes> {
    until("every shard to have its share of keys", RESHARD_MAX, || async {
        match sizes(subject).await? {
            sizes if off_mean(&sizes) <= OFF_MAX => Ok(()),
            sizes => bail!("{sizes:?}: {} % off", off_mean(&sizes)),
        }
    })
    .await?;
    complete(subject).await?;
    let sizes = sizes(subject).await?;
    if off_mean(&sizes) > OFF_MAX {
        bail!("{sizes:?} is {} % off in the end", off_mean(&sizes));
    }
    let reshards = Journal::of(subject).await?.reshards()?;
    let last = reshards.last().context("the journal has no reshard")?;
    if !last["asked_by"].as_str().is_some_and(|by| by.starts_with(asked_by)) || last["ended"].is_null() {
        bail!("asked by {}, ended {}", last["asked_by"], last["ended"]);
    }
    Ok(sizes)
}

/// Takes a wish back as soon as slots have moved for it: they stay where they are by then.
async fn withdrawn(subject: &Subject) -> anyhow::Result<()> {
    let before = counts(subject).await?;
    subject.annotate(ANNOTATION_REBALANCE, "e2e-withdrawn").await?;
    until("slots to move", RESHARD_MAX, || async {
        if counts(subject).await? == before { bail!("{before:?} still") } else { Ok(()) }
    })
    .await?;
    subject.annotate_no_more(ANNOTATION_REBALANCE).await?;
    let ended = until("the reshard to end", RESHARD_MAX, || async {
        let reshards = Journal::of(subject).await?.reshards()?;
        let last = reshards.last().context("the journal has no reshard")?;
        match last["ended"][1].as_str() {
            Some(ended) if last["asked_by"].as_str().is_some_and(|by| by.contains("e2e-withdrawn")) => {
                Ok(ended.to_owned())
            }
            _ => bail!("asked by {}, ended {}", last["asked_by"], last["ended"]),
        }
    });
    let (ended, _) = ended.await?;
    if ended != "RebalanceWithdrawn" {
        bail!("it ended as {ended}");
    }
    complete(subject).await?;
    uneven(subject).await?;
    still(subject).await
}

/// Waits until the operator has nothing to do and every node knows it; then all slots are served.
async fn complete(subject: &Subject) -> anyhow::Result<()> {
    subject.ready().await?;
    settled(subject, FEW, REPLICAS).await?;
    let count = members_of(FEW, REPLICAS);
    until("every node to see every other", GOSSIP_MAX, || acquainted(subject, count)).await?;
    Ok(())
}

/// What its nodes have, which are all primaries.
async fn sizes(subject: &Subject) -> anyhow::Result<Sizes> {
    let mut sizes = Sizes::new();
    for member in subject.members().await? {
        let reply = subject.call(&member, &["DBSIZE"]).await?;
        let keys = reply.integer().and_then(|keys| u64::try_from(keys).ok());
        let shard =
            shard_of(subject, &member.name).with_context(|| format!("{} has no shard", member.name))?;
        *sizes.entry(shard).or_default() += keys.with_context(|| format!("DBSIZE: {reply:?}"))?;
    }
    Ok(sizes)
}

/// By how much the shard that is farthest from the mean has more or fewer. Percent.
fn off_mean(sizes: &Sizes) -> u64 {
    let mean = sizes.values().sum::<u64>() / u64::from(FEW);
    (0..FEW)
        .map(|shard| sizes.get(&shard).copied().unwrap_or_default().abs_diff(mean) * 100 / mean.max(1))
        .max()
        .unwrap_or_default()
}

/// What the shards have, which has to be evened out.
async fn uneven(subject: &Subject) -> anyhow::Result<Sizes> {
    let sizes = sizes(subject).await?;
    if off_mean(&sizes) < OFF_MIN {
        bail!("{sizes:?} is too even to show anything");
    }
    Ok(sizes)
}

/// Nobody asks: nothing moves.
async fn still(subject: &Subject) -> anyhow::Result<()> {
    let (before, begun) = (counts(subject).await?, Instant::now());
    while begun.elapsed() < STILL {
        let now = counts(subject).await?;
        if now != before {
            bail!("{before:?} became {now:?} though nobody asked");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
