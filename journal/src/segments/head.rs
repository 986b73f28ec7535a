//! The head object's text: one line about the stream, then the lines of the open tail.

use crate::{
    backend::BackendError,
    record::{Head, StreamId},
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
}
