//! Runs every story of tests/golden with the battery: a crash after each record, each outcome lost, each effect failed,
//! done but reported as failed, and repeated. What a story expects must hold in every run.

#![allow(
    missing_docs,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests"
)]

use std::path::{Path, PathBuf};
use valkeeper_core::sim::{Perturbation, Sim, Story};

fn stories() -> Vec<(String, Story)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(&root).expect("tests/golden").map(|e| e.expect("entry").path()).collect();
    folders.sort();
    folders
        .into_iter()
        .map(|folder| {
            let name = folder.file_name().expect("name").to_string_lossy().into_owned();
            let text =
                std::fs::read_to_string(folder.join("script.txt")).unwrap_or_else(|e| panic!("{name}: {e}"));
            (name, Story::parse(&text))
        })
        .collect()
}

fn effects(sim: &Sim) -> usize {
    sim.records.iter().filter_map(|r| r.event.decided()).map(|d| d.effects.len()).sum()
}

#[test]
fn every_story_goes_as_written() {
    let failed: Vec<String> = stories()
        .iter()
        .filter_map(|(name, story)| {
            story.run(Perturbation::None, |_, _| {}).err().map(|e| format!("{name}: {e}"))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Runs one story under every perturbation; the failures, and how many runs there were.
fn battery(name: &str, story: &Story) -> (Vec<String>, usize) {
    let plain = story.run(Perturbation::None, |_, _| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
    // A write is there as a whole or not at all: a crash after any of its records is the same crash.
    let crashes = plain.writes.iter().copied().map(Perturbation::CrashAfter);
    let lost = plain.done.iter().copied().map(Perturbation::LoseOutcome);
    let faults = (0..effects(&plain)).flat_map(|n| {
        [Perturbation::FailEffect(n), Perturbation::DoneButFailed(n), Perturbation::RepeatEffect(n)]
    });
    let mut runs = 0;
    let mut failed = Vec::new();
    for perturbation in crashes.chain(lost).chain(faults) {
        runs += 1;
        if let Err(e) = story.run(perturbation.clone(), |_, _| {}) {
            failed.push(format!("{name} with {perturbation:?}: {e}"));
        }
    }
    (failed, runs)
}

#[test]
fn every_story_ends_the_same_whatever_happens_to_the_operator() {
    let stories = stories();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let results = std::sync::Mutex::new((Vec::new(), 0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some((name, story)) =
                    stories.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    let (failed, runs) = battery(name, story);
                    let mut results = results.lock().expect("no panic holds it");
                    results.0.extend(failed);
                    results.1 += runs;
                }
            });
        }
    });
    let (failed, runs) = results.into_inner().expect("no panic holds it");
    println!("{runs} runs of {} stories", stories.len());
    assert!(
        failed.is_empty(),
        "{} of {runs} runs:\n{}",
        failed.len(),
        failed[..failed.len().min(40)].join("\n")
    );
    assert!(runs > 1_000, "the battery ran only {runs} times");
}
