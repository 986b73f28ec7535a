//! Ten killed primaries of three shards with a replica each: failed over by the operator, and by gossip among plain servers.

use crate::{
    NAMESPACE, PATIENCE, spec, stock, subject,
    support::{
        Place,
        load::{Figures, Load, Loss, Target, maximum, median},
        nodes::Nodes,
        process::kill_server,
        resp::Reach,
        slots,
        stock::{NODE_TIMEOUT_MS, Stock},
        subject::{Member, Subject},
        wait::until,
    },
};
use anyhow::{Context, bail};
use kube::Client;
use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

/// Kills of each, one shard after the other.
const KILLS: usize = 10;
/// Replicas of each shard.
const REPLICAS: usize = 1;
/// Acknowledged writes of each client between two kills: at least two seconds.
const WRITES_BETWEEN: usize = 2_000;
/// One client for each shard, and a slot in the middle of what that shard owns.
const CLIENTS: [(&str, u16); 3] = [("0", 2_730), ("1", 8_191), ("2", 13_653)];

/// Measures both, and removes them.
pub async fn run(client: &Client) -> anyhow::Result<()> {
    println!();
    println!(
        "{KILLS} kills of each (SIGKILL of a primary's process under load), {} shards of 1 + {REPLICAS}, append-only file, node timeout \
         {NODE_TIMEOUT_MS} ms; milliseconds without an acknowledged write",
        CLIENTS.len()
    );
    println!(
        "  A ValkeyCluster's server is started again at once by its agent. A plain one is started again only when its replica has been \
         elected:"
    );
    println!("  were it back sooner, nobody would be elected, and it would serve with what its file has.");
    println!(
        "  {:<36} {:>22} {:>24}  acknowledged writes lost",
        "", "shard, median / max", "others, median / max"
    );
    let ours = Side::Ours(subject(client, "killed"));
    let figures = whole(&ours).await.context("Valkeeper")?;
    row("Valkeeper", &figures);
    let thirds = vec![Some(0..=5_460), Some(5_461..=10_922), Some(10_923..=16_383)];
    let plain = Side::Plain(stock(client, "killed-plain", thirds, REPLICAS));
    let theirs = whole(&plain).await.context("plain servers")?;
    row("plain valkey-server, by gossip", &theirs);
    println!(
        "  gossip takes {:.0} times as long (medians)",
        median(&theirs.hit_ms) / median(&figures.hit_ms)
    );
    Ok(())
}

/// What clients saw.
struct Seen {
    /// Longest gap of the killed shard's client, for each kill.
    hit_ms: Vec<f64>,
    /// Longest gap among the other clients, for each kill.
    others_ms: Vec<f64>,
    loss: Loss,
}

fn row(name: &str, seen: &Seen) {
    let both = |values: &[f64]| format!("{:.0} / {:.0}", median(values), maximum(values));
    println!("  {name:<36} {:>22} {:>24}  {}", both(&seen.hit_ms), both(&seen.others_ms), seen.loss);
}

/// One kill.
struct Fault {
    /// Number of the client whose shard it hit.
    shard: usize,
    at: Instant,
    /// When all was as before, long before the next.
    over: Instant,
}

/// Whose servers are killed.
enum Side {
    Ours(Subject),
    Plain(Stock),
}

impl Side {
    async fn create(&self) -> anyhow::Result<Nodes> {
        match self {
            Side::Ours(subject) => {
                subject.apply(&spec(CLIENTS.len(), REPLICAS)).await?;
                subject.ready().await?;
                Nodes::of(subject).await
            }
            Side::Plain(stock) => {
                stock.apply().await?;
                stock.form().await
            }
        }
    }

    async fn members(&self) -> anyhow::Result<Vec<Member>> {
        match self {
            Side::Ours(subject) => subject.members().await,
            Side::Plain(stock) => stock.members().await,
        }
    }

    /// Lets the killed server come back.
    async fn again(&self, killed: &Member, slot: u16, nodes: &Nodes) -> anyhow::Result<()> {
        let Side::Plain(stock) = self else { return Ok(()) };
        let others = nodes.addresses.iter().copied().filter(|at| Some(*at) != killed.address).collect();
        let others = Nodes { addresses: others, ..nodes.clone() };
        until("another owner", PATIENCE, || async {
            let owner = others.ask(move |nodes| nodes.owner(slot)).await?;
            if Some(owner) == killed.address { bail!("it is {owner} still") } else { Ok(()) }
        })
        .await?;
        stock.start_again(killed)
    }

    async fn remove(&self) -> anyhow::Result<()> {
        match self {
            Side::Ours(subject) => subject.remove().await,
            Side::Plain(stock) => stock.delete().await,
        }
    }
}

async fn whole(side: &Side) -> anyhow::Result<Seen> {
    let nodes = side.create().await?;
    let seen = kills(side, &nodes).await?;
    side.remove().await?;
    Ok(seen)
}

async fn kills(side: &Side, nodes: &Nodes) -> anyhow::Result<Seen> {
    let near = CLIENTS.map(|(_, slot)| slot);
    let tags = nodes.ask(move |nodes| Ok(slots::tags_near(&mut nodes.any()?, &near)?)).await?;
    let members = Arc::new(Mutex::new(nodes.addresses.clone()));
    let owner = |tag: &slots::Tag| Target::Owner { members: Arc::clone(&members), tag: tag.clone() };
    let targets = CLIENTS.iter().zip(&tags).map(|((client, _), tag)| (*client, owner(tag))).collect();
    let load = Load::on(targets, &Reach::Direct, &nodes.password)?;
    nodes.settled(REPLICAS, PATIENCE).await?;
    let mut faults = Vec::new();
    for number in 0..KILLS {
        load.grows_by(WRITES_BETWEEN, PATIENCE).await?;
        let shard = number % CLIENTS.len();
        let slot = tags.get(shard).context("a shard without a tag")?.slot;
        let primary = nodes.ask(move |nodes| nodes.owner(slot)).await?;
        let found = side.members().await?.into_iter().find(|member| member.address == Some(primary));
        let member = found.with_context(|| format!("{primary} is no member"))?;
        let at = kill_server(Place::Local, NAMESPACE, &member)?;
        side.again(&member, slot, nodes).await?;
        load.flows(PATIENCE).await?;
        // What the return of the killed one costs is part of the outage.
        nodes.settled(REPLICAS, PATIENCE).await?;
        faults.push(Fault { shard, at, over: Instant::now() });
    }
    let logs = load.finish()?;
    let mut figures = Figures::default();
    for (shard, (log, tag)) in logs.iter().zip(&tags).enumerate() {
        // A shard that was not hit has no excuse for any loss.
        let of_it: Vec<Instant> =
            faults.iter().filter(|fault| fault.shard == shard).map(|fault| fault.at).collect();
        figures.add_loss(log, &nodes.set(tag.slot, &log.key).await?, &of_it);
    }
    let (mut hit_ms, mut others_ms) = (Vec::new(), Vec::new());
    for Fault { shard: hit, at, over } in faults {
        let gaps = logs.iter().map(|log| log.gap_ms(at, Some(over))).collect::<anyhow::Result<Vec<f64>>>()?;
        hit_ms.extend(gaps.get(hit));
        let others: Vec<f64> =
            gaps.iter().enumerate().filter(|(shard, _)| *shard != hit).map(|(_, ms)| *ms).collect();
        others_ms.push(maximum(&others));
    }
    Ok(Seen { hit_ms, others_ms, loss: figures.loss })
}
