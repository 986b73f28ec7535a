//! What two servers are told while a slot goes from the one to the other key by key. Each over a connection of its own: SETSLOT waits
//! for replicas, MIGRATE for the other server, and whoever looks at the server must not wait behind them.

use super::{
    AsyncRead, AsyncWrite, COMMAND_TIMEOUT, Cmd, Error, FromRedisValue, JoinHandle, Local,
    MultiplexedConnection, RedisError, cmd, logged_in, lost,
};
use crate::boot::Login;
use std::time::Duration;
use tokio::net::TcpStream;
use valkeeper_core::{ids::NodeId, info::RawSource};

/// Keys of one MIGRATE: the source serves nobody while it sends them. 100 small ones are 5 to 9 ms, at 34,000 to 134,000 keys a second;
/// ten are no shorter a gap, and slower.
const KEYS_MAX: u32 = 100;
/// How long the source serves nobody if the target hangs. It is for each step of the exchange, also for the one answer that a target gives
/// when it has taken a big value: with half of it a sorted set of a million members does not go. And it is no longer than the shortest node
/// timeout, after which the source is suspected, and any target that takes longer.
const MIGRATE_TIMEOUT_MS: u32 = 1_000;
/// Bound on MIGRATE as a whole: a value of a gigabyte on a network of 1 Gbit/s. It also waits while a handover pauses writes.
const MIGRATE_MAX: Duration = Duration::from_secs(10);
/// How long a replica may take to confirm a batch: as long as SETSLOT waits for one at least.
const CONFIRM_TIMEOUT_MS: u32 = 2_000;
/// Bound on the rest: SETSLOT waits two seconds for replicas before it fails by itself.
const STEP_TIMEOUT: Duration = Duration::from_secs(3);
/// Keys are in database 0. Others came with 9.0 (`cluster-databases`), and do not go by key: the job fails with their names.
const DATABASE: &str = "db0";

/// What a slot is.
pub enum SlotIs<'a> {
    /// On its way from that node, in the eyes of who gets it.
    Importing(&'a NodeId),
    /// On its way to that node.
    Migrating(&'a NodeId),
    /// That node's.
    Of(&'a NodeId),
    /// On no way.
    Stable,
}

/// A connection for what takes its time. What it was told and has not answered goes with it.
pub struct Session {
    connection: MultiplexedConnection,
    driver: JoinHandle<()>,
}

/// The server that gets the keys.
pub struct Target {
    pub session: Session,
    at: RawSource,
    login: Login,
}

impl Drop for Session {
    fn drop(&mut self) {
        // By itself it would wait for the answer, and what was given up would be done later.
        self.driver.abort();
    }
}

/// In the server's own words, without the library's.
fn said(error: &RedisError) -> Error {
    match Error::of(error) {
        Error::Refused(whole) => {
            let words: Vec<&str> = error.code().into_iter().chain(error.detail()).collect();
            Error::Refused(if words.is_empty() { whole } else { words.join(" ") })
        }
        other @ (Error::Silent
        | Error::Lost(_)
        | Error::Garbled(_)
        | Error::Nodes(_)
        | Error::Users(_)
        | Error::Unverified(_)) => other,
    }
}

impl Session {
    async fn begin(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        user: &str,
        password: &str,
    ) -> Result<Session, Error> {
        let (connection, driver) = logged_in(stream, user, password).await?;
        Ok(Session { connection, driver })
    }

    async fn ask<T: FromRedisValue>(&mut self, bound: Duration, command: &Cmd) -> Result<T, Error> {
        let asked = command.query_async(&mut self.connection);
        tokio::time::timeout(bound, asked).await.map_err(|_| Error::Silent)?.map_err(|error| said(&error))
    }

    /// `CLUSTER SETSLOT`.
    pub async fn set_slot(&mut self, slot: u16, is: SlotIs<'_>) -> Result<(), Error> {
        let mut set = cmd("CLUSTER");
        set.arg("SETSLOT").arg(slot);
        match is {
            SlotIs::Importing(from) => set.arg("IMPORTING").arg(from.to_string()),
            SlotIs::Migrating(to) => set.arg("MIGRATING").arg(to.to_string()),
            SlotIs::Of(owner) => set.arg("NODE").arg(owner.to_string()),
            SlotIs::Stable => set.arg("STABLE"),
        };
        self.ask(STEP_TIMEOUT, &set).await
    }

    /// Some keys of the slot, none if there are none.
    pub async fn keys(&mut self, slot: u16) -> Result<Vec<Vec<u8>>, Error> {
        self.ask(STEP_TIMEOUT, cmd("CLUSTER").arg("GETKEYSINSLOT").arg(slot).arg(KEYS_MAX)).await
    }

    /// How many keys of the slot there are, in whatever database.
    pub async fn count(&mut self, slot: u16) -> Result<u64, Error> {
        self.ask(STEP_TIMEOUT, cmd("CLUSTER").arg("COUNTKEYSINSLOT").arg(slot)).await
    }

    /// Databases with keys in them that would be left behind.
    pub async fn other_databases(&mut self) -> Result<Vec<String>, Error> {
        let text: String = self.ask(STEP_TIMEOUT, cmd("INFO").arg("keyspace")).await?;
        let names = text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name);
        Ok(names.filter(|name| name.starts_with("db") && *name != DATABASE).map(str::to_owned).collect())
    }

    /// Its node.
    pub async fn id(&mut self) -> Result<NodeId, Error> {
        let text: String = self.ask(STEP_TIMEOUT, cmd("CLUSTER").arg("MYID")).await?;
        text.parse().map_err(|_| Error::Unverified("it does not say which node it is"))
    }

    /// Whether a replica has what was done here, within [`CONFIRM_TIMEOUT_MS`].
    pub async fn is_confirmed(&mut self) -> Result<bool, Error> {
        let replicas: u32 = self.ask(STEP_TIMEOUT, cmd("WAIT").arg(1).arg(CONFIRM_TIMEOUT_MS)).await?;
        Ok(replicas > 0)
    }

    /// `MIGRATE`; those that are gone meanwhile are no error. If the target has any of them as well, a move was cut off, and the source's is
    /// the one that clients have written since, as long as the source is the same server: hence `REPLACE`. Its successor may lack the last
    /// batch's deletion, and then the target's may be newer.
    pub async fn migrate(&mut self, keys: &[Vec<u8>], to: &Target) -> Result<(), Error> {
        let Target { session: _, at: RawSource { host, port }, login: Login { user, password } } = to;
        let mut migrate = cmd("MIGRATE");
        migrate.arg(host).arg(port).arg("").arg(0).arg(MIGRATE_TIMEOUT_MS).arg("REPLACE");
        migrate.arg("AUTH2").arg(user).arg(password).arg("KEYS").arg(keys);
        self.ask(MIGRATE_MAX, &migrate).await
    }
}

impl Local {
    /// A connection of its own to the server.
    pub async fn session(&self) -> Result<Session, Error> {
        let begun = async {
            let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(|e| lost(&e))?;
            Session::begin(stream, self.user, &self.password).await
        };
        tokio::time::timeout(COMMAND_TIMEOUT, begun).await.map_err(|_| Error::Silent)?
    }

    /// Another node's server, as the user of replication.
    pub async fn target(&self, at: RawSource) -> Result<Target, Error> {
        let mut refused = Error::Unverified("nobody can log in there");
        for login in self.users.logins()? {
            let begun = async {
                let stream = TcpStream::connect((at.host.as_str(), at.port)).await.map_err(|e| lost(&e))?;
                Session::begin(stream, &login.user, &login.password).await
            };
            match tokio::time::timeout(COMMAND_TIMEOUT, begun).await.map_err(|_| Error::Silent)? {
                Ok(session) => return Ok(Target { session, at, login }),
                // It may have another version of the users.
                Err(error @ Error::Refused(_)) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }
}
