//! A directory: a sled store or an archive. Opening sled writes (locks, recovery, repairs), so a copy is opened: what is looked at stays as it
//! is, even if it is damaged or in use.

use super::{Stream, archive, wait};
use crate::Error;
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use valkeeper_journal::{Backend, BackendError, Sled, read_all};

/// What sled calls its data and its settings; without them a directory is something else.
const STORE_FILES: [&str; 2] = ["db", "conf"];
/// Ending of the directory of anchors beside a store.
const ANCHOR_SUFFIX: &str = ".anchor";

/// Reads the streams of the store in `path`, compared with the anchors beside it.
pub(super) fn load(path: &Path) -> Result<Vec<Stream>, Error> {
    let not_a_journal = |why: String| Error::NotAJournal { path: path.to_owned(), why };
    if !STORE_FILES.iter().all(|name| path.join(name).is_file()) {
        let archived = archive::load(path)?;
        if archived.is_empty() {
            let files = STORE_FILES.join(" and ");
            return Err(not_a_journal(format!("no sled store: it has no {files}; and no archive's segment")));
        }
        return Ok(archived);
    }
    let failed = |source: io::Error| Error::Read { path: path.to_owned(), source };
    let anchors = beside(path, ANCHOR_SUFFIX);
    let copied = || -> io::Result<Copy> {
        let copy = Copy::new(path)?;
        if anchors.is_dir() {
            copy_dir(&anchors, &beside(&copy.store(), ANCHOR_SUFFIX))?;
        }
        Ok(copy)
    };
    let copy = copied().map_err(failed)?;
    let anchored = anchors.is_dir().then(|| anchors.display().to_string());
    let trouble = match read(&copy.store()) {
        Ok(streams) => {
            return Ok(streams.into_iter().map(|s| Stream { anchored: anchored.clone(), ..s }).collect());
        }
        Err(why) => why,
    };
    // Refused: what an operator must not continue, a person may still read. From a fresh copy, without the anchors.
    let copy = Copy::new(path).map_err(failed)?;
    match read(&copy.store()) {
        Ok(streams) if !streams.is_empty() => {
            Ok(streams.into_iter().map(|s| Stream { troubles: vec![trouble.clone()], ..s }).collect())
        }
        Ok(_) | Err(_) => Err(not_a_journal(trouble)),
    }
}

fn read(store: &Path) -> Result<Vec<Stream>, String> {
    wait(async {
        let sled = Sled::open(store)?;
        let mut streams = Vec::new();
        for id in sled.streams().await? {
            let whole = read_all(&sled, &id).await?;
            streams.push(Stream::new(Some(&id), whole, Vec::new()));
        }
        Ok::<_, BackendError>(streams)
    })
}

/// A copy of a store in the directory for temporary files, deleted in the end.
struct Copy(PathBuf);

impl Copy {
    fn new(store: &Path) -> io::Result<Copy> {
        let copy = Copy(private_dir()?);
        copy_dir(store, &copy.store())?;
        Ok(copy)
    }

    fn store(&self) -> PathBuf {
        self.0.join("store")
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left behind costs space in a directory for temporary files, no more.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Numbers tried for a new directory: each is taken only by another copy of this process, or by what a killed one of the
/// same id left.
const NAMES_MAX: u32 = 1_000;

/// A new directory that nobody else can read or have prepared.
fn private_dir() -> io::Result<PathBuf> {
    for number in 0..NAMES_MAX {
        let path = std::env::temp_dir().join(format!("valkeeper-replay-{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("no free name for a copy in the directory for temporary files"))
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
        }
    }
    Ok(())
}

/// `/var/lib/valkeeper/` with `.anchor` is `/var/lib/valkeeper.anchor`.
fn beside(store: &Path, suffix: &str) -> PathBuf {
    let mut name = store.components().as_path().as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        source::testing::cut_after_first_page,
        story::{self, sealed},
        verify::verify,
    };
    use valkeeper_core::event::Record;
    use valkeeper_journal::{Stored, StreamId};

    /// A store with the records, in a directory of its own.
    fn store(records: &[Record]) -> Copy {
        let made = Copy(private_dir().unwrap());
        wait(async {
            let sled = Sled::open(&made.store())?;
            sled.append(&StreamId("5f0c1d2e-uid".into()), None, &sealed(records), None).await.unwrap();
            Ok::<(), BackendError>(())
        })
        .unwrap();
        made
    }

    fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path))
            } else {
                found.push((path.clone(), fs::read(path).unwrap()))
            }
        }
        found.sort();
        found
    }

    #[test]
    fn a_store_is_read_with_its_anchor_and_not_touched() {
        let records = story::failover();
        let made = store(&records);
        let before = files(&made.0);
        let streams = load(&made.store()).unwrap();
        assert_eq!((streams.len(), streams[0].history().records().to_vec()), (1, records));
        assert_eq!(streams[0].troubles.len(), 0);
        assert!(streams[0].anchored.as_ref().is_some_and(|path| path.ends_with("store.anchor")));
        assert_eq!(files(&made.0), before);
    }

    #[test]
    fn a_store_behind_its_anchor_is_read_and_said_to_be() {
        let records = story::failover();
        let (whole, short) = (store(&records), store(&records[..20]));
        let anchors = beside(&short.store(), ANCHOR_SUFFIX);
        fs::remove_dir_all(&anchors).unwrap();
        copy_dir(&beside(&whole.store(), ANCHOR_SUFFIX), &anchors).unwrap();
        let streams = load(&short.store()).unwrap();
        assert_eq!(streams[0].stored.len(), 20);
        let trouble = streams[0].troubles.concat();
        assert!(trouble.contains("acknowledged records are missing"), "{trouble}");
    }

    #[test]
    fn another_directory_is_refused_and_left_alone() {
        let made = Copy(private_dir().unwrap());
        let error = load(&made.0).unwrap_err().to_string();
        assert!(error.contains("no sled store: it has no db and conf"), "{error}");
        assert_eq!(files(&made.0), []);
    }

    #[test]
    fn a_store_that_was_cut_begins_with_what_its_beginning_folds_to() {
        let id = StreamId("5f0c1d2e-uid".into());
        let made = Copy(private_dir().unwrap());
        let left = wait(async {
            let sled = Sled::open(&made.store())?;
            let mut head = None;
            // Large enough for more than one page.
            let mut book = story::adopted();
            for round in 0..2_000_u16 {
                book.add(i64::from(round) * 1_000 + 20, story::pod(round % 3));
            }
            for batch in sealed(&book.0).chunks(100) {
                sled.append(&id, head.as_ref(), batch, None).await.unwrap();
                head = batch.last().map(Stored::head);
            }
            cut_after_first_page(&sled, &id).await
        });
        let left = left.unwrap();
        assert!(left.records.len() > 1, "there were several pages");
        let streams = load(&made.store()).unwrap();
        assert_eq!((&streams[0].folded, &streams[0].stored), (&left.folded, &left.records));
        assert_eq!(streams[0].title(), "demo/orders (uid 5f0c1d2e-uid)");
        assert_eq!(verify(&streams[0], None).problems, [""; 0]);
    }
}
