//! What can only be seen from within: a sync that fails, and who is answered how.

use super::*;
use crate::{
    error::Error,
    journal::Journal,
    record::Hash,
    testing::{Scratch, one_of_each},
};
use valkeeper_core::{
    event::{BaselineOrigin, Event, Record},
    ids::{Timestamp, WriterEpoch},
    observation::SpecFact,
};

fn named(name: &str) -> StreamId {
    StreamId(name.to_owned())
}

fn baseline(stream: &StreamId) -> Event {
    let (namespace, name) = ("shop".to_owned(), "orders".to_owned());
    Event::Baseline { cluster_uid: stream.0.clone(), namespace, name, origin: BaselineOrigin::Empty }
}

async fn opened(backend: &Arc<Sled>, stream: &StreamId) -> Result<Journal, Error> {
    Ok(Journal::open(backend.clone(), stream.clone()).await?.0)
}

async fn claimed(backend: &Arc<Sled>, stream: &StreamId) -> Journal {
    let mut journal = opened(backend, stream).await.unwrap();
    journal.claim(Some(baseline(stream)), "w", "v", Timestamp(1)).await.unwrap();
    journal
}

fn swap_data(backend: &Sled, file: File) -> File {
    let gate = backend.shared.gate.read().unwrap();
    gate.live.as_ref().unwrap().store().swap_data(file)
}

#[tokio::test]
async fn a_failed_sync_poisons_until_reopen_and_what_was_acknowledged_is_there() {
    let scratch = Scratch::new("poison");
    let backend = Arc::new(Sled::open(&scratch.path("journal")).unwrap());
    let (one, two) = (named("uid-1"), named("uid-2"));
    let mut journal = claimed(&backend, &one).await;
    let mut other = claimed(&backend, &two).await;
    let kept = *other.head().unwrap();
    // fdatasync of a device that cannot be synced fails, as a bad disk does.
    let real = swap_data(&backend, File::open("/dev/null").unwrap());
    let failed = journal.append(vec![one_of_each()[2].clone()], Timestamp(2)).await.unwrap_err();
    assert!(matches!(failed, Error::Poisoned(_)) && failed.is_broken(), "{failed:?}");
    // The disk works again; the handle is not to be believed all the same.
    swap_data(&backend, real);
    for stream in [&one, &two] {
        assert!(matches!(backend.head(stream).await, Err(BackendError::Poisoned(_))));
    }
    let failed = other.append(vec![one_of_each()[2].clone()], Timestamp(2)).await.unwrap_err();
    assert!(matches!(failed, Error::Poisoned(_)), "{failed:?}");
    // A reading opens it anew. Who was refused stays refused; who opens again goes on.
    let mut again = opened(&backend, &two).await.unwrap();
    assert_eq!(again.head(), Some(&kept));
    let refused = other.append(vec![one_of_each()[2].clone()], Timestamp(3)).await.unwrap_err();
    assert!(matches!(refused, Error::Poisoned(_)), "{refused:?}");
    again.claim(None, "w2", "v", Timestamp(3)).await.unwrap();
    assert!(opened(&backend, &one).await.unwrap().head().unwrap().seq >= Seq(2));
}

#[tokio::test]
async fn a_store_that_cannot_be_opened_anew_stays_refused_until_it_can() {
    let scratch = Scratch::new("revive");
    let dir = scratch.path("journal");
    let backend = Arc::new(Sled::open(&dir).unwrap());
    let stream = named("uid-1");
    let mut journal = claimed(&backend, &stream).await;
    swap_data(&backend, File::open("/dev/null").unwrap());
    journal.append(vec![one_of_each()[2].clone()], Timestamp(2)).await.unwrap_err();
    std::fs::rename(&dir, scratch.path("away")).unwrap();
    for _ in 0..2 {
        let refused = opened(&backend, &stream).await.err().unwrap();
        assert!(matches!(refused, Error::Backend(BackendError::StoreMissing { .. })), "{refused:?}");
        assert!(matches!(backend.head(&stream).await, Err(BackendError::Poisoned(_))));
    }
    std::fs::rename(scratch.path("away"), &dir).unwrap();
    assert!(opened(&backend, &stream).await.unwrap().head().is_some());
}

#[tokio::test]
async fn a_stream_over_which_sled_panics_is_refused_alone_and_can_be_forgotten() {
    let scratch = Scratch::new("panics");
    let backend = Arc::new(Sled::open(&scratch.path("journal")).unwrap());
    let (one, two) = (named("uid-1"), named("uid-2"));
    let mut journal = claimed(&backend, &one).await;
    let mut other = claimed(&backend, &two).await;
    let panics = || -> Result<(), BackendError> { panic!("a page of another tree") };
    let refused = backend.shared.ask(|live, _| live.of(&one, panics));
    for refused in [refused.err().unwrap(), backend.head(&one).await.unwrap_err()] {
        let BackendError::Corrupt(why) = &refused else { panic!("{refused:?}") };
        assert!(why.contains("a page of another tree"), "{why}");
    }
    assert_eq!(backend.streams().await.unwrap(), [one.clone(), two.clone()]);
    let event = one_of_each()[2].clone();
    let stopped = journal.append(vec![event.clone()], Timestamp(2)).await.unwrap_err();
    assert!(matches!(stopped, Error::Backend(BackendError::Corrupt(_))), "{stopped:?}");
    // The other one's writer notices nothing.
    other.append(vec![event], Timestamp(2)).await.unwrap();
    backend.forget(&one).await.unwrap();
    assert_eq!(claimed(&backend, &one).await.head().unwrap().seq, Seq(2));
}

#[tokio::test]
async fn a_store_that_is_opened_anew_has_its_bad_stream_and_its_good_one_as_at_the_first_opening() {
    let scratch = Scratch::new("revive-one");
    let dir = scratch.path("journal");
    let backend = Arc::new(Sled::open(&dir).unwrap());
    let (one, two) = (named("uid-1"), named("uid-2"));
    let mut journal = claimed(&backend, &one).await;
    let kept = *claimed(&backend, &two).await.head().unwrap();
    let real = swap_data(&backend, File::open("/dev/null").unwrap());
    journal.append(vec![one_of_each()[2].clone()], Timestamp(2)).await.unwrap_err();
    swap_data(&backend, real);
    // Meanwhile acknowledged records of one go missing.
    let (mut anchors, _) = crate::anchor::Anchors::open(&dir).unwrap();
    let beyond = Head { seq: Seq(9), ..*journal.head().unwrap() };
    anchors.set(&[(one.clone(), crate::anchor::Anchor::of(&beyond))]).unwrap();
    for _ in 0..2 {
        let refused = opened(&backend, &one).await.err().unwrap();
        assert!(
            matches!(refused, Error::Backend(BackendError::BehindAnchor { anchor: Seq(9), .. })),
            "{refused:?}"
        );
        assert!(matches!(backend.head(&one).await, Err(BackendError::BehindAnchor { .. })));
        assert_eq!(opened(&backend, &two).await.unwrap().head(), Some(&kept));
    }
    assert_eq!(backend.shared.gate.read().unwrap().opening, 2);
    backend.accept_loss(&one).await.unwrap();
    assert!(opened(&backend, &one).await.unwrap().head().is_some());
}

#[tokio::test]
async fn a_stream_that_cannot_be_emptied_goes_on_in_another_tree() {
    let scratch = Scratch::new("generation");
    let dir = scratch.path("journal");
    let backend = Arc::new(Sled::open(&dir).unwrap());
    let stream = named("uid/1");
    claimed(&backend, &stream).await;
    let renew = |live: &Live, _| {
        live.store().renew(&stream, 0)?;
        live.store().sync().map_err(BackendError::Corrupt)
    };
    backend.shared.ask(renew).unwrap();
    drop(backend);
    // The old tree is not looked at any more, and its anchor is missed.
    let backend = Arc::new(Sled::open(&dir).unwrap());
    assert!(matches!(backend.head(&stream).await, Err(BackendError::BehindAnchor { .. })));
    backend.accept_loss(&stream).await.unwrap();
    let head = *claimed(&backend, &stream).await.head().unwrap();
    drop(backend);
    let backend = Arc::new(Sled::open(&dir).unwrap());
    assert_eq!(backend.head(&stream).await.unwrap(), Some(head));
    assert_eq!(backend.streams().await.unwrap(), [stream]);
}

#[tokio::test]
async fn in_a_group_each_append_has_its_own_answer_and_a_failed_sync_is_everyones() {
    let scratch = Scratch::new("group");
    let backend = Arc::new(Sled::open_with_limit(&scratch.path("journal"), 2_000).unwrap());
    let record = |stream: &StreamId, seq: u64, prev: Hash, event: Event| {
        let record = Record { seq: Seq(seq), epoch: WriterEpoch(1), time: Timestamp(1), event };
        (stream.clone(), Stored::seal(record, prev).unwrap())
    };
    let write = |(stream, stored): &(StreamId, Stored), expected: Option<Head>| Write {
        stream: stream.clone(),
        expected,
        first: stored.record.seq,
        head: stored.head(),
        frames: codec::encode(stored),
        cut: None,
    };
    let large = Event::SpecChanged(SpecFact::Invalid("x".repeat(4_000)));
    let (a, b, c) = (named("uid-a"), named("uid-b"), named("uid-c"));
    let first = record(&a, 1, Hash::ZERO, baseline(&a));
    let second = record(&a, 2, first.1.hash, one_of_each()[1].clone());
    let refused = record(&b, 1, Hash::ZERO, baseline(&b));
    let full = record(&c, 1, Hash::ZERO, large);
    let group = vec![
        write(&first, None),
        write(&refused, Some(first.1.head())),
        write(&second, Some(first.1.head())),
        write(&full, None),
        write(&second, Some(first.1.head())),
    ];
    let answers = backend.shared.write(group);
    let [
        Ok(()),
        Err(AppendError::Conflict { actual: None }),
        Ok(()),
        Err(AppendError::Full { .. }),
        Err(late),
    ] = &answers[..]
    else {
        panic!("{answers:?}")
    };
    assert!(matches!(late, AppendError::Conflict { actual: Some(head) } if *head == second.1.head()));
    assert_eq!(backend.head(&a).await.unwrap(), Some(second.1.head()));
    assert_eq!(backend.streams().await.unwrap(), [a]);
    swap_data(&backend, File::open("/dev/null").unwrap());
    let answers = backend.shared.write(vec![write(&refused, None), write(&first, None)]);
    assert!(answers.iter().all(|answer| matches!(answer, Err(AppendError::Poisoned(_)))), "{answers:?}");
}
