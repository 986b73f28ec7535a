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
    faults::{Fault, Ground, Met},
    operator::Operator,
    resp::Reach,
    subject::Subject,
};

/// Namespace of everything that is made.
const NAMESPACE: &str = "valkeeper-bench-clients";
/// Clients go on for so long after all is well again: longer than the longest timeout that one of them has by default.
const AFTER: Duration = Duration::from_secs(12);
/// The same in a Valkey Cluster, where they may know servers by name: the Java machine keeps an address for 30 s.
const AFTER_BY_NAME: Duration = Duration::from_secs(33);

/// What is measured.
#[derive(Parser)]
struct Options {
    /// kill, deleted, drained, switchover, restart, image, all-deleted.
    #[arg(long, value_delimiter = ',', default_values_t = Fault::ALL.map(|fault| fault.name().to_owned()))]
    faults: Vec<String>,
    /// Replication, Cluster.
    #[arg(long, value_delimiter = ',', default_values_t = ["Replication".to_owned(), "Cluster".to_owned()])]
    topologies: Vec<String>,
    /// What nodes of a Valkey Cluster name each other by to clients: Address, Hostname.
    #[arg(long, value_delimiter = ',', default_values_t = ["Hostname".to_owned()])]
    announce: Vec<String>,
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

/// One kind of cluster.
struct Kind {
    topology: Topology,
    /// What its nodes name each other by to clients.
    announce: Option<String>,
}

impl Kind {
    fn name(&self) -> String {
        match &self.announce {
            None => self.topology.name().to_owned(),
            Some(announce) => format!("{}-{announce}", self.topology.name()),
        }
    }
}

/// One fault that was met.
struct Row {
    kind: String,
    fault: Fault,
    /// From its beginning until all was well again by everyone's word, in milliseconds.
    well_after_ms: u64,
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
    for kind in kinds(&topologies, &options.announce) {
        let measured = measure(&client, &kind, &faults, &libraries, options, &mut rows).await;
        measured.with_context(|| kind.name())?;
    }
    support::delete_namespace(&client, NAMESPACE).await?;
    Ok(())
}

fn kinds(topologies: &[Topology], announce: &[String]) -> Vec<Kind> {
    let of = |topology: &Topology| match topology {
        Topology::Replication => vec![Kind { topology: *topology, announce: None }],
        Topology::Cluster => {
            let named =
                announce.iter().map(|name| Kind { topology: *topology, announce: Some(name.clone()) });
            named.collect()
        }
    };
    topologies.iter().flat_map(of).collect()
}

async fn measure(
    client: &Client,
    kind: &Kind,
    faults: &[Fault],
    libraries: &[Library],
    options: &Options,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let (name, topology) = (kind.name().to_lowercase(), kind.topology);
    let namespace = NAMESPACE.to_owned();
    let subject =
        Subject { client: client.clone(), namespace, name, reach: Reach::Direct, place: Place::Local };
    let (spec, replicas) = spec(kind);
    let ground = Ground { subject: &subject, topology, spec, replicas };
    for round in 1..=options.rounds {
        for fault in faults {
            // A fault may have left another image, or, if it could not be met, anything.
            subject.apply(&ground.spec).await?;
            let row = one(&ground, *fault, libraries, &options.jobs).await;
            let (well_after_ms, seen) = match row.with_context(|| format!("{} {}", kind.name(), fault.name()))
            {
                Ok(seen) => seen,
                Err(error) => {
                    println!("not measured: {error:#}");
                    continue;
                }
            };
            let file = results()?.join(format!("{}-{}-{round}.json", kind.name(), fault.name()));
            fs::write(file, serde_json::to_vec_pretty(&seen)?)?;
            for one in &seen {
                println!("{} {}: {one}", kind.name(), fault.name());
            }
            rows.push(Row { kind: kind.name(), fault: *fault, well_after_ms, seen });
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
) -> anyhow::Result<(u64, Vec<Seen>)> {
    ground.settled().await?;
    let clients = Clients::start(ground.subject, ground.topology, libraries, jobs).await?;
    let Met { begun_ms, well_ms } = ground.meet(fault).await?;
    let after = match ground.topology {
        Topology::Replication => AFTER,
        Topology::Cluster => AFTER_BY_NAME,
    };
    tokio::time::sleep(after).await;
    let sudden: &[u64] = if fault.is_sudden() { &[begun_ms] } else { &[] };
    let seen = clients.finish(begun_ms, sudden).await?;
    Ok((well_ms.saturating_sub(begun_ms), seen))
}

/// The spec, and how many replicas a shard has.
fn spec(kind: &Kind) -> (Value, usize) {
    let mut spec = json!({
        "topology": kind.topology.name(),
        "profile": "Durable", "persistence": { "size": "1Gi" },
        "resources": { "requests": { "cpu": "50m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
    });
    if let Some(announce) = &kind.announce {
        spec["announce"] = json!(announce);
    }
    match kind.topology {
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

/// What writers saw of each fault, library by library; then all libraries and rounds together, with what went wrong in any job.
fn table(rows: &[Row], libraries: &[Library]) -> String {
    let mut text = "Longest time without an acknowledged write of one task (stuck tasks; errors that reached the application; \
                    acknowledged numbers lost)\n\n| fault | all well after |"
        .to_owned();
    for library in libraries {
        let _ = write!(text, " {} |", library.name());
    }
    let _ = write!(text, "\n|---|---|{}\n", "---|".repeat(libraries.len()));
    for Row { kind, fault, well_after_ms, seen } in rows {
        let _ = write!(text, "| {kind} {} | {well_after_ms} ms |", fault.name());
        for library in libraries {
            let found = seen.iter().find(|one| one.library == library.name() && one.job == "write");
            let _ = write!(text, " {} |", found.map(cell).unwrap_or_default());
        }
        text.push('\n');
    }
    text + &summary(rows)
}

/// One line for each kind of cluster and fault.
fn summary(rows: &[Row]) -> String {
    let mut text = "\n| fault | runs | writers: median | worst | after all was well | not well at the end |\n|---|---|---|---|---|---|\n"
        .to_owned();
    let mut named: Vec<(&str, Fault)> = Vec::new();
    for row in rows {
        if !named.contains(&(&row.kind, row.fault)) {
            named.push((&row.kind, row.fault));
        }
    }
    for (kind, fault) in named {
        let these: Vec<&Row> = rows.iter().filter(|row| row.kind == kind && row.fault == fault).collect();
        let writers = |row: &&Row| {
            let well = row.well_after_ms;
            let gaps = row.seen.iter().filter(|seen| seen.job == "write");
            gaps.map(|seen| (seen.gap_ms, seen.gap_ms.saturating_sub(well))).collect::<Vec<_>>()
        };
        let mut gaps: Vec<(u64, u64)> = these.iter().flat_map(writers).collect();
        gaps.sort_unstable();
        let median = gaps.get(gaps.len() / 2).map_or(0, |(gap, _)| *gap);
        let worst = gaps.last().map_or(0, |(gap, _)| *gap);
        let late = gaps.iter().map(|(_, late)| *late).max().unwrap_or(0);
        let ill = these.iter().flat_map(|row| &row.seen).filter_map(|seen| seen.is_well().err());
        let ill: Vec<String> = ill.map(|error| error.to_string()).collect();
        let ill = if ill.is_empty() { "nobody".to_owned() } else { ill.join("; ") };
        let name = fault.name();
        let _ = writeln!(
            text,
            "| {kind} {name} | {} | {median} ms | {worst} ms | {late} ms | {ill} |",
            these.len()
        );
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
