//! What a stream's beginning folds to. It stands for records that are not in the store any more: a stream that was cut
//! begins with it, and its `Trimmed` record names it by its hash, so that the chain covers it, too.

use crate::{
    codec, gzip,
    lineage::Lineage,
    record::{Hash, Head, LEVEL_MAX, StreamId},
};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use valkeeper_core::state::ClusterState;

/// Largest text, in bytes. A state takes about 2 KiB and 2 KiB more per member; in a Valkey Cluster every node names every other,
/// some 90 bytes each with IPv6: about 1 MiB for 96 members, the most that a spec allows.
pub const FOLDED_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Most bytes of it that are kept, packed if the text is longer: half of what a ConfigMap may hold, and what sled takes in one batch
/// beside the largest of ours. The text of 96 members packs to a twentieth.
pub const FOLDED_KEPT_BYTES_MAX: usize = 512 * 1024;

/// Layout of the text. A reader that meets a higher one stops.
const FORMAT: u32 = 1;

/// Why a text is not what a stream can begin with, or a state cannot become it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldedError {
    /// It cannot be read.
    #[error("what the stream begins with cannot be read: {0}")]
    Malformed(String),
    /// Written by a newer program.
    #[error("what the stream begins with has format {found}; this program knows {FORMAT}")]
    UnknownFormat {
        /// The format found.
        found: u64,
    },
    /// The stream was finalized at a level that this program does not know.
    #[error("the stream was finalized at level {found}; this program reads up to {LEVEL_MAX}")]
    UnknownLevel {
        /// The level found.
        found: u32,
    },
    /// It would exceed [`FOLDED_BYTES_MAX`], or packed [`FOLDED_KEPT_BYTES_MAX`].
    #[error("what the stream folds to takes {bytes} bytes: at most {max} are allowed")]
    TooLarge {
        /// Its size in bytes.
        bytes: usize,
        /// The limit in bytes.
        max: usize,
    },
}

impl FoldedError {
    /// True if a newer program wrote it.
    pub fn is_newer(&self) -> bool {
        match self {
            FoldedError::UnknownFormat { .. } | FoldedError::UnknownLevel { .. } => true,
            FoldedError::Malformed(_) | FoldedError::TooLarge { .. } => false,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Text<S> {
    format: u32,
    stream: StreamId,
    head: Head,
    version: String,
    /// Left out where nothing was lost: so such a text is the same with every version.
    #[serde(default, skip_serializing_if = "Lineage::is_first")]
    lineage: Lineage,
    state: S,
}

/// A fold that stands for the records up to its head. Keeps the exact text that was hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    stream: StreamId,
    head: Head,
    known: Box<Known>,
    text: String,
}

/// What is known at its head.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    lineage: Lineage,
    state: ClusterState,
}

impl Folded {
    /// What the records up to `head`, which is of that lineage, fold to.
    ///
    /// # Errors
    /// The state is too large.
    pub fn new(
        stream: &StreamId,
        head: Head,
        lineage: Lineage,
        state: &ClusterState,
    ) -> Result<Folded, FoldedError> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let parts = Text { format: FORMAT, stream: stream.clone(), head, version, lineage, state };
        let text = serde_json::to_string(&parts).map_err(|e| FoldedError::Malformed(e.to_string()))?;
        let known = Box::new(Known { lineage, state: state.clone() });
        let folded = Folded { stream: stream.clone(), head, known, text };
        for (bytes, max) in
            [(folded.text.len(), FOLDED_BYTES_MAX), (folded.kept().len(), FOLDED_KEPT_BYTES_MAX)]
        {
            if bytes > max {
                return Err(FoldedError::TooLarge { bytes, max });
            }
        }
        Ok(folded)
    }

    /// What a store keeps of it: the text, packed if that is long.
    pub(crate) fn kept(&self) -> Cow<'_, [u8]> {
        match self.text.as_bytes() {
            long if long.len() > FOLDED_KEPT_BYTES_MAX => Cow::Owned(gzip::pack(long)),
            text => Cow::Borrowed(text),
        }
    }

    /// Reads what was kept, packed or not: no text begins as gzip does.
    ///
    /// # Errors
    /// As [`Folded::parse`].
    pub(crate) fn parse_kept(kept: &[u8]) -> Result<Folded, FoldedError> {
        let malformed = |e: &dyn std::fmt::Display| FoldedError::Malformed(e.to_string());
        let plain = match kept {
            [0x1f, 0x8b, ..] => gzip::unpack(kept, FOLDED_BYTES_MAX).map_err(|e| malformed(&e))?.into(),
            text => Cow::Borrowed(text),
        };
        Folded::parse(std::str::from_utf8(&plain).map_err(|e| malformed(&e))?)
    }

    /// Reads a text. Whether it is the one that was written, its [`Folded::digest`] tells.
    ///
    /// # Errors
    /// It is none, or one that this program does not know.
    pub fn parse(text: &str) -> Result<Folded, FoldedError> {
        let malformed = |e: serde_json::Error| FoldedError::Malformed(e.to_string());
        let parsed: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
        // Before anything else: a later format may have other fields.
        match parsed.get("format").and_then(serde_json::Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(found) => return Err(FoldedError::UnknownFormat { found }),
            None => return Err(FoldedError::Malformed("it has no format".to_owned())),
        }
        let Text { format: _, stream, head, version: _, lineage, state } =
            serde_json::from_value::<Text<ClusterState>>(parsed).map_err(malformed)?;
        if state.level > LEVEL_MAX {
            return Err(FoldedError::UnknownLevel { found: state.level });
        }
        Ok(Folded { stream, head, known: Box::new(Known { lineage, state }), text: text.to_owned() })
    }

    /// True if the line is one, and not a record: both are objects in an export, and only this one has a format.
    pub fn is_in(line: &str) -> bool {
        line.starts_with("{\"format\":")
    }

    /// The stream whose beginning it is.
    pub fn stream(&self) -> &StreamId {
        &self.stream
    }

    /// The last record that it stands for.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The lineage of that record: the record that began it may be gone.
    pub fn lineage(&self) -> Lineage {
        self.known.lineage
    }

    /// What the records up to there fold to.
    pub fn state(&self) -> &ClusterState {
        &self.known.state
    }

    /// Its text: one line of JSON.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// SHA-256 of its text.
    pub fn digest(&self) -> Hash {
        codec::hash(self.text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::one_of_each;
    use valkeeper_core::{
        event::Record,
        ids::{Seq, Timestamp, WriterEpoch},
    };

    fn folded() -> Folded {
        let mut state = ClusterState::default();
        for (event, seq) in one_of_each().into_iter().zip(1..) {
            state.apply(&Record { seq: Seq(seq), epoch: WriterEpoch(1), time: Timestamp(7), event });
        }
        let head = Head { seq: state.head, epoch: state.epoch, time: state.head_time, hash: Hash([7; 32]) };
        Folded::new(&StreamId("uid-1".to_owned()), head, Lineage::FIRST, &state).unwrap()
    }

    #[test]
    fn it_is_read_back_as_it_was_and_any_change_shows_in_its_digest() {
        let folded = folded();
        assert_eq!(Folded::parse(folded.text()).unwrap(), folded);
        assert!(Folded::is_in(folded.text()));
        let edited = folded.text().replace("uid-1", "uid-2");
        assert_ne!(Folded::parse(&edited).unwrap().digest(), folded.digest());
    }

    #[test]
    fn its_lineage_is_in_its_text_where_something_was_lost_and_nowhere_else() {
        let folded = folded();
        assert_eq!(folded.lineage(), Lineage::FIRST);
        assert!(!folded.text().contains("lineage"), "{}", folded.text());
        let lineage = Lineage::named(Hash([8; 32]));
        let after_loss = Folded::new(folded.stream(), *folded.head(), lineage, folded.state()).unwrap();
        assert_eq!(Folded::parse(after_loss.text()).unwrap(), after_loss);
        assert_eq!(Folded::parse(after_loss.text()).unwrap().lineage(), lineage);
        assert_ne!(after_loss.digest(), folded.digest());
    }

    #[test]
    fn what_a_newer_program_wrote_is_refused_by_its_number() {
        let text = folded().text().replace("{\"format\":1", "{\"format\":2");
        assert_eq!(Folded::parse(&text), Err(FoldedError::UnknownFormat { found: 2 }));
        let mut state = folded().state().clone();
        state.level = LEVEL_MAX + 1;
        let stream = StreamId("uid-1".to_owned());
        let later = Folded::new(&stream, *folded().head(), Lineage::FIRST, &state).unwrap();
        let refused = Folded::parse(later.text());
        assert_eq!(refused, Err(FoldedError::UnknownLevel { found: LEVEL_MAX + 1 }));
        for wrong in ["", "{}", "[]", "{\"format\":1}"] {
            assert!(matches!(Folded::parse(wrong), Err(FoldedError::Malformed(_))), "{wrong}");
        }
    }
}
