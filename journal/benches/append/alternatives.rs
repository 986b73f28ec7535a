//! The same bytes without this project: a bare file, a file that was written before, redb, and sled as it comes.

use super::{APPENDS, Samples, timed};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
};

/// The measure of everything: a write at the end of a file, and fdatasync.
pub fn bare(path: &Path, batch: usize) -> Samples {
    let mut file = File::create(path).unwrap();
    timed(APPENDS, batch, |frames| {
        file.write_all(&frames).unwrap();
        file.sync_data().unwrap();
    })
}

/// A file full of zeros.
fn zeros(path: &Path, bytes: usize) -> File {
    fs::write(path, vec![0; bytes]).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.sync_all().unwrap();
    file
}

/// A segment file that has its size from the beginning: what is written does not make it longer.
pub fn written_ahead(path: &Path, batch: usize) -> Samples {
    let file = zeros(path, 16 << 20);
    let mut at = 0;
    timed(APPENDS, batch, |frames| {
        file.write_all_at(&frames, at).unwrap();
        file.sync_data().unwrap();
        at += frames.len() as u64;
    })
}

/// The same with an anchor in another file, synced after it: what sled is given here.
pub fn anchored(path: &Path, batch: usize) -> Samples {
    let (file, anchor) = (zeros(path, 16 << 20), zeros(&path.with_extension("anchor"), 1 << 16));
    let mut at = 0;
    timed(APPENDS, batch, |frames| {
        file.write_all_at(&frames, at).unwrap();
        file.sync_data().unwrap();
        at += frames.len() as u64;
        anchor.write_all_at(&[7; 512], at % 2 * 512).unwrap();
        anchor.sync_data().unwrap();
    })
}

/// redb with its durable commit; one value for each append.
pub fn redb(path: &Path, batch: usize) -> Samples {
    const FRAMES: redb::TableDefinition<u64, &[u8]> = redb::TableDefinition::new("frames");
    let db = redb::Database::create(path).unwrap();
    let mut next = 0;
    timed(APPENDS, batch, |frames| {
        next += 1;
        let write = db.begin_write().unwrap();
        write.open_table(FRAMES).unwrap().insert(next, frames.as_slice()).unwrap();
        write.commit().unwrap();
    })
}

/// What one gets by trusting `flush()`: the same bytes, without sync and anchor.
pub fn sled_plain(path: &Path, batch: usize) -> Samples {
    let db = sled::Config::new().path(path).flush_every_ms(None).open().unwrap();
    let mut next = 0u64;
    timed(APPENDS, batch, |frames| {
        next += 1;
        db.insert(next.to_be_bytes(), frames).unwrap();
        db.flush().unwrap();
    })
}
