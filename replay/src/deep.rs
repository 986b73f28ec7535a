//! `verify --deep`: are what cuts left behind the folds of the records that they stand for? Everything that is there is
//! folded again, and compared with what each `Trimmed` record names and with what the stream begins with.
//!
//! The hash chain tells that nobody changed a line. This tells what the chain cannot: that the operator who cut the
//! stream folded right, and that nobody wrote all of the journal anew.

use crate::{
    report::Finding,
    source::{Origin, Stream},
};
use serde::Serialize;
use std::fmt;
use valkeeper_core::{
    event::Event,
    ids::{Digest, Seq},
    state::ClusterState,
};
use valkeeper_journal::{Folded, Head, Lineage, StreamId};

/// What was folded again and compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Deep {
    /// First record that was folded.
    pub first: Option<Seq>,
    /// Number of records that were folded.
    pub records: usize,
    /// Every cut that is recorded, and what the stream begins with.
    pub cuts: Vec<Cut>,
}

/// A cut, and whether what it left is right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// Last record that left the store.
    pub through: Seq,
    /// The record of the cut; `None` if there is none.
    pub recorded: Option<Seq>,
    /// What was compared, and the outcome.
    pub compared: Compared,
}

/// What a fold was compared with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Compared {
    /// The records fold to the very text that was hashed.
    SameText,
    /// The text is of another version of the program; the state in it is the same.
    SameState {
        /// That version.
        version: String,
    },
    /// The state is the same; the text names no lineage, as builds wrote it that knew none, and the records are of one.
    SameStateNoLineage {
        /// That of the records.
        lineage: Lineage,
    },
    /// What was left is not what the records fold to.
    Differs(String),
    /// There is nothing to compare.
    NotCompared(String),
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compared::SameText => write!(f, "the same text"),
            Compared::SameState { version } => {
                write!(f, "the same state (compared as state: the text is of version {version})")
            }
            Compared::SameStateNoLineage { lineage } => write!(
                f,
                "the same state (the text names no lineage, as older builds wrote it; the records are of {lineage})"
            ),
            Compared::Differs(how) => write!(f, "DIFFERS: {how}"),
            Compared::NotCompared(why) => write!(f, "not compared: {why}"),
        }
    }
}

/// What is said of a cut, to be compared.
struct Claim<'a> {
    through: Seq,
    recorded: Option<Seq>,
    /// Hash of the last record that left, as the record of the cut has it.
    hash: Digest,
    folded: Digest,
    /// What it names, if the stream still begins with it.
    text: Option<&'a Folded>,
    /// Version of the program that cut, as far as it is known.
    version: Option<String>,
}

/// Folds a stream again.
pub fn deep(stream: &Stream) -> Deep {
    let Origin { folded, records } = stream.origin();
    let id = stream.folded.as_ref().map_or_else(|| StreamId(stream.uid.clone()), |f| f.stream().clone());
    let mut open = claims(stream);
    let mut cuts = Vec::new();
    let mut judge = |head: &Head, lineage: Lineage, state: &ClusterState| {
        for claim in open.extract_if(.., |claim| claim.through == head.seq) {
            let compared = claim.compare(&id, head, lineage, state);
            cuts.push(Cut { through: claim.through, recorded: claim.recorded, compared });
        }
    };
    let mut state = folded.map(|f| f.state().clone()).unwrap_or_default();
    let mut lineage = folded.map(Folded::lineage).unwrap_or_default();
    for stored in &records {
        state.apply(&stored.record);
        lineage = lineage.after(stored);
        judge(&stored.head(), lineage, &state);
    }
    cuts.extend(open.into_iter().map(|Claim { through, recorded, .. }| {
        let why = format!("record {through} is not here; an archive (--archive DIR) may have it");
        Cut { through, recorded, compared: Compared::NotCompared(why) }
    }));
    cuts.sort_by_key(|cut| (cut.through, cut.recorded));
    Deep { first: records.first().map(|s| s.record.seq), records: records.len(), cuts }
}

/// Every cut that is recorded; what the stream begins with also if no record names it.
fn claims(stream: &Stream) -> Vec<Claim<'_>> {
    let text = stream.folded.as_ref();
    let mut version = text.and_then(version);
    let mut claims = Vec::new();
    for stored in stream.origin().records {
        match &stored.record.event {
            Event::EpochStarted { writer: _, version: started, .. } => version = Some(started.clone()),
            Event::Trimmed { through, hash, folded, archive: _ } => {
                let is_named =
                    |text: &&Folded| text.head().seq == *through && text.digest().to_string() == folded.0;
                claims.push(Claim {
                    through: *through,
                    recorded: Some(stored.record.seq),
                    hash: hash.clone(),
                    folded: folded.clone(),
                    text: text.filter(is_named),
                    version: version.clone(),
                });
            }
            Event::Baseline { .. }
            | Event::SpecChanged(_)
            | Event::PodChanged { .. }
            | Event::ServerChanged { .. }
            | Event::AgentChanged { .. }
            | Event::NodeChanged { .. }
            | Event::SlotsWeighed { .. }
            | Event::RouteChanged { .. }
            | Event::ObjectChanged { .. }
            | Event::Decided { .. }
            | Event::EffectsEnded(_)
            | Event::DecisionClosed { .. }
            | Event::StandingChanged { .. }
            | Event::LevelRaised { .. } => {}
        }
    }
    if let Some(text) = text.filter(|_| claims.iter().all(|claim| claim.text.is_none())) {
        let (hash, folded) = (Digest(text.head().hash.to_string()), Digest(text.digest().to_string()));
        let (through, version) = (text.head().seq, self::version(text));
        claims.push(Claim { through, recorded: None, hash, folded, text: Some(text), version });
    }
    claims
}

/// Version of the program that wrote a text.
fn version(folded: &Folded) -> Option<String> {
    let text: serde_json::Value = serde_json::from_str(folded.text()).ok()?;
    Some(text.get("version")?.as_str()?.to_owned())
}

impl Claim<'_> {
    /// Compares with what the records up to `head` fold to.
    fn compare(&self, stream: &StreamId, head: &Head, lineage: Lineage, state: &ClusterState) -> Compared {
        if self.hash.0 != head.hash.to_string() {
            return Compared::Differs(format!(
                "record {} is {}, and was {}",
                head.seq, head.hash, self.hash.0
            ));
        }
        let fold = |lineage| Folded::new(stream, *head, lineage, state);
        let (again, unnamed) = match (fold(lineage), fold(Lineage::FIRST)) {
            (Ok(again), Ok(unnamed)) => (again, unnamed),
            (Err(error), _) | (_, Err(error)) => return Compared::NotCompared(error.to_string()),
        };
        if again.digest().to_string() == self.folded.0 {
            return Compared::SameText;
        }
        let is_unnamed = match self.text {
            Some(text) => text.lineage().is_first() && text.state() == state && text.head() == head,
            None => unnamed.digest().to_string() == self.folded.0,
        };
        if is_unnamed && !lineage.is_first() {
            return Compared::SameStateNoLineage { lineage };
        }
        let written_by = self.version.clone().unwrap_or_else(|| "unknown".to_owned());
        match self.text {
            Some(text) if text.lineage() != lineage => {
                Compared::Differs(format!("it says {}, and the records are of {lineage}", text.lineage()))
            }
            Some(text) if text.state() == state && text.head() == head => {
                Compared::SameState { version: version(text).unwrap_or(written_by) }
            }
            Some(text) => Compared::Differs(fields_that_differ(text.state(), state)),
            None if written_by == env!("CARGO_PKG_VERSION") => Compared::Differs(format!(
                "the records fold to {}, and the record of the cut names {}",
                again.digest(),
                self.folded.0
            )),
            None => {
                Compared::NotCompared(format!("version {written_by} wrote it, and only its digest is left"))
            }
        }
    }
}

/// Names of the fields in which what was kept differs from what the records fold to.
fn fields_that_differ(kept: &ClusterState, folded: &ClusterState) -> String {
    let (Ok(serde_json::Value::Object(kept)), Ok(serde_json::Value::Object(folded))) =
        (serde_json::to_value(kept), serde_json::to_value(folded))
    else {
        return "what was kept is not what the records fold to".to_owned();
    };
    let differing = folded.iter().filter(|(name, value)| kept.get(*name) != Some(*value));
    let names: Vec<&str> = differing.map(|(name, _)| name.as_str()).collect();
    match names.as_slice() {
        [] => "its head is not that of the records".to_owned(),
        [..] => format!("what was kept differs from what the records fold to in {}", names.join(", ")),
    }
}

impl Deep {
    /// Lines for people.
    pub fn text(&self) -> String {
        let Deep { first, records, cuts } = self;
        let from = first.map_or_else(|| "-".to_owned(), |seq| seq.to_string());
        let mut text = format!("deep        {records} records folded again, from {from} on\n");
        if cuts.is_empty() {
            text.push_str("  nothing was cut: nothing to compare\n");
        }
        for Cut { through, recorded, compared } in cuts {
            let by = recorded.map_or_else(|| "no record of it".to_owned(), |seq| format!("record {seq}"));
            text.push_str(&format!("  cut after {through} ({by}): {compared}\n"));
        }
        text
    }

    /// Whether anything differs.
    pub fn finding(&self) -> Finding {
        let differs = |cut: &&Cut| matches!(cut.compared, Compared::Differs(_));
        self.cuts.iter().find(differs).map_or(Finding::Clean, |_| Finding::Found)
    }
}
