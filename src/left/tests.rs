//! Journals in objects in memory, an archive beside them, and an API server that says what lives.

use super::*;
use std::cell::Cell;
use valkeeper_core::event::BaselineOrigin;
use valkeeper_journal::{
    Segments,
    archive::{BlobsFault, Branch, MemoryBlobs},
    segments::{MemoryObjects, memory_objects::ObjectsFault},
};

const KEEP: Duration = Duration::from_secs(60);
/// Of the last record of every journal here.
const THEN: Timestamp = Timestamp(1_000_000_000);

struct World {
    objects: Arc<MemoryObjects>,
    blobs: Arc<MemoryBlobs>,
    archive: Archive,
}

impl World {
    /// Journals of clusters of these UIDs, which say that they are deleted.
    async fn of(uids: &[&str]) -> World {
        let (objects, blobs) = (Arc::new(MemoryObjects::new()), Arc::new(MemoryBlobs::new()));
        let world = World { objects, archive: Archive::new(blobs.clone()), blobs };
        for uid in uids {
            world.write(uid, vec![Event::SpecChanged(SpecFact::Deleting)]).await;
        }
        world
    }

    async fn write(&self, uid: &str, events: Vec<Event>) {
        let stream = StreamId(uid.to_owned());
        let (mut journal, _) = Journal::open(self.backend(), stream).await.unwrap();
        let baseline = Event::Baseline {
            cluster_uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            origin: BaselineOrigin::Empty,
        };
        journal.claim(Some(baseline), "w", "v", THEN).await.unwrap();
        journal.append(events, THEN).await.unwrap();
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(Segments::new(self.objects.clone()))
    }

    fn desk(&self) -> Desk<'_> {
        Desk {
            backend: self.backend(),
            archive: Some(&self.archive),
            keep: Some(KEEP),
            writer: "leader",
            after: None,
        }
    }

    async fn streams(&self) -> Vec<String> {
        self.backend().streams().await.unwrap().into_iter().map(|stream| stream.0).collect()
    }

    async fn is_archived(&self, uid: &str) -> bool {
        let branches = self.archive.branches().await.unwrap();
        branches.iter().any(|Branch { stream, .. }| stream.0 == uid)
    }
}

fn after(seconds: i64) -> Timestamp {
    THEN.plus_millis(seconds * 1_000)
}

/// A look at a time at which only these clusters are known, and the API server knows none but `alive`.
async fn look(desk: &mut Desk<'_>, now: Timestamp, known: &[&str], alive: Option<&str>) -> Look {
    let known = known.iter().map(|uid| (*uid).to_owned()).collect();
    let uid_of = async |_: &str, name: &str| Ok((alive == Some(name)).then(|| name.to_owned()));
    desk.look(&known, now, &uid_of, &|| Ok(())).await.unwrap()
}

#[tokio::test]
async fn what_is_old_is_archived_and_removed_and_nothing_else() {
    let world = World::of(&["a", "b", "c"]).await;
    let mut desk = world.desk();
    let young = look(&mut desk, after(60), &[], None).await;
    assert_eq!(young, Look { left: 3, removed: 0, stuck: 0 });
    // One is known to the watch, one to the API server alone.
    let old = look(&mut desk, after(61), &["a"], Some("b")).await;
    assert_eq!(old, Look { left: 1, removed: 1, stuck: 0 });
    assert_eq!(world.streams().await, ["a", "b"]);
    assert!(world.is_archived("c").await && !world.is_archived("b").await);
    desk.keep = None;
    assert_eq!(look(&mut desk, after(1_000_000), &[], None).await.removed, 0, "for ever");
}

#[tokio::test]
async fn a_journal_that_does_not_say_so_is_kept_from_when_it_is_found() {
    let world = World::of(&[]).await;
    world.write("a", vec![Event::SpecChanged(SpecFact::Invalid("x".to_owned()))]).await;
    let mut desk = world.desk();
    assert_eq!(look(&mut desk, after(61), &[], None).await, Look { left: 1, removed: 0, stuck: 0 });
    assert_eq!(look(&mut desk, after(120), &[], None).await.left, 1, "its time counts from there");
    assert_eq!(look(&mut desk, after(122), &[], None).await.removed, 1);
    assert!(world.is_archived("a").await);
}

#[tokio::test]
async fn an_archive_that_is_away_is_asked_once_and_nothing_goes() {
    let world = World::of(&["a", "b", "c"]).await;
    (0..8).for_each(|_| world.blobs.inject(BlobsFault::Unavailable));
    let mut desk = world.desk();
    assert_eq!(look(&mut desk, after(61), &[], None).await, Look { left: 3, removed: 0, stuck: 1 });
    assert!(world.blobs.clear_faults() > 0);
    // Whoever was tried last comes last.
    assert_eq!(desk.after, Some(StreamId("a".to_owned())));
    assert_eq!(look(&mut desk, after(61), &[], None).await, Look { left: 0, removed: 3, stuck: 0 });
}

#[tokio::test]
async fn those_that_cannot_go_are_counted_and_hold_up_no_others() {
    let names: Vec<String> = (0..TRIED_MAX + 5).map(|number| format!("damaged-{number:02}")).collect();
    let mut uids: Vec<&str> = names.iter().map(String::as_str).collect();
    uids.push("whole");
    let world = World::of(&uids).await;
    world.objects.edit(|all| {
        for (name, object) in all.iter_mut().filter(|(name, _)| name.contains("damaged")) {
            let valkeeper_journal::Body::Text(text) = &mut object.body else { panic!("{name}") };
            *text = text.replace("shop", "stop");
        }
    });
    let mut desk = world.desk();
    let found = look(&mut desk, after(61), &[], None).await;
    assert_eq!((found.removed, found.left), (1, names.len()), "{found:?}");
    assert_eq!(found.stuck, names.len());
}

#[tokio::test]
async fn only_so_many_are_tried_at_once_and_the_next_look_goes_on_behind_them() {
    let names: Vec<String> = (0..TRIED_MAX + 5).map(|number| format!("old-{number:02}")).collect();
    let world = World::of(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut desk = world.desk();
    // The first of all lives, which nobody knew before: it is tried once a round, as any other.
    let first = look(&mut desk, after(61), &[], Some("old-00")).await;
    assert_eq!(first, Look { left: 6, removed: TRIED_MAX - 1, stuck: 0 });
    assert_eq!(desk.after.as_ref().unwrap().0, names[TRIED_MAX - 1]);
    let second = look(&mut desk, after(61), &[], Some("old-00")).await;
    assert_eq!(second, Look { left: 1, removed: 5, stuck: 0 });
}

#[tokio::test]
async fn a_removal_that_broke_off_is_ended_or_counted_and_never_one_of_a_cluster_that_lives() {
    let world = World::of(&["a", "b"]).await;
    // The head of `a` is gone, its mark stays; somebody has made such a mark of `b`, which lives.
    world.objects.inject_after(2, ObjectsFault::Unavailable);
    assert!(world.backend().remove(&StreamId("a".to_owned())).await.is_err());
    world.objects.edit(|all| {
        let head = all["journal-b-head"].clone();
        all.insert("journal-b-removed".to_owned(), head);
    });
    world.objects.inject(ObjectsFault::Unavailable);
    let mut desk = world.desk();
    let found = look(&mut desk, after(1), &["b"], None).await;
    assert_eq!(found, Look { left: 0, removed: 0, stuck: 1 });
    let found = look(&mut desk, after(1), &[], None).await;
    assert_eq!(found, Look { left: 1, removed: 0, stuck: 0 }, "a mark beside a head is nothing");
    assert_eq!(world.streams().await, ["b"]);
    world
        .objects
        .edit(|all| assert!(all.keys().all(|name| !name.contains("journal-a-")), "{:?}", all.keys()));
}

#[tokio::test]
async fn whoever_does_not_lead_removes_nothing() {
    let world = World::of(&["a"]).await;
    let asked = Cell::new(0);
    let leads = || -> Result<(), Failure> {
        asked.set(asked.get() + 1);
        Err("deposed".into())
    };
    let uid_of = async |_: &str, _: &str| Ok(None);
    let found = world.desk().look(&HashSet::new(), after(61), &uid_of, &leads).await.unwrap();
    assert_eq!((found, asked.get()), (Look { left: 1, removed: 0, stuck: 1 }, 1));
    assert_eq!(world.streams().await, ["a"]);
}

#[test]
fn a_journal_goes_when_its_last_record_is_old_enough_and_never_without_a_time() {
    let at = |seconds: i64| after(seconds);
    assert_eq!([at(-5), at(60), at(61)].map(|now| is_over(THEN, now, Some(KEEP))), [false, false, true]);
    assert!(!is_over(THEN, at(i64::from(i32::MAX)), None));
}
