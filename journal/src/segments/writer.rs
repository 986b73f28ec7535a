//! The append: one compare-and-swap of the head, after whatever it will name has been made.

use super::{
    FOLDED_PLAIN_BYTES_MAX, METADATA_CONFLICTS_MAX, TAIL_BYTES_MAX,
    head::{FoldedAt, HeadDoc},
    names,
    objects::{Body, ObjectsError},
    store::{Seen, Store},
};
use crate::{
    backend::{AppendError, BackendError},
    folded::Folded,
    record::{Head, Stored, StreamId},
};

/// What is written at once.
#[derive(Clone, Copy)]
pub(super) struct Batch<'a> {
    pub records: &'a [Stored],
    pub cut: Option<&'a Folded>,
    /// Bytes that the stream may have above its limit.
    pub extra_bytes: usize,
}

impl Batch<'_> {
    fn head(&self) -> Option<Head> {
        self.records.last().map(Stored::head)
    }
}

impl Store {
    pub async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        batch: Batch<'_>,
    ) -> Result<(), AppendError> {
        let appended = match expected {
            Some(head) => self.replace_head(stream, head, batch).await,
            None => self.create_head(stream, batch).await,
        };
        // What was made and not named, and what is not named any more, is for a quiet moment: nobody waits for it here.
        if appended.is_err() || batch.cut.is_some() {
            self.untidy(stream);
        }
        appended
    }

    /// The document after the append. What it names is made; if there is no room, nothing is.
    async fn next_doc(
        &self,
        stream: &StreamId,
        doc: &HeadDoc,
        batch: Batch<'_>,
    ) -> Result<HeadDoc, AppendError> {
        let Batch { records, cut, extra_bytes } = batch;
        let mut next = doc.clone();
        let folded = cut.map(|folded| (folded, folded_body(folded.text())));
        if let Some((folded, body)) = &folded
            && !next.cut(FoldedAt::of(folded, body.stored_bytes()))
        {
            let seq = folded.head().seq;
            return Err(AppendError::Io(format!(
                "no segment ends with record {seq}: it cannot be cut there"
            )));
        }
        let mut added = HeadDoc::new(stream, doc.head);
        added.add(records);
        let is_full = next.tail.len() + added.tail.len() > TAIL_BYTES_MAX;
        let sealed = if is_full { next.seal() } else { None };
        let sealed = sealed.map(|(segment, text)| (segment, Body::pack(&text), text));
        next.add(records);
        if let Some((segment, body, _)) = &sealed {
            next.segments.push(super::head::Segment { bytes: body.stored_bytes(), ..*segment });
        }
        self.admit(&next, extra_bytes)?;
        if let (Some((folded, body)), Some(at)) = (&folded, &mut next.folded) {
            at.bytes = self.create(&names::folded(stream, at), folded.text(), body).await?;
        }
        if let (Some((segment, body, text)), Some(last)) = (&sealed, next.segments.last_mut()) {
            last.bytes = self.create(&names::segment(stream, segment), text, body).await?;
        }
        Ok(next)
    }

    async fn create_head(&self, stream: &StreamId, batch: Batch<'_>) -> Result<(), AppendError> {
        let Some(head) = batch.head() else { return Ok(()) };
        let doc = self.next_doc(stream, &HeadDoc::new(stream, head), batch).await?;
        match self.objects.create(&names::head(stream), &Body::Text(doc.text())).await {
            Ok(version) => {
                self.remember(stream, Seen { version, doc });
                Ok(())
            }
            Err(ObjectsError::AlreadyExists) => {
                let actual = self.look(stream).await.map_err(|e| not_seen(e, AppendError::Ambiguous))?;
                settled(actual.map(|seen| seen.doc.head), batch)
            }
            Err(e) => Err(write_error(e)),
        }
    }

    async fn replace_head(
        &self,
        stream: &StreamId,
        expected: &Head,
        batch: Batch<'_>,
    ) -> Result<(), AppendError> {
        let mut seen = match self.known(stream) {
            Some(seen) if seen.doc.head == *expected => seen,
            // Nothing was sent yet: a failed look is certain.
            Some(_) | None => match self.look(stream).await.map_err(|e| not_seen(e, AppendError::Io))? {
                Some(seen) => seen,
                None => return Err(AppendError::Conflict { actual: None }),
            },
        };
        for _ in 0..=METADATA_CONFLICTS_MAX {
            if seen.doc.head != *expected {
                return settled(Some(seen.doc.head), batch);
            }
            let doc = self.next_doc(stream, &seen.doc, batch).await?;
            let body = Body::Text(doc.text());
            match self.objects.replace(&names::head(stream), &seen.version, &body).await {
                Ok(version) => {
                    self.remember(stream, Seen { version, doc });
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
}

/// The head is not the expected one. Our own hash means that an earlier answer was lost.
fn settled(actual: Option<Head>, batch: Batch<'_>) -> Result<(), AppendError> {
    if actual.is_some() && actual == batch.head() { Ok(()) } else { Err(AppendError::Conflict { actual }) }
}

fn folded_body(text: &str) -> Body {
    if text.len() > FOLDED_PLAIN_BYTES_MAX { Body::pack(text) } else { Body::Text(text.to_owned()) }
}

/// Why the head could not be seen: damage stays damage, everything else is what the moment makes of it.
fn not_seen(e: BackendError, otherwise: fn(String) -> AppendError) -> AppendError {
    if e.is_broken() { AppendError::Corrupt(words(e)) } else { otherwise(e.to_string()) }
}

fn words(e: BackendError) -> String {
    match e {
        BackendError::Corrupt(why) => why,
        BackendError::Folded { stream: _, ref source } => format!("{e}: {source}"),
        BackendError::Record { stream: _, ref source } => format!("{e}: {source}"),
        BackendError::Newer(_)
        | BackendError::BehindAnchor { .. }
        | BackendError::StoreMissing { .. }
        | BackendError::Full { .. }
        | BackendError::Locked { .. }
        | BackendError::Poisoned(_)
        | BackendError::Unavailable(_)
        | BackendError::Moved
        | BackendError::Io { .. } => e.to_string(),
    }
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
