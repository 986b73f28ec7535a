//! Where records come from: a sled directory, an export (JSON Lines), or ConfigMaps as `kubectl get configmaps -o json`
//! prints them. What it is, is seen from the content.
//!
//! Damage is no reason to show nothing: what can be read is read, and [`Stream::trouble`] says what could not be.

use crate::Error;
use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::Path,
    sync::Arc,
};
use valkeeper_core::event::{Event, Record};
use valkeeper_journal::{
    Backend, BackendError, Stored, StreamId, import_line, import_lines,
    segments::{MemoryObjects, Object, Segments},
};

mod directory;

/// Names of journal objects, within the name of a ConfigMap.
const OBJECT_PREFIX: &str = "journal-";
/// End of the head object's name.
const HEAD_SUFFIX: &str = "-head";
/// What stands between a stream's id and the sequences of a segment.
const SEGMENT_INFIX: &str = "-segment-";
/// Where a ConfigMap has its text.
const DATA_KEY: &str = "records.jsonl";

/// The journal of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// `metadata.uid` of the cluster's resource.
    pub uid: String,
    /// Its namespace and name, if the beginning of the stream is there.
    pub cluster: Option<(String, String)>,
    /// Records that can be read, in order.
    pub stored: Vec<Stored>,
    /// What could not be read, if anything.
    pub trouble: Option<String>,
    /// The anchors that the stream was compared with when it was read, if there were any.
    pub anchored: Option<String>,
}

impl Stream {
    fn new(id: Option<&StreamId>, stored: Vec<Stored>, trouble: Option<String>) -> Self {
        let mut stream = Stream {
            uid: id.map(|id| id.0.clone()).unwrap_or_default(),
            cluster: None,
            stored,
            trouble,
            anchored: None,
        };
        if let Some(Event::Baseline { cluster_uid, namespace, name, origin: _ }) =
            stream.stored.first().map(|s| &s.record.event)
        {
            stream.uid.clone_from(cluster_uid);
            stream.cluster = Some((namespace.clone(), name.clone()));
        }
        stream
    }

    /// The records without their seals.
    pub fn records(&self) -> Vec<Record> {
        self.stored.iter().map(|s| s.record.clone()).collect()
    }

    /// `namespace/name (uid ...)`.
    pub fn title(&self) -> String {
        let uid = &self.uid;
        match &self.cluster {
            Some((namespace, name)) => format!("{namespace}/{name} (uid {uid})"),
            None => format!("unnamed cluster (uid {uid})"),
        }
    }

    fn is(&self, wanted: &str) -> bool {
        let named =
            |(namespace, name): &(String, String)| wanted == format!("{namespace}/{name}") || wanted == name;
        self.uid == wanted || self.cluster.as_ref().is_some_and(named)
    }
}

/// Reads the streams at `path`; `-` is standard input. Errors: nothing can be read, or nothing in it is a journal.
pub fn load(path: &Path) -> Result<Vec<Stream>, Error> {
    let failed = |source: io::Error| Error::Read { path: path.to_owned(), source };
    if path != Path::new("-") && path.is_dir() {
        return directory::load(path);
    }
    let mut text = String::new();
    if path == Path::new("-") {
        io::stdin().lock().read_to_string(&mut text).map_err(failed)?;
    } else {
        text = std::fs::read_to_string(path).map_err(failed)?;
    }
    parse(path, &text)
}

/// Reads the streams in a text; `path` is its name in errors.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Stream>, Error> {
    let not_a_journal = |why: String| Error::NotAJournal { path: path.to_owned(), why };
    let first = text.lines().find(|line| !line.trim().is_empty());
    let Some(first) = first else { return Err(Error::Empty { path: path.to_owned() }) };
    let streams = match serde_json::from_str::<serde_json::Value>(text) {
        Ok(document) if document.get("kind").and_then(|k| k.as_str()).is_some() => {
            config_maps(&document).map_err(not_a_journal)?
        }
        // One line that is a record, several lines that are no one document, or something else.
        Ok(_) | Err(_) if first.trim_start().starts_with('{') && looks_like_a_record(first) => {
            vec![export(text)]
        }
        Ok(_) | Err(_) => {
            let expected =
                "expected a sled directory, an export (JSON Lines) or `kubectl get configmaps -o json`";
            return Err(not_a_journal(expected.to_owned()));
        }
    };
    let streams: Vec<Stream> =
        streams.into_iter().filter(|s| !s.stored.is_empty() || s.trouble.is_some()).collect();
    if streams.is_empty() { Err(Error::Empty { path: path.to_owned() }) } else { Ok(streams) }
}

fn looks_like_a_record(line: &str) -> bool {
    // A record of an unknown kind is still one; the reader says what is wrong with it.
    import_line(line).is_ok() || (line.contains("\"seq\"") && line.contains("\"prev\""))
}

fn export(text: &str) -> Stream {
    let mut stored = Vec::new();
    let mut trouble = None;
    for item in import_lines(text.as_bytes()) {
        match item {
            Ok(record) => stored.push(record),
            Err(error) => trouble = Some(format!("{error}; nothing after it is read")),
        }
    }
    Stream::new(None, stored, trouble)
}

/// One of several streams, by UID, `namespace/name` or name; without a choice, the only one. Errors:
/// [`Error::ChooseCluster`] with the choices.
pub fn select(streams: Vec<Stream>, wanted: Option<&str>) -> Result<Stream, Error> {
    let choices: Vec<String> =
        streams.iter().map(|s| format!("  {}, {} records", s.title(), s.stored.len())).collect();
    let mut fitting: Vec<Stream> = streams.into_iter().filter(|s| wanted.is_none_or(|w| s.is(w))).collect();
    let asked = match (fitting.len(), wanted) {
        (1, _) => return fitting.pop().ok_or(Error::NoRows),
        (0, Some(wanted)) => format!("there is no cluster {wanted:?}"),
        (_, Some(wanted)) => format!("several clusters are {wanted:?}"),
        (_, None) => "there are several clusters".to_owned(),
    };
    Err(Error::ChooseCluster { asked, choices: choices.join("\n") })
}

/// Journal objects in a ConfigMap or a list of them, by the name that the journal gave them.
fn config_maps(document: &serde_json::Value) -> Result<Vec<Stream>, String> {
    let kind = document.get("kind").and_then(|k| k.as_str()).unwrap_or_default();
    let items: Vec<&serde_json::Value> = match (kind, document.get("items").and_then(|i| i.as_array())) {
        ("ConfigMap", _) => vec![document],
        ("List" | "ConfigMapList", Some(items)) => items.iter().collect(),
        (_, _) => return Err(format!("it is a {kind}; expected ConfigMaps")),
    };
    let objects: BTreeMap<String, String> = items.into_iter().filter_map(journal_object).collect();
    if objects.is_empty() {
        return Err("none of its ConfigMaps is part of a journal".to_owned());
    }
    let ids: std::collections::BTreeSet<&str> = objects.keys().filter_map(|name| stream_id(name)).collect();
    Ok(ids.into_iter().map(|id| from_objects(id, &objects)).collect())
}

fn journal_object(item: &serde_json::Value) -> Option<(String, String)> {
    let name = item.pointer("/metadata/name")?.as_str()?;
    let name = name.get(name.find(OBJECT_PREFIX)?..)?;
    stream_id(name)?;
    let data = item.get("data")?.as_object()?;
    Some((name.to_owned(), data.get(DATA_KEY)?.as_str()?.to_owned()))
}

fn stream_id(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(OBJECT_PREFIX)?;
    rest.strip_suffix(HEAD_SUFFIX).or_else(|| rest.split_once(SEGMENT_INFIX).map(|(id, _)| id))
}

/// Reads a stream as the operator would; if that is refused, whatever lines there are.
fn from_objects(id: &str, objects: &BTreeMap<String, String>) -> Stream {
    let stream = StreamId(id.to_owned());
    let memory = MemoryObjects::new();
    memory.edit(|all| {
        for (name, text) in objects {
            all.insert(name.clone(), Object { bytes: text.clone(), version: "1".to_owned() });
        }
    });
    match wait(async { Segments::new(Arc::new(memory)).read(&stream).await }) {
        Ok(stored) => Stream::new(Some(&stream), stored, None),
        Err(error) => Stream::new(Some(&stream), salvage(id, objects), Some(error.to_string())),
    }
}

/// Every line of a stream's objects that is a record, each once, in order of sequence.
fn salvage(id: &str, objects: &BTreeMap<String, String>) -> Vec<Stored> {
    let mut records: Vec<Stored> = Vec::new();
    for (_, text) in objects.iter().filter(|(name, _)| stream_id(name) == Some(id)) {
        records.extend(text.lines().filter_map(|line| import_line(line).ok()));
    }
    records.sort_by_key(|s| s.record.seq);
    records.dedup();
    records
}

/// Runs a read of a backend to its end, on this thread. The runtime has neither timers nor network.
fn wait<T>(reading: impl Future<Output = Result<T, BackendError>>) -> Result<T, BackendError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|e| BackendError::Unavailable(e.to_string()))?;
    runtime.block_on(reading)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use valkeeper_journal::Hash;

    /// Records sealed into a chain.
    pub(crate) fn sealed(records: &[Record]) -> Vec<Stored> {
        let mut prev = Hash::ZERO;
        let seal = |record: &Record| {
            let stored = Stored::seal(record.clone(), prev).unwrap();
            prev = stored.hash;
            stored
        };
        records.iter().map(seal).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::sealed, *};
    use crate::{export::export as export_text, story};
    use serde_json::json;

    const PATH: &str = "-";

    /// The ConfigMaps that the operator would have made of a journal, appended record by record.
    fn dump(records: &[Record]) -> Vec<serde_json::Value> {
        let objects = Arc::new(MemoryObjects::new());
        let stored = sealed(records);
        let id = StreamId("5f0c1d2e-uid".into());
        let writer = Segments::new(objects.clone());
        let mut head = None;
        for record in &stored {
            let append = async {
                writer.append(&id, head.as_ref(), std::slice::from_ref(record)).await.unwrap();
                Ok(())
            };
            wait(append).unwrap();
            head = Some(record.head());
        }
        let mut items = Vec::new();
        objects.edit(|all| {
            for (name, object) in all.iter() {
                items.push(json!({"kind": "ConfigMap", "metadata": {"name": name}, "data": {DATA_KEY: object.bytes}}));
            }
        });
        items
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
        parse(Path::new(PATH), &document.to_string()).unwrap()
    }

    #[test]
    fn config_maps_are_read_as_the_operator_reads_them() {
        let records = long();
        let items = dump(&records);
        assert!(items.len() > 1, "the tail was sealed");
        let streams = parse_json(&json!({"kind": "List", "apiVersion": "v1", "items": items}));
        assert_eq!(streams.len(), 1);
        assert_eq!((streams[0].records(), &streams[0].trouble), (records, &None));
        assert_eq!(streams[0].title(), "demo/orders (uid 5f0c1d2e-uid)");
    }

    #[test]
    fn a_missing_segment_is_said_and_the_rest_is_read() {
        let mut items = dump(&long());
        items.retain(|item| !item.to_string().contains("segment-0000000001"));
        let streams = parse_json(&json!({"kind": "ConfigMapList", "items": items}));
        assert!(streams[0].trouble.is_some());
        assert!(!streams[0].stored.is_empty());
        assert_eq!(streams[0].uid, "5f0c1d2e-uid");
    }

    #[test]
    fn one_config_map_alone_is_enough_for_a_short_stream() {
        let records = story::adopted().0;
        let mut items = dump(&records);
        assert_eq!(parse_json(&items.remove(0))[0].records(), records);
    }

    #[test]
    fn an_export_is_known_by_its_first_line() {
        let text = export_text(&sealed(&story::failover()));
        assert_eq!(parse(Path::new(PATH), &text).unwrap()[0].stored.len(), 22);
        let one = text.lines().next().unwrap();
        assert_eq!(parse(Path::new(PATH), one).unwrap()[0].stored.len(), 1);
    }

    #[test]
    fn what_is_no_journal_is_refused_with_what_is_expected() {
        let told = |text: &str| parse(Path::new(PATH), text).unwrap_err().to_string();
        assert_eq!(told("\n"), "- holds no records");
        assert!(told("apiVersion: v1\nkind: List").contains("expected a sled directory, an export"));
        assert!(told(r#"{"kind": "Pod"}"#).contains("it is a Pod; expected ConfigMaps"));
        assert!(told(r#"{"kind": "List", "items": []}"#).contains("none of its ConfigMaps"));
        assert!(told("{}").contains("expected"));
    }

    #[test]
    fn several_clusters_need_a_choice_and_are_listed() {
        let stream = |uid: &str, name: &str| Stream {
            uid: uid.into(),
            cluster: Some(("demo".into(), name.into())),
            stored: Vec::new(),
            trouble: None,
            anchored: None,
        };
        let all = || vec![stream("u1", "orders"), stream("u2", "orders"), stream("u3", "carts")];
        let error = select(all(), None).unwrap_err();
        assert!(error.is_usage());
        assert!(error.to_string().contains("  demo/carts (uid u3), 0 records"), "{error}");
        assert!(
            select(all(), Some("demo/orders")).unwrap_err().to_string().starts_with("several clusters are")
        );
        assert!(
            select(all(), Some("nope")).unwrap_err().to_string().starts_with("there is no cluster \"nope\"")
        );
        for wanted in ["u3", "demo/carts", "carts"] {
            assert_eq!(select(all(), Some(wanted)).unwrap().uid, "u3", "{wanted}");
        }
        assert_eq!(select(vec![stream("u1", "orders")], None).unwrap().uid, "u1");
    }
}
