//! News to the operator: of every change at once, and as a sign of life. One request at a time over one held connection.

use crate::shared::Agent;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    client::conn::http1::{self, SendRequest},
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use prost::Message;
use rand::Rng;
use std::time::Duration;
use tokio::{net::TcpStream, time::Instant};
use valkeeper_agent::{
    link::MESSAGE_BYTES_MAX,
    proto,
    tls::{ALPN_HTTP1, Accept},
};
use valkeeper_core::ids::WriterEpoch;

/// Between two signs of life, give or take a fifth so that a thousand agents do not speak at once.
const HEARTBEAT_PERIOD: Duration = Duration::from_secs(5);
/// Bound on connecting and on an answer.
const NEWS_TIMEOUT: Duration = Duration::from_secs(2);
/// Least pause after news: what happens meanwhile goes with the next. Not below, because a flapping member must not
/// be a load; not above, because the operator waits for the death of a server.
const NEWS_PAUSE: Duration = Duration::from_millis(5);
/// Pause after news that nobody took.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Least time between two questions for confirmation.
const CONFIRM_PAUSE: Duration = Duration::from_millis(500);
/// A confirmation older than this is missed: two rounds among peers.
const CONFIRM_AGE_MAX: Duration = Duration::from_secs(1);

/// Why news did not arrive.
#[derive(Debug, thiserror::Error)]
enum Untold {
    #[error("no answer in time")]
    Silent,
    #[error("no connection")]
    Io(#[from] std::io::Error),
    #[error("the connection broke")]
    Http(#[from] hyper::Error),
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
    #[error("the operator answers {0}")]
    Status(StatusCode),
    #[error("the answer cannot be understood")]
    Garbled,
}

struct Held {
    address: String,
    sender: SendRequest<Full<Bytes>>,
}

/// Tells for ever.
pub async fn run(agent: &Agent) {
    let mut changed = agent.changed.subscribe();
    let mut held: Option<Held> = None;
    let mut pause = NEWS_PAUSE;
    loop {
        let heartbeat = HEARTBEAT_PERIOD.mul_f64(rand::rng().random_range(0.8..1.2));
        let due = Instant::now() + heartbeat;
        tokio::time::sleep(pause).await;
        if pause != RETRY_PAUSE {
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep_until(due) => {}
                () = unconfirmed(agent) => {}
                () = agent.news_now.notified() => {}
            }
        }
        changed.mark_unchanged();
        let sent = Instant::now();
        pause = match tell(agent, &mut held).await {
            Ok(()) => NEWS_PAUSE,
            Err(error) => {
                tracing::debug!(error = %error, "news did not arrive");
                held = None;
                agent.update(|known| {
                    // Whoever has spoken since is not away.
                    if known.operator_heard <= sent {
                        known.unanswered_since.get_or_insert(sent);
                    }
                });
                RETRY_PAUSE
            }
        };
    }
}

/// Whether the grant has not been confirmed for a while.
fn needs_confirmation(agent: &Agent) -> bool {
    let now = agent.at(Instant::now());
    let age_max_ms = i64::try_from(CONFIRM_AGE_MAX.as_millis()).unwrap_or(i64::MAX);
    agent.read(|known| {
        known.unconfirmed().is_some_and(|held| now.millis_since(held.confirmed_at()) >= age_max_ms)
    })
}

/// Returns when the operator must be asked.
async fn unconfirmed(agent: &Agent) {
    loop {
        tokio::time::sleep(CONFIRM_PAUSE).await;
        if needs_confirmation(agent) {
            return;
        }
    }
}

async fn tell(agent: &Agent, held: &mut Option<Held>) -> Result<(), Untold> {
    let Some(address) = agent.read(|known| known.news_address.clone()) else {
        return Ok(());
    };
    let confirm = needs_confirmation(agent);
    let grant = agent.read(|known| known.ledger.brief.grant);
    let news = proto::News {
        namespace: agent.config.namespace.clone(),
        cluster: agent.config.args.cluster.clone(),
        member: agent.me().to_string(),
        state: Some(agent.state()),
        confirm,
    };
    let sent = Instant::now();
    let told = tokio::time::timeout(NEWS_TIMEOUT, post(agent, held, address, news));
    let proto::NewsReply { confirmed, epoch } = told.await.unwrap_or(Err(Untold::Silent))?;
    if WriterEpoch(epoch) < agent.read(|known| known.ledger.epoch) {
        // One that was deposed and does not know it yet.
        return Ok(());
    }
    agent.heard();
    if confirm && confirmed {
        let at = agent.at(sent);
        agent.update(|known| {
            let same = known.ledger.brief.grant == grant;
            if let Some(held) = known.held.as_mut().filter(|_| same) {
                held.by_operator(at);
            }
        });
        agent.confirm_now.notify_one();
    }
    Ok(())
}

async fn post(
    agent: &Agent,
    held: &mut Option<Held>,
    address: String,
    news: proto::News,
) -> Result<proto::NewsReply, Untold> {
    // Taken out: a request that is given up must not leave its answer to the next one.
    let kept = held.take().filter(|held| held.address == address && !held.sender.is_closed());
    let mut kept = match kept {
        Some(kept) => kept,
        None => connect(agent, address).await?,
    };
    let request = Request::builder()
        .method(Method::POST)
        .uri("/v1/news")
        .header(HOST, &kept.address)
        .header(CONTENT_TYPE, "application/x-protobuf")
        .body(Full::new(Bytes::from(news.encode_to_vec())))?;
    kept.sender.ready().await?;
    let response = kept.sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(Untold::Status(response.status()));
    }
    let body =
        Limited::new(response.into_body(), MESSAGE_BYTES_MAX).collect().await.map_err(|_| Untold::Garbled)?;
    let reply = proto::NewsReply::decode(body.to_bytes()).map_err(|_| Untold::Garbled)?;
    *held = Some(kept);
    Ok(reply)
}

async fn connect(agent: &Agent, address: String) -> Result<Held, Untold> {
    let stream = TcpStream::connect(&address).await?;
    stream.set_nodelay(true)?;
    let secured = agent.live.connect(&Accept::Operator, &[ALPN_HTTP1], stream).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(secured)).await?;
    // It ends with the sender, or with the socket.
    tokio::spawn(connection);
    Ok(Held { address, sender })
}
