//! Connections to the API server. Two clients, because one read timeout cannot fit both a request (answered in
//! milliseconds) and a watch (silent for a minute when all is well).

use super::Error;
use kube::{Client, Config};
use std::time::Duration;

/// Longest silence on a connection that waits for an answer. The client's default is none, so that a black-holed server
/// would hang a call for ever; 10 s is the lease's renew deadline, and [`super::API_CALL_MAX`] usually ends the call before.
const REQUEST_READ_MAX: Duration = Duration::from_secs(10);

/// Longest silence on a watch. The server sends a bookmark about once a minute; half as much again is a dead connection.
const WATCH_READ_MAX: Duration = Duration::from_secs(90);

/// Longest wait for a TCP and TLS connection: as an answer, see [`super::API_CALL_MAX`].
const CONNECT_MAX: Duration = Duration::from_secs(5);

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
            Client::try_from(config).map_err(|e| Error::Settings(Box::new(e)))
        };
        Ok(Clients {
            requests: with_read_timeout(REQUEST_READ_MAX)?,
            watches: with_read_timeout(WATCH_READ_MAX)?,
            default_namespace,
        })
    }
}
