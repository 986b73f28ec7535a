//! Is this the stream that was written? Sequence, chain, epochs and times, checked record by record.

use crate::{
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

    fn add(&mut self, stored: &Stored) {
        let Record { seq, epoch, time, event } = &stored.record;
        let found = problems(self.head.as_ref(), self.records, stored);
        let room = PROBLEMS_MAX.saturating_sub(self.problems.len());
        self.problems.extend(found.into_iter().take(room));
        self.records += 1;
        self.first.get_or_insert(*seq);
        self.last = Some(*seq);
        if matches!(event, Event::EpochStarted { .. }) || self.epochs.last().is_none_or(|(e, _)| e != epoch) {
            match self.epochs.last() {
                Some((last, _)) if last == epoch => {}
                Some(_) | None => self.epochs.push((*epoch, *seq)),
            }
        }
        self.head = Some(Head { seq: *seq, epoch: *epoch, time: *time, hash: stored.hash });
    }
}

/// Looks at every record and reports everything that is wrong.
pub fn verify<'a>(records: impl IntoIterator<Item = &'a Stored>) -> Report {
    let mut report = Report::default();
    for stored in records {
        report.add(stored);
    }
    report
}

/// As [`verify`], over an export. Stops at the first line that cannot be read.
pub fn verify_lines(reader: impl BufRead) -> Report {
    let mut report = Report::default();
    for (index, item) in import_lines(reader).enumerate() {
        match item {
            Ok(stored) => report.add(&stored),
            Err(e) => report.problems.push(Problem::Unreadable { item: index + 1, why: e.to_string() }),
        }
    }
    report
}

/// The head of an intact stream, `None` if it is empty.
///
/// # Errors
/// The first problem.
pub fn verify_chain(records: &[Stored]) -> Result<Option<Head>, Problem> {
    let mut before = None;
    for (index, stored) in records.iter().enumerate() {
        before = Some(verify_next(before.as_ref(), index, stored)?);
    }
    Ok(before)
}

/// The head after one more record, the `index`th of its stream (from 0), if it continues an intact one.
pub(crate) fn verify_next(before: Option<&Head>, index: usize, stored: &Stored) -> Result<Head, Problem> {
    problems(before, index, stored).into_iter().next().map_or_else(|| Ok(stored.head()), Err)
}

fn problems(before: Option<&Head>, index: usize, stored: &Stored) -> Vec<Problem> {
    let Record { seq, epoch, time, event } = &stored.record;
    let (seq, epoch, time) = (*seq, *epoch, *time);
    let mut found = Vec::new();
    let is_baseline = matches!(event, Event::Baseline { .. });
    if is_baseline != (index == 0) {
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
    let rises = is_baseline || (matches!(event, Event::EpochStarted { .. }) && index != 1);
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
