//! Blobs in a directory: an archive that needs no bucket, and one that was copied from a bucket to be read offline. The
//! names are those of a bucket, so `aws s3 sync` and its like make the same tree.
//!
//! A file gets its name only when all of it is on the disk: it is written under a name that begins with a dot, synced and
//! linked; a link is refused if there is a file of that name. What a crash leaves begins with a dot and is never listed.

use super::blobs::{Blobs, BlobsError, LISTED_MAX, is_word};
use async_trait::async_trait;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// The store. Every call runs on a blocking thread of tokio's.
#[derive(Clone, Debug)]
pub struct DirectoryBlobs {
    root: PathBuf,
}

impl DirectoryBlobs {
    /// The store in a directory. It must be there at each call: one that was not mounted is no empty archive.
    pub fn new(root: impl Into<PathBuf>) -> DirectoryBlobs {
        DirectoryBlobs { root: root.into() }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, BlobsError> + Send + 'static,
    ) -> Result<T, BlobsError> {
        let root = self.root.clone();
        let job = tokio::task::spawn_blocking(move || {
            if !root.is_dir() {
                return Err(BlobsError::Unavailable(format!("{} is no directory", root.display())));
            }
            work(&root)
        });
        job.await.unwrap_or_else(|e| Err(BlobsError::Ambiguous(e.to_string())))
    }
}

#[async_trait]
impl Blobs for DirectoryBlobs {
    async fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
        let (name, bytes) = (checked(name)?.to_owned(), bytes.to_vec());
        self.run(move |root| put_new(root, &name, &bytes)).await
    }

    async fn get(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
        let name = checked(name)?.to_owned();
        self.run(move |root| get(&root.join(name), bytes_max)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobsError> {
        let below = prefix.strip_suffix('/').unwrap_or(prefix).to_owned();
        if !below.is_empty() {
            checked(&below)?;
        }
        self.run(move |root| list(root, below)).await
    }
}

/// A name that stays below the root.
fn checked(name: &str) -> Result<&str, BlobsError> {
    if name.split('/').all(is_word) {
        return Ok(name);
    }
    Err(BlobsError::Unavailable(format!("{name:?} is no name of a blob")))
}

fn failed(doing: &str, path: &Path, e: &io::Error) -> BlobsError {
    BlobsError::Unavailable(format!("cannot {doing} {}: {e}", path.display()))
}

fn put_new(root: &Path, name: &str, bytes: &[u8]) -> Result<(), BlobsError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let path = root.join(name);
    let folder = path.parent().unwrap_or(root);
    make_folder(root, folder).map_err(|e| failed("make", folder, &e))?;
    let unique = format!(".{}-{}.new", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let draft = folder.join(unique);
    let linked = write_synced(&draft, bytes)
        .map_err(|e| failed("write", &draft, &e))
        .and_then(|()| fs::hard_link(&draft, &path).map_err(|e| link_failed(&path, &e)));
    // The draft is gone or has its name. Its removal may fail: it is not listed, and nothing follows from it.
    let _ = fs::remove_file(&draft);
    linked?;
    // The name is there, but a power cut may take it away again.
    sync_folder(folder).map_err(|e| BlobsError::Ambiguous(format!("cannot sync {}: {e}", folder.display())))
}

fn link_failed(path: &Path, e: &io::Error) -> BlobsError {
    if e.kind() == ErrorKind::AlreadyExists { BlobsError::AlreadyExists } else { failed("link", path, e) }
}

/// Makes every missing folder between the root and this one, each with its name on the disk.
fn make_folder(root: &Path, folder: &Path) -> io::Result<()> {
    if folder == root || folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().unwrap_or(root);
    make_folder(root, parent)?;
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e),
        Ok(()) | Err(_) => sync_folder(parent),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn get(path: &Path, bytes_max: usize) -> Result<Option<Vec<u8>>, BlobsError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("read", path, &e)),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes).map_err(|e| failed("read", path, &e))?;
    if bytes.len() > bytes_max {
        return Err(BlobsError::TooLarge { max: bytes_max });
    }
    Ok(Some(bytes))
}

/// Names of the files below a folder. Links are not followed: they could lead in circles, or out.
fn list(root: &Path, below: String) -> Result<Vec<String>, BlobsError> {
    let mut open = vec![below];
    let mut names = Vec::new();
    while let Some(folder) = open.pop() {
        let path = root.join(&folder);
        let read = |e: io::Error| failed("list", &path, &e);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(read(e)),
        };
        for entry in entries {
            let entry = entry.map_err(read)?;
            let kind = entry.file_type().map_err(read)?;
            let word = entry.file_name().to_string_lossy().into_owned();
            if !is_word(&word) {
                continue;
            }
            let name = if folder.is_empty() { word } else { format!("{folder}/{word}") };
            if kind.is_dir() {
                open.push(name);
            } else if kind.is_file() {
                names.push(name);
            }
            if names.len() + open.len() > LISTED_MAX {
                return Err(BlobsError::Unavailable(format!("more than {LISTED_MAX} files")));
            }
        }
    }
    names.sort();
    Ok(names)
}
