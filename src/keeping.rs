//! How journals are kept: how much of each, where the rest goes, and when. Carrying records to the archive takes as long as the archive
//! does, so it runs beside the turns; only what it has brought there may go.

use crate::{cluster::Shell, k8s};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::JoinHandle, time::Instant};
use valkeeper_core::ids::{Seq, Timestamp};
use valkeeper_journal::{Backend, MayGo, Retention, StreamId, archive::Archive, carry};

/// Clusters whose records are carried to the archive at the same time: each holds up to a megabyte meanwhile.
const CARRIERS_MAX: usize = 4;

/// Pause after an archive that refused: it is asked once a minute, and what waits for it is kept.
const CARRY_AGAIN: Duration = Duration::from_secs(60);

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
    not_before: Instant,
}

impl Default for Tending {
    /// The first quiet moment after a start tends: nobody knows what the run before left.
    fn default() -> Tending {
        Tending { untended: TENDED_EVERY, carrier: None, not_before: Instant::now() }
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
        let carried = self.carrier.as_ref().is_some_and(JoinHandle::is_finished);
        if !carried && (self.untended < TENDED_EVERY || Instant::now() < self.not_before) {
            return false;
        }
        self.untended = 0;
        true
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
        self.untended = TENDED_EVERY;
        self.not_before = Instant::now() + CARRY_AGAIN;
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
