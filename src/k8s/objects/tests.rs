//! ConfigMaps against an API server that fails in every way it can: what is certain is told from what is not.

use super::{
    fake::{Fault, Server},
    *,
};
use std::sync::Arc;
use tokio::time::Instant;
use valkeeper_core::{
    event::{BaselineOrigin, Event},
    ids::{MemberId, Timestamp},
    observation::Observed,
};
use valkeeper_journal::{Backend, Journal, Segments, StreamId, read_all, verify};

const UID: &str = "0b5f7f0e-8c2a-4f5e-9a57-0c8d5c1d2e3f";

/// Longer than any test takes, by the paused clock.
const LEADS: Duration = Duration::from_secs(3_600);

fn maps(server: &Server) -> ConfigMaps {
    ConfigMaps::new(server.client(), "valkeeper", Leadership::until(Instant::now() + LEADS))
}

fn text(text: &str) -> Body {
    Body::Text(text.to_owned())
}

fn segment_name() -> String {
    format!("journal-{UID}-segment-0000000001-0000000002")
}

fn head_name() -> String {
    format!("journal-{UID}-head")
}

/// A head object, and a store that knows its version.
async fn with_head() -> (Server, ConfigMaps, String) {
    let server = Server::default();
    let maps = maps(&server);
    let version = maps.create(&head_name(), &text("one\n")).await.unwrap();
    (server, maps, version)
}

async fn now(maps: &ConfigMaps) -> String {
    let object = maps.get(&head_name()).await.unwrap().unwrap();
    object.body.text(100).unwrap().into_owned()
}

#[tokio::test(start_paused = true)]
async fn what_is_packed_is_binary_data_and_what_is_text_is_data() {
    let (server, maps, _) = with_head().await;
    let packed = Body::pack("{}\n{}\n");
    let version = maps.create(&segment_name(), &packed).await.unwrap();
    assert_eq!(maps.get(&segment_name()).await.unwrap(), Some(Object { body: packed, version }));
    let kept = server.object(&segment_name()).unwrap();
    assert!(kept["binaryData"]["records.jsonl.gz"].is_string() && kept["data"].is_null(), "{kept}");
    assert_eq!(kept["immutable"], true);
    let head = server.object(&head_name()).unwrap();
    assert_eq!(
        (head["data"]["records.jsonl"].as_str(), &head["immutable"]),
        (Some("one\n"), &serde_json::Value::Null)
    );
    assert_eq!(head["metadata"]["labels"][JOURNAL_LABEL], UID);
    assert!(head["metadata"]["ownerReferences"].is_null(), "history must survive its cluster");
    let listed = maps.list(&format!("journal-{UID}-")).await.unwrap();
    assert_eq!(listed, [head_name(), segment_name()]);
}

#[tokio::test(start_paused = true)]
async fn a_busy_server_is_asked_again_when_it_said_and_once_more_at_most_each_time() {
    let (server, maps, version) = with_head().await;
    server.inject(Fault::Busy(Some(2)));
    server.inject(Fault::Busy(None));
    let begun = Instant::now();
    maps.replace(&head_name(), &version, &text("two\n")).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 2 + 1);
    assert_eq!((now(&maps).await.as_str(), server.calls().len()), ("two\n", 4));
}

#[tokio::test(start_paused = true)]
async fn who_is_not_let_in_in_time_knows_that_nothing_was_written() {
    for waits in [vec![Some(60)], vec![Some(3), Some(2)], vec![None; 9], vec![Some(u32::MAX)]] {
        let (server, maps, version) = with_head().await;
        waits.iter().for_each(|seconds| server.inject(Fault::Busy(*seconds)));
        let begun = Instant::now();
        let refused = maps.replace(&head_name(), &version, &text("two\n")).await.unwrap_err();
        assert!(matches!(refused, ObjectsError::Unavailable(_)), "{waits:?}: {refused}");
        assert!(begun.elapsed() < API_CALL_MAX, "{waits:?}");
        assert_eq!(now(&maps).await, "one\n");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_certain() {
    let (server, maps, version) = with_head().await;
    server.inject(Fault::Quota);
    let full = maps.replace(&head_name(), &version, &text("two\n")).await;
    assert!(matches!(&full, Err(ObjectsError::Unavailable(why)) if why.contains("403")), "{full:?}");
    server.inject(Fault::Touched);
    let touched = maps.replace(&head_name(), &version, &text("two\n")).await;
    assert_eq!(touched, Err(ObjectsError::Conflict));
    assert_eq!(maps.replace(&head_name(), "", &text("two\n")).await, Err(ObjectsError::Conflict));
    assert_eq!(maps.create(&head_name(), &text("two\n")).await, Err(ObjectsError::AlreadyExists));
    assert_eq!(maps.replace("journal-x-head", "1", &text("two\n")).await, Err(ObjectsError::NotFound));
    assert_eq!(maps.delete("journal-x-head").await, Err(ObjectsError::NotFound));
    assert_eq!(maps.get("journal-x-head").await, Ok(None));
    assert_eq!(now(&maps).await, "one\n");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_leaves_it_open_is_never_taken_for_a_refusal_nor_for_a_write() {
    let open = [
        (Fault::ErrorAfterCommit, "two\n"),
        (Fault::ErrorBeforeCommit, "one\n"),
        (Fault::SilentAfterCommit, "two\n"),
        (Fault::SilentBeforeCommit, "one\n"),
        (Fault::SilentLate, "one\n"),
        (Fault::Slow(6_000), "one\n"),
    ];
    for (fault, after) in open {
        let (server, maps, version) = with_head().await;
        server.inject(fault);
        let begun = Instant::now();
        let unknown = maps.replace(&head_name(), &version, &text("two\n")).await;
        assert!(matches!(unknown, Err(ObjectsError::Ambiguous(_))), "{fault:?}: {unknown:?}");
        assert!(begun.elapsed() <= API_CALL_MAX, "{fault:?}");
        assert_eq!(server.calls().len(), 2, "{fault:?} was sent once");
        assert_eq!(now(&maps).await, after, "{fault:?}");
    }
    // A server that is only slow is waited for.
    let (server, maps, version) = with_head().await;
    server.inject(Fault::Slow(4_900));
    maps.replace(&head_name(), &version, &text("two\n")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failovers_write_waits_for_those_before_it_and_for_nobody_after() {
    let server = Server::default();
    let maps = Arc::new(maps(&server));
    let clusters = 300;
    let write = |number: u32| {
        let (maps, server) = (Arc::clone(&maps), server.clone());
        async move {
            server.inject(Fault::Slow(10));
            maps.create(&format!("journal-{number:04}-head"), &text("one\n")).await.unwrap();
        }
    };
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..clusters {
        tasks.spawn(write(number));
    }
    // Everyone is in line; the failover comes last, and then as many again.
    tokio::task::yield_now().await;
    let failover = tokio::spawn(write(9_000));
    tokio::task::yield_now().await;
    for number in clusters..2 * clusters {
        tasks.spawn(write(number));
    }
    failover.await.unwrap();
    let waited = begun.elapsed().as_millis();
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(server.in_flight_most(), lanes::WRITES_MAX);
    assert_eq!(server.order().iter().position(|name| name.contains("9000")), Some(300));
    // 300 before it, 32 at once, 10 ms each.
    assert!((100..=110).contains(&waited), "{waited} ms");
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_line_for_too_long_knows_that_nothing_was_sent() {
    let server = Server::default();
    let maps = Arc::new(maps(&server));
    let mut tasks = tokio::task::JoinSet::new();
    // Each wave is given up after five seconds; the second has its turn when the first one is.
    for wave in 0..2 {
        for number in 0..lanes::WRITES_MAX {
            server.inject(Fault::SilentBeforeCommit);
            let (maps, name) = (Arc::clone(&maps), format!("journal-{wave}-{number}-head"));
            tasks.spawn(async move { maps.create(&name, &text("one\n")).await });
        }
        // On the paused clock: a second lies between the waves, and nobody waits for it.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let begun = Instant::now();
    let refused = maps.create("journal-late-head", &text("one\n")).await.unwrap_err();
    assert!(matches!(refused, ObjectsError::Unavailable(_)), "{refused}");
    assert_eq!(begun.elapsed().as_secs(), LINE_WAIT_MAX.as_secs());
    while let Some(done) = tasks.join_next().await {
        assert!(matches!(done.unwrap(), Err(ObjectsError::Ambiguous(_))));
    }
    assert!(!server.order().iter().any(|name| name.contains("late")), "it was sent");
}

#[tokio::test(start_paused = true)]
async fn who_lost_leadership_while_in_line_sends_nothing() {
    let server = Server::default();
    let leadership = Leadership::until(Instant::now() + Duration::from_secs(1));
    let maps = Arc::new(ConfigMaps::new(server.client(), "valkeeper", leadership));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..=lanes::WRITES_MAX {
        server.inject(Fault::Slow(2_000));
        let maps = Arc::clone(&maps);
        tasks.spawn(async move { maps.create(&format!("journal-{number}-head"), &text("one\n")).await });
    }
    let mut refused = 0;
    while let Some(done) = tasks.join_next().await {
        refused += usize::from(matches!(done.unwrap(), Err(ObjectsError::Unavailable(_))));
    }
    assert_eq!((refused, server.names().len()), (1, lanes::WRITES_MAX));
}

fn stream() -> StreamId {
    StreamId(UID.to_owned())
}

fn at(seconds: i64) -> Timestamp {
    Timestamp(seconds * 1_000_000_000)
}

fn fact(number: u16) -> Event {
    Event::PodChanged { member: MemberId::new(0, number), pod: Observed::Absent }
}

async fn writing(server: &Server) -> (Arc<Segments>, Journal) {
    let backend = Arc::new(Segments::new(Arc::new(maps(server))));
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    let genesis = Event::Baseline {
        cluster_uid: UID.to_owned(),
        namespace: "shop".to_owned(),
        name: "orders".to_owned(),
        origin: BaselineOrigin::Empty,
    };
    journal.claim(Some(genesis), "valkeeper-0", "0.1.0", at(100)).await.unwrap();
    (backend, journal)
}

#[tokio::test(start_paused = true)]
async fn every_fault_of_the_server_leaves_each_record_once() {
    let faults = [
        Fault::Busy(Some(1)),
        Fault::Busy(Some(60)),
        Fault::Quota,
        Fault::ErrorAfterCommit,
        Fault::ErrorBeforeCommit,
        Fault::SilentAfterCommit,
        Fault::SilentBeforeCommit,
        Fault::SilentLate,
        Fault::Slow(4_000),
        Fault::Slow(6_000),
        Fault::Touched,
    ];
    // One fault meets one write, or the first two or three: each attempt of one append.
    for (fault, times) in faults.into_iter().flat_map(|fault| (1..=3).map(move |times| (fault, times))) {
        let server = Server::default();
        let (backend, mut journal) = writing(&server).await;
        (0..times).for_each(|_| server.inject(fault));
        let mut written = 0;
        for number in 0..8 {
            written += match journal.append(vec![fact(number)], at(101)).await {
                Ok(appended) => appended.records.len(),
                Err(valkeeper_journal::Error::Settled(appended)) => appended.records.len(),
                Err(error) => {
                    assert!(error.is_transient(), "{fault:?}: {error:?}");
                    0
                }
            };
            server.deliver_late();
        }
        let records = read_all(&*backend, &stream()).await.unwrap().records;
        assert_eq!(verify(None, &records).problems, [], "{fault:?}");
        // What was refused for certain is not there, and everything else is there once.
        assert_eq!(records.len(), 2 + written, "{fault:?} {times} times");
        let mut facts: Vec<&Event> = records.iter().skip(2).map(|stored| &stored.record.event).collect();
        let all = facts.len();
        facts.dedup();
        assert_eq!(facts.len(), all, "{fault:?}");
        // Another process reads the same.
        let fresh = Segments::new(Arc::new(maps(&server)));
        assert_eq!(read_all(&fresh, &stream()).await.unwrap().records, records);
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_timed_out_and_lands_after_its_retry_is_refused() {
    let server = Server::default();
    let (backend, mut journal) = writing(&server).await;
    server.inject(Fault::SilentLate);
    journal.append(vec![fact(1)], at(101)).await.unwrap();
    assert_eq!(server.deliver_late(), 0);
    // And one that lands before anyone asked again is found to be ours.
    (0..3).for_each(|_| server.inject(Fault::SilentLate));
    assert!(journal.append(vec![fact(2)], at(102)).await.unwrap_err().is_unresolved());
    assert_eq!(server.deliver_late(), 1);
    assert_eq!(journal.resolve().await.unwrap().unwrap().records[0].event, fact(2));
    assert_eq!(backend.head(&stream()).await.unwrap().as_ref(), journal.head());
    assert_eq!(read_all(&*backend, &stream()).await.unwrap().records.len(), 4);
}
