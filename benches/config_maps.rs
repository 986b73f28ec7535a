//! Journals in ConfigMaps on a real API server: how long an append takes, and what a thousand clusters take of etcd, its versions that are not
//! compacted yet included. Prints figures, asserts none. Started by `make bench-etcd`; an argument is another number of clusters.

#[path = "../tests/e2e/support/mod.rs"]
mod support;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use valkeeper::{
    k8s::{client::Clients, lease::LeaseStore, objects::ConfigMaps},
    lease::Campaign,
};
use valkeeper_core::{
    event::{BaselineOrigin, Event},
    ids::Timestamp,
};
use valkeeper_journal::{Backend, Journal, Segments, StreamId, import_lines};

/// Namespace of everything that is made.
const NAMESPACE: &str = "valkeeper-bench-journals";
/// Clusters, unless an argument says otherwise.
const CLUSTERS: usize = 1_000;
/// Records of each: what 64 KiB hold.
const RECORDS: usize = 700;
/// Records of one append while a journal is filled.
const BATCH: usize = 100;
/// Single appends of each cluster afterwards, as a failover makes them.
const SINGLE: usize = 5;
/// Clusters that write at the same time.
const AT_ONCE: usize = 16;
/// Appends whose time is taken.
const TIMED: usize = 200;
/// Clusters in trouble, which write without a pause beside one that does not.
const STORM: usize = 24;
/// Appends of that one, and the pause between them: a failover in every second and a half.
const QUIET: usize = 60;
const QUIET_PAUSE: Duration = Duration::from_millis(250);
/// Numbers of the clusters in trouble begin here.
const STORM_FIRST: usize = 1_000_000;
/// Until their first writes, which nobody holds back, are over.
const STORM_SETTLES: Duration = Duration::from_secs(10);
/// Most appends of each.
const STORM_APPENDS_MAX: usize = 20_000;
/// Bound on the Lease.
const LEADS_WITHIN: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run().await)
}

async fn run() -> anyhow::Result<()> {
    let clusters = std::env::args().skip(1).find_map(|n| n.parse().ok()).unwrap_or(CLUSTERS);
    let clients = Clients::infer().await?;
    support::restricted_namespace(&clients.requests, NAMESPACE).await?;
    let told = measure(&clients, clusters).await;
    support::delete_namespace(&clients.requests, NAMESPACE).await?;
    told
}

async fn measure(clients: &Clients, clusters: usize) -> anyhow::Result<()> {
    let store = LeaseStore::new(clients.requests.clone(), NAMESPACE, "bench");
    let (mut campaign, mut leadership) = Campaign::new(store, NAMESPACE, "bench".to_owned(), None);
    let maps = || Arc::new(ConfigMaps::new(clients.requests.clone(), NAMESPACE, leadership.clone()));
    let (maps, others) = (maps(), maps());
    let reign = tokio::spawn(async move { campaign.run().await });
    tokio::time::timeout(LEADS_WITHIN, leadership.gained()).await.context("no Lease")?;
    let backend: Arc<dyn Backend> = Arc::new(Segments::new(maps));
    let apart: Arc<dyn Backend> = Arc::new(Segments::new(others));
    let events = events()?;

    let mut journal = claimed(&backend, 0).await?;
    for records in [1, 10] {
        let mut took = Vec::new();
        for number in 0..TIMED {
            let batch = events.iter().cycle().skip(number * records).take(records).cloned().collect();
            let begun = Instant::now();
            journal.append(batch, Timestamp(number as i64)).await?;
            took.push(begun.elapsed());
        }
        took.sort();
        let at = |share: usize| took[(TIMED - 1) * share / 100].as_secs_f64() * 1_000.0;
        println!(
            "append of {records:>2}: {:.1} ms median, {:.1} ms p99, {:.1} ms maximum of {TIMED}",
            at(50),
            at(99),
            at(100)
        );
    }

    beside_trouble(&mut journal, &backend, &apart, &events).await?;

    let before = etcd_bytes(clients).await?;
    let begun = Instant::now();
    let stored: Vec<usize> = futures::stream::iter(1..=clusters)
        .map(|number| fill(&backend, &events, number))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let (after, stored): (u64, usize) = (etcd_bytes(clients).await?, stored.iter().sum());
    let records = clusters * (RECORDS + SINGLE);
    println!(
        "{clusters} clusters of {} records in {:.0} s: {:.1} MiB stored, {} bytes a record; etcd grew by {:.1} MiB to {:.1} MiB",
        RECORDS + SINGLE,
        begun.elapsed().as_secs_f64(),
        mib(stored as u64),
        stored / records,
        mib(after.saturating_sub(before)),
        mib(after),
    );
    reign.abort();
    Ok(())
}

/// Events of the stories, without those that only a claim writes.
fn events() -> anyhow::Result<Vec<Event>> {
    let mut paths: Vec<_> = std::fs::read_dir(support::checkout().join("tests/golden"))?
        .map(|story| Ok(story?.path().join("journal.jsonl")))
        .collect::<std::io::Result<_>>()?;
    // Of most stories there is none.
    paths.retain(|path| path.exists());
    paths.sort();
    let mut events = Vec::new();
    for path in paths {
        for stored in import_lines(std::fs::read(path)?.as_slice()) {
            let event = stored?.record.event;
            if !matches!(event, Event::Baseline { .. } | Event::EpochStarted { .. }) {
                events.push(event);
            }
        }
    }
    Ok(events)
}

async fn claimed(backend: &Arc<dyn Backend>, number: usize) -> anyhow::Result<Journal> {
    let uid = uuid::Uuid::from_u128(number as u128 + 1).to_string();
    let (mut journal, _) = Journal::open(Arc::clone(backend), StreamId(uid.clone())).await?;
    let (namespace, name) = ("bench".to_owned(), format!("cluster-{number}"));
    let baseline = Event::Baseline { cluster_uid: uid, namespace, name, origin: BaselineOrigin::Empty };
    journal.claim(Some(baseline), "bench", "0", Timestamp(0)).await?;
    Ok(journal)
}

/// What a cluster that does something now and then waits for beside those that write without a pause.
async fn beside_trouble(
    journal: &mut Journal,
    backend: &Arc<dyn Backend>,
    apart: &Arc<dyn Backend>,
    events: &[Event],
) -> anyhow::Result<()> {
    let told = quiet(journal, events).await?;
    println!("append of a quiet cluster: {told}");
    // The same operator lets those in trouble in by turns; of another one, which has a line of its own, each is always let in.
    for (storming, how, first) in [(backend, "by turns", 0), (apart, "all at once", STORM)] {
        let stop = Arc::new(AtomicBool::new(false));
        let numbers = (0..STORM).map(|number| STORM_FIRST + first + number);
        let storm: Vec<_> = numbers
            .map(|number| {
                tokio::spawn(trouble(Arc::clone(storming), events.to_vec(), number, Arc::clone(&stop)))
            })
            .collect();
        tokio::time::sleep(STORM_SETTLES).await;
        let told = quiet(journal, events).await?;
        stop.store(true, Ordering::Relaxed);
        for one in storm {
            one.await??;
        }
        println!("beside {STORM} that write without a pause, {how}: {told}");
    }
    Ok(())
}

/// How long the appends of a cluster take that does something now and then.
async fn quiet(journal: &mut Journal, events: &[Event]) -> anyhow::Result<String> {
    let mut took = Vec::new();
    for event in events.iter().cycle().take(QUIET) {
        tokio::time::sleep(QUIET_PAUSE).await;
        let begun = Instant::now();
        journal.append(vec![event.clone()], Timestamp(3)).await?;
        took.push(begun.elapsed());
    }
    took.sort();
    let at = |share: usize| took[(QUIET - 1) * share / 100].as_secs_f64() * 1_000.0;
    Ok(format!("{:.1} ms median, {:.1} ms p95, {:.1} ms maximum of {QUIET}", at(50), at(95), at(100)))
}

/// Appends until it is told to stop.
async fn trouble(
    backend: Arc<dyn Backend>,
    events: Vec<Event>,
    number: usize,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<()> {
    let mut journal = claimed(&backend, number).await?;
    for event in events.iter().cycle().take(STORM_APPENDS_MAX) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        journal.append(vec![event.clone()], Timestamp(3)).await?;
    }
    Ok(())
}

/// A journal as one cluster would have it. Bytes that it takes.
async fn fill(backend: &Arc<dyn Backend>, events: &[Event], number: usize) -> anyhow::Result<usize> {
    let mut journal = claimed(backend, number).await?;
    let mut own = events.iter().cycle().skip(number * 37).cloned();
    for _ in 0..RECORDS / BATCH {
        journal.append(own.by_ref().take(BATCH).collect(), Timestamp(1)).await?;
    }
    for _ in 0..SINGLE {
        journal.append(own.by_ref().take(1).collect(), Timestamp(2)).await?;
    }
    Ok(backend.read(journal.stream()).await?.bytes())
}

/// What etcd takes on its disk, as the API server says.
async fn etcd_bytes(clients: &Clients) -> anyhow::Result<u64> {
    let request = axum::http::Request::get("/metrics").body(Vec::new())?;
    let text = clients.requests.request_text(request).await?;
    let line = text.lines().find(|line| line.starts_with("apiserver_storage_size_bytes{"));
    let value = line.and_then(|line| line.rsplit(' ').next()).context("no apiserver_storage_size_bytes")?;
    Ok(value.parse::<f64>()? as u64)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}
