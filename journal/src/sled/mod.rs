//! The backend in a local directory.
//!
//! - `store`: the only file that knows sled
//! - `live`: an open store, and how a group of appends becomes durable
//! - `group`: who is in a group
//! - `pages`: reading
//! - `aside`: what is kept of a stream that is forgotten
//!
//! Every call runs on a blocking thread: a sync may take seconds on a bad disk, and the lease must be renewed meanwhile.
//! A failed sync poisons the store. Nothing is tried again on that handle; the next reading of a stream closes the store and
//! opens it anew, with all checks, so that it goes on when there is space again. A stream that cannot be read, or ends behind
//! its anchor, is refused by itself: the store is open, and so is every other stream.

mod aside;
mod group;
mod live;
mod pages;
mod store;
#[cfg(test)]
mod tests;

use crate::{
    anchor::has_room,
    backend::{AppendError, Backend, BackendError, Reader},
    codec,
    folded::Folded,
    record::{Head, Stored, StreamId},
};
use async_trait::async_trait;
pub use group::{GROUP_APPENDS_MAX, GROUP_BYTES_MAX, WAITING_APPENDS_MAX, WAITING_BYTES_MAX};
use live::{Live, Write};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};
use valkeeper_core::ids::Seq;

/// Bytes of one stream: about 100 000 records, which are read in about half a second.
pub const STREAM_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The backend. Holds its directory's lock until it is dropped.
pub struct Sled {
    shared: Arc<Shared>,
}

struct Shared {
    queue: group::Queue,
    // Before the lock: the store is closed before another process may open it.
    gate: RwLock<Gate>,
    dir: PathBuf,
    stream_bytes_max: usize,
    _lock: File,
}

/// The store, open or not.
struct Gate {
    live: Result<Live, String>,
    /// Counts how often it was opened.
    opening: u64,
}

impl Sled {
    /// Opens the store in `dir`, or makes it (its parent must exist). What is wrong with one stream alone, each question for
    /// that stream says: it is compared with its anchor before anything else. Blocks.
    ///
    /// # Errors
    /// [`BackendError::Locked`], [`BackendError::StoreMissing`], [`BackendError::Corrupt`] (the store as a whole, or its
    /// anchors) or [`BackendError::Io`].
    pub fn open(dir: &Path) -> Result<Sled, BackendError> {
        Sled::open_with_limit(dir, STREAM_BYTES_MAX)
    }

    /// Where the anchors of the store in `dir` are.
    pub fn anchors_of(dir: &Path) -> PathBuf {
        crate::anchor::Anchors::dir(dir)
    }

    /// As [`Sled::open`], with another limit for one stream, in bytes.
    ///
    /// # Errors
    /// As [`Sled::open`].
    pub fn open_with_limit(dir: &Path, stream_bytes_max: usize) -> Result<Sled, BackendError> {
        let lock = store::lock(dir)?;
        let gate = RwLock::new(Gate { live: Ok(Live::open(dir)?), opening: 1 });
        let (queue, dir) = (group::Queue::default(), dir.to_owned());
        Ok(Sled { shared: Arc::new(Shared { queue, gate, dir, stream_bytes_max, _lock: lock }) })
    }
}

impl Shared {
    /// Reads something from the open store; also given: which opening of it that is.
    fn ask<T>(&self, work: impl FnOnce(&Live, u64) -> Result<T, BackendError>) -> Result<T, BackendError> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        match &gate.live {
            Ok(live) => live.ask(|live| work(live, gate.opening)),
            Err(why) => Err(BackendError::Poisoned(why.clone())),
        }
    }

    fn write(&self, writes: Vec<Write>) -> Vec<Result<(), AppendError>> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        match &gate.live {
            Ok(live) => live.write(writes, self.stream_bytes_max),
            Err(why) => writes.iter().map(|_| Err(AppendError::Poisoned(why.clone()))).collect(),
        }
    }

    /// If the store is poisoned: closes it and opens it anew.
    fn revive(&self) -> Result<(), BackendError> {
        let is_well = |gate: &Gate| gate.live.as_ref().is_ok_and(|live| live.poisoned().is_none());
        if is_well(&self.gate.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(());
        }
        let mut gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if is_well(&gate) {
            return Ok(());
        }
        // Closed first: sled has a lock of its own.
        let closed = std::mem::replace(&mut gate.live, Err("the store is closed".to_owned()));
        drop(closed);
        match Live::open(&self.dir) {
            Ok(live) => {
                gate.live = Ok(live);
                gate.opening += 1;
                Ok(())
            }
            Err(e) => {
                gate.live = Err(format!("the store could not be opened anew: {e}"));
                Err(e)
            }
        }
    }
}

/// Runs `work` on a thread that may block.
async fn run<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<T, BackendError> + Send + 'static,
) -> Result<T, BackendError> {
    let shared = Arc::clone(shared);
    let job = tokio::task::spawn_blocking(move || work(&shared));
    // It panicked, or the runtime is shutting down.
    job.await.unwrap_or_else(|e| Err(BackendError::Poisoned(e.to_string())))
}

#[async_trait]
impl Backend for Sled {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        run(&self.shared, |shared| shared.ask(|live, _| Ok(live.streams()))).await
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        let id = stream.clone();
        let begin = |shared: &Shared| {
            shared.revive()?;
            shared.ask(move |live, opening| Ok((live.stream(&id)?, opening)))
        };
        let (found, opening) = run(&self.shared, begin).await?;
        let (folded, bytes, next, last) = match found {
            Some(found) => {
                let last = found.head.map_or(Seq(0), |head| head.seq);
                (found.folded.clone(), found.bytes(), found.through().next(), last)
            }
            None => (None, 0, Seq(1), Seq(0)),
        };
        let (shared, stream) = (Arc::clone(&self.shared), stream.clone());
        Ok(Box::new(pages::Pages { shared, stream, opening, folded, bytes, next, last }))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        let stream = stream.clone();
        let ask = move |shared: &Shared| shared.ask(|live, _| Ok(live.stream(&stream)?.and_then(|s| s.head)));
        run(&self.shared, ask).await
    }

    async fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        let stream = stream.clone();
        run(&self.shared, move |shared| shared.ask(|live, _| live.claimed_end(&stream))).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
        if !has_room(stream) {
            return Err(AppendError::Io(format!("the name of stream {stream} is too long")));
        }
        let (first, head) = (first.record.seq, last.head());
        let frames = records.iter().flat_map(codec::encode).collect();
        let (stream, expected, cut) = (stream.clone(), expected.copied(), cut.cloned());
        group::append(&self.shared, Write { stream, expected, first, head, frames, cut }).await
    }

    async fn discard(&self, stream: &StreamId) -> Result<(), BackendError> {
        let stream = stream.clone();
        let discard = move |shared: &Shared| {
            shared.revive()?;
            shared.ask(|live, _| live.forget(&stream, |_| Ok(())))
        };
        run(&self.shared, discard).await
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        let stream = stream.clone();
        let forget = move |shared: &Shared| {
            shared.revive()?;
            shared.ask(|live, _| live.forget(&stream, |kept| aside::keep(&shared.dir, &stream, kept)))
        };
        run(&self.shared, forget).await
    }

    async fn accept_loss(&self, stream: &StreamId) -> Result<(), BackendError> {
        let stream = stream.clone();
        let accept = move |shared: &Shared| {
            shared.revive()?;
            shared.ask(|live, _| live.accept_loss(&stream))
        };
        run(&self.shared, accept).await
    }

    async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        loop {
            let stream = stream.clone();
            // One step at a time, so that appends come between.
            let step = move |shared: &Shared| shared.ask(|live, _| live.tidy(&stream));
            if !run(&self.shared, step).await? {
                return Ok(());
            }
        }
    }
}
