//! Secrets by name, on demand. They are never listed or watched (a list returns every content of a namespace); instead
//! each is read again at most once in [`SECRET_AGE_MAX`], or when someone has reason to think that it changed.

use super::{Error, bounded};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// How long a Secret that was read is taken for current. A password that someone changed shows at once as a refused
/// login, which asks again; a minute is for what shows in no other way.
pub const SECRET_AGE_MAX: Duration = Duration::from_secs(60);

/// The Secrets of one namespace that one cluster's task uses.
pub struct SecretCache {
    api: Api<Secret>,
    known: Mutex<HashMap<String, Read>>,
}

/// When a Secret was read, and what was there.
type Read = (Instant, Option<Arc<Secret>>);

impl SecretCache {
    /// An empty cache over `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        SecretCache { api: Api::namespaced(client, namespace), known: Mutex::default() }
    }

    /// The Secret of this name, `None` if there is none. At most [`SECRET_AGE_MAX`] old.
    ///
    /// # Errors
    /// As [`bounded`].
    pub async fn get(&self, name: &str) -> Result<Option<Arc<Secret>>, Error> {
        let mut known = self.known.lock().await;
        if let Some((read_at, secret)) = known.get(name)
            && read_at.elapsed() < SECRET_AGE_MAX
        {
            return Ok(secret.clone());
        }
        let secret = bounded(&format!("get Secret/{name}"), self.api.get_opt(name)).await?.map(Arc::new);
        known.insert(name.to_owned(), (Instant::now(), secret.clone()));
        Ok(secret)
    }

    /// Takes in the answer of a write of this process.
    pub async fn written(&self, name: &str, secret: Secret) {
        self.known.lock().await.insert(name.to_owned(), (Instant::now(), Some(Arc::new(secret))));
    }

    /// Forgets everything: the next reads go to the server.
    pub async fn forget(&self) {
        self.known.lock().await.clear();
    }
}
