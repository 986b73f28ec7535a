//! What this process knows of the streams in a store of objects, and how it looks at them: reading and writing alike
//! begin here.

use super::{
    STREAM_SHARE_BYTES, TEXT_BYTES_MAX,
    head::{FoldedAt, HeadDoc, Segment},
    names,
    objects::{Body, Object, Objects, ObjectsError},
};
use crate::{
    backend::{AppendError, BackendError, READ_ATTEMPTS_MAX},
    folded::{FOLDED_BYTES_MAX, Folded},
    lines::{LineError, import_line, import_lines},
    record::{Head, RecordError, Stored, StreamId},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The head object as last seen.
#[derive(Clone)]
pub(super) struct Seen {
    pub version: String,
    pub doc: HeadDoc,
}

/// A stream as this process knows it.
#[derive(Default)]
struct Known {
    /// The head as this process left it or checked it: saves one read per append, and shows an edit of the tail. An old one costs
    /// a conflict, never a record.
    seen: Option<Seen>,
    /// Bytes that it takes in the store.
    bytes: usize,
    /// True if there are no objects of it that its head does not name, as far as this process knows.
    is_tidy: bool,
}

pub(super) struct Store {
    pub objects: Arc<dyn Objects>,
    stream_bytes_max: usize,
    installation_bytes_max: usize,
    known: Mutex<BTreeMap<StreamId, Known>>,
}

impl Store {
    pub fn new(objects: Arc<dyn Objects>, stream_bytes_max: usize, installation_bytes_max: usize) -> Store {
        Store { objects, stream_bytes_max, installation_bytes_max, known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StreamId, Known>> {
        // Single assignments and removals: no panic leaves it half-changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn known(&self, stream: &StreamId) -> Option<Seen> {
        self.lock().get(stream).and_then(|known| known.seen.clone())
    }

    /// Takes a head that this process wrote, or looked at and checked.
    pub fn remember(&self, stream: &StreamId, seen: Seen) {
        let mut known = self.lock();
        let known = known.entry(stream.clone()).or_default();
        known.bytes = seen.doc.bytes();
        known.seen = Some(seen);
    }

    pub fn unknow(&self, stream: &StreamId) {
        self.lock().remove(stream);
    }

    /// Something was made or is not named any more: there may be objects to collect.
    pub fn untidy(&self, stream: &StreamId) {
        self.lock().entry(stream.clone()).or_default().is_tidy = false;
    }

    pub fn tidied(&self, stream: &StreamId) {
        self.lock().entry(stream.clone()).or_default().is_tidy = true;
    }

    pub fn is_tidy(&self, stream: &StreamId) -> bool {
        self.lock().get(stream).is_some_and(|known| known.is_tidy)
    }

    /// Whether the stream may be as large as `next`.
    pub fn admit(&self, next: &HeadDoc, extra_bytes: usize) -> Result<(), AppendError> {
        let (bytes, max) = (next.bytes(), self.stream_bytes_max.saturating_add(extra_bytes));
        if bytes > max {
            return Err(AppendError::Full { bytes, max });
        }
        Ok(())
    }

    /// What every stream should be content with, if all that this process has seen take too much together.
    pub fn share(&self) -> Option<usize> {
        let bytes: usize = self.lock().values().map(|known| known.bytes).sum();
        (bytes > self.installation_bytes_max).then_some(STREAM_SHARE_BYTES)
    }

    /// The head object as it is now, with nothing checked but that it can be parsed.
    pub async fn fetch(&self, stream: &StreamId) -> Result<Option<Seen>, BackendError> {
        let name = names::head(stream);
        let Some(Object { body, version }) = self.objects.get(&name).await.map_err(unreachable_store)? else {
            self.lock().remove(stream);
            return Ok(None);
        };
        let Body::Text(text) = body else {
            return Err(BackendError::Corrupt(format!("object {name} is packed: no head is")));
        };
        let doc = HeadDoc::parse(stream, &text)?;
        self.lock().entry(stream.clone()).or_default().bytes = doc.bytes();
        Ok(Some(Seen { version, doc }))
    }

    /// The head as it is now, believed only after a check: whoever touched the object may have edited the records in it,
    /// and what is remembered here is what the next append keeps.
    pub async fn look(&self, stream: &StreamId) -> Result<Option<Seen>, BackendError> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let known = self.known(stream);
            let Some(seen) = self.fetch(stream).await? else { return Ok(None) };
            match known {
                Some(known) if known.doc.head == seen.doc.head => known.doc.check_same(&seen.doc)?,
                Some(_) | None => {
                    let before = match self.before_tail(stream, &seen.doc).await {
                        Err(BackendError::Moved) => continue,
                        other => other?,
                    };
                    seen.doc.check_tail(before)?;
                    // Another process wrote this, or this one without hearing of it: with what it left behind.
                    self.untidy(stream);
                }
            }
            self.remember(stream, seen.clone());
            return Ok(Some(seen));
        }
        Err(BackendError::Moved)
    }

    /// The last record before the tail, `None` if that begins the stream.
    async fn before_tail(&self, stream: &StreamId, doc: &HeadDoc) -> Result<Option<Head>, BackendError> {
        let Some(segment) = doc.segments.last() else {
            let folded = self.folded(stream, doc).await?;
            return Ok(folded.map(|folded| *folded.head()));
        };
        let name = names::segment(stream, segment);
        let text = self.segment_text(stream, doc, segment).await?;
        let last = import_line(text.lines().next_back().unwrap_or_default());
        let last = last
            .map_err(|e| BackendError::Corrupt(format!("record {} in object {name}: {e}", segment.last)))?;
        Ok(Some(last.head()))
    }

    /// What the stream begins with. [`BackendError::Moved`] if it is gone because the head is another one by now.
    pub async fn folded(&self, stream: &StreamId, doc: &HeadDoc) -> Result<Option<Folded>, BackendError> {
        let Some(at) = &doc.folded else { return Ok(None) };
        let name = names::folded(stream, at);
        let corrupt = |why: String| BackendError::Corrupt(format!("object {name}: {why}"));
        let Some(object) = self.objects.get(&name).await.map_err(unreachable_store)? else {
            return Err(self.gone(stream, doc, &name, |now| now.folded == doc.folded).await);
        };
        let text = object.body.text(FOLDED_BYTES_MAX).map_err(|e| corrupt(e.to_string()))?;
        let folded = Folded::parse(&text).map_err(|source| match source.is_newer() {
            true => BackendError::Folded { stream: stream.clone(), source },
            false => corrupt(source.to_string()),
        })?;
        if (folded.stream(), FoldedAt::of(&folded, object.body.stored_bytes())) != (stream, *at) {
            return Err(corrupt(format!("it is not what stands for the records up to {}", at.seq)));
        }
        Ok(Some(folded))
    }

    /// The text of a sealed segment: whole lines. [`BackendError::Moved`] if it is gone because the head is another one by now.
    pub async fn segment_text(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
        segment: &Segment,
    ) -> Result<String, BackendError> {
        let name = names::segment(stream, segment);
        let corrupt = |why: String| BackendError::Corrupt(format!("object {name}: {why}"));
        let Some(object) = self.objects.get(&name).await.map_err(unreachable_store)? else {
            return Err(self.gone(stream, doc, &name, |now| now.segments.contains(segment)).await);
        };
        let stored = object.body.stored_bytes();
        if stored != segment.bytes {
            return Err(corrupt(format!("it has {stored} bytes, and the head says {}", segment.bytes)));
        }
        let text = object.body.text(TEXT_BYTES_MAX).map_err(|e| corrupt(e.to_string()))?;
        if !text.ends_with('\n') {
            return Err(corrupt(format!("record {}: its line has no end", segment.last)));
        }
        Ok(text.into_owned())
    }

    /// The records of a sealed segment, which must be those of its name.
    pub async fn segment(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
        segment: &Segment,
    ) -> Result<Vec<Stored>, BackendError> {
        let name = names::segment(stream, segment);
        let text = self.segment_text(stream, doc, segment).await?;
        let records = parse_lines(stream, &name, &text)?;
        let mut wanted = segment.first.0..=segment.last.0;
        let is_whole = records.iter().all(|r| wanted.next() == Some(r.record.seq.0));
        match wanted.next() {
            None if is_whole => Ok(records),
            _ => Err(BackendError::Corrupt(format!("object {name} does not hold the records of its name"))),
        }
    }

    /// Why an object that `doc` names is not there.
    async fn gone(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
        name: &str,
        is_named: impl FnOnce(&HeadDoc) -> bool + Send,
    ) -> BackendError {
        match self.fetch(stream).await {
            Ok(Some(now)) if now.doc != *doc && !is_named(&now.doc) => BackendError::Moved,
            Ok(Some(_) | None) => {
                let head = names::head(stream);
                BackendError::Corrupt(format!("object {name}, named by {head}, is missing"))
            }
            Err(e) => e,
        }
    }

    /// Makes an object that no head names yet, or finds that it is there already with the same text. Returns the bytes that it
    /// takes in the store: another version of this program may have packed it otherwise.
    pub async fn create(&self, name: &str, text: &str, body: &Body) -> Result<usize, AppendError> {
        match self.objects.create(name, body).await {
            Ok(_version) => Ok(body.stored_bytes()),
            // Left by a crash, or by an attempt whose answer was lost.
            Err(ObjectsError::AlreadyExists) => match self.objects.get(name).await {
                Ok(Some(Object { body, version: _ })) => {
                    match body.text(TEXT_BYTES_MAX.max(FOLDED_BYTES_MAX)) {
                        Ok(there) if there == text => Ok(body.stored_bytes()),
                        Ok(_) | Err(_) => {
                            Err(AppendError::Poisoned(format!("object {name} exists with other content")))
                        }
                    }
                }
                Ok(None) => Err(AppendError::Io(format!("object {name} came and went"))),
                Err(e) => Err(AppendError::Io(format!("object {name}: {e}"))),
            },
            // No head names it yet, so nothing is in doubt: the records were not written.
            Err(e) => Err(AppendError::Io(format!("object {name}: {e}"))),
        }
    }
}

pub(super) fn unreachable_store(e: ObjectsError) -> BackendError {
    BackendError::Unavailable(e.to_string())
}

/// The records of whole lines; `name` is where they are.
pub(super) fn parse_lines(stream: &StreamId, name: &str, text: &str) -> Result<Vec<Stored>, BackendError> {
    let failed = |source| BackendError::Record { stream: stream.clone(), source };
    let corrupt = |e: LineError| failed(RecordError::Corrupt(format!("object {name}: {e}")));
    let mut records = Vec::new();
    for item in import_lines(text.as_bytes()) {
        records.push(item.map_err(|e| match e {
            // What is newer stays so: nothing is damaged.
            LineError::Record { line: _, why } if why.is_newer() => failed(why),
            LineError::Io { .. } | LineError::Record { .. } | LineError::Folded { .. } => corrupt(e),
        })?);
    }
    Ok(records)
}
