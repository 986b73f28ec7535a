//! The head object's text: one line about the stream, then the lines of the open tail.

use super::names::Part;
use crate::{
    backend::BackendError,
    folded::Folded,
    lines::{export_line, import_line},
    record::{Hash, Head, Stored, StreamId},
    verify::verify_next,
};
use serde::{Deserialize, Serialize};
use valkeeper_core::ids::Seq;

/// Layout of the first line. A reader that meets a higher one stops.
const FORMAT: u32 = 1;

/// A sealed segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    pub first: Seq,
    pub last: Seq,
    /// Bytes that it takes in the store.
    pub bytes: usize,
}

/// What stands for the records that were cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FoldedAt {
    /// Last record that it stands for.
    pub seq: Seq,
    /// SHA-256 of its text.
    pub digest: Hash,
    /// Bytes that it takes in the store.
    pub bytes: usize,
}

impl FoldedAt {
    pub fn of(folded: &Folded, bytes: usize) -> FoldedAt {
        FoldedAt { seq: folded.head().seq, digest: folded.digest(), bytes }
    }
}

#[derive(Serialize, Deserialize)]
struct FirstLine {
    format: u32,
    stream: StreamId,
    head: Head,
    folded: Option<FoldedAt>,
    /// First record of the tail.
    tail: Option<Seq>,
    segments: Vec<Segment>,
}

/// The head object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeadDoc {
    stream: StreamId,
    /// Last record of the tail.
    pub head: Head,
    /// What the stream begins with, if its beginning was cut.
    pub folded: Option<FoldedAt>,
    /// Sealed segments, in order.
    pub segments: Vec<Segment>,
    /// First record of the tail, `None` if it is empty.
    pub tail_first: Option<Seq>,
    /// Lines that are in no segment, each with its newline.
    pub tail: String,
}

impl HeadDoc {
    pub fn new(stream: &StreamId, head: Head) -> HeadDoc {
        let (folded, segments, tail_first, tail) = (None, Vec::new(), None, String::new());
        HeadDoc { stream: stream.clone(), head, folded, segments, tail_first, tail }
    }

    /// Bytes that the stream takes in the store.
    pub fn bytes(&self) -> usize {
        let sealed: usize = self.segments.iter().map(|s| s.bytes).sum();
        self.folded.map_or(0, |folded| folded.bytes) + sealed + self.text().len()
    }

    pub fn text(&self) -> String {
        let HeadDoc { stream, head, folded, segments, tail_first, tail } = self;
        let (stream, segments) = (stream.clone(), segments.clone());
        let first =
            FirstLine { format: FORMAT, stream, head: *head, folded: *folded, tail: *tail_first, segments };
        // Strings and numbers only: this cannot fail. An empty line would be refused when it is read.
        let first = serde_json::to_string(&first).unwrap_or_default();
        format!("{first}\n{tail}")
    }

    pub fn parse(stream: &StreamId, text: &str) -> Result<HeadDoc, BackendError> {
        let corrupt = |why: String| BackendError::Corrupt(format!("head object of stream {stream}: {why}"));
        let (first, tail) = text.split_once('\n').ok_or_else(|| corrupt("no first line".to_owned()))?;
        let parsed: serde_json::Value = serde_json::from_str(first).map_err(|e| corrupt(e.to_string()))?;
        // Before anything else: a later format may have other fields.
        match parsed.get("format").and_then(serde_json::Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => {
                let what = format!("head object of stream {stream} has format {format}, {FORMAT} is known");
                return Err(BackendError::Newer(what));
            }
            None => return Err(corrupt("no format".to_owned())),
        }
        let parsed: FirstLine = serde_json::from_value(parsed).map_err(|e| corrupt(e.to_string()))?;
        let FirstLine { format: _, stream: named, head, folded, tail: tail_first, segments } = parsed;
        if named != *stream {
            return Err(corrupt(format!("it is the head of stream {named}")));
        }
        Ok(HeadDoc { stream: named, head, folded, segments, tail_first, tail: tail.to_owned() })
    }

    /// Adds lines to the tail.
    pub fn add(&mut self, records: &[Stored]) {
        for stored in records {
            self.tail_first.get_or_insert(stored.record.seq);
            self.tail.push_str(&export_line(stored));
            self.tail.push('\n');
            self.head = stored.head();
        }
    }

    /// Makes the tail a segment. Returns it, with its bytes still to be told, and its text.
    pub fn seal(&mut self) -> Option<(Segment, String)> {
        let first = self.tail_first.take()?;
        Some((Segment { first, last: self.head.seq, bytes: 0 }, std::mem::take(&mut self.tail)))
    }

    /// Takes out everything up to where `folded` ends. False if that is no segment's end; then nothing is changed. A stream that has
    /// nothing yet may begin with any: it is written anew.
    pub fn cut(&mut self, folded: FoldedAt) -> bool {
        if !self.segments.is_empty() || self.tail_first.is_some() {
            let Some(end) = self.segments.iter().position(|s| s.last == folded.seq) else { return false };
            self.segments.drain(..=end);
        }
        self.folded = Some(folded);
        true
    }

    /// True if no head that follows this one can name the object: what a writer may be about to name seals the tail, or lies
    /// between two places where a segment begins and ends. Such places are only ever taken away, or added after the head.
    pub fn is_past(&self, part: Part) -> bool {
        let is_end = |seq: Seq| self.segments.iter().any(|s| s.last == seq);
        let is_begin = |seq: Seq| self.segments.iter().any(|s| s.first == seq);
        part.last() < self.head.seq
            && match part {
                Part::Folded { through } => !is_end(through),
                Part::Segment { first, last } => !(is_begin(first) && is_end(last)),
            }
    }

    /// Checks another reading of the same head: every line of the tail must have the bytes that are known, and so must
    /// everything else but for segments that were merged: one then takes the place of two or more, exactly.
    pub fn check_same(&self, read: &HeadDoc) -> Result<(), BackendError> {
        let mut known = self.tail.split_inclusive('\n');
        let mut found = read.tail.split_inclusive('\n');
        let mut seq = self.tail_first.unwrap_or(self.head.seq.next());
        loop {
            match (known.next(), found.next()) {
                (None, None) => break,
                (known, found) if known == found => seq = seq.next(),
                (_, None) => return Err(self.damage(seq, "its line is gone")),
                (None, Some(_)) => return Err(self.damage(seq, "nobody wrote such a line")),
                (Some(_), Some(_)) => {
                    return Err(self.damage(seq, "its line is not the one that was written"));
                }
            }
        }
        read.check_places()?;
        // A cut adds a record: at the same head there was none.
        if self.folded != read.folded {
            let seq = self.folded.or(read.folded).map_or(Seq(0), |folded| folded.seq);
            return Err(self.damage(seq, "what the stream begins with after it is not what was written"));
        }
        self.check_merged(&read.segments)
    }

    fn check_merged(&self, read: &[Segment]) -> Result<(), BackendError> {
        let mut known = self.segments.iter();
        for segment in read {
            let other = |seq| self.damage(seq, "the segment that begins with it is not one that was written");
            let begin = known.next().ok_or_else(|| other(segment.first))?;
            if begin == segment {
                continue;
            }
            let mut last = begin.last;
            while last < segment.last {
                last = known.next().ok_or_else(|| other(segment.first))?.last;
            }
            let is_merged = begin.first == segment.first && last == segment.last && begin.last < last;
            if !is_merged {
                return Err(other(segment.first));
            }
        }
        match known.next() {
            None => Ok(()),
            Some(gone) => Err(self.damage(gone.first, "the segment that begins with it is gone")),
        }
    }

    /// Checks a tail of which nothing is known but the record before it, `None` if it is the stream's first.
    pub fn check_tail(&self, before: Option<Head>) -> Result<(), BackendError> {
        let mut seq = self.check_places()?;
        let mut before = before;
        for line in self.tail.split_inclusive('\n') {
            seq = seq.next();
            // Without it, the next record would be written onto the same line.
            let text = line.strip_suffix('\n').ok_or_else(|| self.damage(seq, "its line has no end"))?;
            let stored = import_line(text).map_err(|e| self.damage(seq, e))?;
            before = Some(verify_next(before.as_ref(), &stored).map_err(|e| self.damage(seq, e))?);
        }
        if before != Some(self.head) {
            return Err(self.damage(seq, format!("the records end with it, and the head is {}", self.head)));
        }
        Ok(())
    }

    /// Segments and tail must follow each other without a gap, from what was cut. Returns the last sealed record, 0 if none is.
    pub fn check_places(&self) -> Result<Seq, BackendError> {
        let mut sealed = self.folded.map_or(Seq(0), |folded| folded.seq);
        for Segment { first, last, bytes: _ } in &self.segments {
            if *first != sealed.next() || last < first {
                return Err(self.damage(sealed.next(), format!("the next segment is {first} to {last}")));
            }
            sealed = *last;
        }
        if self.tail_first.is_some_and(|first| first != sealed.next())
            || self.tail_first.is_none() != self.tail.is_empty()
        {
            return Err(self.damage(sealed.next(), "the tail does not begin with it"));
        }
        Ok(sealed)
    }

    fn damage(&self, seq: Seq, why: impl std::fmt::Display) -> BackendError {
        BackendError::Corrupt(format!("record {seq} in the head object of stream {}: {why}", self.stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::ids::{Timestamp, WriterEpoch};

    /// Segments of ten records each from record 21 on, after a cut; the tail is 61 to 65.
    fn doc() -> HeadDoc {
        let head = Head { seq: Seq(65), epoch: WriterEpoch(1), time: Timestamp(0), hash: Hash::ZERO };
        let mut doc = HeadDoc::new(&StreamId("uid-1".to_owned()), head);
        doc.folded = Some(FoldedAt { seq: Seq(20), digest: Hash::ZERO, bytes: 5 });
        doc.segments =
            (2..6).map(|n| Segment { first: Seq(10 * n + 1), last: Seq(10 * n + 10), bytes: 7 }).collect();
        doc.tail_first = Some(Seq(61));
        doc.tail = "a line\n".repeat(5);
        doc
    }

    type Edit = fn(&mut HeadDoc);

    fn is_past(first: u64, last: u64) -> bool {
        doc().is_past(Part::Segment { first: Seq(first), last: Seq(last) })
    }

    #[test]
    fn what_is_named_or_may_be_named_next_is_not_past() {
        assert!(!is_past(21, 30) && !is_past(51, 60), "named");
        assert!(!is_past(21, 40) && !is_past(31, 60), "someone merges these, and is about to name it");
        assert!(!is_past(61, 65), "someone seals the tail");
        assert!(!is_past(61, 70) && !is_past(21, 70), "a later head has sealed and merged already");
        for through in [30, 60, 65, 70] {
            assert!(!doc().is_past(Part::Folded { through: Seq(through) }), "someone cuts at {through}");
        }
    }

    #[test]
    fn what_no_later_head_can_name_is_past() {
        assert!(is_past(1, 10) && is_past(1, 20) && is_past(11, 30), "cut");
        assert!(is_past(21, 25) && is_past(26, 30) && is_past(21, 35), "merged");
        assert!(is_past(61, 64), "the tail as it was sealed once and not named: it has grown since");
        for through in [10, 20, 25, 64] {
            assert!(doc().is_past(Part::Folded { through: Seq(through) }), "{through}");
        }
    }

    #[test]
    fn another_reading_of_the_same_head_differs_by_merges_only() {
        let with = |change: Edit| {
            let mut read = doc();
            change(&mut read);
            doc().check_same(&read).map_err(|e| e.to_string())
        };
        with(|_| {}).unwrap();
        with(|doc| drop(doc.segments.splice(0..2, [Segment { first: Seq(21), last: Seq(40), bytes: 9 }])))
            .unwrap();
        with(|doc| drop(doc.segments.splice(.., [Segment { first: Seq(21), last: Seq(60), bytes: 9 }])))
            .unwrap();
        let refused: [(Edit, u64); 6] = [
            (|doc| doc.segments[1].bytes = 8, 31),
            (
                |doc| {
                    drop(doc.segments.splice(
                        0..2,
                        [
                            Segment { first: Seq(21), last: Seq(35), bytes: 9 },
                            Segment { first: Seq(36), last: Seq(40), bytes: 9 },
                        ],
                    ))
                },
                21,
            ),
            (|doc| doc.folded = doc.folded.map(|at| FoldedAt { bytes: 6, ..at }), 20),
            (|doc| doc.folded = None, 1),
            (|doc| doc.segments.truncate(3), 51),
            (|doc| doc.tail.push_str("a line\n"), 66),
        ];
        for (change, seq) in refused {
            let why = with(change).unwrap_err();
            assert!(why.contains(&format!("record {seq} ")), "{seq}: {why}");
        }
    }
}
