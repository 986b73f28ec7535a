//! The end in order: hand over if somebody takes over, stop writes, let the replicas have everything, save, and remember
//! how far the data is.

use crate::{
    run::{gone, note_end},
    shared::{Agent, history, is_at_gate},
    supervise::{Child, Ended},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{agent::History, info::RawRole};

/// How long a primary waits to be handed over. Shorter than what Valkey waits for its replicas (10 s), far shorter than
/// the pod's grace period; a handover takes some 30 ms.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at what is waited for: a fifth of a handover.
const LOOK_PAUSE: Duration = Duration::from_millis(5);
/// How long writes wait at most: for longer than any server takes to end, which ends the pause too.
const PAUSE_MS: u32 = 600_000;
/// Bound on getting hold of the server while a command runs: a little longer than a command.
const ACTING_TIMEOUT: Duration = Duration::from_millis(2_500);

/// Ends the server. `hurry` is a second request to end: then nobody is waited for.
pub async fn leave(agent: &Arc<Agent>, child: &mut Child, hurry: impl Future<Output = ()>) -> Ended {
    tracing::info!("told to end");
    agent.update(|known| known.leaving = true);
    tokio::select! {
        () = handed_over(agent) => {}
        () = hurry => tracing::info!("told again: not waiting for a handover"),
        ended = &mut child.ended => {
            let ended = gone(ended);
            note_end(agent, ended);
            return ended;
        }
    }
    let acting = tokio::time::timeout(ACTING_TIMEOUT, agent.acting.lock()).await;
    let at_gate = agent.read(|known| known.is_at_gate());
    if agent.read(|known| known.is_primary())
        && let Err(error) = agent.local.pause(PAUSE_MS).await
    {
        tracing::warn!(error = %error, "writes cannot be paused");
    }
    let mut left = if at_gate { None } else { look(agent).await };
    child.process.terminate();
    let ended = loop {
        tokio::select! {
            ended = &mut child.ended => break gone(ended),
            // Until its end the server may still send to its replicas, which counts.
            () = tokio::time::sleep(LOOK_PAUSE) => if !at_gate {
                left = look(agent).await.or(left);
            },
        }
    };
    drop(acting);
    note_end(agent, ended);
    if ended == Ended::Exit(0) && !at_gate {
        let written = agent.remember_left(left).await;
        if let Err(error) = written {
            tracing::warn!(error = %error, "how far the data is cannot be remembered");
        }
    }
    ended
}

/// How far a server is that has its data.
async fn look(agent: &Agent) -> Option<History> {
    let info = agent.local.look().await.ok()?.info;
    (!info.loading && !is_at_gate(&info)).then(|| history(&info))
}

/// Returns when the server is not primary, or nobody takes over.
async fn handed_over(agent: &Agent) {
    let until = Instant::now() + HANDOVER_TIMEOUT;
    while agent.read(|known| known.is_primary() && !known.operator_away()) {
        if Instant::now() >= until {
            tracing::warn!("nobody took over in time");
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
        if let Ok(look) = agent.local.look().await
            && look.info.role != RawRole::Primary
        {
            agent.seen(look);
        }
    }
}
