//! The process to which it happens, how it is started, and how its system calls fail.

use crate::common::{at, baseline, big, fact, stream};
use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, OnceLock},
};
use valkeeper_core::{event::Record, ids::Seq};
use valkeeper_journal::{Appended, Backend, Error, Journal, MayGo, Retention, Sled, read_all};

const DIR: &str = "VALKEEPER_BATTERY_DIR";
const PLAN: &str = "VALKEEPER_BATTERY_PLAN";

/// Bytes of the stream that are kept: two of the large appends, so that a cut takes the others.
const KEEP_BYTES: usize = 130_000;

/// How often a journal that was refused is opened again.
const REOPENS_MAX: usize = 8;

/// What a child does.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// Opens a new store, fills it, cuts it, closes it, opens it again, cuts it again; ends.
    Once,
    /// The same on the store that is there; opens the journal again when it is refused.
    Stubborn,
    /// Appends until it is killed.
    Endless,
}

/// Calls that fail in a child.
#[derive(Clone, Copy)]
pub struct Fault {
    /// Names, each with a comma behind it.
    pub calls: &'static str,
    /// The first that fails, from 1.
    pub at: usize,
    /// How many fail; 0: all from there on.
    pub count: usize,
    /// What happens to them: see `tests/battery/fail_at.c`.
    pub how: &'static str,
}

/// The library that lets calls fail, made once.
fn library() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/battery/fail_at.c");
        let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fail_at-{}.so", std::process::id()));
        let done =
            Command::new("cc").args(["-shared", "-fPIC", "-O1", source, "-ldl", "-o"]).arg(&made).status();
        assert!(done.expect("there is a C compiler").success());
        made
    })
}

/// Lets calls of a process fail.
pub fn fail(command: &mut Command, fault: Fault) {
    let Fault { calls, at, count, how } = fault;
    command.env("LD_PRELOAD", library()).env("FAIL_CALLS", calls).env("FAIL_HOW", how);
    command.env("FAIL_AT", at.to_string()).env("FAIL_COUNT", count.to_string());
}

/// The command of a child.
pub fn command(dir: &Path, plan: Plan) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child::child_does_its_plan", "--nocapture", "--test-threads=1"]);
    command.env(DIR, dir).env(PLAN, format!("{plan:?}"));
    command
}

/// A child whose calls fail, to its end.
pub fn failing(dir: &Path, plan: Plan, fault: Fault) -> Output {
    let mut command = command(dir, plan);
    fail(&mut command, fault);
    command.output().unwrap()
}

/// What a child said.
#[derive(Default)]
pub struct Said {
    /// Every record up to the last that was acknowledged; also those whose append was refused and that were there later.
    pub acked: Vec<Record>,
    /// What it did last.
    pub phase: String,
    /// How often it was refused and opened the journal again.
    pub refused: usize,
    /// Why it was, the last time.
    pub last_refusal: String,
    /// It came to the end of its plan.
    pub is_done: bool,
}

impl Said {
    pub fn of(stdout: &[u8]) -> Said {
        let mut said = Said::default();
        let (mut records, mut last) = (BTreeMap::new(), Seq(0));
        let parsed = |json| serde_json::from_str::<Vec<Record>>(json).unwrap_or_default();
        for line in String::from_utf8_lossy(stdout).lines() {
            // A line that a kill cut off was not said.
            if let Some((_, json)) = line.split_once("acked ") {
                let more = parsed(json);
                last = more.last().map_or(last, |record| record.seq);
                records.extend(more.into_iter().map(|record| (record.seq, record)));
            } else if let Some((_, json)) = line.split_once("found ") {
                records.extend(parsed(json).into_iter().map(|record| (record.seq, record)));
            } else if let Some((_, phase)) = line.split_once("phase ") {
                said.phase = phase.to_owned();
            } else if let Some((_, why)) = line.split_once("refused ") {
                said.refused += 1;
                said.last_refusal = why.to_owned();
            } else if line.contains("plan done") {
                said.is_done = true;
            }
        }
        said.acked = records.into_values().filter(|record| record.seq <= last).collect();
        said
    }
}

fn say(line: &str) {
    // Nobody listens any more: the parent has seen enough.
    let _ = writeln!(std::io::stdout(), "\n{line}");
}

/// Without the variables, a test that has nothing to do.
#[test]
fn child_does_its_plan() {
    let (Ok(dir), Ok(plan)) = (std::env::var(DIR), std::env::var(PLAN)) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        match plan.as_str() {
            "Once" => twice(Path::new(&dir)).await.unwrap(),
            "Stubborn" => stubborn(Path::new(&dir)).await,
            _ => endless(Path::new(&dir)).await,
        }
    });
    say("plan done");
}

async fn claimed(backend: &Arc<dyn Backend>) -> Result<Journal, Error> {
    let (mut journal, _) = Journal::open(backend.clone(), stream()).await?;
    journal.retain(Retention { keep_bytes: KEEP_BYTES, keep_ms: None, may_go: MayGo::Any });
    let genesis = journal.head().is_none().then(|| baseline(&stream()));
    acked(&journal.claim(genesis, "child", "v", at(100)).await?);
    Ok(journal)
}

fn acked(appended: &Appended) {
    say(&format!("acked {}", serde_json::to_string(&appended.records).unwrap()));
}

fn store(dir: &Path) -> Result<Arc<dyn Backend>, Error> {
    Ok(Arc::new(Sled::open(dir)?))
}

async fn twice(dir: &Path) -> Result<(), Error> {
    for phase in ["open of a new store", "open of an existing store"] {
        say(&format!("phase {phase}"));
        let backend = store(dir)?;
        fill(&backend, &mut claimed(&backend).await?).await?;
    }
    Ok(())
}

/// Small and large appends, a cut, and what comes after it.
async fn fill(backend: &Arc<dyn Backend>, journal: &mut Journal) -> Result<(), Error> {
    say("phase append");
    for number in 0..4 {
        acked(&journal.append(vec![fact(number)], at(101)).await?);
        acked(&journal.append(vec![big(15_000); 4], at(102)).await?);
    }
    say("phase cut");
    acked(&journal.trim(at(103)).await?);
    acked(&journal.append(vec![fact(10)], at(104)).await?);
    say("phase maintain");
    backend.maintain(&stream()).await?;
    say("phase append");
    acked(&journal.append(vec![fact(11)], at(105)).await?);
    Ok(())
}

async fn stubborn(dir: &Path) {
    let Ok(backend) = store(dir) else { return };
    say("phase begun");
    for _ in 0..REOPENS_MAX {
        let done = async {
            // What was refused may be there all the same.
            let records = read_all(backend.as_ref(), &stream()).await?.records;
            let records: Vec<Record> = records.into_iter().map(|stored| stored.record).collect();
            say(&format!("found {}", serde_json::to_string(&records).unwrap()));
            fill(&backend, &mut claimed(&backend).await?).await
        };
        match done.await {
            Ok(()) => return say("phase end"),
            Err(error) => say(&format!("refused {error:?}")),
        }
    }
}

async fn endless(dir: &Path) {
    let backend = store(dir).unwrap();
    let mut journal = claimed(&backend).await.unwrap();
    for number in 0u16.. {
        let events = if number % 7 == 0 { vec![big(15_000); 4] } else { vec![fact(number), big(500)] };
        acked(&journal.append(events, at(101)).await.unwrap());
        if number % 20 == 0 {
            acked(&journal.trim(at(102)).await.unwrap());
        }
    }
}

/// The last sequence that was acknowledged.
pub fn last(acked: &[Record]) -> Seq {
    acked.last().map_or(Seq(0), |record| record.seq)
}
