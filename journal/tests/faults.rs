//! Exactly once, whatever becomes of an answer: lost, late, refused for metadata, or beaten by another writer.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{all, at, baseline, big, decided, fact, opened, stream};
use std::sync::Arc;
use valkeeper_core::{event::Event, ids::WriterEpoch};
use valkeeper_journal::{
    Backend, Error, Journal, Memory, Segments, Stored,
    journal::SEND_ATTEMPTS_MAX,
    memory::Fault,
    segments::{
        Body, METADATA_CONFLICTS_MAX, MemoryObjects, Object, TEXT_BYTES_MAX, memory_objects::ObjectsFault,
    },
    verify,
};

async fn claimed(backend: Arc<dyn Backend>) -> Journal {
    let (mut journal, _) = opened(backend, stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    journal
}

async fn intact(backend: &dyn Backend) -> Vec<Stored> {
    let stored = all(backend).await;
    assert_eq!(verify(None, &stored).problems, []);
    stored
}

fn count(stored: &[Stored], event: &Event) -> usize {
    stored.iter().filter(|s| s.record.event == *event).count()
}

/// What an object holds, unpacked.
fn text(object: &Object) -> String {
    object.body.text(TEXT_BYTES_MAX).unwrap().into_owned()
}

async fn memory() -> (Arc<Memory>, Journal) {
    let backend = Arc::new(Memory::new());
    let journal = claimed(backend.clone()).await;
    (backend, journal)
}

async fn segments() -> (Arc<MemoryObjects>, Arc<Segments>, Journal) {
    let objects = Arc::new(MemoryObjects::new());
    let backend = Arc::new(Segments::new(objects.clone()));
    let journal = claimed(backend.clone()).await;
    (objects, backend, journal)
}

#[tokio::test]
async fn an_append_whose_answer_was_lost_is_written_once_and_handed_out_once() {
    for fault in [Fault::AmbiguousCommitted, Fault::AmbiguousNotCommitted, Fault::Conflict] {
        let (backend, mut journal) = memory().await;
        backend.inject(fault);
        let appended = journal.append(vec![decided()], at(101)).await.unwrap();
        assert_eq!((appended.records.len(), appended.decisions.len()), (1, 1), "{fault:?}");
        assert_eq!(count(&intact(&*backend).await, &decided()), 1, "{fault:?}");
    }
}

#[tokio::test]
async fn a_write_that_arrives_after_its_retry_changes_nothing() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::AmbiguousLate);
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    assert_eq!(backend.deliver_late(), 0);
    journal.append(vec![fact(2)], at(102)).await.unwrap();
    let stored = intact(&*backend).await;
    assert_eq!((count(&stored, &fact(1)), stored.len()), (1, 4));
}

#[tokio::test]
async fn doubt_blocks_the_stream_until_the_same_records_are_settled() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::AmbiguousLate);
    backend.inject(Fault::HeadUnavailable);
    assert!(journal.append(vec![decided()], at(101)).await.unwrap_err().is_unresolved());
    // Still no answer: nothing else is sent.
    let sent = backend.appends();
    backend.inject(Fault::HeadUnavailable);
    assert!(journal.append(vec![fact(2)], at(102)).await.unwrap_err().is_unresolved());
    assert_eq!(backend.appends(), sent);
    // The write arrives. The next append learns that, and writes nothing: its events were found without it.
    assert_eq!(backend.deliver_late(), 1);
    let Err(Error::Settled(settled)) = journal.append(vec![fact(2)], at(103)).await else {
        panic!("not settled")
    };
    assert_eq!((settled.records.len(), settled.decisions.len()), (1, 1));
    let stored = intact(&*backend).await;
    assert_eq!((count(&stored, &decided()), count(&stored, &fact(2))), (1, 0));
    journal.append(vec![fact(2)], at(104)).await.unwrap();
    intact(&*backend).await;
}

#[tokio::test]
async fn attempts_are_bounded_and_resolve_goes_on_where_they_ended() {
    let (backend, mut journal) = memory().await;
    let before = backend.appends();
    for _ in 0..SEND_ATTEMPTS_MAX {
        backend.inject(Fault::AmbiguousLate);
    }
    assert!(journal.append(vec![fact(1)], at(101)).await.unwrap_err().is_unresolved());
    assert_eq!(backend.appends() - before, SEND_ATTEMPTS_MAX);
    // Three copies of the same write are on their way, and one of them is accepted.
    assert_eq!(backend.deliver_late(), 1);
    assert_eq!(journal.resolve().await.unwrap().unwrap().records.len(), 1);
    assert_eq!(count(&intact(&*backend).await, &fact(1)), 1);
}

#[tokio::test]
async fn a_certain_refusal_leaves_no_doubt_but_one_after_doubt_does() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::Unavailable);
    let refused = journal.append(vec![fact(1)], at(101)).await.unwrap_err();
    assert!(matches!(refused, Error::Unavailable(_)) && refused.is_transient());
    assert_eq!(journal.resolve().await.unwrap(), None);
    // First sent without answer, then refused: the first may still arrive.
    backend.inject(Fault::AmbiguousLate);
    backend.inject(Fault::Unavailable);
    backend.inject(Fault::Unavailable);
    assert!(journal.append(vec![fact(2)], at(102)).await.unwrap_err().is_unresolved());
    assert_eq!(backend.deliver_late(), 1);
    assert!(journal.resolve().await.unwrap().is_some());
    assert_eq!(count(&intact(&*backend).await, &fact(2)), 1);
}

#[tokio::test]
async fn a_refused_resend_after_doubt_stays_in_doubt() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::AmbiguousLate);
    backend.inject(Fault::HeadUnavailable);
    assert!(journal.append(vec![fact(1)], at(101)).await.unwrap_err().is_unresolved());
    // resolve() finds the old head and sends again; "nothing was written" is true of that attempt only.
    for _ in 0..SEND_ATTEMPTS_MAX {
        backend.inject(Fault::Unavailable);
    }
    assert!(journal.resolve().await.unwrap_err().is_unresolved());
    assert_eq!(backend.deliver_late(), 1);
    assert!(journal.resolve().await.unwrap().is_some());
    assert_eq!(count(&intact(&*backend).await, &fact(1)), 1);
}

#[tokio::test]
async fn a_writer_in_doubt_that_was_deposed_is_fenced() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::AmbiguousLate);
    backend.inject(Fault::HeadUnavailable);
    assert!(journal.append(vec![decided()], at(101)).await.unwrap_err().is_unresolved());
    let mut next = claimed(backend.clone()).await;
    // The old write arrives after the claim and is refused.
    assert_eq!(backend.deliver_late(), 0);
    assert!(matches!(journal.resolve().await, Err(Error::Fenced { by: WriterEpoch(2) })));
    next.append(vec![fact(1)], at(102)).await.unwrap();
    assert_eq!(count(&intact(&*backend).await, &decided()), 0);
}

#[tokio::test]
async fn a_head_moved_without_a_claim_stops_the_writer() {
    let (backend, mut journal) = memory().await;
    let (mut twin, _) = opened(backend.clone(), stream()).await.unwrap();
    // Someone writes on with this writer's epoch, by the backend itself.
    let head = *journal.head().unwrap();
    let record = valkeeper_core::event::Record {
        seq: head.seq.next(),
        epoch: head.epoch,
        time: at(101),
        event: fact(9),
    };
    backend.append(&stream(), Some(&head), &[Stored::seal(record, head.hash).unwrap()], None).await.unwrap();
    let moved = journal.append(vec![fact(1)], at(102)).await.unwrap_err();
    assert!(matches!(moved, Error::HeadMoved { .. }) && moved.is_broken(), "{moved:?}");
    assert!(journal.append(vec![fact(1)], at(102)).await.unwrap_err().is_broken());
    // A claim from an old reading is refused likewise.
    assert!(matches!(twin.claim(None, "w", "v", at(103)).await, Err(Error::HeadMoved { .. })));
}

#[tokio::test]
async fn a_poisoned_store_ends_the_journal() {
    let (backend, mut journal) = memory().await;
    backend.inject(Fault::Poisoned);
    assert!(journal.append(vec![fact(1)], at(101)).await.unwrap_err().is_broken());
    assert!(matches!(journal.append(vec![fact(1)], at(102)).await, Err(Error::Poisoned(_))));
    assert!(matches!(journal.resolve().await, Err(Error::Poisoned(_))));
}

#[tokio::test]
async fn an_ambiguous_claim_is_resolved_and_then_holds() {
    for fault in [Fault::AmbiguousCommitted, Fault::AmbiguousNotCommitted] {
        let backend = Arc::new(Memory::new());
        backend.inject(fault);
        let mut journal = claimed(backend.clone()).await;
        assert_eq!(journal.epoch(), Some(WriterEpoch(1)));
        journal.append(vec![fact(1)], at(101)).await.unwrap();
        assert_eq!(intact(&*backend).await.len(), 3);
    }
}

#[tokio::test]
async fn a_head_object_whose_metadata_were_touched_is_written_at_its_new_version() {
    let (objects, backend, mut journal) = segments().await;
    objects.inject(ObjectsFault::MetadataTouched);
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    for _ in 0..=METADATA_CONFLICTS_MAX {
        objects.inject(ObjectsFault::MetadataTouched);
    }
    journal.append(vec![fact(2)], at(102)).await.unwrap();
    assert_eq!(intact(&*backend).await.len(), 4);
}

#[tokio::test]
async fn every_timeout_of_every_write_of_an_append_leaves_each_record_once() {
    let faults = [
        ObjectsFault::TimeoutBeforeCommit,
        ObjectsFault::TimeoutAfterCommit,
        ObjectsFault::TimeoutLateCommit,
    ];
    for fault in faults {
        // Position 0 meets the segment that is sealed, 1 the head, for the appends that seal.
        for position in 0..4 {
            let (objects, backend, mut journal) = segments().await;
            objects.inject_after(position, fault);
            for number in 0..4 {
                let events = vec![fact(number), big(9_000)];
                let mut outcome = journal.append(events.clone(), at(101)).await.map(|_| ());
                if matches!(outcome, Err(Error::Unavailable(_))) {
                    outcome = journal.append(events, at(101)).await.map(|_| ());
                }
                outcome.unwrap();
                objects.deliver_late();
            }
            let stored = intact(&*backend).await;
            assert_eq!(stored.len(), 10, "{fault:?} at write {position}");
            let fresh = Segments::new(objects.clone());
            assert_eq!(all(&fresh).await, stored);
        }
    }
}

#[tokio::test]
async fn a_crash_between_sealing_and_the_head_leaves_a_readable_stream() {
    let (objects, _, mut journal) = segments().await;
    journal.append(vec![big(12_000)], at(101)).await.unwrap();
    // The segment is made, the head is refused, and the process ends here.
    objects.inject_after(1, ObjectsFault::Unavailable);
    assert!(matches!(journal.append(vec![big(6_000)], at(102)).await, Err(Error::Unavailable(_))));
    let backend = Arc::new(Segments::new(objects.clone()));
    assert_eq!(intact(&*backend).await.len(), 3);
    // The next writer's tail grows beyond what was sealed: its own segment is another object.
    let mut next = claimed(backend.clone()).await;
    next.append(vec![big(6_000)], at(103)).await.unwrap();
    next.append(vec![big(15_000)], at(104)).await.unwrap();
    assert_eq!(intact(&*backend).await.len(), 6);
}

#[tokio::test]
async fn what_people_do_to_the_objects_is_noticed() {
    type Edit = fn(&mut std::collections::BTreeMap<String, valkeeper_journal::Object>);
    let head = |name: &String| name.ends_with("-head");
    let edits: [(&str, Edit); 5] = [
        ("head deleted", |objects| objects.retain(|name, _| !name.ends_with("-head"))),
        ("segment deleted", |objects| objects.retain(|name, _| name.ends_with("-head"))),
        ("segment edited", |objects| {
            let object = objects.iter_mut().find(|(name, _)| !name.ends_with("-head")).unwrap().1;
            object.body = Body::pack(&text(object).replace("valkeeper-0", "valkeeper-1"));
        }),
        ("last line cut", |objects| {
            let object = objects.iter_mut().find(|(name, _)| name.ends_with("-head")).unwrap().1;
            let cut = text(object).trim_end().rfind('\n').unwrap();
            object.body = Body::Text(text(object)[..=cut].to_owned());
        }),
        ("newer format", |objects| {
            let object = objects.iter_mut().find(|(name, _)| name.ends_with("-head")).unwrap().1;
            object.body = Body::Text(text(object).replacen("\"format\":1", "\"format\":2", 1));
        }),
    ];
    for (name, edit) in edits {
        let (objects, _, mut journal) = segments().await;
        journal.append(vec![big(12_000)], at(101)).await.unwrap();
        journal.append(vec![big(12_000)], at(102)).await.unwrap();
        objects.edit(|all| assert!(all.keys().any(head) && all.len() == 2));
        objects.edit(edit);
        let opened = opened(Arc::new(Segments::new(objects)), stream()).await;
        let error = opened.err().unwrap_or_else(|| panic!("{name}: not noticed"));
        assert!(error.is_broken(), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_head_rolled_back_under_a_writer_stops_it() {
    let (objects, _, mut journal) = segments().await;
    let mut old = None;
    objects.edit(|all| old = all.values().next().cloned());
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    objects.edit(|all| {
        let object = all.values_mut().next().unwrap();
        object.body = old.unwrap().body;
        object.version = "edited".to_owned();
    });
    let moved = journal.append(vec![fact(2)], at(102)).await.unwrap_err();
    assert!(matches!(moved, Error::HeadMoved { .. }), "{moved:?}");
}

#[tokio::test]
async fn maintenance_that_fails_anywhere_loses_nothing() {
    for position in 0..6 {
        let (objects, backend, mut journal) = segments().await;
        for number in 0..20 {
            journal.append(vec![fact(number), big(12_000)], at(101)).await.unwrap();
        }
        let before = intact(&*backend).await;
        objects.inject_after(position, ObjectsFault::TimeoutBeforeCommit);
        let _ = journal.maintain().await;
        assert_eq!(intact(&*backend).await, before, "write {position}");
        journal.append(vec![fact(99)], at(102)).await.unwrap();
        journal.maintain().await.unwrap();
        assert_eq!(intact(&*backend).await.len(), before.len() + 1);
        let mut largest = 0;
        objects.edit(|all| largest = all.values().map(|o| text(o).len()).max().unwrap());
        assert!(largest > 100_000, "nothing was merged");
        assert!(largest < 1024 * 1024, "too large for a ConfigMap");
    }
}
