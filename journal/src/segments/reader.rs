//! Reads a stream page by page: a page is a sealed segment, the last one is the open tail.

use super::{
    names::{self, Part},
    store::{Seen, Store, parse_lines, unreachable_store},
};
use crate::{
    backend::{BackendError, Page, Reader},
    folded::Folded,
    record::{Head, Stored, StreamId},
};
use async_trait::async_trait;
use std::sync::Arc;

pub(super) struct Pages {
    store: Arc<Store>,
    stream: StreamId,
    /// The head when the reading began; `None`: there is no stream.
    seen: Option<Seen>,
    folded: Option<Folded>,
    /// Segments given.
    given: usize,
    /// The last record given, or cut.
    last: Option<Head>,
    is_ended: bool,
}

impl Pages {
    pub async fn begin(store: Arc<Store>, stream: &StreamId) -> Result<Pages, BackendError> {
        // Before the head: whatever is listed was made under this head or an earlier one.
        let listed = store.objects.list(&names::prefix(stream)).await.map_err(unreachable_store)?;
        let parts = listed.iter().filter_map(|name| Some((name, names::part(stream, name)?)));
        let latest = parts.max_by_key(|(_, part)| part.last());
        let seen = store.fetch(stream).await?;
        check_latest(stream, seen.as_ref(), latest)?;
        let folded = match &seen {
            Some(Seen { version: _, doc }) => {
                doc.check_places()?;
                store.folded(stream, doc).await?
            }
            None => None,
        };
        let last = folded.as_ref().map(|folded| *folded.head());
        Ok(Pages { store, stream: stream.clone(), seen, folded, given: 0, last, is_ended: false })
    }

    async fn next(&mut self) -> Result<Option<Page>, BackendError> {
        let Some(Seen { version: _, doc }) = &self.seen else { return Ok(None) };
        if let Some(segment) = doc.segments.get(self.given) {
            let records = self.store.segment(&self.stream, doc, segment).await?;
            self.given += 1;
            return Ok(Some(Page { records, bytes: segment.bytes }));
        }
        if std::mem::replace(&mut self.is_ended, true) {
            return Ok(None);
        }
        let name = names::head(&self.stream);
        let records = parse_lines(&self.stream, &name, &doc.tail)?;
        let end = records.last().map(Stored::head).or(self.last);
        if end != Some(doc.head) {
            let why = format!("object {name} says {}, its records end elsewhere", doc.head);
            return Err(BackendError::Corrupt(why));
        }
        self.keep();
        Ok((!records.is_empty()).then_some(Page { records, bytes: doc.tail.len() }))
    }

    /// The caller gets what is there and judges it; a writer in this process must not take it for its own unless it is.
    fn keep(&self) {
        let Some(seen) = &self.seen else { return };
        let is_checked = match self.store.known(&self.stream) {
            None => seen.doc.check_tail(self.last).is_ok(),
            Some(_) => false,
        };
        if is_checked {
            self.store.remember(&self.stream, seen.clone());
        }
    }
}

/// The head is the latest of all objects, unless it was lost or put back from an earlier copy.
fn check_latest(
    stream: &StreamId,
    seen: Option<&Seen>,
    latest: Option<(&String, Part)>,
) -> Result<(), BackendError> {
    let Some((name, part)) = latest else { return Ok(()) };
    let head = names::head(stream);
    match seen {
        Some(Seen { version: _, doc }) if doc.head.seq >= part.last() => Ok(()),
        Some(Seen { version: _, doc }) => Err(BackendError::Corrupt(format!(
            "object {head} ends with {}, but object {name} was made after record {}: it was put back from an earlier copy",
            doc.head,
            part.last()
        ))),
        None => Err(BackendError::Corrupt(format!(
            "object {head} is missing, but there are others of its stream such as {name}"
        ))),
    }
}

#[async_trait]
impl Reader for Pages {
    fn folded(&self) -> Option<&Folded> {
        self.folded.as_ref()
    }

    fn bytes(&self) -> usize {
        self.seen.as_ref().map_or(0, |seen| seen.doc.bytes())
    }

    async fn page(&mut self) -> Result<Option<Page>, BackendError> {
        let page = self.next().await?;
        if let Some(last) = page.as_ref().and_then(|page| page.records.last()) {
            self.last = Some(last.head());
        }
        Ok(page)
    }
}
