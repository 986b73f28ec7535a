//! The archive keeps what it was given, says so only when it has read it back, and notices every change.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use async_trait::async_trait;
use common::{Scratch, at, baseline, big, decided, fact, stream};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    fs,
    sync::{Arc, Mutex},
};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, WriterEpoch},
};
use valkeeper_journal::{
    Hash, Stored, StreamId,
    archive::{
        Archive, ArchiveError, Archived, Blobs, BlobsError, BlobsFault, Branch, Covered, DirectoryBlobs,
        MemoryBlobs, SEGMENT_BYTES_MAX,
    },
    export_line,
    gzip::pack,
};

/// Failures in a row after which a loop is stuck. The longest upload here takes some 20 calls.
const CALLS_MAX: usize = 100;

/// Bytes that are changed in each segment, spread evenly.
const FLIPS: usize = 200;

fn seal_after(before: Option<&Stored>, epoch: u64, event: Event) -> Stored {
    let seq = before.map_or(Seq(1), |b| b.record.seq.next());
    let record = Record { seq, epoch: WriterEpoch(epoch), time: at(seq.0 as i64), event };
    Stored::seal(record, before.map_or(Hash::ZERO, |b| b.hash)).unwrap()
}

/// Size of the segments here, in bytes: some twenty records.
const SMALL_BYTES: usize = 16 * 1024;

/// A stream of two epochs, with records of every kind and size.
fn chain(records: usize) -> Vec<Stored> {
    let mut chain: Vec<Stored> = Vec::new();
    for number in 0..records {
        let started = |epoch| Event::EpochStarted {
            writer: format!("op-{epoch}"),
            version: "0.1.0".to_owned(),
            lost_through: None,
        };
        let epoch = if number < 7 { 1 } else { 2 };
        let event = match number {
            0 => baseline(&stream()),
            1 | 7 => started(epoch),
            n if n % 11 == 0 => decided(),
            n if n % 3 == 0 => big(1_500),
            n => fact(n as u16),
        };
        chain.push(seal_after(chain.last(), epoch, event));
    }
    chain
}

fn memory() -> (Arc<MemoryBlobs>, Archive) {
    let blobs = Arc::new(MemoryBlobs::new());
    (Arc::clone(&blobs), Archive::with_limit(blobs, SMALL_BYTES))
}

fn branch() -> Branch {
    Branch::first(stream())
}

async fn read_back(archive: &Archive) -> Result<Vec<Stored>, ArchiveError> {
    let mut pages = archive.read(&branch()).await?;
    let mut all = Vec::new();
    while let Some(page) = pages.next().await? {
        assert!(!page.is_empty());
        all.extend(page);
    }
    Ok(all)
}

fn names(blobs: &MemoryBlobs) -> Vec<String> {
    blobs.edit(|all| all.keys().cloned().collect())
}

fn report(records: &[Stored], segments: usize) -> Archived {
    let (first, last) = (&records[0], &records[records.len() - 1]);
    Archived { first: first.record.seq, last: last.record.seq, last_hash: last.hash, segments }
}

fn covers(records: &[Stored]) -> Covered {
    let Archived { first, last, last_hash, segments: _ } = report(records, 0);
    Covered { first, last, last_hash }
}

/// Puts text of a segment's name and place into the store, as somebody who wants to be believed would.
fn forge(blobs: &MemoryBlobs, first: u64, last: u64, text: &[u8]) -> String {
    let bytes = pack(text);
    let digest = Hash(Sha256::digest(&bytes).into());
    let name = format!("{}/{first:020}-{last:020}-{digest}.jsonl.gz", stream());
    blobs.edit(|all| all.insert(name.clone(), bytes));
    name
}

fn lines(records: &[Stored]) -> String {
    records.iter().map(|stored| export_line(stored) + "\n").collect()
}

#[tokio::test]
async fn what_is_archived_is_read_back_from_memory_and_from_a_directory() {
    let scratch = Scratch::new("archive");
    fs::create_dir(scratch.path("store")).unwrap();
    let directory = Archive::with_limit(Arc::new(DirectoryBlobs::new(scratch.path("store"))), SMALL_BYTES);
    let chain = chain(400);
    for archive in [memory().1, directory] {
        assert_eq!(archive.covered(&branch()).await.unwrap(), None);
        assert_eq!(archive.branches().await.unwrap(), []);
        assert_eq!(read_back(&archive).await.unwrap(), []);
        let archived = archive.store(&branch(), &chain[..300]).await.unwrap();
        assert!(archived.segments > 2, "{archived:?}");
        assert_eq!(archived, report(&chain[..300], archived.segments));
        assert_eq!(archive.covered(&branch()).await.unwrap(), Some(covers(&chain[..300])));
        // The same again writes nothing; with more behind it, only the rest.
        assert_eq!(archive.store(&branch(), &chain[..300]).await.unwrap(), report(&chain[..300], 0));
        assert_eq!(archive.store(&branch(), &chain[250..310]).await.unwrap(), report(&chain[250..310], 1));
        assert_eq!(archive.store(&branch(), &chain[310..]).await.unwrap().last, Seq(400));
        assert_eq!(read_back(&archive).await.unwrap(), chain);
        assert_eq!(archive.branches().await.unwrap(), [branch()]);
    }
}

#[tokio::test]
async fn a_segment_is_gzip_of_lines_and_not_larger_than_its_limit() {
    let blobs = Arc::new(MemoryBlobs::new());
    let archive = Archive::new(blobs.clone());
    let mut chain = chain(300);
    (0..50).for_each(|_| chain.push(seal_after(chain.last(), 2, big(60_000))));
    assert_eq!(archive.store(&branch(), &chain).await.unwrap(), report(&chain, 4));
    assert_eq!(read_back(&archive).await.unwrap(), chain);
    let mut text = Vec::new();
    for bytes in blobs.edit(|all| all.values().cloned().collect::<Vec<_>>()) {
        let plain = valkeeper_journal::gzip::unpack(&bytes, SEGMENT_BYTES_MAX).unwrap();
        assert!(plain.len() > SEGMENT_BYTES_MAX / 2 || plain.ends_with(lines(&chain[349..]).as_bytes()));
        text.extend(plain);
    }
    assert_eq!(String::from_utf8(text).unwrap(), lines(&chain));
}

#[tokio::test]
async fn reading_holds_one_segment_at_a_time() {
    let (blobs, archive) = memory();
    archive.store(&branch(), &chain(300)).await.unwrap();
    let before = blobs.calls();
    let mut pages = archive.read(&branch()).await.unwrap();
    for page in 1..=names(&blobs).len() {
        assert!(pages.next().await.unwrap().is_some());
        assert_eq!(blobs.calls() - before, 1 + page, "a listing, and a read for each page");
    }
    assert_eq!(pages.next().await.unwrap(), None);
}

#[tokio::test]
async fn an_upload_goes_on_after_a_failure_at_any_call() {
    let chain = chain(130);
    let every = [
        BlobsFault::Unavailable,
        BlobsFault::AmbiguousBeforeCommit,
        BlobsFault::AmbiguousAfterCommit,
        BlobsFault::Lost,
        BlobsFault::CorruptedRead(77),
    ];
    for fault in every {
        let (mut failures, mut harmless) = (0, 0);
        for calls in 0..CALLS_MAX {
            let (blobs, archive) = memory();
            archive.store(&branch(), &chain[..30]).await.unwrap();
            blobs.inject_after(calls, fault);
            let first = archive.store(&branch(), &chain).await;
            let met = blobs.clear_faults() == 0;
            match first {
                Ok(archived) => assert_eq!(archived.last, Seq(130)),
                Err(
                    ArchiveError::Unavailable(_) | ArchiveError::Lost { .. } | ArchiveError::Damaged { .. },
                ) => {
                    failures += 1;
                }
                Err(e) => panic!("{fault:?} at call {calls}: {e}"),
            }
            harmless += usize::from(met && first.is_ok());
            // What is there is whole at any moment, and the same call completes it.
            let covered = archive.covered(&branch()).await.unwrap().unwrap();
            assert_eq!(covered.last_hash, chain[covered.last.0 as usize - 1].hash);
            assert_eq!(read_back(&archive).await.unwrap(), chain[..covered.last.0 as usize]);
            assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(130));
            assert_eq!(read_back(&archive).await.unwrap(), chain);
            if !met {
                assert!(calls > 4, "{fault:?}: the upload had {calls} calls only");
                break;
            }
            assert!(calls + 1 < CALLS_MAX, "{fault:?}: still met at call {calls}");
        }
        let is_harmless = fault == BlobsFault::AmbiguousAfterCommit;
        assert_eq!((failures > 0, harmless > 0), (!is_harmless, is_harmless), "{fault:?}");
    }
}

#[tokio::test]
async fn nothing_is_called_archived_that_is_not_there_and_the_same() {
    let chain = chain(20);
    let (blobs, archive) = memory();
    blobs.inject(BlobsFault::Lost);
    let lost = archive.store(&branch(), &chain).await.unwrap_err();
    assert!(
        matches!(&lost, ArchiveError::Lost { segment } if segment.contains("-00000000000000000020-")),
        "{lost}"
    );
    assert_eq!(archive.covered(&branch()).await.unwrap(), None);
    // A store that keeps other bytes than it was given is found out at once, and every time.
    blobs.inject(BlobsFault::CorruptedWrite(300));
    for _ in 0..3 {
        let damaged = archive.store(&branch(), &chain).await.unwrap_err();
        assert!(matches!(damaged, ArchiveError::Damaged { seq: Seq(1), .. }), "{damaged}");
    }
    assert!(archive.covered(&branch()).await.is_err());
    blobs.edit(|all| all.clear());
    assert_eq!(archive.store(&branch(), &chain).await.unwrap(), report(&chain, 1));
}

#[tokio::test]
async fn two_writers_that_cut_differently_make_one_archive() {
    let chain = chain(400);
    let (blobs, archive) = memory();
    let other_blobs = Arc::new(MemoryBlobs::new());
    let other = Archive::with_limit(other_blobs.clone(), 9_000);
    // Each as if it were alone; then the second's segments arrive in the same bucket.
    for (from, to) in [(0, 130), (130, 131), (131, 400)] {
        archive.store(&branch(), &chain[from..to]).await.unwrap();
    }
    for (from, to) in [(0, 1), (1, 3), (3, 290), (290, 399)] {
        other.store(&branch(), &chain[from..to]).await.unwrap();
    }
    let theirs = other_blobs.edit(std::mem::take);
    assert!(theirs.keys().all(|name| !names(&blobs).contains(name)));
    blobs.edit(|all| all.extend(theirs));
    assert_eq!(archive.covered(&branch()).await.unwrap(), Some(covers(&chain)));
    assert_eq!(read_back(&archive).await.unwrap(), chain);
    assert_eq!(archive.store(&branch(), &chain).await.unwrap(), report(&chain, 0));
}

#[tokio::test]
async fn two_histories_of_one_stream_are_told_apart_and_named() {
    let chain = chain(50);
    let mut fork = chain[..40].to_vec();
    for number in 900..915 {
        fork.push(seal_after(fork.last(), 2, fact(number)));
    }
    let blobs = Arc::new(MemoryBlobs::new());
    let archive = Archive::new(blobs.clone());
    archive.store(&branch(), &chain).await.unwrap();
    let refused = archive.store(&branch(), &fork[35..]).await;
    let segment = names(&blobs)[0].clone();
    assert_eq!(refused, Err(ArchiveError::Differs { segment: segment.clone(), seq: Seq(41) }));
    let no_chain = archive.store(&branch(), &fork[50..]).await.unwrap_err();
    assert!(matches!(no_chain, ArchiveError::NoChain(_)), "{no_chain}");
    assert_eq!(names(&blobs).len(), 1, "nothing was written");
    // Both in one bucket.
    let other = forge(&blobs, 36, 55, lines(&fork[35..]).as_bytes());
    let conflict = ArchiveError::Conflict { seq: Seq(41), one: segment, other };
    assert_eq!(read_back(&archive).await, Err(conflict));
    // Side by side, where nothing overlaps.
    blobs.edit(|all| all.clear());
    forge(&blobs, 1, 42, lines(&chain[..42]).as_bytes());
    let beside = forge(&blobs, 43, 55, lines(&fork[42..]).as_bytes());
    let found = read_back(&archive).await.unwrap_err();
    let ArchiveError::Damaged { segment, seq: Seq(43), why } = &found else { panic!("{found}") };
    assert!(*segment == beside && why.contains("does not continue the chain"), "{found}");
    // Two ends of the same number: neither is the archive's end.
    blobs.edit(|all| all.clear());
    forge(&blobs, 1, 50, lines(&chain).as_bytes());
    forge(&blobs, 36, 50, lines(&fork[35..50]).as_bytes());
    let conflict = archive.covered(&branch()).await.unwrap_err();
    assert!(matches!(conflict, ArchiveError::Conflict { seq: Seq(50), .. }), "{conflict}");
}

#[tokio::test]
async fn a_changed_byte_anywhere_in_any_segment_is_found_and_the_segment_named() {
    let (blobs, archive) = memory();
    archive.store(&branch(), &chain(100)).await.unwrap();
    assert!(names(&blobs).len() > 2);
    for name in names(&blobs) {
        let length = blobs.edit(|all| all[&name].len());
        let first: u64 = name[stream().0.len() + 1..][..20].parse().unwrap();
        for flip in 0..FLIPS {
            let place = flip * length / FLIPS;
            blobs.edit(|all| all.get_mut(&name).unwrap()[place] ^= 1 << (flip % 8));
            match read_back(&archive).await {
                Err(ArchiveError::Damaged { segment, seq, .. }) => {
                    assert_eq!((segment, seq), (name.clone(), Seq(first)))
                }
                other => panic!("byte {place} of {name}: {other:?}"),
            }
            blobs.edit(|all| all.get_mut(&name).unwrap()[place] ^= 1 << (flip % 8));
        }
    }
    assert_eq!(read_back(&archive).await.unwrap().len(), 100);
}

#[tokio::test]
async fn a_swapped_a_truncated_and_a_missing_segment_are_found_and_named() {
    let chain = chain(400);
    let (blobs, archive) = memory();
    archive.store(&branch(), &chain).await.unwrap();
    let whole = blobs.edit(|all| all.clone());
    let names = names(&blobs);
    let damaged_at = |e: ArchiveError| {
        let ArchiveError::Damaged { segment, .. } = e else { panic!("{e}") };
        segment
    };
    for at in 0..names.len() - 1 {
        let (one, two) = (&names[at], &names[at + 1]);
        blobs.edit(|all| {
            all.insert(one.clone(), whole[two].clone());
            all.insert(two.clone(), whole[one].clone());
        });
        assert_eq!(damaged_at(read_back(&archive).await.unwrap_err()), *one);
        blobs.edit(|all| *all = whole.clone());
    }
    for name in &names {
        for length in [0, 1, whole[name].len() / 2, whole[name].len() - 1] {
            blobs.edit(|all| all.get_mut(name).unwrap().truncate(length));
            assert_eq!(damaged_at(read_back(&archive).await.unwrap_err()), *name);
            blobs.edit(|all| *all = whole.clone());
        }
    }
    // Renamed as if it were another place of the stream.
    blobs.edit(|all| {
        let bytes = all.remove(&names[1]).unwrap();
        all.insert(names[1].replacen("/0000", "/0001", 1).replacen("-0000", "-0001", 1), bytes);
    });
    assert!(matches!(read_back(&archive).await, Err(ArchiveError::Missing { .. })));
    for at in 1..names.len() - 1 {
        blobs.edit(|all| {
            *all = whole.clone();
            all.remove(&names[at]);
        });
        let after = whole_until(&names[at - 1]);
        let missing = ArchiveError::Missing { after, segment: names[at + 1].clone() };
        assert_eq!(read_back(&archive).await, Err(missing));
        // Only what is after it is covered, and the journal's owner can still mend it.
        assert!(archive.covered(&branch()).await.unwrap().unwrap().first > after.next());
        assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(400));
        assert_eq!(read_back(&archive).await.unwrap(), chain);
    }
}

/// The last record that a name promises.
fn whole_until(name: &str) -> Seq {
    Seq(name[stream().0.len() + 22..][..20].parse().unwrap())
}

#[tokio::test]
async fn bytes_that_hash_to_their_name_are_still_not_believed() {
    let chain = chain(30);
    let text = lines(&chain);
    let mut edited = chain.clone();
    edited.swap(10, 11);
    let unended = text.trim_end().to_owned();
    let changed = text.replacen("\"0-5\"", "\"0-6\"", 1);
    assert_ne!(changed, text);
    let newer = text.replacen("\"kind\":4", "\"kind\":4000", 1);
    let huge = vec![b'x'; SEGMENT_BYTES_MAX + 1];
    // (first, last, text, the record that is named)
    let forged: [(u64, u64, Vec<u8>, u64); 11] = [
        (1, 31, text.clone().into(), 31),
        (1, 29, text.clone().into(), 30),
        (2, 31, text.clone().into(), 2),
        (1, 30, lines(&edited).into(), 11),
        (1, 30, unended.into(), 30),
        (1, 30, changed.into(), 6),
        (1, 30, newer.into(), 3),
        (1, 30, vec![], 1),
        (1, 30, b"\xff\n".to_vec(), 1),
        (1, 30, huge, 1),
        (1, 30, format!("\n{text}").into(), 1),
    ];
    for (case, (first, last, text, named)) in forged.into_iter().enumerate() {
        let (blobs, archive) = memory();
        let name = forge(&blobs, first, last, &text);
        let found = read_back(&archive).await.unwrap_err();
        let (ArchiveError::Damaged { segment, seq, .. } | ArchiveError::Unreadable { segment, seq, .. }) =
            &found
        else {
            panic!("case {case}: {found}")
        };
        assert_eq!((segment, *seq), (&name, Seq(named)), "case {case}");
        assert!(archive.covered(&branch()).await.is_err(), "case {case}");
    }
}

#[tokio::test]
async fn an_archive_that_began_late_is_completed_backwards_and_never_has_a_hole() {
    let chain = chain(130);
    for calls in 0..CALLS_MAX {
        let (blobs, archive) = memory();
        archive.store(&branch(), &chain[80..110]).await.unwrap();
        assert_eq!(read_back(&archive).await.unwrap(), chain[80..110]);
        blobs.inject_after(calls, BlobsFault::Unavailable);
        let is_done = archive.store(&branch(), &chain).await.is_ok();
        assert_eq!(blobs.clear_faults(), usize::from(is_done));
        let covered = archive.covered(&branch()).await.unwrap().unwrap();
        assert!(covered.first <= Seq(81) && covered.last >= Seq(110), "{covered:?}");
        let there = &chain[covered.first.0 as usize - 1..covered.last.0 as usize];
        assert_eq!(read_back(&archive).await.unwrap(), there);
        if is_done {
            assert_eq!(there, chain);
            return;
        }
    }
    panic!("not done after {CALLS_MAX} calls");
}

#[tokio::test]
async fn an_archive_can_begin_with_any_record() {
    let chain = chain(30);
    for from in 0..12 {
        let (_, archive) = memory();
        archive.store(&branch(), &chain[from..20]).await.unwrap();
        archive.store(&branch(), &chain[20..]).await.unwrap();
        assert_eq!(read_back(&archive).await.unwrap(), chain[from..]);
    }
}

#[tokio::test]
async fn records_after_others_that_nobody_has_are_archived_and_the_hole_is_named() {
    let chain = chain(60);
    let (_, archive) = memory();
    archive.store(&branch(), &chain[20..30]).await.unwrap();
    archive.store(&branch(), &chain[41..]).await.unwrap();
    let covered = archive.covered(&branch()).await.unwrap().unwrap();
    assert_eq!((covered.first, covered.last), (Seq(42), Seq(60)));
    let holed = read_back(&archive).await.unwrap_err();
    assert!(matches!(&holed, ArchiveError::Missing { after: Seq(30), .. }), "{holed}");
    // Whoever still has them fills the hole, whatever else is in the same parcel; and another history does not.
    let mut other = chain.clone();
    other[35] = other[34].clone();
    assert!(archive.store(&branch(), &other[30..41]).await.is_err());
    archive.store(&branch(), &chain[25..45]).await.unwrap();
    archive.store(&branch(), &chain[..5]).await.unwrap();
    archive.store(&branch(), &chain[..20]).await.unwrap();
    assert_eq!(read_back(&archive).await.unwrap(), chain);
}

#[tokio::test]
async fn what_does_not_belong_together_is_refused_before_anything_is_written() {
    let chain = chain(60);
    let (blobs, archive) = memory();
    archive.store(&branch(), &chain[20..40]).await.unwrap();
    assert_eq!(archive.store(&branch(), &[]).await, Err(ArchiveError::Nothing));
    let holed: Vec<Stored> = [&chain[38..45], &chain[46..]].concat();
    let refused = archive.store(&branch(), &holed).await.unwrap_err();
    assert!(matches!(refused, ArchiveError::NoChain(_)), "{refused}");
    assert!(refused.to_string().contains("record 47 follows record 45"), "{refused}");
    for name in ["", "a/b", "..", ".", "a b", "ä", ".hidden"] {
        let refused = archive.store(&Branch::first(StreamId(name.to_owned())), &chain).await;
        assert_eq!(refused, Err(ArchiveError::StreamName(name.to_owned())));
    }
    assert_eq!(names(&blobs).len(), 1);
}

#[tokio::test]
async fn what_else_is_in_the_bucket_is_not_of_the_archive() {
    let chain = chain(30);
    let (blobs, archive) = memory();
    archive.store(&branch(), &chain).await.unwrap();
    let other = Branch::first(StreamId("another".to_owned()));
    archive.store(&other, &chain[..10]).await.unwrap();
    blobs.edit(|all| {
        all.insert("README.txt".to_owned(), b"hello".to_vec());
        all.insert(format!("{}/notes.jsonl.gz", stream()), b"hello".to_vec());
        all.insert(format!("{}-copy/00-11.jsonl.gz", stream()), b"hello".to_vec());
    });
    assert_eq!(read_back(&archive).await.unwrap(), chain);
    assert_eq!(archive.branches().await.unwrap(), [branch(), other]);
}

/// A store whose names are taken between the look and the write, every time.
struct Busy(MemoryBlobs, Mutex<BTreeSet<String>>);

#[async_trait]
impl Blobs for Busy {
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        let is_new = self.1.lock().unwrap().insert(name.to_owned());
        if is_new {
            self.0.put_new(name, bytes).await?;
        }
        Err(BlobsError::AlreadyExists)
    }

    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        self.0.get(name, bytes_max).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        self.0.list(prefix).await
    }
}

#[tokio::test]
async fn a_name_that_is_taken_is_as_good_as_written_if_its_bytes_are_the_same() {
    let chain = chain(300);
    let archive = Archive::with_limit(Arc::new(Busy(MemoryBlobs::new(), Mutex::default())), SMALL_BYTES);
    assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(300));
    assert_eq!(read_back(&archive).await.unwrap(), chain);
    // Taken, and nobody wrote it: a store that refuses a write beside another one that then fails.
    let (blobs, _) = memory();
    let empty = Busy(MemoryBlobs::new(), Mutex::default());
    archive.store(&branch(), &chain).await.unwrap();
    blobs.inject(BlobsFault::Lost);
    empty.0.inject(BlobsFault::Lost);
    let refused = Archive::new(Arc::new(empty)).store(&branch(), &chain).await;
    assert!(matches!(refused, Err(ArchiveError::Unavailable(_))), "{refused:?}");
}

#[tokio::test]
async fn a_directory_takes_each_name_once_and_never_a_part_of_a_file() {
    let scratch = Scratch::new("blobs");
    let root = scratch.path("store");
    let blobs = DirectoryBlobs::new(&root);
    assert!(
        matches!(blobs.list("").await, Err(BlobsError::Unavailable(_))),
        "a missing directory is not empty"
    );
    assert!(matches!(blobs.put_new("a/b", b"x").await, Err(BlobsError::Unavailable(_))));
    assert!(!root.exists());
    fs::create_dir(&root).unwrap();
    // Twenty at once: one wins, and its bytes are whole.
    let tries = (0..20_u8).map(|number| {
        let blobs = blobs.clone();
        tokio::spawn(async move { (number, blobs.put_new("a/b", &vec![number; 100_000]).await) })
    });
    let mut won = Vec::new();
    for task in tries.collect::<Vec<_>>() {
        match task.await.unwrap() {
            (number, Ok(())) => won.push(number),
            (_, Err(e)) => assert_eq!(e, BlobsError::AlreadyExists),
        }
    }
    assert_eq!(won.len(), 1);
    assert_eq!(blobs.get("a/b", 100_000).await.unwrap(), Some(vec![won[0]; 100_000]));
    assert_eq!(blobs.get("a/b", 99_999).await, Err(BlobsError::TooLarge { max: 99_999 }));
    assert_eq!(blobs.get("a/c", 1).await.unwrap(), None);
    // A draft that a crash left.
    fs::write(root.join("a/.7-7.new"), b"half").unwrap();
    blobs.put_new("top", b"").await.unwrap();
    assert_eq!(blobs.list("").await.unwrap(), ["a/b", "top"]);
    assert_eq!(blobs.list("a/").await.unwrap(), ["a/b"]);
    assert_eq!(blobs.list("none/").await.unwrap(), Vec::<String>::new());
    let left: Vec<_> = fs::read_dir(root.join("a")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/"] {
        assert!(matches!(blobs.get(name, 1).await, Err(BlobsError::Unavailable(_))), "{name:?}");
        assert!(matches!(blobs.put_new(name, b"").await, Err(BlobsError::Unavailable(_))), "{name:?}");
    }
}
