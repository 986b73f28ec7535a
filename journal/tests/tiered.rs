//! Two stores as one: the mirror never delays, never decides, and is worth its disk when the first store is damaged.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{Scratch, at, baseline, big, fact, stream, whole};
use std::{sync::Arc, time::Duration};
use valkeeper_core::{ids::Seq, state::ClusterState};
use valkeeper_journal::{
    Anchor, Backend, BackendError, Error, Hash, Head, Journal, MayGo, Memory, Retention, Segments, Sled,
    Tiered, Whole,
    memory::Fault,
    segments::{Body, MemoryObjects},
    verify,
};

/// A record as somebody remembers it.
fn place(head: &Head) -> Option<Anchor> {
    Some(Anchor { seq: head.seq, hash: head.hash })
}

/// Waits until the mirror has done what it is to do.
async fn until_it_holds(mirror: &dyn Backend, all: &Whole) {
    let made = async {
        while whole(mirror).await != *all {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), made).await.unwrap();
}

struct Pair {
    first: Arc<Memory>,
    mirror: Arc<Memory>,
    tiered: Arc<Tiered>,
}

impl Pair {
    fn new() -> Pair {
        let (first, mirror) = (Arc::new(Memory::new()), Arc::new(Memory::new()));
        let tiered = Arc::new(Tiered::new(first.clone(), mirror.clone()));
        Pair { first, mirror, tiered }
    }

    async fn claimed(&self) -> Journal {
        let (mut journal, _) = Journal::open(self.tiered.clone(), stream()).await.unwrap();
        journal.retain(Retention { keep_bytes: 100_000, keep_ms: None, may_go: MayGo::Any });
        journal.claim(Some(baseline(&stream())), "w", "v", at(1)).await.unwrap();
        journal
    }

    /// Waits until both hold the same.
    async fn mirrored(&self) -> Whole {
        let both = async {
            loop {
                let (first, mirror) = (whole(&*self.first).await, whole(&*self.mirror).await);
                if first == mirror {
                    return first;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), both).await.unwrap()
    }

    /// Lets the mirror take what waits for it.
    async fn drain(&self) {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    async fn open(&self) -> Result<(Journal, ClusterState), Error> {
        Journal::open(self.tiered.clone(), stream()).await
    }
}

async fn with_history() -> (Pair, Journal) {
    let pair = Pair::new();
    let mut journal = pair.claimed().await;
    for round in 0..50_u16 {
        journal.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
    }
    assert_eq!(journal.trim(at(3)).await.unwrap().records.len(), 1);
    (pair, journal)
}

#[tokio::test]
async fn the_mirror_follows_with_its_cuts_and_is_what_a_start_reads() {
    let (pair, journal) = with_history().await;
    let all = pair.mirrored().await;
    assert!(all.folded.is_some());
    let mut recalled = pair.tiered.recall(&stream()).await.unwrap();
    let mut records = Vec::new();
    while let Some(page) = recalled.page().await.unwrap() {
        records.extend(page.records);
    }
    assert_eq!((recalled.folded(), &records), (all.folded.as_ref(), &all.records));
    let (again, _) = pair.open().await.unwrap();
    assert_eq!(again.head(), journal.head());
}

#[tokio::test]
async fn a_mirror_that_fails_or_lags_delays_nothing_and_is_made_again_in_a_quiet_moment() {
    for fault in [Fault::Poisoned, Fault::Full, Fault::AmbiguousNotCommitted, Fault::Conflict] {
        let (pair, mut journal) = with_history().await;
        pair.mirrored().await;
        pair.mirror.inject(fault);
        for round in 0..5 {
            journal.append(vec![fact(200 + round)], at(4)).await.unwrap();
        }
        let (again, _) = pair.open().await.unwrap();
        assert_eq!(again.head(), journal.head(), "{fault:?}");
        pair.drain().await;
        assert_ne!(whole(&*pair.first).await, whole(&*pair.mirror).await, "{fault:?}");
        journal.maintain().await.unwrap();
        pair.mirrored().await;
        pair.mirror.forget(&stream()).await.unwrap();
        journal.maintain().await.unwrap();
        pair.mirrored().await;
    }
}

#[tokio::test]
async fn a_first_store_that_lost_its_end_or_everything_is_refused_until_a_person_decides() {
    let (pair, journal) = with_history().await;
    let intact = pair.mirrored().await;
    let head = *journal.head().unwrap();
    let last = head.seq;
    pair.first.forget(&stream()).await.unwrap();
    let refused = pair.open().await.err().unwrap();
    assert!(
        matches!(&refused, Error::Backend(BackendError::BehindAnchor { anchor, .. }) if *anchor == last),
        "{refused:?}"
    );
    // Further than the mirror reaches: nothing is written.
    let other = Some(Anchor { hash: Hash([1; 32]), ..place(&head).unwrap() });
    let elsewhere = pair.tiered.repair(&stream(), other).await.unwrap_err();
    assert!(matches!(&elsewhere, BackendError::BehindAnchor { .. }), "{elsewhere:?}");
    let beyond = Some(Anchor { seq: last.next(), hash: Hash([1; 32]) });
    let short = pair.tiered.repair(&stream(), beyond).await.unwrap_err();
    assert!(matches!(&short, BackendError::BehindAnchor { .. }), "{short:?}");
    assert_eq!(whole(&*pair.first).await, Whole::default());
    pair.tiered.repair(&stream(), place(&head)).await.unwrap();
    assert_eq!(whole(&*pair.first).await, intact);
    let (mut journal, _) = pair.open().await.unwrap();
    journal.claim(None, "after the repair", "v", at(9)).await.unwrap();
    assert_eq!(verify(intact.folded.as_ref(), &pair.mirrored().await.records).problems, []);
    // Or the loss is accepted: history begins anew.
    pair.first.forget(&stream()).await.unwrap();
    pair.tiered.accept_loss(&stream()).await.unwrap();
    let (journal, state) = pair.open().await.unwrap();
    assert_eq!((journal.head(), state.head), (None, Seq(0)));
}

#[tokio::test]
async fn a_first_store_that_holds_another_history_is_refused() {
    let (pair, _journal) = with_history().await;
    pair.mirrored().await;
    let other = Pair::new();
    let mut journal = other.claimed().await;
    for round in 0..80_u16 {
        journal.append(vec![big(3_000), fact(round + 1)], at(5)).await.unwrap();
    }
    let mixed = Tiered::new(other.first.clone(), pair.mirror.clone());
    let refused = Journal::open(Arc::new(mixed), stream()).await.err().unwrap();
    let Error::Backend(error) = &refused else { panic!("{refused:?}") };
    let said = error.to_string();
    assert!(refused.is_broken() && said.contains("the second copy"), "{said}");
}

#[tokio::test]
async fn a_repair_never_takes_records_away() {
    let (pair, mut journal) = with_history().await;
    let copied = pair.mirrored().await.records.last().unwrap().head();
    pair.mirror.inject(Fault::Poisoned);
    journal.append(vec![fact(300)], at(6)).await.unwrap();
    let refused = pair.tiered.repair(&stream(), place(&copied)).await.unwrap_err();
    assert!(refused.to_string().contains("the first copy goes on"), "{refused}");
    assert_eq!(whole(&*pair.first).await.records.last().map(|s| s.head()), journal.head().copied());
}

#[tokio::test]
async fn damaged_config_maps_are_written_anew_from_the_mirror_and_kept_aside() {
    let objects = Arc::new(MemoryObjects::new());
    let (first, mirror) = (Arc::new(Segments::new(objects.clone())), Arc::new(Memory::new()));
    let tiered = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    let (mut journal, _) = Journal::open(tiered.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 6_000, keep_ms: None, may_go: MayGo::Any });
    journal.claim(Some(baseline(&stream())), "w", "v", at(1)).await.unwrap();
    for round in 0..80_u16 {
        journal.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
        journal.trim(at(2)).await.unwrap();
    }
    journal.maintain().await.unwrap();
    let before = whole(&*first).await;
    assert!(before.folded.is_some());
    until_it_holds(&*mirror, &before).await;
    let head = *journal.head().unwrap();
    let last = head.seq;
    let names = |suffix: &str| {
        let mut found = Vec::new();
        objects.edit(|all| found = all.keys().filter(|name| name.contains(suffix)).cloned().collect());
        found
    };
    for damaged in [names("-segment-")[0].clone(), names("-folded-")[0].clone(), names("-head")[0].clone()] {
        // A new process, which knows nothing yet.
        let fresh: Arc<dyn Backend> =
            Arc::new(Tiered::new(Arc::new(Segments::new(objects.clone())), mirror.clone()));
        objects.edit(|all| {
            let object = all.get_mut(&damaged).unwrap();
            object.body = Body::Text("edited".to_owned());
        });
        fresh.repair(&stream(), place(&head)).await.unwrap();
        let kept = names("-aside-");
        assert!(kept.iter().any(|name| damaged.ends_with(name.split_once("-of-").unwrap().1)), "{kept:?}");
        let (journal, _) = Journal::open(fresh, stream()).await.unwrap();
        assert_eq!(journal.head().unwrap().seq, last, "{damaged}");
        assert_eq!(whole(&Segments::new(objects.clone())).await, before, "{damaged}");
    }
}

#[tokio::test]
async fn the_mirror_on_a_disk_is_made_for_a_stream_that_was_cut_and_repairs_it() {
    let scratch = Scratch::new("tiered");
    let objects = Arc::new(MemoryObjects::new());
    let first = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(first.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 6_000, keep_ms: None, may_go: MayGo::Any });
    journal.claim(Some(baseline(&stream())), "w", "v", at(1)).await.unwrap();
    for round in 0..80_u16 {
        journal.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
        journal.trim(at(2)).await.unwrap();
    }
    let before = whole(&*first).await;
    assert!(before.folded.is_some());
    // A mirror is given to a journal that has been there for long.
    let sled = Arc::new(Sled::open(&scratch.path("mirror")).unwrap());
    let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), sled.clone()));
    tiered.maintain(&stream()).await.unwrap();
    until_it_holds(&*sled, &before).await;
    let head = *journal.head().unwrap();
    objects.edit(|all| all.clear());
    let refused = Journal::open(tiered.clone(), stream()).await.err().unwrap();
    assert!(refused.is_damage(), "{refused:?}");
    tiered.repair(&stream(), place(&head)).await.unwrap();
    assert_eq!(whole(&Segments::new(objects.clone())).await, before);
    // A loss that is accepted: the mirror does not speak of it any more, and neither does its anchor.
    objects.edit(|all| all.clear());
    tiered.accept_loss(&stream()).await.unwrap();
    let (journal, _) = Journal::open(tiered.clone(), stream()).await.unwrap();
    assert_eq!(journal.head(), None);
    drop((tiered, sled, journal));
    // What the mirror had is kept, and nothing that follows empties it.
    let kept: Vec<_> = std::fs::read_dir(scratch.path("")).unwrap().map(|e| e.unwrap().path()).collect();
    let aside = kept.iter().find(|path| path.to_string_lossy().contains(".aside-")).unwrap();
    assert!(std::fs::metadata(aside).unwrap().len() > 1_000, "{kept:?}");
    // The task that writes the mirror lets go of it a moment later.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let sled = Sled::open(&scratch.path("mirror")).unwrap();
    assert_eq!(whole(&sled).await, Whole::default());
}

#[tokio::test]
async fn a_first_store_that_was_rolled_back_does_not_take_its_mirror_with_it() {
    let (pair, mut journal) = with_history().await;
    let earlier = whole(&*pair.first).await;
    journal.append(vec![fact(400)], at(7)).await.unwrap();
    let intact = pair.mirrored().await;
    pair.first.forget(&stream()).await.unwrap();
    let Whole { folded, records } = earlier;
    pair.first.append(&stream(), None, &records, folded.as_ref()).await.unwrap();
    assert!(matches!(pair.tiered.maintain(&stream()).await, Err(BackendError::BehindAnchor { .. })));
    assert!(matches!(journal.maintain().await, Err(Error::HeadMoved { .. })));
    assert_eq!(whole(&*pair.mirror).await, intact);
    pair.tiered.repair(&stream(), place(&intact.records.last().unwrap().head())).await.unwrap();
    assert_eq!(whole(&*pair.first).await, intact);
}

/// A stream in objects, written before there was a mirror: segments, a cut, and a tail.
async fn in_objects(objects: &Arc<MemoryObjects>) -> (Arc<Segments>, Head) {
    let first = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(first.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes: 20_000, keep_ms: None, may_go: MayGo::Any });
    journal.claim(Some(baseline(&stream())), "w", "v", at(1)).await.unwrap();
    for round in 0..80_u16 {
        journal.append(vec![big(3_000), fact(round)], at(2)).await.unwrap();
    }
    (first, *journal.head().unwrap())
}

fn named(objects: &MemoryObjects, suffix: &str) -> Vec<String> {
    let mut found = Vec::new();
    objects.edit(|all| found = all.keys().filter(|name| name.contains(suffix)).cloned().collect());
    found
}

fn damage(objects: &MemoryObjects, name: &str) {
    objects.edit(|all| all.get_mut(name).unwrap().body = Body::Text("edited".to_owned()));
}

#[tokio::test]
async fn a_mirror_that_is_damaged_before_its_end_is_made_again_and_kept_aside() {
    let (mine, theirs) = (Arc::new(MemoryObjects::new()), Arc::new(MemoryObjects::new()));
    let (first, head) = in_objects(&mine).await;
    let mirror = Arc::new(Segments::new(theirs.clone()));
    let tiered: Arc<dyn Backend> = Arc::new(Tiered::new(first.clone(), mirror.clone()));
    tiered.maintain(&stream()).await.unwrap();
    let all = whole(&*first).await;
    until_it_holds(&*mirror, &all).await;
    let hole = named(&theirs, "-segment-")[1].clone();
    damage(&theirs, &hole);
    let (journal, _) = Journal::open(tiered.clone(), stream()).await.unwrap();
    assert_eq!(journal.head(), Some(&head));
    let again = Segments::new(theirs.clone());
    let healed = async {
        while named(&theirs, "-aside-").is_empty() || again.head(&stream()).await.unwrap() != Some(head) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), healed).await.unwrap();
    assert_eq!(whole(&Segments::new(theirs.clone())).await, all);
    let kept = named(&theirs, "-aside-");
    assert!(kept.iter().any(|name| hole.ends_with(name.split_once("-of-").unwrap().1)), "{kept:?}");
}

#[tokio::test]
async fn a_first_store_of_which_one_object_was_written_after_all_were_deleted_is_written_anew() {
    let (objects, mirror) = (Arc::new(MemoryObjects::new()), Arc::new(Memory::new()));
    let (first, head) = in_objects(&objects).await;
    let all = whole(&*first).await;
    mirror.append(&stream(), None, &all.records, all.folded.as_ref()).await.unwrap();
    let left = named(&objects, "-segment-").pop().unwrap();
    objects.edit(|all| all.retain(|name, _| *name == left));
    assert_eq!(named(&objects, ""), [left]);
    let fresh: Arc<dyn Backend> = Arc::new(Tiered::new(Arc::new(Segments::new(objects.clone())), mirror));
    let refused = Journal::open(fresh.clone(), stream()).await.map(drop).unwrap_err();
    let why = format!("{refused:?}");
    assert!(why.contains("is missing, but there are others of its stream"), "{why}");
    fresh.repair(&stream(), place(&head)).await.unwrap();
    let (journal, _) = Journal::open(fresh, stream()).await.unwrap();
    assert_eq!(journal.head(), Some(&head));
    assert_eq!(whole(&Segments::new(objects)).await, all);
}

#[tokio::test]
async fn a_repair_counts_the_segments_beyond_a_head_that_cannot_be_read() {
    let (objects, older) = (Arc::new(MemoryObjects::new()), Arc::new(Memory::new()));
    let (first, head) = in_objects(&objects).await;
    let all = whole(&*first).await;
    let half: Vec<_> = all.records[..all.records.len() / 2].to_vec();
    older.append(&stream(), None, &half, all.folded.as_ref()).await.unwrap();
    let remembered = half.last().unwrap().head();
    damage(&objects, &named(&objects, "-head")[0]);
    let fresh: Arc<dyn Backend> =
        Arc::new(Tiered::new(Arc::new(Segments::new(objects.clone())), older.clone()));
    let claimed = fresh.claimed_end(&stream()).await.unwrap().unwrap();
    assert!(claimed > remembered.seq && claimed <= head.seq, "{claimed}");
    let refused = fresh.repair(&stream(), place(&remembered)).await.unwrap_err();
    assert!(refused.to_string().contains(&format!("goes on to {claimed}")), "{refused}");
    assert_eq!(named(&objects, "-aside-"), Vec::<String>::new());
    // Once the loss is accepted, the copy that can be read is worth more than the one that cannot.
    fresh.repair(&stream(), None).await.unwrap();
    let (journal, _) = Journal::open(fresh, stream()).await.unwrap();
    assert_eq!(journal.head(), Some(&remembered));
}

#[tokio::test]
async fn an_accepted_loss_never_takes_the_copy_that_is_shorter() {
    let (objects, older) = (Arc::new(MemoryObjects::new()), Arc::new(Memory::new()));
    let (first, head) = in_objects(&objects).await;
    let all = whole(&*first).await;
    older.append(&stream(), None, &all.records[..3], all.folded.as_ref()).await.unwrap();
    let tiered = Tiered::new(first, older);
    let refused = tiered.repair(&stream(), None).await.unwrap_err();
    assert!(refused.to_string().contains(&format!("goes on to {}", head.seq)), "{refused}");
    assert_eq!(named(&objects, "-aside-"), Vec::<String>::new());
}
