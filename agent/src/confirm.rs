//! A primary's confirmations: asked of every peer twice a second; when they run out, its writes are stopped, and if they
//! cannot be stopped in time, its server is.

use crate::shared::{Agent, Known};
use futures::future::join_all;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;
use tokio::time::Instant;
use valkeeper_core::ids::{MemberId, Seq, Timestamp};

/// Between two rounds of questions.
const CONFIRM_PERIOD: Duration = Duration::from_millis(500);
/// Pause before stopping or allowing writes is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Pause while a command is under way: it takes milliseconds.
const COMMAND_PAUSE: Duration = Duration::from_millis(10);

/// Between two looks at how long the machine has slept: for as long, writes may go on after it.
const SLEEP_PERIOD: Duration = Duration::from_millis(100);
/// Shorter sleeps are none, but two clocks that are read one after the other.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    /// Confirmations have run out.
    Stop,
    /// Someone has a higher grant, and confirmations have not run out yet.
    StopDeposed,
    /// Confirmed again, or not a primary any more.
    Allow,
    /// Until then, nothing; `None`: until something changes.
    Wait(Option<Timestamp>),
}

fn duty(known: &Known, now: Timestamp) -> Duty {
    let may_write = known.held.as_ref().is_none_or(|held| held.may_write(now));
    let surely = known.stopped.is_some() && known.surely_stopped;
    match (may_write, if may_write { known.stopped.is_some() } else { surely }) {
        (false, false) if known.may_be_primary() => {
            let until = known.held.as_ref().and_then(|held| held.until());
            if until.is_none_or(|until| now < until) { Duty::StopDeposed } else { Duty::Stop }
        }
        (true, true) => Duty::Allow,
        (true, false) => Duty::Wait(known.held.as_ref().and_then(|held| held.until())),
        (false, true | false) => Duty::Wait(None),
    }
}

/// Confirms for ever.
pub async fn run(agent: &Agent) {
    tokio::join!(ask(agent), obey(agent), count_sleep(agent));
}

/// What the machine has slept since it started, of which tokio's clock knows nothing.
fn slept() -> Duration {
    let now = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    let monotonic = now(ClockId::Monotonic);
    now(ClockId::Boottime).saturating_sub(monotonic)
}

/// Ends every confirmation that is from before a sleep of the machine, or of the virtual one it is.
async fn count_sleep(agent: &Agent) {
    let mut before = slept();
    loop {
        tokio::time::sleep(SLEEP_PERIOD).await;
        let now = slept();
        if now.saturating_sub(before) > SLEEP_MAX {
            tracing::warn!(
                slept_ms = (now - before).as_millis(),
                "the machine has slept: nothing is confirmed"
            );
            agent.update(|known| known.overslept(agent.me()));
            agent.confirm_now.notify_one();
        }
        before = now;
    }
}

/// Asks every peer, round by round.
async fn ask(agent: &Agent) {
    let me = agent.me();
    loop {
        let begun = Instant::now();
        let claim = agent.read(|known| {
            known
                .unconfirmed()
                .map(|_| (known.ledger.brief.grant, known.ledger.peers(me).collect::<Vec<MemberId>>()))
        });
        if let Some((grant, peers)) = claim {
            join_all(peers.iter().map(|id| ask_one(agent, *id, grant))).await;
        }
        tokio::time::sleep_until(begun + CONFIRM_PERIOD).await;
    }
}

async fn ask_one(agent: &Agent, peer: MemberId, grant: Seq) {
    let sent = agent.at(Instant::now());
    match agent.peers.confirm(peer, grant).await {
        Ok(answer) => {
            agent.update(|known| {
                let same = known.ledger.brief.grant == grant;
                if let Some(held) = known.held.as_mut().filter(|_| same) {
                    held.by_peer(peer, sent, answer);
                }
            });
            agent.confirm_now.notify_one();
        }
        Err(error) => tracing::debug!(peer = %peer, error = %error, "a peer has not confirmed"),
    }
}

/// Does what the confirmations say, at the moment they say it.
async fn obey(agent: &Agent) {
    loop {
        let now = agent.at(Instant::now());
        let until = match agent.read(|known| duty(known, now)) {
            // In a handover that is the command itself: it makes a replica of the server at once.
            Duty::StopDeposed if agent.acting.try_lock().is_err() => Some(Instant::now() + COMMAND_PAUSE),
            Duty::Stop | Duty::StopDeposed => {
                stop(agent).await;
                Some(Instant::now() + RETRY_PAUSE)
            }
            Duty::Allow => {
                allow(agent).await;
                Some(Instant::now() + RETRY_PAUSE)
            }
            Duty::Wait(until) => until.map(|at| agent.instant(at)),
        };
        let woken = agent.confirm_now.notified();
        match until {
            Some(at) => drop(tokio::time::timeout_at(at, woken).await),
            None => woken.await,
        }
    }
}

async fn stop(agent: &Agent) {
    let process = agent.read(|known| known.process);
    let stopped = agent.local.stop_writes().await;
    if agent.read(|known| known.process) != process {
        return;
    }
    match stopped {
        Ok(configured) => {
            agent.update(|known| {
                // Refused already: what was found then is what was configured.
                let before = known.stopped.take().flatten();
                known.stopped = Some(configured.or(before));
                known.surely_stopped = true;
            });
            let deposed = agent.read(|known| known.held.as_ref().and_then(|held| held.deposed()));
            tracing::warn!(
                by_grant = deposed.map(|grant| grant.0),
                "nobody confirms the grant: writes are stopped"
            );
        }
        Err(error) => {
            tracing::error!(error = %error, "writes cannot be stopped: the server is ended");
            if let Some(process) = process {
                process.kill();
            }
        }
    }
}

async fn allow(agent: &Agent) {
    let configured = agent.update(|known| {
        known.surely_stopped = false;
        known.stopped.clone().flatten()
    });
    let allowed = match &configured {
        Some(configured) => agent.local.allow_writes(configured).await,
        // Refused before the agent came: somebody else's setting.
        None => Ok(()),
    };
    match allowed {
        Ok(()) => {
            agent.update(|known| known.stopped = None);
            tracing::info!("writes are allowed again");
        }
        Err(error) => tracing::warn!(error = %error, "writes cannot be allowed yet"),
    }
}
