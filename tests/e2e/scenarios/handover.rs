//! Ends that are announced: the primary is asked to stop, and another takes over before it does.

use super::World;
use crate::support::{
    faults::cordon,
    journal::Journal,
    load::{Figures, Load},
    resp::Role,
    wait::until,
};
use anyhow::{Context, bail};
use std::time::{Duration, Instant};

/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Until a primary has left a cordoned node. Its handover begins at once: this is for a busy machine.
const CORDONED_MAX: Duration = Duration::from_secs(20);
/// How long the operator is away while pods come and go, in seconds, unless VALKEEPER_E2E_AWAY_S says otherwise: more than
/// every window and timeout of the members, and few minutes of a test run.
const AWAY_S: u64 = 60;

/// The primary's pod is deleted, as by an eviction: the primary is handed over before the server stops.
pub async fn pod_deleted(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let figures = deleted(world, std::slice::from_ref(&primary.name), Operator::Stays).await?;
    let now = subject.primary().await?;
    Ok(format!("{} -> {}; {figures}", primary.name, now.name))
}

/// Every member on the primary's node is told to stop at once, as by a drain.
pub async fn node_drained(world: &World) -> anyhow::Result<String> {
    drained(world, Operator::Stays).await
}

/// The same of a node that the operator is on, too: its successor begins while the primary waits for its handover.
pub async fn node_drained_with_operator(world: &World) -> anyhow::Result<String> {
    drained(world, Operator::GoesFirst).await
}

/// What becomes of the operator meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operator {
    Stays,
    GoesFirst,
}

async fn drained(world: &World, operator: Operator) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let nodes = subject.nodes().await?;
    let node = nodes.get(&primary.name).context("the primary has no node")?;
    let names: Vec<String> = nodes.iter().filter(|(_, n)| *n == node).map(|(name, _)| name.clone()).collect();
    if names.len() == nodes.len() {
        bail!("every member is on {node}: nobody is left to take over");
    }
    let figures = deleted(world, &names, operator).await?;
    let now = subject.primary().await?;
    Ok(format!(
        "{} of {} members on {node}, {} -> {}; {figures}",
        names.len(),
        nodes.len(),
        primary.name,
        now.name
    ))
}

/// The primary's node is cordoned and nothing else happens: the primary leaves it at once, for a member on another node, and does not
/// come back by itself when the node is free again.
pub async fn node_cordoned(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let nodes = subject.nodes().await?;
    let node = nodes.get(&primary.name).context("the primary has no node")?;
    let load = Load::start(subject).await?;
    let fault = Instant::now();
    cordon(&subject.client, node, true).await?;
    let left = elsewhere(world, node).await;
    cordon(&subject.client, node, false).await?;
    let (successor, took) = left?;
    load.flows(SETTLED_MAX).await?;
    subject.ready().await?;
    if subject.primary().await?.name != successor {
        bail!("{successor} took over, and is not the primary any more");
    }
    let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(format!("{} -> {successor} after {} ms; {}", primary.name, took.as_millis(), figures.line()))
}

/// Waits until the primary is on another node; who it is, and how long that took.
async fn elsewhere(world: &World, node: &str) -> anyhow::Result<(String, Duration)> {
    let subject = &world.subject;
    until("the primary to leave its node", CORDONED_MAX, || async {
        let now = subject.primary().await?.name;
        let nodes = subject.nodes().await?;
        match nodes.get(&now) {
            Some(at) if at != node => Ok(now),
            at => bail!("{now} is at {at:?}"),
        }
    })
    .await
}

/// Deletes pods at once under load; what clients saw.
async fn deleted(world: &World, names: &[String], operator: Operator) -> anyhow::Result<String> {
    let subject = &world.subject;
    let old = subject.members().await?;
    let journal = Journal::of(subject).await?.lines("hand over")?.len();
    let load = Load::start(subject).await?;
    let fault = Instant::now();
    match operator {
        Operator::Stays => {}
        Operator::GoesFirst => world.operator.delete_pod().await?,
    }
    for name in names {
        subject.delete_pod(name).await?;
    }
    load.flows(SETTLED_MAX).await?;
    until("the deleted pods to be replaced", SETTLED_MAX, || async {
        let now = subject.members().await?;
        let left =
            old.iter().filter(|m| names.contains(&m.name)).find(|m| now.iter().any(|n| n.uid == m.uid));
        if let Some(left) = left {
            bail!("{} is there still", left.name);
        }
        if now.len() == old.len() { Ok(()) } else { bail!("{} pods", now.len()) }
    })
    .await?;
    subject.ready().await?;
    let handovers = Journal::of(subject).await?.lines("hand over")?.len();
    if handovers <= journal {
        bail!("the primary was told to stop and nothing was handed over");
    }
    let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(figures.line())
}

/// With the operator at zero, members are restarted one after the other and then all at once: who is proven to have the
/// most goes on as primary, the others follow, and nobody helps.
pub async fn operator_away(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.protected(SETTLED_MAX).await?;
    let load = Load::start(subject).await?;
    world.operator.scale(0).await?;
    let begun = Instant::now();
    let story = while_away(world).await;
    let alone = begun.elapsed();
    world.operator.scale(1).await?;
    let (faults, told) = story?;
    subject.ready().await?;
    subject.protected(SETTLED_MAX).await?;
    // Its client follows the members; the write Service's is served again only when the operator has moved it.
    load.flows(SETTLED_MAX).await?;
    let figures = Figures::of(subject, &load.finish()?, &faults).await?;
    figures.nothing_lost()?;
    Ok(format!("{told}; alone for {:.0} s; {}", alone.as_secs_f64(), figures.line()))
}

async fn while_away(world: &World) -> anyhow::Result<(Vec<Instant>, String)> {
    let subject = &world.subject;
    let away = match std::env::var("VALKEEPER_E2E_AWAY_S") {
        Ok(text) => Duration::from_secs(text.parse().context("VALKEEPER_E2E_AWAY_S")?),
        Err(_) => Duration::from_secs(AWAY_S),
    };
    let begun = Instant::now();
    let (mut faults, mut seconds) = (Vec::new(), Vec::new());
    // Replicas first, the primary last, then everyone; again and again until the time is over, at least once.
    loop {
        let primary = subject.primary().await?.name;
        let mut names: Vec<String> = subject.members().await?.into_iter().map(|m| m.name).collect();
        names.sort_by_key(|name| *name == primary);
        for name in &names {
            faults.push(Instant::now());
            let took = restarted(world, std::slice::from_ref(name)).await;
            seconds.push(took.with_context(|| format!("{name} deleted"))?.as_secs_f64());
        }
        faults.push(Instant::now());
        let took = restarted(world, &names).await.context("all pods deleted at once")?;
        seconds.push(took.as_secs_f64());
        if begun.elapsed() >= away {
            let all = seconds.last().copied().unwrap_or_default();
            let longest = seconds.iter().copied().fold(0.0, f64::max);
            let told = format!(
                "{} restarts without an operator, the longest {longest:.1} s, all pods at once {all:.1} s",
                seconds.len()
            );
            return Ok((faults, told));
        }
    }
}

/// Deletes pods and waits until their successors have found their place by themselves; how long that took.
async fn restarted(world: &World, names: &[String]) -> anyhow::Result<Duration> {
    let subject = &world.subject;
    let old = subject.members().await?;
    for name in names {
        subject.delete_pod(name).await?;
    }
    let settled = until("one primary that everyone follows", SETTLED_MAX, || async {
        let roles = subject.roles().await?;
        if let Some((left, _)) =
            roles.iter().find(|(m, _)| names.contains(&m.name) && old.iter().any(|o| o.uid == m.uid))
        {
            bail!("{} is the old one still", left.name);
        }
        let primaries: Vec<_> = roles.iter().filter(|(_, role)| *role == Role::Primary).collect();
        let [(primary, _)] = primaries.as_slice() else { bail!("{} primaries", primaries.len()) };
        let address = primary.address.map(|a| a.to_string()).unwrap_or_default();
        let follows = Role::Replica { of: address, link: "connected".to_owned() };
        match roles.iter().filter(|(_, role)| *role == follows).count() {
            count if count + 1 == old.len() => Ok(()),
            count => bail!("{count} follow {}", primary.name),
        }
    });
    Ok(settled.await?.1)
}
