//! Blobs in memory, with the faults of a bucket: for tests and simulations.

use super::blobs::{Blobs, BlobsError};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What happens to the next call that it can happen to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobsFault {
    /// Any call: refused for certain.
    Unavailable,
    /// A write: a timeout; nothing was written.
    AmbiguousBeforeCommit,
    /// A write: a timeout; it was written.
    AmbiguousAfterCommit,
    /// A write: answered with `Ok`, and nothing was written.
    Lost,
    /// A write: answered with `Ok`, and another byte was written, the one at this place (counted round).
    CorruptedWrite(usize),
    /// A read: another byte arrives, the one at this place (counted round).
    CorruptedRead(usize),
}

impl BlobsFault {
    fn meets_a_write(self) -> bool {
        !matches!(self, BlobsFault::CorruptedRead(_))
    }

    fn meets_a_read(self) -> bool {
        matches!(self, BlobsFault::Unavailable | BlobsFault::CorruptedRead(_))
    }

    fn meets_a_listing(self) -> bool {
        self == BlobsFault::Unavailable
    }
}

#[derive(Default)]
struct Inner {
    blobs: BTreeMap<String, Vec<u8>>,
    faults: VecDeque<BlobsFault>,
    skip: usize,
    calls: usize,
}

impl Inner {
    /// The fault of this call.
    fn call(&mut self, meets: impl FnOnce(BlobsFault) -> bool) -> Option<BlobsFault> {
        self.calls += 1;
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        let fault = self.faults.front().copied().filter(|fault| meets(*fault))?;
        self.faults.pop_front();
        Some(fault)
    }

    fn commit(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), BlobsError> {
        if self.blobs.contains_key(name) {
            return Err(BlobsError::AlreadyExists);
        }
        self.blobs.insert(name.to_owned(), bytes);
        Ok(())
    }
}

/// The store.
#[derive(Default)]
pub struct MemoryBlobs {
    inner: Mutex<Inner>,
}

impl MemoryBlobs {
    /// An empty store.
    pub fn new() -> MemoryBlobs {
        MemoryBlobs::default()
    }

    /// Queues a fault; each meets one call.
    pub fn inject(&self, fault: BlobsFault) {
        self.lock().faults.push_back(fault);
    }

    /// Lets this many calls pass before queued faults begin.
    pub fn inject_after(&self, calls: usize, fault: BlobsFault) {
        let mut inner = self.lock();
        inner.skip = calls;
        inner.faults.push_back(fault);
    }

    /// Forgets the faults that are still queued. Returns how many there were.
    pub fn clear_faults(&self) -> usize {
        let mut inner = self.lock();
        inner.skip = 0;
        std::mem::take(&mut inner.faults).len()
    }

    /// Calls that arrived, answered or not.
    pub fn calls(&self) -> usize {
        self.lock().calls
    }

    /// Everything there is: what a person with the bucket's keys can do, tests can do.
    pub fn edit<T>(&self, change: impl FnOnce(&mut BTreeMap<String, Vec<u8>>) -> T) -> T {
        change(&mut self.lock().blobs)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable() -> BlobsError {
    BlobsError::Unavailable("injected".to_owned())
}

fn flip(bytes: &mut [u8], place: usize) {
    let at = place.checked_rem(bytes.len()).unwrap_or(0);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1;
    }
}

#[async_trait]
impl Blobs for MemoryBlobs {
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        let mut inner = self.lock();
        let timeout = || BlobsError::Ambiguous("injected timeout".to_owned());
        let mut bytes = bytes.to_vec();
        match inner.call(BlobsFault::meets_a_write) {
            None | Some(BlobsFault::CorruptedRead(_)) => inner.commit(name, bytes),
            Some(BlobsFault::Unavailable) => Err(unavailable()),
            Some(BlobsFault::AmbiguousBeforeCommit) => Err(timeout()),
            Some(BlobsFault::AmbiguousAfterCommit) => inner.commit(name, bytes).and(Err(timeout())),
            Some(BlobsFault::Lost) => Ok(()),
            Some(BlobsFault::CorruptedWrite(place)) => {
                flip(&mut bytes, place);
                inner.commit(name, bytes)
            }
        }
    }

    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        let mut inner = self.lock();
        let fault = inner.call(BlobsFault::meets_a_read);
        if fault == Some(BlobsFault::Unavailable) {
            return Err(unavailable());
        }
        let Some(mut bytes) = inner.blobs.get(name).cloned() else { return Ok(None) };
        if bytes.len() > bytes_max {
            return Err(BlobsError::TooLarge { max: bytes_max });
        }
        if let Some(BlobsFault::CorruptedRead(place)) = fault {
            flip(&mut bytes, place);
        }
        Ok(Some(bytes))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        let mut inner = self.lock();
        if inner.call(BlobsFault::meets_a_listing).is_some() {
            return Err(unavailable());
        }
        Ok(inner.blobs.keys().filter(|name| name.starts_with(prefix)).cloned().collect())
    }
}
