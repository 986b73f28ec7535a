//! Two stores as one, and the mirror dead, hung, of another node, or of a history that a person gave up.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use async_trait::async_trait;
use common::{at, baseline, fact, stream, whole};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};
use valkeeper_core::{
    event::Event,
    ids::{Seq, WriterEpoch},
    observation::SpecFact,
};
use valkeeper_journal::{
    Anchor, AppendError, Backend, BackendError, Claim, Error, Folded, Head, Journal, Memory, Reader,
    Segments, Stored, StreamId, Tiered,
    segments::{Body, MemoryObjects},
};

const WELL: u8 = 0;
const DEAD: u8 = 1;
const HUNG: u8 = 2;

/// A mirror on a disk that fails, or does not answer.
struct Ailing {
    disk: Memory,
    state: AtomicU8,
}

impl Ailing {
    fn new() -> Arc<Ailing> {
        Arc::new(Ailing { disk: Memory::new(), state: AtomicU8::new(WELL) })
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::SeqCst);
    }

    async fn answer(&self) -> Result<(), BackendError> {
        match self.state.load(Ordering::SeqCst) {
            WELL => Ok(()),
            DEAD => Err(BackendError::Poisoned("EIO".to_owned())),
            _ => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Backend for Ailing {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        self.answer().await?;
        self.disk.streams().await
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        self.answer().await?;
        self.disk.read(stream).await
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        self.answer().await?;
        self.disk.head(stream).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.answer().await.map_err(|e| AppendError::Poisoned(e.to_string()))?;
        self.disk.append(stream, expected, records, cut).await
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.answer().await?;
        self.disk.forget(stream).await
    }
}

/// Waits until a condition holds: the mirror is written by a task of its own.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let held = async {
        while !holds().await {
            tokio::task::yield_now().await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), held).await.is_ok(), "not within 10 s: {what}");
}

async fn until_same(one: &dyn Backend, other: &dyn Backend) {
    until("the copies are the same", async || whole(one).await == whole(other).await).await;
}

async fn claimed(backend: &Arc<dyn Backend>, lost_through: Option<Seq>) -> Journal {
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    let genesis = journal.head().is_none().then(|| baseline(&stream()));
    let claim = Claim { genesis, writer: "w", version: "v", above: WriterEpoch(0), lost_through };
    journal.claim_as(claim, at(1)).await.unwrap();
    journal
}

async fn write(journal: &mut Journal, from: u16, records: u16) {
    for round in from..from + records {
        journal.append(vec![fact(round)], at(2)).await.unwrap();
    }
}

fn place(head: &Head) -> Option<Anchor> {
    Some(Anchor { seq: head.seq, hash: head.hash })
}

#[tokio::test]
async fn a_mirror_that_hangs_holds_up_no_claim_and_no_acceptance() {
    let (first, mirror) = (Arc::new(Memory::new()), Ailing::new());
    let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    let mut journal = claimed(&tiered, None).await;
    write(&mut journal, 0, 10).await;
    until_same(&*first, &mirror.disk).await;
    mirror.set(HUNG);
    let bound = Duration::from_secs(15);
    let (again, _) =
        tokio::time::timeout(bound, Journal::open(tiered.clone(), stream())).await.unwrap().unwrap();
    assert_eq!(again.head(), journal.head());
    tokio::time::timeout(bound, journal.maintain()).await.unwrap().unwrap();
    tokio::time::timeout(bound, tiered.accept_loss(&stream())).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_damaged_can_be_given_up_while_the_mirrors_disk_is_dead() {
    let (objects, mirror) = (Arc::new(MemoryObjects::new()), Ailing::new());
    let tiered: Arc<dyn Backend> =
        Arc::new(Tiered::new(Arc::new(Segments::new(objects.clone())), mirror.clone()));
    write(&mut claimed(&tiered, None).await, 0, 10).await;
    objects.edit(|all| all.values_mut().for_each(|object| object.body = Body::Text("edited".to_owned())));
    mirror.set(DEAD);
    let fresh: Arc<dyn Backend> =
        Arc::new(Tiered::new(Arc::new(Segments::new(objects.clone())), mirror.clone()));
    fresh.accept_loss(&stream()).await.unwrap();
    assert!(Journal::open(fresh.clone(), stream()).await.err().unwrap().is_damage());
    fresh.forget(&stream()).await.unwrap();
    assert_eq!(claimed(&fresh, Some(Seq(12))).await.head().unwrap().seq, Seq(2));
}

#[tokio::test]
async fn a_mirror_that_missed_an_accepted_loss_is_made_again_and_speaks_for_nothing() {
    for more in [0, 30] {
        let (first, mirror) = (Arc::new(Memory::new()), Ailing::new());
        let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
        let mut journal = claimed(&tiered, None).await;
        write(&mut journal, 0, 10).await;
        let lost = journal.head().unwrap().seq;
        until_same(&*first, &mirror.disk).await;
        first.forget(&stream()).await.unwrap();
        mirror.set(DEAD);
        tiered.accept_loss(&stream()).await.unwrap();
        let mut journal = claimed(&tiered, Some(lost)).await;
        write(&mut journal, 100, more).await;
        mirror.set(WELL);
        let (again, _) = Journal::open(tiered.clone(), stream()).await.unwrap();
        assert_eq!(again.head(), journal.head(), "{more} records later");
        journal.maintain().await.unwrap();
        until_same(&*first, &mirror.disk).await;
        assert_eq!(whole(&*first).await.records.len(), usize::from(more) + 2);
    }
}

#[tokio::test]
async fn a_mirror_of_another_history_is_told_of_while_the_operator_runs() {
    let (first, mirror) = (Arc::new(Memory::new()), Ailing::new());
    let alone: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), Arc::new(Memory::new())));
    let mut journal = claimed(&alone, None).await;
    write(&mut journal, 0, 10).await;
    let theirs: Arc<dyn Backend> = Arc::new(Tiered::new(mirror.clone(), Arc::new(Memory::new())));
    write(&mut claimed(&theirs, None).await, 50, 5).await;
    let kept = whole(&mirror.disk).await;
    let both = Tiered::new(first.clone(), mirror.clone());
    let mut told = None;
    until("the difference is told", async || {
        told = both.maintain(&stream()).await.err();
        told.is_some()
    })
    .await;
    let told = told.unwrap();
    assert!(told.is_damage() && told.to_string().contains("the second copy"), "{told}");
    assert_eq!(whole(&mirror.disk).await, kept);
}

#[tokio::test]
async fn why_a_mirror_cannot_be_written_is_told_and_stops_nothing() {
    let (first, mirror) = (Arc::new(Memory::new()), Ailing::new());
    let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    let mut journal = claimed(&tiered, None).await;
    mirror.set(DEAD);
    write(&mut journal, 0, 10).await;
    let mut told = None;
    until("the disk is told of", async || {
        told = tiered.maintain(&stream()).await.err();
        told.is_some()
    })
    .await;
    let told = told.unwrap();
    assert!(!told.is_broken() && told.to_string().contains("EIO"), "{told}");
    mirror.set(WELL);
    until("it is made again", async || {
        // What the task met before may still be told once.
        let _ = tiered.maintain(&stream()).await;
        whole(&*first).await == whole(&mirror.disk).await
    })
    .await;
}

/// An event that hardly packs.
fn dense(number: u64) -> Event {
    let mut x = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = String::new();
    for _ in 0..4 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        text.push_str(&format!("{x:016x} and some words "));
    }
    Event::SpecChanged(SpecFact::Invalid(text))
}

fn named(objects: &MemoryObjects, part: &str) -> Vec<String> {
    let mut found = Vec::new();
    objects.edit(|all| found = all.keys().filter(|name| name.contains(part)).cloned().collect());
    found
}

/// A mirrored stream that takes almost all that a stream may, `max` in bytes.
async fn nearly_full(max: usize) -> (Arc<MemoryObjects>, Arc<Memory>, Head) {
    let (objects, mirror) = (Arc::new(MemoryObjects::new()), Arc::new(Memory::new()));
    let first = Arc::new(Segments::with_limit(objects.clone(), max));
    let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    let mut journal = claimed(&tiered, None).await;
    for round in 0_u64..10_000 {
        let events = (0..8).map(|i| dense(round * 8 + i)).collect();
        match journal.append(events, at(2)).await {
            Ok(_) => {}
            Err(Error::Full { .. }) => {
                journal.maintain().await.unwrap();
                break;
            }
            Err(other) => panic!("{other:?}"),
        }
        if round.is_multiple_of(16) {
            journal.maintain().await.unwrap();
        }
    }
    tiered.maintain(&stream()).await.unwrap();
    until_same(&*first, &*mirror).await;
    let head = *journal.head().unwrap();
    assert!(first.read(&stream()).await.unwrap().bytes() > max / 10 * 9, "nearly full");
    (objects, mirror, head)
}

#[tokio::test]
async fn a_nearly_full_stream_is_repaired() {
    let max = 256 * 1024;
    let (objects, mirror, head) = nearly_full(max).await;
    let damaged = named(&objects, "-segment-")[3].clone();
    objects.edit(|all| all.get_mut(&damaged).unwrap().body = Body::Text("edited".to_owned()));
    let first = Arc::new(Segments::with_limit(objects.clone(), max));
    let fresh: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    fresh.repair(&stream(), place(&head)).await.unwrap();
    assert_eq!(whole(&*first).await, whole(&*mirror).await);
}

#[tokio::test]
async fn a_repair_for_which_there_is_no_room_says_so_and_does_not_pile_up_copies() {
    let (objects, mirror, head) = nearly_full(256 * 1024).await;
    let damaged = named(&objects, "-segment-")[3].clone();
    objects.edit(|all| all.get_mut(&damaged).unwrap().body = Body::Text("edited".to_owned()));
    let mut asides = Vec::new();
    for _ in 0..3 {
        let first = Arc::new(Segments::with_limit(objects.clone(), 128 * 1024));
        let fresh: Arc<dyn Backend> = Arc::new(Tiered::new(first, mirror.clone()));
        let refused = fresh.repair(&stream(), place(&head)).await.unwrap_err();
        assert!(matches!(refused, BackendError::Full { .. }) && refused.is_broken(), "{refused:?}");
        asides.push(named(&objects, "-aside-").len());
    }
    assert!(asides[0] > 3 && asides.iter().all(|count| *count == asides[0]), "{asides:?}");
}
