//! The writer of one stream: claim the head, append, and be sure of what was written before going on.
//!
//! Exactly once: a batch is sealed before it is sent, and from then on the stream is in doubt until the store says how
//! it went. In doubt, nothing but the same records is ever sent. Dropping a pending `append` (a cancelled task) leaves
//! the stream in doubt, too.

use crate::{
    backend::{AppendError, Backend, BackendError, READ_ATTEMPTS_MAX, describe},
    error::Error,
    folded::Folded,
    record::{BATCH_BYTES_MAX, Hash, Head, LEVEL_FIRST, LEVEL_MAX, Stored, StreamId, check_level},
    retention::{Goal, MayGo, Retention, fold_oldest, trimmed},
    verify::Chain,
};
use std::sync::Arc;
use valkeeper_core::{
    decision::Decision,
    event::{Event, Record},
    ids::{Seq, Timestamp, WriterEpoch},
    state::ClusterState,
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

/// What a writer says when it claims a stream.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// The Baseline to begin with if the stream is new.
    pub genesis: Option<Event>,
    /// Name of the writer: its own in every life.
    pub writer: &'a str,
    /// Version of its program.
    pub version: &'a str,
    /// The epoch shall be above this one, too: agents may remember writers of a journal that was lost, and refuse whoever comes
    /// with less.
    pub above: WriterEpoch,
    /// A person accepted that records up to this one are gone.
    pub lost_through: Option<Seq>,
}

/// An acknowledged record as somebody outside the store remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// Its sequence.
    pub seq: Seq,
    /// Its hash.
    pub hash: Hash,
}

/// Where a stream is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effort {
    /// Wherever that is fastest.
    Quick,
    /// Where it counts.
    Thorough,
}

/// What is sent at once.
#[derive(Clone, Debug, Default)]
struct Batch {
    records: Vec<Stored>,
    /// What takes the place of the stream's beginning in the same step.
    cut: Option<Folded>,
}

/// The writer of one stream.
pub struct Journal {
    backend: Arc<dyn Backend>,
    stream: StreamId,
    head: Option<Head>,
    /// Epoch under which this writer appends, once it has claimed the head.
    epoch: Option<WriterEpoch>,
    /// What may be written: see [`LEVEL_MAX`].
    level: u32,
    /// How much is kept; `None`: everything, until the store is full.
    retention: Option<Retention>,
    /// The batch that was sent and of which it is not known whether it was written. No records: no doubt.
    in_doubt: Batch,
    stop: Option<Stop>,
}

impl Journal {
    /// Reads a stream page by page, checks it (chain, sequence, epochs, times) and folds it. A stream that does not exist is
    /// empty.
    ///
    /// # Errors
    /// It cannot be read, or it is not what was written.
    pub async fn open(backend: Arc<dyn Backend>, stream: StreamId) -> Result<(Journal, ClusterState), Error> {
        Journal::open_anchored(backend, stream, None).await
    }

    /// As [`Journal::open`], of a stream that must hold what somebody remembers of it.
    ///
    /// # Errors
    /// [`BackendError::BehindAnchor`] if it does not.
    pub async fn open_anchored(
        backend: Arc<dyn Backend>,
        stream: StreamId,
        anchor: Option<Anchor>,
    ) -> Result<(Journal, ClusterState), Error> {
        Journal::open_from(backend, stream, anchor, Effort::Quick).await
    }

    /// As [`Journal::open_anchored`], with every copy that there is: slower, and it finds damage that a start would not meet.
    ///
    /// # Errors
    /// As [`Journal::open_anchored`].
    pub async fn open_thoroughly(
        backend: Arc<dyn Backend>,
        stream: StreamId,
        anchor: Option<Anchor>,
    ) -> Result<(Journal, ClusterState), Error> {
        // What the copies remember of each other, and then the one that counts.
        Journal::open_from(Arc::clone(&backend), stream.clone(), anchor, Effort::Quick).await?;
        Journal::open_from(backend, stream, anchor, Effort::Thorough).await
    }

    async fn open_from(
        backend: Arc<dyn Backend>,
        stream: StreamId,
        anchor: Option<Anchor>,
        effort: Effort,
    ) -> Result<(Journal, ClusterState), Error> {
        let mut attempt = 1;
        let (head, state) = loop {
            match read(backend.as_ref(), &stream, anchor, effort).await {
                Err(Error::Backend(BackendError::Moved)) if attempt < READ_ATTEMPTS_MAX => attempt += 1,
                other => break other?,
            }
        };
        if head.is_some() && state.cluster_uid != stream.0 {
            return Err(Error::ForeignStream { stream, found: state.cluster_uid });
        }
        let level = state.level.max(LEVEL_FIRST);
        let (in_doubt, stop) = (Batch::default(), None);
        let journal = Journal { backend, stream, head, epoch: None, level, retention: None, in_doubt, stop };
        Ok((journal, state))
    }

    /// From now on the oldest records go, when there is more than that, or when the store is full.
    pub fn retain(&mut self, retention: Retention) {
        self.retention = Some(retention);
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
    /// As [`Journal::claim_as`].
    pub async fn claim(
        &mut self,
        genesis: Option<Event>,
        writer: &str,
        version: &str,
        now: Timestamp,
    ) -> Result<Appended, Error> {
        let claim = Claim { genesis, writer, version, above: WriterEpoch(0), lost_through: None };
        self.claim_as(claim, now).await
    }

    /// [`Journal::claim`] with everything that a claim can say.
    ///
    /// # Errors
    /// [`Error::Fenced`] or [`Error::HeadMoved`] if someone else was faster: reopen. [`Error::NoBaseline`] if the stream
    /// is new and there is no Baseline of this cluster. After [`Error::Unresolved`] call [`Journal::resolve`].
    pub async fn claim_as(&mut self, claim: Claim<'_>, now: Timestamp) -> Result<Appended, Error> {
        self.check_idle().await?;
        let Claim { genesis, writer, version, above, lost_through } = claim;
        let last = self.head.map_or(0, |head| head.epoch.0).max(above.0);
        let epoch = WriterEpoch(last.saturating_add(1));
        let (writer, version) = (writer.to_owned(), version.to_owned());
        let started = Event::EpochStarted { writer, version, lost_through };
        let events = match (self.head, genesis) {
            (Some(_), _) => vec![started],
            (None, Some(baseline)) if self.is_baseline(&baseline) => vec![baseline, started],
            (None, Some(_) | None) => return Err(Error::NoBaseline),
        };
        let batch = self.seal(events, epoch, now)?;
        self.send_or_cut(batch).await
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
        self.send_or_cut(batch).await
    }

    /// What the oldest records fold to, if there are more than are to be kept; `None` if there are not. Only reads: it may be given up.
    ///
    /// # Errors
    /// The store cannot be read, or what is read is not what was written.
    pub async fn excess(&self, now: Timestamp) -> Result<Option<Folded>, Error> {
        let Some(retention) = &self.retention else { return Ok(None) };
        let goal = Goal::quiet(retention, self.backend.share(), now);
        fold_oldest(self.backend.as_ref(), &self.stream, goal, &retention.may_go).await
    }

    /// Takes the records out of the store that were folded: recorded as `Trimmed`, in the same step.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub async fn cut(&mut self, folded: Folded, now: Timestamp) -> Result<Appended, Error> {
        self.check_idle().await?;
        let Some(epoch) = self.epoch else { return Err(Error::NotClaimed) };
        let may_go = self.retention.as_ref().map_or(&MayGo::Any, |retention| &retention.may_go);
        let records = self.seal(vec![trimmed(&folded, may_go)], epoch, now)?;
        self.send(Batch { records, cut: Some(folded) }).await
    }

    /// [`Journal::excess`], then [`Journal::cut`].
    ///
    /// # Errors
    /// Theirs.
    pub async fn trim(&mut self, now: Timestamp) -> Result<Appended, Error> {
        self.check_idle().await?;
        match self.excess(now).await? {
            Some(folded) => self.cut(folded, now).await,
            None => Ok(Appended::default()),
        }
    }

    /// Allows what only programs of `level` can read. Nothing is written if it is allowed already.
    ///
    /// # Errors
    /// [`Error::UnknownLevel`], or as [`Journal::append`].
    pub async fn finalize(&mut self, level: u32, version: &str, now: Timestamp) -> Result<Appended, Error> {
        if level > LEVEL_MAX {
            return Err(Error::UnknownLevel { level });
        }
        if level <= self.level {
            return Ok(Appended::default());
        }
        self.append(vec![Event::LevelRaised { level, version: version.to_owned() }], now).await
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
        if self.in_doubt.records.is_empty() {
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
    pub async fn maintain(&mut self) -> Result<(), Error> {
        // What a merge takes away may be what a cut that is in doubt ends at.
        if !self.in_doubt.records.is_empty() {
            return Ok(());
        }
        // What somebody put in the place of this writer's stream is not to be tidied, merged or mirrored.
        let actual = self.backend.head(&self.stream).await?;
        self.judge(actual)?;
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
            check_level(&event, self.level)?;
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

    /// Sends a batch; if the store is full and something may go, once more with that.
    async fn send_or_cut(&mut self, mut records: Vec<Stored>) -> Result<Appended, Error> {
        let full = match self.send(Batch { records: records.clone(), cut: None }).await {
            Err(Error::Full { bytes, max }) => (bytes, max),
            other => return other,
        };
        let (Some(retention), Some(last)) = (&self.retention, records.last()) else {
            return Err(Error::Full { bytes: full.0, max: full.1 });
        };
        let goal = Goal::full(retention, full.1);
        let folded = match fold_oldest(self.backend.as_ref(), &self.stream, goal, &retention.may_go).await {
            Ok(Some(folded)) => folded,
            // Nothing may go, or what it folds to is larger than what would go.
            Ok(None) | Err(Error::Folded(_)) => return Err(Error::Full { bytes: full.0, max: full.1 }),
            Err(e) => return Err(e),
        };
        let Record { seq, epoch, time, event: _ } = &last.record;
        let record = Record {
            seq: seq.next(),
            epoch: *epoch,
            time: *time,
            event: trimmed(&folded, &retention.may_go),
        };
        let record = Stored::seal(record, last.hash)?;
        records.push(record);
        self.send(Batch { records, cut: Some(folded) }).await
    }

    async fn send(&mut self, batch: Batch) -> Result<Appended, Error> {
        // In doubt from before the first byte leaves: a caller that drops this future must not go on as if nothing was.
        self.in_doubt = batch;
        self.send_in_doubt(None).await
    }

    /// Sends the batch until its fate is known. `doubt` says why an earlier attempt may still arrive, if one may.
    async fn send_in_doubt(&mut self, mut doubt: Option<String>) -> Result<Appended, Error> {
        for _ in 0..SEND_ATTEMPTS_MAX {
            let Batch { records, cut } = &self.in_doubt;
            let sent = self.backend.append(&self.stream, self.head.as_ref(), records, cut.as_ref()).await;
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
                self.in_doubt = Batch::default();
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
        let ours = self.in_doubt.records.last().map(Stored::head);
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
        let Batch { records, cut: _ } = std::mem::take(&mut self.in_doubt);
        if let Some(last) = records.last() {
            self.head = Some(last.head());
            self.epoch = Some(last.record.epoch);
        }
        for stored in &records {
            if let Event::LevelRaised { level, version: _ } = &stored.record.event {
                self.level = *level;
            }
        }
        Appended::of(records)
    }

    fn stop(&mut self, stop: Stop) -> Error {
        let error = Error::from(&stop);
        self.stop = Some(stop);
        error
    }
}

/// The head of an intact stream, and what it folds to. Holds one page at a time.
async fn read(
    backend: &dyn Backend,
    stream: &StreamId,
    anchor: Option<Anchor>,
    effort: Effort,
) -> Result<(Option<Head>, ClusterState), Error> {
    let mut reader = match effort {
        Effort::Quick => backend.recall(stream).await?,
        Effort::Thorough => backend.read(stream).await?,
    };
    let mut chain = Chain::new(reader.folded());
    let mut state = reader.folded().map(|folded| folded.state().clone()).unwrap_or_default();
    // What was cut is remembered by its last record only; an older anchor is covered by the chain after it.
    let cut = reader.folded().map(Folded::head).filter(|cut| anchor.is_some_and(|a| a.seq < cut.seq));
    let mut is_there = anchor.is_none() || cut.is_some();
    let matches = |head: &Head| anchor.is_some_and(|a| (a.seq, a.hash) == (head.seq, head.hash));
    is_there |= reader.folded().is_some_and(|folded| matches(folded.head()));
    while let Some(page) = reader.page().await? {
        for stored in &page.records {
            chain.next(stored)?;
            state.apply(&stored.record);
            is_there |= matches(&stored.head());
        }
    }
    let head = chain.end()?;
    if let (Some(anchor), false) = (anchor, is_there) {
        let (stream, found) = (stream.clone(), describe(head.as_ref()));
        return Err(BackendError::BehindAnchor { stream, found, anchor: anchor.seq }.into());
    }
    Ok((head, state))
}
