//! A stream as named texts (ConfigMaps): one head object with the open tail, written by compare-and-swap, and sealed
//! segments that never change. Everything is JSON Lines, so that `kubectl get configmap` and jq can read it.
//!
//! The head lists the segments, so they count only once a head names them. When the tail is full, it is first written
//! as a segment and then, by the same compare-and-swap that adds the new records, taken out of the head. A crash
//! between the two leaves a segment that no head names: it has the same bytes as the tail, and is taken over or ignored.

mod head;
pub mod memory_objects;
pub mod objects;

pub use memory_objects::MemoryObjects;
pub use objects::{Object, Objects, ObjectsError};

use crate::{
    backend::{AppendError, Backend, BackendError},
    lines::{export_line, import_line, import_lines},
    record::{Head, RecordError, Stored, StreamId},
    verify::verify_chain,
};
use async_trait::async_trait;
use head::{HeadDoc, Segment};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Size of the open tail from which it is sealed, in bytes. Every append writes the whole head object, and etcd keeps
/// each version until its next compaction (5 minutes): at 16 KiB a write every second is 5 MiB of history.
pub const TAIL_BYTES_MAX: usize = 16 * 1024;

/// Largest merged segment, in bytes: half of what a ConfigMap may hold, so that metadata never matters.
pub const SEGMENT_BYTES_MAX: usize = 512 * 1024;

/// Small segments that are merged at once when there are so many: their sum (16 x 16 KiB and a little) is over half of
/// [`SEGMENT_BYTES_MAX`], so a merged segment is not merged again.
pub const MERGE_SEGMENTS: usize = 16;

/// Text of one stream, in bytes: about 12 000 records. 250 full streams would fill etcd's default quota of 2 GiB.
pub const STREAM_BYTES_MAX: usize = 8 * 1024 * 1024;

/// How often an append is tried again because only the head object's metadata were touched. Someone who writes to it
/// more often than that is fighting us, and the caller has to know.
pub const METADATA_CONFLICTS_MAX: usize = 3;

/// How often a read begins anew because segments it wanted were merged meanwhile. Merges are minutes apart.
pub const READ_ATTEMPTS_MAX: usize = 3;

const PREFIX: &str = "journal-";
const HEAD_SUFFIX: &str = "-head";

/// The head object as last seen.
#[derive(Clone)]
struct Seen {
    version: String,
    doc: HeadDoc,
}

/// The backend.
pub struct Segments {
    objects: Arc<dyn Objects>,
    stream_bytes_max: usize,
    /// Heads as this process left them or checked them: saves one read per append, and shows an edit of the tail. An old
    /// entry costs a conflict, never a record.
    seen: Mutex<BTreeMap<StreamId, Seen>>,
}

impl Segments {
    /// A backend over `objects`.
    pub fn new(objects: Arc<dyn Objects>) -> Segments {
        Segments::with_limit(objects, STREAM_BYTES_MAX)
    }

    /// As [`Segments::new`], with another limit for the text of one stream, in bytes.
    pub fn with_limit(objects: Arc<dyn Objects>, stream_bytes_max: usize) -> Segments {
        Segments { objects, stream_bytes_max, seen: Mutex::default() }
    }

    fn cache(&self) -> MutexGuard<'_, BTreeMap<StreamId, Seen>> {
        // Single inserts and removals: no panic leaves it half-changed.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch(&self, stream: &StreamId) -> Result<Option<Seen>, BackendError> {
        let found = self.objects.get(&head_name(stream)).await.map_err(unreachable_store)?;
        let Some(Object { bytes, version }) = found else {
            self.cache().remove(stream);
            return Ok(None);
        };
        Ok(Some(Seen { version, doc: HeadDoc::parse(stream, &bytes)? }))
    }

    /// The head as it is now, believed only after a check: whoever touched the object may have edited the records in it,
    /// and what is remembered here is what the next append keeps.
    async fn look(&self, stream: &StreamId) -> Result<Option<Seen>, BackendError> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let known = self.cache().get(stream).cloned();
            let Some(seen) = self.fetch(stream).await? else { return Ok(None) };
            match known {
                Some(known) if known.doc.head == seen.doc.head => known.doc.check_same(&seen.doc)?,
                Some(_) | None => {
                    let Some(sealed) = self.last_sealed(stream, &seen.doc).await? else { continue };
                    seen.doc.check_tail(sealed.as_ref())?;
                }
            }
            self.cache().insert(stream.clone(), seen.clone());
            return Ok(Some(seen));
        }
        Err(segments_missing(stream))
    }

    /// The last record of the last segment, `Some(None)` if there are no segments, `None` if that one is gone.
    async fn last_sealed(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
    ) -> Result<Option<Option<Stored>>, BackendError> {
        let Some(segment) = doc.segments.last() else { return Ok(Some(None)) };
        let name = segment_name(stream, segment);
        let Some(object) = self.objects.get(&name).await.map_err(unreachable_store)? else {
            return Ok(None);
        };
        let last = import_line(object.bytes.lines().next_back().unwrap_or_default());
        let last = last
            .map_err(|e| BackendError::Corrupt(format!("record {} in object {name}: {e}", segment.last)))?;
        Ok(Some(Some(last)))
    }

    /// Segment names that exist although there is no head.
    async fn orphans(&self, stream: &StreamId) -> Result<Vec<String>, BackendError> {
        self.objects.list(&segment_prefix(stream)).await.map_err(unreachable_store)
    }

    /// Records of the segments, `None` if one of them is gone.
    async fn read_segments(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
    ) -> Result<Option<Vec<Stored>>, BackendError> {
        let mut records = Vec::new();
        for segment in &doc.segments {
            let name = segment_name(stream, segment);
            let Some(object) = self.objects.get(&name).await.map_err(unreachable_store)? else {
                return Ok(None);
            };
            let before = records.len();
            parse_lines(stream, &object.bytes, &mut records)?;
            let added = records.get(before..).unwrap_or_default();
            let (first, last) = (added.first().map(|s| s.record.seq), added.last().map(|s| s.record.seq));
            if (first, last) != (Some(segment.first), Some(segment.last)) {
                return Err(BackendError::Corrupt(format!(
                    "object {name} does not hold the records of its name"
                )));
            }
        }
        Ok(Some(records))
    }

    /// Makes the segment, or finds that it is there already with the same bytes.
    async fn create_segment(&self, name: &str, text: &str) -> Result<(), AppendError> {
        match self.objects.create(name, text).await {
            Ok(_version) => Ok(()),
            // Left by a crash, or by an attempt whose answer was lost.
            Err(ObjectsError::AlreadyExists) => match self.objects.get(name).await {
                Ok(Some(object)) if object.bytes == text => Ok(()),
                Ok(Some(_)) => Err(AppendError::Poisoned(format!("object {name} exists with other records"))),
                Ok(None) => Err(AppendError::Io(format!("object {name} came and went"))),
                Err(e) => Err(AppendError::Io(format!("object {name}: {e}"))),
            },
            // No head names the segment yet, so nothing is in doubt: the records were not written.
            Err(e) => Err(AppendError::Io(format!("object {name}: {e}"))),
        }
    }

    /// The document after the append. Seals the tail if it is full.
    async fn next_doc(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
        records: &[Stored],
    ) -> Result<HeadDoc, AppendError> {
        let mut next = doc.clone();
        let mut added = String::new();
        for stored in records {
            added.push_str(&export_line(stored));
            added.push('\n');
        }
        let bytes = next.sealed_bytes() + next.tail.len() + added.len();
        if bytes > self.stream_bytes_max {
            return Err(AppendError::Full { bytes, max: self.stream_bytes_max });
        }
        if let Some(first) = next.tail_first
            && next.tail.len() + added.len() > TAIL_BYTES_MAX
        {
            let segment = Segment { first, last: doc.head.seq, bytes: next.tail.len() };
            self.create_segment(&segment_name(stream, &segment), &next.tail).await?;
            next.segments.push(segment);
            next.tail.clear();
            next.tail_first = None;
        }
        next.tail.push_str(&added);
        if let (Some(first), Some(last)) = (records.first(), records.last()) {
            next.tail_first.get_or_insert(first.record.seq);
            next.head = last.head();
        }
        Ok(next)
    }

    async fn create_head(&self, stream: &StreamId, records: &[Stored]) -> Result<(), AppendError> {
        let Some(last) = records.last() else { return Ok(()) };
        let empty = HeadDoc::new(stream, last.head());
        let doc = self.next_doc(stream, &empty, records).await?;
        match self.objects.create(&head_name(stream), &doc.text()).await {
            Ok(version) => {
                self.cache().insert(stream.clone(), Seen { version, doc });
                Ok(())
            }
            Err(ObjectsError::AlreadyExists) => self.conflict(stream, records).await,
            Err(e) => Err(write_error(e)),
        }
    }

    /// The head is not the expected one: says which it is. Our own hash means that an earlier answer was lost.
    async fn conflict(&self, stream: &StreamId, records: &[Stored]) -> Result<(), AppendError> {
        let actual = self.look(stream).await.map_err(|e| not_seen(e, AppendError::Ambiguous))?;
        let actual = actual.map(|seen| seen.doc.head);
        if actual.is_some() && actual == records.last().map(Stored::head) {
            return Ok(());
        }
        Err(AppendError::Conflict { actual })
    }

    async fn replace_head(
        &self,
        stream: &StreamId,
        expected: &Head,
        records: &[Stored],
    ) -> Result<(), AppendError> {
        let cached = self.cache().get(stream).cloned();
        // Nothing was sent yet: a failed look is certain.
        let mut seen = match cached {
            Some(seen) if seen.doc.head == *expected => seen,
            Some(_) | None => match self.look(stream).await.map_err(|e| not_seen(e, AppendError::Io))? {
                Some(seen) => seen,
                None => return Err(AppendError::Conflict { actual: None }),
            },
        };
        for _ in 0..=METADATA_CONFLICTS_MAX {
            if seen.doc.head != *expected {
                return self.conflict(stream, records).await;
            }
            let doc = self.next_doc(stream, &seen.doc, records).await?;
            match self.objects.replace(&head_name(stream), &seen.version, &doc.text()).await {
                Ok(version) => {
                    self.cache().insert(stream.clone(), Seen { version, doc });
                    return Ok(());
                }
                Err(ObjectsError::Conflict) => {
                    // Refused, so this attempt wrote nothing; but an earlier one of the same records may have.
                    let looked = self.look(stream).await.map_err(|e| not_seen(e, AppendError::Ambiguous))?;
                    seen = looked.ok_or(AppendError::Conflict { actual: None })?;
                }
                Err(ObjectsError::NotFound) => return Err(AppendError::Conflict { actual: None }),
                // What is remembered stays: the next look is compared with it.
                Err(e) => return Err(write_error(e)),
            }
        }
        Err(AppendError::Conflict { actual: Some(seen.doc.head) })
    }

    /// The first run of small segments that is long enough to be merged.
    fn mergeable(doc: &HeadDoc) -> Option<std::ops::Range<usize>> {
        let small = |s: &Segment| s.bytes <= SEGMENT_BYTES_MAX / 2;
        let start = doc.segments.iter().rposition(|s| !small(s)).map_or(0, |index| index + 1);
        let run = doc.segments.get(start..).filter(|run| run.len() >= MERGE_SEGMENTS)?;
        let (mut bytes, mut count) = (0, 0);
        for segment in run {
            bytes += segment.bytes;
            if bytes > SEGMENT_BYTES_MAX {
                break;
            }
            count += 1;
        }
        (count > 1).then_some(start..start + count)
    }
}

#[async_trait]
impl Backend for Segments {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        let names = self.objects.list(PREFIX).await.map_err(unreachable_store)?;
        let id =
            |name: &String| Some(StreamId(name.strip_prefix(PREFIX)?.strip_suffix(HEAD_SUFFIX)?.to_owned()));
        let mut streams: Vec<StreamId> = names.iter().filter_map(id).collect();
        streams.sort();
        Ok(streams)
    }

    async fn read(&self, stream: &StreamId) -> Result<Vec<Stored>, BackendError> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let Some(seen) = self.fetch(stream).await? else {
                let orphans = self.orphans(stream).await?;
                return match orphans.first() {
                    None => Ok(Vec::new()),
                    Some(name) => Err(BackendError::Corrupt(format!(
                        "object {} is missing, but there are segments such as {name}",
                        head_name(stream)
                    ))),
                };
            };
            let doc = &seen.doc;
            let Some(mut records) = self.read_segments(stream, doc).await? else {
                continue;
            };
            parse_lines(stream, &doc.tail, &mut records)?;
            if records.last().map(Stored::head) != Some(doc.head) {
                return Err(BackendError::Corrupt(format!(
                    "object {} says {}, its records end elsewhere",
                    head_name(stream),
                    doc.head
                )));
            }
            // The caller gets what is there and judges it; a writer in this process must not take it for its own.
            let sealed = doc.segments.last().and_then(|s| records.iter().rfind(|r| r.record.seq == s.last));
            if verify_chain(&records).is_ok() && doc.check_tail(sealed).is_ok() {
                self.cache().insert(stream.clone(), seen);
            }
            return Ok(records);
        }
        Err(segments_missing(stream))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        Ok(self.look(stream).await?.map(|seen| seen.doc.head))
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
    ) -> Result<(), AppendError> {
        match expected {
            Some(head) => self.replace_head(stream, head, records).await,
            None => self.create_head(stream, records).await,
        }
    }

    /// Merges small segments: makes the merged one, swaps the head's list, deletes the small ones. A crash leaves objects
    /// that no head names.
    async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        let Some(Seen { version, doc }) = self.look(stream).await? else {
            return Ok(());
        };
        let Some(range) = Segments::mergeable(&doc) else {
            return Ok(());
        };
        let mut next = doc.clone();
        let old: Vec<Segment> = next.segments.drain(range.clone()).collect();
        let (Some(first), Some(last)) = (old.first(), old.last()) else {
            return Ok(());
        };
        let mut text = String::new();
        for segment in &old {
            let name = segment_name(stream, segment);
            let object = self.objects.get(&name).await.map_err(unreachable_store)?;
            text.push_str(
                &object.ok_or_else(|| BackendError::Corrupt(format!("object {name} is missing")))?.bytes,
            );
        }
        let merged = Segment { first: first.first, last: last.last, bytes: text.len() };
        let created = self.create_segment(&segment_name(stream, &merged), &text).await;
        created.map_err(|e| BackendError::Unavailable(e.to_string()))?;
        next.segments.insert(range.start, merged);
        // Not swapped, or nobody knows: the old ones stay, and the next quiet moment tries again.
        let swapped = self.objects.replace(&head_name(stream), &version, &next.text()).await;
        let version = swapped.map_err(unreachable_store)?;
        self.cache().insert(stream.clone(), Seen { version, doc: next });
        for segment in &old {
            match self.objects.delete(&segment_name(stream, segment)).await {
                // What could not be deleted is named by nobody: it costs space, not truth.
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

fn head_name(stream: &StreamId) -> String {
    format!("{PREFIX}{stream}{HEAD_SUFFIX}")
}

fn segment_prefix(stream: &StreamId) -> String {
    format!("{PREFIX}{stream}-segment-")
}

/// First and last sequence are in the name, so that two tails that begin alike are two objects.
fn segment_name(stream: &StreamId, segment: &Segment) -> String {
    format!("{}{:010}-{:010}", segment_prefix(stream), segment.first.0, segment.last.0)
}

fn unreachable_store(e: ObjectsError) -> BackendError {
    BackendError::Unavailable(e.to_string())
}

fn segments_missing(stream: &StreamId) -> BackendError {
    BackendError::Corrupt(format!("segments named by {} are missing", head_name(stream)))
}

/// Why the head could not be seen: damage stays damage, everything else is what the moment makes of it.
fn not_seen(e: BackendError, otherwise: fn(String) -> AppendError) -> AppendError {
    if let BackendError::Corrupt(why) = e { AppendError::Corrupt(why) } else { otherwise(e.to_string()) }
}

fn write_error(e: ObjectsError) -> AppendError {
    match e {
        ObjectsError::Ambiguous(why) => AppendError::Ambiguous(why),
        ObjectsError::Unavailable(why) => AppendError::Io(why),
        // Not answers to a replace or create that was not handled before: treat them as knowing nothing.
        ObjectsError::Conflict | ObjectsError::NotFound | ObjectsError::AlreadyExists => {
            AppendError::Ambiguous(e.to_string())
        }
    }
}

fn parse_lines(stream: &StreamId, text: &str, into: &mut Vec<Stored>) -> Result<(), BackendError> {
    for item in import_lines(text.as_bytes()) {
        into.push(item.map_err(|e| {
            let source = RecordError::Corrupt(e.to_string());
            BackendError::Record { stream: stream.clone(), source }
        })?);
    }
    Ok(())
}
