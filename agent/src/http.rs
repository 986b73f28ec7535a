//! Probes and metrics, over plain HTTP: kubelet and Prometheus have no certificate. Nothing here changes anything.

use crate::{
    metrics, service,
    shared::{Agent, Known},
};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use std::{io, sync::Arc, time::Duration};
use tokio::sync::Semaphore;
use valkeeper_agent::pages;
use valkeeper_core::{info::RawRole, observation::Link};

/// Port of probes and metrics.
const HTTP_PORT: u16 = 9121;
/// How long a server may be missing before kubelet starts the pod's container anew: longer than any pause between two
/// restarts, so that only an agent that has failed is ended.
const MISSING_MAX: Duration = Duration::from_secs(30);
/// How long a server may answer nothing at all while it is not loading. A command that blocks for longer than this is
/// indistinguishable from a hang; the operator has judged the silence long before.
const SILENT_MAX: Duration = Duration::from_secs(60);

/// Pages of metrics at a time, each of which asks the server: a few scrapers. Who comes beyond it comes again.
const PAGES_MAX: usize = 4;
/// Serves, from when this returns.
pub async fn serve(agent: Arc<Agent>) -> io::Result<()> {
    let listener = service::listen(agent.config.args.http_listen, HTTP_PORT).await?;
    let pages = Arc::new(Semaphore::new(PAGES_MAX));
    let routes = Router::new()
        .route("/startupz", get(|State(agent): State<Arc<Agent>>| async move { probe(agent.read(started)) }))
        .route("/readyz", get(|State(agent): State<Arc<Agent>>| async move { probe(agent.read(ready)) }))
        .route("/livez", get(|State(agent): State<Arc<Agent>>| async move { probe(agent.read(alive)) }))
        .route("/metrics", get(move |State(agent): State<Arc<Agent>>| metrics_page(agent, pages.clone())))
        .with_state(agent);
    tokio::spawn(pages::serve(listener, routes));
    Ok(())
}

fn probe(result: Result<&'static str, &'static str>) -> (StatusCode, String) {
    match result {
        Ok(text) => (StatusCode::OK, format!("{text}\n")),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, format!("{text}\n")),
    }
}

async fn metrics_page(agent: Arc<Agent>, pages: Arc<Semaphore>) -> Response {
    let Ok(_permit) = pages.try_acquire() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many at a time\n").into_response();
    };
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::page(&agent).await).into_response()
}

/// The server accepts connections: also while it loads, and at the gate.
fn started(known: &Known) -> Result<&'static str, &'static str> {
    if known.info.is_some() { Ok("the server answers") } else { Err("the server does not answer yet") }
}

/// The server serves what its role promises.
fn ready(known: &Known) -> Result<&'static str, &'static str> {
    let Some(info) = known.info.as_ref().filter(|_| known.silent_since.is_none()) else {
        return Err("the server does not answer");
    };
    if info.loading {
        return Err("loading");
    }
    if known.relays {
        return Err("its clients are passed on");
    }
    let served = match &info.role {
        RawRole::Primary if known.stopped.is_some() => Err("primary, and its writes are stopped"),
        RawRole::Primary => Ok("primary"),
        RawRole::Replica { source: _, link: Link::Up } => Ok("replica"),
        RawRole::Replica { source: _, link: Link::Syncing } => Err("being synchronised"),
        RawRole::Replica { source: _, link: Link::Down } if known.is_at_gate() => Err("at the boot gate"),
        RawRole::Replica { source: _, link: Link::Down } => Err("its link is down"),
    };
    if known.listens { served } else { served.and(Err("its port is closed")) }
}

/// Nothing that a new container would not mend.
fn alive(known: &Known) -> Result<&'static str, &'static str> {
    let loading = known.info.as_ref().is_some_and(|info| info.loading);
    match known.process {
        None if known.since.elapsed() > MISSING_MAX => Err("there has been no server for 30 s"),
        Some(_) if !loading && known.last_answer.elapsed() > SILENT_MAX => Err("no answer for 60 s"),
        None | Some(_) => Ok("alive"),
    }
}
