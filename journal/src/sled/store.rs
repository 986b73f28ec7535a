//! The only file that knows sled 0.34.7: how it is opened, what lies in it, and what it lacks.
//!
//! As it comes, sled's `flush()` does not reach the disk, a kill during open leaves a file that bricks the store, and
//! damage panics. So: an own handle syncs the data after every flush; half-made snapshots are removed before open; open
//! runs under `catch_unwind`; and a damaged store is copied before it is touched. Measured reasons are in docs/JOURNAL.md.
//!
//! A stream is a tree. An append is one *entry* under the sequence of its first record: the bytes of all appends before
//! it, then its frames. An entry in one chunk is one insertion, which sled recovers whole or not at all; larger ones, and
//! cuts, are a sled batch, which costs two more writes. What a cut stream begins with lies under sequence 0.
//!
//! A tree that cannot even be emptied is left behind: its stream goes on in another, of the next generation.

use crate::{
    anchor::{as_on_disk, failed, parent, sibling, sync_dir},
    backend::BackendError,
    folded::{FOLDED_KEPT_BYTES_MAX, Folded, FoldedError},
    record::{BATCH_BYTES_MAX, StreamId},
};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use valkeeper_core::ids::Seq;

/// sled's page cache in bytes. Its default is 1 GiB; the journal is read once, at start.
const CACHE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Largest value. A leaf holds up to 17, and sled moves a leaf of more than 128 KiB out of its log into a file of its own,
/// which is not covered by the handle that we sync.
const VALUE_BYTES_MAX: usize = 6 * 1024;

/// Larger values are cut into chunks of this many bytes: a leaf of them has a third of the largest, and sled holds up to some
/// thousand leaves while a long stream is read. See [`Tree::evict`].
const CHUNK_BYTES: usize = 2 * 1024;

/// Bytes before the frames of an entry: how many bytes the entries before it have.
const OFFSET_BYTES: usize = 8;

/// Bytes before the text of a fold: its length and CRC32C of both.
const FOLDED_HEADER_BYTES: usize = 8;

/// sled's segment: what it allocates at once, and the unit in which it reuses its file.
const SEGMENT_BYTES: u64 = 512 * 1024;

/// The file is written with zeros this far ahead. A sync of bytes within the file is a third of one that makes it longer,
/// for which the filesystem commits its own journal. Two segments: 5 ms of writing once per about 1 000 appends.
const AHEAD_BYTES: u64 = 2 * SEGMENT_BYTES;

/// Copies of damaged stores that are kept: enough to see whether it is the same damage. Then a person has to look.
const BROKEN_COPIES_MAX: u32 = 3;

/// How long to wait for our lock: a process that is just being started by this one holds a copy of everything that is open
/// until it has become another program.
const LOCK_WAIT_MAX: Duration = Duration::from_millis(250);

/// How long to wait for sled's own lock while we hold ours: a handle of this process that was just dropped lets go of it
/// a moment later.
const SLED_LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// What the name of a stream's tree begins with, before its generation (none for the first), a slash and the stream.
const TREE_PREFIX: &str = "stream";

/// Under this, in no stream's tree, lies the number of the last trial.
const TRIAL_KEY: &str = "trial";

/// Entries that cannot be read and are passed over while a stream is kept aside. sled answers for a damaged page again and
/// again with the same error, so there must be an end; a person with a tool has not made more holes than this.
const HOLES_MAX: u32 = 16;

/// An open store.
pub(super) struct Store {
    db: ::sled::Db,
    /// sled's data file, by a handle of our own: its sync is the only one that is one.
    data: Mutex<Data>,
    /// The newest generation of each stream's tree.
    trees: Mutex<BTreeMap<StreamId, u32>>,
}

struct Data {
    file: File,
    /// End of what was written with zeros.
    ahead_bytes: u64,
}

impl Store {
    /// Opens the store in `dir`, which exists. What comes of damage still has to pass the anchors and the chain.
    pub fn open(dir: &Path) -> Result<Store, BackendError> {
        let path = dir.join("db");
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        if path.exists() {
            open(&path).and_then(|file| as_on_disk(&file)).map_err(failed("sync", &path))?;
        }
        let db = open_sled(dir)?;
        harden(dir)?;
        let file = open(&path).map_err(failed("open", &path))?;
        let (data, trees) = (Mutex::new(Data { file, ahead_bytes: 0 }), Mutex::new(generations(&db)));
        Ok(Store { db, data, trees })
    }

    /// Every stream that has a tree, in order of its name.
    pub fn names(&self) -> Vec<StreamId> {
        self.trees().keys().cloned().collect()
    }

    /// The tree of a stream, if it has one: opening one makes it.
    pub fn find(&self, stream: &StreamId) -> Result<Option<Tree>, BackendError> {
        let generation = self.trees().get(stream).copied();
        generation.map(|generation| self.open_tree(stream, generation)).transpose()
    }

    /// The tree of a stream; made if there is none.
    pub fn tree(&self, stream: &StreamId) -> Result<Tree, BackendError> {
        let generation = self.trees().get(stream).copied();
        self.open_tree(stream, generation.unwrap_or_default())
    }

    /// Takes everything out of a stream's tree; if it cannot even be emptied, the stream gets another. Not durable before
    /// [`Store::sync`].
    pub fn empty(&self, stream: &StreamId) -> Result<(), BackendError> {
        let Some(generation) = self.trees().get(stream).copied() else { return Ok(()) };
        let cleared = guarded("reading", || self.open_tree(stream, generation)?.0.clear().map_err(broken));
        match cleared {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) if !e.is_damage() => Err(e),
            Ok(Err(_)) | Err(_) => self.renew(stream, generation),
        }
    }

    /// Gives a stream another tree than that of this generation.
    pub fn renew(&self, stream: &StreamId, generation: u32) -> Result<(), BackendError> {
        self.open_tree(stream, generation.saturating_add(1)).map(drop)
    }

    /// Writes a number that was not written before, beside all streams.
    pub fn begin_trial(&self) -> Result<u64, BackendError> {
        let write = || -> Result<u64, BackendError> {
            let number = self.trial()?.map_or(1, |last| last.wrapping_add(1));
            self.db.insert(TRIAL_KEY, &number.to_le_bytes()).map_err(broken)?;
            let synced = self.sync().map_err(io::Error::other);
            synced.map_err(|source| BackendError::Io { what: "cannot sync the store".to_owned(), source })?;
            Ok(number)
        };
        guarded("trying", write).map_err(BackendError::Corrupt)?
    }

    /// True if the number is still there.
    pub fn ends_trial(&self, number: u64) -> bool {
        guarded("trying", || self.trial())
            .is_ok_and(|found| matches!(found, Ok(Some(found)) if found == number))
    }

    fn trial(&self) -> Result<Option<u64>, BackendError> {
        let found = self.db.get(TRIAL_KEY).map_err(broken)?;
        Ok(found.and_then(|value| Some(u64::from_le_bytes(*value.first_chunk()?))))
    }

    fn open_tree(&self, stream: &StreamId, generation: u32) -> Result<Tree, BackendError> {
        let number = if generation == 0 { String::new() } else { format!(".{generation}") };
        let tree = self.db.open_tree(format!("{TREE_PREFIX}{number}/{stream}")).map(Tree).map_err(broken)?;
        self.trees().insert(stream.clone(), generation);
        Ok(tree)
    }

    fn trees(&self) -> MutexGuard<'_, BTreeMap<StreamId, u32>> {
        // Nothing in here leaves it half-changed.
        self.trees.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything that was put durable.
    pub fn sync(&self) -> Result<(), String> {
        self.db.flush().map_err(|e| format!("flush: {e}"))?;
        self.data().file.sync_data().map_err(|e| format!("fdatasync: {e}"))
    }

    /// Writes zeros behind the end of the file, if sled has reached it. To be called when nobody else puts or removes anything:
    /// then sled writes nothing once it is flushed, and it looks at the file's length only when it opens.
    pub fn write_ahead(&self) -> Result<(), String> {
        let mut data = self.data();
        let length = data.file.metadata().map_err(|e| format!("metadata: {e}"))?.len();
        if length == data.ahead_bytes {
            return Ok(());
        }
        self.db.flush().map_err(|e| format!("flush: {e}"))?;
        data.extend().map_err(|e| format!("writing ahead: {e}"))
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        // Nothing in here leaves it half-changed.
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every sync go to another file; returns the one before.
    #[cfg(test)]
    pub fn swap_data(&self, file: File) -> File {
        let mut data = self.data();
        data.ahead_bytes = file.metadata().unwrap().len();
        std::mem::replace(&mut data.file, file)
    }
}

/// The newest generation of each stream's tree.
fn generations(db: &::sled::Db) -> BTreeMap<StreamId, u32> {
    let mut newest = BTreeMap::new();
    for name in db.tree_names() {
        if let Some((stream, generation)) = std::str::from_utf8(&name).ok().and_then(parse_name) {
            let known = newest.entry(stream).or_insert(generation);
            *known = generation.max(*known);
        }
    }
    newest
}

/// The stream of a tree, and which generation of it.
fn parse_name(name: &str) -> Option<(StreamId, u32)> {
    let (number, stream) = name.strip_prefix(TREE_PREFIX)?.split_once('/')?;
    let generation = if number.is_empty() { 0 } else { number.strip_prefix('.')?.parse().ok()? };
    Some((StreamId(stream.to_owned()), generation))
}

impl Data {
    fn extend(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let end = length.next_multiple_of(SEGMENT_BYTES) + AHEAD_BYTES;
        match self.file.write_all_at(&vec![0; (end - length) as usize], length) {
            Ok(()) => {}
            // What is to be appended may still fit.
            Err(e) if e.kind() == io::ErrorKind::StorageFull => {}
            Err(e) => return Err(e),
        }
        self.file.sync_data()?;
        self.ahead_bytes = self.file.metadata()?.len();
        Ok(())
    }
}

/// What one append wrote.
pub(super) struct Entry {
    /// Sequence of its first record.
    pub first: Seq,
    /// Bytes of all entries before it.
    pub offset: u64,
    /// Its frames.
    pub frames: Vec<u8>,
}

/// The tree of a stream.
#[derive(Clone)]
pub(super) struct Tree(::sled::Tree);

impl Tree {
    /// The last entry.
    pub fn last(&self) -> Result<Option<Entry>, BackendError> {
        let Some((key, _)) = self.0.last().map_err(broken)? else { return Ok(None) };
        match parse_key(&key)? {
            (Seq(0), _) => Ok(None),
            (first, _) => self.entries(first, first).next().transpose(),
        }
    }

    /// The entry that holds record `seq`, if there is one: the last that begins at or before it.
    pub fn holding(&self, seq: Seq) -> Result<Option<Entry>, BackendError> {
        let keys = key(Seq(1), 0)..=key(seq, u16::MAX);
        let Some(found) = self.0.range(keys).next_back() else { return Ok(None) };
        let (first, _) = parse_key(&found.map_err(broken)?.0)?;
        self.entries(first, first).next().transpose()
    }

    /// The entries that begin within these sequences.
    pub fn entries(&self, from: Seq, to: Seq) -> impl Iterator<Item = Result<Entry, BackendError>> {
        let mut chunks = self.0.range(key(from, 0)..=key(to, u16::MAX)).peekable();
        std::iter::from_fn(move || {
            let (head, chunk) = match chunks.next()? {
                Ok(pair) => pair,
                Err(e) => return Some(Err(broken(e))),
            };
            self.evict(&head);
            let mut value = chunk.to_vec();
            let same = |next: &::sled::Result<(::sled::IVec, ::sled::IVec)>| {
                next.as_ref().is_ok_and(|(key, _)| key.get(..8) == head.get(..8))
            };
            while let Some(Ok((key, chunk))) = chunks.next_if(same) {
                self.evict(&key);
                value.extend_from_slice(&chunk);
            }
            Some(parse_key(&head).and_then(|(first, _)| {
                let (offset, frames) = value.split_first_chunk::<OFFSET_BYTES>().ok_or_else(too_short)?;
                Ok(Entry { first, offset: u64::from_le_bytes(*offset), frames: frames.to_vec() })
            }))
        })
    }

    /// Lets sled look whether its cache is too large. It does so in each of the 256 parts of it after 64 reads, and going through a
    /// leaf is one read, so that 16 000 leaves would stay; with one more read of each value, about a thousand do.
    fn evict(&self, key: &[u8]) {
        // What it answers is of no interest: the value was just read.
        let _ = self.0.contains_key(key);
    }

    /// What the stream begins with, if it was cut.
    pub fn folded(&self, stream: &StreamId) -> Result<Option<Folded>, BackendError> {
        let mut value = Vec::new();
        for chunk in self.0.range(key(Seq(0), 0)..key(Seq(1), 0)) {
            value.extend_from_slice(&chunk.map_err(broken)?.1);
        }
        if value.is_empty() {
            return Ok(None);
        }
        let bad = |source: FoldedError| BackendError::Folded { stream: stream.clone(), source };
        let kept = unframe(&value).ok_or_else(|| FoldedError::Malformed("its checksum is wrong".to_owned()));
        let folded = kept.and_then(Folded::parse_kept).map_err(bad)?;
        if folded.stream() != stream {
            let why = format!("it is the beginning of stream {}", folded.stream());
            return Err(bad(FoldedError::Malformed(why)));
        }
        Ok(Some(folded))
    }

    /// Adds an entry, and with it what the stream begins with from then on. Not durable before [`Store::sync`].
    pub fn put(&self, entry: &Entry, folded: Option<&Folded>) -> Result<(), String> {
        let Entry { first, offset, frames } = entry;
        let value = [&offset.to_le_bytes()[..], frames].concat();
        if folded.is_none() && value.len() <= VALUE_BYTES_MAX {
            return self.0.insert(key(*first, 0), value).map(drop).map_err(|e| format!("insert: {e}"));
        }
        let mut batch = ::sled::Batch::default();
        for (chunk, number) in value.chunks(CHUNK_BYTES).zip(0..) {
            batch.insert(key(*first, number).as_slice(), chunk);
        }
        if let Some(folded) = folded {
            for old in self.0.range(key(Seq(0), 0)..key(Seq(1), 0)).keys() {
                batch.remove(old.map_err(|e| format!("read: {e}"))?);
            }
            for (chunk, number) in frame(&folded.kept()).chunks(CHUNK_BYTES).zip(0..) {
                batch.insert(key(Seq(0), number).as_slice(), chunk);
            }
        }
        self.0.apply_batch(batch).map_err(|e| format!("insert: {e}"))
    }

    /// The frames of every entry that can be read, as they are, for what is kept aside.
    pub fn salvage(&self) -> impl Iterator<Item = Vec<u8>> {
        let mut entries = self.entries(Seq(1), Seq(u64::MAX));
        let mut holes = 0;
        std::iter::from_fn(move || {
            while holes < HOLES_MAX {
                match guarded("reading", || entries.next()) {
                    Ok(Some(Ok(entry))) => return Some(entry.frames),
                    Ok(Some(Err(_))) => holes += 1,
                    Ok(None) | Err(_) => holes = HOLES_MAX,
                }
            }
            None
        })
    }

    /// Removes up to `chunks_max` chunks of entries before `first`. True if there may be more. What was cut and cannot be read
    /// stays: nobody asks for it.
    pub fn sweep(&self, first: Seq, chunks_max: usize) -> Result<bool, String> {
        let old = self.0.range(key(Seq(1), 0)..key(first, 0)).keys().take(chunks_max);
        let old: Vec<::sled::IVec> = old.map_while(Result::ok).collect();
        for key in &old {
            self.0.remove(key).map_err(|e| format!("remove: {e}"))?;
        }
        Ok(old.len() == chunks_max)
    }
}

fn key(seq: Seq, chunk: u16) -> [u8; 10] {
    let mut key = [0; 10];
    let (high, low) = key.split_at_mut(8);
    high.copy_from_slice(&seq.0.to_be_bytes());
    low.copy_from_slice(&chunk.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Result<(Seq, u16), BackendError> {
    match key {
        [a, b, c, d, e, f, g, h, high, low] => {
            let seq = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            Ok((Seq(seq), u16::from_be_bytes([*high, *low])))
        }
        _ => Err(BackendError::Corrupt("a key has another length".to_owned())),
    }
}

// A chunk's number is a u16: neither a batch nor a fold has so many.
const _: () = assert!((BATCH_BYTES_MAX + FOLDED_KEPT_BYTES_MAX) / CHUNK_BYTES < u16::MAX as usize);

fn frame(kept: &[u8]) -> Vec<u8> {
    let length = (kept.len() as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&length), kept).to_le_bytes();
    [&length[..], &crc, kept].concat()
}

fn unframe(value: &[u8]) -> Option<&[u8]> {
    let (header, kept) = value.split_first_chunk::<FOLDED_HEADER_BYTES>()?;
    let (length, crc) = header.split_first_chunk::<4>()?;
    let found = crc32c::crc32c_append(crc32c::crc32c(length), kept).to_le_bytes();
    (u32::from_le_bytes(*length) as usize == kept.len() && found == crc).then_some(kept)
}

fn too_short() -> BackendError {
    BackendError::Corrupt("a value is too short".to_owned())
}

/// What cannot be read now may be read later; everything else is damage.
fn broken(e: ::sled::Error) -> BackendError {
    match e {
        ::sled::Error::Io(source) if !is_damage(source.kind()) => {
            BackendError::Io { what: "cannot read the store".to_owned(), source }
        }
        ::sled::Error::Io(_)
        | ::sled::Error::Corruption { .. }
        | ::sled::Error::CollectionNotFound(_)
        | ::sled::Error::Unsupported(_)
        | ::sled::Error::ReportableBug(_) => BackendError::Corrupt(e.to_string()),
    }
}

/// Our own lock, beside the store: it must be held before anything in the store is touched, and sled takes its own late.
pub(super) fn lock(dir: &Path) -> Result<File, BackendError> {
    let path = sibling(dir, ".lock");
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = opened.map_err(failed("open", &path))?;
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => return Err(BackendError::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(failed("lock", &path)(e)),
        }
    }
}

/// Makes the directory if there is none, and removes what a kill during open leaves.
pub(super) fn prepare(dir: &Path) -> Result<(), BackendError> {
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
fn open_sled(dir: &Path) -> Result<::sled::Db, BackendError> {
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
pub(super) fn guarded<T>(verb: &str, work: impl FnOnce() -> T) -> Result<T, String> {
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
