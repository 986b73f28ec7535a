//! Neighbours that do their worst, all at once, while a primary of somebody else's is killed: it fails over as ever, and the operator stays small.

use super::{World, remove_with_claims, spec};
use crate::support::{
    load::{Figures, Load, maximum, median},
    process::{kill_server, proc_text},
    subject::{Member, Subject},
};
use anyhow::{Context, bail};
use k8s_openapi::api::apps::v1::Deployment;
use kube::{Api, api::ListParams};
use serde_json::json;
use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};

/// Kills before the neighbours begin, and beside them.
const KILLS: usize = 3;
/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// A failover beside them may take this many times as long as without.
const TIMES: f64 = 2.0;
/// A failover below this is as good as any: two kills differ by as much. Milliseconds.
const USUAL_MS: f64 = 100.0;
/// What of its limit the operator may use. Percent.
const MEMORY_PERCENT: u64 = 75;
/// Half-open requests to the operator's probes, connections without a handshake to its port for news, and the same to the primary's agent.
const HALF_OPEN: [(Port, usize); 3] = [(Port::Probes, 700), (Port::News, 300), (Port::Agent, 300)];
/// Annotation of the pods of the largest resource that is taken. Bytes.
const LARGE_BYTES: usize = 60_000;
/// Whoever is sent away comes back after this. Sooner, they would take the two cores that members and clients share here.
const BACK_AFTER: Duration = Duration::from_secs(2);
/// Between two changes of the spec that never rests.
const RESTLESS_PAUSE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy)]
enum Port {
    Probes,
    News,
    Agent,
}

/// Kills alone, then beside everything that a neighbour can do.
pub async fn rough(world: &World) -> anyhow::Result<String> {
    let usual = killed(world).await?;
    usual.nothing_lost()?;
    let large = Subject { name: "rough-large".to_owned(), ..world.subject.clone() };
    let restless = Subject { name: "rough-restless".to_owned(), ..world.subject.clone() };
    let stop = Arc::new(AtomicBool::new(false));
    let beside = beside(world, (&large, &restless), &stop).await;
    stop.store(true, Ordering::Relaxed);
    for subject in [&large, &restless] {
        remove_with_claims(subject).await?;
    }
    let (beside, told) = beside?;
    let (found, most) = (median(&beside.roles_ms), TIMES * median(&usual.roles_ms).max(USUAL_MS));
    if found > most {
        bail!("{found:.0} ms beside the neighbours, and {most:.0} ms are twice the usual: {}", usual.line());
    }
    // Replicas that share two cores with all of this read late, and what they have not read goes with their primary's connection: that much is
    // replication's, and told.
    Ok(format!(
        "{:.0} ms median alone, {found:.0} ms beside them ({:.0} ms maximum); {told}; {}",
        median(&usual.roles_ms),
        maximum(&beside.roles_ms),
        beside.loss
    ))
}

async fn killed(world: &World) -> anyhow::Result<Figures> {
    let subject = &world.subject;
    let load = Load::start(subject).await?;
    let mut faults = Vec::new();
    for _ in 0..KILLS {
        let primary = subject.protected(SETTLED_MAX).await?;
        load.flows(Duration::from_secs(10)).await?;
        faults.push(kill_server(world.place, &subject.namespace, &primary)?);
        load.flows(Duration::from_secs(30)).await?;
    }
    subject.protected(SETTLED_MAX).await?;
    Figures::of(subject, &load.finish()?, &faults).await
}

async fn beside(
    world: &World,
    (large, restless): (&Subject, &Subject),
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<(Figures, String)> {
    // As many shards as there may be, each with the largest template, and no node that takes them.
    large
        .apply(&json!({
            "topology": "Cluster", "shards": 16, "replicas": 0, "profile": "Cache",
            "podAnnotations": { "example.org/notes": "x".repeat(LARGE_BYTES) },
            "scheduling": { "nodeSelector": { "disk": "none" } },
        }))
        .await?;
    let mut neighbours = JoinSet::new();
    let opened = Arc::new(AtomicUsize::new(0));
    let primary = world.subject.primary().await?;
    for (port, count) in HALF_OPEN {
        let to = address(world, port, &primary).await?;
        for _ in 0..count {
            neighbours.spawn(half_open(to, Arc::clone(&opened), Arc::clone(stop)));
        }
    }
    let changes = Arc::new(AtomicUsize::new(0));
    neighbours.spawn(never_rests(restless.clone(), Arc::clone(&changes), Arc::clone(stop)));
    let begun = Instant::now();
    let figures = killed(world).await?;
    let took = begun.elapsed().as_secs_f64();
    let (mib, percent) = memory(world).await?;
    if percent > MEMORY_PERCENT {
        bail!("the operator has {mib} MiB, {percent} % of its limit");
    }
    stop.store(true, Ordering::Relaxed);
    neighbours.shutdown().await;
    let (opened, changes) = (opened.load(Ordering::Relaxed), changes.load(Ordering::Relaxed));
    if opened < HALF_OPEN.iter().map(|(_, count)| count).sum() || changes == 0 {
        bail!("the neighbours were tame: {opened} connections, {changes} changes");
    }
    Ok((
        figures,
        format!(
            "{opened} half-open connections, {changes} changes of a spec in {took:.0} s, 16 shards of {} kB; operator {mib} MiB, {percent} % of its limit",
            LARGE_BYTES / 1_000
        ),
    ))
}

async fn address(world: &World, port: Port, primary: &Member) -> anyhow::Result<SocketAddr> {
    let operator: IpAddr =
        world.operator.addresses().await?.into_iter().next().context("the operator has no address")?;
    Ok(match port {
        Port::Probes => SocketAddr::new(operator, 8080),
        Port::News => SocketAddr::new(operator, 8443),
        Port::Agent => SocketAddr::new(primary.address.context("the primary has no address")?, 7443),
    })
}

/// Begins a request and never ends it, again and again: whoever is sent away comes back.
async fn half_open(to: SocketAddr, opened: Arc<AtomicUsize>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        if let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_secs(1), TcpStream::connect(to)).await
        {
            opened.fetch_add(1, Ordering::Relaxed);
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nX: ").await;
            let mut gone = [0];
            let read = tokio::io::AsyncReadExt::read(&mut stream, &mut gone);
            let _ = tokio::time::timeout(Duration::from_secs(5), read).await;
        }
        tokio::time::sleep(BACK_AFTER).await;
    }
}

/// Wants something else all the time.
async fn never_rests(subject: Subject, changes: Arc<AtomicUsize>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let number = changes.load(Ordering::Relaxed);
        let mut wanted = spec();
        wanted["replicas"] = json!(0);
        wanted["scheduling"] = json!({ "nodeSelector": { "disk": "none" } });
        wanted["failover"] = json!({ "detectionWindowMs": 3_000 + number % 2 });
        if subject.apply(&wanted).await.is_ok() {
            changes.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(RESTLESS_PAUSE).await;
    }
}

/// The operator's memory, in MiB and as a share of its limit.
async fn memory(world: &World) -> anyhow::Result<(u64, u64)> {
    let status = proc_text(world.operator.pid().await?, "status");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    let kib: u64 = kib.context("no VmHWM")?.trim().parse()?;
    let deployments: Api<Deployment> =
        Api::namespaced(world.client.clone(), crate::support::operator::NAMESPACE);
    let all = deployments.list(&ListParams::default()).await?.items;
    let limit = all.into_iter().find_map(|deployment| {
        let containers = deployment.spec?.template.spec?.containers;
        let limits = containers.into_iter().find_map(|container| container.resources?.limits)?;
        limits.get("memory").cloned()
    });
    let limit = limit.context("the operator has no memory limit")?.0;
    let mib: u64 = limit.strip_suffix("Mi").with_context(|| limit.clone())?.parse()?;
    Ok((kib / 1024, kib * 100 / (mib * 1024)))
}
