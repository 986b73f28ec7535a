//! Valkeeper's journal: an append-only, hash-chained, fenced stream of records per cluster. No kube here.
//!
//! - what is stored: [`record`], [`codec`] (binary frame), [`lines`] (text form), [`verify`](mod@verify)
//! - who writes: [`journal`]: claim, append, resolve; the only maker of [`Recorded`]
//! - where: [`backend`] (the contract), [`memory`], [`sled`](mod@sled), [`segments`] (over [`segments::Objects`])
//!
//! The layout of bytes and lines, and what is promised, is in docs/JOURNAL.md.

mod anchor;
pub mod backend;
pub mod codec;
pub mod journal;
pub mod lines;
pub mod memory;
pub mod record;
pub mod segments;
pub mod sled;
#[cfg(test)]
mod testing;
pub mod verify;

pub use backend::{AppendError, Backend, BackendError};
pub use codec::{decode, decode_stream, encode};
pub use journal::{Appended, Error, Journal, Recorded};
pub use lines::{LineError, export_line, import_line, import_lines};
pub use memory::Memory;
pub use record::{Hash, Head, KINDS, RecordError, Stored, StreamId};
pub use segments::{Object, Objects, ObjectsError, Segments};
pub use sled::Sled;
pub use verify::{Problem, Report, verify, verify_chain, verify_lines};
