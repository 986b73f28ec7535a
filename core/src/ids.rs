//! Names and numbers with a type each, so that a member is never mistaken for a shard or a sequence for an epoch.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

/// Nanoseconds since the Unix epoch. Signed, so that differences need no care.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Milliseconds from `earlier` to `self`; negative if `earlier` is later.
    pub fn millis_since(self, earlier: Timestamp) -> i64 {
        (self.0 - earlier.0) / 1_000_000
    }

    /// This time plus `millis` milliseconds.
    pub fn plus_millis(self, millis: i64) -> Timestamp {
        Timestamp(self.0.saturating_add(millis.saturating_mul(1_000_000)))
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC with milliseconds, e.g. `2026-11-21T03:00:00.000Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = chrono::DateTime::from_timestamp_nanos(self.0);
        write!(f, "{}", t.format("%Y-%m-%dT%H:%M:%S%.3fZ"))
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// Position of a record in its stream. The first record is 1; 0 is "before the first".
    Seq
);
number!(
    /// Fencing epoch of the journal: raised by one by each writer that claims the head. Not Valkey's config epoch.
    WriterEpoch
);

impl Seq {
    /// The sequence after this one.
    pub fn next(self) -> Seq {
        Seq(self.0.saturating_add(1))
    }
}

/// A shard of a cluster, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId(pub u16);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One desired Valkey instance: (shard, ordinal). Written `0-2`, as in the pod name `<cluster>-0-2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MemberId {
    /// The shard it belongs to.
    pub shard: ShardId,
    /// Its number within the shard: the StatefulSet's ordinal.
    pub ordinal: u16,
}

impl MemberId {
    /// The member `ordinal` of `shard`.
    pub fn new(shard: u16, ordinal: u16) -> Self {
        MemberId { shard: ShardId(shard), ordinal }
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.shard, self.ordinal)
    }
}

/// A text that is not a member id such as `0-2`.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a member: expected SHARD-ORDINAL, for example 0-2")]
pub struct NotAMember(String);

impl FromStr for MemberId {
    type Err = NotAMember;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('-').and_then(|(s, o)| Some((s.parse().ok()?, o.parse().ok()?)));
        parsed.map(|(s, o)| MemberId::new(s, o)).ok_or_else(|| NotAMember(text.to_owned()))
    }
}

impl TryFrom<String> for MemberId {
    type Error = NotAMember;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MemberId> for String {
    fn from(id: MemberId) -> String {
        id.to_string()
    }
}

/// Hex of a SHA-256 (or a prefix of it) over rendered content.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub String);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Valkey's 40-hex replication id: the name of one history of writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplId(pub String);

impl fmt::Display for ReplId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Characters of a node id.
const NODE_ID_CHARS: usize = 40;

/// The name that a node gave itself and keeps in `nodes.conf`: 40 hexadecimal digits. Addresses change, this does not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct NodeId(String);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<NodeId, String> {
        let is_id =
            text.len() == NODE_ID_CHARS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_id {
            Ok(NodeId(text.to_owned()))
        } else {
            Err(format!("{text:?}: {NODE_ID_CHARS} hex digits make a node id"))
        }
    }
}

impl TryFrom<String> for NodeId {
    type Error = String;

    fn try_from(text: String) -> Result<NodeId, String> {
        text.parse()
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> String {
        id.0
    }
}

/// Identity of one effect: the same after a crash and a re-issue, so that its doing can be recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EffectId(pub Uuid);

impl EffectId {
    /// uuid v5 over (cluster uid, sequence of the deciding record, index within the decision).
    pub fn derive(cluster_uid: &str, seq: Seq, index: usize) -> Self {
        let name = format!("valkeeper/{cluster_uid}/{seq}/{index}");
        EffectId(Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()))
    }
}

impl fmt::Display for EffectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
