//! Streams kept as named objects (ConfigMaps): page by page, cut, merged meanwhile, and within a budget. Also how much is stored and written per record.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{at, baseline, big, fact, stream, whole};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, Timestamp},
    observation::SpecFact,
    sim::{Perturbation, Story},
    state::ClusterState,
};
use valkeeper_journal::{
    AppendError, Backend, BackendError, Error, Folded, Hash, Head, Journal, Lineage, Object, Retention,
    Segments, Stored, StreamId, Whole, export_line,
    retention::MayGo,
    segments::{
        Body, MERGE_SEGMENTS, MemoryObjects, STREAM_BYTES_MAX, STREAM_SHARE_BYTES, TEXT_BYTES_MAX,
        memory_objects::ObjectsFault,
    },
    verify,
};

type All = BTreeMap<String, Object>;

fn all(objects: &MemoryObjects) -> All {
    let mut all = All::new();
    objects.edit(|kept| all = kept.clone());
    all
}

fn keep(keep_bytes: usize) -> Retention {
    Retention { keep_bytes, keep_ms: None, may_go: MayGo::Any }
}

/// A fact of about this many bytes that no packer makes smaller than three quarters; another seed is another one.
fn noise(seed: u64, bytes: usize) -> Event {
    let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let letter = || {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[(dice >> 40) as usize % 64]
            as char
    };
    Event::SpecChanged(SpecFact::Invalid(std::iter::repeat_with(letter).take(bytes).collect()))
}

async fn writer(objects: &Arc<MemoryObjects>) -> (Arc<Segments>, Journal) {
    let backend = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    (backend, journal)
}

/// A stream with `segments` sealed segments of two records, and a tail.
async fn sealed(segments: u16) -> (Arc<MemoryObjects>, Arc<Segments>, Journal) {
    let objects = Arc::new(MemoryObjects::new());
    let (backend, mut journal) = writer(&objects).await;
    for number in 0..=segments {
        journal.append(vec![fact(number), big(16_000)], at(101)).await.unwrap();
    }
    (objects, backend, journal)
}

/// The fold of everything up to `through`.
async fn folded(backend: &dyn Backend, through: u64) -> Folded {
    let Whole { folded, records } = whole(backend).await;
    assert_eq!(folded, None);
    let mut state = ClusterState::default();
    let kept: Vec<&Stored> = records.iter().filter(|stored| stored.record.seq.0 <= through).collect();
    kept.iter().for_each(|stored| state.apply(&stored.record));
    Folded::new(&stream(), kept.last().unwrap().head(), Lineage::FIRST, &state).unwrap()
}

/// The record of a cut, as the next one after `head`.
fn trimmed(head: &Head, folded: &Folded) -> Stored {
    let Head { seq, epoch: _, time: _, hash } = folded.head();
    let event = Event::Trimmed {
        through: *seq,
        hash: valkeeper_core::ids::Digest(hash.to_string()),
        folded: valkeeper_core::ids::Digest(folded.digest().to_string()),
        archive: None,
    };
    let record = Record { seq: head.seq.next(), epoch: head.epoch, time: head.time, event };
    Stored::seal(record, head.hash).unwrap()
}

#[tokio::test]
async fn a_page_is_a_segment_and_the_last_one_is_the_tail() {
    let (objects, backend, journal) = sealed(3).await;
    let mut reader = backend.read(&stream()).await.unwrap();
    let mut pages = Vec::new();
    let mut sum = 0;
    while let Some(page) = reader.page().await.unwrap() {
        sum += page.bytes;
        pages.push(page.records.iter().map(|stored| stored.record.seq.0).collect::<Vec<u64>>());
    }
    assert_eq!(pages, [vec![1, 2], vec![3, 4], vec![5, 6], vec![7, 8], vec![9, 10]]);
    assert_eq!(pages.concat().last(), Some(&journal.head().unwrap().seq.0));
    // What the objects hold, to the byte; the pages are all of it but the line about the stream.
    let held: usize = all(&objects).values().map(|object| object.body.stored_bytes()).sum();
    assert_eq!(reader.bytes(), held);
    assert!((1..1_000).contains(&(held - sum)), "{held} {sum}");
    assert_eq!(reader.page().await.unwrap(), None);
}

#[tokio::test]
async fn a_cut_and_its_record_are_one_write() {
    let (objects, backend, journal) = sealed(5).await;
    let head = *journal.head().unwrap();
    let folded = folded(&*backend, 6).await;
    let record = trimmed(&head, &folded);
    // The object that stands for the beginning, the segment of the full tail, the head. No more, and nothing is deleted yet.
    let writes = objects.writes();
    backend.append(&stream(), Some(&head), std::slice::from_ref(&record), Some(&folded)).await.unwrap();
    assert_eq!(objects.writes() - writes, 3);
    let Whole { folded: begins, records } = whole(&*backend).await;
    assert_eq!(begins.as_ref(), Some(&folded));
    assert_eq!((records[0].record.seq, records.last()), (Seq(7), Some(&record)));
    assert_eq!(verify(begins.as_ref(), &records).problems, []);
    // What was cut goes in a quiet moment, once.
    backend.maintain(&stream()).await.unwrap();
    let names = all(&objects).into_keys().collect::<Vec<String>>();
    assert!(!names.iter().any(|name| name.contains("segment-0000000001")), "{names:?}");
    assert_eq!(names.len(), 1 + 1 + 4, "{names:?}");
    let writes = objects.writes();
    backend.maintain(&stream()).await.unwrap();
    assert_eq!(objects.writes(), writes, "quiet when there is nothing to do");
    // Another process begins with it, and a writer goes on.
    let fresh = Segments::new(objects.clone());
    assert_eq!(whole(&fresh).await.records, records);
    let (mut next, state) = Journal::open(Arc::new(fresh), stream()).await.unwrap();
    assert_eq!(state.head, record.record.seq);
    next.claim(None, "valkeeper-1", "0.1.0", at(200)).await.unwrap();
}

#[tokio::test]
async fn a_cut_within_a_segment_is_refused_and_nothing_is_written() {
    let (objects, backend, journal) = sealed(5).await;
    let head = *journal.head().unwrap();
    let before = all(&objects);
    for through in [1, 3, 11, 13, 14] {
        let folded = folded(&*backend, through).await;
        let refused = backend.append(&stream(), Some(&head), &[trimmed(&head, &folded)], Some(&folded)).await;
        assert!(matches!(refused, Err(AppendError::Io(_))), "{through}: {refused:?}");
        assert_eq!(all(&objects), before, "{through}");
    }
}

#[tokio::test]
async fn a_reader_whose_segment_was_merged_or_cut_meanwhile_begins_anew() {
    for is_cut in [false, true] {
        let (objects, backend, mut journal) = sealed(12).await;
        let wanted = whole(&*backend).await;
        let other = Segments::new(objects.clone());
        let mut reader = other.read(&stream()).await.unwrap();
        reader.page().await.unwrap().unwrap();
        if is_cut {
            journal.retain(keep(12_000));
            journal.trim(at(200)).await.unwrap();
        }
        journal.maintain().await.unwrap();
        let moved = loop {
            match reader.page().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended as if nothing was"),
                Err(moved) => break moved,
            }
        };
        assert!(matches!(moved, BackendError::Moved) && !moved.is_broken(), "{moved:?}");
        let again = whole(&other).await;
        assert_eq!(again.folded.is_some(), is_cut);
        assert!(is_cut || again == wanted);
        assert_eq!(verify(again.folded.as_ref(), &again.records).problems, []);
    }
}

#[tokio::test]
async fn a_segment_deleted_under_a_reader_is_damage() {
    for part in ["-segment-0000000005", "-head"] {
        let (objects, backend, _) = sealed(5).await;
        let mut reader = backend.read(&stream()).await.unwrap();
        reader.page().await.unwrap().unwrap();
        objects.edit(|all| all.retain(|name, _| !name.contains(part) && !name.contains("0000000005")));
        reader.page().await.unwrap().unwrap();
        let gone = reader.page().await.unwrap_err();
        assert!(
            matches!(&gone, BackendError::Corrupt(why) if why.contains("segment-0000000005")),
            "{gone:?}"
        );
    }
}

#[tokio::test]
async fn a_lost_answer_of_our_own_merge_or_cut_is_no_damage() {
    for fault in [ObjectsFault::TimeoutAfterCommit, ObjectsFault::TimeoutBeforeCommit] {
        // The merge: its object, then the head.
        for position in 0..2 {
            let (objects, backend, mut journal) = sealed(12).await;
            objects.inject_after(position, fault);
            journal.maintain().await.unwrap_err();
            journal.append(vec![fact(1)], at(200)).await.unwrap();
            journal.maintain().await.unwrap();
            let Whole { folded: _, records } = whole(&*backend).await;
            assert_eq!(
                (verify(None, &records).problems, records.len()),
                (vec![], 29),
                "{fault:?} {position}"
            );
            assert!(all(&objects).len() < 8, "{:?}", all(&objects).keys());
        }
        // The cut: what it begins with, the tail's segment, the head.
        for position in 0..3 {
            let (objects, backend, mut journal) = sealed(5).await;
            journal.retain(keep(12_000));
            objects.inject_after(position, fault);
            match journal.trim(at(200)).await {
                Ok(appended) => assert_eq!(appended.records.len(), 1),
                Err(Error::Unavailable(_)) => {
                    assert_eq!(journal.trim(at(201)).await.unwrap().records.len(), 1)
                }
                Err(other) => panic!("{fault:?} {position}: {other:?}"),
            }
            journal.append(vec![fact(1)], at(202)).await.unwrap();
            journal.maintain().await.unwrap();
            let Whole { folded, records } = whole(&*backend).await;
            assert_eq!(verify(folded.as_ref(), &records).problems, [], "{fault:?} {position}");
            assert_eq!(folded.unwrap().head().seq, Seq(12), "{fault:?} {position}");
        }
    }
}

#[tokio::test]
async fn another_list_of_segments_at_the_same_head_is_damage_unless_it_is_a_merge() {
    type Edit = fn(&mut serde_json::Value);
    let edits: [(&str, Edit, &str); 7] = [
        ("other bytes", |first| first["segments"][1]["bytes"] = 9.into(), "record 3 "),
        ("one gone", |first| drop(first["segments"].as_array_mut().unwrap().remove(0)), "record 1 "),
        (
            "one twice",
            |first| {
                let one = first["segments"][0].clone();
                first["segments"].as_array_mut().unwrap().insert(0, one)
            },
            "record 3 ",
        ),
        (
            "a boundary that never was",
            |first| {
                first["segments"][1]["last"] = 5.into();
                first["segments"][2]["first"] = 6.into()
            },
            "record 3 ",
        ),
        (
            "one split",
            |first| {
                let whole = first["segments"][0].clone();
                first["segments"][0]["last"] = 1.into();
                let mut rest = whole;
                rest["first"] = 2.into();
                first["segments"].as_array_mut().unwrap().insert(1, rest);
            },
            "record 1 ",
        ),
        (
            "a cut that nobody recorded",
            |first| {
                first["segments"].as_array_mut().unwrap().remove(0);
                first["folded"] = serde_json::json!({"seq": 2, "digest": "ab".repeat(32), "bytes": 7});
            },
            "record 2 ",
        ),
        ("an unknown layout", |first| first["format"] = 2.into(), "format 2"),
    ];
    for (name, edit, place) in edits {
        let (objects, backend, mut journal) = sealed(5).await;
        change_first_line(&objects, edit);
        let before = head_object(&objects);
        let seen = backend.head(&stream()).await.unwrap_err();
        let (BackendError::Corrupt(why) | BackendError::Newer(why)) = &seen else {
            panic!("{name}: {seen:?}")
        };
        assert!(why.contains(place), "{name}: {why}");
        assert_eq!(seen.is_newer(), name == "an unknown layout");
        assert!(journal.append(vec![fact(1)], at(200)).await.unwrap_err().is_broken(), "{name}");
        assert!(head_object(&objects) == before, "{name}: written onto damage");
        // A process that remembers nothing finds it, too.
        let opened = Journal::open(Arc::new(Segments::new(objects)), stream()).await;
        assert!(opened.err().is_some_and(|e| e.is_broken()), "{name}");
    }
    // Two that became one, exactly, is what a merge of another process looks like.
    let (objects, backend, mut journal) = sealed(5).await;
    change_first_line(&objects, |first| {
        first["segments"].as_array_mut().unwrap().remove(1);
        first["segments"][0]["last"] = 4.into();
    });
    backend.head(&stream()).await.unwrap();
    journal.append(vec![fact(1)], at(200)).await.unwrap();
}

fn head_object(objects: &MemoryObjects) -> Option<Object> {
    all(objects).into_iter().find(|(name, _)| name.ends_with("-head")).map(|(_, head)| head)
}

fn change_first_line(objects: &MemoryObjects, edit: impl FnOnce(&mut serde_json::Value)) {
    objects.edit(|all| {
        let head = all.iter_mut().find(|(name, _)| name.ends_with("-head")).unwrap().1;
        let text = head.body.text(TEXT_BYTES_MAX).unwrap().into_owned();
        let (first, tail) = text.split_once('\n').unwrap();
        let mut first = serde_json::from_str(first).unwrap();
        edit(&mut first);
        *head = Object {
            body: Body::Text(format!("{first}\n{tail}")),
            version: format!("{}-edited", head.version),
        };
    });
}

#[tokio::test]
async fn a_merge_that_another_process_is_about_to_name_is_taken_over_and_not_taken_away() {
    let (objects, backend, journal) = sealed(u16::try_from(MERGE_SEGMENTS).unwrap() + 2).await;
    // Another process has made the merged segment, and is about to name it.
    objects.inject_after(1, ObjectsFault::TimeoutLateCommit);
    Segments::new(objects.clone()).maintain(&stream()).await.unwrap_err();
    let merged = |all: &All| all.keys().filter(|name| name.contains("segment-0000000001")).count();
    assert_eq!(merged(&all(&objects)), 2);
    backend.maintain(&stream()).await.unwrap();
    assert_eq!((merged(&all(&objects)), objects.deliver_late()), (1, 0));
    assert_eq!(verify(None, &whole(&*backend).await.records).problems, []);
    drop(journal);
}

#[tokio::test]
async fn a_full_stream_cuts_and_goes_on_and_without_permission_to_cut_it_says_full() {
    let objects = Arc::new(MemoryObjects::new());
    let backend = Arc::new(Segments::with_limit(objects.clone(), 100_000));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    let mut written = 0;
    let full = loop {
        match journal.append(vec![noise(written, 12_000)], at(101)).await {
            Ok(_) => written += 1,
            Err(full) => break full,
        }
    };
    assert!(matches!(full, Error::Full { bytes: 100_001.., max: 100_000 }), "{full:?}");
    journal.retain(keep(90_000));
    for number in 0..30 {
        journal.append(vec![noise(written + number, 12_000)], at(102)).await.unwrap();
        journal.maintain().await.unwrap();
        let held: usize = all(&objects).values().map(|object| object.body.stored_bytes()).sum();
        assert!(held <= 100_000, "{held}");
    }
    let Whole { folded, records } = whole(&*backend).await;
    assert_eq!(verify(folded.as_ref(), &records).problems, []);
    assert!(folded.is_some() && records.len() > 4);
}

#[tokio::test]
async fn in_a_full_installation_who_has_more_than_its_share_cuts_and_nobody_else() {
    let budget = 300_000;
    let objects = Arc::new(MemoryObjects::new());
    let backend = Arc::new(Segments::with_budget(objects.clone(), STREAM_BYTES_MAX, budget));
    let mut journals = Vec::new();
    for number in 0..4 {
        let id = StreamId(format!("cluster-{number}"));
        let (mut journal, _) = Journal::open(backend.clone(), id.clone()).await.unwrap();
        journal.retain(keep(500_000));
        journal.claim(Some(baseline(&id)), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
        journals.push(journal);
    }
    let held = |id: &str| -> usize {
        let kept = all(&objects);
        kept.iter().filter(|(name, _)| name.contains(id)).map(|(_, o)| o.body.stored_bytes()).sum()
    };
    // One small one; the others grow side by side until the installation is full, and then go on.
    journals[0].append(vec![noise(1, 20_000)], at(101)).await.unwrap();
    let small = held("cluster-0");
    for round in 0..40 {
        for journal in &mut journals[1..] {
            journal.append(vec![noise(round, 9_000)], at(102)).await.unwrap();
            journal.trim(at(102)).await.unwrap();
            journal.maintain().await.unwrap();
        }
        journals[0].append(vec![fact(u16::try_from(round).unwrap())], at(103)).await.unwrap();
    }
    let sum: usize = (0..4).map(|number| held(&format!("cluster-{number}"))).sum();
    assert!(sum <= budget + 3 * 20_000, "{sum}");
    assert!(held("cluster-0") >= small && held("cluster-0") < STREAM_SHARE_BYTES);
    for number in 0..4 {
        let id = StreamId(format!("cluster-{number}"));
        let (_, state) = Journal::open(Arc::new(Segments::new(objects.clone())), id.clone()).await.unwrap();
        assert_eq!(state.cluster_uid, id.0);
        let folded = backend.read(&id).await.unwrap().folded().is_some();
        assert_eq!(folded, number > 0, "cluster-{number}");
        assert!(number == 0 || held(&id.0) > STREAM_SHARE_BYTES / 2, "more was cut than had to");
    }
}

#[tokio::test]
async fn a_stream_that_is_only_looked_at_counts_after_a_restart() {
    let objects = Arc::new(MemoryObjects::new());
    let before = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(before, stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    journal.append(vec![noise(1, 20_000)], at(101)).await.unwrap();
    let after = Segments::with_budget(objects, STREAM_BYTES_MAX, 15_000);
    assert_eq!(after.share(), None, "nothing of it was seen");
    assert!(after.head(&stream()).await.unwrap().is_some());
    assert_eq!(after.share(), Some(STREAM_SHARE_BYTES));
}

/// Lines of stories, in the order of their names, that fit into one stream when they are packed. Bytes.
const STORIES_BYTES_MAX: usize = 6_200_000;

/// What the stories recorded, as far as one stream holds it, as it was appended: what has the same time came at once.
fn stories() -> Vec<(Timestamp, Vec<Event>)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut scripts: Vec<_> =
        std::fs::read_dir(golden).unwrap().map(|e| e.unwrap().path().join("script.txt")).collect();
    scripts.sort();
    let mut batches: Vec<(Timestamp, Vec<Event>)> = Vec::new();
    let mut left = STORIES_BYTES_MAX;
    for script in scripts {
        let story = Story::parse(&std::fs::read_to_string(script).unwrap());
        for record in story.run(Perturbation::None, |_, _| {}).unwrap().records {
            let line = export_line(&Stored::seal(record.clone(), Hash::ZERO).unwrap());
            let Some(less) = left.checked_sub(line.len() + 1) else { return batches };
            left = less;
            let Record { seq: _, epoch: _, time, event } = record;
            match batches.last_mut() {
                _ if matches!(event, Event::Baseline { .. } | Event::EpochStarted { .. }) => {}
                Some((at, batch)) if *at == time => batch.push(event),
                Some(_) | None => batches.push((time, vec![event])),
            }
        }
    }
    batches
}

#[tokio::test]
async fn packing_makes_room_for_more_than_four_times_as_many_records() {
    let objects = Arc::new(MemoryObjects::new());
    let (backend, mut journal) = writer(&objects).await;
    let (mut appends, mut records, mut decisions, mut text) = (0, 0, 0, 0);
    let writes = objects.writes();
    for (number, (_, events)) in stories().into_iter().enumerate() {
        decisions += events.iter().filter(|event| event.decided().is_some()).count();
        records += events.len();
        appends += 1;
        journal.append(events, at(200)).await.unwrap();
        if number % 50 == 49 {
            journal.maintain().await.unwrap();
        }
    }
    journal.maintain().await.unwrap();
    let writes = objects.writes() - writes;
    for stored in whole(&*backend).await.records {
        text += export_line(&stored).len() + 1;
    }
    let reader = backend.read(&stream()).await.unwrap();
    let held: usize = all(&objects).values().map(|object| object.body.stored_bytes()).sum();
    assert_eq!(reader.bytes(), held, "nothing is left over");
    assert!(held * 4 < text, "{held} of {text}");
    assert!(writes * 100 < appends * 150, "{writes} writes for {appends} appends");
    let per = |bytes: usize, of: usize| bytes as f64 / of as f64;
    eprintln!(
        "{records} records, {decisions} decisions, {appends} appends, {writes} writes: {:.1} bytes a record packed, {:.1} as text; \
         {:.2} writes a record, {:.2} a decision, {:.3} an append; {} records in {STREAM_BYTES_MAX} bytes; {} objects",
        per(held, records),
        per(text, records),
        per(writes, records),
        per(writes, decisions),
        per(writes, appends),
        STREAM_BYTES_MAX * records / held,
        all(&objects).len(),
    );
}
