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

/// How often a store with a damaged stream is opened again to see whether what is written to it stays. Where sled's recovery has
/// cut its log off, the first writing may go to a place that the next recovery does not reach; it is whole from then on.
const TRIALS_MAX: u32 = 3;

/// A batch to be appended.
pub(super) struct Write {
    pub stream: StreamId,
    pub expected: Option<Head>,
    pub first: Seq,
    pub head: Head,
    pub frames: Vec<u8>,
    pub cut: Option<Folded>,
}

/// What can be read of a stream that is forgotten.
pub(super) struct Kept<'a> {
    /// The last record that there is a trace of, 0 if there is none.
    pub end: Seq,
    pub folded: Option<&'a Folded>,
    /// The frames of each entry.
    pub entries: &'a mut dyn Iterator<Item = Vec<u8>>,
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

/// The last record of a tree, or the first of its last entry if that is not whole; `None`: nothing can be read of it.
fn end_of(tree: &Tree, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
    let last = match guarded("reading", || tree.last()) {
        Ok(Ok(last)) => last,
        Ok(Err(e)) if !e.is_damage() => return Err(e),
        Ok(Err(_)) | Err(_) => None,
    };
    Ok(last.map(|last| match decoded(stream, &last) {
        Ok(records) => records.last().map_or(last.first, |stored| stored.record.seq),
        Err(_) => last.first,
    }))
}

/// Why an append was not tried: nothing of it was written.
fn refused(e: BackendError) -> AppendError {
    let why = match std::error::Error::source(&e) {
        Some(source) => format!("{e}: {source}"),
        None => e.to_string(),
    };
    if e.is_broken() { AppendError::Corrupt(why) } else { AppendError::Io(why) }
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
    streams: Mutex<Streams>,
    store: Store,
    /// Whoever writes holds it: one at a time.
    anchors: Mutex<Anchors>,
    poisoned: OnceLock<String>,
}

/// What is known of the streams. One that cannot be read harms nobody else: it is found out when it is asked for, and answers
/// each time with what is wrong.
struct Streams {
    /// Looked up, and seen to hold what their anchors say.
    known: BTreeMap<StreamId, Stream>,
    /// The anchors of all others, as they were when the store was opened.
    anchored: BTreeMap<StreamId, Anchor>,
    /// Over which sled panicked. They are not read again on this handle.
    unreadable: BTreeMap<StreamId, String>,
}

impl Live {
    /// Opens the store, makes it if there is none, and compares every stream with its anchor. If one is damaged, the store may be
    /// as well: it has to show first that what is written to it stays.
    pub fn open(dir: &Path) -> Result<Live, BackendError> {
        let mut live = Live::open_once(dir)?;
        if !live.has_damage() {
            return Ok(live);
        }
        for _ in 0..TRIALS_MAX {
            let number = live.store.begin_trial()?;
            drop(live);
            live = Live::open_once(dir)?;
            if live.store.ends_trial(number) {
                return Ok(live);
            }
        }
        Err(BackendError::Corrupt("what is written to the store is gone when it is opened again".to_owned()))
    }

    fn open_once(dir: &Path) -> Result<Live, BackendError> {
        let (anchors, anchored) = Anchors::open(dir)?;
        if !dir.join("db").exists() && !anchored.is_empty() {
            let anchor = Anchors::dir(dir);
            return Err(BackendError::StoreMissing { dir: dir.to_owned(), anchor });
        }
        prepare(dir)?;
        let store = Store::open(dir)?;
        let (known, unreadable) = (BTreeMap::new(), BTreeMap::new());
        let streams = Streams { known, anchored: anchored.into_iter().collect(), unreadable };
        let (streams, poisoned) = (Mutex::new(streams), OnceLock::new());
        Ok(Live { streams, store, anchors: Mutex::new(anchors), poisoned })
    }

    /// Looks at the end of every stream that has an anchor: true if one of them is damaged.
    fn has_damage(&self) -> bool {
        let anchored: Vec<StreamId> = self.lock().anchored.keys().cloned().collect();
        let is_damaged = |stream: &StreamId| self.stream(stream).is_err_and(|e| e.is_damage());
        // Every one is looked at here, rather than when its cluster asks.
        anchored.iter().filter(|stream| is_damaged(stream)).count() > 0
    }

    /// Why nothing on this handle is to be believed any more, if so.
    pub fn poisoned(&self) -> Option<&String> {
        self.poisoned.get()
    }

    /// Asks for something. If sled panics over it, nothing else is asked of it: see [`Live::of`] for reading.
    pub fn ask<T>(&self, work: impl FnOnce(&Live) -> Result<T, BackendError>) -> Result<T, BackendError> {
        if let Some(why) = self.poisoned() {
            return Err(BackendError::Poisoned(why.clone()));
        }
        guarded("using", || work(self))
            .unwrap_or_else(|panic| Err(BackendError::Poisoned(self.poison(panic))))
    }

    /// Reads something of a stream. sled panics on some damage of a page; it does so before it changes anything, so that
    /// only this stream is not to be read any more.
    pub fn of<T>(
        &self,
        stream: &StreamId,
        work: impl FnOnce() -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        if let Some(why) = self.lock().unreadable.get(stream) {
            return Err(BackendError::Corrupt(why.clone()));
        }
        guarded("reading", work).unwrap_or_else(|panic| {
            let mut streams = self.lock();
            streams.known.remove(stream);
            streams.unreadable.insert(stream.clone(), panic.clone());
            Err(BackendError::Corrupt(panic))
        })
    }

    /// Every stream with a record, and every one that cannot be read: whoever reads it is told why.
    pub fn streams(&self) -> Vec<StreamId> {
        let mut names: BTreeSet<StreamId> = self.store.names().into_iter().collect();
        names.extend(self.lock().anchored.keys().cloned());
        names.retain(|stream| match self.stream(stream) {
            Ok(found) => found.is_some_and(|found| found.head.is_some()),
            Err(_) => true,
        });
        names.into_iter().collect()
    }

    /// A stream as it is on the disk, if it holds what its anchor says.
    pub fn stream(&self, stream: &StreamId) -> Result<Option<Stream>, BackendError> {
        let anchor = {
            let streams = self.lock();
            if let Some(known) = streams.known.get(stream) {
                return Ok(Some(known.clone()));
            }
            streams.anchored.get(stream).copied()
        };
        let loaded = self.of(stream, || {
            let loaded = self.load(stream)?;
            match (&loaded, anchor) {
                (Some(loaded), Some(anchor)) => loaded.check(stream, &anchor)?,
                (None, Some(anchor)) => return Err(behind(stream, &anchor, describe(None))),
                (Some(_) | None, None) => {}
            }
            Ok(loaded)
        })?;
        let Some(loaded) = loaded else { return Ok(None) };
        // Whoever wrote to it meanwhile knows better.
        Ok(Some(self.lock().known.entry(stream.clone()).or_insert(loaded).clone()))
    }

    /// A stream that has a tree, whatever its anchor says.
    fn load(&self, stream: &StreamId) -> Result<Option<Stream>, BackendError> {
        self.store.find(stream)?.map(|tree| Stream::load(tree, stream)).transpose()
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
        self.lock().known.extend(staged);
        Ok(answers)
    }

    /// The last record that there is a trace of, be it the anchor's.
    pub fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        let (known, anchored) = {
            let streams = self.lock();
            (streams.known.get(stream).and_then(|s| s.head), streams.anchored.get(stream).copied())
        };
        if let Some(head) = known {
            return Ok(Some(head.seq));
        }
        let tree = self.store.find(stream)?;
        let end = tree.map(|tree| end_of(&tree, stream)).transpose()?.flatten();
        Ok(end.max(anchored.map(|anchor| anchor.seq)))
    }

    /// Sets a stream's anchor back to what is there, if that can be read.
    pub fn accept_loss(&self, stream: &StreamId) -> Result<(), BackendError> {
        let mut anchors = self.anchors();
        if self.lock().known.contains_key(stream) {
            return Ok(());
        }
        let head = match self.of(stream, || self.load(stream)) {
            Ok(found) => found.and_then(|found| found.head),
            // It stays refused until it is forgotten.
            Err(e) if e.is_damage() => return Ok(()),
            Err(e) => return Err(e),
        };
        let moved = match &head {
            Some(head) => anchors.set_back(stream, Anchor::of(head)),
            None => anchors.forget(stream),
        };
        moved.map_err(|e| BackendError::Poisoned(self.poison(format!("anchor: {e}"))))?;
        let mut streams = self.lock();
        match &head {
            Some(head) => streams.anchored.insert(stream.clone(), Anchor::of(head)),
            None => streams.anchored.remove(stream),
        };
        Ok(())
    }

    /// Takes a stream out, whatever state it is in: its anchor first, or what is left of it would be missed. What can be read of it
    /// is given to `keep` before.
    pub fn forget(
        &self,
        stream: &StreamId,
        keep: impl FnOnce(Kept<'_>) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut anchors = self.anchors();
        if let Some(tree) = self.store.find(stream)? {
            let end = end_of(&tree, stream)?.unwrap_or_default();
            let folded = guarded("reading", || tree.folded(stream).ok().flatten()).ok().flatten();
            keep(Kept { end, folded: folded.as_ref(), entries: &mut tree.salvage() })?;
        }
        let cleared = anchors.forget(stream).map_err(|e| format!("anchor: {e}"));
        let cleared = cleared.and_then(|()| self.store.empty(stream).map_err(|e| e.to_string()));
        let cleared = cleared.and_then(|()| self.store.sync());
        let mut streams = self.lock();
        streams.known.remove(stream);
        streams.anchored.remove(stream);
        streams.unreadable.remove(stream);
        cleared.map_err(|why| BackendError::Poisoned(self.poison(why)))
    }

    /// Puts one append. `Err`: sled failed, and nobody knows what it wrote. A stream that cannot be read is the affair of this append
    /// alone.
    fn stage(
        &self,
        staged: &mut BTreeMap<StreamId, Stream>,
        write: Write,
        stream_bytes_max: usize,
    ) -> Result<Result<(), AppendError>, String> {
        let Write { stream, expected, first, head, frames, cut } = write;
        let known = match staged.get(&stream) {
            Some(staged) => Some(staged.clone()),
            None => match self.stream(&stream) {
                Ok(known) => known,
                Err(e) => return Ok(Err(refused(e))),
            },
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
            let holding = match self.of(&stream, || next.tree.holding(keep)) {
                Ok(holding) => holding,
                Err(e) => return Ok(Err(refused(e))),
            };
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
            let Some(durable) = self.lock().known.get(id).filter(|durable| !durable.is_swept).cloned() else {
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
        let Some(durable) = self.lock().known.get(stream).filter(|s| !s.is_swept).cloned() else {
            return Ok(false);
        };
        let swept = durable.tree.sweep(durable.begin.0, MAINTAIN_CHUNKS_MAX);
        let swept = swept.and_then(|has_more| self.store.sync().map(|()| has_more));
        let has_more = swept.map_err(|why| BackendError::Poisoned(self.poison(why)))?;
        if let Some(known) = self.lock().known.get_mut(stream) {
            known.is_swept = !has_more;
        }
        Ok(has_more)
    }

    fn poison(&self, why: String) -> String {
        self.poisoned.get_or_init(|| why).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Streams> {
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
