//! The operator's ear: takes news over mutual TLS, keeps the newest, and confirms if it is told to.

use super::support::PATIENCE;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use prost::Message;
use std::{convert::Infallible, sync::Arc};
use tokio::{net::TcpListener, sync::watch};
use valkeeper_agent::{
    proto,
    tls::{ALPN_HTTP1, Accept, Live},
};

pub struct Desk {
    pub address: String,
    newest: watch::Receiver<proto::AgentState>,
    confirm: watch::Sender<bool>,
}

struct Clerk {
    newest: watch::Sender<proto::AgentState>,
    confirm: watch::Receiver<bool>,
}

impl Desk {
    pub async fn open(identity: &Live) -> Desk {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (newest, seen) = watch::channel(proto::AgentState::default());
        let (confirm, wanted) = watch::channel(false);
        let clerk = Arc::new(Clerk { newest, confirm: wanted });
        let identity = identity.clone();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let Ok(secured) = identity.accept(&Accept::AnyMember, &[ALPN_HTTP1], stream).await else {
                    continue;
                };
                let clerk = clerk.clone();
                let serve = service_fn(move |request| take(clerk.clone(), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(secured), serve));
            }
        });
        Desk { address, newest: seen, confirm }
    }

    /// Awaits news of which `holds` is true.
    pub async fn heard(&self, what: &str, holds: impl FnMut(&proto::AgentState) -> bool) {
        let mut newest = self.newest.clone();
        let heard = tokio::time::timeout(PATIENCE, newest.wait_for(holds)).await;
        assert!(heard.is_ok_and(|heard| heard.is_ok()), "waited {PATIENCE:?} for news of {what}");
    }

    /// Whether it confirms who asks.
    pub fn confirm(&self, whether: bool) {
        self.confirm.send_replace(whether);
    }
}

async fn take(clerk: Arc<Clerk>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let news = proto::News::decode(body).unwrap();
    clerk.newest.send_replace(news.state.unwrap());
    let reply = proto::NewsReply { confirmed: news.confirm && *clerk.confirm.borrow(), epoch: 1 };
    Ok(Response::new(Full::new(Bytes::from(reply.encode_to_vec()))))
}
