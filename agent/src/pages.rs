//! Probes and metrics over plain HTTP, for agents and for the operator: kubelet and Prometheus have no certificate, so anybody may come, and
//! nobody gets to stay.

use crate::limits::PerKey;
use axum::Router;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tower::Service;

/// Connections at a time: kubelet and a few scrapers. Beyond it, who comes waits.
const CONNECTIONS_MAX: usize = 64;
/// Of them from one address. Beyond it, who comes is sent away.
const OF_ONE_ADDRESS_MAX: usize = 16;
/// Bound on a request's arrival: kubelet sends it with the connection, and whoever does not must not keep the place of who does.
const HEADER_TIMEOUT: Duration = Duration::from_millis(300);
/// What of a request is kept in memory: the headers of a scraper are a few hundred bytes. By itself the library takes 400 KiB.
const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// The same of somebody who is known: the least that the library takes.
const KNOWN_BYTES_MAX: usize = 8 * 1024;
/// Bound on a connection: a probe's own bound is a few seconds, and a page is made within one.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a connection could not be taken (no more descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves for ever: one request for each connection, and a bound on both.
pub async fn serve(listener: TcpListener, routes: Router) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let addresses = PerKey::<IpAddr>::new(OF_ONE_ADDRESS_MAX);
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Some(place) = addresses.enter(peer.ip()) else {
            tracing::debug!(%peer, "too many connections for probes or metrics");
            continue;
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).keep_alive(false);
            http.max_buf_size(REQUEST_BYTES_MAX);
            let served = http.serve_connection(TokioIo::new(stream), service);
            if tokio::time::timeout(CONNECTION_TIMEOUT, served).await.is_err() {
                tracing::debug!("a connection for probes or metrics was too slow");
            }
            drop((permit, place));
        });
    }
}

/// Serves requests over one connection, one after the other, until its other end or an error ends it. Whoever is at the other end is known:
/// `who` is an extension of every request, and the bounds are the caller's.
pub async fn serve_known<W>(stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router, who: W)
where
    W: Clone + Send + Sync + 'static,
{
    let answer = move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(who.clone());
        routes.clone().call(request)
    };
    let mut http = http1::Builder::new();
    http.max_buf_size(KNOWN_BYTES_MAX);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service_fn(answer)).await {
        tracing::debug!(%error, "a connection was ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use std::{net::SocketAddr, time::Instant};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpSocket, TcpStream},
    };

    /// A connection from this address.
    async fn from(address: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((address, 0))).unwrap();
        socket.connect(to).await.unwrap()
    }

    async fn answer(mut stream: TcpStream) -> String {
        let mut text = String::new();
        let asked = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let _ = asked.map(|()| stream.read_to_string(&mut text)).unwrap().await;
        text
    }

    #[tokio::test]
    async fn requests_that_never_end_keep_nobody_else_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Router::new().route("/healthz", get(|| async { "ok\n" }))));
        let mut half = Vec::new();
        for _ in 0..700 {
            let mut stream = from([127, 0, 0, 2], to).await;
            // Who is sent away may hear of it only now.
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nX: ").await;
            half.push(stream);
        }
        let begun = Instant::now();
        assert!(answer(from([127, 0, 0, 3], to).await).await.ends_with("ok\n"));
        assert!(begun.elapsed() < HEADER_TIMEOUT, "it waited for them: {:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_request_without_end_is_not_kept_in_memory() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Router::new()));
        let mut stream = from([127, 0, 0, 2], to).await;
        let mut sent = 0;
        let more = [b'x'; 4_096];
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nX: ").await;
        // What the kernel takes on its own is not counted: it refuses once the connection has been reset.
        while sent < 64 << 20 && stream.write_all(&more).await.is_ok() {
            sent += more.len();
        }
        assert!(sent < 64 << 20, "all of it was taken");
    }
}
