//! Two stores as one: the first is the truth, the second a mirror of it on a local disk. An append waits for the first only. The mirror is
//! read instead of it at a start, it witnesses what the first has held, and at a person's word a broken stream is written anew from it.
//! Lost, late or damaged, it is made again from the first.
//!
//! - `work`: the task that writes the mirror
//! - `survey`: what a copy is worth

mod survey;
mod work;

use crate::{
    backend::{AppendError, Backend, BackendError, Page, Reader, describe},
    folded::Folded,
    journal::Anchor,
    record::{Head, Stored, StreamId},
    verify::Chain,
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};
use survey::{Survey, anchor};
use tokio::{sync::mpsc, time::timeout};
use valkeeper_core::ids::Seq;
use work::{Job, Troubles, copy, work};

/// Appends that wait for the mirror. More of them only wait while its disk is stuck; what does not fit is mirrored later, from the
/// first store.
const WAITING_MAX: usize = 1024;

/// Longest wait for a word of the mirror, where nothing is done without. Its end is in memory or one page away; a disk that takes longer
/// hangs, and a failover may be waiting.
const WORD_MAX: Duration = Duration::from_millis(500);

/// Longest wait for the mirror's records, instead of which the first store's can be read: a full stream is read in a tenth of it.
const RECORDS_MAX: Duration = Duration::from_secs(5);

/// The two stores.
pub struct Tiered {
    first: Arc<dyn Backend>,
    mirror: Arc<dyn Backend>,
    jobs: mpsc::Sender<Job>,
    troubles: Arc<Troubles>,
}

impl Tiered {
    /// `first` with `mirror` behind it. Needs a runtime, on which the mirror is written.
    pub fn new(first: Arc<dyn Backend>, mirror: Arc<dyn Backend>) -> Tiered {
        let (jobs, waiting) = mpsc::channel(WAITING_MAX);
        let troubles = Arc::new(Troubles::default());
        tokio::spawn(work(Arc::clone(&first), Arc::clone(&mirror), Arc::clone(&troubles), waiting));
        Tiered { first, mirror, jobs, troubles }
    }

    /// Where the mirror ends. It is no reason to stop: one that cannot be read is as good as none.
    async fn mirrored(&self, stream: &StreamId) -> Option<Head> {
        timeout(WORD_MAX, self.mirror.head(stream)).await.ok()?.ok().flatten()
    }

    /// Whether a person has given up what the mirror remembers. A mirror that cannot be read says nothing.
    async fn is_outdated(&self, stream: &StreamId) -> Result<bool, BackendError> {
        let mirrored = timeout(RECORDS_MAX, Survey::of(self.mirror.as_ref(), stream, None)).await;
        let Ok(Ok(mirrored)) = mirrored else { return Ok(false) };
        Ok(Survey::of(self.first.as_ref(), stream, None).await?.outdates(&mirrored))
    }

    /// True if the first store holds the beginning of the mirror and nothing else: what a repair leaves that came to nothing. It is not
    /// worth keeping once more.
    async fn is_half_copied(&self, stream: &StreamId) -> bool {
        let Ok(half) = Survey::of(self.first.as_ref(), stream, None).await else { return false };
        let Some(end) = half.head else { return false };
        let whole = Survey::of(self.mirror.as_ref(), stream, Some(anchor(end))).await;
        whole.is_ok_and(|whole| {
            whole.holds && whole.begins_after == half.begins_after && whole.head != half.head
        })
    }

    /// A queue that is full is asked again in the next quiet moment.
    fn order_rebuild(&self, stream: &StreamId) {
        match self.jobs.try_send(Job::Rebuild(stream.clone())) {
            Ok(()) | Err(_) => {}
        }
    }

    /// Where the first copy ends, for a repair that must not take records away: by all that it says itself, or, where a loss was accepted,
    /// by what of it can be read.
    async fn worth(&self, stream: &StreamId, needed: Option<Anchor>) -> Result<Option<Seq>, BackendError> {
        if needed.is_some() {
            return self.first.claimed_end(stream).await;
        }
        match Survey::of(self.first.as_ref(), stream, None).await {
            Ok(survey) => Ok(survey.head.map(|head| head.seq)),
            Err(e) if e.is_damage() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The mirror's pages, if it holds what follows `folded` up to `head`, and nothing else.
    async fn mirror_if_same(
        &self,
        stream: &StreamId,
        folded: Option<&Folded>,
        head: &Head,
    ) -> Option<Box<dyn Reader>> {
        let mut reader = self.mirror.read(stream).await.ok()?;
        if reader.folded() != folded {
            return None;
        }
        let mut chain = Chain::new(folded);
        while let Some(page) = reader.page().await.ok()? {
            page.records.iter().try_for_each(|stored| chain.next(stored)).ok()?;
        }
        if chain.end().ok()?.as_ref() != Some(head) {
            return None;
        }
        self.mirror.read(stream).await.ok()
    }
}

#[async_trait]
impl Backend for Tiered {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        self.first.streams().await
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        self.first.read(stream).await
    }

    async fn recall(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        let reader = self.first.read(stream).await?;
        let Some(mirrored) = self.mirrored(stream).await else { return Ok(reader) };
        let head = self.first.head(stream).await?;
        if head == Some(mirrored) {
            let local = self.mirror_if_same(stream, reader.folded(), &mirrored);
            if let Ok(Some(local)) = timeout(RECORDS_MAX, local).await {
                return Ok(local);
            }
            // Damaged before its end: no later look at the ends would tell.
            self.order_rebuild(stream);
            return Ok(reader);
        }
        if self.is_outdated(stream).await? {
            self.order_rebuild(stream);
            return Ok(reader);
        }
        if head.is_none_or(|head| head.seq < mirrored.seq) {
            return Err(behind(stream, head, mirrored));
        }
        Ok(Box::new(Witnessed { reader, mirrored }))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        self.first.head(stream).await
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.first.append(stream, expected, records, cut).await?;
        let (stream, expected, records) = (stream.clone(), expected.copied(), records.to_vec());
        match self.jobs.try_send(Job::Append { stream, expected, records, cut: cut.cloned() }) {
            // What does not fit is missing in the mirror until the next quiet moment.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn share(&self) -> Option<usize> {
        self.first.share()
    }

    /// The mirror goes first: one that is left alone would say that the first store has lost the stream.
    async fn remove(&self, stream: &StreamId) -> Result<(), BackendError> {
        let discarded = timeout(RECORDS_MAX, self.mirror.remove(stream)).await;
        discarded.unwrap_or_else(|_| Err(BackendError::Unavailable("the second copy hangs".to_owned())))?;
        self.first.remove(stream).await
    }

    async fn half_removed(&self) -> Result<Vec<StreamId>, BackendError> {
        self.first.half_removed().await
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.accept_loss(stream).await?;
        self.first.forget(stream).await
    }

    async fn repair(&self, stream: &StreamId, needed: Option<Anchor>) -> Result<(), BackendError> {
        let copied = Survey::of(self.mirror.as_ref(), stream, needed).await?;
        let short = |found: &str| BackendError::BehindAnchor {
            stream: stream.clone(),
            found: format!("{} in the second copy{found}", describe(copied.head.as_ref())),
            anchor: needed.map_or(Seq(0), |needed| needed.seq),
        };
        let Some(end) = copied.head.filter(|_| copied.holds) else { return Err(short("")) };
        let replaced = self.worth(stream, needed).await?;
        if let Some(more) = replaced.filter(|more| end.seq < *more) {
            return Err(short(&format!("; the first copy goes on to {more}")));
        }
        if self.is_half_copied(stream).await {
            self.first.discard(stream).await?;
        } else {
            self.first.forget(stream).await?;
        }
        copy(self.mirror.as_ref(), self.first.as_ref(), stream).await
    }

    async fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        let mirrored = self.mirrored(stream).await.map(|head| head.seq);
        Ok(self.first.claimed_end(stream).await?.max(mirrored))
    }

    async fn accept_loss(&self, stream: &StreamId) -> Result<(), BackendError> {
        let forgotten = timeout(RECORDS_MAX, self.mirror.forget(stream)).await;
        // One that cannot be read says nothing more; should it come back, the claim that follows outdates it.
        if self.mirrored(stream).await.is_none() {
            return Ok(());
        }
        forgotten.unwrap_or_else(|_| Err(BackendError::Unavailable("the second copy hangs".to_owned())))
    }

    /// The mirror is made again beside: neither its disk nor its length is a reason to wait. Why the last attempt came to nothing is told
    /// by the next call.
    async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.first.maintain(stream).await?;
        let (head, mirrored) = (self.first.head(stream).await?, self.mirrored(stream).await);
        if let Some(mirrored) = mirrored
            && head.is_none_or(|head| head.seq < mirrored.seq)
            && !self.is_outdated(stream).await?
        {
            return Err(behind(stream, head, mirrored));
        }
        if mirrored == head {
            return Ok(());
        }
        let trouble = self.troubles.take(stream);
        self.order_rebuild(stream);
        trouble.map_or(Ok(()), Err)
    }
}

/// The first store must not end before the mirror does, unless a person said so.
fn behind(stream: &StreamId, head: Option<Head>, mirrored: Head) -> BackendError {
    let found = describe(head.as_ref());
    BackendError::BehindAnchor { stream: stream.clone(), found, anchor: mirrored.seq }
}

/// Reads the first store, and compares it with what the mirror has seen of it.
struct Witnessed {
    reader: Box<dyn Reader>,
    mirrored: Head,
}

#[async_trait]
impl Reader for Witnessed {
    fn folded(&self) -> Option<&Folded> {
        self.reader.folded()
    }

    fn bytes(&self) -> usize {
        self.reader.bytes()
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        let page = self.reader.page().await?;
        let records = page.iter().flat_map(|page| &page.records);
        for head in records.map(Stored::head).filter(|head| head.seq == self.mirrored.seq) {
            if head != self.mirrored {
                let (found, mirrored) = (head, self.mirrored);
                return Err(BackendError::Corrupt(format!(
                    "the stream holds {found}, the second copy {mirrored}"
                )));
            }
        }
        Ok(page)
    }
}
