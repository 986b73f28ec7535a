//! What is kept of a stream that a person gave up: its frames as they were, in a file beside the store, and what it began
//! with in another.

use super::live::Kept;
use crate::{
    anchor::{escape, failed, parent, sibling, sync_dir},
    backend::BackendError,
    record::StreamId,
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Files of one stream with the same end: nobody gives the same thing up so often, and none of them takes the place of
/// another. Then a person has to clear up.
const SAME_END_MAX: u32 = 16;

/// Behind the name of the file with what the stream began with.
const FOLDED_SUFFIX: &str = ".folded";

/// Writes what is left of a stream to files of its own, whole and durable, or leaves none. Nothing is written of nothing.
pub(super) fn keep(store: &Path, stream: &StreamId, kept: Kept<'_>) -> Result<(), BackendError> {
    let Kept { end, folded, entries } = kept;
    let mut entries = entries.peekable();
    if entries.peek().is_none() && folded.is_none() {
        return Ok(());
    }
    let (path, file) = make(&sibling(store, &format!(".aside-{}-{end}", escape(stream))))?;
    let beginning = sibling(&path, FOLDED_SUFFIX);
    let written = fill(file, entries).and_then(|()| match folded {
        Some(folded) => fill(create(&beginning)?, std::iter::once(folded.text().as_bytes().to_vec())),
        None => Ok(()),
    });
    written.and_then(|()| sync_dir(parent(&path))).map_err(|e| {
        // Half of it would take a place and say nothing.
        for half in [&path, &beginning] {
            let _ = fs::remove_file(half);
        }
        failed("write", &path)(e)
    })
}

fn fill(mut file: File, mut parts: impl Iterator<Item = Vec<u8>>) -> io::Result<()> {
    parts.try_for_each(|part| file.write_all(&part))?;
    file.sync_all()
}

/// A new file, with a number behind its name if there is one already.
fn make(path: &Path) -> Result<(PathBuf, File), BackendError> {
    for number in 1..=SAME_END_MAX {
        let path = if number == 1 { path.to_owned() } else { sibling(path, &format!("-{number}")) };
        if sibling(&path, FOLDED_SUFFIX).exists() {
            continue;
        }
        match create(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed("make", &path)(e)),
        }
    }
    Err(failed("make", path)(io::Error::other(format!("there are {SAME_END_MAX} of it already"))))
}

/// Never one that is there.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}
