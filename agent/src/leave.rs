//! The end in order: hand over if somebody takes over, stop writes, let the replicas have everything, save, and remember
//! how far the data is.

use crate::{
    relay,
    run::{Asked, gone, has_ended},
    shared::{Agent, Known, history, is_at_gate},
    supervise::{Child, Ended},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{agent::History, config::SHUTDOWN_TIMEOUT_S, info::RawRole, spec::Topology};

/// How long a primary waits to be handed over. Shorter than what Valkey waits for its replicas (10 s), far shorter than
/// the pod's grace period; a handover takes some 30 ms.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node of a Valkey Cluster that has handed over stays and says so: clients ask it when they use it.
const MOVED_MAX: Duration = Duration::from_secs(1);
/// How long its address serves or refuses from when its name can be withdrawn, as it is no primary any more: who is led there by name
/// meanwhile asks another node at once, and would wait for an address that is gone, some libraries for ever. kube-proxy needs up to a second
/// for that, and the operator and the controller of the slices come before it. A termination takes at most this much longer, and
/// [`MOVED_MAX`] more where the server ends by itself, or the end is asked for once more, while it says so.
const SETTLED_MAX: Duration = Duration::from_secs(2);
/// How long it waits for that without any replica: a link that broke is back within a second.
const ALONE_MAX: Duration = Duration::from_secs(1);
/// Between two looks at what is waited for: a fifth of a handover.
const LOOK_PAUSE: Duration = Duration::from_millis(5);
/// Between two requests to end.
const REPEAT_PERIOD: Duration = Duration::from_secs(1);
/// A server that is waiting for its replicas answers for up to its shutdown-timeout, one that saves does not answer at all: one that
/// still answers after three times the former could not save, and will not end.
const ANSWERS_MAX: Duration = Duration::from_secs(3 * SHUTDOWN_TIMEOUT_S as u64);
/// How long writes wait at most: for longer than any server takes to end, which ends the pause too.
const PAUSE_MS: u32 = 600_000;
/// Bound on getting hold of the server while a command runs: a little longer than a command.
const ACTING_TIMEOUT: Duration = Duration::from_millis(2_500);

/// Ends the server. Asked once more, it waits for no handover; asked again after that, for no save.
pub async fn leave(agent: &Arc<Agent>, child: &mut Child, asked: &mut Asked) -> Ended {
    tracing::info!("told to end");
    agent.update(|known| known.leaving = true);
    let none_since = tokio::select! {
        none_since = give_up_role(agent) => none_since,
        () = asked.again() => {
            tracing::info!("told again: not waiting for a handover");
            None
        }
        ended = &mut child.ended => {
            let ended = gone(ended);
            has_ended(agent, ended).await;
            pass_on(agent, asked, None).await;
            return ended;
        }
    };
    let acting = tokio::time::timeout(ACTING_TIMEOUT, agent.acting.lock()).await;
    let at_gate = agent.read(|known| known.is_at_gate());
    if agent.read(|known| known.is_primary())
        && let Err(error) = agent.local.pause(PAUSE_MS).await
    {
        tracing::warn!(error = %error, "writes cannot be paused");
    }
    let (ended, left) = end(agent, child, asked).await;
    drop(acting);
    has_ended(agent, ended).await;
    if ended == Ended::Exit(0) && !at_gate {
        let written = agent.remember_left(left).await;
        if let Err(error) = written {
            tracing::warn!(error = %error, "how far the data is cannot be remembered");
        }
    }
    pass_on(agent, asked, none_since).await;
    ended
}

/// Waits for the handover. Since when it is no primary; `None` if nobody took over.
async fn give_up_role(agent: &Arc<Agent>) -> Option<Instant> {
    let was_primary = agent.read(Known::is_primary);
    handed_over(agent).await;
    let none_since = (!agent.read(Known::is_primary)).then(Instant::now);
    if was_primary && none_since.is_some() && agent.config.topology == Topology::Cluster {
        // Clients that know the old owner ask it first, and learn from it where their slots are.
        tokio::time::sleep(MOVED_MAX).await;
    }
    none_since
}

/// The last of clients find who takes over before this address is gone. Without a word of it the member is no primary since its server ended.
async fn pass_on(agent: &Agent, asked: &mut Asked, none_since: Option<Instant>) {
    let settled_at = none_since.unwrap_or_else(Instant::now) + SETTLED_MAX;
    let done = async {
        match agent.config.topology {
            Topology::Replication => agent.relay.last(relay::PASS_LEAVING_MAX).await,
            Topology::Cluster => tokio::time::sleep_until(settled_at).await,
        }
    };
    tokio::select! {
        () = done => {}
        () = asked.again() => tracing::info!("told again: not passing clients on any longer"),
    }
}

/// Asks the server to end until it does; how, and how far its data was when it said so last.
async fn end(agent: &Agent, child: &mut Child, asked: &mut Asked) -> (Ended, Option<History>) {
    let mut left = look(agent).await.flatten();
    let begun = Instant::now();
    let mut repeat = tokio::time::interval(REPEAT_PERIOD);
    loop {
        tokio::select! {
            ended = &mut child.ended => return (gone(ended), left),
            () = asked.again() => {
                tracing::warn!("told again: not waiting for a save");
                child.process.kill();
            }
            // A server that could not save goes on, and has to be asked again.
            _ = repeat.tick() => child.process.terminate(),
            // Until its end the server may still send to its replicas, which counts.
            () = tokio::time::sleep(LOOK_PAUSE) => if let Some(now) = look(agent).await {
                left = now;
                if begun.elapsed() >= ANSWERS_MAX {
                    tracing::error!("the server has been told to end and still serves: it is killed");
                    child.process.kill();
                }
            },
        }
    }
}

/// How far a server is that has its data, and can save it; `None` if it does not answer.
async fn look(agent: &Agent) -> Option<Option<History>> {
    let look = agent.local.look().await.ok()?;
    let has_data = !look.info.loading && !is_at_gate(&look.info) && !agent.read(|known| known.ledger.blank);
    Some((look.saves && has_data).then(|| history(&look.info)))
}

/// Returns when the server is not primary, or nobody takes over.
async fn handed_over(agent: &Agent) {
    let until = Instant::now() + HANDOVER_TIMEOUT;
    let mut linked_at = Instant::now();
    while agent.read(|known| known.is_primary() && !known.operator_away()) {
        if Instant::now() >= until || linked_at.elapsed() >= ALONE_MAX {
            tracing::warn!("nobody took over in time");
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        let Ok(look) = agent.local.look().await else { continue };
        if look.info.replicas_online > 0 {
            linked_at = Instant::now();
        }
        if look.info.role != RawRole::Primary {
            agent.seen(look);
        }
    }
}
