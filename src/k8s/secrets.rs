//! Secrets by name, on demand. They are never listed or watched (a list returns every content of a namespace). Only the
//! first read is waited for; later ones happen beside the turns, so that a slow API server delays no failover.

use super::{API_CALL_MAX, Error, bounded, cache::kept};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Who notices that a Secret has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noticed {
    /// The members' agents, to whom kubelet brings it within 90 s: they say so, and it is read.
    ByAgents,
    /// Nobody. It is read every twenty minutes, and whenever the resource changes.
    ByReading,
}

impl Noticed {
    /// How long a Secret that was read is taken for current.
    fn age_max(self) -> Duration {
        match self {
            // For one that was deleted, and of which agents therefore hear nothing.
            Noticed::ByAgents => Duration::from_secs(6 * 3_600),
            // A cluster has two of them: one read in ten minutes.
            Noticed::ByReading => Duration::from_secs(1_200),
        }
    }
}

/// How long a Secret is taken for absent: somebody is about to make it.
const ABSENT_AGE_MAX: Duration = Duration::from_secs(60);

/// Shortest time between two reads of a Secret that fails or is doubted: twice the bound of a call, so that there is never
/// more than one under way and a login that is refused at every look costs the API server nothing.
const READ_AGAIN: Duration = Duration::from_secs(10);

/// How long a first read that failed is not tried again: long enough that turns go on meanwhile, short enough that nobody
/// who has just created a cluster notices.
const FAILED_AGAIN: Duration = Duration::from_secs(3);

/// The Secrets of one namespace that one cluster's task uses.
pub struct SecretCache {
    api: Api<Secret>,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

/// What was read of a Secret.
struct Known {
    /// What was there; `None`: nobody could tell yet.
    secret: Option<Option<Arc<Secret>>>,
    /// When it was last asked for, or written.
    asked_at: Instant,
    /// When it is to be read again.
    due: Instant,
}

impl SecretCache {
    /// An empty cache over `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        SecretCache { api: Api::namespaced(client, namespace), known: Arc::default() }
    }

    /// The Secret of this name, `None` if there is none. If it is due to be read again, that begins, and what was
    /// known before is the answer meanwhile.
    ///
    /// # Errors
    /// As [`bounded`], if it has never been read.
    pub async fn get(&self, name: &str, noticed: Noticed) -> Result<Option<Arc<Secret>>, Error> {
        let now = Instant::now();
        let known = {
            let mut all = lock(&self.known);
            match all.get_mut(name) {
                Some(Known { secret: None, due, .. }) if now < *due => {
                    let what = format!("get Secret/{name}: it failed a moment ago");
                    return Err(Error::Ambiguous { what, source: None });
                }
                Some(Known { secret: None, .. }) | None => None,
                Some(Known { secret: Some(secret), asked_at, due }) => {
                    let is_due = now >= (*due).min(*asked_at + noticed.age_max());
                    if is_due {
                        (*asked_at, *due) = (now, now + READ_AGAIN);
                    }
                    Some((secret.clone(), is_due))
                }
            }
        };
        let read = read(self.api.clone(), Arc::clone(&self.known), name.to_owned(), now);
        match known {
            Some((secret, false)) => Ok(secret),
            Some((secret, true)) => {
                tokio::spawn(async move {
                    if let Err(error) = read.await {
                        tracing::warn!(error = super::chain(&error), "a Secret could not be read again");
                    }
                });
                Ok(secret)
            }
            None => {
                let fresh = Known { secret: None, asked_at: now, due: now };
                lock(&self.known).insert(name.to_owned(), fresh);
                let answer = read.await;
                if answer.is_err()
                    && let Some(known) = lock(&self.known).get_mut(name)
                {
                    known.due = Instant::now() + FAILED_AGAIN;
                }
                answer
            }
        }
    }

    /// Takes in the answer of a write of this process.
    pub fn written(&self, name: &str, secret: Secret) {
        lock(&self.known).insert(name.to_owned(), Known::read(Some(kept(&secret)), Instant::now()));
    }

    /// Takes in that this process had it deleted; `left` is what is left of it while someone holds it.
    pub fn deleted(&self, name: &str, left: Option<Secret>) {
        lock(&self.known).insert(name.to_owned(), Known::read(left.as_ref().map(kept), Instant::now()));
    }

    /// There is reason to think that a Secret changed: all are read again, each as soon as its last read is not recent.
    pub fn doubt(&self) {
        for known in lock(&self.known).values_mut() {
            known.due = known.due.min(known.asked_at + READ_AGAIN);
        }
    }

    /// There is reason to think that a Secret goes: it is read again once a read that may be under way has ended.
    pub fn doubt_one(&self, name: &str) {
        if let Some(known) = lock(&self.known).get_mut(name) {
            known.due = known.due.min(known.asked_at + API_CALL_MAX);
        }
    }
}

impl Known {
    fn read(secret: Option<Arc<Secret>>, asked_at: Instant) -> Known {
        let age_max = if secret.is_some() { Noticed::ByAgents.age_max() } else { ABSENT_AGE_MAX };
        Known { secret: Some(secret), asked_at, due: asked_at + age_max }
    }
}

async fn read(
    api: Api<Secret>,
    known: Arc<Mutex<HashMap<String, Known>>>,
    name: String,
    asked_at: Instant,
) -> Result<Option<Arc<Secret>>, Error> {
    let secret = bounded(&format!("get Secret/{name}"), api.get_opt(&name)).await?.as_ref().map(kept);
    let mut all = lock(&known);
    // A write of this process meanwhile is later than what was asked for before it.
    if all.get(&name).is_none_or(|k| k.asked_at == asked_at) {
        all.insert(name, Known::read(secret.clone(), asked_at));
    }
    Ok(secret)
}

fn lock(known: &Mutex<HashMap<String, Known>>) -> MutexGuard<'_, HashMap<String, Known>> {
    // Never held across an await, and every change under it is one step.
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Router, response::IntoResponse};
    use std::sync::atomic::{AtomicU32, Ordering};

    const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

    /// An API server that answers each Secret with the number of the request, or not at all when it is told to hang.
    async fn api_server(asked: Arc<AtomicU32>, hangs: Arc<AtomicU32>) -> Client {
        let answer = move || {
            let (asked, hangs) = (asked.clone(), hangs.clone());
            async move {
                let version = asked.fetch_add(1, Ordering::SeqCst) + 1;
                if hangs.load(Ordering::SeqCst) > 0 {
                    std::future::pending::<()>().await;
                }
                let secret = serde_json::json!({
                    "apiVersion": "v1", "kind": "Secret",
                    "metadata": { "name": "s", "namespace": "n", "resourceVersion": version.to_string() },
                });
                (JSON, secret.to_string()).into_response()
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await });
        Client::try_from(kube::Config::new(url)).unwrap()
    }

    fn make_due(cache: &SecretCache) {
        for known in lock(&cache.known).values_mut() {
            known.due = Instant::now();
        }
    }

    async fn version(cache: &SecretCache) -> Option<String> {
        cache.get("s", Noticed::ByReading).await.unwrap().and_then(|s| s.metadata.resource_version.clone())
    }

    #[tokio::test]
    async fn only_the_first_read_is_waited_for() {
        let (asked, hangs) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let cache = SecretCache::new(api_server(asked.clone(), hangs.clone()).await, "n");
        assert_eq!(version(&cache).await.as_deref(), Some("1"));
        hangs.store(1, Ordering::SeqCst);
        make_due(&cache);
        let begun = Instant::now();
        assert_eq!(version(&cache).await.as_deref(), Some("1"));
        assert!(begun.elapsed() < super::super::API_CALL_MAX / 2, "it did not wait for the second read");
        hangs.store(0, Ordering::SeqCst);
        make_due(&cache);
        while version(&cache).await.as_deref() == Some("1") {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn doubts_at_every_look_ask_once() {
        let (asked, hangs) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let cache = SecretCache::new(api_server(asked.clone(), hangs).await, "n");
        for _ in 0..50 {
            cache.doubt();
            assert_eq!(version(&cache).await.as_deref(), Some("1"));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_write_is_later_than_a_read_that_began_before_it() {
        let (asked, hangs) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let cache = SecretCache::new(api_server(asked, hangs).await, "n");
        version(&cache).await;
        let began = Instant::now();
        let mut written = Secret::default();
        written.metadata.resource_version = Some("99".into());
        cache.written("s", written);
        read(cache.api.clone(), cache.known.clone(), "s".into(), began).await.unwrap();
        assert_eq!(version(&cache).await.as_deref(), Some("99"));
    }
}
