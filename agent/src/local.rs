//! The agent's own connection to its server, over a socket that nobody else can open: the only home of `redis` here.

mod login;
mod node;
mod slots;
mod stranded;

pub use node::Cancelled;
pub use slots::{Session, SlotIs, Target};

use crate::{
    args::Config,
    boot::{self, Users},
};
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
    /// What a replica logs in with cannot be read.
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
    /// Which server of this agent said it.
    pub life: Life,
}

/// A server among those that one agent has started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life(u64);

/// The connection to the server that was started last.
#[derive(Default)]
struct Held {
    life: Life,
    connection: Option<MultiplexedConnection>,
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
    /// Of clients, when the server listens for them.
    port: u16,
    user: &'static str,
    password: String,
    topology: Topology,
    users: Users,
    held: Mutex<Held>,
}

impl Local {
    pub fn new(config: &Config, password: String, users: Users) -> Local {
        Local {
            tickets: AtomicU64::new(1),
            socket: boot::socket(config),
            port: config.args.server_port,
            user: boot::USER,
            password,
            topology: config.topology,
            users,
            held: Mutex::default(),
        }
    }

    /// Whatever is asked from now on has a higher one than whatever was asked before.
    pub fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::SeqCst)
    }

    /// Another server is started. What is said to the one before does not reach it.
    pub async fn forget(&self) {
        let mut held = self.held.lock().await;
        *held = Held { life: Life(held.life.0 + 1), connection: None };
    }

    /// A connection to this server, or to whichever there is; and which one it is. It is made with `held` locked, so that no other server is
    /// started meanwhile.
    async fn connection(&self, to: Option<Life>) -> Result<(MultiplexedConnection, Life), Error> {
        let mut held = self.held.lock().await;
        if to.is_some_and(|life| life != held.life) {
            return Err(Error::Lost("it was another server's".to_owned()));
        }
        if let Some(connection) = &held.connection {
            return Ok((connection.clone(), held.life));
        }
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| lost(&e))?;
        // Its driver ends with the last handle, or with the socket.
        let (connection, _driver) = logged_in(stream, self.user, &self.password).await?;
        held.connection = Some(connection.clone());
        Ok((connection, held.life))
    }

    async fn settle<T>(
        &self,
        bound: Duration,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let result = tokio::time::timeout(bound, asked).await.unwrap_or(Err(Error::Silent));
        if let Err(Error::Lost(_)) = &result {
            self.held.lock().await.connection = None;
        }
        result
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.ask_of(None, command).await
    }

    /// Asks this server, or whichever there is.
    async fn ask_of<T: FromRedisValue>(&self, server: Option<Life>, command: &Cmd) -> Result<T, Error> {
        let asked = async {
            let (mut connection, _) = self.connection(server).await?;
            command.query_async(&mut connection).await.map_err(|error| Error::of(&error))
        };
        self.settle(COMMAND_TIMEOUT, asked).await
    }

    /// Everything that INFO says.
    pub async fn info_text(&self) -> Result<String, Error> {
        self.ask(cmd("INFO").arg("everything")).await
    }

    /// Asks the server what it is.
    pub async fn look_within(&self, bound: Duration) -> Result<Look, Error> {
        self.look_of(None, bound).await
    }

    /// Asks this server, or whichever there is, what it is.
    async fn look_of(&self, server: Option<Life>, bound: Duration) -> Result<Look, Error> {
        let ticket = self.ticket();
        let (text, nodes, life) = self.settle(bound, self.ask_what_it_is(server)).await?;
        let fails = ["rdb_last_bgsave_status:err", "aof_last_write_status:err"];
        let saves = fails.iter().all(|fail| !text.contains(fail));
        let rewrites =
            ["aof_rewrite_in_progress:1", "aof_rewrite_scheduled:1", "aof_last_bgrewrite_status:err"];
        let rewriting = rewrites.iter().any(|sign| text.contains(sign));
        let refused_writes = stranded::refused_writes(&text);
        let info = Info::parse(&text)?;
        let listens = info.port != 0;
        let (info, nodes) = match nodes {
            None => (info, None),
            // Before it has loaded it does not say.
            Some(_) if info.loading => (info.behind_gate(), None),
            Some(nodes) => (info.behind_gate(), Some(nodes?.parse::<Nodes>()?)),
        };
        Ok(Look { info, nodes, saves, rewriting, listens, refused_writes, ticket, life })
    }

    /// INFO, and in Cluster mode `CLUSTER NODES`, in one go, so that all of it is of one moment.
    async fn ask_what_it_is(
        &self,
        server: Option<Life>,
    ) -> Result<(String, Option<Result<String, Error>>, Life), Error> {
        let mut all: Pipeline = redis::pipe();
        all.cmd("INFO").arg("server").arg("replication").arg("persistence").arg("errorstats");
        if self.topology == Topology::Cluster {
            all.cmd("CLUSTER").arg("NODES");
        }
        let (answers, life) = self.in_one_go(server, all).await?;
        let mut answers = answers.into_iter();
        let text = answer(answers.next())?;
        let nodes = (self.topology == Topology::Cluster).then(|| answer(answers.next()));
        Ok((text, nodes, life))
    }

    /// Several commands: no client is served in between, and one that is refused keeps none of the others from being done.
    async fn in_one_go(
        &self,
        server: Option<Life>,
        mut all: Pipeline,
    ) -> Result<(Vec<RedisResult<Value>>, Life), Error> {
        all.ignore_errors();
        let (mut connection, life) = self.connection(server).await?;
        let answers = all.query_async(&mut connection).await.map_err(|error| Error::of(&error))?;
        Ok((answers, life))
    }

    /// [`Local::look_within`] with the bound of a command.
    pub async fn look(&self) -> Result<Look, Error> {
        self.look_within(COMMAND_TIMEOUT).await
    }

    /// What the process with this run id says, if it is the present one. The next one is at the gate again: nothing
    /// that was decided about this one may reach it.
    async fn process(&self, run_id: &str) -> Result<Look, Error> {
        let look = self.look().await?;
        if look.info.run_id != run_id {
            return Err(Error::Lost("it is another process by now".to_owned()));
        }
        Ok(look)
    }

    /// Makes the process with this `run_id` primary, seen to be done.
    pub async fn promote(&self, run_id: &str, by: Promotion) -> Result<Look, Error> {
        let by = match by {
            Promotion::Unspecified => {
                let server = self.process(run_id).await?.life;
                self.ask_of::<()>(Some(server), cmd("REPLICAOF").arg("NO").arg("ONE")).await?;
                let is_primary = |look: &Look| look.info.role == RawRole::Primary;
                return self.until_of(Some(server), is_primary, "it is not a primary").await;
            }
            Promotion::Open => None,
            Promotion::Force => Some(node::Failover::FORCE),
            Promotion::Takeover => Some(node::Failover::TAKEOVER),
            Promotion::Handover => Some(node::Failover::HANDOVER),
        };
        self.promote_node(run_id, by).await
    }

    /// `REPLICAOF` an address, told to the process with this `run_id` and seen to be done. Connections of clients but
    /// of this user are `ended` in the same go, and those that are paused with them: none shall hear of a replica.
    /// Without, they learn what this is now.
    pub async fn attach(&self, run_id: &str, to: &RawSource, ended: Option<&str>) -> Result<Look, Error> {
        let server = self.process(run_id).await?.life;
        let mut all: Pipeline = redis::pipe();
        all.cmd("REPLICAOF").arg(&to.host).arg(to.port);
        if let Some(spared) = ended {
            let endings = tokio::time::timeout(STOP_TIMEOUT, self.endings(spared)).await;
            match endings.unwrap_or(Err(Error::Silent)) {
                Ok(endings) => {
                    for ending in endings {
                        all.add_command(ending);
                    }
                }
                Err(error) => tracing::warn!(%error, "no client of the old primary is sent away"),
            }
        }
        let mut answers =
            self.settle(COMMAND_TIMEOUT, self.in_one_go(Some(server), all)).await?.0.into_iter();
        answer::<()>(answers.next())?;
        // It is done, whoever stays connected: those hear that it is a replica now.
        for error in answers.filter_map(|given| answer::<u64>(Some(given)).err()) {
            tracing::warn!(%error, "not all clients of the old primary were sent away");
        }
        self.ask_of::<()>(Some(server), cmd("CLIENT").arg("UNPAUSE")).await?;
        let follows = |look: &Look| match &look.info.role {
            RawRole::Primary => false,
            RawRole::Replica { source, link: _ } => source == to,
        };
        self.until_of(Some(server), follows, "it does not follow that address").await
    }

    async fn until(&self, holds: impl Fn(&Look) -> bool, otherwise: &'static str) -> Result<Look, Error> {
        self.until_of(None, holds, otherwise).await
    }

    async fn until_of(
        &self,
        server: Option<Life>,
        holds: impl Fn(&Look) -> bool,
        otherwise: &'static str,
    ) -> Result<Look, Error> {
        let until = tokio::time::Instant::now() + COMMAND_TIMEOUT;
        loop {
            let look = self.look_of(server, COMMAND_TIMEOUT).await?;
            if holds(&look) {
                return Ok(look);
            }
            if tokio::time::Instant::now() >= until {
                return Err(Error::Unverified(otherwise));
            }
            tokio::time::sleep(POLL_PAUSE).await;
        }
    }

    /// Has this server, and no later one, listen for clients. In Cluster mode that opens the gate: in the same step it may log in at its
    /// primary.
    pub async fn listen(&self, server: Life) -> Result<(), Error> {
        let mut set = cmd("CONFIG");
        set.arg("SET").arg("port").arg(self.port);
        match self.topology {
            Topology::Replication => {}
            Topology::Cluster => {
                set.arg("primaryauth").arg(self.users.primaryauth()?);
            }
        }
        self.ask_of(Some(server), &set).await
    }

    /// Closes the port. The socket stays, and so do the connections that there are.
    pub async fn close_port(&self) -> Result<(), Error> {
        self.ask(cmd("CONFIG").arg("SET").arg("port").arg(0)).await
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
        let (mut ended, mut failed) = (0, None);
        for ending in self.endings(spared).await? {
            match self.ask::<u64>(&ending).await {
                Ok(number) => ended += number,
                // A user may have been deleted since: the others' connections are ended all the same.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(ended), Err)
    }

    /// What ends the connections of clients. Not one command for all: what spares a user is only known to the newest servers.
    async fn endings(&self, spared: &str) -> Result<Vec<Cmd>, Error> {
        let users: Vec<String> = self.ask(cmd("ACL").arg("USERS")).await?;
        let all = users.iter().filter(|user| *user != spared && *user != self.user).map(|user| {
            let mut kill = cmd("CLIENT");
            kill.arg("KILL").arg("TYPE").arg("normal").arg("USER").arg(user).arg("SKIPME").arg("yes");
            kill
        });
        Ok(all.collect())
    }

    /// Makes the server refuse every write; answers with what was configured before, `None` if it refused already.
    pub async fn stop_writes(&self) -> Result<Option<Configured>, Error> {
        let mut both: Pipeline = redis::pipe();
        both.cmd("CONFIG").arg("GET").arg(MIN_REPLICAS).arg(MIN_REPLICAS_LAG);
        both.cmd("CONFIG").arg("SET").arg(MIN_REPLICAS).arg(REPLICAS_NEVER);
        both.arg(MIN_REPLICAS_LAG).arg(LAG_FOR_NEVER).ignore();
        let asked = async {
            let (mut connection, _) = self.connection(None).await?;
            both.query_async::<(BTreeMap<String, String>,)>(&mut connection).await.map_err(|e| Error::of(&e))
        };
        let (before,) = self.settle(STOP_TIMEOUT, asked).await?;
        let value = |name: &str| before.get(name).cloned().unwrap_or_default();
        let found = Configured { min_replicas: value(MIN_REPLICAS), max_lag: value(MIN_REPLICAS_LAG) };
        Ok((found.min_replicas != REPLICAS_NEVER).then_some(found))
    }

    /// Sets directives, all or none.
    pub async fn configure(&self, settings: impl Iterator<Item = (&str, String)>) -> Result<(), Error> {
        let mut set = cmd("CONFIG");
        set.arg("SET");
        for (name, value) in settings {
            set.arg(name).arg(value);
        }
        self.ask(&set).await
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex, PoisonError};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    /// A server that obeys, and what it was told.
    fn obedient(socket: &std::path::Path) -> Arc<Mutex<String>> {
        let told = Arc::new(Mutex::new(String::new()));
        let (listener, heard) = (UnixListener::bind(socket).unwrap(), told.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let heard = heard.clone();
                tokio::spawn(async move {
                    let mut words = [0; 1024];
                    while let Ok(length @ 1..) = stream.read(&mut words).await {
                        let text = String::from_utf8_lossy(&words[..length]).into_owned();
                        heard.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
                        let _ = stream.write_all(b"+OK\r\n").await;
                    }
                });
            }
        });
        told
    }

    #[tokio::test]
    async fn the_gate_of_the_next_server_is_not_opened_by_what_was_decided_about_the_one_before() {
        let dir = std::env::temp_dir().join(format!("valkeeper-local-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("users.acl"), "").unwrap();
        let local = Local {
            tickets: AtomicU64::new(1),
            socket: dir.join("socket"),
            port: 6379,
            user: boot::USER,
            password: "password".to_owned(),
            topology: Topology::Cluster,
            users: Users::of(&dir),
            held: tokio::sync::Mutex::default(),
        };
        let first = Life::default();
        let told = obedient(&local.socket);
        let heard = || told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // It ends and another is at the socket, before or after the agent has connected to that one.
        local.forget().await;
        for _ in 0..2 {
            let late = local.listen(first).await;
            assert!(matches!(late, Err(Error::Lost(_))), "{late:?}");
            assert!(!heard().contains("CONFIG"), "{}", heard());
            local.unpause().await.unwrap();
        }
        let (_, now) = local.connection(None).await.unwrap();
        assert_ne!(now, first);
        local.listen(now).await.unwrap();
        let said = heard();
        assert!(said.contains("port\r\n$4\r\n6379") && said.contains("primaryauth"), "{said}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
