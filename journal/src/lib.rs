//! Valkeeper's journal: an append-only, hash-chained, fenced stream of records per cluster. No kube here.
//!
//! - what is stored: [`record`], [`codec`] (binary frame), [`lines`] (text form), [`folded`] (what a cut stream begins with),
//!   [`lineage`] (of a stream that lost records), [`verify`](mod@verify)
//! - who writes: [`journal`]: claim, append, resolve; the only maker of [`Recorded`]
//! - how long it is kept: [`retention`], [`retire`](mod@retire)
//! - where: [`backend`] (the contract), [`memory`], [`sled`](mod@sled), [`segments`] (over [`segments::Objects`])
//!
//! The layout of bytes and lines, and what is promised, is in docs/JOURNAL.md.

mod anchor;
pub mod archive;
pub mod backend;
pub mod codec;
pub mod error;
pub mod folded;
pub mod gzip;
pub mod journal;
pub mod lineage;
pub mod lines;
pub mod memory;
pub mod parts;
pub mod record;
pub mod retention;
pub mod retire;
pub mod segments;
pub mod sled;
#[cfg(test)]
mod testing;
pub mod tiered;
mod upcast;
pub mod verify;

pub use backend::{AppendError, Backend, BackendError, Page, Reader, Whole, read_all};
pub use codec::{decode, decode_stream, encode};
pub use error::Error;
pub use folded::{Folded, FoldedError};
pub use journal::{Anchor, Appended, Claim, Journal, Recorded};
pub use lineage::Lineage;
pub use lines::{LineError, export_line, import_line, import_lines};
pub use memory::Memory;
pub use parts::{Parts, parts};
pub use record::{Hash, Head, KINDS, LEVEL_MAX, RecordError, Stored, StreamId};
pub use retention::{Carried, MayGo, Retention, carry};
pub use retire::{Retired, retire};
pub use segments::{Body, Object, Objects, ObjectsError, Segments};
pub use sled::Sled;
pub use tiered::Tiered;
pub use verify::{Chain, Problem, Report, verify, verify_chain, verify_lines};
