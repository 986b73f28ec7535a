//! Reading an archive: one segment after the other, each checked, and each record given once although segments overlap.

use super::{
    ArchiveError,
    blobs::Blobs,
    branch::Branch,
    segment::{Segment, follow},
};
use crate::record::{Hash, Head, Stored};
use std::{collections::VecDeque, sync::Arc};
use valkeeper_core::ids::Seq;

/// The records of a branch, oldest first. Holds one segment at a time.
pub struct Pages {
    blobs: Arc<dyn Blobs>,
    branch: Branch,
    /// What is left, in order.
    open: VecDeque<Segment>,
    /// The last record given.
    head: Option<Head>,
    /// Records given that a later segment may hold again: hash, and the segment it was given from. Two segments'
    /// at most: whatever is before the next one's first record is dropped.
    given: VecDeque<(Seq, Hash, Segment)>,
}

impl Pages {
    /// Segments must be in order.
    pub(super) fn new(blobs: Arc<dyn Blobs>, branch: Branch, segments: Vec<Segment>) -> Pages {
        Pages { blobs, branch, open: segments.into(), head: None, given: VecDeque::new() }
    }

    /// The next records, some at least; `None` after the last. Every segment is read, also one that brings nothing new.
    ///
    /// # Errors
    /// Damage, named by segment and record, or the store is not reachable. Nothing comes after an error.
    pub async fn next(&mut self) -> Result<Option<Vec<Stored>>, ArchiveError> {
        while let Some(segment) = self.open.pop_front() {
            match self.page(segment).await {
                Ok(records) if records.is_empty() => {}
                Ok(records) => return Ok(Some(records)),
                Err(e) => {
                    self.open.clear();
                    return Err(e);
                }
            }
        }
        Ok(None)
    }

    async fn page(&mut self, segment: Segment) -> Result<Vec<Stored>, ArchiveError> {
        let name = segment.name(&self.branch);
        if let Some(head) = self.head
            && segment.first > head.seq.next()
        {
            return Err(ArchiveError::Missing { after: head.seq, segment: name });
        }
        self.given.retain(|(seq, _, _)| *seq >= segment.first);
        let loaded = segment.load(self.blobs.as_ref(), &self.branch).await?;
        let mut records = loaded.ok_or_else(|| ArchiveError::gone(name.clone(), segment.first))?;
        let is_known = |stored: &Stored| self.head.is_some_and(|head| stored.record.seq <= head.seq);
        let new = records.split_off(records.iter().take_while(|stored| is_known(stored)).count());
        for (stored, (seq, hash, other)) in records.iter().zip(&self.given) {
            if stored.hash != *hash {
                let one = other.name(&self.branch);
                return Err(ArchiveError::Conflict { seq: *seq, one, other: name });
            }
        }
        for stored in &new {
            let seq = stored.record.seq;
            let next = follow(self.head, stored);
            self.head = Some(next.map_err(|e| ArchiveError::damaged(name.clone(), seq, e.to_string()))?);
            self.given.push_back((seq, stored.hash, segment));
        }
        Ok(new)
    }
}
