//! One socket to one server, logged in as the operator's user, with a task of its own that sees the socket's end without
//! anybody asking: the driver of the `redis` connection reads all the time and returns when the peer is gone.

use super::{
    Error,
    look::Look,
    secret::Credentials,
    way::{Opened, Stream},
};
use redis::{
    AsyncConnectionConfig, Cmd, FromRedisValue, RedisConnectionInfo, RedisError, RedisResult, Value,
    aio::MultiplexedConnection, cmd, from_redis_value,
};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take},
    sync::watch,
    task::JoinHandle,
    time::Instant,
};
use valkeeper_core::{exports::Fields, info::Garbled, slots::SlotSet, spec::Topology, weights::SlotWeights};

/// Most that is read between two questions. The longest honest answer, INFO of a primary with a thousand replicas or what each of a
/// hundred nodes says of a hundred, is a tenth of it; a stranger at a member's former address shall not fill the memory.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Slots whose keys are counted in one round trip. Others' commands are served in between, and of a server that refuses to count only so many
/// refusals are read.
const COUNTED_AT_ONCE: usize = 1_024;

/// Field of INFO with what the data set takes, in bytes.
const DATASET: &str = "used_memory_dataset";

/// Field of INFO with what the server takes in all, in bytes.
const USED: &str = "used_memory";

/// A logged-in connection. Clones share the socket, which closes with the last of them.
#[derive(Clone)]
pub(super) struct Connection {
    commands: MultiplexedConnection,
    ended: watch::Receiver<()>,
    _driver: Arc<Driver>,
}

/// The task that owns the socket; it ends with the last clone of the connection.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    /// Logs in over what leads to the server. Unbounded: the caller has the bound.
    pub(super) async fn open(opened: Opened, credentials: &Credentials) -> Result<Connection, Error> {
        // Neither login nor client name by the library: it would try the password on the default user as well.
        let info = RedisConnectionInfo::default().set_skip_set_lib_name();
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let (commands, driver) =
            MultiplexedConnection::new_with_config(&info, Bounded::new(opened.stream), config).await?;
        let (alive, ended) = watch::channel(());
        let task = tokio::spawn(async move {
            driver.await;
            drop(alive);
        });
        let connection = Connection { commands, ended, _driver: Arc::new(Driver(task)) };
        if !opened.logged_in {
            let Credentials { user, password } = credentials;
            connection.ask::<()>(cmd("AUTH").arg(&**user).arg(password.expose())).await?;
        }
        Ok(connection)
    }

    /// Sends one command once. Unbounded.
    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        Ok(command.query_async(&mut self.commands.clone()).await?)
    }

    /// Asks the server what it is, in one round trip. Unbounded.
    pub(super) async fn look(&self, topology: Topology) -> Result<Look, Error> {
        let mut info = cmd("INFO");
        info.arg("server").arg("replication").arg("persistence");
        match topology {
            Topology::Replication => {
                let text: String = self.ask(&info).await?;
                Ok(Look::parse(&text, Instant::now())?)
            }
            Topology::Cluster => {
                info.arg("keyspace");
                let mut all = redis::pipe();
                all.add_command(info).cmd("CLUSTER").arg("NODES").cmd("CLUSTER").arg("INFO");
                all.cmd("CLUSTER").arg("GETSLOTMIGRATIONS").ignore_errors();
                let answers: [RedisResult<Value>; 4] = all.query_async(&mut self.commands.clone()).await?;
                let [info, nodes, state, jobs] = answers;
                let (info, nodes): (String, String) = (read(info)?, read(nodes)?);
                let jobs = match jobs {
                    // Below 9.0 there is no such command, and nothing is handed over.
                    Err(error) if is_unknown(&error) => Some(Vec::<Fields>::new()),
                    jobs => read(jobs).ok(),
                };
                // A server whose users are from before does not say it: that is no reason to know nothing.
                let state: String = read(state).unwrap_or_default();
                Look::parse_node(&info, (&nodes, &state), jobs.as_deref(), Instant::now())
            }
        }
    }

    /// Asks the server how many keys are in each of the slots, and what its data set takes. Unbounded.
    pub(super) async fn weigh(&self, slots: &SlotSet) -> Result<SlotWeights, Error> {
        let info: String = self.ask(cmd("INFO").arg("memory")).await?;
        let bytes = dataset_bytes(&info)?;
        let slots: Vec<u16> = slots.iter().collect();
        let mut counts = Vec::with_capacity(slots.len());
        for some in slots.chunks(COUNTED_AT_ONCE) {
            let mut all = redis::pipe();
            for slot in some {
                all.cmd("CLUSTER").arg("COUNTKEYSINSLOT").arg(*slot);
            }
            // Otherwise the library makes one error of all of them, without what the server said.
            all.ignore_errors();
            let answers: Vec<RedisResult<Value>> = all.query_async(&mut self.commands.clone()).await?;
            for (slot, keys) in some.iter().zip(answers) {
                counts.push((*slot, read(keys)?));
            }
        }
        Ok(SlotWeights::sum_up(&counts, bytes))
    }

    /// True once the socket has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.has_changed().is_err()
    }

    /// Returns when the socket has ended.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.clone();
        async move { while ended.changed().await.is_ok() {} }
    }
}

/// True if the server does not know the command.
fn is_unknown(error: &RedisError) -> bool {
    error.detail().is_some_and(|said| said.to_lowercase().contains("unknown subcommand"))
}

/// 0 if the server does not know: 8.x and 9.x were seen to say almost 2^64 where there is little data (valkey-io/valkey#2994).
fn dataset_bytes(info: &str) -> Result<u64, Garbled> {
    let field = |name: &'static str| {
        let text = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        text.ok_or(Garbled::Missing(name))?.trim_end().parse::<u64>().map_err(|_| Garbled::Malformed(name))
    };
    let (dataset, all) = (field(DATASET)?, field(USED)?);
    Ok(if dataset > all { 0 } else { dataset })
}

fn read<T: FromRedisValue>(answer: RedisResult<Value>) -> Result<T, Error> {
    let value: T = from_redis_value(answer?).map_err(RedisError::from)?;
    Ok(value)
}

/// A socket that gives up on a peer that talks without end. What it reads is counted anew with each question.
struct Bounded(Take<Box<dyn Stream>>);

impl Bounded {
    fn new(stream: Box<dyn Stream>) -> Bounded {
        Bounded(stream.take(ANSWER_BYTES_MAX))
    }
}

impl AsyncRead for Bounded {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Bounded(stream) = self.get_mut();
        if stream.limit() == 0 {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        Pin::new(stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Bounded(stream) = self.get_mut();
        stream.set_limit(ANSWER_BYTES_MAX);
        Pin::new(stream.get_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().0.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().0.get_mut()).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_set_that_takes_more_than_all_memory_is_not_known() {
        let of = |all: &str, dataset: &str| {
            dataset_bytes(&format!("# Memory\r\nused_memory:{all}\r\nused_memory_dataset:{dataset}\r\n"))
        };
        assert_eq!(of("2097152", "1048576"), Ok(1_048_576));
        assert_eq!(of("2097152", "18446744073632349612"), Ok(0));
        assert_eq!(of("2097152", "-1"), Err(Garbled::Malformed(DATASET)));
        assert_eq!(dataset_bytes("used_memory:1\r\n"), Err(Garbled::Missing(DATASET)));
    }
}
