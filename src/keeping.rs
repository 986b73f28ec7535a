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

/// Pause after tending was given up for a member that was lost, or because it took too long: a failover is over by then, and on a slow
/// API server it is one attempt of a second in six.
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
    /// True if journals outlive the process: then what a status remembers must be in them.
    pub survives: bool,
}

impl Keeping {
    /// Keeps `keep_bytes` of each journal, and nothing older than `keep_for`.
    pub fn new(keep_bytes: usize, keep_for: Option<Duration>, archive: Option<ArchivePlace>) -> Keeping {
        let keep_ms = keep_for.map(|age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let carriers = Arc::new(Semaphore::new(CARRIERS_MAX));
        let archive = archive.map(Arc::new);
        Keeping { keep_bytes, keep_ms, archive, carriers, finalize: None, survives: true }
    }

    /// What a writer may let go of before anything was carried to the archive.
    pub fn retention(&self) -> Retention {
        self.retention_after(Seq(0))
    }

    /// What a writer may let go of whose journal is full: what can be carried to the archive at once is, however long that takes. Nothing
    /// else can be done for that cluster anyway.
    pub async fn carry_now(&self, shell: &Shell, stream: &StreamId, now: Timestamp) -> Retention {
        let Some(archive) = &self.archive else { return self.retention() };
        match Delivery::new(shell, archive, stream, now).run().await {
            Ok(carried) => self.retention_after(carried.map(|c| c.through).unwrap_or_default()),
            Err(error) => {
                tracing::warn!(
                    error = k8s::chain(&error),
                    "the journal is full, and the archive takes nothing"
                );
                self.retention()
            }
        }
    }

    /// Name of the archive, if there is one.
    pub fn place(&self) -> Option<&str> {
        self.archive.as_ref().map(|archive| archive.place.as_str())
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
        /// Which kind of refusal it was the first time.
        kind: RefusalKind,
        /// What it said then. Later texts tell of other segments and times: the same refusal is told once.
        why: String,
    },
}

/// What makes two refusals the same: who refused, and for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusalKind(Option<(Discriminant<Error>, Option<Discriminant<ArchiveError>>)>);

impl RefusalKind {
    fn of(error: &Error) -> RefusalKind {
        let archive = if let Error::Archive(refusal) = error { Some(discriminant(refusal)) } else { None };
        RefusalKind(Some((discriminant(error), archive)))
    }
}

impl Archiving {
    /// Records were carried there, or none had to be; true if it took none before.
    fn carried(&mut self, carried: Option<Carried>) -> bool {
        carried.is_some() && mem::replace(self, Archiving::Takes) != Archiving::Takes
    }

    /// It did not take them; true if that is new.
    fn refused(&mut self, kind: RefusalKind, why: String) -> bool {
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
    archiving: Archiving,
    /// Times that it became another, and whether the last one is still to be told.
    archiving_changes: usize,
    archiving_is_news: bool,
    /// Not before then, after something failed.
    not_before: Instant,
    /// Then at the latest.
    due_at: Instant,
}

impl Default for Tending {
    /// The first quiet moment after a start tends: nobody knows what the run before left.
    fn default() -> Tending {
        let now = Instant::now();
        let archiving = Archiving::default();
        Tending {
            untended: 0,
            carrier: None,
            archiving,
            archiving_changes: 0,
            archiving_is_news: false,
            not_before: now,
            due_at: now,
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

    /// Something more urgent came, or it took too long: it is due again soon.
    pub fn given_up(&mut self) {
        self.pause(GIVEN_UP_PAUSE);
    }

    fn pause(&mut self, pause: Duration) {
        self.not_before = Instant::now() + pause;
        self.due_at = self.not_before;
    }

    /// What may go now. With an archive: what the carrier that has ended brought there; and the next one is sent when there is none.
    pub async fn retention(&mut self, shell: &Shell, stream: &StreamId, now: Timestamp) -> Option<Retention> {
        let Some(archive) = &shell.keeping.archive else { return Some(shell.keeping.retention()) };
        match self.carrier.take_if(|carrier| carrier.is_finished()) {
            Some(ended) => {
                let carried = match ended.await {
                    Ok(carried) => carried.map_err(|e| (RefusalKind::of(&e), k8s::chain(&e))),
                    Err(panicked) => Err((RefusalKind::default(), panicked.to_string())),
                };
                Some(shell.keeping.retention_after(self.carried(carried)?.through))
            }
            None => {
                if self.carrier.is_none() {
                    let delivery = Delivery::new(shell, archive, stream, now);
                    self.carrier = Some(tokio::spawn(delivery.run()));
                }
                None
            }
        }
    }

    /// What became of a delivery; what was carried, if something was.
    fn carried(&mut self, carried: Result<Option<Carried>, (RefusalKind, String)>) -> Option<Carried> {
        let (carried, changed) = match carried {
            Ok(carried) => (carried, self.archiving.carried(carried)),
            Err((kind, why)) => {
                tracing::warn!(error = why, "the archive does not take records; they stay in the journal");
                self.failed();
                (None, self.archiving.refused(kind, why))
            }
        };
        self.archiving_changes += usize::from(changed);
        self.archiving_is_news |= changed;
        carried
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
            Ok(None) => {}
            Err(_) => metrics.not_archived(),
        }
        carried
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(tending: &mut Tending, error: &Error) {
        assert_eq!(tending.carried(Err((RefusalKind::of(error), k8s::chain(error)))), None);
    }

    #[test]
    fn a_refusal_is_told_once_and_so_is_its_end() {
        let mut tending = Tending::default();
        let taken = Some(Carried { through: Seq(7), segments: 1 });
        assert_eq!((tending.carried(Ok(None)), tending.archiving_news()), (None, None));
        assert_eq!(*tending.archiving(), Archiving::Unknown, "nothing was asked of the archive");
        let unreachable = |after: &str| Error::Archive(ArchiveError::Unavailable(format!("after {after}")));
        refused(&mut tending, &unreachable("1.2 s"));
        assert_eq!((tending.archiving_news(), tending.archiving_news()), (Some(1), None));
        let told = tending.archiving().clone();
        assert!(matches!(&told, Archiving::Refuses { why, .. } if why.ends_with("after 1.2 s")), "{told:?}");
        // Again, in other words; and nothing that had to go says nothing of the archive.
        refused(&mut tending, &unreachable("1.3 s"));
        tending.carried(Ok(None));
        assert_eq!((tending.archiving_news(), tending.archiving()), (None, &told));
        refused(&mut tending, &Error::Archive(ArchiveError::Nothing));
        assert_eq!(tending.archiving_news(), Some(2));
        assert_ne!(*tending.archiving(), told);
        assert_eq!((tending.carried(Ok(taken)), tending.archiving_news()), (taken, Some(3)));
        assert_eq!((tending.carried(Ok(taken)), tending.archiving_news()), (taken, None));
        assert_eq!(*tending.archiving(), Archiving::Takes);
    }
}
