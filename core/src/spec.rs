//! What the user wants, already parsed and valid: the part of a `ValkeyCluster` that decisions depend on.
//! Everything else of the spec reaches decisions only as digests of rendered objects.

use crate::ids::{Digest, MemberId, ShardId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How the members of a cluster relate to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Topology {
    /// Shards of one primary and any number of replicas, failed over by the operator. Standalone is this without replicas.
    Replication,
    /// Valkey Cluster: shards own slots, nodes know each other by gossip, clients are sent to the owner.
    Cluster,
}

/// What the data is worth to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// May be lost: a shard whose every member started blank begins anew by itself.
    Cache,
    /// Must last: a shard that had data and is found blank holds until someone confirms.
    Durable,
}

/// Whether the operator fails over by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailoverMode {
    /// Promote when the evidence is sufficient.
    Automatic,
    /// Only report; a person promotes.
    Manual,
}

/// When and how a shard fails over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverPolicy {
    /// Whether the operator promotes by itself.
    pub mode: FailoverMode,
    /// How long a primary may be silent (alive or not: nobody can tell) before it is fenced, in milliseconds.
    pub detection_window_ms: i64,
    /// Whether a primary of a shard of three or more stops accepting writes when nobody confirms it.
    #[serde(default)]
    pub isolation: Isolation,
}

/// Whether a primary that nobody confirms goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Isolation {
    /// It stops accepting writes a second before the operator may promote another.
    #[default]
    On,
    /// It goes on; the operator promotes another only after a fence that it can see.
    Off,
}

/// How much earlier than the detection window a primary that nobody confirms stops: room for clocks that drift, for the
/// agent's reaction and for a server that is busy for a moment. Milliseconds.
pub const ISOLATION_MARGIN_MS: i64 = 1_000;

/// Shortest such time: three requests for confirmation, which agents send twice a second. With a detection window that leaves less
/// there is none, and only a fence that can be seen lets another be promoted. Milliseconds.
pub const ISOLATION_MIN_MS: i64 = 1_500;

impl FailoverPolicy {
    /// How long a primary may accept writes without being confirmed, in milliseconds; 0: for ever.
    pub fn isolation_ms(&self) -> i64 {
        let window_ms = self.detection_window_ms - ISOLATION_MARGIN_MS;
        match self.isolation {
            Isolation::On if window_ms >= ISOLATION_MIN_MS => window_ms,
            Isolation::On | Isolation::Off => 0,
        }
    }
}

/// What the user asks for by an annotation, whose text tells one request from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verb {
    /// Another primary.
    Switchover,
    /// That a shard, or slots, may begin anew without their data.
    ConfirmBlank,
    /// That slots be evened out.
    Rebalance,
}

/// A planned wish that is open until it is seen fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchoverWish {
    /// The member that shall be primary.
    pub to: MemberId,
    /// Distinguishes one wish from the next of the same text.
    pub token: String,
}

/// The desired cluster as decisions see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredCluster {
    /// `metadata.generation` of the resource this was parsed from.
    pub generation: i64,
    /// Shape of the cluster.
    pub topology: Topology,
    /// Number of shards, at least 1.
    pub shards: u16,
    /// Replicas of each shard's primary, 0 or more.
    pub replicas_per_shard: u16,
    /// Worth of the data.
    pub profile: Profile,
    /// Failover policy.
    pub failover: FailoverPolicy,
    /// Planned promotion asked for by the user, if any.
    #[serde(default)]
    pub switchover: Option<SwitchoverWish>,
    /// The user allows shards whose members are all blank to begin anew; the value is the shard's confirmation token.
    #[serde(default)]
    pub confirm_blank: Option<String>,
    /// True while the user wants no planned change. Failover goes on.
    #[serde(default)]
    pub paused: bool,
    /// Whether the servers run I/O threads.
    #[serde(default, skip_serializing_if = "IoThreads::is_off")]
    pub io_threads: IoThreads,
    /// What the shards of a Valkey Cluster shall be even by.
    #[serde(default, skip_serializing_if = "Balance::is_slots")]
    pub balance: Balance,
    /// The user wants slots to be evened out though no shard came or went; the value distinguishes one wish from the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<String>,
    /// Members keep their data in memory alone: whoever is restarted is empty.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub volatile: bool,
    /// MAJOR.MINOR of the servers, where the user says it and the image's tag does not have to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What servers take of their configuration while they run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// An annotation that cannot be used, and why. It counts as not there; everything else is in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// What servers take of their configuration while they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Tells all of it from another, what the operator names included.
    pub digest: Digest,
    /// What the user names, as it stands in valkey.conf, by directive.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named: BTreeMap<String, String>,
}

/// What the shards of a Valkey Cluster shall be even by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Balance {
    /// Number of slots.
    #[default]
    Slots,
    /// Number of keys.
    Keys,
    /// Memory that the keys take, as far as all keys of a node are of one size.
    Bytes,
}

impl Balance {
    pub(crate) fn is_slots(&self) -> bool {
        *self == Balance::Slots
    }
}

/// Whether servers run I/O threads: releases before [`crate::config::ATOMIC_SLOTS_WITH_THREADS_SINCE`] then hang in the middle of handing
/// slots over atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoThreads {
    /// The server's own thread does it all.
    #[default]
    Off,
    /// There are more.
    On,
}

impl IoThreads {
    fn is_off(&self) -> bool {
        *self == IoThreads::Off
    }
}

impl DesiredCluster {
    /// Every shard that shall exist, in order.
    pub fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shards).map(ShardId)
    }

    /// Every member that shall exist, in order.
    pub fn members(&self) -> impl Iterator<Item = MemberId> + use<> {
        let per_shard = self.replicas_per_shard + 1;
        (0..self.shards).flat_map(move |s| (0..per_shard).map(move |o| MemberId::new(s, o)))
    }

    /// True if the member shall exist.
    pub fn wants(&self, id: MemberId) -> bool {
        id.shard.0 < self.shards && id.ordinal <= self.replicas_per_shard
    }
}
