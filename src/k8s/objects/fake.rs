//! An API server in memory that knows ConfigMaps, and the ways in which one fails.

use axum::http::{Method, Request, Response, header::RETRY_AFTER};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

/// What becomes of the next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// 429, with these seconds to wait.
    Busy(Option<u32>),
    /// 403, as a quota says it.
    Quota,
    /// 500, and the write was made.
    ErrorAfterCommit,
    /// 500, and it was not.
    ErrorBeforeCommit,
    /// No answer ever, and the write was made.
    SilentAfterCommit,
    /// No answer ever, and it was not.
    SilentBeforeCommit,
    /// No answer ever; the write arrives when [`Server::deliver_late`] is called.
    SilentLate,
    /// An answer after this many milliseconds.
    Slow(u64),
    /// Someone sets a label just before.
    Touched,
}

#[derive(Clone)]
struct Call {
    method: Method,
    path: String,
    query: String,
    body: Value,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    version: u64,
    faults: VecDeque<Fault>,
    late: Vec<Call>,
    calls: Vec<String>,
    in_flight: usize,
    in_flight_most: usize,
    order: Vec<String>,
}

/// The server.
#[derive(Clone, Default)]
pub(super) struct Server(Arc<Mutex<State>>);

type Answer = (u16, Value);

impl Server {
    pub fn client(&self) -> Client {
        let server = self.clone();
        Client::new(tower::service_fn(move |r: Request<Body>| server.clone().answer(r)), "valkeeper")
    }

    pub fn inject(&self, fault: Fault) {
        self.0.lock().unwrap().faults.push_back(fault);
    }

    /// Writes that arrived, by method and name, in order.
    pub fn calls(&self) -> Vec<String> {
        self.0.lock().unwrap().calls.clone()
    }

    /// The most writes that were being worked on at once.
    pub fn in_flight_most(&self) -> usize {
        self.0.lock().unwrap().in_flight_most
    }

    pub fn object(&self, name: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(name).cloned()
    }

    pub fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().objects.keys().cloned().collect()
    }

    /// Names whose writes were begun, in order.
    pub fn order(&self) -> Vec<String> {
        self.0.lock().unwrap().order.clone()
    }

    /// Lets late writes arrive. Returns how many were accepted.
    pub fn deliver_late(&self) -> usize {
        let mut state = self.0.lock().unwrap();
        let late = std::mem::take(&mut state.late);
        late.into_iter().filter(|call| state.commit(call).0 < 300).count()
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect_bytes().await?;
        let call = Call {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        };
        if call.method == Method::GET {
            return Ok(response(self.0.lock().unwrap().read(&call)));
        }
        let fault = self.0.lock().unwrap().begin(&call);
        let answer = self.write(&call, fault).await;
        self.0.lock().unwrap().in_flight -= 1;
        Ok(answer)
    }

    async fn write(&self, call: &Call, fault: Option<Fault>) -> Response<Body> {
        let commit = || self.0.lock().unwrap().commit(call);
        let silent = || std::future::pending::<()>();
        match fault {
            None => response(commit()),
            Some(Fault::Touched) => {
                self.0.lock().unwrap().touch(call);
                response(commit())
            }
            Some(Fault::Slow(ms)) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                response(commit())
            }
            // As the server's own filter says it: no Status, only a header.
            Some(Fault::Busy(seconds)) => {
                let mut busy = Response::new(Body::from(b"Too many requests".to_vec()));
                *busy.status_mut() = axum::http::StatusCode::TOO_MANY_REQUESTS;
                if let Some(seconds) = seconds {
                    busy.headers_mut().insert(RETRY_AFTER, seconds.into());
                }
                busy
            }
            Some(Fault::Quota) => response(failure(403, "Forbidden")),
            Some(Fault::ErrorBeforeCommit) => response(failure(500, "InternalError")),
            Some(Fault::ErrorAfterCommit) => {
                commit();
                response(failure(500, "InternalError"))
            }
            Some(Fault::SilentBeforeCommit) => {
                silent().await;
                response(failure(500, "InternalError"))
            }
            Some(Fault::SilentAfterCommit) => {
                commit();
                silent().await;
                response(failure(500, "InternalError"))
            }
            Some(Fault::SilentLate) => {
                self.0.lock().unwrap().late.push(call.clone());
                silent().await;
                response(failure(500, "InternalError"))
            }
        }
    }
}

fn response((code, body): Answer) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string().into_bytes()));
    *response.status_mut() = axum::http::StatusCode::from_u16(code).unwrap();
    response
}

fn failure(code: u16, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": reason, "reason": reason, "code": code,
    });
    (code, status)
}

impl State {
    fn begin(&mut self, call: &Call) -> Option<Fault> {
        self.calls.push(format!("{} {}", call.method, name(call)));
        self.order.push(name(call));
        self.in_flight += 1;
        self.in_flight_most = self.in_flight_most.max(self.in_flight);
        self.faults.pop_front()
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    fn touch(&mut self, call: &Call) {
        let version = self.next_version();
        if let Some(object) = self.objects.get_mut(&name(call)) {
            object["metadata"]["labels"]["touched"] = json!(version.clone());
            object["metadata"]["resourceVersion"] = json!(version);
        }
    }

    fn read(&self, call: &Call) -> Answer {
        if let Some(object) = self.objects.get(&name(call)) {
            return (200, object.clone());
        }
        if !call.path.ends_with("/configmaps") {
            return failure(404, "NotFound");
        }
        let wanted = call.query.split('&').find_map(|part| part.strip_prefix("labelSelector="));
        let uid = wanted.and_then(|w| w.split_once("%3D").or_else(|| w.split_once('='))).map(|(_, uid)| uid);
        let is_wanted = |object: &&Value| {
            uid.is_none_or(|uid| object["metadata"]["labels"][super::JOURNAL_LABEL].as_str() == Some(uid))
        };
        let items: Vec<Value> = self.objects.values().filter(is_wanted).cloned().collect();
        (
            200,
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": self.version.to_string()}, "items": items}),
        )
    }

    fn commit(&mut self, call: &Call) -> Answer {
        let name = name(call);
        let known = self.objects.get(&name);
        let mut object = call.body.clone();
        match call.method {
            Method::POST if known.is_some() => return failure(409, "AlreadyExists"),
            Method::PUT | Method::DELETE if known.is_none() => return failure(404, "NotFound"),
            Method::PUT => {
                let versions =
                    (&object["metadata"]["resourceVersion"], &known.unwrap()["metadata"]["resourceVersion"]);
                if versions.0 != versions.1 {
                    return failure(409, "Conflict");
                }
                assert_ne!(known.unwrap()["immutable"], json!(true), "{name} is immutable");
            }
            Method::DELETE => {
                self.objects.remove(&name);
                return (
                    200,
                    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
                );
            }
            _ => {}
        }
        object["metadata"]["resourceVersion"] = json!(self.next_version());
        self.objects.insert(name, object.clone());
        (200, object)
    }
}

/// The name in the path, or in the object to be made.
fn name(call: &Call) -> String {
    match call.path.split_once("/configmaps/") {
        Some((_, name)) => name.to_owned(),
        None => call.body["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
    }
}
