//! How journals are kept: how much of each, where the rest goes, and when. Carrying records to the archive takes as long as the archive
//! does, so it runs beside the turns; only what it has brought there may go.

use crate::{cluster::Shell, health::Metrics, k8s};
use std::{
    mem::{self, Discriminant, discriminant},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Semaphore, task::JoinHandle, time::Instant};
use valkeeper_core::ids::{Seq, Timestamp};
use valkeeper_journal::{
    Backend, Carried, Error, MayGo, Retention, StreamId,
    archive::{Archive, ArchiveError},
    carry,
};

/// Clusters whose records are carried to the archive at the same time: each holds up to a megabyte meanwhile.
const CARRIERS_MAX: usize = 4;

/// Pause after something failed, such as an archive that refused: it is tried once a minute, and what waits for it is kept.
const AGAIN: Duration = Duration::from_secs(60);

/// First pause after tending was given up for a member that was lost, or because it took too long: a failover is over by then, and on a
/// slow API server it is one attempt of a second in six. Each further one is twice as long, up to [`AGAIN`]: what takes too long now will
/// again in a moment.
const GIVEN_UP_PAUSE: Duration = Duration::from_secs(5);

/// A journal is tended at least so often, also where nothing is written: records grow old, and others may need the room.
const TENDED_WITHIN: Duration = Duration::from_secs(3_600);

/// Records after which the journal is tended in the next quiet moment: enough that there is something to merge, few enough
/// that a stream never consists of many small pieces.
const TENDED_EVERY: usize = 64;

/// Where records go before they leave the store.
pub struct ArchivePlace {
    /// The archive.
    pub archive: Archive,
    /// Its name, as records tell it; without credentials.
    pub place: String,
}

/// Settings and limits that all clusters share.
pub struct Keeping {
    keep_bytes: usize,
    keep_ms: Option<i64>,
    archive: Option<Arc<ArchivePlace>>,
    carriers: Arc<Semaphore>,
    /// Level to finalize streams at, if that was asked for.
    pub finalize: Option<u32>,
    /// How long the journal of a deleted cluster is kept; `None`: for ever.
    pub keep_deleted: Option<Duration>,
    /// True if journals outlive the process: then what a status remembers must be in them.
    pub survives: bool,
}

impl Keeping {
    /// Keeps `keep_bytes` of each journal, and nothing older than `keep_for`.
    pub fn new(keep_bytes: usize, keep_for: Option<Duration>, archive: Option<ArchivePlace>) -> Keeping {
        let keep_ms = keep_for.map(|age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let carriers = Arc::new(Semaphore::new(CARRIERS_MAX));
        let archive = archive.map(Arc::new);
        Keeping { keep_bytes, keep_ms, archive, carriers, finalize: None, keep_deleted: None, survives: true }
    }

    /// What a writer may let go of before anything was carried to the archive.
    pub fn retention(&self) -> Retention {
        self.retention_after(Seq(0))
    }

    /// What a writer may let go of whose journal is full: what can be carried to the archive at once is, however long that takes. Nothing
    /// else can be done for that cluster anyway.
    ///
    /// # Errors
    /// The journal is not one that can be used on.
    pub async fn carry_now(
        &self,
        shell: &Shell,
        stream: &StreamId,
        now: Timestamp,
    ) -> Result<Retention, Error> {
        let Some(archive) = &self.archive else { return Ok(self.retention()) };
        match Delivery::new(shell, archive, stream, now).run().await {
            Ok(carried) => Ok(self.retention_after(carried.map(|c| c.through).unwrap_or_default())),
            Err(error) if !error.is_certain() => Err(error),
            Err(error) => {
                tracing::warn!(
                    error = k8s::chain(&error),
                    "the journal is full, and nothing was carried to the archive"
                );
                Ok(self.retention())
            }
        }
    }

    /// Name of the archive, if there is one.
    pub fn place(&self) -> Option<&str> {
        self.archive.as_ref().map(|archive| archive.place.as_str())
    }

    /// The archive, if there is one.
    pub fn archive(&self) -> Option<&Archive> {
        self.archive.as_ref().map(|place| &place.archive)
    }

    fn retention_after(&self, through: Seq) -> Retention {
        let may_go = match &self.archive {
            None => MayGo::Any,
            Some(archive) => MayGo::Archived { through, place: archive.place.clone() },
        };
        Retention { keep_bytes: self.keep_bytes, keep_ms: self.keep_ms, may_go }
    }
}

/// What is known of the archive by what became of this stream's records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Archiving {
    /// Nothing had to go there since the task began.
    #[default]
    Unknown,
    /// It has taken the last ones.
    Takes,
    /// It has not.
    Refuses {
        /// Which kind of refusal it was.
        kind: Discriminant<ArchiveError>,
        /// What it said then. Later texts tell of other segments and times: the same refusal is told once.
        why: String,
    },
}

impl Archiving {
    /// It took records; true if that is new.
    fn taken(&mut self) -> bool {
        mem::replace(self, Archiving::Takes) != Archiving::Takes
    }

    /// It did not take them; true if that is new.
    fn refused(&mut self, kind: Discriminant<ArchiveError>, why: String) -> bool {
        match self {
            Archiving::Refuses { kind: known, why: _ } if *known == kind => false,
            Archiving::Refuses { .. } | Archiving::Unknown | Archiving::Takes => {
                *self = Archiving::Refuses { kind, why };
                true
            }
        }
    }
}

/// What one cluster's task does for its journal in quiet moments.
pub struct Tending {
    /// Records written since the journal was last tended.
    untended: usize,
    carrier: Option<JoinHandle<Result<Option<Carried>, Error>>>,
    /// Records up to this one were carried, and nothing was cut since: however often that is given up, they are not carried again.
    through: Option<Seq>,
    archiving: Archiving,
    /// Times that it became another, and whether the last one is still to be told.
    archiving_changes: usize,
    archiving_is_news: bool,
    /// Not before then, after something failed.
    not_before: Instant,
    /// Then at the latest.
    due_at: Instant,
    /// Pause after work is given up the next time.
    given_up_pause: Duration,
}

impl Default for Tending {
    /// The first quiet moment after a start tends: nobody knows what the run before left.
    fn default() -> Tending {
        let now = Instant::now();
        let archiving = Archiving::default();
        Tending {
            untended: 0,
            carrier: None,
            through: None,
            archiving,
            archiving_changes: 0,
            archiving_is_news: false,
            not_before: now,
            due_at: now,
            given_up_pause: GIVEN_UP_PAUSE,
        }
    }
}

impl Drop for Tending {
    fn drop(&mut self) {
        if let Some(carrier) = &self.carrier {
            carrier.abort();
        }
    }
}

impl Tending {
    /// So many records were written.
    pub fn wrote(&mut self, records: usize) {
        self.untended = self.untended.saturating_add(records);
    }

    /// True once, when the store is to be tidied and looked through for what is to go.
    pub fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let carried = self.carrier.as_ref().is_some_and(JoinHandle::is_finished);
        let has_reason = self.untended >= TENDED_EVERY || now >= self.due_at;
        if now < self.not_before || !(carried || has_reason) {
            return false;
        }
        self.untended = 0;
        self.due_at = now + TENDED_WITHIN;
        true
    }

    /// It did not work: it is due again after a pause.
    pub fn failed(&mut self) {
        self.pause(AGAIN);
    }

    /// Something more urgent came, or it took too long: it is due again soon, and later each time in a row.
    pub fn given_up(&mut self) {
        if !self.is_paused() {
            self.pause(self.given_up_pause);
            self.given_up_pause = (self.given_up_pause * 2).min(AGAIN);
        }
    }

    /// What was to go is gone, or nothing was. If nothing else was given up either, the pauses begin anew.
    pub fn done(&mut self) {
        self.through = None;
        if !self.is_paused() {
            self.given_up_pause = GIVEN_UP_PAUSE;
        }
    }

    /// True if something failed or was given up since it was due.
    fn is_paused(&self) -> bool {
        Instant::now() < self.not_before
    }

    fn pause(&mut self, pause: Duration) {
        self.not_before = Instant::now() + pause;
        self.due_at = self.not_before;
    }

    /// What may go now. With an archive: what was carried there and is not cut yet; where nothing is, a carrier is sent.
    ///
    /// # Errors
    /// What the carrier met in the journal itself: that is no word of the archive's.
    pub async fn retention(
        &mut self,
        shell: &Shell,
        stream: &StreamId,
        now: Timestamp,
    ) -> Result<Option<Retention>, Error> {
        let Some(archive) = &shell.keeping.archive else { return Ok(Some(shell.keeping.retention())) };
        let through = self.through(|| Delivery::new(shell, archive, stream, now)).await?;
        Ok(through.map(|through| shell.keeping.retention_after(through)))
    }

    /// The last record that may be cut, as a carrier found that has ended; the next one is sent when there is none.
    async fn through(&mut self, deliver: impl FnOnce() -> Delivery) -> Result<Option<Seq>, Error> {
        if let Some(ended) = self.carrier.take_if(|carrier| carrier.is_finished()) {
            match ended.await {
                Ok(carried) => self.carried(carried)?,
                Err(panicked) => {
                    tracing::error!(error = k8s::chain(&panicked), "nothing was carried to the archive");
                    self.failed();
                }
            }
        } else if self.carrier.is_none() && self.through.is_none() {
            self.carrier = Some(tokio::spawn(deliver().run()));
        }
        Ok(self.through)
    }

    /// What became of a delivery.
    fn carried(&mut self, carried: Result<Option<Carried>, Error>) -> Result<(), Error> {
        let changed = match carried {
            Ok(Some(Carried { through, segments: _ })) => {
                self.through = Some(through);
                self.archiving.taken()
            }
            Ok(None) => {
                self.done();
                false
            }
            Err(Error::Archive(refusal)) => {
                let (kind, why) = (discriminant(&refusal), k8s::chain(&Error::Archive(refusal)));
                tracing::warn!(error = why, "the archive does not take records; they stay in the journal");
                self.failed();
                self.archiving.refused(kind, why)
            }
            Err(of_journal) => return Err(of_journal),
        };
        self.archiving_changes += usize::from(changed);
        self.archiving_is_news |= changed;
        Ok(())
    }

    /// What is known of the archive.
    pub fn archiving(&self) -> &Archiving {
        &self.archiving
    }

    /// Number of the change that was not told yet, once.
    pub fn archiving_news(&mut self) -> Option<usize> {
        mem::take(&mut self.archiving_is_news).then_some(self.archiving_changes)
    }
}

/// One carrying of what is to go next.
struct Delivery {
    backend: Arc<dyn Backend>,
    archive: Arc<ArchivePlace>,
    carriers: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    stream: StreamId,
    retention: Retention,
    now: Timestamp,
}

impl Delivery {
    fn new(shell: &Shell, archive: &Arc<ArchivePlace>, stream: &StreamId, now: Timestamp) -> Delivery {
        Delivery {
            backend: Arc::clone(&shell.backend),
            archive: Arc::clone(archive),
            carriers: Arc::clone(&shell.keeping.carriers),
            metrics: Arc::clone(&shell.metrics),
            stream: stream.clone(),
            retention: shell.keeping.retention(),
            now,
        }
    }

    async fn run(self) -> Result<Option<Carried>, Error> {
        let Delivery { backend, archive, carriers, metrics, stream, retention, now } = self;
        // Never closed; a permit is only missing while others carry.
        let _permit = carriers.acquire().await.ok();
        let carried = carry(backend.as_ref(), &stream, &retention, &archive.archive, now).await;
        match &carried {
            Ok(Some(Carried { through: _, segments })) => metrics.archived(*segments),
            Err(Error::Archive(_)) => metrics.not_archived(),
            // Nothing was to go, or it could not be read: the archive was not asked, or said nothing of it.
            Ok(None) | Err(_) => {}
        }
        carried
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::{
        event::{BaselineOrigin, Event},
        observation::SpecFact,
    };
    use valkeeper_journal::{
        BackendError, Body, Journal, Problem, Segments,
        archive::{BlobsFault, MemoryBlobs},
        segments::MemoryObjects,
    };

    /// Longest wait for a carrier, which asks nothing but memory.
    const CARRIED_WITHIN: Duration = Duration::from_secs(30);

    fn told(tending: &mut Tending, refusal: ArchiveError) -> Option<usize> {
        tending.carried(Err(Error::Archive(refusal))).unwrap();
        assert_eq!(tending.through, None);
        tending.archiving_news()
    }

    #[test]
    fn a_refusal_is_told_once_and_so_is_its_end() {
        let mut tending = Tending::default();
        let carried = |tending: &mut Tending, carried| {
            tending.carried(Ok(carried)).unwrap();
            (tending.through, tending.archiving_news())
        };
        let taken = Some(Carried { through: Seq(7), segments: 1 });
        assert_eq!(carried(&mut tending, None), (None, None));
        assert_eq!(*tending.archiving(), Archiving::Unknown, "nothing was asked of the archive");
        let unreachable = |after: &str| ArchiveError::Unavailable(format!("after {after}"));
        assert_eq!((told(&mut tending, unreachable("1.2 s")), tending.archiving_news()), (Some(1), None));
        let first = tending.archiving().clone();
        assert!(
            matches!(&first, Archiving::Refuses { why, .. } if why.ends_with("after 1.2 s")),
            "{first:?}"
        );
        // Again, in other words; and nothing that had to go says nothing of the archive.
        assert_eq!(told(&mut tending, unreachable("1.3 s")), None);
        assert_eq!(carried(&mut tending, None), (None, None));
        assert_eq!(tending.archiving(), &first);
        assert_eq!(told(&mut tending, ArchiveError::Nothing), Some(2));
        assert_ne!(*tending.archiving(), first);
        assert_eq!(carried(&mut tending, taken), (Some(Seq(7)), Some(3)));
        assert_eq!(carried(&mut tending, taken), (Some(Seq(7)), None));
        assert_eq!(*tending.archiving(), Archiving::Takes);
    }

    #[test]
    fn what_is_wrong_with_the_journal_is_no_refusal_of_the_archive() {
        let (after, found) = (Seq(1), Seq(3));
        let mut tending = Tending::default();
        for error in [
            Error::Broken(Problem::Gap { after, found }),
            Error::Backend(BackendError::Corrupt("object journal-1".to_owned())),
            Error::Backend(BackendError::Unavailable("timeout".to_owned())),
            Error::Backend(BackendError::Moved),
        ] {
            let said = format!("{error:?}");
            let handed_on = tending.carried(Err(error)).unwrap_err();
            assert_eq!(format!("{handed_on:?}"), said);
            assert_eq!(tending.archiving_news(), None, "{said}");
            assert_eq!(*tending.archiving(), Archiving::Unknown, "{said}");
        }
    }

    /// A journal with more in sealed segments than is kept, and what carries that to an archive.
    struct Place {
        objects: Arc<MemoryObjects>,
        blobs: Arc<MemoryBlobs>,
        backend: Arc<dyn Backend>,
        deliveries: usize,
    }

    impl Place {
        async fn new() -> Place {
            let (objects, blobs) = (Arc::new(MemoryObjects::new()), Arc::new(MemoryBlobs::new()));
            let backend: Arc<dyn Backend> = Arc::new(Segments::new(objects.clone()));
            let (mut journal, _) = Journal::open(Arc::clone(&backend), stream()).await.unwrap();
            let genesis = Event::Baseline {
                cluster_uid: stream().0,
                namespace: "shop".to_owned(),
                name: "orders".to_owned(),
                origin: BaselineOrigin::Empty,
            };
            journal.claim(Some(genesis), "w", "v", Timestamp(1)).await.unwrap();
            for round in 0..8 {
                let fact = Event::SpecChanged(SpecFact::Invalid(format!("{round}{}", "x".repeat(6_000))));
                journal.append(vec![fact], Timestamp(2)).await.unwrap();
            }
            Place { objects, blobs, backend, deliveries: 0 }
        }

        fn delivery(&mut self) -> Delivery {
            self.deliveries += 1;
            let place = "memory".to_owned();
            Delivery {
                backend: Arc::clone(&self.backend),
                archive: Arc::new(ArchivePlace { archive: Archive::new(self.blobs.clone()), place }),
                carriers: Arc::new(Semaphore::new(1)),
                metrics: Arc::default(),
                stream: stream(),
                retention: Retention { keep_bytes: 0, keep_ms: None, may_go: MayGo::Any },
                now: Timestamp(3),
            }
        }

        /// Sends a carrier, and asks when it has ended.
        async fn carried(&mut self, tending: &mut Tending) -> Result<Option<Seq>, Error> {
            assert_eq!(tending.through(|| self.delivery()).await.unwrap(), None);
            let ended = async {
                while tending.carrier.as_ref().is_some_and(|carrier| !carrier.is_finished()) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(CARRIED_WITHIN, ended).await.unwrap();
            tending.through(|| self.delivery()).await
        }
    }

    fn stream() -> StreamId {
        StreamId("uid-1".to_owned())
    }

    #[tokio::test]
    async fn what_was_carried_is_not_carried_again_until_it_is_cut() {
        let mut place = Place::new().await;
        let mut tending = Tending::default();
        let through = place.carried(&mut tending).await.unwrap();
        assert!(through.is_some_and(|through| through > Seq(1)), "{through:?}");
        let calls = place.blobs.calls();
        // The cut is given up, or fails.
        for _ in 0..3 {
            tending.given_up();
            tending.failed();
            assert_eq!(tending.through(|| place.delivery()).await.unwrap(), through);
        }
        assert_eq!((place.deliveries, place.blobs.calls()), (1, calls));
        tending.done();
        assert_eq!(place.carried(&mut tending).await.unwrap(), through);
        assert_eq!(place.deliveries, 2);
    }

    #[tokio::test]
    async fn a_refusal_lets_nothing_go_and_damage_of_the_journal_is_told_as_such() {
        let mut place = Place::new().await;
        let mut tending = Tending::default();
        place.blobs.inject(BlobsFault::Unavailable);
        assert_eq!(place.carried(&mut tending).await.unwrap(), None);
        assert!(matches!(tending.archiving(), Archiving::Refuses { .. }));
        place.blobs.clear_faults();
        place.objects.edit(|objects| {
            let sealed = objects.iter_mut().find(|(name, _)| name.contains("-segment-")).unwrap();
            sealed.1.body = Body::Text("nothing".to_owned());
        });
        let damage = place.carried(&mut tending).await.unwrap_err();
        assert!(damage.is_damage() && !damage.is_certain(), "{damage:?}");
        assert_eq!(tending.archiving_news(), Some(1), "of the refusal, and no other");
        // It ended: the next one is another.
        assert!(place.carried(&mut tending).await.is_err());
        assert_eq!(place.deliveries, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_given_up_again_and_again_is_tried_less_often() {
        let mut tending = Tending::default();
        let mut waits = Vec::new();
        for round in 0..7 {
            assert!(tending.is_due());
            let given_up_at = Instant::now();
            // Tidying and cutting, one after the other.
            tending.given_up();
            tending.given_up();
            if round == 4 {
                tending.done();
            }
            while !tending.is_due() {
                assert!(given_up_at.elapsed() < TENDED_WITHIN);
                tokio::time::advance(Duration::from_secs(1)).await;
            }
            waits.push(given_up_at.elapsed().as_secs());
            if round == 5 {
                tending.done();
            }
            tending.due_at = Instant::now();
        }
        assert_eq!(waits, [5, 10, 20, 40, 60, 60, 5], "the cut alone is no success, both are");
    }
}
