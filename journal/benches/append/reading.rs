//! What reading costs: folding, verifying, and the start of an operator by the length of its stream.

use super::{baseline, sealed, server, stream};
use std::{fs, hint::black_box, path::Path, sync::Arc, time::Instant};
use valkeeper_core::{event::Event, ids::Timestamp, state::ClusterState};
use valkeeper_journal::{
    Journal, MayGo, Retention, Sled, Stored, decode_stream, encode, export_line, import_lines, verify_chain,
};

const FOLDED: usize = 200_000;

/// Bytes that are kept where a stream is cut: what the operator keeps in sled if nobody says.
const KEEP_BYTES: usize = 48 * 1024 * 1024;

/// Records of an append: as many as a batch may have.
const BATCH: usize = 400;

pub fn fold() {
    let records: Vec<Stored> = sealed(1, FOLDED).remove(0);
    let frames: Vec<u8> = records.iter().flat_map(encode).collect();
    let lines: String = records.iter().map(|s| export_line(s) + "\n").collect();
    println!("\n{:<40} {:>9} {:>9}", format!("reading {FOLDED} records"), "s", "rec/s");
    let report = |name: &str, begin: Instant| {
        let took = begin.elapsed().as_secs_f64();
        println!("{name:<40} {took:>9.3} {:>9.0}", FOLDED as f64 / took);
    };
    let begin = Instant::now();
    black_box(ClusterState::fold(records.iter().map(|s| &s.record)));
    report("fold", begin);
    let begin = Instant::now();
    let decoded: Vec<Stored> = decode_stream(&frames).map(Result::unwrap).collect();
    black_box(ClusterState::fold(decoded.iter().map(|s| &s.record)));
    report("decode frames + fold", begin);
    let begin = Instant::now();
    black_box(verify_chain(None, &decoded)).unwrap();
    report("verify the chain", begin);
    let begin = Instant::now();
    let imported: Vec<Stored> = import_lines(lines.as_bytes()).map(Result::unwrap).collect();
    black_box(ClusterState::fold(imported.iter().map(|s| &s.record)));
    report("import lines + fold", begin);
}

/// Opens streams of more and more records, whole and cut.
pub fn start(dir: &Path, is_all: bool) {
    println!(
        "\n{:<40} {:>9} {:>9} {:>9} {:>9}",
        "start of a stream in sled", "s", "rec/s", "MiB disk", "bytes/rec"
    );
    let lengths: &[usize] = if is_all { &[1_000, 10_000, 100_000, 1_000_000] } else { &[1_000, 10_000] };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for length in lengths {
        for keep_bytes in [None, Some(KEEP_BYTES)] {
            let path = dir.join(format!("start-{length}-{}", keep_bytes.is_some()));
            runtime.block_on(fill(&path, *length, keep_bytes));
            let begin = Instant::now();
            let backend = Arc::new(Sled::open_with_limit(&path, usize::MAX).unwrap());
            let opened = runtime.block_on(Journal::open(backend, stream())).unwrap();
            let took = begin.elapsed().as_secs_f64();
            let head = opened.0.head().unwrap().seq.0 as f64;
            let disk = fs::metadata(path.join("db")).unwrap().len() as f64;
            let kept = keep_bytes.map_or("all kept".to_owned(), |bytes| format!("{} MiB kept", bytes >> 20));
            println!(
                "{:<40} {took:>9.3} {:>9.0} {:>9.1} {:>9.0}",
                format!("{head} records, {kept}"),
                head / took,
                disk / f64::from(1 << 20),
                disk / head
            );
            drop(opened);
            fs::remove_dir_all(&path).unwrap();
        }
    }
}

async fn fill(path: &Path, length: usize, keep_bytes: Option<usize>) {
    let backend = Arc::new(Sled::open_with_limit(path, usize::MAX).unwrap());
    let (mut journal, _) = Journal::open(backend, stream()).await.unwrap();
    if let Some(keep_bytes) = keep_bytes {
        journal.retain(Retention { keep_bytes, keep_ms: None, may_go: MayGo::Any });
    }
    journal.claim(Some(baseline()), "bench", "0.1.0", Timestamp(0)).await.unwrap();
    for first in (0..length).step_by(BATCH) {
        // Facts only: decisions that nobody closes would stay in the state.
        let events: Vec<Event> = (first..length.min(first + BATCH)).map(server).collect();
        journal.append(events, Timestamp(first as i64)).await.unwrap();
        if (first / BATCH).is_multiple_of(16) {
            journal.trim(Timestamp(first as i64)).await.unwrap();
            journal.maintain().await.unwrap();
        }
    }
}
