//! How journals are kept: how much of each, where the rest goes, and when. Carrying records to the archive takes as long as the archive
//! does, so it runs beside the turns; only what it has brought there may go.

use crate::{cluster::Shell, k8s};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::JoinHandle, time::Instant};
use valkeeper_core::ids::{Seq, Timestamp};
use valkeeper_journal::{Backend, MayGo, Retention, StreamId, archive::Archive, carry};

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
    pub async fn carry_now(
        &self,
        backend: &Arc<dyn Backend>,
        stream: &StreamId,
        now: Timestamp,
    ) -> Retention {
        let Some(archive) = &self.archive else { return self.retention() };
        let (archive, carriers) = (Arc::clone(archive), Arc::clone(&self.carriers));
        let job = deliver(Arc::clone(backend), archive, carriers, stream.clone(), self.retention(), now);
        match job.await {
            Ok(through) => self.retention_after(through.unwrap_or_default()),
            Err(error) => {
                tracing::warn!(
                    error = k8s::chain(&error),
                    "the journal is full, and the archive takes nothing"
                );
                self.retention()
            }
        }
    }

    fn retention_after(&self, through: Seq) -> Retention {
        let may_go = match &self.archive {
            None => MayGo::Any,
            Some(archive) => MayGo::Archived { through, place: archive.place.clone() },
        };
        Retention { keep_bytes: self.keep_bytes, keep_ms: self.keep_ms, may_go }
    }
}

type Carried = Result<Option<Seq>, valkeeper_journal::Error>;

/// What one cluster's task does for its journal in quiet moments.
pub struct Tending {
    /// Records written since the journal was last tended.
    untended: usize,
    carrier: Option<JoinHandle<Carried>>,
    /// Not before then, after something failed.
    not_before: Instant,
    /// Then at the latest.
    due_at: Instant,
}

impl Default for Tending {
    /// The first quiet moment after a start tends: nobody knows what the run before left.
    fn default() -> Tending {
        let now = Instant::now();
        Tending { untended: 0, carrier: None, not_before: now, due_at: now }
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
            Some(ended) => match ended.await {
                Ok(Ok(through)) => through.map(|through| shell.keeping.retention_after(through)),
                Ok(Err(error)) => {
                    self.refused(&k8s::chain(&error));
                    None
                }
                Err(panicked) => {
                    self.refused(&panicked.to_string());
                    None
                }
            },
            None => {
                if self.carrier.is_none() {
                    let (archive, carriers) = (Arc::clone(archive), Arc::clone(&shell.keeping.carriers));
                    let (backend, retention) = (Arc::clone(&shell.backend), shell.keeping.retention());
                    let job = deliver(backend, archive, carriers, stream.clone(), retention, now);
                    self.carrier = Some(tokio::spawn(job));
                }
                None
            }
        }
    }

    fn refused(&mut self, why: &str) {
        tracing::warn!(error = why, "the archive does not take records; they stay in the journal");
        self.failed();
    }
}

async fn deliver(
    backend: Arc<dyn Backend>,
    archive: Arc<ArchivePlace>,
    carriers: Arc<Semaphore>,
    stream: StreamId,
    retention: Retention,
    now: Timestamp,
) -> Carried {
    // Never closed; a permit is only missing while others carry.
    let _permit = carriers.acquire().await.ok();
    carry(backend.as_ref(), &stream, &retention, &archive.archive, now).await
}
