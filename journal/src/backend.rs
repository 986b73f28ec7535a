//! What a store of streams must do. One durable compare-and-swap per append; everything else follows from it.

use crate::record::{Head, RecordError, Stored, StreamId};
use async_trait::async_trait;
use std::{io, path::PathBuf};
use valkeeper_core::ids::{Seq, WriterEpoch};

/// A store of streams. All of `tests/contract.rs` holds for every implementation.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Every stream that has at least one record, in order of its name.
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError>;

    /// All records of a stream, in order; empty if there is no such stream. Decoded, but the chain is not checked:
    /// [`crate::verify_chain`] does that for all backends alike. Never leaves a record out.
    async fn read(&self, stream: &StreamId) -> Result<Vec<Stored>, BackendError>;

    /// The head as it is now. An error if the store sees that what leads to it was changed. Never older than the last acknowledged append of anyone.
    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError>;

    /// Adds `records` after `expected` (`None`: the stream is new), all or none, if the head is still that. When it
    /// returns `Ok`, they survive a power cut.
    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
    ) -> Result<(), AppendError>;

    /// Work that keeps the store small and changes no record. For quiet moments, not for the path of a failover.
    async fn maintain(&self, _stream: &StreamId) -> Result<(), BackendError> {
        Ok(())
    }
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
    /// The store did not answer. Nothing is known of its content.
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
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
    /// True if the store is broken (as opposed to: could not be asked). Nothing is to be executed then.
    pub fn is_broken(&self) -> bool {
        match self {
            BackendError::Record { .. }
            | BackendError::Corrupt(_)
            | BackendError::BehindAnchor { .. }
            | BackendError::StoreMissing { .. }
            | BackendError::Poisoned(_) => true,
            BackendError::Locked { .. } | BackendError::Unavailable(_) | BackendError::Io { .. } => false,
        }
    }
}
