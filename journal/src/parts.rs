//! What is too large for one append is cut. A first look at a large cluster is: each of its nodes names every other.

use crate::{
    codec::RECORD_OVERHEAD_BYTES,
    record::{BATCH_BYTES_MAX, KINDS, Nature, RECORD_BYTES_MAX},
};
use valkeeper_core::event::Event;

/// The events of one turn, in order, in as many parts as there must be: one, unless they exceed [`BATCH_BYTES_MAX`]. Appended one
/// after the other at the time of the turn, they read as one turn. What was seen and what was decided are cut apart first: a crash
/// between them leaves what a turn without decisions would. Only decisions that do not fit together go in several parts; of those, some may
/// be left without the others, as if the turn had not come to them.
pub fn parts(events: Vec<Event>) -> Vec<Vec<Event>> {
    // So many fit, whatever they are.
    if events.len() <= BATCH_BYTES_MAX / RECORD_BYTES_MAX {
        return vec![events];
    }
    let sizes: Vec<usize> = events.iter().map(record_bytes).collect();
    if sizes.iter().sum::<usize>() <= BATCH_BYTES_MAX {
        return vec![events];
    }
    let mut parts: Vec<Vec<Event>> = Vec::new();
    let (mut room, mut is_judging) = (0, false);
    for (event, bytes) in events.into_iter().zip(sizes) {
        let judges = is_judgement(&event);
        match parts.last_mut() {
            Some(part) if bytes <= room && judges == is_judging => part.push(event),
            Some(_) | None => {
                parts.push(vec![event]);
                room = BATCH_BYTES_MAX;
            }
        }
        (room, is_judging) = (room.saturating_sub(bytes), judges);
    }
    parts
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
        ids::{MemberId, Seq, Timestamp, WriterEpoch},
        observation::{Observed, SpecFact},
    };

    fn seen(bytes: usize) -> Event {
        Event::SpecChanged(SpecFact::Invalid("x".repeat(bytes)))
    }

    fn judged() -> Event {
        one_of_each().into_iter().find(|event| event.decided().is_some()).unwrap()
    }

    fn lengths(events: Vec<Event>) -> Vec<usize> {
        let (before, parts) = (events.clone(), parts(events));
        assert_eq!(parts.concat(), before, "all of it, in order");
        parts.iter().map(Vec::len).collect()
    }

    #[test]
    fn what_fits_is_one_part() {
        assert_eq!(lengths(one_of_each()), [one_of_each().len()]);
        let four = (0..4).map(|_| seen(60_000)).collect();
        assert_eq!(lengths(four), [4]);
    }

    #[test]
    fn what_does_not_is_cut_between_what_was_seen_and_what_was_decided_first() {
        let look = |seen_n: usize, judged_n: usize| {
            let facts = (0..seen_n).map(|_| seen(20_000));
            facts.chain((0..judged_n).map(|_| judged())).collect::<Vec<_>>()
        };
        assert_eq!(lengths(look(12, 2)), [14], "240 kB fit into 256 KiB");
        assert_eq!(lengths(look(13, 2)), [13, 2]);
        assert_eq!(lengths(look(14, 2)), [13, 1, 2]);
        assert_eq!(lengths(look(26, 0)), [13, 13]);
        let absent = Event::PodChanged { member: MemberId::new(0, 1), pod: Observed::Absent };
        let decisions: Vec<Event> = std::iter::once(absent).chain((0..3_000).map(|_| judged())).collect();
        let parts = lengths(decisions);
        assert_eq!(parts.first(), Some(&1));
        assert!(parts.len() > 2 && parts.iter().skip(2).all(|n| n <= parts.get(1).unwrap()), "{parts:?}");
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
