//! Secrets by name, on demand. They are never listed or watched (a list returns every content of a namespace). Only the
//! first read is waited for; later ones happen beside the turns, so that a slow API server delays no failover.

use super::{Error, bounded};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How long a Secret that was read is taken for current. A password that someone changed shows at once as a refused
/// login, which asks again; a minute is for what shows in no other way.
pub const SECRET_AGE_MAX: Duration = Duration::from_secs(60);

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
    pub async fn get(&self, name: &str) -> Result<Option<Arc<Secret>>, Error> {
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
                    let is_due = now >= *due;
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
        lock(&self.known).insert(name.to_owned(), Known::read(Some(Arc::new(secret)), Instant::now()));
    }

    /// There is reason to think that a Secret changed: all are read again, each as soon as its last read is not recent.
    pub fn doubt(&self) {
        for known in lock(&self.known).values_mut() {
            known.due = known.due.min(known.asked_at + READ_AGAIN);
        }
    }
}

impl Known {
    fn read(secret: Option<Arc<Secret>>, asked_at: Instant) -> Known {
        Known { secret: Some(secret), asked_at, due: asked_at + SECRET_AGE_MAX }
    }
}

async fn read(
    api: Api<Secret>,
    known: Arc<Mutex<HashMap<String, Known>>>,
    name: String,
    asked_at: Instant,
) -> Result<Option<Arc<Secret>>, Error> {
    let secret = bounded(&format!("get Secret/{name}"), api.get_opt(&name)).await?.map(Arc::new);
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
