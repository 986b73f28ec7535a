//! What a verb is asked about: the records that are there, and what those before them fold to if they are gone.

use crate::{Error, moment::Moment};
use serde::Serialize;
use std::fmt;
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, Timestamp},
    state::ClusterState,
};
use valkeeper_journal::Folded;

/// Records in order, and the state before the first of them.
#[derive(Clone, Debug, Default)]
pub struct History {
    start: ClusterState,
    gone: Option<Gone>,
    records: Vec<Record>,
}

/// Records that left the store: the beginning of a stream that was cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gone {
    /// The last of them.
    pub through: Seq,
    /// Its time.
    pub until: Timestamp,
    /// The record of the cut and its time; `None` if there is none, which `verify` calls a problem.
    pub recorded: Option<(Seq, Timestamp)>,
    /// Where they were put before, if they were.
    pub archive: Option<String>,
}

impl Gone {
    /// What `folded` stands for, as the first of the records says that names it.
    pub fn new<'a>(folded: &Folded, mut records: impl Iterator<Item = &'a Record>) -> Gone {
        let (through, until) = (folded.head().seq, folded.head().time);
        let cut = |r: &Record| {
            let Event::Trimmed { through: seq, hash: _, folded: _, archive } = &r.event else { return None };
            (*seq == through).then(|| ((r.seq, r.time), archive.clone()))
        };
        let (recorded, archive) = records.find_map(cut).unzip();
        Gone { through, until, recorded, archive: archive.flatten() }
    }
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Gone { through, until, recorded, archive } = self;
        write!(f, "records 1 to {through}, up to {until}, ")?;
        match recorded {
            Some((seq, time)) => write!(f, "left the store with record {seq} at {time} (retention); ")?,
            None => write!(f, "are gone, and no record says why; ")?,
        }
        match archive {
            Some(name) => write!(f, "they are in the archive {name}: --archive DIR joins a copy of it"),
            None => write!(f, "no archive is named"),
        }
    }
}

impl From<Vec<Record>> for History {
    /// The history of a stream that is there from its first record on.
    fn from(records: Vec<Record>) -> Self {
        History { start: ClusterState::default(), gone: None, records }
    }
}

impl History {
    /// The history of a stream that begins with `folded`, or with record 1.
    pub fn new(folded: Option<&Folded>, records: Vec<Record>) -> Self {
        let start = folded.map(|f| f.state().clone()).unwrap_or_default();
        History { start, gone: folded.map(|f| Gone::new(f, records.iter())), records }
    }

    /// What was known before the first record that is there.
    pub fn start(&self) -> &ClusterState {
        &self.start
    }

    /// The records that are not there, if the beginning was cut.
    pub fn gone(&self) -> Option<&Gone> {
        self.gone.as_ref()
    }

    /// The records that are there.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The record at a sequence. Errors: [`Error::Gone`], [`Error::NoSuchRecord`].
    pub fn record(&self, seq: Seq) -> Result<&Record, Error> {
        if let Some(gone) = self.gone.as_ref().filter(|gone| Seq(0) < seq && seq <= gone.through) {
            return Err(Error::Gone { seq, gone: gone.to_string() });
        }
        let seqs = || self.records.iter().map(|r| r.seq);
        let (first, last) = (seqs().next().unwrap_or_default(), seqs().next_back().unwrap_or_default());
        self.records.iter().find(|r| r.seq == seq).ok_or(Error::NoSuchRecord { seq, first, last })
    }

    /// What was known at a moment. Errors: as [`History::record`] for a sequence, [`Error::BeforeHistory`] for a time before
    /// everything that is there.
    pub fn at(&self, moment: Moment) -> Result<ClusterState, Error> {
        let is_start = |gone: &Gone| moment.includes(gone.through, gone.until, &self.records);
        if let Moment::Seq(seq) = moment
            && self.gone.as_ref().is_none_or(|gone| gone.through != seq)
        {
            self.record(seq)?;
        }
        let known = self.records.get(..moment.end(&self.records)).unwrap_or_default();
        if known.is_empty() && !self.gone.as_ref().is_some_and(is_start) {
            let first = self.gone.as_ref().map(|g| g.until).or(self.records.first().map(|r| r.time));
            let gone = self.gone.as_ref().map(ToString::to_string);
            return Err(Error::BeforeHistory { first: first.unwrap_or_default().to_string(), gone });
        }
        Ok(self.folded_with(known))
    }

    /// What is known at the end.
    pub fn end(&self) -> ClusterState {
        self.folded_with(&self.records)
    }

    fn folded_with(&self, records: &[Record]) -> ClusterState {
        let mut state = self.start.clone();
        records.iter().for_each(|record| state.apply(record));
        state
    }
}
