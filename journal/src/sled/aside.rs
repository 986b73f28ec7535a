//! What is kept of a stream that a person gave up: its frames as they were, in a file beside the store.

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
use valkeeper_core::ids::Seq;

/// Files of one stream with the same end: nobody gives the same thing up so often, and none of them takes the place of
/// another. Then a person has to clear up.
const SAME_END_MAX: u32 = 16;

/// Writes what `entries` hold to a file of its own, whole and durable, or leaves none. Nothing is written of nothing.
pub(super) fn keep(
    store: &Path,
    stream: &StreamId,
    last: Seq,
    entries: &mut dyn Iterator<Item = Vec<u8>>,
) -> Result<(), BackendError> {
    let Some(first) = entries.next() else { return Ok(()) };
    let (path, mut file) = make(&sibling(store, &format!(".aside-{}-{last}", escape(stream))))?;
    let mut frames = std::iter::once(first).chain(entries);
    let written = frames.try_for_each(|frames| file.write_all(&frames)).and_then(|()| file.sync_all());
    let kept = written.and_then(|()| sync_dir(parent(&path)));
    kept.map_err(|e| {
        // Half of it would take a place and say nothing.
        let _ = fs::remove_file(&path);
        failed("write", &path)(e)
    })
}

/// A new file, with a number behind its name if there is one already.
fn make(path: &Path) -> Result<(PathBuf, File), BackendError> {
    for number in 1..=SAME_END_MAX {
        let path = if number == 1 { path.to_owned() } else { sibling(path, &format!("-{number}")) };
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed("make", &path)(e)),
        }
    }
    Err(failed("make", path)(io::Error::other(format!("there are {SAME_END_MAX} of it already"))))
}
