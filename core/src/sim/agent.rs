//! The agents of this world: the real rules of `core::agent`, a ledger on each disk, clocks that may drift, and messages
//! between peers that get lost, come twice or come late.

use super::{
    network::reach,
    process::Process,
    world::{Place, World},
};
use crate::{
    agent::{Answer, Brief, Confirmations, Data, History, PeerAnswer, PeerServer, Verdict, gate},
    decision::HoldReason,
    effect::Promotion,
    ids::{MemberId, ReplId, Seq, Timestamp},
    observation::{AgentFacts, CertificateFacts, Gate, Link, ServerProcess, Source},
};
use std::collections::{BTreeMap, BTreeSet};

/// How often a holder asks to be confirmed, and a server at the gate asks its peers. Milliseconds.
const ASK_EVERY_MS: i64 = 500;
/// Without a word of the operator for this long it counts as away. Milliseconds.
const AWAY_AFTER_MS: i64 = 3_000;

/// How long an agent passes clients on after its primary was demoted. Milliseconds.
const RELAY_MS: i64 = 3_000;

/// The agent of one pod, as far as it does not outlive its process.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) gate: Gate,
    pub(super) leaving: bool,
    /// Until when it passes clients on, by its own clock.
    relays_until: Timestamp,
    pub(super) confirmations: Option<Confirmations>,
    /// When the operator spoke last, by this agent's clock.
    greeted_at: Timestamp,
    asked_at: Timestamp,
    answers: BTreeMap<MemberId, PeerAnswer>,
    consents: BTreeSet<MemberId>,
    /// The last time it confirmed a holder, or its start, by its own clock.
    confirmed_at: Timestamp,
}

/// A message between agents.
#[derive(Clone, Debug)]
pub(super) enum Mail {
    Confirm { grant: Seq, sent: Timestamp },
    Confirmed { sent: Timestamp, answer: Answer },
    Ask,
    Told(PeerAnswer),
    Consent { grant: Seq },
    Consented(bool),
}

/// What happens to messages on their way.
#[derive(Clone, Debug, Default)]
pub(super) struct Post {
    pub(super) lost_percent: u64,
    pub(super) repeated_percent: u64,
    pub(super) late_max_ms: i64,
    pub(super) seed: u64,
    queue: Vec<(Timestamp, MemberId, MemberId, Mail)>,
}

impl Post {
    /// A number below `below`, from the seed.
    fn draw(&mut self, below: u64) -> u64 {
        // Knuth's MMIX generator: any will do, as long as it is the same every time.
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below.max(1)
    }

    fn send(&mut self, now: Timestamp, from: MemberId, to: MemberId, mail: Mail) {
        let copies = 1 + u64::from(self.draw(100) < self.repeated_percent);
        for _ in 0..copies {
            if self.draw(100) < self.lost_percent {
                continue;
            }
            let late = u64::try_from(self.late_max_ms).unwrap_or(0);
            let delay = i64::try_from(self.draw(late + 1)).unwrap_or(0);
            self.queue.push((now.plus_millis(delay), from, to, mail.clone()));
        }
    }

    fn due(&mut self, now: Timestamp) -> Vec<(MemberId, MemberId, Mail)> {
        if self.queue.is_empty() {
            return Vec::new();
        }
        let (due, later) = std::mem::take(&mut self.queue).into_iter().partition(|(at, ..)| *at <= now);
        self.queue = later;
        let due: Vec<(Timestamp, MemberId, MemberId, Mail)> = due;
        due.into_iter().map(|(_, from, to, mail)| (from, to, mail)).collect()
    }
}

impl Agent {
    pub(super) fn new(now: Timestamp) -> Self {
        Agent {
            gate: Gate::Holding(HoldReason::Starting),
            leaving: false,
            relays_until: now,
            confirmations: None,
            greeted_at: now,
            asked_at: now.plus_millis(-ASK_EVERY_MS),
            answers: BTreeMap::new(),
            consents: BTreeSet::new(),
            confirmed_at: now,
        }
    }

    /// The server was started again: nothing that peers said before counts.
    pub(super) fn at_gate(&mut self) {
        self.gate = Gate::Holding(HoldReason::Starting);
        self.answers.clear();
        self.consents.clear();
        self.confirmations = None;
    }

    pub(super) fn writes_stopped(&self, now: Timestamp) -> bool {
        self.confirmations.as_ref().is_some_and(|c| !c.may_write(now))
    }

    fn confirmed_ago_ms(&self, now: Timestamp) -> i64 {
        now.millis_since(self.confirmed_at)
    }
}

impl World {
    /// A member's own clock.
    pub(super) fn local(&self, id: MemberId) -> Timestamp {
        let ppm = self.drift_ppm.get(&id).copied().unwrap_or(0);
        let passed = i128::from(self.now.0 - self.began.0);
        let drifted = passed + passed * i128::from(ppm) / 1_000_000;
        Timestamp(self.began.0.saturating_add(i64::try_from(drifted).unwrap_or(i64::MAX)))
    }

    /// True if the two can talk.
    pub(super) fn reach(&self, a: MemberId, b: MemberId) -> bool {
        a == b || reach(&self.sides, &self.only, a, b)
    }

    /// True if the member's server accepts writes of whoever reaches it.
    pub(super) fn writable(&self, id: MemberId) -> bool {
        let now = self.local(id);
        let Some(pod) = self.places.get(&id).and_then(|p| p.pod.as_ref()) else { return false };
        pod.process.as_ref().is_some_and(|p| p.is_primary() && !p.frozen)
            && !pod.agent.as_ref().is_some_and(|a| a.writes_stopped(now))
            && !self.is_shut_out(id)
    }

    /// The operator speaks to an agent.
    pub(super) fn greet(&mut self, id: MemberId) {
        let now = self.local(id);
        if let Some(agent) = self.agent(id) {
            agent.greeted_at = now;
        }
    }

    pub(super) fn agent(&mut self, id: MemberId) -> Option<&mut Agent> {
        self.places.get_mut(&id)?.pod.as_mut()?.agent.as_mut()
    }

    /// Every agent does what is due, and every message that is due arrives.
    pub(super) fn agents(&mut self) {
        let ids: Vec<MemberId> = self.places.keys().copied().collect();
        for id in ids {
            self.confirm(id);
            self.hold(id);
        }
        // A question and its answer in one tick, if nothing delays them.
        for _ in 0..2 {
            for (from, to, mail) in self.post.due(self.now) {
                if self.reach(from, to) && !self.is_frozen_pod(to) {
                    self.receive(from, to, mail);
                }
            }
        }
    }

    fn post(&mut self, from: MemberId, to: MemberId, mail: Mail) {
        self.post.send(self.now, from, to, mail);
    }

    /// A holder asks its peers, and the operator if that is there.
    fn confirm(&mut self, id: MemberId) {
        let (now, on_our_side) = (self.local(id), !self.is_apart(id));
        let supported = self.authority.contains(&(id, self.grant_of(id))) && on_our_side;
        let Some(place) = self.places.get_mut(&id) else { return };
        let peers: Vec<MemberId> = place.ledger.peers(id).collect();
        let grant = place.ledger.brief.grant;
        let Some(pod) = place.pod.as_mut().filter(|p| !p.frozen) else { return };
        let is_primary = pod.process.as_ref().is_some_and(Process::is_primary);
        let Some(agent) = pod.agent.as_mut() else { return };
        let asks = is_primary && now.millis_since(agent.asked_at) >= ASK_EVERY_MS;
        let Some(known) = agent.confirmations.as_mut().filter(|_| asks) else { return };
        if supported {
            known.by_operator(now);
        }
        agent.asked_at = now;
        for peer in peers {
            self.post(id, peer, Mail::Confirm { grant, sent: now });
        }
    }

    fn grant_of(&self, id: MemberId) -> Seq {
        self.places.get(&id).map(|p| p.ledger.brief.grant).unwrap_or_default()
    }

    /// A server at the gate, with the operator away.
    fn hold(&mut self, id: MemberId) {
        let now = self.local(id);
        let Some(place) = self.places.get_mut(&id) else { return };
        let Some(data) = data_at_gate(place, self.now) else { return };
        let peers: Vec<MemberId> = place.ledger.peers(id).collect();
        let grant = place.ledger.brief.grant;
        let Some(agent) = place.pod.as_mut().filter(|p| !p.frozen).and_then(|p| p.agent.as_mut()) else {
            return;
        };
        let away = now.millis_since(agent.greeted_at) >= AWAY_AFTER_MS;
        let verdict = gate::judge(id, &place.ledger, &data, away, &agent.answers);
        let asks = now.millis_since(agent.asked_at) >= ASK_EVERY_MS;
        if asks {
            agent.asked_at = now;
        }
        let everyone = peers.iter().all(|p| agent.consents.contains(p));
        let (members, window_ms) = (place.ledger.brief.roster.len(), place.ledger.brief.isolation_ms);
        let gate = match verdict {
            Verdict::Attach(to) if self.follow(id, to) => Gate::Attached(to),
            Verdict::Resume if everyone && self.resume(id) => Gate::Resumed,
            Verdict::Hold(reason, _) => Gate::Holding(reason),
            Verdict::Resume | Verdict::Attach(_) => Gate::Holding(HoldReason::ConsentRefused),
        };
        let Some(place) = self.places.get_mut(&id) else { return };
        if let Some(agent) = place.pod.as_mut().and_then(|p| p.agent.as_mut()) {
            agent.gate = gate;
            if gate == Gate::Resumed {
                agent.confirmations = Some(Confirmations::new(members, window_ms, now));
            }
        }
        for peer in peers.into_iter().filter(|_| asks && away) {
            self.post(id, peer, Mail::Ask);
            if verdict == Verdict::Resume {
                self.post(id, peer, Mail::Consent { grant });
            }
        }
    }

    /// The server follows a member; false if it could not be made to.
    fn follow(&mut self, id: MemberId, to: MemberId) -> bool {
        if self.is_cluster() {
            let node = self.node(to).map(|node| node.id.clone());
            if node.and_then(|node| self.replicate_node(id, &node)).is_err() {
                return false;
            }
        }
        self.process(id).map(|process| process.follow(to)).is_some()
    }

    /// The server becomes primary again; false if it could not.
    fn resume(&mut self, id: MemberId) -> bool {
        if self.is_cluster() {
            let is_primary = self.node(id).is_ok_and(|node| node.primary.is_none());
            let by = if is_primary { Promotion::Open } else { Promotion::Force };
            return self.promote_node(id, by).is_ok();
        }
        self.process(id).map(Process::promote).is_some()
    }

    fn receive(&mut self, from: MemberId, to: MemberId, mail: Mail) {
        let (at, now) = (self.now, self.local(to));
        let Some(place) = self.places.get_mut(&to) else { return };
        let told = PeerAnswer {
            grant: place.ledger.brief.grant,
            holder: place.ledger.brief.holder,
            server: serving(place, at),
        };
        let Some(agent) = place.pod.as_mut().and_then(|p| p.agent.as_mut()) else { return };
        let answer = match mail {
            Mail::Confirm { grant, sent } => {
                let supported = place.ledger.support(from, grant).is_ok();
                agent.confirmed_at = if supported { now } else { agent.confirmed_at };
                Mail::Confirmed { sent, answer: Answer::of(supported, told.grant, grant) }
            }
            Mail::Confirmed { sent, answer } => {
                if let Some(known) = agent.confirmations.as_mut() {
                    known.by_peer(from, sent, answer);
                }
                return;
            }
            Mail::Ask => Mail::Told(told),
            Mail::Told(answer) => {
                agent.answers.insert(from, answer);
                return;
            }
            Mail::Consent { grant } => Mail::Consented(place.ledger.consent(from, grant).is_ok()),
            Mail::Consented(given) => {
                if given {
                    agent.consents.insert(from);
                }
                return;
            }
        };
        self.post(to, from, answer);
    }

    /// What the agent tells the operator; `None` if it does not answer.
    pub(super) fn agent_facts(&self, id: MemberId) -> Option<AgentFacts> {
        let (now, place) = (self.local(id), self.places.get(&id)?);
        let pod = place.pod.as_ref().filter(|p| !p.frozen)?;
        let agent = pod.agent.as_ref()?;
        let began_with = pod.settings.iter().chain([&pod.revision]);
        let is_refused =
            pod.process.is_none() && began_with.into_iter().any(|digest| self.refused.contains(digest));
        let server = match &pod.process {
            None if is_refused => ServerProcess::Exited("exit 1".into()),
            None => ServerProcess::Exited("signal 9".into()),
            Some(p) if p.frozen => ServerProcess::Silent { since: p.frozen_at },
            Some(_) => ServerProcess::Running,
        };
        Some(AgentFacts {
            version: "sim".into(),
            brief: place.ledger.brief.clone(),
            consents: place.ledger.consents,
            run_id: pod.process.as_ref().map(|p| p.run_id.clone()).unwrap_or_default(),
            server,
            drawn: pod.process.as_ref().and_then(|p| p.drawn.clone()),
            gate: agent.gate,
            settings: pod.settings.clone(),
            disk_full: false,
            relays: now < agent.relays_until,
            start_failure: is_refused
                .then(|| "exit 1: Bad directive or wrong number of arguments".to_owned()),
            oom_kills: 0,
            leaving: agent.leaving || pod.deleted_at.is_some(),
            writes_stopped: agent.writes_stopped(now),
            certificate: CertificateFacts::default(),
        })
    }

    /// A primary was demoted: its agent passes its clients on for a while.
    pub(super) fn relay(&mut self, id: MemberId) {
        let until = self.local(id).plus_millis(RELAY_MS);
        if let Some(agent) = self.agent(id) {
            agent.relays_until = until;
        }
    }

    /// The operator gives a member's agent a grant of its own, or tells it whose it is.
    pub(super) fn told(&mut self, id: MemberId, brief: &Brief) {
        let now = self.local(id);
        let is_primary = self.process(id).is_some_and(|p| p.is_primary());
        let Some(agent) = self.agent(id) else { return };
        agent.gate = Gate::Commanded;
        agent.confirmations = Confirmations::told(id, brief, is_primary, now);
    }

    /// A member has promised something that nobody asks for any more.
    pub fn promise_above(&mut self, id: MemberId, candidate: MemberId, grant: Seq) -> Result<(), String> {
        let place = self.places.get_mut(&id).ok_or("no such member")?;
        let brief = Brief { grant, holder: Some(candidate), ..place.ledger.brief.clone() };
        place.ledger.learn(&brief).map_err(|refusal| refusal.to_string())
    }

    pub(super) fn promise(&mut self, id: MemberId, brief: &Brief) -> Result<(), String> {
        let now = self.local(id);
        let ago = self.agent(id).ok_or("no agent")?.confirmed_ago_ms(now);
        if self.full.contains(&id) {
            return Err("no space left on device".to_owned());
        }
        let place = self.places.get_mut(&id).ok_or("no such member")?;
        place.ledger.promise(brief, ago).map_err(|refusal| refusal.to_string())
    }
}

/// What its agent knows of the data of a server at the gate; `None` if none is there.
fn data_at_gate(place: &Place, now: Timestamp) -> Option<Data> {
    let process = place.pod.as_ref()?.process.as_ref().filter(|p| !p.frozen && !p.loads(now))?;
    match &process.source {
        Some(Source::Gate { had_history: false }) => Some(Data::Blank),
        Some(Source::Gate { had_history: true }) => {
            // A snapshot says what it is.
            let from_file = !process.replid.0.starts_with("aof-");
            let left = place.ledger.left.clone().or(from_file.then(|| history(process)));
            Some(left.map_or(Data::Unproven, Data::Proven))
        }
        Some(Source::Member(_) | Source::Foreign(_)) | None => None,
    }
}

fn serving(place: &Place, now: Timestamp) -> PeerServer {
    let Some(process) = place.pod.as_ref().and_then(|p| p.process.as_ref()).filter(|p| !p.frozen) else {
        return PeerServer::Starting;
    };
    match (&process.source, process.link) {
        (None, _) => PeerServer::Primary,
        (Some(Source::Gate { .. }), _) => {
            data_at_gate(place, now).map_or(PeerServer::Starting, PeerServer::AtGate)
        }
        (Some(_), Link::Syncing) => PeerServer::Starting,
        (Some(_), Link::Up | Link::Down) => PeerServer::Running(Data::Proven(history(process))),
    }
}

/// The history of a running process.
pub(super) fn history(process: &Process) -> History {
    let (replid, before): (ReplId, Option<(ReplId, i64)>) = (process.replid.clone(), process.before.clone());
    History { replid, offset: process.offset, before }
}
