//! Who leads, when the Lease is not what an operator left it, and when the operators' clocks do not agree.

use super::{World, isolation::own_address};
use crate::support::{
    audit_log::Asked,
    journal::{Journal, claims, number, one_writer_at_a_time},
    load::{Figures, Load},
    operator::{LEASE, LOCAL_IMAGE, LOCAL_VALKEY_IMAGE, NAMESPACE},
    process::{kill_server, signal},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Until a primary has a replica in sync again, and for a takeover: the Lease of a holder that is nobody runs out first.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Longer than a Lease lasts unseen: who would take it over wrongly has done so by then.
const STANDING_BY: Duration = Duration::from_secs(20);
/// Name of the operator whose clock is ahead.
const AHEAD: &str = "ahead";
/// An hour less what happened before it led: so much lies between the first record and the last.
const SPAN_MIN_S: i64 = 3_000;
/// Between two looks at who holds the Lease.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// The Lease is deleted, given to someone who is not there, and its numbers are set to what they cannot be; two operators compete for
/// it all the while.
pub async fn lease_edited(world: &World) -> anyhow::Result<String> {
    world.operator.scale(2).await?;
    let told = edited(world).await;
    world.operator.scale(1).await?;
    told
}

async fn edited(world: &World) -> anyhow::Result<String> {
    let (subject, audit) = (&world.subject, world.audit.as_ref().context("no audit log")?);
    let uid = subject.get().await?.uid().context("no UID")?;
    subject.protected(SETTLED_MAX).await?;
    let load = Load::start(subject).await?;
    let begun = audit.end()?;
    let mut told = Vec::new();
    let hour = |hours: i64| -> anyhow::Result<Value> {
        let time = Timestamp::now().checked_add(SignedDuration::from_hours(hours))?;
        Ok(json!({ "renewTime": format!("{time:.6}") }))
    };
    let edits = [
        ("deleted", None),
        ("held by nobody who is there", Some(json!({ "holderIdentity": "somebody-else" }))),
        ("leaseTransitions 0", Some(json!({ "leaseTransitions": 0 }))),
        ("renewTime an hour ahead", Some(hour(1)?)),
        ("renewTime an hour ago", Some(hour(-1)?)),
    ];
    for (what, spec) in edits {
        let leases = world.operator.leases();
        match spec {
            None => drop(leases.delete(LEASE, &DeleteParams::default()).await?),
            Some(spec) => {
                let patch = Patch::Merge(json!({ "spec": spec }));
                leases.patch(LEASE, &PatchParams::default(), &patch).await?;
            }
        }
        let took = led(world).await.with_context(|| format!("the Lease {what}"))?;
        told.push(format!("{what}: {:.1} s", took.as_secs_f64()));
    }
    let outage = failover(world, load).await?;
    let journal = Journal::of(subject).await?;
    journal.holds()?;
    let records = journal.records()?;
    one_writer_at_a_time(&records)?;
    let (reigns, writes) = one_reign_at_a_time(&audit.asked_since(begun)?, &uid)?;
    Ok(format!(
        "led, recorded and Ready again after the Lease was {}; {} claims in all, {writes} writes in {reigns} reigns, none of another; \
         then a failover: {outage}",
        told.join(", "),
        claims(&records).len(),
    ))
}

/// Waits until one of the operators holds the Lease, renews it, has the journal and says that all is well; how long that took.
pub async fn led(world: &World) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let lease = || async {
        let spec = world.operator.leases().get(LEASE).await?.spec.context("an empty Lease")?;
        anyhow::Ok((spec.holder_identity.unwrap_or_default(), spec.renew_time))
    };
    until("an operator to renew the Lease", SETTLED_MAX, || async {
        let (holder, renewed) = lease().await?;
        let instances = world.operator.instances().await?;
        if !instances.iter().any(|one| one.has(&holder)) {
            bail!("it is held by {holder}");
        }
        // Renewed by whoever holds it, and with a time of today.
        let age = renewed.map(|time| Timestamp::now().duration_since(time.0).as_secs().abs());
        if age.is_none_or(|age| age > 60) {
            bail!("it was renewed {age:?} s ago")
        }
        let records = Journal::of(&world.subject).await?.records()?;
        match claims(&records).pop() {
            Some((_, writer)) if writer == holder => Ok(()),
            other => bail!("the journal's last claim is {other:?}, the Lease is held by {holder}"),
        }
    })
    .await?;
    world.subject.ready().await?;
    Ok(begun.elapsed())
}

/// The primary is killed under load, and another takes over; what clients saw.
async fn failover(world: &World, load: Load) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    load.flows(SETTLED_MAX).await?;
    let fault = kill_server(world.place, &subject.namespace, &primary)?;
    load.flows(SETTLED_MAX).await?;
    subject.ready().await?;
    let now = subject.protected(SETTLED_MAX).await?;
    if now.name == primary.name {
        bail!("{} was killed and is primary still", now.name);
    }
    let figures = Figures::of(subject, &load.finish()?, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(figures.line())
}

/// From the first write of an operator in the journal until another's, nobody else changes anything, the Lease aside. Reigns and
/// writes that were seen.
fn one_reign_at_a_time(asked: &[Asked], uid: &str) -> anyhow::Result<(usize, usize)> {
    let mut reigns: Vec<&Asked> = Vec::new();
    for write in asked.iter().filter(|a| a.is_done() && a.is_of_head(uid)) {
        if reigns.last().is_none_or(|last| last.by != write.by) {
            reigns.push(write);
        }
    }
    // Writes of the head are put in order by the API server itself: each names the version that it replaces.
    let done: Vec<&Asked> =
        asked.iter().filter(|a| a.is_done() && !a.is_lease && !a.is_of_head(uid)).collect();
    for write in &done {
        // The one that had begun when it was received; before the first nothing is known.
        let reign = reigns.iter().rfind(|reign| reign.answered <= write.received);
        if let Some(reign) = reign.filter(|reign| reign.by != write.by) {
            bail!("{} writes after the claim of {}: {write:?}", write.by, reign.by);
        }
    }
    if reigns.is_empty() { bail!("nobody wrote the journal") } else { Ok((reigns.len(), done.len())) }
}

/// One of two operators has a clock that is an hour ahead. It stands by, then leads, then ends, and there is a failover under the
/// other, which goes on with times that are no earlier.
pub async fn clocks_an_hour_apart(world: &World) -> anyhow::Result<String> {
    let told = an_hour_apart(world).await;
    world.operator.scale(1).await?;
    // Its journal is an hour ahead of the clock now, and stays so.
    world.start_over().await?;
    told
}

async fn an_hour_apart(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(SETTLED_MAX).await?;
    let load = Load::start(subject).await?;
    let holder = world.operator.holder().await?;
    let ahead = Ahead::start(own_address(primary.address.context("no address")?)?)?;
    let says = |words: &'static str| {
        until("the operator with the wrong clock to speak", SETTLED_MAX, || async { ahead.says(words) })
    };
    says("another leads").await?;
    stays(world, &holder).await.context("with the other standing by")?;
    world.operator.scale(0).await?;
    says("claimed the journal").await?;
    let holder = world.operator.holder().await?;
    world.operator.scale(1).await?;
    stays(world, &holder).await.context("with the right clock standing by")?;
    let under_it = failover(world, load).await.context("under the clock that is ahead")?;
    drop(ahead);
    let taken = led(world).await?;
    let outage = failover(world, Load::start(subject).await?).await?;
    let journal = Journal::of(subject).await?;
    journal.holds()?;
    let records = journal.records()?;
    one_writer_at_a_time(&records)?;
    let writers = claims(&records);
    let times = || records.iter().map(|record| number(record, "time"));
    let span_s = (times().max().unwrap_or_default() - times().min().unwrap_or_default()) / 1_000_000_000;
    if span_s < SPAN_MIN_S || !writers.iter().any(|(_, writer)| writer.starts_with(AHEAD)) {
        bail!("the records span {span_s} s and were written by {writers:?}: no clock was an hour ahead");
    }
    Ok(format!(
        "no change of leader in {} s of standing by on either side; a failover under the clock that is ahead: {under_it}; the right clock \
         led again after {:.1} s, then another: {outage}; \
         {} records over {span_s} s of {} claims, no time falls",
        STANDING_BY.as_secs(),
        taken.as_secs_f64(),
        records.len(),
        writers.len(),
    ))
}

/// For a while nobody else holds the Lease.
async fn stays(world: &World, holder: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < STANDING_BY {
        let now = world.operator.holder().await?;
        if now != holder {
            bail!("{now} took the Lease from {holder} after {:.1} s", begun.elapsed().as_secs_f64());
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    Ok(())
}

/// An operator outside of the cluster, whose clock is an hour ahead.
struct Ahead {
    process: Child,
    log: PathBuf,
}

impl Ahead {
    fn start(address: IpAddr) -> anyhow::Result<Ahead> {
        let log = std::env::temp_dir().join(format!("valkeeper-ahead-{}.log", std::process::id()));
        let output = fs::File::create(&log)?;
        let process = Command::new(env!("CARGO_BIN_EXE_valkeeper"))
            .args(["run", "--namespace", NAMESPACE, "--listen", "127.0.0.1:18080"])
            .args(["--listen-news", &format!("{address}:18443"), "--pod-ip", &address.to_string()])
            .args(["--default-image", LOCAL_VALKEY_IMAGE, "--agent-image", LOCAL_IMAGE])
            .env("LD_PRELOAD", faketime()?)
            .env("FAKETIME", "+1h")
            // Windows and deadlines are of the other clock, which nobody sets.
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("DONT_FAKE_MONOTONIC", "1")
            .env("POD_NAME", AHEAD)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()?;
        Ok(Ahead { process, log })
    }

    fn says(&self, words: &str) -> anyhow::Result<()> {
        let log = fs::read_to_string(&self.log)?;
        if log.contains(words) {
            Ok(())
        } else {
            bail!("{}", log.lines().next_back().unwrap_or("it says nothing"))
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let _ = signal(self.process.id(), "TERM");
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.log);
    }
}

/// The library that gives a process another clock.
fn faketime() -> anyhow::Result<PathBuf> {
    let of = |folder: fs::DirEntry| folder.path().join("faketime/libfaketimeMT.so.1");
    let found = fs::read_dir("/usr/lib")?.filter_map(Result::ok).map(of).find(|path| path.exists());
    found.context("libfaketime is not installed: run tests/e2e/setup")
}
