//! What the agent is told (service Agent, by the operator) and asked (service Peer, by the shard's other members). Every
//! command names what it was decided from; the ledger's rules come first, and what they answer is on disk first.

mod commands;
mod peer;
mod tunnel;

use crate::{memory::Unchanged, peers::GRPC_PORT, shared::Agent};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
};
use tonic::{Request, Status, transport::Server};
use tunnel::{LogsIn, Tunnels};
use valkeeper_agent::{
    limits::PerKey,
    link::MESSAGE_BYTES_MAX,
    proto::{agent_server::AgentServer, peer_server::PeerServer},
    tls::{ALPN_H2, ALPN_SERVER, ALPN_SERVER_IN, Accept, Peer, Secured},
    wire::Malformed,
};
use valkeeper_core::agent::Refusal;

/// Handshakes at a time: a shard has a few members and one operator, the rest is strangers.
const HANDSHAKES_MAX: usize = 64;
/// Of them from one address: all members and the operator may be behind one.
const HANDSHAKES_OF_ONE_MAX: usize = 16;
/// Connections of one peer: the operator has a few tunnels and two for commands, and an earlier one may not have ended.
const CONNECTIONS_OF_ONE_MAX: usize = 16;
/// Bound on a handshake: several round trips between zones.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// Verified connections that wait for the server to take them.
const ACCEPTED_MAX: usize = 16;
/// Requests at a time on one connection: the operator's sends one, a peer's two.
const REQUESTS_MAX: usize = 16;
/// Bound on a request: longer than every bound within one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two signs of life on a silent connection, so that those of dead nodes do not pile up.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after a connection could not be taken (no more descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens on the address given, or on every address.
pub async fn listen(given: Option<SocketAddr>, port: u16) -> io::Result<TcpListener> {
    if let Some(address) = given {
        return TcpListener::bind(address).await;
    }
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => Ok(listener),
        // A kernel without IPv6.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
    }
}

/// Serves both services, from when this returns.
pub async fn serve(agent: Arc<Agent>) -> io::Result<()> {
    let listener = listen(agent.config.args.grpc_listen, GRPC_PORT).await?;
    let (sender, receiver) = mpsc::channel(ACCEPTED_MAX);
    tokio::spawn(accept(agent.clone(), listener, sender));
    let incoming = futures::stream::unfold(receiver, |mut receiver| async move {
        let secured = receiver.recv().await?;
        Some((Ok::<Secured, io::Error>(secured), receiver))
    });
    let commands =
        AgentServer::new(commands::Commands(agent.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let questions = PeerServer::new(peer::Questions(agent)).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let server = Server::builder()
        .concurrency_limit_per_connection(REQUESTS_MAX)
        .timeout(REQUEST_TIMEOUT)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .add_service(commands)
        .add_service(questions)
        .serve_with_incoming(incoming);
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(error = %error, "the gRPC services have ended");
        }
    });
    Ok(())
}

async fn accept(agent: Arc<Agent>, listener: TcpListener, accepted: mpsc::Sender<Secured>) {
    let me = agent.me();
    let allowed = Accept::OperatorOrShard {
        namespace: agent.config.namespace.clone(),
        cluster: agent.config.args.cluster.clone(),
        shard: me.shard,
    };
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let addresses = PerKey::<IpAddr>::new(HANDSHAKES_OF_ONE_MAX);
    let places = Arc::new(PerKey::<Peer>::new(CONNECTIONS_OF_ONE_MAX));
    let tunnels = Arc::new(Tunnels::new(agent.clone()));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let Ok((stream, address)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Some(of_address) = addresses.enter(address.ip()) else {
            tracing::debug!(%address, "too many handshakes");
            continue;
        };
        let (agent, allowed, accepted) = (agent.clone(), allowed.clone(), accepted.clone());
        let (tunnels, places) = (tunnels.clone(), places.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let shaken = agent.live.accept(&allowed, &[ALPN_SERVER_IN, ALPN_SERVER, ALPN_H2], stream);
            let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken).await;
            match shaken.map(|shaken| shaken.map(|secured| secured.placed(&places))) {
                Ok(Ok(None)) => tracing::debug!(%address, "its peer has too many connections"),
                Ok(Ok(Some(secured))) if secured.protocol() == Some(ALPN_SERVER) => {
                    tunnels.serve(secured, LogsIn::ByItself);
                }
                Ok(Ok(Some(secured))) if secured.protocol() == Some(ALPN_SERVER_IN) => {
                    tunnels.serve(secured, LogsIn::ByAgent);
                }
                Ok(Ok(Some(secured))) => drop(accepted.send(secured).await),
                Ok(Err(error)) => tracing::debug!(error = %error, "a connection is refused"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
            drop((permit, of_address));
        });
    }
}

/// Who asks.
fn caller<T>(request: &Request<T>) -> Result<&Peer, Status> {
    request.extensions().get().ok_or_else(|| Status::unauthenticated("nobody"))
}

fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}

fn unchanged(error: Unchanged) -> Status {
    match error {
        Unchanged::Refused(refusal @ Refusal::Deposed { .. }) => Status::aborted(refusal.to_string()),
        Unchanged::Refused(
            refusal @ (Refusal::Untold
            | Refusal::FarAhead { .. }
            | Refusal::OldGrant { .. }
            | Refusal::OtherHolder { .. }
            | Refusal::Consented { .. }
            | Refusal::Confirmed { .. }),
        ) => Status::failed_precondition(refusal.to_string()),
        Unchanged::Unwritten(source) => Status::internal(format!("the ledger cannot be written: {source}")),
    }
}
