//! Acknowledged writes lost when a primary's process is killed and its container is back at once: the same StatefulSet
//! with plain valkey-server in it, and with Valkeeper. Twenty rounds of each, with persistence off, with snapshots and with the
//! append-only file. Prints one table and asserts nothing. Started by `make bench-loss`.

#[path = "../tests/e2e/support/mod.rs"]
mod support;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    net::IpAddr,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};
use support::{
    Place,
    load::{Figures, Load, TIMEOUT_READ, Target, maximum, median},
    nodes::Nodes,
    operator::Operator,
    process::kill_server,
    resp::{Connection, Reach, Role},
    stock::{Persistence, Shape, Stock},
    subject::{Member, Subject, numbers},
};

/// Rounds of each, where the command line says nothing.
const ROUNDS: usize = 20;
/// Acknowledged writes before and after the moment of the last snapshot: two seconds each.
const WRITES: usize = 2_000;
/// Acknowledged writes after the fault: what serves then must stay.
const WRITES_AFTER: usize = 200;
/// Bound on every wait.
const PATIENCE: Duration = Duration::from_secs(180);
/// Namespace of what is measured.
const NAMESPACE: &str = "valkeeper-bench-loss";
/// What the servers write, in the order of the table.
const ALL: [Persistence; 3] = [Persistence::Off, Persistence::Rdb, Persistence::Aof];

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run().await)
}

/// What the command line asks for.
struct Asked {
    rounds: usize,
    without: bool,
    with: bool,
    persistence: Vec<Persistence>,
}

impl Asked {
    fn read(mut words: impl Iterator<Item = String>) -> anyhow::Result<Asked> {
        let mut asked = Asked { rounds: ROUNDS, without: true, with: true, persistence: ALL.to_vec() };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--no-agent" => asked.with = false,
                "--only-agent" => asked.without = false,
                "--rounds" => asked.rounds = words.next().context("--rounds NUMBER")?.parse()?,
                "--persistence" => {
                    let name = words.next().context("--persistence off|rdb|aof")?;
                    asked.persistence.retain(|p| p.name() == name);
                }
                // Cargo's own.
                "--bench" => {}
                other => bail!(
                    "{other}: expected --no-agent, --only-agent, --rounds NUMBER or --persistence off|rdb|aof"
                ),
            }
        }
        if asked.persistence.is_empty() || !(asked.with || asked.without) {
            bail!("nothing to measure");
        }
        Ok(asked)
    }
}

async fn run() -> anyhow::Result<()> {
    let place = Place::of_environment()?;
    if place == Place::Existing {
        bail!("the benchmark kills processes of the local cluster's nodes: it needs the local cluster");
    }
    let asked = Asked::read(std::env::args().skip(1))?;
    let client = support::client().await?;
    if asked.with {
        Operator::install(&client, place).await?;
    }
    support::restricted_namespace(&client, NAMESPACE).await?;
    println!(
        "SIGKILL of the primary's process under load, {} rounds of each; the container, or the server in it, is started \
         again at once",
        asked.rounds
    );
    println!(
        "{:<12} {:<22} {:>26} {:>9} {:>9} {:>12} {:>12}",
        "persistence", "", "acknowledged writes lost", "in flight", "rounds", "outage ms", "maximum ms"
    );
    for persistence in &asked.persistence {
        if asked.without {
            let name = format!("stock-{}", persistence.name());
            let namespace = NAMESPACE.to_owned();
            let stock = Stock {
                client: client.clone(),
                namespace,
                name,
                persistence: *persistence,
                shape: Shape::Followers,
            };
            let what = format!("StatefulSet, {}", persistence.name());
            stock.apply().await.context(what.clone())?;
            let side = Side::Stock(stock);
            measure(&side, *persistence, asked.rounds).await.context(what)?;
            side.delete().await?;
        }
        if asked.with {
            let (namespace, name) = (NAMESPACE.to_owned(), format!("ours-{}", persistence.name()));
            let subject = Subject { client: client.clone(), namespace, name, reach: Reach::Direct, place };
            let what = format!("Valkeeper, {}", persistence.name());
            subject.apply(&spec(*persistence)).await.context(what.clone())?;
            subject.ready().await.context(what.clone())?;
            let side = Side::Ours(subject);
            measure(&side, *persistence, asked.rounds).await.context(what)?;
            side.delete().await?;
        }
    }
    support::delete_namespace(&client, NAMESPACE).await
}

/// The ValkeyCluster that writes the same files.
fn spec(persistence: Persistence) -> Value {
    match persistence {
        Persistence::Off => json!({ "topology": "Replication", "replicas": 2, "profile": "Cache" }),
        Persistence::Rdb => json!({
            "topology": "Replication", "replicas": 2, "profile": "Durable",
            "persistence": { "size": "1Gi", "mode": "Rdb" },
        }),
        Persistence::Aof => json!({
            "topology": "Replication", "replicas": 2, "profile": "Durable", "persistence": { "size": "1Gi" },
        }),
    }
}

/// What is measured.
enum Side {
    Stock(Stock),
    Ours(Subject),
}

impl Side {
    fn name(&self) -> &'static str {
        match self {
            Side::Stock(_) => "plain StatefulSet",
            Side::Ours(_) => "Valkeeper",
        }
    }

    /// The primary, with replicas in sync, and every member.
    async fn prepared(&self) -> anyhow::Result<(Member, Vec<Member>)> {
        match self {
            Side::Stock(stock) => {
                let members = stock.renew().await?;
                Ok((members.first().context("no pods")?.clone(), members))
            }
            Side::Ours(subject) => {
                subject.ready().await?;
                Ok((subject.protected(PATIENCE).await?, subject.members().await?))
            }
        }
    }

    async fn delete(self) -> anyhow::Result<()> {
        match self {
            Side::Stock(stock) => stock.delete().await,
            Side::Ours(subject) => subject.delete().await,
        }
    }
}

/// All rounds of one side, and its line of the table.
async fn measure(side: &Side, persistence: Persistence, rounds: usize) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for number in 1..=rounds {
        all.push(round(side, persistence).await.with_context(|| format!("round {number}"))?);
    }
    let total = |of: fn(&Figures) -> usize| all.iter().map(of).sum::<usize>();
    let outages: Vec<f64> = all.iter().flat_map(|figures| figures.roles_ms.clone()).collect();
    let lost = total(|f| f.loss.lost);
    println!(
        "{:<12} {:<22} {:>26} {:>9} {:>9} {:>12.0} {:>12.0}",
        persistence.name(),
        side.name(),
        format!("{lost} of {}", total(|f| f.loss.acknowledged)),
        total(|f| f.loss.in_flight),
        format!("{} of {rounds}", all.iter().filter(|f| f.loss.lost > 0).count()),
        median(&outages),
        maximum(&outages),
    );
    Ok(())
}

/// Load, a snapshot where there are any, load, the fault, load; then everything acknowledged is looked for.
async fn round(side: &Side, persistence: Persistence) -> anyhow::Result<Figures> {
    let (primary, members) = side.prepared().await?;
    let addresses: Vec<IpAddr> = members.iter().filter_map(|m| m.address).collect();
    let target = Target::Members(Arc::new(Mutex::new(addresses.clone())));
    let load = Load::on(vec![("roles", target)], &Reach::Direct, &primary.password)?;
    load.grows_by(WRITES, PATIENCE).await?;
    if persistence == Persistence::Rdb {
        // Stands for the one that a timer would have made at a random moment of the last minute.
        let (password, addresses) = (primary.password.clone(), primary.address.into_iter().collect());
        Nodes { reach: Reach::Direct, password, addresses }.snapshot().await?;
    }
    load.grows_by(WRITES, PATIENCE).await?;
    let fault = kill_server(Place::Local, NAMESPACE, &primary)?;
    load.flows(PATIENCE).await?;
    load.grows_by(WRITES_AFTER, PATIENCE).await?;
    let mut figures = Figures::default();
    for log in load.finish()? {
        let (addresses, password, key) = (addresses.clone(), primary.password.clone(), log.key.clone());
        let read = move || -> anyhow::Result<_> {
            let connection = only_primary(&addresses, &password)?;
            Ok(numbers(connection, &key)?)
        };
        figures.add(&log, &tokio::task::spawn_blocking(read).await??, &[fault])?;
    }
    Ok(figures)
}

/// A connection to the one server that says it is the primary.
fn only_primary(addresses: &[IpAddr], password: &str) -> anyhow::Result<Connection> {
    let primary = |address: &IpAddr| {
        let mut connection = Connection::open(&Reach::Direct, *address, password, TIMEOUT_READ).ok()?;
        (connection.role().ok()? == Role::Primary).then_some(connection)
    };
    let mut found: Vec<Connection> = addresses.iter().filter_map(primary).collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => bail!("no server is primary"),
        (Some(_), false) => bail!("{} servers are primary", found.len() + 1),
    }
}
