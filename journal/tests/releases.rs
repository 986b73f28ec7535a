//! What every release wrote is read by every later one. `fixtures/<version>/` holds journals as that version wrote them; they are never
//! changed. A release that writes another layout, kind or level adds its own: VALKEEPER_FIXTURE=1 cargo test -p valkeeper-journal --test
//! releases writes those of the present version, once.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::at;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use valkeeper_core::{
    event::{CloseReason, Event},
    ids::{MemberId, NodeId, Seq},
    observation::NodeFacts,
    state::ClusterState,
    weights::SlotWeights,
};
use valkeeper_journal::{
    Backend, Error, Folded, Journal, KINDS, LEVEL_MAX, MayGo, Memory, Retention, Stored, StreamId, Whole,
    codec::encode, decode_stream, export_line, import_lines, read_all, verify,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Records of a story that has most kinds of events.
fn story() -> Vec<Stored> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/operator_restart/journal.jsonl");
    import_lines(fs::read(path).unwrap().as_slice()).map(Result::unwrap).collect()
}

/// A node of a Valkey Cluster with everything that it can say.
fn node() -> Event {
    let id = |digit: &str| -> NodeId { digit.repeat(40).parse().unwrap() };
    let knows = [(id("b"), Some("10.0.0.2".to_owned())), (id("c"), None)];
    let node = NodeFacts {
        id: id("a"),
        primary: None,
        epoch: 3,
        slots: "0-5460 6000".parse().unwrap(),
        knows: knows.into(),
        meeting: ["10.0.0.4".to_owned()].into(),
        failed: [id("c")].into(),
        covered: 5_462,
        exports: Vec::new(),
        exports_unread: false,
        import_failed: None,
        migrating: Default::default(),
        importing: Default::default(),
        down: false,
    };
    Event::NodeChanged { member: MemberId::new(0, 1), node }
}

/// The story as a stream that was finalized and cut.
async fn written() -> (Whole, Whole) {
    let story = story();
    let Event::Baseline { cluster_uid, .. } = &story[0].record.event else { panic!("no Baseline") };
    let stream = StreamId(cluster_uid.clone());
    let memory = Arc::new(Memory::new());
    memory.append(&stream, None, &story, None).await.unwrap();
    let (mut journal, _) = Journal::open(memory.clone(), stream.clone()).await.unwrap();
    let last = story.last().unwrap().record.time;
    journal.claim(None, "valkeeper-1", env!("CARGO_PKG_VERSION"), last).await.unwrap();
    let level = Event::LevelRaised { level: LEVEL_MAX, version: env!("CARGO_PKG_VERSION").to_owned() };
    // The kinds that the story lacks.
    let closed = Event::DecisionClosed { decision: Seq(8), how: CloseReason::Superseded };
    let counts = SlotWeights::sum_up(&[(0, 3), (1, 900), (7, 0)], 4_096);
    let weighed = Event::SlotsWeighed { member: MemberId::new(0, 1), weights: Some(counts) };
    journal.append(vec![closed, node(), weighed, level], last).await.unwrap();
    let whole = read_all(&*memory, &stream).await.unwrap();
    journal.retain(Retention { keep_bytes: 20_000, keep_ms: None, may_go: MayGo::Any });
    assert_eq!(journal.trim(last).await.unwrap().records.len(), 1);
    (whole, read_all(&*memory, &stream).await.unwrap())
}

fn export(Whole { folded, records }: &Whole) -> String {
    let folded = folded.iter().map(|folded| folded.text().to_owned());
    folded.chain(records.iter().map(export_line)).map(|line| line + "\n").collect()
}

fn import(text: &[u8]) -> Whole {
    let mut lines = import_lines(text);
    let mut records = Vec::new();
    let mut folded: Option<Folded> = None;
    while let Some(line) = lines.next() {
        folded = folded.or(lines.take_folded());
        records.push(line.unwrap());
    }
    Whole { folded, records }
}

#[tokio::test]
async fn journals_of_every_release_are_read_and_keep_their_bytes() {
    let present = fixtures().join(env!("CARGO_PKG_VERSION"));
    if std::env::var_os("VALKEEPER_FIXTURE").is_some() && !present.exists() {
        let (whole, cut) = written().await;
        fs::create_dir_all(&present).unwrap();
        fs::write(present.join("whole.jsonl"), export(&whole)).unwrap();
        fs::write(present.join("whole.frames"), whole.records.iter().flat_map(encode).collect::<Vec<_>>())
            .unwrap();
        fs::write(present.join("cut.jsonl"), export(&cut)).unwrap();
    }
    let versions: Vec<PathBuf> =
        fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!versions.is_empty());
    for version in versions {
        let name = version.display();
        let text = fs::read(version.join("whole.jsonl")).unwrap();
        let whole = import(&text);
        assert_eq!(verify(None, &whole.records).problems, [], "{name}");
        assert_eq!(export(&whole).as_bytes(), text, "{name}");
        let frames = fs::read(version.join("whole.frames")).unwrap();
        let decoded: Vec<Stored> = decode_stream(&frames).map(Result::unwrap).collect();
        assert_eq!(decoded, whole.records, "{name}");
        assert_eq!(decoded.iter().flat_map(encode).collect::<Vec<_>>(), frames, "{name}");
        let cut = import(&fs::read(version.join("cut.jsonl")).unwrap());
        assert_eq!(verify(cut.folded.as_ref(), &cut.records).problems, [], "{name}");
        // What was cut folds on to what the whole stream folds to, but for the record of the cut itself.
        let mut state = cut.folded.unwrap().state().clone();
        let known = whole.records.last().unwrap().record.seq;
        cut.records.iter().filter(|s| s.record.seq <= known).for_each(|s| state.apply(&s.record));
        assert_eq!(state, ClusterState::fold(whole.records.iter().map(|s| &s.record)), "{name}");
    }
}

#[test]
fn every_release_tag_and_every_kind_has_its_fixture() {
    let tags = Command::new("git").args(["tag", "--list", "v*"]).current_dir(fixtures()).output().unwrap();
    assert!(tags.status.success(), "{tags:?}");
    for tag in String::from_utf8(tags.stdout).unwrap().lines() {
        let version = tag.trim_start_matches('v');
        assert!(fixtures().join(version).is_dir(), "{tag} was released and has no fixture");
    }
    let present = import(&fs::read(fixtures().join(env!("CARGO_PKG_VERSION")).join("cut.jsonl")).unwrap());
    let whole = import(&fs::read(fixtures().join(env!("CARGO_PKG_VERSION")).join("whole.jsonl")).unwrap());
    for kind in KINDS {
        let has = |s: &Stored| s.record.event.kind() == kind.number;
        let found = present.records.iter().chain(&whole.records).any(has);
        assert!(found, "no fixture has a {}", kind.name);
    }
}

#[tokio::test]
async fn a_stream_is_finalized_once_and_never_at_a_level_that_this_program_does_not_know() {
    let memory = Arc::new(Memory::new());
    let (mut journal, state) = Journal::open(memory.clone(), common::stream()).await.unwrap();
    assert_eq!(state.level, 0);
    journal.claim(Some(common::baseline(&common::stream())), "w", "v", at(1)).await.unwrap();
    let refused = journal.finalize(LEVEL_MAX + 1, "v", at(2)).await.unwrap_err();
    assert!(matches!(refused, Error::UnknownLevel { level } if level == LEVEL_MAX + 1), "{refused:?}");
    // The first level is that of every stream.
    assert_eq!(journal.finalize(LEVEL_MAX, "v", at(2)).await.unwrap().records.len(), 0);
    assert_eq!(journal.head().unwrap().seq, Seq(2));
}

#[tokio::test]
async fn a_stream_that_a_later_version_finalized_is_refused_with_that_version() {
    let memory = Arc::new(Memory::new());
    let mut journal = {
        let (mut journal, _) = Journal::open(memory.clone(), common::stream()).await.unwrap();
        journal.claim(Some(common::baseline(&common::stream())), "w", "v", at(1)).await.unwrap();
        journal
    };
    let later = Event::LevelRaised { level: LEVEL_MAX + 1, version: "9.0.0".to_owned() };
    journal.append(vec![later], at(2)).await.unwrap();
    let refused = Journal::open(memory, common::stream()).await.err().unwrap();
    assert!(refused.is_newer() && refused.is_broken(), "{refused:?}");
    let said = std::error::Error::source(&refused).and_then(|e| e.source()).unwrap().to_string();
    assert_eq!(
        said,
        "record 3: version 9.0.0 finalized the stream at level 2; this program reads up to level 1"
    );
}
