//! A disk that fails, is full, or is slow.

use crate::{
    check::{check, check_open, every, is_all, row},
    child::{Fault, Plan, Said, fail, failing},
    common::{Scratch, at, baseline, big, fact, stream},
};
use std::{
    fs,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};
use valkeeper_core::event::Record;
use valkeeper_journal::{Backend, Error, Journal, MayGo, Retention, Sled};

/// Calls of one kind that a child makes at most; it makes about 200.
const CALLS_MAX: usize = 2_000;

/// A fault at each call in turn. The child opens the journal again when it is refused; afterwards the disk is well.
async fn faults(name: &str, fault: Fault, step: usize) {
    let (mut rounds, mut refused, mut failures, mut is_done) = (0, 0, Vec::new(), false);
    for at in every(step, 1..CALLS_MAX) {
        let scratch = Scratch::new("fault");
        let dir = scratch.path("journal");
        let output = failing(&dir, Plan::Stubborn, Fault { at, ..fault });
        let said = Said::of(&output.stdout);
        is_done = said.is_done && said.refused == 0 && said.phase == "end";
        if is_done {
            break;
        }
        rounds += 1;
        refused += said.refused;
        if let Err(why) = check(&dir, &said.acked).await {
            failures.push(format!("{at}: {why}"));
        }
        // What fails for a moment does not end the process, unless the store could not even be opened.
        if fault.count > 0 && !said.phase.is_empty() && said.phase != "end" {
            failures.push(format!("{at}: it did not go on after {}: {}", said.phase, said.last_refusal));
        }
    }
    assert!(is_done, "{name}: the child never came to its end");
    assert!(refused > 0, "{name}: no child was refused");
    row(name, rounds, &failures);
}

#[tokio::test]
async fn a_sync_that_fails_once_is_refused_and_the_process_goes_on() {
    let fault = Fault { calls: "fdatasync,fsync,sync_file_range,", at: 1, count: 1, how: "eio" };
    faults("EIO once, at each fdatasync, fsync, sync_file_range", fault, 17).await;
}

#[tokio::test]
async fn a_sync_that_fails_from_some_moment_on_is_refused_and_nothing_is_lost() {
    let fault = Fault { calls: "fdatasync,fsync,sync_file_range,", at: 1, count: 0, how: "eio" };
    faults("EIO from each fdatasync, fsync, sync_file_range on", fault, 17).await;
}

#[tokio::test]
async fn a_write_without_space_is_refused_and_the_process_goes_on() {
    let fault = Fault { calls: "pwrite64,write,", at: 1, count: 3, how: "enospc" };
    faults("ENOSPC at each write and the two after it", fault, 17).await;
}

#[tokio::test]
async fn a_write_that_fails_once_is_refused_and_the_process_goes_on() {
    let fault = Fault { calls: "pwrite64,write,", at: 1, count: 1, how: "eio" };
    faults("EIO once, at each write", fault, 17).await;
}

/// A filesystem in memory of this many KiB, gone at the end.
struct Small<'a>(&'a Path);

impl Small<'_> {
    fn mount(at: &Path, kib: usize) -> Small<'_> {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={kib}k");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).status();
        assert!(done.unwrap().success(), "mount needs root");
        Small(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

async fn claimed(backend: &Arc<dyn Backend>, acked: &mut Vec<Record>) -> Result<Journal, Error> {
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await?;
    journal.retain(Retention { keep_bytes: 1_000_000, keep_ms: None, may_go: MayGo::Any });
    let genesis = journal.head().is_none().then(|| baseline(&stream()));
    acked.extend(journal.claim(genesis, "w", "v", at(100)).await?.records);
    Ok(journal)
}

/// With root only: a real filesystem that is full, in an append or in a cut, and has space again while the process runs.
#[tokio::test]
async fn a_full_disk_refuses_and_with_space_again_the_same_process_goes_on() {
    if !is_all() {
        return;
    }
    let (mut rounds, mut failures) = (0, Vec::new());
    for round in 0..20 {
        let scratch = Scratch::new("full");
        let mount = scratch.path("mount");
        let _small = Small::mount(&mount, 12 * 1024);
        let filler = mount.join("filler");
        // Other amounts of space, so that it ends in other writes; and in every second round it ends in a cut.
        fs::write(&filler, vec![1; 5 << 20]).unwrap();
        let backend: Arc<dyn Backend> = Arc::new(Sled::open(&mount.join("journal")).unwrap());
        let mut acked = Vec::new();
        let mut journal = claimed(&backend, &mut acked).await.unwrap();
        for number in 0..150 {
            acked.extend(
                journal.append(vec![fact(number), big(7_000 + round * 100)], at(101)).await.unwrap().records,
            );
        }
        if round % 2 == 1 {
            fs::write(mount.join("rest"), vec![1; 12 << 20]).unwrap_err();
        }
        let mut refused = None;
        for number in 0..2_000u16 {
            let done = match number {
                0 if round % 2 == 1 => journal.trim(at(102)).await,
                _ => journal.append(vec![big(9_000)], at(103)).await,
            };
            match done {
                Ok(appended) => acked.extend(appended.records),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        rounds += 1;
        if !matches!(refused, Some(Error::Poisoned(_))) {
            failures.push(format!("round {round}: not refused as poisoned, but {refused:?}"));
        }
        // Still full: it may be refused again, and nothing is lost.
        let _ = Journal::open(backend.clone(), stream()).await;
        fs::remove_file(&filler).unwrap();
        let _ = fs::remove_file(mount.join("rest"));
        if let Err(why) = check_open(backend, &acked).await {
            failures.push(format!("round {round}: {why}"));
        }
    }
    row("full tmpfs in append and cut, then space again, same process", rounds, &failures);
}

/// What a disk may take for a sync before anybody else has to notice.
const SLOW: Duration = Duration::from_secs(2);

const SLOW_DIR: &str = "VALKEEPER_BATTERY_SLOW_DIR";

/// Appends once while a timer of the same runtime ticks, and says how long both took.
#[tokio::test]
async fn child_appends_to_a_slow_disk() {
    let Ok(dir) = std::env::var(SLOW_DIR) else { return };
    let backend: Arc<dyn Backend> = Arc::new(Sled::open(Path::new(&dir)).unwrap());
    let mut journal = claimed(&backend, &mut Vec::new()).await.unwrap();
    let begin = Instant::now();
    let (mut last, mut longest) = (begin, Duration::ZERO);
    let append = journal.append(vec![fact(1)], at(101));
    tokio::pin!(append);
    let mut timer = tokio::time::interval(Duration::from_millis(10));
    loop {
        tokio::select! {
            done = &mut append => {
                done.unwrap();
                break;
            }
            _ = timer.tick() => {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
        };
    }
    std::io::Write::write_all(
        &mut std::io::stdout(),
        format!("\nslow {} {}\n", begin.elapsed().as_millis(), longest.as_millis()).as_bytes(),
    )
    .unwrap();
}

#[test]
fn a_slow_disk_holds_up_nobody_else() {
    let scratch = Scratch::new("slow");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "disk::child_appends_to_a_slow_disk", "--nocapture"]);
    command.env(SLOW_DIR, scratch.path("journal"));
    // The three of the claim pass first.
    fail(&mut command, Fault { calls: "fdatasync,", at: 4, count: 0, how: "slow" });
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("slow ")).unwrap_or_else(|| panic!("{text}"));
    let (took_ms, longest_ms) = line.split_once(' ').unwrap();
    let (took_ms, longest_ms): (u128, u128) = (took_ms.parse().unwrap(), longest_ms.parse().unwrap());
    assert!(took_ms >= SLOW.as_millis(), "the append took {took_ms} ms: the disk was not slow");
    let failures = if longest_ms < 1_000 { vec![] } else { vec![format!("a timer waited {longest_ms} ms")] };
    row("2 s for each fdatasync: a timer of the same thread goes on", 1, &failures);
}
