//! Streams kept as named texts (ConfigMaps): what a person changes under a running writer, and what maintenance leaves.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{at, baseline, big, decided, fact, opened, stream};
use std::{collections::BTreeMap, error::Error as _, sync::Arc};
use valkeeper_core::event::Record;
use valkeeper_journal::{
    Backend, Error, Head, Journal, Object, Segments, Stored, export_line,
    journal::SEND_ATTEMPTS_MAX,
    segments::{Body, MemoryObjects, TEXT_BYTES_MAX, memory_objects::ObjectsFault},
    verify, verify_lines,
};

type All = BTreeMap<String, Object>;

/// A writer whose stream has one sealed segment (records 1 to 3) and the records 4 to 6 in its tail.
async fn writing() -> (Arc<MemoryObjects>, Arc<Segments>, Journal) {
    let objects = Arc::new(MemoryObjects::new());
    let backend = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = opened(backend.clone(), stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    journal.append(vec![big(12_000)], at(101)).await.unwrap();
    journal.append(vec![big(6_000)], at(102)).await.unwrap();
    journal.append(vec![fact(5), fact(6)], at(103)).await.unwrap();
    assert_eq!(all(&objects).len(), 2);
    (objects, backend, journal)
}

fn all(objects: &MemoryObjects) -> All {
    let mut all = All::new();
    objects.edit(|kept| all = kept.clone());
    all
}

/// What an object holds, unpacked.
fn text(object: &Object) -> String {
    object.body.text(TEXT_BYTES_MAX).unwrap().into_owned()
}

/// What `kubectl edit` of the head object does: another text, and another version.
fn edit_head(objects: &MemoryObjects, change: impl FnOnce(&str) -> String) {
    objects.edit(|all| {
        let head = all.iter_mut().find(|(name, _)| name.ends_with("-head")).unwrap().1;
        let changed = change(&text(head));
        assert_ne!(changed, text(head), "nothing was edited");
        *head = Object { body: Body::Text(changed), version: format!("{}-edited", head.version) };
    });
}

/// Changes one line, counted from 0: 0 is about the stream, 1 to 3 are the records 4 to 6.
fn in_line(text: &str, number: usize, from: &str, to: &str) -> String {
    let lines = text.split_inclusive('\n').enumerate();
    lines.map(|(at, line)| if at == number { line.replacen(from, to, 1) } else { line.to_owned() }).collect()
}

fn without_line(text: &str, number: usize) -> String {
    let lines = text.split_inclusive('\n').enumerate();
    lines.filter(|(index, _)| *index != number).map(|(_, line)| line).collect()
}

/// Its name, what it makes of the head object's text, and the record that is to be named.
type Edit = (&'static str, fn(&str) -> String, u64);

/// Edits of the head object that leave the head's sequence and hash alone.
const EDITS: [Edit; 8] = [
    ("another content", |text| in_line(text, 2, r#""member":"0-5""#, r#""member":"0-7""#), 5),
    ("another time", |text| in_line(text, 2, r#""time":103"#, r#""time":104"#), 5),
    ("another spelling", |text| in_line(text, 2, r#"{"seq":5,"#, r#"{ "seq":5,"#), 5),
    ("the last line", |text| in_line(text, 3, r#""member":"0-6""#, r#""member":"0-7""#), 6),
    ("the tail's first line removed", |text| without_line(text, 1), 4),
    ("a line in the middle removed", |text| without_line(text, 2), 5),
    ("a line added", |text| format!("{text}{}\n", text.lines().last().unwrap()), 7),
    ("a newline lost", |text| text.trim_end().to_owned(), 6),
];

/// The record that the writer would append next.
fn next(head: &Head) -> Stored {
    let record = Record { seq: head.seq.next(), epoch: head.epoch, time: at(104), event: fact(7) };
    Stored::seal(record, head.hash).unwrap()
}

fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[track_caller]
fn assert_names(name: &str, error: &Error, seq: u64) {
    assert!(error.is_broken() && !error.is_transient(), "{name}: {error:?}");
    assert!(whole(error).contains(&format!("record {seq} ")), "{name}: {}", whole(error));
}

#[tokio::test]
async fn a_tail_edited_under_a_running_writer_stops_it_and_names_the_record() {
    for (name, edit, seq) in EDITS {
        let (objects, _, mut journal) = writing().await;
        edit_head(&objects, edit);
        let before = all(&objects);
        let broken = journal.append(vec![decided()], at(104)).await.unwrap_err();
        assert_names(name, &broken, seq);
        // For ever, and nothing was written: neither the head nor a segment that seals the altered tail.
        for events in [vec![fact(7)], vec![big(15_000)]] {
            assert_names(name, &journal.append(events, at(105)).await.unwrap_err(), seq);
        }
        assert_names(name, &journal.resolve().await.unwrap_err(), seq);
        assert_eq!(all(&objects), before, "{name}");
    }
}

#[tokio::test]
async fn a_tail_edited_while_an_append_is_in_doubt_stops_the_writer() {
    for fault in [ObjectsFault::TimeoutBeforeCommit, ObjectsFault::TimeoutLateCommit] {
        for (name, edit, seq) in EDITS {
            let (objects, _, mut journal) = writing().await;
            for _ in 0..SEND_ATTEMPTS_MAX {
                objects.inject(fault);
            }
            assert!(journal.append(vec![decided()], at(104)).await.unwrap_err().is_unresolved());
            edit_head(&objects, edit);
            assert_eq!(objects.deliver_late(), 0);
            let before = all(&objects);
            assert_names(name, &journal.resolve().await.unwrap_err(), seq);
            assert_names(name, &journal.append(vec![fact(8)], at(105)).await.unwrap_err(), seq);
            assert_eq!(all(&objects), before, "{name}");
        }
    }
}

#[tokio::test]
async fn a_tail_edited_after_a_write_whose_answer_was_lost_stops_the_writer() {
    let (objects, backend, mut journal) = writing().await;
    // Written, and nobody here knows: what this process remembers is one append older than what is there.
    objects.inject(ObjectsFault::TimeoutAfterCommit);
    let head = *journal.head().unwrap();
    backend.append(&stream(), Some(&head), &[next(&head)], None).await.unwrap_err();
    edit_head(&objects, EDITS[0].1);
    // The same record again: without the edit, the store would say that it is there.
    assert_names("edited", &journal.append(vec![fact(7)], at(104)).await.unwrap_err(), 5);
}

#[tokio::test]
async fn an_edited_list_of_segments_stops_a_running_writer() {
    let edits: [Edit; 3] = [
        (
            "another beginning",
            |text| text.replacen(r#"{"first":1,"last":3,"#, r#"{"first":2,"last":3,"#, 1),
            1,
        ),
        ("another end", |text| text.replacen(r#""last":3,"#, r#""last":2,"#, 1), 3),
        ("another tail", |text| text.replacen(r#""tail":4,"#, r#""tail":5,"#, 1), 4),
    ];
    for (name, edit, seq) in edits {
        let (objects, _, mut journal) = writing().await;
        edit_head(&objects, edit);
        assert_names(name, &journal.append(vec![fact(7)], at(104)).await.unwrap_err(), seq);
        // The next writer as well: at its open if the records show it, else before its first write.
        let before = all(&objects);
        let refused = match opened(Arc::new(Segments::new(objects.clone())), stream()).await {
            Ok((mut next, _)) => next.claim(None, "valkeeper-1", "0.1.0", at(105)).await.unwrap_err(),
            Err(e) => e,
        };
        assert!(refused.is_broken(), "{name}: {refused:?}");
        assert_eq!(all(&objects), before, "{name}");
    }
}

#[tokio::test]
async fn a_writer_that_remembers_nothing_verifies_the_tail_before_it_writes() {
    for (name, edit, seq) in EDITS {
        // Another spelling of the same record is no other record: only who remembers the bytes can tell.
        if name == "another spelling" {
            continue;
        }
        let (objects, _, journal) = writing().await;
        let head = *journal.head().unwrap();
        edit_head(&objects, edit);
        let before = all(&objects);
        let fresh = Segments::new(objects.clone());
        let refused =
            fresh.append(&stream(), Some(&head), &[next(&head)], None).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("record {seq} ")), "{name}: {refused}");
        assert_eq!(all(&objects), before, "{name}");
    }
}

#[tokio::test]
async fn reading_an_edited_tail_does_not_make_the_writer_believe_it() {
    let (objects, backend, mut journal) = writing().await;
    edit_head(&objects, EDITS[0].1);
    // An audit in the same process: it gets what is there, and says what is wrong with it.
    assert!(!verify(None, &common::all(&*backend).await).is_intact());
    assert_names("head", &Error::from(backend.head(&stream()).await.unwrap_err()), 5);
    assert_names("maintain", &journal.maintain().await.unwrap_err(), 5);
    assert_names("append", &journal.append(vec![fact(7)], at(104)).await.unwrap_err(), 5);
}

#[tokio::test]
async fn a_tail_that_is_put_back_can_be_opened_again() {
    let (objects, backend, mut journal) = writing().await;
    let before = all(&objects);
    edit_head(&objects, EDITS[0].1);
    assert!(journal.append(vec![fact(7)], at(104)).await.unwrap_err().is_broken());
    assert!(opened(backend.clone(), stream()).await.err().unwrap().is_broken());
    let name = before.keys().find(|name| name.ends_with("-head")).unwrap();
    edit_head(&objects, |_| text(&before[name]));
    let (mut next, records) = opened(backend.clone(), stream()).await.unwrap();
    assert_eq!(records.len(), 6);
    next.claim(None, "valkeeper-0", "0.1.0", at(105)).await.unwrap();
    next.append(vec![fact(7)], at(106)).await.unwrap();
    assert!(verify(None, &common::all(&*backend).await).is_intact());
}

#[tokio::test]
async fn labels_set_between_and_during_appends_are_nobodys_business() {
    let (objects, backend, mut journal) = writing().await;
    for number in 7..40 {
        // Between: the version is another one, the text is the same.
        objects.edit(|all| all.values_mut().for_each(|object| object.version.push_str("-labelled")));
        if number % 3 == 0 {
            objects.inject(ObjectsFault::MetadataTouched);
        }
        journal.append(vec![fact(number), big(1_000)], at(104)).await.unwrap();
    }
    let stored = common::all(&*backend).await;
    assert_eq!((verify(None, &stored).problems, stored.len()), (vec![], 72));
}

#[tokio::test]
async fn segments_merged_by_another_process_do_not_stop_a_running_writer() {
    let (objects, backend, mut journal) = writing().await;
    for number in 7..30 {
        journal.append(vec![fact(number), big(12_000)], at(104)).await.unwrap();
    }
    let segments = all(&objects).len();
    Segments::new(objects.clone()).maintain(&stream()).await.unwrap();
    assert!(all(&objects).len() < segments - 10, "nothing was merged");
    journal.append(vec![fact(30)], at(105)).await.unwrap();
    assert!(verify(None, &common::all(&*backend).await).is_intact());
}

#[tokio::test]
async fn an_export_of_a_stream_with_merged_segments_verifies() {
    let (objects, backend, mut journal) = writing().await;
    for round in 0..3 {
        for number in 0..20 {
            journal.append(vec![fact(number), decided(), big(12_000)], at(104 + round)).await.unwrap();
        }
        journal.maintain().await.unwrap();
    }
    let largest = all(&objects).values().map(|object| text(object).len()).max().unwrap();
    assert!(largest > 200_000, "nothing was merged");
    let head = *journal.head().unwrap();
    // As `export` writes it, read by a process that has just started.
    let stored = common::all(&Segments::new(objects.clone())).await;
    let export: String = stored.iter().map(|s| export_line(s) + "\n").collect();
    let report = verify_lines(export.as_bytes());
    assert_eq!((report.problems, report.records, report.head), (vec![], 186, Some(head)));
    // And as `kubectl get configmap` shows it: the segments by name, then the head without its first line.
    let mut texts = String::new();
    let kept = all(&objects);
    for (_, object) in kept.iter().filter(|(name, _)| !name.ends_with("-head")) {
        texts.push_str(&text(object));
    }
    let (_, object) = kept.iter().find(|(name, _)| name.ends_with("-head")).unwrap();
    texts.push_str(text(object).split_once('\n').unwrap().1);
    assert_eq!(texts, export);
    assert!(verify(None, &common::all(&*backend).await).is_intact());
}
