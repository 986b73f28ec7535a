//! Planned changes under load: they lose nothing and hardly interrupt.

use super::{World, spec};
use crate::support::{
    load::{Figures, Load},
    resp::Reply,
    subject::PATIENCE,
    wait::until,
};
use anyhow::bail;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

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

/// A directive reaches every server, one restart after the other.
pub async fn config(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let before = subject.protected(Duration::from_secs(60)).await?;
    let load = Load::start(subject).await?;
    let mut wanted = spec();
    // Not the value of another run: it must be a change.
    let value = (1_000 + std::time::UNIX_EPOCH.elapsed()?.as_secs() % 8_000).to_string();
    wanted["config"] = json!({ "slowlog-max-len": value });
    let begun = Instant::now();
    subject.apply(&wanted).await?;
    subject.ready().await?;
    let took = begun.elapsed();
    for member in subject.members().await? {
        let reply = subject.call(&member, &["CONFIG", "GET", "slowlog-max-len"]).await?;
        if reply.list().get(1).and_then(Reply::text) != Some(value.as_str()) {
            bail!("{} has {reply:?}, not {value}", member.name);
        }
    }
    let after = subject.primary().await?;
    load.flows(Duration::from_secs(10)).await?;
    let figures = Figures::of(subject, &load.finish()?, &[begun]).await?;
    figures.nothing_lost()?;
    // Back to the spec that the other scenarios begin with.
    let settled: Value = spec();
    subject.apply(&settled).await?;
    subject.ready().await?;
    let path = format!("{} -> {}", before.name, after.name);
    Ok(format!("rolled in {:.1} s, primary {path}; {}", took.as_secs_f64(), figures.line()))
}
