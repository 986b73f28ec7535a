//! The head object's text: one line about the stream, then the lines of the open tail.

use crate::{
    backend::BackendError,
    lines::import_line,
    record::{Head, Stored, StreamId},
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
    /// Size of its text in bytes.
    pub bytes: usize,
}

#[derive(Serialize, Deserialize)]
struct FirstLine {
    format: u32,
    stream: StreamId,
    head: Head,
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
    /// Sealed segments, in order.
    pub segments: Vec<Segment>,
    /// First record of the tail, `None` if it is empty.
    pub tail_first: Option<Seq>,
    /// Lines that are in no segment, each with its newline.
    pub tail: String,
}

impl HeadDoc {
    pub fn new(stream: &StreamId, head: Head) -> HeadDoc {
        HeadDoc { stream: stream.clone(), head, segments: Vec::new(), tail_first: None, tail: String::new() }
    }

    pub fn sealed_bytes(&self) -> usize {
        self.segments.iter().map(|s| s.bytes).sum()
    }

    pub fn text(&self) -> String {
        let HeadDoc { stream, head, segments, tail_first, tail } = self;
        let (stream, segments) = (stream.clone(), segments.clone());
        let first = FirstLine { format: FORMAT, stream, head: *head, tail: *tail_first, segments };
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
            Some(format) => return Err(corrupt(format!("format {format} is not known to this program"))),
            None => return Err(corrupt("no format".to_owned())),
        }
        let parsed: FirstLine = serde_json::from_value(parsed).map_err(|e| corrupt(e.to_string()))?;
        let FirstLine { format: _, stream: named, head, tail: tail_first, segments } = parsed;
        if named != *stream {
            return Err(corrupt(format!("it is the head of stream {named}")));
        }
        Ok(HeadDoc { stream: named, head, segments, tail_first, tail: tail.to_owned() })
    }

    /// Checks another reading of the same head: every line of the tail must have the bytes that are known. The list of
    /// segments may be shorter, because another process merges them, but it covers the same records with as many bytes.
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
        let sealed = read.check_places()?;
        if self.sealed_bytes() != read.sealed_bytes() {
            return Err(self.damage(sealed, "the segments up to it have other sizes than were written"));
        }
        Ok(())
    }

    /// Checks a tail of which nothing is known but the last sealed record, `None` if there are no segments.
    pub fn check_tail(&self, sealed: Option<&Stored>) -> Result<(), BackendError> {
        let mut seq = self.check_places()?;
        let mut before = sealed.map(Stored::head);
        for line in self.tail.split_inclusive('\n') {
            seq = seq.next();
            // Without it, the next record would be written onto the same line.
            let text = line.strip_suffix('\n').ok_or_else(|| self.damage(seq, "its line has no end"))?;
            let stored = import_line(text).map_err(|e| self.damage(seq, e))?;
            let index = usize::try_from(seq.0 - 1).unwrap_or(usize::MAX);
            before = Some(verify_next(before.as_ref(), index, &stored).map_err(|e| self.damage(seq, e))?);
        }
        if before != Some(self.head) {
            return Err(self.damage(seq, format!("the records end with it, and the head is {}", self.head)));
        }
        Ok(())
    }

    /// Segments and tail must follow each other without a gap, from record 1. Returns the last sealed record, 0 if none is.
    fn check_places(&self) -> Result<Seq, BackendError> {
        let mut sealed = Seq(0);
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
