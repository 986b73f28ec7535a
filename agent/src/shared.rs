//! What the agent's tasks share: the ledger, what is known of the server, and who has spoken lately. Rules are the core's;
//! here is what they are asked with.

mod known;
mod last_words;

pub use known::{Known, history, is_at_gate};

use crate::{
    args::Config,
    boot::Files,
    handing::Handing,
    local::{self, Local, Look},
    memory::{Memory, Unchanged},
    peers::Peers,
    relay::Relay,
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use valkeeper_agent::{proto, tls::Live, wire};
use valkeeper_core::{
    agent::{Answer, History, Ledger, Refusal},
    ids::{MemberId, Timestamp},
    info::RawRole,
};

/// The agent.
pub struct Agent {
    pub config: Config,
    pub live: Live,
    pub local: Local,
    pub peers: Peers,
    memory: Memory,
    /// Held while the ledger is changed and written.
    writing: Arc<tokio::sync::Mutex<()>>,
    known: Mutex<Known>,
    /// Number of the newest state.
    pub changed: watch::Sender<u64>,
    /// Someone wants the server looked at now.
    pub look_now: Notify,
    /// Confirmations or the server's role have changed.
    pub confirm_now: Notify,
    /// News is due, whether there is any or not.
    pub news_now: Notify,
    /// A server has loaded.
    pub judge_now: Notify,
    /// Held by whoever opens or closes the server's port.
    pub port: tokio::sync::Mutex<()>,
    /// Passes clients on where the server was primary.
    pub relay: Relay,
    /// Held by whoever changes the server's role.
    pub acting: tokio::sync::Mutex<()>,
    /// Slots that go to another node key by key.
    pub handing: Handing,
    /// When it started.
    pub started: Instant,
    instance: String,
}

impl Agent {
    pub fn new(config: Config, live: Live, local: Local, memory: Memory, ledger: Ledger) -> Agent {
        let peers = Peers::new(&config, live.clone());
        Agent {
            config,
            live,
            local,
            peers,
            memory,
            writing: Arc::default(),
            known: Mutex::new(Known::new(ledger)),
            changed: watch::Sender::new(0),
            look_now: Notify::new(),
            confirm_now: Notify::new(),
            news_now: Notify::new(),
            judge_now: Notify::new(),
            port: tokio::sync::Mutex::new(()),
            relay: Relay::default(),
            acting: tokio::sync::Mutex::new(()),
            handing: Handing::default(),
            started: Instant::now(),
            instance: format!("{:016x}", rand::random::<u64>()),
        }
    }

    pub fn me(&self) -> MemberId {
        self.config.me
    }

    /// The agent's own clock, which never goes back.
    pub fn at(&self, instant: Instant) -> Timestamp {
        let nanos = instant.saturating_duration_since(self.started).as_nanos();
        Timestamp(i64::try_from(nanos).unwrap_or(i64::MAX))
    }

    /// The moment on tokio's clock of a time on the agent's.
    pub fn instant(&self, at: Timestamp) -> Instant {
        self.started + Duration::from_nanos(u64::try_from(at.0).unwrap_or(0))
    }

    /// Reads what is known.
    pub fn read<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes what is known. Whatever of it the operator is told makes news.
    pub fn update<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.facts(&known);
        let changed = change(&mut known);
        if self.facts(&known) != before {
            known.number += 1;
            self.changed.send_replace(known.number);
        }
        changed
    }

    /// Makes news of something that is not in what is known: a new certificate.
    pub fn renew(&self) {
        let number = self.update(|known| {
            known.number += 1;
            known.number
        });
        self.changed.send_replace(number);
    }

    /// Everything that the operator is told.
    pub fn state(&self) -> proto::AgentState {
        self.read(|known| {
            let silent = known.silent_since.map_or(0, |since| since.elapsed().as_millis().max(1));
            let silent_ms = i64::try_from(silent).unwrap_or(i64::MAX);
            proto::AgentState { number: known.number, silent_ms, ..self.facts(known) }
        })
    }

    /// What does not change while nothing happens.
    fn facts(&self, known: &Known) -> proto::AgentState {
        let (gate, hold_reason, attached_to) = wire::gate_words(known.gate);
        let identity = self.live.current();
        proto::AgentState {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            epoch: known.ledger.epoch.0,
            brief: Some((&known.ledger.brief).into()),
            consents: known.ledger.consents,
            number: 0,
            instance: self.instance.clone(),
            run_id: known.run_id.clone(),
            exited: known.exited.clone(),
            exited_run_id: known.exited_run_id.clone(),
            silent_ms: i64::from(known.silent_since.is_some()),
            gate: gate.to_owned(),
            hold_reason: hold_reason.to_owned(),
            attached_to,
            leaving: known.leaving,
            writes_stopped: known.stopped.is_some(),
            certificate_thumbprint: identity.thumbprint.clone(),
            certificate_not_after: identity.not_after_s,
            disk_full: known.no_space,
            oom_kills: known.oom_kills,
            drawn_replid: known.drawn_if_blank(),
            relays: known.relays,
            start_failure: known.last_words.start_failure().to_owned(),
            mounted: self.local.mounted(),
            settings: known.settings.clone(),
        }
    }

    /// Changes the ledger by a rule: on disk before this returns, or not at all.
    ///
    /// Whoever is told of the change may give up waiting: it is made whole all the same.
    pub async fn write<T>(
        self: &Arc<Self>,
        rule: impl FnOnce(&mut Ledger) -> Result<T, Refusal>,
    ) -> Result<T, Unchanged> {
        let writing = self.writing.clone().lock_owned().await;
        let before = self.read(|known| known.ledger.clone());
        let mut after = before.clone();
        let result = rule(&mut after)?;
        if after != before {
            let agent = self.clone();
            let whole = async move {
                let written = agent.store(after).await;
                drop(writing);
                written
            };
            let stored = tokio::spawn(whole).await;
            stored.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(Unchanged::Unwritten)?;
        }
        Ok(result)
    }

    /// On disk, then in what is known.
    async fn store(&self, after: Ledger) -> io::Result<()> {
        let (memory, copy) = (self.memory.clone(), after.clone());
        let written = tokio::task::spawn_blocking(move || memory.write(&copy)).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error))).inspect_err(|error| {
            if error.kind() == io::ErrorKind::StorageFull {
                self.update(|known| known.no_space = true);
            }
        })?;
        let (me, now) = (self.me(), self.at(Instant::now()));
        self.update(|known| {
            known.ledger = after;
            let brief = &known.ledger.brief;
            // A holder that learns of a higher grant of another's is deposed, whoever says so.
            if let Some(held) = known.held.as_mut().filter(|_| brief.holder != Some(me)) {
                held.by_peer(me, now, Answer::Deposed { grant: brief.grant });
            }
        });
        self.confirm_now.notify_one();
        Ok(())
    }

    /// Remembers how far the data is that a server left, or that this means nothing any more.
    pub async fn remember_left(self: &Arc<Self>, left: Option<History>) -> Result<(), Unchanged> {
        let rule = |ledger: &mut Ledger| {
            ledger.left = left;
            Ok(())
        };
        self.write(rule).await
    }

    /// Remembers that the server has no data, or that it has got some.
    pub async fn remember_blank(self: &Arc<Self>, blank: bool) -> Result<(), Unchanged> {
        let rule = |ledger: &mut Ledger| {
            ledger.blank = blank;
            Ok(())
        };
        self.write(rule).await
    }

    /// The operator, or everyone else, spoke at `spoken`: what the ledger says since counts for the server.
    pub fn told(&self, spoken: Instant) {
        let (me, at) = (self.me(), self.at(spoken));
        self.update(|known| known.hold(me, at));
        self.confirm_now.notify_one();
    }

    /// Makes the server primary under the grant that the ledger has, of which someone spoke at `spoken`. The grant is watched from
    /// before the command, whatever becomes of that: a server that does not answer may do it later.
    pub async fn promote(
        self: &Arc<Self>,
        spoken: Instant,
        run_id: &str,
        by: proto::Promotion,
    ) -> Result<(), local::Error> {
        self.update(|known| known.promoting = Some(u64::MAX));
        self.told(spoken);
        let promoted = self.local.promote(run_id, by).await;
        let ticket = self.local.ticket();
        let result = promoted.map(|look| self.seen(look));
        self.update(|known| {
            if result.is_ok() && known.nodes.is_some() {
                // A node keeps the history it drew at its start: whatever it is to be taken for, it is the shard's data from now on.
                known.files = Files::RdbWithHistory;
            }
            known.promoting = result.is_err().then_some(ticket).filter(|_| known.process.is_some())
        });
        if result.is_ok() {
            // Whoever is here waits for this server now.
            self.relay.end().await;
            self.settle_port().await;
        }
        result
    }

    /// Takes over what the server has said, unless that was asked before what is known: before a promotion, or before the
    /// end of the server that said it.
    pub fn seen(&self, look: Look) {
        let Look { info, nodes, saves, rewriting: _, listens, refused_writes: _, ticket, life } = look;
        let me = self.me();
        let turned = self.update(|known| {
            if ticket < known.ticket {
                return false;
            }
            let was_primary = known.may_be_primary();
            (known.ticket, known.life) = (ticket, life);
            known.listens = listens;
            known.exited.clear();
            known.last_words.answered();
            known.run_id.clone_from(&info.run_id);
            known.silent_since = None;
            known.last_answer = Instant::now();
            known.no_space &= !saves;
            if known.drawn.is_none() && !info.loading {
                known.drawn = Some(info.replid.clone());
                self.judge_now.notify_one();
            }
            let is_primary = info.role == RawRole::Primary;
            (known.info, known.nodes) = (Some(info), nodes);
            known.promoting = known.promoting.filter(|by| !is_primary && ticket <= *by);
            if !known.may_be_primary() {
                known.held = None;
            } else if known.held.is_none() && known.ledger.brief.holder == Some(me) {
                // By a command that was given up. Whoever is primary by a person's hand is not kept from it: the operator
                // follows the live cluster, and may be away.
                known.hold(me, known.granted);
            }
            was_primary != known.may_be_primary()
        });
        if turned {
            self.confirm_now.notify_one();
        }
    }

    /// The operator has spoken.
    pub fn heard(&self) {
        self.update(|known| (known.operator_heard, known.unanswered_since) = (Instant::now(), None));
    }
}
