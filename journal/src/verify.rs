//! Is this the stream that was written? Sequence, chain, epochs and times, checked record by record.

use crate::{
    folded::Folded,
    lineage::Lineage,
    lines::import_lines,
    record::{Hash, Head, Stored},
};
use std::io::BufRead;
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, Timestamp, WriterEpoch},
};

/// Problems reported at most; a stream with so many is not worth a longer list.
pub const PROBLEMS_MAX: usize = 100;

/// Something that is wrong with a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A stream begins with record 1 and a zero previous hash.
    #[error("the stream begins with record {first} instead of 1: its beginning is missing")]
    BeginningMissing {
        /// First sequence found.
        first: Seq,
    },
    /// The first record is something else than a Baseline, or a later one is a Baseline.
    #[error("record {seq} is {name}: a stream has one Baseline, and it comes first")]
    Baseline {
        /// The record.
        seq: Seq,
        /// Name of its event.
        name: &'static str,
    },
    /// Records are missing, doubled or out of order.
    #[error("record {found} follows record {after}")]
    Gap {
        /// The record before.
        after: Seq,
        /// The record found.
        found: Seq,
    },
    /// It does not name the record before by its hash.
    #[error(
        "record {seq} does not continue the chain: it names {prev} as the record before, which is {before}"
    )]
    PrevMismatch {
        /// The record.
        seq: Seq,
        /// What it names.
        prev: Hash,
        /// Hash of the record before.
        before: Hash,
    },
    /// Its content was changed after it was written.
    #[error("record {seq} was changed: its content gives {computed}, it says {stored}")]
    HashMismatch {
        /// The record.
        seq: Seq,
        /// Hash of its content.
        computed: Hash,
        /// Hash it carries.
        stored: Hash,
    },
    /// Epochs rise by one, at `EpochStarted` and nowhere else.
    #[error("record {seq} is of epoch {epoch} after epoch {before}")]
    Epoch {
        /// The record.
        seq: Seq,
        /// Its epoch.
        epoch: WriterEpoch,
        /// Epoch of the record before.
        before: WriterEpoch,
    },
    /// Time goes backwards.
    #[error("record {seq} is older than the record before")]
    Time {
        /// The record.
        seq: Seq,
    },
    /// The stream begins with a fold of records that are gone, and no record says that they were cut so.
    #[error(
        "the stream begins with a fold up to record {through}, and no Trimmed record names it as {digest}"
    )]
    Unnamed {
        /// Last record that it stands for.
        through: Seq,
        /// SHA-256 of what is there.
        digest: Hash,
    },
    /// A line or frame cannot be read; nothing after it is looked at.
    #[error("item {item} cannot be read: {why}")]
    Unreadable {
        /// Its number, counted from 1: the line number in an export.
        item: usize,
        /// Why.
        why: String,
    },
}

/// What a stream looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of records read.
    pub records: usize,
    /// Last record that is gone, if the stream's beginning was cut.
    pub trimmed: Option<Seq>,
    /// Sequence of the first.
    pub first: Option<Seq>,
    /// Sequence of the last.
    pub last: Option<Seq>,
    /// Epochs, each with the first record of it.
    pub epochs: Vec<(WriterEpoch, Seq)>,
    /// The last record's place; compare it with an anchor.
    pub head: Option<Head>,
    /// What is wrong, at most [`PROBLEMS_MAX`]. Empty: the stream is what was written.
    pub problems: Vec<Problem>,
}

impl Report {
    /// True if nothing is wrong.
    pub fn is_intact(&self) -> bool {
        self.problems.is_empty()
    }

    fn add(&mut self, chain: &mut Chain, stored: &Stored) {
        let Record { seq, epoch, time: _, event: _ } = &stored.record;
        let found = chain.take(stored);
        let room = PROBLEMS_MAX.saturating_sub(self.problems.len());
        self.problems.extend(found.into_iter().take(room));
        self.records += 1;
        self.first.get_or_insert(*seq);
        self.last = Some(*seq);
        if self.epochs.last().is_none_or(|(last, _)| last != epoch) {
            self.epochs.push((*epoch, *seq));
        }
    }

    fn end(mut self, chain: Chain) -> Report {
        self.head = chain.before;
        self.problems.extend(chain.end().err());
        self
    }
}

/// Checks a stream record by record, while it is read.
#[derive(Clone, Debug)]
pub struct Chain {
    before: Option<Head>,
    lineage: Lineage,
    /// What the stream begins with, until a record names it: last record it stands for, that one's hash, its own digest.
    unnamed: Option<(Seq, Hash, Hash)>,
}

impl Chain {
    /// The check of a stream that begins with `folded`, or with record 1.
    pub fn new(folded: Option<&Folded>) -> Chain {
        let name = |folded: &Folded| (folded.head().seq, folded.head().hash, folded.digest());
        let lineage = folded.map(Folded::lineage).unwrap_or_default();
        Chain { before: folded.map(|folded| *folded.head()), lineage, unnamed: folded.map(name) }
    }

    /// The next record.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn next(&mut self, stored: &Stored) -> Result<(), Problem> {
        self.take(stored).into_iter().next().map_or(Ok(()), Err)
    }

    /// The last record's place.
    pub fn head(&self) -> Option<&Head> {
        self.before.as_ref()
    }

    /// The last record's lineage.
    pub fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// There are no more records. Returns the head, `None` if the stream is empty.
    ///
    /// # Errors
    /// [`Problem::Unnamed`].
    pub fn end(self) -> Result<Option<Head>, Problem> {
        match self.unnamed {
            None => Ok(self.before),
            Some((through, _, digest)) => Err(Problem::Unnamed { through, digest }),
        }
    }

    fn take(&mut self, stored: &Stored) -> Vec<Problem> {
        let found = problems(self.before.as_ref(), stored);
        if let (Event::Trimmed { through, hash, folded, archive: _ }, Some((seq, last, digest))) =
            (&stored.record.event, &self.unnamed)
            && (through, &hash.0, &folded.0) == (seq, &last.to_string(), &digest.to_string())
        {
            self.unnamed = None;
        }
        self.before = Some(stored.head());
        self.lineage = self.lineage.after(stored);
        found
    }
}

/// Looks at every record and reports everything that is wrong.
pub fn verify<'a>(folded: Option<&Folded>, records: impl IntoIterator<Item = &'a Stored>) -> Report {
    let mut chain = Chain::new(folded);
    let mut report = Report { trimmed: folded.map(|f| f.head().seq), ..Report::default() };
    for stored in records {
        report.add(&mut chain, stored);
    }
    report.end(chain)
}

/// As [`verify`], over an export. Stops at the first line that cannot be read.
pub fn verify_lines(reader: impl BufRead) -> Report {
    let mut lines = import_lines(reader);
    let (mut report, mut chain) = (Report::default(), Chain::new(None));
    let mut item = 0;
    while let Some(line) = lines.next() {
        item += 1;
        if let Some(folded) = lines.take_folded() {
            chain = Chain::new(Some(&folded));
            report.trimmed = Some(folded.head().seq);
            item += 1;
        }
        match line {
            Ok(stored) => report.add(&mut chain, &stored),
            Err(e) => report.problems.push(Problem::Unreadable { item, why: e.to_string() }),
        }
    }
    report.end(chain)
}

/// The head of an intact stream, `None` if it is empty.
///
/// # Errors
/// The first problem.
pub fn verify_chain(folded: Option<&Folded>, records: &[Stored]) -> Result<Option<Head>, Problem> {
    let mut chain = Chain::new(folded);
    records.iter().try_for_each(|stored| chain.next(stored))?;
    chain.end()
}

/// The head after one more record, if it continues an intact stream that ends with `before`.
pub(crate) fn verify_next(before: Option<&Head>, stored: &Stored) -> Result<Head, Problem> {
    problems(before, stored).into_iter().next().map_or_else(|| Ok(stored.head()), Err)
}

fn problems(before: Option<&Head>, stored: &Stored) -> Vec<Problem> {
    let Record { seq, epoch, time, event } = &stored.record;
    let (seq, epoch, time) = (*seq, *epoch, *time);
    let mut found = Vec::new();
    let is_baseline = matches!(event, Event::Baseline { .. });
    if is_baseline != before.is_none() {
        found.push(Problem::Baseline { seq, name: event.name() });
    }
    let origin = Head { seq: Seq(0), epoch: WriterEpoch(0), time: Timestamp(i64::MIN), hash: Hash::ZERO };
    let Head { seq: last, epoch: reigning, time: latest, hash } = before.copied().unwrap_or(origin);
    if seq != last.next() {
        found.push(match before {
            None => Problem::BeginningMissing { first: seq },
            Some(_) => Problem::Gap { after: last, found: seq },
        });
    } else if stored.prev != hash {
        found.push(Problem::PrevMismatch { seq, prev: stored.prev, before: hash });
    }
    let computed = stored.computed_hash();
    if computed != stored.hash {
        found.push(Problem::HashMismatch { seq, computed, stored: stored.hash });
    }
    // A Baseline opens its writer's epoch; the EpochStarted after it names the writer.
    let rises = is_baseline || (matches!(event, Event::EpochStarted { .. }) && last != Seq(1));
    // By one, or by more where agents remembered a later writer than this journal.
    let is_right = if rises { epoch > reigning } else { epoch == reigning };
    if !is_right {
        found.push(Problem::Epoch { seq, epoch, before: reigning });
    }
    if time < latest {
        found.push(Problem::Time { seq });
    }
    found
}
