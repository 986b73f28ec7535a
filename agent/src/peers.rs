//! The shard's other agents: found by name, asked over held connections, each question bounded.

use crate::args::{Config, hostname};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tonic::{Status, transport::Channel};
use valkeeper_agent::{
    link::{self, MESSAGE_BYTES_MAX},
    proto::{self, peer_client::PeerClient},
    tls::{Accept, Live, Peer},
    wire::{self, Malformed},
};
use valkeeper_core::{
    agent::{Answer, PeerAnswer},
    ids::{MemberId, NodeId, Seq},
};

/// Port of every agent's gRPC services.
pub const GRPC_PORT: u16 = 7443;
/// Bound on finding, connecting and asking: the next round of questions comes as soon, and a round must not hold it up.
const ASK_TIMEOUT: Duration = Duration::from_millis(450);
/// Bound on a consent, for which the other writes to its disk.
const CONSENT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a peer has not answered.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    #[error("no answer in time")]
    Silent,
    #[error("its name is unknown")]
    Unknown(#[source] io::Error),
    #[error("it cannot be reached")]
    Unreached(#[from] tonic::transport::Error),
    #[error("it answers {}", .0.code())]
    Status(#[from] Status),
    #[error("its answer cannot be understood")]
    Malformed(#[from] Malformed),
}

impl Unanswered {
    /// True unless the peer itself has answered.
    fn is_broken(&self) -> bool {
        match self {
            Unanswered::Silent | Unanswered::Unknown(_) | Unanswered::Unreached(_) => true,
            // What the transport made of an error of its own has that as its source.
            Unanswered::Status(status) => {
                status.code() == tonic::Code::Unavailable || std::error::Error::source(status).is_some()
            }
            Unanswered::Malformed(_) => false,
        }
    }
}

/// What is known of a peer's name.
#[derive(Clone, Copy, Default)]
struct Found {
    last: Option<SocketAddr>,
    /// A look-up is under way; it may outlast who began it.
    looking: bool,
}

#[derive(Clone)]
struct Held {
    client: PeerClient<Channel>,
    ip: IpAddr,
}

/// Where a peer is.
#[derive(Clone, Debug)]
pub struct Place {
    pub ip: IpAddr,
    /// Its node, in Cluster mode, once it knows it.
    pub node: Option<NodeId>,
}

/// Connections to the peers.
#[derive(Clone)]
pub struct Peers {
    cluster: String,
    namespace: String,
    me: MemberId,
    given: Arc<BTreeMap<MemberId, SocketAddr>>,
    live: Live,
    held: Arc<Mutex<BTreeMap<MemberId, Held>>>,
    found: Arc<Mutex<BTreeMap<MemberId, Found>>>,
}

impl Peers {
    pub fn new(config: &Config, live: Live) -> Peers {
        Peers {
            cluster: config.args.cluster.clone(),
            namespace: config.namespace.clone(),
            me: config.me,
            given: Arc::new(config.peer_addresses()),
            live,
            held: Arc::default(),
            found: Arc::default(),
        }
    }

    async fn find(&self, member: MemberId) -> Result<SocketAddr, Unanswered> {
        if let Some(address) = self.given.get(&member) {
            return Ok(*address);
        }
        let last = self.noted(member, |found| {
            let before = *found;
            found.looking = true;
            before
        });
        if !last.looking {
            let peers = self.clone();
            // A thread each, which nobody can end: one at a time, to its end, whoever still waits for it.
            let looked = tokio::spawn(async move { peers.look_up(member).await });
            match looked.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(address) => return Ok(address),
                Err(error) if last.last.is_none() => return Err(Unanswered::Unknown(error)),
                Err(error) => tracing::debug!(peer = %member, error = %error, "a name is not found any more"),
            }
        }
        // Whoever is there by now must show who it is.
        last.last.ok_or_else(|| Unanswered::Unknown(io::ErrorKind::WouldBlock.into()))
    }

    fn noted<T>(&self, member: MemberId, note: impl FnOnce(&mut Found) -> T) -> T {
        note(self.found.lock().unwrap_or_else(PoisonError::into_inner).entry(member).or_default())
    }

    async fn look_up(&self, member: MemberId) -> io::Result<SocketAddr> {
        let name = hostname(&self.namespace, &self.cluster, member);
        let looked = tokio::net::lookup_host((name, GRPC_PORT)).await;
        let address = looked.and_then(|mut all| all.next().ok_or_else(|| io::ErrorKind::NotFound.into()));
        self.noted(member, |found| {
            found.looking = false;
            found.last = address.as_ref().ok().copied().or(found.last);
        });
        address
    }

    async fn client(&self, member: MemberId) -> Result<Held, Unanswered> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).get(&member).cloned();
        if let Some(held) = held {
            return Ok(held);
        }
        let address = self.find(member).await?;
        let peer = Peer::Member { namespace: self.namespace.clone(), cluster: self.cluster.clone(), member };
        let channel = link::connect(&self.live, Accept::Exactly(peer), address, ASK_TIMEOUT).await?;
        let client = PeerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let held = Held { client, ip: address.ip() };
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(member, held.clone());
        Ok(held)
    }

    async fn bounded<T>(
        &self,
        member: MemberId,
        bound: Duration,
        asked: impl Future<Output = Result<T, Unanswered>>,
    ) -> Result<T, Unanswered> {
        let result = tokio::time::timeout(bound, asked).await.unwrap_or(Err(Unanswered::Silent));
        if result.as_ref().is_err_and(Unanswered::is_broken) {
            // Its address may be another one by now.
            self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&member);
        }
        result
    }

    fn claim(&self, grant: Seq) -> proto::ConfirmRequest {
        proto::ConfirmRequest { holder: self.me.to_string(), grant: grant.0 }
    }

    /// Asks a peer to confirm this member's grant.
    pub async fn confirm(&self, member: MemberId, grant: Seq) -> Result<Answer, Unanswered> {
        let asked = async {
            let mut held = self.client(member).await?;
            Ok(wire::answer(held.client.confirm(self.claim(grant)).await?.get_ref(), grant))
        };
        self.bounded(member, ASK_TIMEOUT, asked).await
    }

    /// Asks a peer for its consent to this member's return.
    pub async fn consent(&self, member: MemberId, grant: Seq) -> Result<Answer, Unanswered> {
        let asked = async {
            let mut held = self.client(member).await?;
            Ok(wire::answer(held.client.consent(self.claim(grant)).await?.get_ref(), grant))
        };
        self.bounded(member, CONSENT_TIMEOUT, asked).await
    }

    /// True if a peer was found at this address last.
    pub fn is_at(&self, ip: IpAddr) -> bool {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = found.values().filter_map(|found| found.last).chain(self.given.values().copied());
        known.any(|address| address.ip() == ip)
    }

    /// Asks a peer what it knows; with where it answers.
    pub async fn ask(&self, member: MemberId) -> Result<(PeerAnswer, Place), Unanswered> {
        let asked = async {
            let mut held = self.client(member).await?;
            let question = proto::AskRequest { member: self.me.to_string() };
            let reply = held.client.ask(question).await?.into_inner();
            let node = wire::node_or_none(&reply.node_id, "node_id")?;
            Ok((PeerAnswer::try_from(reply)?, Place { ip: held.ip, node }))
        };
        self.bounded(member, ASK_TIMEOUT, asked).await
    }
}
