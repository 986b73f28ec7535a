//! Looks at the server again and again: whether it answers, and what it says.

use crate::{
    boot::Files,
    election,
    local::Error,
    shared::{Agent, Known},
};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{info::RawRole, observation::Link, spec::Topology};

/// Between two looks at a server that runs, and the bound on each: silence is known within a second.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Between two looks at one that is starting: nothing else waits for it as long.
const STARTING_PERIOD: Duration = Duration::from_millis(10);
/// Between two looks at one that is loading.
const LOADING_PERIOD: Duration = Duration::from_millis(50);
/// Between two looks at the control group.
const CGROUP_PERIOD: Duration = Duration::from_secs(1);

/// Looks for ever.
pub async fn run(agent: &Arc<Agent>) {
    let mut cgroup_at = Instant::now();
    loop {
        let process = agent.read(|known| known.process);
        if process.is_some() {
            look(agent).await;
        }
        if cgroup_at <= Instant::now() {
            let kills = oom_kills(&agent.config.args.cgroup);
            agent.update(|known| known.oom_kills = kills.unwrap_or(known.oom_kills));
            cgroup_at = Instant::now() + CGROUP_PERIOD;
        }
        let pause = agent.read(|known| match (&known.process, &known.info) {
            (Some(_), None) => STARTING_PERIOD,
            (Some(_), Some(info)) if info.loading => LOADING_PERIOD,
            (Some(_) | None, Some(_) | None) => LOOK_PERIOD,
        });
        let _ = tokio::time::timeout(pause, agent.look_now.notified()).await;
    }
}

async fn look(agent: &Arc<Agent>) {
    let sent = Instant::now();
    let process = agent.read(|known| known.process);
    let looked = agent.local.look_within(LOOK_PERIOD).await;
    if agent.read(|known| known.process) != process {
        // The answer, if it is one, is of a server that is gone.
        return;
    }
    match looked {
        Ok(look) => {
            let serves = !look.info.loading && !crate::shared::is_at_gate(&look.info);
            let (is_on_disk, refused) = (!look.rewriting, look.refused_writes);
            agent.seen(look);
            if serves {
                settle(agent, is_on_disk).await;
                send_away(agent, refused).await;
            }
        }
        Err(error) if error.is_answer() => agent.update(|known| {
            known.silent_since = None;
            known.last_answer = sent;
        }),
        Err(
            Error::Silent
            | Error::Lost(_)
            | Error::Refused(_)
            | Error::Garbled(_)
            | Error::Nodes(_)
            | Error::Users(_)
            | Error::Unverified(_),
        ) => {
            agent.update(|known| {
                // Before its first answer a server is starting, not silent.
                if known.info.is_some() {
                    known.silent_since.get_or_insert(sent);
                }
            });
        }
    }
}

/// What is left to do once a server has left the gate, by whomever. `is_on_disk`: whatever data it has is there.
async fn settle(agent: &Arc<Agent>, is_on_disk: bool) {
    if agent.read(|known| known.ledger.left.is_some()) {
        // What it left is no longer where it is.
        if let Err(error) = agent.remember_left(None).await {
            tracing::warn!(error = %error, "what the last server left is still in the ledger");
        }
    }
    if is_on_disk && agent.read(|known| known.ledger.blank && known.was_given_data() && !known.aof_left_off) {
        match agent.remember_blank(false).await {
            Ok(()) => {
                agent.update(|known| known.files = Files::RdbWithHistory);
                tracing::info!("the server has data now");
            }
            Err(error) => tracing::warn!(error = %error, "that there is data now cannot be remembered"),
        }
    }
    let linked = |role: &RawRole| match role {
        RawRole::Primary => true,
        RawRole::Replica { source: _, link } => *link == Link::Up,
    };
    agent.reclaim_port().await;
    if agent.read(|known| !known.listens) {
        agent.settle_port().await;
    }
    stand(agent).await;
    let append =
        agent.read(|known| known.aof_left_off && known.info.as_ref().is_some_and(|i| linked(&i.role)));
    if append {
        match agent.local.append().await {
            Ok(()) => agent.update(|known| known.aof_left_off = false),
            Err(error) => tracing::warn!(error = %error, "the append-only file cannot be turned on yet"),
        }
    }
}

/// Ends connections that write to a replica, when there are any: within [`LOOK_PERIOD`] and a moment of their first write. They were led here
/// before the port was closed, or by rules that have not changed for longer than clients are passed on.
async fn send_away(agent: &Arc<Agent>, refused: u64) {
    let before = agent.update(|known| std::mem::replace(&mut known.refused_writes, refused));
    if refused <= before || agent.read(Known::may_be_primary) {
        return;
    }
    let is_replica = || !agent.read(Known::may_be_primary);
    let ending = agent.local.end_writers(&agent.config.args.operator_user, is_replica);
    match tokio::time::timeout(LOOK_PERIOD, ending).await.unwrap_or(Err(Error::Silent)) {
        Ok(ended) => tracing::info!(ended, "clients that write to this replica are sent away"),
        Err(error) => tracing::warn!(%error, "clients that write to this replica cannot be sent away"),
    }
}

/// Tells the server whether its node stands for election, when that has changed.
async fn stand(agent: &Arc<Agent>) {
    let standing = agent.update(election::standing);
    if agent.config.topology == Topology::Replication || agent.read(|known| known.standing == standing) {
        return;
    }
    match agent.local.stand_for_election(standing).await {
        Ok(()) => {
            agent.update(|known| known.standing = standing);
            tracing::info!(?standing, "elections");
        }
        Err(error) => {
            tracing::warn!(error = %error, "the server is not told whether its node stands for election")
        }
    }
}

/// OOM kills in the control group since it was made.
fn oom_kills(cgroup: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(cgroup.join("memory.events")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}
