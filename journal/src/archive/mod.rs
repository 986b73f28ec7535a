//! The archive of journals: where records go before a stream's beginning is cut, and stay.
//!
//! A stream's records lie in segments that are written once. A segment's name says which records are in it and what its
//! bytes hash to, so it needs no index, two writers cannot harm each other, and an upload that was interrupted goes on
//! where it ended. Segments may overlap: a record that is there twice must be the same.
//!
//! Records after a loss that a person accepted have the numbers of others that are archived already. They are of another lineage, and
//! archived beside those. Only the record of an accepted loss begins one: whatever else differs is refused.
//!
//! A bucket may lose or change what it was given. So nothing is called archived before it was read back and found equal.

pub mod blobs;
pub mod branch;
pub mod directory_blobs;
pub mod memory_blobs;
mod pages;
mod segment;

pub use blobs::{Blobs, BlobsError};
pub use branch::Branch;
pub use directory_blobs::DirectoryBlobs;
pub use memory_blobs::{BlobsFault, MemoryBlobs};
pub use pages::Pages;
pub use segment::{SEGMENT_BYTES_MAX, STORED_BYTES_MAX};

use crate::{
    record::{Hash, Head, RecordError, Stored},
    verify::Problem,
};
use segment::{Segment, cut, follow};
use std::{collections::BTreeSet, sync::Arc};
use valkeeper_core::ids::Seq;

/// Why records are not archived, or an archive cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// A stream of that name cannot be archived: the name becomes a part of the segments' names.
    #[error("{0:?} cannot be the name of an archived stream")]
    StreamName(String),
    /// No records were given.
    #[error("there is nothing to archive")]
    Nothing,
    /// The records given do not follow each other, or not the archive's last one.
    #[error("the records to archive are no chain: {0}")]
    NoChain(Problem),
    /// The archive holds another record of this number.
    #[error("record {seq} in {segment} is another one than the journal's")]
    Differs {
        /// Name of the segment.
        segment: String,
        /// The record.
        seq: Seq,
    },
    /// Two segments hold different records of this number.
    #[error("record {seq} differs between {one} and {other}")]
    Conflict {
        /// The record.
        seq: Seq,
        /// A segment.
        one: String,
        /// Another one.
        other: String,
    },
    /// No segment holds the records between two that are there.
    #[error("the records after {after} are missing: the next segment is {segment}")]
    Missing {
        /// Last record before the hole.
        after: Seq,
        /// The segment after it.
        segment: String,
    },
    /// A segment is not what was stored.
    #[error("{segment} is damaged at record {seq}: {why}")]
    Damaged {
        /// Name of the segment.
        segment: String,
        /// First record that cannot be believed.
        seq: Seq,
        /// What is wrong.
        why: String,
    },
    /// A segment holds what is no record, or one of a newer program.
    #[error("{segment}, record {seq}: {why}")]
    Unreadable {
        /// Name of the segment.
        segment: String,
        /// The record.
        seq: Seq,
        /// Why.
        why: RecordError,
    },
    /// The store took a segment, and does not have it.
    #[error("{segment} was stored and is not there")]
    Lost {
        /// Name of the segment.
        segment: String,
    },
    /// The store did not answer. What was stored before stays; the same call again goes on from there.
    #[error("the archive is not reachable: {0}")]
    Unavailable(String),
}

impl ArchiveError {
    fn damaged(segment: String, seq: Seq, why: String) -> ArchiveError {
        ArchiveError::Damaged { segment, seq, why }
    }

    fn gone(segment: String, seq: Seq) -> ArchiveError {
        ArchiveError::damaged(segment, seq, "it was listed and is not there".to_owned())
    }
}

/// The newest records that the names of segments promise: those after the last hole, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// First of them.
    pub first: Seq,
    /// Last one.
    pub last: Seq,
    /// Its hash.
    pub last_hash: Hash,
}

/// Records that were just found in the archive, each compared with the one given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Archived {
    /// First record given.
    pub first: Seq,
    /// Last record given.
    pub last: Seq,
    /// Its hash.
    pub last_hash: Hash,
    /// Segments written for them; 0 if all were there.
    pub segments: usize,
}

/// The archive of every stream in a store.
#[derive(Clone)]
pub struct Archive {
    blobs: Arc<dyn Blobs>,
    segment_bytes_max: usize,
}

impl Archive {
    /// The archive in a store.
    pub fn new(blobs: Arc<dyn Blobs>) -> Archive {
        Archive::with_limit(blobs, SEGMENT_BYTES_MAX)
    }

    /// As [`Archive::new`], with smaller segments; a record that is larger gets one of its own. Any can be read.
    pub fn with_limit(blobs: Arc<dyn Blobs>, segment_bytes_max: usize) -> Archive {
        Archive { blobs, segment_bytes_max: segment_bytes_max.min(SEGMENT_BYTES_MAX) }
    }

    /// Lineages of streams that have segments, those of one stream together and its first one before the others.
    ///
    /// # Errors
    /// The store is not reachable.
    pub async fn branches(&self) -> Result<Vec<Branch>, ArchiveError> {
        let names = self.blobs.list("").await.map_err(unreachable_store)?;
        let branches: BTreeSet<Branch> =
            names.iter().filter_map(|name| Segment::parse(name)).map(|(branch, _)| branch).collect();
        Ok(branches.into_iter().collect())
    }

    /// How far the archive reaches, by the names in it; `None` if it has nothing of the branch. Only the end is read: that
    /// the rest is as it was stored, [`Archive::read`] finds out.
    ///
    /// # Errors
    /// The store is not reachable, or the last segment is damaged.
    pub async fn covered(&self, branch: &Branch) -> Result<Option<Covered>, ArchiveError> {
        let segments = self.segments(branch).await?;
        let Some((first, last)) = extent(&segments) else { return Ok(None) };
        let Some(stored) = self.find(branch, &segments, last).await? else { return Ok(None) };
        Ok(Some(Covered { first, last, last_hash: stored.hash }))
    }

    /// Archives records that follow each other; `branch` is that of the record before them. Those that are there already are compared, and so
    /// are the neighbours. What is returned was read back and is equal; after an error nothing is promised, and the same call again goes
    /// on with what is still missing.
    ///
    /// Records between the archive's end and the first one given may be in neither (they went while there was no archive): that is no
    /// reason to refuse these. [`Archive::read`] names the hole.
    ///
    /// # Errors
    /// See [`ArchiveError`].
    pub async fn store(&self, branch: &Branch, records: &[Stored]) -> Result<Archived, ArchiveError> {
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            return Err(ArchiveError::Nothing);
        };
        let runs = branch.runs(records);
        let mut before = match runs.first() {
            Some((begun, _)) if begun != branch => self.head_before(branch, first).await?,
            Some(_) | None => None,
        };
        let mut segments = 0;
        for (branch, run) in runs {
            segments += self.store_run(&branch, before, run).await?;
            before = run.last().map(Stored::head);
        }
        Ok(Archived { first: first.record.seq, last: last.record.seq, last_hash: last.hash, segments })
    }

    /// Archives records of one branch; gives the number of segments written. What is before them need not be in this branch.
    async fn store_run(
        &self,
        branch: &Branch,
        before: Option<Head>,
        records: &[Stored],
    ) -> Result<usize, ArchiveError> {
        let segments = self.segments(branch).await?;
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            return Err(ArchiveError::Nothing);
        };
        let mut head = match (before, first.record.seq.0.checked_sub(1)) {
            (Some(before), _) => Some(before),
            (None, Some(seq)) => self.find(branch, &segments, Seq(seq)).await?.map(|stored| stored.head()),
            (None, None) => None,
        };
        let after = self.find(branch, &segments, last.record.seq.next()).await?;
        for stored in records.iter().chain(&after) {
            head = Some(follow(head, stored).map_err(ArchiveError::NoChain)?);
        }
        self.compare(branch, &segments, records).await?;
        let mut written = 0;
        for run in missing(&segments, records) {
            let mut pieces = cut(run, self.segment_bytes_max);
            // Towards what is there, so that no hole is made, however early this ends.
            if run.first().is_some_and(|first| segments.iter().any(|s| s.first > first.record.seq)) {
                pieces.reverse();
            }
            for piece in pieces {
                self.put(branch, piece).await?;
                written += 1;
            }
        }
        Ok(written)
    }

    /// The record before this one, if it is in the branch.
    async fn head_before(&self, branch: &Branch, stored: &Stored) -> Result<Option<Head>, ArchiveError> {
        let Some(before) = stored.record.seq.0.checked_sub(1) else { return Ok(None) };
        let segments = self.segments(branch).await?;
        Ok(self.find(branch, &segments, Seq(before)).await?.map(|stored| stored.head()))
    }

    /// The branch's records, oldest first. Where they end is all that the archive knows: records after a segment that is
    /// gone without a trace are not missed.
    ///
    /// # Errors
    /// The store is not reachable.
    pub async fn read(&self, branch: &Branch) -> Result<Pages, ArchiveError> {
        let segments = self.segments(branch).await?;
        Ok(Pages::new(Arc::clone(&self.blobs), branch.clone(), segments))
    }

    /// The branch's segments, in the order of their records.
    async fn segments(&self, branch: &Branch) -> Result<Vec<Segment>, ArchiveError> {
        let Branch { stream, lineage: _ } = branch;
        if !blobs::is_word(&stream.0) {
            return Err(ArchiveError::StreamName(stream.0.clone()));
        }
        let names = self.blobs.list(&format!("{branch}/")).await.map_err(unreachable_store)?;
        let of_branch = names.iter().filter_map(|name| Segment::parse(name)).filter(|(b, _)| b == branch);
        let mut segments: Vec<Segment> = of_branch.map(|(_, segment)| segment).collect();
        segments.sort();
        Ok(segments)
    }

    /// A record, if a segment has it. Every segment that does must agree.
    async fn find(
        &self,
        branch: &Branch,
        segments: &[Segment],
        seq: Seq,
    ) -> Result<Option<Stored>, ArchiveError> {
        let mut found: Option<(Stored, &Segment)> = None;
        for segment in segments.iter().filter(|segment| segment.meets(seq, seq)) {
            let records = self.load(branch, segment).await?;
            let Some(stored) = records.into_iter().find(|stored| stored.record.seq == seq) else { continue };
            match &found {
                Some((other, one)) if other.hash != stored.hash => {
                    let (one, other) = (one.name(branch), segment.name(branch));
                    return Err(ArchiveError::Conflict { seq, one, other });
                }
                Some(_) => {}
                None => found = Some((stored, segment)),
            }
        }
        Ok(found.map(|(stored, _)| stored))
    }

    /// Compares records with every segment that has one of them.
    async fn compare(
        &self,
        branch: &Branch,
        segments: &[Segment],
        records: &[Stored],
    ) -> Result<(), ArchiveError> {
        let Some((first, last)) = ends(records) else { return Ok(()) };
        for segment in segments.iter().filter(|segment| segment.meets(first, last)) {
            let archived = self.load(branch, segment).await?;
            let there = archived.iter().skip_while(|stored| stored.record.seq < first);
            let given = records.iter().skip_while(|stored| stored.record.seq < segment.first);
            if let Some((other, _)) = there.zip(given).find(|(there, given)| there != given) {
                let (segment, seq) = (segment.name(branch), other.record.seq);
                return Err(ArchiveError::Differs { segment, seq });
            }
        }
        Ok(())
    }

    /// Writes one segment and reads it back.
    async fn put(&self, branch: &Branch, piece: &[Stored]) -> Result<(), ArchiveError> {
        let Some((segment, bytes)) = Segment::of(piece) else { return Ok(()) };
        let name = segment.name(branch);
        let put = self.blobs.put_new(&name, &bytes).await;
        match &put {
            Ok(()) | Err(BlobsError::AlreadyExists | BlobsError::Ambiguous(_)) => {}
            Err(e @ (BlobsError::Unavailable(_) | BlobsError::TooLarge { .. })) => {
                return Err(ArchiveError::Unavailable(format!("{name}: {e}")));
            }
        }
        // Whatever was answered: it is archived if it is there and the same, and not before.
        match (segment.load(self.blobs.as_ref(), branch).await?, put) {
            (Some(records), _) if records == piece => Ok(()),
            (Some(_), _) => Err(ArchiveError::Differs { segment: name, seq: segment.first }),
            (None, Ok(())) => Err(ArchiveError::Lost { segment: name }),
            (None, Err(e)) => Err(ArchiveError::Unavailable(format!("{name}: {e}"))),
        }
    }

    async fn load(&self, branch: &Branch, segment: &Segment) -> Result<Vec<Stored>, ArchiveError> {
        let loaded = segment.load(self.blobs.as_ref(), branch).await?;
        loaded.ok_or_else(|| ArchiveError::gone(segment.name(branch), segment.first))
    }
}

fn unreachable_store(e: BlobsError) -> ArchiveError {
    ArchiveError::Unavailable(e.to_string())
}

/// First and last record after the last hole between segments in order.
fn extent(segments: &[Segment]) -> Option<(Seq, Seq)> {
    let first = segments.first()?;
    let reach = |(first, last): (Seq, Seq), segment: &Segment| {
        if segment.first > last.next() {
            (segment.first, segment.last)
        } else {
            (first, last.max(segment.last))
        }
    };
    Some(segments.iter().fold((first.first, first.last), reach))
}

fn ends(records: &[Stored]) -> Option<(Seq, Seq)> {
    Some((records.first()?.record.seq, records.last()?.record.seq))
}

/// The runs of records that no segment has.
fn missing<'a>(segments: &[Segment], records: &'a [Stored]) -> impl Iterator<Item = &'a [Stored]> {
    let is_there = |stored: &Stored| segments.iter().any(|s| s.meets(stored.record.seq, stored.record.seq));
    records
        .chunk_by(move |one, other| is_there(one) == is_there(other))
        .filter(move |run| run.first().is_some_and(|stored| !is_there(stored)))
}
