//! A stream as named objects (ConfigMaps): one head object with the open tail, written by compare-and-swap, and objects
//! that never change: sealed segments, and what the stream begins with if its beginning was cut. The head is JSON Lines as it is,
//! everything else is packed, so that `kubectl get configmap`, `gunzip` and jq can read it.
//!
//! The head names the others, so they count only once a head names them. When the tail is full, it is first written
//! as a segment and then, by the same compare-and-swap that adds the new records, taken out of the head. A crash
//! between the two leaves a segment that no head names: it has the same text as the tail, and is taken over or collected.

mod forget;
mod head;
pub mod memory_objects;
mod names;
pub mod objects;
mod reader;
mod store;
mod tidy;
mod writer;

pub use memory_objects::MemoryObjects;
pub use objects::{Body, BodyError, Object, Objects, ObjectsError};

use crate::{
    backend::{AppendError, Backend, BackendError, Reader},
    folded::Folded,
    record::{Head, Stored, StreamId},
};
use async_trait::async_trait;
use forget::Remains;
use reader::Pages;
use std::sync::Arc;
use store::Store;
use valkeeper_core::ids::Seq;
use writer::Batch;

/// Size of the open tail from which it is sealed, in bytes. Every append writes the whole head object, and etcd keeps
/// each version until its next compaction (5 minutes): at 16 KiB a write every second is 5 MiB of history.
pub const TAIL_BYTES_MAX: usize = 16 * 1024;

/// Largest text that an object is unpacked to, in bytes: a sealed tail was data of a ConfigMap once, which holds 1 MiB.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// Largest text of what a stream begins with that is kept as it is, in bytes. Packing saves less than an object's own
/// metadata take below that, and who looks for it in a hurry can read it.
pub const FOLDED_PLAIN_BYTES_MAX: usize = 4 * 1024;

/// Largest sum of segments that are merged into one, in bytes as they are stored. A segment is what is read and cut at once: with a
/// quarter of [`STREAM_SHARE_BYTES`], a stream that is cut to its share keeps most of that. 64 of them are a full stream.
pub const MERGED_BYTES_MAX: usize = 16 * 1024;

/// Small segments that are merged at once when there are so many. A sealed tail packs to 3 to 4 KiB, so four or five
/// become one: half as many would be merged twice.
pub const MERGE_SEGMENTS: usize = 8;

/// Objects deleted in one quiet moment: at 10 ms each it is over in a third of a second. The rest waits for the next.
pub const TIDY_DELETES_MAX: usize = 32;

/// One stream, in bytes as they are stored: what one ConfigMap may hold, so that no head can grow beyond it. About 12,000
/// records of 470 bytes, which pack to 87 each.
pub const STREAM_BYTES_MAX: usize = 1024 * 1024;

/// All streams, in bytes as they are stored: a quarter of etcd's default quota of 2 GiB, so 1,000 clusters may have 512 KiB each.
/// A second quarter is for heads that etcd has not compacted yet (5 minutes): an append writes 10 KiB, the middle of a tail and
/// a list of segments, so it holds 50,000 appends, 50 of each cluster. The other half is everyone else's.
pub const INSTALLATION_BYTES_MAX: usize = 512 * 1024 * 1024;

/// What every stream may keep even if the installation is full, in bytes as they are stored: some 600 records, which is weeks of a quiet
/// cluster. 1,000 clusters take 64 MiB of [`INSTALLATION_BYTES_MAX`].
pub const STREAM_SHARE_BYTES: usize = 64 * 1024;

/// Bytes by which a stream that is copied may pass its limit: its tail is another one, plain where it was packed, and segments end
/// elsewhere. Two tails cover it.
pub const COPY_EXTRA_BYTES: usize = 2 * TAIL_BYTES_MAX;

/// How often an append is tried again because only the head object's metadata were touched. Someone who writes to it
/// more often than that is fighting us, and the caller has to know.
pub const METADATA_CONFLICTS_MAX: usize = 3;

/// The backend.
pub struct Segments {
    store: Arc<Store>,
}

impl Segments {
    /// A backend over `objects`.
    pub fn new(objects: Arc<dyn Objects>) -> Segments {
        Segments::with_budget(objects, STREAM_BYTES_MAX, INSTALLATION_BYTES_MAX)
    }

    /// As [`Segments::new`], with another limit for one stream, in bytes as they are stored.
    pub fn with_limit(objects: Arc<dyn Objects>, stream_bytes_max: usize) -> Segments {
        Segments::with_budget(objects, stream_bytes_max, INSTALLATION_BYTES_MAX)
    }

    /// As [`Segments::with_limit`], with another budget for all streams that this process has seen. Above it, a
    /// stream keeps no more than [`STREAM_SHARE_BYTES`] from its next quiet moment on; nobody is refused for it.
    pub fn with_budget(
        objects: Arc<dyn Objects>,
        stream_bytes_max: usize,
        installation_bytes_max: usize,
    ) -> Segments {
        Segments { store: Arc::new(Store::new(objects, stream_bytes_max, installation_bytes_max)) }
    }
}

#[async_trait]
impl Backend for Segments {
    async fn streams(&self) -> Result<Vec<StreamId>, BackendError> {
        let listed = self.store.objects.list(names::PREFIX).await.map_err(store::unreachable_store)?;
        let mut streams: Vec<StreamId> =
            listed.iter().filter_map(|name| names::stream_of_head(name)).collect();
        streams.sort();
        Ok(streams)
    }

    async fn read(&self, stream: &StreamId) -> Result<Box<dyn Reader>, BackendError> {
        Ok(Box::new(Pages::begin(Arc::clone(&self.store), stream).await?))
    }

    async fn head(&self, stream: &StreamId) -> Result<Option<Head>, BackendError> {
        Ok(self.store.look(stream).await?.map(|seen| seen.doc.head))
    }

    /// Also by the names of segments: what was sealed had been acknowledged, and they outlive a damaged head.
    async fn claimed_end(&self, stream: &StreamId) -> Result<Option<Seq>, BackendError> {
        let head = match self.store.fetch(stream).await {
            Ok(found) => found.map(|seen| seen.doc.head.seq),
            Err(e) if e.is_damage() => None,
            Err(e) => return Err(e),
        };
        let listed =
            self.store.objects.list(&names::prefix(stream)).await.map_err(store::unreachable_store)?;
        let named = listed.iter().filter_map(|name| names::part(stream, name)).map(|part| part.last());
        Ok(named.chain(head).max())
    }

    async fn append(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.store.append(stream, expected, Batch { records, cut, extra_bytes: 0 }).await
    }

    async fn append_copied(
        &self,
        stream: &StreamId,
        expected: Option<&Head>,
        records: &[Stored],
        cut: Option<&Folded>,
    ) -> Result<(), AppendError> {
        self.store.append(stream, expected, Batch { records, cut, extra_bytes: COPY_EXTRA_BYTES }).await
    }

    fn share(&self) -> Option<usize> {
        self.store.share()
    }

    async fn discard(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.store.forget(stream, Remains::Dropped).await
    }

    async fn remove(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.store.remove(stream).await
    }

    async fn half_removed(&self) -> Result<Vec<StreamId>, BackendError> {
        let listed = self.store.objects.list(names::PREFIX).await.map_err(store::unreachable_store)?;
        // Beside a head the mark is of no removal that went any way, or of nobody's: that stream is whole.
        let is_headless = |stream: &StreamId| !listed.contains(&names::head(stream));
        Ok(listed.iter().filter_map(|name| names::stream_of_removed(name)).filter(is_headless).collect())
    }

    async fn forget(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.store.forget(stream, Remains::Kept).await
    }

    async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        self.store.maintain(stream).await
    }
}
