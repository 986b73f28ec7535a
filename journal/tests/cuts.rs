//! Streams whose beginning goes: what is left is the same history, whoever cut it and whatever went wrong meanwhile.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use async_trait::async_trait;
use common::{Dice, Scratch, at, baseline, big, fact, stream, whole};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use valkeeper_core::{
    event::{Event, Record},
    ids::{MemberId, NodeId, Seq, Timestamp},
    observation::{NodeFacts, SpecFact},
    slots::{SLOTS, SlotSet},
    state::ClusterState,
};
use valkeeper_journal::{
    Anchor, AppendError, Backend, BackendError, Carried, Error, Folded, Hash, Head, Journal, MayGo, Memory,
    Page, Problem, Reader, Retention, Segments, Sled, Stored, StreamId, Whole,
    archive::{Archive, BlobsFault, Branch, MemoryBlobs},
    backend::READ_ATTEMPTS_MAX,
    carry, export_line,
    memory::Fault,
    parts,
    segments::MemoryObjects,
    verify, verify_chain, verify_lines,
};

/// Bytes that a stream may have in these tests, and that are to be kept of it.
const MAX: usize = 200_000;
const KEEP: usize = 120_000;

fn keep(may_go: MayGo) -> Retention {
    Retention { keep_bytes: KEEP, keep_ms: None, may_go }
}

/// A spec of so many bytes that no store can make much smaller.
fn noise(seed: u16, bytes: usize) -> Event {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = String::new();
    while text.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(&format!("{state:016x}"));
    }
    Event::SpecChanged(SpecFact::Invalid(text))
}

type Open = Box<dyn Fn() -> Arc<dyn Backend>>;

/// Each kind of store.
fn stores() -> Vec<(&'static str, Open, Option<Scratch>)> {
    stores_of(MAX)
}

/// Each kind of store, with a limit for a stream in bytes.
fn stores_of(max: usize) -> Vec<(&'static str, Open, Option<Scratch>)> {
    let memory = Arc::new(Memory::new());
    memory.set_limit(max);
    let objects = Arc::new(MemoryObjects::new());
    let scratch = Scratch::new("cuts");
    let dir = scratch.path("store");
    vec![
        ("memory", Box::new(move || memory.clone()), None),
        ("segments", Box::new(move || Arc::new(Segments::with_limit(objects.clone(), max))), None),
        ("sled", Box::new(move || Arc::new(Sled::open_with_limit(&dir, max).unwrap())), Some(scratch)),
    ]
}

/// A writer, and everything that it was told is written.
struct Told {
    journal: Journal,
    records: Vec<Record>,
}

impl Told {
    async fn claimed(backend: Arc<dyn Backend>, retention: Option<Retention>) -> Told {
        let (mut journal, _) = Journal::open(backend, stream()).await.unwrap();
        if let Some(retention) = retention {
            journal.retain(retention);
        }
        let claimed = journal.claim(Some(baseline(&stream())), "w", "v", at(1)).await.unwrap();
        Told { journal, records: claimed.records }
    }

    async fn append(&mut self, events: Vec<Event>, now: Timestamp) -> Result<(), Error> {
        self.records.extend(self.journal.append(events, now).await?.records);
        Ok(())
    }

    async fn trim(&mut self, now: Timestamp) -> usize {
        let trimmed = self.journal.trim(now).await.unwrap().records;
        let count = trimmed.len();
        self.records.extend(trimmed);
        count
    }

    fn cuts(&self) -> usize {
        self.records.iter().filter(|r| matches!(r.event, Event::Trimmed { .. })).count()
    }
}

/// What is left must be the end of what was told, fold to the same state, and verify.
async fn check(name: &str, backend: &dyn Backend, told: &[Record]) -> Whole {
    let left = whole(backend).await;
    assert_eq!(verify(left.folded.as_ref(), &left.records).problems, [], "{name}");
    let records: Vec<Record> = left.records.iter().map(|s| s.record.clone()).collect();
    let gone = told.len() - records.len();
    assert_eq!(records, told[gone..], "{name}");
    match &left.folded {
        None => assert_eq!(gone, 0, "{name}"),
        Some(folded) => {
            assert_eq!(folded.head().seq, Seq(gone as u64), "{name}");
            assert_eq!(*folded.state(), ClusterState::fold(&told[..gone]), "{name}");
        }
    }
    left
}

#[tokio::test]
async fn an_append_that_finds_the_stream_full_cuts_it_and_everything_goes_on() {
    for (name, open, _scratch) in stores() {
        let backend = open();
        let mut told = Told::claimed(backend.clone(), Some(keep(MayGo::Any))).await;
        for round in 0..300_u16 {
            told.append(vec![fact(round), noise(round, 3_000)], at(2 + i64::from(round))).await.unwrap();
        }
        assert!(told.cuts() >= 2, "{name}: {} cuts", told.cuts());
        let left = check(name, &*backend, &told.records).await;
        assert!(left.folded.is_some(), "{name}");
        drop((told.journal, backend));
        let (journal, state) = Journal::open(open(), stream()).await.unwrap();
        assert_eq!(state, ClusterState::fold(&told.records), "{name}");
        assert_eq!(journal.head().unwrap().seq, told.records.last().unwrap().seq, "{name}");
    }
}

#[tokio::test]
async fn without_retention_a_full_stream_stays_full() {
    for (name, open, _scratch) in stores() {
        let mut told = Told::claimed(open(), None).await;
        let mut refused = None;
        for round in 0..400_u16 {
            refused = told.append(vec![noise(round, 3_000)], at(2)).await.err();
            if refused.is_some() {
                break;
            }
        }
        assert!(matches!(refused, Some(Error::Full { max: MAX, .. })), "{name}: {refused:?}");
        assert_eq!(told.cuts(), 0);
    }
}

#[tokio::test]
async fn a_quiet_cut_takes_a_quarter_and_the_next_one_nothing() {
    for (name, open, _scratch) in stores() {
        let backend = open();
        let mut told = Told::claimed(backend.clone(), Some(keep(MayGo::Any))).await;
        let mut quiet = 0;
        for round in 0..300_u16 {
            told.append(vec![noise(round, 2_000)], at(2)).await.unwrap();
            if told.trim(at(2)).await > 0 {
                quiet += 1;
                assert_eq!(told.trim(at(2)).await, 0, "{name}: a cut is followed by none");
                assert!(backend.read(&stream()).await.unwrap().bytes() <= KEEP, "{name}");
            }
        }
        assert!(quiet >= 1, "{name}");
        assert_eq!(told.cuts(), quiet, "{name}: no append found it full");
        check(name, &*backend, &told.records).await;
    }
}

#[tokio::test]
async fn records_go_by_age_although_there_is_room() {
    for (name, open, _scratch) in stores() {
        let backend = open();
        let aged = Retention { keep_bytes: MAX, keep_ms: Some(60_000), may_go: MayGo::Any };
        let mut told = Told::claimed(backend.clone(), Some(aged)).await;
        for round in 0..120_i64 {
            told.append(vec![big(1_200)], at(10 + round / 2)).await.unwrap();
        }
        assert_eq!(told.trim(at(60)).await, 0, "{name}: nothing is a minute old");
        assert_eq!(told.trim(at(10 + 60 + 50)).await, 1, "{name}");
        let left = check(name, &*backend, &told.records).await;
        assert!(left.folded.unwrap().head().time < at(60), "{name}");
    }
}

#[tokio::test]
async fn nothing_goes_before_it_is_in_the_archive_and_was_read_back() {
    let (blobs, memory) = (Arc::new(MemoryBlobs::new()), Arc::new(Memory::new()));
    memory.set_limit(MAX);
    let archive = Archive::new(blobs.clone());
    let nowhere = |through| MayGo::Archived { through, place: "memory".to_owned() };
    let mut told = Told::claimed(memory.clone(), Some(keep(nowhere(Seq(0))))).await;
    let mut appended = 0;
    let full = loop {
        match told.append(vec![big(2_000)], at(2)).await {
            Ok(()) => appended += 1,
            Err(error) => break error,
        }
        assert!(appended < 1_000);
    };
    assert!(matches!(full, Error::Full { .. }), "{full:?}");
    assert_eq!(told.trim(at(3)).await, 0);
    blobs.inject(BlobsFault::Unavailable);
    let retention = keep(nowhere(Seq(0)));
    let refused = carry(&*memory, &stream(), &retention, &archive, at(3)).await.unwrap_err();
    assert!(matches!(refused, Error::Archive(_)) && !refused.is_broken(), "{refused:?}");
    blobs.clear_faults();
    let carried = carry(&*memory, &stream(), &retention, &archive, at(3)).await.unwrap().unwrap();
    let Carried { through, segments } = carried;
    assert_eq!(segments, 1);
    let again = carry(&*memory, &stream(), &retention, &archive, at(3)).await.unwrap();
    assert_eq!(again, Some(Carried { through, segments: 0 }), "it was there");
    told.journal.retain(keep(nowhere(through)));
    told.append(vec![big(2_000)], at(4)).await.unwrap();
    assert_eq!(told.cuts(), 1);
    let left = check("archived", &*memory, &told.records).await;
    let cut = left.folded.unwrap().head().seq;
    assert!(cut <= through);
    // The archive and what is left are one chain.
    let mut pages = archive.read(&Branch::first(stream())).await.unwrap();
    let mut all = Vec::new();
    while let Some(page) = pages.next().await.unwrap() {
        all.extend(page);
    }
    let overlap = left.records.iter().filter(|s| s.record.seq > through);
    all.extend(overlap.cloned());
    assert_eq!(verify_chain(None, &all).unwrap().as_ref(), told.journal.head());
}

/// A store that is tidied while it is read, so many times.
struct Tidied {
    store: Memory,
    times: AtomicUsize,
}

/// What is read meanwhile: everything but the end.
struct Interrupted(Box<dyn Reader>, usize);

#[async_trait]
impl Reader for Interrupted {
    fn folded(&self) -> Option<&Folded> {
        self.0.folded()
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        self.1 = self.1.checked_sub(1).ok_or(BackendError::Moved)?;
        self.0.page().await
    }
}

#[async_trait]
impl Backend for Tidied {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        self.store.streams().await
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        let reader = self.store.read(stream).await?;
        let left = self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |times| times.checked_sub(1));
        Ok(if left.is_ok() { Box::new(Interrupted(reader, 2)) } else { reader })
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        self.store.head(stream).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.store.append(stream, expected, records, cut).await
    }
}

#[tokio::test]
async fn a_carry_from_a_store_that_is_tidied_meanwhile_reads_again_and_ends() {
    let tidied = Arc::new(Tidied { store: Memory::new(), times: AtomicUsize::new(0) });
    let mut told = Told::claimed(tidied.clone(), None).await;
    for round in 0..150 {
        told.append(vec![noise(round, 2_000)], at(2)).await.unwrap();
    }
    let archive = Archive::new(Arc::new(MemoryBlobs::new()));
    let carry = async |times: usize| {
        tidied.times.store(times, Ordering::SeqCst);
        carry(&*tidied, &stream(), &keep(MayGo::Any), &archive, at(3)).await
    };
    let never = carry(READ_ATTEMPTS_MAX).await.unwrap_err();
    assert!(matches!(never, Error::Backend(BackendError::Moved)), "{never:?}");
    assert!(never.is_certain() && !never.is_broken());
    let carried = carry(READ_ATTEMPTS_MAX - 1).await.unwrap().unwrap();
    assert!(carried.through > Seq(1) && carried.segments > 0, "{carried:?}");
    assert_eq!(carry(0).await.unwrap(), Some(Carried { segments: 0, ..carried }));
}

#[tokio::test]
async fn a_cut_whose_answer_is_lost_happens_once_or_not_at_all() {
    for fault in
        [Fault::AmbiguousCommitted, Fault::AmbiguousNotCommitted, Fault::AmbiguousLate, Fault::Conflict]
    {
        for retries in 0..4 {
            let memory = Arc::new(Memory::new());
            let mut told = Told::claimed(memory.clone(), Some(keep(MayGo::Any))).await;
            for round in 0..60_u16 {
                told.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
            }
            (0..=retries).for_each(|_| memory.inject(fault));
            let trimmed = told.journal.trim(at(3)).await;
            memory.deliver_late();
            memory.clear_faults();
            let settled = match trimmed {
                Ok(appended) => appended,
                Err(Error::Unresolved(_)) => told.journal.resolve().await.unwrap().unwrap(),
                Err(other) => panic!("{fault:?}: {other:?}"),
            };
            told.records.extend(settled.records);
            told.append(vec![fact(99)], at(4)).await.unwrap();
            assert_eq!(told.cuts(), 1, "{fault:?} {retries}");
            let left = check("ambiguous", &*memory, &told.records).await;
            assert!(left.folded.is_some(), "{fault:?} {retries}");
        }
    }
}

async fn cut() -> (Arc<Memory>, Told) {
    let memory = Arc::new(Memory::new());
    let mut told = Told::claimed(memory.clone(), Some(keep(MayGo::Any))).await;
    for round in 0..60_u16 {
        told.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
    }
    assert_eq!(told.trim(at(3)).await, 1);
    (memory, told)
}

#[tokio::test]
async fn a_stream_must_hold_what_is_remembered_of_it_outside() {
    let (memory, told) = cut().await;
    let left = whole(&*memory).await;
    let folded = left.folded.unwrap();
    let open = |seq, hash| Journal::open_anchored(memory.clone(), stream(), Some(Anchor { seq, hash }));
    for stored in &left.records {
        open(stored.record.seq, stored.hash).await.unwrap();
    }
    open(folded.head().seq, folded.head().hash).await.unwrap();
    // Older than the cut: only its being there can be seen, and the cut says so.
    open(Seq(2), Hash([9; 32])).await.unwrap();
    let last = told.journal.head().unwrap();
    for (seq, hash) in [
        (last.seq.next(), last.hash),
        (last.seq, Hash([9; 32])),
        (folded.head().seq, Hash([9; 32])),
        (left.records[3].record.seq, Hash([9; 32])),
    ] {
        let refused = open(seq, hash).await.err().unwrap();
        let behind =
            matches!(&refused, Error::Backend(BackendError::BehindAnchor { anchor, .. }) if *anchor == seq);
        assert!(behind && refused.is_broken(), "{seq}: {refused:?}");
    }
    let empty: Arc<dyn Backend> = Arc::new(Memory::new());
    let anchor = Anchor { seq: Seq(1), hash: Hash([1; 32]) };
    let refused = Journal::open_anchored(empty, stream(), Some(anchor)).await.err().unwrap();
    assert!(refused.to_string().contains("cannot be read"), "{refused}");
}

#[tokio::test]
async fn a_beginning_that_no_record_names_is_no_beginning() {
    let (memory, _) = cut().await;
    let Whole { folded, records } = whole(&*memory).await;
    let folded = folded.unwrap();
    let mut state = folded.state().clone();
    state.released = !state.released;
    let edited = Folded::new(&stream(), *folded.head(), folded.lineage(), &state).unwrap();
    let problems = verify(Some(&edited), &records).problems;
    assert_eq!(problems, [Problem::Unnamed { through: folded.head().seq, digest: edited.digest() }]);
    // Neither does a stream begin in the middle of nothing.
    assert!(matches!(verify(None, &records).problems[..], [Problem::Baseline { .. }, ..]));
}

#[tokio::test]
async fn an_export_of_a_cut_stream_verifies_and_an_edit_of_its_first_line_shows() {
    let (memory, told) = cut().await;
    let Whole { folded, records } = whole(&*memory).await;
    let folded = folded.unwrap();
    let lines: Vec<String> = records.iter().map(export_line).collect();
    let export = format!("{}\n{}\n", folded.text(), lines.join("\n"));
    let report = verify_lines(export.as_bytes());
    assert_eq!((report.problems, report.trimmed), (vec![], Some(folded.head().seq)));
    assert_eq!(report.head.as_ref(), told.journal.head());
    let edited = export.replacen("\"released\":false", "\"released\":true", 1);
    assert!(matches!(verify_lines(edited.as_bytes()).problems[..], [Problem::Unnamed { .. }]));
    let headless = format!("{}\n", lines.join("\n"));
    assert!(!verify_lines(headless.as_bytes()).is_intact());
}

/// Members of the largest cluster that a spec allows.
const MEMBERS: u16 = 96;

/// What the first look at the largest cluster brings, with IPv6: each node names every other.
fn first_look() -> Vec<Event> {
    let mut dice = Dice::of(96);
    let mut groups = |n: usize| (0..n).map(|_| format!("{:04x}", dice.roll(0x1_0000))).collect::<Vec<_>>();
    let names: Vec<(NodeId, String)> =
        (0..MEMBERS).map(|_| (groups(10).concat().parse().unwrap(), groups(8).join(":"))).collect();
    let id = |n: u16| names[usize::from(n)].0.clone();
    let node = |n: u16| NodeFacts {
        id: id(n),
        primary: None,
        epoch: 1,
        slots: SlotSet::default(),
        knows: names
            .iter()
            .filter(|(other, _)| *other != id(n))
            .map(|(id, at)| (id.clone(), Some(at.clone())))
            .collect(),
        meeting: BTreeSet::new(),
        failed: BTreeSet::new(),
        covered: SLOTS,
        exports: Vec::new(),
        exports_unread: false,
        import_failed: None,
        migrating: BTreeMap::new(),
        importing: BTreeMap::new(),
        down: false,
    };
    (0..MEMBERS).map(|n| Event::NodeChanged { member: MemberId::new(n / 6, n % 6), node: node(n) }).collect()
}

#[tokio::test]
async fn what_is_seen_of_the_largest_cluster_is_recorded_and_cut() {
    for (name, open, _scratch) in stores_of(48 * 1024 * 1024) {
        let retention = Retention { keep_bytes: 0, keep_ms: None, may_go: MayGo::Any };
        let mut told = Told::claimed(open(), Some(retention)).await;
        let look = first_look();
        let whole_look = told.append(look.clone(), at(2)).await;
        assert!(
            matches!(whole_look, Err(Error::BatchTooLarge { bytes: 700_000.., .. })),
            "{name}: {whole_look:?}"
        );
        let parts = parts(look).appends;
        assert!(parts.len() > 2, "{name}: {} parts", parts.len());
        for part in parts {
            told.append(part, at(2)).await.unwrap();
        }
        // What the end holds is not cut: something must follow.
        for n in 0..200 {
            told.append(vec![noise(n, 2_000)], at(3)).await.unwrap();
        }
        assert_eq!(told.trim(at(4)).await, 1, "{name}");
        drop(told.journal);
        let left = check(name, &*open(), &told.records).await;
        let folded = left.folded.unwrap();
        assert!(folded.text().len() > 700_000, "{name}: {}", folded.text().len());
        assert_eq!(folded.state().members.len(), usize::from(MEMBERS), "{name}");
    }
}
