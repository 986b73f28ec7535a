//! An archive that was copied to a directory: a journal by itself, or what a store's journal lost of its beginning.

use super::{Stream, wait};
use crate::Error;
use std::{path::Path, sync::Arc};
use valkeeper_core::ids::Seq;
use valkeeper_journal::{
    Stored, StreamId, Whole,
    archive::{Archive, ArchiveError, DirectoryBlobs},
};

/// Reads every stream of the archive in `path`; none if it is no archive.
pub(super) fn load(path: &Path) -> Result<Vec<Stream>, Error> {
    let archive = Archive::new(Arc::new(DirectoryBlobs::new(path)));
    let streams = |ids: Vec<StreamId>| {
        ids.into_iter().map(|id| {
            let (records, trouble) = read(&archive, &id);
            let troubles = trouble.into_iter().chain(beginning_missing(&records)).collect();
            Stream::new(Some(&id), Whole { folded: None, records }, troubles)
        })
    };
    let ids = wait(archive.streams()).map_err(|why| refused(path, why))?;
    Ok(streams(ids).collect())
}

/// Puts the archived records before those of the store. What is in both must be the same, and nothing may be missing
/// between them: what is wrong becomes one of the stream's troubles. Errors: the archive cannot be read, or has nothing of
/// the stream.
pub fn join(stream: Stream, path: &Path) -> Result<Stream, Error> {
    let archive = Archive::new(Arc::new(DirectoryBlobs::new(path)));
    let (mut archived, trouble) = read(&archive, &StreamId(stream.uid.clone()));
    if archived.is_empty() {
        let why = trouble.unwrap_or_else(|| "no archive".to_owned());
        return Err(refused(path, format!("{why}: it has no record of {}", stream.title())));
    }
    let mut stream = stream;
    stream.troubles.extend(trouble);
    stream.troubles.extend(differing(&archived, &stream.stored));
    let Some(first) = stream.stored.first().map(|s| s.record.seq) else { return Ok(stream) };
    stream.troubles.extend(beyond(&archived, &stream.stored));
    if first == Seq(1) {
        return Ok(stream);
    }
    archived.retain(|s| s.record.seq < first);
    let (from, to) = (archived.first().map(|s| s.record.seq), archived.last().map(|s| s.record.seq));
    if from == Some(Seq(1)) && to.is_some_and(|to| to.next() == first) {
        return Ok(Stream { archived, ..stream });
    }
    let archived = match (from, to) {
        (Some(from), Some(to)) => format!("its records are {from} to {to}"),
        (_, _) => "it has none of them".to_owned(),
    };
    let before = Seq(first.0.saturating_sub(1));
    stream.troubles.push(format!("the archive does not hold records 1 to {before}: {archived}"));
    Ok(stream)
}

/// The records of a stream up to the first that cannot be believed, and why that cannot.
fn read(archive: &Archive, id: &StreamId) -> (Vec<Stored>, Option<String>) {
    let mut records = Vec::new();
    let reading = wait(async {
        let mut pages = archive.read(id).await?;
        while let Some(page) = pages.next().await? {
            records.extend(page);
        }
        Ok::<(), ArchiveError>(())
    });
    (records, reading.err().map(|why| format!("the archive: {why}")))
}

fn beginning_missing(records: &[Stored]) -> Option<String> {
    let first = records.first()?.record.seq;
    (first > Seq(1))
        .then(|| format!("the archive begins with record {first}: what was before it is not known"))
}

/// The first record that is in both and not the same.
fn differing(archived: &[Stored], stored: &[Stored]) -> Option<String> {
    let (first, start) = (stored.first()?.record.seq, archived.first()?.record.seq);
    let there = archived.iter().skip_while(|s| s.record.seq < first);
    let here = stored.iter().skip_while(|s| s.record.seq < start);
    let mut pairs = there.zip(here);
    let (there, _) = pairs.find(|(there, here)| there != here)?;
    Some(format!("record {} is another one in the archive than in the store", there.record.seq))
}

fn beyond(archived: &[Stored], stored: &[Stored]) -> Option<String> {
    let (last, end) = (archived.last()?.record.seq, stored.last()?.record.seq);
    (last > end)
        .then(|| format!("the store ends with record {end}, and the archive has records up to {last}"))
}

fn refused(path: &Path, why: String) -> Error {
    Error::NotAJournal { path: path.to_owned(), why }
}
