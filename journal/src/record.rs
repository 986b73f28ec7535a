//! What the journal stores: a record sealed into the hash chain, and the names and limits around it.

use crate::{codec, upcast};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, Timestamp, WriterEpoch},
};

/// Largest record, envelope included, in bytes. The largest event is a decision with the readings of every member: 100
/// members need about 20 KiB. 64 KiB leaves room for three times that, and is half of the size from which sled moves a
/// value out of its log into a file of its own, which the power-cut runs did not cover.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;

/// Largest batch (one append), in bytes of all its records. Four of the largest records; as text in one ConfigMap
/// (1 MiB) it leaves room for everything else that is there.
pub const BATCH_BYTES_MAX: usize = 256 * 1024;

/// Every kind of event this program can read: number, name, newest schema, what it is. Numbers are never reused.
pub const KINDS: &[Kind] = &[
    Kind { number: 1, name: "Baseline", schema: 1, level: 1, nature: Nature::Writer },
    Kind { number: 2, name: "EpochStarted", schema: 1, level: 1, nature: Nature::Writer },
    Kind { number: 3, name: "SpecChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 4, name: "PodChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 5, name: "ServerChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 6, name: "RouteChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 7, name: "ObjectChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 8, name: "Decided", schema: 1, level: 1, nature: Nature::Decision },
    Kind { number: 9, name: "EffectsEnded", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 10, name: "DecisionClosed", schema: 1, level: 1, nature: Nature::Decision },
    Kind { number: 11, name: "StandingChanged", schema: 1, level: 1, nature: Nature::Decision },
    Kind { number: 12, name: "AgentChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 13, name: "Trimmed", schema: 1, level: 1, nature: Nature::Writer },
    Kind { number: 14, name: "LevelRaised", schema: 1, level: 1, nature: Nature::Writer },
    Kind { number: 15, name: "NodeChanged", schema: 1, level: 1, nature: Nature::Fact },
    Kind { number: 16, name: "SlotsWeighed", schema: 1, level: 1, nature: Nature::Fact },
];

/// Highest level that this program reads, and writes after a [`Event::LevelRaised`] of it. A level is a set of kinds and layouts;
/// one is added when a release writes what the release before cannot read.
pub const LEVEL_MAX: u32 = 1;

/// Level of a stream that was never finalized.
pub const LEVEL_FIRST: u32 = 1;

/// What an event tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// About the stream itself.
    Writer,
    /// Something seen in the world.
    Fact,
    /// Something the operator decided or found by its rules.
    Decision,
}

/// A row of [`KINDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Number in the envelope.
    pub number: u16,
    /// Name in timelines and exports.
    pub name: &'static str,
    /// Newest payload layout this program can read.
    pub schema: u16,
    /// Level from which that layout may be written: a stream that was not finalized at it holds what older programs read.
    pub level: u32,
    /// What it tells.
    pub nature: Nature,
}

/// SHA-256 over a sealed record; each covers the one before. Written as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The previous hash of a stream's first record.
    pub const ZERO: Hash = Hash([0; 32]);
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 64 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a hash: expected 64 lower-case hex digits")]
pub struct NotAHash(String);

impl FromStr for Hash {
    type Err = NotAHash;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Lower case only: one hash has one spelling, so an edited export cannot verify.
        let digit = |d: u8| match d {
            b'0'..=b'9' => Some(d - b'0'),
            b'a'..=b'f' => Some(d - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        let pairs = text.as_bytes().chunks_exact(2);
        if text.len() != 64 {
            return Err(NotAHash(text.chars().take(80).collect()));
        }
        for (byte, pair) in bytes.iter_mut().zip(pairs) {
            let value = digit(pair[0]).zip(digit(pair[1])).map(|(high, low)| high * 16 + low);
            *byte = value.ok_or_else(|| NotAHash(text.to_owned()))?;
        }
        Ok(Hash(bytes))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Name of a stream: the `metadata.uid` of the cluster's resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamId(pub String);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a stream ends: what an append is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Sequence of the last record.
    pub seq: Seq,
    /// Epoch of its writer.
    pub epoch: WriterEpoch,
    /// Its time.
    pub time: Timestamp,
    /// Its hash.
    pub hash: Hash,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Head { seq, epoch, time: _, hash } = self;
        let hash = hash.to_string();
        write!(f, "seq {seq} of epoch {epoch} ({})", hash.get(..12).unwrap_or(&hash))
    }
}

/// Why bytes or a line are not a record, or an event cannot become one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The input ends in the middle of a record: a write that did not finish. Only ever the last item.
    #[error("torn record: the input ends {missing} byte(s) early")]
    Torn {
        /// Bytes missing at least.
        missing: usize,
    },
    /// The bytes are not what was written.
    #[error("corrupt record: {0}")]
    Corrupt(String),
    /// Written by a program that encodes payloads in another way.
    #[error("record {seq}: payload codec {codec} is not known to this program")]
    UnknownCodec {
        /// The record, as far as known (0 if not).
        seq: Seq,
        /// The tag found.
        codec: u8,
    },
    /// Written by a program that knows more events.
    #[error("record {seq}: event kind {kind} is not known to this program")]
    UnknownKind {
        /// The record.
        seq: Seq,
        /// The number found.
        kind: u16,
    },
    /// Written by a newer program, which asks not to be read by older ones.
    #[error("record {seq}: schema {schema} of event kind {kind} is newer than this program's {known}")]
    UnknownSchema {
        /// The record.
        seq: Seq,
        /// Number of the kind.
        kind: u16,
        /// Schema found.
        schema: u16,
        /// Newest schema this program can read.
        known: u16,
    },
    /// The stream was finalized by a newer program: from this record on it holds what this one cannot read.
    #[error(
        "record {seq}: version {version} finalized the stream at level {level}; this program reads up to level {LEVEL_MAX}"
    )]
    UnknownLevel {
        /// The record.
        seq: Seq,
        /// The level.
        level: u32,
        /// Version that finalized it: the oldest that is known to read on.
        version: String,
    },
    /// An event that older programs cannot read, in a stream that was not finalized for it.
    #[error("event kind {kind} may be written from level {level} on; the stream is at level {stream}")]
    NotFinalized {
        /// Number of the kind.
        kind: u16,
        /// Level that it needs.
        level: u32,
        /// Level of the stream.
        stream: u32,
    },
    /// It would exceed [`RECORD_BYTES_MAX`].
    #[error("record of {bytes} bytes: at most {max} are allowed")]
    TooLarge {
        /// Its size in bytes.
        bytes: usize,
        /// The limit in bytes.
        max: usize,
    },
}

impl RecordError {
    /// True if a newer program wrote it: nothing is damaged, and that program can go on.
    pub fn is_newer(&self) -> bool {
        match self {
            RecordError::UnknownCodec { .. }
            | RecordError::UnknownKind { .. }
            | RecordError::UnknownSchema { .. }
            | RecordError::UnknownLevel { .. } => true,
            RecordError::Torn { .. }
            | RecordError::Corrupt(_)
            | RecordError::NotFinalized { .. }
            | RecordError::TooLarge { .. } => false,
        }
    }
}

/// A record in its place in the chain.
///
/// Keeps the exact bytes it was sealed with: what an older program wrote keeps its hash although this program would
/// write the same event with other bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The record.
    pub record: Record,
    /// Hash of the record before, [`Hash::ZERO`] for the first.
    pub prev: Hash,
    /// Hash of this record: SHA-256 over everything but itself, as it was stored. See [`Stored::computed_hash`].
    pub hash: Hash,
    /// Everything the hash covers: envelope and payload.
    pub(crate) sealed: Box<[u8]>,
}

impl Stored {
    /// Seals a record after `prev`.
    ///
    /// # Errors
    /// The record is too large, or its kind or schema is not in [`KINDS`]: what could not be read back is not written.
    pub fn seal(record: Record, prev: Hash) -> Result<Stored, RecordError> {
        codec::seal(record, prev)
    }

    /// The head of a stream that ends with this record.
    pub fn head(&self) -> Head {
        let Record { seq, epoch, time, event: _ } = &self.record;
        Head { seq: *seq, epoch: *epoch, time: *time, hash: self.hash }
    }

    /// The hash that its content gives. Differs from `hash` if it was tampered with.
    pub fn computed_hash(&self) -> Hash {
        codec::hash(&self.sealed)
    }

    /// The event as stored: JSON, byte for byte.
    pub fn payload(&self) -> &[u8] {
        codec::payload(&self.sealed)
    }

    /// Size of the encoded frame in bytes.
    pub fn encoded_len(&self) -> usize {
        codec::FRAME_BYTES + self.sealed.len()
    }
}

/// Checks that this program can read (and may write) `schema` of `kind`.
pub(crate) fn check_kind(seq: Seq, kind: u16, schema: u16) -> Result<(), RecordError> {
    let known = KINDS.iter().find(|k| k.number == kind).ok_or(RecordError::UnknownKind { seq, kind })?;
    if schema > known.schema {
        return Err(RecordError::UnknownSchema { seq, kind, schema, known: known.schema });
    }
    Ok(())
}

/// Checks that a stream of this level may hold the event.
pub(crate) fn check_level(event: &Event, stream: u32) -> Result<(), RecordError> {
    let kind = event.kind();
    let needed = KINDS.iter().find(|k| k.number == kind).map_or(LEVEL_FIRST, |k| k.level);
    if needed > stream {
        return Err(RecordError::NotFinalized { kind, level: needed, stream });
    }
    Ok(())
}

/// Parses a payload whose kind and schema were checked, and checks that it is of that kind.
pub(crate) fn parse_event(seq: Seq, kind: u16, schema: u16, payload: &[u8]) -> Result<Event, RecordError> {
    let event = upcast::parse(kind, schema, payload)
        .map_err(|e| RecordError::Corrupt(format!("record {seq}: payload of kind {kind}: {e}")))?;
    if event.kind() != kind {
        let found = event.kind();
        return Err(RecordError::Corrupt(format!(
            "record {seq}: envelope says kind {kind}, payload is kind {found}"
        )));
    }
    if let Event::LevelRaised { level, version } = &event
        && *level > LEVEL_MAX
    {
        return Err(RecordError::UnknownLevel { seq, level: *level, version: version.clone() });
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn the_table_of_kinds_agrees_with_the_events() {
        let samples = testing::one_of_each();
        assert_eq!(samples.len(), KINDS.len());
        for (event, kind) in samples.iter().zip(KINDS) {
            assert_eq!((event.kind(), event.name(), event.schema()), (kind.number, kind.name, kind.schema));
        }
    }

    #[test]
    fn a_hash_has_one_spelling() {
        let hash = Hash([0xab; 32]);
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!(hash.to_string().to_uppercase().parse::<Hash>().is_err());
        assert!("ab".parse::<Hash>().is_err());
        assert!("é".repeat(32).parse::<Hash>().is_err());
    }
}
