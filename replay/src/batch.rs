//! Turns, found again in a stream: the observations of one look and what was decided on them were appended together, or, if
//! they were too many, the observations alone.

use crate::line;
use valkeeper_core::{
    decision::Scope,
    event::{Event, Record},
    observation::Evidence,
};

/// One turn's records.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// What was seen: folded before deciding.
    pub seen: &'a [Record],
    /// What followed from it: closed doubts, decisions, standing.
    pub judged: &'a [Record],
}

impl<'a> Batch<'a> {
    /// The readings that were decided on; `None` if the turn recorded neither a decision nor a change of standing.
    pub fn evidence(&self) -> Option<&'a Evidence> {
        self.judged.iter().find_map(evidence)
    }
}

/// The readings in a record, if it carries some.
pub fn evidence(record: &Record) -> Option<&Evidence> {
    match &record.event {
        Event::Decided { decision: _, evidence } | Event::StandingChanged { standing: _, evidence } => {
            Some(evidence)
        }
        Event::Baseline { .. }
        | Event::EpochStarted { .. }
        | Event::SpecChanged(_)
        | Event::PodChanged { .. }
        | Event::ServerChanged { .. }
        | Event::AgentChanged { .. }
        | Event::NodeChanged { .. }
        | Event::SlotsWeighed { .. }
        | Event::RouteChanged { .. }
        | Event::ObjectChanged { .. }
        | Event::EffectsEnded(_)
        | Event::DecisionClosed { .. }
        | Event::Trimmed { .. }
        | Event::LevelRaised { .. } => None,
    }
}

/// True for what a turn appends after it has decided; doubts are closed by what was decided, so they belong to it.
fn is_judgement(record: &Record) -> bool {
    matches!(record.event, Event::DecisionClosed { .. }) || evidence(record).is_some()
}

/// Splits a stream into turns.
pub fn batches(records: &[Record]) -> impl Iterator<Item = Batch<'_>> {
    let mut rest = records;
    std::iter::from_fn(move || {
        let turn = rest.get(..turn_len(rest))?;
        rest = rest.get(turn.len()..)?;
        let (seen, judged) = turn.split_at(turn.iter().position(is_judgement).unwrap_or(turn.len()));
        (!turn.is_empty()).then_some(Batch { seen, judged })
    })
}

/// Number of records of the first turn. Time and epoch tell turns apart, except where time stands still (simulations);
/// then the order does, in which a turn appends: what was seen, closed doubts, one decision for each scope, standing.
fn turn_len(records: &[Record]) -> usize {
    let Some(first) = records.first() else { return 0 };
    let mut stage = Stage::Seen;
    let mut scopes: Vec<Scope> = Vec::new();
    let mut readings = None;
    for (index, record) in records.iter().enumerate() {
        // A full store lets go of its oldest records between two appends of one turn.
        let next = Stage::of(record).unwrap_or(stage);
        let scope = line::decided(record).map(|d| d.scope);
        let again = scope.is_some_and(|s| scopes.contains(&s))
            || (Stage::of(record), stage) == (Some(Stage::Standing), Stage::Standing);
        let other_readings =
            evidence(record).zip(readings).is_some_and(|(a, b): (&Evidence, &Evidence)| a != b);
        let moved = record.time != first.time || record.epoch != first.epoch;
        if moved || next < stage || again || other_readings {
            return index;
        }
        stage = next;
        scopes.extend(scope);
        readings = readings.or(evidence(record));
    }
    records.len()
}

/// What a turn appends, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Seen,
    Closed,
    Decided,
    Standing,
}

impl Stage {
    /// `None`: it may come anywhere.
    fn of(record: &Record) -> Option<Stage> {
        Some(match &record.event {
            Event::Trimmed { .. } => return None,
            Event::DecisionClosed { .. } => Stage::Closed,
            Event::Decided { .. } => Stage::Decided,
            Event::StandingChanged { .. } => Stage::Standing,
            Event::Baseline { .. }
            | Event::EpochStarted { .. }
            | Event::SpecChanged(_)
            | Event::PodChanged { .. }
            | Event::ServerChanged { .. }
            | Event::AgentChanged { .. }
            | Event::NodeChanged { .. }
            | Event::SlotsWeighed { .. }
            | Event::RouteChanged { .. }
            | Event::ObjectChanged { .. }
            | Event::EffectsEnded(_)
            | Event::LevelRaised { .. } => Stage::Seen,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;
    use valkeeper_core::{event::CloseReason, ids::Seq};

    #[test]
    fn a_turn_is_what_was_seen_and_what_followed() {
        let records = story::failover();
        let sizes: Vec<(usize, usize)> = batches(&records).map(|b| (b.seen.len(), b.judged.len())).collect();
        assert_eq!(sizes, [(2, 0), (8, 1), (1, 1), (4, 1), (1, 2), (1, 0)]);
    }

    #[test]
    fn a_closed_doubt_belongs_to_the_judgement() {
        let mut book = story::adopted();
        book.add(500, story::gone(0));
        book.add(500, Event::DecisionClosed { decision: Seq(3), how: CloseReason::Superseded });
        book.add(500, story::decided(story::promotion(), story::readings(500, &[])));
        let last = batches(&book.0).last().map(|b| (b.seen.len(), b.judged.len()));
        assert_eq!(last, Some((1, 2)));
    }

    #[test]
    fn a_look_at_the_same_time_is_another_turn() {
        let mut book = story::adopted();
        book.add(10, story::gone(0));
        assert_eq!(batches(&book.0).last().map(|b| (b.seen.len(), b.judged.len())), Some((1, 0)));
    }

    #[test]
    fn a_cut_between_two_appends_splits_no_turn() {
        let mut book = story::adopted();
        let readings = story::readings(10, &[]);
        book.add(10, story::decided(story::promotion(), readings.clone()));
        let (through, hash) = (Seq(1), valkeeper_core::ids::Digest("aa".into()));
        book.add(10, Event::Trimmed { through, folded: hash.clone(), hash, archive: None });
        book.add(10, Event::StandingChanged { standing: Default::default(), evidence: readings });
        assert_eq!(batches(&book.0).last().map(|b| (b.seen.len(), b.judged.len())), Some((0, 3)));
    }

    #[test]
    fn a_second_decision_of_a_scope_or_with_other_readings_is_another_turn() {
        for readings in [story::readings(10, &[(0, 1000), (1, 1000), (2, 1000)]), story::readings(9, &[])] {
            let mut book = story::adopted();
            book.add(10, story::decided(story::promotion(), readings));
            assert_eq!(batches(&book.0).last().map(|b| (b.seen.len(), b.judged.len())), Some((0, 1)));
        }
    }
}
