//! Client libraries of other people in their default settings, through what happens every day: whatever it is, their next operations
//! succeed, nothing that they were told is gone, and none is told that its password is wrong.

use super::{World, cluster, spec};
use crate::support::{
    clients::{Clients, Library, Topology},
    faults::{Fault, Ground},
};
use anyhow::Context;
use std::time::Duration;

/// One that keeps a connection whatever it answers, and has no timeouts; and one with a pool that tries again.
const LIBRARIES: [Library; 2] = [Library::ValkeyPy, Library::GoRedis];
/// What they do. A thousand connections are left to the benchmark.
const JOBS: [&str; 4] = ["write", "multi", "subscriber", "blpop"];
/// After all is well again: who is served by then goes on, and who is not is stuck. Longer than the slowest retry that these libraries
/// have by default, and far shorter than their timeouts.
const AFTER: Duration = Duration::from_secs(3);

/// Through the write Service.
pub async fn through_the_service(world: &World) -> anyhow::Result<String> {
    let ground =
        Ground { subject: &world.subject, topology: Topology::Replication, spec: spec(), replicas: 2 };
    through(&ground, &[Fault::Kill, Fault::Switchover, Fault::Deleted]).await
}

/// With the libraries' own clients of a Valkey Cluster.
pub async fn of_a_cluster(world: &World) -> anyhow::Result<String> {
    let replicas = usize::from(cluster::REPLICAS);
    let spec = cluster::ledger();
    let ground = Ground { subject: &world.ledger, topology: Topology::Cluster, spec, replicas };
    through(&ground, &[Fault::Kill, Fault::Deleted]).await
}

/// Each fault has clients of its own, so that none is blamed for what another did.
async fn through(ground: &Ground<'_>, faults: &[Fault]) -> anyhow::Result<String> {
    let mut told = Vec::new();
    let mut wrong = Vec::new();
    for fault in faults {
        let name = fault.name();
        ground.settled().await?;
        let jobs = JOBS.map(str::to_owned);
        let clients = Clients::start(ground.subject, ground.topology, &LIBRARIES, &jobs).await?;
        let begun = ground.meet(*fault).await.context(name)?.begun_ms;
        tokio::time::sleep(AFTER).await;
        let sudden: &[u64] = if fault.is_sudden() { &[begun] } else { &[] };
        let seen = clients.finish(begun, sudden).await.context(name)?;
        let writes = seen.iter().filter(|seen| seen.job == "write");
        let gaps: Vec<String> = writes.map(|seen| format!("{} {} ms", seen.library, seen.gap_ms)).collect();
        told.push(format!("{name}: {}", gaps.join(", ")));
        let unwell = seen.iter().filter_map(|seen| seen.is_well().err());
        wrong.extend(unwell.map(|error| format!("{name}: {error}")));
    }
    anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(told.join("; "))
}
