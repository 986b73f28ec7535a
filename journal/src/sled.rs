//! The backend in a local directory: sled 0.34.7, with what it lacks around it. The only file that knows sled.
//!
//! As it comes, sled's `flush()` does not reach the disk, a kill during open leaves a file that bricks the store, damage
//! panics, and a lost end is silent. So: an own handle syncs the data after every flush; half-made snapshots are removed
//! before open; open runs under `catch_unwind`; a damaged store is copied before it is touched; and an anchor outside
//! the store says where the end must be. Measured reasons are in docs/JOURNAL.md.
//!
//! Every call runs on a blocking thread: a sync may take seconds on a bad disk, and the lease must be renewed meanwhile.

use crate::{
    anchor::{Anchor, AnchorFile, Anchors, failed, parent, sibling, sync_dir},
    backend::{AppendError, Backend, BackendError},
    codec,
    record::{Head, RecordError, Stored, StreamId},
};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use valkeeper_core::ids::Seq;

/// Frames of one stream, in bytes: about 100 000 records, which are read in about half a second.
pub const STREAM_BYTES_MAX: usize = 64 * 1024 * 1024;

/// sled's page cache in bytes. Its default is 1 GiB; the journal is read once, at start.
const CACHE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Values are cut into chunks of this many bytes. A leaf holds up to 17, and sled moves a leaf of more than 128 KiB out
/// of its log into a file of its own, which is not covered by the handle that we sync.
const CHUNK_BYTES_MAX: usize = 4 * 1024;

/// Copies of damaged stores that are kept: enough to see whether it is the same damage. Then a person has to look.
const BROKEN_COPIES_MAX: u32 = 3;

/// How long to wait for sled's own lock while we hold ours: a handle of this process that was just dropped lets go of it
/// a moment later.
const SLED_LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Name of a stream's tree within the store.
const TREE_PREFIX: &str = "stream/";

/// The backend. Holds its directory's lock until it is dropped.
pub struct Sled {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    // Declared in the order in which they must be dropped: the store before the lock on it.
    streams: BTreeMap<StreamId, Open>,
    db: ::sled::Db,
    /// sled's data file, by a handle of our own: its sync is the only one that is one.
    data: File,
    anchors: Anchors,
    stream_bytes_max: usize,
    poisoned: Option<String>,
    _lock: File,
}

struct Open {
    tree: ::sled::Tree,
    head: Option<Head>,
    bytes: usize,
    anchor: Option<AnchorFile>,
}

impl Sled {
    /// Opens the store in `dir`, or makes it (its parent must exist), and compares it with its anchors. Blocks.
    ///
    /// # Errors
    /// [`BackendError::Locked`], [`BackendError::StoreMissing`], [`BackendError::BehindAnchor`],
    /// [`BackendError::Corrupt`] or [`BackendError::Io`].
    pub fn open(dir: &Path) -> Result<Sled, BackendError> {
        Sled::open_with_limit(dir, STREAM_BYTES_MAX)
    }

    /// As [`Sled::open`], with another limit for one stream, in bytes.
    ///
    /// # Errors
    /// As [`Sled::open`].
    pub fn open_with_limit(dir: &Path, stream_bytes_max: usize) -> Result<Sled, BackendError> {
        let lock = lock(dir)?;
        let anchors = Anchors::beside(dir);
        let anchored = anchors.read_all()?;
        prepare(dir, &anchors, &anchored)?;
        let db = open_store(dir)?;
        harden(dir)?;
        let path = dir.join("db");
        let data = OpenOptions::new().read(true).write(true).open(&path).map_err(failed("open", &path))?;
        let streams = BTreeMap::new();
        let mut inner = Inner { streams, db, data, anchors, stream_bytes_max, poisoned: None, _lock: lock };
        for (stream, anchor) in anchored {
            let checked = guarded("reading", || inner.check_anchor(&stream, &anchor));
            checked.map_err(BackendError::Corrupt)??;
        }
        Ok(Sled { inner: Arc::new(Mutex::new(inner)) })
    }

    /// Runs `work` on a thread that may block. `Err`: it panicked, or the runtime is shutting down.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Inner) -> T + Send + 'static,
    ) -> Result<T, String> {
        let inner = Arc::clone(&self.inner);
        let job = tokio::task::spawn_blocking(move || match inner.lock() {
            Ok(mut inner) => Ok(work(&mut inner)),
            Err(_) => Err("an earlier call panicked".to_owned()),
        });
        job.await.unwrap_or_else(|e| Err(e.to_string()))
    }

    async fn ask<T, F>(&self, work: F) -> Result<T, BackendError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Inner) -> Result<T, BackendError> + Send + 'static,
    {
        let checked = move |inner: &mut Inner| match &inner.poisoned {
            Some(why) => Err(BackendError::Poisoned(why.clone())),
            None => work(inner),
        };
        self.run(checked).await.unwrap_or_else(|why| Err(BackendError::Poisoned(why)))
    }
}

#[async_trait]
impl Backend for Sled {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        self.ask(|inner| {
            let mut streams = Vec::new();
            for stream in inner.names() {
                if inner.head(&stream)?.is_some() {
                    streams.push(stream);
                }
            }
            Ok(streams)
        })
        .await
    }

    async fn read(&self, stream: &StreamId) -> Result<Vec<Stored>, BackendError> {
        let stream = stream.clone();
        self.ask(move |inner| inner.read(&stream)).await
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        let stream = stream.clone();
        self.ask(move |inner| inner.head(&stream)).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
    ) -> Result<(), AppendError> {
        let frames: Vec<(Head, Vec<u8>)> = records.iter().map(|r| (r.head(), codec::encode(r))).collect();
        let (stream, expected) = (stream.clone(), expected.copied());
        let done = self.run(move |inner| inner.append(&stream, expected, &frames)).await;
        done.unwrap_or_else(|why| Err(AppendError::Poisoned(why)))
    }
}

impl Inner {
    fn names(&self) -> Vec<StreamId> {
        let id =
            |name: &::sled::IVec| Some(std::str::from_utf8(name).ok()?.strip_prefix(TREE_PREFIX)?.to_owned());
        let mut names: Vec<StreamId> = self.db.tree_names().iter().filter_map(id).map(StreamId).collect();
        names.sort();
        names
    }

    /// Where the stream ends. Opening a tree makes it, and a question must leave the store as it is.
    fn head(&mut self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        let known = self.streams.contains_key(stream) || self.names().contains(stream);
        if known { Ok(self.stream(stream)?.head) } else { Ok(None) }
    }

    /// The stream's tree and where it ends; looked up once, made if there is none.
    fn stream(&mut self, stream: &StreamId) -> Result<&mut Open, BackendError> {
        if !self.streams.contains_key(stream) {
            let tree = self.db.open_tree(format!("{TREE_PREFIX}{stream}")).map_err(broken)?;
            let (mut head, mut bytes) = (None, 0);
            for frame in frames(&tree) {
                let (_, frame) = frame?;
                bytes += frame.len();
                head = Some(frame);
            }
            let head = head.map(|frame| codec::decode(&frame)).transpose().map_err(bad_record(stream))?;
            let open = Open { tree, head: head.map(|stored| stored.head()), bytes, anchor: None };
            self.streams.insert(stream.clone(), open);
        }
        self.streams.get_mut(stream).ok_or_else(|| BackendError::Corrupt("a tree vanished".to_owned()))
    }

    fn read(&mut self, stream: &StreamId) -> Result<Vec<Stored>, BackendError> {
        let mut records = Vec::new();
        if self.head(stream)?.is_none() {
            return Ok(records);
        }
        let open = self.stream(stream)?;
        for frame in frames(&open.tree) {
            let (seq, frame) = frame?;
            let stored = codec::decode(&frame).map_err(bad_record(stream))?;
            if stored.record.seq != seq {
                let found = stored.record.seq;
                return Err(BackendError::Corrupt(format!(
                    "record {found} of stream {stream} is stored as {seq}"
                )));
            }
            records.push(stored);
        }
        Ok(records)
    }

    fn check_anchor(&mut self, stream: &StreamId, anchor: &Anchor) -> Result<(), BackendError> {
        let head = self.head(stream)?;
        let behind =
            |found: String| BackendError::BehindAnchor { stream: stream.clone(), found, anchor: anchor.seq };
        let Some(head) = head.filter(|head| head.seq >= anchor.seq) else {
            return Err(behind(crate::backend::describe(head.as_ref())));
        };
        if head.seq == anchor.seq && head.hash == anchor.hash {
            return Ok(());
        }
        // The head may be ahead by the one append that was not acknowledged; the anchor's record must be in it.
        let anchored = self.read(stream)?.into_iter().find(|stored| stored.record.seq == anchor.seq);
        match anchored {
            Some(stored) if stored.hash == anchor.hash => Ok(()),
            Some(stored) => Err(behind(format!("another record {} ({})", anchor.seq, stored.hash))),
            None => Err(behind(format!("no record {}", anchor.seq))),
        }
    }

    fn append(
        &mut self,
        stream: &StreamId,
        expected: Option<Head>,
        records: &[(Head, Vec<u8>)],
    ) -> Result<(), AppendError> {
        if let Some(why) = &self.poisoned {
            return Err(AppendError::Poisoned(why.clone()));
        }
        let max = self.stream_bytes_max;
        let open = self.stream(stream).map_err(|e| AppendError::Poisoned(e.to_string()))?;
        if open.head != expected {
            return Err(AppendError::Conflict { actual: open.head });
        }
        let bytes = open.bytes + records.iter().map(|(_, frame)| frame.len()).sum::<usize>();
        if bytes > max {
            return Err(AppendError::Full { bytes, max });
        }
        let Some((head, _)) = records.last() else { return Ok(()) };
        match self.write(stream, records, *head) {
            Ok(()) => {
                let open = self.stream(stream).map_err(|e| AppendError::Poisoned(e.to_string()))?;
                (open.head, open.bytes) = (Some(*head), bytes);
                Ok(())
            }
            Err(why) => {
                // After a failed sync the kernel calls the pages clean: a second sync would succeed and mean nothing.
                self.poisoned = Some(why.clone());
                Err(AppendError::Poisoned(why))
            }
        }
    }

    /// One durable write: a batch, sled's flush, our sync, the anchor.
    fn write(&mut self, stream: &StreamId, records: &[(Head, Vec<u8>)], head: Head) -> Result<(), String> {
        let mut batch = ::sled::Batch::default();
        for (head, frame) in records {
            for (chunk, number) in frame.chunks(CHUNK_BYTES_MAX).zip(0u16..) {
                batch.insert(key(head.seq, number).as_slice(), chunk);
            }
        }
        let open = self.streams.get_mut(stream).ok_or("the stream is not open")?;
        open.tree.apply_batch(batch).map_err(|e| format!("insert: {e}"))?;
        open.tree.flush().map_err(|e| format!("flush: {e}"))?;
        self.data.sync_data().map_err(|e| format!("fdatasync: {e}"))?;
        let anchor = Anchor::of(&head);
        let moved = match &mut open.anchor {
            Some(file) => file.set(anchor),
            None => self.anchors.open(stream, anchor).and_then(|mut file| {
                file.set(anchor)?;
                open.anchor = Some(file);
                Ok(())
            }),
        };
        moved.map_err(|e| format!("anchor: {e}"))
    }
}

fn key(seq: Seq, chunk: u16) -> [u8; 10] {
    let mut key = [0; 10];
    let (high, low) = key.split_at_mut(8);
    high.copy_from_slice(&seq.0.to_be_bytes());
    low.copy_from_slice(&chunk.to_be_bytes());
    key
}

/// Frames of a tree, put together from their chunks, each under its sequence.
fn frames(tree: &::sled::Tree) -> impl Iterator<Item = Result<(Seq, Vec<u8>), BackendError>> {
    let mut chunks = tree.iter().peekable();
    std::iter::from_fn(move || {
        let (first, chunk) = match chunks.next()? {
            Ok(pair) => pair,
            Err(e) => return Some(Err(broken(e))),
        };
        let Some(seq) = first.first_chunk::<8>().map(|bytes| Seq(u64::from_be_bytes(*bytes))) else {
            return Some(Err(BackendError::Corrupt("a key is too short".to_owned())));
        };
        let mut frame = chunk.to_vec();
        let same = |next: &::sled::Result<(::sled::IVec, ::sled::IVec)>| {
            next.as_ref().is_ok_and(|(key, _)| key.get(..8) == first.get(..8))
        };
        while let Some(Ok((_, chunk))) = chunks.next_if(same) {
            frame.extend_from_slice(&chunk);
        }
        Some(Ok((seq, frame)))
    })
}

fn bad_record(stream: &StreamId) -> impl Fn(RecordError) -> BackendError + '_ {
    move |source| BackendError::Record { stream: stream.clone(), source }
}

fn broken(e: ::sled::Error) -> BackendError {
    BackendError::Corrupt(e.to_string())
}

/// Our own lock, beside the store: it must be held before anything in the store is touched, and sled takes its own late.
fn lock(dir: &Path) -> Result<File, BackendError> {
    let path = sibling(dir, ".lock");
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = opened.map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BackendError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(e)) => Err(failed("lock", &path)(e)),
    }
}

/// Makes the directory if this is a new store, and removes what a kill during open leaves.
fn prepare(dir: &Path, anchors: &Anchors, anchored: &[(StreamId, Anchor)]) -> Result<(), BackendError> {
    if !dir.join("db").exists() && !anchored.is_empty() {
        return Err(BackendError::StoreMissing { dir: dir.to_owned(), anchor: anchors.dir().to_owned() });
    }
    if !dir.exists() {
        fs::DirBuilder::new().mode(0o700).create(dir).map_err(failed("make", dir))?;
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed("protect", dir))?;
    for path in snapshots(dir)? {
        if path.extension().is_some_and(|e| e == "generating") {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

fn snapshots(dir: &Path) -> Result<Vec<PathBuf>, BackendError> {
    let entries = fs::read_dir(dir).map_err(failed("read", dir))?;
    let paths: Vec<PathBuf> =
        entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(failed("read", dir))?;
    let is_snapshot =
        |p: &PathBuf| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("snap."));
    Ok(paths.into_iter().filter(is_snapshot).collect())
}

/// Opens sled. If it finds damage: a copy first, then once more without its snapshots, which rescans the whole log.
/// What comes of it still has to pass the anchors and the chain.
fn open_store(dir: &Path) -> Result<::sled::Db, BackendError> {
    let why = match try_open(dir)? {
        Ok(db) => return Ok(db),
        Err(why) => why,
    };
    let copy =
        copy_broken(dir).map_err(|e| BackendError::Corrupt(format!("{why}; no copy could be made: {e}")))?;
    for path in snapshots(dir)? {
        fs::remove_file(&path).map_err(failed("remove", &path))?;
    }
    try_open(dir)?.map_err(|again| {
        let copy = copy.display();
        BackendError::Corrupt(format!(
            "{why}; without its snapshots: {again}; a copy of the first state is in {copy}"
        ))
    })
}

/// `Ok(Err(why))`: damaged.
fn try_open(dir: &Path) -> Result<Result<::sled::Db, String>, BackendError> {
    // No background flusher: it would swallow the error of a sync, and nothing here waits for it.
    let config = ::sled::Config::new().path(dir).cache_capacity(CACHE_BYTES_MAX).flush_every_ms(None);
    let deadline = Instant::now() + SLED_LOCK_WAIT_MAX;
    loop {
        match guarded("opening", || config.open()) {
            Err(panic) => return Ok(Err(panic)),
            Ok(Ok(db)) => return Ok(Ok(db)),
            Ok(Err(::sled::Error::Io(e))) if e.to_string().contains("could not acquire lock") => {
                if Instant::now() >= deadline {
                    return Err(BackendError::Locked { dir: dir.to_owned() });
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            // Damage in a snapshot is reported in this way; a full or unreadable disk has other kinds.
            Ok(Err(::sled::Error::Io(e))) if is_damage(e.kind()) => return Ok(Err(e.to_string())),
            Ok(Err(::sled::Error::Io(e))) => return Err(failed("open", dir)(e)),
            Ok(Err(
                e @ (::sled::Error::Corruption { .. }
                | ::sled::Error::CollectionNotFound(_)
                | ::sled::Error::Unsupported(_)
                | ::sled::Error::ReportableBug(_)),
            )) => return Ok(Err(e.to_string())),
        }
    }
}

fn is_damage(kind: io::ErrorKind) -> bool {
    [io::ErrorKind::InvalidData, io::ErrorKind::UnexpectedEof, io::ErrorKind::Other].contains(&kind)
}

/// sled panics on damage that it did not expect.
fn guarded<T>(verb: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        format!("panic while {verb} the store: {text}")
    })
}

/// sled's recovery cuts off what it cannot read, so what was there is kept.
fn copy_broken(dir: &Path) -> io::Result<PathBuf> {
    let free =
        (1..=BROKEN_COPIES_MAX).map(|n| sibling(dir, &format!(".broken-{n}"))).find(|path| !path.exists());
    let copy = free.ok_or_else(|| io::Error::other(format!("there are {BROKEN_COPIES_MAX} already")))?;
    copy_dir(dir, &copy)?;
    sync_dir(parent(dir))?;
    Ok(copy)
}

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
            File::open(&target)?.sync_all()?;
        }
    }
    sync_dir(to)
}

/// Everything that a power cut may not take: files, directory, its entry in the parent. And nobody else reads it.
fn harden(dir: &Path) -> Result<(), BackendError> {
    for name in ["db", "conf"] {
        let path = dir.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed("protect", &path))?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(failed("sync", &path))?;
    }
    sync_dir(dir).map_err(failed("sync", dir))?;
    sync_dir(parent(dir)).map_err(failed("sync", parent(dir)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        journal::{Error, Journal},
        testing::{Scratch, one_of_each},
    };
    use valkeeper_core::ids::Timestamp;

    #[tokio::test]
    async fn a_failed_sync_poisons_until_reopen_and_what_was_acknowledged_is_there() {
        let scratch = Scratch::new("poison");
        let dir = scratch.path("journal");
        let stream = StreamId("uid-1".to_owned());
        let events = one_of_each();
        let backend = Arc::new(Sled::open(&dir).unwrap());
        let (mut journal, _) = Journal::open(backend.clone(), stream.clone()).await.unwrap();
        journal.claim(Some(events[0].clone()), "w", "v", Timestamp(1)).await.unwrap();
        let real = {
            let mut inner = backend.inner.lock().unwrap();
            // fdatasync of a device that cannot be synced fails, as a bad disk does.
            std::mem::replace(&mut inner.data, File::open("/dev/null").unwrap())
        };
        let failed = journal.append(vec![events[2].clone()], Timestamp(2)).await.unwrap_err();
        assert!(matches!(failed, Error::Poisoned(_)) && failed.is_broken(), "{failed:?}");
        // The disk works again; the handle is not to be believed all the same.
        backend.inner.lock().unwrap().data = real;
        let again = Journal::open(backend.clone(), stream.clone()).await.err().unwrap();
        assert!(matches!(again, Error::Backend(BackendError::Poisoned(_))), "{again:?}");
        drop((journal, backend));
        let backend = Arc::new(Sled::open(&dir).unwrap());
        let (_, records) = Journal::open(backend, stream).await.unwrap();
        assert!(records.len() >= 2);
    }
}
