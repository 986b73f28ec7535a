//! What is too large for one append is cut. A first look at a large cluster is: each of its nodes names every other.

use crate::{
    codec::RECORD_OVERHEAD_BYTES,
    record::{BATCH_BYTES_MAX, KINDS, Nature, RECORD_BYTES_MAX},
};
use valkeeper_core::{event::Event, ids::ShardId};

/// The events of one turn, as they are appended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts {
    /// What each append holds, one after the other, all at the time of the turn.
    pub appends: Vec<Vec<Event>>,
    /// True if what was decided is in none of them: the next look decides anew.
    pub postponed: bool,
}

/// The events of one turn, in order: in one part, unless they exceed [`BATCH_BYTES_MAX`]; otherwise in several. If what was seen exceeds it
/// alone, what was decided is left out: so many appends take longer than a decision
/// keeps, and the next look, which is small, decides anew. What was seen of one shard stays together: a crash between two parts shows its
/// members as a shorter look would, and never a replica without its link beside a primary of which nothing was heard.
///
/// What the journal will refuse anyway is one part, so that it is refused whole. Decisions are cut between any two.
pub fn parts(mut events: Vec<Event>) -> Parts {
    // So many fit, whatever they are.
    if events.len() <= BATCH_BYTES_MAX / RECORD_BYTES_MAX {
        return Parts { appends: vec![events], postponed: false };
    }
    let sizes: Vec<usize> = events.iter().map(record_bytes).collect();
    if sizes.iter().sum::<usize>() <= BATCH_BYTES_MAX || sizes.iter().any(|bytes| *bytes > RECORD_BYTES_MAX) {
        return Parts { appends: vec![events], postponed: false };
    }
    let (all, seen) = (events.len(), events.iter().position(is_judgement).unwrap_or(events.len()));
    if sizes.iter().take(seen).sum::<usize>() > BATCH_BYTES_MAX {
        events.truncate(seen);
    }
    let postponed = events.len() < all;
    Parts { appends: cut(events, sizes), postponed }
}

/// Fills parts with what was seen of one shard, or with one event, at a time. `sizes`: the bytes of each event's record.
fn cut(events: Vec<Event>, sizes: Vec<usize>) -> Vec<Vec<Event>> {
    let sized: Vec<(Event, usize)> = events.into_iter().zip(sizes).collect();
    let (mut parts, mut room) = (Vec::<Vec<Event>>::new(), 0);
    for together in sized.chunk_by(|(a, _), (b, _)| shard(a).is_some() && shard(a) == shard(b)) {
        let bytes: usize = together.iter().map(|(_, bytes)| bytes).sum();
        let events = together.iter().map(|(event, _)| event.clone());
        match parts.last_mut() {
            Some(part) if bytes <= room => part.extend(events),
            Some(_) | None => {
                parts.push(events.collect());
                room = BATCH_BYTES_MAX;
            }
        }
        room = room.saturating_sub(bytes);
    }
    parts
}

/// The shard of which it tells what was seen.
fn shard(event: &Event) -> Option<ShardId> {
    match event {
        Event::PodChanged { member, .. }
        | Event::ServerChanged { member, .. }
        | Event::AgentChanged { member, .. }
        | Event::NodeChanged { member, .. }
        | Event::SlotsWeighed { member, .. } => Some(member.shard),
        Event::RouteChanged { shard, .. } => Some(*shard),
        Event::Baseline { .. }
        | Event::EpochStarted { .. }
        | Event::SpecChanged(_)
        | Event::ObjectChanged { .. }
        | Event::Decided { .. }
        | Event::EffectsEnded(_)
        | Event::DecisionClosed { .. }
        | Event::StandingChanged { .. }
        | Event::Trimmed { .. }
        | Event::LevelRaised { .. } => None,
    }
}

/// Bytes of its record.
fn record_bytes(event: &Event) -> usize {
    // What has no JSON is refused when it is sealed.
    serde_json::to_vec(event).map_or(0, |payload| RECORD_OVERHEAD_BYTES + payload.len())
}

/// True for what a turn appends after what was seen.
fn is_judgement(event: &Event) -> bool {
    KINDS.iter().any(|kind| kind.number == event.kind() && kind.nature == Nature::Decision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        record::{Hash, Stored},
        testing::one_of_each,
    };
    use valkeeper_core::{
        event::Record,
        ids::{Seq, Timestamp, WriterEpoch},
        observation::SpecFact,
    };

    fn seen(bytes: usize) -> Event {
        Event::SpecChanged(SpecFact::Invalid("x".repeat(bytes)))
    }

    fn judged() -> Event {
        one_of_each().into_iter().find(|event| event.decided().is_some()).unwrap()
    }

    /// What a node of that shard says, which knows a hundred others: some 5 kB.
    fn of_shard(shard: u16) -> Event {
        let mut event = one_of_each().into_iter().find(|event| event.kind() == 15).unwrap();
        if let Event::NodeChanged { member, node } = &mut event {
            let id = |n: u64| format!("{n:040x}").parse().unwrap();
            (member.shard, node.knows) = (ShardId(shard), (0..100).map(|n| (id(n), None)).collect());
        }
        event
    }

    fn lengths(events: &[Event]) -> Vec<usize> {
        parts(events.to_vec()).appends.iter().map(Vec::len).collect()
    }

    #[test]
    fn what_fits_is_one_part_and_so_is_what_is_refused() {
        assert_eq!(parts(one_of_each()), Parts { appends: vec![one_of_each()], postponed: false });
        assert_eq!(lengths(&[(); 4].map(|()| seen(60_000))), [4]);
        let refused: Vec<Event> = [60_000; 9].into_iter().chain([70_000]).map(seen).collect();
        assert_eq!(lengths(&refused), [10]);
    }

    #[test]
    fn what_does_not_fit_is_only_what_was_seen() {
        let look = |seen_n: usize, judged_n: usize| {
            let facts = (0..seen_n).map(|_| seen(20_000));
            facts.chain((0..judged_n).map(|_| judged())).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&look(12, 2)), [14], "240 kB fit into 256 KiB");
        assert_eq!(lengths(&look(13, 2)), [14, 1], "little was seen: what was decided on it is kept");
        assert_eq!(lengths(&look(27, 2)), [13, 13, 1]);
        let large = parts(look(27, 2));
        assert_eq!((large.appends.concat(), large.postponed), (look(27, 0), true));
        assert!(!parts(look(13, 2)).postponed && !parts(look(27, 0)).postponed);
        let decisions: Vec<Event> = (0..3_000).map(|_| judged()).collect();
        assert!(lengths(&decisions).len() > 1);
        let cut = parts(decisions.clone());
        assert_eq!((cut.appends.concat(), cut.postponed), (decisions, false));
    }

    #[test]
    fn what_was_seen_of_one_shard_stays_together() {
        let look: Vec<Event> = (0..12).flat_map(|shard| (0..6).map(move |_| of_shard(shard))).collect();
        let parts = parts(look.clone()).appends;
        assert!(parts.len() > 1 && parts.iter().all(|part| part.len() % 6 == 0), "{:?}", lengths(&look));
        assert_eq!(parts.concat(), look);
    }

    #[test]
    fn a_record_has_the_bytes_that_are_counted() {
        for (event, seq) in one_of_each().into_iter().zip(1..) {
            let bytes = record_bytes(&event);
            let record = Record { seq: Seq(seq), epoch: WriterEpoch(1), time: Timestamp(1), event };
            assert_eq!(Stored::seal(record, Hash::ZERO).unwrap().encoded_len(), bytes);
        }
    }
}
