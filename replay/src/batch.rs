//! Turns, found again in a stream: the observations of one look and what was decided on them were appended together.

use valkeeper_core::{
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
        | Event::RouteChanged { .. }
        | Event::ObjectChanged { .. }
        | Event::EffectsEnded(_)
        | Event::DecisionClosed { .. } => None,
    }
}

/// True for what a turn appends after it has decided; doubts are closed by what was decided, so they belong to it.
fn is_judgement(record: &Record) -> bool {
    matches!(record.event, Event::DecisionClosed { .. }) || evidence(record).is_some()
}

/// Splits a stream into turns: records of the same time and epoch, observations first. An observation that follows a
/// decision begins another turn even at the same time.
pub fn batches(records: &[Record]) -> impl Iterator<Item = Batch<'_>> {
    let same_turn = |a: &Record, b: &Record| {
        a.time == b.time && a.epoch == b.epoch && (is_judgement(b) || !is_judgement(a))
    };
    records.chunk_by(same_turn).map(|turn| {
        let (seen, judged) = turn.split_at(turn.partition_point(|r| !is_judgement(r)));
        Batch { seen, judged }
    })
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
}
