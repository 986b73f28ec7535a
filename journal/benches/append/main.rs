//! Durable append per backend next to a bare append + fdatasync of the same bytes in the same run, and the fold rate.
//! `cargo bench -p valkeeper-journal`; with `-- --all` (`make bench-journal`) also starts of a million records, which takes minutes.
//! Numbers are of this machine and this disk.

#![allow(clippy::unwrap_used)] // a failed step ends the benchmark

mod alternatives;
mod group;
mod reading;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};
use valkeeper_core::{
    decision::{Decision, Reason, Scope, StepName},
    effect::{Effect, Promotion, Server},
    event::{BaselineOrigin, Event, Record},
    ids::{MemberId, ReplId, Seq, ShardId, Timestamp, WriterEpoch},
    observation::{Evidence, Link, Observed, Reading, ServerFacts, ServerRole, Source},
};
use valkeeper_journal::{
    Backend, Hash, Journal, Memory, Segments, Sled, Stored, StreamId, encode, segments::MemoryObjects,
};

/// Appends per row: enough for a p99 of 10 samples, few enough for the whole table to take seconds.
const APPENDS: usize = 1000;
/// A row ends after this long with fewer appends: six rows sync, so on the slowest disk they take 24 s.
const ROW_MAX: Duration = Duration::from_secs(4);

fn stream() -> StreamId {
    StreamId("7d6ff6a5-1b2c-4d3e-8f90-0123456789ab".to_owned())
}

fn baseline() -> Event {
    let (namespace, name) = ("shop".to_owned(), "orders".to_owned());
    Event::Baseline { cluster_uid: stream().0, namespace, name, origin: BaselineOrigin::Empty }
}

fn server(number: usize) -> Event {
    let facts = ServerFacts {
        run_id: format!("{number:040x}"),
        version: "9.1.2".to_owned(),
        role: ServerRole::Replica { source: Source::Member(MemberId::new(0, 0)), link: Link::Up },
        loading: false,
        replid: ReplId("8f3a".repeat(10)),
        replid2: None,
        replid2_offset: None,
    };
    Event::ServerChanged {
        member: MemberId::new((number % 3) as u16, (number % 5) as u16),
        server: Observed::Present(facts),
    }
}

fn decided(number: usize) -> Event {
    let member = MemberId::new(0, (number % 3) as u16);
    let mut decision = Decision::new(StepName::Failover, Scope::Shard(ShardId(0)), Reason::PrimaryGone);
    let server = Server { member, address: "10.1.2.3".to_owned(), run_id: format!("{number:040x}") };
    decision.effects.push(Effect::Promote {
        server,
        replid: ReplId("8f3a".repeat(10)),
        offset: number as i64,
        consents: 0,
        by: Promotion::Detach,
    });
    let reading = Reading {
        taken_at: Timestamp(number as i64),
        offset: number as i64,
        last_io_ms: Some(12),
        replicas_online: 0,
        keys: None,
    };
    let readings = (0..3).map(|ordinal| (MemberId::new(0, ordinal), reading.clone())).collect();
    Event::Decided { decision: Box::new(decision), evidence: Evidence { readings, ..Evidence::default() } }
}

/// Nine facts, one decision.
fn event(number: usize) -> Event {
    if number % 10 == 9 { decided(number) } else { server(number) }
}

/// A stream that verifies: it begins with its Baseline and its writer.
fn event_at(seq: u64) -> Event {
    match seq {
        1 => baseline(),
        2 => Event::EpochStarted {
            writer: "bench".to_owned(),
            version: "0.1.0".to_owned(),
            lost_through: None,
        },
        _ => event(seq as usize),
    }
}

fn main() {
    // Everything that takes longer than half a minute.
    let is_all = std::env::args().any(|arg| arg == "--all");
    let begin = Instant::now();
    let dir = std::env::current_dir().unwrap().join("../target/bench-journal");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    println!(
        "{:<40} {:>9} {:>9} {:>9} {:>9} {:>11} {:>7}",
        "durable append", "p50 us", "p99 us", "max us", "rec/s", "bytes/rec", "x bare"
    );
    for batch in [1, 10] {
        let path = |name: &str| dir.join(format!("{name}-{batch}"));
        let bare = alternatives::bare(&path("bare"), batch);
        row(&format!("bare append + fdatasync, {batch}"), &bare, batch, None);
        let others: [(&str, Samples); 7] = [
            ("plain file, written ahead", alternatives::written_ahead(&path("ahead"), batch)),
            ("plain file, written ahead, and an anchor", alternatives::anchored(&path("anchored"), batch)),
            ("redb", alternatives::redb(&path("redb"), batch)),
            ("sled flush only (loses data)", alternatives::sled_plain(&path("plain"), batch)),
            ("sled", runtime.block_on(journal(Arc::new(Sled::open(&path("sled")).unwrap()), batch))),
            ("memory", runtime.block_on(journal(Arc::new(Memory::new()), batch))),
            ("segments over memory", {
                let segments = Arc::new(Segments::new(Arc::new(MemoryObjects::new())));
                runtime.block_on(journal(segments, batch))
            }),
        ];
        for (name, samples) in &others {
            row(&format!("{name}, {batch}"), samples, batch, Some(&bare));
        }
    }
    group::table(&dir);
    reading::fold();
    reading::start(&dir, is_all);
    fs::remove_dir_all(&dir).unwrap();
    println!("\n{:<40} {:>9.1} s", "all of this", begin.elapsed().as_secs_f64());
}

struct Samples {
    took: Vec<Duration>,
    bytes: usize,
}

fn row(name: &str, samples: &Samples, batch: usize, bare: Option<&Samples>) {
    let p = |s: &Samples, percent: usize| {
        let mut sorted = s.took.clone();
        sorted.sort();
        sorted[(sorted.len() - 1) * percent / 100].as_secs_f64() * 1e6
    };
    let total: f64 = samples.took.iter().map(Duration::as_secs_f64).sum();
    let records = (samples.took.len() * batch) as f64;
    let ratio = bare.map_or("1.00".to_owned(), |b| format!("{:.2}", p(samples, 50) / p(b, 50)));
    println!(
        "{name:<40} {:>9.1} {:>9.1} {:>9.1} {:>9.0} {:>11.0} {ratio:>7}",
        p(samples, 50),
        p(samples, 99),
        p(samples, 100),
        records / total,
        samples.bytes as f64 / records,
    );
}

/// Frames as the journal would write them.
fn sealed(batches: usize, batch: usize) -> Vec<Vec<Stored>> {
    let mut prev = Hash::ZERO;
    let mut seq = 0;
    let mut seal = |_| {
        seq += 1;
        let record = Record {
            seq: Seq(seq),
            epoch: WriterEpoch(1),
            time: Timestamp(seq as i64),
            event: event_at(seq),
        };
        let stored = Stored::seal(record, prev).unwrap();
        prev = stored.hash;
        stored
    };
    (0..batches).map(|_| (0..batch).map(&mut seal).collect()).collect()
}

fn timed(batches: usize, batch: usize, mut write: impl FnMut(Vec<u8>)) -> Samples {
    let (mut took, mut bytes) = (Vec::new(), 0);
    let row = Instant::now();
    for records in sealed(batches, batch) {
        if row.elapsed() > ROW_MAX {
            break;
        }
        let begin = Instant::now();
        let frames: Vec<u8> = records.iter().flat_map(encode).collect();
        bytes += frames.len();
        write(frames);
        took.push(begin.elapsed());
    }
    Samples { took, bytes }
}

async fn journal(backend: Arc<dyn Backend>, batch: usize) -> Samples {
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.claim(Some(baseline()), "bench", "0.1.0", Timestamp(0)).await.unwrap();
    let (mut took, mut number) = (Vec::new(), 0);
    let row = Instant::now();
    while took.len() < APPENDS && row.elapsed() < ROW_MAX {
        let events = (number..number + batch).map(event).collect();
        number += batch;
        let begin = Instant::now();
        journal.append(events, Timestamp(number as i64)).await.unwrap();
        took.push(begin.elapsed());
    }
    let bytes = backend.read(&stream()).await.unwrap().bytes();
    Samples { took, bytes }
}
