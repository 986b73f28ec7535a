//! How much of a stream stays in the store, where the rest goes, and what stands for it. Only whole pages go, oldest first, and
//! never the last one.

use crate::{
    archive::{Archive, Archived, Branch},
    backend::{Backend, BackendError, Page, READ_ATTEMPTS_MAX, Reader},
    error::Error,
    folded::Folded,
    record::{Head, Stored, StreamId},
    verify::{Chain, Problem},
};
use valkeeper_core::{
    event::Event,
    ids::{Digest, Seq, Timestamp},
};

/// How much of a stream is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Bytes in the store from which the oldest go.
    pub keep_bytes: usize,
    /// Age in milliseconds from which records go although there is room; `None`: they go by size only.
    pub keep_ms: Option<i64>,
    /// Which records may go at all.
    pub may_go: MayGo,
}

/// Which records may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MayGo {
    /// All of them: there is no archive.
    Any,
    /// Those that are in the archive and were read back from it.
    Archived {
        /// The last of them, 0 if there is none.
        through: Seq,
        /// Name of the archive, as records tell it.
        place: String,
    },
}

impl MayGo {
    fn allows(&self, last: &Stored) -> bool {
        match self {
            MayGo::Any => true,
            MayGo::Archived { through, place: _ } => last.record.seq <= *through,
        }
    }

    fn place(&self) -> Option<String> {
        match self {
            MayGo::Any => None,
            MayGo::Archived { through: _, place } => Some(place.clone()),
        }
    }
}

/// What a cut is to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    /// No more than this many bytes: nothing is to be done.
    trigger_bytes: usize,
    /// Bytes to be left.
    left_bytes: usize,
    /// Records before this go in any case.
    before: Option<Timestamp>,
}

impl Goal {
    /// In a quiet moment: a quarter of what is kept goes at once, so that a cut is rare.
    pub fn quiet(retention: &Retention, share: Option<usize>, now: Timestamp) -> Goal {
        let before = retention.keep_ms.map(|ms| now.plus_millis(ms.saturating_neg()));
        let keep_bytes = share.map_or(retention.keep_bytes, |share| share.min(retention.keep_bytes));
        Goal { trigger_bytes: keep_bytes, left_bytes: keep_bytes / 4 * 3, before }
    }

    /// When an append was refused because a stream may have `max` bytes: whatever is kept otherwise, there must be room now.
    pub fn full(retention: &Retention, max_bytes: usize) -> Goal {
        let left_bytes = retention.keep_bytes.min(max_bytes) / 4 * 3;
        Goal { trigger_bytes: left_bytes, left_bytes, before: None }
    }
}

/// The pages of a stream that are to go, oldest first.
struct Oldest {
    reader: Box<dyn Reader>,
    goal: Goal,
    must_shrink: bool,
    bytes: usize,
    next: Option<Page>,
}

impl Oldest {
    async fn of(backend: &dyn Backend, stream: &StreamId, goal: Goal) -> Result<Oldest, BackendError> {
        let mut reader = backend.read(stream).await?;
        let bytes = reader.bytes();
        let must_shrink = bytes > goal.trigger_bytes;
        let next = if must_shrink || goal.before.is_some() { reader.page().await? } else { None };
        Ok(Oldest { reader, goal, must_shrink, bytes, next })
    }

    /// The next page, `None` if the rest stays. The last page is the open end: it stays.
    async fn page(&mut self) -> Result<Option<Vec<Stored>>, BackendError> {
        let Some(Page { records, bytes }) = self.next.take() else { return Ok(None) };
        self.next = self.reader.page().await?;
        let Goal { trigger_bytes: _, left_bytes, before } = self.goal;
        let is_old =
            before.is_some_and(|before| records.last().is_some_and(|last| last.record.time < before));
        let is_too_much = self.must_shrink && self.bytes > left_bytes;
        if self.next.is_none() || !(is_old || is_too_much) {
            self.next = Some(Page { records, bytes });
            return Ok(None);
        }
        self.bytes = self.bytes.saturating_sub(bytes);
        Ok(Some(records))
    }

    /// What stays must follow what goes: a page that was exchanged for another must not become the beginning that is believed.
    fn check_rest(&self, rest: Option<&Vec<Stored>>, chain: &Chain) -> Result<(), Problem> {
        let stays = rest.or(self.next.as_ref().map(|page| &page.records));
        match stays.and_then(|records| records.first()) {
            Some(first) => chain.clone().next(first),
            None => Ok(()),
        }
    }
}

/// Folds the oldest records of a stream, as many as are to go and may go; `None` if there are none. They are checked while they are
/// folded: what is not intact never becomes the beginning of anything.
pub(crate) async fn fold_oldest(
    backend: &dyn Backend,
    stream: &StreamId,
    goal: Goal,
    may_go: &MayGo,
) -> Result<Option<Folded>, Error> {
    let mut oldest = Oldest::of(backend, stream, goal).await?;
    let folded = oldest.reader.folded();
    let mut chain = Chain::new(folded);
    let mut state = folded.map(|folded| folded.state().clone()).unwrap_or_default();
    let mut through: Option<Head> = None;
    let mut held = None;
    while let Some(records) = oldest.page().await? {
        if !records.last().is_some_and(|last| may_go.allows(last)) {
            held = Some(records);
            break;
        }
        for stored in &records {
            chain.next(stored)?;
            state.apply(&stored.record);
        }
        through = chain.head().copied();
    }
    oldest.check_rest(held.as_ref(), &chain)?;
    Ok(through.map(|head| Folded::new(stream, head, chain.lineage(), &state)).transpose()?)
}

/// What was carried to the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Records up to this one are there, read back and compared.
    pub through: Seq,
    /// Segments written for them; 0 if all were there.
    pub segments: usize,
}

/// Carries to the archive what is to go next; `None` if nothing is. Needs no writer: it may take as long as the archive does.
///
/// # Errors
/// The store cannot be read or is not intact, or the archive does not take it.
pub async fn carry(
    backend: &dyn Backend,
    stream: &StreamId,
    retention: &Retention,
    archive: &Archive,
    now: Timestamp,
) -> Result<Option<Carried>, Error> {
    let goal = Goal::quiet(retention, backend.share(), now);
    let mut attempt = 1;
    loop {
        match carry_once(backend, stream, goal, archive).await {
            // What was brought there meanwhile is found there, and compared.
            Err(Error::Backend(BackendError::Moved)) if attempt < READ_ATTEMPTS_MAX => attempt += 1,
            other => return other,
        }
    }
}

async fn carry_once(
    backend: &dyn Backend,
    stream: &StreamId,
    goal: Goal,
    archive: &Archive,
) -> Result<Option<Carried>, Error> {
    let mut oldest = Oldest::of(backend, stream, goal).await?;
    let mut chain = Chain::new(oldest.reader.folded());
    let mut branch = Branch { stream: stream.clone(), lineage: chain.lineage() };
    let (mut parcel, mut bytes) = (Vec::new(), 0);
    let mut carried = None;
    while let Some(records) = oldest.page().await? {
        for stored in &records {
            chain.next(stored)?;
            bytes += stored.encoded_len();
        }
        parcel.extend(records);
        if bytes >= PARCEL_BYTES {
            carried = Some(more(carried, archive.store(&branch, &parcel).await?));
            branch.lineage = chain.lineage();
            (parcel, bytes) = (Vec::new(), 0);
        }
    }
    // Of the first record alone the lineage is not known: the second may be the claim after a loss.
    if parcel.last().is_some_and(|last| last.record.seq > Seq(1)) {
        carried = Some(more(carried, archive.store(&branch, &parcel).await?));
    }
    Ok(carried)
}

fn more(before: Option<Carried>, archived: Archived) -> Carried {
    let segments = before.map_or(0, |before| before.segments) + archived.segments;
    Carried { through: archived.last, segments }
}

/// Bytes of records that are given to the archive at once: few enough to be held in memory for many clusters, enough that an archive
/// does not consist of crumbs.
pub(crate) const PARCEL_BYTES: usize = 512 * 1024;

/// The record of a cut.
pub(crate) fn trimmed(folded: &Folded, may_go: &MayGo) -> Event {
    let Head { seq, epoch: _, time: _, hash } = folded.head();
    Event::Trimmed {
        through: *seq,
        hash: Digest(hash.to_string()),
        folded: Digest(folded.digest().to_string()),
        archive: may_go.place(),
    }
}
