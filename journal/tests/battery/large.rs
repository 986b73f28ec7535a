//! Many records: what it costs to start, and whether the store stays small when its streams are cut.

use crate::{
    check::{check, is_all, row},
    common::{Scratch, at, baseline, big, fact, stream},
};
use std::{fs, path::Path, process::Command, sync::Arc, time::Instant};
use valkeeper_core::event::Event;
use valkeeper_journal::{Backend, Journal, MayGo, Retention, Sled};

/// Memory that a start may take: the program and its state, sled's cache, its table of pages, and a page of records. By
/// measurement 36 MiB for half a million records, which take 130 MiB on the disk.
const START_KIB_MAX: u64 = 96 * 1024;

/// The store after every cycle of filling and cutting, as a multiple of what is kept.
const DISK_FACTOR_MAX: u64 = 4;

fn events(number: u64) -> Vec<Event> {
    (0..500).map(|n| fact(((number + n) % 10) as u16)).collect()
}

const START_DIR: &str = "VALKEEPER_BATTERY_START_DIR";

/// Opens a large stream and says how long it took and how much memory the process has had.
#[tokio::test]
async fn child_starts() {
    let Ok(dir) = std::env::var(START_DIR) else { return };
    let begin = Instant::now();
    let backend = Arc::new(Sled::open_with_limit(Path::new(&dir), usize::MAX).unwrap());
    let (journal, _) = Journal::open(backend, stream()).await.unwrap();
    let took = begin.elapsed().as_millis();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak = peak.trim().trim_end_matches("kB").trim();
    let head = journal.head().unwrap().seq;
    let said = format!("\nsaid {head} {took} {peak}\n");
    std::io::Write::write_all(&mut std::io::stdout(), said.as_bytes()).unwrap();
}

#[tokio::test]
async fn a_long_stream_starts_with_bounded_memory() {
    let appends = if is_all() { 2_000 } else { 40 };
    for keep_bytes in [None, Some(8 << 20)] {
        let scratch = Scratch::new("long");
        let dir = scratch.path("journal");
        let backend: Arc<dyn Backend> = Arc::new(Sled::open_with_limit(&dir, usize::MAX).unwrap());
        let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
        if let Some(keep_bytes) = keep_bytes {
            journal.retain(Retention { keep_bytes, keep_ms: None, may_go: MayGo::Any });
        }
        journal.claim(Some(baseline(&stream())), "w", "v", at(100)).await.unwrap();
        for number in 0..appends {
            journal.append(events(number), at(101)).await.unwrap();
            if number % 20 == 0 {
                journal.trim(at(102)).await.unwrap();
                backend.maintain(&stream()).await.unwrap();
            }
        }
        let head = journal.head().unwrap().seq.0;
        drop((journal, backend));
        let disk = fs::metadata(dir.join("db")).unwrap().len();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "large::child_starts", "--nocapture"])
            .env(START_DIR, &dir)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said =
            text.lines().find_map(|line| line.strip_prefix("said ")).unwrap_or_else(|| panic!("{text}"));
        let numbers: Vec<u64> = said.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let [found, took_ms, peak_kib] = numbers[..] else { panic!("{said}") };
        let mut failures = Vec::new();
        if found != head || peak_kib > START_KIB_MAX {
            failures.push(format!("head {found} of {head}, {peak_kib} KiB"));
        }
        let kept = keep_bytes.map_or("all kept".to_owned(), |bytes| format!("{} MiB kept", bytes >> 20));
        let (disk, peak) = (disk >> 20, peak_kib >> 10);
        row(
            &format!("{head} records, {kept}: start {took_ms} ms, {peak} MiB; disk {disk} MiB"),
            1,
            &failures,
        );
    }
}

#[tokio::test]
async fn what_is_cut_gives_its_space_back() {
    let scratch = Scratch::new("space");
    let dir = scratch.path("journal");
    let keep_bytes = if is_all() { 16 << 20 } else { 4 << 20 };
    let (cycles, per_append) = if is_all() { (10, 1) } else { (5, 8) };
    let backend: Arc<dyn Backend> = Arc::new(Sled::open_with_limit(&dir, 4 * keep_bytes).unwrap());
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await.unwrap();
    journal.retain(Retention { keep_bytes, keep_ms: None, may_go: MayGo::Any });
    let mut acked = journal.claim(Some(baseline(&stream())), "w", "v", at(100)).await.unwrap().records;
    let (mut sizes, mut failures) = (Vec::new(), Vec::new());
    for cycle in 0..cycles {
        while backend.read(&stream()).await.unwrap().bytes() < keep_bytes + keep_bytes / 8 {
            for number in 0..50 {
                let events = (0..per_append).flat_map(|_| [fact(number), big(900)]).collect();
                acked.extend(journal.append(events, at(101)).await.unwrap().records);
            }
        }
        acked.extend(journal.trim(at(102)).await.unwrap().records);
        // In every second cycle nobody has a quiet moment.
        if cycle % 2 == 0 {
            backend.maintain(&stream()).await.unwrap();
        }
        sizes.push(fs::metadata(dir.join("db")).unwrap().len());
    }
    let largest = sizes.iter().copied().max().unwrap();
    if largest > DISK_FACTOR_MAX * keep_bytes as u64 {
        failures.push(format!("{sizes:?}"));
    }
    drop((journal, backend));
    failures.extend(check(&dir, &acked).await.err());
    let mib: Vec<u64> = sizes.iter().map(|size| size >> 20).collect();
    row(&format!("fill and cut, {} MiB kept: disk MiB {mib:?}", keep_bytes >> 20), cycles, &failures);
}
