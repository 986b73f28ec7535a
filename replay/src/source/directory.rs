//! A directory: a sled store or an archive. Opening sled writes (locks, recovery, repairs), so a copy is opened: what is looked at stays as it
//! is, even if it is damaged or in use.

use super::{Stream, archive, said, wait};
use crate::Error;
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use valkeeper_journal::{Backend, BackendError, Sled, StreamId, Whole};

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
    let compared = read(&copy.store());
    if let Ok(streams) = &compared
        && streams.iter().all(|(_, stream)| stream.troubles.is_empty())
    {
        return Ok(streams.iter().map(|(_, s)| Stream { anchored: anchored.clone(), ..s.clone() }).collect());
    }
    // Refused: what an operator must not continue, a person may still read. From a fresh copy, without the anchors.
    let copy = Copy::new(path).map_err(failed)?;
    let readable = read(&copy.store());
    let streams: Vec<Stream> = match (compared, readable) {
        (Ok(compared), readable) => joined(compared, readable.unwrap_or_default(), anchored.as_ref()),
        (Err(trouble), Ok(readable)) if !readable.is_empty() => readable
            .into_iter()
            .map(|(_, mut stream)| {
                stream.troubles.insert(0, trouble.clone());
                stream
            })
            .collect(),
        (Err(trouble), Ok(_) | Err(_)) => return Err(not_a_journal(trouble)),
    };
    if streams.iter().all(|stream| stream.stored.is_empty()) {
        let troubles: Vec<String> = streams.into_iter().flat_map(|stream| stream.troubles).collect();
        return Err(not_a_journal(troubles.join("; ")));
    }
    Ok(streams)
}

/// The streams that hold what their anchors say, and of each other one what can be read without them.
fn joined(
    compared: Vec<(StreamId, Stream)>,
    mut readable: Vec<(StreamId, Stream)>,
    anchored: Option<&String>,
) -> Vec<Stream> {
    let join = |(id, stream): (StreamId, Stream)| {
        if stream.troubles.is_empty() {
            return Stream { anchored: anchored.cloned(), ..stream };
        }
        let Some(found) = readable.iter().position(|(other, _)| *other == id) else { return stream };
        let mut troubles = stream.troubles;
        let (_, stream) = readable.swap_remove(found);
        troubles.extend(stream.troubles);
        troubles.dedup();
        Stream { troubles, ..stream }
    };
    compared.into_iter().map(join).collect()
}

/// Reads every stream, as far as it goes.
fn read(store: &Path) -> Result<Vec<(StreamId, Stream)>, String> {
    wait(async {
        let sled = Sled::open(store)?;
        let mut streams = Vec::new();
        for id in sled.streams().await? {
            let mut whole = Whole::default();
            let troubles = match read_into(&sled, &id, &mut whole).await {
                Ok(()) => Vec::new(),
                Err(error) => vec![said(&error)],
            };
            let stream = Stream::new(Some(&id), whole, troubles);
            streams.push((id, stream));
        }
        Ok::<_, BackendError>(streams)
    })
}

/// Adds what can be read of a stream, also if it ends in an error. Nobody else writes to a copy.
async fn read_into(sled: &Sled, id: &StreamId, whole: &mut Whole) -> Result<(), BackendError> {
    let mut reader = sled.read(id).await?;
    whole.folded = reader.folded().cloned();
    while let Some(page) = reader.page().await? {
        whole.records.extend(page.records);
    }
    Ok(())
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
    use valkeeper_journal::Stored;

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
    fn one_stream_that_cannot_be_read_hides_no_other() {
        let records = story::failover();
        let made = store(&records);
        let (behind, gone) = (StreamId("behind".into()), StreamId("gone".into()));
        let (kept, anchors) = (beside(&made.store(), ".kept"), beside(&made.store(), ANCHOR_SUFFIX));
        let append = |id: StreamId, from: usize, to: usize| {
            let all = sealed(&records);
            wait(async {
                let sled = Sled::open(&made.store())?;
                let head = from.checked_sub(1).map(|last| all[last].head());
                sled.append(&id, head.as_ref(), &all[from..to], None).await.unwrap();
                Ok::<(), BackendError>(())
            })
            .unwrap();
        };
        append(behind.clone(), 0, 10);
        copy_dir(&made.store(), &kept).unwrap();
        append(behind, 10, 20);
        append(gone, 0, 5);
        fs::remove_dir_all(made.store()).unwrap();
        fs::rename(&kept, made.store()).unwrap();
        let streams = load(&made.store()).unwrap();
        assert!(anchors.is_dir());
        let found: Vec<_> =
            streams.iter().map(|s| (s.stored.len(), s.troubles.len(), s.anchored.is_some())).collect();
        assert_eq!(found, [(records.len(), 0, true), (10, 1, false), (0, 1, false)]);
        for stream in &streams[1..] {
            let trouble = stream.troubles.concat();
            assert!(trouble.contains("acknowledged records are missing"), "{trouble}");
            assert!(verify(stream, None).problems.concat().contains(&trouble));
        }
        assert_eq!(verify(&streams[0], None).problems, [""; 0]);
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
