//! A backend in memory: for tests and simulations, with the faults that a network has.

use crate::{
    backend::{AppendError, Backend, BackendError, Page, Reader},
    codec,
    folded::Folded,
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

/// Records of a page: few, so that tests cut at many places.
const PAGE_RECORDS: usize = 4;

/// A write as it arrives.
struct Write {
    stream: StreamId,
    expected: Option<Head>,
    frames: Vec<(Head, Vec<u8>)>,
    cut: Option<Folded>,
}

#[derive(Clone, Default)]
struct Stream {
    folded: Option<Folded>,
    frames: Vec<(Head, Vec<u8>)>,
}

impl Stream {
    fn head(&self) -> Option<Head> {
        self.frames.last().map(|(head, _)| *head)
    }

    fn bytes(&self) -> usize {
        let folded = self.folded.as_ref().map_or(0, |folded| folded.text().len());
        self.frames.iter().map(|(_, frame)| frame.len()).sum::<usize>() + folded
    }
}

#[derive(Default)]
struct Inner {
    streams: BTreeMap<StreamId, Stream>,
    faults: VecDeque<Fault>,
    late: Vec<Write>,
    appends: usize,
    stream_bytes_max: Option<usize>,
}

impl Inner {
    fn swap(&mut self, write: Write) -> Result<(), AppendError> {
        let Write { stream, expected, frames, cut } = write;
        let known = self.streams.get(&stream).cloned().unwrap_or_default();
        let actual = known.head();
        if actual != expected {
            return Err(AppendError::Conflict { actual });
        }
        let mut next = known;
        next.frames.extend(frames);
        if let Some(folded) = cut {
            next.frames.retain(|(head, _)| head.seq > folded.head().seq);
            next.folded = Some(folded);
        }
        let bytes = next.bytes();
        if let Some(max) = self.stream_bytes_max.filter(|max| bytes > *max) {
            return Err(AppendError::Full { bytes, max });
        }
        self.streams.insert(stream, next);
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

    /// Another store with what is in this one now: yesterday's copy, once this one goes on.
    pub fn copied(&self) -> Memory {
        let Inner { streams, faults: _, late: _, appends: _, stream_bytes_max } = &*self.lock();
        let streams = streams.clone();
        let inner = Inner { streams, stream_bytes_max: *stream_bytes_max, ..Inner::default() };
        Memory { inner: Mutex::new(inner) }
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
        late.into_iter().filter_map(|write| inner.swap(write).ok()).count()
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

/// Everything at once, handed out in pages.
struct Pages {
    stream: StreamId,
    from: Stream,
    given: usize,
}

#[async_trait]
impl Reader for Pages {
    fn folded(&self) -> Option<&Folded> {
        self.from.folded.as_ref()
    }

    fn bytes(&self) -> usize {
        self.from.bytes()
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        let frames: Vec<&[u8]> =
            self.from.frames.iter().skip(self.given).take(PAGE_RECORDS).map(|(_, f)| f.as_slice()).collect();
        self.given += frames.len();
        let records: Result<Vec<Stored>, _> = frames.iter().map(|frame| codec::decode(frame)).collect();
        let records =
            records.map_err(|source| BackendError::Record { stream: self.stream.clone(), source })?;
        let bytes = frames.iter().map(|frame| frame.len()).sum();
        Ok((!records.is_empty()).then_some(Page { records, bytes }))
    }
}

#[async_trait]
impl Backend for Memory {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        let inner = self.lock();
        Ok(inner.streams.iter().filter(|(_, s)| s.head().is_some()).map(|(id, _)| id.clone()).collect())
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        let from = self.lock().streams.get(stream).cloned().unwrap_or_default();
        Ok(Box::new(Pages { stream: stream.clone(), from, given: 0 }))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        let mut inner = self.lock();
        if inner.next_fault(|f| f == Fault::HeadUnavailable).is_some() {
            return Err(BackendError::Unavailable("injected".to_owned()));
        }
        Ok(inner.streams.get(stream).and_then(Stream::head))
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.lock().streams.remove(stream);
        Ok(())
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        let mut inner = self.lock();
        inner.appends += 1;
        let frames = records.iter().map(|r| (r.head(), codec::encode(r))).collect();
        let write = Write { stream: stream.clone(), expected: expected.copied(), frames, cut: cut.cloned() };
        let unknown = || AppendError::Ambiguous("injected".to_owned());
        match inner.next_fault(|f| f != Fault::HeadUnavailable) {
            None | Some(Fault::HeadUnavailable) => inner.swap(write),
            Some(Fault::AmbiguousNotCommitted) => Err(unknown()),
            Some(Fault::AmbiguousCommitted) => inner.swap(write).and(Err(unknown())),
            Some(Fault::AmbiguousLate) => {
                inner.late.push(write);
                Err(unknown())
            }
            Some(Fault::Conflict) => {
                let actual = inner.streams.get(stream).and_then(Stream::head);
                Err(AppendError::Conflict { actual })
            }
            Some(Fault::Unavailable) => Err(AppendError::Io("injected".to_owned())),
            Some(Fault::Full) => Err(AppendError::Full { bytes: 0, max: 0 }),
            Some(Fault::Poisoned) => Err(AppendError::Poisoned("injected".to_owned())),
        }
    }
}
