//! A primary that is cut off with a client on its side: it must stop accepting writes before another begins to.

use super::World;
use crate::support::{
    load::{Figures, IN_FLIGHT, Load, Log, TIMEOUT_READ, Target},
    net::{From, cut},
    process::{pid_in_pod, signal},
    resp::{PORT, Reach, Role},
    subject::Member,
    wait::until,
};
use anyhow::{Context, bail};
use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, UdpSocket},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Acknowledged writes before and after the cut.
const WRITES: usize = 1_000;
/// How long a cut must change nothing: more than twice the detection window.
const HELD: Duration = Duration::from_secs(8);
/// How long a thawed primary may accept writes: its agent looks ten times a second, and the machine is busy.
const THAWED_MAX: Duration = Duration::from_secs(1);
/// The client on the primary's side.
pub(super) const INSIDE: &str = "inside";
/// The client of everyone else.
pub(super) const OUTSIDE: &str = "outside";

/// Cut from operator and members, with a client kept.
pub async fn primary_isolated(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let address = primary.address.context("no address")?;
    let load = on_both_sides(world, &primary).await?;
    let broken = cut(&primary, &From::Everyone, &[own_address(address)?])?;
    let since = broken.since;
    load.grows_of(OUTSIDE, WRITES, SETTLED_MAX).await.context("after the cut")?;
    broken.heal()?;
    follows(world, &primary).await?;
    subject.ready().await?;
    let logs = load.finish()?;
    told(world, &logs, since).await
}

/// A client that writes to the primary, and one that writes to whoever else accepts it: before the fault nobody does, so only the
/// first has something to do.
async fn on_both_sides(world: &World, primary: &Member) -> anyhow::Result<Load> {
    let subject = &world.subject;
    let address = primary.address.context("no address")?;
    let members = subject.members().await?;
    let others: Vec<IpAddr> =
        members.iter().filter(|m| m.name != primary.name).filter_map(|m| m.address).collect();
    let targets =
        vec![(INSIDE, Target::Service(address)), (OUTSIDE, Target::Members(Arc::new(Mutex::new(others))))];
    let load = Load::on(targets, &Reach::Direct, &subject.password().await?)?;
    load.grows_of(INSIDE, WRITES, SETTLED_MAX).await?;
    Ok(load)
}

/// Agent and server stand still, as in a frozen machine, and go on together after another was promoted: how long both sides
/// accept writes is measured, since nothing in the pod can prevent it.
pub async fn pod_frozen(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let load = on_both_sides(world, &primary).await?;
    let pids = [pid_in_pod(&primary.uid, "valkey-server")?, pid_in_pod(&primary.uid, "valkeeper-agent")?];
    for pid in pids {
        signal(pid, "STOP")?;
    }
    let promoted = load.grows_of(OUTSIDE, WRITES, SETTLED_MAX).await;
    // The server first: whatever waits in its sockets is executed before its agent has looked at a clock.
    let thawed = signal(pids[0], "CONT")?;
    signal(pids[1], "CONT")?;
    promoted.context("while the pod was frozen")?;
    follows(world, &primary).await?;
    subject.ready().await?;
    let logs = load.finish()?;
    let inside = logs.iter().find(|log| log.client == INSIDE).context("no such client")?;
    let kept = subject.set(&inside.key, TIMEOUT_READ).await?;
    // What is there was acknowledged before the fault, or by the successor, to which the old primary's clients are passed on.
    let last = inside.missing(&kept).into_iter().max();
    let both = last.and_then(|last| last.checked_duration_since(thawed)).unwrap_or_default();
    if both > THAWED_MAX {
        bail!("{:.0} ms after it thawed {} still accepted writes", both.as_secs_f64() * 1000.0, primary.name);
    }
    Ok(format!("both sides writable for {:.0} ms after the thaw", both.as_secs_f64() * 1000.0))
}

/// Cut from the operator alone, then from the other members alone: whoever is left confirms it, so it goes on, and nobody
/// takes its place.
pub async fn one_side_cut(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let mut told = Vec::new();
    for side in ["operator", "members"] {
        let primary = subject.protected(SETTLED_MAX).await?;
        let others = subject.members().await?.into_iter().filter(|m| m.name != primary.name);
        let whom = match side {
            "operator" => world.operator.addresses().await?,
            _ => others.filter_map(|m| m.address).collect(),
        };
        let load = Load::start(subject).await?;
        let broken = cut(&primary, &From::These(whom), &[])?;
        let since = broken.since;
        tokio::time::sleep(HELD).await;
        let now = subject.primary().await?;
        load.flows(SETTLED_MAX).await.with_context(|| format!("cut from the {side}"))?;
        broken.heal()?;
        if now.uid != primary.uid {
            bail!("cut from the {side} alone, {} lost its place to {}", primary.name, now.name);
        }
        subject.ready().await?;
        subject.protected(SETTLED_MAX).await?;
        let figures = Figures::of(subject, &load.finish()?, &[since]).await?;
        figures.nothing_lost().with_context(|| format!("cut from the {side}"))?;
        told.push(format!("{side}: {}", figures.line()));
    }
    Ok(told.join(" | "))
}

/// The address by which members see this process.
pub fn own_address(member: IpAddr) -> anyhow::Result<IpAddr> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect((member, PORT))?;
    Ok(socket.local_addr()?.ip())
}

/// Waits until the healed member follows another.
async fn follows(world: &World, old: &Member) -> anyhow::Result<()> {
    until("the old primary to follow", SETTLED_MAX, || async {
        let roles = world.subject.roles().await?;
        let role = roles.into_iter().find(|(m, _)| m.name == old.name).map(|(_, role)| role);
        match role {
            Some(Role::Replica { of: _, link }) if link == "connected" => Ok(()),
            other => bail!("{} is {other:?}", old.name),
        }
    })
    .await
    .map(|_| ())
}

/// What both sides saw, given what is there.
async fn told(world: &World, logs: &[Log], since: Instant) -> anyhow::Result<String> {
    let mut kept = BTreeMap::new();
    for log in logs {
        kept.insert(log.client, world.subject.set(&log.key, TIMEOUT_READ).await?);
    }
    two_sides(logs, &kept, since)
}

/// How long both sides were writable, and what was acknowledged by a primary that nobody heard any more. `kept`: by client, what is there
/// now.
pub(super) fn two_sides(
    logs: &[Log],
    kept: &BTreeMap<&'static str, HashSet<u64>>,
    since: Instant,
) -> anyhow::Result<String> {
    let log = |client: &str| logs.iter().find(|log| log.client == client).context("no such client");
    let kept = |client: &str| kept.get(client).context("nobody read what the client wrote");
    let (inside, outside) = (log(INSIDE)?, log(OUTSIDE)?);
    let missing = inside.missing(kept(INSIDE)?);
    // Whatever is there was not acknowledged by the isolated one: when it is back its clients are passed on.
    let last = missing.iter().max().copied().context("nothing was acknowledged inside alone")?;
    let first = outside.first_since(since).context("nothing was acknowledged outside")?;
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    if last <= since {
        bail!("nothing was acknowledged inside after the cut: it was cut off, too");
    }
    let both = last.checked_duration_since(first).unwrap_or_default();
    if !both.is_zero() {
        bail!("both sides accepted writes for {:.1} ms", ms(both));
    }
    let lost = outside.missing(kept(OUTSIDE)?).len();
    if lost > 0 {
        bail!("{lost} writes of the side that went on are lost");
    }
    if let Some(early) = missing.iter().find(|at| **at + IN_FLIGHT < since) {
        bail!("a write {:.1} ms before the cut is lost", ms(since - *early));
    }
    Ok(format!(
        "the isolated side stopped {:.0} ms after the cut, the other began after {:.0} ms, both writable 0 ms; {} writes that \
         the isolated side acknowledged could reach nobody",
        ms(last.saturating_duration_since(since)),
        ms(first.saturating_duration_since(since)),
        missing.len()
    ))
}
