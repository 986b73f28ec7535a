//! What the jobs need of redis-rs, which does what it does if nobody says anything.

use redis::{
    Client, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult, aio::ConnectionManager,
    cluster::ClusterClient, cluster_async::ClusterConnection,
};

/// Makes connections.
pub enum Library {
    /// To one address.
    Single(Client),
    /// To a Valkey Cluster.
    Cluster(Box<ClusterClient>),
}

impl Library {
    /// The library's client for an address.
    pub fn new(cluster: bool, address: &str, password: &str) -> RedisResult<Library> {
        let at = redis::IntoConnectionInfo::into_connection_info(format!("redis://{address}"))?;
        let settings = at.redis_settings().clone().set_password(password);
        let at = at.set_redis_settings(settings);
        Ok(if cluster {
            Library::Cluster(Box::new(ClusterClient::new(vec![at])?))
        } else {
            Library::Single(Client::open(at)?)
        })
    }

    /// A connection that connects again by itself. A bare `MultiplexedConnection` never does.
    pub async fn open(&self) -> RedisResult<Connection> {
        Ok(match self {
            Library::Single(client) => Connection::Single(client.get_connection_manager().await?),
            Library::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

/// A connection that tasks can share.
#[derive(Clone)]
pub enum Connection {
    /// To one address.
    Single(ConnectionManager),
    /// To a Valkey Cluster.
    Cluster(ClusterConnection),
}

/// What is asked for.
pub enum Request {
    /// One command.
    One(Cmd),
    /// MULTI, the commands, EXEC.
    Transaction(Pipeline),
}

impl Connection {
    /// The answer, unless it is an error.
    pub async fn ask<T: FromRedisValue>(&mut self, request: &Request) -> RedisResult<T> {
        match (self, request) {
            (Connection::Single(connection), Request::One(command)) => command.query_async(connection).await,
            (Connection::Cluster(connection), Request::One(command)) => command.query_async(connection).await,
            (Connection::Single(connection), Request::Transaction(all)) => all.query_async(connection).await,
            (Connection::Cluster(connection), Request::Transaction(all)) => all.query_async(connection).await,
        }
    }
}

/// A word for an error.
pub fn kind(error: &RedisError) -> String {
    let text = error.to_string().to_lowercase();
    if let Some(word) = error.code() {
        word.to_owned()
    } else if error.kind() == ErrorKind::AuthenticationFailed {
        // The library takes the server's word away.
        "WRONGPASS".to_owned()
    } else if error.is_timeout() {
        "timeout".to_owned()
    } else if error.is_connection_refusal() {
        "refused".to_owned()
    } else if text.contains("reset") {
        "reset".to_owned()
    } else if text.contains("broken pipe") {
        "broken-pipe".to_owned()
    } else if text.contains("end of file") {
        "EOF".to_owned()
    } else {
        format!("{:?}", error.kind())
    }
}
