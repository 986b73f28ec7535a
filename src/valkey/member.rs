//! The operator's link to one member: a held connection whose end is the first witness of the process's death. The second is the member's
//! agent, which says that nobody serves, or the refusal of a new connection to the agent itself: its container's other processes end with
//! it. Silence is neither, and a refusal alone may be a firewall's.

use super::{Error, connection::Connection, look::Look, secret::Credentials, way::Way};
use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, task::JoinHandle};
use valkeeper_core::{
    ids::MemberId, observation::Observed, slots::SlotSet, spec::Topology, weights::SlotWeights,
};

/// Bound on one look, connecting included. A server that forks 10 GiB stops for some 100 ms, so this is no alarm by
/// itself; six looks fit into the default detection window of 3 s.
pub const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// Bound on counting what is in the slots of one member, which comes on top of a look. A program that is not optimized takes 60 to 140 ms for
/// all slots on two busy cores, and who is once too slow is not asked again for minutes.
pub const WEIGH_TIMEOUT: Duration = Duration::from_millis(500);

/// Pause before asking again at an address whose connection ended without an answer: the kernel closes a killed
/// process's clients before its listener, which accepts for another millisecond. The timer rounds this up to its own
/// millisecond; a whole one would be rounded up to two.
const CONFIRM_PAUSE: Duration = Duration::from_micros(100);

/// Pause before a refusal is taken for one: it is asked for once more.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

/// How often such an address is asked within one look: the first repetition is enough with few clients, and 10,000
/// take the kernel some 100 ms to close. Something that accepts and hangs up for ever is no proof of anything.
const CONFIRM_TRIES: u32 = 100;

/// Wakes a driver: one permit, however many links end.
pub type Wake = Arc<Notify>;

/// Where a member's server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The member.
    pub member: MemberId,
    /// IP address of its pod.
    pub address: IpAddr,
    /// Port of valkey-server.
    pub port: u16,
    /// What there is to ask it.
    pub topology: Topology,
}

impl Target {
    pub(crate) fn socket(self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// A link to one member. Dropping it closes the connection and wakes nobody.
pub struct MemberLink {
    target: Target,
    way: Arc<dyn Way>,
    credentials: Credentials,
    wake: Wake,
    state: Mutex<State>,
    /// One look at a time: a second would fight for the held connection.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// True once a connection has been held: only what has lived can be seen to have died.
    has_held: bool,
    trouble: Option<Error>,
}

struct Held {
    connection: Connection,
    watcher: JoinHandle<()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl MemberLink {
    /// A link to `target`, by this way. It connects at the first look and after that whenever it has to; `wake` is notified when a
    /// held connection ends.
    pub fn connect(target: Target, way: Arc<dyn Way>, credentials: Credentials, wake: Wake) -> MemberLink {
        MemberLink {
            target,
            way,
            credentials,
            wake,
            state: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
        }
    }

    /// Where it leads.
    pub fn target(&self) -> Target {
        self.target
    }

    /// True if the server refused what this link logs in with, and these credentials are others.
    pub fn is_refused_with_other(&self, credentials: &Credentials) -> bool {
        self.credentials != *credentials && matches!(self.trouble(), Some(Error::Unauthorized(_)))
    }

    /// Why the last look brought nothing, for logs and messages; `None` if it brought an answer.
    pub fn trouble(&self) -> Option<Error> {
        self.state().trouble.clone()
    }

    /// Looks at the server, within [`LOOK_TIMEOUT`].
    ///
    /// `Absent`: the agent says that there is no server; or the connection that was held has ended and a new one to the agent is
    /// refused, so the process that every other of the container ends with is gone.
    /// `Unknown(Silent)`: no answer in time, or refused without a connection ever held (then [`MemberLink::trouble`] is
    /// [`Error::Refused`]). A frozen process is silent: its kernel goes on accepting connections.
    pub async fn look(&self) -> Observed<Look> {
        let _alone = self.looking.lock().await;
        let result = tokio::time::timeout(LOOK_TIMEOUT, self.find()).await.unwrap_or(Err(Error::Silent));
        let has_held = {
            let mut state = self.state();
            state.trouble = result.as_ref().err().cloned();
            state.has_held
        };
        match result {
            Ok(look) => Observed::Present(look),
            Err(Error::NoServer) => Observed::Absent,
            Err(Error::Refused) if has_held => Observed::Absent,
            Err(error) => Observed::Unknown(error.why()),
        }
    }

    /// Counts what is in the slots, over the connection that is held since the last look, within [`WEIGH_TIMEOUT`]. It makes no
    /// connection and gives none up, so whatever comes of it, the next look finds what this one found.
    ///
    /// # Errors
    /// Why it does not tell.
    pub async fn weigh(&self, slots: &SlotSet) -> Result<SlotWeights, Error> {
        let counted = async {
            let _alone = self.looking.lock().await;
            self.held().ok_or(Error::Closed)?.weigh(slots).await
        };
        tokio::time::timeout(WEIGH_TIMEOUT, counted).await.unwrap_or(Err(Error::Silent))
    }

    /// What was held at the last look, unless it has ended since.
    fn held(&self) -> Option<Connection> {
        let state = self.state();
        state.held.as_ref().map(|held| held.connection.clone()).filter(|connection| !connection.has_ended())
    }

    async fn find(&self) -> Result<Look, Error> {
        let Some(held) = self.held() else {
            return self.reconnect().await;
        };
        let was_silent = self.trouble() == Some(Error::Silent);
        let answer =
            if was_silent { self.ask_both_ways(&held).await } else { held.look(self.target.topology).await };
        match answer {
            Err(Error::Closed) => {
                self.state().held = None;
                self.reconnect().await
            }
            answer => answer,
        }
    }

    /// After silence. The path of the held connection may be dead while the server is not (a healed partition, a
    /// forgotten NAT entry), so a new connection is tried beside it. That a new one fails proves nothing while
    /// the held one is open.
    async fn ask_both_ways(&self, held: &Connection) -> Result<Look, Error> {
        tokio::select! {
            answer = held.look(self.target.topology) => answer,
            fresh = self.reconnect() => match fresh {
                Err(Error::Refused | Error::NoServer | Error::Silent | Error::Closed | Error::Unreachable(_)) => {
                    held.ended().await;
                    Err(Error::Closed)
                }
                answer => answer,
            },
        }
    }

    /// Makes a new connection, looks through it, and holds it in place of the one before.
    async fn reconnect(&self) -> Result<Look, Error> {
        let mut refused = false;
        for _ in 0..CONFIRM_TRIES {
            match self.open().await {
                Err(Error::Closed) => tokio::time::sleep(CONFIRM_PAUSE).await,
                Ok((connection, look)) => {
                    self.hold(connection);
                    return Ok(look);
                }
                // A kernel that ends the first process of a container closes its sockets before it ends the others.
                Err(Error::Refused) if !refused => {
                    refused = true;
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Closed)
    }

    async fn open(&self) -> Result<(Connection, Look), Error> {
        let opened = self.way.open(self.target).await?;
        let connection = Connection::open(opened, &self.credentials).await?;
        let look = connection.look(self.target.topology).await?;
        Ok((connection, look))
    }

    fn hold(&self, connection: Connection) {
        let (ended, wake) = (connection.ended(), self.wake.clone());
        let watcher = tokio::spawn(async move {
            ended.await;
            wake.notify_one();
        });
        let mut state = self.state();
        state.held = Some(Held { connection, watcher });
        state.has_held = true;
    }

    /// Never held across an await, and nothing that runs under it can panic.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
