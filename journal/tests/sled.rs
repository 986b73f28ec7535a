//! The sled backend against what a disk, a kill and a person can do to it.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{Scratch, at, baseline, big, copy, fact, opened, stream};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};
use valkeeper_core::{event::Record, ids::Seq};
use valkeeper_journal::{Backend, BackendError, Error, Journal, MayGo, Retention, Sled, StreamId};

async fn open(dir: &Path) -> Result<(Journal, Vec<Record>), Error> {
    let backend = Sled::open(dir)?;
    opened(Arc::new(backend), stream()).await
}

async fn claimed(dir: &Path) -> Journal {
    let (mut journal, _) = open(dir).await.unwrap();
    journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    journal
}

#[tokio::test]
async fn a_second_open_of_the_same_directory_is_refused() {
    let scratch = Scratch::new("second");
    let dir = scratch.path("journal");
    let journal = claimed(&dir).await;
    let refused = Sled::open(&dir).err().unwrap();
    assert!(matches!(refused, BackendError::Locked { .. }), "{refused:?}");
    assert!(refused.to_string().contains("open elsewhere"));
    drop(journal);
    open(&dir).await.unwrap();
}

#[tokio::test]
async fn nobody_else_can_read_the_store() {
    let scratch = Scratch::new("modes");
    let dir = scratch.path("journal");
    let _journal = claimed(&dir).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("db")), 0o600);
    assert_eq!(mode(&scratch.path("journal.anchor")), 0o700);
    let anchor = scratch.path("journal.anchor").join("slots");
    assert_eq!(mode(&anchor), 0o600);
}

#[tokio::test]
async fn a_snapshot_left_half_made_by_a_kill_is_removed() {
    let scratch = Scratch::new("generating");
    let dir = scratch.path("journal");
    drop(claimed(&dir).await);
    fs::write(dir.join("snap.00000000000000FF.generating"), b"half").unwrap();
    let (_, records) = open(&dir).await.unwrap();
    assert_eq!(records.len(), 2);
    assert!(!dir.join("snap.00000000000000FF.generating").exists());
}

#[tokio::test]
async fn a_store_that_vanished_is_not_a_new_store() {
    let scratch = Scratch::new("vanished");
    let dir = scratch.path("journal");
    drop(claimed(&dir).await);
    fs::remove_dir_all(&dir).unwrap();
    for make in [false, true] {
        if make {
            fs::create_dir(&dir).unwrap();
        }
        let error = open(&dir).await.err().unwrap();
        assert!(matches!(error, Error::Backend(BackendError::StoreMissing { .. })) && error.is_broken());
        assert!(!dir.join("db").exists());
    }
}

#[tokio::test]
async fn yesterdays_copy_is_behind_the_anchor() {
    let scratch = Scratch::new("rollback");
    let (dir, old) = (scratch.path("journal"), scratch.path("old"));
    let mut journal = claimed(&dir).await;
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    drop(journal);
    copy(&dir, &old);
    let (mut journal, _) = open(&dir).await.unwrap();
    journal.claim(None, "w", "v", at(102)).await.unwrap();
    journal.append(vec![fact(2)], at(103)).await.unwrap();
    drop(journal);
    copy(&old, &dir);
    let error = open(&dir).await.err().unwrap();
    let Error::Backend(BackendError::BehindAnchor { anchor: Seq(5), .. }) = error else {
        panic!("{error:?}")
    };
}

#[tokio::test]
async fn another_history_of_the_same_length_is_not_the_anchors() {
    let scratch = Scratch::new("swapped");
    let (dir, other) = (scratch.path("journal"), scratch.path("other"));
    for (dir, number) in [(&dir, 1), (&other, 2)] {
        let mut journal = claimed(dir).await;
        journal.append(vec![fact(number)], at(101)).await.unwrap();
    }
    copy(&other, &dir);
    let error = open(&dir).await.err().unwrap();
    assert!(matches!(error, Error::Backend(BackendError::BehindAnchor { .. })), "{error:?}");
}

#[tokio::test]
async fn a_head_ahead_of_its_anchor_is_an_append_that_was_not_acknowledged() {
    let scratch = Scratch::new("ahead");
    let dir = scratch.path("journal");
    let mut journal = claimed(&dir).await;
    let anchors = scratch.path("journal.anchor");
    copy(&anchors, &scratch.path("kept"));
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    drop(journal);
    copy(&scratch.path("kept"), &anchors);
    assert_eq!(open(&dir).await.unwrap().1.len(), 3);
}

#[tokio::test]
async fn a_reading_ends_where_the_stream_ended_when_it_began_and_says_if_it_was_cut() {
    let scratch = Scratch::new("pages");
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(&scratch.path("journal")).unwrap());
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.claim(Some(baseline(&stream())), "w", "v", at(100)).await.unwrap();
    for _ in 0..40 {
        journal.append(vec![big(8_000)], at(101)).await.unwrap();
    }
    let head = *journal.head().unwrap();
    let mut reader = backend.read(&stream()).await.unwrap();
    let (mut pages, mut records, mut bytes) = (0, 0, 0);
    while let Some(page) = reader.page().await.unwrap() {
        assert!(page.bytes <= 64 * 1024, "a page of {} bytes", page.bytes);
        (pages, records, bytes) = (pages + 1, records + page.records.len(), bytes + page.bytes);
        journal.append(vec![fact(1)], at(102)).await.unwrap();
    }
    assert_eq!((records as u64, bytes), (head.seq.0, reader.bytes()));
    assert!(pages > 4, "{pages} pages");
    let mut reader = backend.read(&stream()).await.unwrap();
    reader.page().await.unwrap().unwrap();
    journal.retain(Retention { keep_bytes: 200_000, keep_ms: None, may_go: MayGo::Any });
    let trimmed = journal.trim(at(103)).await.unwrap();
    assert_eq!(trimmed.records.len(), 1);
    assert!(matches!(reader.page().await, Err(BackendError::Moved)));
    backend.maintain(&stream()).await.unwrap();
    let mut reader = backend.read(&stream()).await.unwrap();
    assert!(reader.bytes() <= 200_000 && reader.folded().is_some());
    let first = reader.page().await.unwrap().unwrap().records.remove(0);
    assert_eq!(first.record.seq, reader.folded().unwrap().head().seq.next());
}

#[tokio::test]
async fn many_streams_at_once_lose_nothing_and_each_keeps_its_order() {
    const STREAMS: usize = 100;
    const APPENDS: u16 = 20;
    let scratch = Scratch::new("many");
    let dir = scratch.path("journal");
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(&dir).unwrap());
    let name = |n: usize| StreamId(format!("uid-{n:03}"));
    let mut writers = Vec::new();
    for stream in (0..STREAMS).map(name) {
        let backend = backend.clone();
        writers.push(tokio::spawn(async move {
            let (mut journal, _) = Journal::open(backend, stream.clone()).await.unwrap();
            journal.claim(Some(baseline(&stream)), "w", "v", at(100)).await.unwrap();
            for number in 0..APPENDS {
                journal.append(vec![fact(number)], at(101)).await.unwrap();
            }
            *journal.head().unwrap()
        }));
    }
    let mut heads = Vec::new();
    for writer in writers {
        heads.push(writer.await.unwrap());
    }
    drop(backend);
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(&dir).unwrap());
    assert_eq!(backend.streams().await.unwrap().len(), STREAMS);
    for (number, head) in heads.iter().enumerate() {
        let (journal, records) = opened(backend.clone(), name(number)).await.unwrap();
        assert_eq!((journal.head(), records.len()), (Some(head), 2 + APPENDS as usize));
    }
}

#[tokio::test]
async fn large_records_stay_in_the_file_that_is_synced() {
    let scratch = Scratch::new("blobs");
    let dir = scratch.path("journal");
    let mut journal = claimed(&dir).await;
    for _ in 0..100 {
        journal.append(vec![big(60_000)], at(101)).await.unwrap();
    }
    assert_eq!(fs::read_dir(dir.join("blobs")).map_or(0, Iterator::count), 0);
}

#[tokio::test]
async fn damage_is_refused_or_harmless_and_never_silent() {
    let scratch = Scratch::new("damage");
    let (good, dir) = (scratch.path("good"), scratch.path("journal"));
    let mut journal = claimed(&dir).await;
    for number in 0..200 {
        journal.append(vec![fact(number)], at(101)).await.unwrap();
    }
    drop(journal);
    let whole = open(&dir).await.unwrap().1;
    copy(&dir, &good);
    let length = fs::metadata(good.join("db")).unwrap().len() as usize;
    let used = fs::read(good.join("db")).unwrap().iter().rposition(|b| *b != 0).unwrap();
    let (mut refused, mut harmless) = (0, 0);
    let flips = (0..40).map(|n| used * n / 40);
    let cuts = [used / 2, used - 10, length - 1];
    for (position, cut) in flips.map(|p| (p, false)).chain(cuts.into_iter().map(|p| (p, true))) {
        copy(&good, &dir);
        let db = dir.join("db");
        let mut bytes = fs::read(&db).unwrap();
        bytes[position] ^= 0x10;
        bytes.truncate(if cut { position } else { length });
        fs::write(&db, bytes).unwrap();
        match open(&dir).await {
            Ok((_, records)) => {
                assert_eq!(records, whole, "silently wrong: position {position} cut {cut}");
                harmless += 1;
            }
            Err(error) => {
                assert!(error.is_broken(), "position {position} cut {cut}: {error:?}");
                refused += 1;
            }
        }
        for number in 1..=3 {
            let _ = fs::remove_dir_all(scratch.path(&format!("journal.broken-{number}")));
        }
    }
    assert!(refused > 0, "{harmless} harmless: the damage met nothing");
}

#[tokio::test]
async fn a_damaged_snapshot_is_copied_and_then_done_without() {
    let scratch = Scratch::new("snapshot");
    let dir = scratch.path("journal");
    drop(claimed(&dir).await);
    let whole = open(&dir).await.unwrap().1;
    let snapshot = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.display().to_string().contains("snap."));
    let snapshot = snapshot.unwrap();
    let mut bytes = fs::read(&snapshot).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&snapshot, &bytes).unwrap();
    assert_eq!(open(&dir).await.unwrap().1, whole);
    let kept = scratch.path("journal.broken-1").join(snapshot.file_name().unwrap());
    assert_eq!(fs::read(kept).unwrap(), bytes);
}

const CHILD_DIR: &str = "VALKEEPER_TEST_CHILD_DIR";

/// The writer that is killed: appends for ever and prints each acknowledged sequence. Without the variable, it is a test
/// that has nothing to do.
#[tokio::test]
async fn child_appends_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let mut journal = claimed(Path::new(&dir)).await;
    for number in 0u16.. {
        let appended = journal.append(vec![fact(number), big(500)], at(101)).await.unwrap();
        let last = appended.records.last().unwrap().seq;
        writeln!(std::io::stdout(), "acked {last}").unwrap();
    }
}

const OPEN_DIR: &str = "VALKEEPER_TEST_OPEN_DIR";

/// Opens what a power cut left and prints where it ends; for the recipe in docs/JOURNAL.md, which needs a loop device.
#[tokio::test]
async fn child_opens_and_prints_the_head() {
    let Ok(dir) = std::env::var(OPEN_DIR) else { return };
    match open(Path::new(&dir)).await {
        Ok((journal, records)) => {
            let head = journal.head().map_or(0, |head| head.seq.0);
            writeln!(std::io::stdout(), "opened {} records, head {head}", records.len()).unwrap();
        }
        Err(error) => writeln!(std::io::stdout(), "refused: {error:?}").unwrap(),
    }
}

#[tokio::test]
async fn a_kill_at_any_moment_loses_no_acknowledged_record() {
    const ROUNDS: usize = 6;
    let scratch = Scratch::new("kill");
    let dir = scratch.path("journal");
    let mut before = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_appends_until_it_is_killed", "--nocapture"])
            .env(CHILD_DIR, &dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acked = 0;
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acks =
            lines.map_while(Result::ok).filter_map(|l| l.rsplit_once("acked ")?.1.trim().parse::<u64>().ok());
        // Another number of appends in each round, so that the kill meets other moments of sled's segments.
        for _ in 0..20 + round * 37 {
            acked = acks.next().unwrap();
        }
        child.kill().unwrap();
        acked = acks.last().unwrap_or(acked);
        child.wait().unwrap();
        let (journal, records) = open(&dir).await.unwrap();
        let head = journal.head().unwrap().seq.0;
        // At most the one batch that was not acknowledged is there as well, and it is whole.
        assert!((acked..=acked + 2).contains(&head), "acked {acked}, found {head}");
        assert_eq!((records.len() as u64, (head - acked) % 2), (head, 0));
        assert!(head > before);
        before = head;
    }
}
