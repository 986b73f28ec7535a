//! An archive that was copied to a directory: a journal by itself, or what a store's journal lost of its beginning.
//!
//! After a loss that a person accepted a stream is of another lineage, and the archive has each lineage by itself. What is read is one of
//! them, with what led to it in those before; the others are named and left alone.

use super::{Stream, wait};
use crate::Error;
use std::{path::Path, sync::Arc};
use valkeeper_core::ids::Seq;
use valkeeper_journal::{
    Folded, Hash, Lineage, Stored, StreamId, Whole,
    archive::{Archive, ArchiveError, Branch, DirectoryBlobs},
};

/// Reads every stream of the archive in `path`, each lineage by itself; none if it is no archive.
pub(super) fn load(path: &Path) -> Result<Vec<Stream>, Error> {
    let all = Lineages::read(path, |_| true).map_err(|why| refused(path, why))?;
    let streams = all.0.iter().map(|Archived { branch, records, trouble }| {
        let mut records = records.clone();
        all.lead_to(branch, &mut records);
        let troubles = trouble.iter().cloned().chain(beginning_missing(&records)).collect();
        let stream = Stream::new(Some(&branch.stream), Whole { folded: None, records }, troubles);
        Stream { lineage: Some(branch.lineage), other_lineages: all.others(branch), ..stream }
    });
    Ok(streams.collect())
}

/// Puts the archived records before those of the store. What is in both must be the same, and nothing may be missing
/// between them: what is wrong becomes one of the stream's troubles. Errors: the archive cannot be read, or has nothing of
/// the stream.
pub fn join(stream: Stream, path: &Path) -> Result<Stream, Error> {
    let id = StreamId(stream.uid.clone());
    let all = Lineages::read(path, |branch| branch.stream == id).map_err(|why| refused(path, why))?;
    let start = stream.folded.as_ref().map_or(Lineage::FIRST, Folded::lineage);
    let start = Branch { stream: id, lineage: start };
    let runs = start.runs(&stream.stored);
    let end = runs.last().map_or_else(|| start.clone(), |(branch, _)| branch.clone());
    let (mut archived, troubles) = all.along(&start, &runs);
    if all.0.iter().all(|archived| archived.records.is_empty()) {
        let why = troubles.first().map_or("no archive", String::as_str);
        return Err(refused(path, format!("{why}: it has no record of {}", stream.title())));
    }
    let mut stream = Stream { other_lineages: all.others(&end), ..stream };
    stream.troubles.extend(troubles);
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

/// What the archive has of one lineage.
struct Archived {
    branch: Branch,
    /// Records up to the first that cannot be believed.
    records: Vec<Stored>,
    /// Why that cannot.
    trouble: Option<String>,
}

/// What the archive has of some streams, a stream's first lineage before its others.
struct Lineages(Vec<Archived>);

impl Lineages {
    fn read(path: &Path, is_wanted: impl Fn(&Branch) -> bool) -> Result<Lineages, String> {
        let archive = Archive::new(Arc::new(DirectoryBlobs::new(path)));
        let branches = wait(archive.branches())?.into_iter().filter(is_wanted);
        Ok(Lineages(branches.map(|branch| read(&archive, branch)).collect()))
    }

    fn of(&self, branch: &Branch) -> Option<&Archived> {
        self.0.iter().find(|archived| archived.branch == *branch)
    }

    /// The archived records of the lineages that a store's records are of, one after the other, with what led to the first of them; and what
    /// is wrong with them.
    fn along(&self, start: &Branch, runs: &[(Branch, &[Stored])]) -> (Vec<Stored>, Vec<String>) {
        let begun = runs.iter().filter_map(|(branch, run)| Some((branch, run.first()?.record.seq)));
        let mut path: Vec<(&Branch, Seq)> = begun.collect();
        if path.first().is_none_or(|(branch, _)| *branch != start) {
            path.insert(0, (start, Seq(0)));
        }
        let ends = path.iter().skip(1).map(|(_, first)| *first).chain([Seq(u64::MAX)]);
        let (mut records, mut troubles) = (Vec::new(), Vec::new());
        for ((branch, _), end) in path.iter().zip(ends) {
            let Some(Archived { branch: _, records: all, trouble }) = self.of(branch) else { continue };
            records.extend(all.iter().filter(|s| s.record.seq < end).cloned());
            troubles.extend(trouble.clone());
        }
        self.lead_to(start, &mut records);
        (records, troubles)
    }

    /// Puts before the first record what other lineages have up to the record that it names as the one before.
    fn lead_to(&self, branch: &Branch, records: &mut Vec<Stored>) {
        // Each lineage leads to another one once at most.
        for _ in &self.0 {
            let Some(prev) = records.first().map(|s| s.prev).filter(|prev| *prev != Hash::ZERO) else {
                return;
            };
            let of_stream = self.0.iter().filter(|archived| archived.branch.stream == branch.stream);
            let before = of_stream.filter_map(|archived| {
                let end = archived.records.iter().position(|s| s.hash == prev)?;
                archived.records.get(..=end)
            });
            let Some(before) = before.max_by_key(|before| before.len()) else { return };
            records.splice(0..0, before.iter().cloned());
        }
    }

    /// The stream's other lineages, as people are told of them.
    fn others(&self, branch: &Branch) -> Vec<String> {
        let others = self
            .0
            .iter()
            .filter(|other| other.branch.stream == branch.stream && other.branch.lineage != branch.lineage);
        let told = others.map(|Archived { branch, records, trouble }| {
            let ends = records.first().zip(records.last());
            let extent =
                ends.map(|(first, last)| format!("records {} to {}", first.record.seq, last.record.seq));
            let extent = extent.unwrap_or_else(|| "no record that can be read".to_owned());
            let trouble = trouble.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
            format!("{}: {extent}{trouble}", branch.lineage)
        });
        told.collect()
    }
}

fn read(archive: &Archive, branch: Branch) -> Archived {
    let mut records = Vec::new();
    let reading = wait(async {
        let mut pages = archive.read(&branch).await?;
        while let Some(page) = pages.next().await? {
            records.extend(page);
        }
        Ok::<(), ArchiveError>(())
    });
    Archived { branch, records, trouble: reading.err().map(|why| format!("the archive: {why}")) }
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
