//! What the agent's tasks share: the ledger, what is known of the server, and who has spoken lately. Rules are the core's;
//! here is what they are asked with.

use crate::{
    args::Config,
    boot::Files,
    election::{Allegiance, Standing, Told},
    handing::Handing,
    local::{self, Configured, Life, Local, Look},
    memory::{Memory, Unchanged},
    peers::Peers,
    relay::Relay,
    supervise::Process,
};
use std::{
    collections::BTreeMap,
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
    agent::{Answer, Confirmations, Data, History, Ledger, PeerServer, Refusal},
    decision::HoldReason,
    ids::{MemberId, ReplId, Seq, Timestamp},
    info::{Info, RawRole, resolve},
    nodes::Nodes,
    observation::{Gate, Link, Source},
};

/// The operator is away if news has gone unanswered for this long, or nothing has been heard of one that nobody can be sent to: the
/// default detection window, so that a restart of the operator alone (a second or two) moves nobody.
pub const AWAY: Duration = Duration::from_secs(3);
/// It is away as well if nothing has been heard for this long, whatever became of news: two heartbeats.
const AWAY_SILENT: Duration = Duration::from_secs(12);

/// What is known of the member now.
pub struct Known {
    pub ledger: Ledger,
    /// The server's process, if one runs.
    pub process: Option<Process>,
    pub files: Files,
    pub aof_left_off: bool,
    /// When the process was started, or the last one ended.
    pub since: Instant,
    pub run_id: String,
    pub exited: String,
    pub exited_run_id: String,
    /// The last answer of this process.
    pub info: Option<Info>,
    /// Which server gave it.
    pub life: Life,
    /// Its node in Cluster mode and those that it knows, as it said then.
    pub nodes: Option<Nodes>,
    /// History that it had when it had loaded, which says nothing if nothing was loaded that could.
    pub drawn: Option<ReplId>,
    /// When the first question was sent that has no answer.
    pub silent_since: Option<Instant>,
    pub last_answer: Instant,
    pub gate: Gate,
    pub leaving: bool,
    /// The server was ended so that the nodes of the others elect another primary: no next one is started for a while.
    pub yielded: bool,
    /// Whether the node stands for election in place of its primary, as its server was told.
    pub standing: Standing,
    /// Its link to its primary.
    pub allegiance: Allegiance,
    /// What its primary's agent said last while that was lost.
    pub told: Option<Told>,
    /// Set while writes are refused: what to put back.
    pub stopped: Option<Option<Configured>>,
    /// Cleared before a command that lets writes go on: then they may, whatever its answer.
    pub surely_stopped: bool,
    /// The grant held, while its server is primary by it.
    pub held: Option<Confirmations>,
    /// The grant that this is of.
    held_of: Seq,
    /// When the operator, or everyone else, spoke of the newest grant of this member's.
    granted: Timestamp,
    /// Looks that were asked up to this ticket do not tell that the server is no primary: it may be about to become one.
    promoting: Option<u64>,
    /// When this agent confirmed another holder's grant last.
    pub confirmed: Option<Instant>,
    /// How often it has confirmed another.
    pub confirmations: u64,
    /// Of the last look: how often the server has refused a write as a replica.
    pub refused_writes: u64,
    /// The server listens at the port of clients.
    pub listens: bool,
    /// The relay does.
    pub relays: bool,
    pub no_space: bool,
    pub oom_kills: u64,
    pub restarts: u64,
    pub news_address: Option<String>,
    pub operator_heard: Instant,
    /// When the first news was sent that has no answer.
    pub unanswered_since: Option<Instant>,
    /// Of the newest look; what was asked before says nothing any more.
    pub ticket: u64,
    number: u64,
}

impl Known {
    pub fn new(ledger: Ledger) -> Known {
        let now = Instant::now();
        Known {
            held_of: ledger.brief.grant,
            ledger,
            process: None,
            files: Files::Blank,
            aof_left_off: false,
            since: now,
            run_id: String::new(),
            exited: String::new(),
            exited_run_id: String::new(),
            info: None,
            life: Life::default(),
            nodes: None,
            drawn: None,
            silent_since: None,
            last_answer: now,
            gate: Gate::Holding(HoldReason::Starting),
            leaving: false,
            yielded: false,
            standing: Standing::Refrains,
            allegiance: Allegiance::default(),
            told: None,
            stopped: None,
            surely_stopped: false,
            held: None,
            granted: Timestamp(0),
            promoting: None,
            confirmed: None,
            confirmations: 0,
            refused_writes: 0,
            listens: false,
            relays: false,
            no_space: false,
            oom_kills: 0,
            restarts: 0,
            news_address: None,
            operator_heard: now,
            unanswered_since: None,
            ticket: 0,
            number: 0,
        }
    }

    /// True if the server is primary.
    pub fn is_primary(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.role == RawRole::Primary)
    }

    /// True if the server is primary, or may have become one unseen.
    pub fn may_be_primary(&self) -> bool {
        self.promoting.is_some() || self.is_primary()
    }

    /// Whoever spoke at `at` told what the ledger says now. Only a higher grant makes confirmations anew: the same one may come late or
    /// again.
    fn hold(&mut self, me: MemberId, at: Timestamp) {
        let brief = &self.ledger.brief;
        let (grant, own) = (brief.grant, brief.holder == Some(me));
        let deposed = self.held.as_ref().and_then(Confirmations::deposed);
        match self.held.as_mut().filter(|_| self.held_of == grant) {
            Some(held) => held.retold(brief, at),
            None => {
                self.held = Confirmations::told(me, brief, self.promoting.is_some() || self.is_primary(), at);
                if own && self.held_of != grant {
                    self.granted = at;
                }
                self.held_of = grant;
            }
        }
        let higher = deposed.filter(|by| *by > grant).or((!own).then_some(grant));
        if let (Some(held), Some(grant)) = (self.held.as_mut(), higher) {
            held.by_peer(me, at, Answer::Deposed { grant });
        }
    }

    /// What was confirmed means nothing any more: time has passed that nobody counted.
    pub fn overslept(&mut self, me: MemberId) {
        let Some(before) = self.held.take_if(|held| held.has_window()) else { return };
        self.held = Confirmations::told(me, &self.ledger.brief, true, Timestamp(0));
        if let (Some(held), Some(grant)) = (self.held.as_mut(), before.deposed()) {
            held.by_peer(me, Timestamp(0), Answer::Deposed { grant });
        }
    }

    /// Forgets the server that has ended, or what was before the one that starts.
    pub fn forget_server(&mut self) {
        (self.info, self.nodes, self.drawn, self.silent_since) = (None, None, None, None);
        (self.stopped, self.held, self.promoting) = (None, None, None);
        (self.listens, self.refused_writes) = (false, 0);
        (self.standing, self.allegiance, self.told) = (Standing::Refrains, Allegiance::default(), None);
    }

    /// True if the server is at the gate, loaded or not.
    pub fn is_at_gate(&self) -> bool {
        self.info.as_ref().is_some_and(is_at_gate)
    }

    /// The server's data, once it has loaded.
    pub fn data(&self) -> Option<Data> {
        let info = self.info.as_ref().filter(|info| !info.loading)?;
        let drawn = self.drawn.as_ref()?;
        Some(match self.files {
            Files::Blank if info.replid == *drawn => Data::Blank,
            Files::Rdb if info.replid == *drawn => Data::Unproven,
            Files::Aof if info.replid == *drawn => {
                self.ledger.left.clone().map_or(Data::Unproven, Data::Proven)
            }
            Files::Blank | Files::Rdb | Files::Aof | Files::RdbWithHistory => Data::Proven(history(info)),
        })
    }

    /// True if a server that began blank has been given data: it is on another history, or linked on the very one of files that it was
    /// not to be trusted with.
    pub fn was_given_data(&self) -> bool {
        let Some((info, drawn)) = self.info.as_ref().zip(self.drawn.as_ref()) else { return false };
        match &info.role {
            RawRole::Primary | RawRole::Replica { source: _, link: Link::Syncing } => false,
            RawRole::Replica { source: _, link: Link::Up } => true,
            RawRole::Replica { source: _, link: Link::Down } => info.replid != *drawn,
        }
    }

    /// The history that the server drew at its start, if that was without a data file; else empty.
    fn drawn_if_blank(&self) -> String {
        let drawn = self.drawn.as_ref().filter(|_| self.files == Files::Blank);
        drawn.map(|id| id.0.clone()).unwrap_or_default()
    }

    /// The server as a peer is told of it.
    pub fn server(&self) -> PeerServer {
        let (Some(info), Some(data)) = (&self.info, self.data()) else {
            return PeerServer::Starting;
        };
        match &info.role {
            RawRole::Primary => PeerServer::Primary,
            RawRole::Replica { source: _, link: Link::Syncing } => PeerServer::Starting,
            RawRole::Replica { source: _, link: Link::Up | Link::Down } if is_at_gate(info) => {
                PeerServer::AtGate(data)
            }
            RawRole::Replica { source: _, link: Link::Up | Link::Down } => PeerServer::Running(data),
        }
    }

    /// The grant that is held and must be confirmed, if there is one: the server is primary by it, and nobody has a higher one.
    pub fn unconfirmed(&self) -> Option<&Confirmations> {
        self.held
            .as_ref()
            .filter(|held| self.may_be_primary() && held.has_window() && held.deposed().is_none())
    }

    /// True if nobody else will decide.
    pub fn operator_away(&self) -> bool {
        self.operator_away_for().is_some()
    }

    /// For how long nobody else has been there to decide; `None` if somebody is.
    pub fn operator_away_for(&self) -> Option<Duration> {
        let silent_max = if self.news_address.is_some() { AWAY_SILENT } else { AWAY };
        let silent = self.operator_heard.elapsed().checked_sub(silent_max);
        // Silence between two heartbeats says nothing; news that fails does.
        let unanswered = self.unanswered_since.and_then(|since| since.elapsed().checked_sub(AWAY));
        silent.max(unanswered)
    }

    /// True if somebody who waits for the operator to be there or away should ask: nothing has been heard, and nothing asked.
    pub fn operator_in_doubt(&self) -> bool {
        self.news_address.is_some()
            && self.unanswered_since.is_none()
            && self.operator_heard.elapsed() >= AWAY
    }
}

/// True of a server that follows the gate.
pub fn is_at_gate(info: &Info) -> bool {
    match &info.role {
        RawRole::Primary => false,
        RawRole::Replica { source, link: _ } => match resolve(source, &BTreeMap::new()) {
            Source::Gate { had_history: _ } => true,
            Source::Member(_) | Source::Foreign(_) => false,
        },
    }
}

/// How far a server is.
pub fn history(info: &Info) -> History {
    let before = info.replid2.clone().zip(info.replid2_offset);
    History { replid: info.replid.clone(), offset: info.offset, before }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_operator_is_away_when_news_fails_and_not_between_two_heartbeats() {
        let mut known = Known::new(Ledger::default());
        let ms = Duration::from_millis;
        tokio::time::advance(ms(2_999)).await;
        assert!(!known.operator_away());
        tokio::time::advance(ms(1)).await;
        assert!(known.operator_away(), "nobody to ask");
        known.news_address = Some("operator:8443".to_owned());
        known.operator_heard = Instant::now();
        tokio::time::advance(ms(6_000)).await;
        assert!(!known.operator_away() && known.operator_in_doubt());
        known.unanswered_since = Some(Instant::now());
        assert!(!known.operator_away() && !known.operator_in_doubt());
        tokio::time::advance(ms(3_000)).await;
        assert!(known.operator_away());
        known.unanswered_since = None;
        tokio::time::advance(ms(3_000)).await;
        assert!(known.operator_away(), "silent for twelve seconds");
    }
}
