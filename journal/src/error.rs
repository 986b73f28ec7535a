//! Why the journal did not do what it was asked, and what that means for whoever asked.

use crate::{
    archive::ArchiveError,
    backend::BackendError,
    folded::FoldedError,
    journal::Appended,
    record::{LEVEL_MAX, RecordError, StreamId},
    verify::Problem,
};
use valkeeper_core::ids::WriterEpoch;

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
    /// What the stream folds to cannot take the place of its beginning. Nothing was written.
    #[error("the stream's beginning cannot be cut")]
    Folded(#[from] FoldedError),
    /// A level that this program does not write. Nothing was written.
    #[error("level {level} is not known to this program: it writes up to level {LEVEL_MAX}")]
    UnknownLevel {
        /// The level asked for.
        level: u32,
    },
    /// The archive did not take records that are to go. Nothing was written.
    #[error("the archive does not take what is to go")]
    Archive(#[from] ArchiveError),
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

    /// True if records are gone or changed, for certain: what a person can decide about. Not: poisoned, of another cluster, of a newer
    /// program.
    pub fn is_damage(&self) -> bool {
        match self {
            Error::Broken(_) => true,
            Error::Backend(source) => source.is_damage(),
            Error::ForeignStream { .. }
            | Error::Folded(_)
            | Error::Archive(_)
            | Error::UnknownLevel { .. }
            | Error::Record(_)
            | Error::BatchTooLarge { .. }
            | Error::NoBaseline
            | Error::NotClaimed
            | Error::Fenced { .. }
            | Error::HeadMoved { .. }
            | Error::Unresolved(_)
            | Error::Settled(_)
            | Error::Full { .. }
            | Error::Poisoned(_)
            | Error::Unavailable(_) => false,
        }
    }

    /// True if a newer program wrote what this one cannot read: nothing is damaged.
    pub fn is_newer(&self) -> bool {
        if let Error::Backend(source) = self { source.is_newer() } else { false }
    }

    /// True if nothing was written, for certain, and the journal can be used on.
    pub fn is_certain(&self) -> bool {
        match self {
            Error::Backend(source) => !source.is_broken(),
            Error::Folded(_)
            | Error::Archive(_)
            | Error::UnknownLevel { .. }
            | Error::Record(_)
            | Error::BatchTooLarge { .. }
            | Error::NoBaseline
            | Error::NotClaimed
            | Error::Full { .. }
            | Error::Unavailable(_) => true,
            Error::Broken(_)
            | Error::ForeignStream { .. }
            | Error::HeadMoved { .. }
            | Error::Poisoned(_)
            | Error::Fenced { .. }
            | Error::Unresolved(_)
            | Error::Settled(_) => false,
        }
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
            | Error::Folded(_)
            | Error::Archive(_)
            | Error::UnknownLevel { .. }
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
            | Error::Folded(_)
            | Error::Archive(_)
            | Error::UnknownLevel { .. }
            | Error::BatchTooLarge { .. }
            | Error::NoBaseline
            | Error::NotClaimed
            | Error::Fenced { .. }
            | Error::Full { .. } => false,
        }
    }
}
