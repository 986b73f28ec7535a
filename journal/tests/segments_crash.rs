//! Streams kept as named objects (ConfigMaps): the process dies at each of its writes, made or not made, and a second time at each of
//! the first writes of its successor. Whatever was acknowledged is there, and what a crash left behind is collected.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use async_trait::async_trait;
use common::{at, baseline, big, fact, stream, whole};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use valkeeper_core::{event::Record, state::ClusterState};
use valkeeper_journal::{
    Appended, Backend, Error, Journal, Object, Objects, ObjectsError, Retention, Segments, Whole,
    archive::{Archive, MemoryBlobs},
    retention::MayGo,
    retire,
    segments::{Body, MemoryObjects, TEXT_BYTES_MAX},
    verify,
};

/// What the workload keeps: less than one tail, so that each trim cuts whatever is sealed.
const KEEP: Retention = Retention { keep_bytes: 12_000, keep_ms: None, may_go: MayGo::Any };

/// Appends of one life. Each but the first seals, so there are eight segments to be merged before the first cut.
const APPENDS: u16 = 17;

/// Writes of a successor at which it dies, too.
const SECOND_DEATHS: usize = 7;

/// The connection of a process that dies at one of its writes, and asks nothing after that.
struct Mortal {
    objects: Arc<MemoryObjects>,
    /// Writes until then.
    left: AtomicUsize,
    /// Whether the last one is made.
    is_made: bool,
}

impl Mortal {
    fn alive(&self) -> Result<(), ObjectsError> {
        let dead = || ObjectsError::Unavailable("the process is dead".to_owned());
        if self.left.load(Ordering::SeqCst) == 0 { Err(dead()) } else { Ok(()) }
    }

    async fn write<T>(&self, call: impl Future<Output = Result<T, ObjectsError>>) -> Result<T, ObjectsError> {
        self.alive()?;
        let last = || ObjectsError::Ambiguous("the process died".to_owned());
        match (self.left.fetch_sub(1, Ordering::SeqCst), self.is_made) {
            (1, true) => call.await.and(Err(last())),
            (1, false) => Err(last()),
            (_, _) => call.await,
        }
    }
}

#[async_trait]
impl Objects for Mortal {
    async fn get(&self, name: &str) -> Result<Option<Object>, ObjectsError> {
        self.alive()?;
        self.objects.get(name).await
    }

    async fn create(&self, name: &str, body: &Body) -> Result<String, ObjectsError> {
        self.write(self.objects.create(name, body)).await
    }

    async fn replace(&self, name: &str, version: &str, body: &Body) -> Result<String, ObjectsError> {
        self.write(self.objects.replace(name, version, body)).await
    }

    async fn delete(&self, name: &str) -> Result<(), ObjectsError> {
        self.write(self.objects.delete(name)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, ObjectsError> {
        self.alive()?;
        self.objects.list(prefix).await
    }
}

/// The stream as everyone who was answered knows it.
#[derive(Default)]
struct History {
    records: BTreeMap<u64, Record>,
    cuts: usize,
    merges: usize,
}

impl History {
    fn ack(&mut self, appended: &Appended) {
        for record in &appended.records {
            let before = self.records.insert(record.seq.0, record.clone());
            assert!(before.is_none_or(|before| before == *record), "{record:?} was acknowledged twice");
        }
    }

    /// What is in the store is what was acknowledged, and perhaps the one batch that was not answered.
    fn check(&mut self, Whole { folded, records }: &Whole, state: &ClusterState, place: &str) {
        assert_eq!(verify(folded.as_ref(), records).problems, [], "{place}");
        let cut = folded.as_ref().map_or(0, |folded| folded.head().seq.0);
        let last = records.last().map_or(0, |stored| stored.record.seq.0);
        for (seq, record) in &self.records {
            assert!(*seq <= last, "{place}: {record:?} was acknowledged and is not there");
        }
        for stored in records {
            let seq = stored.record.seq.0;
            let known = self.records.entry(seq).or_insert_with(|| stored.record.clone());
            assert_eq!(*known, stored.record, "{place}");
        }
        let all: Vec<u64> = self.records.keys().copied().collect();
        assert_eq!(all, (1..=last).collect::<Vec<u64>>(), "{place}: cut up to {cut}");
        let mut whole = ClusterState::default();
        self.records.values().for_each(|record| whole.apply(record));
        assert!(whole == *state, "{place}: the state is not what everything folds to");
    }
}

/// One process: opens, claims, appends, merges and cuts, and is followed by another that claims.
async fn live(objects: Arc<dyn Objects>, history: &mut History) -> Result<(), Error> {
    let backend = Arc::new(Segments::new(objects));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await?;
    journal.retain(KEEP);
    let from = i64::try_from(history.records.len()).unwrap() + 100;
    history.ack(&journal.claim(Some(baseline(&stream())), "valkeeper-0", "0.1.0", at(from)).await?);
    for number in 0..APPENDS {
        // Text is what takes time here: one append fills the tail, the next one finds it full.
        let events = if number % 2 == 0 { vec![fact(number)] } else { vec![big(16_000)] };
        history.ack(&journal.append(events, at(from + i64::from(number))).await?);
        if number == 10 {
            journal.maintain().await?;
            history.merges += 1;
        }
        if number == 13 || number == 15 {
            let trimmed = journal.trim(at(from + 50)).await?;
            history.cuts += trimmed.records.len();
            history.ack(&trimmed);
            journal.maintain().await?;
        }
    }
    let (mut next, _) = Journal::open(backend, stream()).await?;
    history.ack(&next.claim(None, "valkeeper-1", "0.1.0", at(from + 60)).await?);
    history.ack(&next.append(vec![fact(100)], at(from + 61)).await?);
    Ok(())
}

/// Checks what a dead process left. `None`: there is no stream yet.
async fn look(objects: &Arc<MemoryObjects>, history: &mut History, place: &str) {
    let backend = Arc::new(Segments::new(objects.clone()));
    let opened = Journal::open(backend.clone(), stream()).await;
    let (_, state) = opened.unwrap_or_else(|e| panic!("{place}: {e:?}"));
    history.check(&whole(&*backend).await, &state, place);
}

/// Names of objects that the head does not name.
fn leftovers(objects: &MemoryObjects) -> Vec<String> {
    let mut found = Vec::new();
    objects.edit(|all| {
        let head = all.values().find(|object| matches!(object.body, Body::Text(_))).unwrap();
        let text = head.body.text(TEXT_BYTES_MAX).unwrap();
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let segments = first["segments"].as_array().unwrap().iter();
        let mut named: Vec<String> = segments
            .map(|s| {
                format!("segment-{:010}-{:010}", s["first"].as_u64().unwrap(), s["last"].as_u64().unwrap())
            })
            .collect();
        named.extend(first["folded"]["seq"].as_u64().map(|seq| format!("folded-{seq:010}")));
        named.push("-head".to_owned());
        found = all.keys().filter(|name| !named.iter().any(|part| name.contains(part))).cloned().collect();
    });
    found
}

/// Lives on without a crash, then tidies.
async fn recover(objects: &Arc<MemoryObjects>, history: &mut History, place: &str) {
    live(objects.clone(), history).await.unwrap_or_else(|e| panic!("{place}: {e:?}"));
    let backend = Arc::new(Segments::new(objects.clone()));
    let (mut journal, _) = Journal::open(backend, stream()).await.unwrap();
    journal.maintain().await.unwrap();
    assert_eq!(leftovers(objects), Vec::<String>::new(), "{place}");
    look(objects, history, place).await;
}

fn mortal(objects: &Arc<MemoryObjects>, writes: usize, is_made: bool) -> Arc<Mortal> {
    Arc::new(Mortal { objects: objects.clone(), left: AtomicUsize::new(writes), is_made })
}

#[tokio::test]
async fn a_crash_at_any_write_loses_nothing_and_what_it_leaves_is_collected() {
    let (mut runs, mut collected) = (0, 0);
    for is_made in [false, true] {
        // Until the workload ends before the process does.
        for death in 1..1_000 {
            let objects = Arc::new(MemoryObjects::new());
            let mut history = History::default();
            let place = format!("died at write {death}, made: {is_made}");
            let lived = live(mortal(&objects, death, is_made), &mut history).await;
            look(&objects, &mut history, &place).await;
            if lived.is_ok() {
                assert!(history.cuts > 0 && history.merges > 0 && death > 40, "{place}: too short a life");
                break;
            }
            collected += usize::from(objects.writes() > 1 && !leftovers(&objects).is_empty());
            recover(&objects, &mut history, &place).await;
            runs += 1;
        }
    }
    assert!(collected > 20, "{collected}: hardly a crash left anything");
    eprintln!("{runs} runs, {collected} of them left something to collect");
}

#[tokio::test]
async fn a_crash_while_a_stream_is_retired_leaves_it_whole_or_half_removed_and_the_next_one_ends_it() {
    let mut found = BTreeMap::<&str, usize>::new();
    for is_made in [false, true] {
        for death in 1..1_000 {
            let objects = Arc::new(MemoryObjects::new());
            live(objects.clone(), &mut History::default()).await.unwrap();
            let archive = Archive::new(Arc::new(MemoryBlobs::default()));
            let dying = Segments::new(mortal(&objects, death, is_made));
            let retired = retire(&dying, &stream(), Some(&archive)).await;
            let place = format!("died at write {death}, made: {is_made}");
            let backend = Segments::new(objects.clone());
            let (streams, half) = (backend.streams().await.unwrap(), backend.half_removed().await.unwrap());
            let state = match (&retired, streams.len(), half.len()) {
                (Ok(_), 0, 0) => "gone",
                (Err(_), 1, _) => {
                    assert!(verify_all(&backend).await, "{place}: it can be read as before");
                    "whole"
                }
                // The last write may have been the last of all.
                (Err(_), 0, 0..=1) => "half removed",
                other => panic!("{place}: {other:?}"),
            };
            *found.entry(state).or_default() += 1;
            for stream in half.iter().filter(|_| state == "half removed") {
                backend.remove(stream).await.unwrap();
            }
            retire(&backend, &stream(), Some(&archive)).await.unwrap();
            objects.edit(|all| assert_eq!(all.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "{place}"));
            if retired.is_ok() {
                break;
            }
        }
    }
    assert!(found["whole"] >= 2 && found["half removed"] >= 4 && found["gone"] == 2, "{found:?}");
}

/// True if the stream is there and intact.
async fn verify_all(backend: &Segments) -> bool {
    let Whole { folded, records } = whole(backend).await;
    !records.is_empty() && verify(folded.as_ref(), &records).problems.is_empty()
}

#[tokio::test]
async fn a_second_crash_while_the_successor_begins_loses_nothing() {
    let mut runs = 0;
    // Every third write of the first life, from shortly before its merge on.
    for (death, is_made) in (20..50).step_by(3).flat_map(|death| [(death, false), (death, true)]) {
        for second in 1..=SECOND_DEATHS {
            let objects = Arc::new(MemoryObjects::new());
            let mut history = History::default();
            let place = format!("died at write {death} and at write {second} after it, made: {is_made}");
            assert!(live(mortal(&objects, death, is_made), &mut history).await.is_err(), "{place}");
            look(&objects, &mut history, &place).await;
            assert!(live(mortal(&objects, second, !is_made), &mut history).await.is_err(), "{place}");
            look(&objects, &mut history, &place).await;
            runs += 1;
            if second == SECOND_DEATHS {
                recover(&objects, &mut history, &place).await;
            }
        }
    }
    eprintln!("{runs} runs with two deaths");
}
