//! Takes agents' news: HTTPS with mutual TLS, `POST /v1/news`. Who speaks is who the certificate says, never the body.

use super::Registry;
use axum::{
    Extension, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use prost::Message;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, Sleep},
};
use valkeeper_agent::{
    limits::PerKey,
    link::MESSAGE_BYTES_MAX,
    pages,
    proto::{News, NewsReply},
    tls::{ALPN_HTTP1, Accept, Live, Peer, Secured},
};
use valkeeper_core::ids::{MemberId, Seq};

/// Handshakes under way at once: each costs a signature (0.1 ms of a core), and after an operator's start every agent
/// of a thousand clusters comes within a second or two.
const HANDSHAKES_MAX: usize = 256;

/// Of them from one address: after an operator's start many agents may come from behind one.
const HANDSHAKES_OF_ONE_MAX: usize = 64;

/// Connections of one agent: it has one, and those before it may not have ended.
const CONNECTIONS_OF_ONE_MAX: usize = 8;

/// Bound on a handshake: a stranger that connects and says nothing holds one of [`HANDSHAKES_MAX`] for so long.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);

/// Connections that are through, altogether: the agents of a thousand clusters of three have one each, and a third more may be
/// ending. Each costs a file descriptor and some 20 KiB.
const CONNECTIONS_MAX: usize = 4_096;

/// How long a connection may bring nothing: an agent's heartbeat comes every 5 s or so, and one that is gone without a word does not
/// keep its place for long.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Connections that are through and not taken up yet: taking one up is a spawn, so this is never a queue for long.
const WAITING_MAX: usize = 64;

/// Pause after the system refused to accept (no file descriptors left): they come back when others close.
const ACCEPT_AGAIN_PAUSE: Duration = Duration::from_millis(100);

/// Gives the operator's identity, once there is one.
pub type Identity = Arc<dyn Fn() -> Option<Live> + Send + Sync>;

/// What the endpoint needs.
#[derive(Clone)]
pub struct Desk {
    /// The boards of the clusters.
    pub registry: Arc<Registry>,
    /// Whether this process leads: another would confirm what it does not know.
    pub leads: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// Listens at this address, or at every one of IPv4 if it is every one of an IPv6 that the kernel does not have.
///
/// # Errors
/// The system's.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(_) if address.ip() == Ipv6Addr::UNSPECIFIED => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        answer => answer,
    }
}

/// Serves until it is dropped.
///
/// # Errors
/// The listener's.
pub async fn serve(listener: TcpListener, identity: Identity, desk: Desk) -> io::Result<()> {
    let (through, mut waiting) = mpsc::channel(WAITING_MAX);
    let mut acceptor = JoinSet::new();
    acceptor.spawn(accept(listener, identity, through));
    let router = Router::new()
        .route("/v1/news", post(take))
        .layer(DefaultBodyLimit::max(MESSAGE_BYTES_MAX))
        .with_state(desk);
    let mut served = JoinSet::new();
    while let Some(held) = waiting.recv().await {
        while served.try_join_next().is_some() {}
        let caller = Caller(held.stream.peer.clone());
        served.spawn(pages::serve_known(held, router.clone(), caller));
    }
    Ok(())
}

/// Accepts and shakes hands, many at once: one that is slow keeps nobody waiting.
async fn accept(listener: TcpListener, identity: Identity, through: mpsc::Sender<Held>) {
    let permits = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let addresses = PerKey::<IpAddr>::new(HANDSHAKES_OF_ONE_MAX);
    let agents = Arc::new(PerKey::<Peer>::new(CONNECTIONS_OF_ONE_MAX));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection of an agent could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN_PAUSE).await;
                continue;
            }
        };
        // Nobody leads here yet, so there is no identity to show: the agent comes again.
        let Some(live) = identity() else { continue };
        let Some(of_address) = addresses.enter(address.ip()) else {
            tracing::debug!(%address, "too many handshakes");
            continue;
        };
        let (through, places, agents) = (through.clone(), Arc::clone(&places), Arc::clone(&agents));
        handshakes.spawn(async move {
            let _held = (permit, of_address);
            match shake_hands(&live, stream).await.map(|stream| stream.placed(&agents)) {
                Ok(None) => tracing::debug!(%address, "its agent has too many connections for news"),
                Ok(Some(stream)) => match places.try_acquire_owned() {
                    // The receiver is gone only when the process ends.
                    Ok(place) => drop(through.send(Held::new(stream, place)).await),
                    Err(_full) => {
                        tracing::warn!(peer = %stream.peer, "no place for another connection for news")
                    }
                },
                Err(error) => tracing::debug!(%error, "a connection for news was refused"),
            }
        });
    }
}

async fn shake_hands(live: &Live, stream: TcpStream) -> io::Result<Secured> {
    stream.set_nodelay(true)?;
    let handshake = live.accept(&Accept::AnyMember, &[ALPN_HTTP1], stream);
    tokio::time::timeout(HANDSHAKE_MAX, handshake)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A connection in its place, which ends when it brings nothing for too long.
struct Held {
    stream: Secured,
    idle: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Held {
    fn new(stream: Secured, place: OwnedSemaphorePermit) -> Held {
        Held { stream, idle: Box::pin(tokio::time::sleep(IDLE_MAX)), _place: place }
    }
}

impl AsyncRead for Held {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let held = self.get_mut();
        let read = Pin::new(&mut held.stream).poll_read(cx, buf);
        if read.is_ready() {
            held.idle.as_mut().reset(Instant::now() + IDLE_MAX);
            return read;
        }
        held.idle.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Held {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Who is at the other end.
#[derive(Clone)]
struct Caller(Peer);

async fn take(State(desk): State<Desk>, Extension(Caller(peer)): Extension<Caller>, body: Bytes) -> Response {
    let Ok(news) = News::decode(body) else {
        return (StatusCode::BAD_REQUEST, "not a message of the contract\n").into_response();
    };
    let Some((namespace, cluster, member)) = speaks_for(&peer, &news) else {
        return (StatusCode::FORBIDDEN, "the certificate is another's\n").into_response();
    };
    let board = desk.registry.find(&(namespace, cluster));
    let Some(board) = board.filter(|_| (desk.leads)()) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "not led from here\n").into_response();
    };
    let News { state, confirm, .. } = news;
    let grant = state.as_ref().and_then(|state| state.brief.as_ref()).map(|brief| Seq(brief.grant));
    let instance = state.as_ref().map(|state| state.instance.clone()).unwrap_or_default();
    let current = match state.map(|state| board.news(member, state)) {
        Some(Ok(current)) => current,
        Some(Err(malformed)) => {
            tracing::warn!(%peer, %malformed, "an agent's news cannot be understood");
            return (StatusCode::BAD_REQUEST, malformed.to_string()).into_response();
        }
        None => false,
    };
    let confirmed = confirm && current && grant.is_some_and(|grant| board.confirm(member, &instance, grant));
    // Said only by who still leads now: whoever comes next waits longer than this answer takes.
    if !(desk.leads)() {
        return (StatusCode::SERVICE_UNAVAILABLE, "not led from here any more\n").into_response();
    }
    NewsReply { confirmed, epoch: board.epoch().0 }.encode_to_vec().into_response()
}

/// The member that both the certificate and the body name.
fn speaks_for(peer: &Peer, news: &News) -> Option<(String, String, MemberId)> {
    match peer {
        Peer::Member { namespace, cluster, member } => {
            let same =
                news.namespace == *namespace && news.cluster == *cluster && news.member == member.to_string();
            same.then(|| (namespace.clone(), cluster.clone(), *member))
        }
        Peer::Operator(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_address_of_either_family_is_listened_at() {
        let listener = listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))).await.unwrap();
        let at = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        assert!(TcpStream::connect(at).await.is_ok());
    }

    #[test]
    fn nobody_speaks_for_another() {
        let (namespace, cluster) = ("shop".to_owned(), "orders".to_owned());
        let peer = Peer::Member { namespace, cluster, member: MemberId::new(0, 1) };
        let news = |namespace: &str, cluster: &str, member: &str| News {
            namespace: namespace.into(),
            cluster: cluster.into(),
            member: member.into(),
            ..News::default()
        };
        assert!(speaks_for(&peer, &news("shop", "orders", "0-1")).is_some());
        for other in
            [news("shop", "orders", "0-2"), news("shop", "bills", "0-1"), news("prod", "orders", "0-1")]
        {
            assert_eq!(speaks_for(&peer, &other), None);
        }
        assert_eq!(speaks_for(&Peer::Operator("one".into()), &news("shop", "orders", "0-1")), None);
    }
}
