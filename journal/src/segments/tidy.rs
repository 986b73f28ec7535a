//! Quiet moments: small segments are merged, and objects that no head can name any more are deleted.

use super::{
    MERGE_SEGMENTS, MERGED_BYTES_MAX, TEXT_BYTES_MAX, TIDY_DELETES_MAX,
    head::{HeadDoc, Segment},
    names,
    objects::{Body, ObjectsError},
    store::{Seen, Store, unreachable_store},
};
use crate::{
    backend::{AppendError, BackendError},
    lines::export_line,
    record::StreamId,
};
use std::ops::Range;

impl Store {
    pub async fn maintain(&self, stream: &StreamId) -> Result<(), BackendError> {
        let Some(seen) = self.look(stream).await? else { return Ok(()) };
        let doc = self.merge(stream, seen).await?;
        if self.is_tidy(stream) {
            return Ok(());
        }
        self.collect(stream, &doc).await
    }

    /// Makes a merged segment, then swaps the head's list. A crash between the two leaves a segment that no head names.
    async fn merge(&self, stream: &StreamId, seen: Seen) -> Result<HeadDoc, BackendError> {
        let Seen { version, doc } = seen;
        let mut text = String::new();
        let mut merged: Option<Segment> = None;
        let range = mergeable(&doc.segments);
        let mut end = range.start;
        for segment in doc.segments.get(range.clone()).unwrap_or_default() {
            // Checked, not only copied: damage is to be found where it happened.
            let records = self.segment(stream, &doc, segment).await?;
            let lines: String = records.iter().map(|stored| export_line(stored) + "\n").collect();
            if text.len() + lines.len() > TEXT_BYTES_MAX {
                break;
            }
            text.push_str(&lines);
            end += 1;
            let first = merged.map_or(segment.first, |merged| merged.first);
            merged = Some(Segment { first, last: segment.last, bytes: 0 });
        }
        let Some(mut merged) = merged.filter(|_| end > range.start + 1) else { return Ok(doc) };
        self.untidy(stream);
        let created = self.create(&names::segment(stream, &merged), &text, &Body::pack(&text)).await;
        merged.bytes = created.map_err(not_created)?;
        let mut next = doc;
        next.segments.splice(range.start..end, [merged]);
        // Not swapped, or nobody knows: the old ones stay, and the next quiet moment tries again.
        let body = Body::Text(next.text());
        let swapped = self.objects.replace(&names::head(stream), &version, &body).await;
        let version = swapped.map_err(unreachable_store)?;
        self.remember(stream, Seen { version, doc: next.clone() });
        Ok(next)
    }

    /// Deletes what neither `doc` names nor any head after it can name.
    async fn collect(&self, stream: &StreamId, doc: &HeadDoc) -> Result<(), BackendError> {
        let listed = self.objects.list(&names::prefix(stream)).await.map_err(unreachable_store)?;
        let kept = doc.folded.as_ref().map(|folded| names::folded(stream, folded));
        let is_past = |name: &String| {
            Some(name) != kept.as_ref() && names::part(stream, name).is_some_and(|part| doc.is_past(part))
        };
        let mut past = listed.iter().filter(|name| is_past(name));
        for name in past.by_ref().take(TIDY_DELETES_MAX) {
            match self.objects.delete(name).await {
                Ok(()) | Err(ObjectsError::NotFound) => {}
                Err(e) => return Err(unreachable_store(e)),
            }
        }
        if past.next().is_none() {
            self.tidied(stream);
        }
        Ok(())
    }
}

/// The first run of small segments that is long enough to be merged, as far as it fits into one.
fn mergeable(segments: &[Segment]) -> Range<usize> {
    let is_small = |s: &Segment| s.bytes <= MERGED_BYTES_MAX / 2;
    let mut start = 0;
    for run in segments.chunk_by(|one, other| is_small(one) == is_small(other)) {
        if run.len() >= MERGE_SEGMENTS && run.iter().all(is_small) {
            let mut bytes = 0;
            let fits = run.iter().take_while(|s| {
                bytes += s.bytes;
                bytes <= MERGED_BYTES_MAX
            });
            return start..start + fits.count();
        }
        start += run.len();
    }
    0..0
}

fn not_created(e: AppendError) -> BackendError {
    match e {
        AppendError::Poisoned(why) | AppendError::Corrupt(why) => BackendError::Corrupt(why),
        AppendError::Conflict { .. }
        | AppendError::Fenced { .. }
        | AppendError::Ambiguous(_)
        | AppendError::Full { .. }
        | AppendError::Io(_) => BackendError::Unavailable(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use valkeeper_core::ids::Seq;

    fn of(sizes: &[usize]) -> Vec<Segment> {
        let segment = |(index, bytes): (usize, &usize)| {
            let seq = Seq(index as u64 + 1);
            Segment { first: seq, last: seq, bytes: *bytes }
        };
        sizes.iter().enumerate().map(segment).collect()
    }

    #[test]
    fn a_run_of_small_segments_is_merged_as_far_as_it_fits() {
        const KIB: usize = 1024;
        assert_eq!(mergeable(&of(&[3 * KIB; MERGE_SEGMENTS - 1])), 0..0, "too few");
        assert_eq!(mergeable(&of(&[3 * KIB; MERGE_SEGMENTS])), 0..5);
        assert_eq!(mergeable(&of(&[[9 * KIB; 2].as_slice(), &[100; 20]].concat())), 2..22);
        assert_eq!(mergeable(&of(&[[100; 7].as_slice(), &[9 * KIB], &[8 * KIB; 8]].concat())), 8..10);
        assert_eq!(mergeable(&of(&[9 * KIB; 50])), 0..0, "what is merged is not merged again");
    }
}
