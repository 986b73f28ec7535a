//! ConfigMaps of a journal, as `kubectl get configmaps -o json` prints them: the head as text, what is sealed packed.

use super::{Stream, wait};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use valkeeper_journal::{
    Folded, Object, Segments, Stored, StreamId, Whole,
    folded::FOLDED_BYTES_MAX,
    import_line, read_all,
    segments::{Body, MemoryObjects, TEXT_BYTES_MAX},
};

/// Names of journal objects, within the name of a ConfigMap.
const OBJECT_PREFIX: &str = "journal-";
/// End of the head object's name.
const HEAD_SUFFIX: &str = "-head";
/// What stands between a stream's id and the sequences of a sealed object.
const SEALED_INFIXES: [&str; 2] = ["-segment-", FOLDED_INFIX];
const FOLDED_INFIX: &str = "-folded-";
/// What stands in the name of an object that was put aside: part of no journal any more.
const ASIDE_INFIX: &str = "-aside-";
/// Where a ConfigMap has its text.
const TEXT_KEY: &str = "records.jsonl";
/// Where a ConfigMap has its packed text.
const PACKED_KEY: &str = "records.jsonl.gz";

/// Journal objects in a ConfigMap or a list of them, by the name that the journal gave them. Errors: what it is instead.
pub(super) fn streams(document: &serde_json::Value) -> Result<Vec<Stream>, String> {
    let kind = document.get("kind").and_then(|k| k.as_str()).unwrap_or_default();
    let items: Vec<&serde_json::Value> = match (kind, document.get("items").and_then(|i| i.as_array())) {
        ("ConfigMap", _) => vec![document],
        ("List" | "ConfigMapList", Some(items)) => items.iter().collect(),
        (_, _) => return Err(format!("it is a {kind}; expected ConfigMaps")),
    };
    let objects: BTreeMap<String, Body> = items.into_iter().filter_map(journal_object).collect();
    if objects.is_empty() {
        return Err("none of its ConfigMaps is part of a journal".to_owned());
    }
    let ids: BTreeSet<&str> = objects.keys().filter_map(|name| stream_id(name)).collect();
    Ok(ids.into_iter().map(|id| from_objects(id, &objects)).collect())
}

fn journal_object(item: &serde_json::Value) -> Option<(String, Body)> {
    let name = item.pointer("/metadata/name")?.as_str()?;
    let name = name.get(name.find(OBJECT_PREFIX)?..)?;
    stream_id(name)?;
    let value = |field: &str, key: &str| item.get(field)?.get(key)?.as_str();
    // What is no base64 is no gzip either, and the reader says of which object.
    let packed = |text: &str| BASE64_STANDARD.decode(text).unwrap_or_else(|_| text.as_bytes().to_vec());
    let body = match value("data", TEXT_KEY) {
        Some(text) => Body::Text(text.to_owned()),
        None => Body::Packed(packed(value("binaryData", PACKED_KEY)?)),
    };
    Some((name.to_owned(), body))
}

fn stream_id(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(OBJECT_PREFIX).filter(|rest| !rest.contains(ASIDE_INFIX))?;
    let sealed = || SEALED_INFIXES.iter().find_map(|infix| rest.split_once(infix)).map(|(id, _)| id);
    rest.strip_suffix(HEAD_SUFFIX).or_else(sealed)
}

/// Reads a stream as the operator would; if that is refused, whatever lines there are.
fn from_objects(id: &str, objects: &BTreeMap<String, Body>) -> Stream {
    let stream = StreamId(id.to_owned());
    let memory = MemoryObjects::new();
    memory.edit(|all| {
        for (name, body) in objects {
            all.insert(name.clone(), Object { body: body.clone(), version: "1".to_owned() });
        }
    });
    match wait(read_all(&Segments::new(Arc::new(memory)), &stream)) {
        Ok(whole) => Stream::new(Some(&stream), whole, Vec::new()),
        Err(why) => Stream::new(Some(&stream), salvage(id, objects), vec![why]),
    }
}

/// Every line of a stream's objects that is a record, each once, in order of sequence; after the newest fold, if there
/// is one with records after it.
fn salvage(id: &str, objects: &BTreeMap<String, Body>) -> Whole {
    let mut records: Vec<Stored> = Vec::new();
    let mut folded: Option<Folded> = None;
    for (name, body) in objects.iter().filter(|(name, _)| stream_id(name) == Some(id)) {
        let is_folded = name.contains(FOLDED_INFIX);
        let Ok(text) = body.text(if is_folded { FOLDED_BYTES_MAX } else { TEXT_BYTES_MAX }) else { continue };
        if is_folded {
            let found = Folded::parse(text.trim_end_matches('\n')).ok();
            folded = folded.into_iter().chain(found).max_by_key(|f| f.head().seq);
        } else {
            records.extend(text.lines().filter_map(|line| import_line(line).ok()));
        }
    }
    records.sort_by_key(|s| s.record.seq);
    records.dedup();
    let last = records.last().map(|s| s.record.seq).unwrap_or_default();
    folded = folded.filter(|f| f.head().seq < last);
    if let Some(folded) = &folded {
        records.retain(|s| s.record.seq > folded.head().seq);
    }
    Whole { folded, records }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        source::{parse, testing::cut_after_first_page},
        story::{self, sealed},
        verify::verify,
    };
    use serde_json::json;
    use valkeeper_core::event::Record;
    use valkeeper_journal::{Backend, BackendError};

    fn id() -> StreamId {
        StreamId("5f0c1d2e-uid".into())
    }

    /// A journal as the operator would have written it, record by record.
    fn written(records: &[Record]) -> Arc<MemoryObjects> {
        let objects = Arc::new(MemoryObjects::new());
        let writer = Segments::new(objects.clone());
        let writing = async {
            let mut head = None;
            for record in sealed(records) {
                writer.append(&id(), head.as_ref(), std::slice::from_ref(&record), None).await.unwrap();
                head = Some(record.head());
            }
            Ok::<(), BackendError>(())
        };
        wait(writing).unwrap();
        objects
    }

    /// The ConfigMaps of a journal.
    fn dump(objects: &MemoryObjects) -> Vec<serde_json::Value> {
        let mut items = Vec::new();
        objects.edit(|all| {
            for (name, object) in all.iter() {
                let mut item = json!({"kind": "ConfigMap", "metadata": {"name": name}});
                match &object.body {
                    Body::Text(text) => item["data"] = json!({TEXT_KEY: text}),
                    Body::Packed(bytes) => {
                        item["binaryData"] = json!({PACKED_KEY: BASE64_STANDARD.encode(bytes)});
                    }
                }
                items.push(item);
            }
        });
        items
    }

    /// The long story, cut at the first place where its store can be cut: its ConfigMaps, and what is left.
    fn cut() -> (Vec<serde_json::Value>, Whole) {
        let objects = written(&long());
        let store = Segments::new(objects.clone());
        let left = wait(async {
            let left = cut_after_first_page(&store, &id()).await?;
            // What no head names any more goes in quiet moments.
            store.maintain(&id()).await?;
            Ok::<_, BackendError>(left)
        });
        (dump(&objects), left.unwrap())
    }

    /// The story again and again until its tail has been sealed.
    fn long() -> Vec<Record> {
        let mut book = story::adopted();
        for round in 0..80_u16 {
            book.add(i64::from(round) * 1_000 + 20, story::pod(round % 3));
        }
        book.0
    }

    fn parse_json(document: &serde_json::Value) -> Vec<Stream> {
        parse("-".as_ref(), &document.to_string()).unwrap()
    }

    #[test]
    fn what_was_put_aside_is_part_of_no_journal() {
        assert_eq!(stream_id("journal-uid-1-head"), Some("uid-1"));
        assert_eq!(stream_id("journal-uid-1-segment-0000000001-0000000009"), Some("uid-1"));
        for name in ["head", "segment-0000000001-0000000009", "folded-0000000009-ab"] {
            assert_eq!(stream_id(&format!("journal-uid-1-aside-77-of-{name}")), None, "{name}");
        }
    }

    #[test]
    fn config_maps_are_read_as_the_operator_reads_them() {
        let records = long();
        let items = dump(&written(&records));
        let packed = items.iter().filter(|item| item["binaryData"].is_object()).count();
        assert!(packed > 0 && packed < items.len(), "the tail was sealed, the head is text");
        let streams = parse_json(&json!({"kind": "List", "apiVersion": "v1", "items": items}));
        assert_eq!(streams.len(), 1);
        assert_eq!((streams[0].history().records(), &streams[0].troubles[..]), (&records[..], [].as_slice()));
        assert_eq!(streams[0].title(), "demo/orders (uid 5f0c1d2e-uid)");
    }

    #[test]
    fn a_missing_segment_is_said_and_the_rest_is_read() {
        let mut items = dump(&written(&long()));
        items.retain(|item| !item.to_string().contains("segment-0000000001"));
        let streams = parse_json(&json!({"kind": "ConfigMapList", "items": items}));
        assert!(!streams[0].troubles.is_empty());
        assert!(!streams[0].stored.is_empty());
        assert_eq!(streams[0].uid, "5f0c1d2e-uid");
    }

    #[test]
    fn one_config_map_alone_is_enough_for_a_short_stream() {
        let records = story::adopted().0;
        let mut items = dump(&written(&records));
        assert_eq!(parse_json(&items.remove(0))[0].history().records(), records);
    }

    #[test]
    fn a_cut_journal_begins_with_what_its_beginning_folds_to() {
        let (items, left) = cut();
        let streams = parse_json(&json!({"kind": "List", "items": items}));
        assert_eq!(streams[0].troubles, [""; 0]);
        assert_eq!((&streams[0].folded, &streams[0].stored), (&left.folded, &left.records));
        assert_eq!(streams[0].title(), "demo/orders (uid 5f0c1d2e-uid)");
        assert_eq!(verify(&streams[0], None).problems, [""; 0]);
    }

    #[test]
    fn what_a_cut_left_is_missed_or_salvaged_like_every_other_object() {
        let (items, left) = cut();
        let is_folded =
            |item: &serde_json::Value| item["metadata"]["name"].to_string().contains(FOLDED_INFIX);
        let without = |gone: &dyn Fn(&serde_json::Value) -> bool| {
            let kept: Vec<_> = items.iter().filter(|item| !gone(item)).collect();
            assert_eq!(kept.len(), items.len() - 1);
            parse_json(&json!({"kind": "List", "items": kept})).remove(0)
        };
        let no_fold = without(&is_folded);
        assert!(!verify(&no_fold, None).problems.is_empty());
        assert_eq!((&no_fold.folded, &no_fold.stored), (&None, &left.records));
        let no_head = without(&|item| item["metadata"]["name"].to_string().contains(HEAD_SUFFIX));
        assert!(!no_head.troubles.is_empty());
        assert_eq!(no_head.folded, left.folded);
        assert!(
            !no_head.stored.is_empty() && left.records.starts_with(&no_head.stored),
            "what was sealed is there"
        );
    }

    #[test]
    fn what_is_packed_badly_is_damage_of_the_object_that_holds_it() {
        for bad in ["no base64!", "bm8gZ3ppcA=="] {
            let mut items = dump(&written(&long()));
            let packed = items.iter_mut().find(|item| item["binaryData"].is_object()).unwrap();
            packed["binaryData"][PACKED_KEY] = json!(bad);
            let name = packed["metadata"]["name"].as_str().unwrap().to_owned();
            let streams = parse_json(&json!({"kind": "List", "items": items}));
            assert!(streams[0].troubles.concat().contains(&name), "{:?}", streams[0].troubles);
            assert!(!streams[0].stored.is_empty());
        }
    }
}
