//! The task that writes the mirror, and how a stream is copied from one store to the other.

use super::survey::{Survey, anchor};
use crate::{
    backend::{AppendError, Backend, BackendError, describe},
    folded::Folded,
    record::{Head, Stored, StreamId},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::mpsc;

/// Bytes of records that are copied at once. What is copied into ConfigMaps is sealed and packed as it would have been in its first
/// life, where a tail is sealed at this size.
const COPY_BYTES_MAX: usize = crate::segments::TAIL_BYTES_MAX;

/// Batches between two tidyings of a store that is copied into: small segments are merged before they are so many that the copy takes
/// more room than what it was made from.
const COPY_TIDIED_EVERY: usize = 16;

/// What the mirror is to do. One after the other, so that it never does two things to a stream at once.
pub(super) enum Job {
    /// Takes an append that the first store has taken.
    Append { stream: StreamId, expected: Option<Head>, records: Vec<Stored>, cut: Option<Folded> },
    /// Is made again from the first store.
    Rebuild(StreamId),
}

/// Why mirrors could not be made again, until somebody has been told.
#[derive(Default)]
pub(super) struct Troubles(Mutex<BTreeMap<StreamId, BackendError>>);

impl Troubles {
    /// What is to be told, once.
    pub fn take(&self, stream: &StreamId) -> Option<BackendError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(stream)
    }

    fn put(&self, stream: StreamId, trouble: BackendError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(stream, trouble);
    }
}

/// Writes the mirror. An append that does not follow its end, or cannot be written, is left out: the next quiet moment has it made again.
pub(super) async fn work(
    first: Arc<dyn Backend>,
    mirror: Arc<dyn Backend>,
    troubles: Arc<Troubles>,
    mut waiting: mpsc::Receiver<Job>,
) {
    while let Some(job) = waiting.recv().await {
        match job {
            Job::Append { stream, expected, records, cut } => {
                match mirror.append(&stream, expected.as_ref(), &records, cut.as_ref()).await {
                    Ok(()) | Err(_) => {}
                }
            }
            Job::Rebuild(stream) => match rebuild(first.as_ref(), mirror.as_ref(), &stream).await {
                Ok(()) => drop(troubles.take(&stream)),
                Err(trouble) => troubles.put(stream, trouble),
            },
        }
    }
}

/// Makes the mirror again from the first store, once that is seen to be whole and to hold what the mirror has seen: it may be the
/// better copy. A mirror that is damaged, or that speaks of what a person has given up, is kept aside.
async fn rebuild(first: &dyn Backend, mirror: &dyn Backend, stream: &StreamId) -> Result<(), BackendError> {
    match Survey::of(mirror, stream, None).await {
        Ok(mirrored) => {
            let survey = Survey::of(first, stream, mirrored.head.map(anchor)).await?;
            if survey.head == mirrored.head {
                return Ok(());
            }
            if survey.holds {
                mirror.discard(stream).await?;
            } else if survey.outdates(&mirrored) {
                mirror.forget(stream).await?;
            } else {
                let found = describe(mirrored.head.as_ref());
                let why = format!("stream {stream} does not hold what the second copy ends with: {found}");
                return Err(BackendError::Corrupt(why));
            }
        }
        Err(e) if e.is_damage() => {
            Survey::of(first, stream, None).await?;
            mirror.forget(stream).await?;
        }
        Err(e) => return Err(elsewhere(&e)),
    }
    copy(first, mirror, stream).await.map_err(|e| elsewhere(&e))
}

/// What is wrong with the mirror only is no reason to stop.
fn elsewhere(e: &BackendError) -> BackendError {
    BackendError::Unavailable(format!("the second copy: {e}"))
}

/// Writes a stream into a store that has none of that name.
pub(super) async fn copy(
    from: &dyn Backend,
    to: &dyn Backend,
    stream: &StreamId,
) -> Result<(), BackendError> {
    let mut reader = from.read(stream).await?;
    let mut put = Put { to, stream, folded: reader.folded().cloned(), head: None, batches: 0 };
    let mut batch = Vec::new();
    let mut bytes = 0;
    loop {
        let page = reader.page().await?;
        let is_end = page.is_none();
        for stored in page.map(|page| page.records).unwrap_or_default() {
            if bytes > 0 && bytes + stored.encoded_len() > COPY_BYTES_MAX {
                put.batch(std::mem::take(&mut batch)).await?;
                bytes = 0;
            }
            bytes += stored.encoded_len();
            batch.push(stored);
        }
        if is_end {
            return put.batch(batch).await;
        }
    }
}

struct Put<'a> {
    to: &'a dyn Backend,
    stream: &'a StreamId,
    /// What the stream begins with, until it was written.
    folded: Option<Folded>,
    head: Option<Head>,
    batches: usize,
}

impl Put<'_> {
    async fn batch(&mut self, batch: Vec<Stored>) -> Result<(), BackendError> {
        let Some(last) = batch.last().map(Stored::head) else { return Ok(()) };
        let cut = self.folded.take();
        let mut put = self.to.append_copied(self.stream, self.head.as_ref(), &batch, cut.as_ref()).await;
        if let Err(AppendError::Full { .. }) = put {
            self.to.maintain(self.stream).await?;
            put = self.to.append_copied(self.stream, self.head.as_ref(), &batch, cut.as_ref()).await;
        }
        put.map_err(|e| match e {
            AppendError::Full { bytes, max } => {
                BackendError::Full { stream: self.stream.clone(), bytes, max }
            }
            AppendError::Conflict { .. }
            | AppendError::Fenced { .. }
            | AppendError::Ambiguous(_)
            | AppendError::Poisoned(_)
            | AppendError::Corrupt(_)
            | AppendError::Io(_) => BackendError::Unavailable(e.to_string()),
        })?;
        self.head = Some(last);
        self.batches += 1;
        if self.batches.is_multiple_of(COPY_TIDIED_EVERY) {
            self.to.maintain(self.stream).await
        } else {
            Ok(())
        }
    }
}
