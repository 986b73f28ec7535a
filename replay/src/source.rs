//! Where records come from: a sled directory, the directory of an archive, an export (JSON Lines), or ConfigMaps as
//! `kubectl get configmaps -o json` prints them. What it is, is seen from the content.
//!
//! Damage is no reason to show nothing: what can be read is read, and [`Stream::trouble`] says what could not be.

use crate::{
    Error,
    history::{Gone, History},
};
use std::{
    collections::BTreeSet,
    io::{self, Read},
    path::Path,
};
use valkeeper_core::{event::Event, ids::Timestamp};
use valkeeper_journal::{Folded, Lineage, Stored, StreamId, Whole, import_line, import_lines};

mod archive;
mod config_maps;
mod directory;

pub use archive::join;

/// Digits that name a lineage: as many as name a place in a journal elsewhere.
const LINEAGE_DIGITS_MIN: usize = 12;

/// The journal of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// `metadata.uid` of the cluster's resource.
    pub uid: String,
    /// Its namespace and name, if the beginning of the stream is there.
    pub cluster: Option<(String, String)>,
    /// Records of an archive that belong before those of the store: from record 1 on, without a hole.
    pub archived: Vec<Stored>,
    /// What the stream begins with in the store, if its beginning was cut.
    pub folded: Option<Folded>,
    /// Records that can be read, in order.
    pub stored: Vec<Stored>,
    /// What could not be read, or does not fit together.
    pub troubles: Vec<String>,
    /// The lineage, if this is one of an archive by itself.
    pub lineage: Option<Lineage>,
    /// What an archive has of the stream besides its own lineage.
    pub other_lineages: Vec<String>,
    /// The journals of the same namespace and name that were left for this one, the newest.
    pub namesakes: Vec<String>,
    /// The anchors that the stream was compared with when it was read, if there were any.
    pub anchored: Option<String>,
}

impl Stream {
    fn new(id: Option<&StreamId>, whole: Whole, troubles: Vec<String>) -> Self {
        let Whole { folded, records: stored } = whole;
        let mut stream = Stream {
            uid: id.map(|id| id.0.clone()).unwrap_or_default(),
            cluster: None,
            archived: Vec::new(),
            folded,
            stored,
            troubles,
            lineage: None,
            other_lineages: Vec::new(),
            namesakes: Vec::new(),
            anchored: None,
        };
        if let Some(folded) = &stream.folded {
            let state = folded.state();
            stream.uid.clone_from(&folded.stream().0);
            stream.cluster = Some((state.namespace.clone(), state.name.clone()));
        }
        if let Some(Event::Baseline { cluster_uid, namespace, name, origin: _ }) =
            stream.stored.first().map(|s| &s.record.event)
        {
            stream.uid.clone_from(cluster_uid);
            stream.cluster = Some((namespace.clone(), name.clone()));
        }
        stream
    }

    /// Everything that is there, and what is before it if that is not record 1.
    pub fn origin(&self) -> Origin<'_> {
        let folded = self.folded.as_ref().filter(|_| self.archived.is_empty());
        Origin { folded, records: self.archived.iter().chain(&self.stored).collect() }
    }

    /// As [`Stream::origin`], without the seals.
    pub fn history(&self) -> History {
        let Origin { folded, records } = self.origin();
        History::new(folded, records.into_iter().map(|s| s.record.clone()).collect())
    }

    /// What left the store, if the beginning was cut; an archive may have it.
    pub fn gone(&self) -> Option<Gone> {
        let records = || self.stored.iter().map(|s| &s.record);
        self.folded.as_ref().map(|folded| Gone::new(folded, records()))
    }

    /// When the last record was written, if there is one.
    fn written_at(&self) -> Option<Timestamp> {
        let folded = || self.folded.as_ref().map(|folded| folded.state().head_time);
        self.stored.last().map(|stored| stored.record.time).or_else(folded)
    }

    /// `namespace/name (uid ...)`, and the lineage of an archive that is not the first.
    pub fn title(&self) -> String {
        let uid = &self.uid;
        let title = match &self.cluster {
            Some((namespace, name)) => format!("{namespace}/{name} (uid {uid})"),
            None => format!("unnamed cluster (uid {uid})"),
        };
        match self.lineage.filter(|lineage| !lineage.is_first()) {
            Some(lineage) => format!("{title}, {lineage}"),
            None => title,
        }
    }

    fn is(&self, wanted: &str) -> bool {
        let named =
            |(namespace, name): &(String, String)| wanted == format!("{namespace}/{name}") || wanted == name;
        let is_named = self.uid == wanted || self.cluster.as_ref().is_some_and(named);
        match self.lineage.and_then(Lineage::name) {
            // Without more, an archive's first lineage is meant.
            Some(name) => wanted.len() >= LINEAGE_DIGITS_MIN && name.to_string().starts_with(wanted),
            None => is_named,
        }
    }
}

/// The records of a stream from its beginning on, as far back as they are there.
#[derive(Clone, Debug)]
pub struct Origin<'a> {
    /// What stands for the records before, if there were some.
    pub folded: Option<&'a Folded>,
    /// The records.
    pub records: Vec<&'a Stored>,
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
            config_maps::streams(&document).map_err(not_a_journal)?
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
        streams.into_iter().filter(|s| !s.stored.is_empty() || !s.troubles.is_empty()).collect();
    if streams.is_empty() { Err(Error::Empty { path: path.to_owned() }) } else { Ok(streams) }
}

fn looks_like_a_record(line: &str) -> bool {
    // A record of an unknown kind is still one; the reader says what is wrong with it.
    Folded::is_in(line)
        || import_line(line).is_ok()
        || (line.contains("\"seq\"") && line.contains("\"prev\""))
}

fn export(text: &str) -> Stream {
    let mut stored = Vec::new();
    let mut troubles = Vec::new();
    let mut folded = None;
    let mut lines = import_lines(text.as_bytes());
    while let Some(item) = lines.next() {
        folded = folded.or_else(|| lines.take_folded());
        match item {
            Ok(record) => stored.push(record),
            Err(error) => troubles.push(format!("{error}; nothing after it is read")),
        }
    }
    Stream::new(None, Whole { folded, records: stored }, troubles)
}

/// One of several streams, by UID, `namespace/name` or name; without a choice, the only one. Of a resource that was made again under its
/// name, the journal that was written last. Errors: [`Error::ChooseCluster`] with the choices.
pub fn select(streams: Vec<Stream>, wanted: Option<&str>) -> Result<Stream, Error> {
    let choices: Vec<String> =
        streams.iter().map(|s| format!("  {}, {} records", s.title(), s.stored.len())).collect();
    let mut fitting: Vec<Stream> = streams.into_iter().filter(|s| wanted.is_none_or(|w| s.is(w))).collect();
    if wanted.is_some() && are_of_one_name(&fitting) {
        fitting.sort_by_key(Stream::written_at);
        let newest = fitting.pop().ok_or(Error::NoRows)?;
        let namesakes = fitting.iter().rev().map(|s| format!("{}, {} records", s.title(), s.stored.len()));
        return Ok(Stream { namesakes: namesakes.collect(), ..newest });
    }
    let asked = match (fitting.len(), wanted) {
        (1, _) => return fitting.pop().ok_or(Error::NoRows),
        (0, Some(wanted)) => format!("there is no cluster {wanted:?}"),
        (_, Some(wanted)) => format!("several clusters are {wanted:?}"),
        (_, None) => "there are several clusters".to_owned(),
    };
    Err(Error::ChooseCluster { asked, choices: choices.join("\n") })
}

/// True of the journals of one resource and of those that had its name before: not of the lineages of one archive.
fn are_of_one_name(streams: &[Stream]) -> bool {
    let Some((first, rest)) = streams.split_first() else { return false };
    first.cluster.is_some()
        && rest.iter().all(|s| s.cluster == first.cluster)
        && streams.iter().all(|s| s.lineage.is_none_or(|lineage| lineage.is_first()))
        && streams.iter().map(|s| &s.uid).collect::<BTreeSet<_>>().len() == streams.len()
}

/// Runs a read to its end, on this thread. The runtime has neither timers nor network.
fn wait<T, E: std::error::Error>(reading: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|e| e.to_string())?;
    runtime.block_on(reading).map_err(|e| said(&e))
}

/// An error with its causes: it is kept as text.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod testing {
    use valkeeper_core::{
        event::{Event, Record},
        ids::Digest,
        state::ClusterState,
    };
    use valkeeper_journal::{Backend, BackendError, Folded, Lineage, Stored, StreamId, Whole, read_all};

    /// Cuts a stream at the first place where its store can cut it. Returns what is left then.
    pub async fn cut_after_first_page(store: &dyn Backend, id: &StreamId) -> Result<Whole, BackendError> {
        let page = store.read(id).await?.page().await?.unwrap();
        let through = page.records.last().unwrap().head();
        let gone = page.records.iter().map(|s| &s.record);
        let folded = Folded::new(id, through, Lineage::FIRST, &ClusterState::fold(gone)).unwrap();
        let event = Event::Trimmed {
            through: through.seq,
            hash: Digest(through.hash.to_string()),
            folded: Digest(folded.digest().to_string()),
            archive: None,
        };
        let mut records = read_all(store, id).await?.records;
        let last = records.last().unwrap().head();
        let trimmed = Record { seq: last.seq.next(), epoch: last.epoch, time: last.time, event };
        let trimmed = Stored::seal(trimmed, last.hash).unwrap();
        store.append(id, Some(&last), std::slice::from_ref(&trimmed), Some(&folded)).await.unwrap();
        records.retain(|s| s.record.seq > through.seq);
        records.push(trimmed);
        Ok(Whole { folded: Some(folded), records })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::export as export_text,
        story::{self, sealed},
    };

    const PATH: &str = "-";

    #[test]
    fn an_export_is_known_by_its_first_line() {
        let text = export_text(None, &sealed(&story::failover()));
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
            archived: Vec::new(),
            folded: None,
            stored: Vec::new(),
            troubles: Vec::new(),
            lineage: None,
            other_lineages: Vec::new(),
            namesakes: Vec::new(),
            anchored: None,
        };
        let all = || vec![stream("u1", "orders"), stream("u2", "orders"), stream("u3", "carts")];
        let error = select(all(), None).unwrap_err();
        assert!(error.is_usage());
        assert!(error.to_string().contains("  demo/carts (uid u3), 0 records"), "{error}");
        let elsewhere = Stream { cluster: Some(("test".into(), "carts".into())), ..stream("u4", "carts") };
        let error = select([all(), vec![elsewhere]].concat(), Some("carts")).unwrap_err().to_string();
        assert!(error.starts_with("several clusters are \"carts\""), "{error}");
        assert!(
            select(all(), Some("nope")).unwrap_err().to_string().starts_with("there is no cluster \"nope\"")
        );
        for wanted in ["u3", "demo/carts", "carts"] {
            assert_eq!(select(all(), Some(wanted)).unwrap().uid, "u3", "{wanted}");
        }
        assert_eq!(select(vec![stream("u1", "orders")], None).unwrap().uid, "u1");
    }

    #[test]
    fn of_a_resource_that_was_made_again_the_newest_journal_is_taken_and_the_others_are_named() {
        let text = export_text(None, &sealed(&story::failover()));
        let known = parse(Path::new(PATH), &text).unwrap().remove(0);
        let of = |uid: &str, records: usize| {
            let stored = known.stored.iter().take(records).cloned().collect();
            Stream { uid: uid.to_owned(), stored, ..known.clone() }
        };
        let (namespace, name) = known.cluster.clone().unwrap();
        let all = || vec![of("u1", 3), of("u2", 22), of("u3", 0)];
        for wanted in [name.clone(), format!("{namespace}/{name}")] {
            let chosen = select(all(), Some(&wanted)).unwrap();
            assert_eq!(chosen.uid, "u2");
            let others = ["(uid u1), 3 records", "(uid u3), 0 records"];
            assert!(
                chosen.namesakes.iter().zip(others).all(|(other, end)| other.ends_with(end)),
                "{chosen:?}"
            );
            assert_eq!(chosen.namesakes.len(), 2);
        }
        assert_eq!(select(all(), Some("u1")).unwrap().uid, "u1");
        assert!(select(all(), None).unwrap_err().is_usage(), "nobody has said which");
    }
}
