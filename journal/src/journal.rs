//! The writer of one stream: claim the head, append, and be sure of what was written before going on.
//!
//! Exactly once: a batch is sealed before it is sent, and from then on the stream is in doubt until the store says how
//! it went. In doubt, nothing but the same records is ever sent. Dropping a pending `append` (a cancelled task) leaves
//! the stream in doubt, too.

use crate::{
    backend::{AppendError, Backend, BackendError, describe},
    record::{BATCH_BYTES_MAX, Hash, Head, RecordError, Stored, StreamId},
    verify::{Problem, verify_chain},
};
use std::sync::Arc;
use valkeeper_core::{
    decision::Decision,
    event::{Event, Record},
    ids::{Seq, Timestamp, WriterEpoch},
};

/// How often one call sends the same batch before it gives the doubt back to the caller. Each attempt is bounded by the
/// backend's own timeout (5 s for the API server), so three stay within a lease of 15 s.
pub const SEND_ATTEMPTS_MAX: usize = 3;

/// A value together with the place at which it was durably recorded. Only this crate can make one, so a function that
/// takes `&Recorded<Decision>` cannot be called with a decision that is not in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded<T> {
    seq: Seq,
    epoch: WriterEpoch,
    time: Timestamp,
    value: T,
}

impl<T> Recorded<T> {
    /// Sequence of the record.
    pub fn seq(&self) -> Seq {
        self.seq
    }

    /// Epoch of its writer.
    pub fn epoch(&self) -> WriterEpoch {
        self.epoch
    }

    /// When it was written.
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// The value.
    pub fn value(&self) -> &T {
        &self.value
    }
}

/// What an append wrote: to be folded, then executed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Every record, in order.
    pub records: Vec<Record>,
    /// The decisions among them, in order.
    pub decisions: Vec<Recorded<Decision>>,
}

impl Appended {
    fn of(stored: Vec<Stored>) -> Appended {
        let records: Vec<Record> = stored.into_iter().map(|s| s.record).collect();
        let decisions = records.iter().filter_map(recorded_decision).collect();
        Appended { records, decisions }
    }
}

fn recorded_decision(record: &Record) -> Option<Recorded<Decision>> {
    let Record { seq, epoch, time, event } = record;
    let value = event.decided()?.clone();
    Some(Recorded { seq: *seq, epoch: *epoch, time: *time, value })
}

/// Why the journal did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be read.
    #[error("the journal cannot be read")]
    Backend(#[from] BackendError),
    /// The stream was read, and it is not the one that was written.
    #[error("the chain of the journal is broken")]
    Broken(#[from] Problem),
    /// The stream belongs to another cluster.
    #[error("stream {stream} holds the history of cluster {found}")]
    ForeignStream {
        /// The stream opened.
        stream: StreamId,
        /// Cluster named in its Baseline.
        found: String,
    },
    /// An event cannot become a record. Nothing was written.
    #[error("an event cannot be recorded")]
    Record(#[from] RecordError),
    /// The events of one append exceed [`BATCH_BYTES_MAX`]. Nothing was written.
    #[error("a batch of {bytes} bytes: at most {max} are allowed")]
    BatchTooLarge {
        /// Size in bytes.
        bytes: usize,
        /// Limit in bytes.
        max: usize,
    },
    /// A new stream needs its Baseline. Nothing was written.
    #[error("the stream is new and no Baseline of this cluster was given")]
    NoBaseline,
    /// `append` before `claim`. Nothing was written.
    #[error("the stream was not claimed by this writer")]
    NotClaimed,
    /// A later writer has the stream. This journal refuses everything from now on.
    #[error("fenced by a writer of epoch {by}")]
    Fenced {
        /// Epoch of that writer.
        by: WriterEpoch,
    },
    /// The head is neither what this writer left nor what it wrote, and no later writer claimed it: another program wrote
    /// with this writer's epoch, or the stream was rolled back. This journal refuses everything; reopen to see.
    #[error("the head was moved by someone else: expected {expected}, found {actual}")]
    HeadMoved {
        /// What this writer left.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// It is not known whether the batch was written. Call [`Journal::resolve`] until it is; nothing else is written
    /// meanwhile.
    #[error("the outcome of an append is unknown: {0}")]
    Unresolved(String),
    /// An append was refused because an earlier one was in doubt and has just been settled: it is written. Fold this and
    /// decide anew; the refused events were found without it.
    #[error("an earlier append of {} record(s) is settled; nothing new was written", .0.records.len())]
    Settled(Box<Appended>),
    /// The stream has reached its limit. Nothing was written.
    #[error("the stream is full: {bytes} of at most {max} bytes")]
    Full {
        /// Size it would have, in bytes.
        bytes: usize,
        /// Limit in bytes.
        max: usize,
    },
    /// A write failed in a way after which the handle cannot be believed. This journal refuses everything; reopen the
    /// backend and verify.
    #[error("the store is poisoned until it is reopened and verified: {0}")]
    Poisoned(String),
    /// Nothing was written, for certain; try again later.
    #[error("nothing was written: {0}")]
    Unavailable(String),
}

impl Error {
    /// True if a later writer has the stream.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Error::Fenced { by: _ })
    }

    /// True if it is not known whether the last batch was written.
    pub fn is_unresolved(&self) -> bool {
        matches!(self, Error::Unresolved(_))
    }

    /// True if the journal is broken: no effects, and `JournalIntact=False`.
    pub fn is_broken(&self) -> bool {
        match self {
            Error::Backend(source) => source.is_broken(),
            Error::Broken(_) | Error::ForeignStream { .. } | Error::HeadMoved { .. } | Error::Poisoned(_) => {
                true
            }
            Error::Record(_)
            | Error::BatchTooLarge { .. }
            | Error::NoBaseline
            | Error::NotClaimed
            | Error::Fenced { .. }
            | Error::Unresolved(_)
            | Error::Settled(_)
            | Error::Full { .. }
            | Error::Unavailable(_) => false,
        }
    }

    /// True if trying again later, without reopening, can succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Backend(source) => !source.is_broken(),
            Error::Unresolved(_) | Error::Settled(_) | Error::Unavailable(_) => true,
            Error::Broken(_)
            | Error::ForeignStream { .. }
            | Error::HeadMoved { .. }
            | Error::Poisoned(_)
            | Error::Record(_)
            | Error::BatchTooLarge { .. }
            | Error::NoBaseline
            | Error::NotClaimed
            | Error::Fenced { .. }
            | Error::Full { .. } => false,
        }
    }
}

/// Why a journal refuses everything.
#[derive(Clone, Debug)]
enum Stop {
    Fenced { by: WriterEpoch },
    Moved { expected: String, actual: String },
    Corrupt(String),
    Poisoned(String),
}

impl From<&Stop> for Error {
    fn from(stop: &Stop) -> Error {
        match stop.clone() {
            Stop::Fenced { by } => Error::Fenced { by },
            Stop::Moved { expected, actual } => Error::HeadMoved { expected, actual },
            Stop::Corrupt(why) => Error::Backend(BackendError::Corrupt(why)),
            Stop::Poisoned(why) => Error::Poisoned(why),
        }
    }
}

/// What the store says of a batch that was sent.
enum Standing {
    Committed,
    NotCommitted,
}

/// The writer of one stream.
pub struct Journal {
    backend: Arc<dyn Backend>,
    stream: StreamId,
    head: Option<Head>,
    /// Epoch under which this writer appends, once it has claimed the head.
    epoch: Option<WriterEpoch>,
    /// The batch that was sent and of which it is not known whether it was written. Empty: no doubt.
    in_doubt: Vec<Stored>,
    stop: Option<Stop>,
}

impl Journal {
    /// Reads a stream and checks it: chain, sequence, epochs, times. A stream that does not exist is empty.
    ///
    /// # Errors
    /// It cannot be read, or it is not what was written.
    pub async fn open(backend: Arc<dyn Backend>, stream: StreamId) -> Result<(Journal, Vec<Record>), Error> {
        let stored = backend.read(&stream).await?;
        let head = verify_chain(&stored)?;
        if let Some(Event::Baseline { cluster_uid, .. }) = stored.first().map(|s| &s.record.event)
            && *cluster_uid != stream.0
        {
            return Err(Error::ForeignStream { stream, found: cluster_uid.clone() });
        }
        let records = stored.into_iter().map(|s| s.record).collect();
        Ok((Journal { backend, stream, head, epoch: None, in_doubt: Vec::new(), stop: None }, records))
    }

    /// The stream's name.
    pub fn stream(&self) -> &StreamId {
        &self.stream
    }

    /// The last record known to be written.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// Epoch of this writer, once it has claimed the stream.
    pub fn epoch(&self) -> Option<WriterEpoch> {
        self.epoch
    }

    /// Makes this writer the stream's only one: raises the epoch by one, by compare-and-swap. `genesis` is the Baseline
    /// to begin with if the stream is new; it is not used otherwise.
    ///
    /// # Errors
    /// [`Error::Fenced`] or [`Error::HeadMoved`] if someone else was faster: reopen. [`Error::NoBaseline`] if the stream
    /// is new and `genesis` is no Baseline of this cluster. After [`Error::Unresolved`] call [`Journal::resolve`].
    pub async fn claim(
        &mut self,
        genesis: Option<Event>,
        writer: &str,
        version: &str,
        now: Timestamp,
    ) -> Result<Appended, Error> {
        self.claim_above(WriterEpoch(0), genesis, writer, version, now).await
    }

    /// [`Journal::claim`] with an epoch above `known`: agents may remember writers of a journal that was lost, and refuse
    /// whoever comes with less.
    ///
    /// # Errors
    /// As [`Journal::claim`].
    pub async fn claim_above(
        &mut self,
        known: WriterEpoch,
        genesis: Option<Event>,
        writer: &str,
        version: &str,
        now: Timestamp,
    ) -> Result<Appended, Error> {
        self.check_idle().await?;
        let last = self.head.map_or(0, |head| head.epoch.0).max(known.0);
        let epoch = WriterEpoch(last.saturating_add(1));
        let started = Event::EpochStarted { writer: writer.to_owned(), version: version.to_owned() };
        let events = match (self.head, genesis) {
            (Some(_), _) => vec![started],
            (None, Some(baseline)) if self.is_baseline(&baseline) => vec![baseline, started],
            (None, Some(_) | None) => return Err(Error::NoBaseline),
        };
        let batch = self.seal(events, epoch, now)?;
        self.send(batch).await
    }

    /// Records events: assigns sequence, epoch, time (never below the head's) and hash, and writes them at once. When it
    /// returns, they are durable. No events: nothing is written.
    ///
    /// # Errors
    /// [`Error::Unresolved`]: the batch may or may not be written; [`Journal::resolve`] tells. [`Error::Settled`]: an
    /// earlier batch was in doubt and turned out to be written; nothing of this one was. Otherwise nothing was written.
    pub async fn append(&mut self, events: Vec<Event>, now: Timestamp) -> Result<Appended, Error> {
        self.check_idle().await?;
        let Some(epoch) = self.epoch else {
            return Err(Error::NotClaimed);
        };
        if events.is_empty() {
            return Ok(Appended::default());
        }
        let batch = self.seal(events, epoch, now)?;
        self.send(batch).await
    }

    /// Settles a batch that is in doubt: asks the store, sends the same records again if they are not there. `None` if
    /// nothing is in doubt; then nothing is asked.
    ///
    /// # Errors
    /// [`Error::Unresolved`]: still in doubt. [`Error::Fenced`] or one that [`Error::is_broken`]: this journal is over.
    pub async fn resolve(&mut self) -> Result<Option<Appended>, Error> {
        if let Some(stop) = &self.stop {
            return Err(stop.into());
        }
        if self.in_doubt.is_empty() {
            return Ok(None);
        }
        match self.ask().await? {
            Standing::Committed => Ok(Some(self.commit())),
            Standing::NotCommitted => self.send_in_doubt(Some("sent earlier".to_owned())).await.map(Some),
        }
    }

    /// Work on the store that changes no record; for quiet moments.
    ///
    /// # Errors
    /// The backend's.
    pub async fn maintain(&self) -> Result<(), Error> {
        Ok(self.backend.maintain(&self.stream).await?)
    }

    fn is_baseline(&self, event: &Event) -> bool {
        matches!(event, Event::Baseline { cluster_uid, .. } if *cluster_uid == self.stream.0)
    }

    async fn check_idle(&mut self) -> Result<(), Error> {
        match self.resolve().await? {
            None => Ok(()),
            Some(settled) => Err(Error::Settled(Box::new(settled))),
        }
    }

    fn seal(&self, events: Vec<Event>, epoch: WriterEpoch, now: Timestamp) -> Result<Vec<Stored>, Error> {
        let (mut seq, mut prev) = self.head.map_or((Seq(0), Hash::ZERO), |head| (head.seq, head.hash));
        let time = self.head.map_or(now, |head| head.time.max(now));
        let mut batch = Vec::with_capacity(events.len());
        for event in events {
            seq = seq.next();
            let stored = Stored::seal(Record { seq, epoch, time, event }, prev)?;
            prev = stored.hash;
            batch.push(stored);
        }
        let bytes = batch.iter().map(Stored::encoded_len).sum();
        if bytes > BATCH_BYTES_MAX {
            return Err(Error::BatchTooLarge { bytes, max: BATCH_BYTES_MAX });
        }
        Ok(batch)
    }

    async fn send(&mut self, batch: Vec<Stored>) -> Result<Appended, Error> {
        // In doubt from before the first byte leaves: a caller that drops this future must not go on as if nothing was.
        self.in_doubt = batch;
        self.send_in_doubt(None).await
    }

    /// Sends the batch until its fate is known. `doubt` says why an earlier attempt may still arrive, if one may.
    async fn send_in_doubt(&mut self, mut doubt: Option<String>) -> Result<Appended, Error> {
        for _ in 0..SEND_ATTEMPTS_MAX {
            let sent = self.backend.append(&self.stream, self.head.as_ref(), &self.in_doubt).await;
            let failure = match sent {
                Ok(()) => return Ok(self.commit()),
                Err(AppendError::Conflict { actual }) => {
                    if let Standing::Committed = self.judge(actual)? {
                        return Ok(self.commit());
                    }
                    doubt.get_or_insert("someone else keeps touching the stream's metadata".to_owned());
                    continue;
                }
                Err(AppendError::Fenced { by }) => return Err(self.stop(Stop::Fenced { by })),
                Err(AppendError::Poisoned(why)) => return Err(self.stop(Stop::Poisoned(why))),
                Err(AppendError::Corrupt(why)) => return Err(self.stop(Stop::Corrupt(why))),
                Err(AppendError::Ambiguous(why)) => {
                    doubt = Some(why);
                    None
                }
                Err(AppendError::Full { bytes, max }) => Some(Error::Full { bytes, max }),
                Err(AppendError::Io(why)) => Some(Error::Unavailable(why)),
            };
            // "Nothing was written" is true of this attempt only. If an earlier one may still arrive, the doubt stays.
            if let (Some(certain), None) = (failure, &doubt) {
                self.in_doubt.clear();
                return Err(certain);
            }
            if let Standing::Committed = self.ask().await? {
                return Ok(self.commit());
            }
        }
        Err(Error::Unresolved(doubt.unwrap_or_default()))
    }

    async fn ask(&mut self) -> Result<Standing, Error> {
        match self.backend.head(&self.stream).await {
            Ok(actual) => self.judge(actual),
            Err(BackendError::Poisoned(why)) => Err(self.stop(Stop::Poisoned(why))),
            Err(BackendError::Corrupt(why)) => Err(self.stop(Stop::Corrupt(why))),
            Err(e) if e.is_broken() => Err(self.stop(Stop::Corrupt(e.to_string()))),
            Err(e) => Err(Error::Unresolved(e.to_string())),
        }
    }

    /// The four cases of an append that is in doubt.
    fn judge(&mut self, actual: Option<Head>) -> Result<Standing, Error> {
        let ours = self.in_doubt.last().map(Stored::head);
        if actual == ours {
            return Ok(Standing::Committed);
        }
        if actual == self.head {
            return Ok(Standing::NotCommitted);
        }
        let reigning = self.epoch.or(self.head.map(|head| head.epoch)).unwrap_or_default();
        match actual {
            Some(head) if head.epoch > reigning => Err(self.stop(Stop::Fenced { by: head.epoch })),
            Some(_) | None => {
                let (expected, actual) = (describe(self.head.as_ref()), describe(actual.as_ref()));
                Err(self.stop(Stop::Moved { expected, actual }))
            }
        }
    }

    fn commit(&mut self) -> Appended {
        let batch = std::mem::take(&mut self.in_doubt);
        if let Some(last) = batch.last() {
            self.head = Some(last.head());
            self.epoch = Some(last.record.epoch);
        }
        Appended::of(batch)
    }

    fn stop(&mut self, stop: Stop) -> Error {
        let error = Error::from(&stop);
        self.stop = Some(stop);
        error
    }
}
