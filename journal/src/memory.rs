//! A backend in memory: for tests and simulations, with the faults that a network has.

use crate::{
    backend::{AppendError, Backend, BackendError},
    codec,
    record::{Head, Stored, StreamId},
};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What happens to the next append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its outcome is unknown; it was not written and never will be.
    AmbiguousNotCommitted,
    /// Its outcome is unknown; it was written.
    AmbiguousCommitted,
    /// Its outcome is unknown; it arrives when [`Memory::deliver_late`] is called.
    AmbiguousLate,
    /// It is refused although the head is the expected one: someone touched only metadata.
    Conflict,
    /// It is refused for certain.
    Unavailable,
    /// The stream is full.
    Full,
    /// The store fails for good.
    Poisoned,
    /// The next question for the head is not answered. Appends are not affected.
    HeadUnavailable,
}

struct Late {
    stream: StreamId,
    expected: Option<Head>,
    frames: Vec<(Head, Vec<u8>)>,
}

#[derive(Default)]
struct Inner {
    streams: BTreeMap<StreamId, Vec<(Head, Vec<u8>)>>,
    faults: VecDeque<Fault>,
    late: Vec<Late>,
    appends: usize,
    stream_bytes_max: Option<usize>,
}

impl Inner {
    fn swap(
        &mut self,
        stream: &StreamId,
        expected: Option<&Head>,
        new: Vec<(Head, Vec<u8>)>,
    ) -> Result<(), AppendError> {
        let frames = self.streams.entry(stream.clone()).or_default();
        let actual = frames.last().map(|(head, _)| *head);
        if actual.as_ref() != expected {
            return Err(AppendError::Conflict { actual });
        }
        let bytes = frames.iter().chain(&new).map(|(_, frame)| frame.len()).sum();
        if let Some(max) = self.stream_bytes_max.filter(|max| bytes > *max) {
            return Err(AppendError::Full { bytes, max });
        }
        frames.extend(new);
        Ok(())
    }

    fn next_fault(&mut self, wanted: fn(Fault) -> bool) -> Option<Fault> {
        let next = self.faults.front().copied().filter(|fault| wanted(*fault))?;
        self.faults.pop_front();
        Some(next)
    }
}

/// The backend. Holds the same frames as every other one.
#[derive(Default)]
pub struct Memory {
    inner: Mutex<Inner>,
}

impl Memory {
    /// An empty store.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Limits each stream to this many bytes; there is no limit before.
    pub fn set_limit(&self, stream_bytes_max: usize) {
        self.lock().stream_bytes_max = Some(stream_bytes_max);
    }

    /// Queues a fault; each meets one call.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push_back(fault);
    }

    /// Forgets the faults that are still queued.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// Lets the writes of [`Fault::AmbiguousLate`] arrive. Returns how many were still accepted.
    pub fn deliver_late(&self) -> usize {
        let mut inner = self.lock();
        let late = std::mem::take(&mut inner.late);
        late.into_iter().filter_map(|l| inner.swap(&l.stream, l.expected.as_ref(), l.frames).ok()).count()
    }

    /// Appends that arrived, accepted or not.
    pub fn appends(&self) -> usize {
        self.lock().appends
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here leaves the state half-changed, so a panic of another holder does not matter.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Backend for Memory {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        let inner = self.lock();
        Ok(inner.streams.iter().filter(|(_, frames)| !frames.is_empty()).map(|(id, _)| id.clone()).collect())
    }

    async fn read(&self, stream: &StreamId) -> Result<Vec<Stored>, BackendError> {
        let inner = self.lock();
        let frames = inner.streams.get(stream).map(Vec::as_slice).unwrap_or_default();
        let decoded = frames.iter().map(|(_, bytes)| codec::decode(bytes));
        decoded
            .collect::<Result<_, _>>()
            .map_err(|source| BackendError::Record { stream: stream.clone(), source })
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        let mut inner = self.lock();
        if inner.next_fault(|f| f == Fault::HeadUnavailable).is_some() {
            return Err(BackendError::Unavailable("injected".to_owned()));
        }
        Ok(inner.streams.get(stream).and_then(|frames| frames.last()).map(|(head, _)| *head))
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
    ) -> Result<(), AppendError> {
        let mut inner = self.lock();
        inner.appends += 1;
        let frames = records.iter().map(|r| (r.head(), codec::encode(r))).collect();
        let unknown = || AppendError::Ambiguous("injected".to_owned());
        match inner.next_fault(|f| f != Fault::HeadUnavailable) {
            None | Some(Fault::HeadUnavailable) => inner.swap(stream, expected, frames),
            Some(Fault::AmbiguousNotCommitted) => Err(unknown()),
            Some(Fault::AmbiguousCommitted) => inner.swap(stream, expected, frames).and(Err(unknown())),
            Some(Fault::AmbiguousLate) => {
                inner.late.push(Late { stream: stream.clone(), expected: expected.copied(), frames });
                Err(unknown())
            }
            Some(Fault::Conflict) => {
                let actual = inner.streams.get(stream).and_then(|f| f.last()).map(|(head, _)| *head);
                Err(AppendError::Conflict { actual })
            }
            Some(Fault::Unavailable) => Err(AppendError::Io("injected".to_owned())),
            Some(Fault::Full) => Err(AppendError::Full { bytes: 0, max: 0 }),
            Some(Fault::Poisoned) => Err(AppendError::Poisoned("injected".to_owned())),
        }
    }
}
