//! What a store of streams must do. One durable compare-and-swap per append; everything else follows from it.

use crate::{
    folded::{Folded, FoldedError},
    journal::Anchor,
    record::{Head, RecordError, Stored, StreamId},
};
use async_trait::async_trait;
use std::{io, path::PathBuf};
use valkeeper_core::ids::{Seq, WriterEpoch};

/// How often a reading begins anew because the store was tidied meanwhile by another process. That is minutes apart.
pub const READ_ATTEMPTS_MAX: usize = 3;

/// A store of streams. All of `tests/contract.rs` holds for every implementation.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Every stream that has at least one record, in order of its name.
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError>;

    /// Begins to read a stream as it is now. Nothing is checked but that frames and lines are whole: [`crate::Chain`]
    /// checks the rest for all backends alike. Never leaves a record out.
    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError>;

    /// As [`Backend::read`], from wherever that is fastest: pages need not be what can be cut.
    async fn recall(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        self.read(stream).await
    }

    /// The head as it is now. An error if the store sees that what leads to it was changed. Never older than the last acknowledged append of anyone.
    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError>;

    /// The last record that the store has any trace of, with nothing checked: for whoever is about to replace the stream, or to accept
    /// that it is gone.
    async fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        Ok(self.head(stream).await?.map(|head| head.seq))
    }

    /// Adds `records` after `expected` (`None`: the stream is new), all or none, if the head is still that. When it
    /// returns `Ok`, they survive a power cut. With `cut`, everything up to its head goes in the same step, and the stream begins
    /// with it from then on: there is no moment at which one has happened without the other.
    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError>;

    /// [`Backend::append`] to a stream that is written anew from a copy: what fitted once is not refused for the bytes by which it is
    /// packed otherwise now.
    async fn append_copied(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.append(stream, expected, records, cut).await
    }

    /// Bytes with which every stream should be content now, because all of them together take too much; `None`: there is room. Nobody is
    /// refused for it: it is what is kept after the next quiet moment.
    fn share(&self) -> Option<usize> {
        None
    }

    /// Writes a broken stream anew from a second copy, which must hold the record that is remembered of it, and end no earlier than what it
    /// takes the place of. Nothing is `needed` once a loss was accepted: the copy must then reach further than what can still be
    /// read. What was there is kept aside. Only ever at a person's word.
    async fn repair(&self, stream: &StreamId, _needed: Option<Anchor>) -> Result<(), BackendError> {
        Err(BackendError::Corrupt(format!(
            "stream {stream} cannot be repaired: there is no second copy of it"
        )))
    }

    /// Takes a stream out of the store. What can be kept aside of it is.
    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        Err(BackendError::Unavailable(format!("this store does not forget streams such as {stream}")))
    }

    /// [`Backend::forget`] of what is only a copy: nothing is kept aside.
    async fn discard(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.forget(stream).await
    }

    /// Takes a whole stream out for good, and keeps nothing of it; what a person had put aside of it stays. A removal
    /// that broke off is told by [`Backend::half_removed`], and ended by the same call.
    async fn remove(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.discard(stream).await
    }

    /// Streams whose removal broke off: nothing of them can be read any more.
    async fn half_removed(&self) -> Result<Vec<StreamId>, BackendError> {
        Ok(Vec::new())
    }

    /// A person accepts that records are gone: what the store remembers of them elsewhere is no reason to refuse any more.
    async fn accept_loss(&self, _stream: &StreamId) -> Result<(), BackendError> {
        Ok(())
    }

    /// Work that keeps the store small and changes no record. For quiet moments, not for the path of a failover.
    async fn maintain(&self, _stream: &StreamId) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A stream that is being read, from its beginning to where it ended when the reading began. Holds one page at a time.
#[async_trait]
pub trait Reader: Send {
    /// What the stream begins with, if its beginning was cut.
    fn folded(&self) -> Option<&Folded>;

    /// Bytes that the stream takes in the store.
    fn bytes(&self) -> usize;

    /// The next records, `None` at the end. A page is what can be cut at once, and is never empty.
    async fn page(&mut self) -> Result<Option<Page>, BackendError>;
}

/// Records that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The records, decoded.
    pub records: Vec<Stored>,
    /// Bytes that they take in the store.
    pub bytes: usize,
}

/// A whole stream in memory: for tools and tests. The operator reads page by page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// What it begins with, if its beginning was cut.
    pub folded: Option<Folded>,
    /// Its records, in order.
    pub records: Vec<Stored>,
}

/// Reads a whole stream; empty if there is none.
///
/// # Errors
/// As [`Backend::read`] and [`Reader::page`].
pub async fn read_all(backend: &dyn Backend, stream: &StreamId) -> Result<Whole, BackendError> {
    let mut attempt = 1;
    loop {
        match read_once(backend, stream).await {
            Err(BackendError::Moved) if attempt < READ_ATTEMPTS_MAX => attempt += 1,
            other => return other,
        }
    }
}

async fn read_once(backend: &dyn Backend, stream: &StreamId) -> Result<Whole, BackendError> {
    let mut reader = backend.read(stream).await?;
    let mut records = Vec::new();
    while let Some(Page { records: more, bytes: _ }) = reader.page().await? {
        records.extend(more);
    }
    Ok(Whole { folded: reader.folded().cloned(), records })
}

/// Why an append did not succeed, or is not known to have.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Nothing was written: the head is another one.
    #[error("the head is {}", describe(actual.as_ref()))]
    Conflict {
        /// The head found, `None` if there is no stream.
        actual: Option<Head>,
    },
    /// Nothing was written: a later writer has claimed the stream.
    #[error("the stream was claimed by a writer of epoch {by}")]
    Fenced {
        /// Epoch of that writer.
        by: WriterEpoch,
    },
    /// Nobody knows whether it was written, or whether it will be. Only the same records may be sent again.
    #[error("the outcome of the append is unknown: {0}")]
    Ambiguous(String),
    /// Nothing was written: the stream has reached its limit.
    #[error("the stream is full: {bytes} of at most {max} bytes")]
    Full {
        /// Size it would have, in bytes.
        bytes: usize,
        /// Limit in bytes.
        max: usize,
    },
    /// A write or fsync failed in a way after which nothing on this handle can be believed.
    #[error("the store is poisoned until it is reopened and verified: {0}")]
    Poisoned(String),
    /// Nothing was written by this attempt: what is there is not the stream that was written.
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    /// Nothing was written, for certain; the same or another batch may be tried later.
    #[error("nothing was written: {0}")]
    Io(String),
}

pub(crate) fn describe(head: Option<&Head>) -> String {
    head.map_or_else(|| "none: the stream is empty".to_owned(), Head::to_string)
}

/// Why a store cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A record is torn, damaged or newer than this program.
    #[error("stream {stream} holds something that is not a record")]
    Record {
        /// The stream.
        stream: StreamId,
        /// What is wrong.
        source: RecordError,
    },
    /// What a cut stream begins with is damaged or newer than this program.
    #[error("stream {stream} does not begin with what it can begin with")]
    Folded {
        /// The stream.
        stream: StreamId,
        /// What is wrong.
        source: FoldedError,
    },
    /// A newer program has laid the store out in another way.
    #[error("the store is of a newer program: {0}")]
    Newer(String),
    /// The store is damaged beyond its records.
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    /// Acknowledged records are missing.
    #[error("stream {stream} ends at {found}, its anchor says {anchor}: acknowledged records are missing")]
    BehindAnchor {
        /// The stream.
        stream: StreamId,
        /// Where the stream ends, or what is in the anchor's place.
        found: String,
        /// The anchor: sequence of the last acknowledged record.
        anchor: Seq,
    },
    /// The store is not there although its anchor is: it was deleted, or another volume is mounted.
    #[error("the journal at {} is missing, but its anchor {} is there", dir.display(), anchor.display())]
    StoreMissing {
        /// Where the store should be.
        dir: PathBuf,
        /// Where the anchor is.
        anchor: PathBuf,
    },
    /// Another process (or another handle in this one) has it open.
    #[error("the journal at {} is open elsewhere", dir.display())]
    Locked {
        /// The store.
        dir: PathBuf,
    },
    /// It was poisoned and must be reopened.
    #[error("the store is poisoned until it is reopened and verified: {0}")]
    Poisoned(String),
    /// A copy does not fit: nothing that is tried again would.
    #[error("stream {stream} would have {bytes} bytes, and {max} fit into the store")]
    Full {
        /// The stream.
        stream: StreamId,
        /// Its size, in bytes.
        bytes: usize,
        /// Limit in bytes.
        max: usize,
    },
    /// The store did not answer. Nothing is known of its content.
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
    /// The stream was merged or cut by another process while it was read: read it again.
    #[error("the stream was tidied by another process while it was read")]
    Moved,
    /// A file operation failed.
    #[error("{what}")]
    Io {
        /// What was attempted, with the path.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl BackendError {
    /// True if a newer program wrote what this one cannot read: nothing is damaged.
    pub fn is_newer(&self) -> bool {
        match self {
            BackendError::Record { stream: _, source } => source.is_newer(),
            BackendError::Folded { stream: _, source } => source.is_newer(),
            BackendError::Newer(_) => true,
            BackendError::Corrupt(_)
            | BackendError::BehindAnchor { .. }
            | BackendError::StoreMissing { .. }
            | BackendError::Full { .. }
            | BackendError::Poisoned(_)
            | BackendError::Locked { .. }
            | BackendError::Unavailable(_)
            | BackendError::Moved
            | BackendError::Io { .. } => false,
        }
    }

    /// True if records are gone or changed, for certain.
    pub fn is_damage(&self) -> bool {
        match self {
            BackendError::Record { .. } | BackendError::Folded { .. } => !self.is_newer(),
            BackendError::Corrupt(_) | BackendError::BehindAnchor { .. } => true,
            BackendError::Newer(_)
            | BackendError::StoreMissing { .. }
            | BackendError::Full { .. }
            | BackendError::Locked { .. }
            | BackendError::Poisoned(_)
            | BackendError::Unavailable(_)
            | BackendError::Moved
            | BackendError::Io { .. } => false,
        }
    }

    /// True if the store is broken (as opposed to: could not be asked). Nothing is to be executed then.
    pub fn is_broken(&self) -> bool {
        match self {
            BackendError::Record { .. }
            | BackendError::Folded { .. }
            | BackendError::Newer(_)
            | BackendError::Corrupt(_)
            | BackendError::BehindAnchor { .. }
            | BackendError::StoreMissing { .. }
            | BackendError::Full { .. }
            | BackendError::Poisoned(_) => true,
            BackendError::Locked { .. }
            | BackendError::Unavailable(_)
            | BackendError::Moved
            | BackendError::Io { .. } => false,
        }
    }
}
