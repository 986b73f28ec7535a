//! The operator's way to the server: a connection to the agent's port that leads to the server's socket. What clients may reach at the
//! server's own port, and whoever serves there, is nothing to it.

use crate::{boot, shared::Agent};
use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{io::AsyncWriteExt, net::UnixStream, task::AbortHandle};
use valkeeper_agent::tls::{Peer, Reached, Secured};

/// Tunnels at a time: an operator holds one, tries another beside it after silence, and its successor does the same. A newer one ends
/// the oldest, whose path may be dead.
const TUNNELS_MAX: usize = 8;
/// How long the news of a process's end takes here at most, after its sockets have ended.
const END_HEARD_MAX: Duration = Duration::from_millis(50);
/// Bound on reaching the socket, which the kernel answers at once, and on the login there, for which a server that forks takes some 100 ms. The
/// operator's look ends after 500.
const REACH_TIMEOUT: Duration = Duration::from_millis(400);

/// Who logs the operator in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogsIn {
    /// The operator, by the password of a Secret.
    ByItself,
    /// This agent, whatever has become of the Secret.
    ByAgent,
}

/// The tunnels to one server's socket.
pub struct Tunnels {
    agent: Arc<Agent>,
    socket: PathBuf,
    open: Mutex<VecDeque<AbortHandle>>,
}

impl Tunnels {
    pub fn new(agent: Arc<Agent>) -> Tunnels {
        Tunnels { socket: boot::socket(&agent.config), agent, open: Mutex::default() }
    }

    /// Serves one that has shaken hands, if it is the operator's.
    pub fn serve(&self, secured: Secured, logs_in: LogsIn) {
        if !matches!(secured.peer, Peer::Operator(_)) {
            tracing::debug!(peer = %secured.peer, "a way to the server is for the operator only");
            return;
        }
        let (agent, socket) = (self.agent.clone(), self.socket.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = lead(&agent, &socket, secured, logs_in).await {
                tracing::debug!(%error, "the operator's connection to the server has ended");
            }
        });
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|task| !task.is_finished());
        open.push_back(task.abort_handle());
        if open.len() > TUNNELS_MAX
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
    }
}

/// Says whether the server is there, and then passes on what both sides say until one of them ends.
async fn lead(agent: &Agent, socket: &Path, mut secured: Secured, logs_in: LogsIn) -> io::Result<()> {
    let reached = tokio::time::timeout(REACH_TIMEOUT, reach(agent, socket, logs_in)).await;
    let (said, server) = match reached {
        Ok(Ok(Some(server))) => (Reached::Server, Some(server)),
        Ok(Ok(None)) => (Reached::Refused, None),
        // The file of a socket stays when the process ends; before the server's first moment there is none.
        Ok(Err(error)) if is_end(error.kind()) => {
            let said = if is_gone(agent).await { Reached::Nobody } else { Reached::Unknown };
            (said, None)
        }
        Ok(Err(_)) | Err(_) => (Reached::Unknown, None),
    };
    secured.write_all(&[said.byte()]).await?;
    secured.flush().await?;
    match server {
        Some(mut server) => both_ways(&mut secured, &mut server).await,
        None => secured.shutdown().await,
    }
}

/// A connection to the server, `None` if it does not let the operator's user in.
async fn reach(agent: &Agent, socket: &Path, logs_in: LogsIn) -> io::Result<Option<UnixStream>> {
    let mut server = UnixStream::connect(socket).await?;
    match logs_in {
        LogsIn::ByItself => Ok(Some(server)),
        LogsIn::ByAgent => {
            let mut is_in = agent.local.log_operator_in(&mut server).await?;
            if !is_in {
                // Somebody has deleted or changed the user.
                let restored = agent.local.restore_operator().await;
                tracing::warn!(?restored, "the server refused the operator's user, which is restored");
                is_in = agent.local.log_operator_in(&mut server).await?;
            }
            Ok(is_in.then_some(server))
        }
    }
}

/// What a socket says that nobody serves, or has just ended.
fn is_end(kind: io::ErrorKind) -> bool {
    [
        io::ErrorKind::ConnectionRefused,
        io::ErrorKind::NotFound,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::UnexpectedEof,
    ]
    .contains(&kind)
}

/// Whether the process has ended, or has not served yet. A socket that is missed beside a process that has served says nothing: somebody may
/// have removed the file. The end of a process is heard of a moment after its sockets have ended.
async fn is_gone(agent: &Agent) -> bool {
    let mut changed = agent.changed.subscribe();
    let gone = async {
        while agent.read(|known| known.process.is_some() && known.info.is_some()) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::time::timeout(END_HEARD_MAX, gone).await.is_ok()
}

/// Ends as soon as either side does: half a connection is of no use, and the operator waits for the end.
async fn both_ways(secured: &mut Secured, server: &mut UnixStream) -> io::Result<()> {
    let (mut operator_reads, mut operator_writes) = tokio::io::split(secured);
    let (mut server_reads, mut server_writes) = server.split();
    let ended = tokio::select! {
        ended = tokio::io::copy(&mut operator_reads, &mut server_writes) => ended,
        ended = tokio::io::copy(&mut server_reads, &mut operator_writes) => ended,
    };
    operator_writes.shutdown().await?;
    ended.map(|_| ())
}
