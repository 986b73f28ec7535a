//! A million keys from one primary to another: by `spec.shards`, by one bare job of the same slots, and by valkey-cli, which moves keys
//! one by one.

use crate::{
    PATIENCE, spec, stock, subject,
    support::{
        breakdown::Clock,
        journal::Journal,
        keys::Keys,
        load::{Figures, Load, Loss, Target},
        nodes::Nodes,
        resp::PORT,
        slots::{self, COUNT, Tag},
        valkey_binaries,
        wait::until,
    },
};
use anyhow::{Context, bail};
use kube::Client;
use serde_json::Value;
use std::{
    net::IpAddr,
    ops::RangeInclusive,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Keys in the slots that move.
const KEYS: usize = 1_000_000;
/// Bytes of each value.
const VALUE_BYTES: usize = 100;
/// Half of the slots moves: the higher one as a ValkeyCluster has it, the lower one as valkey-cli chooses.
const LOWER: RangeInclusive<u16> = 0..=8_191;
const HIGHER: RangeInclusive<u16> = 8_192..=16_383;
/// The clients write to slots in the middle of each half.
const MIDDLES: [u16; 2] = [4_096, 12_288];
/// Acknowledged writes of each client before anything moves, and after.
const WRITES: usize = 1_000;
/// Bound on valkey-cli, which took 99 s on loopback: its keys go ten at a time.
const CLI_MAX: Duration = Duration::from_secs(400);
/// Between two looks at a bare job, which takes a second or two.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// Measures all three, and removes them.
pub async fn run(client: &Client) -> anyhow::Result<()> {
    println!();
    println!(
        "Reshard: {KEYS} keys with values of {VALUE_BYTES} bytes in {} slots go from one primary to another, no replicas, append-only file; \
         ratios to one bare job in parentheses",
        HIGHER.len()
    );
    println!(
        "  Gaps are the longest time without an acknowledged write of a client, from the first job on. valkey-cli chooses the lower half."
    );
    println!(
        "  {:<36} {:>14} {:>20} {:>20}  keys lost, writes lost",
        "", "seconds", "moving slot, ms", "staying slot, ms"
    );
    let bare = plain(client, Way::Bare).await.context("CLUSTER MIGRATESLOTS")?;
    row("CLUSTER MIGRATESLOTS, one job", &bare, &bare);
    let Ours { seen, jobs, since_asked_s } = ours(client).await.context("Valkeeper")?;
    row(&format!("Valkeeper, shards 1 -> 2, {jobs} jobs"), &seen, &bare);
    println!("  {:<36} {since_asked_s:>8.2}", "  from the change of the resource");
    let cli = plain(client, Way::Cli).await.context("valkey-cli")?;
    row("valkey-cli --cluster reshard", &cli, &bare);
    Ok(())
}

fn row(name: &str, seen: &Seen, bare: &Seen) {
    let part = |value: f64, of: f64, digits: usize| format!("{value:.digits$} ({:.1})", value / of);
    println!(
        "  {name:<36} {:>14} {:>20} {:>20}  {} of {KEYS}, {}",
        part(seen.seconds, bare.seconds, 2),
        part(seen.moving_ms, bare.moving_ms, 0),
        part(seen.staying_ms, bare.staying_ms, 0),
        seen.keys_lost,
        seen.loss,
    );
}

/// What came of one reshard.
struct Seen {
    seconds: f64,
    moving_ms: f64,
    staying_ms: f64,
    keys_lost: usize,
    loss: Loss,
}

/// The same of a ValkeyCluster's.
struct Ours {
    seen: Seen,
    jobs: usize,
    since_asked_s: f64,
}

/// Keys and clients that are there before anything moves.
struct Prepared {
    keys: Keys,
    load: Load,
    tags: Vec<Tag>,
    moves: RangeInclusive<u16>,
}

impl Prepared {
    async fn on(nodes: &Nodes, moves: RangeInclusive<u16>) -> anyhow::Result<Prepared> {
        // A node that has just got its slots refuses for up to two seconds more.
        let one = || async { Keys::write_into(nodes, moves.clone(), 1, VALUE_BYTES).await.map(|_| ()) };
        until("writes to be taken", PATIENCE, one).await?;
        let keys = Keys::write_into(nodes, moves.clone(), KEYS, VALUE_BYTES).await?;
        // A migration waits for what the server writes to its disk.
        nodes.snapshot().await?;
        let tags = nodes.ask(|nodes| Ok(slots::tags_near(&mut nodes.any()?, &MIDDLES)?)).await?;
        let members = Arc::new(Mutex::new(nodes.addresses.clone()));
        let target = |tag: &Tag| Target::Owner { members: Arc::clone(&members), tag: tag.clone() };
        let targets = ["lower", "higher"].into_iter().zip(tags.iter().map(target)).collect();
        let load = Load::on(targets, &nodes.reach, &nodes.password)?;
        load.grows_by(WRITES, PATIENCE).await?;
        Ok(Prepared { keys, load, tags, moves })
    }

    /// Reads everything back. `begun`: when the first job began.
    async fn finish(self, nodes: &Nodes, begun: Instant, seconds: f64) -> anyhow::Result<Seen> {
        let Prepared { keys, load, tags, moves } = self;
        load.grows_by(WRITES, PATIENCE).await?;
        let (mut moving_ms, mut staying_ms, mut figures) = (0.0, 0.0, Figures::default());
        for (log, tag) in load.finish()?.iter().zip(&tags) {
            let gap_ms = log.gap_ms(begun, None)?;
            if moves.contains(&tag.slot) {
                moving_ms = gap_ms
            } else {
                staying_ms = gap_ms
            }
            figures.add_loss(log, &nodes.set(tag.slot, &log.key).await?, &[]);
        }
        let wrong = keys.compare(nodes).await?;
        wrong.first.iter().for_each(|first| println!("     lost: {first}"));
        Ok(Seen { seconds, moving_ms, staying_ms, keys_lost: wrong.count, loss: figures.loss })
    }
}

async fn ours(client: &Client) -> anyhow::Result<Ours> {
    let subject = subject(client, "resharded");
    subject.apply(&spec(1, 0)).await?;
    subject.ready().await?;
    let before = Nodes::of(&subject).await?;
    let prepared = Prepared::on(&before, HIGHER).await?;
    let (clock, asked) = (Clock::start()?, Instant::now());
    subject.apply(&spec(2, 0)).await?;
    until("both to have their half", PATIENCE, || before.ask(halves)).await?;
    subject.ready().await?;
    let after = Nodes::of(&subject).await?;
    after.settled(0, PATIENCE).await?;
    let (reshard, _) = until("the reshard's end in the journal", PATIENCE, || async {
        let found = Journal::of(&subject).await?.reshards()?.pop().context("the journal has no reshard")?;
        let ends = found.pointer("/ended/1").and_then(Value::as_str) == Some("ReshardComplete");
        if ends { Ok(found) } else { bail!("it is open still") }
    })
    .await?;
    let time_ns = |pointer: &str| {
        reshard.pointer(pointer).and_then(Value::as_i64).context("a reshard without its times")
    };
    let (first_ns, ended_ns) = (time_ns("/jobs/0/sent/time")?, time_ns("/ended/0/time")?);
    let seconds = |from_ns: i64| (ended_ns - from_ns) as f64 / 1e9;
    let seen = prepared.finish(&after, clock.moment(first_ns), seconds(first_ns)).await?;
    let jobs = reshard.pointer("/jobs").and_then(Value::as_array).map_or(0, Vec::len);
    subject.remove().await?;
    Ok(Ours { seen, jobs, since_asked_s: seconds(clock.unix_ns(asked)) })
}

/// Two nodes serve half of the slots each, as one node sees it.
fn halves(nodes: &Nodes) -> anyhow::Result<()> {
    let counts = slots::counts(&slots::runs(&mut nodes.any()?)?);
    let half = usize::from(COUNT) / 2;
    if counts.len() == 2 && counts.values().all(|count| *count == half) {
        Ok(())
    } else {
        bail!("{counts:?}")
    }
}

/// How plain servers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Bare,
    Cli,
}

async fn plain(client: &Client, way: Way) -> anyhow::Result<Seen> {
    let (name, moves) = match way {
        Way::Bare => ("resharded-bare", HIGHER),
        Way::Cli => ("resharded-cli", LOWER),
    };
    let stock = stock(client, name, vec![Some(0..=COUNT - 1), None], 0);
    stock.apply().await?;
    let nodes = stock.form().await?;
    let prepared = Prepared::on(&nodes, moves.clone()).await?;
    let [source, target] = nodes.addresses[..] else { bail!("there are two nodes") };
    let (from, to) = nodes.ask(move |nodes| Ok((nodes.id(source)?, nodes.id(target)?))).await?;
    let begun = Instant::now();
    match way {
        Way::Bare => nodes.ask(move |nodes| by_one_job(nodes, source, &to, &moves)).await?,
        Way::Cli => by_cli(&nodes, source, (&from, &to), moves.len()).await?,
    }
    let seconds = begun.elapsed().as_secs_f64();
    until("both to have their half", PATIENCE, || nodes.ask(halves)).await?;
    nodes.settled(0, PATIENCE).await?;
    let seen = prepared.finish(&nodes, begun, seconds).await?;
    stock.delete().await?;
    Ok(seen)
}

/// One job, until its source says how it ended.
fn by_one_job(nodes: &Nodes, source: IpAddr, to: &str, slots: &RangeInclusive<u16>) -> anyhow::Result<()> {
    let (first, last) = (slots.start().to_string(), slots.end().to_string());
    nodes.tell(source, &["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", &first, &last, "NODE", to])?;
    let begun = Instant::now();
    let mut node = nodes.open(source)?;
    while begun.elapsed() < PATIENCE {
        let jobs = node.call(&["CLUSTER", "GETSLOTMIGRATIONS"])?;
        let job = jobs.list().first().with_context(|| format!("no job: {jobs:?}"))?;
        let mut words = job.list().iter().map(|word| word.text().unwrap_or_default());
        match words.by_ref().find(|word| *word == "state").and(words.next()) {
            Some("success") => return Ok(()),
            Some("failed" | "cancelled") | None => bail!("{job:?}"),
            Some(_) => std::thread::sleep(LOOK_PAUSE),
        }
    }
    bail!("the job did not end")
}

/// `valkey-cli --cluster reshard`, as it comes.
async fn by_cli(nodes: &Nodes, source: IpAddr, (from, to): (&str, &str), count: usize) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new(valkey_binaries()?.join("valkey-cli"));
    command.args(["--cluster", "reshard", &format!("{source}:{PORT}"), "--cluster-yes"]);
    command.args(["--cluster-from", from, "--cluster-to", to, "--cluster-slots", &count.to_string()]);
    command.env("REDISCLI_AUTH", &nodes.password).stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(CLI_MAX, command.output()).await.context("it did not end")??;
    if !ended.status.success() {
        let told = String::from_utf8_lossy(&ended.stdout).into_owned();
        bail!(
            "{}: {}{}",
            ended.status,
            told.lines().last().unwrap_or_default(),
            String::from_utf8_lossy(&ended.stderr)
        );
    }
    Ok(())
}
