//! Names of a stream's objects, and what a name says.

use super::head::{FoldedAt, Segment};
use crate::record::StreamId;
use valkeeper_core::ids::Seq;

/// How the names of all journals' objects begin.
pub(super) const PREFIX: &str = "journal-";

const HEAD_SUFFIX: &str = "-head";

/// In place of a head whose stream is being removed.
const REMOVED_SUFFIX: &str = "-removed";

/// In the name of what was put aside. No UID has it.
const ASIDE: &str = "-aside-";

/// Characters of a folded text's digest in its name: as many as nobody meets twice.
const DIGEST_CHARS: usize = 16;

/// What an immutable object holds, as its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Segment { first: Seq, last: Seq },
    Folded { through: Seq },
}

impl Part {
    /// The last record in it.
    pub fn last(&self) -> Seq {
        match self {
            Part::Segment { first: _, last } => *last,
            Part::Folded { through } => *through,
        }
    }
}

pub(super) fn head(stream: &StreamId) -> String {
    format!("{PREFIX}{stream}{HEAD_SUFFIX}")
}

/// How the names of a stream's objects begin. Those of another stream may begin so, too: [`part`] tells.
pub(super) fn prefix(stream: &StreamId) -> String {
    format!("{PREFIX}{stream}-")
}

/// First and last sequence are in the name, so that two tails that begin alike are two objects.
pub(super) fn segment(stream: &StreamId, segment: &Segment) -> String {
    let Segment { first, last, bytes: _ } = segment;
    format!("{}segment-{:010}-{:010}", prefix(stream), first.0, last.0)
}

/// The digest is in the name, because another version of the program folds the same records to another text.
pub(super) fn folded(stream: &StreamId, folded: &FoldedAt) -> String {
    let FoldedAt { seq, digest, bytes: _ } = folded;
    let digest: String = digest.to_string().chars().take(DIGEST_CHARS).collect();
    format!("{}folded-{:010}-{digest}", prefix(stream), seq.0)
}

/// Another name for an object that is put aside: of this stream, but no part of it.
pub(super) fn aside(stream: &StreamId, name: &str, version: &str) -> String {
    let prefix = prefix(stream);
    let rest = name.strip_prefix(&prefix).unwrap_or(name);
    format!("{}{ASIDE}{version}-of-{rest}", prefix.trim_end_matches('-'))
}

/// The stream of a head object.
pub(super) fn stream_of_head(name: &str) -> Option<StreamId> {
    let stream = name.strip_prefix(PREFIX)?.strip_suffix(HEAD_SUFFIX)?;
    (!stream.contains(ASIDE)).then(|| StreamId(stream.to_owned()))
}

/// The object that says that a stream is being removed.
pub(super) fn removed(stream: &StreamId) -> String {
    format!("{PREFIX}{stream}{REMOVED_SUFFIX}")
}

/// The stream that is being removed, if an object of this name says so.
pub(super) fn stream_of_removed(name: &str) -> Option<StreamId> {
    let stream = name.strip_prefix(PREFIX)?.strip_suffix(REMOVED_SUFFIX)?;
    (!stream.contains(ASIDE)).then(|| StreamId(stream.to_owned()))
}

/// What an object of this stream holds; `None` if it is the head, or none of this stream.
pub(super) fn part(stream: &StreamId, name: &str) -> Option<Part> {
    let rest = name.strip_prefix(&prefix(stream))?;
    let (kind, numbers) = rest.split_once('-')?;
    let (one, other) = numbers.split_once('-')?;
    let seq = |text: &str| text.parse().ok().map(Seq);
    match kind {
        "segment" => Some(Part::Segment { first: seq(one)?, last: seq(other)? }),
        "folded" => Some(Part::Folded { through: seq(one)? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Hash;

    #[test]
    fn a_name_says_what_the_object_holds_and_of_which_stream() {
        let (one, other) = (StreamId("a".to_owned()), StreamId("a-b".to_owned()));
        let segment_name = segment(&one, &Segment { first: Seq(4), last: Seq(12_345_678_901), bytes: 1 });
        assert_eq!(segment_name, "journal-a-segment-0000000004-12345678901");
        let held = Part::Segment { first: Seq(4), last: Seq(12_345_678_901) };
        assert_eq!(part(&one, &segment_name), Some(held));
        let at = FoldedAt { seq: Seq(7), digest: Hash([0xab; 32]), bytes: 1 };
        assert_eq!(folded(&one, &at), "journal-a-folded-0000000007-abababababababab");
        assert_eq!(part(&one, &folded(&one, &at)), Some(Part::Folded { through: Seq(7) }));
        assert_eq!(stream_of_head(&head(&other)), Some(other.clone()));
        let kept = aside(&one, &segment_name, "77");
        assert_eq!(kept, "journal-a-aside-77-of-segment-0000000004-12345678901");
        assert_eq!((part(&one, &kept), stream_of_head(&aside(&one, &head(&one), "7"))), (None, None));
        for strange in [head(&one), folded(&other, &at), "journal-a-segment-1".to_owned(), "x".to_owned()] {
            assert_eq!(part(&one, &strange), None, "{strange}");
        }
    }
}
