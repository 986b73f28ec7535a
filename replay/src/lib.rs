//! Offline reader of Valkeeper journals. It opens files and standard input, never a socket, and writes nothing but its
//! answer.
//!
//! - where records come from: [`source`]
//! - verbs, one file each: [`log`], [`show`], [`verify`] (and [`deep`]), [`at`], [`diverge`], [`audit`], [`why`],
//!   [`blame`], [`explain`], [`export`]
//! - shared: [`history`] (records and what is before them), [`line`](mod@line) (one record as one line), [`moment`] (points in a stream), [`batch`] (turns),
//!   [`moves`] (slots and their jobs), [`rules`] (the core's policy), [`report`] and [`table`] (answers)

pub mod at;
pub mod audit;
pub mod batch;
pub mod blame;
pub mod deep;
pub mod diverge;
pub mod explain;
pub mod export;
pub mod history;
pub mod line;
pub mod log;
pub mod moment;
pub mod moves;
pub mod report;
pub mod rules;
pub mod show;
pub mod source;
#[cfg(test)]
#[path = "../tests/story/mod.rs"]
mod story;
pub mod table;
pub mod verify;
pub mod why;

use std::{io, path::PathBuf};
use valkeeper_core::ids::Seq;

/// Why a question cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The path, `-` for standard input.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The input is no journal, or cannot be opened as one.
    #[error("{path} is not a journal: {why}")]
    NotAJournal {
        /// The path, `-` for standard input.
        path: PathBuf,
        /// Why, and what is expected.
        why: String,
    },
    /// No journal was named, and standard input is a terminal.
    #[error("no journal: name one with -j PATH, or pipe one in")]
    NoJournal,
    /// The input holds no record.
    #[error("{path} holds no records")]
    Empty {
        /// The path, `-` for standard input.
        path: PathBuf,
    },
    /// Several clusters, and none or more than one is meant.
    #[error("{asked}; choose one with --cluster:\n{choices}")]
    ChooseCluster {
        /// What is wrong with the choice.
        asked: String,
        /// One line for each cluster.
        choices: String,
    },
    /// A sequence outside of the stream.
    #[error("there is no record {seq}: the stream holds {first} to {last}")]
    NoSuchRecord {
        /// The sequence asked for.
        seq: Seq,
        /// First sequence there is.
        first: Seq,
        /// Last sequence there is.
        last: Seq,
    },
    /// A record that left the store.
    #[error("record {seq} is not in the store: {gone}")]
    Gone {
        /// The sequence asked for.
        seq: Seq,
        /// Which records are gone, since when, and where they are.
        gone: String,
    },
    /// A time before everything that is known.
    #[error("history begins at {first}{}", gone.as_ref().map(|gone| format!(": {gone}")).unwrap_or_default())]
    BeforeHistory {
        /// Time of the first record that is known, or folded.
        first: String,
        /// Which records are gone, if the beginning was cut.
        gone: Option<String>,
    },
    /// A subject that no record is about.
    #[error("nothing in this stream is about {subject}")]
    NeverSeen {
        /// What was asked about.
        subject: String,
    },
    /// A code that does not exist.
    #[error("there is no code {code:?}{}", if alike.is_empty() { String::new() } else { format!("; perhaps {alike}") })]
    NoSuchCode {
        /// The code asked for.
        code: String,
        /// Codes that look alike.
        alike: String,
    },
    /// CSV of an answer that is not a list.
    #[error("this answer is not a list: use -o table, json or jsonl")]
    NoRows,
    /// An answer that has no JSON.
    #[error("the answer cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    /// An anchor that cannot be understood.
    #[error("{path} is not an anchor: expected JSON with seq, epoch and hash")]
    NotAnAnchor {
        /// The file.
        path: PathBuf,
    },
}

impl Error {
    /// True if the question was wrong, not the journal.
    pub fn is_usage(&self) -> bool {
        match self {
            Error::NoJournal
            | Error::ChooseCluster { .. }
            | Error::NoSuchRecord { .. }
            | Error::Gone { .. }
            | Error::BeforeHistory { .. }
            | Error::NeverSeen { .. }
            | Error::NoSuchCode { .. }
            | Error::NoRows => true,
            Error::Read { .. }
            | Error::NotAJournal { .. }
            | Error::Empty { .. }
            | Error::Json(_)
            | Error::NotAnAnchor { .. } => false,
        }
    }
}
