//! The operator's link to one agent: a held channel, greeted whenever it is new or nothing was heard for too long.

use super::{
    Board,
    call::{CALL_MAX, CallError, greet},
};
use crate::k8s;
use futures::future::join_all;
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::Instant,
};
use tonic::transport::Channel;
use valkeeper_agent::{
    link::connect,
    proto::AgentState,
    tls::{Accept, Live, Peer},
};
use valkeeper_core::{
    agent::Brief,
    ids::{MemberId, WriterEpoch},
    observation::{AgentFacts, Gate, Observed},
};

/// How long an agent may say nothing before it is asked: two of its heartbeats with their jitter.
const SILENCE_MAX: Duration = Duration::from_secs(12);

/// The same for an agent that would otherwise take the operator for away (3 s) and act by itself: one that holds its server at
/// the gate, or whose news have never arrived, whether it knows no address for them or finds no way there.
const SILENCE_AT_GATE_MAX: Duration = Duration::from_secs(1);

/// First and longest pause before an agent that did not answer is asked again. The first is short because a restarted pod's
/// agent is there a moment after its address; the longest is that of a turn.
const AGAIN_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Bound on the greeting of an agent that has just been heard and is doubted, over the connection that is there: one round trip and no
/// write. While it is waited for, nobody knows whether the path to it is dead.
const DOUBTED_MAX: Duration = Duration::from_millis(500);

/// Bound on making a connection, handshake included: two round trips and two signatures, on a busy node.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// How one cluster's agents are reached.
#[derive(Clone)]
pub struct Dial {
    /// The operator's identity.
    pub live: Live,
    /// host:port at which agents bring their news; empty if they cannot.
    pub news_address: String,
    /// Where what they say is kept.
    pub board: Arc<Board>,
}

/// Who is expected where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The member.
    pub member: MemberId,
    /// Where its agent listens.
    pub address: SocketAddr,
    /// The name its certificate must have.
    pub peer: Peer,
}

/// A link to one agent. Dropping it ends the connection.
pub struct AgentLink {
    contact: Arc<Contact>,
    task: JoinHandle<()>,
}

struct Contact {
    place: Place,
    dial: Dial,
    channel: Mutex<Option<Channel>>,
    check: Arc<Notify>,
    /// True once it has answered, or failed to.
    settled: watch::Sender<bool>,
}

impl Drop for AgentLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl AgentLink {
    /// Reaches out to the agent at once, and keeps in touch.
    pub fn open(place: Place, dial: Dial) -> AgentLink {
        let settled = watch::Sender::new(false);
        let check = dial.board.doubts(place.member);
        let contact = Arc::new(Contact { place, dial, channel: Mutex::default(), check, settled });
        let task = tokio::spawn(tend(Arc::clone(&contact)));
        AgentLink { contact, task }
    }

    /// Who is expected where.
    pub fn place(&self) -> &Place {
        &self.contact.place
    }

    /// The epoch that commands carry.
    pub(super) fn epoch(&self) -> WriterEpoch {
        self.contact.dial.board.epoch()
    }

    pub(super) fn channel(&self) -> Option<Channel> {
        self.contact.channel()
    }

    pub(super) fn heard(&self, state: AgentState) {
        let member = self.contact.place.member;
        if let Err(malformed) = self.contact.dial.board.answered(member, state) {
            tracing::warn!(%member, %malformed, "an agent's answer cannot be understood");
        }
    }

    /// A command gave the member a grant, or told it that it has one: its window begins then, whatever became of the answer.
    pub(super) fn spoke_for(&self, brief: &Brief) {
        let Place { member, address: _, peer: _ } = &self.contact.place;
        if brief.holder == Some(*member) {
            self.contact.dial.board.spoke_for(*member);
        }
    }

    pub(super) fn deposed(&self, by: WriterEpoch) {
        self.contact.deposed(by);
    }

    /// Greets the agent now: whoever answers has the member's certificate.
    ///
    /// # Errors
    /// Why there was no answer.
    pub async fn prove(&self) -> Result<(), String> {
        self.contact.greet().await
    }

    /// Something is wrong with the member: ask the agent again, soon.
    pub fn check(&self) {
        self.contact.check.notify_one();
    }

    /// Returns when the agent has answered or failed to, once.
    pub async fn settled(&self) {
        let mut settled = self.contact.settled.subscribe();
        // The sender lives as long as `self`.
        let _ = settled.wait_for(|settled| *settled).await;
    }
}

impl Contact {
    fn channel(&self) -> Option<Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn deposed(&self, by: WriterEpoch) {
        let board = &self.dial.board;
        board.depose(self.place.member, by.max(WriterEpoch(board.epoch().0.saturating_add(1))));
    }

    /// Connects if there is no channel yet, and greets.
    async fn greet(&self) -> Result<(), String> {
        let Dial { live, news_address, board } = &self.dial;
        let known = self.channel();
        let is_heard = known.is_some() && board.facts(self.place.member).present().is_some();
        let bound = if is_heard { DOUBTED_MAX } else { CALL_MAX };
        let channel = match known {
            Some(channel) => channel,
            None => {
                let accept = Accept::Exactly(self.place.peer.clone());
                let connecting = connect(live, accept, self.place.address, CONNECT_MAX);
                let connected = tokio::time::timeout(CONNECT_MAX, connecting).await;
                let channel =
                    connected.map_err(|_| "no connection in time".to_owned())?.map_err(|e| k8s::chain(&e))?;
                *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel.clone());
                channel
            }
        };
        let state = greet(channel, board.epoch(), news_address, bound).await.map_err(|error| {
            if let CallError::Deposed { by, words: _ } = &error {
                self.deposed(*by);
            }
            error.to_string()
        })?;
        board.greeted(self.place.member, state).map_err(|malformed| malformed.to_string())
    }

    /// Returns when the agent should be asked: nothing was heard for too long, or someone has a doubt.
    async fn is_doubted(&self) {
        while let Some(due) = self.due().filter(|due| *due > Instant::now()) {
            // A server may come to the gate meanwhile.
            let until = due.min(Instant::now() + SILENCE_AT_GATE_MAX);
            tokio::select! {
                () = self.check.notified() => return,
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// When the agent has said nothing for too long, if it has said anything.
    fn due(&self) -> Option<Instant> {
        let Dial { live: _, news_address, board } = &self.dial;
        let facts = board.facts(self.place.member);
        let holds = facts.present().is_none_or(|facts| matches!(facts.gate, Gate::Holding(_)));
        let finds_way = !news_address.is_empty() && board.brings_news(self.place.member);
        let silence_max = if holds || !finds_way { SILENCE_AT_GATE_MAX } else { SILENCE_MAX };
        board.heard_at(self.place.member).map(|at| at + silence_max)
    }
}

async fn tend(contact: Arc<Contact>) {
    let (first, longest) = AGAIN_PAUSE;
    let (mut pause, mut failing) = (first, false);
    loop {
        let greeted = tokio::time::timeout(CONNECT_MAX + CALL_MAX, contact.greet()).await;
        match greeted.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            Ok(()) => {
                contact.settled.send_replace(true);
                if std::mem::take(&mut failing) {
                    tracing::info!(member = %contact.place.member, "the agent answers");
                }
                pause = first;
                // Doubts that come one after the other are one.
                let not_before = Instant::now() + first;
                contact.is_doubted().await;
                tokio::time::sleep_until(not_before).await;
            }
            Err(error) => {
                if contact.dial.board.facts(contact.place.member).present().is_some() || !failing {
                    tracing::info!(member = %contact.place.member, error, "the agent does not answer");
                }
                failing = true;
                contact.dial.board.silent(contact.place.member);
                contact.settled.send_replace(true);
                tokio::time::sleep(first).await;
                // Whoever brings news is there again.
                let _ = tokio::time::timeout(pause - first, contact.check.notified()).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// The links to the agents of one cluster.
pub struct AgentLinks {
    namespace: String,
    cluster: String,
    port: u16,
    dial: Dial,
    links: BTreeMap<MemberId, AgentLink>,
}

impl AgentLinks {
    /// None yet. `port` is where agents listen, at the addresses of their pods.
    pub fn new(namespace: &str, cluster: &str, port: u16, dial: Dial) -> AgentLinks {
        let (namespace, cluster) = (namespace.to_owned(), cluster.to_owned());
        AgentLinks { namespace, cluster, port, dial, links: BTreeMap::new() }
    }

    /// What the agents have said.
    pub fn board(&self) -> &Board {
        &self.dial.board
    }

    /// The link to a member's agent.
    pub fn get(&self, member: MemberId) -> Option<&AgentLink> {
        self.links.get(&member)
    }

    /// Brings the links in line with the members' addresses.
    pub fn follow(&mut self, addresses: &BTreeMap<MemberId, IpAddr>) {
        let board = Arc::clone(&self.dial.board);
        self.links.retain(|member, link| {
            let stays = addresses.get(member) == Some(&link.place().address.ip());
            if !stays {
                board.forget(*member);
            }
            stays
        });
        for (member, address) in addresses {
            self.links.entry(*member).or_insert_with(|| {
                let (namespace, cluster) = (self.namespace.clone(), self.cluster.clone());
                let peer = Peer::Member { namespace, cluster, member: *member };
                let address = SocketAddr::new(*address, self.port);
                AgentLink::open(Place { member: *member, address, peer }, self.dial.clone())
            });
        }
    }

    /// What is known of the agents. Waits for the first answer of new ones, at most `bound`.
    pub async fn look(&self, bound: Duration) -> BTreeMap<MemberId, Observed<AgentFacts>> {
        let all = join_all(self.links.values().map(AgentLink::settled));
        let _ = tokio::time::timeout(bound, all).await;
        self.links.keys().map(|member| (*member, self.dial.board.facts(*member))).collect()
    }
}
