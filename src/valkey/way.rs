//! How a server is reached. The operator goes through the member's agent: the server's own port is its clients', and may be closed or
//! served by somebody else.

use super::{Error, Target};
use async_trait::async_trait;
use std::net::SocketAddr;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// A stream to a server.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to a server.
pub struct Opened {
    /// What leads to it.
    pub stream: Box<dyn Stream>,
    /// Whoever opened it has logged the operator in.
    pub logged_in: bool,
}

/// A way to servers.
#[async_trait]
pub trait Way: Send + Sync {
    /// Connects to the server of this target. Unbounded: the caller has the bound.
    ///
    /// # Errors
    /// [`Error::NoServer`] and [`Error::Refused`] are told apart: the first is said by whoever runs the server.
    async fn open(&self, target: Target) -> Result<Opened, Error>;
}

/// The server's own port.
pub struct Direct;

#[async_trait]
impl Way for Direct {
    async fn open(&self, target: Target) -> Result<Opened, Error> {
        Ok(Opened { stream: Box::new(connected(target.socket()).await?), logged_in: false })
    }
}

/// A connection over TCP.
pub(crate) async fn connected(address: SocketAddr) -> Result<TcpStream, Error> {
    let stream = TcpStream::connect(address).await.map_err(|error| Error::of_io(&error))?;
    stream.set_nodelay(true).map_err(|error| Error::of_io(&error))?;
    Ok(stream)
}
