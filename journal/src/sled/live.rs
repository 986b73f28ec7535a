//! An open store: where each stream begins and ends, and how a group of appends becomes durable with one sync.

use super::store::{Entry, Store, Tree, guarded, prepare};
use crate::{
    anchor::{Anchor, Anchors},
    backend::{AppendError, BackendError, describe},
    codec,
    folded::Folded,
    record::{Head, RecordError, Stored, StreamId},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};
use valkeeper_core::ids::Seq;

/// Frames of a page, in bytes, unless one append alone has more: what is held in memory while a stream is read. As large as
/// the largest record.
pub(super) const PAGE_BYTES_MAX: usize = 64 * 1024;

/// Chunks that were cut and go with each later append of their stream. An append adds one or two, so what was cut is gone
/// long before the next cut, also where nobody calls `maintain`; 32 removals take 0.1 ms.
const SWEEP_CHUNKS_MAX: usize = 32;

/// Chunks that go at once in `maintain`, between two syncs: some milliseconds, for which an append may have to wait.
const MAINTAIN_CHUNKS_MAX: usize = 512;

/// A batch to be appended.
pub(super) struct Write {
    pub stream: StreamId,
    pub expected: Option<Head>,
    pub first: Seq,
    pub head: Head,
    pub frames: Vec<u8>,
    pub cut: Option<Folded>,
}

/// A stream as it is on the disk.
#[derive(Clone)]
pub(super) struct Stream {
    tree: Tree,
    pub head: Option<Head>,
    pub folded: Option<Arc<Folded>>,
    /// The entry with the first record that was not cut, and the bytes of all entries before it, cut or not.
    begin: (Seq, u64),
    /// The same bytes at its end.
    end: u64,
    /// Entries that were cut may still be in the tree.
    is_swept: bool,
}

impl Stream {
    /// Looks a stream up: its last entry, its first, and its fold. Nothing else is read.
    fn load(tree: Tree, stream: &StreamId) -> Result<Stream, BackendError> {
        let folded = tree.folded(stream)?;
        let mut found = Stream {
            tree,
            head: None,
            folded: folded.map(Arc::new),
            begin: (Seq(1), 0),
            end: 0,
            is_swept: true,
        };
        let Some(last) = found.tree.last()? else { return Ok(found) };
        found.end = last.offset.saturating_add(last.frames.len() as u64);
        found.head = decoded(stream, &last)?.last().map(Stored::head);
        if let Some(entry) = found.tree.holding(found.through().next())? {
            found.begin = (entry.first, entry.offset);
        }
        found.is_swept = found.through() == Seq(0);
        Ok(found)
    }

    /// The last record that was cut.
    pub fn through(&self) -> Seq {
        self.folded.as_ref().map_or(Seq(0), |folded| folded.head().seq)
    }

    pub fn bytes(&self) -> usize {
        let folded = self.folded.as_ref().map_or(0, |folded| folded.text().len());
        usize::try_from(self.end.saturating_sub(self.begin.1)).unwrap_or(usize::MAX).saturating_add(folded)
    }

    /// The records of whole entries from the one with record `from` on, up to `to`, as many as a page may have.
    pub fn page(&self, stream: &StreamId, from: Seq, to: Seq) -> Result<(Vec<Stored>, usize), BackendError> {
        let (mut records, mut bytes) = (Vec::new(), 0);
        let first = if from <= self.through().next() { self.begin.0 } else { from };
        for entry in self.tree.entries(first, to) {
            let entry = entry?;
            if bytes > 0 && bytes + entry.frames.len() > PAGE_BYTES_MAX {
                break;
            }
            bytes += entry.frames.len();
            records.extend(decoded(stream, &entry)?.into_iter().filter(|stored| stored.record.seq >= from));
        }
        if records.is_empty() {
            return Err(BackendError::Corrupt(format!("stream {stream} ends before record {from}")));
        }
        Ok((records, bytes))
    }

    /// Compares with the anchor. The head may be ahead of it by the one append that was not acknowledged; then the anchor's record
    /// must be in it, or be the last that was cut.
    fn check(&self, stream: &StreamId, anchor: &Anchor) -> Result<(), BackendError> {
        let behind = |found: String| Err(behind(stream, anchor, found));
        let Some(head) = self.head.filter(|head| head.seq >= anchor.seq) else {
            return behind(describe(self.head.as_ref()));
        };
        let folded = self.folded.as_ref().map(|folded| *folded.head());
        let known = [Some(head), folded].into_iter().flatten().find(|head| head.seq == anchor.seq);
        let hash = match known {
            Some(head) => Some(head.hash),
            None => {
                let entry = self.tree.holding(anchor.seq)?;
                let records = entry.map(|entry| decoded(stream, &entry)).transpose()?.unwrap_or_default();
                records.iter().find(|stored| stored.record.seq == anchor.seq).map(|stored| stored.hash)
            }
        };
        match hash {
            Some(hash) if hash == anchor.hash => Ok(()),
            Some(hash) => behind(format!("another record {} ({hash})", anchor.seq)),
            None => behind(format!("no record {}", anchor.seq)),
        }
    }
}

fn behind(stream: &StreamId, anchor: &Anchor, found: String) -> BackendError {
    BackendError::BehindAnchor { stream: stream.clone(), found, anchor: anchor.seq }
}

fn decoded(stream: &StreamId, entry: &Entry) -> Result<Vec<Stored>, BackendError> {
    let bad = |source: RecordError| BackendError::Record { stream: stream.clone(), source };
    let records: Vec<Stored> = codec::decode_stream(&entry.frames).collect::<Result<_, _>>().map_err(bad)?;
    match records.first() {
        Some(first) if first.record.seq == entry.first => Ok(records),
        Some(first) => Err(BackendError::Corrupt(format!(
            "record {} of stream {stream} is stored as {}",
            first.record.seq, entry.first
        ))),
        None => Err(BackendError::Corrupt(format!("entry {} of stream {stream} is empty", entry.first))),
    }
}

/// A store that is open.
pub(super) struct Live {
    // Declared in the order in which they must be dropped: trees before the store.
    streams: Mutex<BTreeMap<StreamId, Stream>>,
    store: Store,
    /// Whoever writes holds it: one at a time.
    anchors: Mutex<Anchors>,
    poisoned: OnceLock<String>,
}

impl Live {
    /// Opens the store, makes it if there is none, and compares every stream with its anchor.
    pub fn open(dir: &Path) -> Result<Live, BackendError> {
        let (anchors, anchored) = Anchors::open(dir)?;
        if !dir.join("db").exists() && !anchored.is_empty() {
            let anchor = Anchors::dir(dir);
            return Err(BackendError::StoreMissing { dir: dir.to_owned(), anchor });
        }
        prepare(dir)?;
        let store = Store::open(dir)?;
        let (streams, poisoned) = (Mutex::new(BTreeMap::new()), OnceLock::new());
        let live = Live { streams, store, anchors: Mutex::new(anchors), poisoned };
        let names: BTreeSet<StreamId> = live.store.names().into_iter().collect();
        for (stream, anchor) in anchored {
            let check = || match names.contains(&stream) {
                true => live.load(&stream)?.check(&stream, &anchor),
                false => Err(behind(&stream, &anchor, describe(None))),
            };
            guarded("reading", check).map_err(BackendError::Corrupt)??;
        }
        Ok(live)
    }

    /// Why nothing on this handle is to be believed any more, if so.
    pub fn poisoned(&self) -> Option<&String> {
        self.poisoned.get()
    }

    /// Reads something. sled panics on damage; then nothing else is asked of it.
    pub fn ask<T>(&self, work: impl FnOnce(&Live) -> Result<T, BackendError>) -> Result<T, BackendError> {
        if let Some(why) = self.poisoned() {
            return Err(BackendError::Poisoned(why.clone()));
        }
        guarded("reading", || work(self))
            .unwrap_or_else(|panic| Err(BackendError::Poisoned(self.poison(panic))))
    }

    /// Every stream with a record.
    pub fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        let mut streams = Vec::new();
        for stream in self.store.names() {
            if self.load(&stream)?.head.is_some() {
                streams.push(stream);
            }
        }
        Ok(streams)
    }

    /// A stream as it is on the disk. Opening a tree makes it, and a question must leave the store as it is.
    pub fn stream(&self, stream: &StreamId) -> Result<Option<Stream>, BackendError> {
        if let Some(known) = self.known().get(stream) {
            return Ok(Some(known.clone()));
        }
        if self.store.names().contains(stream) { self.load(stream).map(Some) } else { Ok(None) }
    }

    /// A stream that has a tree.
    fn load(&self, stream: &StreamId) -> Result<Stream, BackendError> {
        if let Some(known) = self.known().get(stream) {
            return Ok(known.clone());
        }
        let loaded = Stream::load(self.store.tree(stream)?, stream)?;
        // Whoever wrote to it meanwhile knows better.
        Ok(self.known().entry(stream.clone()).or_insert(loaded).clone())
    }

    /// Makes a group of appends durable: each is its own compare-and-swap, and all share one sync of the data and one of the
    /// anchors. The anchors come second: they must never be ahead of the data.
    pub fn write(&self, writes: Vec<Write>, stream_bytes_max: usize) -> Vec<Result<(), AppendError>> {
        let count = writes.len();
        let written = match self.poisoned() {
            Some(why) => Err(why.clone()),
            None => {
                let written = guarded("writing", || self.write_all(writes, stream_bytes_max));
                // After a failed sync the kernel calls the pages clean: a second sync would succeed and mean nothing.
                written.and_then(|written| written).map_err(|why| self.poison(why))
            }
        };
        written.unwrap_or_else(|why| (0..count).map(|_| Err(AppendError::Poisoned(why.clone()))).collect())
    }

    fn write_all(
        &self,
        writes: Vec<Write>,
        stream_bytes_max: usize,
    ) -> Result<Vec<Result<(), AppendError>>, String> {
        let mut anchors = self.anchors();
        self.store.write_ahead()?;
        let mut staged = BTreeMap::new();
        let mut answers = Vec::with_capacity(writes.len());
        for write in writes {
            answers.push(self.stage(&mut staged, write, stream_bytes_max)?);
        }
        self.sweep(&mut staged)?;
        if staged.is_empty() {
            return Ok(answers);
        }
        self.store.sync()?;
        let moved: Vec<(StreamId, Anchor)> =
            staged.iter().filter_map(|(id, s)| Some((id.clone(), Anchor::of(s.head.as_ref()?)))).collect();
        anchors.set(&moved).map_err(|e| format!("anchor: {e}"))?;
        self.known().extend(staged);
        Ok(answers)
    }

    /// Takes a stream out: its anchor first, or what is left of it would be missed. Its last entries are given to `keep` before.
    pub fn forget(
        &self,
        stream: &StreamId,
        keep: impl FnOnce(&mut dyn Iterator<Item = Vec<u8>>) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut anchors = self.anchors();
        if !self.store.names().contains(stream) {
            return Ok(());
        }
        let tree = self.store.tree(stream)?;
        let entries = tree.entries(Seq(1), Seq(u64::MAX));
        keep(&mut entries.map_while(Result::ok).map(|entry| entry.frames))?;
        let cleared = anchors.forget(stream).map_err(|e| format!("anchor: {e}"));
        let cleared = cleared.and_then(|()| tree.clear()).and_then(|()| self.store.sync());
        self.known().remove(stream);
        cleared.map_err(|why| BackendError::Poisoned(self.poison(why)))
    }

    /// Puts one append. `Err`: sled failed, and nobody knows what it wrote.
    fn stage(
        &self,
        staged: &mut BTreeMap<StreamId, Stream>,
        write: Write,
        stream_bytes_max: usize,
    ) -> Result<Result<(), AppendError>, String> {
        let Write { stream, expected, first, head, frames, cut } = write;
        let known = match staged.get(&stream) {
            Some(staged) => Some(staged.clone()),
            None => self.stream(&stream).map_err(|e| e.to_string())?,
        };
        let actual = known.as_ref().and_then(|known| known.head);
        if actual != expected {
            return Ok(Err(AppendError::Conflict { actual }));
        }
        let mut next = match known {
            Some(known) => known,
            None => {
                let tree = self.store.tree(&stream).map_err(|e| e.to_string())?;
                Stream::load(tree, &stream).map_err(|e| e.to_string())?
            }
        };
        let entry = Entry { first, offset: next.end, frames };
        next.end = next.end.saturating_add(entry.frames.len() as u64);
        next.head = Some(head);
        let is_cut = cut.is_some();
        if let Some(folded) = cut {
            let keep = folded.head().seq.next();
            // A stream that has nothing yet may begin with any: it is written anew.
            let is_beyond = expected.map_or(keep != first, |head| keep > head.seq.next());
            if is_beyond {
                return Ok(Err(AppendError::Io("what is to be cut is not in the stream".to_owned())));
            }
            let holding = next.tree.holding(keep).map_err(|e| e.to_string())?;
            let old = holding.filter(|_| keep < first).map(|entry| (entry.first, entry.offset));
            next.begin = old.unwrap_or((first, entry.offset));
            next.folded = Some(Arc::new(folded));
            next.is_swept = false;
        }
        let new = next.folded.as_deref().filter(|_| is_cut);
        let bytes = next.bytes();
        if bytes > stream_bytes_max {
            return Ok(Err(AppendError::Full { bytes, max: stream_bytes_max }));
        }
        next.tree.put(&entry, new)?;
        staged.insert(stream, next);
        Ok(Ok(()))
    }

    /// Removes some of what earlier appends cut. Never what this group cuts: until its sync it may still be wanted.
    fn sweep(&self, staged: &mut BTreeMap<StreamId, Stream>) -> Result<(), String> {
        for (id, next) in staged {
            let Some(durable) = self.known().get(id).filter(|durable| !durable.is_swept).cloned() else {
                continue;
            };
            let has_more = durable.tree.sweep(durable.begin.0, SWEEP_CHUNKS_MAX)?;
            next.is_swept = !has_more && next.begin == durable.begin;
        }
        Ok(())
    }

    /// Removes what was cut from a stream, some at a time; true if there is more.
    pub fn tidy(&self, stream: &StreamId) -> Result<bool, BackendError> {
        let Some(_) = self.stream(stream)? else { return Ok(false) };
        let _writing = self.anchors();
        let Some(durable) = self.known().get(stream).filter(|s| !s.is_swept).cloned() else {
            return Ok(false);
        };
        let swept = durable.tree.sweep(durable.begin.0, MAINTAIN_CHUNKS_MAX);
        let swept = swept.and_then(|has_more| self.store.sync().map(|()| has_more));
        let has_more = swept.map_err(|why| BackendError::Poisoned(self.poison(why)))?;
        if let Some(known) = self.known().get_mut(stream) {
            known.is_swept = !has_more;
        }
        Ok(has_more)
    }

    fn poison(&self, why: String) -> String {
        self.poisoned.get_or_init(|| why).clone()
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<StreamId, Stream>> {
        // Nothing in here leaves it half-changed.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn anchors(&self) -> MutexGuard<'_, Anchors> {
        // A panic under it has poisoned the store, and nothing is written any more.
        self.anchors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn store(&self) -> &Store {
        &self.store
    }
}
