//! Planned changes under load: they lose nothing and hardly interrupt.

use super::{World, spec};
use crate::support::{
    load::{Figures, Load},
    resp::Reply,
    subject::{PATIENCE, Subject},
    wait::until,
};
use anyhow::bail;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Two replicas, four, one.
pub async fn scale(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.protected(Duration::from_secs(60)).await?;
    let load = Load::start(subject).await?;
    let mut faults = Vec::new();
    let mut seconds = Vec::new();
    for replicas in [4, 1] {
        let mut wanted = spec();
        wanted["replicas"] = json!(replicas);
        let begun = Instant::now();
        faults.push(begun);
        subject.apply(&wanted).await?;
        subject.ready().await?;
        let pods = usize::try_from(replicas + 1)?;
        until(&format!("{pods} pods"), PATIENCE, || async {
            match subject.members().await?.len() {
                count if count == pods => Ok(()),
                count => bail!("{count} pods"),
            }
        })
        .await?;
        seconds.push(format!("{replicas} replicas in {:.1} s", begun.elapsed().as_secs_f64()));
    }
    load.flows(Duration::from_secs(10)).await?;
    let figures = Figures::of(subject, &load.finish()?, &faults).await?;
    figures.nothing_lost()?;
    Ok(format!("{}; {}", seconds.join(", "), figures.line()))
}

/// A directive that servers take while they run reaches every one of them and restarts none; another does by one restart after the other. What
/// no server takes is told in its words.
pub async fn config(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let before = subject.protected(Duration::from_secs(60)).await?;
    let load = Load::start(subject).await?;
    let pods = uids(subject).await?;
    // Not the value of another run: it must be a change.
    let number = std::time::UNIX_EPOCH.elapsed()?.as_secs();
    let length = (1_000 + number % 8_000).to_string();
    let mut wanted = spec();
    wanted["config"] = json!({ "slowlog-max-len": length });
    let mut faults = vec![Instant::now()];
    subject.apply(&wanted).await?;
    let ((), live) =
        until("every server to have it", PATIENCE, || all_have(subject, "slowlog-max-len", &length)).await?;
    subject.ready().await?;
    wanted["config"] = json!({ "slowlog-max-len": length, "locale-collate": "nowhere" });
    subject.apply(&wanted).await?;
    let ((), refused) = until("the servers' refusal in the status", PATIENCE, || async {
        let told = subject.said("Ready").await?;
        let is_it = told.reason == "SettingsRefused" && told.message.contains("locale-collate");
        if is_it { Ok(()) } else { bail!("Ready says {}: {}", told.reason, told.message) }
    })
    .await?;
    // Left out again: the server's own value.
    wanted["config"] = json!({ "hz": "10" });
    subject.apply(&wanted).await?;
    until("the default again", PATIENCE, || all_have(subject, "slowlog-max-len", "128")).await?;
    subject.ready().await?;
    if uids(subject).await? != pods {
        bail!("a pod was made anew for what servers take while they run");
    }
    let backlog = (200 + number % 300).to_string();
    wanted["config"] = json!({ "tcp-backlog": backlog });
    let begun = Instant::now();
    faults.push(begun);
    subject.apply(&wanted).await?;
    until("every server to be started with it", PATIENCE, || all_have(subject, "tcp-backlog", &backlog))
        .await?;
    subject.ready().await?;
    let took = begun.elapsed();
    let after = subject.primary().await?;
    load.flows(Duration::from_secs(10)).await?;
    let figures = Figures::of(subject, &load.finish()?, &faults).await?;
    figures.nothing_lost()?;
    // Back to the spec that the other scenarios begin with.
    let settled: Value = spec();
    subject.apply(&settled).await?;
    subject.ready().await?;
    let path = format!("{} -> {}", before.name, after.name);
    Ok(format!(
        "live in {} ms and refused in {} ms, no pod made anew; rolled in {:.1} s, primary {path}; {}",
        live.as_millis(),
        refused.as_millis(),
        took.as_secs_f64(),
        figures.line()
    ))
}

async fn uids(subject: &Subject) -> anyhow::Result<BTreeSet<String>> {
    Ok(subject.members().await?.into_iter().map(|member| member.uid).collect())
}

async fn all_have(subject: &Subject, directive: &str, value: &str) -> anyhow::Result<()> {
    for member in subject.members().await? {
        let reply = subject.call(&member, &["CONFIG", "GET", directive]).await?;
        if reply.list().get(1).and_then(Reply::text) != Some(value) {
            bail!("{} has {reply:?}, not {value}", member.name);
        }
    }
    Ok(())
}
