//! The anchor of a stream: sequence, epoch and hash of the last acknowledged record, kept outside the store. A hash
//! chain shows every change but the loss of its end; the anchor shows that one, and the loss of the whole store.
//!
//! One file for all streams, so that appends of many share one sync. A stream has two slots, written in turn: a torn
//! write leaves the other slot, which is one append older. The file is written with zeros before it is used, so that a
//! sync has no metadata to write.

use crate::{
    backend::BackendError,
    record::{Hash, Head, StreamId},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use valkeeper_core::ids::{Seq, WriterEpoch};

/// Size of a slot in bytes: a sector of a disk, which is never torn. The longest line has 435.
const SLOT_BYTES: usize = 512;

/// Bytes of the two slots of a stream.
const PAIR_BYTES: usize = 2 * SLOT_BYTES;

/// Bytes of a stream's name as JSON. A UID has 38; more than this would not fit into a slot beside the rest.
const NAME_BYTES_MAX: usize = 256;

/// The file grows by this many pairs: 64 KiB, written in one go.
const GROWTH_PAIRS: u64 = 64;

/// Name of the file in the directory of anchors.
const FILE: &str = "slots";

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
}

#[derive(Serialize, Deserialize)]
struct Slot {
    stream: StreamId,
    #[serde(flatten)]
    anchor: Anchor,
    crc: u32,
}

impl Slot {
    fn of(stream: &StreamId, anchor: Anchor) -> Slot {
        Slot { stream: stream.clone(), anchor, crc: crc(stream, &anchor) }
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        if line.len() >= SLOT_BYTES {
            return Err(io::Error::other("an anchor does not fit into its slot"));
        }
        line.resize(SLOT_BYTES - 1, b' ');
        line.push(b'\n');
        Ok(line)
    }

    fn read(bytes: &[u8]) -> Option<Slot> {
        let slot: Slot = serde_json::from_slice(bytes).ok()?;
        (slot.crc == crc(&slot.stream, &slot.anchor)).then_some(slot)
    }
}

fn crc(stream: &StreamId, anchor: &Anchor) -> u32 {
    let Anchor { seq, epoch, hash } = anchor;
    crc32c::crc32c(format!("{seq} {epoch} {hash} {stream}").as_bytes())
}

/// True if the stream's name has room in a slot.
pub(crate) fn has_room(stream: &StreamId) -> bool {
    serde_json::to_string(stream).is_ok_and(|name| name.len() <= NAME_BYTES_MAX)
}

/// Where a stream's newest anchor is.
#[derive(Clone, Copy)]
struct Place {
    pair: u64,
    slot: u64,
}

/// The anchors beside a store.
pub(crate) struct Anchors {
    dir: PathBuf,
    /// Made with the first anchor.
    file: Option<File>,
    places: BTreeMap<StreamId, Place>,
    /// Pairs that the file has.
    pairs: u64,
    /// The next pair that no stream has.
    free: u64,
}

impl Anchors {
    /// `<store>.anchor`.
    pub fn dir(store: &Path) -> PathBuf {
        sibling(store, ".anchor")
    }

    /// Opens the anchors of a store, and says what they are.
    pub fn open(store: &Path) -> Result<(Anchors, Vec<(StreamId, Anchor)>), BackendError> {
        let dir = Anchors::dir(store);
        let path = dir.join(FILE);
        let mut anchors = Anchors { dir, file: None, places: BTreeMap::new(), pairs: 0, free: 0 };
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((anchors, Vec::new())),
            Err(e) => return Err(failed("open", &path)(e)),
        };
        as_on_disk(&file).map_err(failed("sync", &path))?;
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let mut found = Vec::new();
        for (bytes, pair) in bytes.chunks(PAIR_BYTES).zip(0..) {
            let damaged =
                |why: &str| BackendError::Corrupt(format!("anchor {pair} in {}: {why}", path.display()));
            if bytes.len() < PAIR_BYTES {
                return Err(damaged("the file ends in it"));
            }
            anchors.pairs = pair + 1;
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let (slot, Slot { stream, anchor, crc: _ }) =
                newest(bytes).ok_or_else(|| damaged("neither slot can be read"))?;
            anchors.free = pair + 1;
            if anchors.places.insert(stream.clone(), Place { pair, slot }).is_some() {
                return Err(damaged(&format!("stream {stream} has another one")));
            }
            found.push((stream, anchor));
        }
        anchors.file = Some(file);
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok((anchors, found))
    }

    /// Moves anchors; all durable when it returns.
    pub fn set(&mut self, moved: &[(StreamId, Anchor)]) -> io::Result<()> {
        let is_new = |stream: &StreamId| !self.places.contains_key(stream);
        let wanted = self.free + moved.iter().filter(|(stream, _)| is_new(stream)).count() as u64;
        if self.file.is_none() {
            self.file = Some(self.make()?);
        }
        let file = self.file.as_ref().ok_or_else(|| io::Error::other("there is no file of anchors"))?;
        if wanted > self.pairs {
            self.pairs = grow(file, self.pairs, wanted)?;
        }
        let mut places = Vec::with_capacity(moved.len());
        for (stream, anchor) in moved {
            let bytes = Slot::of(stream, *anchor).bytes()?;
            let place = match self.places.get(stream) {
                Some(Place { pair, slot }) => {
                    let place = Place { pair: *pair, slot: 1 - slot };
                    file.write_all_at(
                        &bytes,
                        place.pair * PAIR_BYTES as u64 + place.slot * SLOT_BYTES as u64,
                    )?;
                    place
                }
                None => {
                    let place = Place { pair: self.free, slot: 0 };
                    self.free += 1;
                    file.write_all_at(&bytes.repeat(2), place.pair * PAIR_BYTES as u64)?;
                    place
                }
            };
            places.push((stream.clone(), place));
        }
        file.sync_data()?;
        self.places.extend(places);
        Ok(())
    }

    /// Moves an anchor to what a person accepted, which may be less: in both slots, since the higher of two counts. Torn, it is
    /// as before.
    pub fn set_back(&mut self, stream: &StreamId, anchor: Anchor) -> io::Result<()> {
        let (Some(place), Some(file)) = (self.places.get_mut(stream), &self.file) else {
            return self.set(&[(stream.clone(), anchor)]);
        };
        file.write_all_at(&Slot::of(stream, anchor).bytes()?.repeat(2), place.pair * PAIR_BYTES as u64)?;
        file.sync_data()?;
        place.slot = 0;
        Ok(())
    }

    /// There is no such stream any more. Its place is not given to another.
    pub fn forget(&mut self, stream: &StreamId) -> io::Result<()> {
        if let (Some(place), Some(file)) = (self.places.remove(stream), &self.file) {
            file.write_all_at(&[0; PAIR_BYTES], place.pair * PAIR_BYTES as u64)?;
            file.sync_data()?;
        }
        Ok(())
    }

    fn make(&mut self) -> io::Result<File> {
        if !self.dir.exists() {
            fs::DirBuilder::new().mode(0o700).create(&self.dir)?;
            sync_dir(parent(&self.dir))?;
        }
        let (path, new) = (self.dir.join(FILE), self.dir.join(format!("{FILE}.new")));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        self.pairs = grow(&file, 0, 1)?;
        fs::rename(&new, &path)?;
        sync_dir(&self.dir)?;
        Ok(file)
    }
}

/// Adds zeros, so that there are at least `wanted` pairs. Returns how many there are.
fn grow(file: &File, pairs: u64, wanted: u64) -> io::Result<u64> {
    let grown = wanted.next_multiple_of(GROWTH_PAIRS);
    let zeros = vec![0; (grown - pairs) as usize * PAIR_BYTES];
    file.write_all_at(&zeros, pairs * PAIR_BYTES as u64)?;
    file.sync_all()?;
    Ok(grown)
}

fn newest(pair: &[u8]) -> Option<(u64, Slot)> {
    let slots = pair.chunks_exact(SLOT_BYTES).zip(0..);
    slots
        .filter_map(|(bytes, number)| Some((number, Slot::read(bytes)?)))
        .max_by_key(|(_, slot)| slot.anchor.seq)
}

/// A stream's name as part of a file's: anything but letters, digits and hyphens as `%xx`.
pub(crate) fn escape(stream: &StreamId) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    stream.0.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect()
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

/// Makes what is read from now on be what is on the disk: after a failed sync the kernel keeps pages that the disk does
/// not have, calls them clean, and would never write them; and it shows them to the next process, too.
pub(crate) fn as_on_disk(file: &File) -> io::Result<()> {
    file.sync_all()?;
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
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

    fn read(store: &Path) -> Vec<(StreamId, Anchor)> {
        Anchors::open(store).unwrap().1
    }

    #[test]
    fn a_forgotten_stream_has_no_anchor_and_takes_nobody_elses() {
        let scratch = Scratch::new("anchor-forgotten");
        let store = scratch.path("store");
        let (one, other) = (StreamId("one".to_owned()), StreamId("other".to_owned()));
        let (mut anchors, _) = Anchors::open(&store).unwrap();
        anchors.set(&[(one.clone(), anchor(5)), (other.clone(), anchor(6))]).unwrap();
        anchors.forget(&one).unwrap();
        assert_eq!(read(&store), [(other.clone(), anchor(6))]);
        anchors.set(&[(one.clone(), anchor(1)), (other.clone(), anchor(7))]).unwrap();
        assert_eq!(read(&store), [(one, anchor(1)), (other, anchor(7))]);
    }

    #[test]
    fn an_anchor_that_is_set_back_counts_also_after_the_next_one() {
        let scratch = Scratch::new("anchor-back");
        let store = scratch.path("store");
        let stream = StreamId("uid-1".to_owned());
        let (mut anchors, _) = Anchors::open(&store).unwrap();
        for seq in 8..=9 {
            anchors.set(&[(stream.clone(), anchor(seq))]).unwrap();
            anchors.set_back(&stream, anchor(3)).unwrap();
            assert_eq!(read(&store), [(stream.clone(), anchor(3))]);
            anchors.set(&[(stream.clone(), anchor(4))]).unwrap();
            assert_eq!(read(&store), [(stream.clone(), anchor(4))]);
        }
    }

    #[test]
    fn an_anchor_is_read_back_and_a_torn_slot_leaves_the_one_before() {
        let scratch = Scratch::new("anchor");
        let store = scratch.path("store");
        let (mut anchors, found) = Anchors::open(&store).unwrap();
        assert_eq!(found, []);
        let (stream, other) = (StreamId("../odd \"name\"%".to_owned()), StreamId("uid-2".to_owned()));
        anchors.set(&[(other.clone(), anchor(9))]).unwrap();
        for seq in 1..=5 {
            anchors.set(&[(stream.clone(), anchor(seq))]).unwrap();
            assert_eq!(read(&store), [(stream.clone(), anchor(seq)), (other.clone(), anchor(9))]);
        }
        let path = Anchors::dir(&store).join(FILE);
        let whole = fs::read(&path).unwrap();
        for position in PAIR_BYTES..PAIR_BYTES * 2 {
            let mut bytes = whole.clone();
            bytes[position] ^= 0x04;
            fs::write(&path, &bytes).unwrap();
            let found = read(&store);
            assert!(found[0].1 == anchor(5) || found[0].1 == anchor(4), "byte {position} gave {found:?}");
            assert_eq!(found[1], (other.clone(), anchor(9)));
        }
        let (mut anchors, _) = Anchors::open(&store).unwrap();
        anchors.set(&[(stream.clone(), anchor(6)), (other.clone(), anchor(10))]).unwrap();
        assert_eq!(read(&store), [(stream, anchor(6)), (other, anchor(10))]);
    }

    #[test]
    fn a_new_anchor_that_is_torn_after_its_first_slot_is_there() {
        let scratch = Scratch::new("anchor-torn");
        let store = scratch.path("store");
        let stream = StreamId("uid-1".to_owned());
        Anchors::open(&store).unwrap().0.set(&[(stream.clone(), anchor(1))]).unwrap();
        let path = Anchors::dir(&store).join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[SLOT_BYTES..PAIR_BYTES].fill(0);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&store), [(stream, anchor(1))]);
    }

    #[test]
    fn the_file_grows_and_every_stream_keeps_its_place() {
        let scratch = Scratch::new("anchor-many");
        let store = scratch.path("store");
        let (mut anchors, _) = Anchors::open(&store).unwrap();
        let all: Vec<_> = (0..200).map(|n| (StreamId(format!("uid-{n:03}")), anchor(n))).collect();
        for part in all.chunks(30) {
            anchors.set(part).unwrap();
        }
        assert_eq!(read(&store), all);
        let length = fs::metadata(Anchors::dir(&store).join(FILE)).unwrap().len();
        assert_eq!(length, 256 * PAIR_BYTES as u64);
        anchors.set(&all).unwrap();
        assert_eq!(fs::metadata(Anchors::dir(&store).join(FILE)).unwrap().len(), length);
    }

    #[test]
    fn an_anchor_without_a_readable_slot_or_with_two_places_is_refused() {
        let scratch = Scratch::new("anchor-bad");
        let store = scratch.path("store");
        let stream = StreamId("uid-1".to_owned());
        Anchors::open(&store).unwrap().0.set(&[(stream, anchor(1))]).unwrap();
        let path = Anchors::dir(&store).join(FILE);
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Anchors::open(&store).err().unwrap().to_string()
        };
        let mut bytes = whole.clone();
        bytes[..PAIR_BYTES].fill(b'x');
        assert!(refused(&bytes).contains("neither slot"));
        let mut bytes = whole.clone();
        bytes.copy_within(..PAIR_BYTES, PAIR_BYTES);
        assert!(refused(&bytes).contains("has another one"));
        assert!(refused(&whole[..whole.len() - 1]).contains("ends in it"));
    }

    #[test]
    fn the_longest_name_has_room_and_a_longer_one_does_not() {
        let name = |length: usize| StreamId("x".repeat(length));
        assert!(has_room(&name(NAME_BYTES_MAX - 2)) && !has_room(&name(NAME_BYTES_MAX - 1)));
        let longest = Anchor { seq: Seq(u64::MAX), epoch: WriterEpoch(u64::MAX), hash: Hash([0xff; 32]) };
        assert!(Slot::of(&name(NAME_BYTES_MAX - 2), longest).bytes().is_ok());
    }
}
