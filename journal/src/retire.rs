//! The end of a stream: a journal whose cluster is gone is carried to the archive, every record of it, and taken out of the store.

use crate::{
    archive::{Archive, Branch},
    backend::{Backend, BackendError, READ_ATTEMPTS_MAX},
    error::Error,
    record::{Head, Stored, StreamId},
    retention::PARCEL_BYTES,
    verify::Chain,
};

/// What was taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retired {
    /// Its last record.
    pub head: Head,
    /// Records that the store had of it.
    pub records: usize,
    /// Segments written to the archive for them; 0 if all were there, or without one.
    pub segments: usize,
}

/// Takes a whole stream out of the store, after every record of it was read, checked, and found in the archive if there is one. `None` if there
/// is no such stream. What is damaged stays where it is: someone may want to know why.
///
/// # Errors
/// The stream cannot be read or is not intact, it was written to meanwhile, or the archive does not take it. Nothing was taken out then, or the
/// store has not answered: the same call again goes on.
pub async fn retire(
    backend: &dyn Backend,
    stream: &StreamId,
    archive: Option<&Archive>,
) -> Result<Option<Retired>, Error> {
    let mut attempt = 1;
    let retired = loop {
        match carry_whole(backend, stream, archive).await {
            Err(Error::Backend(BackendError::Moved)) if attempt < READ_ATTEMPTS_MAX => attempt += 1,
            other => break other?,
        }
    };
    let Some(retired) = retired else { return Ok(None) };
    // Whoever writes to it has a reason to.
    if backend.head(stream).await? != Some(retired.head) {
        return Err(Error::Backend(BackendError::Moved));
    }
    backend.remove(stream).await?;
    Ok(Some(retired))
}

async fn carry_whole(
    backend: &dyn Backend,
    stream: &StreamId,
    archive: Option<&Archive>,
) -> Result<Option<Retired>, Error> {
    let mut reader = backend.read(stream).await?;
    let mut chain = Chain::new(reader.folded());
    let mut branch = Branch { stream: stream.clone(), lineage: chain.lineage() };
    let (mut parcel, mut bytes): (Vec<Stored>, usize) = (Vec::new(), 0);
    let (mut records, mut segments) = (0, 0);
    loop {
        let page = reader.page().await?;
        let is_end = page.is_none();
        for stored in page.into_iter().flat_map(|page| page.records) {
            chain.next(&stored)?;
            bytes += stored.encoded_len();
            records += 1;
            parcel.push(stored);
        }
        // Of the first record alone the lineage is not known, unless it is the only one.
        let is_due = is_end || bytes >= PARCEL_BYTES && parcel.len() > 1;
        if let Some(archive) = archive.filter(|_| is_due && !parcel.is_empty()) {
            segments += archive.store(&branch, &parcel).await?.segments;
            branch.lineage = chain.lineage();
        }
        if is_due {
            (parcel, bytes) = (Vec::new(), 0);
        }
        if is_end {
            break;
        }
    }
    Ok(chain.end()?.map(|head| Retired { head, records, segments }))
}
