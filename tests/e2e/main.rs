//! End-to-end tests on a real cluster: the operator from its image, real pods, real faults. The scenarios run in order on
//! one ValkeyCluster, and after it on one of topology Cluster; each ends with the same questions to the journal and to the API
//! server's audit log. `tests/e2e/run` prepares everything; words given as arguments choose scenarios by name.

mod scenarios;
mod support;

use anyhow::Context;
use scenarios::{BY_HAND, SCENARIOS, Scenario, World};
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};
use support::{
    Place,
    audit_log::{AuditLog, STEADY, STEADY_AT_LAST},
    journal::Journal,
    operator::Operator,
    subject::Subject,
};

/// Longest time for one scenario with its questions: repeated kills wait for kubelet's back-off, and the operator may be asked to stay
/// away for ten minutes.
const SCENARIO_MAX: Duration = Duration::from_secs(1_200);
/// The same of one that runs only by hand: twenty changes of the number of shards, each with pods that start.
const BY_HAND_MAX: Duration = Duration::from_secs(3_600);
/// Lines of logs and journal that a failure shows.
const TAIL_LINES: i64 = 25;

#[tokio::main]
async fn main() -> ExitCode {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    match run(&chosen).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(chosen: &[String]) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let place = Place::of_environment()?;
    let client = support::client().await?;
    let operator = Operator::install(&client, place).await?;
    let audit = AuditLog::of(place)?;
    println!("the operator is installed ({:.1} s)", begun.elapsed().as_secs_f64());
    let world = World::new(client, operator, audit, place).await?;
    let wanted =
        |s: &&Scenario| chosen.is_empty() || chosen.iter().any(|word| s.name.contains(word.as_str()));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let named = |s: &&Scenario| chosen.iter().any(|word| s.name == word);
    let usual = SCENARIOS.iter().filter(wanted).map(|scenario| (scenario, SCENARIO_MAX));
    let by_hand = BY_HAND.iter().filter(named).map(|scenario| (scenario, BY_HAND_MAX));
    for (scenario, longest) in usual.chain(by_hand) {
        if place == Place::Existing && scenario.needs_nodes {
            println!("skip {}: it needs the nodes of the local cluster", scenario.name);
            skipped += 1;
            continue;
        }
        if tell(&world, scenario, longest).await { passed += 1 } else { failed += 1 }
    }
    if let Some(audit) = &world.audit {
        audit.quiet(STEADY_AT_LAST).await.context("after the last scenario")?;
    }
    world.clean_up().await.context("cleaning up")?;
    let skipped = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    println!("{passed} passed, {failed} failed{skipped} ({:.0} s)", begun.elapsed().as_secs_f64());
    Ok(failed == 0 && passed > 0)
}

/// Runs one scenario and prints how it went. True if it passed.
async fn tell(world: &World, scenario: &Scenario, longest: Duration) -> bool {
    let begun = Instant::now();
    let outcome = tokio::time::timeout(longest, whole(world, scenario)).await;
    let seconds = begun.elapsed().as_secs_f64();
    match outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("not done after {} s", longest.as_secs()))) {
        Ok(figures) => {
            println!("ok   {:<22} {seconds:6.1} s  {figures}", scenario.name);
            true
        }
        Err(error) => {
            println!("FAIL {:<22} {seconds:6.1} s  {error:#}", scenario.name);
            report(world, world.subject_of(scenario)).await;
            // The next scenario shall not fail for this one's sake.
            if let Err(error) = world.start_over().await {
                println!("     starting over failed: {error:#}");
            }
            false
        }
    }
}

/// The scenario and the questions after it.
async fn whole(world: &World, scenario: &Scenario) -> anyhow::Result<String> {
    world.begin(scenario.begins).await.context("before the scenario")?;
    let figures = (scenario.run)(world).await?;
    let subject = world.subject_of(scenario);
    if subject.exists().await? {
        subject.ready().await.context("after the scenario")?;
        Journal::of(subject).await?.holds()?;
    }
    if let Some(audit) = &world.audit {
        audit.quiet(STEADY).await?;
    }
    Ok(figures)
}

/// What someone who looks for the cause wants to see.
async fn report(world: &World, subject: &Subject) {
    if let Ok(cluster) = subject.get().await {
        println!("     status: {}", serde_json::to_string(&cluster.status).unwrap_or_default());
        let log = match Journal::of(subject).await {
            Ok(journal) => {
                let kept = journal
                    .path
                    .with_extension(format!("{}.json", cluster.metadata.generation.unwrap_or_default()));
                let _ = std::fs::copy(&journal.path, &kept);
                println!("     journals: {}", kept.display());
                journal.ask(&["log", "-n", &TAIL_LINES.to_string()])
            }
            Err(error) => Err(error),
        };
        println!("{}", log.unwrap_or_else(|error| format!("{error:#}")));
    }
    for (member, role) in subject.roles().await.unwrap_or_default() {
        println!("     {} {:?} {:?}", member.name, member.address, role);
    }
    println!("{}", world.operator.log_tail(TAIL_LINES).await);
}
