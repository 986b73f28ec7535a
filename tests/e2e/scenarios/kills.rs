//! The primary's process killed without warning.

use super::World;
use crate::support::{
    load::{Figures, Load},
    process::kill_server,
};
use anyhow::Context;
use std::time::{Duration, Instant};

/// Kills in a row. The first of each member is followed by an immediate restart, the others by kubelet's back-off.
const KILLS: usize = 10;
/// Until a primary has a replica again: the longest back-off that ten kills of three members lead to is 40 s.
const BACK_OFF_MAX: Duration = Duration::from_secs(120);

/// Ten kills under load.
pub async fn ten(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let load = Load::start(subject).await?;
    let mut faults: Vec<Instant> = Vec::new();
    for round in 1..=KILLS {
        let primary =
            subject.protected(BACK_OFF_MAX).await.with_context(|| format!("before kill {round}"))?;
        load.flows(Duration::from_secs(10))
            .await
            .with_context(|| format!("before kill {round} of {}", primary.name))?;
        faults.push(kill_server(world.place, &subject.namespace, &primary)?);
        load.flows(Duration::from_secs(30))
            .await
            .with_context(|| format!("after kill {round} of {}", primary.name))?;
    }
    subject.protected(BACK_OFF_MAX).await?;
    let logs = load.finish()?;
    let figures = Figures::of(subject, &logs, &faults).await?;
    figures.nothing_lost()?;
    subject.ready().await?;
    Ok(figures.line())
}
