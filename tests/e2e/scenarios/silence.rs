//! A primary that says nothing but may wake at any moment.

use super::{
    World,
    cluster::{Outages, REPLICAS, SETTLED_MAX, SHARDS, load, settled},
};
use crate::support::{
    load::{Figures, Load, maximum},
    process::{freeze_server, signal},
    subject::{Member, Subject},
};
use anyhow::{Context, bail};
use std::time::{Duration, Instant};
use valkeeper::api::v1alpha1::DETECTION_WINDOW_DEFAULT_MS;

/// Until another has been promoted: twenty detection windows.
const PROMOTED_MAX: Duration = Duration::from_secs(60);
/// Acknowledged writes of each client that show that somebody serves again: more than an answer that was on its way at the freeze.
const WRITES: usize = 100;
/// How much longer than the detection window a shard of a Valkey Cluster may be without writes, in milliseconds. The fence and the election
/// took 0.2 to 0.9 s, and 1.3 s on a slower machine: this is twice that and more, as speed is for benchmarks to tell.
const BEYOND_WINDOW_MS: f64 = 3_000.0;

/// A frozen primary is fenced before another is promoted, and what was acknowledged stays.
pub async fn frozen(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let load = Load::start(subject).await?;
    let fault = frozen_until_fenced(subject, &primary, &load).await?;
    let now = subject.primary().await?;
    let logs = load.finish()?;
    let figures = Figures::of(subject, &logs, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(format!("{} -> {}; {}", primary.name, now.name, figures.line()))
}

/// The same in a Valkey Cluster: the other primaries elect the replica as soon as the silent one is fenced, and the other shards go on.
pub async fn frozen_in_cluster(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let load = load(subject, &before).await?;
    let target = before.get(1).context("no shard 1")?;
    let fault = frozen_until_fenced(subject, &target.primary, &load).await?;
    let after = settled(subject, SHARDS, REPLICAS).await?;
    subject.ready().await?;
    let outages = Outages::of(subject, &load.finish()?, &[(target.number, fault)].into()).await?;
    let told = outages.line()?;
    let longest = maximum(&outages.hit.values().copied().collect::<Vec<f64>>());
    let window_ms = f64::from(u32::try_from(DETECTION_WINDOW_DEFAULT_MS)?);
    if longest > window_ms + BEYOND_WINDOW_MS {
        bail!("with a window of {window_ms} ms: {told}");
    }
    let now = after.get(1).context("no shard 1")?;
    Ok(format!("{} -> {}; {told}", target.primary.name, now.primary.name))
}

/// Freezes a primary until clients are served by another and all is well again; the time just before. It was ended meanwhile.
async fn frozen_until_fenced(subject: &Subject, primary: &Member, load: &Load) -> anyhow::Result<Instant> {
    let (pid, fault) = freeze_server(subject.place, primary)?;
    let story = async {
        load.grows_by(WRITES, PROMOTED_MAX).await?;
        subject.ready().await
    };
    let outcome = story.await;
    // If nobody has fenced it, it must not stay frozen; if it has been, its pid is gone.
    let woken = signal(pid, "CONT").is_ok();
    outcome?;
    if woken {
        bail!("the frozen process {pid} of {} was never fenced", primary.name);
    }
    Ok(fault)
}
