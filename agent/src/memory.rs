//! The ledger's file. A change is on disk before anybody hears of it: written beside, synced, renamed, and the directory
//! synced.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};
use valkeeper_core::agent::Ledger;

/// Directory in the data directory.
const DIR: &str = "valkeeper";
/// The file in it.
const FILE: &str = "agent.json";
/// Largest file that is read, in bytes: a ledger with a hundred members has 2 KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where the ledger is kept.
#[derive(Clone, Debug)]
pub struct Memory {
    dir: PathBuf,
}

impl Memory {
    /// Opens the memory below the data directory and reads the ledger: a new one if there is none. A file that cannot be
    /// understood is an error: forgetting whom it has refused would be worse than not starting.
    pub fn open(data: &Path) -> io::Result<(Memory, Ledger)> {
        let memory = Memory { dir: data.join(DIR) };
        fs::create_dir_all(&memory.dir)?;
        File::open(data)?.sync_all()?;
        let path = memory.dir.join(FILE);
        let ledger = match fs::metadata(&path) {
            Ok(found) if found.len() > FILE_BYTES_MAX => {
                return Err(io::Error::other(format!("{} is too large", path.display())));
            }
            Ok(_) => serde_json::from_slice(&fs::read(&path)?)
                .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ledger::default(),
            Err(error) => return Err(error),
        };
        Ok((memory, ledger))
    }

    /// Writes the ledger. Blocks until it is on disk.
    pub fn write(&self, ledger: &Ledger) -> io::Result<()> {
        let temporary = self.dir.join(format!("{FILE}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(ledger)?)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(FILE))?;
        File::open(&self.dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::ids::WriterEpoch;

    #[test]
    fn what_was_written_is_read_and_rubbish_is_an_error() {
        let dir = std::env::temp_dir().join(format!("valkeeper-memory-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (memory, mut ledger) = Memory::open(&dir).unwrap();
        assert_eq!(ledger, Ledger::default());
        ledger.obey(WriterEpoch(7)).unwrap();
        memory.write(&ledger).unwrap();
        assert_eq!(Memory::open(&dir).unwrap().1, ledger);
        fs::write(dir.join(DIR).join(FILE), "{").unwrap();
        assert!(Memory::open(&dir).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
