//! What the agent in each pod keeps from happening: a primary that comes back empty, a container restart for each crash of the
//! server, a flush that is undone.

use super::World;
use crate::support::{
    load::{Figures, Load},
    operator::page,
    process::{kill_server, pid_in_pod, signal, wipe_data},
    resp::{Reply, Role},
    subject::{Member, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use std::time::{Duration, Instant};

/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Looks at the replicas while nobody may touch them: five seconds, of which one sees a replica of an empty primary empty.
const LOOKS: u32 = 50;
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Acknowledged writes before a fault.
const WRITES: usize = 1_000;
/// Keys before a flush.
const KEYS: usize = 100;
/// Where an agent answers probes.
const PROBES_PORT: u16 = 9121;
/// Process of the agent.
const AGENT: &str = "valkeeper-agent";

/// The primary is killed and starts again without its data, at the same address, before anyone can have noticed.
pub async fn restarted_empty(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let mut told = Vec::new();
    // The server alone, then with its agent, which takes the container with it.
    for process in ["valkey-server", AGENT] {
        let primary = subject.protected(SETTLED_MAX).await?;
        let load = Load::start(subject).await?;
        load.grows_by(WRITES, SETTLED_MAX).await?;
        let fault = wipe_and_kill(&primary, process)?;
        load.flows(SETTLED_MAX).await.with_context(|| format!("after the end of {process}"))?;
        subject.ready().await?;
        subject.protected(SETTLED_MAX).await?;
        let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
        figures.nothing_lost().with_context(|| format!("after the end of {process}"))?;
        told.push(format!("{process}: {}", figures.line()));
    }
    Ok(told.join(" | "))
}

/// The same with nobody there to promote a replica: the replicas must keep what they have until somebody is.
pub async fn restarted_empty_alone(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let load = Load::start(subject).await?;
    load.grows_by(WRITES, SETTLED_MAX).await?;
    world.operator.scale(0).await?;
    let story = async {
        let fault = wipe_and_kill(&primary, "valkey-server")?;
        until("the server to be at its gate", SETTLED_MAX, || async {
            // Its port is closed: its agent says where it is.
            let said = page(primary.address.context("no address")?, PROBES_PORT, "/readyz").await?;
            if said.contains("at the boot gate") { Ok(()) } else { bail!("it says {said}") }
        })
        .await?;
        replicas_keep(subject, &primary, &load.keys()).await?;
        Ok::<Instant, anyhow::Error>(fault)
    }
    .await;
    world.operator.scale(1).await?;
    let fault = story?;
    load.flows(SETTLED_MAX).await?;
    subject.ready().await?;
    subject.protected(SETTLED_MAX).await?;
    let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(format!("replicas kept everything with the operator at zero; {}", figures.loss))
}

/// Removes a member's data under its running server, and ends a process of its pod: whatever starts next finds nothing.
fn wipe_and_kill(member: &Member, process: &str) -> anyhow::Result<Instant> {
    let pid = pid_in_pod(&member.uid, process)?;
    wipe_data(member, process == AGENT)?;
    signal(pid, "KILL")
}

async fn role_of(subject: &Subject, name: &str) -> anyhow::Result<Role> {
    let roles = subject.roles().await?;
    roles.into_iter().find(|(m, _)| m.name == name).map(|(_, role)| role).context("it does not answer")
}

/// Looks at the replicas for a while: none may lose a number that it had.
async fn replicas_keep(subject: &Subject, primary: &Member, keys: &[String]) -> anyhow::Result<()> {
    let replicas: Vec<Member> =
        subject.members().await?.into_iter().filter(|m| m.name != primary.name).collect();
    let mut had: Vec<i64> = Vec::new();
    for _ in 0..LOOKS {
        let mut has = Vec::new();
        for replica in &replicas {
            for key in keys {
                let reply = subject.call(replica, &["SCARD", key]).await?;
                let Reply::Integer(count) = reply else { bail!("SCARD on {}: {reply:?}", replica.name) };
                has.push(count);
            }
        }
        if has.iter().zip(&had).any(|(now, before)| now < before) || has.contains(&0) {
            bail!("the replicas had {had:?} of the numbers, and have {has:?}");
        }
        had = has;
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    Ok(())
}

/// What a user throws away stays away, whoever is primary afterwards.
pub async fn flushed(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    for i in 0..KEYS {
        let key = format!("tests:flushed:{i}");
        let reply = subject.call(&primary, &["SET", &key, "1"]).await?;
        if reply != Reply::Text("OK".to_owned()) {
            bail!("SET {key}: {reply:?}");
        }
    }
    let reply = subject.call(&primary, &["FLUSHALL"]).await?;
    if reply != Reply::Text("OK".to_owned()) {
        bail!("FLUSHALL: {reply:?}");
    }
    kill_server(world.place, &subject.namespace, &primary)?;
    let now = until("another primary", SETTLED_MAX, || async {
        let now = subject.primary().await?;
        if now.name == primary.name { bail!("it is {} still", now.name) } else { Ok(now) }
    })
    .await?
    .0;
    subject.ready().await?;
    // The one that was killed may be loading still: the status is of a moment ago.
    until("every member to be empty after FLUSHALL and a failover", SETTLED_MAX, || async {
        for member in subject.members().await? {
            let reply = subject.call(&member, &["DBSIZE"]).await?;
            if reply != Reply::Integer(0) {
                bail!("{} answers {reply:?} to DBSIZE", member.name);
            }
        }
        Ok(())
    })
    .await?;
    Ok(format!("{} -> {}, and all members are empty", primary.name, now.name))
}

/// The server dies alone: its agent starts another at the gate, and kubelet does not notice.
pub async fn server_killed(world: &World) -> anyhow::Result<String> {
    let (restarts, figures) = killed(world, "valkey-server").await?;
    if restarts != 0 {
        bail!("the container was restarted {restarts} times for a server that its agent can start again");
    }
    Ok(format!("no container restart; {figures}"))
}

/// The agent dies, and takes its server with it: the container is restarted, and its successor finds its way.
pub async fn agent_killed(world: &World) -> anyhow::Result<String> {
    let (restarts, figures) = killed(world, AGENT).await?;
    if restarts != 1 {
        bail!("{restarts} restarts of the container whose first process was killed");
    }
    Ok(format!("one container restart; {figures}"))
}

/// Ends a process of the primary's pod under load. Restarts of its container, and what clients saw.
async fn killed(world: &World, process: &str) -> anyhow::Result<(i32, String)> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let before = subject.restarts(&primary.name).await?;
    let load = Load::start(subject).await?;
    let fault = signal(pid_in_pod(&primary.uid, process)?, "KILL")?;
    load.flows(SETTLED_MAX).await?;
    subject.ready().await?;
    let members = subject.members().await?;
    if !members.iter().any(|m| m.uid == primary.uid) {
        bail!("the pod of {} was replaced", primary.name);
    }
    until("the killed member to follow", SETTLED_MAX, || async {
        match role_of(subject, &primary.name).await? {
            Role::Replica { of: _, link } if link == "connected" => Ok(()),
            other @ (Role::Primary | Role::Replica { .. }) => bail!("it is {other:?}"),
        }
    })
    .await?;
    let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
    figures.nothing_lost()?;
    Ok((subject.restarts(&primary.name).await? - before, figures.line()))
}
