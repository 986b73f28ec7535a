//! Reading a stream page by page. No page is held longer than it is needed, and no part of the store between two pages:
//! it may be closed, cut or opened again meanwhile, which the next page finds.

use super::{Shared, run};
use crate::{
    backend::{BackendError, Page, Reader},
    folded::Folded,
    record::StreamId,
};
use async_trait::async_trait;
use std::sync::Arc;
use valkeeper_core::ids::Seq;

/// A stream that is being read.
pub(super) struct Pages {
    pub shared: Arc<Shared>,
    pub stream: StreamId,
    /// Which opening of the store it was read from.
    pub opening: u64,
    pub folded: Option<Arc<Folded>>,
    pub bytes: usize,
    /// The next record, and the last one.
    pub next: Seq,
    pub last: Seq,
}

impl Pages {
    fn through(&self) -> Seq {
        self.folded.as_ref().map_or(Seq(0), |folded| folded.head().seq)
    }
}

#[async_trait]
impl Reader for Pages {
    fn folded(&self) -> Option<&Folded> {
        self.folded.as_deref()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        let (next, last, opening, through) = (self.next, self.last, self.opening, self.through());
        if next > last {
            return Ok(None);
        }
        let stream = self.stream.clone();
        let read = move |shared: &Shared| {
            shared.ask(|live, now| {
                // Before: what this reading began with is gone. After: it may have gone while it was read.
                let is_same = || -> Result<_, BackendError> {
                    let found = live.stream(&stream)?.filter(|found| found.through() == through);
                    found.filter(|_| now == opening).ok_or(BackendError::Moved)
                };
                let from = is_same()?;
                let page = live.of(&stream, || from.page(&stream, next, last));
                is_same()?;
                page
            })
        };
        let (records, bytes) = run(&self.shared, read).await?;
        self.next = records.last().map_or(last, |stored| stored.record.seq).next();
        Ok(Some(Page { records, bytes }))
    }
}
