//! The agent's life: one server after the other, each at the gate, until it is told to end.

use crate::{
    args::{Config, RunArgs},
    boot, confirm, election, gate, http, identity, leave,
    local::Local,
    look,
    memory::Memory,
    news, relay, service, settings,
    shared::{Agent, Known},
    supervise::{Child, Ended, Supervisor},
    users,
};
use anyhow::Context;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::Instant,
};
use valkeeper_agent::tls::Live;
use valkeeper_core::{decision::HoldReason, observation::Gate};

/// A server that lived shorter than this died quickly: its own fault, most likely.
const QUICK: Duration = Duration::from_secs(10);
/// Pause before the second restart in a row after quick deaths; it doubles each time. The first comes at once.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause: what a person waits for who mends the cause.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often the pause doubles until it is the longest.
const DOUBLINGS_MAX: u32 = 6;

/// The agent that log lines of the server are read for.
static AGENT: OnceLock<Arc<Agent>> = OnceLock::new();

/// Runs until the server has ended for good; its status.
pub async fn run(args: RunArgs) -> anyhow::Result<u8> {
    // First, so that a signal is never lost and never ends PID 1 by default.
    let mut asked =
        Asked { terminated: signal(SignalKind::terminate())?, interrupted: signal(SignalKind::interrupt())? };
    let config = Config::read(args)?;
    let supervisor = Supervisor::start()?;
    let (memory, ledger) = Memory::open(&config.args.data).context("the ledger")?;
    let identity = identity::read(&config).context("the identity")?;
    let password = boot::password();
    let users = boot::Users::new(&config, &password);
    let local = Local::new(&config, password, users.clone());
    let agent = Arc::new(Agent::new(config, Live::new(identity), local, memory, ledger));
    let _ = AGENT.set(agent.clone());
    tracing::info!(member = %agent.me(), "the agent starts");
    serve(&agent, &users).await?;
    if agent.read(|known| known.ledger.brief.holder == Some(agent.me())) {
        // Of a container that was started anew in its pod: the address is still where the primary is looked for.
        relay::begin(&agent).await;
    }
    let mut deaths: u32 = 0;
    loop {
        let begun = Instant::now();
        let mut child = start(&agent, &supervisor, &users).await?;
        let ended = tokio::select! {
            ended = &mut child.ended => gone(ended),
            () = asked.again() => {
                let ended = leave::leave(&agent, &mut child, &mut asked).await;
                tracing::info!(%ended, "the server has ended");
                return Ok(ended.status());
            }
        };
        ended_by_itself(&agent, ended).await;
        deaths = if begun.elapsed() < QUICK { deaths + 1 } else { 1 };
        let pause = pause(deaths);
        if !pause.is_zero() {
            tracing::warn!(
                deaths,
                pause_ms = u64::try_from(pause.as_millis()).unwrap_or(0),
                "quick deaths in a row"
            );
        }
        tokio::select! {
            () = async {
                tokio::time::sleep(pause).await;
                election::make_place(&agent).await;
            } => {}
            () = asked.again() => return Ok(ended.status()),
        }
    }
}

fn pause(deaths: u32) -> Duration {
    match deaths.checked_sub(2) {
        None => Duration::ZERO,
        Some(n) => (RESTART_PAUSE * 2u32.pow(n.min(DOUBLINGS_MAX))).min(RESTART_PAUSE_MAX),
    }
}

/// The signals by which the agent is asked to end.
pub struct Asked {
    terminated: Signal,
    interrupted: Signal,
}

impl Asked {
    /// Returns when it is asked, each time.
    pub async fn again(&mut self) {
        tokio::select! {
            _ = self.terminated.recv() => {}
            _ = self.interrupted.recv() => {}
        }
    }
}

/// How it ended; the sender is only dropped when the runtime ends.
pub fn gone(ended: Result<Ended, oneshot::error::RecvError>) -> Ended {
    ended.unwrap_or(Ended::Exit(i32::from(u8::MAX)))
}

async fn serve(agent: &Arc<Agent>, users: &boot::Users) -> anyhow::Result<()> {
    service::serve(agent.clone()).await.context("gRPC")?;
    http::serve(agent.clone()).await.context("probes")?;
    macro_rules! task {
        ($run:path) => {
            let agent = agent.clone();
            tokio::spawn(async move { $run(&agent).await });
        };
    }
    task!(look::run);
    task!(confirm::run);
    task!(gate::run);
    task!(news::run);
    task!(identity::watch);
    let (agent, users) = (agent.clone(), users.clone());
    tokio::spawn(async move { users::watch(&agent, &users).await });
    Ok(())
}

async fn start(agent: &Arc<Agent>, supervisor: &Supervisor, users: &boot::Users) -> anyhow::Result<Child> {
    let blank = agent.read(|known| known.ledger.blank);
    let boot::Start { mut command, files, aof_left_off } =
        boot::prepare(&agent.config, users, blank).context("preparing the server")?;
    if files == boot::Files::Blank {
        // Before it makes files that look like data.
        agent.remember_blank(true).await.context("remembering that there is no data")?;
    }
    agent.local.forget().await;
    let settings = settings::kept(&agent.config);
    let child = supervisor.spawn(&mut command, line).context("starting the server")?;
    tracing::info!(pid = child.process.id(), ?files, "the server is started at the gate");
    agent.update(|known| {
        known.process = Some(child.process);
        known.last_words.begin(&known.exited);
        (known.files, known.aof_left_off) = (files, aof_left_off);
        known.settings = settings;
        known.since = Instant::now();
        known.last_answer = known.since;
        known.forget_server();
        known.gate = Gate::Holding(HoldReason::Starting);
    });
    agent.look_now.notify_one();
    Ok(child)
}

/// Takes the end of the server to where everybody looks.
fn note_end(agent: &Agent, ended: Ended) {
    let ticket = agent.local.ticket();
    agent.update(|known| {
        known.process = None;
        known.ticket = ticket;
        known.exited = ended.to_string();
        if !known.run_id.is_empty() {
            known.exited_run_id = std::mem::take(&mut known.run_id);
        }
        known.since = Instant::now();
        known.forget_server();
        known.restarts += 1;
    });
    agent.confirm_now.notify_one();
}

/// The same, and who comes to where a primary was is passed on.
pub async fn has_ended(agent: &Arc<Agent>, ended: Ended) {
    let was_primary = agent.read(Known::may_be_primary);
    note_end(agent, ended);
    if was_primary {
        relay::begin(agent).await;
    }
}

async fn ended_by_itself(agent: &Arc<Agent>, ended: Ended) {
    has_ended(agent, ended).await;
    tracing::warn!(%ended, "the server has ended; another is started at the gate");
    agent.local.forget().await;
}

/// A line of the server's.
fn line(text: &str) {
    if text.contains("No space left on device")
        && let Some(agent) = AGENT.get()
    {
        agent.update(|known| known.no_space = true);
    }
    let (level, said) = levelled(text);
    // Why a server does not start is said by lines that are warnings, or have no level. The process and the time before them would make
    // the same words news at every try.
    if matches!(level, None | Some(Level::Warning))
        && let Some(agent) = AGENT.get()
    {
        agent.update(|known| known.last_words.say(said));
    }
    match level {
        Some(Level::Warning) => tracing::warn!(target: "valkey", "{said}"),
        Some(Level::Notice) | None => tracing::info!(target: "valkey", "{said}"),
        Some(Level::Debug) => tracing::debug!(target: "valkey", "{said}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Warning,
    Notice,
    Debug,
}

/// The level of a line and what follows it: one character after process and time (`1:M 25 Nov 2026 10:00:00.123 # ...`), or with
/// `log-format logfmt` a field of its own. What has neither is printed before there is a log, and whole.
fn levelled(text: &str) -> (Option<Level>, &str) {
    let marks =
        [(" # ", Level::Warning), (" * ", Level::Notice), (" - ", Level::Debug), (" . ", Level::Debug)];
    let begins = text.split_once(' ').and_then(|(process, _)| process.split_once(':'));
    let is_plain =
        begins.is_some_and(|(pid, role)| pid.bytes().all(|b| b.is_ascii_digit()) && role.len() == 1);
    let first = marks.iter().filter_map(|(mark, level)| Some((text.find(mark)?, mark.len(), *level)));
    let first = first.filter(|_| is_plain).min_by_key(|(at, _, _)| *at);
    let fields = [("warning", Level::Warning), ("notice", Level::Notice)];
    let field = text.split_once(" level=").and_then(|(_, rest)| rest.split_once(' '));
    match (first, field) {
        (Some((at, length, level)), _) => (Some(level), text.get(at + length..).unwrap_or_default()),
        (None, Some((name, rest))) => {
            let known = fields.iter().find(|(field, _)| name.trim_matches('"') == *field);
            let said = rest.split_once("message=").map_or(rest, |(_, said)| said);
            (Some(known.map_or(Level::Debug, |(_, level)| *level)), said)
        }
        (None, None) => (None, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_told_by_its_level_and_without_what_changes_at_every_try() {
        let plain = "1:M 25 Nov 2026 10:00:00.123 # Can't open the file - No such file";
        assert_eq!(levelled(plain), (Some(Level::Warning), "Can't open the file - No such file"));
        let notice = "17:S 25 Nov 2026 10:00:00.123 * Ready - to # accept";
        assert_eq!(levelled(notice), (Some(Level::Notice), "Ready - to # accept"));
        assert_eq!(levelled(">>> 'save - # x'"), (None, ">>> 'save - # x'"), "it has no time before it");
        let field = "pid=1 role=RDB/AOF timestamp=\"25 Nov 2026\" level=warning message=\"Bad file\"";
        assert_eq!(levelled(field), (Some(Level::Warning), "\"Bad file\""));
        assert_eq!(levelled("pid=1 level=info message=x").0, Some(Level::Debug));
    }

    #[test]
    fn the_first_restart_comes_at_once_and_the_pauses_grow_to_a_bound() {
        let pauses: Vec<u128> = (1..=9).map(|deaths| pause(deaths).as_millis()).collect();
        assert_eq!(pauses, [0, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
    }
}
