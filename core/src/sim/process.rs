//! A valkey-server as far as replication goes: role, history, offset, link; and the writes it has.

use crate::{
    ids::{MemberId, ReplId, Timestamp},
    observation::{Link, Source},
};

/// Time a partial or full synchronisation takes in this world. Milliseconds.
const SYNC_MS: i64 = 100;

/// One server process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Changes with every start.
    pub run_id: String,
    /// `None` for a primary, else whom it follows.
    pub source: Option<Source>,
    /// Link to the source.
    pub link: Link,
    /// When a running synchronisation ends.
    pub synced_at: Option<Timestamp>,
    /// Present history.
    pub replid: ReplId,
    /// History before the last promotion, and its first offset that is no longer shared.
    pub before: Option<(ReplId, i64)>,
    /// Replication offset; in this world one byte a write.
    pub offset: i64,
    /// The writes it has, by number.
    pub writes: Vec<u64>,
    /// The history that a server without data draws at its start, if it was one.
    pub drawn: Option<ReplId>,
    /// SIGSTOPped.
    pub frozen: bool,
    /// When that began, or ended.
    pub frozen_at: Timestamp,
    /// Until then it loads its data, and does nothing else.
    pub loads_until: Timestamp,
    /// When it last heard from its source.
    pub heard_at: Timestamp,
}

impl Process {
    /// A process that has just started at the boot gate, with the data that was on disk.
    pub fn at_gate(run_id: String, disk: Option<(ReplId, Vec<u64>)>, now: Timestamp) -> Self {
        let had_history = disk.is_some();
        let (replid, writes) = disk.unwrap_or_else(|| (ReplId(format!("r-{run_id}")), Vec::new()));
        Process {
            drawn: (!had_history).then(|| replid.clone()),
            source: Some(Source::Gate { had_history }),
            link: Link::Down,
            synced_at: None,
            before: None,
            offset: offset_of(&writes),
            replid,
            writes,
            frozen: false,
            frozen_at: now,
            loads_until: now,
            heard_at: now,
            run_id,
        }
    }

    /// True if it accepts writes.
    pub fn is_primary(&self) -> bool {
        self.source.is_none()
    }

    /// True while it loads its data set.
    pub fn loads(&self, now: Timestamp) -> bool {
        now < self.loads_until
    }

    /// True if it has a whole data set: not in the middle of a first synchronisation.
    pub fn is_complete(&self) -> bool {
        self.link != Link::Syncing
    }

    /// `REPLICAOF NO ONE`.
    pub fn promote(&mut self) {
        if self.source.take().is_some() {
            let fresh = ReplId(format!("r-{}-{}", self.run_id, self.offset));
            self.before = Some((std::mem::replace(&mut self.replid, fresh), self.offset + 1));
            self.link = Link::Up;
            self.synced_at = None;
        }
    }

    /// `REPLICAOF` a member.
    pub fn follow(&mut self, of: MemberId) {
        if self.source != Some(Source::Member(of)) {
            self.source = Some(Source::Member(of));
            (self.link, self.synced_at) = (Link::Down, None);
        }
    }

    /// Lets a replica talk to its source, which is there and lets replicas in.
    pub fn talk(&mut self, source: &Process, now: Timestamp) {
        self.heard_at = now;
        match (self.link, self.synced_at) {
            (Link::Up, _) => self.copy(source),
            (Link::Down, _) => {
                // A partial resynchronisation keeps the data set usable throughout.
                let partial = self.replid == source.replid && self.offset <= source.offset
                    || source.before.as_ref().is_some_and(|(id, at)| *id == self.replid && self.offset < *at);
                self.link = if partial { Link::Down } else { Link::Syncing };
                if partial {
                    self.copy(source);
                    self.link = Link::Up;
                } else {
                    self.synced_at = Some(now.plus_millis(SYNC_MS));
                }
            }
            (Link::Syncing, Some(at)) if now >= at => {
                self.copy(source);
                (self.link, self.synced_at) = (Link::Up, None);
            }
            (Link::Syncing, _) => {}
        }
    }

    /// The source is gone, frozen or refuses: a linked replica keeps what it has.
    pub fn lose_link(&mut self) {
        (self.link, self.synced_at) = (Link::Down, None);
    }

    fn copy(&mut self, source: &Process) {
        self.replid = source.replid.clone();
        self.before.clone_from(&source.before);
        self.offset = source.offset;
        self.writes.clone_from(&source.writes);
    }
}

fn offset_of(writes: &[u64]) -> i64 {
    i64::try_from(writes.len()).unwrap_or(i64::MAX)
}
