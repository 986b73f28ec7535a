//! The agent's own connection to its server, over a socket that nobody else can open: the only home of `redis` here.

mod node;
mod slots;
mod stranded;

pub use node::Cancelled;
pub use slots::{Session, SlotIs, Target};

use crate::boot::Users;
use redis::{
    AsyncConnectionConfig, Cmd, FromRedisValue, Pipeline, RedisConnectionInfo, RedisError, RedisResult,
    Value, aio::MultiplexedConnection, cmd, from_redis_value,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    sync::Mutex,
    task::JoinHandle,
};
use valkeeper_agent::proto::Promotion;
use valkeeper_core::{
    info::{Garbled, Info, RawRole, RawSource},
    nodes::{Nodes, NodesError},
    spec::Topology,
};

/// Bound on a command: longer than the stall of a fork, shorter than the default detection window of 3 s.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// Bound on stopping writes; then the server is ended instead. The windows leave a second for both.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);
/// Between two looks for what a command brings about: it takes a millisecond.
const POLL_PAUSE: Duration = Duration::from_millis(1);
/// A number of replicas that no server has: with it every write is refused.
const REPLICAS_NEVER: &str = "2147483647";
/// Lag in seconds at which the number counts at all; 0 would turn it off.
const LAG_FOR_NEVER: &str = "10";
/// How many replicas a primary must have to accept writes: the directive's name.
const MIN_REPLICAS: &str = "min-replicas-to-write";
/// Up to which lag in seconds a replica counts for that: the directive's name.
const MIN_REPLICAS_LAG: &str = "min-replicas-max-lag";

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer in time: it may or may not have been done.
    #[error("no answer from the server in time")]
    Silent,
    /// The server refused it; its words.
    #[error("the server refuses: {0}")]
    Refused(String),
    /// No connection, or it broke.
    #[error("no connection to the server: {0}")]
    Lost(String),
    /// An answer that is none.
    #[error("the server's answer cannot be understood")]
    Garbled(#[from] Garbled),
    /// What it says of the nodes is none.
    #[error("the server's answer cannot be understood: {0}")]
    Nodes(#[from] NodesError),
    /// The gate is opened with the users, and their files cannot be read or written.
    #[error("the users' files: {0}")]
    Users(#[from] std::io::Error),
    /// Done, and not seen to have an effect.
    #[error("sent and accepted, but {0}")]
    Unverified(&'static str),
}

impl Error {
    /// True if the server is alive all the same: it has answered.
    pub fn is_answer(&self) -> bool {
        match self {
            Error::Refused(_) | Error::Garbled(_) | Error::Nodes(_) | Error::Unverified(_) => true,
            Error::Silent | Error::Lost(_) | Error::Users(_) => false,
        }
    }

    fn of(error: &RedisError) -> Error {
        let lost = error.is_io_error() || error.is_connection_dropped() || error.is_connection_refusal();
        if error.is_timeout() {
            Error::Silent
        } else if lost {
            Error::Lost(error.category().to_owned())
        } else {
            Error::Refused(error.to_string())
        }
    }
}

/// What was configured before writes were stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configured {
    min_replicas: String,
    max_lag: String,
}

/// What the server said it is.
pub struct Look {
    /// Behind the gate of Cluster mode it follows the gate, whatever its node is to the others.
    pub info: Info,
    /// Its node and what that knows of the others, in Cluster mode, once it has loaded.
    pub nodes: Option<Nodes>,
    /// False if the last save or the last write of the append-only file failed.
    pub saves: bool,
    /// True while the append-only file is not what the server has: it is being written anew, or that failed.
    pub rewriting: bool,
    /// True if it listens at a port, whichever.
    pub listens: bool,
    /// How often it has refused a write as a replica.
    pub refused_writes: u64,
    /// Of two looks the one with the higher ticket was asked later, whoever hears of it first.
    pub ticket: u64,
}

/// What a server in Cluster mode says beside INFO.
struct Gossip {
    users: Vec<String>,
    /// `CLUSTER NODES`.
    nodes: Result<String, Error>,
}

/// One answer of several.
fn answer<T: FromRedisValue>(given: Option<RedisResult<Value>>) -> Result<T, Error> {
    let value = given.ok_or(Error::Garbled(Garbled::NotAnAnswer))?.map_err(|error| Error::of(&error))?;
    from_redis_value(value).map_err(|_| Error::Garbled(Garbled::NotAnAnswer))
}

fn lost(error: &std::io::Error) -> Error {
    Error::Lost(error.kind().to_string())
}

/// A connection of this user, and what drives it.
async fn logged_in(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    user: &str,
    password: &str,
) -> Result<(MultiplexedConnection, JoinHandle<()>), Error> {
    let info = RedisConnectionInfo::default().set_skip_set_lib_name();
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let (mut connection, driver) =
        MultiplexedConnection::new_with_config(&info, stream, config).await.map_err(|e| Error::of(&e))?;
    let driver = tokio::spawn(driver);
    let mut auth = cmd("AUTH");
    auth.arg(user).arg(password);
    auth.query_async::<()>(&mut connection).await.map_err(|e| Error::of(&e))?;
    Ok((connection, driver))
}

/// The connection.
pub struct Local {
    tickets: AtomicU64,
    socket: PathBuf,
    user: &'static str,
    password: String,
    topology: Topology,
    users: Users,
    held: Mutex<Option<MultiplexedConnection>>,
}

impl Local {
    pub fn new(
        socket: PathBuf,
        user: &'static str,
        password: String,
        topology: Topology,
        users: Users,
    ) -> Local {
        let (tickets, held) = (AtomicU64::new(1), Mutex::new(None));
        Local { tickets, socket, user, password, topology, users, held }
    }

    /// Whatever is asked from now on has a higher one than whatever was asked before.
    pub fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::SeqCst)
    }

    /// Forgets the connection: another server is started.
    pub async fn forget(&self) {
        *self.held.lock().await = None;
    }

    async fn connection(&self) -> Result<MultiplexedConnection, Error> {
        let mut held = self.held.lock().await;
        if let Some(connection) = &*held {
            return Ok(connection.clone());
        }
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| lost(&e))?;
        // Its driver ends with the last handle, or with the socket.
        let (connection, _driver) = logged_in(stream, self.user, &self.password).await?;
        *held = Some(connection.clone());
        Ok(connection)
    }

    async fn settle<T>(
        &self,
        bound: Duration,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let result = tokio::time::timeout(bound, asked).await.unwrap_or(Err(Error::Silent));
        if let Err(Error::Lost(_)) = &result {
            self.forget().await;
        }
        result
    }

    async fn ask_within<T: FromRedisValue>(&self, bound: Duration, command: &Cmd) -> Result<T, Error> {
        let asked = async {
            let mut connection = self.connection().await?;
            command.query_async(&mut connection).await.map_err(|error| Error::of(&error))
        };
        self.settle(bound, asked).await
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.ask_within(COMMAND_TIMEOUT, command).await
    }

    /// Everything that INFO says.
    pub async fn info_text(&self) -> Result<String, Error> {
        self.ask(cmd("INFO").arg("everything")).await
    }

    /// Asks the server what it is.
    pub async fn look_within(&self, bound: Duration) -> Result<Look, Error> {
        let ticket = self.ticket();
        let mut sections = cmd("INFO");
        sections.arg("server").arg("replication").arg("persistence").arg("errorstats");
        let (text, gossip): (String, Option<Gossip>) = match self.topology {
            Topology::Replication => (self.ask_within(bound, &sections).await?, None),
            Topology::Cluster => {
                let (text, gossip) = self.ask_node(bound, sections).await?;
                (text, Some(gossip))
            }
        };
        let fails = ["rdb_last_bgsave_status:err", "aof_last_write_status:err"];
        let saves = fails.iter().all(|fail| !text.contains(fail));
        let rewrites =
            ["aof_rewrite_in_progress:1", "aof_rewrite_scheduled:1", "aof_last_bgrewrite_status:err"];
        let rewriting = rewrites.iter().any(|sign| text.contains(sign));
        let refused_writes = stranded::refused_writes(&text);
        let listens = !text.lines().any(|line| line.trim_end() == "tcp_port:0");
        let info = Info::parse(&text)?;
        let (info, nodes) = match gossip {
            None => (info, None),
            // Before it has loaded it does not say.
            Some(Gossip { users, nodes: _ }) if info.loading => (info.behind_gate(&users), None),
            Some(Gossip { users, nodes }) => (info.behind_gate(&users), Some(nodes?.parse::<Nodes>()?)),
        };
        Ok(Look { info, nodes, saves, rewriting, listens, refused_writes, ticket })
    }

    /// In one go, so that all of it is of one moment.
    async fn ask_node(&self, bound: Duration, sections: Cmd) -> Result<(String, Gossip), Error> {
        let mut all: Pipeline = redis::pipe();
        all.add_command(sections).cmd("ACL").arg("USERS").cmd("CLUSTER").arg("NODES").ignore_errors();
        let asked = async {
            let mut connection = self.connection().await?;
            all.query_async::<Vec<RedisResult<Value>>>(&mut connection).await.map_err(|e| Error::of(&e))
        };
        let mut answers = self.settle(bound, asked).await?.into_iter();
        let (text, users) = (answer(answers.next())?, answer(answers.next())?);
        Ok((text, Gossip { users, nodes: answer(answers.next()) }))
    }

    /// [`Local::look_within`] with the bound of a command.
    pub async fn look(&self) -> Result<Look, Error> {
        self.look_within(COMMAND_TIMEOUT).await
    }

    /// Makes it primary, seen to be done.
    pub async fn promote(&self, by: Promotion) -> Result<Look, Error> {
        let by = match by {
            Promotion::Unspecified => {
                self.ask::<()>(cmd("REPLICAOF").arg("NO").arg("ONE")).await?;
                let is_primary = |look: &Look| look.info.role == RawRole::Primary;
                return self.until(is_primary, "it is not a primary").await;
            }
            Promotion::Open => None,
            Promotion::Force => Some(node::Failover::FORCE),
            Promotion::Takeover => Some(node::Failover::TAKEOVER),
            Promotion::Handover => Some(node::Failover::HANDOVER),
        };
        self.promote_node(by).await
    }

    /// `REPLICAOF` an address, seen to be done. Connections of clients but of this user are `ended` before those that are paused go on: none
    /// shall hear of a replica. Without, they learn what this is now.
    pub async fn attach(&self, to: &RawSource, ended: Option<&str>) -> Result<Look, Error> {
        self.ask::<()>(cmd("REPLICAOF").arg(&to.host).arg(to.port)).await?;
        if let Some(spared) = ended {
            // It is done, whoever stays connected: those hear that it is a replica now.
            let ending = tokio::time::timeout(STOP_TIMEOUT, self.disconnect(spared)).await;
            if let Err(error) = ending.unwrap_or(Err(Error::Silent)) {
                tracing::warn!(%error, "not all clients of the old primary were sent away");
            }
        }
        self.unpause().await?;
        let follows = |look: &Look| match &look.info.role {
            RawRole::Primary => false,
            RawRole::Replica { source, link: _ } => source == to,
        };
        self.until(follows, "it does not follow that address").await
    }

    async fn until(&self, holds: impl Fn(&Look) -> bool, otherwise: &'static str) -> Result<Look, Error> {
        let until = tokio::time::Instant::now() + COMMAND_TIMEOUT;
        loop {
            let look = self.look().await?;
            if holds(&look) {
                return Ok(look);
            }
            if tokio::time::Instant::now() >= until {
                return Err(Error::Unverified(otherwise));
            }
            tokio::time::sleep(POLL_PAUSE).await;
        }
    }

    /// Listens at this port, or at none if it is 0; the socket stays.
    pub async fn listen(&self, port: u16) -> Result<(), Error> {
        self.ask(cmd("CONFIG").arg("SET").arg("port").arg(port)).await
    }

    /// Makes writes wait. They go on by themselves after `timeout_ms`.
    pub async fn pause(&self, timeout_ms: u32) -> Result<(), Error> {
        self.ask(cmd("CLIENT").arg("PAUSE").arg(timeout_ms).arg("WRITE")).await
    }

    /// Lets writes go on.
    pub async fn unpause(&self) -> Result<(), Error> {
        self.ask(cmd("CLIENT").arg("UNPAUSE")).await
    }

    /// Ends the connections of clients, but not those of `spared` users and the agent's own.
    pub async fn disconnect(&self, spared: &str) -> Result<u64, Error> {
        let users: Vec<String> = self.ask(cmd("ACL").arg("USERS")).await?;
        let (mut ended, mut failed) = (0, None);
        // Not one command for all: what spares a user is only known to the newest servers.
        for user in users.iter().filter(|user| *user != spared && *user != self.user) {
            let mut kill = cmd("CLIENT");
            kill.arg("KILL").arg("TYPE").arg("normal").arg("USER").arg(user).arg("SKIPME").arg("yes");
            match self.ask::<u64>(&kill).await {
                Ok(number) => ended += number,
                // A user may have been deleted since: the others' connections are ended all the same.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(ended), Err)
    }

    /// Makes the server refuse every write; answers with what was configured before, `None` if it refused already.
    pub async fn stop_writes(&self) -> Result<Option<Configured>, Error> {
        let mut both: Pipeline = redis::pipe();
        both.cmd("CONFIG").arg("GET").arg(MIN_REPLICAS).arg(MIN_REPLICAS_LAG);
        both.cmd("CONFIG").arg("SET").arg(MIN_REPLICAS).arg(REPLICAS_NEVER);
        both.arg(MIN_REPLICAS_LAG).arg(LAG_FOR_NEVER).ignore();
        let asked = async {
            let mut connection = self.connection().await?;
            both.query_async::<(BTreeMap<String, String>,)>(&mut connection).await.map_err(|e| Error::of(&e))
        };
        let (before,) = self.settle(STOP_TIMEOUT, asked).await?;
        let value = |name: &str| before.get(name).cloned().unwrap_or_default();
        let found = Configured { min_replicas: value(MIN_REPLICAS), max_lag: value(MIN_REPLICAS_LAG) };
        Ok((found.min_replicas != REPLICAS_NEVER).then_some(found))
    }

    /// Puts back what was configured before.
    pub async fn allow_writes(&self, configured: &Configured) -> Result<(), Error> {
        let Configured { min_replicas, max_lag } = configured;
        let mut set = cmd("CONFIG");
        set.arg("SET").arg(MIN_REPLICAS).arg(min_replicas).arg(MIN_REPLICAS_LAG).arg(max_lag);
        self.ask(&set).await
    }

    /// Turns the append-only file on, which was left off so that the snapshot would be loaded.
    pub async fn append(&self) -> Result<(), Error> {
        self.ask(cmd("CONFIG").arg("SET").arg("appendonly").arg("yes")).await
    }
}
