//! Waits when the API server says that it is too busy, as long as it says, and asks again. Only that: 429 is said before a
//! request is looked at, so nothing was done. No other answer is as certain.

use crate::k8s::API_CALL_MAX;
use axum::http::{HeaderMap, Request, Response, StatusCode, header::RETRY_AFTER};
use kube::{Client, client::Body};
use std::time::Duration;
use tokio::time::Instant;

/// Longest time from the first attempt to the last, waiting included. A second before the call is given up: whoever is still not let in by
/// then hears so, and knows that nothing was done, instead of an attempt that is cut off and leaves it open.
const PATIENCE_MAX: Duration = API_CALL_MAX.saturating_sub(Duration::from_secs(1));

/// Wait when the server does not say how long: what it usually says.
const UNTOLD_WAIT: Duration = Duration::from_secs(1);

/// A client that waits when it is told to.
pub(super) fn patient(client: Client, namespace: &str) -> Client {
    let service = tower::service_fn(move |request: Request<Body>| send(client.clone(), request));
    Client::new(service, namespace)
}

async fn send(client: Client, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
    let end = Instant::now() + PATIENCE_MAX;
    let (parts, mut body) = request.into_parts();
    loop {
        let again = body.try_clone();
        let answer = client.send(Request::from_parts(parts.clone(), body)).await?;
        let due = Instant::now() + told_to_wait(answer.headers());
        match again {
            Some(again) if answer.status() == StatusCode::TOO_MANY_REQUESTS && due <= end => {
                tokio::time::sleep_until(due).await;
                body = again;
            }
            Some(_) | None => return Ok(answer),
        }
    }
}

fn told_to_wait(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    seconds.map_or(UNTOLD_WAIT, |seconds| Duration::from_secs(seconds.into()))
}
