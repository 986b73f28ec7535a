//! Many clusters under one operator that nobody touches: memory of its process, its share of a core, and what it asks of the API server.
//! Prints one table and asserts nothing. Started by `make bench-many`.

#[path = "../tests/e2e/support/mod.rs"]
mod support;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};
use support::{
    Place, audit_log::AuditLog, delete_namespace, operator::Operator, process::proc_text, resp::Reach,
    subject::Subject,
};

/// Clusters of three members each, step by step, where the command line says nothing.
const STEPS: [usize; 2] = [10, 24];
/// How long each step is watched once every cluster is Ready.
const WATCHED: Duration = Duration::from_secs(120);
/// Before that: what their creation began has ended.
const SETTLED: Duration = Duration::from_secs(30);
/// Period in which a cluster may have one read of a Secret.
const READ_PERIOD: Duration = Duration::from_secs(600);
/// Namespace of all of them.
const NAMESPACE: &str = "valkeeper-bench-many";
/// Clock ticks of a second in /proc.
const TICKS: f64 = 100.0;

#[tokio::main]
async fn main() -> ExitCode {
    support::ended(run().await)
}

async fn run() -> anyhow::Result<()> {
    let place = Place::of_environment()?;
    if place == Place::Existing {
        bail!("the benchmark reads the operator's process: it needs the local cluster");
    }
    let words = std::env::args().skip(1).filter(|word| word != "--bench");
    let asked =
        words.map(|word| word.parse::<usize>().with_context(|| format!("{word}: expected NUMBER...")));
    let asked = asked.collect::<anyhow::Result<Vec<usize>>>()?;
    let steps = if asked.is_empty() { STEPS.to_vec() } else { asked };
    let client = support::client().await?;
    let operator = Operator::install(&client, place).await?;
    support::restricted_namespace(&client, NAMESPACE).await?;
    let audit = AuditLog::of(place)?.context("no audit log")?;
    let subject = |number: usize| Subject {
        client: client.clone(),
        namespace: NAMESPACE.to_owned(),
        name: format!("many-{number}"),
        reach: Reach::Direct,
        place,
    };
    println!(
        "{:>9} {:>9} {:>17} {:>9} {:>22} {:>8}",
        "clusters", "MiB", "MiB each more", "core %", "Secret reads, 10 min", "writes"
    );
    let (mut there, mut before) = (0, None);
    for wanted in steps {
        for number in there..wanted {
            subject(number).apply(&spec()).await?;
        }
        for number in there..wanted {
            subject(number).ready().await?;
        }
        there = there.max(wanted);
        tokio::time::sleep(SETTLED).await;
        let seen = watch(&operator, &audit).await?;
        let slope = before.map(|(count, mib): (usize, f64)| (seen.mib - mib) / (there - count) as f64);
        println!(
            "{there:>9} {:>9.1} {:>17} {:>9.2} {:>22.2} {:>8}",
            seen.mib,
            slope.map_or("".to_owned(), |slope| format!("{slope:.2}")),
            seen.core_percent,
            seen.secret_reads / there as f64,
            seen.writes
        );
        before = Some((there, seen.mib));
    }
    delete_namespace(&client, NAMESPACE).await
}

/// Three members that keep nothing on disk.
fn spec() -> Value {
    json!({
        "topology": "Replication", "replicas": 2, "profile": "Cache",
        "resources": { "requests": { "cpu": "5m", "memory": "32Mi" }, "limits": { "memory": "64Mi" } },
    })
}

/// What was seen of the operator.
struct Seen {
    mib: f64,
    core_percent: f64,
    /// Of all clusters in [`READ_PERIOD`].
    secret_reads: f64,
    /// In [`WATCHED`], the Lease aside.
    writes: usize,
}

async fn watch(operator: &Operator, audit: &AuditLog) -> anyhow::Result<Seen> {
    let pid = operator.pid().await?;
    let (begun, since, ticks) = (Instant::now(), audit.end()?, ticks(pid)?);
    tokio::time::sleep(WATCHED).await;
    let took = begun.elapsed().as_secs_f64();
    let used = (self::ticks(pid)? - ticks) / TICKS;
    let status = proc_text(pid, "status");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kib: f64 = kib.context("no VmRSS")?.trim().parse()?;
    let reads = audit.secrets_read_since(since)? as f64;
    let writes = audit.asked_since(since)?.iter().filter(|asked| !asked.is_lease).count();
    Ok(Seen {
        mib: kib / 1024.0,
        core_percent: used / took * 100.0,
        secret_reads: reads * READ_PERIOD.as_secs_f64() / took,
        writes,
    })
}

/// Time of a process on cores so far, in clock ticks: fields 14 and 15 of proc(5), counted behind the name in brackets.
fn ticks(pid: u32) -> anyhow::Result<f64> {
    let stat = proc_text(pid, "stat");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    Ok(field(14).context("no utime")? + field(15).context("no stime")?)
}
