//! What must hold after every fault, and the row of the table that says how often it was tried.

use crate::common::{at, fact, stream};
use std::{fs::OpenOptions, io::Write, path::Path, sync::Arc};
use valkeeper_core::{event::Record, state::ClusterState};
use valkeeper_journal::{Backend, Error, Journal, Sled, read_all};

/// Set: every round of every fault, by hand. Its value is the file for the rows of the table.
const ALL: &str = "VALKEEPER_BATTERY";

/// True if every round is to be done.
pub fn is_all() -> bool {
    std::env::var_os(ALL).is_some()
}

/// One of the numbers if a part is enough, else all of them.
pub fn every<T>(step: usize, all: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
    all.step_by(if is_all() { 1 } else { step })
}

/// Ends the test of a fault: says how it went, and fails if something did.
pub fn row(fault: &str, rounds: usize, failures: &[String]) {
    let line = format!("{fault:<92} {rounds:>6} {:>8}\n", failures.len());
    if let Some(table) = std::env::var_os(ALL) {
        OpenOptions::new().append(true).create(true).open(table).unwrap().write_all(line.as_bytes()).unwrap();
    }
    assert!(rounds > 0, "{fault}: nothing was tried");
    assert!(failures.is_empty(), "{fault}, {rounds} rounds: {failures:#?}");
}

/// Opens the store and compares it with what was acknowledged, in order from record 1.
pub async fn check(dir: &Path, acked: &[Record]) -> Result<(), String> {
    let store = Sled::open(dir).map_err(|e| format!("not opened: {e:?}"))?;
    let backend: Arc<dyn Backend> = Arc::new(store);
    check_open(backend, acked).await
}

/// [`check`] of a store that is open. Nothing acknowledged is missing; what was cut is covered by a fold that equals the fold
/// of all that was acknowledged; the chain verifies; and going on works.
pub async fn check_open(backend: Arc<dyn Backend>, acked: &[Record]) -> Result<(), String> {
    let (mut journal, state) =
        Journal::open(backend.clone(), stream()).await.map_err(|e| format!("not read: {e:?}"))?;
    let whole = read_all(backend.as_ref(), &stream()).await.map_err(|e| format!("not read: {e:?}"))?;
    let through = whole.folded.as_ref().map_or(0, |folded| folded.head().seq.0);
    let (gone, kept) =
        acked.split_at_checked(through as usize).ok_or("more was cut than was acknowledged")?;
    if let Some(folded) = &whole.folded
        && *folded.state() != ClusterState::fold(gone)
    {
        return Err(format!("the fold up to {through} is not the fold of the records"));
    }
    let found: Vec<&Record> = whole.records.iter().map(|stored| &stored.record).collect();
    let is_there = found.len() >= kept.len() && found.iter().zip(kept).all(|(found, kept)| *found == kept);
    if !is_there {
        let (last, head) = (acked.last().map_or(0, |r| r.seq.0), through as usize + found.len());
        return Err(format!("acknowledged up to {last}, found up to {head}"));
    }
    let mut full = ClusterState::fold(acked);
    found.iter().skip(kept.len()).for_each(|record| full.apply(record));
    if full != state {
        return Err("the state is not the fold of all records".to_owned());
    }
    let baseline = (found.is_empty() && through == 0).then(|| crate::common::baseline(&stream()));
    let goes_on = async {
        journal.claim(baseline, "after", "v", at(900)).await?;
        journal.append(vec![fact(9)], at(901)).await?;
        Ok::<_, Error>(())
    };
    goes_on.await.map_err(|e| format!("does not go on: {e:?}"))
}
