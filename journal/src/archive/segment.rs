//! A segment: records of one stream that follow each other, as lines, packed, under a name that says what is in it. So a
//! listing alone tells what is archived, and no byte can change without its name being wrong.

use super::{
    ArchiveError,
    blobs::{Blobs, BlobsError},
    branch::Branch,
};
use crate::{
    codec,
    gzip::{pack, unpack},
    lines::{export_line, import_line},
    record::{Hash, Head, RecordError, Stored},
    verify::{Problem, verify_next},
};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, WriterEpoch},
};

/// Largest segment, in bytes of text. Half a thousand of the usual records at least; small enough that two of them are
/// held in memory while one is checked, large enough that a year of a busy stream is some hundred objects.
pub const SEGMENT_BYTES_MAX: usize = 1024 * 1024;

/// Largest segment as it is stored: text that does not shrink grows by 5 bytes in 16 KiB, and gzip's head and end are 18.
pub const STORED_BYTES_MAX: usize = SEGMENT_BYTES_MAX + 4096;

const SUFFIX: &str = ".jsonl.gz";

/// What a name says. Ordered as the records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment {
    /// First record.
    pub first: Seq,
    /// Last record.
    pub last: Seq,
    /// SHA-256 of the stored bytes.
    pub digest: Hash,
}

impl Segment {
    /// The name.
    pub(super) fn name(&self, branch: &Branch) -> String {
        let Segment { first, last, digest } = self;
        format!("{branch}/{:020}-{:020}-{digest}{SUFFIX}", first.0, last.0)
    }

    /// What a name says, `None` if it is not one: whatever else is in the bucket is not of the archive.
    pub(super) fn parse(name: &str) -> Option<(Branch, Segment)> {
        let (folder, file) = name.rsplit_once('/')?;
        let branch = Branch::parse(folder)?;
        let mut parts = file.strip_suffix(SUFFIX)?.splitn(3, '-');
        let (first, last) = (seq(parts.next()?)?, seq(parts.next()?)?);
        let digest = parts.next()?.parse().ok()?;
        let is_one = Seq(0) < first && first <= last;
        is_one.then_some((branch, Segment { first, last, digest }))
    }

    /// Packs records, which are not empty: the segment and its bytes.
    pub(super) fn of(records: &[Stored]) -> Option<(Segment, Vec<u8>)> {
        let (first, last) = (records.first()?.record.seq, records.last()?.record.seq);
        let text: String = records.iter().map(line).collect();
        let bytes = pack(text.as_bytes());
        Some((Segment { first, last, digest: codec::hash(&bytes) }, bytes))
    }

    /// True if it holds one of these records.
    pub(super) fn meets(&self, first: Seq, last: Seq) -> bool {
        self.first <= last && first <= self.last
    }

    /// Its records, each checked, `None` if there is no such object.
    pub(super) async fn load(
        &self,
        blobs: &dyn Blobs,
        branch: &Branch,
    ) -> Result<Option<Vec<Stored>>, ArchiveError> {
        let name = self.name(branch);
        match blobs.get(&name, STORED_BYTES_MAX).await {
            Ok(Some(bytes)) => self.open(name, &bytes).map(Some),
            Ok(None) => Ok(None),
            Err(BlobsError::TooLarge { max }) => {
                Err(ArchiveError::damaged(name, self.first, format!("it has more than {max} bytes")))
            }
            Err(e) => Err(ArchiveError::Unavailable(format!("{name}: {e}"))),
        }
    }

    fn open(&self, name: String, bytes: &[u8]) -> Result<Vec<Stored>, ArchiveError> {
        let digest = codec::hash(bytes);
        if digest != self.digest {
            return Err(ArchiveError::damaged(name, self.first, format!("its bytes give {digest}")));
        }
        let plain = unpack(bytes, SEGMENT_BYTES_MAX)
            .map_err(|e| ArchiveError::damaged(name.clone(), self.first, e.to_string()))?;
        self.parse_lines(name, &plain)
    }

    fn parse_lines(&self, name: String, plain: &[u8]) -> Result<Vec<Stored>, ArchiveError> {
        let mut records: Vec<Stored> = Vec::new();
        let mut before = None;
        for line in plain.split_inclusive(|byte| *byte == b'\n') {
            let seq = before.map_or(self.first, |head: Head| head.seq.next());
            let stored = parse_line(line).map_err(|why| ArchiveError::Unreadable {
                segment: name.clone(),
                seq,
                why,
            })?;
            if stored.record.seq != seq || seq > self.last {
                let why = format!("record {} is there instead", stored.record.seq);
                return Err(ArchiveError::damaged(name, seq, why));
            }
            let next = follow(before, &stored);
            before = Some(next.map_err(|e| ArchiveError::damaged(name.clone(), seq, e.to_string()))?);
            records.push(stored);
        }
        match before {
            Some(head) if head.seq == self.last => Ok(records),
            Some(_) | None => {
                let seq = before.map_or(self.first, |head| head.seq.next());
                Err(ArchiveError::damaged(name, seq, "it ends before this record".to_owned()))
            }
        }
    }
}

/// Cuts records into segments of at most so many bytes of text, or of one record.
pub(super) fn cut(records: &[Stored], bytes_max: usize) -> Vec<&[Stored]> {
    let mut bytes = records.first().map_or(0, |first| line(first).len());
    let pieces = records.chunk_by(|_, next| {
        let length = line(next).len();
        let fits = bytes + length <= bytes_max;
        bytes = if fits { bytes + length } else { length };
        fits
    });
    pieces.collect()
}

/// The head after a record, if it continues the chain. What is before the first record of a segment that is looked at by
/// itself is not known: whatever it says is taken for true, and checked where the segment before ends.
pub(super) fn follow(before: Option<Head>, stored: &Stored) -> Result<Head, Problem> {
    verify_next(before.or_else(|| supposed_before(stored)).as_ref(), stored)
}

fn supposed_before(stored: &Stored) -> Option<Head> {
    let Record { seq, epoch, time, event } = &stored.record;
    let seq = Seq(seq.0.checked_sub(1).filter(|before| *before > 0)?);
    // The second record names the writer of the first; every later EpochStarted begins an epoch.
    let begins = matches!(event, Event::EpochStarted { .. }) && seq != Seq(1);
    let epoch = if begins { WriterEpoch(epoch.0.saturating_sub(1)) } else { *epoch };
    Some(Head { seq, epoch, time: *time, hash: stored.prev })
}

fn line(stored: &Stored) -> String {
    let mut line = export_line(stored);
    line.push('\n');
    line
}

fn parse_line(line: &[u8]) -> Result<Stored, RecordError> {
    let text = std::str::from_utf8(line).map_err(|e| RecordError::Corrupt(e.to_string()))?;
    let text =
        text.strip_suffix('\n').ok_or_else(|| RecordError::Corrupt("its line has no end".to_owned()))?;
    import_line(text)
}

fn seq(digits: &str) -> Option<Seq> {
    let is_one = digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| is_one).map(Seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lineage::Lineage, record::StreamId};

    #[test]
    fn a_name_says_what_is_in_it_and_has_one_spelling() {
        let segment = Segment { first: Seq(1), last: Seq(u64::MAX), digest: Hash([0xab; 32]) };
        let branch = Branch::first(StreamId("uid-1".to_owned()));
        let name = segment.name(&branch);
        assert_eq!(
            name,
            format!("uid-1/00000000000000000001-18446744073709551615-{}.jsonl.gz", "ab".repeat(32))
        );
        let beside = Branch { lineage: Lineage::named(Hash([0xcd; 32])), ..branch.clone() };
        assert_eq!(segment.name(&beside), name.replace("uid-1/", &format!("uid-1/{}/", "cd".repeat(32))));
        assert_eq!(Segment::parse(&segment.name(&beside)), Some((beside, segment)));
        assert_eq!(Segment::parse(&name), Some((branch, segment)));
        let others = [
            name.replace("ab", "AB"),
            name.replace("0001-", "001-"),
            name.replace(".gz", ""),
            name.replace("uid-1/", "/"),
            name.replace("uid-1/", "uid-1/more/"),
            name.replace("uid-1/", &format!("uid-1/{}/", "CD".repeat(32))),
            name.replace("uid-1/", &format!("uid-1/{}/more/", "cd".repeat(32))),
            name.replace("uid-1/", ".uid-1/"),
            name.replace("00000000000000000001", "00000000000000000000"),
            name.replace("00000000000000000001", "+0000000000000000001"),
            name.replace("18446744073709551615", "18446744073709551616"),
            name.replace("18446744073709551615", "00000000000000000000"),
        ];
        for other in others {
            assert_eq!(Segment::parse(&other), None, "{other}");
        }
    }
}
