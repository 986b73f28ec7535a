//! Client libraries in their default settings, all at once through the same faults: how long each was not served, what its application
//! was told, who was stuck at the end, and what is lost. Prints a table, keeps it and its figures in target/bench-clients, asserts
//! nothing. Started by `make bench-clients`.

#[path = "../../tests/e2e/support/mod.rs"]
mod support;

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use kube::Client;
use serde_json::{Value, json};
use std::{fmt::Write as _, fs, process::ExitCode, time::Duration};
use support::{
    Place,
    clients::{Clients, Library, Seen, Topology, results},
    faults::{Fault, Ground},
    operator::Operator,
    resp::Reach,
    subject::Subject,
};

/// Namespace of everything that is made.
const NAMESPACE: &str = "valkeeper-bench-clients";
/// Clients go on for so long after all is well again: longer than the longest timeout that one of them has by default.
const AFTER: Duration = Duration::from_secs(12);

/// What is measured.
#[derive(Parser)]
struct Options {
    /// kill, deleted, drained, switchover, restart, image, all-deleted.
    #[arg(long, value_delimiter = ',', default_values_t = Fault::ALL.map(|fault| fault.name().to_owned()))]
    faults: Vec<String>,
    /// Replication, Cluster.
    #[arg(long, value_delimiter = ',', default_values_t = ["Replication".to_owned(), "Cluster".to_owned()])]
    topologies: Vec<String>,
    /// Names of packages.
    #[arg(long, value_delimiter = ',', default_values_t = Library::ALL.map(|library| library.name().to_owned()))]
    libraries: Vec<String>,
    /// write, multi, subscriber, blpop, pool (a thousand connections of each library).
    #[arg(long, value_delimiter = ',', default_values_t = ["write", "multi", "subscriber", "blpop"].map(str::to_owned))]
    jobs: Vec<String>,
    /// How often each.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Cargo's own.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One fault that was met.
struct Row {
    topology: Topology,
    fault: Fault,
    seen: Vec<Seen>,
}

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run(&Options::parse()).await)
}

/// Those of some things whose names were given.
fn chosen<T: Copy>(all: &[T], name: impl Fn(T) -> &'static str, words: &[String]) -> anyhow::Result<Vec<T>> {
    let find = |word: &String| {
        let found = all.iter().copied().find(|one| name(*one) == word);
        found.ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|one| name(*one)).collect();
            anyhow!("{word}: expected {}", names.join(", "))
        })
    };
    words.iter().map(find).collect()
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let place = Place::of_environment()?;
    if place == Place::Existing {
        bail!("the benchmark kills processes of the local cluster's nodes: it needs the local cluster");
    }
    let faults = chosen(&Fault::ALL, Fault::name, &options.faults)?;
    let topologies =
        chosen(&[Topology::Replication, Topology::Cluster], Topology::name, &options.topologies)?;
    let libraries = chosen(&Library::ALL, Library::name, &options.libraries)?;
    let client = support::client().await?;
    Operator::install(&client, place).await?;
    // What a run that was ended has left, if there was one.
    let _ = support::delete_namespace(&client, NAMESPACE).await;
    support::restricted_namespace(&client, NAMESPACE).await?;
    let mut rows = Vec::new();
    for topology in topologies {
        let measured = measure(&client, topology, &faults, &libraries, options, &mut rows).await;
        measured.with_context(|| topology.name())?;
    }
    support::delete_namespace(&client, NAMESPACE).await?;
    Ok(())
}

async fn measure(
    client: &Client,
    topology: Topology,
    faults: &[Fault],
    libraries: &[Library],
    options: &Options,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let name = topology.name().to_lowercase();
    let namespace = NAMESPACE.to_owned();
    let subject =
        Subject { client: client.clone(), namespace, name, reach: Reach::Direct, place: Place::Local };
    let (spec, replicas) = spec(topology);
    let ground = Ground { subject: &subject, topology, spec, replicas };
    for round in 1..=options.rounds {
        for fault in faults {
            // A fault may have left another image, or, if it could not be met, anything.
            subject.apply(&ground.spec).await?;
            let row = one(&ground, *fault, libraries, &options.jobs).await;
            let seen = match row.with_context(|| format!("{} {}", topology.name(), fault.name())) {
                Ok(seen) => seen,
                Err(error) => {
                    println!("not measured: {error:#}");
                    continue;
                }
            };
            let file = results()?.join(format!("{}-{}-{round}.json", topology.name(), fault.name()));
            fs::write(file, serde_json::to_vec_pretty(&seen)?)?;
            for one in &seen {
                println!("{} {}: {one}", topology.name(), fault.name());
            }
            rows.push(Row { topology, fault: *fault, seen });
            // After each, so that a run that is ended leaves what it has.
            fs::write(results()?.join("table.md"), table(rows, libraries))?;
        }
    }
    subject.remove().await?;
    println!();
    println!("{}", table(rows, libraries));
    Ok(())
}

async fn one(
    ground: &Ground<'_>,
    fault: Fault,
    libraries: &[Library],
    jobs: &[String],
) -> anyhow::Result<Vec<Seen>> {
    ground.settled().await?;
    let clients = Clients::start(ground.subject, ground.topology, libraries, jobs).await?;
    let begun = ground.meet(fault).await?;
    tokio::time::sleep(AFTER).await;
    let sudden: &[u64] = if fault.is_sudden() { &[begun] } else { &[] };
    clients.finish(begun, sudden).await
}

/// The spec, and how many replicas a shard has.
fn spec(topology: Topology) -> (Value, usize) {
    let mut spec = json!({
        "topology": topology.name(),
        "profile": "Durable", "persistence": { "size": "1Gi" },
        "resources": { "requests": { "cpu": "50m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
    });
    match topology {
        Topology::Replication => {
            spec["replicas"] = json!(2);
            (spec, 2)
        }
        Topology::Cluster => {
            spec["shards"] = json!(3);
            spec["replicas"] = json!(1);
            (spec, 1)
        }
    }
}

/// Writers of each library, for each fault.
fn table(rows: &[Row], libraries: &[Library]) -> String {
    let mut text = "Longest time without an acknowledged write of one task (stuck tasks; errors that reached the application; \
                    acknowledged numbers lost)\n\n| fault |"
        .to_owned();
    for library in libraries {
        let _ = write!(text, " {} |", library.name());
    }
    let _ = write!(text, "\n|---|{}\n", "---|".repeat(libraries.len()));
    for Row { topology, fault, seen } in rows {
        let _ = write!(text, "| {} {} |", topology.name(), fault.name());
        for library in libraries {
            let found = seen.iter().find(|one| one.library == library.name() && one.job == "write");
            let _ = write!(text, " {} |", found.map(cell).unwrap_or_default());
        }
        text.push('\n');
    }
    text
}

fn cell(seen: &Seen) -> String {
    let mut text = format!("{} ms", seen.gap_ms);
    if seen.stuck > 0 {
        let _ = write!(text, ", **{} of {} stuck**", seen.stuck, seen.tasks);
    }
    for (kind, count) in &seen.errors {
        let _ = write!(text, ", {kind} {count}");
    }
    if seen.lost > 0 {
        let _ = write!(text, ", **{} lost**", seen.lost);
    }
    text
}
