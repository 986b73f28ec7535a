//! One stream of a sled store that cannot be read: it alone is refused, with what is wrong with it, until a person accepts
//! the loss.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{Scratch, at, baseline, big, copy, fact, opened};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, WriterEpoch},
};
use valkeeper_journal::{
    AppendError, Backend, BackendError, Error, Hash, Head, Journal, MayGo, RecordError, Retention, Sled,
    Stored, StreamId, decode_stream,
};

fn bad() -> StreamId {
    StreamId("uid-bad".to_owned())
}

fn good() -> StreamId {
    StreamId("uid-good".to_owned())
}

fn sled(dir: &Path) -> Arc<dyn Backend> {
    Arc::new(Sled::open(dir).unwrap())
}

async fn claimed(backend: &Arc<dyn Backend>, stream: &StreamId) -> Journal {
    let (mut journal, _) = Journal::open(backend.clone(), stream.clone()).await.unwrap();
    let baseline = journal.head().is_none().then(|| baseline(stream));
    journal.claim(baseline, "w", "v", at(100)).await.unwrap();
    journal
}

async fn append(journal: &mut Journal, numbers: std::ops::Range<u16>) -> Head {
    for number in numbers {
        journal.append(vec![fact(number)], at(101)).await.unwrap();
    }
    *journal.head().unwrap()
}

/// Two streams, of which the first then loses what it appended last: the head that is left, and the one before the loss.
async fn behind(dir: &Path, old: &Path) -> (Head, Head) {
    let backend = sled(dir);
    append(&mut claimed(&backend, &good()).await, 0..3).await;
    let mut journal = claimed(&backend, &bad()).await;
    let left = append(&mut journal, 0..3).await;
    drop((journal, backend));
    copy(dir, old);
    let backend = sled(dir);
    let lost = append(&mut claimed(&backend, &bad()).await, 3..5).await;
    drop(backend);
    copy(old, dir);
    (left, lost)
}

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Two streams, of which the first one's tree is then rewritten with sled itself.
async fn rewritten(dir: &Path, change: impl Fn(&mut Pairs)) -> Head {
    let backend = sled(dir);
    append(&mut claimed(&backend, &good()).await, 0..3).await;
    let head = append(&mut claimed(&backend, &bad()).await, 0..3).await;
    drop(backend);
    let db = sled::Config::new().path(dir).flush_every_ms(None).open().unwrap();
    let tree = db.open_tree(format!("stream/{}", bad())).unwrap();
    let mut pairs: Pairs =
        tree.iter().map(|pair| pair.unwrap()).map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
    change(&mut pairs);
    tree.clear().unwrap();
    for (key, value) in pairs {
        tree.insert(key, value).unwrap();
    }
    db.flush().unwrap();
    head
}

/// What is done to a stream's tree, and the last record of which a trace is left in it.
type Damage = (&'static str, fn(&mut Pairs), u64);

fn last(pairs: &mut Pairs) -> &mut Vec<u8> {
    &mut pairs.last_mut().unwrap().1
}

/// A record of a later version, with right checksums.
fn newer(pairs: &mut Pairs) {
    let value = last(pairs);
    // An entry begins with eight bytes of its own; then the frame, whose body begins after twelve.
    let frame = &mut value[8..];
    frame[15] = 9;
    let crc = crc32c::crc32c(&frame[12..]).to_le_bytes();
    frame[8..12].copy_from_slice(&crc);
}

async fn error(backend: &Arc<dyn Backend>) -> BackendError {
    match Journal::open(backend.clone(), bad()).await {
        Err(Error::Backend(error)) => error,
        Err(other) => panic!("{other:?}"),
        Ok((journal, _)) => panic!("opened at {:?}", journal.head()),
    }
}

/// The bad stream is refused at every question, however often; the good one is as it was, and goes on.
async fn refused_alone(dir: &Path, is_it: fn(&BackendError) -> bool) {
    for round in 0..2 {
        let backend = sled(dir);
        assert_eq!(backend.streams().await.unwrap(), [bad(), good()]);
        for _ in 0..2 {
            let (read, head) =
                (backend.read(&bad()).await.err().unwrap(), backend.head(&bad()).await.unwrap_err());
            assert!(is_it(&read) && is_it(&head), "round {round}: {read:?}, {head:?}");
            assert!(is_it(&error(&backend).await));
            let record = Record { seq: Seq(1), epoch: WriterEpoch(1), time: at(1), event: baseline(&bad()) };
            let stored = Stored::seal(record, Hash::ZERO);
            let appended = backend.append(&bad(), None, &[stored.unwrap()], None).await;
            let Err(AppendError::Corrupt(why)) = appended else { panic!("{appended:?}") };
            assert!(why.contains(&read.to_string()), "{why}");
        }
        let (mut journal, records) = opened(backend.clone(), good()).await.unwrap();
        assert_eq!(records.len(), 5 + 2 * round);
        journal.claim(None, "w", "v", at(102)).await.unwrap();
        append(&mut journal, 9..10).await;
    }
}

fn asides(dir: &Path) -> Vec<PathBuf> {
    let siblings = fs::read_dir(dir.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        siblings.filter(|path| path.to_string_lossy().contains(".aside-uid-bad-")).collect();
    found.sort();
    found
}

#[tokio::test]
async fn a_stream_behind_its_anchor_is_refused_alone_until_the_loss_is_accepted() {
    let scratch = Scratch::new("behind");
    let dir = scratch.path("journal");
    let (left, lost) = behind(&dir, &scratch.path("old")).await;
    refused_alone(&dir, |e| matches!(e, BackendError::BehindAnchor { anchor, .. } if anchor.0 == 8)).await;
    let backend = sled(&dir);
    assert_eq!((lost.seq, backend.claimed_end(&bad()).await.unwrap()), (Seq(8), Some(Seq(8))));
    backend.accept_loss(&bad()).await.unwrap();
    assert_eq!(backend.head(&bad()).await.unwrap(), Some(left));
    drop(backend);
    // What was accepted stays so, and the next loss is refused again.
    let backend = sled(&dir);
    assert_eq!(opened(backend.clone(), bad()).await.unwrap().0.head(), Some(&left));
    drop(backend);
    copy(&dir, &scratch.path("old"));
    let backend = sled(&dir);
    append(&mut claimed(&backend, &bad()).await, 20..21).await;
    drop(backend);
    copy(&scratch.path("old"), &dir);
    let again = error(&sled(&dir)).await;
    assert!(matches!(again, BackendError::BehindAnchor { anchor: Seq(7), .. }), "{again:?}");
    assert_eq!(asides(&dir), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_stream_that_is_gone_whole_begins_anew_once_the_loss_is_accepted() {
    for way in ["accepted", "forgotten"] {
        let scratch = Scratch::new("gone");
        let (dir, old) = (scratch.path("journal"), scratch.path("old"));
        let backend = sled(&dir);
        append(&mut claimed(&backend, &good()).await, 0..3).await;
        drop(backend);
        copy(&dir, &old);
        let backend = sled(&dir);
        append(&mut claimed(&backend, &bad()).await, 0..3).await;
        drop(backend);
        copy(&old, &dir);
        refused_alone(&dir, |e| matches!(e, BackendError::BehindAnchor { .. })).await;
        let backend = sled(&dir);
        match way {
            "accepted" => backend.accept_loss(&bad()).await.unwrap(),
            _forgotten => backend.forget(&bad()).await.unwrap(),
        }
        assert_eq!(backend.streams().await.unwrap(), [good()], "{way}");
        drop(backend);
        let backend = sled(&dir);
        assert_eq!(backend.head(&bad()).await.unwrap(), None, "{way}");
        append(&mut claimed(&backend, &bad()).await, 0..3).await;
        assert_eq!(asides(&dir), Vec::<PathBuf>::new(), "{way}");
    }
}

#[tokio::test]
async fn a_stream_of_a_newer_version_is_refused_alone_and_nothing_gives_it_up_by_accident() {
    let scratch = Scratch::new("newer");
    let dir = scratch.path("journal");
    rewritten(&dir, newer).await;
    let is_newer = |e: &BackendError| {
        matches!(e, BackendError::Record { source: RecordError::UnknownSchema { schema: 9, .. }, .. })
    };
    refused_alone(&dir, is_newer).await;
    let backend = sled(&dir);
    let refused = backend.accept_loss(&bad()).await.unwrap_err();
    assert!(is_newer(&refused) && refused.is_newer() && !refused.is_damage(), "{refused:?}");
    drop(backend);
    let refused = error(&sled(&dir)).await;
    assert!(is_newer(&refused), "{refused:?}");
}

#[tokio::test]
async fn a_damaged_stream_is_refused_alone_and_forgotten_at_a_persons_word() {
    let damages: [Damage; 4] = [
        ("a changed byte", |pairs| *last(pairs).last_mut().unwrap() ^= 1, 5),
        ("a record cut off", |pairs| last(pairs).truncate(40), 5),
        ("a value without an entry", |pairs| last(pairs).truncate(3), 0),
        ("a key of another length", |pairs| pairs.push((vec![0xff; 3], vec![1; 9])), 0),
    ];
    for (name, damage, end) in damages {
        let scratch = Scratch::new("damaged");
        let dir = scratch.path("journal");
        rewritten(&dir, damage).await;
        refused_alone(&dir, |e| {
            matches!(e, BackendError::Record { .. } | BackendError::Corrupt(_)) && e.is_damage()
        })
        .await;
        let backend = sled(&dir);
        assert_eq!(backend.claimed_end(&bad()).await.unwrap(), Some(Seq(5)), "{name}");
        backend.accept_loss(&bad()).await.unwrap();
        assert!(error(&backend).await.is_damage(), "{name}: nothing is healed by half");
        backend.forget(&bad()).await.unwrap();
        assert_eq!(backend.head(&bad()).await.unwrap(), None, "{name}");
        let head = append(&mut claimed(&backend, &bad()).await, 0..2).await;
        drop(backend);
        let backend = sled(&dir);
        assert_eq!(opened(backend.clone(), bad()).await.unwrap().0.head(), Some(&head), "{name}");
        assert_eq!(opened(backend, good()).await.unwrap().1.len(), 9, "{name}");
        // What could be read is kept, from the first record on.
        let aside = asides(&dir);
        assert_eq!(aside, [scratch.path(&format!("journal.aside-uid-bad-{end}"))], "{name}");
        let frames = fs::read(&aside[0]).unwrap();
        let kept: Vec<Stored> = decode_stream(&frames).map_while(Result::ok).collect();
        assert!(kept.len() >= 4, "{name}: {}", kept.len());
        assert!(matches!(kept[0].record.event, Event::Baseline { .. }), "{name}");
    }
}

#[tokio::test]
async fn what_a_cut_stream_began_with_is_kept_as_well() {
    let scratch = Scratch::new("folded");
    let dir = scratch.path("journal");
    let backend = sled(&dir);
    let mut journal = claimed(&backend, &bad()).await;
    for _ in 0..40 {
        journal.append(vec![big(8_000)], at(101)).await.unwrap();
    }
    journal.retain(Retention { keep_bytes: 200_000, keep_ms: None, may_go: MayGo::Any });
    assert_eq!(journal.trim(at(103)).await.unwrap().records.len(), 1);
    let folded = backend.read(&bad()).await.unwrap().folded().unwrap().clone();
    let last = journal.head().unwrap().seq;
    for number in 1..=2 {
        backend.forget(&bad()).await.unwrap();
        let name = if number == 1 { String::new() } else { format!("-{number}") };
        let path = scratch.path(&format!("journal.aside-uid-bad-{last}{name}"));
        let beginning = scratch.path(&format!("journal.aside-uid-bad-{last}{name}.folded"));
        assert_eq!(fs::read_to_string(&beginning).unwrap(), folded.text());
        let frames = fs::read(&path).unwrap();
        let kept: Vec<Stored> = decode_stream(&frames).map(Result::unwrap).collect();
        assert_eq!(kept.last().unwrap().record.seq, last);
        assert!(kept[0].record.seq <= folded.head().seq.next());
        // Once more the same, of which only what it began with is still kept: it stays, too.
        fs::remove_file(&path).unwrap();
        let all: Vec<Stored> = kept.into_iter().filter(|s| s.record.seq > folded.head().seq).collect();
        backend.append(&bad(), None, &all, Some(&folded)).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_kept_of_a_stream_takes_the_place_of_nothing_that_was_kept() {
    let scratch = Scratch::new("asides");
    let dir = scratch.path("journal");
    let backend = sled(&dir);
    let mut kept = Vec::new();
    for round in 0..3 {
        append(&mut claimed(&backend, &bad()).await, round..round + 2).await;
        backend.forget(&bad()).await.unwrap();
        // Nothing is left: nothing is written of it.
        backend.forget(&bad()).await.unwrap();
        let found = asides(&dir);
        assert_eq!(found.len(), usize::from(round) + 1);
        let newest = found.into_iter().find(|path| !kept.iter().any(|(known, _)| known == path));
        let bytes = fs::read(newest.as_ref().unwrap()).unwrap();
        kept.push((newest.unwrap(), bytes));
        for (path, bytes) in &kept {
            assert_eq!(&fs::read(path).unwrap(), bytes, "{}", path.display());
        }
    }
    assert_ne!(kept[0].1, kept[1].1);
    // There is an end to it, at which nothing is given up.
    for round in 3..16 {
        append(&mut claimed(&backend, &bad()).await, round..round + 2).await;
        backend.forget(&bad()).await.unwrap();
    }
    let head = append(&mut claimed(&backend, &bad()).await, 0..2).await;
    let full = backend.forget(&bad()).await.unwrap_err();
    assert!(matches!(full, BackendError::Io { .. }), "{full:?}");
    assert_eq!(backend.head(&bad()).await.unwrap(), Some(head));
    assert_eq!(asides(&dir).len(), 16);
}
