//! Where in an archive records are: by their stream and, within it, by their lineage.

use super::blobs::is_word;
use crate::{
    lineage::{Lineage, begins_with},
    record::{Stored, StreamId},
};
use std::fmt;
use valkeeper_core::ids::Seq;

/// One lineage of a stream: a folder of the archive. That of the first lineage is the stream's own, and the others are in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Branch {
    /// The stream.
    pub stream: StreamId,
    /// Its lineage.
    pub lineage: Lineage,
}

impl Branch {
    /// The first lineage of a stream.
    pub fn first(stream: StreamId) -> Branch {
        Branch { stream, lineage: Lineage::FIRST }
    }

    /// What a folder's name says, `None` if it is not one.
    pub(super) fn parse(folder: &str) -> Option<Branch> {
        let (stream, lineage) = match folder.split_once('/') {
            Some((stream, name)) => (stream, Lineage::named(name.parse().ok()?)),
            None => (folder, Lineage::FIRST),
        };
        is_word(stream).then(|| Branch { stream: StreamId(stream.to_owned()), lineage })
    }

    /// Records that follow each other, the first one in this branch unless it begins another: each run of them with its branch. What a
    /// stream that begins anew has before the record of the loss, its first record, is of the new lineage, too.
    pub fn runs<'a>(&self, records: &'a [Stored]) -> Vec<(Branch, &'a [Stored])> {
        let belong = |one: &Stored, next: &Stored| one.record.seq == Seq(1) || !begins_with(next);
        let mut lineage = self.lineage;
        let with_branch = |run: &'a [Stored]| {
            lineage = run.iter().fold(lineage, Lineage::after);
            (Branch { stream: self.stream.clone(), lineage }, run)
        };
        records.chunk_by(belong).map(with_branch).collect()
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Branch { stream, lineage } = self;
        match lineage.name() {
            Some(name) => write!(f, "{stream}/{name}"),
            None => write!(f, "{stream}"),
        }
    }
}
