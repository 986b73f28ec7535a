//! gRPC over a verified connection: how the operator reaches an agent, and an agent its peers.

use crate::tls::{ALPN_H2, Accept, Live};
use hyper_util::rt::TokioIo;
use std::{io, net::SocketAddr, time::Duration};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// Between two signs of life on a connection that is not used: requests notice a dead one sooner, by their own bounds.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a sign of life may stay unanswered: a node that is gone without a word costs no more than this and the interval.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Requests that wait to be sent. Each has a bound of its own, and there are a few at a time; the library has room for 1,024, which is 9 KiB of
/// every connection.
const WAITING_MAX: usize = 16;
/// Largest answer, in bytes: the longest honest one, a state with a roster of a hundred, is a tenth of it.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Connects to the agent at `address`, which must be who `accept` allows, within `bound`. The channel is of this one
/// connection's identity while that lasts; after an end it connects again with the newest.
///
/// # Errors
/// Nobody there, or somebody else.
pub async fn connect(
    live: &Live,
    accept: Accept,
    address: SocketAddr,
    bound: Duration,
) -> Result<Channel, Error> {
    let live = live.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (live, accept) = (live.clone(), accept.clone());
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(TokioIo::new(live.connect(&accept, &[ALPN_H2], stream).await?))
        }
    });
    // The address in the URI is for the :authority header only.
    Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(bound)
        .buffer_size(WAITING_MAX)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
}
