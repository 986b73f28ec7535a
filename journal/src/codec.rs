//! The binary frame of a record: the only file that knows bincode. The layout is in docs/JOURNAL.md.
//!
//! Checked in this order, so that no length from a damaged disk is ever believed: CRC of the length, limit, CRC of the
//! body, codec tag, bincode under a limit, kind and schema, payload. (Without a limit, bincode aborts the process on a
//! corrupt length.)

use crate::record::{Hash, RECORD_BYTES_MAX, RecordError, Stored, check_kind, parse_event};
use bincode::{Decode, Encode};
use sha2::{Digest, Sha256};
use valkeeper_core::{
    event::Record,
    ids::{Seq, Timestamp, WriterEpoch},
};

/// Payload is JSON of the event.
pub(crate) const CODEC_JSON: u8 = 1;

/// Length, CRC32C of the length, CRC32C of the body: four bytes each, little endian.
const HEADER_BYTES: usize = 12;
/// Length of a SHA-256.
const HASH_BYTES: usize = 32;

/// Bytes of a frame beyond what the hash covers.
pub(crate) const FRAME_BYTES: usize = HEADER_BYTES + HASH_BYTES;

/// Bytes of the envelope before the payload: codec 1, kind 2, schema 2, seq 8, epoch 8, time 8, prev 32, length 8.
const ENVELOPE_BYTES: usize = 69;

/// Bytes of a frame beyond its payload.
pub(crate) const RECORD_OVERHEAD_BYTES: usize = FRAME_BYTES + ENVELOPE_BYTES;

/// Everything the hash covers. Field order is byte order; fixed-width little-endian integers.
#[derive(Encode, Decode)]
struct Sealed {
    codec: u8,
    kind: u16,
    schema: u16,
    seq: u64,
    epoch: u64,
    time: i64,
    prev: [u8; HASH_BYTES],
    payload: Vec<u8>,
}

const fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<RECORD_BYTES_MAX>()
}

/// Seals a record of this program.
pub(crate) fn seal(record: Record, prev: Hash) -> Result<Stored, RecordError> {
    let payload = serde_json::to_vec(&record.event)
        .map_err(|e| RecordError::Corrupt(format!("record {}: the event has no JSON: {e}", record.seq)))?;
    let (kind, schema) = (record.event.kind(), record.event.schema());
    check_kind(record.seq, kind, schema)?;
    let sealed = sealed_bytes(&record, kind, schema, prev, payload)?;
    let hash = hash(&sealed);
    Ok(Stored { record, prev, hash, sealed })
}

/// Puts together a record that was stored as text.
pub(crate) fn from_parts(
    (seq, epoch, time): (Seq, WriterEpoch, Timestamp),
    (kind, schema): (u16, u16),
    (prev, hash): (Hash, Hash),
    payload: &[u8],
) -> Result<Stored, RecordError> {
    check_kind(seq, kind, schema)?;
    let record = Record { seq, epoch, time, event: parse_event(seq, kind, schema, payload)? };
    let sealed = sealed_bytes(&record, kind, schema, prev, payload.to_vec())?;
    Ok(Stored { record, prev, hash, sealed })
}

fn sealed_bytes(
    record: &Record,
    kind: u16,
    schema: u16,
    prev: Hash,
    payload: Vec<u8>,
) -> Result<Box<[u8]>, RecordError> {
    let bytes = RECORD_OVERHEAD_BYTES + payload.len();
    if bytes > RECORD_BYTES_MAX {
        return Err(RecordError::TooLarge { bytes, max: RECORD_BYTES_MAX });
    }
    let Record { seq: Seq(seq), epoch: WriterEpoch(epoch), time: Timestamp(time), event: _ } = *record;
    let sealed = Sealed { codec: CODEC_JSON, kind, schema, seq, epoch, time, prev: prev.0, payload };
    let bytes = bincode::encode_to_vec(sealed, config())
        .map_err(|e| RecordError::Corrupt(format!("record {seq}: the envelope cannot be encoded: {e}")))?;
    Ok(bytes.into_boxed_slice())
}

/// SHA-256 over sealed bytes.
pub(crate) fn hash(sealed: &[u8]) -> Hash {
    Hash(Sha256::digest(sealed).into())
}

/// The payload within sealed bytes.
pub(crate) fn payload(sealed: &[u8]) -> &[u8] {
    sealed.get(ENVELOPE_BYTES..).unwrap_or_default()
}

/// Kind and schema within sealed bytes, as they were written.
pub(crate) fn kind_and_schema(sealed: &[u8]) -> (u16, u16) {
    match sealed {
        [_, k0, k1, s0, s1, ..] => (u16::from_le_bytes([*k0, *k1]), u16::from_le_bytes([*s0, *s1])),
        _ => (0, 0),
    }
}

/// One frame: length, CRCs, sealed bytes, hash.
pub fn encode(stored: &Stored) -> Vec<u8> {
    let Stored { record: _, prev: _, hash, sealed } = stored;
    let mut body = Vec::with_capacity(HEADER_BYTES + sealed.len() + HASH_BYTES);
    // A sealed record is at most RECORD_BYTES_MAX, which fits.
    let length = ((sealed.len() + HASH_BYTES) as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(sealed), &hash.0);
    body.extend_from_slice(&length);
    body.extend_from_slice(&crc32c::crc32c(&length).to_le_bytes());
    body.extend_from_slice(&crc.to_le_bytes());
    body.extend_from_slice(sealed);
    body.extend_from_slice(&hash.0);
    body
}

/// Decodes exactly one frame.
///
/// # Errors
/// Anything but one whole, known frame. The hash is not checked here; see [`crate::verify_chain`].
pub fn decode(bytes: &[u8]) -> Result<Stored, RecordError> {
    let mut frames = decode_stream(bytes);
    let stored = frames.next().unwrap_or(Err(RecordError::Torn { missing: HEADER_BYTES }))?;
    if !frames.rest.is_empty() {
        let extra = frames.rest.len();
        return Err(RecordError::Corrupt(format!("{extra} byte(s) after the record")));
    }
    Ok(stored)
}

/// Iterates over frames one after the other. Ends after the first error.
pub fn decode_stream(bytes: &[u8]) -> Frames<'_> {
    Frames { rest: bytes }
}

/// Iterator of [`decode_stream`].
pub struct Frames<'a> {
    rest: &'a [u8],
}

impl Iterator for Frames<'_> {
    type Item = Result<Stored, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = take_body(self.rest).and_then(|(body, rest)| {
            self.rest = rest;
            decode_body(body)
        });
        if item.is_err() {
            self.rest = &[];
        }
        Some(item)
    }
}

fn take_body(bytes: &[u8]) -> Result<(&[u8], &[u8]), RecordError> {
    // A file whose length reached the disk before its content ends in zeros: that is a torn write, too.
    if bytes.iter().take(HEADER_BYTES).all(|b| *b == 0) && bytes.iter().all(|b| *b == 0) {
        return Err(RecordError::Torn { missing: bytes.len() });
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(RecordError::Torn { missing: HEADER_BYTES - bytes.len() });
    };
    let [l0, l1, l2, l3, c0, c1, c2, c3, b0, b1, b2, b3] = *header;
    let length_bytes = [l0, l1, l2, l3];
    if crc32c::crc32c(&length_bytes) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(RecordError::Corrupt("checksum of the length".to_owned()));
    }
    let length = u32::from_le_bytes(length_bytes) as usize;
    if !(ENVELOPE_BYTES + HASH_BYTES..=RECORD_BYTES_MAX).contains(&length) {
        return Err(RecordError::Corrupt(format!("a length of {length} bytes")));
    }
    let Some((body, rest)) = rest.split_at_checked(length) else {
        return Err(RecordError::Torn { missing: length - rest.len() });
    };
    if crc32c::crc32c(body) != u32::from_le_bytes([b0, b1, b2, b3]) {
        return Err(RecordError::Corrupt("checksum of the body".to_owned()));
    }
    Ok((body, rest))
}

fn decode_body(body: &[u8]) -> Result<Stored, RecordError> {
    let Some((sealed_bytes, hash)) = body.split_last_chunk::<HASH_BYTES>() else {
        return Err(RecordError::Corrupt("no hash".to_owned()));
    };
    if let Some(&codec) = sealed_bytes.first()
        && codec != CODEC_JSON
    {
        return Err(RecordError::UnknownCodec { seq: Seq(0), codec });
    }
    let (sealed, used): (Sealed, usize) = bincode::decode_from_slice(sealed_bytes, config())
        .map_err(|e| RecordError::Corrupt(format!("envelope: {e}")))?;
    if used != sealed_bytes.len() {
        return Err(RecordError::Corrupt(format!("{} byte(s) after the payload", sealed_bytes.len() - used)));
    }
    let Sealed { codec: _, kind, schema, seq, epoch, time, prev, payload } = sealed;
    let (seq, epoch, time) = (Seq(seq), WriterEpoch(epoch), Timestamp(time));
    check_kind(seq, kind, schema)?;
    let event = parse_event(seq, kind, schema, &payload)?;
    let record = Record { seq, epoch, time, event };
    Ok(Stored { record, prev: Hash(prev), hash: Hash(*hash), sealed: sealed_bytes.into() })
}
