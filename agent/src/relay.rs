//! Passes clients on from where a shard's primary was to where it is. Rules of kube-proxy lead new connections to the old address for up to a
//! second after the route has changed, and a client that lands on a replica there keeps that connection: so the member that was primary takes
//! its server's port, holds who comes until a peer serves under the newest grant, and copies bytes to it and back for a few seconds. Then
//! it ends what it passes on, and gives the port back.
//!
//! It cannot loop: connections from members' own addresses are not taken, a target is primary by its own word under the highest grant that is
//! known, and everything here is bounded in count, bytes and time.

use crate::shared::Agent;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};
use valkeeper_core::{
    agent::{PeerAnswer, gate::passes_to},
    ids::MemberId,
    spec::Topology,
};

/// How long clients are passed on to a primary. kube-proxy's second sync within a second waits for the end of that
/// second, and a sync takes up to another: what it leads here after that it leads here for good.
const PASS_MAX: Duration = Duration::from_secs(3);
/// The same once the server of a member that leaves has ended: what its end may take longer.
pub const PASS_LEAVING_MAX: Duration = Duration::from_secs(2);
/// How long the port is kept while there is nobody to pass on to. After that, who comes is refused.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// How long the port is kept in all, however often the primary changes: after this no further change is followed.
const RELAY_MAX: Duration = Duration::from_secs(30);
/// How long a connection is held while there is nobody to pass it on to: ten times a failover, shorter than clients wait for an answer.
const HOLD_MAX: Duration = Duration::from_secs(1);
/// Connections at a time. Who comes beyond them waits in the queue of the port.
const CONNECTIONS_MAX: usize = 2_048;
/// Open files that the rest of the agent needs: probes, peers, the operator, the server's socket.
const FILES_OF_OTHERS: u64 = 512;
/// Bytes of each direction of a connection that are held here.
const BUFFER_BYTES: usize = 4_096;
/// Connections that wait to be taken.
const BACKLOG: u32 = 511;
/// Bound on reaching the new primary.
const REACH_MAX: Duration = Duration::from_millis(300);
/// Between two tries to reach it.
const REACH_PAUSE: Duration = Duration::from_millis(5);
/// Between two questions to a peer while there is nobody to pass on to: at first, and after [`SOON`].
const ASK_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// How long a failover takes, with room.
const SOON: Duration = Duration::from_millis(500);
/// Between two questions while clients are passed on.
const RENEW_PAUSE: Duration = Duration::from_millis(100);
/// How long the end of a connection waits for the answers to what its client has sent.
const DRAIN_MAX: Duration = Duration::from_millis(200);
/// A connection on which the server has said nothing for so long has all of its answer.
const QUIET: Duration = Duration::from_millis(3);
/// Bound on taking the port, which a server that ends or closes it may still have.
const TAKE_MAX: Duration = Duration::from_millis(200);
/// Between two tries to take it.
const TAKE_PAUSE: Duration = Duration::from_millis(1);
/// Pause after a connection could not be taken (no more descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);

/// What becomes of who comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It waits.
    Hold,
    /// It is passed on to this address.
    Pass(SocketAddr),
    /// It is ended.
    End,
}

/// The relay of one member.
#[derive(Default)]
pub struct Relay {
    running: Mutex<Option<Running>>,
    /// Connections of clients that it has taken since the agent began.
    taken: AtomicU64,
}

/// One that runs.
struct Running {
    ask_to_end: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
    phase: watch::Receiver<Phase>,
}

impl Relay {
    fn running(&self) -> std::sync::MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections of clients that were taken since the agent began, whether or not anybody was there to pass them on to.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Gives the port back now. When this returns, nobody listens there.
    pub async fn end(&self) {
        let Some(Running { ask_to_end, mut ended, phase: _ }) = self.running().take() else { return };
        ask_to_end.send_replace(true);
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Waits until it has ended by itself, at most so long, and ends it then. Where nobody is there to pass clients on to, they are held
    /// once: all of the shard may be going, and its next primary be whoever comes after this member.
    pub async fn last(&self, bound: Duration) {
        let running = self.running().as_ref().map(|running| (running.ended.clone(), running.phase.clone()));
        if let Some((mut ended, mut phase)) = running {
            let passes = phase.wait_for(|phase| matches!(phase, Phase::Pass(_)));
            let last = async {
                // Not kept: it would hold up whoever says what becomes of clients.
                let is_passed_on =
                    tokio::time::timeout(HOLD_MAX, passes).await.is_ok_and(|found| found.is_ok());
                if is_passed_on {
                    let _ = ended.wait_for(|ended| *ended).await;
                }
            };
            let _ = tokio::time::timeout(bound, last).await;
        }
        self.end().await;
    }
}

/// Takes the port and passes on who comes there, unless that is done already. In a Valkey Cluster nodes say themselves where to go. When
/// this returns the port is taken, or it cannot be.
pub async fn begin(agent: &Arc<Agent>) {
    let alone = agent.read(|known| known.ledger.peers(agent.me()).next().is_none());
    if agent.config.topology == Topology::Cluster || alone || agent.read(|known| known.relays) {
        return;
    }
    agent.relay.end().await;
    let Ok(own) = agent.config.pod_ip.parse::<IpAddr>() else { return };
    let listener = match take(SocketAddr::new(own, agent.config.args.server_port)).await {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "the port cannot be taken: clients are not passed on"),
    };
    let (ask_to_end, asked) = watch::channel(false);
    let (say_ended, ended) = watch::channel(false);
    let (phase, seen) = watch::channel(Phase::Hold);
    *agent.relay.running() = Some(Running { ask_to_end, ended, phase: seen });
    agent.update(|known| known.relays = true);
    tracing::info!("clients that come here are passed on to the primary");
    let agent = agent.clone();
    tokio::spawn(async move {
        let before = agent.relay.taken();
        run(&agent, listener, own, &phase, asked).await;
        agent.update(|known| known.relays = false);
        say_ended.send_replace(true);
        tracing::info!(taken = agent.relay.taken() - before, "no clients are passed on any more");
        // The server gets the port back, if it has left the gate.
        agent.look_now.notify_one();
    });
}

async fn take(at: SocketAddr) -> io::Result<TcpListener> {
    let until = Instant::now() + TAKE_MAX;
    loop {
        let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        match socket.bind(at).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => tokio::time::sleep(TAKE_PAUSE).await,
        }
    }
}

/// Until it is asked to end, or its time is over.
async fn run(
    agent: &Arc<Agent>,
    listener: TcpListener,
    own: IpAddr,
    phase: &watch::Sender<Phase>,
    mut asked: watch::Receiver<bool>,
) {
    let seen = phase.subscribe();
    let mut connections = JoinSet::new();
    tokio::select! {
        () = accept(agent, listener, own, &seen, &mut connections) => {}
        () = follow(agent, phase) => {}
        _ = asked.wait_for(|asked| *asked) => {}
    }
    phase.send_replace(Phase::End);
    let all = async { while connections.join_next().await.is_some() {} };
    // The port is free by now. Whoever asks for it does not wait for answers to others.
    tokio::select! {
        _ = tokio::time::timeout(DRAIN_MAX * 2, all) => {}
        _ = asked.wait_for(|asked| *asked) => {}
    }
}

/// How many connections there is room for. Each takes two open files, of which a container may have 1,024 until it asks for more; the
/// agent must not be without any itself.
fn places() -> usize {
    let wanted = 2 * CONNECTIONS_MAX as u64 + FILES_OF_OTHERS;
    let limit = getrlimit(Resource::Nofile);
    let mut files = limit.current.unwrap_or(u64::MAX);
    if files < wanted {
        let raised = wanted.min(limit.maximum.unwrap_or(u64::MAX));
        match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit }) {
            Ok(()) => files = raised,
            Err(error) => tracing::debug!(%error, "no more open files"),
        }
    }
    usize::try_from(files.saturating_sub(FILES_OF_OTHERS) / 2).unwrap_or(CONNECTIONS_MAX).min(CONNECTIONS_MAX)
}

async fn accept(
    agent: &Arc<Agent>,
    listener: TcpListener,
    own: IpAddr,
    phase: &watch::Receiver<Phase>,
    connections: &mut JoinSet<()>,
) {
    let places = Arc::new(Semaphore::new(places()));
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((client, from)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // A replica that looks for its primary, or what another member passes on: neither is to be passed on from here.
        if from.ip() == own || agent.peers.is_at(from.ip()) {
            continue;
        }
        agent.relay.taken.fetch_add(1, Ordering::Relaxed);
        let phase = phase.clone();
        connections.spawn(async move {
            if let Err(error) = serve(client, own, phase).await {
                tracing::debug!(%error, "a connection was not passed on");
            }
            drop(place);
        });
    }
}

/// Asks the peers until the time is over, and says what becomes of clients.
async fn follow(agent: &Arc<Agent>, phase: &watch::Sender<Phase>) {
    let me = agent.me();
    let begun = Instant::now();
    let answers: Mutex<BTreeMap<MemberId, (PeerAnswer, IpAddr)>> = Mutex::default();
    let peers: Vec<MemberId> = agent.read(|known| known.ledger.peers(me).collect());
    let asked = peers.iter().map(|peer| async {
        loop {
            let answer = agent.peers.ask(*peer).await;
            {
                let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                match answer {
                    Ok((answer, place)) => answers.insert(*peer, (answer, place.ip)),
                    Err(_) => answers.remove(peer),
                };
                decide(agent, &answers, phase);
            }
            let pause = match *phase.borrow() {
                Phase::Pass(_) => RENEW_PAUSE,
                Phase::Hold | Phase::End if begun.elapsed() < SOON => ASK_PAUSES.0,
                Phase::Hold | Phase::End => ASK_PAUSES.1,
            };
            tokio::time::sleep(pause).await;
        }
    });
    tokio::select! {
        _ = futures::future::join_all(asked) => {}
        () = is_over(begun, phase.subscribe()) => {}
    }
}

fn decide(
    agent: &Arc<Agent>,
    answers: &BTreeMap<MemberId, (PeerAnswer, IpAddr)>,
    phase: &watch::Sender<Phase>,
) {
    let said = answers.iter().map(|(id, (answer, _))| (*id, answer.clone())).collect();
    let to = agent.read(|known| passes_to(&known.ledger, &said));
    let at = to.and_then(|id| answers.get(&id)).map(|(_, ip)| *ip);
    let next = at.map_or(Phase::Hold, |ip| Phase::Pass(SocketAddr::new(ip, agent.config.args.server_port)));
    phase.send_if_modified(|phase| std::mem::replace(phase, next) != next);
}

/// Returns when clients have been passed on for long enough to whoever was primary last, or nobody was found to pass them on to.
async fn is_over(begun: Instant, mut phase: watch::Receiver<Phase>) {
    let mut last = None;
    while begun.elapsed() < RELAY_MAX {
        let bound = if last.is_none() { WAIT_MAX } else { PASS_MAX };
        let another = phase.wait_for(|phase| matches!(phase, Phase::Pass(to) if last != Some(*to)));
        let Ok(Ok(now)) = tokio::time::timeout(bound, another).await.map(|found| found.map(|phase| *phase))
        else {
            return;
        };
        if let Phase::Pass(to) = now {
            let after_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(0);
            tracing::info!(%to, after_ms, "the new primary is known");
            last = Some(to);
        }
    }
}

/// One client.
async fn serve(client: TcpStream, own: IpAddr, mut phase: watch::Receiver<Phase>) -> io::Result<()> {
    client.set_nodelay(true)?;
    let reached = tokio::time::timeout(HOLD_MAX, reach(own, &mut phase)).await;
    let Some((server, to)) = reached.ok().flatten() else { return Err(io::ErrorKind::TimedOut.into()) };
    server.set_nodelay(true)?;
    let mut ending = phase.clone();
    let drained = async {
        moved(&mut ending, to).await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    tokio::select! {
        copied = copy(client, server, to, phase) => copied,
        () = drained => Ok(()),
    }
}

/// Returns when clients go elsewhere, or nowhere.
async fn moved(phase: &mut watch::Receiver<Phase>, from: Phase) {
    // Without its sender there is nobody to pass on to either.
    let _ = phase.wait_for(|phase| *phase != from).await;
}

/// Connects to the new primary as soon as it is known; `None` if it is not going to be.
async fn reach(own: IpAddr, phase: &mut watch::Receiver<Phase>) -> Option<(TcpStream, Phase)> {
    loop {
        let now = *phase.borrow_and_update();
        match now {
            Phase::End => return None,
            Phase::Hold => phase.changed().await.ok()?,
            Phase::Pass(to) => {
                let connected = tokio::time::timeout(REACH_MAX, connect(own, to)).await;
                match connected {
                    Ok(Ok(server)) => return Some((server, now)),
                    // It is primary and does not listen yet.
                    Ok(Err(_)) | Err(_) => tokio::time::sleep(REACH_PAUSE).await,
                }
            }
        }
    }
}

/// From the member's own address, by which others know it for a member.
async fn connect(own: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(SocketAddr::new(own, 0))?;
    socket.connect(to).await
}

/// Copies both ways while that is where the primary is. After that no more questions are taken, and it ends when there is no answer to wait for.
async fn copy(
    mut client: TcpStream,
    mut server: TcpStream,
    to: Phase,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<()> {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let (mut questions, mut answers) = ([0_u8; BUFFER_BYTES], [0_u8; BUFFER_BYTES]);
    let (mut waits, mut ends) = (false, false);
    loop {
        tokio::select! {
            read = from_server.read(&mut answers) => match read? {
                0 => return Ok(()),
                n => {
                    to_client.write_all(answers.get(..n).unwrap_or_default()).await?;
                    waits = false;
                }
            },
            read = from_client.read(&mut questions), if !ends => match read? {
                // It asks no more, and may wait for an answer.
                0 => ends = true,
                n => {
                    to_server.write_all(questions.get(..n).unwrap_or_default()).await?;
                    waits = true;
                }
            },
            () = moved(&mut phase, to), if !ends => ends = true,
            () = tokio::time::sleep(QUIET), if ends && !waits => return Ok(()),
        }
    }
}
