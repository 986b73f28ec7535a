//! Real client libraries in their default settings: the programs of `benches/clients` are started, left alone while something happens,
//! and asked at the end. What they saw is told for each library and job, and every acknowledged number is looked for.

use super::{
    checkout,
    load::{IN_FLIGHT, READ_LATE, TIMEOUT_READ},
    nodes::Nodes,
    resp::{PORT, Reply},
    slots,
    subject::Subject,
};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

/// The longest that a program may run: it ends by itself if nobody is left to end it.
const RUN_MAX: Duration = Duration::from_secs(900);
/// Until every task of a program had an acknowledgement: a thousand connections on two cores take the longest.
const READY_MAX: Duration = Duration::from_secs(70);
/// Until a program has told what it saw.
const TELL_MAX: Duration = Duration::from_secs(30);
/// A task whose last acknowledgement is longer ago than this, beside its own pace, is stuck.
const STUCK_MS: u64 = 1_000;
/// Errors after which most libraries give up, and that no fault excuses.
const FINAL: [&str; 3] = ["WRONGPASS", "NOAUTH", "NOPERM"];

/// A client library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Python.
    ValkeyPy,
    /// Python.
    RedisPy,
    /// Go.
    GoRedis,
    /// Go.
    ValkeyGo,
    /// Node.
    Iovalkey,
    /// Node.
    Ioredis,
    /// Java.
    Lettuce,
    /// Java.
    Jedis,
    /// Rust.
    RedisRs,
}

impl Library {
    /// All of them.
    pub const ALL: [Library; 9] = [
        Library::ValkeyPy,
        Library::RedisPy,
        Library::GoRedis,
        Library::ValkeyGo,
        Library::Iovalkey,
        Library::Ioredis,
        Library::Lettuce,
        Library::Jedis,
        Library::RedisRs,
    ];

    /// Its name as a package.
    pub fn name(self) -> &'static str {
        match self {
            Library::ValkeyPy => "valkey-py",
            Library::RedisPy => "redis-py",
            Library::GoRedis => "go-redis",
            Library::ValkeyGo => "valkey-go",
            Library::Iovalkey => "iovalkey",
            Library::Ioredis => "ioredis",
            Library::Lettuce => "lettuce",
            Library::Jedis => "jedis",
            Library::RedisRs => "redis-rs",
        }
    }

    /// The folder of its program.
    fn language(self) -> &'static str {
        match self {
            Library::ValkeyPy | Library::RedisPy => "python",
            Library::GoRedis | Library::ValkeyGo => "go",
            Library::Iovalkey | Library::Ioredis => "node",
            Library::Lettuce | Library::Jedis => "java",
            Library::RedisRs => "rust",
        }
    }
}

/// How clients find servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// Through the write Service.
    Replication,
    /// By themselves, beginning at the Service of all nodes.
    Cluster,
}

impl Topology {
    /// Its name in a spec.
    pub fn name(self) -> &'static str {
        match self {
            Topology::Replication => "Replication",
            Topology::Cluster => "Cluster",
        }
    }

    fn address(self, subject: &Subject) -> String {
        let service = match self {
            Topology::Replication => format!("{}-primary", subject.name),
            Topology::Cluster => subject.name.clone(),
        };
        format!("{service}.{}.svc.cluster.local:{PORT}", subject.namespace)
    }
}

/// What one task of a program says that it saw. Times are milliseconds since 1970.
#[derive(Clone, Debug, Deserialize)]
struct Task {
    library: String,
    job: String,
    task: usize,
    /// The set that has its numbers.
    key: Option<String>,
    period_ms: u64,
    ended_ms: u64,
    acks: Vec<(u64, u64)>,
    errors: Vec<(u64, String)>,
}

/// The programs, while they run. Those that are dropped are killed.
pub struct Clients {
    subject: Subject,
    topology: Topology,
    programs: Vec<Program>,
}

struct Program {
    library: Library,
    // Ends when its standard input does.
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Clients {
    /// Starts a program for each library, all with the same jobs, and waits until every task had an acknowledgement.
    pub async fn start(
        subject: &Subject,
        topology: Topology,
        libraries: &[Library],
        jobs: &[String],
    ) -> anyhow::Result<Clients> {
        let folder = installed(libraries).await?;
        let run = format!("clients:{:x}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
        let (address, password) = (topology.address(subject), subject.password().await?);
        let mut programs = Vec::new();
        for library in libraries {
            let name = library.name();
            let seconds = RUN_MAX.as_secs().to_string();
            let mut command = Command::new(folder.join(library.language()).join("client"));
            command.args([name, topology.name(), &address, &seconds, &run, &jobs.join(",")]);
            command.env("VALKEY_PASSWORD", &password).kill_on_drop(true);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_of(name)?);
            let mut child = command.spawn().with_context(|| format!("the program of {name}"))?;
            let stdout = child.stdout.take().context("no pipe")?;
            let (stdin, lines) = (child.stdin.take(), BufReader::new(stdout).lines());
            programs.push(Program { library: *library, child, stdin, lines });
        }
        for program in &mut programs {
            let name = program.library.name();
            let said = timeout(READY_MAX, program.lines.next_line()).await;
            match said.with_context(|| format!("{name} is silent"))?? {
                Some(line) if line.contains("true") => {}
                other => bail!("{name} is not ready: {other:?}"),
            }
        }
        Ok(Clients { subject: subject.clone(), topology, programs })
    }

    /// Ends the programs, and looks for what was acknowledged. `faults`: when something happened that may lose what no replica had
    /// received yet.
    pub async fn finish(mut self, since_ms: u64, faults: &[u64]) -> anyhow::Result<Vec<Seen>> {
        for program in &mut self.programs {
            program.stdin = None;
        }
        let mut tasks = Vec::new();
        for mut program in std::mem::take(&mut self.programs) {
            let name = program.library.name();
            let told = timeout(TELL_MAX, program.told()).await;
            tasks.extend(told.with_context(|| format!("{name} does not end"))?.context(name)?);
        }
        let kept = self.kept(tasks.iter().filter_map(|task| task.key.clone()).collect()).await?;
        Ok(Seen::of(&tasks, &kept, since_ms, faults))
    }

    /// The numbers in each of these sets, as the servers have them.
    async fn kept(&self, keys: Vec<String>) -> anyhow::Result<BTreeMap<String, HashSet<u64>>> {
        let nodes = Nodes::of(&self.subject).await?;
        let first = match self.topology {
            Topology::Replication => self.subject.primary().await?.address,
            Topology::Cluster => nodes.addresses.first().copied(),
        };
        let first = first.context("no address")?;
        let read = move |nodes: &Nodes| {
            let (reach, password) = (nodes.reach.clone(), nodes.password.clone());
            let mut client = slots::Client::new(reach, first, password, TIMEOUT_READ);
            let mut kept = BTreeMap::new();
            for key in keys {
                let reply = client.call(&["SMEMBERS", &key])?;
                let numbers =
                    reply.list().iter().filter_map(Reply::text).filter_map(|text| text.parse().ok());
                kept.insert(key, numbers.collect());
            }
            Ok(kept)
        };
        nodes.ask(read).await
    }
}

impl Program {
    async fn told(&mut self) -> anyhow::Result<Vec<Task>> {
        let mut tasks = Vec::new();
        while let Some(line) = self.lines.next_line().await? {
            tasks.push(
                serde_json::from_str(&line).with_context(|| line.chars().take(100).collect::<String>())?,
            );
        }
        let status = self.child.wait().await?;
        if !status.success() || tasks.is_empty() {
            bail!("{status}, {} tasks told", tasks.len());
        }
        Ok(tasks)
    }
}

/// Where results are kept.
pub fn results() -> anyhow::Result<PathBuf> {
    let folder = checkout().join("target/bench-clients");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn log_of(name: &str) -> anyhow::Result<Stdio> {
    let file = results()?.join(format!("{name}.log"));
    Ok(OpenOptions::new().create(true).append(true).open(file)?.into())
}

/// The folder of the programs; they are installed where there is a way to the registries, and here they are only found.
async fn installed(libraries: &[Library]) -> anyhow::Result<PathBuf> {
    let languages: BTreeSet<&str> = libraries.iter().map(|library| library.language()).collect();
    let setup = checkout().join("benches/clients/setup");
    let output = Command::new(setup).args(languages).stderr(Stdio::inherit()).output().await?;
    if !output.status.success() {
        bail!("benches/clients/setup must have been run before, outside of the cluster's network");
    }
    Ok(Path::new(String::from_utf8(output.stdout)?.trim()).to_owned())
}

/// What the tasks of one job of a library saw.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// Name of the library.
    pub library: String,
    /// The job.
    pub job: String,
    /// How many tasks it has.
    pub tasks: usize,
    /// Longest time between two acknowledgements of one task, or from its last to the end, in milliseconds.
    pub gap_ms: u64,
    /// Acknowledgements.
    pub acknowledged: usize,
    /// Acknowledged numbers that are not there.
    pub lost: usize,
    /// Those of them that were acknowledged just when the fault came, which no replica may have received.
    pub in_flight: usize,
    /// Tasks that were not served any more when it ended.
    pub stuck: usize,
    /// What reached the application.
    pub errors: BTreeMap<String, usize>,
}

impl Seen {
    fn of(tasks: &[Task], kept: &BTreeMap<String, HashSet<u64>>, since_ms: u64, faults: &[u64]) -> Vec<Seen> {
        let mut all: Vec<Seen> = Vec::new();
        for task in tasks {
            let is_it = |seen: &&mut Seen| seen.library == task.library && seen.job == task.job;
            let numbers = task.key.as_ref().and_then(|key| kept.get(key));
            match all.iter_mut().find(is_it) {
                Some(seen) => seen.add(task, numbers, since_ms, faults),
                None => {
                    let mut seen = Seen {
                        library: task.library.clone(),
                        job: task.job.clone(),
                        tasks: 0,
                        gap_ms: 0,
                        acknowledged: 0,
                        lost: 0,
                        in_flight: 0,
                        stuck: 0,
                        errors: BTreeMap::new(),
                    };
                    seen.add(task, numbers, since_ms, faults);
                    all.push(seen);
                }
            }
        }
        all
    }

    fn add(&mut self, task: &Task, kept: Option<&HashSet<u64>>, since_ms: u64, faults: &[u64]) {
        self.tasks += 1;
        self.acknowledged += task.acks.len();
        for (_, kind) in &task.errors {
            *self.errors.entry(kind.clone()).or_default() += 1;
        }
        let mut last = since_ms;
        for at in task.acks.iter().map(|(_, at)| *at).filter(|at| *at >= since_ms).chain([task.ended_ms]) {
            self.gap_ms = self.gap_ms.max(at.saturating_sub(last));
            last = at;
        }
        let served = task.acks.last().map_or(0, |(_, at)| *at);
        if task.ended_ms.saturating_sub(served) > STUCK_MS + task.period_ms {
            self.stuck += 1;
        }
        let Some(kept) = kept else { return };
        for (_, at) in task.acks.iter().filter(|(number, _)| !kept.contains(number)) {
            let window = |fault: u64| fault.saturating_sub(millis(IN_FLIGHT))..=fault + millis(READ_LATE);
            if faults.iter().any(|fault| window(*fault).contains(at)) {
                self.in_flight += 1;
            } else {
                self.lost += 1;
            }
        }
    }

    /// Fails if something is lost, somebody is stuck, or was told that its password is wrong.
    pub fn is_well(&self) -> anyhow::Result<()> {
        let refused = self.errors.keys().any(|kind| FINAL.contains(&kind.as_str()));
        if self.stuck > 0 || self.lost > 0 || refused { bail!("{self}") } else { Ok(()) }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} ms", self.library, self.job, self.gap_ms)?;
        if self.stuck > 0 {
            write!(f, ", {} of {} stuck", self.stuck, self.tasks)?;
        }
        if self.lost > 0 {
            write!(f, ", {} of {} acknowledged lost", self.lost, self.acknowledged)?;
        }
        if self.in_flight > 0 {
            write!(f, ", {} no replica had received", self.in_flight)?;
        }
        for (kind, count) in &self.errors {
            write!(f, ", {kind} {count}")?;
        }
        Ok(())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970, as the programs have them.
pub fn now_ms() -> anyhow::Result<u64> {
    Ok(millis(std::time::UNIX_EPOCH.elapsed()?))
}
