//! Appends of many streams at once, which share their syncs, next to a file that takes them one after the other.

use super::{ROW_MAX, alternatives, event};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use valkeeper_core::{
    event::{BaselineOrigin, Event},
    ids::Timestamp,
};
use valkeeper_journal::{Backend, Journal, Sled, StreamId};

/// Appends of each stream: enough for a steady state.
const APPENDS_EACH: usize = 400;

pub fn table(dir: &Path) {
    let bare = alternatives::bare(&dir.join("bare-group"), 1);
    let bare_each = bare.took.iter().sum::<Duration>().as_secs_f64() / bare.took.len() as f64;
    println!(
        "\n{:<40} {:>9} {:>9} {:>9} {:>9} {:>11} {:>7}",
        "durable appends of many streams at once",
        "p50 us",
        "p99 us",
        "app/s",
        "us each",
        "bare us",
        "x bare"
    );
    for streams in [1, 8, 64] {
        let begin = Instant::now();
        let mut took = all(&dir.join(format!("group-{streams}")), streams);
        let each = begin.elapsed().as_secs_f64() / took.len() as f64;
        took.sort();
        let p = |percent: usize| took[(took.len() - 1) * percent / 100].as_secs_f64() * 1e6;
        println!(
            "{:<40} {:>9.1} {:>9.1} {:>9.0} {:>9.1} {:>11.1} {:>7.2}",
            format!("sled, {streams} streams"),
            p(50),
            p(99),
            1.0 / each,
            each * 1e6,
            bare_each * 1e6,
            each / bare_each
        );
    }
}

fn all(path: &Path, streams: usize) -> Vec<Duration> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(path).unwrap());
    runtime.block_on(async {
        let mut writers = Vec::new();
        for number in 0..streams {
            writers.push(tokio::spawn(one(backend.clone(), StreamId(format!("uid-{number:04}")))));
        }
        let mut took = Vec::new();
        for writer in writers {
            took.extend(writer.await.unwrap());
        }
        took
    })
}

async fn one(backend: Arc<dyn Backend>, stream: StreamId) -> Vec<Duration> {
    let (mut journal, _) = Journal::open(backend, stream.clone()).await.unwrap();
    let (namespace, name) = ("shop".to_owned(), "orders".to_owned());
    let baseline =
        Event::Baseline { cluster_uid: stream.0.clone(), namespace, name, origin: BaselineOrigin::Empty };
    journal.claim(Some(baseline), "bench", "0.1.0", Timestamp(0)).await.unwrap();
    let mut took = Vec::new();
    let row = Instant::now();
    while took.len() < APPENDS_EACH && row.elapsed() < ROW_MAX {
        let begin = Instant::now();
        journal.append(vec![event(took.len())], Timestamp(took.len() as i64)).await.unwrap();
        took.push(begin.elapsed());
    }
    took
}
