//! Write outage of ten killed primaries: Valkeeper on real pods, then Valkey Sentinel as plain processes, on the same
//! machine in the same run, seen by the same client. Prints figures, and for
//! Valkeeper where the time went; asserts none. Started by `make bench`; `--no-sentinel` leaves the other side out, and
//! VALKEEPER_JOURNAL=sled keeps the journal in sled.

#[path = "../tests/e2e/support/mod.rs"]
mod support;

use anyhow::{Context, bail};
use serde_json::json;
use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use support::{
    Place,
    breakdown::{Breakdown, Clock, Measured},
    journal::Journal,
    load::{Figures, Load, Loss, TIMEOUT_READ, Target, maximum, median},
    operator::{Operator, Store},
    process::kill_server,
    resp::{Connection, PORT, Reach, Role},
    subject::{Subject, numbers},
    wait::until,
};

/// Kills of each.
const KILLS: usize = 10;
/// Sentinel's detection window, in milliseconds.
const DOWN_AFTER_MS: u32 = 2_000;
/// Members and sentinels.
const PROCESSES: u8 = 3;
/// Port of sentinels.
const SENTINEL_PORT: u16 = 26_379;
/// Password of the throw-away servers on loopback: the client that measures logs in.
const PASSWORD: &str = "bench";
/// Acknowledged writes between two kills: at least two seconds.
const WRITES_BETWEEN: usize = 2_000;
/// Bound on every wait.
const PATIENCE: Duration = Duration::from_secs(120);
/// Namespace of the cluster that is measured.
const NAMESPACE: &str = "valkeeper-bench";

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run().await)
}

async fn run() -> anyhow::Result<()> {
    let place = Place::of_environment()?;
    if place == Place::Existing {
        bail!("the benchmark compares on one machine: it needs the local cluster");
    }
    println!(
        "{KILLS} kills of each (SIGKILL of the primary's process under load), milliseconds without an acknowledged write"
    );
    let (ours, breakdown) = valkeeper(place).await.context("Valkeeper")?;
    row("Valkeeper, client that asks for roles", &ours.roles_ms, Some(&ours.loss));
    row("Valkeeper, client of the Service", &ours.service_ms, None);
    println!("of which, with the journal in {:?}:", Store::of_environment()?);
    for line in breakdown.lines() {
        println!("{line}");
    }
    if std::env::args().any(|word| word == "--no-sentinel") {
        return Ok(());
    }
    let theirs = sentinel().await.context("Sentinel")?;
    let name = format!("Sentinel (down-after {DOWN_AFTER_MS}), client that asks for roles");
    row(&name, &theirs.roles_ms, Some(&theirs.loss));
    println!(
        "Sentinel takes {:.0} times as long (medians)",
        median(&theirs.roles_ms) / median(&ours.roles_ms)
    );
    Ok(())
}

fn row(name: &str, values: &[f64], loss: Option<&Loss>) {
    let loss = loss.map(|loss| format!("  {loss}")).unwrap_or_default();
    println!("{name:<55} median {:7.0}  maximum {:7.0}{loss}", median(values), maximum(values));
}

async fn valkeeper(place: Place) -> anyhow::Result<(Figures, Breakdown)> {
    let client = support::client().await?;
    let operator = Operator::install(&client, place).await?;
    support::restricted_namespace(&client, NAMESPACE).await?;
    let (namespace, name) = (NAMESPACE.to_owned(), "bench".to_owned());
    let subject = Subject { client, namespace, name, reach: Reach::Direct, place };
    subject.apply(&json!({ "topology": "Replication", "replicas": 2, "profile": "Cache" })).await?;
    subject.ready().await?;
    let load = Load::start(&subject).await?;
    let clock = Clock::start()?;
    let mut faults = Vec::new();
    for _ in 0..KILLS {
        let primary = subject.protected(PATIENCE).await?;
        // Not while the last start of a member is fresh: kube-proxy makes a change wait that comes within a second after
        // another. Members in kubelet's back-off are not waited for, which is to Valkeeper's disadvantage.
        load.grows_by(WRITES_BETWEEN, PATIENCE).await?;
        let before = Measured::now(&operator).await?;
        let fault = kill_server(place, &subject.namespace, &primary)?;
        load.flows(PATIENCE).await?;
        faults.push((fault, before.next(&operator).await?));
    }
    subject.protected(PATIENCE).await?;
    let logs = load.finish()?;
    let moments: Vec<Instant> = faults.iter().map(|(fault, _)| *fault).collect();
    let figures = Figures::of(&subject, &logs, &moments).await?;
    let journal = match Store::of_environment()? {
        Store::ConfigMaps => Journal::of(&subject).await?,
        Store::Sled => {
            let uid = subject.get().await?.metadata.uid.context("no UID")?;
            Journal::of_sled(operator.pid().await?, &uid)?
        }
    };
    let breakdown = Breakdown::of(&clock, &journal.records()?, &logs, &faults)?;
    subject.delete().await?;
    support::delete_namespace(&subject.client, NAMESPACE).await?;
    Ok((figures, breakdown))
}

/// Processes on loopback: members and sentinels have an address each, so that all may use their usual port.
struct Ring {
    binaries: PathBuf,
    dir: PathBuf,
    members: Vec<Child>,
    sentinels: Vec<Child>,
}

impl Drop for Ring {
    fn drop(&mut self) {
        for child in self.members.iter_mut().chain(&mut self.sentinels) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn address(index: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 7, index + 1))
}

impl Ring {
    fn start() -> anyhow::Result<Ring> {
        let binaries = support::valkey_binaries()?;
        let dir = std::env::temp_dir().join(format!("valkeeper-bench-{}", std::process::id()));
        let mut ring = Ring { binaries, dir, members: Vec::new(), sentinels: Vec::new() };
        for index in 0..PROCESSES {
            let home = ring.dir.join(format!("member-{index}"));
            fs::create_dir_all(&home)?;
            let follows =
                if index == 0 { String::new() } else { format!("replicaof {} {PORT}\n", address(0)) };
            let at = address(index);
            let conf = format!(
                "bind {at}\nport {PORT}\ndir {}\nsave \"\"\nreplica-announce-ip {at}\nrequirepass {PASSWORD}\n\
                 primaryauth {PASSWORD}\nrepl-diskless-sync-delay 0\n{follows}",
                home.display()
            );
            fs::write(home.join("valkey.conf"), conf)?;
            let child = ring.spawn("valkey-server", &home.join("valkey.conf"))?;
            ring.members.push(child);
        }
        for index in 0..PROCESSES {
            let home = ring.dir.join(format!("sentinel-{index}"));
            fs::create_dir_all(&home)?;
            let at = address(index);
            let conf = format!(
                "bind {at}\nport {SENTINEL_PORT}\ndir {}\nsentinel announce-ip {at}\n\
                 sentinel monitor bench {} {PORT} 2\nsentinel auth-pass bench {PASSWORD}\n\
                 sentinel down-after-milliseconds bench {DOWN_AFTER_MS}\nsentinel failover-timeout bench 10000\n",
                home.display(),
                address(0)
            );
            fs::write(home.join("sentinel.conf"), conf)?;
            let child = ring.spawn("valkey-sentinel", &home.join("sentinel.conf"))?;
            ring.sentinels.push(child);
        }
        Ok(ring)
    }

    fn spawn(&self, program: &str, conf: &Path) -> anyhow::Result<Child> {
        let log = fs::File::create(conf.with_extension("log"))?;
        let mut command = Command::new(self.binaries.join(program));
        Ok(command.arg(conf).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?)
    }

    /// The primary, once both others follow it and are in sync, and every sentinel knows all of them.
    async fn settled(&self) -> anyhow::Result<usize> {
        let found = until("three members in sync that every sentinel knows", PATIENCE, || async {
            tokio::task::spawn_blocking(look).await?
        });
        Ok(found.await?.0)
    }

    async fn kills(&mut self, load: &Load) -> anyhow::Result<Vec<Instant>> {
        let mut faults = Vec::new();
        for _ in 0..KILLS {
            let primary = self.settled().await?;
            load.grows_by(WRITES_BETWEEN, PATIENCE).await?;
            let member = self.members.get_mut(primary).context("no such member")?;
            faults.push(Instant::now());
            member.kill()?;
            member.wait()?;
            // Started again only when another has taken over: Sentinel does not notice one that is back at once, and
            // its empty data set would become everyone's.
            load.flows(PATIENCE).await?;
            let conf = self.dir.join(format!("member-{primary}/valkey.conf"));
            let again = self.spawn("valkey-server", &conf)?;
            if let Some(slot) = self.members.get_mut(primary) {
                *slot = again;
            }
        }
        Ok(faults)
    }
}

fn look() -> anyhow::Result<usize> {
    let timeout = Duration::from_secs(1);
    let open = |index: u8| Connection::open(&Reach::Direct, address(index), PASSWORD, timeout);
    let roles = (0..PROCESSES).map(|i| open(i)?.role()).collect::<std::io::Result<Vec<Role>>>()?;
    let primary = roles.iter().position(|role| *role == Role::Primary).context("no primary")?;
    let wanted =
        Role::Replica { of: address(u8::try_from(primary)?).to_string(), link: "connected".to_owned() };
    if roles.iter().filter(|role| **role == wanted).count() != usize::from(PROCESSES) - 1 {
        bail!("{roles:?}");
    }
    for index in 0..PROCESSES {
        let mut sentinel = Connection::open_without_password(address(index), SENTINEL_PORT, timeout)?;
        let known = sentinel.info("sentinel", "master0")?.unwrap_or_default();
        let at = format!("address={}:{PORT}", address(u8::try_from(primary)?));
        if !known.contains("status=ok") || !known.contains(&at) || !known.contains("slaves=2,sentinels=3") {
            bail!("sentinel {index} knows {known}");
        }
    }
    Ok(primary)
}

async fn sentinel() -> anyhow::Result<Figures> {
    let mut ring = Ring::start()?;
    ring.settled().await?;
    let members = Arc::new(Mutex::new((0..PROCESSES).map(address).collect()));
    let load = Load::on(vec![("roles", Target::Members(members))], &Reach::Direct, PASSWORD)?;
    let faults = ring.kills(&load).await?;
    let primary = ring.settled().await?;
    let mut figures = Figures::default();
    for log in load.finish()? {
        let key = log.key.clone();
        let at = address(u8::try_from(primary)?);
        let read = move || numbers(Connection::open(&Reach::Direct, at, PASSWORD, TIMEOUT_READ)?, &key);
        figures.add(&log, &tokio::task::spawn_blocking(read).await??, &faults)?;
    }
    Ok(figures)
}
