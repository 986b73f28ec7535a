//! Events and scratch directories for the tests of the backends.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses its part; a failed step is a failed test

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use valkeeper_core::{
    decision::{Decision, Reason, Scope, StepName},
    event::{BaselineOrigin, Event, Record},
    ids::{MemberId, ShardId, Timestamp},
    observation::{Evidence, Observed, SpecFact},
};
use valkeeper_journal::{Backend, Journal, Stored, StreamId, Whole, read_all};

/// The stream that most tests use.
pub fn stream() -> StreamId {
    StreamId("7d6ff6a5-1b2c-4d3e-8f90-0123456789ab".to_owned())
}

/// Everything of the stream.
pub async fn whole(backend: &dyn Backend) -> Whole {
    read_all(backend, &stream()).await.unwrap()
}

/// Every record of a stream that was never cut.
pub async fn all(backend: &dyn Backend) -> Vec<Stored> {
    let Whole { folded, records } = whole(backend).await;
    assert_eq!(folded, None);
    records
}

/// Opens a stream that was never cut; also its records.
pub async fn opened(
    backend: Arc<dyn Backend>,
    stream: StreamId,
) -> Result<(Journal, Vec<Record>), valkeeper_journal::Error> {
    let (journal, _) = Journal::open(backend.clone(), stream.clone()).await?;
    let Whole { folded, records } = read_all(backend.as_ref(), &stream).await?;
    assert_eq!(folded, None);
    Ok((journal, records.into_iter().map(|stored| stored.record).collect()))
}

/// The first event of a stream.
pub fn baseline(stream: &StreamId) -> Event {
    Event::Baseline {
        cluster_uid: stream.0.clone(),
        namespace: "shop".to_owned(),
        name: "orders".to_owned(),
        origin: BaselineOrigin::Empty,
    }
}

/// A fact; another number is another fact.
pub fn fact(number: u16) -> Event {
    Event::PodChanged { member: MemberId::new(0, number), pod: Observed::Absent }
}

/// A fact of about this many bytes.
pub fn big(bytes: usize) -> Event {
    Event::SpecChanged(SpecFact::Invalid("x".repeat(bytes)))
}

/// A decision.
pub fn decided() -> Event {
    let decision = Decision::new(StepName::Failover, Scope::Shard(ShardId(0)), Reason::PrimaryGone);
    Event::Decided { decision: Box::new(decision), evidence: Evidence::default() }
}

/// Some time, in seconds since the epoch.
pub fn at(seconds: i64) -> Timestamp {
    Timestamp(seconds * 1_000_000_000)
}

/// A directory that is removed at the end of the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("valkeeper-it-{}-{name}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies a directory, in the place of what is there.
pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// xorshift64*: enough for choices, and the same everywhere.
pub struct Dice(u64);

impl Dice {
    /// Each seed rolls its own numbers.
    pub fn of(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize]
    }
}
