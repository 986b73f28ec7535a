//! The operator is not there: for a moment in the middle of a failover, or for long enough that someone helps out.

use super::World;
use crate::support::{
    journal::Journal,
    load::{Figures, Load},
    process::{kill_server, signal},
    resp::{PORT, Reply},
    wait::until,
};
use anyhow::{Context, bail};
use rand::Rng;
use std::time::{Duration, Instant};

/// Moments of a failover at which the operator is killed.
const ROUNDS: usize = 4;
/// A failover takes about 15 ms until clients write again, and some more until it is closed.
const MOMENT_MAX_MS: u64 = 20;
/// Until the next process leads: the Lease of one that was killed runs out first.
const LEASE_PATIENCE: Duration = Duration::from_secs(120);

/// The operator's process is killed at a random moment of a failover; the one that kubelet starts finishes it.
pub async fn killed_in_a_failover(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let mut told = Vec::new();
    for _ in 0..ROUNDS {
        let primary = subject.protected(LEASE_PATIENCE).await?;
        let epoch = epoch(world).await?;
        let load = Load::start(subject).await?;
        let operator = world.operator.pid().await?;
        let moment = Duration::from_millis(rand::rng().random_range(0..=MOMENT_MAX_MS));
        let fault = kill_server(world.place, &subject.namespace, &primary)?;
        std::thread::sleep(moment);
        signal(operator, "KILL")?;
        let at = format!("operator killed {} ms after the primary", moment.as_millis());
        load.flows(LEASE_PATIENCE).await.with_context(|| at.clone())?;
        until("a new epoch of the journal", LEASE_PATIENCE, || async {
            let now = self::epoch(world).await?;
            if now > epoch { Ok(()) } else { bail!("still {now}") }
        })
        .await
        .with_context(|| at.clone())?;
        subject.ready().await.with_context(|| at.clone())?;
        let logs = load.finish()?;
        let figures = Figures::of(subject, &logs, &[fault]).await?;
        figures.nothing_lost().with_context(|| at.clone())?;
        Journal::of(subject).await?.holds().with_context(|| at.clone())?;
        told.push(format!("{} ms: {}", moment.as_millis(), figures.line()));
    }
    Ok(format!("operator killed after {}", told.join(" | ")))
}

async fn epoch(world: &World) -> anyhow::Result<i64> {
    let status = world.subject.get().await?.status.unwrap_or_default();
    Ok(status.journal.context("no place in the journal")?.epoch)
}

/// With the operator scaled to zero someone promotes a replica by hand; the operator comes back and follows.
pub async fn changed_by_hand(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let old = subject.protected(Duration::from_secs(60)).await?;
    world.operator.scale(0).await?;
    let changed = change_by_hand(world, &old.name).await;
    let back = Instant::now();
    world.operator.scale(1).await?;
    let chosen = changed?;
    until("the write Service to follow", LEASE_PATIENCE, || async {
        let route = subject.route().await?;
        if route == [chosen.1.clone()] { Ok(()) } else { bail!("it leads to {route:?}") }
    })
    .await?;
    let took = back.elapsed();
    subject.ready().await?;
    let now = subject.primary().await?;
    if now.name != chosen.0 {
        bail!("{} is primary, not {}, which was promoted by hand", now.name, chosen.0);
    }
    if Journal::of(subject).await?.lines("ExternalPromotion")?.is_empty() {
        bail!("the journal does not call it an external promotion");
    }
    let now = (chosen.0, took.as_secs_f64());
    Ok(format!("{} -> {} by hand; adopted {:.1} s after the operator was asked back", old.name, now.0, now.1))
}

/// What a person does with valkey-cli: one replica becomes primary, all others follow it. Its name and address.
pub async fn change_by_hand(world: &World, old: &str) -> anyhow::Result<(String, String)> {
    let subject = &world.subject;
    let members = subject.members().await?;
    let chosen = members.iter().find(|m| m.name != old).context("no replica")?;
    let address = chosen.address.context("no address")?.to_string();
    let port = PORT.to_string();
    let others =
        members.iter().filter(|m| m.name != chosen.name).map(|m| (m, [address.as_str(), port.as_str()]));
    for (member, [host, port]) in std::iter::once((chosen, ["NO", "ONE"])).chain(others) {
        let reply = subject.call(member, &["REPLICAOF", host, port]).await?;
        if !matches!(&reply, Reply::Text(text) if text.starts_with("OK")) {
            bail!("REPLICAOF {host} {port} on {}: {reply:?}", member.name);
        }
    }
    Ok((chosen.name.clone(), address))
}
