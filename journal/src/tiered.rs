//! Two stores as one: the first is the truth, the second a mirror of it on a local disk. An append waits for the first only. The mirror is
//! read instead of it at a start, it witnesses what the first has held, and at a person's word a broken stream is written anew from it.
//! Lost, late or damaged, it is made again from the first.

use crate::{
    backend::{AppendError, Backend, BackendError, Page, Reader, describe},
    folded::Folded,
    journal::Anchor,
    record::{BATCH_BYTES_MAX, Head, Stored, StreamId},
    verify::{Chain, Problem},
};
use async_trait::async_trait;
use std::sync::Arc;
use tokio::sync::mpsc;
use valkeeper_core::ids::Seq;

/// Appends that wait for the mirror. More of them only wait while its disk is stuck; what does not fit is mirrored later, from the
/// first store.
const WAITING_MAX: usize = 1024;

/// What the mirror is to do. One after the other, so that it never does two things to a stream at once.
enum Job {
    /// Takes an append that the first store has taken.
    Append { stream: StreamId, expected: Option<Head>, records: Vec<Stored>, cut: Option<Folded> },
    /// Is made again from the first store.
    Rebuild(StreamId),
}

/// The two stores.
pub struct Tiered {
    first: Arc<dyn Backend>,
    mirror: Arc<dyn Backend>,
    jobs: mpsc::Sender<Job>,
}

impl Tiered {
    /// `first` with `mirror` behind it. Needs a runtime, on which the mirror is written.
    pub fn new(first: Arc<dyn Backend>, mirror: Arc<dyn Backend>) -> Tiered {
        let (jobs, waiting) = mpsc::channel(WAITING_MAX);
        tokio::spawn(work(Arc::clone(&first), Arc::clone(&mirror), waiting));
        Tiered { first, mirror, jobs }
    }

    /// Where the mirror ends. It is no reason to stop: one that cannot be read is as good as none.
    async fn mirrored(&self, stream: &StreamId) -> Option<Head> {
        self.mirror.head(stream).await.ok().flatten()
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
        match intact(self.first.as_ref(), stream, None).await {
            Ok((head, _)) => Ok(head.map(|head| head.seq)),
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
        let Some(head) = head.filter(|head| head.seq >= mirrored.seq) else {
            let (stream, found) = (stream.clone(), describe(head.as_ref()));
            return Err(BackendError::BehindAnchor { stream, found, anchor: mirrored.seq });
        };
        if head == mirrored {
            if let Some(local) = self.mirror_if_same(stream, reader.folded(), &head).await {
                return Ok(local);
            }
            // Damaged before its end: no later look at the ends would tell.
            self.order_rebuild(stream);
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

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.mirror.forget(stream).await?;
        self.first.forget(stream).await
    }

    async fn repair(&self, stream: &StreamId, needed: Option<Anchor>) -> Result<(), BackendError> {
        let (intact, holds) = intact(self.mirror.as_ref(), stream, needed).await?;
        let short = |found: &str| BackendError::BehindAnchor {
            stream: stream.clone(),
            found: format!("{} in the second copy{found}", describe(intact.as_ref())),
            anchor: needed.map_or(Seq(0), |needed| needed.seq),
        };
        if intact.is_none() || !holds {
            return Err(short(""));
        }
        let replaced = self.worth(stream, needed).await?;
        if let Some(more) = replaced.filter(|end| intact.is_none_or(|intact| intact.seq < *end)) {
            return Err(short(&format!("; the first copy goes on to {more}")));
        }
        self.first.forget(stream).await?;
        copy(self.mirror.as_ref(), self.first.as_ref(), stream).await
    }

    async fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        let mirrored = self.mirrored(stream).await.map(|head| head.seq);
        Ok(self.first.claimed_end(stream).await?.max(mirrored))
    }

    async fn accept_loss(&self, stream: &StreamId) -> Result<(), BackendError> {
        let forgotten = self.mirror.forget(stream).await;
        // One that cannot be read says nothing more.
        if self.mirrored(stream).await.is_none() { Ok(()) } else { forgotten }
    }

    /// The mirror is made again beside: neither its disk nor its length is a reason to wait.
    async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.first.maintain(stream).await?;
        let (head, mirrored) = (self.first.head(stream).await?, self.mirrored(stream).await);
        if let Some(mirrored) = mirrored
            && head.is_none_or(|head| head.seq < mirrored.seq)
        {
            let (stream, found) = (stream.clone(), describe(head.as_ref()));
            return Err(BackendError::BehindAnchor { stream, found, anchor: mirrored.seq });
        }
        if mirrored != head {
            self.order_rebuild(stream);
        }
        Ok(())
    }
}

/// Writes the mirror. What does not follow its end, or cannot be written, is left out: the next quiet moment has it made again.
async fn work(first: Arc<dyn Backend>, mirror: Arc<dyn Backend>, mut waiting: mpsc::Receiver<Job>) {
    while let Some(job) = waiting.recv().await {
        let done = match job {
            Job::Append { stream, expected, records, cut } => {
                let appended = mirror.append(&stream, expected.as_ref(), &records, cut.as_ref()).await;
                appended.map_err(|e| BackendError::Unavailable(e.to_string()))
            }
            Job::Rebuild(stream) => rebuild(first.as_ref(), mirror.as_ref(), &stream).await,
        };
        match done {
            Ok(()) | Err(_) => {}
        }
    }
}

/// Makes the mirror again from the first store, once that is seen to be whole and to hold what the mirror has seen: it may be the
/// better copy. A damaged mirror is kept aside.
async fn rebuild(first: &dyn Backend, mirror: &dyn Backend, stream: &StreamId) -> Result<(), BackendError> {
    match intact(mirror, stream, None).await {
        Ok((mirrored, _)) => {
            let seen = mirrored.map(|head| Anchor { seq: head.seq, hash: head.hash });
            let (head, holds) = intact(first, stream, seen).await?;
            if head == mirrored || !holds {
                return Ok(());
            }
            mirror.discard(stream).await?;
        }
        Err(e) if e.is_damage() => {
            intact(first, stream, None).await?;
            mirror.forget(stream).await?;
        }
        Err(e) => return Err(e),
    }
    copy(first, mirror, stream).await
}

/// The head of a stream that is intact, and whether it holds a record.
async fn intact(
    backend: &dyn Backend,
    stream: &StreamId,
    needed: Option<Anchor>,
) -> Result<(Option<Head>, bool), BackendError> {
    let corrupt = |problem: Problem| BackendError::Corrupt(format!("a copy of stream {stream}: {problem}"));
    let is_needed =
        |head: &Head| needed.is_some_and(|needed| (needed.seq, needed.hash) == (head.seq, head.hash));
    let mut reader = backend.read(stream).await?;
    let mut holds = needed.is_none() || reader.folded().is_some_and(|folded| is_needed(folded.head()));
    // Older than the cut: that it was there, the cut says.
    holds |= reader.folded().is_some_and(|f| needed.is_some_and(|needed| needed.seq < f.head().seq));
    let mut chain = Chain::new(reader.folded());
    while let Some(page) = reader.page().await? {
        for stored in &page.records {
            chain.next(stored).map_err(corrupt)?;
            holds |= is_needed(&stored.head());
        }
    }
    Ok((chain.end().map_err(corrupt)?, holds))
}

/// Writes a stream into a store that has none of that name.
async fn copy(from: &dyn Backend, to: &dyn Backend, stream: &StreamId) -> Result<(), BackendError> {
    let mut reader = from.read(stream).await?;
    let mut folded = reader.folded().cloned();
    let mut head = None;
    let mut batch = Vec::new();
    let mut bytes = 0;
    loop {
        let page = reader.page().await?;
        let is_end = page.is_none();
        for stored in page.map(|page| page.records).unwrap_or_default() {
            if bytes + stored.encoded_len() > BATCH_BYTES_MAX / 2 {
                put(to, stream, &mut head, std::mem::take(&mut batch), folded.take()).await?;
                bytes = 0;
            }
            bytes += stored.encoded_len();
            batch.push(stored);
        }
        if is_end {
            return put(to, stream, &mut head, batch, folded).await;
        }
    }
}

async fn put(
    to: &dyn Backend,
    stream: &StreamId,
    head: &mut Option<Head>,
    batch: Vec<Stored>,
    cut: Option<Folded>,
) -> Result<(), BackendError> {
    let Some(last) = batch.last().map(Stored::head) else { return Ok(()) };
    let put = to.append(stream, head.as_ref(), &batch, cut.as_ref()).await;
    put.map_err(|e| BackendError::Unavailable(e.to_string()))?;
    *head = Some(last);
    Ok(())
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
