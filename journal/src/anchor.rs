//! The anchor of a stream: sequence, epoch and hash of the last acknowledged record, kept outside the store. A hash
//! chain shows every change but the loss of its end; the anchor shows that one, and the loss of the whole store.
//!
//! One small file per stream with two slots, written in turn and synced: a torn write leaves the other slot, which is
//! one append older.

use crate::{
    backend::BackendError,
    record::{Hash, Head, StreamId},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use valkeeper_core::ids::{Seq, WriterEpoch};

/// Size of a slot in bytes: the longest line is 163, and half a disk sector is never torn.
const SLOT_BYTES: usize = 256;

/// An anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Anchor {
    pub seq: Seq,
    pub epoch: WriterEpoch,
    pub hash: Hash,
}

impl Anchor {
    pub fn of(head: &Head) -> Anchor {
        let Head { seq, epoch, time: _, hash } = *head;
        Anchor { seq, epoch, hash }
    }

    fn crc(&self) -> u32 {
        crc32c::crc32c(format!("{} {} {}", self.seq, self.epoch, self.hash).as_bytes())
    }

    fn slot(self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&Slot { anchor: self, crc: self.crc() })?;
        line.resize(SLOT_BYTES - 1, b' ');
        line.push(b'\n');
        Ok(line)
    }
}

#[derive(Serialize, Deserialize)]
struct Slot {
    #[serde(flatten)]
    anchor: Anchor,
    crc: u32,
}

/// The directory of anchors beside a store.
pub(crate) struct Anchors {
    dir: PathBuf,
}

impl Anchors {
    /// `<store>.anchor`; made with the first anchor.
    pub fn beside(store: &Path) -> Anchors {
        Anchors { dir: sibling(store, ".anchor") }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every anchor there is.
    pub fn read_all(&self) -> Result<Vec<(StreamId, Anchor)>, BackendError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed("read", &self.dir)(e)),
        };
        let mut anchors = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed("read", &self.dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            // What a crash left of an anchor that was being made: its stream has no anchor yet.
            if name.ends_with(".new") {
                continue;
            }
            let damaged = |why: &str| BackendError::Corrupt(format!("anchor {}: {why}", path.display()));
            let stream = unescape(name).ok_or_else(|| damaged("its name is not a stream's"))?;
            let bytes = fs::read(&path).map_err(failed("read", &path))?;
            let anchor = newest(&bytes).ok_or_else(|| damaged("neither slot can be read"))?;
            anchors.push((stream, anchor.1));
        }
        anchors.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(anchors)
    }

    /// Opens the anchor of a stream for writing; makes it with `first` if there is none.
    pub fn open(&self, stream: &StreamId, first: Anchor) -> io::Result<AnchorFile> {
        let path = self.dir.join(escape(stream));
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => {
                let slot = newest(&fs::read(&path)?).map_or(0, |(slot, _)| slot);
                Ok(AnchorFile { file, slot })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.make(&path, first),
            Err(e) => Err(e),
        }
    }

    fn make(&self, path: &Path, first: Anchor) -> io::Result<AnchorFile> {
        if !self.dir.exists() {
            fs::DirBuilder::new().mode(0o700).create(&self.dir)?;
            sync_dir(parent(&self.dir))?;
        }
        let new = sibling(path, ".new");
        let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let mut file = options?;
        file.write_all(&first.slot()?.repeat(2))?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_dir(&self.dir)?;
        Ok(AnchorFile { file, slot: 0 })
    }
}

/// An anchor that is being moved forward.
pub(crate) struct AnchorFile {
    file: File,
    /// The slot with the newest anchor.
    slot: u64,
}

impl AnchorFile {
    /// Moves the anchor; durable when it returns.
    pub fn set(&mut self, anchor: Anchor) -> io::Result<()> {
        let slot = 1 - self.slot;
        self.file.write_all_at(&anchor.slot()?, slot * SLOT_BYTES as u64)?;
        self.file.sync_data()?;
        self.slot = slot;
        Ok(())
    }
}

fn newest(bytes: &[u8]) -> Option<(u64, Anchor)> {
    let slots = bytes.chunks_exact(SLOT_BYTES).take(2).zip(0..);
    let read = |(slot, number): (&[u8], u64)| {
        let Slot { anchor, crc } = serde_json::from_slice(slot).ok()?;
        (crc == anchor.crc()).then_some((number, anchor))
    };
    slots.filter_map(read).max_by_key(|(_, anchor)| anchor.seq)
}

/// A file name from which the stream can be read back: anything but letters, digits and hyphens as `%xx`.
fn escape(stream: &StreamId) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    stream.0.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect()
}

fn unescape(name: &str) -> Option<StreamId> {
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let (hex, tail) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok().map(StreamId)
}

/// The path with `suffix` added to its last part.
pub(crate) fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

pub(crate) fn failed<'a>(verb: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> BackendError + 'a {
    move |source| BackendError::Io { what: format!("cannot {verb} {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn anchor(seq: u64) -> Anchor {
        Anchor { seq: Seq(seq), epoch: WriterEpoch(u64::MAX), hash: Hash([7; 32]) }
    }

    #[test]
    fn an_anchor_is_read_back_and_a_torn_slot_leaves_the_one_before() {
        let scratch = Scratch::new("anchor");
        let anchors = Anchors::beside(&scratch.path("store"));
        let stream = StreamId("../odd name%".to_owned());
        let mut file = anchors.open(&stream, anchor(1)).unwrap();
        for seq in 2..=5 {
            file.set(anchor(seq)).unwrap();
            assert_eq!(anchors.read_all().unwrap(), [(stream.clone(), anchor(seq))]);
        }
        let path = fs::read_dir(anchors.dir()).unwrap().next().unwrap().unwrap().path();
        let whole = fs::read(&path).unwrap();
        for position in 0..SLOT_BYTES * 2 {
            let mut bytes = whole.clone();
            bytes[position] ^= 0x04;
            fs::write(&path, &bytes).unwrap();
            let (_, found) = anchors.read_all().unwrap().remove(0);
            assert!(found == anchor(5) || found == anchor(4), "byte {position} gave {found:?}");
        }
        let mut reopened = anchors.open(&stream, anchor(1)).unwrap();
        reopened.set(anchor(6)).unwrap();
        assert_eq!(anchors.read_all().unwrap(), [(stream, anchor(6))]);
    }

    #[test]
    fn an_anchor_without_a_readable_slot_is_refused() {
        let scratch = Scratch::new("anchor-bad");
        let anchors = Anchors::beside(&scratch.path("store"));
        fs::create_dir(anchors.dir()).unwrap();
        fs::write(anchors.dir().join("uid-1"), vec![0; SLOT_BYTES * 2]).unwrap();
        assert!(anchors.read_all().unwrap_err().to_string().contains("neither slot"));
    }
}
