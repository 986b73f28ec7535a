//! The ledger's file. A change is on disk before anybody hears of it. A promotion waits for it, so it is one write in place and one
//! sync of data, without a change of the file's size or name: two slots, written in turn, of which the newest that is whole counts.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use valkeeper_core::agent::{Ledger, Refusal};

/// Directory in the data directory.
const DIR: &str = "valkeeper";
/// The file in it: two lines of JSON, filled up with spaces.
const FILE: &str = "agent.json";
/// Bytes of a slot: a ledger with a hundred members has 2 KiB. Slots begin at a multiple of it, so no block is shared.
const SLOT_BYTES: usize = 16 * 1024;

/// Why the ledger did not change.
#[derive(Debug, thiserror::Error)]
pub enum Unchanged {
    /// A rule says so.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be written.
    #[error("the ledger cannot be written")]
    Unwritten(#[source] io::Error),
}

/// Where the ledger is kept.
#[derive(Clone, Debug)]
pub struct Memory {
    written: Arc<Mutex<Written>>,
}

#[derive(Debug)]
struct Written {
    file: File,
    /// Number of the newest slot.
    number: u64,
}

/// What a slot holds.
#[derive(Serialize, Deserialize)]
struct Slot {
    number: u64,
    /// As it was written: a later program's fields count in the sum, too.
    ledger: Value,
    /// Hex of the SHA-256 over number and ledger: half a write is none.
    sum: String,
}

impl Slot {
    fn new(number: u64, ledger: &Ledger) -> io::Result<Slot> {
        let ledger = serde_json::to_value(ledger)?;
        let sum = sum(number, &ledger)?;
        Ok(Slot { number, ledger, sum })
    }

    fn read(bytes: &[u8]) -> Option<Slot> {
        let slot: Slot = serde_json::from_slice(bytes.trim_ascii()).ok()?;
        (sum(slot.number, &slot.ledger).ok()? == slot.sum).then_some(slot)
    }
}

fn sum(number: u64, ledger: &Value) -> io::Result<String> {
    let bytes = serde_json::to_vec(&(number, ledger))?;
    Ok(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Memory {
    /// Opens the memory below the data directory and reads the ledger: a new one if there is none.
    ///
    /// # Errors
    /// The file system's. A file without a whole slot is an error, too: forgetting whom it has refused would be worse than not
    /// starting.
    pub fn open(data: &Path) -> io::Result<(Memory, Ledger)> {
        let dir = data.join(DIR);
        fs::create_dir_all(&dir)?;
        let path = dir.join(FILE);
        let is_new = !path.try_exists()?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut slots = vec![0; 2 * SLOT_BYTES];
        let found = file.read_at(&mut slots, 0)?;
        let whole = slots.chunks(SLOT_BYTES).filter_map(Slot::read).max_by_key(|slot| slot.number);
        let slot = match whole {
            Some(slot) => slot,
            // A file that was made and never written is as good as none.
            None if is_new || found == 0 => Slot::new(0, &Ledger::default())?,
            None => return Err(io::Error::other(format!("{}: neither slot is whole", path.display()))),
        };
        let ledger: Ledger = serde_json::from_value(slot.ledger)?;
        let memory = Memory { written: Arc::new(Mutex::new(Written { file, number: slot.number })) };
        if whole_size(found) {
            return Ok((memory, ledger));
        }
        // Once, so that later writes change neither size nor name.
        memory.write(&ledger)?;
        memory.write(&ledger)?;
        memory.written.lock().unwrap_or_else(PoisonError::into_inner).file.sync_all()?;
        for made in [dir.as_path(), data] {
            File::open(made)?.sync_all()?;
        }
        Ok((memory, ledger))
    }

    /// Writes the ledger. Blocks until it is on disk.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, ledger: &Ledger) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let number = written.number + 1;
        let mut bytes = serde_json::to_vec(&Slot::new(number, ledger)?)?;
        if bytes.len() >= SLOT_BYTES {
            return Err(io::Error::other(format!("a ledger of {} bytes has no room", bytes.len())));
        }
        bytes.resize(SLOT_BYTES - 1, b' ');
        bytes.push(b'\n');
        let at = if number.is_multiple_of(2) { 0 } else { SLOT_BYTES };
        written.file.write_all_at(&bytes, at as u64)?;
        written.file.sync_data()?;
        written.number = number;
        Ok(())
    }
}

fn whole_size(found: usize) -> bool {
    found == 2 * SLOT_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::ids::WriterEpoch;

    fn dir(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("valkeeper-memory-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn ledger(epoch: u64) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.obey(WriterEpoch(epoch)).unwrap();
        ledger
    }

    #[test]
    fn what_was_written_is_read_and_rubbish_is_an_error() {
        let dir = dir("whole");
        let (memory, first) = Memory::open(&dir).unwrap();
        assert_eq!(first, Ledger::default());
        for epoch in 1..=3 {
            memory.write(&ledger(epoch)).unwrap();
            assert_eq!(Memory::open(&dir).unwrap().1, ledger(epoch));
        }
        fs::write(dir.join(DIR).join(FILE), "{").unwrap();
        assert!(Memory::open(&dir).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn half_a_write_leaves_what_was_before() {
        let dir = dir("torn");
        let (memory, _) = Memory::open(&dir).unwrap();
        memory.write(&ledger(1)).unwrap();
        memory.write(&ledger(2)).unwrap();
        let path = dir.join(DIR).join(FILE);
        let whole = fs::read(&path).unwrap();
        for slot in [0, SLOT_BYTES] {
            let mut torn = whole.clone();
            torn[slot + 20] ^= 1;
            fs::write(&path, &torn).unwrap();
            let read = Memory::open(&dir).unwrap().1;
            assert!(read == ledger(1) || read == ledger(2));
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
