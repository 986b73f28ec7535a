//! What an agent knows of its member now: the ledger, the server as it said last, the grant, and when the operator spoke.

use super::last_words::LastWords;
use crate::{
    boot::Files,
    election::{Allegiance, Standing, Told},
    local::{Configured, Life},
    supervise::Process,
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;
use valkeeper_core::{
    agent::{Answer, Confirmations, Data, History, Ledger, PeerServer},
    decision::HoldReason,
    ids::{MemberId, ReplId, Seq, Timestamp},
    info::{Info, RawRole, resolve},
    nodes::Nodes,
    observation::{Gate, Link, Source},
};

/// The operator is away if news has gone unanswered for this long, or nothing has been heard of one that nobody can be sent to: the
/// default detection window, so that a restart of the operator alone (a second or two) moves nobody.
const AWAY: Duration = Duration::from_secs(3);
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
    /// What the server has said since its start, and how the one before ended if it never answered.
    pub last_words: LastWords,
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
    pub(super) held_of: Seq,
    /// When the operator, or everyone else, spoke of the newest grant of this member's.
    pub(super) granted: Timestamp,
    /// Looks that were asked up to this ticket do not tell that the server is no primary: it may be about to become one.
    pub(super) promoting: Option<u64>,
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
    /// Digest of the settings that this server began with or took since.
    pub settings: String,
    pub no_space: bool,
    pub oom_kills: u64,
    pub restarts: u64,
    pub news_address: Option<String>,
    pub operator_heard: Instant,
    /// When the first news was sent that has no answer.
    pub unanswered_since: Option<Instant>,
    /// Of the newest look; what was asked before says nothing any more.
    pub ticket: u64,
    pub(super) number: u64,
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
            last_words: LastWords::default(),
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
            settings: String::new(),
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
    pub(super) fn hold(&mut self, me: MemberId, at: Timestamp) {
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
    pub(super) fn drawn_if_blank(&self) -> String {
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
