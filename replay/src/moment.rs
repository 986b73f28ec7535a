//! Points in a stream as people write them: a sequence, a time, a time of day, or "so long before the end".

use chrono::{DateTime, NaiveDateTime, NaiveTime};
use std::str::FromStr;
use valkeeper_core::{
    event::Record,
    ids::{Seq, Timestamp},
};

/// Nanoseconds in a second.
const SECOND_NS: i64 = 1_000_000_000;
/// Nanoseconds in a day.
const DAY_NS: i64 = 86_400 * SECOND_NS;

/// A point in a stream. Times without a zone are UTC; what is relative is relative to the last record, not to now:
/// the same command gives the same answer tomorrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A sequence: `1842`.
    Seq(Seq),
    /// A time: `2026-11-21T03:12:44.5Z`, `2026-11-21 03:12:44`, `2026-11-21`, `@1795230000`.
    Time(Timestamp),
    /// A time of day of the last record's day, nanoseconds since midnight: `03:12`, `03:12:44.5`.
    TimeOfDay(i64),
    /// So many nanoseconds before the last record: `-90s`, `-15m`, `-2h`, `-1d`.
    BeforeEnd(i64),
}

/// A text that is no [`Moment`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a sequence (1842), a time (2026-11-21T03:12:44Z, 03:12:44, @1795230000) or -15m, not {0:?}"
)]
pub struct NotAMoment(String);

impl FromStr for Moment {
    type Err = NotAMoment;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = if let Some(ago) = text.strip_prefix('-') {
            before_end(ago)
        } else if let Some(seconds) = text.strip_prefix('@') {
            let ns = seconds.parse::<i64>().ok().and_then(|s| s.checked_mul(SECOND_NS));
            ns.map(|ns| Moment::Time(Timestamp(ns)))
        } else if let Ok(seq) = text.parse() {
            Some(Moment::Seq(Seq(seq)))
        } else {
            time(text)
        };
        parsed.ok_or_else(|| NotAMoment(text.to_owned()))
    }
}

fn before_end(ago: &str) -> Option<Moment> {
    let unit_at = ago.find(|c: char| !c.is_ascii_digit())?;
    let (count, unit) = ago.split_at(unit_at);
    let unit_ns = match unit {
        "ms" => SECOND_NS / 1000,
        "s" => SECOND_NS,
        "m" | "min" => 60 * SECOND_NS,
        "h" => 3600 * SECOND_NS,
        "d" => DAY_NS,
        _ => return None,
    };
    count.parse::<i64>().ok()?.checked_mul(unit_ns).map(Moment::BeforeEnd)
}

fn time(text: &str) -> Option<Moment> {
    let at = |t: DateTime<chrono::Utc>| t.timestamp_nanos_opt().map(|ns| Moment::Time(Timestamp(ns)));
    if let Ok(zoned) = DateTime::parse_from_rfc3339(text) {
        return at(zoned.to_utc());
    }
    let seconds = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M"];
    if let Some(naive) = seconds.iter().find_map(|f| NaiveDateTime::parse_from_str(text, f).ok()) {
        return at(naive.and_utc());
    }
    if let Ok(day) = chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return at(day.and_time(NaiveTime::MIN).and_utc());
    }
    let of_day = ["%H:%M:%S%.f", "%H:%M"].iter().find_map(|f| NaiveTime::parse_from_str(text, f).ok())?;
    of_day.signed_duration_since(NaiveTime::MIN).num_nanoseconds().map(Moment::TimeOfDay)
}

impl Moment {
    /// The time meant, or `None` for a sequence.
    fn time(self, records: &[Record]) -> Option<Timestamp> {
        let end_ns = records.last().map_or(0, |r| r.time.0);
        match self {
            Moment::Seq(_) => None,
            Moment::Time(time) => Some(time),
            Moment::TimeOfDay(ns) => Some(Timestamp(end_ns - end_ns.rem_euclid(DAY_NS) + ns)),
            Moment::BeforeEnd(ns) => Some(Timestamp(end_ns.saturating_sub(ns))),
        }
    }

    /// Index of the first record at or after this moment; the number of records if there is none.
    pub fn start(self, records: &[Record]) -> usize {
        match (self, self.time(records)) {
            (Moment::Seq(seq), _) => records.partition_point(|r| r.seq < seq),
            (_, Some(time)) => records.partition_point(|r| r.time < time),
            (_, None) => 0,
        }
    }

    /// Index after the last record at or before this moment. People write milliseconds: a time includes every record
    /// that is shown with the same one.
    pub fn end(self, records: &[Record]) -> usize {
        records.partition_point(|r| self.includes(r.seq, r.time, records))
    }

    /// True if what happened with this sequence at this time is at or before this moment of the records.
    pub fn includes(self, seq: Seq, at: Timestamp, records: &[Record]) -> bool {
        match (self, self.time(records)) {
            (Moment::Seq(last), _) => seq <= last,
            (_, Some(time)) => at.0.div_euclid(1_000_000) <= time.0.div_euclid(1_000_000),
            (_, None) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    fn at(text: &str) -> Moment {
        text.parse().unwrap()
    }

    #[test]
    fn the_same_time_can_be_written_in_many_ways() {
        let time = Moment::Time(story::at_ms(0));
        for text in ["2026-11-21T03:00:00Z", "2026-11-21T04:00:00+01:00", "2026-11-21 03:00", "@1795230000"] {
            assert_eq!(at(text), time, "{text}");
        }
    }

    #[test]
    fn a_number_is_a_sequence_and_nonsense_is_refused() {
        assert_eq!(at("42"), Moment::Seq(Seq(42)));
        for text in ["", "-", "-5", "yesterday", "25:00", "-5y"] {
            assert_eq!(text.parse::<Moment>(), Err(NotAMoment(text.into())), "{text}");
        }
    }

    #[test]
    fn bounds_select_records_by_sequence_and_by_time() {
        let records = story::failover();
        assert_eq!(at("12").start(&records), 11);
        assert_eq!(at("12").end(&records), 12);
        assert_eq!(at("03:01:00").start(&records), 11, "the first record of the loss");
        assert_eq!(at("03:01:00").end(&records), 13);
        assert_eq!(at("-100ms").start(&records), 18);
        assert_eq!(at("2027-01-01").start(&records), records.len());
        assert_eq!(at("2020-01-01").end(&records), 0);
    }
}
