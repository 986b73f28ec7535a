//! Topology Cluster beside what Valkey does by itself, on real pods of one machine in one run: a killed primary beside a failover by
//! gossip, a reshard beside the bare command and beside valkey-cli, and how long a new cluster takes. Prints tables, asserts none.
//! Started by `make bench-cluster`; words choose parts: create, kills, reshard.

mod create;
mod kills;
mod reshard;
#[path = "../../tests/e2e/support/mod.rs"]
mod support;

use anyhow::bail;
use kube::Client;
use serde_json::{Value, json};
use std::{
    ops::RangeInclusive,
    process::ExitCode,
    time::{Duration, Instant},
};
use support::{
    Place,
    operator::Operator,
    resp::Reach,
    stock::{Persistence, Shape, Stock},
    subject::Subject,
};

/// Namespace of everything that is made.
const NAMESPACE: &str = "valkeeper-bench-cluster";
/// Bound on every single wait.
const PATIENCE: Duration = Duration::from_secs(180);
/// Bound on all of it: three times what it takes.
const RUN_MAX: Duration = Duration::from_secs(1_800);
/// The parts, in their order.
const PARTS: [&str; 3] = ["create", "kills", "reshard"];

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run().await)
}

async fn run() -> anyhow::Result<()> {
    let place = Place::of_environment()?;
    if place == Place::Existing {
        bail!("the benchmark kills processes of the local cluster's nodes: it needs the local cluster");
    }
    // The flag is cargo's own.
    let mut parts: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let Some(other) = parts.iter().find(|word| !PARTS.contains(&word.as_str())) {
        bail!("{other}: expected {}", PARTS.join(", "));
    }
    if parts.is_empty() {
        parts = PARTS.map(str::to_owned).to_vec();
    }
    let begun = Instant::now();
    let client = support::client().await?;
    Operator::install(&client, place).await?;
    // What a run that was ended has left, if there was one.
    let _ = support::delete_namespace(&client, NAMESPACE).await;
    support::restricted_namespace(&client, NAMESPACE).await?;
    let measured = tokio::time::timeout(RUN_MAX, measure(&client, &parts)).await;
    support::delete_namespace(&client, NAMESPACE).await?;
    match measured {
        Ok(outcome) => outcome?,
        Err(_) => bail!("not done after {} s", RUN_MAX.as_secs()),
    }
    println!("all of it took {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

async fn measure(client: &Client, parts: &[String]) -> anyhow::Result<()> {
    let asked = |part: &str| parts.iter().any(|word| word == part);
    if asked("create") {
        create::run(client).await?;
    }
    if asked("kills") {
        kills::run(client).await?;
    }
    if asked("reshard") {
        reshard::run(client).await?;
    }
    Ok(())
}

/// A ValkeyCluster of that name, which need not be there yet.
fn subject(client: &Client, name: &str) -> Subject {
    let (namespace, name) = (NAMESPACE.to_owned(), name.to_owned());
    Subject { client: client.clone(), namespace, name, reach: Reach::Direct, place: Place::Local }
}

/// Its spec: an append-only file, as a Valkey Cluster has it unless told otherwise, and memory for a million keys.
fn spec(shards: usize, replicas: usize) -> Value {
    json!({
        "topology": "Cluster", "shards": shards, "replicas": replicas,
        "profile": "Durable", "persistence": { "size": "1Gi" },
        "resources": { "requests": { "cpu": "50m", "memory": "128Mi" }, "limits": { "memory": "1Gi" } },
    })
}

/// Plain servers that write the same files.
fn stock(client: &Client, name: &str, slots: Vec<Option<RangeInclusive<u16>>>, replicas: usize) -> Stock {
    Stock {
        client: client.clone(),
        namespace: NAMESPACE.to_owned(),
        name: name.to_owned(),
        persistence: Persistence::Aof,
        shape: Shape::Nodes(slots, replicas),
    }
}
