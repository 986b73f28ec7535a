//! Lineages. After a person accepted that records are gone, a stream may write other records under the same numbers. From the record
//! that says so it is of another lineage, named by that record's hash. So an archive can keep both, and nobody takes one for the other.

use crate::record::{Hash, Stored};
use serde::{Deserialize, Serialize};
use std::fmt;
use valkeeper_core::event::Event;

/// A lineage of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lineage(Option<Hash>);

impl Lineage {
    /// The lineage of a stream that never lost anything.
    pub const FIRST: Lineage = Lineage(None);

    /// The lineage that begins with the record of this hash.
    pub fn named(hash: Hash) -> Lineage {
        Lineage(Some(hash))
    }

    /// Its name; the first has none.
    pub fn name(self) -> Option<Hash> {
        let Lineage(name) = self;
        name
    }

    /// True if nothing was lost up to here.
    pub fn is_first(&self) -> bool {
        *self == Lineage::FIRST
    }

    /// The lineage from this record on.
    #[must_use]
    pub fn after(self, stored: &Stored) -> Lineage {
        if begins_with(stored) { Lineage::named(stored.hash) } else { self }
    }
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(hash) => write!(f, "lineage {hash}"),
            None => f.write_str("the first lineage"),
        }
    }
}

/// True of a claim after an accepted loss, and of nothing else: a store that was rolled back behind everybody's back stays in its lineage,
/// and does not fit there any more.
pub(crate) fn begins_with(stored: &Stored) -> bool {
    matches!(stored.record.event, Event::EpochStarted { writer: _, version: _, lost_through: Some(_) })
}
