//! A primary that says nothing but may wake at any moment.

use super::World;
use crate::support::{
    load::{Figures, Load},
    process::{freeze_server, signal},
};
use anyhow::bail;
use std::time::Duration;

/// A frozen primary is fenced before another is promoted, and what was acknowledged stays.
pub async fn frozen(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let primary = subject.protected(Duration::from_secs(60)).await?;
    let load = Load::start(subject).await?;
    let (pid, fault) = freeze_server(world.place, &primary)?;
    let story = async {
        load.flows(Duration::from_secs(60)).await?;
        subject.ready().await
    };
    let outcome = story.await;
    // If nobody has fenced it, it must not stay frozen; if it has been, its pid is gone.
    let woken = signal(pid, "CONT").is_ok();
    outcome?;
    if woken {
        bail!("the frozen process {pid} of {} was never fenced", primary.name);
    }
    let now = subject.primary().await?;
    let logs = load.finish()?;
    let figures = Figures::of(subject, &logs, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(format!("{} -> {}; {}", primary.name, now.name, figures.line()))
}
