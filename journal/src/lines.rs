//! The text form of a record, one JSON object per line: what exports and ConfigMaps hold. `event` is the payload byte
//! for byte, so a line has the same hash as the frame it came from.

use crate::{
    codec,
    folded::{FOLDED_BYTES_MAX, Folded, FoldedError},
    record::{Hash, RECORD_BYTES_MAX, RecordError, Stored},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::io::{self, BufRead, Read};
use valkeeper_core::{
    event::Record,
    ids::{Seq, Timestamp, WriterEpoch},
};

/// Longest line in bytes, newline included: the largest payload, and the envelope spelled out (about 320 bytes).
pub const LINE_BYTES_MAX: usize = RECORD_BYTES_MAX + 512;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<E> {
    seq: Seq,
    epoch: WriterEpoch,
    time: Timestamp,
    kind: u16,
    schema: u16,
    prev: Hash,
    hash: Hash,
    event: E,
}

/// Why an export cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The reader failed.
    #[error("line {line} cannot be read")]
    Io {
        /// Number of the line, from 1.
        line: usize,
        /// The reader's error.
        source: io::Error,
    },
    /// The line is no record.
    #[error("line {line}: {why}")]
    Record {
        /// Number of the line, from 1.
        line: usize,
        /// Why.
        why: RecordError,
    },
    /// The first line is not what a stream can begin with.
    #[error("line {line}: {why}")]
    Folded {
        /// Number of the line: 1.
        line: usize,
        /// Why.
        why: FoldedError,
    },
}

/// One line, without its newline.
pub fn export_line(stored: &Stored) -> String {
    let Stored { record, prev, hash, sealed } = stored;
    let Record { seq, epoch, time, event: _ } = record;
    let (kind, schema) = codec::kind_and_schema(sealed);
    // A payload has been parsed from these bytes, so they are UTF-8. Written by hand, because the payload is not to be
    // serialised anew: it is the bytes that count.
    let payload = String::from_utf8_lossy(stored.payload());
    format!(
        r#"{{"seq":{seq},"epoch":{epoch},"time":{},"kind":{kind},"schema":{schema},"prev":"{prev}","hash":"{hash}","event":{payload}}}"#,
        time.0
    )
}

/// One record of a line.
///
/// # Errors
/// It is not a whole record, or one that this program does not know. The hash is not checked; see
/// [`crate::verify_chain`].
pub fn import_line(text: &str) -> Result<Stored, RecordError> {
    let line: Line<&RawValue> = serde_json::from_str(text).map_err(|e| match e.classify() {
        serde_json::error::Category::Eof => RecordError::Torn { missing: 1 },
        serde_json::error::Category::Io
        | serde_json::error::Category::Syntax
        | serde_json::error::Category::Data => RecordError::Corrupt(e.to_string()),
    })?;
    let Line { seq, epoch, time, kind, schema, prev, hash, event } = line;
    codec::from_parts((seq, epoch, time), (kind, schema), (prev, hash), event.get().as_bytes())
}

/// Reads an export. Ends after the first error; a torn last line is [`RecordError::Torn`]. If the first line is what a stream
/// begins with whose beginning was cut, it is no record: [`Lines::take_folded`] has it.
pub fn import_lines<R: BufRead>(reader: R) -> Lines<R> {
    Lines { reader, line: 0, ended: false, folded: None }
}

/// Iterator of [`import_lines`].
pub struct Lines<R> {
    reader: R,
    line: usize,
    ended: bool,
    folded: Option<Folded>,
}

impl<R: BufRead> Lines<R> {
    /// What the stream begins with, once, after the first item has been taken.
    pub fn take_folded(&mut self) -> Option<Folded> {
        self.folded.take()
    }

    fn text_line(&mut self) -> Result<Vec<u8>, LineError> {
        self.line += 1;
        let line = self.line;
        let max = if line == 1 { FOLDED_BYTES_MAX.max(LINE_BYTES_MAX) } else { LINE_BYTES_MAX };
        let mut text = Vec::new();
        let mut limited = self.reader.by_ref().take(max as u64 + 1);
        limited.read_until(b'\n', &mut text).map_err(|source| LineError::Io { line, source })?;
        Ok(text)
    }

    fn next_line(&mut self) -> Result<Option<Stored>, LineError> {
        let mut text = self.text_line()?;
        if self.line == 1
            && let Some(first) = std::str::from_utf8(&text).ok().filter(|text| Folded::is_in(text))
        {
            let folded = Folded::parse(first.trim_end_matches('\n'));
            self.folded = Some(folded.map_err(|why| LineError::Folded { line: 1, why })?);
            text = self.text_line()?;
        }
        let line = self.line;
        if text.is_empty() {
            return Ok(None);
        }
        let failed = |why| LineError::Record { line, why };
        if text.len() > LINE_BYTES_MAX {
            return Err(failed(RecordError::TooLarge { bytes: text.len(), max: LINE_BYTES_MAX }));
        }
        let whole = text.pop_if(|last| *last == b'\n').is_some();
        let parsed =
            std::str::from_utf8(&text).map_err(|e| RecordError::Corrupt(e.to_string())).and_then(import_line);
        parsed.map(Some).map_err(|why| match why {
            RecordError::Corrupt(_) if !whole => failed(RecordError::Torn { missing: 1 }),
            // Whole lines are not torn, whatever they look like.
            RecordError::Torn { missing: _ } if whole => {
                failed(RecordError::Corrupt("unfinished JSON".to_owned()))
            }
            RecordError::Torn { .. }
            | RecordError::Corrupt(_)
            | RecordError::UnknownCodec { .. }
            | RecordError::UnknownKind { .. }
            | RecordError::UnknownSchema { .. }
            | RecordError::UnknownLevel { .. }
            | RecordError::NotFinalized { .. }
            | RecordError::TooLarge { .. } => failed(why),
        })
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Stored, LineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.next_line().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        item
    }
}
