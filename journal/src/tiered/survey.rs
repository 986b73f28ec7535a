//! Reading a copy through, to see what it is worth.

use crate::{
    backend::{Backend, BackendError},
    folded::Folded,
    journal::Anchor,
    lineage::Lineage,
    record::{Head, StreamId},
    verify::{Chain, Problem},
};
use std::collections::BTreeSet;

/// A copy that is whole: every record follows the one before it.
pub(super) struct Survey {
    /// Its last record.
    pub head: Option<Head>,
    /// The last record that was cut.
    pub begins_after: Option<Head>,
    /// Whether it holds the record that was asked for, or was cut after it.
    pub holds: bool,
    /// The lineages that it knows of.
    lineages: BTreeSet<Lineage>,
    /// The lineage of its last record.
    lineage: Lineage,
}

impl Survey {
    /// Reads a stream.
    ///
    /// # Errors
    /// The store's; [`BackendError::Corrupt`] if it is not whole.
    pub async fn of(
        backend: &dyn Backend,
        stream: &StreamId,
        needed: Option<Anchor>,
    ) -> Result<Survey, BackendError> {
        let corrupt =
            |problem: Problem| BackendError::Corrupt(format!("a copy of stream {stream}: {problem}"));
        let is_needed =
            |head: &Head| needed.is_some_and(|needed| (needed.seq, needed.hash) == (head.seq, head.hash));
        let mut reader = backend.read(stream).await?;
        let mut holds = needed.is_none() || reader.folded().is_some_and(|folded| is_needed(folded.head()));
        // Older than the cut: that it was there, the cut says.
        holds |= reader.folded().is_some_and(|f| needed.is_some_and(|needed| needed.seq < f.head().seq));
        let begins_after = reader.folded().map(|folded| *folded.head());
        let mut chain = Chain::new(reader.folded());
        let mut lineages = BTreeSet::from([reader.folded().map(Folded::lineage).unwrap_or_default()]);
        while let Some(page) = reader.page().await? {
            for stored in &page.records {
                chain.next(stored).map_err(corrupt)?;
                lineages.insert(chain.lineage());
                holds |= is_needed(&stored.head());
            }
        }
        let lineage = chain.lineage();
        Ok(Survey { head: chain.end().map_err(corrupt)?, begins_after, holds, lineages, lineage })
    }

    /// True if a person accepted a loss here that `other` never heard of: where the two differ, this one counts.
    pub fn outdates(&self, other: &Survey) -> bool {
        !self.lineage.is_first() && !other.lineages.contains(&self.lineage)
    }
}

/// A record as a copy is asked for it.
pub(super) fn anchor(head: Head) -> Anchor {
    Anchor { seq: head.seq, hash: head.hash }
}
