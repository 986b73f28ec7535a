//! Connections to the API server. Two clients, because one read timeout cannot fit both a request (answered in
//! milliseconds) and a watch (silent for a minute when all is well).

use super::Error;
use kube::{Client, Config};
use std::time::Duration;

/// Longest silence on a connection that waits for an answer. The client's default is none, so that a black-holed server
/// would hang a call for ever; 10 s is the lease's renew deadline, and [`super::API_CALL_MAX`] usually ends the call before.
const REQUEST_READ_MAX: Duration = Duration::from_secs(10);

/// Longest silence on a watch. The server ends each after [`WATCH_S`], with a bookmark shortly before: what has been silent
/// for longer than that is a dead connection, and while it is taken for a living one, new pods go unnoticed.
const WATCH_READ_MAX: Duration = Duration::from_secs(WATCH_S as u64 + 10);

/// Server-side end of a watch in seconds. It is begun again where it ended, without a list: four such requests a minute
/// for the whole installation buy that a dead connection is noticed after two minutes instead of five.
pub const WATCH_S: u32 = 120;

/// Longest wait for a TCP and TLS connection: as an answer, see [`super::API_CALL_MAX`].
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// How the program introduces itself.
const USER_AGENT: &str = concat!("valkeeper/", env!("CARGO_PKG_VERSION"));

/// Both clients and the namespace that the process itself belongs to.
#[derive(Clone)]
pub struct Clients {
    /// For requests: everything but watches.
    pub requests: Client,
    /// For watches, and the lists that begin them.
    pub watches: Client,
    /// Namespace of the service account or of the kubeconfig's context.
    pub default_namespace: String,
}

impl Clients {
    /// From the kubeconfig (`KUBECONFIG`, `~/.kube/config`) or else the pod's service account.
    ///
    /// # Errors
    /// [`Error::Settings`] if neither is usable.
    pub async fn infer() -> Result<Self, Error> {
        let config = Config::infer().await.map_err(|e| Error::Settings(Box::new(e)))?;
        let default_namespace = config.default_namespace.clone();
        let with_read_timeout = |read: Duration| {
            let mut config = config.clone();
            config.connect_timeout = Some(CONNECT_MAX);
            config.read_timeout = Some(read);
            // Else the time that a pooled connection was idle counts against its next answer.
            config.reset_reader_on_write = true;
            // The default retries every method up to 15 times over 164 s: one write could outlive a lease unseen.
            config.default_retry = false;
            // So that an audit log tells the operator's calls from everyone else's.
            if let (Ok(name), Ok(value)) = ("user-agent".parse(), USER_AGENT.parse()) {
                config.headers.push((name, value));
            }
            Client::try_from(config).map_err(|e| Error::Settings(Box::new(e)))
        };
        Ok(Clients {
            requests: with_read_timeout(REQUEST_READ_MAX)?,
            watches: with_read_timeout(WATCH_READ_MAX)?,
            default_namespace,
        })
    }
}
