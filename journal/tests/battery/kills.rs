//! SIGKILL at every system call that writes, and in the middle of every write.

use crate::{
    check::{check, every, is_all, row},
    child::{Fault, Plan, Said, failing},
    common::Scratch,
};
use std::{collections::BTreeMap, os::unix::process::ExitStatusExt};

/// Everything with which something reaches the disk, or its name.
const CALLS: &str =
    "pwrite64,write,fdatasync,fsync,sync_file_range,rename,unlink,ftruncate64,open,mkdir,chmod,";

/// Calls that a child makes at most; it makes about 160.
const CALLS_MAX: usize = 2_000;

const PHASES: [&str; 5] = ["open of a new store", "append", "cut", "maintain", "open of an existing store"];

/// Kills a child at each call in turn, until it comes to its end.
async fn kills(name: &str, calls: &'static str, how: &'static str, step: usize) {
    let mut rounds: BTreeMap<String, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    let mut is_done = false;
    for at in every(step, 1..CALLS_MAX) {
        let scratch = Scratch::new("kill-at");
        let dir = scratch.path("journal");
        let output = failing(&dir, Plan::Once, Fault { calls, at, count: 1, how });
        let said = Said::of(&output.stdout);
        is_done = said.is_done;
        if is_done {
            break;
        }
        *rounds.entry(said.phase.clone()).or_default() += 1;
        if output.status.signal() != Some(9) {
            failures.push(format!("{at}: {:?}", String::from_utf8_lossy(&output.stderr)));
        }
        if let Err(why) = check(&dir, &said.acked).await {
            failures.push(format!("{} {at}: {why}", said.phase));
        }
    }
    assert!(is_done, "the child never came to its end");
    if is_all() {
        for phase in PHASES {
            let rounds = rounds.remove(phase).unwrap_or_default();
            let failed: Vec<String> = failures.iter().filter(|why| why.starts_with(phase)).cloned().collect();
            row(&format!("{name}: {phase}"), rounds, &failed);
        }
        assert!(rounds.is_empty(), "{rounds:?}");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[tokio::test]
async fn a_kill_before_any_call_that_writes_loses_nothing() {
    kills("SIGKILL before each write, sync, rename, open", CALLS, "kill", 23).await;
}

#[tokio::test]
async fn a_kill_in_the_middle_of_any_write_loses_nothing() {
    kills("SIGKILL in the middle of each write", "pwrite64,write,", "torn", 17).await;
}
