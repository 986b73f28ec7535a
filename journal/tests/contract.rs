//! What every backend must do: each test below runs over memory, sled and segments.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{Scratch, all, at, baseline, big, decided, fact, opened, stream};
use std::sync::Arc;
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, WriterEpoch},
};
use valkeeper_journal::{
    AppendError, Backend, Claim, Error, Hash, Journal, Lineage, Memory, Segments, Sled, Stored, StreamId,
    archive::{Archive, Branch, MemoryBlobs},
    decode_stream, encode, export_line, import_lines,
    record::RECORD_BYTES_MAX,
    retire,
    segments::MemoryObjects,
    verify, verify_chain, verify_lines,
};

/// A store under test, which can be closed and opened again with what is in it.
struct Store {
    backend: Option<Arc<dyn Backend>>,
    open: Box<dyn Fn(usize) -> Arc<dyn Backend>>,
}

/// Bytes of a stream that no test but the one about full streams reaches.
const ROOMY: usize = 8 * 1024 * 1024;

impl Store {
    fn new(open: impl Fn(usize) -> Arc<dyn Backend> + 'static) -> Store {
        Store { backend: Some(open(ROOMY)), open: Box::new(open) }
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone().unwrap()
    }

    fn reopen(&mut self, bytes_max: usize) -> Arc<dyn Backend> {
        self.backend = None;
        self.backend = Some((self.open)(bytes_max));
        self.backend()
    }
}

fn memory() -> Store {
    let kept = Arc::new(Memory::new());
    Store::new(move |max| {
        kept.set_limit(max);
        kept.clone()
    })
}

fn sled() -> Store {
    let scratch = Scratch::new("contract");
    Store::new(move |max| Arc::new(Sled::open_with_limit(&scratch.path("journal"), max).unwrap()))
}

fn segments() -> Store {
    let objects = Arc::new(MemoryObjects::new());
    Store::new(move |max| Arc::new(Segments::with_limit(objects.clone(), max)))
}

macro_rules! contract {
    ($($test:ident),+ $(,)?) => {
        mod memory_backend { $(#[tokio::test] async fn $test() { super::$test(super::memory()).await })+ }
        mod sled_backend { $(#[tokio::test] async fn $test() { super::$test(super::sled()).await })+ }
        mod segments_backend { $(#[tokio::test] async fn $test() { super::$test(super::segments()).await })+ }
    };
}

contract!(
    a_stream_that_was_never_written_is_empty,
    what_was_appended_is_read_back_after_reopening,
    every_decision_of_a_batch_is_handed_out_once,
    appending_nothing_writes_nothing,
    time_never_goes_back,
    an_append_before_the_claim_is_refused,
    a_new_stream_needs_its_own_baseline,
    the_second_writer_fences_the_first,
    a_claim_goes_above_what_others_remember,
    of_two_claims_at_once_one_wins,
    a_batch_after_another_head_is_refused_with_the_head_found,
    streams_do_not_touch_each_other,
    an_accepted_loss_of_nothing_changes_nothing,
    a_forgotten_stream_begins_anew_and_the_others_go_on,
    a_retired_stream_is_whole_in_the_archive_and_gone_from_the_store,
    the_largest_record_fits_and_a_larger_one_is_refused,
    a_batch_that_is_too_large_is_refused_whole,
    a_full_stream_says_so_and_stays_readable,
    thousands_of_records_survive_maintenance,
    the_chain_is_the_same_in_an_export,
    a_dropped_append_leaves_the_stream_in_doubt_and_is_settled,
);

async fn open(backend: Arc<dyn Backend>) -> (Journal, Vec<Record>) {
    opened(backend, stream()).await.unwrap()
}

async fn claimed(backend: Arc<dyn Backend>) -> Journal {
    let (mut journal, _) = open(backend).await;
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    journal
}

async fn a_stream_that_was_never_written_is_empty(store: Store) {
    let backend = store.backend();
    let (journal, records) = open(backend.clone()).await;
    assert!(records.is_empty());
    assert_eq!(journal.head(), None);
    assert_eq!(backend.streams().await.unwrap(), []);
    assert_eq!(backend.head(&stream()).await.unwrap(), None);
}

async fn what_was_appended_is_read_back_after_reopening(mut store: Store) {
    let mut journal = claimed(store.backend()).await;
    let first = journal.append(vec![fact(1), fact(2)], at(101)).await.unwrap();
    let second = journal.append(vec![fact(3)], at(102)).await.unwrap();
    let head = *journal.head().unwrap();
    drop(journal);
    let (journal, records) = open(store.reopen(ROOMY)).await;
    assert_eq!(records.len(), 5);
    assert_eq!(records[2..4], first.records);
    assert_eq!(records[4..], second.records);
    assert_eq!(records.iter().map(|r| r.seq.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(matches!(records[0].event, Event::Baseline { .. }));
    assert!(matches!(records[1].event, Event::EpochStarted { .. }));
    assert_eq!(journal.head(), Some(&head));
}

async fn every_decision_of_a_batch_is_handed_out_once(store: Store) {
    let mut journal = claimed(store.backend()).await;
    let appended = journal.append(vec![fact(1), decided(), fact(2), decided()], at(101)).await.unwrap();
    let places: Vec<_> = appended.decisions.iter().map(|d| (d.seq().0, d.epoch().0, d.time())).collect();
    assert_eq!(places, [(4, 1, at(101)), (6, 1, at(101))]);
    assert_eq!(journal.resolve().await.unwrap(), None);
}

async fn appending_nothing_writes_nothing(store: Store) {
    let mut journal = claimed(store.backend()).await;
    let head = *journal.head().unwrap();
    assert!(journal.append(Vec::new(), at(500)).await.unwrap().records.is_empty());
    assert_eq!(store.backend().head(&stream()).await.unwrap(), Some(head));
}

async fn time_never_goes_back(store: Store) {
    let mut journal = claimed(store.backend()).await;
    let appended = journal.append(vec![fact(1)], at(50)).await.unwrap();
    assert_eq!(appended.records[0].time, at(100));
}

async fn an_append_before_the_claim_is_refused(store: Store) {
    let (mut journal, _) = open(store.backend()).await;
    assert!(matches!(journal.append(vec![fact(1)], at(1)).await, Err(Error::NotClaimed)));
    claimed(store.backend()).await;
    let (mut journal, _) = open(store.backend()).await;
    assert!(matches!(journal.append(vec![fact(1)], at(1)).await, Err(Error::NotClaimed)));
}

async fn a_new_stream_needs_its_own_baseline(store: Store) {
    let (mut journal, _) = open(store.backend()).await;
    let other = baseline(&StreamId("another".to_owned()));
    for genesis in [None, Some(fact(1)), Some(other)] {
        assert!(matches!(journal.claim(genesis, "w", "v", at(1)).await, Err(Error::NoBaseline)));
    }
    assert_eq!(store.backend().head(&stream()).await.unwrap(), None);
}

async fn the_second_writer_fences_the_first(store: Store) {
    let mut old = claimed(store.backend()).await;
    old.append(vec![fact(1)], at(101)).await.unwrap();
    let mut new = claimed(store.backend()).await;
    assert_eq!(new.epoch(), Some(WriterEpoch(2)));
    let fenced = old.append(vec![decided()], at(102)).await.unwrap_err();
    assert!(matches!(fenced, Error::Fenced { by: WriterEpoch(2) }), "{fenced:?}");
    // For ever, and also for claims.
    assert!(old.append(vec![fact(2)], at(103)).await.unwrap_err().is_fenced());
    assert!(old.claim(None, "w", "v", at(104)).await.unwrap_err().is_fenced());
    assert!(old.resolve().await.unwrap_err().is_fenced());
    new.append(vec![fact(3)], at(103)).await.unwrap();
    let stored = all(&*store.backend()).await;
    assert!(verify(None, &stored).is_intact());
    assert!(!stored.iter().any(|s| matches!(s.record.event, Event::Decided { .. })));
}

async fn a_claim_goes_above_what_others_remember(store: Store) {
    let journal = claimed(store.backend()).await;
    let ours = journal.head().unwrap().epoch;
    drop(journal);
    let (mut journal, _) = open(store.backend()).await;
    let claim = |above| Claim { genesis: None, writer: "w", version: "v", above, lost_through: None };
    journal.claim_as(claim(WriterEpoch(700)), at(101)).await.unwrap();
    assert_eq!(journal.head().unwrap().epoch, WriterEpoch(701));
    let (mut journal, _) = open(store.backend()).await;
    journal.claim_as(claim(ours), at(102)).await.unwrap();
    assert_eq!(journal.head().unwrap().epoch, WriterEpoch(702));
    assert!(verify(None, &all(&*store.backend()).await).is_intact());
}

async fn of_two_claims_at_once_one_wins(store: Store) {
    drop(claimed(store.backend()).await);
    let (mut one, _) = open(store.backend()).await;
    let (mut two, _) = open(store.backend()).await;
    one.claim(None, "one", "v", at(101)).await.unwrap();
    assert!(two.claim(None, "two", "v", at(101)).await.unwrap_err().is_fenced());
    one.append(vec![fact(1)], at(102)).await.unwrap();
}

async fn a_batch_after_another_head_is_refused_with_the_head_found(store: Store) {
    let backend = store.backend();
    let journal = claimed(backend.clone()).await;
    let head = *journal.head().unwrap();
    let record = Record { seq: Seq(1), epoch: WriterEpoch(1), time: at(1), event: fact(1) };
    let stored = Stored::seal(record, Hash::ZERO).unwrap();
    let refused = backend.append(&stream(), None, std::slice::from_ref(&stored), None).await;
    assert!(
        matches!(refused, Err(AppendError::Conflict { actual: Some(found) }) if found == head),
        "{refused:?}"
    );
    let mut stale = head;
    stale.hash = Hash([1; 32]);
    let refused = backend.append(&stream(), Some(&stale), std::slice::from_ref(&stored), None).await;
    assert!(
        matches!(refused, Err(AppendError::Conflict { actual: Some(found) }) if found == head),
        "{refused:?}"
    );
    let other = StreamId("none".to_owned());
    let refused = backend.append(&other, Some(&head), &[stored], None).await;
    assert!(matches!(refused, Err(AppendError::Conflict { actual: None })), "{refused:?}");
    assert_eq!(all(&*backend).await.len(), 2);
}

async fn streams_do_not_touch_each_other(mut store: Store) {
    let names = [StreamId("a".to_owned()), StreamId("a-b".to_owned()), StreamId("b".to_owned())];
    for name in names.iter().rev() {
        let (mut journal, _) = opened(store.backend(), name.clone()).await.unwrap();
        journal.claim(Some(baseline(name)), "w", "v", at(1)).await.unwrap();
    }
    let backend = store.reopen(ROOMY);
    assert_eq!(backend.streams().await.unwrap(), names);
    for name in names {
        let (_, records) = opened(backend.clone(), name).await.unwrap();
        assert_eq!(records.len(), 2);
    }
}

async fn an_accepted_loss_of_nothing_changes_nothing(mut store: Store) {
    let backend = store.backend();
    let mut journal = claimed(backend.clone()).await;
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    backend.accept_loss(&stream()).await.unwrap();
    backend.accept_loss(&StreamId("never written".to_owned())).await.unwrap();
    journal.append(vec![fact(2)], at(102)).await.unwrap();
    drop((journal, backend));
    let backend = store.reopen(ROOMY);
    assert_eq!(backend.streams().await.unwrap(), [stream()]);
    assert_eq!(open(backend).await.1.len(), 4);
}

async fn a_forgotten_stream_begins_anew_and_the_others_go_on(mut store: Store) {
    let backend = store.backend();
    let other = StreamId("another".to_owned());
    let (mut beside, _) = opened(backend.clone(), other.clone()).await.unwrap();
    beside.claim(Some(baseline(&other)), "w", "v", at(1)).await.unwrap();
    let mut journal = claimed(backend.clone()).await;
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    backend.forget(&stream()).await.unwrap();
    backend.forget(&StreamId("never written".to_owned())).await.unwrap();
    assert_eq!(backend.head(&stream()).await.unwrap(), None);
    assert_eq!(backend.streams().await.unwrap(), std::slice::from_ref(&other));
    beside.append(vec![fact(2)], at(102)).await.unwrap();
    // Who wrote it is over.
    assert!(journal.append(vec![fact(2)], at(102)).await.unwrap_err().is_broken());
    drop((journal, beside, backend));
    let backend = store.reopen(ROOMY);
    assert_eq!(claimed(backend.clone()).await.head().unwrap().seq, Seq(2));
    assert_eq!(opened(backend, other).await.unwrap().1.len(), 3);
}

async fn a_retired_stream_is_whole_in_the_archive_and_gone_from_the_store(mut store: Store) {
    let backend = store.backend();
    let other = StreamId("another".to_owned());
    let (mut beside, _) = opened(backend.clone(), other.clone()).await.unwrap();
    beside.claim(Some(baseline(&other)), "w", "v", at(1)).await.unwrap();
    let mut journal = claimed(backend.clone()).await;
    for number in 0..40 {
        journal.append(vec![fact(number), big(3_000)], at(101)).await.unwrap();
    }
    let records = all(backend.as_ref()).await;
    let archive = Archive::new(Arc::new(MemoryBlobs::default()));
    let retired = retire(backend.as_ref(), &stream(), Some(&archive)).await.unwrap().unwrap();
    assert_eq!((Some(&retired.head), retired.records), (journal.head(), records.len()));
    assert!(retired.segments > 0);
    let branch = Branch { stream: stream(), lineage: Lineage::FIRST };
    let (mut pages, mut archived) = (archive.read(&branch).await.unwrap(), Vec::new());
    while let Some(page) = pages.next().await.unwrap() {
        archived.extend(page);
    }
    assert_eq!(archived, records);
    assert_eq!(backend.streams().await.unwrap(), std::slice::from_ref(&other));
    assert_eq!(backend.half_removed().await.unwrap(), []);
    assert_eq!(retire(backend.as_ref(), &stream(), Some(&archive)).await.unwrap(), None, "there is none");
    drop((journal, beside, backend));
    let backend = store.reopen(ROOMY);
    assert_eq!(backend.head(&stream()).await.unwrap(), None);
    assert_eq!(opened(backend, other).await.unwrap().1.len(), 2);
}

async fn the_largest_record_fits_and_a_larger_one_is_refused(mut store: Store) {
    let mut journal = claimed(store.backend()).await;
    let head = *journal.head().unwrap();
    let overhead = {
        let record = Record { seq: Seq(1), epoch: WriterEpoch(1), time: at(1), event: big(0) };
        Stored::seal(record, Hash::ZERO).unwrap().encoded_len()
    };
    let refused = journal.append(vec![fact(1), big(RECORD_BYTES_MAX - overhead + 1)], at(101)).await;
    assert!(matches!(refused, Err(Error::Record(_))), "{refused:?}");
    assert_eq!(journal.head(), Some(&head));
    for _ in 0..40 {
        journal.append(vec![big(RECORD_BYTES_MAX - overhead)], at(102)).await.unwrap();
    }
    drop(journal);
    let (_, records) = open(store.reopen(ROOMY)).await;
    assert_eq!(records.len(), 42);
}

async fn a_batch_that_is_too_large_is_refused_whole(store: Store) {
    let mut journal = claimed(store.backend()).await;
    let head = *journal.head().unwrap();
    let refused = journal.append((0..5).map(|_| big(60_000)).collect(), at(101)).await;
    assert!(matches!(refused, Err(Error::BatchTooLarge { .. })), "{refused:?}");
    assert_eq!(store.backend().head(&stream()).await.unwrap(), Some(head));
}

async fn a_full_stream_says_so_and_stays_readable(mut store: Store) {
    let backend = store.reopen(40_000);
    let mut journal = claimed(backend).await;
    // A store that packs takes more of them.
    let mut written = 0;
    let full = loop {
        match journal.append(vec![big(20_000)], at(101)).await {
            Ok(_) => written += 1,
            Err(full) => break full,
        }
        assert!(written < 200, "it never was full");
    };
    assert!(matches!(full, Error::Full { bytes: 40_001.., max: 40_000 }), "{full:?}");
    assert!(!full.is_broken());
    // Not poisoned, not in doubt: something smaller still fits.
    journal.append(vec![fact(1)], at(103)).await.unwrap();
    drop(journal);
    let (_, records) = open(store.reopen(40_000)).await;
    assert_eq!(records.len(), 3 + written);
}

async fn thousands_of_records_survive_maintenance(mut store: Store) {
    let mut journal = claimed(store.backend()).await;
    let mut next = 0;
    for round in 0..60 {
        journal.append((0..40).map(|n| fact(next + n)).collect(), at(101 + round)).await.unwrap();
        next += 40;
        if round % 20 == 19 {
            journal.maintain().await.unwrap();
        }
    }
    drop(journal);
    let backend = store.reopen(ROOMY);
    let mut journal = claimed(backend.clone()).await;
    journal.append(vec![fact(next)], at(900)).await.unwrap();
    let stored = all(&*backend).await;
    assert_eq!(stored.len(), 2 + 60 * 40 + 2);
    let report = verify(None, &stored);
    assert_eq!(report.problems, []);
    assert_eq!(report.epochs, [(WriterEpoch(1), Seq(1)), (WriterEpoch(2), Seq(2403))]);
    assert_eq!(report.head.as_ref(), journal.head());
}

async fn the_chain_is_the_same_in_an_export(store: Store) {
    let backend = store.backend();
    let mut journal = claimed(backend.clone()).await;
    journal.append(vec![fact(1), decided(), big(1000)], at(101)).await.unwrap();
    let stored = all(&*backend).await;
    let export: String = stored.iter().map(|s| export_line(s) + "\n").collect();
    let imported: Vec<Stored> = import_lines(export.as_bytes()).collect::<Result<_, _>>().unwrap();
    assert_eq!(imported, stored);
    let frames: Vec<u8> = stored.iter().flat_map(encode).collect();
    assert_eq!(decode_stream(&frames).collect::<Result<Vec<_>, _>>().unwrap(), stored);
    assert_eq!(verify_chain(None, &imported).unwrap().as_ref(), journal.head());
    assert_eq!(verify_lines(export.as_bytes()), verify(None, &stored));
}

async fn a_dropped_append_leaves_the_stream_in_doubt_and_is_settled(store: Store) {
    let mut journal = claimed(store.backend()).await;
    {
        let mut append = Box::pin(journal.append(vec![fact(1)], at(101)));
        // Polled once and then given up, as a cancelled task does.
        let waker = std::task::Waker::noop();
        let _ = append.as_mut().poll(&mut std::task::Context::from_waker(waker));
    }
    let next = journal.append(vec![fact(2)], at(102)).await;
    match next {
        // It was answered within the one poll: there was no doubt.
        Ok(appended) => assert_eq!(appended.records[0].seq, Seq(4)),
        Err(Error::Settled(appended)) => assert_eq!(appended.records[0].event, fact(1)),
        Err(other) => panic!("{other:?}"),
    }
    journal.append(vec![fact(3)], at(103)).await.unwrap();
    let stored = all(&*store.backend()).await;
    assert!(verify(None, &stored).is_intact());
    assert_eq!(stored.iter().filter(|s| s.record.event == fact(1)).count(), 1);
}
