//! `log`: the timeline, one line per record, with journalctl's flags.

use crate::{
    history::{Gone, History},
    line::{self, Joined},
    moment::Moment,
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use valkeeper_core::{
    event::{Event, Record},
    ids::Timestamp,
};

/// Which records to show.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// At most so many of the last.
    pub lines_max: Option<usize>,
    /// From here on.
    pub since: Option<Moment>,
    /// Up to here, included.
    pub until: Option<Moment>,
    /// Only lines (kind and text) that match.
    pub pattern: Option<regex_lite::Regex>,
    /// Order of the lines.
    pub order: Order,
}

/// Order of the lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As it happened.
    #[default]
    OldestFirst,
    /// The last first.
    NewestFirst,
}

/// One record of a timeline.
#[derive(Clone, Debug, Serialize)]
pub struct Entry<'a> {
    /// Position in the stream.
    pub seq: u64,
    /// Epoch of the writer.
    pub epoch: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: i64,
    /// Nanoseconds since the record before; `None` for the first of the stream.
    pub after_ns: Option<i64>,
    /// Short kind.
    pub kind: &'static str,
    /// What happened, for people.
    pub text: String,
    /// What happened, in full.
    pub event: &'a Event,
}

/// The selected records.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Timeline<'a> {
    /// One for each record.
    pub entries: Vec<Entry<'a>>,
    /// Records that are gone, if the selection reaches back to where they were; in text only.
    #[serde(skip)]
    pub gone: Option<&'a Gone>,
    #[serde(skip)]
    order: Order,
}

/// Selects records of a stream. Times are relative to the record before it in the stream, shown or not.
pub fn log<'a>(history: &'a History, filter: &Filter) -> Timeline<'a> {
    let (joined, records) = (Joined::new(history), history.records());
    let mut gone = history.gone();
    let start = filter.since.map_or(0, |since| since.start(records));
    let end = filter.until.map_or(records.len(), |until| until.end(records));
    let mut entries: Vec<Entry<'a>> = Vec::new();
    if start > 0 {
        gone = None;
    }
    for index in (start..end).rev() {
        if filter.lines_max.is_some_and(|max| entries.len() >= max) {
            gone = None;
            break;
        }
        let Some(record) = records.get(index) else { break };
        let before = index.checked_sub(1).and_then(|i| records.get(i)).map(|r| r.time);
        let before = before.or(history.gone().map(|gone| gone.until));
        let entry = entry(record, before, &joined);
        let wanted = |p: &regex_lite::Regex| p.is_match(&format!("{} {}", entry.kind, entry.text));
        if filter.pattern.as_ref().is_none_or(wanted) {
            entries.push(entry);
        }
    }
    match filter.order {
        Order::OldestFirst => entries.reverse(),
        Order::NewestFirst => {}
    }
    Timeline { entries, gone, order: filter.order }
}

fn entry<'a>(record: &'a Record, before: Option<Timestamp>, joined: &Joined<'_>) -> Entry<'a> {
    Entry {
        seq: record.seq.0,
        epoch: record.epoch.0,
        time: record.time.to_string(),
        time_ns: record.time.0,
        after_ns: before.map(|b| record.time.0 - b.0),
        kind: line::kind(&record.event),
        text: joined.text(record),
        event: &record.event,
    }
}

impl Report for Timeline<'_> {
    /// One aligned line per record; a line of its own for each day.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut day = String::new();
        let seq_width = self.entries.iter().map(|e| e.seq.to_string().len()).max().unwrap_or(0);
        let gone = self.gone.map(|gone| format!("-- {gone} --\n")).unwrap_or_default();
        if self.order == Order::OldestFirst {
            text.push_str(&gone);
        }
        for entry in &self.entries {
            let (date, clock) = entry.time.split_once('T').unwrap_or(("", &entry.time));
            if date != day {
                text.push_str(&format!("-- {date} UTC --\n"));
                date.clone_into(&mut day);
            }
            let clock = clock.trim_end_matches('Z');
            let after = entry.after_ns.map(after).unwrap_or_default();
            let Entry { seq, kind, text: what, .. } = entry;
            text.push_str(&format!("{clock}  {after:>12}  {seq:>seq_width$}  {kind:<8}  {what}\n"));
        }
        if self.order == Order::NewestFirst {
            text.push_str(&gone);
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new(["seq", "epoch", "time", "kind", "text"]);
        for e in &self.entries {
            table.push([
                e.seq.to_string(),
                e.epoch.to_string(),
                e.time.clone(),
                e.kind.to_owned(),
                e.text.clone(),
            ]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}

/// Time since the record before, in a unit that a person reads at once. Empty for the same moment: a batch is seen as
/// one block.
fn after(ns: i64) -> String {
    let ms = Timestamp(ns).millis_since(Timestamp(0));
    match ms {
        0 => String::new(),
        ms if ms.abs() < 60_000 => format!("+{}.{:03} s", ms / 1000, (ms % 1000).abs()),
        ms if ms < 3_600_000 => format!("+{} m {:02} s", ms / 60_000, ms / 1000 % 60),
        ms if ms < 86_400_000 => format!("+{} h {:02} m", ms / 3_600_000, ms / 60_000 % 60),
        ms => format!("+{} d {:02} h", ms / 86_400_000, ms / 3_600_000 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    fn seqs(filter: &Filter) -> Vec<u64> {
        log(&story::failover().into(), filter).entries.iter().map(|e| e.seq).collect()
    }

    #[test]
    fn the_timeline_shows_the_day_the_distance_and_one_block_per_batch() {
        let text = log(
            &story::failover().into(),
            &Filter { since: "12".parse().ok(), until: "14".parse().ok(), ..Filter::default() },
        )
        .text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "-- 2026-11-21 UTC --");
        assert_eq!(lines[1], "03:01:00.000     +59.990 s  12  server    0-0 server gone");
        assert!(lines[2].starts_with("03:01:00.000                13  decided   PrimaryGone 0-0"), "{text}");
        assert!(
            lines[3].starts_with("03:01:00.020      +0.020 s  14  effects   of 13: promote 0-1 verified"),
            "{text}"
        );
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn the_last_lines_newest_first() {
        let filter = Filter { lines_max: Some(3), order: Order::NewestFirst, ..Filter::default() };
        assert_eq!(seqs(&filter), [22, 21, 20]);
    }

    #[test]
    fn a_pattern_selects_before_the_limit_does() {
        let pattern = regex_lite::Regex::new("^decided .*(Gone|Complete)").ok();
        assert_eq!(seqs(&Filter { pattern: pattern.clone(), ..Filter::default() }), [13, 18]);
        assert_eq!(seqs(&Filter { pattern, lines_max: Some(1), ..Filter::default() }), [18]);
    }

    #[test]
    fn long_distances_are_said_in_long_units() {
        let told = [12, 59_999, 61_000, 3_660_000, 90_000_000].map(|ms| after(ms * 1_000_000));
        assert_eq!(told, ["+0.012 s", "+59.999 s", "+1 m 01 s", "+1 h 01 m", "+1 d 01 h"]);
    }
}
