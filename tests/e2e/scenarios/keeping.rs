//! A journal that keeps little: its oldest records go to an archive, its mirror survives the operator, and when its ConfigMaps are gone it is
//! written anew from there, at a person's word.

use super::{World, spec};
use crate::support::{
    journal::{self, Journal, one_writer_at_a_time},
    load::{Figures, Load},
    operator::Operator,
    process::kill_server,
    subject::PATIENCE,
    wait::until,
};
use anyhow::{Context, bail};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use std::{path::PathBuf, process::Command, time::Duration, time::Instant};
use valkeeper::api::v1alpha1::{JournalPosition, REPAIR};

/// Where the archive is in the operator's pod.
const ARCHIVE: &str = "/var/lib/archive";
/// The chart's values: as little as may be kept, a mirror, an archive.
const VALUES: &[&str] = &[
    "--set-string",
    "journal=tiered:/var/lib/mirror/journal",
    "--set-string",
    "journalKeep=16Ki",
    "--set-string",
    "archive.url=file:///var/lib/archive",
    "--set-json",
    r#"extraVolumes=[{"name":"mirror","emptyDir":{}},{"name":"archive","emptyDir":{}}]"#,
    "--set-json",
    r#"extraVolumeMounts=[{"name":"mirror","mountPath":"/var/lib/mirror"},{"name":"archive","mountPath":"/var/lib/archive"}]"#,
];
/// Changes of the spec until something must have gone: each is a record or more, and 16 KiB are some hundreds. On a busy machine the
/// operator may give up a quiet moment and wait a minute for the next: as long as two thousand changes take.
const CHANGES_MAX: u32 = 5_000;
/// Changes between two looks at the journal.
const CHANGES: u32 = 50;
/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);

/// All of it, one after the other.
pub async fn kept(world: &World) -> anyhow::Result<String> {
    world.operator.set(VALUES).await?;
    let told = story(world).await;
    // The next scenario finds the operator as it was.
    Operator::install(&world.client, world.place).await?;
    told
}

async fn story(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.ready().await?;
    let uid = subject.get().await?.uid().context("no UID")?;
    let desk = Desk { world, uid: &uid };
    let changes = desk.until_trimmed().await?;
    let first = desk.whole().await?;

    let load = Load::start(subject).await?;
    let before = subject.protected(SETTLED_MAX).await?;
    let killed = kill_server(world.place, &subject.namespace, &before)?;
    until("another primary", SETTLED_MAX, || async {
        let now = subject.primary().await?;
        if now.name == before.name { bail!("it is still {}", now.name) } else { Ok(()) }
    })
    .await?;
    subject.protected(SETTLED_MAX).await?;
    let figures = Figures::of(subject, &load.finish()?, &[killed]).await?;
    figures.nothing_lost()?;

    // A process that begins reads the mirror; one whose ConfigMaps are gone is told so by it.
    world.operator.kill().await?;
    subject.condition("Ready", "True", PATIENCE).await?;
    let lost = desk.delete().await?;
    let repaired = Instant::now();
    subject.annotate(REPAIR, &lost.hash).await?;
    world.operator.kill().await?;
    subject.condition("JournalIntact", "True", PATIENCE).await?;
    subject.ready().await?;
    let took = repaired.elapsed().as_secs_f64();
    let (last, lost) = (desk.whole().await?, lost.seq);
    Ok(format!(
        "{first} after {changes} changes; {}; written anew from the mirror up to {lost} in {took:.1} s: {last}",
        figures.line()
    ))
}

struct Desk<'a> {
    world: &'a World,
    uid: &'a str,
}

impl Desk<'_> {
    /// Changes the spec to and fro until the journal says that its beginning went. How many changes that took.
    async fn until_trimmed(&self) -> anyhow::Result<u32> {
        let subject = &self.world.subject;
        // The one before may be cut away by the one after: their number need not grow.
        let begun = self.last_cut().await?;
        for change in 1..=CHANGES_MAX {
            let mut wanted = spec();
            wanted["failover"] = json!({ "detectionWindowMs": 3_000 + i64::from(change % 2) });
            subject.apply(&wanted).await?;
            if change.is_multiple_of(CHANGES) && self.last_cut().await? > begun {
                subject.apply(&spec()).await?;
                subject.ready().await?;
                return Ok(change);
            }
        }
        bail!("nothing went in {CHANGES_MAX} changes after {begun:?}")
    }

    /// Number of the record that tells of the last cut.
    async fn last_cut(&self) -> anyhow::Result<Option<i64>> {
        let records = self.records().await?;
        let cuts = records.iter().filter(|r| r.pointer("/event/Trimmed").is_some());
        Ok(cuts.map(|record| journal::number(record, "seq")).max())
    }

    async fn records(&self) -> anyhow::Result<Vec<Value>> {
        Journal::of_uid(&self.world.client, self.uid).await?.records()
    }

    /// What is left and what is archived is one chain from the first record on, and everything that was cut folds to what it should.
    async fn whole(&self) -> anyhow::Result<String> {
        let archive = self.archive().await?;
        let journal = Journal::of_uid(&self.world.client, self.uid).await?;
        let path = archive.0.to_str().context("no path")?;
        let found = journal.ask(&["--archive", path, "verify", "--deep", "-o", "json"])?;
        let verified: Value = serde_json::from_str(&found).with_context(|| found.clone())?;
        let records = verified.get("records").and_then(Value::as_u64).context("no records")?;
        let all = journal.ask(&["--archive", path, "export"])?;
        let lines: Result<Vec<Value>, _> = all.lines().map(serde_json::from_str).collect();
        one_writer_at_a_time(&lines?)?;
        let left = journal.records()?.iter().filter(|r| r.get("seq").is_some()).count();
        Ok(format!("{left} of {records} records left, the rest archived, all of them one chain"))
    }

    /// A copy of the archive, as a user would bring it to another machine.
    async fn archive(&self) -> anyhow::Result<Copy> {
        let pid = self.world.operator.pid().await?;
        let copy = Copy(std::env::temp_dir().join(format!("valkeeper-archive-{}", std::process::id())));
        let from = format!("/proc/{pid}/root{ARCHIVE}");
        // A file that is being written gets its name when it is whole, and then the other name is gone.
        until("a copy of the archive", PATIENCE, || async {
            let _ = std::fs::remove_dir_all(&copy.0);
            let copied = Command::new("cp").args(["-r", &from]).arg(&copy.0).output().context("cp")?;
            if copied.status.success() {
                Ok(())
            } else {
                bail!("cp: {}", String::from_utf8_lossy(&copied.stderr).trim())
            }
        })
        .await?;
        Ok(copy)
    }

    /// Deletes the journal's ConfigMaps; waits until the operator has noticed. The last record that was there.
    async fn delete(&self) -> anyhow::Result<JournalPosition> {
        let subject = &self.world.subject;
        // What follows must be known to the mirror and to the status: a quiet moment has come when the resource is Ready and stays so.
        until("the status to show the last record", PATIENCE, || async {
            let shown = subject.get().await?.status.and_then(|s| s.journal).context("no place")?.seq;
            let newest = journal::newest(&self.world.client, self.uid).await?;
            let last = newest.last().map(|record| journal::number(record, "seq")).context("an empty tail")?;
            if shown == last { Ok(()) } else { bail!("it shows {shown}, and {last} is there") }
        })
        .await?;
        let last = subject.get().await?.status.and_then(|s| s.journal).context("no place")?;
        let label = format!("valkeeper.io/journal={}", self.uid);
        let maps = journal::maps(&self.world.client);
        let every = ListParams::default().labels(&label);
        maps.delete_collection(&DeleteParams::default(), &every).await?;
        self.world.operator.kill().await?;
        // Whoever looked while they went one by one says something else before, and a tidying that was under way may have written one
        // more object after they went.
        until("the operator to miss what was acknowledged", PATIENCE, || async {
            maps.delete_collection(&DeleteParams::default(), &every).await?;
            let (condition, _) = subject.condition("JournalIntact", "False", PATIENCE).await?;
            let said = condition.message;
            if said.contains("acknowledged records are missing") { Ok(()) } else { bail!("it says {said:?}") }
        })
        .await?;
        Ok(last)
    }
}

/// A directory that is removed in the end.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
